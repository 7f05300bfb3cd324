"""`sso-lightning figure`: signal accuracy and on-policyness of runs.

Three panels: the signal accuracy of each iteration's pairs, the on-policyness of y+ and y-, and one
against the other (arXiv 2410.17131, Figures 3 and 4). Everything is computed from the records, and
from the scores that a judge left in the run.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sso_lightning.errors import InputError, OneLineParser
from sso_lightning.evaluation import Mean, mean_of, read_scores
from sso_lightning.records import iteration_sets, load_records, replace_file
from sso_lightning.report.facts import Lore, measures_of

JUDGED = "judge/signal_accuracy"
EXACT = "exact"
ENDINGS = (".png", ".svg", ".pdf")

# Okabe and Ito's palette, without its yellow: told apart with any kind of colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
RING: dict[str, Any] = {"marker": "o", "markersize": 13, "markerfacecolor": "none"}
SIDES = {"good": "y+", "bad": "y-"}


@dataclass
class Line:
    """A run in the figure.

    Attributes:
        name: In the legend.
        signal: Iteration to signal accuracy; empty where it is not known.
        on_policy: Response to iteration to mean exp(avg(y|x)) under the policy that wrote the
            pairs.
        both: Iteration to the same over y+ and y- together.
    """

    name: str
    signal: dict[int, Mean]
    on_policy: dict[str, dict[int, Mean]]
    both: dict[int, Mean]


def read_lines(roots: Sequence[Path], metric: str | None = None) -> tuple[list[Line], str]:
    """Read what the figure shows.

    Args:
        roots: Run folders.
        metric: Scores that are the signal accuracy, or "exact" for the sandbox's ground truth; by
            default the latter where all queries are the sandbox's, else `JUDGED`.

    Returns:
        The runs, and the metric.

    Raises:
        InputError: A run has no pairs of an iteration, or not this metric.
    """
    names = Counter(root.resolve().name for root in roots)
    numbers = {}
    for root in roots:
        numbers[root] = {number: _measured(folder) for number, folder in _folders(root).items()}
    sets = [found for by in numbers.values() for found in by.values()]
    if metric is None:
        metric = EXACT if all("signal" in found for found in sets) else JUDGED
    lines = []
    for root, by in numbers.items():
        name = root.resolve().name
        if names[name] > 1:
            name = f"{root.resolve().parent.name}/{name}"
        if metric == EXACT:
            signal = {i: mean_of(own["signal"]) for i, own in by.items() if "signal" in own}
        else:
            scores = read_scores(root).get(metric, {})
            signal = {i: mean_of([*own.values()]) for i, own in scores.items() if i in by}
        if metric not in (EXACT, JUDGED) and not signal:
            raise InputError(f"--metric {metric}: {root} has no such scores of its pairs")
        sides = {side: _means(by, f"on_policy_{side}") for side in SIDES}
        lines.append(Line(name, signal, sides, _means(by, "on_policy")))
    return lines, metric


def _folders(root: Path) -> dict[int, Path]:
    """The sets that the policy learned from, by the iterations it was trained for before."""
    found = iteration_sets(root)
    if not found and (root / "pairs" / "offline").is_dir():
        found[0] = root / "pairs" / "offline"
    if not found:
        raise InputError(f"{root}: has no pairs of an iteration")
    return found


def _means(by: dict[int, dict[str, list[float]]], name: str) -> dict[int, Mean]:
    return {i: mean_of(own[name]) for i, own in by.items() if own.get(name)}


def _measured(folder: Path) -> dict[str, list[float]]:
    """Numbers of all records of a set, by measure; those that a record lacks are left out."""
    found: dict[str, list[float]] = {}
    for record in load_records(folder):
        numbers = measures_of(record, Lore())
        sides = [numbers.get(f"on_policy_{side}") for side in SIDES]
        if None not in sides:
            numbers["on_policy"] = sum(filter(None, sides)) / len(sides)
        for name in ("signal", "on_policy", *(f"on_policy_{side}" for side in SIDES)):
            if name in numbers:
                found.setdefault(name, []).append(numbers[name])
    return found


# ------------------------------------------------------------------------------------- the drawing


def draw(lines: Sequence[Line], metric: str, out: Path) -> None:
    """Draw the figure.

    Args:
        lines: The runs.
        metric: What the signal accuracy is, see `read_lines`.
        out: A .png, .svg or .pdf file; replaced if it exists.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(13.5, 4.6), layout=ConstrainedLayoutEngine(wspace=0.06))
    FigureCanvasAgg(figure)
    accuracy, policy, both = figure.subplots(1, 3)
    label = "exact" if metric == EXACT else metric.removesuffix("/signal_accuracy")
    known = any(line.signal for line in lines)
    for number, line in enumerate(lines):
        # runs that meet would hide each other's bars
        shift = 0.06 * (number - (len(lines) - 1) / 2)
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
        }
        _by_iteration(accuracy, line.signal, shift, style)
        _by_iteration(policy, line.on_policy["good"], shift, style)
        hollow = {**style, "markerfacecolor": "white", "linestyle": "--"}
        _by_iteration(policy, line.on_policy["bad"], shift, hollow)
        _against(both, line, style)
    accuracy.set_title(f"Signal accuracy, {label}")
    accuracy.set_ylabel("share of pairs whose y+ is better")
    policy.set_title("On-policyness")
    policy.set_ylabel("mean exp(avg log-probability of y given x)")
    both.set_title("Accuracy against on-policyness")
    both.set_xlabel("on-policyness, mean of y+ and y-")
    both.locator_params(axis="x", nbins=6)
    both.set_ylabel(f"signal accuracy, {label}")
    for axis in (accuracy, policy):
        axis.set_xlabel("iterations that the sampling policy was trained for")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in (accuracy, both):
        if known:
            axis.axhline(0.5, color="0.6", linewidth=1, linestyle=":", zorder=0)
            axis.set_ylim(*_limits([m for line in lines for m in line.signal.values()]))
        else:
            text = "not known:\nask sso-lightning judge"
            axis.set(xticks=[], yticks=[])
            axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center")
    policy.set_ylim(bottom=0)
    sides = [
        Line2D([], [], color="0.3", linestyle=dash, label=SIDES[side])
        for side, dash in (("good", "-"), ("bad", "--"))
    ]
    policy.legend(handles=sides, frameon=False, loc="best")
    if known:
        ring = Line2D([], [], **RING, color="0.3", linestyle="none", label="last iteration")
        both.legend(handles=[ring], frameon=False, loc="best")
    for axis in (accuracy, policy, both):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    named = [
        Line2D(
            [],
            [],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            label=line.name,
        )
        for number, line in enumerate(lines)
    ]
    figure.legend(
        handles=named, loc="outside lower center", ncols=min(len(named), 5), frameon=False
    )
    # the same runs give the same bytes
    with rc_context({"svg.hashsalt": "sso_lightning", "svg.fonttype": "none"}):
        stamp = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(out.suffix, {})
        replace_file(
            out,
            lambda file: figure.savefig(file, format=out.suffix[1:], dpi=150, metadata=stamp),
        )


