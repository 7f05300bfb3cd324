"""Every shipped recipe is parsed and started, on models small enough to take seconds."""

import csv
import shutil
import sys
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from sso_lightning.evaluation import read_scores

ROOT = Path(__file__).resolve().parent.parent
# benchmarks.yaml goes beside a recipe, see test_benchmarks.py
RECIPES = [p for p in sorted((ROOT / "configs").rglob("*.yaml")) if p.stem != "benchmarks"]
LARGE = {"qwen2_7b": ("qwen2", "CHATML"), "llama31_8b": ("llama", "LLAMA3")}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A working folder as a user has it, with a sandbox trained for three steps."""
    from sso_lightning.sandbox.build import make_sandbox

    folder = tmp_path_factory.mktemp("world")
    make_sandbox(folder / "sandbox", steps=3, quiet=True)
    held_out = folder / "sandbox" / "validation.jsonl"
    held_out.write_text("".join(held_out.read_text().splitlines(keepends=True)[:2]))
    for name in ("configs", "callbacks"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


def small(recipe: Path, folder: Path, request) -> list[str]:
    """Options that make a recipe small without touching what it is about."""
    options = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    settings = yaml.safe_load(recipe.read_text())
    if settings["data"].get("queries"):
        options += ["--data.queries_per_iteration=3", "--data.batch_size=2"]
        options += ["--pairs.sampler.init_args.max_new_tokens=6"]
    if settings["model"].get("generator"):
        options += ["--trainer.max_epochs=2", "--data.generator.queries_per_iteration=3"]
    if recipe.parent.name in LARGE:
        conftest = request.config.pluginmanager.getplugin(str(ROOT / "tests" / "conftest.py"))
        architecture, template = LARGE[recipe.parent.name]
        model = folder / f"{architecture}-model"
        if not model.exists():
            conftest.save_tiny(model, architecture, getattr(conftest, template))
        options += [f"--model.policy.path={model}"]
        if recipe.stem == "reward":
            pairs = [{"path": "configs/sandbox/preferences.jsonl", "limit": 4}]
            return [*options, f"--data.sets={pairs}", f"--data.val_sets={pairs}"]
        queries = conftest.write_queries(folder / "queries.jsonl", 5)
        options += [f"--data.queries={queries}"]
    return options


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_recipe_starts(recipe, world, sso, monkeypatch, request):
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "path", [*sys.path, str(world)])
    run = world / yaml.safe_load(recipe.read_text())["trainer"]["default_root_dir"]
    command = ["reward", "fit"] if recipe.stem == "reward" else ["fit"]
    status, _, err = sso(
        *command, "--config", recipe.relative_to(ROOT), *small(recipe, world, request)
    )
    assert status == 0, err
    with (run / "metrics.csv").open() as file:
        losses = [row["train/loss"] for row in csv.DictReader(file) if row.get("train/loss")]
    assert losses
    assert (run / "export" / "tokenizer_config.json").is_file()
    if "SandboxMetrics" in recipe.read_text():
        # of the policy at the start and after its one iteration, also where a generator trains
        with (run / "metrics.csv").open() as file:
            exact = [float(q) for row in csv.DictReader(file) if (q := row.get("sandbox/quality"))]
        scores = read_scores(run)["sandbox/quality"]
        assert [*scores] == [0, 1]
        assert [fmean(own.values()) for own in scores.values()] == pytest.approx(exact)
    if recipe.stem == "pbaa_watched":
        assert "iteration-00: 3 pairs" in (run / "samples.txt").read_text()
        assert (run / "drift.txt").read_text().startswith("iteration-00:")


def test_paper_settings_of_the_large_recipes():
    for family in LARGE:
        settings = yaml.safe_load((ROOT / "configs" / family / "sso_2024.yaml").read_text())
        objective = settings["model"]["objective"]
        assert objective["class_path"] == "SelfSteering"
        assert objective["init_args"]["base"] == {"class_path": "IPO", "init_args": {"beta": 0.2}}
        assert (objective["init_args"]["alpha"], objective["init_args"]["steering"]) == (0.66, 0.1)
        assert settings["trainer"]["max_epochs"] == 3
        assert settings["pairs"]["reference"] == "previous"


def test_settings_of_the_2025_method():
    large = [yaml.safe_load((ROOT / "configs" / f / "sso_2025.yaml").read_text()) for f in LARGE]
    for settings in large:
        generator = settings["model"]["generator"]["objective"]
        assert generator["class_path"] == "DataGenerator"
        dpo = {"class_path": "DPO", "init_args": {"beta": 0.1}}
        assert generator["init_args"] == {"base": dpo, "sft": 0.1}
        assert settings["model"]["objective"]["init_args"] == {"base": dpo}
        assert settings["data"]["generator"]["queries_per_iteration"] == 8000


def test_ablations_of_the_generator_differ_in_its_terms():
    def settings(name: str) -> dict:
        text = (ROOT / "configs" / "sandbox" / f"sso_2025{name}.yaml").read_text()
        found = yaml.safe_load(text)
        del found["trainer"]["default_root_dir"]
        return found

    changes = {
        "_only_good": {"terms": "good"},
        "_only_bad": {"terms": "bad"},
        "_bad_for_original": {"terms": "bad", "bad": "bad"},
    }
    for name, change in changes.items():
        expected = settings("")
        expected["model"]["generator"]["objective"]["init_args"] |= change
        assert settings(name) == expected


def test_ablations_differ_from_sso_in_one_setting():
    def objective(name: str) -> dict:
        text = (ROOT / "configs" / "sandbox" / f"{name}.yaml").read_text()
        return yaml.safe_load(text)["model"]["objective"]

    sso = objective("sso_2024")["init_args"]
    assert objective("without_weight")["init_args"] == {**sso, "weight": False}
    assert objective("without_steering")["init_args"] == {**sso, "steering": 0.0}
    assert objective("pbaa")["init_args"] == {"base": sso["base"]}


def test_qlora_recipes_differ_in_what_they_keep_in_memory():
    for family in LARGE:
        plain, qlora = (
            yaml.safe_load((ROOT / "configs" / family / f"sso_2024{name}.yaml").read_text())
            for name in ("", "_qlora")
        )
        assert qlora["trainer"].pop("default_root_dir").endswith("-qlora")
        del plain["trainer"]["default_root_dir"]
        plain["model"]["policy"]["quantize"] = "4bit"
        plain["model"]["optimizer"]["class_path"] = "bitsandbytes.optim.PagedAdamW8bit"
        assert qlora == plain
