"""The numbers of a set as columns of tables, their drift, and all charts of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from sso_lightning.report.charts import COLOURS, Series, bar_chart, line_chart, nice_ticks
from sso_lightning.report.health import SYMBOLS
from sso_lightning.report.read import HISTOGRAMS, PairSet, Run

CURVE_POINTS = 100_000
"""Points of all training curves together; a curve of more shows every n-th."""

NUMBERS = {
    "signal": "signal accuracy of these pairs (exact)",
    "held_out_signal": "signal accuracy on held-out queries of the policy that wrote them",
    "gap_logp": "gap avg(y+|x) - avg(y-|x), nats per token",
    "on_policy_good": "on-policyness of y+",
    "on_policy_bad": "on-policyness of y-",
    "on_policy_original": "on-policyness of yo",
    "logp_good": "avg(y+|x), nats per token",
    "logp_bad": "avg(y-|x), nats per token",
    "contrast_good": "avg(y+|x+) - avg(y+|x-), nats per token",
    "contrast_bad": "avg(y-|x-) - avg(y-|x+), nats per token",
    "weight": "weight W, mean",
    "length_good": "length of y+, tokens",
    "length_bad": "length of y-, tokens",
    "length_original": "length of yo, tokens",
    "truncated_good": "share of y+ cut at the limit",
    "truncated_bad": "share of y- cut at the limit",
    "truncated_original": "share of yo cut at the limit",
    "leak_good": "share of y+ that show the principle",
    "leak_bad": "share of y- that show the principle",
    "duplicate_good": "share of y+ that repeat another record's",
    "duplicate_bad": "share of y- that repeat another record's",
    "repeating_good": "share of y+ that are loops (as the run reported)",
    "repeating_bad": "share of y- that are loops (as the run reported)",
    "principle_fallback_rate": "share of principles that fell back (did not parse)",
    "principle_failed_rate": "share of principles that fell back (no answer)",
    "feature_fill_rate": "share of features drawn because the policy named too few",
}

# ------------------------------------------------------------------------------------------ numbers


def _held_out(run: Run, pairs: PairSet) -> float | None:
    """Signal accuracy on held-out queries of the writer of a set, just before it was trained on.

    Aligned by optimizer step: the last measurement that is not later than the set's own row.
    """
    kind = "generator_" if pairs.kind == "generator" else ""
    two_phases = any(each.kind == "generator" for each in run.sets)
    writer = "generator_" if two_phases and pairs.kind == "iteration" else ""
    rows = run.curves.get(f"{kind}pairs/kept", [])
    same_kind = [each for each in run.sets if each.kind == pairs.kind]
    if pairs.kind == "other" or len(rows) != len(same_kind):
        return None
    step = rows[same_kind.index(pairs)][0]
    known = [v for at, v in run.curves.get(f"sandbox/{writer}signal_accuracy", []) if at <= step]
    return known[-1] if known else None


def numbers_of(run: Run, pairs: PairSet) -> dict[str, float]:
    """The numbers of a set's column, by the names in `NUMBERS`; what is not known is absent."""
    held_out = _held_out(run, pairs)
    found = {k: v for k, v in pairs.reported.items() if k in NUMBERS} | pairs.means
    if held_out is not None:
        found["held_out_signal"] = held_out
    return {name: found[name] for name in NUMBERS if name in found}


def _distance(one: Mapping[Any, int], other: Mapping[Any, int]) -> float | None:
    """Total variation distance of two counts, in [0, 1]."""
    a, b = sum(one.values()), sum(other.values())
    if not a or not b:
        return None
    keys = {*one, *other}
    return sum(abs(one.get(k, 0) / a - other.get(k, 0) / b) for k in keys) / 2


def drift_of(before: PairSet, after: PairSet) -> dict[str, float | None]:
    """How far a set has moved from the one before it."""

    def bins(pairs: PairSet, name: str) -> dict[int, int]:
        return dict(enumerate(pairs.histograms.get(name, ())))

    def change(name: str) -> float | None:
        one, other = before.means.get(name), after.means.get(name)
        return None if one is None or other is None else other - one

    changes = {
        **{f"on_policy_{r}": f"on-policyness of {s}" for r, s in SYMBOLS.items()},
        "gap_logp": "gap avg(y+|x) - avg(y-|x), nats per token",
        **{f"length_{r}": f"length of {s}, tokens" for r, s in SYMBOLS.items()},
        "signal": "signal accuracy of the pairs",
    }
    moved = {}
    for name, sign in SYMBOLS.items():
        lengths = [bins(pairs, f"length_{name}") for pairs in (before, after)]
        moved[f"lengths of {sign}, distance"] = _distance(*lengths)
    shared = len(before.ids & after.ids) / len(after.ids) if after.ids else None
    return {
        **{f"change of {label}": change(name) for name, label in changes.items()},
        **moved,
        "feature mix, distance": _distance(before.features, after.features),
        "share of queries that the set before had too": shared,
    }


# ------------------------------------------------------------------------------------------- charts

