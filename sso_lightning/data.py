"""The data of a run: queries that become pairs every iteration, or pairs from a file.

One epoch is one iteration. `train_dataloader` asks the regenerator (attached by
`callbacks.RegeneratePairs`) for the set of the current epoch and plans its batches; the plan is
a function of (seed, epoch) alone, so a resumed run sees the same batches in the same order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from sso_lightning.errors import InputError
from sso_lightning.objectives import ContrastLogps
from sso_lightning.pairs import columns_of, rows_of, tokens_of, trees_of
from sso_lightning.prompts import ChatRenderer
from sso_lightning.records import (
    CONTEXTS,
    RESPONSES,
    Query,
    Record,
    load_queries,
    load_records,
    stream_seed,
)
from sso_lightning.scoring import Tree, response_logps, token_logps
from sso_lightning.sources import is_hub

Sequences = Sequence[tuple[str, str]]
Stored = TypeVar("Stored")

_COUNT = "queries_per_iteration"
_OWN = (_COUNT, "steps_per_iteration")  # where None means all, not the policy's number
SOURCES = ("queries", "val_queries", "predict_queries", "pairs", "val_pairs")
"""Settings of `SSODataModule` that name files."""

_WINDOW = 64  # batches of records that are sorted by size together


class Regenerator(Protocol):
    """What the data module asks for pairs."""

    def build(self, queries: Sequence[Query], iteration: int, name: str) -> list[Record]:
        """Sample, clean and score pairs with the current policy (see `pairs.PairBuilder`)."""
        ...

    def score(self, records: list[Record], sequences: Sequences, name: str) -> list[Record]:
        """Add the reference's log-probabilities to records from a file."""
        ...


@dataclass
class GeneratorData:
    """What a generator phase trains on, where it differs from the policy phase.

    Attributes:
        queries_per_iteration: As in `SSODataModule`; None uses all queries.
        batch_size: Records per batch and process; None takes the policy's.
        passes: Times every record is trained on; None takes the policy's.
        steps_per_iteration: Most optimizer steps of the phase; None sees every record.
    """

    queries_per_iteration: int | None = None
    batch_size: int | None = None
    passes: int | None = None
    steps_per_iteration: int | None = None


class PairBatch:
    """One batch of records, ready to be scored.

    Not a dataclass: the trainer's half precision walks into those and would round the reference.

    Attributes:
        ids: Record ids, for error messages.
        trees: One per record and context, records in order.
        sequences: What the trees hold, as `pairs.columns_of` needs it.
        reference: Stored log-probabilities of the reference, float64 `[records]`.
        scale: Factor on the mean loss that makes an optimizer step the mean over its examples,
            whatever the sizes of the batches accumulated into it; 0 if the batch does not count.
        closes_step: Whether the optimizer steps after this batch.
    """

    def __init__(
        self,
        ids: list[str],
        trees: list[Tree],
        sequences: Sequences,
        reference: ContrastLogps,
        scale: float = 1.0,
        closes_step: bool = True,
    ) -> None:
        self.ids = ids
        self.trees = trees
        self.sequences = sequences
        self.reference = reference
        self.scale = scale
        self.closes_step = closes_step

    def to(self, device: torch.device) -> PairBatch:
        """Move the reference; scoring lays token ids out itself, on the model's device."""

        def move(values: Any) -> Any:
            kind = torch.float32 if device.type == "mps" else torch.float64
            return {
                k: v.to(device, kind) if v.is_floating_point() else v.to(device)
                for k, v in values.items()
            }

        reference = self.reference
        parts = (reference.logps, reference.lengths, reference.tokens)
        self.reference = ContrastLogps(*map(move, parts))
        return self


def score_batch(model: Any, batch: PairBatch, max_tokens: int | None = None) -> ContrastLogps:
    """Log-probabilities of a batch by a model, with gradient, as an objective takes them.

    Args:
        model: A transformers causal language model, wrapped by PEFT or not, sharded or not.
        batch: As `PlannedBatches` gives it.
        max_tokens: Most tokens of one forward call, see `scoring.response_logps`.
    """
    by_token: dict[tuple[str, str], Tensor] = {}
    if batch.reference.tokens:
        parts = token_logps(model, batch.trees, max_tokens=max_tokens)
        for sequence in batch.reference.tokens:
            rows = [*rows_of(parts, batch.sequences, sequence)]
            by_token[sequence] = pad_sequence(rows, batch_first=True)
        logps = torch.stack([part.sum() for part in parts])
        lengths = torch.tensor([len(part) for part in parts], device=logps.device)
    else:
        logps, lengths = response_logps(model, batch.trees, max_tokens=max_tokens)
    counts = columns_of(lengths, batch.sequences)
    return ContrastLogps(
        columns_of(logps, batch.sequences),
        {r: counts[c, r] for c, r in batch.sequences},
        by_token,
    )


