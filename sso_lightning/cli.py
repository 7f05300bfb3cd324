"""`fit`, `validate`, `test` and `predict`: LightningCLI with this library's parts in place."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.optim import Optimizer

from sso_lightning.benchmarks import Benchmarks
from sso_lightning.callbacks import ExportPolicy, Guard, RegeneratePairs
from sso_lightning.checkpoint_files import check_checkpoint, is_checkpoint
from sso_lightning.checkpoints import Checkpoints, RunState, newest_whole
from sso_lightning.data import SSODataModule
from sso_lightning.errors import InputError
from sso_lightning.module import SSOModule
from sso_lightning.reward import RewardDataModule, RewardModule
from sso_lightning.runs import (
    RunLogger,
    SaveConfig,
    check_writable,
    claim_run_folder,
    is_requeued,
    outputs_in,
)
from sso_lightning.settings import check_file, one_line
from sso_lightning.strategies import FSDP2Strategy
from sso_lightning.terminal import Terminal

log = logging.getLogger("sso_lightning")


class SSOCLI(LightningCLI):
    """One YAML describes a run: `trainer`, `model`, `data`, and a key per built-in callback."""

    parts: tuple[type[pl.LightningModule], type[pl.LightningDataModule]] = SSOModule, SSODataModule
    makes_pairs = True

    def __init__(self, *args: Any, command: str, **kwargs: Any) -> None:
        """Offer one command: to set up the settings of all four takes half a second more."""
        self._command = command
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that is asked for, and the arguments of the trainer that are not its own."""
        return {self._command: LightningCLI.subcommands()[self._command]}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that takes whole flags only: `--trainer.max_epoch` must be an error."""
        return super().init_parser(allow_abbrev=False, exit_on_error=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the built-in callbacks as top-level keys."""
        if self.makes_pairs:
            parser.add_lightning_class_args(RegeneratePairs, "pairs")
            parser.add_lightning_class_args(Guard, "guard")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        if self.makes_pairs:  # after the checkpoints: both are called in this order
            parser.add_lightning_class_args(Benchmarks, "benchmarks")
        parser.add_lightning_class_args(ExportPolicy, "export")
        parser.add_lightning_class_args(Terminal, "terminal")
        parser.add_argument(
            "--overwrite",
            type=bool,
            default=False,
            help="Remove the outputs of an earlier run in trainer.default_root_dir.",
        )
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what `run` was given, whatever `sys.argv` holds."""
        self.config = parser.parse_args(args)
        settings = self.config[self._command]
        if settings.terminal.quiet:
            for name in ("sso_lightning", "lightning.pytorch", "lightning.fabric"):
                logging.getLogger(name).setLevel(logging.WARNING)
            settings.trainer.enable_progress_bar = settings.trainer.enable_model_summary = False
        seed = settings.seed_everything
        if not 0 <= seed < 2**32:
            raise InputError(f"seed_everything must be in [0, 2**32), got {seed}")
        # the parser takes any function for a maker of optimizers, and would call it
        chosen = settings.model.optimizer
        path = getattr(chosen, "class_path", chosen)
        found = path
        if isinstance(path, str):
            module, _, name = path.rpartition(".")
            found = getattr(import_module(module), name)
        is_class = isinstance(found, type) and issubclass(found, Optimizer)
        if found is not None and not is_class:
            raise InputError(f"model.optimizer: {path} is not an optimizer class")

    def before_instantiate_classes(self) -> None:
        """Refuse a damaged checkpoint, or two runs in one folder, before anything is loaded."""
        checkpoint = self._get(self.config, "ckpt_path")
        fitting = self.subcommand == "fit"
        if fitting and not checkpoint and is_requeued(self._root):
            log.info("SLURM started this job again: continuing %s", self._root)
            checkpoint = "last"
        if checkpoint == "last":
            # the trainer looks for it before callbacks are set up, in a folder named after the
            # logger, and starts from nothing if it is not there
            last = self._last_checkpoint()
            self.config[self.subcommand].ckpt_path = str(last) if last else None
            if fitting:
                self.config[self.subcommand].overwrite = False
        elif checkpoint and checkpoint != "best":
            if not Path(checkpoint).exists():
                raise InputError(f"--ckpt_path: no checkpoint {checkpoint}")
            if is_checkpoint(Path(checkpoint)):
                check_checkpoint(Path(checkpoint))
        if fitting and not checkpoint and not self._get(self.config, "overwrite"):
            claim_run_folder(self._root)
        check_writable(self._root)

    def _last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; None if there is no file, but a run that began to write."""
        folder = self._root / "checkpoints"
        newest, damaged = newest_whole(folder)
        names = ", ".join(path.name for path in damaged)
        if newest is None and damaged:
            raise InputError(
                f"--ckpt_path last: no checkpoint in {folder} is whole ({names}); remove them to "
                "start with the pairs that are there, or start anew with --overwrite true alone"
            )
        if newest is None and self.subcommand == "fit" and outputs_in(self._root):
            log.info("no checkpoint in %s; starting with the pairs that are there", folder)
        elif newest is None:
            raise InputError(f"--ckpt_path last: no checkpoint in {folder}")
        elif damaged and self.subcommand == "fit":
            rank_zero_only(log.warning)(
                "damaged in %s: %s; continuing with %s", folder, names, newest.name
            )
        elif damaged:  # a run only loses time by going back, but these would be other numbers
            raise InputError(
                f"--ckpt_path last: damaged in {folder}: {names}; the newest whole checkpoint is "
                f"{newest}: give it by its name"
            )
        return newest

    def _parse_ckpt_path(self) -> None:
        """Nothing: settings come from the YAML, and reading a large checkpoint twice takes time."""

    @property
    def _root(self) -> Path:
        return Path(self._get(self.config, "trainer").default_root_dir or ".")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Log to metrics.csv of the run folder, whatever else the YAML logs to."""
        trainer = self._get(self.config_init, "trainer")
        loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
        own = RunLogger(self._root)
        fitting = self.subcommand == "fit"
        kept = [logger for logger in loggers if logger not in (None, True, False)]
        check_numbers(trainer)
        try:
            made = super().instantiate_trainer(logger=[own, *kept] if fitting else kept, **kwargs)
        except ValueError as error:
            raise InputError(f"trainer: {str(error).partition('. ')[0]}") from error
        except RuntimeError as error:
            if "SLURM" not in str(error):
                raise
            raise InputError(f"trainer: {error}") from error
        if not isinstance(made.strategy, SingleDeviceStrategy | DDPStrategy | FSDP2Strategy):
            raise InputError(
                f"trainer.strategy: {type(made.strategy).__name__} is not supported, as sampling "
                "and checkpoints do not know how it spreads the weights; use auto, ddp, "
                "ddp_find_unused_parameters_true or fsdp2"
            )
        return made


class RewardCLI(SSOCLI):
    """The same for a reward model, which is given its pairs."""

    parts = RewardModule, RewardDataModule
    makes_pairs = False


def check_numbers(trainer: Any) -> None:
    """Refuse settings that the trainer takes without a word and stumbles over later."""
    counts = ("accumulate_grad_batches", "log_every_n_steps", "check_val_every_n_epoch")
    lowest: dict[str, float] = {**dict.fromkeys(counts, 1), "gradient_clip_val": 0}
    lowest["val_check_interval"] = sys.float_info.min
    for key, least in lowest.items():
        value = getattr(trainer, key)
        if isinstance(value, int | float) and not least <= value < math.inf:
            bound = f"at least {least}" if key != "val_check_interval" else "above 0"
            raise InputError(f"trainer.{key} must be {bound}, got {value}")


TRAINER_DEFAULTS = {
    "default_root_dir": "runs/sso",
    # one epoch is one iteration, and every iteration has its own pairs
    "reload_dataloaders_every_n_epochs": 1,
    "max_epochs": 3,
    "num_sanity_val_steps": 0,
    # the data module shards by itself, in an order that a resumed run can repeat
    "use_distributed_sampler": False,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
}


def quieten() -> None:
    """Show this library's messages; hide advertising and notes about others' internals."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*The dirpath has changed from.*")
    # a run without held-out queries validates nothing
    warnings.filterwarnings("ignore", message=r".*Total length of `list` across ranks is zero.*")
    warnings.filterwarnings(
        "ignore", message=r".*Checkpoint directory .* exists and is not empty.*"
    )
    # what is logged was gathered from all processes by torchmetrics
    warnings.filterwarnings("ignore", message=r".*sync_dist=True.*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).addFilter(lambda record: "litlogger" not in record.getMessage())
    for name in ("lightning.pytorch", "lightning.fabric"):  # a quiet run before may have changed it
        logging.getLogger(name).setLevel(logging.INFO)
    # anew for every run: a handler keeps the stderr that it was made with
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if getattr(rank_zero_only, "rank", 0) == 0 else logging.WARNING)
    log.propagate = False


