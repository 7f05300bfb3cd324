"""Callbacks of sandbox runs: exact quality of the policy and of its pairs; the sandbox itself."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from sso_lightning.errors import InputError
from sso_lightning.evaluation import write_scores
from sso_lightning.policy import GENERATOR, POLICY, speaking
from sso_lightning.principles import Draw, PrincipleSource
from sso_lightning.prompts import ChatRenderer
from sso_lightning.records import (
    CONTEXTS,
    Message,
    Query,
    Record,
    load_queries,
    stream_seed,
)
from sso_lightning.sampling import Request, Sampler, TransformersSampler
from sso_lightning.sandbox import world
from sso_lightning.sandbox.build import is_sandbox, make_sandbox
from sso_lightning.sandbox.principles import SandboxPrinciples

__all__ = ["EnsureSandbox", "SandboxMetrics", "answers_quality", "measure", "records_quality"]

log = logging.getLogger("sso_lightning")

_METRIC = {
    "query": "sandbox/quality",
    "good": "sandbox/quality_good",
    "bad": "sandbox/quality_bad",
}


def answers_quality(answers: Iterable[tuple[str, Mapping[str, str]]]) -> dict[str, float]:
    """Ground truth of answers that were written under the three contexts.

    Args:
        answers: The text of each query, and the answer of each context in `CONTEXTS`.

    Returns:
        `sandbox/quality`, `sandbox/quality_good` and `sandbox/quality_bad` (mean quality in
        [0, 1] without principle, under the good and under the bad one), `sandbox/well_formed`
        (share of all answers), `sandbox/signal_accuracy` (share of queries whose good answer is
        really better than the bad one, ties counting half) and `sandbox/gap` (mean quality of
        good answers minus bad ones).

    Raises:
        InputError: A query is not one of the sandbox, or there are none.
    """
    answers = list(answers)
    if not answers:
        raise InputError("there are no sandbox answers to score")
    quality = {c: [world.quality(query, given[c]) for query, given in answers] for c in CONTEXTS}
    pairs = list(zip(quality["good"], quality["bad"], strict=True))
    formed = [world.parse(given[c]) is not None for _, given in answers for c in CONTEXTS]
    return {
        **{_METRIC[c]: fmean(quality[c]) for c in CONTEXTS},
        "sandbox/well_formed": fmean(formed),
        "sandbox/signal_accuracy": fmean((g > b) + 0.5 * (g == b) for g, b in pairs),
        "sandbox/gap": fmean(g - b for g, b in pairs),
    }


def records_quality(records: Sequence[Record]) -> dict[str, float]:
    """Ground truth of the stored answers of records, under the names of `answers_quality`.

    `sandbox/quality` is that of the original answers.

    Raises:
        InputError: A record's query is not one of the sandbox, or there are no records.
    """
    return answers_quality(
        (_text_of(r.messages), {"query": r.original, "good": r.good, "bad": r.bad}) for r in records
    )


def measure(
    model: nn.Module,
    renderer: ChatRenderer,
    queries: Sequence[Query],
    sampler: Sampler,
    principles: PrincipleSource,
    seed: int = 0,
    iteration: int = 0,
) -> dict[str, float]:
    """Sample one answer to every query in every context and score it exactly.

    Everything random depends on seed, iteration and query only: two policies that are measured
    with the same numbers get the same principles and the same random numbers.

    Args:
        model: The policy.
        renderer: Of the policy's chat template.
        queries: Queries of the sandbox.
        sampler: Engine that answers the prompts.
        principles: Where the opposed principles come from; it must not ask the policy.
        seed: Of principles and answers.
        iteration: Of principles and answers.

    Returns:
        The metrics of `answers_quality`.

    Raises:
        InputError: A query is not one of the sandbox, or there are none.
    """
    return answers_quality(_answers(model, renderer, queries, sampler, principles, seed, iteration))


def _answers(
    model: nn.Module,
    renderer: ChatRenderer,
    queries: Sequence[Query],
    sampler: Sampler,
    principles: PrincipleSource,
    seed: int,
    iteration: int = 0,
) -> list[tuple[str, dict[str, str]]]:
    """The text of each query, and its answers by context; see `measure`."""

    def ask(asked: Sequence[tuple[str, list[Message]]], max_new_tokens: int) -> list[str]:
        raise InputError("sandbox metrics need principles that do not ask the policy")

    steerings = principles.propose(queries, Draw(seed, iteration, ask))
    requests = []
    for index, (query, steering) in enumerate(zip(queries, steerings, strict=True)):
        systems = {"query": None, "good": steering.good_system, "bad": steering.bad_system}
        requests += [
            Request(
                f"{index}/{context}",
                renderer.render(query.messages, systems[context]),
                stream_seed(seed, iteration, query.id, context),
            )
            for context in CONTEXTS
        ]
    samples = sampler.sample(model, requests, stop_ids=renderer.stop_ids)
    texts = {sample.key: renderer.decode(sample.ids) for sample in samples}
    return [
        (_text_of(query.messages), {c: texts[f"{index}/{c}"] for c in CONTEXTS})
        for index, query in enumerate(queries)
    ]


def _text_of(messages: Sequence[Message]) -> str:
    return messages[-1]["content"]


class SandboxMetrics(Callback):
    """Logs the exact quality of the policy on held-out queries.

    Measures before training and after every validation, always with the same principles and
    random numbers, so that differences between two measurements are mostly the policy's. After a
    generator phase it is the generator that is measured, as `sandbox/generator_...`. On several
    processes each one measures the whole, since a sharded model needs all of them.

    A fit also keeps the quality and the signal accuracy of every single query, at the start and
    after each iteration of the policy, for `sso-lightning iterations`.
    """

    def __init__(
        self,
        queries: str,
        limit: int = 192,
        sampler: Sampler | None = None,
        principles: PrincipleSource | None = None,
        seed: int = 0,
    ) -> None:
        """Set the callback up.

        Args:
            queries: File of held-out sandbox queries, the sandbox's `validation.jsonl`.
            limit: Most queries used, the first ones of the file.
            sampler: Engine that answers; by default the built-in one with at most 96 new tokens.
            principles: Source of the opposed principles; `SandboxPrinciples()` if not given.
            seed: Of principles and answers; the same for every measurement.

        Raises:
            InputError: If `limit` is not positive.
        """
        if limit < 1:
            raise InputError(f"limit of SandboxMetrics must be at least 1, got {limit}")
        self.queries = queries
        self.limit = limit
        self.sampler = sampler or TransformersSampler(max_new_tokens=96, max_rows=128)
        self.principles = principles or SandboxPrinciples()
        self.seed = seed

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the policy that training starts from, unless the run is resumed."""
        if trainer.global_step == 0 and trainer.current_epoch == 0:
            self._log(trainer, pl_module, 0)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the policy as it is now, during training and under `validate`."""
        if trainer.sanity_checking:
            return
        # a validation within an iteration, or of a generator phase, is of no iteration's policy
        ends = trainer.state.fn == "fit" and trainer.is_last_batch
        ends = ends and not getattr(pl_module, "trains_generator", False)
        self._log(trainer, pl_module, int(pl_module.iteration) + 1 if ends else None)  # type: ignore[arg-type]

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, trained: int | None) -> None:
        generator = getattr(pl_module, "trains_generator", False) and trainer.global_step > 0
        queries = load_queries(self.queries)[: self.limit]
        with speaking(pl_module.policy, GENERATOR if generator else POLICY) as model:
            answers = _answers(
                model,
                pl_module.renderer,  # type: ignore[arg-type]
                queries,
                self.sampler,
                self.principles,
                self.seed,
            )
        numbers = answers_quality(answers)
        if trained is not None and trainer.is_global_zero:
            each = {q.id: answers_quality([a]) for q, a in zip(queries, answers, strict=True)}
            for metric in ("sandbox/quality", "sandbox/signal_accuracy"):
                scores = {name: own[metric] for name, own in each.items()}
                write_scores(Path(trainer.default_root_dir), metric, trained, scores)
        if generator:
            numbers = {k.replace("/", "/generator_"): v for k, v in numbers.items()}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in numbers.items()})
        log.info("sandbox: %s", ", ".join(f"{k[8:]} {v:.3f}" for k, v in numbers.items()))


class EnsureSandbox(Callback):
    """Builds the sandbox where there is none, so that a recipe runs from a fresh clone."""

    def __init__(self, folder: str, seed: int = 0) -> None:
        """Set the callback up.

        Args:
            folder: Where the sandbox is, or will be.
            seed: Of a sandbox that has to be built; one that is there is kept as it is.
        """
        self.folder = Path(folder)
        self.seed = seed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Build on process 0 while the others wait."""
        if trainer.is_global_zero and not is_sandbox(self.folder):
            log.info("no sandbox in %s yet: building it, which takes minutes", self.folder)
            make_sandbox(self.folder, seed=self.seed)
        trainer.strategy.barrier("sandbox")
