"""Benchmarks of EleutherAI's lm-eval on the policy as it is in memory, after chosen iterations.

The policy is wrapped in lm-eval's own model class, so nothing is loaded again and the scores are
those that `lm-eval` gives for the exported folder with the same settings: seeds, few-shot examples
and prompts are made as its command line makes them.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint

from sso_lightning.checkpoint_files import checkpoint_epochs
from sso_lightning.errors import InputError
from sso_lightning.evaluation import FOLDER, write_scores
from sso_lightning.module import SSOModule
from sso_lightning.policy import POLICY, speaking
from sso_lightning.processes import Processes
from sso_lightning.records import replace_file
from sso_lightning.sampling import eval_mode
from sso_lightning.sharding import causal_lm, gathered, is_sharded

log = logging.getLogger("sso_lightning")

AREA = "lm_eval"
"""First part of the metrics' names."""

_SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""lm-eval's own: another seed would choose other few-shot examples than its command line."""


class Benchmarks(Checkpoint):
    """Measures the policy with lm-eval before training and after iterations.

    Nothing happens without `tasks`. On several processes each one measures the whole, since a
    sharded model needs all of them, and what process 0 found counts. The random numbers of the run
    are left as they were.

    To Lightning this is a checkpoint callback, because those come last at the end of an epoch: a
    benchmark takes long, and what was trained is on disk before it begins. A run that was stopped
    in one makes up for it when it goes on.
    """

    def __init__(
        self,
        tasks: list[str] | None = None,
        every: int = 1,
        at: list[int] | None = None,
        limit: int | float | None = None,
        batch_size: int = 8,
        num_fewshot: int | None = None,
        apply_chat_template: bool = True,
        fewshot_as_multiturn: bool = True,
        system_instruction: str | None = None,
        gen_kwargs: dict[str, Any] | None = None,
        include_path: str | None = None,
    ) -> None:
        """Set the callback up; the names are those of lm-eval's own options.

        Args:
            tasks: Names of lm-eval tasks, groups or tags (`*` stands for any text), or YAML files
                of tasks. With files alone lm-eval's own tasks are not looked through, which takes
                seconds: a file that refers to them by name needs `include_path` too.
            every: Measure after iterations 0 (the start), `every`, 2 * `every` ...
            at: Measure after these iterations instead; 0 is the start.
            limit: Most documents of a task, the first ones; below 1 a share of them.
            batch_size: Sequences in one call of the model.
            num_fewshot: Examples in a prompt; what a task says if not given.
            apply_chat_template: Make a conversation of every prompt.
            fewshot_as_multiturn: Each example is a turn of its own in it.
            system_instruction: System message of all prompts.
            gen_kwargs: Settings of generation that replace the tasks' own, such as {max_gen_toks:
                512}.
            include_path: Folder with tasks of your own, to be named in `tasks`.

        Raises:
            InputError: A setting is out of its range.
        """
        checks = {
            "every": (every >= 1, "at least 1"),
            "at": (all(i >= 0 for i in at or ()), "iterations from 0 on"),
            "limit": (limit is None or (limit > 0 and math.isfinite(limit)), "above 0"),
            "batch_size": (batch_size >= 1, "at least 1"),
            "num_fewshot": (num_fewshot is None or num_fewshot >= 0, "0 or more"),
            "include_path": (include_path is None or Path(include_path).is_dir(), "a folder"),
        }
        wrong = [f"benchmarks.{k} must be {what}" for k, (fine, what) in checks.items() if not fine]
        if wrong:
            raise InputError("; ".join(wrong))
        self.tasks = tasks or []
        self.every = every
        self.at = at
        self.limit = limit
        self.batch_size = batch_size
        self.num_fewshot = num_fewshot
        self.apply_chat_template = apply_chat_template
        self.fewshot_as_multiturn = fewshot_as_multiturn and apply_chat_template
        self.system_instruction = system_instruction
        self.gen_kwargs = gen_kwargs or {}
        self.include_path = include_path
        self._loaded: Any = None

    def settings(self) -> dict[str, Any]:
        """What the scores depend on, as plain JSON values."""
        return {
            "tasks": self.tasks,
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "apply_chat_template": self.apply_chat_template,
            "fewshot_as_multiturn": self.fewshot_as_multiturn,
            "system_instruction": self.system_instruction,
            "gen_kwargs": self.gen_kwargs,
        }

    # ------------------------------------------------------------------ when

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the tasks and their data before any weights, so that a mistake shows at once."""
        if not self.tasks or stage not in ("fit", "validate") or self._loaded:
            return
        assert isinstance(pl_module, SSOModule)
        with _bars(), own_random_numbers():
            self._loaded = load_tasks(self.tasks, self.include_path)
        for task in self._loaded["tasks"].values():
            self._configure(task)
        pl_module.load_tokenizer()
        if self.system_instruction and pl_module.renderer.mode != "system":
            raise InputError(
                "benchmarks.system_instruction: the chat template has no system role, and lm-eval "
                "would leave the text out"
            )

    def _configure(self, task: Any) -> None:
        """Put our settings into a task as `lm_eval.simple_evaluate` does."""
        if self.gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=self.gen_kwargs, update=True)
        own = task.get_config("num_fewshot")
        if self.num_fewshot is not None and own != 0:  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=self.num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)

    def is_wanted(self, iteration: int) -> bool:
        """Whether the policy after so many iterations is measured."""
        if self.at is not None:
            return bool(self.tasks) and iteration in self.at
        return bool(self.tasks) and iteration % self.every == 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the start, or make up for what the run that goes on was stopped in."""
        assert isinstance(pl_module, SSOModule)
        epoch, iteration = trainer.current_epoch, pl_module.iteration
        within = bool(trainer.datamodule.batches_done(epoch))  # type: ignore[attr-defined]
        if within or (epoch and not self._ends_iteration(pl_module, epoch - 1)):
            return
        if not self.is_wanted(iteration):
            return
        kept = self._kept(trainer, iteration)
        if kept is None:
            kept = self._measure(trainer, pl_module, iteration)
        elif trainer.global_step > 0:  # metrics.csv goes on with the rows of the steps before
            return
        self._log(trainer, kept)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the policy after an iteration."""
        assert isinstance(pl_module, SSOModule)
        iteration = pl_module.iteration + 1
        if self._ends_iteration(pl_module, trainer.current_epoch) and self.is_wanted(iteration):
            self._log(trainer, self._measure(trainer, pl_module, iteration))

    @staticmethod
    def _ends_iteration(module: SSOModule, epoch: int) -> bool:
        """Whether the policy was trained in an epoch: a generator phase leaves it as it was."""
        return module.generator is None or epoch % 2 == 1

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the policy under `validate`, whatever its iteration."""
        assert isinstance(pl_module, SSOModule)
        if not self.tasks or trainer.state.fn != "validate":
            return
        numbers = self._measure(trainer, pl_module, _iteration_of(trainer, pl_module))
        pl_module.log_dict(numbers)

    # ------------------------------------------------------------------ what

    def _measure(
        self, trainer: pl.Trainer, module: SSOModule, iteration: int | None
    ) -> dict[str, float]:
        """Measure the policy as it is now and keep the scores; without an iteration, only measure.

        All processes call this.

        Returns:
            `lm_eval/TASK/METRIC` to score, the same on every process.
        """
        log.info("measuring %s with lm-eval", ", ".join(self.tasks))
        with (
            _bars(),
            own_random_numbers(module.device),
            speaking(module.policy, POLICY) as model,
            gathered(model),
            eval_mode(model),
            torch.no_grad(),
        ):
            found = self._evaluate(model, module)
        processes = Processes.current()
        numbers: dict[str, float] = processes.gather(numbers_of(found))[0]
        with processes.together():
            if processes.first:
                log.info(
                    "lm-eval%s: %s",
                    "" if iteration is None else f" after iteration {iteration}",
                    ", ".join(f"{k.partition('/')[2]} {v:.4g}" for k, v in numbers.items()),
                )
                if iteration is not None:
                    self._keep(Path(trainer.default_root_dir), iteration, found, numbers)
        return numbers

    def _evaluate(self, model: Any, module: SSOModule) -> Any:
        """lm-eval's results."""
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        logging.getLogger("lm_eval.models.huggingface").addFilter(_is_news)
        harness = HFLM(
            # PEFT's wrapper would go past the hooks by which a sharded model gathers its weights
            pretrained=causal_lm(model) if is_sharded(model) else model,
            # a copy: lm-eval gives a tokenizer a padding token, and ours is hashed and exported
            tokenizer=copy.deepcopy(module.tokenizer),
            batch_size=self.batch_size,
            chat_template_args=module.policy_config.template_kwargs,
        )
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=_SEEDS["fewshot"])
        return evaluate(
            harness,
            self._loaded,
            limit=self.limit,
            bootstrap_iters=0,
            system_instruction=self.system_instruction,
            apply_chat_template=self.apply_chat_template,
            fewshot_as_multiturn=self.fewshot_as_multiturn,
        )

    def _log(self, trainer: pl.Trainer, numbers: Mapping[str, float]) -> None:
        """Log at the last step that was done, whose rows a run that goes on keeps."""
        for logger in trainer.loggers:
            logger.log_metrics(dict(numbers), step=max(trainer.global_step - 1, 0))
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in numbers.items()})

    def _keep(self, run: Path, iteration: int, found: Any, numbers: Mapping[str, float]) -> None:
        """Write the documents' scores and, when all are there, what they were measured with."""
        for metric, scores in document_scores(found).items():
            write_scores(run, metric, iteration, scores)
        about = {
            "settings": self.settings(),
            "lm_eval": _version(),
            "versions": found["versions"],
            "num_fewshot": found["n-shot"],
            "documents": {k: v["effective"] for k, v in found["n-samples"].items()},
            "scores": numbers,
        }
        text = json.dumps(about, indent=1, default=str) + "\n"
        replace_file(_summary(run, iteration), text.encode())

    def _kept(self, trainer: pl.Trainer, iteration: int) -> dict[str, float] | None:
        """The scores of an iteration that was measured in the same way; None if it was not."""
        path = _summary(Path(trainer.default_root_dir), iteration)
        about = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        same = about.get("settings") == self.settings()
        scores: list[dict[str, float] | None] = Processes.current().gather(
            about["scores"] if same else None
        )
        return scores[0]


