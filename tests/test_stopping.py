"""A run that is told to stop, or must: what it keeps, what it says, and how it goes on."""

import csv
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from sso_lightning.errors import InputError
from sso_lightning.records import load_records, replace_file

USER_CODE = """
import os, resource, signal
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


class DiskFull(Callback):
    def __init__(self, size: int, hook: str):
        self.hook, self.size = hook, size
        setattr(self, hook, self.fill)

    def fill(self, trainer, *args):
        if trainer.current_epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))
"""


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


def config(home, root, callback=None, sampler=None, **changes):
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
            **({"callbacks": [own(callback)]} if callback else {}),
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
def whole(home, tmp_path_factory):
    """The run that nothing happens to."""
    root = tmp_path_factory.mktemp("whole") / "run"
    assert run_alone(home, config(home, root)).returncode == 0
    assert checkpoint(root)["global_step"] >= 6
    return root


def run_alone(home, path, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "sso_lightning", "fit", "--config", str(path), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )


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
def test_exit_statuses_of_processes(home, tmp_path):
    for times, status in ((1, 130), (2, -signal.SIGINT)):  # a shell reports the second as 130 too
        root = tmp_path / f"run{times}"
        kick = ("KickStep", {"name": "SIGINT", "batch": 2, "times": times})
        done = run_alone(home, config(home, root, kick))
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        steps = checkpoint(root)["global_step"]
        first = (len(load_records(root / "pairs" / "iteration-00")) + 1) // 2
        assert steps == (first + 2 if times == 1 else first)


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
    report |= {
        "pairs/truncated_good": 0.25,
        "pairs/truncated_bad": 0,
        "pairs/truncated_original": 0,
    }

    def built(**bounds):
        Guard(stop=True, **bounds).on_pairs_built(None, None, [], report, "x")

    built(max_empty=0.1, max_equal=0.3, max_truncated=0.25)
    for bound, said in (
        ({"max_empty": 0.09}, "10% empty"),
        ({"max_equal": 0.29}, "30% equal"),
        ({"max_truncated": 0.2}, "25% truncated"),
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
    status, _, err = fit(callback=("DiskFull", {"size": size, "hook": hook}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert status == 2
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    assert f"{file}: cannot be written (File too large)" in line
    assert fit("--ckpt_path", "last")[0] == 0
    assert_same(root, whole)
