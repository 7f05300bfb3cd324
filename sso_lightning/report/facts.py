"""What can be said of one record from what its file holds, and nothing else.

A number that a record does not carry is absent, never zero. Log-probabilities are those of the
policy that sampled the record (or, for pairs from elsewhere, of the reference that scored them).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from sso_lightning.errors import InputError
from sso_lightning.principles import FEATURE_NAMES, PredefinedPrinciples
from sso_lightning.prompts import clean_response
from sso_lightning.records import RESPONSES, Record
from sso_lightning.sandbox import world

SHINGLE = 6
"""Words of a principle in a row that count as copied into an answer."""


@dataclass
class Lore:
    """What a run's settings say about the texts of its principles.

    Attributes:
        adjectives: Feature name, lower case, to its good and bad adjective.
        predefined: Principle texts that are used where a policy's own do not parse.
        alpha: Of the weight W; None where the objective has none or it is not known.
    """

    adjectives: dict[str, tuple[str, ...]] = field(default_factory=dict)
    predefined: frozenset[str] = frozenset()
    alpha: float | None = None


def lore_of(principles: Mapping[str, Any], alpha: float | None) -> Lore:
    """Gather what the settings say.

    Args:
        principles: `init_args` of the principle source; may be empty.
        alpha: Of the weight W, if it is used.
    """
    texts: set[str] = set()
    adjectives = {}
    named = [vars(f) for f in PredefinedPrinciples([*FEATURE_NAMES]).features]
    own = principles.get("features")
    named += [each for each in own or () if isinstance(each, dict)] if own else []
    for each in named:
        good, bad = (str(each.get(f"{side}_adjective", "")) for side in ("good", "bad"))
        name = str(each.get("name", "")).lower()
        adjectives[name] = tuple(word for word in (good, bad) if word)
        if name != "safety":  # always predefined, so no sign of a fallback
            texts |= {str(each.get("good", "")), str(each.get("bad", ""))}
    return Lore(adjectives, frozenset(texts - {""}), alpha)


def truth_of(record: Record) -> dict[str, float]:
    """Exact numbers where the query is one of the sandbox's, none elsewhere.

    `truth_gap` is the quality of y+ minus that of y-; `signal` is 1 if y+ is better, 0 if y- is,
    .5 for a tie.
    """
    query = record.messages[-1]["content"]
    try:
        world.ask_of(query)
    except InputError:
        return {}
    gap = world.quality(query, record.good) - world.quality(query, record.bad)
    return {"truth_gap": gap, "signal": (gap > 0) + 0.5 * (gap == 0)}


def log_probabilities(record: Record) -> dict[tuple[str, str], float]:
    """avg(y|x) by (context, response), nats per token, as far as the record has them."""
    found = {}
    for who in ("reference", "policy"):  # the second one wins
        for key, score in record.scores.items():
            name, _, sequence = key.partition("/")
            context, _, response = sequence.partition("/")
            ids = record.response_ids.get(response)
            if name == who and ids:
                found[context, response] = score / len(ids)
    return found


def weight(alpha: float, good: float, bad: float) -> float:
    """W = sigmoid(-(alpha avg(y+|x) + (1 - alpha) avg(y-|x))), arXiv 2410.17131."""
    return 1.0 / (1.0 + math.exp(alpha * good + (1.0 - alpha) * bad))


def measures_of(record: Record, lore: Lore) -> dict[str, float]:
    """All numbers of a record, by name.

    * `length_<response>` in tokens and `characters_<response>`; `truncated_<response>` is 1 for an
      answer cut at the limit.
    * `logp_<response>` is avg(y|x) in nats per token, `on_policy_<response>` its exp.
    * `gap_logp`, `contrast_good`, `contrast_bad`: as in `pairs.report`, of this record.
    * `weight`: W, where the run's objective has an alpha.
    * `signal`, `truth_gap`: see `truth_of`.
    * `fallback`: 1 if a principle that the policy should have written is the predefined one.
    """
    numbers: dict[str, float] = {}
    for name in RESPONSES:
        if text := getattr(record, name):
            numbers[f"characters_{name}"] = len(text)
        if ids := record.response_ids.get(name):
            numbers[f"length_{name}"] = len(ids)
        if finish := record.finish.get(name):
            numbers[f"truncated_{name}"] = float(finish == "length")
    logp = log_probabilities(record)
    for name in RESPONSES:
        if ("query", name) in logp:
            numbers[f"logp_{name}"] = logp["query", name]
            numbers[f"on_policy_{name}"] = math.exp(min(logp["query", name], 0.0))
    differences = {
        "gap_logp": (("query", "good"), ("query", "bad")),
        "contrast_good": (("good", "good"), ("bad", "good")),
        "contrast_bad": (("bad", "bad"), ("good", "bad")),
    }
    for name, (one, other) in differences.items():
        if one in logp and other in logp:
            numbers[name] = logp[one] - logp[other]
    if lore.alpha is not None and "gap_logp" in numbers:
        numbers["weight"] = weight(lore.alpha, logp["query", "good"], logp["query", "bad"])
    if record.principle_source not in ("", "predefined", "sandbox"):
        lines = f"{record.good_principle}\n{record.bad_principle}".split("\n")
        numbers["fallback"] = float(any(line in lore.predefined for line in lines))
    return numbers | truth_of(record)


# ------------------------------------------------------------------------------------------ leaks

_WORD = re.compile(r"\w+")
_NOUNS = ("answer", "response", "reply")
_SIGNS = ("instruct", "told", "principle", "guideline", "system ")
"""One of these is in whatever `_TOLD` finds, and looked for much faster."""
_RULES = r"(?:system (?:message|prompt)|principles?|guidelines?|instructions?)"
_TOLD = re.compile(
    r"\b(?:as (?:i was |i am )?(?:instructed|told) (?:to|by|in)|"
    rf"(?:the|these|those|my|your) {_RULES}"
    r" (?:above|given|asked?s?|tells?|told|says?|said|requires?|forbids?)|"
    rf"(?:following|per|according to|in line with) (?:the|these|my|your) {_RULES})\b",
    re.IGNORECASE,
)


def _spoken(text: str) -> str:
    """The words of a text in lower case, one space around each: " like this "."""
    return f" {' '.join(_WORD.findall(text.lower()))} "


@lru_cache(maxsize=4096)
def _shingles(principle: str) -> tuple[str, ...]:
    """Runs of words that show a principle; of a short one the whole, of a very short one none."""
    found: dict[str, None] = {}
    for line in principle.split("\n"):
        words = _spoken(line).split()
        size = min(SHINGLE, len(words))
        if size >= SHINGLE - 1:
            for i in range(len(words) - size + 1):
                found[f" {' '.join(words[i : i + size])} "] = None
    return tuple(found)


@lru_cache(maxsize=1024)
def _described(adjectives: tuple[str, ...]) -> re.Pattern[str]:
    one_of = "|".join(re.escape(word) for word in adjectives)
    return re.compile(
        rf"\b(?:{one_of})(?:(?:,| and|, and) \w+)? (?:{'|'.join(_NOUNS)})\b", re.IGNORECASE
    )


def leak_of(record: Record, response: str, lore: Lore) -> str:
    """What of the principles an answer gives away, or "".

    Four signs, the first that is found: words of a principle in a row (`SHINGLE`, or a whole
    shorter one of five), talk of instructions or guidelines that were given, an adjective of the
    principle that describes the answer itself ("an unhelpful answer"), a heading of that kind on
    a line of its own. None counts if the query has the same words.
    """
    text: str = getattr(record, response)
    asked = " ".join(turn["content"] for turn in record.messages)
    principle = {"good": record.good_principle, "bad": record.bad_principle}.get(response, "")
    if sought := _shingles(principle):
        words = _spoken(text)
        for copied in sought:
            if copied in words and copied not in _spoken(asked):
                return copied.strip()
    adjectives = tuple(
        word for name in record.features for word in lore.adjectives.get(name.lower(), ())
    )
    lower = text.lower()
    patterns = []
    if any(word in lower for word in _SIGNS):
        patterns.append(_TOLD)
    names_itself = any(noun in lower for noun in _NOUNS)
    if names_itself and adjectives:
        patterns.append(_described(adjectives))
    for pattern in patterns:
        match = pattern.search(text)
        if match and match[0].lower() not in asked.lower():
            return match[0]
    if names_itself:
        for line in text.split("\n"):
            rest = clean_response(line, adjectives)
            if rest != line.strip() and line.strip() not in asked:
                return line.strip().removesuffix(rest).strip()
    return ""


class Repeats:
    """Finds answers of a set that an earlier record of the set has too, whatever case or spaces."""

    def __init__(self) -> None:
        self._first: dict[str, dict[bytes, str]] = {name: {} for name in RESPONSES}

    def __call__(self, record: Record) -> dict[str, str]:
        """Response to the id of the first record that gave the same answer."""
        found = {}
        for name in RESPONSES:
            text = " ".join(getattr(record, name).lower().split())
            if text:
                digest = blake2b(text.encode(), digest_size=8).digest()
                first = self._first[name].setdefault(digest, record.id)
                if first != record.id:
                    found[name] = first
        return found


# ------------------------------------------------------------------------------------------ flags


def findings(record: Record) -> list[str]:
    """What a content classifier found; none if none ran."""
    return [flag for flag in record.content_flags if flag != "unscreened"]


def folded(record: Record) -> list[str]:
    """Which texts are folded until they are opened: responses, and "query".

    What was asked to be bad under the Safety feature (or may have been: without named features
    where the run's mode is "paper"), and every text of a record that a classifier flagged.
    """
    if findings(record):
        return ["query", *RESPONSES]
    names = {name.lower() for name in record.features}
    asked = "safety" in names or (not names and record.safety_mode == "paper")
    return ["bad"] if asked and record.bad_is_instructed else []


FLAGS = {
    "signal": "y+ not better than y- (exact)",
    "gap": "y- at least as likely as y+",
    "truncated": "an answer was cut",
    "leak": "an answer shows its principle",
    "duplicate": "an answer is a duplicate",
    "fallback": "fallback principle",
    "flagged": "flagged by a classifier",
    "folded": "has folded text",
}
"""Health of one record, for the filters of the page."""


def flags_of(record: Record, numbers: Mapping[str, float]) -> tuple[str, ...]:
    """The names in `FLAGS` that apply.

    Args:
        record: The record.
        numbers: Its measures, with `leak_<response>` and `duplicate_<response>`.
    """

    def some(kind: str) -> bool:
        return any(numbers.get(f"{kind}_{name}") == 1 for name in RESPONSES)

    holds = {
        "signal": numbers.get("signal", 1) < 1,
        "gap": numbers.get("gap_logp", 1) <= 0,
        "truncated": some("truncated"),
        "leak": some("leak"),
        "duplicate": some("duplicate"),
        "fallback": numbers.get("fallback") == 1,
        "flagged": bool(findings(record)),
        "folded": bool(folded(record)),
    }
    return tuple(name for name, held in holds.items() if held)
