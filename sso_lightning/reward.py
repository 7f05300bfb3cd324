"""Reward models: a chat model with a scalar head that learns which of two answers is better.

They learn from SSO's pairs, from any preference data, or from both mixed. The run itself is that
of SSO: optimizer, schedule, skipped steps, metrics.csv, checkpoints and exact resume. What is read
is the whole conversation as the chat template writes it, so that
`tokenizer.apply_chat_template(messages)` and `AutoModelForSequenceClassification` of the exported
folder give the rewards that were trained.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from sso_lightning.data import Planned, ResumableDataModule, held_out_turns, loader, plan_batches
from sso_lightning.errors import InputError
from sso_lightning.formats import COMPARED, records_of
from sso_lightning.module import Schedule, SSOModule, _Gathered
from sso_lightning.policy import PolicyConfig, load_model, set_padding
from sso_lightning.prompts import ChatRenderer
from sso_lightning.records import Record, load_records, stream_seed
from sso_lightning.scoring import Tree, response_rewards, shares_prompts
from sso_lightning.sources import rows_of

log = logging.getLogger("sso_lightning")

# --------------------------------------------------------------------------------------- the loss


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, center: float = 0.0
) -> Tensor:
    """Negative log-likelihood of the preferences (Bradley and Terry 1952), centred.

    `-log sigmoid(r_w - r_l - margin) + center * (r_w + r_l)^2`: the margin is that of Llama 2
    (Touvron et al. 2023, arXiv 2307.09288, eq. 2), the second term that of Eisenstein et al. 2023
    (arXiv 2312.09244, eq. 4), which fixes the constant that preferences leave open.

    Args:
        chosen: Rewards r_w of the better answers [batch].
        rejected: Rewards r_l of the worse ones [batch].
        margin: How far they should be apart, per pair [batch] or one number.
        center: Weight of the second term.

    Returns:
        Losses [batch], to be minimised.

    >>> bradley_terry(torch.tensor([2.0]), torch.tensor([2.0]), center=0.01)
    tensor([0.8531])
    """
    loss = -F.logsigmoid(chosen - rejected - margin)
    return loss + center * (chosen + rejected) ** 2 if center else loss


# --------------------------------------------------------------------------------------- the model


def find_pad_id(renderer: ChatRenderer, tokenizer: Any, name: str | None = None) -> int:
    """The token that fills short rows, which must not be one that ends an answer.

    A sequence classifier reads its reward at the last token that is not padding, so with the end
    token as padding it would read another place than the one that knows the whole answer.

    Args:
        renderer: The tokenizer's.
        tokenizer: A Hugging Face tokenizer.
        name: The token's text; by default the tokenizer's padding token or, if that ends answers,
            an added token that has "pad" in its name.

    Raises:
        InputError: There is none.
    """
    if name is not None:
        vocabulary = tokenizer.get_vocab()
        if name not in vocabulary:
            raise InputError(f"model.pad_token: the tokenizer has no token {name!r}")
        found = [vocabulary[name]]
    else:
        own = [] if tokenizer.pad_token_id is None else [tokenizer.pad_token_id]
        added = tokenizer.added_tokens_decoder.items()
        found = own + [i for i, token in added if "pad" in str(token).lower()]
    last = renderer.render_answered([{"role": "user", "content": "?"}], "!")[-1]
    fitting = [i for i in found if i != last and i not in renderer.stop_ids]
    if not fitting:
        given = name or tokenizer.pad_token
        why = f"{given!r} ends answers as well" if given else "the tokenizer has none"
        raise InputError(f"model.pad_token: {why}; name one of its tokens that no text holds")
    return int(fitting[0])


def padded(rows: Sequence[Sequence[int]], pad_id: int, device: Any = None) -> dict[str, Tensor]:
    """Token ids as a classifier takes them, filled on the right.

    >>> padded([[5, 6, 7], [8]], 0)
    {'input_ids': tensor([[5, 6, 7],
            [8, 0, 0]]), 'attention_mask': tensor([[1, 1, 1],
            [1, 0, 0]])}
    """
    ids = [torch.tensor(row, device=device) for row in rows]
    ones = [torch.ones_like(row) for row in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence(ones, batch_first=True),
    }


def tree_of(rows: Sequence[list[int]]) -> Tree:
    """What rows of token ids begin with, and how each goes on, by one token at least.

    >>> tree_of([[5, 6, 7], [5, 6, 8, 9]])
    Tree(prompt=[5, 6], responses=[[7], [8, 9]])
    """
    alike = takewhile(lambda column: len({*column}) == 1, zip(*rows, strict=False))
    width = min(len([*alike]), min(map(len, rows)) - 1)
    return Tree(rows[0][:width], [row[width:] for row in rows])


def rewards_of(model: Any, groups: Sequence[Sequence[list[int]]]) -> Tensor:
    """Rewards of conversations, those of a group being answers to the same prompt.

    The prompt is computed once where the architecture is proven for that, see `scoring`; others
    take plain padded rows.

    Args:
        model: A sequence classifier with one label and a padding token, wrapped by PEFT or not.
        groups: Token ids of whole conversations.

    Returns:
        Rewards of all conversations of all groups, in order; at least float32.
    """
    if shares_prompts(model):
        return response_rewards(model, [tree_of(rows) for rows in groups])
    rows = [row for group in groups for row in group]
    inputs = padded(rows, model.config.pad_token_id, next(model.parameters()).device)
    logits: Tensor = model(**inputs, use_cache=False).logits.squeeze(-1)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# ---------------------------------------------------------------------------------------- the data


@dataclass
class PairSet:
    """Where pairs come from, and how much they count.

    Attributes:
        path: A run folder (all of its iterations), or any file, folder or hf:NAME of pairs.
        weight: Factor on the loss of its pairs. A step is a weighted mean, so only the ratio of
            the sets' weights matters.
        limit: Most pairs taken, drawn by the seed; None takes all.
        name: In metrics and messages; the file's or folder's name if not given.
        context: Which comparison of our own records: y+ over y- under the plain query ("query") or
            under the good principle ("good"), or yo over y+ under the bad one ("bad").
        iteration: Only the pairs of this iteration.
        margin: Column that holds how far the rewards of a pair should be apart.
        columns: Our field to the column that holds it, such as {prompt: question, chosen: best}.
    """

    path: str
    weight: float = 1.0
    limit: int | None = None
    name: str | None = None
    context: Literal["query", "good", "bad"] = "query"
    iteration: int | None = None
    margin: str | None = None
    columns: dict[str, str] | None = None

    def __post_init__(self) -> None:
        wrong = []
        if not (math.isfinite(self.weight) and self.weight > 0):
            wrong.append(f"weight must be above 0, got {self.weight}")
        if self.limit is not None and self.limit < 1:
            wrong.append(f"limit must be at least 1, got {self.limit}")
        if self.iteration is not None and (self.columns or self.margin):
            wrong.append("columns and margin are for data of others, iteration is for our own")
        if wrong:
            raise InputError(f"data.sets: {self.path}: {'; '.join(wrong)}")

    @property
    def label(self) -> str:
        """The set's name."""
        return self.name or Path(self.path).stem

    def read(self) -> tuple[list[Record], list[float]]:
        """All of its records, and their margins (0 where there is no such column)."""
        if self.columns:
            records = load_records(self.path, self.columns)
        else:
            records = records_of(self.path, self.iteration)
        if not self.margin:
            return records, [0.0] * len(records)
        rows = rows_of(self.path)
        if len(rows) != len(records):  # a run folder holds more than its pairs
            raise InputError(f"data.sets: {self.path}: margin {self.margin!r} needs a file")
        return records, [_number(row.get(self.margin), row.what(self.margin)) for row in rows]


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise InputError(f"{what} must be a number, got {value!r}")
    return number


