"""Every mistake ends with one clear line on stderr, status 2, and nothing lost."""

import json
from pathlib import Path

import pytest
import yaml

GOOD = {"id": "a", "prompt": "Name a bird."}


@pytest.fixture(scope="module")
def bare_model(tiny_model, tmp_path_factory):
    """The tiny model, its tokenizer without a chat template."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        if "chat_template" not in file.name:
            folder.joinpath(file.name).write_bytes(file.read_bytes())
    return folder


class Start:
    """A run that would work, to be spoilt in one place."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.queries = folder / "q.jsonl"
        self.void = folder / "void"
        self.void.mkdir()
        self.write(GOOD, {"id": "b", "prompt": "Name a fish."})
        self.settings = {
            "trainer": {
                "default_root_dir": str(self.run),
                "max_epochs": 1,
                "accelerator": "cpu",
                "devices": 1,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
            "model": {
                "policy": {"path": str(model)},
                "objective": {
                    "class_path": "Contrastive",
                    "init_args": {"base": {"class_path": "IPO"}},
                },
            },
            "data": {"queries": str(self.queries), "batch_size": 2},
            "pairs": {
                "sampler": {
                    "class_path": "TransformersSampler",
                    "init_args": {"max_new_tokens": 4},
                },
                "principles": {
                    "class_path": "PredefinedPrinciples",
                    "init_args": {"pick": "random"},
                },
            },
        }

    def write(self, *rows) -> None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        self.queries.write_text("\n".join(lines) + "\n")

    def set(self, key: str, value) -> None:
        at = self.settings
        *way, last = key.split(".")
        for part in way:
            at = at.setdefault(part, {})
        at[last] = value

    @property
    def config(self) -> Path:
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.settings))
        return path


@pytest.fixture
def start(tmp_path, tiny_model):
    return Start(tmp_path, tiny_model)


def assert_one_line(result, *named):
    status, _, err = result
    assert status == 2, err
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, err
    assert err.rstrip().endswith(errors[0])
    for word in named:
        assert word in errors[0], errors[0]
    return errors[0]


SPOILT = {
    "missing query file": (
        lambda s: s.queries.unlink(),
        ["data.queries", "q.jsonl"],
    ),
    "bad JSON in line 7": (
        lambda s: s.write(*[{**GOOD, "id": str(i)} for i in range(6)], '{"prompt": "Name'),
        ["q.jsonl", "line 7", "JSON"],
    ),
    "a record without a query": (
        lambda s: s.write(GOOD, {"id": "b", "answer": "A wren."}),
        ["q.jsonl", "line 2", "no query"],
    ),
    "an empty query": (
        lambda s: s.write(GOOD, {"id": "b", "prompt": "  "}),
        ["q.jsonl", "line 2", "empty"],
    ),
    "an empty file": (lambda s: s.queries.write_text(""), ["q.jsonl", "empty"]),
    "two queries with one id": (lambda s: s.write(GOOD, GOOD), ["line 2", "'a'", "line 1"]),
    "an unknown feature": (
        lambda s: s.set("pairs.principles.init_args.features", ["Accuracy", "Brilliance"]),
        ["principles.features", "'Brilliance'", "Accuracy"],
    ),
    "harmful negatives not allowed": (
        lambda s: s.set("pairs.principles.init_args.safety", "paper"),
        ["principles.safety", "allow_harmful_negatives"],
    ),
    "an unknown YAML key": (lambda s: s.set("model.policy.lorra", {"r": 4}), ["lorra"]),
    "an unknown top-level key": (lambda s: s.set("modle", {"a": 1}), ["modle"]),
    "an unknown key of the data": (lambda s: s.set("data.batchsize", 4), ["batchsize"]),
    "an unknown argument of a class": (
        lambda s: s.set("model.objective.init_args.alhpa", 0.5),
        ["alhpa"],
    ),
    "a missing class": (
        lambda s: s.set("model.objective.class_path", "no_such_module.Objective"),
        ["objective", "no_such_module.Objective"],
    ),
    "a missing short class name": (
        lambda s: s.set("model.objective.class_path", "SelfStearing"),
        ["objective", "SelfStearing"],
    ),
    "a class of another kind": (
        lambda s: s.set("model.objective.class_path", "os.system"),
        ["objective", "os.system"],
    ),
    "a wrong type": (lambda s: s.set("data.batch_size", "many"), ["batch_size", "many"]),
    "a number out of range": (lambda s: s.set("data.batch_size", 0), ["data.batch_size", "0"]),
    "a loss out of range": (
        lambda s: s.set("model.objective.init_args.base.init_args", {"beta": -1}),
        ["beta", "-1"],
    ),
    "no model folder": (
        lambda s: s.set("model.policy.path", "./no/such/model"),
        ["policy.path", "./no/such/model"],
    ),
    "an empty model folder": (
        lambda s: s.set("model.policy.path", str(s.void)),
        ["policy.path", "void"],
    ),
    "neither queries nor pairs": (
        lambda s: s.set("data", {"batch_size": 2}),
        ["data.queries", "data.pairs"],
    ),
    "both queries and pairs": (
        lambda s: s.set("data.pairs", "pairs.jsonl"),
        ["data.queries", "data.pairs"],
    ),
    "a missing validation file": (
        lambda s: s.set("data.val_queries", "nowhere.jsonl"),
        ["data.val_queries", "nowhere.jsonl"],
    ),
    "no fresh pairs every epoch": (
        lambda s: s.set("trainer.reload_dataloaders_every_n_epochs", 0),
        ["reload_dataloaders_every_n_epochs"],
    ),
}


