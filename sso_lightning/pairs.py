"""From queries to scored pairs: principles, three prompts, three answers, cleaning, scores.

A set of pairs is built in shards of queries; each shard runs the whole chain and is written
when it is finished, so a killed run loses one shard per process at most. A shard is made by one
process, whichever: the set is the same for any number of them. The scores are those of the policy
that sampled, taken in one pass over the same token ids that will be trained on: they are the
reference of the iteration (`reference: previous`), the near-on-policy filter's input and the
on-policy report in one.
"""

from __future__ import annotations

import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from sso_lightning.errors import InputError
from sso_lightning.policy import fingerprint
from sso_lightning.principles import Draw, PrincipleSource, Steering, principle_rates
from sso_lightning.processes import Processes
from sso_lightning.progress import progress
from sso_lightning.prompts import ChatRenderer, clean_response
from sso_lightning.records import (
    RESPONSES,
    Message,
    PairStore,
    Query,
    Record,
    stream_seed,
)
from sso_lightning.sampling import Request, Sample, Sampler
from sso_lightning.scoring import Tree, response_logps, token_logps
from sso_lightning.sharding import uneven_calls

log = logging.getLogger("sso_lightning")

SAMPLED_FROM = {"good": "good", "bad": "bad", "original": "query"}
"""Response to the context whose prompt it is sampled from."""

SCORED = (
    *(("query", response) for response in RESPONSES),
    *(("good", response) for response in ("good", "bad")),
    *(("bad", response) for response in RESPONSES),
)
"""All sequences that an objective, the near-on-policy filter or the report reads."""


def by_context(sequences: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """(context, response) sequences as one list of responses per context: one tree each."""
    grouped: dict[str, list[str]] = {}
    for context, response in sequences:
        grouped.setdefault(context, []).append(response)
    return grouped


def trees_of(records: Sequence[Record], sequences: Iterable[tuple[str, str]]) -> list[Tree]:
    """One tree per record and context, records in order."""
    grouped = by_context(sequences)
    return [
        Tree(record.prompt_ids[context], [record.response_ids[r] for r in responses])
        for record in records
        for context, responses in grouped.items()
    ]


def tokens_of(records: Sequence[Record], sequences: Iterable[tuple[str, str]]) -> list[int]:
    """Tokens that a pass over each record computes, shared prompts counted once."""
    wanted = list(sequences)
    return [sum(tree.tokens for tree in trees_of([record], wanted)) for record in records]


def columns_of(
    values: Tensor, sequences: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], Tensor]:
    """Split the flat result for `trees_of` into one `[records]` tensor per sequence."""
    keys = [(c, r) for c, responses in by_context(sequences).items() for r in responses]
    table = values.reshape(-1, len(keys))
    return {key: table[:, i] for i, key in enumerate(keys)}


def rows_of(
    parts: Sequence[Tensor], sequences: Iterable[tuple[str, str]], wanted: tuple[str, str]
) -> Sequence[Tensor]:
    """One sequence's items, a record each, of a flat list over all responses of `trees_of`."""
    keys = [(c, r) for c, responses in by_context(sequences).items() for r in responses]
    return parts[keys.index(wanted) :: len(keys)]


def score(
    model: Any,
    records: Sequence[Record],
    sequences: Sequence[tuple[str, str]],
    *,
    who: str,
    max_tokens: int | None,
    token_sequences: Sequence[tuple[str, str]] = (),
) -> None:
    """Store summed log-probabilities (nats) as `<who>/<context>/<response>` in each record.

    Those of `token_sequences` are stored token by token as well.
    """
    if not records:
        return
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            trees = trees_of(records, sequences)
            if token_sequences:
                tokens = token_logps(model, trees, max_tokens=max_tokens)
                logps = torch.stack([part.sum() for part in tokens])
            else:
                tokens = []
                logps, _ = response_logps(model, trees, max_tokens=max_tokens)
    finally:
        model.train(was_training)
    for sequence in token_sequences:
        for record, values in zip(records, rows_of(tokens, sequences, sequence), strict=True):
            record.token_scores[f"{who}/{'/'.join(sequence)}"] = values.tolist()
    for (context, response), values in columns_of(logps, sequences).items():
        for record, value in zip(records, values.tolist(), strict=True):
            record.scores[f"{who}/{context}/{response}"] = value


