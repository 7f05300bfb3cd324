"""Kills real runs at random moments and checks that each ends as if nothing had happened.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/crash.py --kills 100 --seed 1 --out crash.md

A run is the command line's `fit` on a tiny random model: two iterations of pairs, training,
validation, checkpoints and export, in four settings that take turns (`CONFIGS`). It is a process
of its own that is ended by SIGKILL up to `--per-run` times, each time continued with `--ckpt_path
last` (or, where no file was finished yet, with the same command again), and at last left to finish.
Then all of it is compared with a run of the same settings that nothing happened to: weights,
optimizer and random state of the last checkpoint, the weights of every iteration's checkpoint and
of the export bit for bit; every record of every set with all its fields, in order; every row of
metrics.csv but for clock times; config.yaml but for ckpt_path; and the names of all files.

Two more settings are runs of `predict`, which are continued by the same command: `predict` draws
its principles, `endpoint` asks a scripted chat server, which is a process of the harness, for them.
After every process of any run, each shard that a manifest listed before it must be the same file
still, not written again (inode and time). A process of these two must not have sampled more often
than it listed shards, but for the one it died in; and the server must not have been asked for what
the run had the answer of.

Moments are drawn from the seed in two ways, by turns:

* in time (two in five): uniform over the duration of the uninterrupted run, counted from the
  process' start;
* targeted: at the n-th time (n drawn from 1 to 3) that the run enters a phase, one in three at
  once, the others after a delay that is uniform over 1.2 times one of the phase's durations in the
  uninterrupted run. Phases take turns, so that those of a millisecond are hit as well. The kill may
  land in the phase after; the phase that counts is the one the run was in when it died, not the one
  aimed at.

The run tells its phase through a pipe (`crash_probe.py`). A run that ends before its moment has
no kill there. Checkpoints, shards and all else go through the real file system, but a kill of a
process is not a power cut: what the kernel had taken was kept.

Importing torch, lightning and transformers takes most of a short run, so by default this process
imports them once, with one thread, and forks: only the imports are shared. `--spawn N` makes at
least N kills in runs whose every process is a fresh interpreter (`python -m sso_lightning`); the
moments of a fresh interpreter are counted from the end of its imports, but for one in five.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import hashlib
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
IN_TIME = 0.4  # share of the moments that are not aimed at a phase

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# changes to `settings`, by dotted key
CONFIGS: dict[str, dict[str, Any]] = {
    "full": {"trainer.log_every_n_steps": 1},
    "lora": {"model.policy.lora": {"r": 4, "alpha": 8, "dropout": 0.1}},
    "accumulate": {
        "trainer.accumulate_grad_batches": 2,
        "data.batch_size": 1,
        "checkpoint.every_n_steps": 1,
        "model.schedule": {"restart": False, "warmup": 0.0},
    },
    "workers": {"data.num_workers": 2, "checkpoint.every_n_steps": 2},
    "predict": {"pairs.shard_size": 1},
    "endpoint": {
        "pairs.shard_size": 3,
        "pairs.principles": {
            "class_path": "sso_lightning.endpoint.EndpointPrinciples",
            "init_args": {"endpoint": {"base_url": "", "model": "scripted", "concurrency": 2}},
        },
    },
}
COMMANDS = {"predict": "predict", "endpoint": "predict"}  # of the configs that are no `fit`

TARGETS = {
    "fit": (
        *("config write", "sampling", "scoring", "shard write", "manifest write", "metrics write"),
        *("optimizer step", "checkpoint write", "after checkpoint", "validation"),
        *("checkpoint read", "export", "after export"),
    ),
    "predict": (
        *("principles", "sampling", "scoring", "shard write", "manifest write", "set finish"),
        "prediction",
    ),
}

# ------------------------------------------------------------------------------------------- a run


def make_home(folder: Path) -> None:
    """Write what runs need: a random model of 30k weights, its tokenizer, two query files."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|im_start|>", "<|im_end|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    from sso_lightning import principles

    # its text has the principles' words: short prompts are fast
    inner.train_from_iterator([Path(principles.__file__).read_text()], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=600,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, count in (("train", 6), ("held", 2)):
        lines = [f'{{"id": "{name}{i}", "prompt": "Name {i} birds."}}\n' for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def write_config(home: Path, name: str, root: Path) -> Path:
    """The YAML of a run in `root` with one of the `CONFIGS`, beside it."""
    import yaml

    settings: dict[str, Any] = {
        "trainer": {
            "default_root_dir": str(root),
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "crash_probe.Probe"}],
        },
        "model": {
            "policy": {"path": str(home / "model")},
            "objective": {
                "class_path": "SelfSteering",
                "init_args": {"base": {"class_path": "IPO", "init_args": {"beta": 5.0}}},
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {
            "queries": str(home / "train.jsonl"),
            "val_queries": str(home / "held.jsonl"),
            "batch_size": 2,
        },
        "pairs": {
            "sampler": {"class_path": "TransformersSampler", "init_args": {"max_new_tokens": 6}},
            "principles": {"class_path": "PredefinedPrinciples", "init_args": {"pick": "random"}},
            "shard_size": 2,
        },
    }
    for key, value in CONFIGS[name].items():
        at = settings
        *way, last = key.split(".")
        for part in way:
            at = at.setdefault(part, {})
        at[last] = copy.deepcopy(value)
    if command_of(name) == "predict":
        settings["data"]["predict_queries"] = settings["data"]["queries"]
    if name == "endpoint":
        server = settings["pairs"]["principles"]["init_args"]["endpoint"]
        server |= {"base_url": (home / "server").read_text(), "cache": str(answers_of(root).parent)}
    path = root.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


def command_of(config: str) -> str:
    """The command that a config is for."""
    return COMMANDS.get(config, "fit")


def answers_of(root: Path) -> Path:
    """The file in which an endpoint's answers are kept; every run has its own, beside it."""
    return root.with_suffix(".cache") / "answers.jsonl"


def serve(home: Path, listening: socket.socket) -> int:
    """Answer every query with guidelines of its own, and note in home/asked that it was asked."""
    notes = os.open(home / "asked", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            query = re.findall(r"Name \d+ birds", body["messages"][-1]["content"])[-1]
            os.write(notes, f"{query}\n".encode())
            time.sleep(0.01)
            text = f"## Bad guideline\nNever {query}.\n\n## Good guideline\nGladly {query}."
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            data = json.dumps({"object": "chat.completion", "choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(listening.getsockname(), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listening
    server.handle_error = lambda *args: None  # type: ignore[method-assign]  # killed clients
    server.serve_forever()
    return 0


@contextlib.contextmanager
def scripted_server(home: Path) -> Iterator[None]:
    """The server of the endpoint runs, in a process of its own; its address is in home/server."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        (home / "server").write_text(f"http://127.0.0.1:{listening.getsockname()[1]}/v1")
        (home / "asked").touch()
        pid = fork(lambda: serve(home, listening), home / "server.log", home)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@dataclass
class Attempt:
    """One process of a run, as it was seen from outside.

    Attributes:
        status: Exit status; -9 if it was killed.
        timeline: (seconds since the start, phase) at every change of phase.
        killed_at: Seconds since the start.
    """

    status: int
    timeline: list[tuple[float, str]]
    killed_at: float | None

    @property
    def phase(self) -> str:
        """The last phase it entered."""
        return self.timeline[-1][1]


@dataclass(frozen=True)
class Moment:
    """When to kill: `delay` seconds after the process starts, or enters `phase` the `nth` time."""

    delay: float
    phase: str = ""
    nth: int = 1


def fork(work: Callable[[], int], log: Path, cwd: Path) -> int:
    """Run `work` in a forked process that writes to `log`; its exit status is what it returns."""
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork would lose all but one of them"
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(cwd)
        status = work()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def attempt(
    arguments: Sequence[str], home: Path, log: Path, spawn: bool, moment: Moment | None
) -> Attempt:
    """Start the command line once; kill it at `moment`, if it lives to see it."""
    read, write = os.pipe()

    def work() -> int:
        os.environ["SSO_CRASH_PIPE"] = str(write)
        os.close(read)
        if spawn:
            os.set_inheritable(write, True)
            os.execv(sys.executable, [sys.executable, "-m", "sso_lightning", *arguments])
        from sso_lightning.__main__ import main

        return main(list(arguments))

    start = time.monotonic()
    pid = fork(work, log, home)
    os.close(write)
    os.set_blocking(read, False)
    watch = os.pidfd_open(pid)
    timeline, rest = [(0.0, "start-up")], b""

    def listen() -> None:
        nonlocal rest
        try:
            while data := os.read(read, 65536):
                *lines, rest = (rest + data).split(b"\n")
                now = time.monotonic() - start
                timeline.extend((now, line.decode()) for line in lines)
        except BlockingIOError:
            pass

    due = start + moment.delay if moment and not moment.phase else None
    killed_at = None
    while True:
        left = None if due is None else due - time.monotonic()
        if left is not None and left <= 0:
            killed_at = time.monotonic() - start
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
            break
        ready, _, _ = select.select([read, watch], [], [], left)
        if watch in ready:
            break
        seen = len(timeline)
        listen()
        if seen == len(timeline):  # the pipe's end: the process is ending
            select.select([watch], [], [], 0.01)
        if moment and moment.phase and due is None:
            entered = [i for i, (_, phase) in enumerate(timeline) if phase == moment.phase]
            if len(entered) >= moment.nth:
                due = time.monotonic() + moment.delay
    _, ended = os.waitpid(pid, 0)
    listen()
    os.close(read)
    os.close(watch)
    status = os.waitstatus_to_exitcode(ended)
    # one that had ended by itself before the signal came was not killed
    return Attempt(status, timeline, killed_at if status == -signal.SIGKILL else None)


# ------------------------------------------------------------------------------------- comparison


def _hash(value: Any) -> str:
    """A hash of a tensor's type, shape and bits."""
    import torch

    bits = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode() + bits).hexdigest()[:16]


def _flat(value: Any, name: str) -> dict[str, Any]:
    """Nested dicts and lists as one dict, tensors hashed."""
    import torch

    if isinstance(value, torch.Tensor):
        return {name: _hash(value)}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in _flat(item, f"{name}/{key}").items()}
    return {name: value}


def snapshot(root: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on what happened on the way.

    Args:
        root: The run folder.

    Returns:
        A flat dict of JSON values; what differs between two is told by its key.
    """
    import torch
    import yaml
    from safetensors.torch import load_file

    from sso_lightning.records import PairStore

    found: dict[str, Any] = {}
    for path in sorted((root / "checkpoints").glob("*.ckpt")):
        saved = torch.load(path, weights_only=True)
        found |= _flat(saved["state_dict"], f"{path.name}: weights")
        if path.name == "last.ckpt":
            parts = ("optimizer_states", "global_step", "epoch", "SSODataModule")
            parts = {key: saved[key] for key in parts}
            parts["random"] = saved["callbacks"]["RunState"]
            found |= _flat(parts, path.name)
    for path in sorted((root / "export").glob("*.safetensors")):
        found |= _flat(load_file(path), f"export/{path.name}: weights")
    for path in sorted((root / "pairs").rglob("manifest.json")):
        store, name = PairStore(path.parent), str(path.parent.relative_to(root))
        found[f"{name}: complete"] = store.complete
        records = store.read()
        found[f"{name}: ids"] = [record.id for record in records]
        for record in records:
            for key, value in asdict(record).items():
                found[f"{name}: record {record.id}: {key}"] = value
        report = {k: v for k, v in store.report.items() if not _is_clock(k)}
        found |= _flat(report, f"{name}: report")
    if (root / "config.yaml").exists():  # a fit; the names of all files are compared below
        with (root / "metrics.csv").open(newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 1):
                values = {k: v for k, v in row.items() if v and not _is_clock(k)}
                found[f"metrics.csv: row {number}"] = values
        settings = yaml.safe_load((root / "config.yaml").read_text())
        settings.pop("ckpt_path", None)
        settings["trainer"].pop("default_root_dir")
        found |= _flat(settings, "config.yaml")
    # a shard that was set aside would be found here, and a temporary file that was left
    found["files"] = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    return found


def _is_clock(column: str) -> bool:
    return column.endswith(("seconds", "tokens_per_second"))


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What two snapshots do not have in common, a line each; empty if they are identical."""
    lines = []
    for key in sorted({*one, *other}):
        a, b = one.get(key), other.get(key)
        if key not in one or key not in other:
            lines.append(f"{key}: only in {'one' if key in one else 'the other'}")
        elif key == "files":
            lines += [f"file {name} only in one of them" for name in sorted({*a} ^ {*b})]
        elif a != b:
            lines.append(f"{key}: {a!r} is not {b!r}")
    return lines


def apart(work: Callable[[], object], log: Path) -> None:
    """Do work that starts threads (writing models, reading tables) in a process of its own."""

    def whole() -> int:
        work()
        return 0

    _, status = os.waitpid(fork(whole, log, log.parent), 0)
    assert status == 0, f"{log}:\n{log.read_text()}"


def snapshot_apart(root: Path) -> dict[str, Any]:
    """`snapshot` in a process of its own."""
    out = root.with_suffix(".json")
    apart(lambda: out.write_text(json.dumps(snapshot(root))), root.with_suffix(".log"))
    return dict(json.loads(out.read_text()))


# ------------------------------------------------------------------------------------------- kills


@dataclass
class Kill:
    """One kill and what came of it."""

    run: int
    config: str
    process: str  # "fork" or "spawn"
    moment: str  # "time" or the phase aimed at
    phase: str  # in which it died
    seconds: float
    resumed: bool = False
    identical: bool = False


@dataclass
class Whole:
    """A run that nothing happened to."""

    seconds: float
    durations: dict[str, list[float]]  # by phase
    counts: Counter[str]
    snapshot: dict[str, Any]


@dataclass(frozen=True)
class Kept:
    """What a run has made so far that must not be made again.

    Attributes:
        shards: Inode and time of the file of every shard that a manifest lists.
        answers: What the endpoint answered, by the query in it.
        asked: The queries that the server got, of all runs.
    """

    shards: dict[str, tuple[int, int]]
    answers: list[str]
    asked: list[str]

    @classmethod
    def of(cls, home: Path, root: Path) -> Kept:
        """Look at a run as it is now."""
        shards = {}
        for path in sorted((root / "pairs").rglob("manifest.json")):
            for shard in json.loads(path.read_text())["shards"]:
                file = path.parent / shard["file"]
                stat = file.stat()
                shards[str(file.relative_to(root))] = (stat.st_ino, stat.st_mtime_ns)
        answers, asked = answers_of(root), home / "asked"
        kept = answers.read_text().splitlines() if answers.exists() else []
        return cls(
            shards,
            re.findall(r"Gladly (Name \d+ birds)", "\n".join(kept)),
            asked.read_text().splitlines() if asked.exists() else [],
        )

    def repeated(self, after: Kept, done: Attempt, command: str) -> list[str]:
        """What a process did again or lost, a line each; empty as it should be."""
        lines = [
            f"{name}: was finished, and is {'another file' if name in after.shards else 'lost'}"
            for name, file in self.shards.items()
            if after.shards.get(name) != file
        ]
        if command == "predict":
            samplings = sum(phase == "sampling" for _, phase in done.timeline)
            made = len(after.shards) - len(self.shards)
            if samplings > made + (done.killed_at is not None):
                lines.append(f"sampled {samplings} times for {made} shards")
        asked = after.asked[len(self.asked) :]
        again = sorted({*asked} & {*self.answers})
        twice = sorted(query for query, count in Counter(asked).items() if count > 1)
        stored = sorted(query for query, count in Counter(after.answers).items() if count > 1)
        lost = sorted({*self.answers} - {*after.answers})
        for what, names in (
            ("asked though answered", again),
            ("asked twice", twice),
            ("stored twice", stored),
            ("lost", lost),
        ):
            lines += [f"{name}: {what}" for name in names]
        return lines


@dataclass
class Harness:
    """Runs, kills, resumes and compares.

    Attributes:
        home: Folder of everything.
        seed: Of all draws.
        per_run: Most kills of one run.
        configs: Names of `CONFIGS`, which take turns.
        aim: Phases that all kills are aimed at, or None for the usual mixture.
        imports: Seconds that a fresh interpreter needs before it does anything.
    """

    home: Path
    seed: int
    per_run: int
    configs: Sequence[str]
    aim: Sequence[str] | None = None
    imports: float = 0.0
    kills: list[Kill] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    wholes: dict[str, Whole] = field(default_factory=dict)

    def whole(self, config: str) -> Whole:
        """The uninterrupted run of a config, made when it is first asked for."""
        if config not in self.wholes:
            root = self.home / f"whole-{config}"
            path = write_config(self.home, config, root)
            log = root.with_suffix(".log")
            command = [command_of(config), "--config", str(path)]
            done = attempt(command, self.home, log, False, None)
            assert done.status == 0, f"the uninterrupted run failed:\n{log.read_text()}"
            spans = defaultdict(list)
            for (start, phase), (end, _) in itertools.pairwise(done.timeline):
                spans[phase].append(end - start)
            self.wholes[config] = Whole(
                done.timeline[-1][0],
                dict(spans),
                Counter(phase for _, phase in done.timeline),
                snapshot_apart(root),
            )
        return self.wholes[config]

    def draw(self, whole: Whole, target: str, spawn: bool, rng: random.Random) -> Moment:
        """A moment in time, or in the phase aimed at."""
        if not target:
            start = self.imports if spawn and rng.random() < 0.8 else 0.0
            return Moment(start + rng.uniform(0, whole.seconds))
        seen = whole.durations.get(target, [0.005])  # only a resumed run reads a checkpoint
        nth = rng.randint(1, max(1, min(3, whole.counts[target])))
        at_once = rng.random() < 1 / 3
        return Moment(0.0 if at_once else rng.uniform(0, 1.2 * rng.choice(seen)), target, nth)

    def run(self, number: int, config: str, targets: Sequence[str], spawn: bool) -> None:
        """Kill a run at a moment for each of `targets` ("": in time), finish it, compare it."""
        rng = random.Random(f"{self.seed}-{number}")
        whole = self.whole(config)
        root = self.home / f"run-{number:03d}"
        command = [command_of(config), "--config", str(write_config(self.home, config, root))]
        log = root.with_suffix(".log")
        mine: list[Kill] = []
        repeated: list[str] = []
        for target in (*targets, None):
            moment = None if target is None else self.draw(whole, target, spawn, rng)
            begun = root.exists() and any(p.name[0] != "." for p in root.iterdir())
            resume = ["--ckpt_path", "last"] if begun and command[0] == "fit" else []
            before = Kept.of(self.home, root)
            done = attempt([*command, *resume], self.home, log, spawn, moment)
            failed = done.killed_at is None and done.status != 0
            repeated += before.repeated(Kept.of(self.home, root), done, command[0])
            if mine:
                mine[-1].resumed = not failed
            if failed:
                self.failures.append(f"run {number} ({config}): {_last_line(log)}")
                break
            if done.killed_at is None:
                break
            process = "spawn" if spawn else "fork"
            at = round(done.killed_at, 4)
            mine.append(Kill(number, config, process, target or "time", done.phase, at))
        else:
            raise AssertionError("a run that is not killed ends")
        self.kills += mine
        if failed:
            return
        lines = repeated + differences(whole.snapshot, snapshot_apart(root))
        if lines:
            more = f" (and {len(lines) - 6} more)" if len(lines) > 6 else ""
            text = "; ".join(line[:200] for line in lines[:6])
            self.failures.append(f"run {number} ({config}): {text}{more}")
        else:
            shutil.rmtree(root)
        for kill in mine:
            kill.identical = not lines

    def go(self, count: int, spawned: int) -> None:
        """Make at least `count` kills, `spawned` of them in fresh interpreters."""
        rng = random.Random(self.seed)
        aims = {
            command: _turns([t for t in targets if t in (self.aim or targets)], rng)
            for command, targets in TARGETS.items()
        }
        in_time = 0.0 if self.aim else IN_TIME
        configs = itertools.cycle(self.configs)
        start = time.monotonic()
        for number in itertools.count():
            in_spawned = sum(kill.process == "spawn" for kill in self.kills)
            left = count - len(self.kills)
            if left <= 0 and in_spawned >= spawned:
                break
            spawn = in_spawned < spawned
            some = min(self.per_run, max(left, 1))
            config = next(configs)
            mine = aims[command_of(config)]
            targets = ["" if rng.random() < in_time else next(mine) for _ in range(some)]
            before = len(self.kills)
            self.run(number, config, targets, spawn)
            new = self.kills[before:]
            failed = bool(self.failures) and self.failures[-1].startswith(f"run {number} ")
            print(
                f"{time.monotonic() - start:6.0f} s  run {number:3d} {config:10s} "
                f"{'spawn' if spawn else 'fork'}  {len(self.kills):3d} kills  "
                f"{'FAILED' if failed else 'identical'}  {', '.join(k.phase for k in new)}",
                flush=True,
            )


def _turns(names: Sequence[str], rng: random.Random) -> Any:
    """Endless names, each once a turn, in an order drawn for every turn."""
    while True:
        yield from rng.sample(names, len(names))


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


# ------------------------------------------------------------------------------------------ report


def table(kills: Sequence[Kill]) -> str:
    """Kills by the phase that was hit, as a Markdown table."""
    from crash_probe import PHASES

    lines = [
        "| phase hit | kills | drawn in time / aimed | resumed | identical |",
        "|---|---|---|---|---|",
    ]
    for name in (*PHASES, "all"):
        hit = [kill for kill in kills if name in (kill.phase, "all")]
        timed = sum(kill.moment == "time" for kill in hit)
        resumed, identical = (sum(getattr(k, a) for k in hit) for a in ("resumed", "identical"))
        lines.append(
            f"| {name} | {len(hit)} | {timed} / {len(hit) - timed} | {resumed} | {identical} |"
        )
    return "\n".join(lines)


def split(kills: Sequence[Kill], key: str) -> str:
    """Numbers of kills by an attribute, in words."""
    return ", ".join(f"{n} {k}" for k, n in Counter(getattr(x, key) for x in kills).items())


def main() -> int:
    """Run the harness; the exit status is 1 if a run failed or is not identical."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="kills to make")
    parser.add_argument("--seed", type=int, default=0, help="of all draws")
    parser.add_argument("--per-run", type=int, default=5, help="most kills of one run")
    parser.add_argument("--spawn", type=int, default=0, help="kills made in fresh interpreters")
    parser.add_argument("--out", type=Path, help="write the table as Markdown")
    parser.add_argument("--json", type=Path, help="write every kill as JSON")
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    phases = sorted({phase for targets in TARGETS.values() for phase in targets})
    parser.add_argument("--aim", nargs="+", choices=phases, help="no moments but in these phases")
    parser.add_argument("--work", type=Path, help="folder for the runs, which is kept")
    given = parser.parse_args()
    if given.work and given.work.exists() and any(given.work.iterdir()):
        parser.error(f"--work: {given.work} is not empty; what is in it would be taken for a run's")
    for name in given.configs:
        if given.aim and not {*given.aim} & {*TARGETS[command_of(name)]}:
            parser.error(f"--aim: {name} has none of these phases")

    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # the probe, and the library that this process has imported, for fresh interpreters too
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    sys.path[:0] = paths[:2]
    start = time.monotonic()
    import torch

    import sso_lightning.cli  # noqa: F401

    imports = time.monotonic() - start
    if "endpoint" in given.configs:
        import openai  # noqa: F401
    torch.set_num_threads(1)
    # wake before the run does when it enters a phase, if the system lets us; not inherited
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    home = Path(given.work or tempfile.mkdtemp(prefix="sso-crash-")).resolve()
    home.mkdir(parents=True, exist_ok=True)
    apart(lambda: make_home(home), home / "home.log")
    harness = Harness(home, given.seed, given.per_run, given.configs, given.aim, imports)
    with scripted_server(home) if "endpoint" in given.configs else contextlib.nullcontext():
        harness.go(given.kills, given.spawn)
    summary = (
        f"{table(harness.kills)}\n\n"
        f"By config: {split(harness.kills, 'config')}. By process: "
        f"{split(harness.kills, 'process')}. {len({k.run for k in harness.kills})} runs, "
        f"{time.monotonic() - start:.0f} s.\n"
    )
    summary += "".join(f"\n* {failure}" for failure in harness.failures)
    print(summary)
    if given.out:
        given.out.write_text(summary + "\n" * bool(harness.failures))
    if given.json:
        given.json.write_text(json.dumps([asdict(k) for k in harness.kills], indent=1) + "\n")
    if harness.failures:
        print(f"what is left of them: {home}")
    elif not given.work:
        shutil.rmtree(home)
    return int(bool(harness.failures))


if __name__ == "__main__":
    sys.exit(main())
