# Everything runs in .venv, which `setup` makes from any Python 3.10 or newer: no other tool needed.
PYTHON ?= python3
BIN := .venv/bin
BASE := .venv/.base
READY := .venv/.ready
# processes that run tests
WORKERS ?= 2

.PHONY: setup demo test lint clean
.DEFAULT_GOAL := setup

setup: $(READY)

# what the library itself needs
$(BASE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or newer is needed; name one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $(BASE)

# and all extras that run without a GPU, with what tests need
$(READY): $(BASE)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

# two minutes for the tiny model, then SSO and its baseline side by side
demo: $(BASE)
	$(BIN)/python -m sso_lightning.sandbox.demo

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs sandbox build *.egg-info
