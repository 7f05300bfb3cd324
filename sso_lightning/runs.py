"""The folder of a run: who may write into it, its metrics.csv and its config.yaml."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers.logger import Logger

from sso_lightning.errors import InputError
from sso_lightning.records import replace_file

SLURM_JOB = ".slurm-job"
"""File of a run folder: which job began or continued the run."""

OUTPUTS = (
    *("metrics.csv", "pairs", "evaluations", "checkpoints", "export", "config.yaml"),
    SLURM_JOB,
)
"""What `fit` writes, and what overwriting removes."""


def outputs_in(root: Path) -> list[Path]:
    """What a run has left in `root`; empty where none began to write."""
    return [root / name for name in OUTPUTS if (root / name).exists()]


def claim_run_folder(root: Path, *, overwrite: bool = False) -> None:
    """Make sure that a new run does not write into another run's folder.

    Args:
        root: `trainer.default_root_dir`.
        overwrite: Remove the outputs of an earlier run.

    Raises:
        InputError: If `root` holds a run that is not to be overwritten.
    """
    found = outputs_in(root)
    if not found:
        return
    if not overwrite:
        raise InputError(
            f"{root} already holds a run ({found[0].name}); continue it with --ckpt_path last, "
            "remove it with --overwrite true, or choose another --trainer.default_root_dir"
        )
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@rank_zero_only
def check_writable(root: Path) -> None:
    """Make sure that the folder of a run can be written, and leave it as it was.

    Raises:
        InputError: It cannot.
    """
    made: list[Path] = []
    try:
        made = [path for path in (root, *root.parents) if not path.exists()]
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise InputError(
            f"trainer.default_root_dir: {root} cannot be written ({error.strerror})"
        ) from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def slurm_job() -> str:
    """The id under which SLURM knows this job, with its place in an array; "" outside of SLURM."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID", "")


def is_requeued(root: Path) -> bool:
    """Whether SLURM started this job again after it had begun the run in `root`."""
    restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    marker = root / SLURM_JOB
    return restarted and marker.is_file() and marker.read_text("utf-8") == slurm_job()


class RunLogger(Logger):
    """Writes metrics.csv into the run folder: one row per call, one column per metric.

    Unlike Lightning's CSV logger it continues the file of a resumed run instead of deleting it.
    """

    def __init__(self, folder: str | Path) -> None:
        """Set the logger up.

        Args:
            folder: The run folder.
        """
        super().__init__()
        self.folder = Path(folder)
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []
        self._written = 0

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.csv, those of earlier parts of the run included."""
        return self._rows

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def version(self) -> str:
        """Always empty: a run folder is one run."""
        return ""

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self.folder)

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> RunLogger:
        """The logger itself."""
        return self

    @rank_zero_only
    def continue_from(self, step: int, last: dict[str, float]) -> None:
        """Take over the rows that an earlier part of the run wrote before `step`.

        Args:
            step: Optimizer steps done.
            last: Metrics of the step before, which may have been left without a row.
        """
        path = self.folder / "metrics.csv"
        if not path.is_file():
            return
        # a run that was killed, or met a full disk, may have left a part of a row at the end
        whole = [x for x in path.read_text("utf-8").splitlines(keepends=True) if x.endswith("\n")]
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(whole)]
        rows = [row for row in rows if int(row.get("step") or 0) < step]
        of_last = [row for row in rows if int(row.get("step") or 0) == step - 1]
        if last and not any(last.keys() <= row.keys() for row in of_last):
            rows.append({"step": step - 1} | {key: _number(value) for key, value in last.items()})
        self._rows = rows + self._rows
        self._columns = list(dict.fromkeys(key for row in self._rows for key in row))
        self._written = 0

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: config.yaml holds the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Add a row."""
        row = {"step": step} | {key: _number(value) for key, value in metrics.items()}
        new = [key for key in row if key not in self._columns]
        self._rows.append(row)
        if new:
            self._columns += new
            self._written = 0  # the header changes: write the file anew
        self.save()

    @rank_zero_only
    def save(self) -> None:
        """Bring the file up to date."""
        if not self._rows:  # a start that failed is saved too, and the file may be an earlier run's
            return
        path = self.folder / "metrics.csv"
        fresh = self._written == 0
        target = path.with_name(".metrics.csv.tmp") if fresh else path
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with target.open("w" if fresh else "a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns)
                if fresh:
                    writer.writeheader()
                writer.writerows(self._rows[self._written :])
            if fresh:
                target.replace(path)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); mend that and continue with "
                "--ckpt_path last"
            ) from error
        self._written = len(self._rows)


def _number(value: Any) -> Any:
    number = float(value)
    return int(number) if math.isfinite(number) and number.is_integer() else number


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the run folder when a fit starts; a resumed run keeps its first.

    This is where a fit begins to write: files, settings, chat template and weights were read
    before, so a start that fails neither removes an earlier run nor leaves a folder that the
    mended command would refuse.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove an earlier run if asked to, then save the settings."""
        root = Path(trainer.default_root_dir)
        if self.config.overwrite and not self.config.ckpt_path and trainer.is_global_zero:
            claim_run_folder(root, overwrite=True)
        if slurm_job() and trainer.is_global_zero:
            replace_file(root / SLURM_JOB, slurm_job().encode())
        path = root / self.config_filename
        if trainer.is_global_zero and not path.exists():
            # the parent class writes in place: a kill would leave a part that is kept for good
            replace_file(path, self.parser.dump(self.config, skip_none=False).encode())
