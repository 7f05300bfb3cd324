"""Line and bar charts as inline SVG: a few hundred bytes each, themed by the page's style sheet.

A plotting library in the page was tried first: Plotly's script takes two to four seconds to start
in Chromium on two busy cores, more than the whole page may take to open. What is drawn here is
simple enough for a function, needs no script, and prints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 410, 8, 186
"""Size of a drawing and of the field inside its axes, in the drawing's own units."""
COLOURS, DASHES = 8, 4
"""How many of each the style sheet has: a chart of more series repeats them."""
MARKED = 30
"""Up to so many points a line has marks, which tell their values."""


@dataclass(frozen=True)
class Series:
    """One line: its name, points, and which colour and dash of the style sheet it has."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dash: int = 0


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten.

    Args:
        low: Smallest value.
        high: Largest value; above `low`.
        most: About how many steps.
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * by for by in (1, 2, 5, 10) if power * by >= rough * 0.999999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _label(value: float) -> str:
    return f"{value:.6g}" if abs(value) < 1e5 else f"{value:.1e}"


def _span(values: Sequence[float], *, zero: bool = False) -> tuple[float, float]:
    """The range of an axis: all values, a little room, never empty."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        room = abs(high) / 10 or 1.0
        return (low if zero and low == 0 else low - room), high + room
    room = (high - low) * 0.04
    return (low if zero and low == 0 else low - room), high + room


class _Field:
    """Values to places in the drawing."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x_range, self.y_range = x, y

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (RIGHT - LEFT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP)

    def grid(self, x_ticks: Sequence[tuple[float, str]]) -> str:
        parts = []
        for tick in nice_ticks(*self.y_range):
            at = f"{self.y(tick):.1f}"
            parts.append(f'<path class="grid" d="M{LEFT} {at}H{RIGHT}"/>')
            parts.append(
                f'<text x="{LEFT - 5}" y="{at}" dy=".32em" class="y">{_label(tick)}</text>'
            )
        for value, name in x_ticks:
            at = f"{self.x(value):.1f}"
            parts.append(f'<text x="{at}" y="{BOTTOM + 15}" class="x">{escape(name)}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>')
        return "".join(parts)


def _figure(title: str, note: str, drawing: str, legend: Sequence[tuple[str, str]]) -> Markup:
    """A drawing with its title above and the names of its series below."""
    keys = "".join(
        f'<li><svg viewBox="0 0 24 8" aria-hidden="true">{mark}</svg><bdi>{escape(name)}</bdi></li>'
        for name, mark in legend
    )
    names = ", ".join(name for name, _ in legend)
    return Markup(
        f'<figure class="chart"><figcaption>{escape(title)} <small>{escape(note)}</small>'
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"{title}: {names}")}">{drawing}</svg>'
        f"<ul>{keys if len(legend) > 1 else ''}</ul></figure>"
    )


def line_chart(
    title: str,
    note: str,
    series: Sequence[Series],
    *,
    zero: bool = False,
    steps: bool = False,
    ticks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Lines over a common axis.

    Args:
        title: Above the drawing.
        note: Unit and horizontal axis, beside the title.
        series: At least one, each with a point.
        zero: Begin the vertical axis at zero.
        steps: Draw each value as a step of width one, as in a histogram of equal bins.
        ticks: Places and names on the horizontal axis; round numbers if none are given.
    """
    every_x = [x for each in series for x, _ in each.points]
    low, high = min(every_x), max(every_x)
    x_range = (low, high + 1.0) if steps else (low, high) if high > low else (low - 1, low + 1)
    field = _Field(x_range, _span([y for each in series for _, y in each.points], zero=zero))
    named = ticks
    if not named:
        found = nice_ticks(*x_range, most=6)
        whole = all(float(x).is_integer() for x in every_x)
        named = [(x, _label(x)) for x in found if not whole or float(x).is_integer()]
    parts = [field.grid(named)]
    legend = []
    for each in series:
        style = f"c{each.colour % COLOURS} d{each.dash % DASHES}"
        points = [*each.points]
        if steps:
            points = [(x + right, y) for x, y in points for right in (0.0, 1.0)]
        path = " ".join(f"{field.x(x):.1f},{field.y(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="line {style}" points="{path}"/>')
        if not steps and len(points) <= MARKED:
            for x, y in points:
                says = escape(f"{each.name}, {_label(x)}: {y:.5g}")
                place = f'cx="{field.x(x):.1f}" cy="{field.y(y):.1f}"'
                parts.append(
                    f'<circle class="mark {style}" {place} r="3"><title>{says}</title></circle>'
                )
        legend.append((each.name, f'<path class="line {style}" d="M0 4H24"/>'))
    return _figure(title, note, "".join(parts), legend)


def bar_chart(
    title: str, note: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]
) -> Markup:
    """Stacked bars.

    Args:
        title: Above the drawing.
        note: Unit and horizontal axis, beside the title.
        columns: Names of the bars.
        rows: Name of a part and its height in every bar, lowest first.
    """
    highest = max(sum(heights[i] for _, heights in rows) for i in range(len(columns)))
    field = _Field((0.0, float(len(columns))), _span([0.0, highest], zero=True))
    every = -(-len(columns) // 8)
    named = [(i + 0.5, name) for i, name in enumerate(columns) if i % every == 0]
    parts = [field.grid(named)]
    tops = [0.0] * len(columns)
    legend = []
    for number, (name, heights) in enumerate(rows):
        style = f"c{number % COLOURS}"
        for i, height in enumerate(heights):
            upper, lower = field.y(tops[i] + height), field.y(tops[i])
            width = (RIGHT - LEFT) / len(columns)
            place = f'x="{LEFT + width * (i + 0.14):.1f}" y="{upper:.1f}"'
            says = escape(f"{columns[i]}, {name}: {height:.4g}")
            parts.append(
                f'<rect class="bar {style}" {place} width="{width * 0.72:.1f}" '
                f'height="{max(lower - upper, 0):.1f}"><title>{says}</title></rect>'
            )
            tops[i] += height
        legend.append((name, f'<rect class="bar {style}" width="24" height="8"/>'))
    return _figure(title, note, "".join(parts), legend)
