"""Killed runs end as if nothing had happened, and the comparison that says so can fail."""

import importlib.util
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from sso_lightning.checkpoints import RunState
from sso_lightning.records import PairStore, load_records
from sso_lightning.runs import RunLogger, SaveConfig

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "crash.py"


@pytest.fixture(scope="module")
def crash():
    """The harness, imported by its path."""
    spec = importlib.util.spec_from_file_location("crash", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["crash"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["crash"]


@pytest.fixture(scope="module")
def harness(tmp_path_factory, forks):
    """Its output after a handful of kills, and the folder of its runs."""
    work = tmp_path_factory.mktemp("crash") / "work"
    aims = ["shard write", "metrics write", "checkpoint write", "after checkpoint"]
    options = [
        *("--kills", "4", "--per-run", "4", "--seed", "1", "--configs", "accumulate"),
        *("--aim", *aims, "--work", work, "--json", work.parent / "kills.json"),
    ]
    return forks.run(PROGRAM, *options, cwd=work.parent), work


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened(harness):
    done, work = harness
    assert done.returncode == 0, done.stdout + done.stderr
    kills = json.loads((work.parent / "kills.json").read_text())
    assert len(kills) >= 4
    assert all(kill["resumed"] and kill["identical"] for kill in kills)
    assert len(Counter(kill["phase"] for kill in kills)) >= 2, "all in one phase"
    assert f"| all | {len(kills)} |" in done.stdout


@pytest.mark.slow
def test_the_comparison_notices_every_change(crash, harness, tmp_path):
    whole = harness[1] / "whole-accumulate"
    before = crash.snapshot(whole)
    assert len(before["pairs/iteration-00: ids"]) >= 4
    assert crash.differences(before, json.loads(json.dumps(before))) == []

    def changed(change) -> list[str]:
        root = tmp_path / "run"
        shutil.copytree(whole, root)
        change(root)
        found = crash.differences(before, crash.snapshot(root))
        shutil.rmtree(root)
        return found

    assert changed(lambda root: None) == []

    def weight(root):
        path = root / "checkpoints" / "last.ckpt"
        saved = torch.load(path, weights_only=True)
        name = next(iter(saved["state_dict"]))
        bits = saved["state_dict"][name].view(-1).view(torch.int32)
        bits[3] ^= 1  # the last bit of one weight
        torch.save(saved, path)

    (line,) = changed(weight)
    assert line.startswith("last.ckpt: weights/")

    def other_records(edit):
        def change(root):
            folder = root / "pairs" / "iteration-01"
            old, records = PairStore(folder), load_records(folder)
            edit(records)
            for path in (folder / "manifest.json", *folder.glob("*.parquet")):
                path.unlink()
            new = PairStore(folder, old.identity)
            for index in old.shards():
                new.write_shard(index, records[2 * index : 2 * index + 2], {})
            new.finish(old.report)

        return change

    assert changed(other_records(lambda records: None)) == []
    found = changed(other_records(lambda records: records.pop()))
    assert any(line.startswith("pairs/iteration-01: ids: ") for line in found)
    found = changed(other_records(lambda records: records.reverse()))
    assert [line.partition(": [")[0] for line in found] == ["pairs/iteration-01: ids"]

    def score(records):
        records[0].scores["policy/query/good"] += 1e-9

    (line,) = changed(other_records(score))
    assert line.startswith("pairs/iteration-01: record ")
    assert ": scores: " in line

    def cut(root, name):
        path = root / name
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:-1]))

    (line,) = changed(lambda root: cut(root, "metrics.csv"))
    assert line.startswith("metrics.csv: row ")
    assert changed(lambda root: cut(root, "config.yaml"))
    (line,) = changed(lambda root: (root / "checkpoints" / ".last.ckpt.tmp").write_text(""))
    assert line == "file checkpoints/.last.ckpt.tmp only in one of them"