def mean_logp(record: Record, context: str, response: str) -> float:
    """avg(y|x) of a stored response under the policy: nats per token."""
    total = record.scores[f"policy/{context}/{response}"]
    return total / len(record.response_ids[response])


class PairFilter(ABC):
    """A rule that decides which pairs of a set are trained on; see `filters`, or write your own.

    Attributes:
        name: Used in metrics: `pairs/filtered_<name>`.
    """

    name: str

    @abstractmethod
    def keep(self, records: Sequence[Record]) -> list[bool]:
        """Say of each record of the whole set whether to train on it.

        The answer must be a function of the records alone: every process asks for itself.
        """


def apply_filters(
    filters: Sequence[PairFilter], records: list[Record], where: str
) -> tuple[list[Record], dict[str, float]]:
    """Leave out what the filters do not keep, each judging what the ones before it kept.

    Args:
        filters: Rules, in order.
        records: The whole set.
        where: What the set is called in messages.

    Returns:
        The records kept, and `pairs/filtered`, `pairs/filtered_<name>` and `pairs/trained` counts
        (no counts without filters).

    Raises:
        InputError: Nothing is left, or a record lacks the scores that a rule reads.
    """
    counts: Counter[str] = Counter()
    total = len(records)
    for rule in filters:
        try:
            keeps = rule.keep(records)
        except KeyError as error:
            raise InputError(
                f"{where}: the filter {rule.name} needs the score {error} of every record, which "
                "sampled pairs have"
            ) from error
        counts[rule.name] += keeps.count(False)
        records = [r for r, kept in zip(records, keeps, strict=True) if kept]
    if filters and not records:
        rates = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(f"{where}: the filters left none of {total} records ({rates})")
    numbers = {f"pairs/filtered_{name}": float(count) for name, count in counts.items()}
    if filters:
        numbers |= {"pairs/filtered": float(sum(counts.values())), "pairs/trained": len(records)}
    return records, numbers


def fill_shards(
    store: PairStore,
    count: int,
    make: Callable[[int], tuple[Sequence[Record], dict[str, Any]]],
    *,
    model: Any,
    processes: Processes,
) -> None:
    """Make the shards that are missing, each process its part of them, and list them all.

    Args:
        store: The set; on process 0 the one that owns it.
        count: Shards of the whole set.
        make: Makes the records of a shard and the notes beside it.
        model: What `make` calls, each process as often as it needs to.
        processes: Which process makes which.
    """
    done = store.shards()
    # as process 0 sees it: what the others read may already hold a shard of this round
    missing = processes.gather([index for index in range(count) if index not in done])[0]
    if processes.first and 0 < len(missing) < processes.size:
        log.info(
            "%s: shards to make: %d, processes: %d; with a smaller pairs.shard_size each of them "
            "would have a part",
            store.folder,
            len(missing),
            processes.size,
        )
    with processes.together(), uneven_calls(model):
        for index in processes.share(missing):
            store.write_shard(index, *make(index))
    if processes.first:
        store.adopt()