def _summary(run: Path, iteration: int) -> Path:
    return run / FOLDER / AREA / f"iteration-{iteration:02d}.json"


def _version() -> str:
    import lm_eval

    return str(lm_eval.__version__)


def _iteration_of(trainer: pl.Trainer, module: SSOModule) -> int | None:
    """Iterations that the policy under `validate` was trained for; None within one."""
    if not trainer.ckpt_path:
        return 0
    epochs = checkpoint_epochs(Path(trainer.ckpt_path))
    return epochs // 2 if epochs is not None and module.generator else epochs


def _is_news(record: logging.LogRecord) -> bool:
    """Leave out two warnings that the model is one in memory: it is meant to be."""
    return "`pretrained`" not in record.getMessage()


@contextmanager
def _bars() -> Iterator[None]:
    """Let lm-eval show its bars on a terminal only, as ours are: it has no setting for all."""
    from tqdm import tqdm

    if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
        yield
        return
    before: Any = tqdm.__init__

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.__init__ = before


@contextmanager
def own_random_numbers(device: torch.device | None = None) -> Iterator[None]:
    """Seed all generators as lm-eval's command line does, and give the run's own back.

    Args:
        device: Whose generator is kept too, if it is a GPU.
    """
    python, numpy = random.getstate(), np.random.get_state()
    gpus = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        random.seed(_SEEDS["python"])
        np.random.seed(_SEEDS["numpy"])
        torch.manual_seed(_SEEDS["torch"])
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@cache
def _manager(include_path: str | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=defaults)


