"""A plan: settings, data, memory and hours of one run put together."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from sso_lightning.errors import InputError
from sso_lightning.plan.dry_run import Data, DryRun, check_lengths, look_at
from sso_lightning.plan.hours import H100_TFLOPS, Cost, Epoch, Rates, Shape, costs
from sso_lightning.plan.memory import (
    Lengths,
    Phases,
    Planner,
    Remedy,
    Run,
    Training,
    fullest,
    remedies,
)
from sso_lightning.plan.read import NOWHERE, Settings, check, read
from sso_lightning.sampling import TransformersSampler

DEVICE_MEMORY = 80 * 10**9
"""Of a GPU if nothing is said."""


@dataclass
class Plan:
    """What is known of a run before it starts.

    Attributes:
        policy: Path of the model.
        parameters: Numbers of its base; None if its config cannot be read.
        trained: Numbers that are trained.
        devices: How many.
        memory: Bytes of one.
        strategy: How the weights are spread.
        lengths: Tokens that were measured or assumed.
        queries: In an iteration.
        records: Of a training batch, at their longest, by phase.
        slots: Answers that are sampled at the same time, and the tokens of each.
        phases: Bytes by phase and part.
        costs: Tokens, FLOPs and hours of an iteration by phase.
        assumed: Rates that the hours are reckoned with.
        remedies: Settings that would take less.
        dry_run: One record.
        problems: What is wrong.
        notes: What is worth knowing.
    """

    policy: str
    devices: int
    memory: int
    strategy: str
    parameters: int | None = None
    trained: int | None = None
    lengths: Lengths | None = None
    queries: int | None = None
    records: Mapping[str, int] = field(default_factory=dict)
    slots: tuple[int, int] | None = None
    phases: Phases = field(default_factory=dict)
    costs: Mapping[str, Cost] = field(default_factory=dict)
    assumed: Rates = field(default_factory=Rates)
    remedies: Sequence[Remedy] = ()
    dry_run: DryRun | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> tuple[str, int] | None:
        """The fullest phase and its bytes; None if memory could not be planned."""
        return fullest(self.phases) if self.phases else None

    @property
    def fits(self) -> bool | None:
        """Whether a device has as much memory."""
        return self.peak[1] <= self.memory if self.peak else None

    @property
    def fine(self) -> bool:
        """Whether nothing is wrong and it fits."""
        return not self.problems and self.fits is True


def make_plan(
    arguments: Sequence[str],
    *,
    devices: int | None = None,
    memory: int | None = None,
    mfu: float = 0.4,
    tflops: float | None = None,
    bandwidth: float = 3.35e12,
    answer_tokens: float | None = None,
    model_config: Path | None = None,
) -> Plan:
    """Plan a `fit`.

    Args:
        arguments: What would follow `sso-lightning fit`.
        devices: How many; as the settings say if not given.
        memory: Bytes of one; 80 GB, or on a CPU this machine's, if not given.
        mfu: Share of the peak that scoring and training reach.
        tflops: Peak of a device; an H100's if not given, and for a CPU none.
        bandwidth: Bytes that a device reads a second.
        answer_tokens: Expected tokens of an answer.
        model_config: File to read the model's config from.

    Raises:
        InputError: The settings cannot be read at all.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run gives them too
        return _made(
            read(arguments), devices, memory, mfu, tflops, bandwidth, answer_tokens, model_config
        )


def _made(
    settings: Settings,
    devices: int | None,
    memory: int | None,
    mfu: float,
    tflops: float | None,
    bandwidth: float,
    answer_tokens: float | None,
    model_config: Path | None,
) -> Plan:
    module = settings.module
    count = devices or settings.devices
    name, options = settings.strategy
    cpu = settings.kind == "cpu"
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if cpu else DEVICE_MEMORY
    plan = Plan(
        policy=module.policy_config.path,
        devices=count,
        memory=memory or machine,
        strategy="ddp" if name == "auto" and count > 1 else name,
        assumed=Rates(tflops or (None if cpu else H100_TFLOPS), bandwidth, mfu, count),
        problems=settings.problems,
        notes=settings.notes,
    )
    check(settings, count)
    config, readable = None, False
    if module.policy_config.path != NOWHERE:
        config = _model_config(settings, model_config)
        readable = _readable(settings, model_config)
    if readable:
        # all that the check asks the trainer for
        settings.data.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
        settings.attempt(settings.data.check_pairs)
    data = look_at(settings, answer_tokens, readable)
    plan.lengths, plan.dry_run = data.lengths, data.dry_run
    if config is None:
        return plan
    check_lengths(settings, data, config)
    try:
        run = _run(settings, config, data, count, plan.memory, name, options)
        planner = Planner()
        made = planner.simulation(run)
        plan.phases = planner.phases(run)
    except InputError as error:
        plan.problems.append(str(error))
        return plan
    plan.parameters = made.parameters()
    plan.trained = sum(p.numel() for p in made.trained())
    half = {p.dtype for p in made.trained()} & {torch.bfloat16, torch.float16}
    if half:
        plan.notes.append("trained weights in half precision: small steps are rounded away")
    plan.records = {phase: run.records(t) for phase, t in run.trainings.items()}
    plan.slots = run.slots() if run.rows is not None else None
    epochs = _epochs(settings, data, run, count)
    if epochs:
        plan.queries = epochs[-1].queries
        plan.costs = costs(
            Shape.of(made, config),
            data.lengths,
            epochs,
            plan.assumed,
            rows=run.slots()[0] if run.rows is not None else None,
            shard_size=run.shard_size,
        )
    else:
        plan.notes.append("no query is counted, so there are no hours")
    if not plan.fits:
        plan.remedies = remedies(planner, run)
    return plan


