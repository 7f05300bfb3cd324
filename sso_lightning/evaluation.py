"""What a policy was worth after each iteration: scores of single items, kept beside the run.

Whatever measures a policy (a benchmark, a judge, exact ground truth) writes its items' scores with
`write_scores`; what compares iterations reads them back and pairs them by item.

Intervals and p-values come from one bootstrap over items (Efron and Tibshirani 1993, chapters 13
and 16): items are drawn with replacement, and the spread of the statistic over the draws stands
for its spread over samples of items. It knows nothing of what items do not show: other training
seeds, other judges. With fewer than about twenty items it is too sure of itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sso_lightning.errors import InputError
from sso_lightning.records import replace_file
from sso_lightning.sources import rows_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

FOLDER = "evaluations"
"""Folder of a run that holds the scores: `METRIC/iteration-NN.jsonl`."""

DRAWS = 1999
"""Draws of a bootstrap for an interval."""
DRAWS_FOR_P = 9999
"""Draws for a p-value too; the smallest one it can give is 2 / (DRAWS_FOR_P + 1)."""
CONFIDENCE = 0.95
"""Of the intervals."""

_FILE = re.compile(r"iteration-(\d{2,})\.jsonl")
_METRIC = re.compile(r"[\w.@+=-]+(/[\w.@+=-]+)*")


def check_metric(name: str) -> None:
    """Make sure that a metric's name can be a path.

    Raises:
        InputError: It cannot.
    """
    if not _METRIC.fullmatch(name) or ".." in name.split("/"):
        raise InputError(f"evaluation: {name!r} is no name of a metric")


def write_scores(run: Path, metric: str, iteration: int, scores: Mapping[str, float]) -> Path:
    """Keep the scores of a policy.

    Args:
        run: The run folder.
        metric: What was measured, such as `lm_eval/gsm8k/exact_match`; higher is better.
        iteration: Iterations that the policy was trained for; 0 is the start.
        scores: Item id to score. The same ids in every iteration, so that items can be paired.

    Returns:
        The file.

    Raises:
        InputError: The name cannot be a path, there are no scores, or one is not finite.
    """
    check_metric(metric)
    if not scores:
        raise InputError(f"evaluation: {metric} has no scores")
    for item, score in scores.items():
        if not math.isfinite(score):
            raise InputError(f"evaluation: {metric} of item {item!r} is {score}")
    rows = [json.dumps({"id": item, "score": score}) + "\n" for item, score in scores.items()]
    path = run / FOLDER / metric / f"iteration-{iteration:02d}.jsonl"
    replace_file(path, "".join(rows).encode())
    return path


def read_scores(run: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Read what `write_scores` has kept.

    Args:
        run: The run folder.

    Returns:
        Metric to iteration to item id to score; metrics by name, iterations in order.

    Raises:
        InputError: There is no such folder, or a file is not as it was written.
    """
    if not run.is_dir():
        raise InputError(f"{run}: no such run folder")
    found: dict[str, dict[int, dict[str, float]]] = {}
    for path in sorted((run / FOLDER).rglob("iteration-*.jsonl")):
        match = _FILE.fullmatch(path.name)
        if match:
            metric = path.parent.relative_to(run / FOLDER).as_posix()
            found.setdefault(metric, {})[int(match[1])] = _scores_in(path)
    return {metric: dict(sorted(by.items())) for metric, by in sorted(found.items())}


def _scores_in(path: Path) -> dict[str, float]:
    scores: dict[str, float] = {}
    for row in rows_of(path):
        item, score = row.get("id"), row.get("score")
        if not isinstance(item, str):
            raise InputError(f"{row.what('id')} must be text, got {item!r}")
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise InputError(f"{row.what('score')} must be a number, got {score!r}")
        if item in scores:
            raise InputError(f"{row.what('id')}: {item!r} is there twice")
        scores[item] = float(score)
    return scores


def without_nan(value: Any) -> Any:
    """JSON values with null for what is not a number, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


# -------------------------------------------------------------------------------------- statistics


def bootstrap(
    statistic: Callable[..., Any],
    *columns: Sequence[float],
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[float, float, Floats]:
    """Draw items with replacement and see how a statistic spreads.

    Args:
        statistic: Takes the columns as arrays and `axis`, over which it computes.
        *columns: Numbers of the items, one for each item; drawn together.
        seed: Of the draws.
        draws: Their number.

    Returns:
        Both ends of the `CONFIDENCE` interval (percentiles) and all drawn values; ends that are
        not numbers and no values for fewer than two items.

    Raises:
        InputError: scipy is not installed.
    """
    import numpy as np

    try:
        from scipy import stats
    except ImportError:
        raise InputError(
            "intervals and p-values need scipy: pip install 'sso-lightning[eval]'"
        ) from None
    if len(columns[0]) < 2:
        return math.nan, math.nan, np.empty(0)
    drawn = stats.bootstrap(
        [np.asarray(column, np.float64) for column in columns],
        statistic,
        n_resamples=draws,
        batch=max(1, 4_000_000 // len(columns[0])),  # draws in memory at a time
        vectorized=True,
        paired=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = drawn.confidence_interval
    return float(low), float(high), drawn.bootstrap_distribution


@dataclass(frozen=True)
class Mean:
    """A mean over items with its interval.

    Attributes:
        mean: The mean.
        low: Lower end of the `CONFIDENCE` interval; not a number for a single item.
        high: Upper end.
        items: Number of items.
    """

    mean: float
    low: float
    high: float
    items: int


def mean_of(scores: Sequence[float], seed: int = 0) -> Mean:
    """The mean of items' scores and its bootstrap interval.

    Args:
        scores: At least one.
        seed: Of the bootstrap.
    """
    import numpy as np

    low, high, _ = bootstrap(np.mean, scores, seed=seed)
    return Mean(fmean(scores), low, high, len(scores))


@dataclass(frozen=True)
class Comparison:
    """How the scores of the same items differ between two iterations.

    Attributes:
        difference: Mean of the later score minus the earlier one, with its interval; its `items`
            are those that both have.
        left_out: Items that only one of them has.
        p: Two-sided p-value of no difference: twice the share of draws on the smaller side of
            zero, zero included, counting the data themselves as one draw (Davison and Hinkley
            1997, section 4.2). Not a number for a single item.
    """

    difference: Mean
    left_out: int
    p: float


def compare(
    before: Mapping[str, float], after: Mapping[str, float], seed: int = 0
) -> Comparison | None:
    """Compare two iterations by the items that both have (paired bootstrap).

    Args:
        before: Item id to score.
        after: The same of the later iteration.
        seed: Of the bootstrap.

    Returns:
        The comparison; None where they have no item in common.
    """
    import numpy as np

    both = [item for item in after if item in before]
    if not both:
        return None
    differences = [after[item] - before[item] for item in both]
    low, high, drawn = bootstrap(np.mean, differences, seed=seed, draws=DRAWS_FOR_P)
    p = math.nan
    if len(drawn):
        # what is zero but for rounding lies on both sides
        side = min((drawn < 1e-12).sum(), (drawn > -1e-12).sum())
        p = min(1.0, 2 * (int(side) + 1) / (len(drawn) + 1))
    difference = Mean(fmean(differences), low, high, len(both))
    return Comparison(difference, len({*before, *after}) - len(both), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm 1979): the chance of one false finding is bounded.

    >>> holm([0.01, 0.04, 0.03])  # 3 * .01, 2 * .03, and never below a smaller one
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, least = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected
