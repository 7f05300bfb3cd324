"""What a pass takes, found by running it on tensors that have shapes and no data.

The model is built from its config alone. The library's own scoring and sampling code then runs on
torch's FakeTensors, and every storage that an operator makes is noted from its birth to its end, so
that recomputation, tiles and lean products are counted as they are. What a kernel needs inside of
itself and what an allocator loses to fragments is not seen.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sso_lightning import scoring
from sso_lightning.errors import InputError
from sso_lightning.policy import PolicyConfig, make_trainable
from sso_lightning.sampling import rehearse
from sso_lightning.scoring import PROVEN, Tree, planned_for, response_logps
from sso_lightning.sharding import causal_lm

Kind = Literal["cpu", "cuda"]

# bitsandbytes: an 8-bit scale per 64 weights, a float32 per 256 scales, and tables of 16 and 256
# float32 (Dettmers et al. 2023, arXiv 2305.14314, section 3); small tensors keep 32-bit moments
_BLOCK, _SCALES, _TABLES, _SMALL = 64, 256, 4 * (16 + 256), 4096


@dataclass(frozen=True)
class Precision:
    """What `trainer.precision` does to a model.

    Attributes:
        mixed: Type of the products under autocast.
        whole: Type that all weights are cast to.
    """

    mixed: torch.dtype | None = None
    whole: torch.dtype | None = None

    @classmethod
    def of(cls, name: str | int | None) -> Precision:
        """The trainer's setting.

        Raises:
            InputError: It is none of those that are planned for.
        """
        half = {"bf16": torch.bfloat16, "16": torch.float16}
        known = {f"{k}-mixed": cls(mixed=v) for k, v in half.items()}
        known |= {f"{k}-true": cls(whole=v) for k, v in half.items()}
        known |= {"bf16": known["bf16-mixed"], "16": known["16-mixed"]}
        known |= {"32": cls(), "32-true": cls(), "None": cls()}
        known |= dict.fromkeys(("64", "64-true"), cls(whole=torch.float64))
        if str(name) not in known:
            raise InputError(f"trainer.precision: plan does not know {name}")
        return known[str(name)]


class Births(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the storages that operators make while it is on, in order."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """Start.

        Args:
            known: Tensors whose storages were there before; operators return views of them.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[tuple[int, int]] = []  # number of the storage; bytes, negative at its end
        self._alive: dict[int, int] = {}
        self._sizes: list[int] = []
        self._born: list[int] = []
        self._known = {t.untyped_storage()._cdata for t in known}
        self._label = ""
        self._labels: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note what it made."""
        made = func(*args, **(kwargs or {}))
        label = self._label
        if func is torch.ops.aten._to_copy.default and self._is_known(args[0]):
            label = "copies"
        for value in tree_leaves(made):
            if isinstance(value, Tensor) and not self._is_known(value):
                self._note(value.untyped_storage(), label)
        return made

    def _is_known(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._known

    def _note(self, storage: Any, label: str) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        number = self._alive[key] = len(self._sizes)
        self._sizes.append(storage.nbytes())
        self._born.append(len(self.events))
        self.events.append((number, storage.nbytes()))
        if label:
            self._labels[number] = label
        weakref.finalize(storage, self._end, key)

    def _end(self, key: int) -> None:
        number = self._alive.pop(key)
        self.events.append((number, -self._sizes[number]))

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Give a part's name to what is made in the block."""
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    def name(self, tensors: Iterable[Tensor], label: str) -> None:
        """Give a part's name to tensors that are alive."""
        for tensor in tensors:
            number = self._alive.get(tensor.untyped_storage()._cdata)
            if number is not None:
                self._labels[number] = label

    def born(self, tensor: Tensor) -> int:
        """The event of a tensor's birth."""
        return self._born[self._alive[tensor.untyped_storage()._cdata]]

    def parts(self) -> Iterator[tuple[int, str, int]]:
        """For each event: its place, the part of the storage ("activations" if unnamed), bytes."""
        for at, (number, size) in enumerate(self.events):
            yield at, self._labels.get(number, "activations"), size