@dataclass(frozen=True)
class RewardPair:
    """Two whole conversations as token ids, the first one preferred."""

    id: str
    chosen: list[int]
    rejected: list[int]
    margin: float = 0.0
    weight: float = 1.0

    @property
    def size(self) -> int:
        """Tokens of two rows as long as the longer one; a shared prompt takes fewer."""
        return 2 * max(len(self.chosen), len(self.rejected))


def tokenize(
    records: Iterable[Record],
    renderer: ChatRenderer,
    where: str,
    context: Literal["query", "good", "bad"] = "query",
) -> Iterator[tuple[list[int], list[int]]]:
    """The conversations that a context compares, see `formats.COMPARED`.

    Args:
        records: Ours, or what `load_records` reads.
        renderer: Of the reward model's tokenizer.
        where: The source, for errors.
        context: The comparison.

    Yields:
        Token ids of the better and of the worse conversation.

    Raises:
        InputError: A record lacks what the context compares.
    """
    for record in records:
        system = None if context == "query" else getattr(record, f"{context}_system")
        answers = [getattr(record, response) for response in COMPARED[context]]
        if system == "" or not all(answers):
            lacks = f"{context}_system" if system == "" else "original"
            raise InputError(
                f"{where}: record {record.id!r} has no {lacks}, which context {context} compares"
            )
        better, worse = (renderer.render_answered(record.messages, a, system) for a in answers)
        yield better, worse