def collate(
    records: Sequence[Record], sequences: Sequences, token_sequences: Sequences = ()
) -> PairBatch:
    """Records to a batch of exactly the sequences an objective names.

    >>> record = Record(id="a", messages=[{"role": "user", "content": "Hi"}], good="Yes", bad="No",
    ...     prompt_ids={"query": [5, 6]}, response_ids={"good": [7, 8, 2], "bad": [9, 2]},
    ...     scores={"policy/query/good": -1.5, "policy/query/bad": -4.0})
    >>> batch = collate([record], [("query", "good"), ("query", "bad")])
    >>> batch.trees
    [Tree(prompt=[5, 6], responses=[[7, 8, 2], [9, 2]])]
    >>> batch.reference.logps["query", "bad"], batch.reference.lengths["good"]
    (tensor([-4.], dtype=torch.float64), tensor([3]))
    """
    logps = {
        (c, r): torch.tensor([_stored(x.scores, f"{c}/{r}") for x in records], dtype=torch.float64)
        for c, r in sequences
    }
    lengths = {
        r: torch.tensor([len(x.response_ids[r]) for x in records])
        for r in dict.fromkeys(r for _, r in sequences)
    }
    tokens = {
        (c, r): pad_sequence(
            [
                torch.tensor(_stored(x.token_scores, f"{c}/{r}"), dtype=torch.float64)
                for x in records
            ],
            batch_first=True,
        )
        for c, r in token_sequences
    }
    return PairBatch(
        [x.id for x in records],
        trees_of(records, sequences),
        sequences,
        ContrastLogps(logps, lengths, tokens),
    )


def _stored(scores: Mapping[str, Stored], key: str) -> Stored:
    """The reference's log-probabilities: the sampling policy's, unless others were stored."""
    return scores[f"reference/{key}"] if f"reference/{key}" in scores else scores[f"policy/{key}"]