@pytest.mark.parametrize("mistake", SPOILT)
def test_a_mistake_is_one_line_and_leaves_no_run(sso, start, mistake):
    spoil, named = SPOILT[mistake]
    spoil(start)
    assert_one_line(sso("fit", "--config", start.config), *named)
    # the folder is as it was, so the mended command works without --overwrite
    assert not start.run.exists() or not any(start.run.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--trainer.max_epoch", "3"], ["max_epoch"]),
        (["--nonsense"], ["nonsense"]),
        (["--ckpt_path", "nowhere.ckpt"], ["ckpt_path", "nowhere.ckpt"]),
        (["--ckpt_path", "last"], ["ckpt_path", "last"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    ],
    ids=lambda value: value[-1],
)
def test_wrong_arguments(sso, start, arguments, named):
    assert_one_line(sso("fit", "--config", start.config, *arguments), *named)
    assert not start.run.exists() or not any(start.run.iterdir())


def test_malformed_yaml(sso, start):
    path = start.folder / "broken.yaml"
    path.write_text("trainer: {max_epochs: 2\nmodel: [1\n")
    assert_one_line(sso("fit", "--config", path), "broken.yaml")


def test_a_tokenizer_without_a_chat_template(sso, start, bare_model):
    start.set("model.policy.path", str(bare_model))
    assert_one_line(sso("fit", "--config", start.config), "chat template", "chat_template")
    assert not start.run.exists() or not any(start.run.iterdir())


def test_no_record_left_after_cleaning(sso, start):
    # one likeliest token each: the three answers are equal, or nothing
    start.set("pairs.sampler.init_args", {"max_new_tokens": 1, "temperature": 0})
    start.write(GOOD)
    line = assert_one_line(sso("fit", "--config", start.config), "no record is left of 1 queries")
    assert any(reason in line for reason in ("equals", "empty"))


def test_a_damaged_checkpoint(sso, start):
    path = start.folder / "broken.ckpt"
    path.write_bytes(b"not a checkpoint")
    assert_one_line(sso("fit", "--config", start.config, "--ckpt_path", path), "broken.ckpt")
    assert_one_line(sso("export", path, start.folder / "out"), "broken.ckpt")
    assert_one_line(sso("export", start.folder / "no.ckpt", start.folder / "out"), "no.ckpt")
    assert not (start.folder / "out").exists()


class Trap:
    """Sets a flag when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("sprung"),))


def test_a_checkpoint_is_not_unpickled(sso, start, tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "trap.ckpt"
    torch.save({"state_dict": {}, "policy": Trap(), "pytorch-lightning_version": "2.6.0"}, path)
    assert_one_line(sso("fit", "--config", start.config, "--ckpt_path", path), "trap.ckpt")
    assert_one_line(sso("export", path, tmp_path / "out"), "trap.ckpt")
    assert not (tmp_path / "sprung").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    """A finished run, and the command that made it."""
    from sso_lightning.__main__ import main

    start = Start(tmp_path_factory.mktemp("finished"), tiny_model)
    assert main(["fit", "--config", str(start.config)]) == 0
    return start


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_that_holds_a_run_is_refused(sso, finished):
    before = snapshot(finished.run)
    result = sso("fit", "--config", finished.config)
    assert_one_line(result, str(finished.run), "already holds a run", "--overwrite true")
    assert snapshot(finished.run) == before


@pytest.mark.parametrize(
    "mistake",
    [
        "missing query file",
        "bad JSON in line 7",
        "an unknown feature",
        "an unknown YAML key",
        "a missing class",
        "a number out of range",
        "no model folder",
        "an empty model folder",
        "a missing validation file",
    ],
)
def test_a_failing_start_does_not_remove_the_earlier_run(
    sso, finished, tmp_path, tiny_model, mistake
):
    before = snapshot(finished.run)
    assert {"metrics.csv", "config.yaml", "checkpoints/last.ckpt"} < {*before}
    start = Start(tmp_path, tiny_model)
    start.set("trainer.default_root_dir", str(finished.run))
    spoil, named = SPOILT[mistake]
    spoil(start)
    assert_one_line(sso("fit", "--config", start.config, "--overwrite", "true"), *named)
    assert snapshot(finished.run) == before


def test_a_model_that_does_not_load_does_not_remove_the_earlier_run(
    sso, finished, tmp_path, tiny_model
):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            folder.joinpath(file.name).write_bytes(file.read_bytes())
    before = snapshot(finished.run)
    start = Start(tmp_path, folder)
    start.set("trainer.default_root_dir", str(finished.run))
    result = sso("fit", "--config", start.config, "--overwrite", "true")
    assert_one_line(result, "policy.path", str(folder))
    assert snapshot(finished.run) == before


def test_a_good_start_with_overwrite_does(sso, finished, tmp_path, tiny_model):
    start = Start(tmp_path, tiny_model)
    start.run.mkdir()
    (start.run / "config.yaml").write_text("old: 1\n")
    (start.run / "metrics.csv").write_text("step,old\n0,1\n")
    (start.run / "notes.txt").write_text("mine")
    status, _, err = sso("fit", "--config", start.config, "--overwrite", "true")
    assert status == 0, err
    assert "old" not in (start.run / "metrics.csv").read_text()
    assert "old" not in (start.run / "config.yaml").read_text()
    assert (start.run / "notes.txt").read_text() == "mine"  # not ours to remove


def test_debug_shows_the_traceback(sso, start, monkeypatch):
    from sso_lightning.errors import InputError

    monkeypatch.setenv("SSO_DEBUG", "1")
    start.queries.unlink()
    with pytest.raises(InputError, match=r"data\.queries"):
        sso("fit", "--config", start.config)
