"""Draw responses from a policy: what a sampler is, and the built-in one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sso_lightning.errors import InputError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """A prompt to be answered once.

    `seed` alone decides the randomness of the answer, whatever else is sampled beside it.
    """

    key: str
    prompt: list[int]
    seed: int
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Sample:
    """The answer to a request: token ids as emitted, the stop token included when it came."""

    key: str
    ids: list[int]
    finish: Literal["stop", "length"]


class Sampler(ABC):
    """An engine that answers requests with a policy."""

    engine: ClassVar[str]

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides the distribution that is sampled from, as plain JSON values."""

    @abstractmethod
    def sample(
        self,
        model: nn.Module,
        requests: Sequence[Request],
        *,
        stop_ids: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Sample]:
        """Answer all requests.

        Args:
            model: The policy.
            requests: What to answer.
            stop_ids: Tokens that end an answer.
            progress: Called as `progress(new_tokens, finished)` with the tokens made and the
                requests finished since its last call.

        Returns:
            One sample per request, in their order.
        """


class TransformersSampler(Sampler):
    """A decode loop over a transformers model, in batches that shrink as answers finish."""

    engine = "transformers"

    def __init__(
        self,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_rows: int = 32,
        max_tokens: int = 65536,
    ) -> None:
        """Check and keep the settings.

        Args:
            max_new_tokens: Most tokens of an answer, where the request does not say.
            temperature: Divides the logits; 0 takes the likeliest token.
            top_p: Keep the fewest likeliest tokens that hold this much probability; 1 keeps all.
            top_k: Keep this many of the likeliest tokens; 0 keeps all.
            max_rows: Most answers that grow at the same time.
            max_tokens: Most tokens whose keys and values are held at the same time.

        Raises:
            InputError: A setting is out of its range.
        """
        checks = {
            "max_new_tokens": (max_new_tokens >= 1, "at least 1"),
            "temperature": (temperature >= 0 and math.isfinite(temperature), "0 or more"),
            "top_p": (0 < top_p <= 1, "above 0 and at most 1"),
            "top_k": (top_k >= 0, "0 (off) or more"),
            "max_rows": (max_rows >= 1, "at least 1"),
            "max_tokens": (max_tokens >= 1, "at least 1"),
        }
        wrong = [f"{name} must be {what}" for name, (fine, what) in checks.items() if not fine]
        if wrong:
            raise InputError(f"sampler: {'; '.join(wrong)}")
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k
        self.max_rows = max_rows
        self.max_tokens = max_tokens

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide what is sampled (not those of speed)."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }

    def sample(
        self,
        model: nn.Module,
        requests: Sequence[Request],
        *,
        stop_ids: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Sample]:
        """Answer all requests; see `Sampler.sample`."""
        for request in requests:
            if not request.prompt:
                raise InputError(f"sampling: request {request.key!r} has an empty prompt")
            if self._limit(request) < 1:
                raise InputError(f"sampling: request {request.key!r} allows no new token")
        samples: dict[int, Sample] = {}
        with torch.no_grad(), _eval_mode(model):
            for batch in self._batches(requests):
                group = [requests[i] for i in batch]
                answers = self._sample_batch(model, group, frozenset(stop_ids), progress)
                samples.update(zip(batch, answers, strict=True))
        return [samples[i] for i in range(len(requests))]

    def _limit(self, request: Request) -> int:
        return self.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        cost = [len(r.prompt) + self._limit(r) for r in requests]
        batch: list[int] = []
        for index in sorted(range(len(requests)), key=lambda i: -cost[i]):
            full = batch and cost[batch[0]] * (len(batch) + 1) > self.max_tokens
            if full or len(batch) == self.max_rows:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _sample_batch(
        self,
        model: nn.Module,
        requests: list[Request],
        stop_ids: frozenset[int],
        progress: Progress | None,
    ) -> list[Sample]:
        device = next(model.parameters()).device
        width = max(len(r.prompt) for r in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        uniforms = [_uniforms(r.seed, self._limit(r)) for r in requests]
        answers: list[list[int]] = [[] for _ in requests]
        live = list(range(len(requests)))
        cache = None
        while live:
            out = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            draw = torch.stack([uniforms[i][len(answers[i])] for i in live]).to(device)
            tokens = pick_tokens(
                out.logits[:, -1], draw, self.temperature, self.top_p, self.top_k
            ).tolist()
            keep = []
            for row, (i, token) in enumerate(zip(live, tokens, strict=True)):
                answers[i].append(token)
                if token not in stop_ids and len(answers[i]) < self._limit(requests[i]):
                    keep.append(row)
            if progress:
                progress(len(live), len(live) - len(keep))
            if len(keep) < len(live):
                rows = torch.tensor(keep, dtype=torch.int64, device=device)
                if keep:
                    cache.batch_select_indices(rows)
                mask = mask[rows]
                live = [live[row] for row in keep]
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            ids = torch.tensor([answers[i][-1:] for i in live], device=device)
        return [
            Sample(r.key, ids, "stop" if ids[-1] in stop_ids else "length")
            for r, ids in zip(requests, answers, strict=True)
        ]


def _uniforms(seed: int, count: int) -> Tensor:
    """The uniform numbers [count] (float64) that pick a request's tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def pick_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, top_k: int
) -> Tensor:
    """Pick one token per row by inverting the distribution function at a uniform number.

    Args:
        logits: Next-token logits [rows, vocabulary].
        uniforms: Numbers in [0, 1), float64 [rows].
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Keep the fewest likeliest tokens that hold this much probability.
        top_k: Keep this many of the likeliest tokens; 0 keeps all.

    Returns:
        Token ids [rows].
    """
    if temperature == 0:
        return logits.argmax(-1)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    probs = (logits.to(wide) / temperature).softmax(-1)
    order = None
    if 0 < top_k < probs.shape[-1]:
        probs, order = probs.topk(top_k)
    if top_p < 1:
        if order is None:
            probs, order = probs.sort(descending=True, stable=True)
        probs = probs / probs.sum(-1, keepdim=True)
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill((before >= top_p), 0)  # before[0] is 0: one is always kept
    mass = probs.cumsum(-1)
    target = uniforms.to(wide)[:, None] * mass[:, -1:]
    # Rounding may put the target on the total: the last token of any probability is taken then.
    last = (probs > 0).long().mul(torch.arange(1, probs.shape[-1] + 1, device=probs.device))
    index = torch.searchsorted(mass, target, right=True)
    index = torch.minimum(index, last.amax(-1, keepdim=True) - 1)
    return (index if order is None else order.gather(-1, index)).squeeze(-1)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode and give each of its modules its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