@dataclass(frozen=True)
class Pass:
    """What a pass made.

    Attributes:
        births: Its storages.
        backward_at: The event before which its backward pass began; None if it has none.
        middle_at: The event of the first gradient of the first half of the layers, whose backward
            pass is the second half.
        gradients: Bytes of the gradients that it leaves.
    """

    births: Births
    backward_at: int | None = None
    middle_at: int | None = None
    gradients: int = 0

    def windows(
        self, *, kept: bool = False, accumulates: bool = False, share: int = 1
    ) -> list[dict[str, int]]:
        """Bytes by part at the fullest moment of the forward pass and of each half of the backward.

        The trainer drops the gradients of the step before only when the backward pass begins, and
        under accumulation not even then: a new gradient is added to the one that is there and
        freed.

        Args:
            kept: Whether the gradients of an earlier pass are there.
            accumulates: Whether they are added to.
            share: Processes that share the gradients.
        """
        begin = self.backward_at
        now = {"gradients": self.gradients // share if kept else 0}
        best = [dict(now)]
        most, fresh = sum(now.values()), 0  # fresh: a gradient that was made and is not added yet
        for at, part, size in self.births.parts():
            if at == begin and not accumulates:
                now["gradients"] = 0
            if at in (begin, self.middle_at):
                best.append(dict(now))
                most = sum(now.values())
            if part == "gradients":
                size //= share
                if accumulates:
                    fresh = max(0, size)
                    continue
            now[part] = now.get(part, 0) + size
            if sum(now.values()) + fresh > most:
                most = sum(now.values()) + fresh
                best[-1] = {**now, "gradients": now["gradients"] + fresh}
            if size > 0:
                fresh = 0
        return best

    def peak(self, **how: Any) -> dict[str, int]:
        """The fullest of all `windows`."""
        return max(self.windows(**how), key=lambda parts: sum(parts.values()))


DEPTHS = 4, 6
"""Layers of the models that stand for deeper ones; the last layer is unlike the others."""


@dataclass(frozen=True)
class Deep:
    """A pass of a model, from that pass of two shallower ones.

    Every part of a window grows with each layer by the same number of bytes, so the window does,
    while the peak of the whole pass may lie in one window or in another.

    Attributes:
        passes: Of models of `DEPTHS` layers, or of the model itself.
        depth: Layers of the model.
    """

    passes: tuple[Pass, ...]
    depth: int

    def peak(self, **how: Any) -> dict[str, int]:
        """As `Pass.peak`."""
        if len(self.passes) == 1:
            return self.passes[0].peak(**how)
        few, more = (made.windows(**how) for made in self.passes)
        low, high = DEPTHS
        windows = [
            {k: b[k] + (b[k] - a.get(k, 0)) * (self.depth - high) // (high - low) for k in b}
            for a, b in zip(few, more, strict=True)
        ]
        return max(windows, key=lambda parts: sum(parts.values()))


class Simulation:
    """A policy without data.

    Attributes:
        model: As `load_model` gives it, but that its base is not quantised.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        config: Any,
        precision: Precision | None = None,
        kind: Kind = "cpu",
        depth: int | None = None,
    ) -> None:
        """Build the model.

        Args:
            policy: Settings.
            config: The base model's transformers config.
            precision: The trainer's.
            kind: The device whose tiles and kernels are taken.
            depth: Layers, if not all.

        Raises:
            InputError: The architecture is scored as plain rows, which nothing here foresees.
        """
        from transformers import AutoModelForCausalLM

        self.policy, self.kind = policy, kind
        self.precision = precision or Precision()
        if config.model_type not in PROVEN:
            raise InputError(
                f"policy.path: plan foresees {', '.join(sorted(PROVEN))}, not {config.model_type}, "
                "which is scored as plain rows"
            )
        if depth is not None:
            config = copy.deepcopy(config)
            config.num_hidden_layers = depth
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:depth]
        saved = config.dtype or torch.float32
        dtype = saved if policy.dtype == "auto" else getattr(torch, policy.dtype)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            self.model = make_trainable(model, policy)
        if self.precision.whole:
            self.model.to(self.precision.whole)
        if policy.quantize:  # the scoring pass keeps lean products of whole weights only
            for layer in causal_lm(self.model).get_decoder().layers:
                layer.mlp.parameters = lambda: iter([torch.empty(0, dtype=torch.uint8)])
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def _place(self) -> None:
        """Give all weights a device, once: code that asks for one must not find "meta"."""
        convert = self._fake.fake_tensor_converter.from_meta_and_device
        made: dict[int, nn.Parameter] = {}  # tied weights stay one
        cpu = torch.device("cpu")
        for module in self.model.modules():
            for name, weight in module._parameters.items():
                if weight is not None and weight.is_meta:
                    if id(weight) not in made:
                        placed = convert(self._fake, weight.detach(), cpu)
                        made[id(weight)] = nn.Parameter(placed, weight.requires_grad)
                    module._parameters[name] = made[id(weight)]
            for name, value in module._buffers.items():
                if value is not None and value.is_meta:
                    module._buffers[name] = convert(self._fake, value, cpu)

    # ------------------------------------------------------------------ weights

    def parameters(self) -> int:
        """Numbers of the base, tied ones once."""
        return sum(p.numel() for n, p in self._named() if "lora_" not in n)

    def trained(self) -> list[Tensor]:
        """Weights with a gradient."""
        return [p for _, p in self._named() if p.requires_grad]

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        yield from causal_lm(self.model).named_parameters()

    def linear_layers(self) -> Iterator[tuple[str, nn.Linear]]:
        """The linear layers of the base but its head: what is adapted and quantised."""
        base = causal_lm(self.model)
        head = base.get_output_embeddings()
        for name, layer in base.named_modules():
            if isinstance(layer, nn.Linear) and layer is not head and ".lora_" not in name:
                yield name, layer

    def weight_bytes(self) -> tuple[int, int]:
        """Bytes of the base's weights as they are kept, and of the adapters."""
        quantized = {f"{name}.weight" for name, _ in self.linear_layers()}
        base = adapters = 0
        for name, p in self._named():
            if "lora_" in name:
                adapters += p.nbytes
            elif self.policy.quantize == "4bit" and name in quantized:
                blocks = p.numel() // _BLOCK
                base += p.numel() // 2 + blocks + 4 * (blocks // _SCALES) + _TABLES
            elif self.policy.quantize == "8bit" and name in quantized:
                base += p.numel() + 4 * p.shape[0]
            else:
                base += p.nbytes
        return base, adapters

    def dense_bytes(self) -> int:
        """Bytes of the largest quantised weight in the type that it is multiplied in, or 0."""
        if not self.policy.quantize:
            return 0
        item = 4 if self.policy.dtype == "float32" else 2
        return max(layer.weight.numel() for _, layer in self.linear_layers()) * item

    def layer_bytes(self) -> tuple[int, int, int]:
        """Of what FSDP2 gathers: the largest layer, all layers, and the rest, as computed in."""
        item = self.precision.mixed
        sizes = [
            sum(p.numel() * (item or p.dtype).itemsize for p in layer.parameters())
            for layer in self._layers()
        ]
        every = sum(p.numel() * (item or p.dtype).itemsize for _, p in self._named())
        return max(sizes), sum(sizes), every - sum(sizes)

    def largest_gradient(self) -> int:
        """Bytes, in float32, of the gradients of the layer that has most, or of the rest."""
        every = sum(p.numel() for p in self.trained())
        sizes = [
            sum(p.numel() for p in layer.parameters() if p.requires_grad)
            for layer in self._layers()
        ]
        return 4 * max(*sizes, every - sum(sizes))

    def _layers(self) -> list[nn.Module]:
        """The decoder layers; of a quantised base, too, with their own weights."""
        layers: list[nn.Module] = list(causal_lm(self.model).get_decoder().layers)
        return layers

    # ------------------------------------------------------------------ passes

    @contextmanager
    def _running(self, training: bool) -> Iterator[Births]:
        self._place()
        self.model.train(training)
        births = Births([*self.model.parameters(), *self.model.buffers()])
        with self._fake, planned_for(self.kind), births, _head_labelled(births):
            yield births

    def _mixed(self) -> AbstractContextManager[Any]:
        mixed = self.precision.mixed
        return torch.autocast("cpu", mixed) if mixed else nullcontext()

    def scoring(self, trees: Sequence[Tree], max_tokens: int | None) -> Pass:
        """The pass that stores log-probabilities.

        Args:
            trees: What is scored.
            max_tokens: Most tokens of one call.
        """
        with self._running(training=False) as births, torch.no_grad(), self._mixed():
            response_logps(self.model, trees, max_tokens=max_tokens)
        return Pass(births)

    def training(self, trees: Sequence[Tree], max_tokens: int | None) -> Pass:
        """A forward and a backward pass.

        Args:
            trees: Of a batch.
            max_tokens: Most tokens of one call.
        """
        with self._running(training=True) as births:
            with self._mixed():
                logps, _ = response_logps(self.model, trees, max_tokens=max_tokens)
            backward_at = len(births.events)
            torch.autograd.backward(logps.sum())
            found = [p.grad for p in self.model.parameters() if p.grad is not None]
            births.name(found, "gradients")
            layers = self._layers()
            middle = layers[(len(layers) - 1) // 2]
            early = [p.grad for p in middle.parameters() if p.grad is not None]
            middle_at = min(map(births.born, early)) if len(layers) > 1 else None
            kept = sum(gradient.nbytes for gradient in found)
            made = Pass(births, backward_at, middle_at, kept)
        del logps, found, early
        self.model.zero_grad(set_to_none=True)
        return made

    def sampling(self, prompts: Sequence[int], rows: int, capacity: int) -> Pass:
        """A prefill, and a token of every slot.

        Args:
            prompts: Tokens of each prompt of the prefill.
            rows: Slots.
            capacity: Tokens of a slot.
        """
        with self._running(training=False) as births, self._mixed():
            slots = rehearse(self.model, prompts, rows, capacity)
            births.name((t for pair in slots for t in pair), "cache")
        return Pass(births)


@contextmanager
def _head_labelled(births: Births) -> Iterator[None]:
    """Tell what the head makes, its tiles and what it keeps for later, from the rest."""
    head = scoring._HeadLogps

    def labelled(run: Callable[..., Any]) -> Any:
        def inside(*args: Any) -> Any:
            with births.labelled("logits"):
                return run(*args)

        return staticmethod(inside)

    with (
        patch.object(head, "forward", labelled(head.forward)),
        patch.object(head, "backward", labelled(head.backward)),
    ):
        yield


def optimizer_bytes(
    optimizer: Callable[[Any], Optimizer], trained: Sequence[Tensor], kind: Kind = "cpu"
) -> tuple[int, int]:
    """Bytes that an optimizer keeps, and that a step of it takes on top, found by small steps.

    Args:
        optimizer: Makes an optimizer of parameters.
        trained: What it trains, with or without data.
        kind: The device; torch's optimizers go over all weights at once on a GPU.

    Raises:
        InputError: It refuses.
    """
    kept = extra = 0
    counts: dict[tuple[torch.dtype, bool], list[int]] = {}
    for p in trained:
        counts.setdefault((p.dtype, p.numel() < _SMALL), []).append(p.numel())
    for (dtype, small), numbers in counts.items():
        rows = 8 if small else 128
        one = rows * 64
        _, alone = _small_step(optimizer, 1, rows, dtype, kind)
        states, most = _small_step(optimizer, 8, rows, dtype, kind)
        shared = Counter(t.data_ptr() for t in states)  # tables belong to all; counts are small
        own = sum(t.nbytes for t in states if t.numel() > 1 and shared[t.data_ptr()] == 1)
        kept += sum(numbers) * own // (8 * one)
        together = most > 4 * alone
        extra = max(extra, (most * sum(numbers) // 8 if together else alone * max(numbers)) // one)
    return kept, extra


def _small_step(
    optimizer: Callable[[Any], Optimizer], number: int, rows: int, dtype: torch.dtype, kind: Kind
) -> tuple[list[Tensor], int]:
    """States after a step of equal weights [rows, 64], and bytes that it takes on top."""
    probes = [nn.Parameter(torch.ones(rows, 64, dtype=dtype)) for _ in range(number)]
    try:
        made = optimizer(probes)
        for group in made.param_groups:
            if kind == "cuda" and group.get("foreach", 0) is None and not group.get("fused"):
                group["foreach"] = True
        for _ in range(2):  # states are born in the first step
            for probe in probes:
                probe.grad = torch.ones_like(probe)
            there = [*probes, *(p.grad for p in probes), *tree_leaves(made.state_dict())]
            with Births(t for t in there if isinstance(t, Tensor)) as births:
                made.step()
    except Exception as error:
        raise InputError(f"model.optimizer: {' '.join(str(error).split())}") from error
    states = [t for t in tree_leaves(made.state_dict()["state"]) if isinstance(t, Tensor)]
    return states, sum(Pass(births).peak().values())
