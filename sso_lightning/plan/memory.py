"""Memory per device by phase and part, and which settings would make a run fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch.optim import Optimizer

from sso_lightning.pairs import SAMPLED_FROM, SCORED, by_context
from sso_lightning.plan.simulate import (
    DEPTHS,
    Deep,
    Kind,
    Pass,
    Precision,
    Simulation,
    optimizer_bytes,
)
from sso_lightning.policy import LoRA, PolicyConfig
from sso_lightning.sampling import PREFILL_TOKENS
from sso_lightning.scoring import Tree
from sso_lightning.sharding import ROOM

PARTS = (
    "weights",
    "adapters",
    "reference",
    "gathered",
    "copies",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "cache",
    "context",
)
"""What memory is taken by; `docs/plan.md` says what each is."""

CONTEXT = 600_000_000
"""Assumed: CUDA's context and the workspaces of its libraries."""

Phases = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts by context, and of answers by response.

    Attributes:
        longest: Of prompts; memory is planned for these.
        mean: Of prompts; time is planned for these.
        answers: Most tokens of an answer.
        mean_answers: Expected tokens of an answer.
    """

    longest: Mapping[str, int]
    mean: Mapping[str, float]
    answers: Mapping[str, int]
    mean_answers: Mapping[str, float]


@dataclass(frozen=True)
class Training:
    """What one kind of training phase is given.

    Attributes:
        sequences: Of the objective.
        batch_size: Records of a batch.
    """

    sequences: Sequence[tuple[str, str]]
    batch_size: int


@dataclass(frozen=True)
class Run:
    """The settings of a run that decide about its memory.

    Attributes:
        policy: How the model is held.
        config: The base model's transformers config.
        lengths: Of the data.
        trainings: By phase.
        optimizer: Makes the optimizer.
        optimizer_name: Its class.
        precision: The trainer's.
        kind: Of the device.
        devices: Processes.
        memory: Bytes of a device, if they are known.
        sharded: Whether FSDP2 shards weights, gradients and moments.
        offload: Whether the shards live in the host's memory.
        reshard: Whether a layer is freed between its forward and its backward pass.
        accumulates: Whether a step has several batches.
        batch_tokens: `data.max_tokens`.
        call_tokens: `model.max_tokens`.
        score_tokens: `pairs.score_tokens`.
        shard_size: `pairs.shard_size`.
        rows: `sampler.max_rows`; None if answers are not sampled in this process.
        cache_tokens: `sampler.max_tokens`.
        initial: Whether the reference is the policy before any training.
        generator: Whether there is a second adapter.
        repeats: Whether sampling comes after training: moments are there then.
    """

    policy: PolicyConfig
    config: Any
    lengths: Lengths
    trainings: Mapping[str, Training]
    optimizer: Callable[[Any], Optimizer]
    optimizer_name: str = "torch.optim.AdamW"
    precision: Precision = field(default_factory=Precision)
    kind: Kind = "cuda"
    devices: int = 1
    memory: int | None = None
    sharded: bool = False
    offload: bool = False
    reshard: bool = True
    accumulates: bool = False
    batch_tokens: int | None = None
    call_tokens: int | None = None
    score_tokens: int = 16384
    shard_size: int = 256
    rows: int | None = 32
    cache_tokens: int = 65536
    initial: bool = False
    generator: bool = False
    repeats: bool = True

    def trees(self, sequences: Sequence[tuple[str, str]]) -> list[Tree]:
        """A record at its longest, as a pass gets it; the ids mean nothing."""
        return [
            Tree(
                [0] * self.lengths.longest[context],
                [[0] * self.lengths.answers[response] for response in responses],
            )
            for context, responses in by_context(sequences).items()
        ]

    def records(self, training: Training) -> int:
        """Records of a batch at their longest."""
        tokens = sum(tree.tokens for tree in self.trees(training.sequences))
        fitting = max(1, self.batch_tokens // tokens) if self.batch_tokens else training.batch_size
        return min(training.batch_size, fitting)

    def slots(self) -> tuple[int, int]:
        """Answers that grow at the same time, and the tokens that each has room for."""
        capacity = max(
            self.lengths.longest[context] + self.lengths.answers[response]
            for response, context in SAMPLED_FROM.items()
        )
        answers = len(SAMPLED_FROM) * self.shard_size
        return max(1, min(self.rows or 1, self.cache_tokens // capacity, answers)), capacity

    def prefill(self, rows: int) -> list[int]:
        """Tokens of each prompt of a call that fills `rows` slots as far as it may."""
        mean = max(1, round(sum(self.lengths.mean.values()) / len(self.lengths.mean)))
        longest = max(self.lengths.longest.values())
        usual = [mean] * max(1, min(rows, PREFILL_TOKENS // mean))
        return usual if sum(usual) >= longest else [longest]


class Planner:
    """Works memory out, and simulates no pass twice."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def _once(self, make: Callable[[], Any], *key: object) -> Any:
        name = repr(key)
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def simulation(self, run: Run, depth: int | None = None) -> Simulation:
        """The model of a run, whole or with few of its layers."""
        made: Simulation = self._once(
            lambda: Simulation(run.policy, run.config, run.precision, run.kind, depth),
            *("model", run.policy, run.precision, run.kind, depth),
        )
        return made

    def _pass(self, run: Run, make: Callable[[Simulation], Pass], *key: object) -> Deep:
        depth = run.config.num_hidden_layers
        depths = DEPTHS if depth > max(DEPTHS) else (None,)
        own = (*key, run.policy, run.precision, run.kind, run.lengths)
        found = []
        for few in depths:
            of = self.simulation(run, few)
            found.append(self._once(partial(make, of), *own, few))
        return Deep(tuple(found), depth)

    def phases(self, run: Run) -> Phases:
        """Bytes by phase and part, phases in their order; a part of no bytes is left out."""
        made = self.simulation(run)
        base, adapters = made.weight_bytes()
        trained = made.trained()
        moments, extra = self._once(
            lambda: optimizer_bytes(run.optimizer, trained, run.kind),
            *("optimizer", run.optimizer_name, run.policy, run.precision, run.kind),
        )
        share = run.devices if run.sharded else 1
        here = not run.offload  # shards in the host's memory take none of the device's
        fixed = {
            "weights": here * base // share,
            "adapters": here * adapters * (1 + run.generator) // share,
            "context": CONTEXT if run.kind == "cuda" else 0,
        }
        # all-reduce goes through buckets as large as the gradients, which are never freed
        alone = run.devices == 1 or run.sharded
        buckets = 0 if alone else sum(p.nbytes for p in trained)
        kept = here * sum(p.nbytes for p in trained) // share
        moments = here * moments // share
        dense = made.dense_bytes()  # a quantised weight is unpacked to be multiplied

        def together(*several: Mapping[str, int]) -> dict[str, int]:
            every = {part: sum(parts.get(part, 0) for parts in several) for part in PARTS}
            if run.sharded:  # gathered in the type of the products already
                every["copies"] = 0
            return {part: size for part, size in every.items() if size}

        found: Phases = {}
        # of the training before
        left = {"gradients": buckets, "optimizer": moments if run.repeats else 0}
        taken = sum(fixed.values()) + sum(left.values())
        more = {"activations": dense, "gathered": self._gathered(run, made, taken)}
        if run.rows is not None:
            rows, capacity = run.slots()
            prompts = run.prefill(rows)
            sampled = self._pass(
                run, lambda s: s.sampling(prompts, rows, capacity), prompts, rows, capacity
            )
            found["sampling"] = together(fixed, left, more, sampled.peak())
        record = run.trees(SCORED)
        each = sum(tree.tokens for tree in record)
        # enough of them to fill a call
        many = record * max(1, min(run.shard_size, -(-run.score_tokens // each)))
        scored = self._pass(
            run, lambda s: s.scoring(many, run.score_tokens), "scoring", run.score_tokens, len(many)
        )
        copied = {"reference": 0 if run.policy.lora or not run.initial else base}
        found["scoring"] = together(fixed, left, more, copied, scored.peak())
        for name, training in run.trainings.items():
            turn = self._training(run, training)
            parts = turn.peak(kept=True, accumulates=run.accumulates, share=share)
            parts["gradients"] *= here
            more = {"activations": dense, "gathered": self._gathered(run, made)}
            usual = {"gradients": buckets, "optimizer": moments}
            step = {"gradients": kept + buckets, "optimizer": moments + here * extra // share}
            moments_of = together(fixed, more, usual, parts), together(fixed, step)
            found[name] = max(moments_of, key=lambda parts: sum(parts.values()))
        return found

    def _training(self, run: Run, training: Training) -> Deep:
        batch = run.trees(training.sequences) * run.records(training)
        tokens = None if run.sharded else run.call_tokens  # sharded: all processes in step
        return self._pass(
            run,
            lambda s: s.training(batch, tokens),
            *("training", training.sequences, run.records(training), tokens),
        )

    def _gathered(self, run: Run, made: Simulation, taken: int | None = None) -> int:
        """Bytes of whole weights that FSDP2 holds beside the shards.

        Args:
            run: The run.
            made: Its model.
            taken: Bytes of all else, in a pass without gradient, which gathers all weights if there
                is room. A step holds two layers (the next one comes while one computes) or all,
                what is outside of the layers, and one layer's gradients as they are computed and as
                they are summed (float32).
        """
        if not run.sharded:
            return 0
        layer, layers, rest = made.layer_bytes()
        few = rest + 2 * layer
        if taken is not None:
            whole = rest + layers
            return whole if not run.memory or whole <= ROOM * (run.memory - taken) else few
        summed = made.largest_gradient()
        computed = summed // 4 * (run.precision.mixed or made.trained()[0].dtype).itemsize
        return (few if run.reshard else rest + layers) + summed + computed


def fullest(phases: Phases) -> tuple[str, int]:
    """The phase that takes most, and its bytes."""
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    name = max(totals, key=lambda n: totals[n])
    return name, totals[name]


@dataclass(frozen=True)
class Remedy:
    """A change of settings.

    Attributes:
        settings: Their keys and values.
        phase: The phase that takes most with them.
        bytes: What it takes.
        fits: Whether a device has as much.
    """

    settings: tuple[str, ...]
    phase: str
    bytes: int
    fits: bool


def changes(run: Run) -> dict[str, Run]:
    """Settings that may help, each alone; those first that change least about the training."""
    own = run.policy
    found: dict[str, Run] = {}

    def policy(**new: Any) -> Run:
        return replace(run, policy=replace(own, **new))

    if not own.gradient_checkpointing:
        found["model.policy.gradient_checkpointing: true"] = policy(gradient_checkpointing=True)
    if max(run.records(training) for training in run.trainings.values()) > 1:
        ones = {k: replace(t, batch_size=1) for k, t in run.trainings.items()}
        small = replace(run, trainings=ones, accumulates=True)
        found["data.batch_size: 1, with more accumulate_grad_batches"] = small
    if not run.sharded and (run.call_tokens or 4097) > 4096:
        found["model.max_tokens: 4096"] = replace(run, call_tokens=4096)
    if run.score_tokens > 4096:
        found["pairs.score_tokens: 4096"] = replace(run, score_tokens=4096)
    if run.rows is not None and (rows := run.slots()[0] // 2):
        found[f"pairs.sampler.init_args.max_rows: {rows}"] = replace(run, rows=rows)
    small_moments = "8bit" in run.optimizer_name
    if not small_moments and not run.sharded:
        from bitsandbytes.optim import AdamW8bit

        name = "bitsandbytes.optim.AdamW8bit"
        found[f"model.optimizer: {name}"] = replace(run, optimizer=AdamW8bit, optimizer_name=name)
    if run.devices > 1 and not run.sharded and not own.quantize and not small_moments:
        found["trainer.strategy: fsdp2"] = replace(run, sharded=True)
    if run.sharded and not run.offload:
        found["trainer.strategy: fsdp2 with cpu_offload: true"] = replace(run, offload=True)
    if not own.lora:
        found["model.policy.lora: {r: 16}"] = policy(lora=LoRA())
    if own.lora and not own.quantize and not run.sharded:
        found["model.policy.quantize: 4bit"] = policy(quantize="4bit")
    return found


def remedies(planner: Planner, run: Run) -> list[Remedy]:
    """What each setting alone would come to, and then the fewest together that fit, if any do."""
    memory = run.memory
    assert memory is not None

    def tried(changed: Run, *settings: str) -> Remedy:
        phase, size = fullest(planner.phases(changed))
        return Remedy(settings, phase, size, size <= memory)

    now = tried(run)
    single = [tried(changed, name) for name, changed in changes(run).items()]
    helping = [remedy for remedy in single if remedy.bytes < 0.99 * now.bytes]
    joint, best = run, now
    while not best.fits and not any(remedy.fits for remedy in single):
        # what the fullest phase does not notice may still be needed for the one after it
        steps = [(tried(c, *best.settings, name), c) for name, c in changes(joint).items()]
        following, joint = min(steps, key=lambda step: step[0].bytes)
        if following.bytes >= best.bytes:
            break
        best = following
    return [*helping, *([best] if len(best.settings) > 1 else [])]
