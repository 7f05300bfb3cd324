"""Alarms: small rules over the numbers of a run's sets, each with a bound that can be set.

Relative rules compare a set with the first one of its kind in the same run, and say nothing of a
change that is within two of its standard errors. An alarm names the set,
the number, the bound, and the three records that show it best. What a run's files do not hold is
"not known", which is no alarm and no all-clear either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal

from sso_lightning.errors import InputError
from sso_lightning.records import RESPONSES
from sso_lightning.report.read import STRONGEST, Example, PairSet, Run

STANDARD_ERRORS = 2.0
"""A relative rule is silent while the change is within so many standard errors of it."""
SYMBOLS = {"good": "y+", "bad": "y-", "original": "yo"}


@dataclass(frozen=True)
class Bounds:
    """From where on a number is an alarm.

    Attributes:
        signal: Least share of pairs whose y+ really is better (known in the sandbox; chance: .5).
        gap: Least gap avg(y+|x) - avg(y-|x), as a share of the first set's.
        off_policy: Least on-policyness of y-, as a share of the first set's.
        length: Most mean length of an answer of a kind, in lengths of the first set's.
        truncated: Most share of answers of a kind that were cut at the length limit.
        leak: Most share of answers of a kind that show their principle.
        duplicates: Most share of answers of a kind that an earlier record of the set has too.
        chosen: Most fall of avg(y+|x) since the first set, in nats per token.
        fallback: Most share of principles that fell back to predefined text.
    """

    signal: float = 0.7
    gap: float = 0.7
    off_policy: float = 0.75
    length: float = 1.5
    truncated: float = 0.2
    leak: float = 0.05
    duplicates: float = 0.2
    chosen: float = 0.25
    fallback: float = 0.2

    def __post_init__(self) -> None:
        """Refuse what can never or always be an alarm by mistake."""
        wrong = [name for name, value in asdict(self).items() if not 0 <= value < 1e9]
        if wrong:
            raise InputError(f"report bound {wrong[0]} must be 0 or more")

    @classmethod
    def parse(cls, given: Sequence[str]) -> Bounds:
        """Bounds from `name=number` texts.

        Raises:
            InputError: A name is unknown or a number is none.
        """
        values = {}
        for text in given:
            name, _, number = text.partition("=")
            if name not in {f.name for f in fields(cls)}:
                known = ", ".join(f.name for f in fields(cls))
                raise InputError(f"--bound: unknown rule {name!r}; known: {known}")
            try:
                values[name] = float(number)
            except ValueError:
                raise InputError(f"--bound {name}: {number!r} is not a number") from None
        return cls(**values)


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        name: Its bound in `Bounds`.
        title: What is wrong when it fires.
        meaning: What that tells, in a sentence.
        measures: Measure to what it is called; the worst of them counts.
        form: A "floor" or "ceiling" for the number; a floor for its "share" of the first set's; a
            ceiling for it in "times" the first set's; a ceiling for its "fall" since the first.
        proof: Measure whose strongest records are shown; {} stands for the response.
        proof_label: What that measure is.
        unit: "%" for shares, else a unit.
    """

    name: str
    title: str
    meaning: str
    measures: Mapping[str, str]
    form: Literal["floor", "ceiling", "share", "times", "fall"]
    proof: str
    proof_label: str
    unit: str = "%"


def _each(measure: str, label: str) -> dict[str, str]:
    return {f"{measure}_{name}": f"{label} of {SYMBOLS[name]}" for name in RESPONSES}


RULES = (
    Rule(
        "signal",
        "Signal lost",
        "y+ is hardly more often better than y-: training on these pairs teaches nothing, or harm.",
        {"signal": "signal accuracy"},
        "floor",
        "truth_gap",
        "exact quality of y+ minus y-",
    ),
    Rule(
        "gap",
        "Gap closing",
        "The policy finds y+ and y- ever more alike: good and bad answers grow together.",
        {"gap_logp": "gap avg(y+|x) - avg(y-|x)"},
        "share",
        "gap_logp",
        "avg(y+|x) - avg(y-|x) in nats per token",
        "nats per token",
    ),
    Rule(
        "off_policy",
        "y- going off-policy",
        "The policy itself would hardly write y- any more: the bad principle is a back door.",
        {"on_policy_bad": "on-policyness of y-"},
        "share",
        "logp_bad",
        "avg(y-|x) in nats per token",
        "probability per token",
    ),
    Rule(
        "length",
        "Length blow-up",
        "Answers grow: length is easily learnt as a sign of quality.",
        _each("length", "mean length"),
        "times",
        "length_{}",
        "tokens",
        "tokens",
    ),
    Rule(
        "truncated",
        "Truncation",
        "Answers meet the length limit: what is compared has no end.",
        _each("truncated", "cut answers"),
        "ceiling",
        "truncated_{}",
        "cut at the limit",
    ),
    Rule(
        "leak",
        "Principle leaks",
        "Answers talk of their principle: the pair teaches the talk.",
        _each("leak", "leaking answers"),
        "ceiling",
        "leak_{}",
        "shows its principle",
    ),
    Rule(
        "duplicates",
        "Duplicated answers",
        "Different queries get the same answer: the policy says little about them.",
        _each("duplicate", "repeated answers"),
        "ceiling",
        "duplicate_{}",
        "same as an earlier record's",
    ),
    Rule(
        "chosen",
        "Chosen log-probs falling",
        "The policy finds its own y+ ever less likely.",
        {"logp_good": "avg(y+|x)"},
        "fall",
        "logp_good",
        "avg(y+|x) in nats per token",
        "nats per token",
    ),
    Rule(
        "fallback",
        "Fallback principles",
        "Principles that should have been written are the predefined ones.",
        {
            "principle_fallback_rate": "principles that did not parse",
            "principle_failed_rate": "principles that no server gave",
        },
        "ceiling",
        "fallback",
        "has a predefined principle",
    ),
)


