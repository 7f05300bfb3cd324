"""The 2025 method: a generator that makes the pairs, and a policy that learns from them."""

import csv
import itertools
import json
import shutil

import pytest
import torch
import yaml

from sso_lightning.policy import GENERATOR, POLICY
from sso_lightning.records import load_records

LORA = {"r": 4, "alpha": 8}
DPO = {"class_path": "DPO", "init_args": {"beta": 0.1}}
GENERATES = {"class_path": "DataGenerator", "init_args": {"base": DPO}}
LEARNS = {"class_path": "Contrastive", "init_args": {"base": DPO}}


def main(*arguments):
    from sso_lightning.__main__ import main

    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    rows = [{"id": f"q{i}", "prompt": f"Name {i} birds."} for i in range(9)]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(
    home, model, name, objective=LEARNS, generator=None, generator_data=None, epochs=2, **data
):
    """A YAML file; a generator phase has two steps, a policy phase three."""
    if generator_data:
        data["generator"] = generator_data
    settings = {
        "trainer": {
            "default_root_dir": str(home / name),
            "max_epochs": epochs,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "policy": {"path": str(model), "lora": LORA},
            "objective": objective,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            **({"generator": generator} if generator else {}),
        },
        "data": {"queries": str(home / "q.jsonl"), "batch_size": 3, **data},
        "pairs": {
            "sampler": {"class_path": "TransformersSampler", "init_args": {"max_new_tokens": 6}},
            "principles": {"class_path": "PredefinedPrinciples", "init_args": {"pick": "random"}},
        },
    }
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def two_phases(home, model, name, start="current", **more):
    generator = {"objective": GENERATES, "lr": 0.02, "start": start}
    of_generator = {"queries_per_iteration": 6, "passes": 1}
    return config(home, model, name, generator=generator, generator_data=of_generator, **more)