def plan_batches(
    sizes: Sequence[int],
    *,
    batch_size: int,
    max_tokens: int | None = None,
    seed: int,
    epoch: int,
    passes: int = 1,
    world: int = 1,
) -> list[list[list[int]]]:
    """Indices of each batch of an epoch, a function of the arguments alone.

    Args:
        sizes: Tokens of each record of the set.
        batch_size: Most records per batch and process.
        max_tokens: Most tokens per batch and process; a larger record gets a batch of its own.
            The records of a shuffled window are then sorted by size, so that the processes get
            batches of like size, and the batches are shuffled.
        seed: Seed of the run.
        epoch: The epoch; every pass over every epoch has its own order.
        passes: Times every record is seen.
        world: Number of processes.

    Returns:
        For each turn, one batch per process. Every process gets equally many, none empty: up to
        `world - 1` records at the end of a pass's order sit that pass out where they cannot be
        shared out otherwise.
    """
    turns = []
    for number in range(passes):
        rng = random.Random(stream_seed(seed, epoch, "order", number))
        order = list(range(len(sizes)))
        rng.shuffle(order)
        if max_tokens is None:
            shared = order[: len(order) - len(order) % world]
            every = batch_size * world
            wholes = [shared[i : i + every] for i in range(0, len(shared), every)]
            turns += [[whole[rank::world] for rank in range(world)] for whole in wholes]
            continue
        batches: list[list[int]] = []
        window = _WINDOW * batch_size * world
        for start in range(0, len(order), window):
            tokens = 0
            batches.append([])
            for index in sorted(order[start : start + window], key=lambda i: sizes[i]):
                full = len(batches[-1]) == batch_size or tokens + sizes[index] > max_tokens
                if full and batches[-1]:
                    batches.append([])
                    tokens = 0
                batches[-1].append(index)
                tokens += sizes[index]
        while len(batches) % world and (largest := max(batches, key=len))[1:]:
            at, half = batches.index(largest), len(largest) // 2
            batches[at : at + 1] = [largest[:half], largest[half:]]
        of_pass = [batches[i : i + world] for i in range(0, len(batches) // world * world, world)]
        rng.shuffle(of_pass)
        turns += of_pass
    return turns


class Planned(Dataset[Any]):
    """A planned epoch of one process: item i is its i-th batch.

    A batch has a `scale`, the factor on its mean loss that makes an optimizer step the mean over
    all that is in it, and `closes_step`.
    """

    def __init__(
        self,
        turns: Sequence[Sequence[Sequence[int]]],
        accumulate: int = 1,
        limit: int | None = None,
        rank: int = 0,
        padding: int = 0,
    ) -> None:
        """Plan an epoch.

        Args:
            turns: Indices of each batch of every process, as `plan_batches` gives them.
            accumulate: Batches per optimizer step.
            limit: Batches that will be asked for, if not all.
            rank: This process.
            padding: Batches at the end that do not count (their scale is 0): the processes of a
                sharded model must call it equally often.
        """
        self.turns = turns
        self.accumulate = accumulate
        self.limit = min(len(turns), limit or len(turns))
        self.rank = rank
        self.padding = padding

    def collate(self, indices: Sequence[int]) -> Any:
        """The batch of some indices."""
        raise NotImplementedError

    def weight(self, indices: Sequence[int]) -> float:
        """How much a batch counts within its step."""
        return len(indices)

    def __len__(self) -> int:
        return len(self.turns)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        turn = self.turns[index]
        batch = self.collate(turn[self.rank])
        first = index - index % self.accumulate
        window = self.turns[first : min(first + self.accumulate, self.limit)]
        # the trainer divides every loss by `accumulate`, also in a last, shorter window, and the
        # sum over the processes by their number
        of_step = math.fsum(self.weight(other) for each in window for other in each)
        batch.scale = self.weight(turn[self.rank]) / of_step * self.accumulate * len(turn)
        if index >= len(self) - self.padding:
            batch.scale = 0.0
        batch.closes_step = index + 1 == min(first + self.accumulate, self.limit)
        return batch


class PlannedBatches(Planned):
    """Batches of records."""

    def __init__(
        self,
        records: Sequence[Record],
        turns: Sequence[Sequence[Sequence[int]]],
        sequences: Sequences,
        accumulate: int = 1,
        limit: int | None = None,
        rank: int = 0,
        token_sequences: Sequences = (),
        padding: int = 0,
    ) -> None:
        """See `Planned`.

        Args:
            records: The set.
            turns: See there.
            sequences: What the objective needs.
            accumulate: See there.
            limit: See there.
            rank: See there.
            token_sequences: What the objective needs token by token.
            padding: See there.
        """
        super().__init__(turns, accumulate, limit, rank, padding)
        self.records = records
        self.sequences = sequences
        self.token_sequences = token_sequences

    def collate(self, indices: Sequence[int]) -> PairBatch:
        """Collated records."""
        records = [self.records[i] for i in indices]
        return collate(records, self.sequences, self.token_sequences)


def held_out_turns(
    count: int, size: int, rank: int, world: int
) -> tuple[list[list[Sequence[int]]], int]:
    """Batches of a process over a held-out set, and how many at their end are only padding.

    With fewer items than processes each one takes them all: none is left without metrics, and the
    mean over copies is the mean.
    """
    order = range(rank, count, world) if world <= count else range(count)
    turns: list[list[Sequence[int]]] = [[order[i : i + size]] for i in range(0, len(order), size)]
    most = count if world > count else -(-count // world)
    padding = -(-most // size) - len(turns)
    return turns + turns[-1:] * padding, padding


def loader(planned: Planned, start: int, seed: int, num_workers: int) -> DataLoader[Any]:
    """A loader of planned batches, from number `start` on."""
    # a loader draws a seed when it starts: from a generator of its own, or a resumed run, which
    # starts another number of loaders, would go on with other random numbers
    own = torch.Generator().manual_seed(seed)
    order = _From(start, len(planned))
    return DataLoader(
        planned, batch_size=None, sampler=order, num_workers=num_workers, generator=own
    )


class _From(Sampler[int]):
    """Indices from `start` on. The length is that of the whole epoch: the trainer counts on."""

    def __init__(self, start: int, count: int) -> None:
        self.start = start
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.count))

    def __len__(self) -> int:
        return self.count


class ResumableDataModule(pl.LightningDataModule):
    """A data module whose epochs are planned, so that a run can go on in the middle of one."""

    def __init__(self) -> None:
        """Begin at the start."""
        super().__init__()
        self._entered = (-1, 0)  # (epoch, batches trained on) of the checkpoint

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many of its batches were trained on."""
        progress = self._trainer.fit_loop.epoch_loop.batch_progress.current
        return {"epoch": self._trainer.current_epoch, "batches": progress.ready}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the batches that were trained on."""
        self._entered = (state_dict["epoch"], state_dict["batches"])

    def batches_done(self, epoch: int) -> int:
        """Batches of an epoch that were trained on before the run was resumed."""
        return self._entered[1] if self._entered[0] == epoch else 0

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.trainer is not None
        return self.trainer


class SSODataModule(ResumableDataModule):
    """Queries for training and validation, or pair files for offline training."""

    regenerator: Regenerator | None = None

    def __init__(
        self,
        queries: str | None = None,
        pairs: str | None = None,
        val_queries: str | None = None,
        val_pairs: str | None = None,
        predict_queries: str | None = None,
        columns: dict[str, str | dict[str, str]] | None = None,
        queries_per_iteration: int | None = None,
        val_limit: int | None = None,
        batch_size: int = 8,
        max_tokens: int | None = None,
        val_batch_size: int | None = None,
        passes: int = 1,
        steps_per_iteration: int | None = None,
        generator: GeneratorData | None = None,
        retokenize: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Set the data up. Files are read when training starts.

        Args:
            queries: Queries that get fresh pairs every iteration: a file (.jsonl, .json, .parquet,
                .csv, .tsv), a folder, or hf:OWNER/NAME:CONFIG/SPLIT (config and split optional).
            pairs: Finished pairs, for offline training instead of `queries`; sources as there.
            val_queries: Held-out queries; their pairs are sampled with the training set's.
            val_pairs: Held-out pairs, instead of `val_queries`.
            predict_queries: Queries that `predict` samples pairs for.
            columns: Our field to the column that holds it, such as {prompt: question, chosen:
                best}; or, for one source alone, {val_pairs: {prompt: question}}.
            queries_per_iteration: Queries used in one iteration, taken in turn from a seeded
                shuffle; None uses all of them every time.
            val_limit: Most held-out queries or pairs used.
            batch_size: Records per batch and process; with `max_tokens`, the most there can be.
            max_tokens: Most tokens per training batch and process, shared prompts counted once;
                batches then hold as many records as fit, of like size. An optimizer step is the
                mean over its records, however many there are.
            val_batch_size: Records per validation batch; `batch_size` if not given.
            passes: Times every record is trained on in its iteration.
            steps_per_iteration: Most optimizer steps of an iteration; None sees every record.
            generator: Numbers of the generator phases of a run with `model.generator`.
            retokenize: Tokenize the texts of a pair file anew, also where it holds token ids.
            num_workers: Processes that prepare batches.
            seed: Seed of queries and order; the command line sets it from `seed_everything`.

        Raises:
            InputError: If both or neither of queries and pairs are given, or a number is wrong.
        """
        super().__init__()
        if queries and pairs:
            raise InputError("data.queries and data.pairs are both set; keep one of them")
        if val_queries and val_pairs:
            raise InputError("data.val_queries and data.val_pairs are both set; keep one of them")
        numbers = {
            "batch_size": batch_size,
            "max_tokens": max_tokens,
            "passes": passes,
            "queries_per_iteration": queries_per_iteration,
            "val_limit": val_limit,
            "val_batch_size": val_batch_size,
            "steps_per_iteration": steps_per_iteration,
        }
        own = asdict(generator) if generator else {}
        numbers |= {f"generator.{key}": value for key, value in own.items()}
        wrong = [
            f"data.{k} must be at least 1, got {v}"
            for k, v in numbers.items()
            if v is not None and v < 1
        ]
        if num_workers < 0:
            wrong.append(f"data.num_workers must be 0 or more, got {num_workers}")
        if wrong:
            raise InputError("; ".join(wrong))
        self.queries = queries
        self.pairs = pairs
        self.val_queries = val_queries
        self.val_pairs = val_pairs
        self.predict_queries = predict_queries
        self.columns = columns or {}
        self._read: dict[str, list[Query]] = {}
        self._given: dict[str, list[Record]] = {}
        self.queries_per_iteration = queries_per_iteration
        self.val_limit = val_limit
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.val_batch_size = val_batch_size or batch_size
        self.passes = passes
        self.steps_per_iteration = steps_per_iteration
        self.generator = generator
        self.retokenize = retokenize
        self.num_workers = num_workers
        self.seed = seed
        self._built: int | None = None
        self._train: list[Record] = []
        self._val: list[Record] = []

    # ------------------------------------------------------------------ what Lightning calls

    def setup(self, stage: str) -> None:
        """Fail early if there is nothing to work on."""
        problems = self.problems(stage, self._module, self._trainer.max_steps)
        if problems:
            raise InputError(problems[0])

    def problems(self, stage: str, module: Any, max_steps: int) -> list[str]:
        """What contradicts the module's settings or each other, all of it."""
        found = []
        if stage == "fit" and not (self.queries or self.pairs):
            found.append("set data.queries (fresh pairs every iteration) or data.pairs (offline)")
        if stage == "fit" and module.generator and not self.queries:
            found.append("model.generator needs data.queries: it writes the pairs itself")
        if self.generator and not module.generator:
            found.append("data.generator is set, but model.generator is not")
        endless = max_steps <= 0 and not module.schedule.restart
        if stage == "fit" and self.queries and self.max_tokens and endless:
            found.append(
                "model.schedule.restart: false needs to know the steps of the run, which "
                "data.max_tokens leaves open; set trainer.max_steps, or restart: true"
            )
        if stage == "predict" and not self.predict_queries:
            found.append("predict needs data.predict_queries")
        return found

    def check_files(self) -> None:
        """Read all files before a large model is loaded; callbacks may have made them."""
        for key in SOURCES:
            self.check_source(key)

    def check_source(self, key: str) -> None:
        """Read one of `SOURCES`, if it is given."""
        path = getattr(self, key)
        if path and not is_hub(path) and not Path(path).exists():
            raise InputError(f"data.{key}: no file {path}")
        if path and key.endswith("pairs"):
            self._given[key] = load_records(path, self._columns(key))
        elif path:
            queries = self.queries_of(key)
            if key == "queries":
                for count in (self.queries_per_iteration, self._of_generator.get(_COUNT)):
                    self._take(queries, 0, count)

    def check_pairs(self) -> None:
        """Check the records of files against tokenizer and objective, before weights are loaded."""
        for key, records in self._given.items():
            for record in records:
                self._check_record(record, f"{getattr(self, key)}: record {record.id!r}")

    def train_dataloader(self) -> DataLoader[PairBatch]:
        """Batches of the current epoch's set, built or read when they are asked for."""
        self._ensure_built()
        trainer = self._trainer
        turns = self._plan()
        if not turns:
            raise InputError(
                f"iteration {trainer.current_epoch}: {len(self._train)} records are too few for "
                f"{trainer.world_size} processes"
            )
        limit = trainer.limit_train_batches or 1.0
        planned = PlannedBatches(
            self._train,
            turns,
            self._sequences,
            trainer.accumulate_grad_batches,
            limit=limit if isinstance(limit, int) else int(limit * len(turns)),
            rank=trainer.global_rank,
            token_sequences=self._module.objective.token_sequences,
        )
        return self._loader(planned, self.batches_done(trainer.current_epoch))

    def val_dataloader(self) -> DataLoader[PairBatch] | list[Any]:
        """Batches of the held-out set; none if there is neither val_queries nor val_pairs."""
        if not (self.val_queries or self.val_pairs):
            if self._trainer.state.fn != "fit":
                raise InputError("set data.val_queries or data.val_pairs to validate")
            return []
        self._ensure_built()
        return self._held_out(self._val)

    def test_dataloader(self) -> DataLoader[PairBatch] | list[Any]:
        """The same held-out set as validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[PairBatch]:
        """Sample pairs for `predict_queries` into `pairs/predict` and serve them in batches."""
        assert self.predict_queries
        records = self._regenerate(self.queries_of("predict_queries"), 0, "predict")
        return self._held_out(records)

    def transfer_batch_to_device(
        self, batch: PairBatch, device: torch.device, dataloader_idx: int
    ) -> PairBatch:
        """Only the reference moves."""
        return batch.to(device)

    # ------------------------------------------------------------------ what is behind it

    @property
    def _module(self) -> Any:
        return self._trainer.lightning_module

    @property
    def _sequences(self) -> Sequences:
        sequences: Sequences = self._module.objective.sequences
        return sequences

    def _loader(self, dataset: PlannedBatches, start: int = 0) -> DataLoader[PairBatch]:
        return loader(dataset, start, self.seed, self.num_workers)

    def _held_out(self, records: Sequence[Record]) -> DataLoader[PairBatch]:
        rank, world = self._trainer.global_rank, self._trainer.world_size
        turns, padding = held_out_turns(len(records), self.val_batch_size, rank, world)
        planned = PlannedBatches(
            records,
            turns,
            self._sequences,
            token_sequences=self._module.objective.token_sequences,
            padding=padding,
        )
        return self._loader(planned)

    @property
    def _of_generator(self) -> dict[str, int | None]:
        """Numbers of the generator phases that are not the policy's."""
        if not self.generator:
            return {}
        own = asdict(self.generator)
        return {k: v for k, v in own.items() if v is not None or k in _OWN}

    def _number(self, name: str) -> Any:
        """A number of this epoch's phase."""
        own = self._of_generator if self._module.trains_generator else {}
        return own.get(name, getattr(self, name))

    def _plan(self) -> list[list[list[int]]]:
        """The batches of this epoch, of all processes."""
        turns = plan_batches(
            tokens_of(self._train, self._sequences),
            batch_size=self._number("batch_size"),
            max_tokens=self.max_tokens,
            seed=self.seed,
            epoch=self._module.iteration,
            passes=self._number("passes"),
            world=self._trainer.world_size,
        )
        steps = self._number("steps_per_iteration")
        return turns[: steps * self._trainer.accumulate_grad_batches] if steps else turns

    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of one epoch if no record is dropped; for schedules over a whole run.

        None if they cannot be known: of pairs that are yet to be made, `max_tokens` leaves open
        how many a batch holds.
        """
        if self.pairs:
            self._ensure_built()
            batches = len(self._plan())
        elif self.max_tokens:
            return None
        else:
            assert self.queries
            count = self.queries_per_iteration or len(self.queries_of("queries"))
            per_rank = count // self._trainer.world_size
            batches = -(-per_rank // self.batch_size) * self.passes
        steps = -(-batches // self._trainer.accumulate_grad_batches)
        return min(steps, self.steps_per_iteration or steps)

    def _ensure_built(self) -> None:
        """Make or read the sets of this epoch, once, before training moves the policy."""
        epoch = self._trainer.current_epoch
        if self._built == epoch and (self._train or self._val):
            return
        fitting = self._trainer.state.fn == "fit"
        iteration = self._module.iteration
        name = f"iteration-{iteration:02d}"
        if self._module.trains_generator:
            name = f"generator-{iteration:02d}"
        if fitting and self.queries:
            queries = self._take(self.queries_of("queries"), iteration, self._number(_COUNT))
            self._train = self._regenerate(queries, iteration, name)
        elif fitting and not self._train:
            assert self.pairs
            self._train = self._offline("pairs", "offline")
        if self.val_pairs:
            self._val = (
                self._val or self._offline("val_pairs", "offline/validation")[: self.val_limit]
            )
        elif self.val_queries:
            queries = self.queries_of("val_queries")[: self.val_limit]
            where = f"{name}/validation" if fitting else "validation"
            self._val = self._regenerate(queries, iteration, where)
        self._built = epoch

    def _take(self, queries: Sequence[Query], iteration: int, count: int | None) -> list[Query]:
        """The queries of an iteration: fresh ones until all were used, then a new shuffle."""
        if count is None:
            return list(queries)
        if count > len(queries):
            raise InputError(
                f"data.{'' if count == self.queries_per_iteration else 'generator.'}{_COUNT} is "
                f"{count}, but {self.queries} holds {len(queries)}"
            )
        order: list[Query] = []
        for turn in range(-(-(iteration + 1) * count // len(queries))):
            shuffled = list(queries)
            random.Random(stream_seed(self.seed, "queries", turn)).shuffle(shuffled)
            # what the last turn's end already gave to an iteration that goes on into this one waits
            given = {q.id for q in order[len(order) - len(order) % count :]}
            order += sorted(shuffled, key=lambda q: q.id in given)
        return order[iteration * count : (iteration + 1) * count]

    def _regenerate(self, queries: Sequence[Query], iteration: int, name: str) -> list[Record]:
        if self.regenerator is None:
            raise InputError("no callback makes pairs; add sso_lightning.callbacks.RegeneratePairs")
        return self.regenerator.build(queries, iteration, name)

    def _columns(self, key: str) -> dict[str, str]:
        """Our field to its column in one of the sources: its own mapping, or the common one."""
        sources = ("queries", "pairs", "val_queries", "val_pairs", "predict_queries")
        own = self.columns.get(key)
        found = own if isinstance(own, dict) else self.columns
        common = {k: v for k, v in found.items() if found is own or k not in sources}
        wrong = [field for field, column in common.items() if not isinstance(column, str)]
        if wrong:
            raise InputError(
                f"data.columns.{wrong[0]} must be the name of a column, or one of "
                f"{', '.join(sources)} with a mapping of its own"
            )
        return {k: v for k, v in common.items() if isinstance(v, str)}

    def queries_of(self, key: str) -> list[Query]:
        """The queries of a source, read once: a hub's may change while a run goes on."""
        if key not in self._read:
            self._read[key] = load_queries(getattr(self, key), self._columns(key))
        return self._read[key]

    def pairs_of(self, key: str) -> list[Record]:
        """The records of a source that `check_source` read, without what scoring adds."""
        return self._given.get(key, [])

    def _offline(self, key: str, name: str) -> list[Record]:
        """Records of a source with token ids and the reference's log-probabilities."""
        if self.regenerator is None:
            raise InputError(
                "no callback scores pairs; add sso_lightning.callbacks.RegeneratePairs"
            )
        records = self._given.pop(key, None) or load_records(getattr(self, key), self._columns(key))
        for record in records:
            if self.retokenize or not record.prompt_ids:
                self.tokenize(record, self._module.renderer)
        return self.regenerator.score(records, self._sequences, name)

    def _check_record(self, record: Record, where: str) -> None:
        """Refuse a record that the objective cannot use."""
        module = self._module
        objective = type(module.objective).__name__
        if record.prompt_ids and not self.retokenize:
            if record.template != module.renderer.template_hash:
                raise InputError(
                    f"{where} was made with another chat template; set data.retokenize: true to "
                    "tokenize its texts anew"
                )
            ids = {f"{c} prompt": record.prompt_ids.get(c) for c, _ in self._sequences}
            ids |= {f"{r} answer": record.response_ids.get(r) for _, r in self._sequences}
            for what, found in ids.items():
                if not found:
                    raise InputError(
                        f"{where} has no token ids of the {what}, which {objective} needs; set "
                        "data.retokenize: true to tokenize its texts anew"
                    )
                if module.vocabulary is not None and max(found) >= module.vocabulary:
                    raise InputError(
                        f"{where}: the {what} has the token id {max(found)}, but the vocabulary "
                        f"of {module.policy_config.path} ends at {module.vocabulary - 1}"
                    )
            return
        contexts = {c for c, _ in self._sequences}
        responses = {r for _, r in self._sequences}
        lacking = [
            f"{c}_system"
            for c in CONTEXTS
            if c in contexts and c != "query" and not getattr(record, f"{c}_system")
        ]
        lacking += [r for r in RESPONSES if r in responses and not getattr(record, r)]
        if lacking:
            raise InputError(f"{where} has no {lacking[0]}, which {objective} needs")

    def tokenize(self, record: Record, renderer: ChatRenderer) -> None:
        """Give a record from a file the token ids of what the objective needs."""
        systems = {"query": None, "good": record.good_system, "bad": record.bad_system}
        record.prompt_ids = {
            c: renderer.render(record.messages, systems[c]) for c in CONTEXTS if systems[c] != ""
        }
        record.response_ids = {
            r: renderer.encode_response(getattr(record, r)) for r in RESPONSES if getattr(record, r)
        }
        record.template = renderer.template_hash
        record.scores, record.token_scores = {}, {}
