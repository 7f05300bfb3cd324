"""Rules that decide which pairs of a finished set are trained on.

A rule sees the whole set with the log-probabilities of its one scoring pass, so that statistics
are those of the set and never of a batch. Rules are applied in the order of the YAML, each to what
the ones before it left; what they leave out stays in the files and is counted.

The three rules here are the near-on-policy filter of the authors' 2025 release, in its order
`ContextOrder`, `LikelyAnswers`, `ClearContrast`. In what follows avg(y|x) is the mean
log-probability of a response per token (nats) under the policy.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Literal

from sso_lightning.errors import InputError
from sso_lightning.pairs import PairFilter, mean_logp
from sso_lightning.records import Record

_CENTRES: dict[str, Callable[[Sequence[float]], float]] = {"mean": fmean, "median": median}


class ContextOrder(PairFilter):
    """Each answer is likeliest under the principle it was asked with, and least under the other.

    avg(y+|x+) > avg(y+|x) > avg(y+|x-) and avg(y-|x-) > avg(y-|x) > avg(y-|x+).
    """

    name = "context_order"

    def __init__(self, margin: float = 0.0) -> None:
        """Set the rule up.

        Args:
            margin: By how much each step must fall, nats per token; a negative one is lenient.
        """
        self.margin = _finite("margin", margin)

    def keep(self, records: Sequence[Record]) -> list[bool]:
        """See the class."""
        return [
            all(
                mean_logp(r, one, response) - mean_logp(r, next_one, response) > self.margin
                for response, order in (
                    ("good", ("good", "query", "bad")),
                    ("bad", ("bad", "query", "good")),
                )
                for one, next_one in pairwise(order)
            )
            for r in records
        ]


class _AboveCentre(PairFilter):
    """Both answers have a number above that number's centre in the set."""

    def __init__(self, centre: Literal["mean", "median"] = "mean", offset: float = 0.0) -> None:
        """Set the rule up.

        Args:
            centre: Statistic of the set that is the bound.
            offset: Added to the bound, nats per token; a negative one is lenient.
        """
        if centre not in _CENTRES:
            raise InputError(f"pairs.filters: centre must be mean or median, got {centre!r}")
        self.centre = centre
        self.offset = _finite("offset", offset)

    @abstractmethod
    def number(self, record: Record, response: str, other: str) -> float:
        """What is compared of a response, whose name is its principle's; `other` is the other's."""

    def passes(self, value: float, bound: float) -> bool:
        """Whether a number is far enough up."""
        return value > bound

    def keep(self, records: Sequence[Record]) -> list[bool]:
        """See the class."""
        kept = [True] * len(records)
        for names in (("good", "bad"), ("bad", "good")):
            values = [self.number(record, *names) for record in records]
            bound = _CENTRES[self.centre](values) + self.offset if values else 0.0
            kept = [k and self.passes(v, bound) for k, v in zip(kept, values, strict=True)]
        return kept


class LikelyAnswers(_AboveCentre):
    """Both answers are near on-policy: avg(y+|x) and avg(y-|x) are at least the set's own means."""

    name = "likely_answers"

    def number(self, record: Record, response: str, other: str) -> float:
        """avg(y|x)."""
        return mean_logp(record, "query", response)

    def passes(self, value: float, bound: float) -> bool:
        """The mean itself passes."""
        return value >= bound


class ClearContrast(_AboveCentre):
    """The principles matter: both contrast gaps are above the set's own means.

    The gaps are avg(y+|x+) - avg(y+|x-) and avg(y-|x-) - avg(y-|x+).
    """

    name = "clear_contrast"

    def number(self, record: Record, response: str, other: str) -> float:
        """avg(y|its own principle) - avg(y|the other principle)."""
        return mean_logp(record, response, response) - mean_logp(record, other, response)


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise InputError(f"pairs.filters: {name} must be a finite number, got {value}")
    return float(value)
