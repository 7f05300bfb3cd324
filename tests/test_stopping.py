"""A run that is told to stop, or must: what it keeps, what it says, and how it goes on."""

import csv
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
import yaml

from sso_lightning.errors import InputError
from sso_lightning.records import load_records, replace_file

USER_CODE = """
import os, random, resource, signal
import numpy as np
import torch
from lightning.pytorch import Callback
from sso_lightning.objectives import Contrastive
from sso_lightning.sampling import TransformersSampler


def kick(name, times=1):
    for _ in range(times):
        os.kill(os.getpid(), getattr(signal, name))


class KickStep(Callback):
    def __init__(self, name: str, batch: int, times: int = 1):
        self.name, self.batch, self.times = name, batch, times

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, self.batch):
            kick(self.name, self.times)


class KickRank(KickStep):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_rank == 1:
            super().on_train_batch_start(trainer, *args)


class KickValidation(Callback):
    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_validation_batch_end(self, trainer, *args):
        if trainer.current_epoch == self.epoch:
            kick("SIGTERM")


class KickSampler(TransformersSampler):
    def __init__(self, call: int, max_new_tokens: int = 6):
        super().__init__(max_new_tokens=max_new_tokens)
        self.call = call

    def sample(self, *args, **kwargs):
        self.call -= 1
        if self.call == 0:
            kick("SIGTERM")
        return super().sample(*args, **kwargs)


class Poison(Callback):
    '''Spoils the gradients of some steps and checks that nothing came of it.'''

    def __init__(self, steps: list[int]):
        self.steps, self.before = steps, None

    def state(self, module, optimizer):
        moments = {(i, k): v for i, s in enumerate(optimizer.state.values()) for k, v in s.items()}
        values = {**dict(module.named_parameters()), **moments}
        return {k: v.detach().clone() for k, v in values.items()}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step in self.steps:
            self.before = self.state(module, optimizer)
            next(p for p in module.parameters()).grad.view(-1)[0] = float("nan")

    def on_train_batch_end(self, trainer, module, *args):
        if self.before:
            after = self.state(module, trainer.optimizers[0])
            assert len(after) > len(list(module.parameters())), "no moments yet"
            assert after.keys() == self.before.keys()
            assert all(torch.equal(v, self.before[k]) for k, v in after.items())
            self.before = None


class Endless(Contrastive):
    def combine(self, losses, policy):
        return losses["query"] + torch.inf, {}  # with finite gradients


class Noisy(Contrastive):
    '''A loss that hangs on every random number generator.'''

    def combine(self, losses, policy):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return losses["query"] * noise, {"noise": torch.tensor(noise)}


class OwnSeeds(Callback):
    def on_train_start(self, trainer, module):
        if not trainer.global_step:
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(trainer.global_rank)


class DiskFull(Callback):
    def __init__(self, size: int, hook: str):
        self.hook, self.size = hook, size
        setattr(self, hook, self.fill)

    def fill(self, trainer, *args):
        if trainer.current_epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))
"""


FIT = ("-m", "sso_lightning", "fit", "--config")


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_model):
    """A folder with queries, code and a model."""
    folder = tmp_path_factory.mktemp("home")
    for name, count in (("train", 8), ("held", 3)):
        lines = [f'{{"id": "{name}{i}", "prompt": "Name {i} birds."}}\n' for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "stop_code.py").write_text(USER_CODE)
    (folder / "model").symlink_to(tiny_model)
    return folder


