"""The table of iterations: what a policy was worth after each, and whether that is a change.

Every metric whose scores a run keeps (`evaluation`) is compared with the start of the run, item by
item. As many comparisons are made as the table has cells, so their p-values are Holm's.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sso_lightning.errors import InputError, OneLineParser
from sso_lightning.evaluation import (
    CONFIDENCE,
    FOLDER,
    Comparison,
    Mean,
    compare,
    holm,
    mean_of,
    read_scores,
    without_nan,
)

LEVEL = 0.05
"""Corrected p-values below this are marked."""


@dataclass(frozen=True)
class Cell:
    """A metric after an iteration.

    Attributes:
        score: Over all items of the iteration.
        change: Against the start; None for the start itself, without one, and where no item is in
            both.
        corrected: Holm's p-value of the change, over all cells of the table; None where the
            bootstrap gives none.
    """

    score: Mean
    change: Comparison | None = None
    corrected: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the change is more than chance, at `LEVEL`."""
        return self.corrected is not None and self.corrected < LEVEL


Table = dict[str, dict[int, Cell]]
"""Metric to iteration to its cell."""


def table_of(run: Path, metrics: Sequence[str] = (), seed: int = 0) -> Table:
    """Compare every iteration of a run with its start.

    Args:
        run: The run folder.
        metrics: Which ones, in this order; names, or the beginning of names up to a slash. All
            there are if not given.
        seed: Of the bootstrap.

    Raises:
        InputError: The run has no scores, or none of a metric that is named.
    """
    known = read_scores(run)
    if not known:
        raise InputError(
            f"{run}: has no {FOLDER}/ with scores; a benchmark, a judge or the sandbox's metrics "
            "write them"
        )
    chosen: dict[str, None] = dict.fromkeys(() if metrics else known)
    for name in metrics:
        found = [m for m in known if m == name or m.startswith(f"{name.rstrip('/')}/")]
        if not found:
            raise InputError(f"--metric {name}: {run} has {', '.join(known)}")
        chosen |= dict.fromkeys(found)
    table: Table = {}
    for metric in chosen:
        scores = known[metric]
        start = scores.get(0)
        table[metric] = {
            iteration: Cell(
                mean_of([*own.values()], seed),
                compare(start, own, seed) if start and iteration else None,
            )
            for iteration, own in scores.items()
        }
    return _corrected(table)


def _corrected(table: Table) -> Table:
    tested = [
        (metric, iteration, cell.change.p)
        for metric, cells in table.items()
        for iteration, cell in cells.items()
        if cell.change and not math.isnan(cell.change.p)
    ]
    for (metric, iteration, _), p in zip(tested, holm([p for *_, p in tested]), strict=True):
        table[metric][iteration] = replace(table[metric][iteration], corrected=p)
    return table


# --------------------------------------------------------------------------------------- as a text


def as_json(table: Table) -> str:
    """The table as a JSON object: metric to iteration to numbers; what is not known is null."""
    values = {
        metric: {str(i): asdict(cell) | {"significant": cell.significant} for i, cell in by.items()}
        for metric, by in table.items()
    }
    return json.dumps(without_nan(values), indent=1) + "\n"


def _lines(cell: Cell | None) -> list[str]:
    """A cell: the score, its change with the interval, the corrected p-value."""
    if cell is None:
        return []
    lines = [f"{cell.score.mean:.3f}" + "*" * cell.significant]
    if cell.change:
        moved = cell.change.difference
        lines.append(f"{moved.mean:+.3f}")
        if cell.corrected is not None:
            lines[-1] += f" [{moved.low:+.3f}, {moved.high:+.3f}]"
            lines.append(f"p {cell.corrected:.2g}")
    return lines


def _rows(table: Table) -> list[tuple[str, list[list[str]]]]:
    iterations = sorted({iteration for by in table.values() for iteration in by})
    return [
        (str(i) if i else "start", [_lines(by.get(i)) for by in table.values()]) for i in iterations
    ]


def notes(table: Table) -> list[str]:
    """What must be known to read the table, in sentences."""
    found = []
    if any(cell.change for by in table.values() for cell in by.values()):
        found.append(
            "Changes are against the start, over the same items, with "
            f"{100 * CONFIDENCE:g} % intervals of a paired bootstrap; * marks p below {LEVEL:g} "
            "after Holm's correction for all cells."
        )
    for metric, by in table.items():
        if 0 not in by:
            found.append(f"{metric}: the start was not measured, so nothing is compared.")
            continue
        apart = [str(i) for i, cell in by.items() if i and cell.change is None]
        if apart:
            found.append(
                f"{metric}: not compared in iteration {', '.join(apart)}, which has no item of "
                "the start."
            )
        for iteration, cell in by.items():
            if cell.change and cell.change.left_out:
                found.append(
                    f"{metric}: iteration {iteration} and the start have {cell.change.left_out} "
                    f"items that the other has not; {cell.change.difference.items} are compared."
                )
    return found


def as_markdown(table: Table) -> str:
    """The table and its notes as Markdown."""
    lines = ["| iteration | " + " | ".join(table) + " |", "|---" * (len(table) + 1) + "|"]
    for name, cells in _rows(table):
        texts = [f"{c[0]} ({', '.join(c[1:])})" if c[1:] else "".join(c) for c in cells]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", *(f"* {note}" for note in notes(table))]) + "\n"


def _print(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as Drawn

    drawn = Drawn(show_lines=True)
    drawn.add_column("iteration", justify="right")
    for metric in table:
        drawn.add_column(metric, justify="right", overflow="fold")
    for name, cells in _rows(table):
        # brackets would be read as markup
        drawn.add_row(name, *("\n".join(cell).replace("[", r"\[") for cell in cells))
    # a file has no width of its own
    console = Console(width=None if sys.stdout.isatty() else 40 + 32 * len(table))
    console.print(drawn)
    for note in notes(table):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def run(argv: list[str]) -> int:
    """The command `sso-lightning iterations`.

    Args:
        argv: What follows it on the command line.

    Raises:
        InputError: A flag is wrong, or the run has no such scores.
    """
    parser = OneLineParser(
        prog="sso-lightning iterations",
        description="What a run's policy was worth after each iteration, by every metric whose "
        "scores it keeps, and whether that is a change against the start (paired bootstrap).",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        help="only this one (sandbox/quality) or all of a kind (lm_eval); may be repeated",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--json", action="store_true", help="print JSON")
    kinds.add_argument("--markdown", action="store_true", help="print Markdown")
    given = parser.parse_args(argv)
    table = table_of(given.run, given.metric, given.seed)
    if given.json:
        sys.stdout.write(as_json(table))
    elif given.markdown:
        sys.stdout.write(as_markdown(table))
    else:
        _print(table)
    return 0
