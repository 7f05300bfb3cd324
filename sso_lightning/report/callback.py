"""The page of a run while it trains, and its alarms in the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl

from sso_lightning.callbacks import PairCallback
from sso_lightning.errors import InputError
from sso_lightning.records import Record
from sso_lightning.report.command import MAX_RECORDS, write_report
from sso_lightning.report.health import Bounds
from sso_lightning.report.read import PairSet

log = logging.getLogger("sso_lightning")


class Report(PairCallback):
    """Keeps `report.html` of the run folder fresh and warns of alarms as soon as pairs show them.

    Written when a set of pairs was built, before anything is trained on it, and again after every
    iteration. A page that cannot be written is a warning: it never ends a run.
    """

    def __init__(
        self,
        bounds: Bounds | None = None,
        max_records: int = MAX_RECORDS,
        seed: int = 0,
        page: bool = True,
    ) -> None:
        """Set the callback up.

        Args:
            bounds: From where on a number is an alarm.
            max_records: Most records on the page, besides those that prove alarms.
            seed: Which records are drawn.
            page: Whether the run has a page and alarms at all.
        """
        if max_records < 0:
            raise InputError(f"report.max_records must be 0 or more, got {max_records}")
        self.bounds = bounds or Bounds()
        self.max_records = max_records
        self.seed = seed
        self.page = page
        self._cache: dict[tuple[str, str], PairSet] = {}
        self._told: set[tuple[str, str]] = set()

    def on_pairs_built(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        records: Sequence[Record],
        report: dict[str, float],
        name: str,
    ) -> None:
        """Write the page and tell of the new set's alarms, unless it is held out."""
        if "validation" not in name:
            self._refresh(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the page with the iteration's curves."""
        if trainer.is_global_zero:
            self._refresh(trainer)

    def _refresh(self, trainer: pl.Trainer) -> None:
        if not self.page:
            return
        root = Path(trainer.default_root_dir)
        try:
            found = write_report(
                [root],
                root / "report.html",
                bounds=self.bounds,
                max_records=self.max_records,
                seed=self.seed,
                cache=self._cache,
            )
        except Exception as error:  # days of training are worth more than a page
            log.warning("report.html was not written: %s: %s", type(error).__name__, error)
            return
        for reading in (reading for fired in found.values() for reading in fired):
            key = (reading.set_name, reading.rule.name)
            if key not in self._told:
                self._told.add(key)
                log.warning("alarm: %s (%s)", reading.line, root / "report.html")