class RewardBatch:
    """One batch of pairs.

    Attributes:
        ids: Record ids, for error messages.
        rows: Token ids of each pair's better and worse conversation.
        margin: Margins [pairs].
        weight: Factors on the pairs' losses [pairs].
        scale: Factor on the batch's weighted mean that makes an optimizer step the weighted mean
            over all of its pairs; 0 if the batch does not count.
        closes_step: Whether the optimizer steps after this batch.
    """

    def __init__(self, pairs: Sequence[RewardPair]) -> None:
        self.ids = [pair.id for pair in pairs]
        self.rows = [(pair.chosen, pair.rejected) for pair in pairs]
        self.margin = torch.tensor([pair.margin for pair in pairs])
        self.weight = torch.tensor([pair.weight for pair in pairs])
        self.scale = 1.0
        self.closes_step = True

    def to(self, device: torch.device) -> RewardBatch:
        """Move margins and weights; token ids are laid out on the model's device."""
        self.margin, self.weight = self.margin.to(device), self.weight.to(device)
        return self


class _Batches(Planned):
    """Batches of pairs, which count by the pairs' weights."""

    def __init__(self, pairs: Sequence[RewardPair], *planned: Any, **more: Any) -> None:
        """See `data.Planned`."""
        super().__init__(*planned, **more)
        self.pairs = pairs

    def collate(self, indices: Sequence[int]) -> RewardBatch:
        """The pairs of some indices."""
        return RewardBatch([self.pairs[i] for i in indices])

    def weight(self, indices: Sequence[int]) -> float:
        """The sum of their weights."""
        return math.fsum(self.pairs[i].weight for i in indices)


