"""SSOModule: a policy, an objective, and the step that joins them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import MaxMetric, MeanMetric, Metric, MinMetric

from sso_lightning.data import PairBatch, score_batch
from sso_lightning.errors import InputError
from sso_lightning.losses import IPO
from sso_lightning.objectives import ContrastLogps, Objective
from sso_lightning.policy import (
    GENERATOR,
    POLICY,
    PolicyConfig,
    activate,
    adapter_weights,
    add_generator,
    load_model,
    load_tokenizer,
    set_adapter_weights,
    vocabulary_size,
)
from sso_lightning.prompts import ChatRenderer
from sso_lightning.sharding import full, shard
from sso_lightning.strategies import FSDP2Strategy

log = logging.getLogger("sso_lightning")

IPO_PROGRESS_FLOOR = 0.1


@dataclass
class Schedule:
    """Learning rate over optimizer steps: linear warmup, then decay.

    Attributes:
        kind: Decay after the warmup.
        warmup: Share of the steps that warm up.
        floor: Learning rate at the end, as a share of its peak.
        restart: Each iteration is a training run of its own, as in the papers: the schedule
            starts again and the optimizer forgets its moments.
    """

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    floor: float = 0.0
    restart: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.warmup < 1.0:
            raise InputError(f"schedule.warmup must be in [0, 1), got {self.warmup}")
        if not 0.0 <= self.floor <= 1.0:
            raise InputError(f"schedule.floor must be in [0, 1], got {self.floor}")

    def factor(self, step: int, total: int) -> float:
        """Share of the peak learning rate at optimizer step `step` (from 0) of `total`."""
        warm = math.ceil(self.warmup * total)
        if step < warm:
            return (step + 1) / warm
        done = min(1.0, (step - warm) / max(1, total - warm))
        shape = {
            "constant": 1.0,
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        }[self.kind]
        return self.floor + (1.0 - self.floor) * shape


@dataclass
class Generator:
    """The data generator of the 2025 method: a second adapter that is trained to make the pairs.

    Epochs then alternate. In a generator phase the policy writes pairs under the principles and
    the generator learns to follow these better; in the policy phase after it the generator writes
    the pairs, and the policy learns from them under `SSOModule`'s own objective.

    Attributes:
        objective: What trains the generator, `DataGenerator` in the paper.
        lr: Its peak learning rate; the policy's if not given.
        start: Where its weights begin in every iteration: at the policy's ("current", as
            published), or at those that the run began with ("first"). They are its reference too.
    """

    objective: Objective
    lr: float | None = None
    start: Literal["current", "first"] = "current"

    def __post_init__(self) -> None:
        if self.start not in ("current", "first"):
            raise InputError(f"generator.start must be current or first, got {self.start!r}")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"generator.lr must be above 0, got {self.lr}")


class _Gathered:
    """Metrics over the batches of an optimizer step or of an epoch, on all processes.

    Which ones there are is the objective's choice. By their names: `_min` and `_max` are extremes,
    `_std` goes with the `_mean` of the same name, and everything else is a mean over examples.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}

    def update(self, metrics: Mapping[str, Tensor], weight: float) -> None:
        """Take in a batch of `weight` examples."""
        for name, value in metrics.items():
            wide = torch.float32 if value.device.type == "mps" else torch.float64
            value = value.detach().to(wide)
            if name.endswith("_std"):  # spreads do not average, but second moments do
                value = value**2 + metrics[name[:-4] + "_mean"].to(wide) ** 2
            kind = {"_min": MinMetric, "_max": MaxMetric}.get(name[-4:], MeanMetric)
            if name not in self._metrics:
                self._metrics[name] = kind().set_dtype(wide).to(value.device)
            weighted = (value, weight) if kind is MeanMetric else (value,)
            self._metrics[name].update(*weighted)

    def take(self) -> dict[str, Tensor]:
        """What was gathered; the next batches start from nothing."""
        values: dict[str, Tensor] = {k: metric.compute() for k, metric in self._metrics.items()}
        for name in values:
            if name.endswith("_std"):
                variance = values[name] - values[name[:-4] + "_mean"] ** 2
                values[name] = variance.clamp(min=0).sqrt()
        self._metrics.clear()
        return values