def column(root, key):
    with (root / "metrics.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


def weights(root, adapter, name="last.ckpt"):
    state = torch.load(root / "checkpoints" / name, weights_only=True)["state_dict"]
    mark = f".{adapter}."
    return {k.replace(mark, "."): v for k, v in state.items() if mark in k}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert a
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.fixture(scope="module", params=["current", "first"])
def whole(request, home, tiny_model):
    """A finished run of two iterations: four epochs of 2, 3, 2 and 3 steps."""
    name = f"whole-{request.param}"
    assert main("fit", "--config", two_phases(home, tiny_model, name, request.param, epochs=4)) == 0
    return request.param, home / name


def test_phases_alternate_and_train_one_adapter_each(whole):
    _, root = whole
    assert len(column(root, "generator/loss")) == 4
    assert len(column(root, "train/loss")) == 6
    sets = sorted(p.name for p in (root / "pairs").iterdir())
    assert sets == ["generator-00", "generator-01", "iteration-00", "iteration-01"]
    assert column(root, "generator/lr")[0] != column(root, "train/lr")[0]
    ends = sorted((root / "checkpoints").glob("iteration-*.ckpt"), key=lambda p: p.stat().st_mtime)
    after = [{a: weights(root, a, p.name) for a in (POLICY, GENERATOR)} for p in ends]
    assert len(after) == 4
    moved = [
        {a: any(not torch.equal(v, y[a][k]) for k, v in x[a].items()) for a in x}
        for x, y in itertools.pairwise(after)
    ]
    assert [m[POLICY] for m in moved] == [True, False, True]
    assert [m[GENERATOR] for m in moved] == [False, True, False]


def test_the_reference_is_where_the_trained_adapter_began(whole):
    """A first step has implicit rewards of exactly zero then: the DPO loss is log 2."""
    _, root = whole
    log2 = torch.tensor(2.0).log().item()
    for phase, first in (("generator", (0, 2)), ("train", (0, 3))):
        term = "good" if phase == "generator" else "query"
        losses = column(root, f"{phase}/loss_{term}")
        for step in first:
            assert losses[step] == pytest.approx(log2, abs=1e-6), (phase, step)
        assert losses[1] != pytest.approx(log2, abs=1e-6)


def test_the_generator_writes_the_policys_pairs(whole):
    start, root = whole
    writers = {
        name: {r.adapter for r in load_records(root / "pairs" / name)}
        for name in ("generator-00", "iteration-00", "generator-01", "iteration-01")
    }
    assert all(len(found) == 1 for found in writers.values())
    # the untrained policy, the trained generator, the trained policy, the generator trained anew
    assert len(set.union(*writers.values())) == 4
    scored = load_records(root / "pairs" / "generator-01")[0].scores
    assert any(key.startswith("reference/") for key in scored) == (start == "first")


@pytest.mark.parametrize("at", [1, 4])  # in the first generator phase and in a policy phase
def test_resume_within_a_phase_is_bit_identical(whole, home, tiny_model, at):
    start, root = whole
    name = f"again-{start}-{at}"
    path = two_phases(home, tiny_model, name, start, epochs=4)
    every = ("--checkpoint.every_n_steps", "1")
    stop = ("--trainer.max_steps", str(at))
    assert main("fit", "--config", path, *every, *stop) == 0
    assert main("fit", "--config", path, *every, "--ckpt_path", "last") == 0
    for adapter in (POLICY, GENERATOR):
        assert_same(weights(root, adapter), weights(home / name, adapter))
    for key in ("generator/loss", "train/loss"):
        assert column(home / name, key) == column(root, key)


def test_pairs_of_another_generator_are_made_anew(whole, home, tiny_model):
    """A run that goes back to its first checkpoint need not train the same generator again."""
    start, root = whole
    name = f"back-{start}"
    path = two_phases(home, tiny_model, name, start, epochs=4)
    shutil.copytree(root, home / name)
    for checkpoint in (home / name / "checkpoints").iterdir():
        if not checkpoint.name.startswith("iteration-00-"):
            checkpoint.unlink()
    manifest = home / name / "pairs" / "iteration-00" / "manifest.json"
    (writer,) = {r.adapter for r in load_records(manifest.parent)}
    manifest.write_text(manifest.read_text().replace(writer, "0" * len(writer)))
    assert main("fit", "--config", path, "--ckpt_path", "last") == 0
    assert (home / name / "pairs" / "iteration-00.replaced-1").is_dir()
    for adapter in (POLICY, GENERATOR):
        assert_same(weights(root, adapter), weights(home / name, adapter))


def test_three_commands_do_the_same(whole, home, tiny_model):
    """fit (generator), predict, fit (policy from the file) give iteration 0 of the one run."""
    start, root = whole
    if start == "first":
        pytest.skip("the first iteration is the same")
    generator = config(
        home, tiny_model, "alone", GENERATES, epochs=1, queries_per_iteration=6, passes=1
    )
    assert main("fit", "--config", generator, "--model.optimizer.lr", "0.02") == 0
    assert column(home / "alone", "train/loss") == column(root, "generator/loss")[:2]
    checkpoint = home / "alone" / "checkpoints" / "last.ckpt"
    more = ("--data.predict_queries", home / "q.jsonl", "--ckpt_path", checkpoint)
    assert main("predict", "--config", generator, *more) == 0
    pairs = home / "alone" / "pairs" / "predict"

    def answers(folder):
        return [(r.id, r.prompt_ids, r.response_ids) for r in load_records(folder)]

    assert answers(pairs) == answers(root / "pairs" / "iteration-00")
    learns = config(home, tiny_model, "learns", epochs=1, queries=None, pairs=str(pairs))
    assert main("fit", "--config", learns) == 0
    assert column(home / "learns", "train/loss") == column(root, "train/loss")[:3]
    first = sorted((root / "checkpoints").glob("iteration-01-*.ckpt"))[0].name
    assert_same(weights(home / "learns", POLICY), weights(root, POLICY, first))


def test_export_of_both(whole, home, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    _, root = whole
    checkpoint = root / "checkpoints" / "last.ckpt"
    assert main("export", checkpoint, tmp_path / "policy") == 0
    assert main("export", checkpoint, tmp_path / "generator", "--generator") == 0
    files = [root / "export", tmp_path / "policy", tmp_path / "generator"]
    live, policy, generator = (load_file(f / "adapter_model.safetensors") for f in files)
    assert_same(live, policy)
    assert any(not torch.equal(v, generator[k]) for k, v in policy.items())
    assert not (root / "export" / GENERATOR).exists()
    settings = json.loads((tmp_path / "generator" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"])
    PeftModel.from_pretrained(base, tmp_path / "generator")


def test_predict_uses_the_generator(whole, home, tiny_model):
    start, root = whole
    path = two_phases(home, tiny_model, f"whole-{start}", start, epochs=4)
    checkpoint = ("--ckpt_path", root / "checkpoints" / "last.ckpt")
    assert (
        main("predict", "--config", path, "--data.predict_queries", home / "q.jsonl", *checkpoint)
        == 0
    )
    (writer,) = {r.adapter for r in load_records(root / "pairs" / "predict")}
    (last,) = {r.adapter for r in load_records(root / "pairs" / "iteration-01")}
    assert writer == last


def test_steps_bound_a_phase(home, tiny_model):
    path = config(
        home,
        tiny_model,
        "bounded",
        generator={"objective": GENERATES},
        generator_data={"steps_per_iteration": 1},
        steps_per_iteration=2,
    )
    assert main("fit", "--config", path) == 0
    assert len(column(home / "bounded", "generator/loss")) == 1
    assert len(column(home / "bounded", "train/loss")) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model.policy.lora", "null"], ["model.generator", "model.policy.lora"]),
        (["--model.schedule.restart", "false"], ["model.generator", "model.schedule.restart"]),
        (["--model.generator.start", "last"], ["start", "last"]),
        (["--model.generator.lr", "0"], ["generator.lr", "0"]),
        (["--data.generator.batch_size", "0"], ["data.generator.batch_size", "0"]),
        (
            ["--data.generator.queries_per_iteration", "10"],
            ["data.generator.queries_per_iteration is 10", "holds 9"],
        ),
        (["--model.generator", "null"], ["data.generator", "model.generator"]),
    ],
    ids=lambda value: value[0],
)
def test_mistakes_are_named(home, tiny_model, sso, arguments, named):
    path = two_phases(home, tiny_model, "wrong")
    status, _, err = sso("fit", "--config", path, *arguments)
    assert status == 2, err
    assert len(err.splitlines()) <= 3
    for word in named:
        assert word in err.splitlines()[-1]
