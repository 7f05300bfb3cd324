"""One real record as each of its sequences, and how long the data is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from sso_lightning.endpoint import EndpointPrinciples
from sso_lightning.errors import InputError
from sso_lightning.pairs import SAMPLED_FROM
from sso_lightning.plan.memory import Lengths
from sso_lightning.plan.read import Settings
from sso_lightning.principles import Draw, PredefinedPrinciples, PrincipleSource, Steering
from sso_lightning.prompts import ChatRenderer
from sso_lightning.records import CONTEXTS, RESPONSES, Query, Record

QUERY, PRINCIPLE = 100, 150
"""Tokens that are assumed where nothing can be measured, as in `benchmarks/scaling.py`."""

_MEASURED, _STEERED = 2000, 64  # queries whose lengths, and whose principles', are measured
_MARKS = "\u27e6", "\u27e7"
_NAMES = {"query": "x", "good": "x+", "bad": "x-"}
_ANSWERS = {"good": "y+", "bad": "y-", "original": "yo"}


@dataclass(frozen=True)
class Rendered:
    """One sequence of a record.

    Attributes:
        name: As the papers have it.
        context: Of its prompt.
        response: Which answer.
        prompt_tokens: Of its prompt.
        principle: First and one after the last token of the principle in it, if it has one.
        answer_tokens: Of its answer; where that is yet to be sampled, the most it can have.
        sampled: Whether it is yet to be sampled.
    """

    name: str
    context: str
    response: str
    prompt_tokens: int
    principle: tuple[int, int] | None
    answer_tokens: int
    sampled: bool


@dataclass(frozen=True)
class DryRun:
    """What a record is turned into.

    Attributes:
        record: Its id.
        prompts: Rendered by context, the principle in marks.
        sequences: Those that are scored in training.
        ends: What ends an answer and is scored with it.
    """

    record: str
    prompts: Mapping[str, str]
    sequences: Sequence[Rendered]
    ends: str

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Data:
    """What is known of the data.

    Attributes:
        lengths: Of prompts and answers.
        queries: How many there are; None if there is no file to count.
        dry_run: One record; None if there is none.
    """

    lengths: Lengths
    queries: int | None
    dry_run: DryRun | None


def _steered(settings: Settings, queries: Sequence[Query]) -> list[Steering]:
    """Principles of some queries, without asking a model for them."""
    source: PrincipleSource = settings.pairs.principles
    name = type(source).__name__
    if isinstance(source, EndpointPrinciples):
        source = PredefinedPrinciples(pick="random")
        settings.notes.append(f"{name} asks another model: predefined principles stand in here")
    elif isinstance(source, PredefinedPrinciples) and source.pick == "policy":
        settings.notes.append(f"{name} asks the policy, which is not loaded: picked at random here")
    draw = Draw(seed=settings.data.seed, iteration=0, ask=lambda asked, most: [""] * len(asked))
    return source.propose(queries, draw)


def _spread(queries: Sequence[Query]) -> list[Query]:
    """Queries that stand for all: evenly spaced ones, and those with the longest texts."""
    if len(queries) <= _MEASURED:
        return list(queries)

    def size(query: Query) -> int:
        return sum(len(turn["content"]) for turn in query.messages)

    even = queries[:: -(-len(queries) // _MEASURED)]
    return [*even, *sorted(queries, key=size)[-20:]]


def _marked(renderer: ChatRenderer, query: Query, system: str | None, tokenizer: Any) -> Any:
    """The rendered text with its principle in marks, and the place of that in tokens."""
    text = renderer.as_text(query.messages, system)
    begin = text.find(system) if system else -1
    if begin < 0 or system is None:
        return text, None
    end = begin + len(system)
    marked = text[:begin] + _MARKS[0] + system + _MARKS[1] + text[end:]
    if not tokenizer.is_fast:
        return marked, None
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    inside = [i for i, (a, b) in enumerate(offsets["offset_mapping"]) if a < end and b > begin]
    return marked, (inside[0], inside[-1] + 1) if inside else None


def _limits(settings: Settings) -> dict[str, int]:
    most = getattr(settings.pairs.sampler, "max_new_tokens", 512)
    return dict.fromkeys(RESPONSES, most)


def _assumed(settings: Settings, answer_tokens: float | None) -> Lengths:
    limits = _limits(settings)
    most = settings.pairs.max_prompt_tokens
    mean = {c: QUERY + (PRINCIPLE if c != "query" else 0) for c in CONTEXTS}
    settings.notes.append(
        f"no queries or no tokenizer to measure: queries of {QUERY} tokens and principles of "
        f"{PRINCIPLE} are assumed, for memory prompts of pairs.max_prompt_tokens ({most})"
    )
    return Lengths({c: most for c in CONTEXTS}, mean, limits, _expected(limits, answer_tokens))


def _expected(limits: Mapping[str, int], answer_tokens: float | None) -> dict[str, float]:
    return {r: min(answer_tokens or limit, limit) for r, limit in limits.items()}


def look_at(settings: Settings, answer_tokens: float | None, readable: bool) -> Data:
    """Measure the data and render one record.

    Args:
        settings: Of the run; what is wrong is added to its problems.
        answer_tokens: Expected tokens of an answer; None takes the most there can be.
        readable: Whether the module has its tokenizer.
    """
    data = settings.data
    if readable and (records := data.pairs_of("pairs")):
        return _offline(settings, records, answer_tokens)
    try:
        queries = data.queries_of("queries") if data.queries else []
    except InputError:  # the check of the files has told of it
        queries = []
    if not (queries and readable):
        return Data(_assumed(settings, answer_tokens), len(queries) or None, None)
    renderer, most = settings.module.renderer, settings.pairs.max_prompt_tokens
    some = _spread(queries)
    plain: list[tuple[int, Query]] = []
    refused: list[str] = []
    for query in some:
        try:
            plain.append((len(renderer.render(query.messages)), query))
        except InputError as error:
            refused.append(f"query {query.id}: {error}")
    if refused:
        told = settings.problems if not plain else settings.notes
        told.append(f"{len(refused)} of {len(some)} queries cannot be rendered ({refused[0]})")
    if not plain:
        return Data(_assumed(settings, answer_tokens), len(queries), None)
    plain.sort(key=lambda pair: pair[0])
    steered = [query for _, query in plain[:: -(-len(plain) // _STEERED)]]
    try:
        steerings = _steered(settings, steered)
    except InputError as error:
        settings.problems.append(str(error))
        return Data(_assumed(settings, answer_tokens), len(queries), None)
    added = {
        context: [
            len(renderer.render(query.messages, steering.systems[context]))
            - len(renderer.render(query.messages))
            for query, steering in zip(steered, steerings, strict=True)
        ]
        for context in CONTEXTS
    }
    widest = max(max(values) for values in added.values())
    fitting = [length for length, _ in plain if length + widest <= most]
    if len(fitting) < len(plain):
        told = settings.notes if fitting else settings.problems
        told.append(
            f"{len(plain) - len(fitting)} of {len(plain)} queries are longer with their principles "
            f"than pairs.max_prompt_tokens ({most}) and will be dropped"
        )
    fitting = fitting or [length for length, _ in plain]
    limits = _limits(settings)
    lengths = Lengths(
        {c: min(most, max(fitting) + max(values)) for c, values in added.items()},
        {c: fmean(fitting) + fmean(values) for c, values in added.items()},
        limits,
        _expected(limits, answer_tokens),
    )
    shown, steering = steered[len(steered) // 2], steerings[len(steered) // 2]
    return Data(lengths, len(queries), _render(settings, shown, steering.systems, {}))


def _offline(settings: Settings, records: list[Record], answer_tokens: float | None) -> Data:
    """The lengths of finished pairs."""
    sequences = settings.module.policy_objective.sequences
    prepared = records[: 2 * _MEASURED]
    for record in prepared:
        if settings.data.retokenize or not record.prompt_ids:
            settings.data.tokenize(record, settings.module.renderer)
    contexts = {c for c, _ in sequences}
    responses = {r for _, r in sequences}
    prompts = {c: [len(r.prompt_ids.get(c, ())) for r in prepared] for c in CONTEXTS}
    answers = {n: [len(r.response_ids.get(n, ())) for r in prepared] for n in RESPONSES}
    lacking = [c for c in contexts if not max(prompts[c])] + [
        r for r in responses if not max(answers[r])
    ]
    if lacking:
        settings.problems.append(
            f"{settings.data.pairs}: no record has what the objective needs: {', '.join(lacking)}"
        )
    most = {n: max(1, *values) for n, values in answers.items()}
    lengths = Lengths(
        {c: max(1, *values) for c, values in prompts.items()},
        {c: max(1.0, fmean(values)) for c, values in prompts.items()},
        most,
        {n: max(1.0, answer_tokens or fmean(values)) for n, values in answers.items()},
    )
    record = prepared[len(prepared) // 2]
    query = Query(record.id, record.messages)
    systems = {"query": None, "good": record.good_system, "bad": record.bad_system}
    own = {n: len(ids) for n, ids in record.response_ids.items()}
    return Data(lengths, len(records), _render(settings, query, systems, own))


def _render(
    settings: Settings,
    query: Query,
    systems: Mapping[str, str | None],
    answers: Mapping[str, int],
) -> DryRun:
    module = settings.module
    renderer, tokenizer = module.renderer, module.tokenizer
    objectives = [module.policy_objective]
    if module.generator:
        objectives.insert(0, module.generator.objective)
    wanted = dict.fromkeys(s for objective in objectives for s in objective.sequences)
    contexts = dict.fromkeys(c for c, _ in wanted)
    found = {c: _marked(renderer, query, systems[c], tokenizer) for c in contexts}
    limits = _limits(settings)
    sequences = [
        Rendered(
            f"({_NAMES[c]}, {_ANSWERS[r]})",
            c,
            r,
            len(renderer.render(query.messages, systems[c])),
            found[c][1],
            answers.get(r, limits[r]),
            r not in answers,
        )
        for c, r in wanted
    ]
    ends = tokenizer.convert_ids_to_tokens(renderer.stop_ids[0])
    return DryRun(query.id, {c: text for c, (text, _) in found.items()}, sequences, str(ends))


def check_lengths(settings: Settings, data: Data, config: Any) -> None:
    """Add what the model's positions have no room for."""
    room = getattr(config, "max_position_embeddings", None)
    if room is None or data.dry_run is None:
        return
    lengths = data.lengths
    longest = max(lengths.longest[c] + lengths.answers[r] for r, c in SAMPLED_FROM.items())
    if longest > room:
        settings.problems.append(
            f"the longest prompt and its answer may have {longest} tokens, the model has "
            f"{room} positions (max_position_embeddings); lower pairs.max_prompt_tokens or "
            "max_new_tokens"
        )
