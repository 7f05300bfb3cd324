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


class LikelyAnswers(PairFilter):
    """Both answers are near on-policy: avg(y+|x) and avg(y-|x) are at least the set's own means."""

    name = "likely_answers"

    def __init__(self, centre: Literal["mean", "median"] = "mean", offset: float = 0.0) -> None:
        """Set the rule up.

        Args:
            centre: Statistic of the set that is the bound.
            offset: Added to the bound, nats per token; a negative one is lenient.
        """
        self.centre = _known(centre)
        self.offset = _finite("offset", offset)

    def keep(self, records: Sequence[Record]) -> list[bool]:
        """See the class."""
        columns = [[mean_logp(r, "query", y) for r in records] for y in ("good", "bad")]
        return _above(columns, self.centre, self.offset, equal=True)


class ClearContrast(PairFilter):
    """The principles matter: both contrast gaps are above the set's own means.

    The gaps are avg(y+|x+) - avg(y+|x-) and avg(y-|x-) - avg(y-|x+).
    """

    name = "clear_contrast"

    def __init__(self, centre: Literal["mean", "median"] = "mean", offset: float = 0.0) -> None:
        """Set the rule up.

        Args:
            centre: Statistic of the set that is the bound.
            offset: Added to the bound, nats per token; a negative one is lenient.
        """
        self.centre = _known(centre)
        self.offset = _finite("offset", offset)

    def keep(self, records: Sequence[Record]) -> list[bool]:
        """See the class."""
        columns = [
            [mean_logp(r, own, y) - mean_logp(r, other, y) for r in records]
            for y, own, other in (("good", "good", "bad"), ("bad", "bad", "good"))
        ]
        return _above(columns, self.centre, self.offset, equal=False)


def _above(
    columns: Sequence[Sequence[float]], centre: str, offset: float, *, equal: bool
) -> list[bool]:
    """Which rows are above (or equal to) the centre of every column."""
    if not columns[0]:
        return []
    bounds = [_CENTRES[centre](column) + offset for column in columns]
    return [
        all(v > bound or (equal and v == bound) for v, bound in zip(row, bounds, strict=True))
        for row in zip(*columns, strict=True)
    ]


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise InputError(f"pairs.filters: {name} must be a finite number, got {value}")
    return float(value)


def _known(centre: str) -> str:
    if centre not in _CENTRES:
        raise InputError(f"pairs.filters: centre must be mean or median, got {centre!r}")
    return centre