@dataclass(frozen=True)
class Reading:
    """What a rule says of a set.

    Attributes:
        rule: The rule.
        set_name: The set.
        label: What was measured, the worst of the rule's measures.
        value: The number; None if it is not known.
        first: The first set's number, for relative rules.
        limit: The bound in the number's own unit; None if there is none (the first set of a
            relative rule, or no positive number to compare with).
        fired: Whether the number is beyond the limit.
        examples: At most three records that show it, strongest first; only where it fired.
        measure: The measure the examples are ordered by.
    """

    rule: Rule
    set_name: str
    label: str
    value: float | None
    first: float | None
    limit: float | None
    fired: bool
    examples: tuple[Example, ...] = ()
    measure: str = ""

    def text(self, number: float | None) -> str:
        """A number in the rule's unit."""
        if number is None:
            return "not known"
        if self.rule.unit == "%":
            return f"{number:.1%}"
        return f"{number:.1f}" if self.rule.unit == "tokens" else f"{number:.3f}"

    @property
    def line(self) -> str:
        """The reading in one line, for logs and terminals."""
        unit = "" if self.rule.unit == "%" else f" {self.rule.unit}"
        side = "below" if self.rule.form in ("floor", "share", "fall") else "above"
        first = f" (first set: {self.text(self.first)})" if self.first is not None else ""
        ids = ", ".join(repr(e.record.id) for e in self.examples) or "none stands out"
        return (
            f"{self.rule.title} in {self.set_name}: {self.label} is {self.text(self.value)}{unit}, "
            f"{side} the bound {self.text(self.limit)}{first}; records: {ids}"
        )


def _limit(rule: Rule, bound: float, first: float | None) -> float | None:
    if rule.form in ("floor", "ceiling"):
        return bound
    if first is None:
        return None
    if rule.form == "fall":
        return first - bound
    return first * bound if first > 0 else None  # a share of nothing says nothing


def _read(rule: Rule, bound: float, pairs: PairSet, first: PairSet | None) -> Reading:
    """The worst of a rule's measures in a set, by how far it is beyond its limit."""
    worst: tuple[float, Reading] | None = None
    for measure, label in rule.measures.items():
        value = pairs.means.get(measure)
        if value is None:
            continue
        relative = rule.form not in ("floor", "ceiling")
        start = first.means.get(measure) if relative and first else None
        limit = _limit(rule, bound, start)
        beyond = 0.0 if limit is None else value - limit
        if rule.form in ("floor", "share", "fall"):
            beyond = -beyond
        fired = limit is not None and beyond > 0
        if start is not None and first:  # not for a change that chance alone would make
            chance = math.hypot(pairs.errors.get(measure, 0.0), first.errors.get(measure, 0.0))
            fired &= abs(value - start) > STANDARD_ERRORS * chance
        proof = rule.proof.format(measure.rpartition("_")[2])
        shown = tuple(pairs.strongest.get(proof, ())[:STRONGEST]) if fired else ()
        reading = Reading(rule, pairs.name, label, value, start, limit, fired, shown, proof)
        if worst is None or beyond > worst[0]:
            worst = (beyond, reading)
    if worst is None:
        label = next(iter(rule.measures.values()))
        return Reading(rule, pairs.name, label, None, None, None, False)
    return worst[1]


def readings(run: Run, bounds: Bounds) -> list[list[Reading]]:
    """Every rule's reading of every set: one list per set, rules in order of `RULES`."""
    firsts: dict[str, PairSet] = {}
    table = []
    for pairs in run.sets:
        # sets of other kinds (a file, a prediction) do not follow one another
        first = firsts.get(pairs.kind) if pairs.kind != "other" else None
        table.append([_read(rule, getattr(bounds, rule.name), pairs, first) for rule in RULES])
        if pairs.records:
            firsts.setdefault(pairs.kind, pairs)
    return table


def alarms(run: Run, bounds: Bounds) -> list[Reading]:
    """The readings that are alarms, in the order of the sets."""
    return [reading for row in readings(run, bounds) for reading in row if reading.fired]