def load_tasks(tasks: Sequence[str], include_path: str | None = None) -> Any:
    """Find tasks and load their data.

    Args:
        tasks: As `Benchmarks` takes them.
        include_path: Folder with further tasks.

    Returns:
        lm-eval's `TaskDict`: `tasks`, `groups` and `group_map`.

    Raises:
        InputError: lm-eval is not installed, does not know a task or cannot load it, or a task
            runs code that the model wrote.
    """
    if find_spec("lm_eval") is None:
        raise InputError("benchmarks.tasks need lm-eval: pip install 'sso-lightning[eval]'")
    files = [task for task in tasks if Path(task).is_file()]
    manager = _manager(include_path, include_path is not None or len(files) < len(tasks))
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for task in tasks:
        names = [task] if task in files else manager.match_tasks([task])
        if not names:
            near = get_close_matches(task, manager.all_tasks, n=1)
            hint = f" (is it {near[0]}?)" if near else ""
            raise InputError(
                f"benchmarks.tasks: there is no file and no lm-eval task {task}{hint}; "
                "`lm-eval ls tasks` lists them"
            )
        try:
            found = manager.load(names)
        except Exception as error:  # tasks are programs, and their data come over the network
            reason = " ".join(str(error).split()).partition(". ")[0]
            kind = type(error).__name__
            raise InputError(
                f"benchmarks.tasks: {task} cannot be loaded ({kind}: {reason[:300]})"
            ) from error
        for key, values in found.items():
            loaded[key] |= values
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"benchmarks.tasks: {name} runs code that the model wrote: leave it")
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"benchmarks.tasks: {name} shows the model more than text")
    return loaded


def _name(task: str, metric: str, filter_name: str) -> str:
    """A metric's name in loggers and files; filters are ways to read an answer out of a text."""
    parts = (task, metric if filter_name in ("none", "") else f"{metric}.{filter_name}")
    return "/".join([AREA, *(re.sub(r"[^\w.+-]", "_", part) for part in parts)])


def numbers_of(found: Any) -> dict[str, float]:
    """lm-eval's results as `lm_eval/TASK/METRIC` to score, groups of tasks included.

    A task that reads answers in several ways has `METRIC.FILTER` for each.
    """
    if found is None:
        return {}
    numbers = {}
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            number = isinstance(value, int | float | np.number)
            if comma and number and not metric.endswith("_stderr"):
                numbers[_name(task, metric, filter_name)] = float(value)
    return numbers


def document_scores(found: Any) -> dict[str, dict[str, float]]:
    """The scores of single documents, by metric and the document's number in its data set.

    Metrics of which less is better, and those that are no number per document (such as a
    perplexity), are left out.
    """
    scores: dict[str, dict[str, float]] = {}
    for task, samples in found["samples"].items():
        better = found["higher_is_better"].get(task, {})
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            for metric in sample["metrics"]:
                value = sample[metric]
                if better.get(metric) and isinstance(value, int | float | np.number | np.bool_):
                    own = scores.setdefault(_name(task, metric, sample["filter"]), {})
                    own[str(sample["doc_id"])] = float(value)
    return {k: own for k, own in scores.items() if all(map(math.isfinite, own.values()))}
