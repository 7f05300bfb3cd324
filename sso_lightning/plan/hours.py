"""Tokens, floating point operations and hours of an iteration: arithmetic, not a measurement.

Products are counted in closed form, as the library makes them: shared prompts once, the last
layer's MLP and the head only where a token is scored. Scoring and training make them at a share of
the device's peak; a decoding step takes the reading of weights, keys and values, or what the host
needs to start it, whichever is longer (`benchmarks/scaling.py` reckons in the same way).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sso_lightning.pairs import SAMPLED_FROM, SCORED, by_context
from sso_lightning.plan.memory import Lengths
from sso_lightning.plan.simulate import Simulation
from sso_lightning.sharding import causal_lm

# NVIDIA H100 SXM data sheet: dense bfloat16 products a second, bytes a second
H100_TFLOPS, H100_BANDWIDTH = 989.0, 3.35e12
# assumed: the share of the bandwidth that decoding reaches, and the seconds of the host for one
# layer of a step: 31 ms for 28 were measured on a slow CPU, half of that is taken
READS, HOST = 0.60, 0.0155 / 28


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that products are counted from.

    Attributes:
        linear: Weights of the decoder's linear layers.
        adapters: Weights of the adapters on them.
        last: Weights of the last layer's MLP and output projection, which see scored tokens only.
        adapters_last: The same of the adapters.
        down: Weights of an MLP's second half, which nothing needs when it is computed again.
        head: Weights of the head.
        layers: Decoder layers.
        width: Heads times their width.
        cache: Bytes of a token's keys and values.
        kept: Bytes of the weights as they are kept.
        full: Whether all weights are trained.
        checkpointing: Whether layers are computed again in the backward pass.
    """

    linear: int
    adapters: int
    last: int
    adapters_last: int
    down: int
    head: int
    layers: int
    width: int
    cache: int
    kept: int
    full: bool
    checkpointing: bool

    @classmethod
    def of(cls, made: Simulation, config: Any) -> Shape:
        """Read a model's numbers."""
        base = causal_lm(made.model)
        last = base.get_decoder().layers[-1]

        def count(module: nn.Module, *, lora: bool = False) -> int:
            return sum(
                layer.weight.numel()
                for name, layer in module.named_modules()
                if isinstance(layer, nn.Linear) and ("lora_" in name) == lora
            )

        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        of_cache = made.precision.mixed or made.precision.whole
        item = of_cache or next(base.get_decoder().layers[0].self_attn.k_proj.parameters()).dtype
        return cls(
            linear=count(base.get_decoder()),
            adapters=count(base.get_decoder(), lora=True),
            last=count(last.mlp) + count(last.self_attn.o_proj),
            adapters_last=count(last.mlp, lora=True) + count(last.self_attn.o_proj, lora=True),
            down=count(last.mlp.down_proj),
            head=base.get_output_embeddings().weight.numel(),
            layers=config.num_hidden_layers,
            width=heads * width,
            cache=2 * config.num_hidden_layers * config.num_key_value_heads * width * item.itemsize,
            kept=sum(made.weight_bytes()),
            full=made.policy.lora is None,
            checkpointing=made.policy.gradient_checkpointing,
        )

    def linear_flops(
        self, tokens: float, scored: float, per_weight: int, per_adapter: int = 2
    ) -> float:
        """Products of the linear layers: FLOPs for each weight and token, of base and adapters."""
        base = self.linear * tokens - self.last * (tokens - scored)
        adapters = self.adapters * tokens - self.adapters_last * (tokens - scored)
        return per_weight * base + per_adapter * adapters

    def forward(self, work: Work) -> float:
        """FLOPs of a pass without gradient."""
        return (
            self.linear_flops(work.tokens, work.scored, 2)
            + 4 * self.width * self.layers * work.seen
            + 2 * self.head * work.scored
        )

    def step(self, work: Work) -> float:
        """FLOPs of a forward and a backward pass.

        A frozen weight takes two products (forward, and back to its input), a trained one three;
        attention seven (two forward, and five back, as its scores are made again); the head two
        forward (its gradient is made there) and, trained, two more. Under checkpointing all layers
        but the last are computed once more.
        """
        again = (self.layers - 1) / self.layers if self.checkpointing else 0.0
        weights = self.linear_flops(work.tokens, work.scored, 6 if self.full else 4, 6)
        weights += again * self.linear_flops(work.tokens, work.tokens, 2)
        if self.full:  # an adapter on it needs what comes in, so that it is computed again
            weights -= again * 2 * self.down * self.layers * work.tokens
        attention = (7 + 2 * again) * 2 * self.width * self.layers * work.seen
        return weights + attention + (8 if self.full else 4) * self.head * work.scored