def run(argv: Sequence[str], cli: type[SSOCLI] = SSOCLI) -> SSOCLI:
    """Parse and run one command.

    Args:
        argv: The command line without the program's name.
        cli: What is trained.
    """
    quieten()
    for path in configs(argv):
        check_file(path)
    # a console script does not see the working folder; appended, so that it shadows nothing
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return make(cli, argv)
    except ArgumentError as error:
        raise InputError(one_line(str(error), argv[0])) from error
    except MisconfigurationException as error:
        raise InputError(str(error)) from error


def make(cli: type[SSOCLI], argv: Sequence[str]) -> SSOCLI:
    """Make the command line, which parses and runs."""
    # anew for every command of a process: what `validate` restores is not the next fit's;
    # what a run that makes pairs is guarded from has settings of its own
    always = [RunState()] if cli.makes_pairs else [RunState(), Guard()]
    return cli(
        *cli.parts,
        save_config_callback=SaveConfig,
        seed_everything_default=0,
        trainer_defaults={**TRAINER_DEFAULTS, "callbacks": always},
        auto_configure_optimizers=False,
        command=argv[0],
        args=list(argv),
    )


def configs(argv: Sequence[str]) -> list[Path]:
    """The configuration files of a command line."""
    flags = ("--config", "-c")
    given = [b for a, b in pairwise(argv) if a in flags and not b.startswith("-")]
    given += [a.partition("=")[2] for a in argv if a.startswith("--config=")]
    return [Path(name) for name in given]
