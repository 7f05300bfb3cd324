"""Bars, lines, the table of iterations, and silence."""

import csv
import json
import logging
import re

import pytest
import yaml

from sso_lightning import progress as module
from sso_lightning.progress import in_words, progress
from sso_lightning.terminal import Terminal, iteration_table


@pytest.fixture
def lines(monkeypatch):
    """What is logged, at a clock that a test moves."""
    found, now = [], [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("sso_lightning")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found, now
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_a_log_gets_a_line_a_minute_with_the_time_that_is_left(lines):
    found, now = lines
    with progress("pairs of iteration-00", 100, "queries") as advance:
        advance(0, 20)  # an earlier run had made these
        for _ in range(40):
            now[0] += 3.0
            advance(30, 0.5)
    # a minute for 10 of the 80 that were left: 70 more take seven; then 60 take six
    assert found == [
        "pairs of iteration-00: 30 of 100 queries, 10 tokens/s, 7 min left",
        "pairs of iteration-00: 40 of 100 queries, 10 tokens/s, 6 min left",
    ]


def test_quiet_says_nothing(lines):
    found, now = lines
    logging.getLogger("sso_lightning").setLevel(logging.WARNING)
    with progress("pairs", 10, "queries") as advance:
        now[0] += 100
        advance(10, 5)
    assert not found


def test_times_in_words():
    assert [in_words(s) for s in (5, 89, 91, 5000, 7300)] == [
        *("5 s", "89 s", "2 min", "83 min", "2 h 2 min")
    ]


def test_a_table_has_a_row_per_iteration():
    rows = [
        {"step": 0, "pairs/kept": 8, "pairs/gap_logp": 0.25},
        {"step": 0, "sandbox/quality": 0.4},
        {"step": 0, "train/loss": 1.0},
        {"step": 1, "train/loss": 0.5},
        {"step": 2, "sandbox/quality": 0.5},
        {"step": 2, "pairs/kept": 7, "pairs/gap_logp": ""},
        {"step": 2, "train/loss": 0.25},
    ]
    headings, cells = iteration_table(rows)
    assert headings == ["iteration", "pairs", "gap", "loss", "quality"]
    assert cells == [["0", "8", "0.25", "0.75", "0.5"], ["1", "7", "", "0.25", ""]]


def test_a_run_ends_with_its_table_or_in_silence(tiny_model, tmp_path, sso):
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Name {i} birds."}) + "\n" for i in range(4))
    )
    settings = {
        "trainer": {
            "default_root_dir": "",
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": {
                "class_path": "TensorBoardLogger",
                "init_args": {"save_dir": str(tmp_path / "events"), "name": ""},
            },
        },
        "model": {
            "policy": {"path": str(tiny_model)},
            "objective": {
                "class_path": "Contrastive",
                "init_args": {"base": {"class_path": "DPO"}},
            },
        },
        "data": {"queries": str(tmp_path / "q.jsonl"), "batch_size": 2},
        "pairs": {
            "sampler": {"class_path": "TransformersSampler", "init_args": {"max_new_tokens": 5}},
            "principles": {"class_path": "PredefinedPrinciples", "init_args": {"pick": "random"}},
        },
        "guard": {"max_truncated": 1.0},
    }
    for name, more in {
        "loud": ["--terminal.every", "1e-9"],
        "quiet": ["--terminal.quiet", "true"],
    }.items():
        settings["trainer"]["default_root_dir"] = str(tmp_path / name)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        status, out, err = sso("fit", "--config", path, *more)
        assert status == 0, err
        if name == "quiet":
            assert "iteration" not in err + out
            assert "pairs" not in err + out
        else:
            assert re.search(r"epoch 1: batch 2 of 2, loss [\d.]+, 0 s left", err)
            table = err[err.index("iteration  pairs") :].splitlines()
            assert [line.split()[:2] for line in table[1:3]] == [["0", "4"], ["1", "4"]]
            assert "Total length" not in err
            assert_tracked_as_written(tmp_path / "events" / "version_0", tmp_path / name)


def assert_tracked_as_written(events, run):
    """TensorBoard was given every number of metrics.csv and nothing else: no text, above all."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(events)).Reload()
    kinds = found.Tags()
    assert [kind for kind, tags in kinds.items() if tags and kind != "scalars"] == []
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    written = {key for row in rows for key, value in row.items() if value} - {"step", "epoch"}
    assert {*kinds["scalars"]} - {"epoch", "hp_metric"} == written
    for tag in ("train/loss", "pairs/kept", "pairs/gap_logp"):
        ours = [(int(row["step"]), float(row[tag])) for row in rows if row.get(tag)]
        theirs = [(each.step, each.value) for each in found.Scalars(tag)]
        assert [step for step, _ in theirs] == [step for step, _ in ours]
        assert [v for _, v in theirs] == pytest.approx([v for _, v in ours], rel=1e-6)


def test_a_wrong_interval_is_refused():
    from sso_lightning.errors import InputError

    with pytest.raises(InputError, match=r"terminal.every must be above 0"):
        Terminal(every=0)
