"""The settings of a `fit`, read as `fit` reads them, with everything that is wrong in one list.

Classes are made as for a run, but for the trainer, its loggers and its callbacks, whose making can
leave traces. Nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace as _Namespace

from sso_lightning import cli
from sso_lightning.callbacks import RegeneratePairs
from sso_lightning.data import SOURCES, SSODataModule
from sso_lightning.errors import InputError, mistake_behind
from sso_lightning.module import SSOModule
from sso_lightning.plan.simulate import Kind, Precision
from sso_lightning.runs import outputs_in
from sso_lightning.sampling import TransformersSampler
from sso_lightning.settings import check_file

_UNMADE = ("logger", "callbacks", "profiler", "plugins", "barebones", "fast_dev_run")
_GROUPS = ("data", "pairs", "guard", "checkpoint", "export", "terminal", "model")
Namespace: Any = _Namespace  # its own types say nothing of its arguments
NOWHERE = "policy"
"""Stands for a path that was refused."""
_OBJECTIVE = Namespace(
    class_path="sso_lightning.objectives.Contrastive",
    init_args=Namespace(
        base=Namespace(
            class_path="sso_lightning.losses.DPO",
            init_args=Namespace(beta=0.1, label_smoothing=0.0),
        )
    ),
)


@dataclass
class Settings:
    """What a YAML and its overrides say.

    Attributes:
        trainer: The trainer's settings, as parsed.
        optimizer: Class path of the optimizer.
        module: The module, without weights.
        data: The data module.
        pairs: What makes the pairs.
        problems: What is wrong.
        notes: What is worth knowing.
    """

    trainer: Namespace
    optimizer: str
    module: SSOModule
    data: SSODataModule
    pairs: RegeneratePairs
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def attempt(self, check: Callable[[], Any]) -> bool:
        """Run a check and keep what it refuses; tell whether it passed."""
        try:
            check()
        except InputError as error:
            self.problems.append(str(error))
            return False
        return True

    @property
    def kind(self) -> Kind:
        """The kind of device that is meant."""
        return "cpu" if self.trainer.accelerator == "cpu" else "cuda"

    @property
    def precision(self) -> Precision:
        """What the trainer does to the weights."""
        return Precision.of(self.trainer.precision)

    @property
    def strategy(self) -> tuple[str, dict[str, Any]]:
        """Name and arguments of the strategy."""
        given = self.trainer.strategy
        if isinstance(given, str):
            return given, {}
        name = str(given.class_path).rpartition(".")[2]
        known = {"FSDP2Strategy": "fsdp2", "DDPStrategy": "ddp", "SingleDeviceStrategy": "auto"}
        return known.get(name, name), dict(vars(given.get("init_args") or Namespace()))

    @property
    def devices(self) -> int:
        """Processes that the YAML asks for; 1 if it leaves that open."""
        given = self.trainer.devices
        if isinstance(given, str) and given.isdigit():
            given = int(given)
        each = len(given) if isinstance(given, list) else given
        nodes: int = self.trainer.num_nodes
        return nodes * each if isinstance(each, int) and each > 0 else nodes


class _Reader(cli.SSOCLI):
    """Parses as `fit` does, and makes the parts that have no effect."""

    found: Settings

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def before_instantiate_classes(self) -> None:
        """No folder is claimed."""

    def instantiate_classes(self) -> None:
        """Make the parts; a key whose value is refused is set to its default, and told."""
        name = str(self.subcommand)
        parser: Any = self._parser(name)
        config = self.config[name]
        trainer = config.trainer.clone()
        for key in _UNMADE:
            if key in config.trainer:
                config.trainer[key] = None
        made, problems = _make_all(parser, config)
        chosen = config.model.optimizer
        optimizer = getattr(chosen, "class_path", None) or "torch.optim.AdamW"
        self.found = Settings(trainer, optimizer, made.model, made.data, made.pairs, problems)

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing runs."""


