"""Checkpoints that are whole or not there, signals that end a fit with one, and random state."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from sso_lightning.errors import Stopped
from sso_lightning.records import replace_file
from sso_lightning.runs import RunLogger

log = logging.getLogger("sso_lightning")


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are on disk whole, or not at all.

    The trainer's own go through memory and the system's temporary folder, which may be on another
    disk, and are not synced.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write beside the file, sync, rename."""
        replace_file(Path(path), partial(torch.save, checkpoint))


class Checkpoints(ModelCheckpoint):
    """Keeps a checkpoint of every iteration (and `last.ckpt`) in `checkpoints/` of the run.

    Ends a fit that is asked to stop (by SIGINT, SIGTERM, SIGUSR1, or a callback through
    `end_with`). Within an iteration it ends after the optimizer step that is under way, with that
    state in `last.ckpt`; a validation that has begun is finished. While pairs are made there is
    nothing to save, and it ends at once. A second Ctrl-C ends at once in any case.
    """

    def __init__(self, every_n_steps: int | None = None, keep: int = -1) -> None:
        """Set the callback up.

        Args:
            every_n_steps: Also save after every so many optimizer steps; None saves only at the
                end of an iteration.
            keep: How many to keep, the newest ones; -1 keeps all.
        """
        super().__init__(
            filename="iteration-{epoch:02d}-step-{step}",
            auto_insert_metric_name=False,
            monitor="step" if keep > 0 else None,
            mode="max",
            save_top_k=keep,
            save_last=True,
            every_n_train_steps=every_n_steps,
            every_n_epochs=None if every_n_steps else 1,
            save_on_train_epoch_end=True,
        )
        self._end: BaseException | None = None
        self._training = False
        self._ends_now = False
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the folder into the run's, and listen for signals."""
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            signals = [signal.SIGINT]
            if not SLURMEnvironment.detect():  # there the trainer requeues the job
                signals += [signal.SIGTERM, signal.SIGUSR1]
                # the trainer's own handler would end the run within an accumulation window
                trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
            self._process = os.getpid()
            self._handlers = {s: signal.signal(s, self._on_signal) for s in signals}

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process or self._end:  # a loader's worker, or a repetition
            return
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once
        self.end_with(Stopped(signum))
        if not self._training:
            raise Stopped(signum)
        log.warning("%s: ending after this step", signal.Signals(signum).name)

    def end_with(self, reason: BaseException) -> None:
        """Raise `reason` when the state after this optimizer step is saved."""
        self._end = self._end or reason

    def _saved_to_end(self, trainer: pl.Trainer) -> bool:
        """Save if any process was asked to end: they end together."""
        ends = trainer.strategy.reduce_boolean_decision(self._end is not None, all=False)
        if ends:
            self.end_with(Stopped(signal.SIGTERM))
            if not self._should_skip_saving_checkpoint(trainer):
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        return ends

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End here if asked to: the last step is saved and logged."""
        self._training = True  # no epoch hook is called in every kind of resume
        if self._ends_now:
            assert self._end is not None
            raise self._end

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save if it is time or the run is to end, but never within an accumulation window."""
        if not batch.closes_step:
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # after the last step of an iteration its own checkpoint comes
        if batch_idx + 1 < trainer.num_training_batches:
            self._ends_now = self._saved_to_end(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save; end here if asked to, before the next iteration's pairs are made."""
        super().on_train_epoch_end(trainer, pl_module)
        self._training = False
        if self._saved_to_end(trainer):
            assert self._end is not None
            raise self._end

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave the signals to whom they belonged."""
        super().on_exception(trainer, pl_module, exception)
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the signals to whom they belonged."""
        self._release()

    def _release(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())


class RunState(Callback):
    """Saves and restores the random number generators, and lets metrics.csv continue."""

    def __init__(self) -> None:
        self._restored: dict[str, Any] = {}
        self._steps: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """States of Python's, NumPy's and torch's generators, as plain values and tensors."""
        version, internal, gauss = random.getstate()
        kind, keys, position, has_gauss, cached = np.random.get_state()
        return {
            "python": [version, list(internal), gauss],
            "numpy": [
                kind,
                torch.from_numpy(np.asarray(keys).astype(np.int64)),
                position,
                has_gauss,
                cached,
            ],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts: set-up draws random numbers too."""
        self._restored = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the generators as they were."""
        state = self._restored
        if not state:
            return
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
        self._restored = {}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note the step: the trainer itself goes back to it only after `on_fit_start`."""
        self._steps = checkpoint["global_step"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue metrics.csv where the checkpoint was taken."""
        if self._steps is not None:
            for logger in trainer.loggers:
                if isinstance(logger, RunLogger):
                    logger.continue_from(self._steps)