@dataclass
class PairBuilder:
    """Builds one set of pairs with one policy.

    Attributes:
        model: The model that writes.
        renderer: Renders prompts with the policy's own chat template.
        sampler: Engine that answers prompts.
        principles: Where the opposed principles come from.
        seed: Seed of the run; every draw is a function of (seed, iteration, record, purpose).
        iteration: Which iteration the set belongs to.
        initial: Context manager that yields the policy before any training, if the reference is
            the initial policy; None if the reference is the sampling policy itself.
        policy: Context manager that yields the policy whose log-probabilities are stored; None if
            it is the model that writes, as in every variant without a data generator.
        max_prompt_tokens: Queries with a longer prompt are dropped and counted, never cut.
        score_tokens: Token budget of one scoring batch.
        shard_size: Queries per shard.
        token_sequences: Sequences whose log-probabilities are stored token by token.
        forward_context: Entered around the policy's forward passes (the trainer's precision).
        processes: All of which call `build`; each makes a part of the shards.
        writer: Hashes of the policy that wrote the set, if the policy has been trained since (a
            run resumed within the iteration; empty if they are not known). The set must be there.
            None means the policy as it is.
        replaces: Set a set of another policy aside and build it anew, instead of refusing it: a
            run that went back to an earlier checkpoint need not come to the same weights.
        show_progress: Draw a progress bar.
    """

    model: Any
    renderer: ChatRenderer
    sampler: Sampler
    principles: PrincipleSource
    seed: int
    iteration: int
    initial: Callable[[], AbstractContextManager[Any]] | None = None
    policy: Callable[[], AbstractContextManager[Any]] | None = None
    max_prompt_tokens: int = 4096
    score_tokens: int = 16384
    shard_size: int = 256
    token_sequences: tuple[tuple[str, str], ...] = ()
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext
    writer: Mapping[str, str] | None = None
    replaces: bool = False
    show_progress: bool = True
    processes: Processes = field(default_factory=Processes.current)
    _new_tokens: int = field(default=0, init=False)

    def build(self, queries: Sequence[Query], folder: Path) -> tuple[list[Record], dict[str, Any]]:
        """Build the set in `folder`, or continue or reread what is already there.

        Args:
            queries: What to answer, in order.
            folder: Where the shards and the manifest go.

        Returns:
            The records kept, and the report (`pairs/...` numbers, see `report`).

        Raises:
            InputError: The folder holds a set built from other queries or settings, or no
                record is left.
        """
        processes = self.processes
        names = fingerprint(self.model) if self.writer is None else None
        with processes.together():
            store = self._open(folder, queries, names) if processes.first else None
        store = store or PairStore(folder, helps=True)
        if not store.complete:
            with processes.together():
                self.sampler.hand_over(self.model, processes)
            self._fill(store, queries)
            store = store if processes.first else PairStore(folder, helps=True)
        records = store.read()
        if not records:
            dropped = {
                k: v for k, v in store.report.items() if k.startswith("pairs/dropped_") and v
            }
            reasons = ", ".join(
                f"{k.removeprefix('pairs/dropped_')} {v}, {v / len(queries):.0%}"
                for k, v in dropped.items()
            )
            raise InputError(
                f"{folder}: no record is left of {len(queries)} queries after cleaning "
                f"({reasons or 'no query given'}); look at the sampler and the principles"
            )
        return records, store.report

    def _open(
        self, folder: Path, queries: Sequence[Query], names: tuple[str, str] | None
    ) -> PairStore:
        asked = {
            "seed": self.seed,
            "iteration": self.iteration,
            "queries": digest([[q.id, q.messages] for q in queries]),
            "sampler": self.sampler.settings(),
            "engine": self.sampler.engine,
            "principles": f"{self.principles.name} {digest(self.principles.settings())}",
            "template": self.renderer.template_hash,
            "reference": "initial" if self.initial else "previous",
            "max_prompt_tokens": self.max_prompt_tokens,
            "shard_size": self.shard_size,
        }
        if self.token_sequences:
            asked["token_scores"] = ["/".join(sequence) for sequence in self.token_sequences]
        if names:
            expected = asked | dict(zip(("policy", "adapter"), names, strict=True))
        else:
            expected = asked | dict(self.writer or {})
        if (folder / "manifest.json").exists():
            store = PairStore(folder)
            wrong = [k for k, v in expected.items() if store.identity.get(k) != v]
            only_weights = {*wrong} <= {"policy", "adapter"}
            if wrong and only_weights and self.replaces and self.writer is None:
                aside = _set_aside(folder)
                log.warning(
                    "%s is by other weights than the run has now: kept as %s, made anew",
                    folder,
                    aside.name,
                )
            elif wrong and store.complete and (self.writer is None or not only_weights):
                raise InputError(
                    f"{folder}: was made with another {wrong[0]}; remove it, set that back, "
                    "or use another trainer.default_root_dir"
                )
            elif store.complete and not wrong:
                return store
        if self.writer is not None:
            raise InputError(
                f"{folder}: is not (or not whole) the set that the checkpoint trains on, whose "
                "policy has been trained since; continue from the end of an iteration "
                "(--ckpt_path FILE), or start anew"
            )
        return PairStore(folder, expected)

    def _fill(self, store: PairStore, queries: Sequence[Query]) -> None:
        """Build the shards that are missing and finish the set."""
        names = {"policy": store.identity["policy"], "adapter": store.identity["adapter"]}
        started = time.monotonic()
        count = -(-len(queries) // self.shard_size)
        done = store.shards()
        everybody = self.processes.size
        show = self.show_progress and self.processes.first
        with progress(f"pairs of {store.folder.name}", len(queries), "queries", show=show) as tell:
            tell(0, sum(len(shard.info["queries"]) for shard in done.values()))

            def advance(new_tokens: int, queries: float) -> None:
                """What this process did stands for what all of them did."""
                tell(new_tokens * everybody, queries * everybody)

            def make(index: int) -> tuple[list[Record], dict[str, Any]]:
                chunk = queries[index * self.shard_size :][: self.shard_size]
                records, dropped, counts = self._shard(chunk, names, advance)
                return records, {
                    "queries": [q.id for q in chunk],
                    "dropped": dict(dropped),
                    "counts": dict(counts),
                }

            fill_shards(store, count, make, model=self.model, processes=self.processes)
        seconds = time.monotonic() - started
        new_tokens = sum(self.processes.gather(self._new_tokens))
        with self.processes.together():
            if self.processes.first:
                infos = [shard.info for shard in store.shards().values()]
                numbers = report(
                    store.read(),
                    sum((Counter(i["dropped"]) for i in infos), Counter()),
                    sum((Counter(i["counts"]) for i in infos), Counter()),
                )
                # not part of the set: a set that was continued knows only its last stretch
                numbers["pairs/seconds"] = seconds
                numbers["pairs/tokens_per_second"] = new_tokens / seconds
                store.finish(numbers)

    def _shard(
        self, queries: Sequence[Query], names: dict[str, str], advance: Callable[[int, float], None]
    ) -> tuple[list[Record], Counter[str], Counter[str]]:
        """The whole chain for some queries: records kept, drops by reason, source counts."""
        draw = Draw(seed=self.seed, iteration=self.iteration, ask=self._ask)
        dropped: Counter[str] = Counter()
        total = len(queries)
        # a source may ask the policy about every query: those that cannot be used go first
        queries = [q for q in queries if self._prompts(q, {"query": None}, dropped)]
        advance(0, total - len(queries))
        with self.forward_context():
            steerings = self.principles.propose(queries, draw)
            prompts = [
                self._prompts(query, steering.systems, dropped)
                for query, steering in zip(queries, steerings, strict=True)
            ]
            answers = self._answers(queries, prompts, advance)
            records = []
            for query, steering, prompt, answer in zip(
                queries, steerings, prompts, answers, strict=True
            ):
                if answer:
                    record = self._record(query, steering, prompt, answer, names)
                    reason = drop_reason(record)
                    dropped[reason] += bool(reason)
                    if not reason:
                        records.append(record)
            scored = partial(
                score,
                records=records,
                sequences=SCORED,
                max_tokens=self.score_tokens,
                token_sequences=self.token_sequences,
            )
            with self.policy() if self.policy else nullcontext(self.model) as policy:
                scored(policy, who="policy")
            if self.initial:
                with self.initial() as start:
                    scored(start, who="reference")
        # weights that overflow give answers, but no log-probabilities to train on
        finite = [r for r in records if all(map(math.isfinite, r.scores.values()))]
        dropped["score_not_finite"] += len(records) - len(finite)
        return finite, +dropped, draw.counts

    def _prompts(
        self, query: Query, systems: Mapping[str, str | None], dropped: Counter[str]
    ) -> dict[str, list[int]]:
        """Token ids of the prompts by context; empty (and counted) if one cannot be used."""
        try:
            prompts = {c: self.renderer.render(query.messages, s) for c, s in systems.items()}
        except InputError as error:
            log.warning("query %s (%s): %s", query.id, query.source, error)
            dropped["render_error"] += 1
            return {}
        if max(map(len, prompts.values())) > self.max_prompt_tokens:
            dropped["prompt_too_long"] += 1
            return {}
        return prompts

    def _answers(
        self,
        queries: Sequence[Query],
        prompts: Sequence[dict[str, list[int]]],
        advance: Callable[[int, float], None],
    ) -> list[dict[str, Sample]]:
        """Sample all responses of all queries in one call, so that the engine can batch them."""
        requests = [
            Request(
                f"{i}/{response}",
                prompt[context],
                stream_seed(self.seed, self.iteration, query.id, response),
            )
            for i, (query, prompt) in enumerate(zip(queries, prompts, strict=True))
            if prompt
            for response, context in SAMPLED_FROM.items()
        ]

        def sampled(new_tokens: int, finished: int) -> None:
            self._new_tokens += new_tokens
            advance(new_tokens, finished / len(SAMPLED_FROM))

        samples = self.sampler.sample(
            self.model, requests, stop_ids=self.renderer.stop_ids, progress=sampled
        )
        by_key = {sample.key: sample for sample in samples}
        advance(0, prompts.count({}))
        return [
            {r: by_key[f"{i}/{r}"] for r in SAMPLED_FROM} if prompt else {}
            for i, prompt in enumerate(prompts)
        ]

    def _record(
        self,
        query: Query,
        steering: Steering,
        prompts: dict[str, list[int]],
        answers: dict[str, Sample],
        names: dict[str, str],
    ) -> Record:
        texts: dict[str, Any] = {}
        ids: dict[str, list[int]] = {}
        for response, sample in answers.items():
            raw = self.renderer.decode(sample.ids)
            texts[response] = clean_response(raw, steering.adjectives)
            # the sampler's own ids, unless a leaked heading had to go
            ids[response] = sample.ids
            if texts[response] != raw:
                anew = self.renderer.encode_response(texts[response])
                ids[response] = anew if sample.finish == "stop" else anew[:-1]
        return Record(
            id=query.id,
            messages=query.messages,
            features=list(steering.features),
            good_principle=steering.good_principle,
            bad_principle=steering.bad_principle,
            good_system=steering.good_system,
            bad_system=steering.bad_system,
            **texts,
            prompt_ids=prompts,
            response_ids=ids,
            finish={response: sample.finish for response, sample in answers.items()},
            iteration=self.iteration,
            seed=self.seed,
            sampler=self.sampler.settings(),
            engine=self.sampler.engine,
            template=self.renderer.template_hash,
            query_source=query.source,
            principle_source=self.principles.name,
            safety_mode=self.principles.safety_mode,
            bad_is_instructed=True,
            policy=names["policy"],
            adapter=names["adapter"],
        )

    def _ask(self, asked: Sequence[tuple[str, list[Message]]], max_new_tokens: int) -> list[str]:
        """The policy's answers to plain questions of a principle source, keyed for their seeds."""
        requests = [
            Request(
                key,
                self.renderer.render(messages),
                stream_seed(self.seed, self.iteration, "ask", key),
                max_new_tokens,
            )
            for key, messages in asked
        ]
        samples = self.sampler.sample(self.model, requests, stop_ids=self.renderer.stop_ids)
        return [self.renderer.decode(sample.ids) for sample in samples]


def _set_aside(folder: Path) -> Path:
    """Give a folder a name that no set has."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.replaced-{number}")).exists():
        number += 1
    return folder.rename(aside)


def digest(value: object) -> str:
    """A short hash of a JSON value."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def drop_reason(record: Record) -> str:
    """Why a record cannot be trained on, or "" if it can."""
    texts = {name: getattr(record, name) for name in RESPONSES}
    for name, text in texts.items():
        if not text:
            return f"empty_{name}"
    for one, other in (("good", "bad"), ("good", "original"), ("bad", "original")):
        if texts[one] == texts[other]:
            return f"{one}_equals_{other}"
    return ""


REPEATING = 0.5
"""Repetition above which an answer counts as a loop; in the sandbox no answer of any run is."""


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of a text's n-grams that were in it before: seq-rep-n of Welleck et al. (2019).

    "Neural Text Generation with Unlikelihood Training", arXiv 1908.04319, section 6: one minus
    distinct n-grams over n-grams. Prose has a few hundredths, an answer that ends in a loop comes
    near 1. A text of fewer than n tokens has none.

    Args:
        ids: Tokens.
        n: Tokens of an n-gram.
    """
    count = len(ids) - n + 1
    if count < 1:
        return 0.0
    return 1.0 - len({tuple(ids[i : i + n]) for i in range(count)}) / count


def report(
    records: Sequence[Record], dropped: Counter[str], counts: Counter[str]
) -> dict[str, float]:
    """The quality of a set in `pairs/...` numbers.

    * `kept`, `dropped`, `dropped_<reason>`: records.
    * `on_policy_<response>`: mean of exp(avg(y|x)), the geometric-mean token probability.
    * `gap_logp`: mean of avg(y+|x) - avg(y-|x), nats per token.
    * `contrast_good`, `contrast_bad`: mean of avg(y+|x+) - avg(y+|x-) and of
      avg(y-|x-) - avg(y-|x+), nats per token: how much the principles still matter.
    * `length_<response>`, `truncated_<response>`: mean tokens, share cut by the length limit.
    * `repeating_<response>`: share of answers whose `repetition` is above `REPEATING`: loops.
    * `feature_fill_rate`, `principle_fallback_rate`: see `principles.principle_rates`.
    """
    numbers: dict[str, float] = {"pairs/kept": len(records), "pairs/dropped": sum(dropped.values())}
    numbers |= {f"pairs/dropped_{reason}": n for reason, n in sorted(dropped.items())}
    numbers |= principle_rates(counts)
    if not records:
        return numbers

    def gap(a: tuple[str, str], b: tuple[str, str]) -> float:
        return fmean(mean_logp(r, *a) - mean_logp(r, *b) for r in records)

    for name in RESPONSES:
        probabilities = [math.exp(mean_logp(r, "query", name)) for r in records]
        numbers[f"pairs/length_{name}"] = fmean(len(r.response_ids[name]) for r in records)
        numbers[f"pairs/truncated_{name}"] = fmean(r.finish[name] == "length" for r in records)
        loops = [repetition(r.response_ids[name]) > REPEATING for r in records]
        numbers[f"pairs/repeating_{name}"] = fmean(loops)
        numbers[f"pairs/on_policy_{name}"] = fmean(probabilities)
    numbers["pairs/gap_logp"] = gap(("query", "good"), ("query", "bad"))
    numbers["pairs/contrast_good"] = gap(("good", "good"), ("bad", "good"))
    numbers["pairs/contrast_bad"] = gap(("bad", "bad"), ("good", "bad"))
    return numbers
