"""Draw responses from a policy: what a sampler is, and the built-in one.

The built-in sampler keeps a fixed number of slots. Waiting requests are prefilled together in one
flat row, a prompt that several of them share once; their keys and values go straight into the
slots, which were allocated before. Every step then decodes one token for all living slots. When an
answer ends, the last slot moves into its place and a waiting request is let in, so that no step is
spent on a finished row. Like the scoring pass it plugs into transformers through the registries of
attention and mask functions; other architectures run with transformers' own cache.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sso_lightning.errors import InputError
from sso_lightning.processes import Processes
from sso_lightning.sharding import causal_lm, is_sharded

SLOT_ARCHITECTURES = frozenset(
    {"gemma", "gemma3_text", "granite", "llama", "mistral", "qwen2", "qwen3"}
)
"""`config.model_type` of the architectures whose slots a test compares with `generate`."""

_IMPLEMENTATION = "sso_slots"
PREFILL_TOKENS = 4096
"""Most tokens of the prompts of one call, unless one prompt has more."""

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

    def hand_over(self, model: nn.Module, processes: Processes) -> None:  # noqa: B027
        """Give an engine outside of this process the policy's weights as they are now.

        Called on every process before a set is sampled; an engine in this process needs nothing.

        Args:
            model: The policy, whole, with the adapter active that is to write.
            processes: All processes of the run.
        """

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


class DrawingSampler(Sampler):
    """A sampler that draws tokens from the policy's distribution, or from its likelier part."""

    def __init__(
        self,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        checks: dict[str, tuple[bool, str]],
    ) -> None:
        """Check and keep the settings of the distribution; `checks` are the subclass's own.

        Raises:
            InputError: A setting is out of its range.
        """
        checks = {
            "max_new_tokens": (max_new_tokens >= 1, "at least 1"),
            "temperature": (temperature >= 0 and math.isfinite(temperature), "0 or more"),
            "top_p": (0 < top_p <= 1, "above 0 and at most 1"),
            "top_k": (top_k >= 0, "0 (off) or more"),
            **checks,
        }
        wrong = [f"{name} must be {what}" for name, (fine, what) in checks.items() if not fine]
        if wrong:
            raise InputError(f"sampler: {'; '.join(wrong)}")
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide what is sampled (not those of speed)."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }

    def limit(self, request: Request) -> int:
        """Most tokens of the answer to a request."""
        return self.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens

    def check(self, requests: Sequence[Request]) -> None:
        """Make sure that all requests can be answered.

        Raises:
            InputError: A prompt is empty, or no new token is allowed.
        """
        for request in requests:
            if not request.prompt:
                raise InputError(f"sampling: request {request.key!r} has an empty prompt")
            if self.limit(request) < 1:
                raise InputError(f"sampling: request {request.key!r} allows no new token")


