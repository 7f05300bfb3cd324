"""Checkpoints that are whole or not there, signals that end a fit with one, and random state.

A run continues from `last.ckpt`, or from the newest checkpoint before it that is whole. What it
does then is what the uninterrupted run did: weights, moments, random numbers of every process,
batches, pairs and rows of metrics.csv.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import threading
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from sso_lightning.checkpoint_files import check_checkpoint, checkpoint_step, read_checkpoint
from sso_lightning.errors import InputError, Stopped
from sso_lightning.records import replace_file
from sso_lightning.runs import RunLogger, slurm_job

log = logging.getLogger("sso_lightning")


def newest_whole(folder: Path) -> tuple[Path | None, list[Path]]:
    """Find the checkpoint to go on with.

    Args:
        folder: `checkpoints/` of a run.

    Returns:
        `last.ckpt`, or if that is damaged the newest other one by the step that it holds (None if
        no file is whole); and the damaged files that were met.
    """
    damaged = []

    def is_whole(path: Path) -> bool:
        try:
            check_checkpoint(path)
        except InputError:
            damaged.append(path)
            return False
        return True

    def time(path: Path) -> float:
        return path.stat().st_mtime

    last = set(folder.glob("last*.ckpt"))
    for path in sorted(last, key=time, reverse=True):
        if is_whole(path):
            return path, damaged
    age = {}
    for path in sorted(set(folder.glob("*.ckpt")) - last):
        try:  # this reads little more than the numbers
            age[path] = (checkpoint_step(path), time(path))
        except InputError:
            damaged.append(path)
    for path in sorted(age, key=age.__getitem__, reverse=True):
        if is_whole(path):
            return path, damaged
    return None, damaged


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are on disk whole, or not at all.

    The trainer's own go through memory and the system's temporary folder, which may be on another
    disk, and are not synced.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write beside the file, sync, rename."""
        if Path(path).is_dir():  # by a run that wrote shards
            self.remove_checkpoint(path)
        replace_file(Path(path), partial(torch.save, checkpoint))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Map the file, which all processes of a machine share; nothing in it is unpickled."""
        return read_checkpoint(Path(path))


class Checkpoints(ModelCheckpoint):
    """Keeps a checkpoint of every iteration (and `last.ckpt`) in `checkpoints/` of the run.

    Ends a fit that is asked to stop (by SIGINT, SIGTERM, SIGUSR1, or a callback through
    `end_with`). Within an iteration it ends after the optimizer step that is under way, with that
    state in `last.ckpt`; a validation that has begun is finished. While pairs are made there is
    nothing to save, and it ends at once. A second Ctrl-C ends at once in any case.

    Under SLURM the requeue signal (SIGUSR1) ends it in the same way and puts the job back into
    the queue; started again by SLURM, the same command continues.
    """

    def __init__(self, every_n_steps: int | None = None, keep: int = -1) -> None:
        """Set the callback up.

        Args:
            every_n_steps: Also save after every so many optimizer steps; None saves only at the
                end of an iteration.
            keep: How many to keep beside `last.ckpt`, the newest ones; -1 keeps all.
        """
        if every_n_steps is not None and every_n_steps < 1:
            raise InputError(f"checkpoint.every_n_steps must be at least 1, got {every_n_steps}")
        if keep < -1:
            raise InputError(f"checkpoint.keep must be -1 (all) or more, got {keep}")
        super().__init__(
            filename="iteration-{epoch:02d}-step-{step}",
            auto_insert_metric_name=False,
            monitor="step" if keep > 0 else None,
            mode="max",
            save_top_k=keep,
            save_last=True,
            every_n_epochs=1,
            save_on_train_epoch_end=True,
            # a run that went back writes its files anew: last.ckpt is never an older one
            enable_version_counter=False,
        )
        self.every_n_steps = every_n_steps
        self._end: BaseException | None = None
        self._training = False
        self._ends_now = False
        self._requeue_signal: int | None = None
        self._requeues = False
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the folder into the run's, and listen for signals."""
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
            cluster = trainer._accelerator_connector.cluster_environment
            if isinstance(cluster, SLURMEnvironment) and cluster.auto_requeue:
                assert cluster.requeue_signal is not None
                self._requeue_signal = cluster.requeue_signal
                signals.add(cluster.requeue_signal)
            # the trainer's own handler would end the run within an accumulation window
            trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
            self._process = os.getpid()
            self._is_first = trainer.is_global_zero
            self._handlers = {s: signal.signal(s, self._on_signal) for s in signals}

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process or self._end:  # a loader's worker, or a repetition
            return
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once
        self.end_with(Stopped(signum))
        self._requeues = signum == self._requeue_signal
        if not self._training:
            self._finish()
        log.warning("%s: ending after this step", signal.Signals(signum).name)

    def end_with(self, reason: BaseException) -> None:
        """Raise `reason` when the state after this optimizer step is saved."""
        self._end = self._end or reason

    def _finish(self) -> NoReturn:
        assert self._end is not None
        if self._requeues and self._is_first:
            _requeue()
        raise self._end

    def _save(self, trainer: pl.Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def _saved_to_end(self, trainer: pl.Trainer) -> bool:
        """Save if any process was asked to end: they end together."""

        def anywhere(decision: bool) -> bool:
            return trainer.strategy.reduce_boolean_decision(decision, all=False)

        ends = anywhere(self._end is not None)
        if ends:
            self._requeues = anywhere(self._requeues)
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
            self._finish()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save if it is time or the run is to end, but never within an accumulation window."""
        # after the last step of an iteration its own checkpoint comes, when it was validated
        if not batch.closes_step or batch_idx + 1 >= trainer.num_training_batches:
            return
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if due and not self._should_skip_saving_checkpoint(trainer):
            self._save(trainer)
        self._ends_now = self._saved_to_end(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save; end here if asked to, before the next iteration's pairs are made."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save(trainer)
        self._training = False
        if self._saved_to_end(trainer):
            self._finish()

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


def _requeue() -> None:
    """Put this SLURM job back into the queue, under its own id."""
    command = ["scontrol", "requeue", slurm_job()]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        said = done.stderr.strip() or f"status {done.returncode}"
    except OSError as error:
        said = str(error)
    else:
        if done.returncode == 0:
            log.warning("job %s is in the queue again and will continue", command[-1])
            return
    log.warning("%s failed (%s); submit the job again", " ".join(command), said)


class RunState(Callback):
    """Saves and restores the random number generators, and lets metrics.csv continue."""

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] = []
        self._steps: int | None = None
        self._metrics: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """States of Python's, NumPy's and torch's generators of every process.

        They are plain values and tensors. All processes must call this together, as they do to
        save a checkpoint.
        """
        version, internal, gauss = random.getstate()
        kind, keys, position, has_gauss, cached = np.random.get_state()
        own = {
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
        if not (dist.is_available() and dist.is_initialized()):
            return {"ranks": [own]}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts: set-up draws random numbers too."""
        self._restored = state_dict.get("ranks", [state_dict])  # 0.1.0 saved those of one process

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the generators as they were.

        Raises:
            InputError: The run goes on within an iteration with another number of processes, which
                would not see the same batches.
        """
        self._continue_metrics(trainer)  # a sharded model is restored only after `on_fit_start`
        if not self._restored:
            return
        states, self._restored = self._restored, []
        if len(states) != trainer.world_size:
            if trainer.datamodule.batches_done(trainer.current_epoch):  # type: ignore[attr-defined]
                raise InputError(
                    f"the checkpoint was taken within an iteration by {len(states)} processes, and "
                    f"now there are {trainer.world_size}: continue with as many (trainer.devices, "
                    "trainer.num_nodes), or from the end of an iteration (--ckpt_path FILE)"
                )
            return
        state = states[trainer.global_rank]
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the step's metrics along: the trainer logs them after the checkpoint is written.

        A run that is killed in between would never log them.
        """
        connector = trainer._logger_connector
        row = connector.metrics["log"] if trainer.training and connector.should_update_logs else {}
        if row:
            values = {key: float(value) for key, value in row.items()}
            checkpoint["metrics"] = values | {"epoch": trainer.current_epoch}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note the step: the trainer itself goes back to it only after `on_fit_start`."""
        self._steps = checkpoint["global_step"]
        self._metrics = checkpoint.get("metrics", {})

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue metrics.csv where the checkpoint was taken."""
        self._continue_metrics(trainer)

    def _continue_metrics(self, trainer: pl.Trainer) -> None:
        steps, self._steps = self._steps, None
        for logger in trainer.loggers:
            if steps is not None and isinstance(logger, RunLogger):
                logger.continue_from(steps, self._metrics)