SET_CHARTS: dict[str, tuple[str, dict[str, str]]] = {
    "Signal accuracy": ("share", {"signal": "these pairs", "held_out_signal": "held-out queries"}),
    "On-policyness": (
        "probability per token",
        {f"on_policy_{name}": sign for name, sign in SYMBOLS.items()},
    ),
    "Gap and contrasts": (
        "nats per token",
        {
            "gap_logp": "gap y+ to y-",
            "contrast_good": "contrast of y+",
            "contrast_bad": "contrast of y-",
        },
    ),
    "Length": ("tokens", {f"length_{name}": sign for name, sign in SYMBOLS.items()}),
    "Weight W": ("mean", {"weight": "W"}),
    "Fallbacks": (
        "share",
        {
            "principle_fallback_rate": "did not parse",
            "principle_failed_rate": "no answer",
            "feature_fill_rate": "features filled up",
        },
    ),
}
CURVE_CHARTS = {
    "Loss": ("train/loss", "val/loss", "generator/loss"),
    "Reward accuracy": ("train/reward_accuracy_query", "val/reward_accuracy"),
    "Reward margin": ("train/reward_margin_query", "val/reward_margin"),
    "Weight W in training": ("train/weight_mean", "train/weight_min", "train/weight_max"),
    "Gradient norm": ("train/grad_norm",),
    "Sandbox, held-out queries": ("sandbox/quality", "sandbox/signal_accuracy", "sandbox/gap"),
}


def _named(runs: list[Run], run: Run, name: str) -> str:
    return f"{run.name}: {name}" if len(runs) > 1 else name


def set_charts(runs: list[Run]) -> list[Markup]:
    """Numbers by iteration, all runs together; the feature mix and the drops of each."""
    drawn = []
    numbers = {id(pairs): numbers_of(run, pairs) for run in runs for pairs in run.sets}
    for title, (unit, measures) in SET_CHARTS.items():
        series = []
        for r, run in enumerate(runs):
            for kind in dict.fromkeys(pairs.kind for pairs in run.sets):
                sets = [pairs for pairs in run.sets if pairs.kind == kind]
                for m, (measure, name) in enumerate(measures.items()):
                    points = [
                        (pairs.number, numbers[id(pairs)][measure])
                        for pairs in sets
                        if measure in numbers[id(pairs)]
                    ]
                    if points:
                        full = name if kind == "iteration" else f"{name} ({kind})"
                        colour, dash = (m if len(measures) > 1 else r), r + (kind == "generator")
                        series.append(Series(_named(runs, run, full), points, colour, dash))
        if series:
            drawn.append(line_chart(title, f"{unit}, by iteration", series, zero=unit == "tokens"))
    for title, unit, what in (
        ("Feature mix", "share of mentions, by iteration", "features"),
        ("Dropped queries by reason", "queries, by iteration", "dropped"),
    ):
        counts: list[list[Mapping[str, int]]] = [
            [getattr(pairs, what) for pairs in run.sets] for run in runs
        ]
        # the same keys in every run's drawing, so that a colour means the same in all
        keys = dict.fromkeys(key for own in counts for each in own for key in each)
        for run, own in zip(runs, counts, strict=True):
            totals = [sum(each.values()) or 1 if what == "features" else 1 for each in own]
            names = [str(p.number) if p.kind == "iteration" else p.name for p in run.sets]
            rows = [
                (
                    key.replace("_", " "),
                    [c.get(key, 0) / t for c, t in zip(own, totals, strict=True)],
                )
                for key in keys
            ]
            if rows and names:
                drawn.append(bar_chart(_named(runs, run, title), unit, names, rows))
    return drawn


def distributions(runs: list[Run]) -> list[Markup]:
    """How the numbers of the records are spread in every set, a chart per run and measure."""
    drawn = []
    for measure, label in NUMBERS.items():
        for run in runs:
            sets = [pairs for pairs in run.sets if measure in pairs.histograms]
            if not sets:
                continue
            bins = len(sets[0].histograms[measure])
            if measure in HISTOGRAMS:
                low, high, _ = HISTOGRAMS[measure]
                marks = nice_ticks(low, high)
                ticks = [((value - low) / (high - low) * bins, f"{value:g}") for value in marks]
            else:
                ticks = [(float(i), str(2**i)) for i in range(0, bins, 2)]
            series = [
                Series(
                    pairs.name,
                    _shares(pairs.histograms[measure]),
                    number,
                    number // COLOURS,
                )
                for number, pairs in enumerate(sets)
            ]
            title = _named(runs, run, label.removesuffix(", mean"))
            drawn.append(
                line_chart(title, "share of records", series, zero=True, steps=True, ticks=ticks)
            )
    return drawn


def curve_charts(runs: list[Run]) -> tuple[list[Markup], list[Markup]]:
    """Columns of metrics.csv: the main ones, and a chart for each of the others."""
    columns = dict.fromkeys(name for run in runs for name in run.curves)
    most = max(20, min(400, CURVE_POINTS // max(sum(len(run.curves) for run in runs), 1)))

    def chart(title: str, names: Sequence[str]) -> list[Markup]:
        series = [
            Series(
                _named(runs, run, name),
                _thin(run.curves[name], most),
                colour=n if len(names) > 1 else r,
                dash=r,
            )
            for r, run in enumerate(runs)
            for n, name in enumerate(names)
            if name in run.curves
        ]
        return [line_chart(title, "by optimizer step", series)] if series else []

    main = [each for title, names in CURVE_CHARTS.items() for each in chart(title, names)]
    used = {name for names in CURVE_CHARTS.values() for name in names}
    return main, [each for name in sorted(columns.keys() - used) for each in chart(name, [name])]


def _shares(counts: Sequence[int]) -> list[tuple[int, float]]:
    total = sum(counts)
    return [(i, count / total) for i, count in enumerate(counts)]


def _thin(points: list[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    kept = points[:: max(-(-len(points) // most), 1)]
    return [*kept, points[-1]] if kept[-1] != points[-1] else kept
