"""Built-in callbacks: pairs for every iteration, guards, export."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from sso_lightning.checkpoints import Checkpoints
from sso_lightning.data import PairBatch
from sso_lightning.errors import InputError
from sso_lightning.module import SSOModule
from sso_lightning.pairs import (
    SCORED,
    PairBuilder,
    PairFilter,
    apply_filters,
    digest,
    fill_shards,
    score,
)
from sso_lightning.policy import POLICY, fingerprint, initial_policy, save_policy, speaking
from sso_lightning.principles import PredefinedPrinciples, PrincipleSource
from sso_lightning.processes import Processes
from sso_lightning.records import (
    RESPONSES,
    PairStore,
    Query,
    Record,
    load_records,
)
from sso_lightning.sampling import Sampler, TransformersSampler
from sso_lightning.sharding import gathered, uneven_calls

log = logging.getLogger("sso_lightning")


class PairCallback(Callback):
    """A callback that is told when a set of pairs was built; for your own files too."""

    def on_pairs_built(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        records: Sequence[Record],
        report: dict[str, float],
        name: str,
    ) -> None:
        """Called on process 0 when a set was sampled, cleaned and scored, and not trained on yet.

        A policy that is sharded is whole then, and may be called without the other processes.

        Args:
            trainer: The trainer.
            pl_module: The module; its policy is the one that sampled.
            records: The records kept.
            report: The set's `pairs/...` numbers (see `pairs.report`).
            name: `iteration-NN`, `iteration-NN/validation`, `validation-...` or `predict`; in a
                generator phase `generator-NN` for `iteration-NN`.
        """


class RegeneratePairs(Callback):
    """Makes the pairs of every iteration with the policy in training.

    Attaches itself to the data module, which asks it at the start of an epoch, before the policy
    moves. Every process samples and scores its part of the shards.
    """

    def __init__(
        self,
        sampler: Sampler | None = None,
        principles: PrincipleSource | None = None,
        reference: Literal["previous", "initial"] = "previous",
        max_prompt_tokens: int = 4096,
        score_tokens: int = 16384,
        shard_size: int = 256,
        filters: list[PairFilter] | None = None,
        token_scores: bool = False,
    ) -> None:
        """Set the callback up.

        Args:
            sampler: Engine that answers the prompts; `TransformersSampler()` if not given.
            principles: Source of the opposed principles; `PredefinedPrinciples()` if not given.
            reference: The policy at the start of the iteration (as in the papers), or at the
                start of the run.
            max_prompt_tokens: Queries with a longer prompt are dropped and counted, never cut.
            score_tokens: Token budget of one scoring batch.
            shard_size: Queries per shard; what a killed run can lose.
            filters: Rules that leave pairs out of the training (see `filters`), in order. The
                files and the held-out pairs keep all.
            token_scores: Store the log-probability of every token of the answers under each of
                their prompts, by which the report shades them: 8 bytes per token and prompt before
                compression. What an objective needs token by token is stored in any case.
        """
        numbers = {
            "max_prompt_tokens": max_prompt_tokens,
            "score_tokens": score_tokens,
            "shard_size": shard_size,
        }
        wrong = [f"pairs.{k} must be at least 1, got {v}" for k, v in numbers.items() if v < 1]
        if reference not in ("previous", "initial"):
            wrong.append(f"pairs.reference must be previous or initial, got {reference!r}")
        if wrong:
            raise InputError("; ".join(wrong))
        self.sampler = sampler or TransformersSampler()
        self.principles = principles or PredefinedPrinciples()
        self.reference = reference
        self.max_prompt_tokens = max_prompt_tokens
        self.score_tokens = score_tokens
        self.shard_size = shard_size
        self.filters = filters or []
        self.token_scores = token_scores
        self._trainer: pl.Trainer
        self._writers: dict[str, dict[str, str]] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Attach to the data module; check files and chat template before weights are loaded."""
        assert isinstance(pl_module, SSOModule)
        every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if stage == "fit" and every != 1:
            raise InputError(
                f"trainer.reload_dataloaders_every_n_epochs is {every}; it must be 1, or later "
                "iterations would train on the pairs of the first"
            )
        self._trainer = trainer
        trainer.datamodule.regenerator = self  # type: ignore[attr-defined]
        trainer.datamodule.check_files()  # type: ignore[attr-defined]
        pl_module.load_tokenizer()
        trainer.datamodule.check_pairs()  # type: ignore[attr-defined]
        log.info(
            "chat template: principles go into the %s",
            {"system": "system role", "fold": "last user turn"}[pl_module.renderer.mode],
        )

    @property
    def _module(self) -> SSOModule:
        module = self._trainer.lightning_module
        assert isinstance(module, SSOModule)
        return module

    def builder(self, iteration: int) -> PairBuilder:
        """The builder of an iteration's sets with the policy as it is now."""
        trainer, module = self._trainer, self._module
        # a set that is only validated needs a reference that differs from the policy that wrote it
        initial = self.reference == "initial" or trainer.state.fn in ("validate", "test")
        if module.generator and module.trains_generator:
            initial |= module.generator.start == "first"
        return PairBuilder(
            model=module.policy,
            renderer=module.renderer,
            sampler=self.sampler,
            principles=self.principles,
            seed=trainer.datamodule.seed,  # type: ignore[attr-defined]
            iteration=iteration,
            initial=partial(initial_policy, module.policy, module.policy_config)
            if initial
            else None,
            policy=partial(speaking, module.policy, POLICY) if module.writer != POLICY else None,
            token_sequences=SCORED if self.token_scores else module.objective.token_sequences,
            max_prompt_tokens=self.max_prompt_tokens,
            score_tokens=self.score_tokens,
            shard_size=self.shard_size,
            forward_context=self._forward_context,
            # the set of the first epoch is by a policy that no checkpoint holds
            replaces=trainer.state.fn == "fit" and trainer.current_epoch > 0,
        )

    def state_dict(self) -> dict[str, Any]:
        """Who wrote the sets that were built or read."""
        return {"writers": self._writers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a set of that policy only, when the checkpoint is from within an iteration."""
        self._writers = state_dict["writers"]

    def _resumed_within(self) -> bool:
        """Whether a fit goes on in the middle of the current iteration."""
        trainer = self._trainer
        done = trainer.datamodule.batches_done(trainer.current_epoch)  # type: ignore[attr-defined]
        return trainer.state.fn == "fit" and bool(done)

    def _forward_context(self) -> AbstractContextManager[Any]:
        return self._trainer.precision_plugin.forward_context()

    def build(self, queries: Sequence[Query], iteration: int, name: str) -> list[Record]:
        """Sample, clean, score and store a set (or continue or reread it).

        Args:
            queries: What to answer.
            iteration: Part of every seed.
            name: Folder below `pairs/` of the run.

        Returns:
            The records, on every process.
        """
        trainer, module = self._trainer, self._module
        if name.startswith("generator") and not self._resumed_within():
            module.start_generator()
        builder = self.builder(iteration)
        if self._resumed_within():
            builder.writer = self._writers.get(name, {})
        processes, folder = builder.processes, Path(trainer.default_root_dir) / "pairs"
        with speaking(module.policy, module.writer), gathered(module.policy):
            if name == "validation":
                # not an iteration's: every checkpoint that is validated has a set of its own
                name = f"validation-{digest(fingerprint(module.policy))}"
            records, report = builder.build(queries, folder / name)
            self._writers[name] = {"policy": records[0].policy, "adapter": records[0].adapter}
            kept, counts = self._filtered(records, name)
            with processes.together(), uneven_calls(module.policy):
                self._announce(records, report | counts, name)
        return kept

    def score(
        self, records: list[Record], sequences: Sequence[tuple[str, str]], name: str
    ) -> list[Record]:
        """Store the reference's log-probabilities of records from a file.

        The reference of offline training is the policy before any training, for the whole run.

        Args:
            records: With token ids.
            sequences: What the objective needs.
            name: Folder below `pairs/` of the run.

        Returns:
            The same records with `reference/...` scores, on every process.
        """
        folder = Path(self._trainer.default_root_dir) / "pairs" / name
        module = self._module
        texts = [[r.id, r.prompt_ids, r.response_ids] for r in records]
        identity = {
            "records": digest(texts),
            "sequences": [f"{c}/{r}" for c, r in sequences],
            "token_scores": [f"{c}/{r}" for c, r in module.objective.token_sequences],
            "reference": digest(asdict(module.policy_config)),
            "shard_size": self.shard_size,
        }
        processes = Processes.current()
        with processes.together():
            store = PairStore(folder, identity) if processes.first else None
        store = store or PairStore(folder, helps=True)
        if not store.complete:
            self._score_shards(store, records, sequences, processes)
            with processes.together():
                if processes.first:
                    store.finish({"pairs/kept": len(records)})
        kept, counts = self._filtered(load_records(folder), name)
        if counts and processes.first:
            log.info("%s: %d of %d pairs pass the filters", name, len(kept), len(records))
        return kept

    def _filtered(self, records: list[Record], name: str) -> tuple[list[Record], dict[str, float]]:
        """What is trained on; a set that is not for training keeps everything."""
        training = name.startswith(("iteration", "generator", "offline"))
        own = self.filters if training and "validation" not in name else []
        return apply_filters(own, records, name)

    def _score_shards(
        self,
        store: PairStore,
        records: list[Record],
        sequences: Sequence[tuple[str, str]],
        processes: Processes,
    ) -> None:
        """Score and write the shards that are missing."""
        module, size = self._module, self.shard_size
        with (
            gathered(module.policy),
            initial_policy(module.policy, module.policy_config) as model,
            self._forward_context(),
        ):

            def make(index: int) -> tuple[list[Record], dict[str, Any]]:
                chunk = records[index * size :][:size]
                score(
                    model,
                    chunk,
                    sequences,
                    who="reference",
                    max_tokens=self.score_tokens,
                    token_sequences=module.objective.token_sequences,
                )
                return chunk, {}

            count = -(-len(records) // size)
            fill_shards(store, count, make, model=model, processes=processes)

    def _announce(self, records: list[Record], report: dict[str, float], name: str) -> None:
        trainer = self._trainer
        kind = "val_" * ("validation" in name) + "generator_" * name.startswith("generator")
        numbers = {key.replace("pairs/", f"{kind}pairs/"): v for key, v in report.items()}
        if not self._resumed_within():  # the set's numbers were logged by the first part of the run
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)
        tensors = {key: torch.tensor(float(value)) for key, value in numbers.items()}
        trainer.callback_metrics.update(tensors)
        if not trainer.is_global_zero:
            return
        log.info(
            "%s: %d pairs kept, %d dropped; on-policy %.3f / %.3f, gap %.3f, %.0f tokens/s",
            name,
            report["pairs/kept"],
            report["pairs/dropped"],
            report["pairs/on_policy_good"],
            report["pairs/on_policy_bad"],
            report["pairs/gap_logp"],
            report["pairs/tokens_per_second"],
        )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PairCallback):
                callback.on_pairs_built(trainer, self._module, records, report, name)


class Guard(PairCallback):
    """Watches for training that goes nowhere: steps that are not finite, answers that say nothing.

    The module itself skips an optimizer step whose loss or gradient is not finite.
    """

    def __init__(
        self,
        max_skipped: int = 5,
        max_empty: float = 0.5,
        max_equal: float = 0.5,
        max_truncated: float = 0.5,
        max_repeating: float = 0.25,
        stop: bool = False,
    ) -> None:
        """Set the callback up.

        Args:
            max_skipped: Skipped optimizer steps in a row that end the run.
            max_empty: Share of a set's queries dropped for an empty answer that is too much.
            max_equal: Share of a set's queries dropped for equal answers that is too much.
            max_truncated: Share of answers of a kind cut by the length limit that is too much.
            max_repeating: Share of answers of a kind that are loops (see `pairs.repetition`) that
                is too much.
            stop: End the run when one of the four shares is too much, instead of a warning.
        """
        shares = {
            "empty": max_empty,
            "equal": max_equal,
            "truncated": max_truncated,
            "repeating": max_repeating,
        }
        wrong = [
            f"guard.max_{k} must be in [0, 1], got {v}"
            for k, v in shares.items()
            if not 0 <= v <= 1
        ]
        if max_skipped < 1:
            wrong.append(f"guard.max_skipped must be at least 1, got {max_skipped}")
        if wrong:
            raise InputError("; ".join(wrong))
        self.max_skipped = max_skipped
        self.shares = shares
        self.stop = stop
        self._ids: deque[str] = deque(maxlen=16)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PairBatch,
        batch_idx: int,
    ) -> None:
        """End the run after too many skipped steps in a row."""
        assert isinstance(pl_module, SSOModule)
        self._ids += batch.ids
        if not batch.closes_step or pl_module.skipped_in_row < self.max_skipped:
            return
        reason = InputError(
            f"{pl_module.skipped_in_row} optimizer steps in a row had a loss or gradient that is "
            f"not finite (guard.max_skipped); the last records were {', '.join(self._ids)}; "
            "the weights from before them are in checkpoints/last.ckpt; try a lower learning rate"
        )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoints):
                callback.end_with(reason)

    def on_pairs_built(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        records: Sequence[Record],
        report: dict[str, float],
        name: str,
    ) -> None:
        """Warn of (or stop at) answers that are empty, equal, cut or loops too often."""
        total = report["pairs/kept"] + report["pairs/dropped"]

        def dropped(word: str) -> float:
            return sum(v for k, v in report.items() if "pairs/dropped_" in k and word in k) / total

        found = {"empty": dropped("empty_"), "equal": dropped("_equals_")}
        for kind in ("truncated", "repeating"):
            found[kind] = max(report[f"pairs/{kind}_{r}"] for r in RESPONSES)
        wrong = [
            f"{share:.0%} {kind} (guard.max_{kind}: {self.shares[kind]})"
            for kind, share in found.items()
            if share > self.shares[kind]
        ]
        if not wrong:
            return
        line = f"{name}: degenerate answers: {', '.join(wrong)}"
        if self.stop:
            raise InputError(f"{line}; look at the sampler, or raise the bound")
        log.warning("%s", line)


class ExportPolicy(Callback):
    """Writes the trained policy as a Hugging Face folder to `export/` when training ends."""

    def __init__(self, merge: bool = False) -> None:
        """Set the callback up.

        Args:
            merge: Fold LoRA adapters into the base instead of writing the adapter.
        """
        self.merge = merge

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export."""
        assert isinstance(pl_module, SSOModule)
        if trainer.interrupted:
            return
        out = Path(trainer.default_root_dir) / "export"
        policy, tokenizer, writes = pl_module.policy, pl_module.tokenizer, trainer.is_global_zero
        save_policy(policy, tokenizer, out, merge=self.merge, writes=writes)
        if writes:
            log.info("exported the model to %s", out)
