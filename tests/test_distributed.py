"""Two real processes with real shards give what one process gives.

All runs of two processes share one launch: starting Python twice costs more than they do.
"""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sso_lightning.checkpoint_files import check_checkpoint, read_checkpoint
from sso_lightning.errors import InputError
from sso_lightning.records import load_records

WORKER = Path(__file__).with_name("distributed_worker.py")
LORA = {"r": 4, "alpha": 8}
FSDP2 = "sso_lightning.strategies.FSDP2Strategy"
SHARDED = {"class_path": FSDP2, "init_args": {"sharded_checkpoints": True}}
CLIP = 0.04
OFFLOAD = {"class_path": FSDP2, "init_args": {"cpu_offload": True, "reshard_after_forward": False}}


def reward_config(home, model, name, batch_size, *, lora=None, **trainer):
    """The same for a reward model: two sets of pairs, of which one weighs more."""
    path = Path(config(home, model, name, batch_size, lora=lora, **trainer))
    settings = yaml.safe_load(path.read_text())
    del settings["pairs"], settings["model"]["objective"]
    sets = []
    for label, count in (("a", 6), ("b", 2)):
        file = home / f"{label}.jsonl"
        rows = [
            {"prompt": f"Name {i} birds.", "chosen": f"A wren{', so small' * i}.", "rejected": "No"}
            for i in range(count)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sets.append({"path": str(file), "weight": 3.0 if label == "b" else 1.0})
    settings["data"] = {"sets": sets, "val_sets": sets, "batch_size": batch_size}
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def save_classifier(folder, model):
    """A reward model with a head, so that no process draws one."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    made = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    torch.nn.init.normal_(made.score.weight)
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def written(jobs, folder):
    path = folder / f"jobs-{len(list(folder.glob('jobs-*')))}.json"
    path.write_text(json.dumps(jobs))
    return path


def launch(jobs, folder, forks, count=2, ranks=None):
    """Run command lines on `count` processes, one after another, as if torchrun had started them.

    Args:
        jobs: What `distributed_worker.py` reads.
        folder: Where to work.
        forks: Starts processes.
        count: How many.
        ranks: Environment of a rank, if another launcher's.
    """
    path, port = written(jobs, folder), free_port()
    torchrun = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def of_torchrun(rank):
        rank_of = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
        return {**torchrun, **rank_of, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}

    started = [
        forks.start(WORKER, path, cwd=folder, **(ranks or of_torchrun)(rank))
        for rank in range(count)
    ]
    for done in [process.wait(400) for process in started]:
        assert done.returncode == 0, done.stderr[-4000:]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main(*arguments):
    from sso_lightning.__main__ import main

    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    rows = [{"id": f"q{i}", "prompt": f"Name {i} birds."} for i in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    return folder


def config(
    home,
    model,
    name,
    batch_size,
    *,
    lora=None,
    quantize=None,
    generator=False,
    shard_size=3,
    **trainer,
):
    """A YAML file: two batches a step and a bound on the gradient that is always met."""
    settings = {
        "trainer": {
            "default_root_dir": str(home / name),
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": CLIP,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **trainer,
        },
        "model": {
            "policy": {
                "path": str(model),
                "gradient_checkpointing": bool(lora),
                "dtype": "float32",
                "quantize": quantize,
                **({"lora": lora} if lora else {}),
            },
            "objective": {
                "class_path": "SelfSteering",
                "init_args": {"base": {"class_path": "IPO", "init_args": {"beta": 5.0}}},
            },
            "optimizer": {
                "class_path": "torch.optim.AdamW",
                # a large epsilon: Adam would blow the last bits of small gradients up
                "init_args": {"lr": 0.01, "eps": 0.01},
            },
        },
        "data": {
            "queries": str(home / "train.jsonl"),
            "val_queries": str(home / "held.jsonl"),
            "batch_size": batch_size,
        },
        "checkpoint": {"every_n_steps": 1},
        "pairs": {
            "shard_size": shard_size,
            "sampler": {"class_path": "TransformersSampler", "init_args": {"max_new_tokens": 6}},
            "principles": {"class_path": "PredefinedPrinciples", "init_args": {"pick": "random"}},
        },
    }
    if generator:
        settings["model"]["generator"] = {
            "objective": {
                "class_path": "DataGenerator",
                "init_args": {"base": {"class_path": "DPO"}},
            },
            "lr": 0.02,
        }
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def rows(root, key):
    with (root / "metrics.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


def weights(root, name="last.ckpt"):
    return read_checkpoint(root / "checkpoints" / name)["state_dict"]


def iteration_end(root, epoch):
    (found,) = (root / "checkpoints").glob(f"iteration-{epoch:02d}-step-{2 * (epoch + 1)}.ckpt")
    return found


RUNS = {
    "ddp": {"strategy": "ddp"},
    "fsdp2": {"strategy": "fsdp2"},
    "sharded-lora": {"strategy": SHARDED, "lora": LORA},
    "generator-ddp": {"strategy": "ddp_find_unused_parameters_true", "generator": True},
    "generator-fsdp2": {"strategy": "fsdp2", "generator": True},
    # all queries in one shard: one of the two processes makes none, not even the first
    "stay-sharded-lora": {"strategy": "fsdp2", "lora": LORA, "shard_size": 8},
    "ddp-qlora": {"strategy": "ddp", "lora": LORA, "quantize": "4bit"},
}
MORE = {
    "ddp-lora": {"strategy": "ddp", "lora": LORA},
    "fsdp2-lora": {"strategy": "fsdp2", "lora": LORA},
    "sharded": {"strategy": SHARDED},
    "offload": {"strategy": OFFLOAD},
    "stay-sharded": {"strategy": "fsdp2"},
}
REWARD = {
    "reward-ddp": {"strategy": "ddp"},
    "reward-fsdp2": {"strategy": "fsdp2"},
    "reward-fsdp2-lora": {"strategy": SHARDED, "lora": LORA},
}
NAMES = [*RUNS, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MORE)]
STAY_SHARDED = """
from sso_lightning import sharding
sharding._fits, sharding.was = lambda root: False, sharding._fits
"""
ERRORS = """
import pytest
from sso_lightning.errors import InputError
from sso_lightning.processes import Processes
here = Processes.current()
assert here.size == 2
assert here.gather(here.rank * 10) == [0, 10]
for rank in range(2):
    with pytest.raises(InputError, match="only here"), here.together():
        if here.rank == rank:
            raise InputError("only here")
    with pytest.raises(ValueError if here.rank == rank else RuntimeError, match="bad"):
        with here.together():
            if here.rank == rank:
                raise ValueError("bad")
"""
FABRIC = """
import json, runpy
from pathlib import Path
main = runpy.run_path({example!r})["main"]
losses = main({arguments!r})
Path({out!r}).write_text(json.dumps(losses))
"""


def began(home, name, copy):
    """A copy of a run as it was after its first iteration."""
    folder = shutil.copytree(home / name, home / copy)
    shutil.rmtree(folder / "pairs/iteration-01")
    return folder


def training(home, model, runs):
    """Jobs that train."""
    jobs = []
    for name, settings in runs.items():
        if "generator" in name:
            settings = {**settings, "lora": LORA}
        path = config(home, model, name, 1, devices=2, **settings)
        job = {"argv": ["fit", "--config", path]}
        if name.startswith("stay"):
            back = {"python": "from sso_lightning import sharding; sharding._fits = sharding.was"}
            jobs += [{"python": STAY_SHARDED}, job, back]
        else:
            jobs.append(job)
    return jobs


@pytest.fixture(scope="module")
def runs(home, tiny_model, forks):
    """The runs of one process, and then those of two."""
    for name, settings in {
        "one": {},
        "one-lora": {"lora": LORA},
        "one-generator": {"lora": LORA, "generator": True},
        "one-qlora": {"lora": LORA, "quantize": "4bit"},
    }.items():
        assert main("fit", "--config", config(home, tiny_model, name, 2, **settings)) == 0
    head = save_classifier(home / "classifier", tiny_model)
    for name, lora in {"one-reward": None, "one-reward-lora": LORA}.items():
        path = reward_config(home, head, name, 2, lora=lora)
        assert main("reward", "fit", "--config", path) == 0
    jobs = training(home, tiny_model, RUNS)
    for name, settings in REWARD.items():
        path = reward_config(home, head, name, 1, devices=2, **settings)
        jobs.append({"argv": ["reward", "fit", "--config", path]})
    for name in ("fsdp2", "sharded-lora"):
        # cut within the second iteration, then continued
        path = config(home, tiny_model, f"cut-{name}", 1, devices=2, **RUNS[name])
        jobs.append({"argv": ["fit", "--config", path, "--trainer.max_steps", "3"]})
        jobs.append({"argv": ["fit", "--config", path, "--ckpt_path", "last"]})
    for name in ("one", "one-lora"):
        lora = {"lora": LORA} if "lora" in name else {}
        path = config(home, tiny_model, f"from-{name}", 1, devices=2, strategy="fsdp2", **lora)
        checkpoint = str(iteration_end(began(home, name, f"from-{name}"), 0))
        jobs.append({"argv": ["fit", "--config", path, "--ckpt_path", checkpoint]})
    path = config(home, tiny_model, "tools", 1, devices=2, **RUNS["sharded-lora"])
    checkpoint = str(home / "sharded-lora/checkpoints/last.ckpt")
    for command in (["validate"], ["predict", "--data.predict_queries", str(home / "train.jsonl")]):
        jobs.append({"argv": [*command, "--config", path, "--ckpt_path", checkpoint]})
    fabric = [
        *("--model", str(tiny_model), "--queries", str(home / "train.jsonl"), "--devices", "2"),
        *("--out", str(home / "fabric"), "--accelerator", "cpu", "--iterations", "2"),
        *("--batch-size", "1", "--lr", "0.01", "--beta", "5", "--clip", str(CLIP)),
        *("--max-new-tokens", "6", "--shard-size", "3"),
    ]
    example = str(WORKER.parent.parent / "examples/fabric_loop.py")
    names = {"example": example, "arguments": fabric, "out": str(home / "fabric.json")}
    jobs += [{"python": FABRIC.format(**names)}, {"python": ERRORS}]
    launch(jobs, home, forks)
    return home


@pytest.fixture(scope="module")
def more(runs, tiny_model, forks):
    """Further runs of two processes."""
    launch(training(runs, tiny_model, MORE), runs, forks)
    return runs


@pytest.fixture
def made(request, name):
    """The folder of all runs, the one named among them."""
    return request.getfixturevalue("more" if name in MORE else "runs")


def twin(name):
    kinds = (kind for kind in ("generator", "qlora", "lora") if kind in name)
    return next((f"one-{kind}" for kind in kinds), "one")


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one(made, name):
    """Losses, gradient norms, pairs of every iteration, final weights."""
    ours, theirs = made / name, made / twin(name)
    sets = sorted(p.parent.relative_to(theirs) for p in theirs.glob("pairs/**/manifest.json"))
    assert len(sets) == 4 if "generator" not in name else len(sets) >= 2
    for part in sets:
        one, two = load_records(theirs / part), load_records(ours / part)
        assert [(r.id, r.response_ids) for r in two] == [(r.id, r.response_ids) for r in one]
        for a, b in zip(one, two, strict=True):
            assert b.scores == pytest.approx(a.scores, abs=2e-4)
    keys = ["train/loss", "train/grad_norm", "val/loss"]
    for key in keys + (["generator/loss"] if "generator" in name else []):
        numbers = rows(theirs, key)
        assert numbers, key
        assert rows(ours, key) == pytest.approx(numbers, rel=1e-3), key
    assert max(rows(theirs, "train/grad_norm")) > CLIP, "nothing was clipped"
    expected, found = weights(theirs), weights(ours)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=2e-5, msg=key)
    start = weights(theirs, iteration_end(theirs, 0).name)
    assert any(not torch.equal(start[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", REWARD)
def test_two_processes_train_a_reward_model_as_one(runs, name):
    """Losses and held-out losses, gradient norms, the exported weights."""
    from safetensors.torch import load_file

    lora = name.endswith("lora")
    ours, theirs = runs / name, runs / ("one-reward-lora" if lora else "one-reward")
    for key in ("train/loss", "train/grad_norm", "val/loss", "val/a/margin"):
        numbers = rows(theirs, key)
        assert numbers, key
        assert rows(ours, key) == pytest.approx(numbers, rel=1e-3), key
    assert max(rows(theirs, "train/grad_norm")) > CLIP, "nothing was clipped"
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    found, expected = (load_file(root / "export" / file) for root in (ours, theirs))
    assert any("score" in key for key in found)
    assert_close(found, expected)


@pytest.mark.parametrize("name", ["fsdp2", "sharded-lora"])
def test_a_sharded_run_continues_within_an_iteration(runs, name):
    """Bit for bit, from shards of weights and moments."""
    whole, cut = weights(runs / name), weights(runs / f"cut-{name}")
    assert whole.keys() == cut.keys()
    for key, value in whole.items():
        assert torch.equal(cut[key], value), key
    assert rows(runs / f"cut-{name}", "train/loss") == rows(runs / name, "train/loss")


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=2e-5, msg=key)


@pytest.mark.parametrize("name", ["one", "one-lora"])
def test_two_processes_continue_what_one_began(runs, name):
    assert_close(weights(runs / f"from-{name}"), weights(runs / name))


@pytest.mark.parametrize("name", NAMES)
def test_one_process_continues_what_two_began(made, tiny_model, name):
    kept = {k: v for k, v in (RUNS | MORE)[name].items() if k != "strategy"}
    kept |= {"lora": LORA} if "generator" in name else {}
    path = config(made, tiny_model, f"back-{name}", 2, **kept)
    if "generator" in name:
        checkpoint = iteration_end(shutil.copytree(made / name, made / f"back-{name}"), 0)
        shutil.rmtree(made / f"back-{name}" / "pairs/iteration-00")
    else:
        checkpoint = iteration_end(began(made, name, f"back-{name}"), 0)
    assert main("fit", "--config", path, "--ckpt_path", checkpoint) == 0
    assert_close(weights(made / f"back-{name}"), weights(made / twin(name)))


@pytest.mark.parametrize("name", NAMES)
def test_exports_hold_the_trained_weights(made, name, tmp_path):
    """The folder written at the end of the run, and one made from its checkpoint."""
    from safetensors.torch import load_file

    assert main("export", made / name / "checkpoints/last.ckpt", tmp_path / "out") == 0
    file = "adapter_model.safetensors" if twin(name) != "one" else "model.safetensors"
    live, later = (load_file(f / file) for f in (made / name / "export", tmp_path / "out"))
    assert_close(live, load_file(made / twin(name) / "export" / file))
    assert live.keys() == later.keys()
    assert all(torch.equal(later[key], value) for key, value in live.items())


def test_a_damaged_shard_is_named(runs, tmp_path):
    folder = shutil.copytree(runs / "sharded-lora/checkpoints/last.ckpt", tmp_path / "last.ckpt")
    check_checkpoint(folder)
    shard = next(folder.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=f"damaged .{shard.name} has another checksum"):
        check_checkpoint(folder)


def test_predict_on_two_processes_gives_the_pairs_of_one(runs, tiny_model):
    path = config(runs, tiny_model, "tools-one", 1, lora=LORA)
    checkpoint = runs / "sharded-lora/checkpoints/last.ckpt"
    arguments = ("--config", path, "--ckpt_path", checkpoint)
    assert main("predict", *arguments, "--data.predict_queries", runs / "train.jsonl") == 0
    one, two = (load_records(runs / n / "pairs/predict") for n in ("tools-one", "tools"))
    assert [r.response_ids for r in two] == [r.response_ids for r in one]
    assert [r.policy + r.adapter for r in two] == [r.policy + r.adapter for r in one]


def test_the_fabric_example_takes_the_trainers_steps(runs, tiny_model):
    path = config(runs, tiny_model, "like-fabric", 2)
    settings = yaml.safe_load(Path(path).read_text())
    settings["model"]["optimizer"]["init_args"] = {"lr": 0.01}
    Path(path).write_text(yaml.safe_dump(settings))
    assert main("fit", "--config", path) == 0
    expected = rows(runs / "like-fabric", "train/loss")
    assert len(expected) == 4
    found = json.loads((runs / "fabric.json").read_text())
    assert found == pytest.approx(expected, rel=1e-3)
    for part in ("iteration-00", "iteration-01"):
        one, two = (load_records(runs / n / "pairs" / part) for n in ("like-fabric", "fabric"))
        assert [r.response_ids for r in two] == [r.response_ids for r in one]
    assert (runs / "fabric/export/model.safetensors").is_file()


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload"])
def test_other_strategies_are_refused_in_one_line(home, tiny_model, capsys, strategy):
    path = config(home, tiny_model, "refused", 2, strategy=strategy)
    assert main("fit", "--config", path) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: trainer"), line


def test_quantised_weights_are_not_cut(tiny_model):
    from sso_lightning.policy import LoRA, PolicyConfig, load_model
    from sso_lightning.sharding import shard

    model = load_model(PolicyConfig(str(tiny_model), lora=LoRA(r=4), quantize="4bit"))
    with pytest.raises(InputError, match="quantize cannot be sharded"):
        shard(model, mesh=None)


def slurm(rank):
    """What srun puts into the environment of a task."""
    of_job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "job"}
    of_job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    of_task = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0"}
    return {**of_job, **of_task, "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": PORT}


PORT = str(free_port())


@pytest.mark.exhaustive
def test_slurm_starts_the_processes(runs, tiny_model, forks):
    path = config(runs, tiny_model, "slurm", 1, devices=2, strategy="fsdp2")
    launch([{"argv": ["fit", "--config", path]}], runs, forks, ranks=slurm)
    assert_close(weights(runs / "slurm"), weights(runs / "one"))


@pytest.mark.exhaustive
def test_torchrun_starts_the_processes(runs, tiny_model):
    path = config(runs, tiny_model, "torchrun", 1, devices=2, strategy="fsdp2")
    jobs = written([{"argv": ["fit", "--config", path]}], runs)
    command = (
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(WORKER), str(jobs)),
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=runs, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_close(weights(runs / "torchrun"), weights(runs / "one"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_four_processes_make_the_pairs_of_one(runs, tiny_model, forks, strategy):
    """Three shards and four processes: one has nothing to do."""
    checkpoint = str(runs / "one/checkpoints/last.ckpt")
    more = ["--ckpt_path", checkpoint, "--data.predict_queries", str(runs / "train.jsonl")]
    path = config(runs, tiny_model, f"four-{strategy}", 1, devices=4, strategy=strategy)
    launch([{"argv": ["predict", "--config", path, *more]}], runs, forks, count=4)
    alone = config(runs, tiny_model, f"alone-{strategy}", 1)
    assert main("predict", "--config", alone, *more) == 0
    one, four = (load_records(runs / f"{n}-{strategy}/pairs/predict") for n in ("alone", "four"))
    assert [(r.id, r.response_ids) for r in four] == [(r.id, r.response_ids) for r in one]