class SSOModule(pl.LightningModule):
    """Trains a policy on pairs that it wrote itself.

    The reference is not here: its log-probabilities come with every batch, stored once per
    iteration. A step is therefore one forward and backward of the policy over exactly the
    sequences that the objective names.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        objective: Objective,
        optimizer: Callable[[Iterable[torch.nn.Parameter]], Optimizer] | None = None,
        schedule: Schedule | None = None,
        max_tokens: int | None = None,
        generator: Generator | None = None,
    ) -> None:
        """Keep the settings; weights are loaded in `configure_model`.

        Args:
            policy: Which model is trained, and how it is held in memory.
            objective: Which pairs are compared, and how the terms are combined.
            optimizer: Optimizer class and its settings; AdamW with its own defaults if not given.
            schedule: Learning rate over the steps of an iteration (or of the run).
            max_tokens: Most tokens of one forward call in a step; None puts a batch in one call.
            generator: Train a data generator too, as in the 2025 method; needs LoRA. An
                iteration is then two epochs.
        """
        super().__init__()
        policy.check()
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"model.max_tokens must be at least 1, got {max_tokens}")
        if generator and not policy.lora:
            raise InputError(
                "model.generator is a second adapter: set model.policy.lora, or train generator "
                "and policy by commands of their own (fit, predict, fit)"
            )
        if generator and schedule and not schedule.restart:
            raise InputError("model.generator needs model.schedule.restart: true")
        self.policy_config = policy
        self.policy_objective = objective
        self.generator = generator
        self._first_adapter: dict[str, Tensor] = {}
        # as a default of the signature its weight decay would be carried over to another class
        self.optimizer = optimizer or torch.optim.AdamW
        self.schedule = schedule or Schedule()
        self.max_tokens = max_tokens
        self.policy: Any = None
        self.tokenizer: Any = None
        self.renderer: ChatRenderer
        self.vocabulary: int | None = None
        self._step_metrics = _Gathered()
        self._held_out_metrics = _Gathered()
        self._ipo_progress: list[float] = []
        self._loss_is_finite = True
        self.skipped_steps = 0
        self.skipped_in_row = 0
        # adapters and frozen bases are saved without the base, see `on_save_checkpoint`
        self.strict_loading = False

    # ------------------------------------------------------------------ model

    def configure_model(self) -> None:
        """Load tokenizer and weights, once."""
        if self.policy is not None:
            return
        self.load_tokenizer()
        # from_pretrained gives a model in eval mode, in which gradient checkpointing does nothing
        self.policy = self.load_weights().train()
        if self.generator:
            add_generator(self.policy)
            self._first_adapter = adapter_weights(self.policy, POLICY)
        strategy = self._trainer.strategy if self._trainer else None
        if isinstance(strategy, ModelParallelStrategy):
            # only ours has settings of its own
            options = strategy.sharding if isinstance(strategy, FSDP2Strategy) else {}
            shard(self.policy, strategy.device_mesh["data_parallel"], **options)

    def load_weights(self) -> Any:
        """The model that is trained."""
        return load_model(self.policy_config)

    def load_tokenizer(self) -> None:
        """Load the tokenizer and probe its chat template: seconds, and needs no weights."""
        if self.tokenizer is None:
            config = self.policy_config
            self.tokenizer = load_tokenizer(config)
            self.renderer = ChatRenderer(self.tokenizer, config.system_role, config.template_kwargs)
            self.vocabulary = vocabulary_size(config)
            # added tokens that are never used, such as one for padding, may lie beyond it
            highest = max(self.tokenizer.vocab_size - 1, *self.renderer.stop_ids)
            if self.vocabulary is not None and highest >= self.vocabulary:
                raise InputError(
                    f"policy.path: the tokenizer of {config.path} has the token id {highest}, but "
                    f"the model's vocabulary ends at {self.vocabulary - 1}; they do not belong "
                    "together"
                )

    def configure_optimizers(self) -> Optimizer:
        """The optimizer over the trainable weights; the schedule acts in `optimizer_step`."""
        trainable = {n: p for n, p in self.named_parameters() if p.requires_grad}
        groups: Any = list(trainable.values())
        if self.generator:
            of_generator = [p for n, p in trainable.items() if f".{GENERATOR}." in n]
            of_policy = [p for n, p in trainable.items() if f".{GENERATOR}." not in n]
            own_rate = {"lr": self.generator.lr} if self.generator.lr else {}
            groups = [{"params": of_policy}, {"params": of_generator, **own_rate}]
        try:
            optimizer = self.optimizer(groups)
        except (TypeError, ValueError) as error:
            raise InputError(f"model.optimizer: {error}") from error
        for key, value in optimizer.defaults.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"model.optimizer: {key} must be finite, got {value}")
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._warn_of_rounding(trainable.values())
        return optimizer

    @rank_zero_only
    def _warn_of_rounding(self, trained: Iterable[Tensor]) -> None:
        """A sum in half precision keeps two or three digits: most small steps change nothing."""
        dtypes = {p.dtype for p in trained}
        for dtype in dtypes & {torch.bfloat16, torch.float16}:
            log.warning(
                "the weights that are trained are %s: a step smaller than 1/%d of a weight is "
                "rounded away; policy.dtype: float32 (for LoRA any) with trainer.precision: "
                "bf16-mixed keeps it",
                str(dtype).removeprefix("torch."),
                round(2 / torch.finfo(dtype).eps),
            )

    # ------------------------------------------------------------------ phases

    @property
    def trains_generator(self) -> bool:
        """Whether this epoch of a fit is a generator phase."""
        if not self.generator:
            return False
        return self.trainer.state.fn == "fit" and self.trainer.current_epoch % 2 == 0

    @property
    def iteration(self) -> int:
        """The iteration that this epoch belongs to."""
        return self.trainer.current_epoch // (2 if self.generator else 1)

    @property
    def objective(self) -> Objective:
        """The objective of what is trained in this epoch."""
        training = self.generator if self.trains_generator else None
        return training.objective if training else self.policy_objective

    @property
    def writer(self) -> str:
        """Adapter that writes this epoch's pairs."""
        return GENERATOR if self.generator and not self.trains_generator else POLICY

    def start_generator(self) -> None:
        """Put the generator's weights where it begins its phase."""
        assert self.generator
        weights = self._first_adapter
        if self.generator.start == "current":
            weights = adapter_weights(self.policy, POLICY)
        set_adapter_weights(self.policy, GENERATOR, weights)

    def _log_phase(self, stage: str, values: Mapping[str, Tensor]) -> None:
        """Log under `train/` or `val/`, or in a generator phase under `generator/`."""
        if self.trains_generator:
            stage = {"train": "generator", "val": "generator/val"}[stage]
        self.log_dict({f"{stage}/{k}": v for k, v in values.items()})

    def _log_step(self, name: str, value: Any) -> None:
        stage = "generator" if self.trains_generator else "train"
        self.log(f"{stage}/{name}", value, on_step=True, on_epoch=False)

    # ------------------------------------------------------------------ steps

    def score(self, batch: PairBatch) -> ContrastLogps:
        """Log-probabilities of a batch by what is trained in this epoch, with gradient."""
        if self.generator:
            activate(self.policy, GENERATOR if self.trains_generator else POLICY)
        return score_batch(self.policy, batch, self.max_tokens)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """One batch; the loss of an optimizer step is the mean over its examples."""
        loss, metrics = self.objective(self.score(batch), batch.reference)
        metrics["loss"] = loss.detach()
        self._step_metrics.update(metrics, weight=len(batch.ids))
        if batch.closes_step:
            values = self._step_metrics.take()
            self._loss_is_finite = bool(values["loss"].isfinite())
            if "ipo_progress" in values:
                self._ipo_progress.append(float(values["ipo_progress"]))
            self._log_phase("train", values)
            self.log("loss", values["loss"], prog_bar=True, logger=False)
        return loss * batch.scale

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Loss, reward accuracies and margins on the held-out pairs."""
        loss, metrics = self.objective(self.score(batch), batch.reference)
        first = self.objective.terms[0].name
        metrics["loss"] = loss
        metrics["reward_accuracy"] = metrics[f"reward_accuracy_{first}"]
        metrics["reward_margin"] = metrics[f"reward_margin_{first}"]
        self._held_out_metrics.update(metrics, weight=len(batch.ids) if batch.scale else 0)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the means over the held-out pairs of all processes."""
        values = self._held_out_metrics.take()
        self._log_phase("val", values)

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`, under `test/`."""
        values = self._held_out_metrics.take()
        self.log_dict({f"test/{k}": v for k, v in values.items()})

    def predict_step(self, batch: PairBatch, batch_idx: int) -> dict[str, list[Any]]:
        """Ids and log-probabilities of sampled pairs (the pairs themselves are on disk)."""
        logps = self.score(batch).logps
        if not batch.scale:
            return {}
        return {"id": batch.ids} | {f"{c}/{r}": v.tolist() for (c, r), v in logps.items()}

    # ------------------------------------------------------------------ schedule

    def on_train_epoch_start(self) -> None:
        """A new iteration starts its count of IPO's progress."""
        self._ipo_progress = []

    def on_train_epoch_end(self) -> None:
        """Drop the gradients, and warn while IPO's target is out of reach.

        Nothing holds the policy back then.
        """
        # the trainer keeps them until the next step: all through the next set's sampling
        self.zero_grad(set_to_none=True)
        if not isinstance(self.objective.base, IPO) or not self._ipo_progress:
            return
        late = self._ipo_progress[len(self._ipo_progress) // 2 :]
        progress = sum(late) / len(late)
        if progress < IPO_PROGRESS_FLOOR and self.trainer.is_global_zero:
            log.warning(
                "iteration %d: in its second half the IPO margin was %.3f of its target of %.3g "
                "nats per token; with the target out of reach nothing holds the policy back. A "
                "larger beta sets a nearer target.",
                self.iteration,
                progress,
                self.objective.base.target,
            )

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Set the learning rate for this step, then step.

        The rate is a function of the step's number alone, so there is no scheduler state that a
        resumed run could get wrong.
        """
        step, total = self._progress(batch_idx)
        if self.schedule.restart and step == 0:
            # a new iteration forgets the moments; no epoch hook is called in every kind of resume
            optimizer.state.clear()
        factor = self.schedule.factor(step, total)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self._log_step("lr", optimizer.param_groups[-1 if self.trains_generator else 0]["lr"])
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def _progress(self, batch_idx: int) -> tuple[int, int]:
        """(Optimizer step from 0, number of steps) in the iteration or the run."""
        every = self.trainer.accumulate_grad_batches
        if self.schedule.restart:
            return batch_idx // every, math.ceil(self.trainer.num_training_batches / every)
        if not hasattr(self, "_run_steps"):
            per_epoch = self.trainer.datamodule.steps_per_epoch()  # type: ignore[attr-defined]
            epochs, limit = self.trainer.max_epochs or 1, self.trainer.max_steps
            bounds = (limit if limit > 0 else None, per_epoch and per_epoch * epochs)
            self._run_steps = min(bound for bound in bounds if bound)
        return self.trainer.global_step, self._run_steps

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the gradient's norm before clipping; skip the step if it or the loss is not finite.

        All processes see the same loss and norm, so they all skip or none does.
        """
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = full(torch.nn.utils.get_total_norm(gradients))
        self._log_step("grad_norm", norm)
        if self._loss_is_finite and norm.isfinite():
            self.skipped_in_row = 0
        else:
            # optimizers pass over weights without gradient: no decay, no moments, no count
            optimizer.zero_grad(set_to_none=True)
            self.skipped_in_row += 1
            self.skipped_steps += 1
        self._log_step("skipped_steps", float(self.skipped_steps))

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave a frozen base out, and say what the weights belong to."""
        if self.policy_config.lora:
            trainable = {n for n, p in self.named_parameters() if p.requires_grad}
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in state.items() if k in trainable}
        checkpoint["policy"] = asdict(self.policy_config)
        checkpoint["skipped_steps"] = self.skipped_steps
        if self._first_adapter:
            checkpoint["first_adapter"] = self._first_adapter

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained another way (LoRA or full, another rank)."""
        self.configure_model()
        self.skipped_steps = checkpoint.get("skipped_steps", 0)
        self._first_adapter = checkpoint.get("first_adapter", self._first_adapter)
        path = checkpoint.get("policy", {}).get("path")
        if self.policy_config.lora and path != self.policy_config.path:
            log.warning("the adapter was trained on %s, not on %s", path, self.policy_config.path)
        shapes = {name: p.shape for name, p in self.named_parameters() if p.requires_grad}
        found = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        wrong = [name for name, shape in shapes.items() if found.get(name) != shape]
        if wrong:
            raise InputError(
                f"the checkpoint does not fit model.policy: {wrong[0]} is "
                f"{tuple(found[wrong[0]]) if wrong[0] in found else 'missing'}; use the "
                "settings it was trained with (policy.path, policy.lora)"
            )
