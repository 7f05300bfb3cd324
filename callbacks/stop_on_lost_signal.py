"""Stop when the signal is lost: when a measured number falls below a bound.

In a YAML:

    trainer:
      callbacks:
        - class_path: callbacks.stop_on_lost_signal.StopOnLostSignal
          init_args: {metric: sandbox/signal_accuracy, bound: 0.6}

`pairs/gap_logp` and `pairs/contrast_bad` need no ground truth; `sandbox/signal_accuracy` is exact.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import lightning.pytorch as pl

from sso_lightning.callbacks import PairCallback
from sso_lightning.errors import InputError
from sso_lightning.records import Record

log = logging.getLogger("sso_lightning")


class StopOnLostSignal(PairCallback):
    """Ends the run, with its last good state saved, once a metric falls below a bound."""

    def __init__(self, metric: str = "pairs/gap_logp", bound: float = 0.0) -> None:
        """Set the callback up.

        Args:
            metric: A name from metrics.csv: one of `pairs/...` is read when pairs were built,
                any other after validation.
            bound: The run ends when the metric is below this.
        """
        self.metric = metric
        self.bound = bound

    def on_pairs_built(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        records: Sequence[Record],
        report: dict[str, float],
        name: str,
    ) -> None:
        """Judge the set by its report."""
        if self.metric.startswith("pairs/") and not name.endswith("validation"):
            if self.metric not in report:
                known = ", ".join(sorted(report))
                raise InputError(f"StopOnLostSignal: no metric {self.metric}; there are {known}")
            self._judge(trainer, report[self.metric])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge what validation measured."""
        if not self.metric.startswith("pairs/") and self.metric in trainer.callback_metrics:
            self._judge(trainer, float(trainer.callback_metrics[self.metric]))

    def _judge(self, trainer: pl.Trainer, value: float) -> None:
        if value < self.bound:
            log.warning("%s is %.3f, below %.3f: stopping", self.metric, value, self.bound)
            trainer.should_stop = True