def config(home, root, callback=None, sampler=None, more=(), **changes):
    """Two iterations of four steps of two batches of one record (fewer if records are dropped)."""

    def own(spec):
        name, settings = spec
        return {"class_path": f"stop_code.{name}", "init_args": settings}

    settings = {
        "trainer": {
            "default_root_dir": str(root),
            "max_epochs": 2,
            "accumulate_grad_batches": 2,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [own(c) for c in (callback, *more) if c],
        },
        "model": {
            "policy": {"path": str(home / "model")},
            "objective": {
                "class_path": "Contrastive",
                "init_args": {"base": {"class_path": "IPO", "init_args": {"beta": 5.0}}},
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            # with moments at the first step of the second iteration
            "schedule": {"restart": False, "warmup": 0.0},
        },
        "data": {
            "queries": str(home / "train.jsonl"),
            "val_queries": str(home / "held.jsonl"),
            "batch_size": 1,
        },
        "pairs": {
            "sampler": own(sampler or ("KickSampler", {"call": 0})),
            "principles": {"class_path": "PredefinedPrinciples", "init_args": {"pick": "random"}},
            "shard_size": 3,
        },
    } | changes
    path = root.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def fit(home, tmp_path, monkeypatch, sso):
    """Run `fit` in this process, signals included."""
    monkeypatch.chdir(home)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]

    def call(*arguments, **spoil):
        result = sso("fit", "--config", config(home, tmp_path / "run", **spoil), *arguments)
        after = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        assert after == handlers, "signals belong to their owner again"
        return result

    return call


def rows(root):
    clock = ("seconds", "tokens_per_second")
    with (root / "metrics.csv").open() as file:
        return [
            {k: v for k, v in row.items() if v and not k.endswith(clock)}
            for row in csv.DictReader(file)
        ]


def checkpoint(root):
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(root, other):
    a, b = checkpoint(root), checkpoint(other)
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    assert rows(root) == rows(other)


@pytest.fixture(scope="module")
def whole(home, forks, tmp_path_factory):
    """The run that nothing happens to."""
    root = tmp_path_factory.mktemp("whole") / "run"
    path = config(home, root)
    done = forks.run(*FIT, path, "--checkpoint.every_n_steps", 1, cwd=home)
    assert done.returncode == 0, done.stderr
    assert checkpoint(root)["global_step"] >= 6
    return root


# ------------------------------------------------------------------------------------------ signals


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, 3])  # the first and the last batch of the second step
def test_a_stop_within_an_iteration_continues_bit_for_bit(whole, fit, tmp_path, batch):
    root = tmp_path / "run"
    status, _, err = fit(callback=("KickStep", {"name": "SIGTERM", "batch": batch}))
    assert (status, err.splitlines()[-1]) == (
        143,
        "stopped by SIGTERM; continue with --ckpt_path last",
    )
    first = len(load_records(root / "pairs" / "iteration-00"))
    assert checkpoint(root)["global_step"] == (first + 1) // 2 + 2
    assert not (root / "export").exists()
    assert not list(root.rglob(".*.tmp"))
    assert fit("--ckpt_path", "last")[0] == 0
    assert (root / "export" / "config.json").is_file()
    assert_same(root, whole)


@pytest.mark.slow
def test_a_resumed_run_never_saves_within_an_accumulation_window(whole, fit, tmp_path):
    """Right after a resume nothing was saved at this step, yet the window is open."""
    assert fit(callback=("KickStep", {"name": "SIGTERM", "batch": 2}))[0] == 143
    again = ("--ckpt_path", "last", "--checkpoint.every_n_steps", "1")
    assert fit(*again, callback=("KickStep", {"name": "SIGUSR1", "batch": 4}))[0] == 138
    for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt"):
        saved = torch.load(path, weights_only=True)
        if saved["SSODataModule"]["epoch"] == 1:
            assert saved["SSODataModule"]["batches"] % 2 == 0, path
    assert fit("--ckpt_path", "last")[0] == 0
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_stop_in_validation_ends_with_the_iterations_checkpoint(whole, fit, tmp_path, epoch):
    root = tmp_path / "run"
    assert fit(callback=("KickValidation", {"epoch": epoch}))[0] == 143
    assert len(list((root / "pairs").iterdir())) == epoch + 1
    assert sum("val/loss" in row for row in rows(root)) == epoch + 1
    assert not (root / "export").exists()
    assert fit("--ckpt_path", "last")[0] == 0
    assert (root / "export" / "config.json").is_file()
    assert_same(root, whole)


