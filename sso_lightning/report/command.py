"""The command `sso-lightning report`, and the writing of a page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sso_lightning.errors import InputError, OneLineParser
from sso_lightning.records import replace_file
from sso_lightning.report.health import Bounds, Reading, alarms
from sso_lightning.report.page import render
from sso_lightning.report.read import Cache, read_runs

MAX_RECORDS = 1500
ALARM = 3
"""Exit status of `--check` when a run has an alarm."""


def write_report(
    roots: Sequence[Path],
    out: Path,
    *,
    bounds: Bounds | None = None,
    max_records: int = MAX_RECORDS,
    seed: int = 0,
    cache: Cache | None = None,
) -> dict[str, list[Reading]]:
    """Read runs and write their page, whole or not at all.

    Args:
        roots: Run folders.
        out: The HTML file; replaced if it exists.
        bounds: Of the alarms.
        max_records: Most records on the page, besides those that prove alarms.
        seed: Which records are drawn.
        cache: Sets that were read before.

    Returns:
        The alarms by the name of the run.

    Raises:
        InputError: A folder is not a run's, or the file cannot be written.
    """
    bounds = bounds or Bounds()
    runs = read_runs([*roots], seed=seed, keep=max_records, cache=cache)
    html = render(runs, bounds, max_records=max_records, seed=seed)
    replace_file(out, html.encode())
    return {run.name: alarms(run, bounds) for run in runs}


def run(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: What follows `sso-lightning report` on the command line.

    Returns:
        The exit status: 0, or 3 for `--check` with an alarm.

    Raises:
        InputError: A flag or a folder is wrong.
    """
    parser = OneLineParser(
        prog="sso-lightning report",
        description="Write one HTML file that shows runs: settings, curves, the pairs of every "
        "iteration with their health, and alarms. It needs no network. With --check the exit "
        "status is 3 if a run has an alarm.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; several are compared")
    parser.add_argument(
        "--out", type=Path, help="the file (default: report.html in the folder of the one run)"
    )
    parser.add_argument("--check", action="store_true", help="exit status 3 if there is an alarm")
    parser.add_argument(
        "--max-records",
        type=int,
        default=MAX_RECORDS,
        help=f"records on the page, drawn by id (default: {MAX_RECORDS}); counts are over all",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument(
        "--bound",
        action="append",
        default=[],
        metavar="RULE=NUMBER",
        help="bound of an alarm, such as gap=0.5; the page lists all rules",
    )
    given = parser.parse_args(argv)
    if given.max_records < 0:
        raise InputError(f"--max-records must be 0 or more, got {given.max_records}")
    if given.out is None and len(given.runs) > 1:
        raise InputError("--out: name a file for the page of several runs")
    out = given.out or given.runs[0] / "report.html"
    if out.is_dir():
        raise InputError(f"--out: {out} is a folder; name a file in it")
    found = write_report(
        given.runs,
        out,
        bounds=Bounds.parse(given.bound),
        max_records=given.max_records,
        seed=given.seed,
    )
    for name, fired in found.items():
        for reading in fired:
            sys.stdout.write(f"alarm: {name}: {reading.line}\n")
    count = sum(map(len, found.values()))
    sys.stdout.write(f"{out}: {count or 'no'} alarm{'s' * (count != 1)}\n")
    return ALARM if given.check and count else 0