class RewardDataModule(ResumableDataModule):
    """Pairs for a reward model: one or more sets, mixed, and held-out sets.

    An epoch is a pass over all pairs, in an order that is a function of (seed, epoch).
    """

    def __init__(
        self,
        sets: list[PairSet],
        val_sets: list[PairSet] | None = None,
        batch_size: int = 8,
        max_tokens: int | None = None,
        max_length: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Set the data up. Files are read before weights are loaded.

        Args:
            sets: What is trained on.
            val_sets: What is measured on, each on its own; their weights are not used.
            batch_size: Pairs per batch and process; with `max_tokens`, the most there can be.
            max_tokens: Most tokens per training batch and process, padding included; batches then
                hold as many pairs as fit, of like size.
            max_length: Pairs with a longer conversation (tokens) are left out and counted.
            num_workers: Worker processes of each loader.
            seed: Of drawing and order; the run's own.
        """
        super().__init__()
        numbers = {"batch_size": batch_size, "max_tokens": max_tokens, "max_length": max_length}
        wrong = [
            f"data.{k} must be at least 1, got {v}"
            for k, v in numbers.items()
            if v is not None and v < 1
        ]
        if num_workers < 0:
            wrong.append(f"data.num_workers must be 0 or more, got {num_workers}")
        if not sets:
            wrong.append("data.sets is empty; give at least one {path: ...}")
        labels = [each.label for each in val_sets or []]
        twice = [label for label in labels if labels.count(label) > 1]
        if twice:
            wrong.append(f"data.val_sets: two sets are named {twice[0]!r}; give them a name")
        if wrong:
            raise InputError("; ".join(wrong))
        self.sets = sets
        self.val_sets = val_sets or []
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.max_length = max_length
        self.num_workers = num_workers
        self.seed = seed
        self._train: list[RewardPair] = []
        self._val: list[list[RewardPair]] = []

    def read(self, stage: str, renderer: ChatRenderer) -> None:
        """Read and tokenize, before weights are loaded; callbacks may have made the files."""
        if stage == "fit" and not self._train:
            self._train = [p for each in self.sets for p in self._pairs(each, renderer)]
        if stage != "fit" and not self.val_sets:
            raise InputError("data.val_sets: give at least one set to measure on")
        if not self._val:
            self._val = [self._pairs(each, renderer) for each in self.val_sets]

    # ------------------------------------------------------------------ what Lightning calls

    def train_dataloader(self) -> DataLoader[RewardBatch]:
        """Batches of the current epoch, from where a checkpoint was taken."""
        trainer = self._trainer
        turns = self._plan()
        if not turns:
            raise InputError(
                f"data.sets: {len(self._train)} pairs are too few for {trainer.world_size} "
                "processes"
            )
        limit = trainer.limit_train_batches or 1.0
        batches = _Batches(
            self._train,
            turns,
            accumulate=trainer.accumulate_grad_batches,
            limit=limit if isinstance(limit, int) else int(limit * len(turns)),
            rank=trainer.global_rank,
        )
        return self._loader(batches, self.batches_done(trainer.current_epoch))

    def val_dataloader(self) -> list[DataLoader[RewardBatch]]:
        """A loader for each held-out set."""
        return [self._held_out(pairs) for pairs in self._val]

    def test_dataloader(self) -> list[DataLoader[RewardBatch]]:
        """The same held-out sets as validation."""
        return self.val_dataloader()

    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-len(self._plan()) // self._trainer.accumulate_grad_batches)

    def transfer_batch_to_device(
        self, batch: RewardBatch, device: torch.device, dataloader_idx: int
    ) -> RewardBatch:
        """Margins and weights move."""
        return batch.to(device)

    # ------------------------------------------------------------------ what is behind it

    def _pairs(self, each: PairSet, renderer: ChatRenderer) -> list[RewardPair]:
        records, margins = each.read()
        chosen = range(len(records))
        if each.limit is not None and each.limit < len(records):
            rng = random.Random(stream_seed(self.seed, "pairs", each.label))
            chosen = sorted(rng.sample(chosen, each.limit))  # type: ignore[assignment]
        kept = [records[i] for i in chosen]
        ids = tokenize(kept, renderer, each.path, each.context)
        pairs = [
            RewardPair(record.id, better, worse, margins[i], each.weight)
            for i, record, (better, worse) in zip(chosen, kept, ids, strict=True)
        ]
        short = [p for p in pairs if not self.max_length or p.size <= 2 * self.max_length]
        if not short:
            raise InputError(f"{each.path}: every pair is longer than data.max_length")
        self._tell(each, len(short), len(pairs) - len(short))
        return short

    @rank_zero_only
    def _tell(self, each: PairSet, kept: int, long: int) -> None:
        left = f", {long} longer than data.max_length left out" if long else ""
        log.info("%s: %d pairs%s", each.path, kept, left)

    def _plan(self) -> list[list[list[int]]]:
        return plan_batches(
            [pair.size for pair in self._train],
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            seed=self.seed,
            epoch=self._trainer.current_epoch,
            world=self._trainer.world_size,
        )

    def _held_out(self, pairs: Sequence[RewardPair]) -> DataLoader[RewardBatch]:
        rank, world = self._trainer.global_rank, self._trainer.world_size
        turns, padding = held_out_turns(len(pairs), self.batch_size, rank, world)
        return self._loader(_Batches(pairs, turns, padding=padding))

    def _loader(self, batches: _Batches, start: int = 0) -> DataLoader[RewardBatch]:
        return loader(batches, start, self.seed, self.num_workers)


# --------------------------------------------------------------------------------------- the module


class RewardModule(SSOModule):
    """Trains a reward model on pairs.

    It shares with `SSOModule` all that is not about log-probabilities: optimizer, schedule,
    skipped steps, checkpoints, sharding, export.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        center: float = 0.0,
        pad_token: str | None = None,
        optimizer: Callable[[Iterable[torch.nn.Parameter]], Optimizer] | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        """Keep the settings; weights are loaded in `configure_model`.

        Args:
            policy: Which model becomes the reward model, and how it is held in memory. A chat model
                gets a fresh head; a reward model goes on with its own.
            center: Weight of the squared sum of a pair's rewards, which keeps their mean near 0.
            pad_token: Token that fills short rows; by default the tokenizer's own, if it does not
                end answers as well.
            optimizer: Optimizer class and its settings; AdamW with its own defaults if not given.
            schedule: Learning rate over the steps of the run; with restart: true, of each epoch.
        """
        if not (math.isfinite(center) and center >= 0):
            raise InputError(f"model.center must be 0 or more, got {center}")
        run = schedule or Schedule(restart=False)
        super().__init__(policy, cast(Any, None), optimizer, run)
        self.center = center
        self.pad_token = pad_token
        self._pad_id = -1
        self._held_out: dict[str, _Gathered] = {}

    def setup(self, stage: str) -> None:
        """Read the data: it needs the tokenizer."""
        self.load_tokenizer()
        self.trainer.datamodule.read(stage, self.renderer)  # type: ignore[attr-defined]

    def load_tokenizer(self) -> None:
        """Load the tokenizer, probe its chat template, find the padding token."""
        if self.tokenizer is None:
            super().load_tokenizer()
            self._pad_id = find_pad_id(self.renderer, self.tokenizer, self.pad_token)

    def load_weights(self) -> Any:
        """The classifier."""
        model = load_model(self.policy_config, kind="reward")
        set_padding(model, self.tokenizer, self._pad_id)
        return model

    # ------------------------------------------------------------------ steps

    def _judge(self, batch: RewardBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's weighted mean loss, and what is worth knowing of its rewards."""
        chosen, rejected = rewards_of(self.policy, batch.rows).view(-1, 2).unbind(1)
        losses = bradley_terry(chosen, rejected, batch.margin, self.center)
        loss = (losses * batch.weight).sum() / batch.weight.sum()
        chosen, rejected = chosen.detach(), rejected.detach()
        return loss, {
            "accuracy": (chosen > rejected).float().mean(),
            "margin": (chosen - rejected).mean(),
            "reward": (chosen + rejected).mean() / 2,
        }

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One batch; the loss of an optimizer step is the weighted mean over its pairs."""
        loss, metrics = self._judge(batch)
        # the weighted mean over a step, whatever the batches it was accumulated from
        self._step_metrics.update({"loss": loss.detach()}, weight=batch.scale)
        self._step_metrics.update(metrics, weight=len(batch.ids))
        if batch.closes_step:
            values = self._step_metrics.take()
            self._loss_is_finite = bool(values["loss"].isfinite())
            self.log_dict({f"train/{k}": v for k, v in values.items()})
            self.log("loss", values["loss"], prog_bar=True, logger=False)
        return cast(Tensor, loss * batch.scale)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss, accuracy, margin and mean reward on a held-out set."""
        loss, metrics = self._judge(batch)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        name = data.val_sets[dataloader_idx].label
        gathered = self._held_out.setdefault(name, _Gathered())
        gathered.update({"loss": loss, **metrics}, weight=len(batch.ids) if batch.scale else 0)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log each set's means under `val/NAME/`, and their mean over sets under `val/`."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`, under `test/`."""
        self._log_held_out("test")

    def _log_held_out(self, stage: str) -> None:
        found = {name: metrics.take() for name, metrics in self._held_out.items()}
        self._held_out.clear()
        for name, each in found.items():
            self._say("%s: accuracy %.3f, loss %.3f", name, each["accuracy"], each["loss"])
        for key in ("loss", "accuracy", "margin", "reward"):
            values: Mapping[str, Tensor] = {name: each[key] for name, each in found.items()}
            if len(values) > 1:
                self.log_dict({f"{stage}/{name}/{key}": v for name, v in values.items()})
            self.log(f"{stage}/{key}", torch.stack([*values.values()]).mean())

    @rank_zero_only
    def _say(self, *told: Any) -> None:
        log.info(*told)

    def on_train_epoch_end(self) -> None:
        """Nothing: there is no IPO target."""

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As `SSOModule`, and say that it is a reward model."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["kind"] = "reward"
        checkpoint["pad_id"] = self._pad_id