@pytest.mark.slow
@pytest.mark.parametrize("call", [2, 6])  # the second shard of the first and second iteration
def test_a_stop_while_sampling_keeps_the_shards(whole, fit, tmp_path, call):
    root = tmp_path / "run"
    status, _, err = fit(sampler=("KickSampler", {"call": call}))
    assert status == 143, err
    iteration = root / "pairs" / ("iteration-00" if call == 2 else "iteration-01")
    (shard,) = iteration.glob("*.parquet")
    written = shard.stat().st_mtime_ns
    assert (root / "checkpoints" / "last.ckpt").exists() == (call == 6)
    status, _, err = fit("--ckpt_path", "last")
    assert status == 0, err
    assert shard.stat().st_mtime_ns == written
    assert_same(root, whole)


@pytest.mark.slow
def test_exit_statuses_of_processes(home, forks, tmp_path):
    def fresh(*arguments, cwd):  # an interpreter of its own, whose end is a part of it
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=300,
        )

    # a shell reports the second as 130 too
    for times, status, run in ((1, 130, fresh), (2, -signal.SIGINT, forks.run)):
        root = tmp_path / f"run{times}"
        kick = ("KickStep", {"name": "SIGINT", "batch": 2, "times": times})
        done = run(*FIT, config(home, root, kick), cwd=home)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        steps = checkpoint(root)["global_step"]
        first = (len(load_records(root / "pairs" / "iteration-00")) + 1) // 2
        assert steps == (first + 2 if times == 1 else first)


# ------------------------------------------------------------------- random numbers and processes


def noisy(home, **policy):
    """Changes that make training hang on random numbers, which are other ones in every process."""
    settings = yaml.safe_load(config(home, home / "noisy").read_text())
    settings["model"]["objective"]["class_path"] = "stop_code.Noisy"
    settings["model"]["policy"].update(policy)
    return {"model": settings["model"], "data": settings["data"], "more": [("OwnSeeds", {})]}