@dataclass(frozen=True)
class Work:
    """What a pass over a record computes.

    Attributes:
        tokens: Tokens, shared prompts once.
        scored: Tokens whose log-probability is wanted.
        seen: Pairs of a token and one that it attends to.
    """

    tokens: float
    scored: float
    seen: float

    @classmethod
    def of(cls, lengths: Lengths, sequences: Sequence[tuple[str, str]]) -> Work:
        """A record of expected lengths."""
        tokens = scored = seen = 0.0
        for context, responses in by_context(sequences).items():
            prompt = lengths.mean[context]
            answers = [lengths.mean_answers[response] for response in responses]
            tokens += prompt + sum(answers) - len(answers)  # no answer's last token is fed
            scored += sum(answers)
            seen += prompt * (prompt + 1) / 2
            seen += sum((a - 1) * prompt + (a - 1) * a / 2 for a in answers)
        return cls(tokens, scored, seen)

    def times(self, factor: float) -> Work:
        """The same for many records."""
        return Work(self.tokens * factor, self.scored * factor, self.seen * factor)


@dataclass(frozen=True)
class Epoch:
    """One epoch of an iteration.

    Attributes:
        name: Of its training.
        queries: Queries that get pairs.
        trained: Records that are trained on, each time counted.
        steps: Optimizer steps.
        sequences: Of its objective.
    """

    name: str
    queries: int
    trained: int
    steps: int
    sequences: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Rates:
    """What a device does.

    Attributes:
        tflops: Its peak, 1e12 products and sums a second; None if it is not known.
        bandwidth: Bytes that it reads a second.
        mfu: Share of the peak that scoring and training reach.
        devices: How many there are.
    """

    tflops: float | None = H100_TFLOPS
    bandwidth: float = H100_BANDWIDTH
    mfu: float = 0.4
    devices: int = 1

    def hours(self, flops: float) -> float | None:
        """Of products, on all devices."""
        if self.tflops is None:
            return None
        return flops / (self.mfu * self.tflops * 1e12 * self.devices) / 3600


@dataclass(frozen=True)
class Cost:
    """What a phase of an iteration takes.

    Attributes:
        tokens: Computed, shared prompts once; of sampling the new ones.
        flops: Products of all devices.
        hours: On the wall; None if the device's rates are not known.
    """

    tokens: float
    flops: float
    hours: float | None


def decoding_seconds(
    shape: Shape, lengths: Lengths, rates: Rates, rows: int, answers: int
) -> float:
    """Seconds in which a device decodes a shard.

    Slots are refilled until the last `rows` answers, which decode down to the longest of them.
    """
    context = sum(lengths.mean[c] for c in SAMPLED_FROM.values()) / len(SAMPLED_FROM)
    answer = sum(lengths.mean_answers.values()) / len(lengths.mean_answers)
    rows = min(rows, answers)
    reads = (shape.kept + rows * (context + answer / 2) * shape.cache) / (READS * rates.bandwidth)
    # the host prepares a step's kernels while the device runs those of the one before
    step = max(HOST * shape.layers, reads)
    return step * ((answers - rows) * answer / rows + max(lengths.answers.values()))


def costs(
    shape: Shape,
    lengths: Lengths,
    epochs: Sequence[Epoch],
    rates: Rates,
    *,
    rows: int | None,
    shard_size: int,
) -> dict[str, Cost]:
    """Costs of an iteration by phase.

    Args:
        shape: The model.
        lengths: Expected lengths.
        epochs: Of an iteration.
        rates: Of the devices.
        rows: Answers that a device decodes at the same time; None if it samples none.
        shard_size: Queries of a shard, which one device makes.
    """
    found: dict[str, Cost] = {}
    queries = sum(epoch.queries for epoch in epochs)
    if rows is not None:
        new = queries * sum(lengths.mean_answers[r] for r in SAMPLED_FROM)
        prompts = queries * sum(lengths.mean[c] for c in SAMPLED_FROM.values())
        seen = queries * sum(
            (lengths.mean[c] + lengths.mean_answers[r]) ** 2 / 2 for r, c in SAMPLED_FROM.items()
        )
        # every new token passes the head, of a prompt the last
        flops = shape.forward(Work(prompts + new, prompts + new, seen))
        flops -= 2 * shape.head * prompts
        hours = None
        if rates.tflops is not None:
            first = shape.linear_flops(prompts, prompts, 2)
            seconds = 3600 * (rates.hours(first) or 0.0)
            for epoch in epochs:
                shards = math.ceil(epoch.queries / shard_size)
                size = min(shard_size, epoch.queries) * len(SAMPLED_FROM)
                one = decoding_seconds(shape, lengths, rates, rows, size)
                seconds += math.ceil(shards / rates.devices) * one
            hours = seconds / 3600
        found["sampling"] = Cost(new, flops, hours)
    scored = Work.of(lengths, SCORED).times(queries)
    flops = shape.forward(scored)
    found["scoring"] = Cost(scored.tokens, flops, rates.hours(flops))
    for epoch in epochs:
        work = Work.of(lengths, epoch.sequences).times(epoch.trained)
        flops = shape.step(work)
        found[epoch.name] = Cost(work.tokens, flops, rates.hours(flops))
    return found
