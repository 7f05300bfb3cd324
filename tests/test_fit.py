"""Whole runs through the command line, on models of a few thousand parameters."""

import csv
import json

import pytest
import torch
import yaml

from sso_lightning.records import load_records

pytestmark = pytest.mark.slow

LORA = {"r": 4, "alpha": 8}
USER_CODE = """
from lightning.pytorch import Callback
from sso_lightning.callbacks import PairCallback
from sso_lightning.objectives import Contrastive
from sso_lightning.principles import Feature, PrincipleSource, steer


class Crash(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


class Stop(PairCallback):
    def on_pairs_built(self, trainer, pl_module, records, report, name):
        if name == "iteration-01":
            trainer.should_stop = True


class Doubled(Contrastive):
    def combine(self, losses, policy):
        return 2 * losses["query"], {"my_metric": losses["query"].detach().mean()}


class Loud(PrincipleSource):
    name = "loud"
    safety_mode = "off"

    def __init__(self, word: str = "SHOUT"):
        self.word = word

    def propose(self, queries, draw):
        feature = Feature("Volume", "loud", "quiet", f"{self.word} at them.", "Whisper.")
        return [steer([feature]) for _ in queries]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's folder with queries and a Python file of their own."""
    folder = tmp_path_factory.mktemp("home")
    for name, count in (("train", 8), ("held", 3)):
        rows = [{"id": f"{name}{i}", "prompt": f"Name {i} birds."} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "users_own.py").write_text(USER_CODE)
    return folder


