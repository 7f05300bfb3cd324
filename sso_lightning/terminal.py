"""What a run says while it trains: a line now and then, and a table of its iterations."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from sso_lightning.errors import InputError
from sso_lightning.progress import in_words
from sso_lightning.runs import RunLogger

log = logging.getLogger("sso_lightning")

COLUMNS = {
    "pairs": "pairs/kept",
    "dropped": "pairs/dropped",
    "on-policy y+": "pairs/on_policy_good",
    "and y-": "pairs/on_policy_bad",
    "gap": "pairs/gap_logp",
    "tokens y+": "pairs/length_good",
    "loss": "train/loss",
    "accuracy": "train/reward_accuracy_query",
    "held out": "val/reward_accuracy",
    "quality": "sandbox/quality",
    "signal": "sandbox/signal_accuracy",
}
"""Heading to the column of metrics.csv; of several rows of an iteration the last one counts."""
MEANS = ("train/loss", "train/reward_accuracy_query")


class Terminal(Callback):
    """Lines while training where no terminal shows a bar, and a table at the end of a fit."""

    def __init__(self, quiet: bool = False, every: float = 60.0, table: bool = True) -> None:
        """Set the callback up.

        Args:
            quiet: Say nothing but warnings and errors: no bars, no lines, no tables.
            every: Seconds between two lines of training where standard error is no terminal.
            table: Print a table of the iterations at the end of a fit.
        """
        if not every > 0:
            raise InputError(f"terminal.every must be above 0, got {every}")
        self.quiet = quiet
        self.every = every
        self.table = table
        self._last = self._started = 0.0
        self._first: int | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of an iteration."""
        self._started = self._last = time.monotonic()
        self._first = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Say how far the iteration is."""
        now = time.monotonic()
        if self._first is None:  # not 0 where a run goes on within an iteration
            self._first = batch_idx
        if sys.stderr.isatty() or now - self._last < self.every:
            return
        self._last = now
        total = int(trainer.num_training_batches)
        left = (now - self._started) * (total - batch_idx - 1) / (batch_idx + 1 - self._first)
        loss = trainer.callback_metrics.get("train/loss")
        log.info(
            "epoch %d: batch %d of %d%s, %s left",
            trainer.current_epoch,
            batch_idx + 1,
            total,
            "" if loss is None else f", loss {float(loss):.4g}",
            in_words(left),
        )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table."""
        loggers = [own for own in trainer.loggers if isinstance(own, RunLogger)]
        if not (self.table and loggers and trainer.is_global_zero and log.isEnabledFor(20)):
            return
        from rich.console import Console
        from rich.table import Table

        headings, rows = iteration_table(loggers[0].rows)
        if not rows:
            return
        table = Table(*headings, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        # a log file has no width of its own
        console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
        console.print(table)


def iteration_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The rows of metrics.csv as a table with a row per iteration.

    Args:
        rows: As they were logged; an iteration begins with the numbers of its pairs.

    Returns:
        Headings (`iteration` and those of `COLUMNS` that have a number) and the cells.
    """
    parts: list[list[Mapping[str, Any]]] = []
    for row in rows:
        if "pairs/kept" in row:
            parts.append([])
        if parts:
            parts[-1].append(row)
    numbers: list[dict[str, float]] = []
    for part in parts:
        found: dict[str, float] = {}
        for heading, key in COLUMNS.items():
            values = [float(row[key]) for row in part if row.get(key) not in (None, "")]
            if values:
                mean = sum(values) / len(values)
                found[heading] = mean if key in MEANS else values[-1]
        numbers.append(found)
    headings = [heading for heading in COLUMNS if any(heading in row for row in numbers)]
    cells = [
        [str(index), *(f"{row[h]:.4g}" if h in row else "" for h in headings)]
        for index, row in enumerate(numbers)
    ]
    return ["iteration", *headings], cells