def _model_config(settings: Settings, given: Path | None) -> Any:
    """The base model's transformers config, or None with a problem."""
    from transformers import AutoConfig

    policy = settings.module.policy_config
    source = str(given or policy.path)
    try:
        found = AutoConfig.from_pretrained(
            source, revision=None if given else policy.revision, trust_remote_code=False
        )
    except Exception as error:  # damaged files make transformers raise anything
        reason = " ".join(str(error).split()).partition(". ")[0][:160]
        hint = "" if given else "; give its config.json as --model-config FILE"
        key = "--model-config" if given else "policy.path"
        settings.problems.append(f"{key}: cannot read the config of {source} ({reason}){hint}")
        return None
    return found


def _readable(settings: Settings, model_config: Path | None) -> bool:
    """Whether the tokenizer is there; its template is probed."""
    try:
        settings.module.load_tokenizer()
    except InputError as error:
        if model_config:
            settings.notes.append(f"no dry run: {error}")
        else:
            settings.problems.append(str(error))
        return False
    return True


def _run(
    settings: Settings,
    config: Any,
    data: Data,
    devices: int,
    memory: int,
    strategy: str,
    options: Mapping[str, Any],
) -> Run:
    module, pairs, sampler = settings.module, settings.pairs, settings.pairs.sampler
    ours = sampler if isinstance(sampler, TransformersSampler) and not settings.data.pairs else None
    trainings = {}
    if module.generator:
        own = settings.data.generator
        size = (own and own.batch_size) or settings.data.batch_size
        trainings["generator training"] = Training(module.generator.objective.sequences, size)
    trainings["training"] = Training(module.policy_objective.sequences, settings.data.batch_size)
    return Run(
        policy=module.policy_config,
        config=config,
        lengths=data.lengths,
        trainings=trainings,
        optimizer=module.optimizer,
        optimizer_name=settings.optimizer,
        precision=settings.precision,
        kind=settings.kind,
        devices=devices,
        memory=memory,
        sharded=strategy == "fsdp2",
        offload=bool(options.get("cpu_offload")),
        reshard=options.get("reshard_after_forward", True),
        accumulates=settings.trainer.accumulate_grad_batches > 1,
        batch_tokens=settings.data.max_tokens,
        call_tokens=module.max_tokens,
        score_tokens=pairs.score_tokens,
        shard_size=min(pairs.shard_size, *(_queries(settings, data, name) for name in trainings)),
        rows=ours.max_rows if ours else None,
        cache_tokens=ours.max_tokens if ours else 0,
        initial=pairs.reference == "initial",
        generator=module.generator is not None,
        repeats=(settings.trainer.max_epochs or 1) > 1 and not settings.data.pairs,
    )


def _queries(settings: Settings, data: Data, name: str) -> int:
    """Queries of an epoch; more than any run has, if that is not known."""
    own = settings.data.generator if name == "generator training" else None
    count = own.queries_per_iteration if own else settings.data.queries_per_iteration
    return count or data.queries or sys.maxsize


def _epochs(settings: Settings, data: Data, run: Run, devices: int) -> list[Epoch]:
    """The epochs of an iteration; none if the number of queries is not known."""
    given, epochs = settings.data, []
    for name, training in run.trainings.items():
        own = given.generator if name == "generator training" else None
        queries = _queries(settings, data, name)
        if queries == sys.maxsize:
            return []
        passes = (own and own.passes) or given.passes
        most = own.steps_per_iteration if own else given.steps_per_iteration
        step = training.batch_size * devices * settings.trainer.accumulate_grad_batches
        steps = math.ceil(queries * passes / step)
        steps = min(steps, most or steps)
        trained = min(queries * passes, steps * step)
        epochs.append(Epoch(name, queries, trained, steps, training.sequences))
    return epochs