def _limits(means: Sequence[Mean]) -> tuple[float, float]:
    """Bounds of an axis of shares: all intervals and one half, with some air."""
    ends = [0.5, *(x for m in means for x in (m.mean, m.low, m.high) if x == x)]
    return max(min(ends) - 0.06, -0.02), min(max(ends) + 0.06, 1.02)


def _bars(means: Sequence[Mean]) -> list[list[float]]:
    """Lengths of error bars; none where there is no interval."""
    return [
        [m.mean - m.low if m.low == m.low else 0.0 for m in means],
        [m.high - m.mean if m.high == m.high else 0.0 for m in means],
    ]


def _by_iteration(axis: Any, means: dict[int, Mean], shift: float, style: dict[str, Any]) -> None:
    if means:
        axis.errorbar(
            [iteration + shift for iteration in means],
            [m.mean for m in means.values()],
            yerr=_bars([*means.values()]),
            capsize=2.5,
            linewidth=1.6,
            markersize=5.5,
            elinewidth=1,
            **style,
        )


def _against(axis: Any, line: Line, style: dict[str, Any]) -> None:
    """A run's way from iteration to iteration; the last one has a ring."""
    shared = [i for i in line.signal if i in line.both]
    if not shared:
        return
    x, y = ([means[i] for i in shared] for means in (line.both, line.signal))
    axis.errorbar(
        [m.mean for m in x],
        [m.mean for m in y],
        xerr=_bars(x),
        yerr=_bars(y),
        linewidth=1,
        elinewidth=0.7,
        markersize=5.5,
        alpha=0.9,
        **style,
    )
    axis.plot(x[-1].mean, y[-1].mean, **RING, color=style["color"])


def run(argv: list[str]) -> int:
    """The command `sso-lightning figure`.

    Args:
        argv: What follows it on the command line.

    Raises:
        InputError: A flag or a folder is wrong.
    """
    parser = OneLineParser(
        prog="sso-lightning figure",
        description="Draw signal accuracy and on-policyness of runs by iteration, and one against "
        "the other, with 95% bootstrap intervals. The accuracy is exact for the sandbox's queries; "
        "for others `sso-lightning judge RUN` must have scored the pairs.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, drawn together")
    parser.add_argument("--out", type=Path, required=True, help=".png, .svg or .pdf file")
    parser.add_argument(
        "--metric",
        help=f"scores that are the signal accuracy (default: {EXACT} if known, else {JUDGED})",
    )
    given = parser.parse_args(argv)
    if given.out.suffix not in ENDINGS:
        raise InputError(f"--out {given.out}: give one of {', '.join(ENDINGS)}")
    lines, metric = read_lines(given.runs, given.metric)
    draw(lines, metric, given.out)
    sys.stdout.write(f"wrote {given.out}\n")
    return 0