@pytest.mark.slow
def test_random_numbers_go_on_bit_for_bit(home, fit, tmp_path):
    """Those of LoRA's dropout too; stopped between iterations and within one."""
    changes = noisy(home, lora={"r": 4, "alpha": 8, "dropout": 0.1})
    changes["data"]["num_workers"] = 1
    assert fit(callback=("KickValidation", {"epoch": 0}), **changes)[0] == 143
    step = ("KickStep", {"name": "SIGTERM", "batch": 2})
    assert fit("--ckpt_path", "last", callback=step, **changes)[0] == 143
    assert fit("--ckpt_path", "last", **changes)[0] == 0
    stopped = (tmp_path / "run").rename(tmp_path / "stopped")
    assert fit(**changes)[0] == 0
    assert_same(stopped, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_go_on_bit_for_bit(home, fit, forks, tmp_path):
    """Stopped by a signal to the second one, and with the two newest checkpoints damaged."""
    changes = noisy(home)
    changes["data"]["passes"] = 2
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--checkpoint.every_n_steps", "1")

    def run(name, *arguments, **others):
        """Exit statuses and stderr of two processes that are started as torchrun does."""
        path = config(home, tmp_path / name, **changes, **others)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        env = {"WORLD_SIZE": 2, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started = [
            forks.start(*FIT, path, *two, *arguments, cwd=home, LOCAL_RANK=rank, **env)
            for rank in range(2)
        ]
        done = [process.wait() for process in started]
        return [d.returncode for d in done], "".join(d.stderr for d in done)

    statuses, err = run("whole")
    assert statuses == [0, 0], err
    root = tmp_path / "run"
    kick = ("KickRank", {"name": "SIGTERM", "batch": 4})
    statuses, err = run("run", callback=kick)
    assert statuses == [143, 143], err
    first = checkpoint(tmp_path / "whole")["global_step"] // 2
    last, steps = checkpoint(root), last_steps(root)
    assert last["global_step"] == first + 3 == max(steps)
    assert (
        last["callbacks"]["RunState"]["ranks"][0]["torch"]
        .ne(last["callbacks"]["RunState"]["ranks"][1]["torch"])
        .any()
    )
    for path in (root / "checkpoints" / "last.ckpt", steps[first + 3]):
        flip(path)
    status, _, err = fit("--ckpt_path", steps[first + 2], **changes)
    assert status == 2
    assert "by 2 processes, and now there are 1" in err.splitlines()[-1]
    statuses, err = run("run", "--ckpt_path", "last")
    assert statuses == [0, 0], err
    assert err.count(f"continuing with {steps[first + 2].name}") == 1
    assert_same(root, tmp_path / "whole")


# ------------------------------------------------------------------------------ damaged checkpoints


def last_steps(root):
    """Checkpoints of a run by the optimizer step in their name."""
    files = (root / "checkpoints").glob("iteration-*.ckpt")
    return {int(path.stem.rpartition("-")[2]): path for path in files}


def flip(path):
    """Turn one bit of a weight around, which torch itself reads without a word."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    from sso_lightning.checkpoint_files import check_checkpoint
    from sso_lightning.checkpoints import newest_whole

    assert newest_whole(tmp_path / "missing") == (None, [])
    files = {}
    # the order of the clock is not that of the steps: files that were copied, say
    for name, step, clock in (("last", 6, 1), ("c", 4, 9), ("a", 9, 5), ("b", 8, 7)):
        files[name] = tmp_path / f"{name}.ckpt"
        weights = torch.arange(5000.0)
        torch.save({"state_dict": {"w": weights}, "global_step": step}, files[name])
        os.utime(files[name], (clock, clock))
    assert newest_whole(tmp_path) == (files["last"], [])
    flip(files["last"])
    read = torch.load(files["last"], weights_only=True)["state_dict"]["w"]
    assert (read != weights).sum() == 1, "torch does look, and the check may go"
    assert newest_whole(tmp_path) == (files["a"], [files["last"]])
    files["a"].write_bytes(files["a"].read_bytes()[:-100])
    assert newest_whole(tmp_path) == (files["b"], [files["last"], files["a"]])
    flip(files["b"])
    assert newest_whole(tmp_path) == (files["c"], [files["last"], files["a"], files["b"]])
    torch.save({"w": weights}, files["c"])  # whole, but no checkpoint
    found, damaged = newest_whole(tmp_path)
    assert found is None
    assert {*damaged} == {*files.values()}
    for data in (b"", b"not a checkpoint", b"PK"):
        files["c"].write_bytes(data)
        with pytest.raises(InputError, match=r"c\.ckpt is damaged or not a checkpoint"):
            check_checkpoint(files["c"])
    with pytest.raises(InputError, match="no checkpoint"):
        check_checkpoint(tmp_path)


@pytest.fixture
def spoilt(whole, tmp_path):
    """A copy of the whole run in which every checkpoint after some step is damaged."""

    def spoil(within, behind):
        root = tmp_path / "run"
        shutil.copytree(whole, root)
        first = (len(load_records(root / "pairs" / "iteration-00")) + 1) // 2
        steps = last_steps(root)
        flip(root / "checkpoints" / "last.ckpt")
        for step, path in steps.items():
            if step > within * first + behind:
                flip(path)
        return root, steps[within * first + behind]

    return spoil


def by_other_weights(root):
    path = root / "pairs" / "iteration-01" / "manifest.json"
    values = json.loads(path.read_text())
    values["identity"]["policy"] = "another"
    path.write_text(json.dumps(values))


@pytest.mark.slow
@pytest.mark.parametrize(("within", "behind"), [(0, 1), (1, 0), (1, 1)])
def test_a_damaged_checkpoint_costs_time_only(whole, fit, spoilt, within, behind):
    root, newest = spoilt(within, behind)
    replaced = (within, behind) == (1, 0)  # as if the step could not be repeated bit for bit
    if replaced:
        by_other_weights(root)
    sets = {path: path.stat().st_mtime_ns for path in (root / "pairs").rglob("*.parquet")}
    status, _, err = fit("--ckpt_path", "last")
    assert status == 0, err
    (line,) = (line for line in err.splitlines() if line.startswith("damaged in"))
    assert "last.ckpt" in line
    assert line.endswith(f"; continuing with {newest.name}")
    assert_same(root, whole)
    assert not list((root / "checkpoints").glob("*-v*.ckpt"))
    if replaced:
        old, new = (root / "pairs" / name for name in ("iteration-01.replaced-1", "iteration-01"))
        assert load_records(old) == load_records(new)
    else:
        assert sets == {p: p.stat().st_mtime_ns for p in (root / "pairs").rglob("*.parquet")}


@pytest.mark.slow
def test_what_cannot_be_continued_says_so(home, fit, spoilt, sso):
    root, newest = spoilt(1, 1)
    by_other_weights(root)
    status, _, err = fit("--ckpt_path", "last")
    assert status == 2
    assert "set that the checkpoint trains on" in err.splitlines()[-1]
    # other numbers than those of the last state must be asked for
    status, _, err = sso("validate", "--config", root.with_suffix(".yaml"), "--ckpt_path", "last")
    assert status == 2
    assert "last.ckpt" in err
    assert err.endswith(f"{newest}: give it by its name\n")
    for path in last_steps(root).values():
        path.write_bytes(path.read_bytes()[:1000])
    status, _, err = fit("--ckpt_path", "last")
    assert status == 2
    line = err.splitlines()[-1]
    assert "no checkpoint in" in line
    assert "last.ckpt" in line
    assert newest.name in line


# -------------------------------------------------------------------------------------------- SLURM


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """Job 123 of a cluster; returns the file in which its `scontrol` notes what it is asked for."""
    job = {"JOB_ID": "123", "JOB_NAME": "train", "NTASKS": "1", "NTASKS_PER_NODE": "1"}
    for key, value in {**job, "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    tools, asked = tmp_path / "bin", tmp_path / "asked"
    tools.mkdir()
    tool = tools / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return asked


@pytest.mark.slow
def test_slurm_has_a_job_again_after_its_step(whole, fit, slurm, tmp_path, monkeypatch):
    same = ("--overwrite", "true")  # the command of a batch script is the same every time
    status, _, err = fit(*same, callback=("KickStep", {"name": "SIGUSR1", "batch": 2}))
    assert status == 138, err
    assert slurm.read_text() == "requeue 123\n"
    assert "job 123 is in the queue again" in err
    assert checkpoint(tmp_path / "run")["SSODataModule"]["batches"] == 4
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert fit(*same)[0] == 0
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_slurm_ends_a_job_for_good_with_sigterm(fit, slurm):
    assert fit(sampler=("KickSampler", {"call": 2}))[0] == 143
    assert not slurm.exists()
    status, _, err = fit()
    assert status == 2
    assert "already holds a run" in err


def test_slurm_names_and_failures(slurm, monkeypatch, tmp_path, caplog):
    from sso_lightning.checkpoints import _requeue, log
    from sso_lightning.runs import is_requeued, slurm_job

    (tmp_path / ".slurm-job").write_text("123")
    assert not is_requeued(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert is_requeued(tmp_path)
    assert not is_requeued(tmp_path / "another")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "120")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert slurm_job() == "120_3"
    assert not is_requeued(tmp_path)
    monkeypatch.setattr(log, "propagate", True)
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho not allowed >&2\nexit 1\n")
    _requeue()
    assert "scontrol requeue 120_3 failed (not allowed); submit" in caplog.text
    monkeypatch.setenv("PATH", str(tmp_path))
    _requeue()
    assert "No such file" in caplog.text


# ------------------------------------------------------------------------------------------- guards


def test_a_step_that_is_not_finite_is_skipped_and_counted(fit, tmp_path):
    status, _, err = fit(callback=("Poison", {"steps": [1, 3]}))
    assert status == 0, err
    counts = [float(r["train/skipped_steps"]) for r in rows(tmp_path / "run") if "train/lr" in r]
    assert counts[:5] == [0, 1, 1, 2, 2]
    assert checkpoint(tmp_path / "run")["skipped_steps"] == 2


def test_too_many_skipped_steps_end_the_run(fit, home, tmp_path):
    endless = {
        "class_path": "stop_code.Endless",
        "init_args": {"base": {"class_path": "IPO"}},
    }
    model = {"policy": {"path": str(home / "model")}, "objective": endless}
    status, _, err = fit("--guard.max_skipped", "2", model=model)
    assert status == 2
    line = err.splitlines()[-1]
    assert line.startswith("error: 2 optimizer steps in a row had a loss or gradient")
    assert line.count("train") >= 4  # two steps of two records
    assert "Traceback" not in err
    saved = checkpoint(tmp_path / "run")
    from transformers import AutoModelForCausalLM

    # the weights are those it started with
    fresh = AutoModelForCausalLM.from_pretrained(home / "model").state_dict()
    assert saved["global_step"] == 2
    for name, value in fresh.items():
        assert torch.equal(saved["state_dict"][f"policy.{name}"], value), name
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.slow
def test_degenerate_answers_warn_or_stop(fit, tmp_path):
    bound = ("--guard.max_truncated", "0", "--trainer.max_epochs", "1")
    status, _, err = fit(*bound)
    assert status == 0
    assert "iteration-00: degenerate answers: " in err
    assert "truncated (guard.max_truncated: 0.0)" in err
    status, _, err = fit(*bound, "--guard.stop", "true", "--overwrite", "true")
    assert status == 2
    assert err.splitlines()[-1].startswith("error: iteration-00")
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_shares_of_degenerate_answers_by_hand():
    from sso_lightning.callbacks import Guard

    report = {"pairs/kept": 6, "pairs/dropped": 4, "pairs/dropped_empty_bad": 1}
    report |= {"pairs/dropped_good_equals_bad": 2, "pairs/dropped_bad_equals_original": 1}
    for kind, most in (("truncated", 0.25), ("repeating", 0.2)):
        report |= {f"pairs/{kind}_good": 0, f"pairs/{kind}_bad": most, f"pairs/{kind}_original": 0}

    def built(**bounds):
        Guard(stop=True, **bounds).on_pairs_built(None, None, [], report, "x")

    built(max_empty=0.1, max_equal=0.3, max_truncated=0.25, max_repeating=0.2)
    for bound, said in (
        ({"max_empty": 0.09}, "10% empty"),
        ({"max_equal": 0.29}, "30% equal"),
        ({"max_truncated": 0.2}, "25% truncated"),
        ({"max_repeating": 0.1}, "20% repeating"),
    ):
        with pytest.raises(InputError, match=said):
            built(**bound)
    with pytest.raises(InputError, match=r"guard\.max_equal"):
        Guard(max_equal=1.5)


# ---------------------------------------------------------------------------------------- disk full


@pytest.fixture
def disk():
    """Whatever a test limits is free again afterwards."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("disk")
def test_replace_file_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.ckpt"
    replace_file(path, b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    large = {"x": torch.zeros(10_000)}
    for data in (bytes(10_000), lambda file: torch.save(large, file)):
        with pytest.raises(InputError, match=r"a\.ckpt: cannot be written \(File too large\)"):
            replace_file(path, data)
        assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]
        assert path.read_bytes() == b"old"
    with pytest.raises(ZeroDivisionError):
        replace_file(path, lambda file: 1 / 0)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.slow
@pytest.mark.usefixtures("disk")
@pytest.mark.parametrize(
    ("size", "hook", "file"),
    [(20_000, "on_train_epoch_end", "ckpt"), (2_000, "on_train_batch_start", "metrics.csv")],
)
def test_a_full_disk_keeps_the_last_state(whole, fit, tmp_path, size, hook, file):
    root = tmp_path / "run"
    full = ("DiskFull", {"size": size, "hook": hook})
    status, _, err = fit("--checkpoint.keep", "0", callback=full)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert status == 2
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    assert f"{file}: cannot be written (File too large)" in line
    assert checkpoint(root)["epoch"] == 0
    assert not last_steps(root)
    assert fit("--ckpt_path", "last")[0] == 0
    assert_same(root, whole)