class TransformersSampler(DrawingSampler):
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
            "max_rows": (max_rows >= 1, "at least 1"),
            "max_tokens": (max_tokens >= 1, "at least 1"),
        }
        super().__init__(max_new_tokens, temperature, top_p, top_k, checks)
        self.max_rows = max_rows
        self.max_tokens = max_tokens

    def sample(
        self,
        model: nn.Module,
        requests: Sequence[Request],
        *,
        stop_ids: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Sample]:
        """Answer all requests; see `Sampler.sample`."""
        self.check(requests)
        answers = [_Answer(request, self.limit(request)) for request in requests]
        if is_sharded(model):
            # PEFT's wrapper would go past the hooks by which it gathers its weights
            model = causal_lm(model)
        run = self._run_slots if _fits_slots(model) else self._run_cache
        with torch.no_grad(), eval_mode(model):
            run(model, answers, frozenset(stop_ids), progress or (lambda tokens, finished: None))
        return [answer.sample() for answer in answers]

    def _pick(self, live: list[_Answer], logits: Tensor, stop_ids: frozenset[int]) -> list[int]:
        """Extend each answer by a token [rows, vocabulary]; return the rows that are finished."""
        uniforms = torch.stack([answer.uniform() for answer in live]).to(logits.device)
        tokens = pick_tokens(logits, uniforms, self.temperature, self.top_p, self.top_k).tolist()
        return [row for row, token in enumerate(tokens) if live[row].extend(token, stop_ids)]

    def _run_slots(
        self, model: nn.Module, answers: list[_Answer], stop_ids: frozenset[int], progress: Progress
    ) -> None:
        """Answer in slots; see the module's docstring."""
        if not answers:
            return
        capacity = max(answer.cost for answer in answers)
        rows = max(1, min(self.max_rows, self.max_tokens // capacity, len(answers)))
        # Longest first, so that the end is not one long answer; equal prompts side by side.
        waiting = sorted(answers, key=lambda a: (a.cost, a.request.prompt))
        slots = _Slots(rows, capacity)
        live: list[_Answer] = []

        def step(old: int, logits: Tensor) -> None:
            """Use the logits of the slots from `old` on, then close the gaps."""
            finished = self._pick(live[old:], logits, stop_ids)
            progress(len(live) - old, len(finished))
            for row in sorted((old + row for row in finished), reverse=True):
                last = live.pop()
                if row < len(live):
                    slots.move(len(live), row, last.length)
                    live[row] = last

        with _attention(causal_lm(model).get_decoder().config):
            while live or waiting:
                old, tokens = len(live), 0
                while waiting and len(live) < rows:
                    prompt = waiting[-1].request.prompt
                    if len(live) == old or prompt != live[-1].request.prompt:
                        if tokens and tokens + len(prompt) > PREFILL_TOKENS:
                            break
                        tokens += len(prompt)
                    live.append(waiting.pop())
                if len(live) > old:
                    step(old, slots.prefill(model, [a.request.prompt for a in live[old:]], old))
                if live:
                    step(0, slots.decode(model, [(a.ids[-1], a.length) for a in live]))

    def _run_cache(
        self, model: nn.Module, answers: list[_Answer], stop_ids: frozenset[int], progress: Progress
    ) -> None:
        """Answer in left-padded batches over transformers' own cache, evicting finished rows."""
        device = next(model.parameters()).device
        waiting = sorted(answers, key=lambda a: a.cost)
        while waiting:
            rows = max(1, min(self.max_rows, self.max_tokens // waiting[-1].cost))
            live, waiting = waiting[-rows:][::-1], waiting[:-rows]
            width = max(len(a.request.prompt) for a in live)
            pads = torch.tensor([width - len(a.request.prompt) for a in live], device=device)
            ids = torch.tensor(
                [[0] * (width - len(a.request.prompt)) + a.request.prompt for a in live],
                device=device,
            )
            mask = (torch.arange(width, device=device) >= pads[:, None]).long()
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
                finished = self._pick(live, out.logits[:, -1], stop_ids)
                progress(len(live), len(finished))
                keep = [row for row in range(len(live)) if row not in finished]
                if finished and keep:
                    kept = torch.tensor(keep, device=device)
                    cache.batch_select_indices(kept)
                    mask = mask[kept]
                live = [live[row] for row in keep]
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                ids = torch.tensor([[answer.ids[-1]] for answer in live], device=device)


class _Answer:
    """An answer that grows."""

    def __init__(self, request: Request, limit: int) -> None:
        self.request, self.limit = request, limit
        self.cost = len(request.prompt) + limit  # most tokens it will ever hold
        self.ids: list[int] = []
        self.finish: Literal["stop", "length"] = "length"
        self._uniforms = _uniforms(request.seed, limit)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.request.prompt) + len(self.ids)

    def uniform(self) -> Tensor:
        """The number that picks the next token."""
        return self._uniforms[len(self.ids)]

    def extend(self, token: int, stop_ids: frozenset[int]) -> bool:
        """Take a token; tell whether it was the last."""
        self.ids.append(token)
        if token in stop_ids:
            self.finish = "stop"
        return token in stop_ids or len(self.ids) == self.limit

    def sample(self) -> Sample:
        """The finished answer."""
        return Sample(self.request.key, self.ids, self.finish)


class _Slots:
    """Keys and values [rows, key heads, capacity, head width] of every layer, and who sees what."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self._store: dict[int, tuple[Tensor, Tensor]] = {}
        self._prompts: list[tuple[int, list[int]]] | None = None  # of a prefill: length, slots
        self._lengths = torch.empty(0)  # of a decoding step, its new token included
        self._most = 0
        self._masks: dict[int | None, Tensor] = {}

    def prefill(self, model: nn.Module, prompts: list[list[int]], first: int) -> Tensor:
        """Fill the slots from `first` on; return the logits [prompts, vocabulary] that follow."""
        device = next(model.parameters()).device
        self._prompts, flat, ends, where = [], [], [], []
        for slot, prompt in enumerate(prompts, first):
            if slot == first or prompt != prompts[slot - first - 1]:
                self._prompts.append((len(prompt), []))
                flat.append(prompt)
                ends.append(sum(map(len, flat)) - 1)
            self._prompts[-1][1].append(slot)
            where.append(len(ends) - 1)
        out = cast(Any, model)(
            input_ids=torch.tensor([[i for prompt in flat for i in prompt]], device=device),
            position_ids=torch.tensor([[i for p in flat for i in range(len(p))]], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(ends, device=device),
            sso_slots=self,
        )
        return cast(Tensor, out.logits[0][torch.tensor(where, device=device)])

    def decode(self, model: nn.Module, last: list[tuple[int, int]]) -> Tensor:
        """Feed each slot its last token, given with the length it makes; return the logits."""
        device = next(model.parameters()).device
        ids, lengths = (torch.tensor(column, device=device) for column in zip(*last, strict=True))
        self._prompts, self._lengths, self._masks = None, lengths, {}
        self._most = max(length for _, length in last)
        out = cast(Any, model)(
            input_ids=ids[:, None],
            position_ids=lengths[:, None] - 1,
            use_cache=False,
            logits_to_keep=1,
            sso_slots=self,
        )
        return cast(Tensor, out.logits[:, -1])

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a slot's first `length` keys and values to another slot."""
        for store in self._store.values():
            for part in store:
                part[target, :, :length] = part[source, :, :length]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        """Store new keys and values and attend; arguments [batch, heads, tokens, head width]."""
        if layer not in self._store:
            shape = (self.rows, key.shape[1], self.capacity, key.shape[3])
            # zeros, because a masked NaN would still spoil the sum
            self._store[layer] = key.new_zeros(shape), value.new_zeros(shape)
        keys, values = self._store[layer]
        if self._prompts is not None:
            return self._attend_prompts(keys, values, query, key, value, scaling, window)
        rows, groups = len(query), query.shape[1] // key.shape[1]
        at = torch.arange(rows, device=query.device)
        keys[at, :, self._lengths - 1] = key[:, :, 0]
        values[at, :, self._lengths - 1] = value[:, :, 0]
        # The heads that share a key head are laid out as its queries: nothing is repeated.
        out = F.scaled_dot_product_attention(
            query.reshape(rows, -1, groups, query.shape[3]),
            keys[:rows, :, : self._most],
            values[:rows, :, : self._most],
            attn_mask=self._mask(window),
            scale=scaling,
        )
        return out.reshape(rows, 1, -1, query.shape[3])

    def _attend_prompts(
        self,
        keys: Tensor,
        values: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        outputs, start = [], 0
        for length, slots in self._prompts or ():
            q, k, v = (x[:, :, start : start + length] for x in (query, key, value))
            start += length
            keys[slots, :, :length] = k
            values[slots, :, :length] = v
            mask = None
            if window is not None and length > window:
                mask = torch.ones(length, length, dtype=torch.bool, device=q.device)
                mask = mask.tril().triu(1 - window)
            out = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
            outputs.append(out.transpose(1, 2))
        return torch.cat(outputs, 1)

    def _mask(self, window: int | None) -> Tensor:
        """Which keys [rows, 1, 1, most] each slot's new token sees."""
        if window not in self._masks:
            at = torch.arange(self._most, device=self._lengths.device)
            seen = at < self._lengths[:, None]
            if window is not None:
                seen &= at >= self._lengths[:, None] - window
            self._masks[window] = seen[:, None, None]
        return self._masks[window]


def rehearse(
    model: nn.Module, prompts: Sequence[int], rows: int, capacity: int
) -> list[tuple[Tensor, Tensor]]:
    """Prefill some slots, then let all decode a token: what `TransformersSampler` does at its most.

    For finding out what that takes, also with tensors without data; no token is picked.

    Args:
        model: The policy.
        prompts: Tokens of the prompts of one prefill.
        rows: Slots.
        capacity: Tokens of a slot.

    Returns:
        Keys and values of each layer.

    Raises:
        InputError: The architecture is not sampled in slots.
    """
    if not _fits_slots(model):
        kind = causal_lm(model).config.model_type
        raise InputError(f"the architecture {kind!r} is not sampled in slots")
    slots = _Slots(rows, capacity)
    with torch.no_grad(), eval_mode(model), _attention(causal_lm(model).get_decoder().config):
        # prompts that differ: equal neighbours would be computed once
        ids = [[number % 2] * length for number, length in enumerate(prompts)]
        _masses(slots.prefill(model, ids, 0))
        _masses(slots.decode(model, [(0, capacity)] * rows))
    return list(slots._store.values())


def _masses(logits: Tensor) -> None:
    """What `pick_tokens` holds at its most."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    (logits.to(wide) / 1.0).softmax(-1).cumsum(-1, dtype=torch.float64)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    sso_slots: _Slots,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over slots, as transformers' attention registry wants it."""
    layer = cast(int, module.layer_idx)
    return sso_slots.attend(layer, query, key, value, scaling, sliding_window), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """No mask: the slots know who sees whom."""


ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, _no_mask)


def _fits_slots(model: nn.Module) -> bool:
    config = getattr(causal_lm(model), "config", None)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    # these rotary embeddings depend on the longest row of a call
    varies = bool(kinds & {"dynamic", "longrope"})
    return getattr(config, "model_type", None) in SLOT_ARCHITECTURES and not varies


@contextmanager
def _attention(config: Any) -> Iterator[None]:
    """Let the attention modules of a model call `_attend`."""
    before = config._attn_implementation
    config._attn_implementation = _IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = before


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
    wide = torch.promote_types(logits.dtype, torch.float32)
    finest = torch.float32 if logits.device.type == "mps" else torch.float64
    probs = (logits.to(wide) / temperature).softmax(-1)
    order = None
    if 0 < top_k < probs.shape[-1]:
        probs, order = probs.topk(top_k)
        probs = probs / probs.sum(-1, keepdim=True)
    if top_p < 1:
        if order is None:
            probs, order = _likeliest(probs, top_p)
        before = probs.cumsum(-1, dtype=finest) - probs
        probs = probs.masked_fill(before >= top_p, 0)  # before[0] is 0: one is always kept
    mass = probs.cumsum(-1, dtype=finest)
    target = uniforms.to(finest)[:, None] * mass[:, -1:]
    index = torch.searchsorted(mass, target, right=True)
    # Rounding may put the target on the total: take the last token that adds to it then.
    last = torch.searchsorted(mass, mass[:, -1:].contiguous())
    index = torch.minimum(index, last)
    return (index if order is None else order.gather(-1, index)).squeeze(-1)


def _likeliest(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row, in order, that surely hold `top_p`; and their ids."""
    for count in (1024, probs.shape[-1]):
        top, order = probs.topk(min(count, probs.shape[-1]))
        if bool((top.sum(-1) > top_p + 1e-4).all()):
            break
    return top, order


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode and give each of its modules its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