def config(home, model, root, *, epochs=2, lora=None, **changes):
    """A YAML file; three steps an iteration (the last one smaller)."""
    settings = {
        "trainer": {
            "default_root_dir": str(root),
            "max_epochs": epochs,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "policy": {"path": str(model), **({"lora": lora} if lora else {})},
            "objective": {
                "class_path": "SelfSteering",
                "init_args": {"base": {"class_path": "IPO", "init_args": {"beta": 5.0}}},
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {
            "queries": str(home / "train.jsonl"),
            "val_queries": str(home / "held.jsonl"),
            "batch_size": 3,
        },
        "pairs": {
            "sampler": {"class_path": "TransformersSampler", "init_args": {"max_new_tokens": 6}},
            "principles": {"class_path": "PredefinedPrinciples", "init_args": {"pick": "random"}},
        },
    }
    for key, value in changes.items():
        at = settings
        *way, last = key.split("__")
        for part in way:
            at = at.setdefault(part, {})
        at[last] = value
    root.parent.mkdir(parents=True, exist_ok=True)
    path = root.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


def main(*arguments):
    from sso_lightning.__main__ import main

    return main([str(a) for a in arguments])


def rows(root):
    with (root / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def state(root, name="last.ckpt"):
    return torch.load(root / "checkpoints" / name, weights_only=True)["state_dict"]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.fixture(scope="module", params=[None, LORA], ids=["full", "lora"])
def whole(request, home, tiny_model, tmp_path_factory):
    """Two iterations without a break: (root, lora)."""
    root = tmp_path_factory.mktemp("whole") / "run"
    assert main("fit", "--config", config(home, tiny_model, root, lora=request.param)) == 0
    return root, request.param


# ------------------------------------------------------------------------------------------ outputs


def test_fit_writes_every_output(whole):
    root, _ = whole
    for name in ("config.yaml", "metrics.csv", "checkpoints/last.ckpt", "export/config.json"):
        if name != "export/config.json" or whole[1] is None:
            assert (root / name).is_file(), name
    for iteration in ("iteration-00", "iteration-01"):
        for part, source, count in (("", "train", 8), ("validation", "held", 3)):
            folder = root / "pairs" / iteration / part
            manifest = json.loads((folder / "manifest.json").read_text())
            assert manifest["complete"] is True
            made = load_records(folder)
            assert len(made) == manifest["report"]["pairs/kept"] <= count
            assert made
            assert all(r.id.startswith(source) and r.bad_is_instructed for r in made)
    assert len(list((root / "checkpoints").glob("iteration-0?-step-*.ckpt"))) == 2
    assert yaml.safe_load((root / "config.yaml").read_text())["trainer"]["max_epochs"] == 2
    assert not list(root.rglob("*.tmp"))
    assert not list(root.rglob("*.partial"))


def test_metrics_csv_has_the_named_columns(whole):
    table = rows(whole[0])
    named = (
        *("train/loss", "train/weight_mean", "pairs/kept", "pairs/dropped"),
        *("pairs/on_policy_good", "pairs/on_policy_bad", "pairs/gap_logp", "pairs/length_good"),
        *("pairs/length_bad", "pairs/length_original", "val/reward_accuracy", "val/reward_margin"),
    )
    counts = {key: sum(key in row for row in table) for key in named}
    assert counts.pop("train/loss") == counts.pop("train/weight_mean") == 6
    assert set(counts.values()) == {2}


def test_the_export_is_the_trained_policy_and_answers(whole, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root, lora = whole
    if lora:
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        model = PeftModel.from_pretrained(base, root / "export")
    else:
        model = AutoModelForCausalLM.from_pretrained(root / "export")
        assert_same({f"policy.{k}": v for k, v in model.state_dict().items()}, state(root))
    tokenizer = AutoTokenizer.from_pretrained(root / "export")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a bird."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.eval().generate(**ids, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]


@pytest.mark.parametrize("merge", [False, True])
def test_an_exported_checkpoint_has_the_live_policys_logits(whole, tiny_model, tmp_path, merge):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from sso_lightning.losses import IPO
    from sso_lightning.module import SSOModule
    from sso_lightning.objectives import Contrastive
    from sso_lightning.policy import LoRA, PolicyConfig

    root, lora = whole
    first = next((root / "checkpoints").glob("iteration-00-*.ckpt"))
    flags = ["--merge"] if merge else []
    assert main("export", first, tmp_path / "out", *flags) == 0
    settings = PolicyConfig(str(tiny_model), lora=LoRA(**lora) if lora else None)
    live = SSOModule(settings, Contrastive(IPO()))
    live.configure_model()
    live.load_state_dict(state(root, first.name), strict=False)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    if lora and not merge:
        loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        expected = live.policy.eval()(ids).logits
        torch.testing.assert_close(loaded.eval()(ids).logits, expected, rtol=0, atol=1e-5)
        start = AutoModelForCausalLM.from_pretrained(tiny_model).eval()(ids).logits
        assert (expected - start).abs().max() > 1e-3  # or this shows nothing


# ------------------------------------------------------------------------------------------- resume


def assert_same_course(root, other):
    """The same numbers were logged, in the same order, but for the time it took."""

    def course(folder):
        clock = ("seconds", "tokens_per_second")
        return [{k: v for k, v in row.items() if not k.endswith(clock)} for row in rows(folder)]

    assert course(root) == course(other)


def test_resume_after_an_iteration_is_bit_identical(whole, home, tiny_model, tmp_path):
    root, lora = whole
    path = config(home, tiny_model, tmp_path / "run", epochs=1, lora=lora)
    assert main("fit", "--config", path) == 0
    again = ["--trainer.max_epochs", "2", "--ckpt_path", "last"]
    assert main("fit", "--config", path, *again) == 0
    assert_same(state(tmp_path / "run"), state(root))
    assert_same_course(tmp_path / "run", root)
    assert load_records(tmp_path / "run" / "pairs" / "iteration-01") == load_records(
        root / "pairs" / "iteration-01"
    )


@pytest.mark.parametrize("step", [4, 5])  # the checkpoint is that of the step before
def test_resume_within_an_iteration_is_bit_identical(
    whole, home, tiny_model, tmp_path, monkeypatch, step
):
    root, lora = whole
    monkeypatch.chdir(home)
    crash = {"class_path": "users_own.Crash", "init_args": {"step": step}}
    kept = {"lora": lora, "checkpoint__every_n_steps": 1}
    broken = config(home, tiny_model, tmp_path / "run", trainer__callbacks=[crash], **kept)
    assert main("fit", "--config", broken) == 1
    path = config(home, tiny_model, tmp_path / "run", **kept)
    assert main("fit", "--config", path, "--ckpt_path", "last") == 0
    assert_same(state(tmp_path / "run"), state(root))
    assert_same_course(tmp_path / "run", root)


# ------------------------------------------------------------------------- validate, test, predict


def test_validate_test_and_predict_use_a_checkpoint(whole, home, tiny_model, tmp_path, sso):
    root, lora = whole
    first = next((root / "checkpoints").glob("iteration-00-*.ckpt"))
    path = config(home, tiny_model, tmp_path / "run", lora=lora)
    for command in ("validate", "test"):
        status, out, err = sso(command, "--config", path, "--ckpt_path", first)
        assert status == 0, err
        name = {"validate": "val"}.get(command, command)
        assert f"{name}/reward_accuracy" in out + err
    (folder,) = (tmp_path / "run" / "pairs").glob("validation-*")  # both read the same set
    made = load_records(folder)
    # sampled by the checkpoint, compared with the policy before training
    assert made[0].scores["policy/query/good"] != made[0].scores["reference/query/good"]

    held = home / "held.jsonl"
    status, _, err = sso(
        "predict", "--config", path, "--ckpt_path", first, "--data.predict_queries", held
    )
    assert status == 0, err
    predicted = load_records(tmp_path / "run" / "pairs" / "predict")
    assert {r.id for r in predicted} <= {"held0", "held1", "held2"}
    assert predicted
    # another checkpoint must not pass off the pairs of the first as its own
    last = root / "checkpoints" / "last.ckpt"
    status, _, err = sso(
        "predict", "--config", path, "--ckpt_path", last, "--data.predict_queries", held
    )
    assert status == 2
    assert "was made with another" in err


# ----------------------------------------------------------------------------------- offline, users


@pytest.mark.parametrize("kind", ["authors", "plain", "own"])
def test_offline_training(kind, whole, home, tiny_model, tmp_path):
    path = tmp_path / "pairs.jsonl"
    ask = {"authors": "instruction", "plain": "prompt"}.get(kind)
    contrastive = {
        "class_path": "Contrastive",
        "init_args": {"base": {"class_path": "DPO"}},
    }
    changes = {"model__objective": contrastive} if kind == "plain" else {}
    if kind == "own":
        path = whole[0] / "pairs" / "iteration-00"
    else:
        extra = {"p_system": "Be good.", "n_system": "Be bad.", "raw": "Plain."}
        lines = [
            {ask: f"Query {i}", "chosen": f"Yes {i}", "rejected": "No"}
            | (extra if kind == "authors" else {})
            for i in range(5)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"pairs": str(path), "val_pairs": str(path), "val_limit": 2, "batch_size": 3}
    made = config(home, tiny_model, tmp_path / "run", data=data, **changes)
    assert main("fit", "--config", made) == 0
    table = rows(tmp_path / "run")
    margins = [float(r["train/reward_margin_query"]) for r in table if "train/loss" in r]
    assert abs(margins[0]) < 1e-4  # against the starting policy, which it still is
    assert max(map(abs, margins[1:])) > 1e-4
    assert sum("val/reward_accuracy" in r for r in table) == 2
    stored = load_records(tmp_path / "run" / "pairs" / "offline")
    assert all("reference/query/good" in r.scores for r in stored)
    assert {r.bad_is_instructed for r in stored} == {kind != "plain"}


def test_users_own_classes_and_early_stop(home, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    path = config(
        home,
        tiny_model,
        tmp_path / "run",
        epochs=4,
        trainer__callbacks=[{"class_path": "users_own.Stop"}],
        model__objective={
            "class_path": "users_own.Doubled",
            "init_args": {"base": {"class_path": "IPO", "init_args": {"beta": 5.0}}},
        },
        pairs__principles={"class_path": "users_own.Loud", "init_args": {"word": "BELLOW"}},
    )
    assert main("fit", "--config", path) == 0
    table = rows(tmp_path / "run")
    steps = [row for row in table if "train/loss" in row]
    for row in steps:
        assert float(row["train/loss"]) == pytest.approx(2 * float(row["train/my_metric"]))
    made = load_records(tmp_path / "run" / "pairs" / "iteration-00")
    assert {r.good_principle for r in made} == {"BELLOW at them."}
    assert {r.principle_source for r in made} == {"loud"}
    # stopped in the second iteration, and the export was written all the same
    assert not (tmp_path / "run" / "pairs" / "iteration-02").exists()
    assert 3 <= len(steps) <= 6
    assert (tmp_path / "run" / "export" / "config.json").is_file()


def test_a_token_budget_changes_no_step(home, tiny_model, tmp_path):
    """One step over eight records, all in one batch or each in a batch of its own."""
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}}
    common = {"epochs": 1, "model__optimizer": sgd, "data__batch_size": 8}
    whole = config(home, tiny_model, tmp_path / "whole", **common, data__max_tokens=100_000)
    assert main("fit", "--config", whole) == 0
    split = config(home, tiny_model, tmp_path / "split", **common, data__max_tokens=1)
    assert main("fit", "--config", split, "--trainer.accumulate_grad_batches", 8) == 0
    ours, theirs = state(tmp_path / "whole"), state(tmp_path / "split")
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-6)
    steps = [
        [float(r["train/loss"]) for r in rows(tmp_path / name) if r.get("train/loss")]
        for name in ("whole", "split")
    ]
    assert len(steps[0]) == 1
    assert steps[1] == pytest.approx(steps[0])


def test_another_optimizer_has_its_own_defaults(home, tiny_model, tmp_path):
    path = config(home, tiny_model, tmp_path / "run", epochs=1, trainer__max_steps=1)
    settings = yaml.safe_load(path.read_text())
    del settings["model"]["optimizer"]
    path.write_text(yaml.safe_dump(settings))
    other = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1")
    assert main("fit", "--config", path, *other) == 0
    (group,) = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)[
        "optimizer_states"
    ][0]["param_groups"]
    assert group["weight_decay"] == 0


def test_a_budget_leaves_the_steps_of_a_run_open(home, tiny_model, tmp_path, sso):
    path = config(home, tiny_model, tmp_path / "run", data__max_tokens=100)
    status, _, err = sso("fit", "--config", path, "--model.schedule.restart", "false")
    assert status == 2
    assert "model.schedule.restart" in err
    assert "data.max_tokens" in err


# ------------------------------------------------------------------------------------ two processes


def test_two_processes_train_as_one(home, tiny_model, tmp_path, forks):
    """Two ranks with batches of 2 see together what one process with batches of 4 sees."""
    common = {"epochs": 1, "model__optimizer": {"class_path": "torch.optim.SGD"}}
    common["model__optimizer"]["init_args"] = {"lr": 0.05}
    one = config(home, tiny_model, tmp_path / "one", data__batch_size=4, **common)
    assert main("fit", "--config", one) == 0
    two = config(home, tiny_model, tmp_path / "two", data__batch_size=2, **common)
    # the first process starts the second one
    ddp = ("--trainer.devices", 2, "--trainer.strategy", "ddp")
    done = forks.run("-m", "sso_lightning", "fit", "--config", two, *ddp, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    kept = load_records(tmp_path / "one" / "pairs" / "iteration-00")
    assert len(kept) == 8, "an odd number would leave one out on two ranks"
    assert load_records(tmp_path / "two" / "pairs" / "iteration-00") == kept
    ours, theirs = state(tmp_path / "one"), state(tmp_path / "two")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5)
    for key in ("val/loss", "train/grad_norm"):  # step metrics are those of process 0
        numbers = [[float(r[key]) for r in rows(tmp_path / n) if key in r] for n in ("one", "two")]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-3), key