def _make_all(parser: Any, config: Namespace) -> tuple[Namespace, list[str]]:
    problems: list[str] = []
    while True:
        message = _refusal(parser, config)
        if message is None:
            return parser.instantiate(config), problems
        problems.append(message)
        for key, default in _defaults(parser, config):
            changed = config.clone()
            changed[key] = default
            if _refusal(parser, changed) != message:
                config = changed
                break
        else:
            raise InputError("; ".join(problems))


def _refusal(parser: Any, config: Namespace) -> str | None:
    """What a class says of its arguments, or None."""
    try:
        parser.instantiate(config)
    except Exception as error:  # a parser wraps what a class raises
        return str(mistake_behind(error) or " ".join(str(error).split()))
    return None


def _defaults(parser: Any, config: Namespace) -> list[tuple[str, Any]]:
    """All settings that can be set back, and to what."""
    usual = parser.get_defaults()
    usual.model.objective = _OBJECTIVE
    usual.model.policy.path = NOWHERE
    groups = ("model.policy", *_GROUPS)
    keys = [f"{group}.{key}" for group in groups for key in vars(usual[group])]
    return [(key, usual[key]) for key in keys if config[key] != usual[key]]


def read(arguments: Sequence[str]) -> Settings:
    """Read the settings of a `fit`.

    Args:
        arguments: What would follow `sso-lightning fit`.

    Raises:
        InputError: The parser refuses a key or the type of a value.
    """
    _refuse_reward(arguments)
    made = cli.run(["fit", *arguments], _Reader)
    assert isinstance(made, _Reader)
    return made.found


def _refuse_reward(arguments: Sequence[str]) -> None:
    for path in cli.configs(arguments):
        check_file(path)
        data = yaml.safe_load(path.read_text(encoding="utf-8")).get("data")
        if isinstance(data, dict) and "sets" in data:
            raise InputError(
                f"{path} trains a reward model, which plan does not know; it plans `fit`"
            )


def check(settings: Settings, devices: int) -> None:
    """Add what contradicts each other, and files that are missing or damaged."""
    trainer, module, data = settings.trainer, settings.module, settings.data
    problems, attempt = settings.problems, settings.attempt
    attempt(lambda: cli.check_numbers(trainer))
    attempt(lambda: settings.precision)
    every = trainer.reload_dataloaders_every_n_epochs
    if every != 1:
        problems.append(
            f"trainer.reload_dataloaders_every_n_epochs is {every}; it must be 1, or later "
            "iterations would train on the pairs of the first"
        )
    steps = trainer.max_steps if trainer.max_steps is not None else -1
    problems += data.problems("fit", module, steps)
    for key in SOURCES:
        attempt(partial(data.check_source, key))
    made = [
        str(c.class_path).rpartition(".")[2] for c in trainer.callbacks or () if "class_path" in c
    ]
    if made:
        settings.notes.append(
            f"callbacks are not made ({', '.join(made)}): a file that one writes when a run starts "
            "must be there already"
        )
    name, _ = settings.strategy
    alone = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp2")
    if name not in alone:
        problems.append(f"trainer.strategy: {name} is not supported; use {', '.join(alone)}")
    if name == "fsdp2" and module.policy_config.quantize:
        problems.append("policy.quantize cannot be sharded: use trainer.strategy: ddp")
    if name == "fsdp2" and settings.optimizer.startswith("bitsandbytes"):
        problems.append(
            f"model.optimizer: {settings.optimizer} cannot step sharded weights; with fsdp2 use "
            "torch.optim.AdamW"
        )
    if module.generator and devices > 1 and name in ("auto", "ddp"):
        problems.append(
            "model.generator: one adapter always rests; on several processes set trainer.strategy: "
            "ddp_find_unused_parameters_true"
        )
    sampler = settings.pairs.sampler
    if sampler.engine == "vllm" and devices > 1:
        problems.append("pairs.sampler: VLLMSampler works in one process; use a server")
    if not isinstance(sampler, TransformersSampler):
        settings.notes.append(
            f"answers come from the engine {sampler.engine!r}: its memory and time are not counted"
        )
    root = Path(trainer.default_root_dir or ".")
    if outputs_in(root):
        settings.notes.append(f"{root} already holds a run")
