"""How far something has come: a bar with the time left, or now and then a line in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

log = logging.getLogger("sso_lightning")

T = TypeVar("T")

EVERY = 60.0
"""Seconds between two lines where there is no terminal."""


@contextmanager
def progress(
    what: str, total: int, unit: str, *, show: bool = True, every: float | None = None
) -> Iterator[Callable[[int, float], None]]:
    """Yield `advance(new_tokens, done)`, which shows `done` of `total` and the tokens a second.

    Args:
        what: What is done.
        total: How much there is to do.
        unit: Of what.
        show: False shows nothing, as does a log that is told to be quiet.
        every: Seconds between two lines in a log that is no terminal; `EVERY` if not given.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    show = show and log.isEnabledFor(logging.INFO)
    lines = show and not console.is_terminal
    bar = Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not show or lines,
    )
    started = last = time.monotonic()
    tokens, done, first = 0, 0.0, 0.0
    task = bar.add_task("", total=total, rate=0.0)

    def advance(new_tokens: int, more: float) -> None:
        nonlocal tokens, done, first, last
        now = time.monotonic()
        if tokens == 0 == new_tokens:  # what an earlier run has finished says nothing of the speed
            first += more
        tokens += new_tokens
        done = min(done + more, float(total))
        rate = tokens / max(now - started, 1e-9)
        bar.update(task, completed=int(done), rate=rate)
        if lines and now - last >= (EVERY if every is None else every) and done > first:
            last = now
            left = (now - started) * (total - done) / (done - first)
            log.info(
                "%s: %d of %d %s, %.0f tokens/s, %s left",
                what,
                done,
                total,
                unit,
                rate,
                in_words(left),
            )

    with bar:
        yield advance


def steps(what: str, of: Sequence[T]) -> Iterable[T]:
    """Go through steps of like length, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(of, what, console=console, disable=not console.is_terminal)


def in_words(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