@pytest.mark.slow
def test_killed_predictions_repeat_nothing_and_end_the_same(forks, tmp_path):
    """Principles from a list, and from a server that counts what it is asked."""
    aims = ["principles", "sampling", "scoring", "shard write", "set finish"]
    options = ["--kills", 6, "--per-run", 3, "--configs", "predict", "endpoint"]
    options += ["--aim", *aims, "--work", tmp_path / "work", "--json", tmp_path / "kills.json"]
    done = forks.run(PROGRAM, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = json.loads((tmp_path / "kills.json").read_text())
    assert len(kills) >= 6
    assert {kill["config"] for kill in kills} == {"predict", "endpoint"}
    assert all(kill["resumed"] and kill["identical"] for kill in kills)
    assert len({kill["phase"] for kill in kills}) >= 3
    assert len((tmp_path / "work" / "asked").read_text().splitlines()) >= 2 * 6


def test_what_is_repeated_or_lost_is_noticed(crash, tmp_path):
    (tmp_path / "asked").write_text("")
    folder, cache = tmp_path / "run" / "pairs" / "predict", tmp_path / "run.cache"
    folder.mkdir(parents=True)
    cache.mkdir()

    def state(shards, answers=(), asked=()):
        """Kept, with shards by their content; those that are there are not written again."""
        for name, text in shards.items():
            if not (folder / name).exists() or (folder / name).read_text() != text:
                (folder / name).write_text(text)
                os.utime(folder / name, ns=(0, len(text)))
        listed = [{"file": name} for name in shards]
        (folder / "manifest.json").write_text(json.dumps({"shards": listed}))
        lines = [json.dumps({"text": f"Gladly Name {n} birds."}) + "\n" for n in answers]
        (cache / "answers.jsonl").write_text("".join(lines))
        (tmp_path / "asked").write_text("".join(f"Name {n} birds\n" for n in asked))
        return crash.Kept.of(tmp_path, tmp_path / "run")

    def attempt(samplings, killed=True):
        timeline = [(0.0, phase) for _ in range(samplings) for phase in ("sampling", "scoring")]
        return crash.Attempt(-9 if killed else 0, timeline, 1.0 if killed else None)

    before = state({"a": "1"}, [1], [1, 2])
    fine = state({"a": "1", "b": "2"}, [1, 2, 3], [1, 2, 2, 3])
    assert before.repeated(fine, attempt(2), "predict") == []
    assert before.repeated(fine, attempt(1, killed=False), "predict") == []
    assert before.repeated(fine, attempt(9), "fit") == []  # the policy may be asked more often
    for samplings, killed in ((3, True), (2, False)):
        found = before.repeated(fine, attempt(samplings, killed), "predict")
        assert found == [f"sampled {samplings} times for 1 shards"]
    for after, line in (
        (({"b": "2"}, [1], [1, 2]), "pairs/predict/a: was finished, and is lost"),
        (({"a": "22"}, [1], [1, 2]), "pairs/predict/a: was finished, and is another file"),
        (({"a": "1"}, [1], [1, 2, 1]), "Name 1 birds: asked though answered"),
        (({"a": "1"}, [1, 3], [1, 2, 3, 3]), "Name 3 birds: asked twice"),
        (({"a": "1"}, [1, 1], [1, 2]), "Name 1 birds: stored twice"),
        (({"a": "1"}, [], [1, 2]), "Name 1 birds: lost"),
    ):
        before = state({"a": "1"}, [1], [1, 2])
        assert before.repeated(state(*after), attempt(1), "predict") == [line]


# -------------------------------------------------------------------------- what kills brought up


@pytest.mark.slow
def test_a_run_killed_right_after_its_settings_were_written_continues(harness, sso, tmp_path):
    root = tmp_path / "run"
    settings = yaml.safe_load((harness[1] / "whole-accumulate.yaml").read_text())
    settings["trainer"] |= {"default_root_dir": str(root), "max_epochs": 1, "callbacks": None}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    last = ("fit", "--config", path, "--ckpt_path", "last")
    status, _, err = sso(*last)
    assert status == 2, "nothing was written: the name is wrong, say"
    assert f"no checkpoint in {root / 'checkpoints'}" in err
    root.mkdir()
    (root / "config.yaml").write_text("seed_everything: 0\n")
    status, _, err = sso(*last)
    assert status == 0, err
    assert (root / "export" / "config.json").is_file()


def test_settings_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*args):
        raise Killed

    parser = SimpleNamespace(dump=lambda config, skip_none: "seed_everything: 0\n")
    config = SimpleNamespace(overwrite=False, ckpt_path=None)
    callback = SaveConfig(parser, config)
    trainer = SimpleNamespace(default_root_dir=tmp_path, is_global_zero=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", kill)  # text is written, its name is not there yet
        with pytest.raises(Killed):
            callback.on_fit_start(trainer, None)
    assert not (tmp_path / "config.yaml").exists()
    callback.on_fit_start(trainer, None)
    assert (tmp_path / "config.yaml").read_text() == "seed_everything: 0\n"


def test_the_row_of_a_step_that_was_saved_but_not_logged_comes_back(tmp_path):
    """The trainer logs a step after its checkpoint; a kill in between left two of three rows."""

    def rows():
        return (tmp_path / "metrics.csv").read_text().splitlines()

    metrics = [{"train/loss": loss, "epoch": 0} for loss in (0.5, 0.25, 0.125)]
    first = RunLogger(tmp_path)
    for step in (0, 1):
        first.log_metrics(metrics[step], step)
    assert rows() == ["step,train/loss,epoch", "0,0.5,0", "1,0.25,0"]
    for expected in (3, 2):  # killed after the checkpoint of step 3, then after that of step 2
        again = RunLogger(tmp_path)
        again.continue_from(expected, metrics[expected - 1])
        again.log_metrics({"train/loss": 1.0, "epoch": 0}, expected)
        losses = ["0,0.5,0", "1,0.25,0", "2,0.125,0"][:expected]
        assert rows() == ["step,train/loss,epoch", *losses, f"{expected},1,0"]


def test_a_checkpoint_within_an_iteration_holds_the_metrics_of_its_step():
    connector = SimpleNamespace(should_update_logs=True, metrics={"log": {"x": torch.tensor(0.5)}})
    trainer = SimpleNamespace(training=True, current_epoch=1, _logger_connector=connector)
    saved = {}
    RunState().on_save_checkpoint(trainer, None, saved)
    assert saved == {"metrics": {"x": 0.5, "epoch": 1}}
    connector.metrics = {"log": {}}  # at the end of an iteration all is logged
    saved = {}
    RunState().on_save_checkpoint(trainer, None, saved)
    assert saved == {}
