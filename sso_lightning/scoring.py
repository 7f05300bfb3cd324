"""Summed log-probabilities of responses that share prompts, at the price of one pass per prompt.

An SSO example scores six sequences made of three prompts with two responses each. Three things
keep that cheap, and none of them changes the result:

1. *Trees.* A prompt is computed once; its responses follow it in one flat row `[P, R1, R2]`, each
   with positions that go on from the prompt. `P, R1` is one causal attention call, and `R2` is a
   second one over the keys and values of `[P; R2]`. Trees are packed without any padding.
2. *Only what is scored.* The last layer's MLP, the final norm and the head run on the positions
   that predict a response token and on no other.
3. *A head in tiles.* `_HeadLogps` walks the logits in tiles of a few megabytes, as flash attention
   walks its scores. `[tokens, vocabulary]` of anything is only ever held where that is small.

The tree pass plugs into transformers through its registries of attention and mask functions; the
model's own decoder code runs. Architectures that are not proven equal by a test are scored as
plain padded rows instead, and a warning says so once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, NamedTuple, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sso_lightning.errors import InputError
from sso_lightning.sharding import causal_lm, is_sharded

PROVEN = frozenset(
    {"gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "qwen2", "qwen3"}
)
"""`config.model_type` of the architectures whose tree pass a test compares with plain forwards."""

_IMPLEMENTATION = "sso_trees"
# On a CPU small passes and tiles stay in the cache; a GPU wants few large launches.
_CPU_PASS_TOKENS = 1024
_TILE_BYTES = {"cpu": 2 << 20}
_GPU_TILE_BYTES = 64 << 20
# A trained head's probabilities are kept for the backward pass if all of them fit in here.
_KEPT_BYTES = 192 << 20


_planned: str | None = None


@contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """Take the passes, tiles and kernels of another kind of device (`cpu`, `cuda`).

    For tensors without data only: that device's kernel is taken to work.
    """
    global _planned
    before, _planned = _planned, kind
    try:
        yield
    finally:
        _planned = before


@dataclass(frozen=True)
class Tree:
    """One prompt and the responses that continue it, as token ids."""

    prompt: list[int]
    responses: list[list[int]]

    @property
    def tokens(self) -> int:
        """Tokens that a pass computes: no response's last one, and nothing if there is none."""
        lengths = [len(response) for response in self.responses if response]
        return len(self.prompt) + sum(lengths) - len(lengths) if lengths else 0


@overload
def response_logps(
    model: nn.Module,
    trees: Sequence[Tree],
    *,
    max_tokens: int | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def response_logps(
    model: nn.Module,
    trees: Sequence[Tree],
    *,
    max_tokens: int | None = None,
    chunk_bytes: int | None = None,
    entropy: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def response_logps(
    model: nn.Module,
    trees: Sequence[Tree],
    *,
    max_tokens: int | None = None,
    chunk_bytes: int | None = None,
    entropy: bool = False,
) -> tuple[Tensor, ...]:
    """Score every response given its prompt.

    The true mean log-probability of a response is `logps / lengths`. The model's train or eval mode
    decides about dropout and gradient checkpointing as always, and is left as it is.

    Args:
        model: A transformers causal language model, wrapped by PEFT or not.
        trees: Prompts with their responses.
        max_tokens: Most tokens that one forward pass of the decoder takes; a larger tree gets a
            pass of its own. By default what is fastest: about a thousand on a CPU, everything in
            one pass on a GPU. It does not change how much a backward pass has to hold.
        chunk_bytes: Size of the block of logits that is held at a time (float32). By default 2 MiB
            on a CPU and 64 MiB elsewhere.
        entropy: Return the summed entropies of the next-token distributions as well.

    Returns:
        `(logps, lengths)` over all responses of all trees, in order: summed log-probabilities in
        nats (float64 where the device has it, differentiable) and numbers of tokens (int64). With
        `entropy`, a third tensor: entropies in nats summed over each response, without gradient.

    Raises:
        InputError: A prompt is empty, so that nothing predicts the first token of its responses.
    """
    tokens, entropies, owners = _score(model, trees, max_tokens, chunk_bytes, entropy)
    lengths = [len(response) for tree in trees for response in tree.responses]

    def per_response(values: Tensor) -> Tensor:
        zeros = torch.zeros(len(lengths), dtype=_finest(values.device), device=values.device)
        return zeros.index_add(0, owners, values.to(zeros.dtype))

    counts = torch.tensor(lengths, dtype=torch.int64, device=owners.device)
    if entropy:
        return per_response(tokens), counts, per_response(entropies)
    return per_response(tokens), counts


def token_logps(
    model: nn.Module,
    trees: Sequence[Tree],
    *,
    max_tokens: int | None = None,
    chunk_bytes: int | None = None,
) -> list[Tensor]:
    """Log-probability of every token of every response, nats.

    Args:
        model: As for `response_logps`, whose results are the sums of these.
        trees: See there.
        max_tokens: See there.
        chunk_bytes: See there.

    Returns:
        For each response of all trees, in order, a differentiable tensor [its tokens].

    Raises:
        InputError: A prompt is empty.
    """
    tokens, _, owners = _score(model, trees, max_tokens, chunk_bytes, False)
    lengths = [len(response) for tree in trees for response in tree.responses]
    # plain rows are scored longest first
    ordered = tokens[owners.argsort(stable=True)].to(_finest(tokens.device))
    return list(torch.split(ordered, lengths))


def shares_prompts(model: nn.Module) -> bool:
    """Whether trees can be computed as such; if not, a warning says once why."""
    reason = _why_not_trees(model, causal_lm(model))
    if reason:
        _say_once(reason)
    return not reason


def response_rewards(
    model: nn.Module, trees: Sequence[Tree], *, max_tokens: int | None = None
) -> Tensor:
    """Reward of every response, read at its last token.

    Args:
        model: A sequence classifier with one label that `shares_prompts`, wrapped by PEFT or not.
        trees: Prompts, which may be empty, with their responses, which may not.
        max_tokens: As for `response_logps`.

    Returns:
        Rewards of all responses of all trees, in order [responses]; at least float32,
        differentiable.
    """
    root = causal_lm(model)
    sharded = is_sharded(root)
    if sharded:
        max_tokens = None  # all processes gather each layer equally often
    elif max_tokens is None and next(model.parameters()).device.type == "cpu":
        max_tokens = _CPU_PASS_TOKENS
    # a row leaves the last token of a response out: here it is needed, so another one is last
    ended = [Tree(tree.prompt, [[*r, 0] for r in tree.responses]) for tree in trees]
    run = partial(_reward_trees, root, list(_passes(ended, max_tokens)))
    return cast(Tensor, _as_forward(root, run) if sharded else run())


def _reward_trees(root: Any, groups: Sequence[Sequence[tuple[Tree, int]]]) -> Tensor:
    device = next(root.parameters()).device
    rows = [_Row(group, device, ends=True) for group in groups]
    rewards = root.score(torch.cat(_hidden_of(root, rows))).squeeze(-1)
    return cast(Tensor, rewards.to(torch.promote_types(rewards.dtype, torch.float32)))


def _finest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _score(
    model: nn.Module,
    trees: Sequence[Tree],
    max_tokens: int | None,
    chunk_bytes: int | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy (0 unless asked for) and response index of every scored token."""
    for index, tree in enumerate(trees):
        if not tree.prompt:
            raise InputError(f"scoring: the prompt of tree {index} has no tokens; give it one")
    root = causal_lm(model)
    sharded, device = is_sharded(root), next(model.parameters()).device
    in_step = sharded and torch.is_grad_enabled()  # all processes gather each layer equally often
    reason = _why_not_trees(model, root)
    if reason:
        _say_once(reason)
        return _score_rows(root if sharded else model, trees, None if in_step else max_tokens)
    kind = _planned or device.type
    tile_bytes = chunk_bytes or _TILE_BYTES.get(kind, _GPU_TILE_BYTES)
    if max_tokens is None and kind == "cpu":
        max_tokens = _CPU_PASS_TOKENS
    if in_step:
        max_tokens = None
    groups = list(_passes(trees, max_tokens))
    if not groups:
        nothing = torch.zeros(0, device=device)
        return nothing, nothing, torch.zeros(0, dtype=torch.int64, device=device)
    if not sharded and torch.is_grad_enabled():
        return _score_trees(root, groups, tile_bytes, entropy)
    # without gradient nothing of a pass is needed after it, and a set may be large
    calls = [partial(_score_trees, root, [group], tile_bytes, entropy) for group in groups]
    parts = [_as_forward(root, call) if sharded else call() for call in calls]
    tokens, entropies, owners = (torch.cat(column) for column in zip(*parts, strict=True))
    return tokens, entropies, owners


def _as_forward(root: Any, run: Callable[[], Any]) -> Any:
    """Run something as the model's forward call, around which a sharded model gathers its root."""
    with _attribute(root, "forward", run):
        return root()


def _why_not_trees(model: nn.Module, root: Any) -> str | None:
    """Name the reason why a model must be scored as plain rows, if there is one."""
    config = getattr(root, "config", None)
    kind = getattr(config, "model_type", type(root).__name__)
    if kind not in PROVEN:
        return f"the architecture {kind!r} is not proven for shared prompts"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "soft prompts come before every row"
    if getattr(config, "use_bidirectional_attention", False):
        return "attention is bidirectional"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if kinds & {"dynamic", "longrope"}:
        return "its rotary embedding depends on the longest row of a pass"
    return None


@cache
def _say_once(reason: str) -> None:
    logging.getLogger(__name__).warning("scoring plain padded rows, which is slower: %s", reason)


# ---------------------------------------------------------------------------------------------
# Trees in a flat row
# ---------------------------------------------------------------------------------------------


class _Segment(NamedTuple):
    """Neighbouring tokens of a row that attend in one call.

    They see themselves, causally, and all of a prompt elsewhere in the row (length 0: none).
    """

    start: int
    length: int
    prompt_start: int
    prompt_length: int


class _Row:
    """Trees laid out one after another: `[P, R1, R2, ...]` each, without padding.

    A response's last token predicts nothing that is scored, so it is left out.
    """

    def __init__(
        self, trees: Sequence[tuple[Tree, int]], device: torch.device, *, ends: bool = False
    ) -> None:
        """Lay out trees, each with the index of its first response among all responses.

        With `ends`, the one scored position of a response is the last before its last token.
        """
        ids: list[int] = []
        positions: list[int] = []
        scored: list[int] = []
        targets: list[int] = []
        owners: list[int] = []
        self.segments: list[_Segment] = []
        for tree, first in trees:
            start, width = len(ids), len(tree.prompt)
            ids += tree.prompt
            positions += range(width)
            pending = width  # the prompt joins the first response's segment
            for offset, response in enumerate(tree.responses):
                if not response:
                    continue
                begin = len(ids)
                ids += response[:-1]
                positions += range(width, width + len(response) - 1)
                predicting = [start + width - 1, *range(begin, len(ids))]
                kept = slice(-1 if ends else 0, None)
                scored += predicting[kept]
                targets += response[kept]
                owners += [first + offset] * len(response[kept])
                if pending:
                    self.segments.append(_Segment(start, width + len(response) - 1, 0, 0))
                elif len(response) > 1:
                    self.segments.append(_Segment(begin, len(response) - 1, start, width))
                pending = 0
        self.device = device
        self.ids = torch.tensor(ids, device=device)
        self.positions = torch.tensor(positions, device=device)
        self.scored = torch.tensor(scored, device=device)
        self.targets = torch.tensor(targets, device=device)
        self.owners = torch.tensor(owners, device=device)
        self._masks: dict[tuple[_Segment, int | None], Tensor | None] = {}
        self._varlen: tuple[Tensor, Tensor, Tensor, int, int] | None = None

    def mask(self, segment: _Segment, window: int | None) -> Tensor | None:
        """Which keys [prompt + own] each query may see, or None for plain causal attention."""
        if (segment, window) not in self._masks:
            keys = torch.arange(segment.prompt_length + segment.length, device=self.device)
            queries = keys[segment.prompt_length :, None]
            seen = keys <= queries
            narrow = window is not None and len(keys) > window
            if window is not None and narrow:
                seen &= keys > queries - window
            plain = not segment.prompt_length and not narrow
            self._masks[segment, window] = None if plain else seen
        return self._masks[segment, window]

    def varlen(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Describe the segments to a variable-length kernel.

        Returns:
            Row indices of all keys, segment by segment; cumulated numbers of queries and of keys
            (int32, segments + 1); most queries and most keys of a segment.
        """
        if self._varlen is None:
            keys = [
                i
                for s in self.segments
                for part in (
                    range(s.prompt_start, s.prompt_start + s.prompt_length),
                    range(s.start, s.start + s.length),
                )
                for i in part
            ]
            sizes = [(s.length, s.prompt_length + s.length) for s in self.segments]
            ends = torch.tensor([(0, 0), *sizes]).cumsum(0).to(torch.int32).to(self.device)
            most = map(max, zip(*sizes, strict=True))
            index = torch.tensor(keys, device=self.device)
            self._varlen = (index, ends[:, 0].contiguous(), ends[:, 1].contiguous(), *most)
        return self._varlen


def _score_trees(
    root: Any,
    groups: Sequence[Sequence[tuple[Tree, int]]],
    tile_bytes: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_score` returns, by a pass of the decoder per group of trees."""
    rows = [_Row(group, next(root.parameters()).device) for group in groups]
    hidden = _hidden_of(root, rows)
    targets = torch.cat([row.targets for row in rows])
    tokens, entropies = _head_logps(root, torch.cat(hidden), targets, tile_bytes, entropy)
    return tokens, entropies, torch.cat([row.owners for row in rows])


def _passes(trees: Sequence[Tree], max_tokens: int | None) -> Iterator[list[tuple[Tree, int]]]:
    """Neighbouring trees, with their first response's index, in groups of `max_tokens`."""
    group: list[tuple[Tree, int]] = []
    tokens = first = 0
    for tree in trees:
        if tree.tokens:
            if group and max_tokens and tokens + tree.tokens > max_tokens:
                yield group
                group, tokens = [], 0
            group.append((tree, first))
            tokens += tree.tokens
        first += len(tree.responses)
    if group:
        yield group


def _hidden_of(root: Any, rows: Sequence[_Row]) -> list[Tensor]:
    """The decoder's normed output [scored, width] of each row."""
    # One embedding for all passes: each call would make a gradient as large as the table.
    embeds = root.get_input_embeddings()(torch.cat([row.ids for row in rows])[None])
    parts = embeds.split([len(row.ids) for row in rows], 1)
    return [_scored_hidden(root, part, row) for part, row in zip(parts, rows, strict=True)]


def _scored_hidden(root: Any, embeds: Tensor, row: _Row) -> Tensor:
    """Run the decoder over one row and return its normed output [scored, width]."""
    decoder = root.get_decoder()
    with _tree_pass(decoder, row):
        out = decoder(
            inputs_embeds=embeds,
            position_ids=row.positions[None],
            use_cache=False,
            sso_row=row,
        )
    return cast(Tensor, out.last_hidden_state[0])


@contextmanager
def _tree_attention(config: Any) -> Iterator[None]:
    """Let the attention modules of a model call `_attend`."""
    before = config._attn_implementation
    config._attn_implementation = _IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def _tree_pass(decoder: Any, row: _Row) -> Iterator[None]:
    """Prepare a decoder for one call on a row of trees, and put everything back afterwards."""
    last = decoder.layers[-1]
    whole: list[Tensor] = []

    def keep_whole(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        whole.append(args[0])
        return (args[0][:, row.scored], *args[1:])

    def again(original: Callable[..., Any]) -> Callable[..., Any]:
        # Gradient checkpointing calls a layer once more when this pass is long over.
        def checkpointed(layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                with _tree_attention(decoder.config):
                    return layer(*args, **kwargs)

            return original(run, *args, **kwargs)

        return checkpointed

    # Autocast casts weights only once, so that a repetition would miss the products kept.
    lean_fits = torch.is_grad_enabled() and not torch.is_autocast_enabled(row.device.type)
    with ExitStack() as stack:
        stack.enter_context(_tree_attention(decoder.config))
        # The last layer's residual stream holds scored positions only, while its attention still
        # reads all of them: its first norm is given the whole row, its output projection a part.
        for hook in (
            last.register_forward_pre_hook(keep_whole),
            last.input_layernorm.register_forward_pre_hook(lambda module, args: (whole.pop(),)),
            last.self_attn.o_proj.register_forward_pre_hook(
                lambda module, args: (args[0][:, row.scored],)
            ),
        ):
            stack.callback(hook.remove)
        for layer in decoder.layers:
            if layer.gradient_checkpointing and layer is not last:
                stack.enter_context(
                    _attribute(
                        layer,
                        "_gradient_checkpointing_func",
                        again(layer._gradient_checkpointing_func),
                    )
                )
            elif lean_fits and all(p.is_floating_point() for p in layer.mlp.parameters()):
                lean = partial(
                    checkpoint, layer.mlp.forward, use_reentrant=False, context_fn=_lean_contexts
                )
                stack.enter_context(_attribute(layer.mlp, "forward", lean))
        # The hooks above are gone when a checkpoint would run the last layer again.
        stack.enter_context(_attribute(last, "gradient_checkpointing", False))
        yield


def _lean_contexts() -> Any:
    """Keep an MLP's matrix products for the backward pass, and make the rest anew.

    The activation and its product with the gate are cheap to repeat and half of what an MLP holds.
    """
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op in products
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return cast(Any, create_selective_checkpoint_contexts)(policy)


@contextmanager
def _attribute(owner: Any, name: str, value: object) -> Iterator[None]:
    """Set an instance attribute for a while."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    sso_row: _Row,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a row of trees, as transformers' attention registry wants it.

    Args:
        module: The attention module.
        query: [1, heads, tokens, head width].
        key: [1, key heads, tokens, head width]; `value` likewise.
        value: See `key`.
        attention_mask: Always None, because `_no_mask` makes it.
        sso_row: Where the trees of the row are.
        scaling: Factor of the scores.
        dropout: Probability of dropping an attention weight.
        sliding_window: Most keys a query sees, itself included.
        softcap: Bound of the scores (Gemma 2).
        kwargs: What some models pass on and no proven one needs.

    Returns:
        Output [1, tokens, heads, head width], and None for the weights.
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    kind = _planned or query.device.type
    if kind == "cuda" and half and not softcap and not dropout:
        shape = query.shape[1], key.shape[1], query.shape[3]
        if _planned or _varlen_agrees(query.device, query.dtype, *shape):
            return _attend_varlen(query, key, value, sso_row, scaling, sliding_window), None
    out = _attend_segments(query, key, value, sso_row, scaling, sliding_window, softcap, dropout)
    return out, None


def _attend_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: _Row,
    scaling: float | None,
    window: int | None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """One call of plain attention per segment; arguments and result as `_attend` has them."""
    sizes = [segment.length for segment in row.segments]
    parts = zip(*(torch.split(x, sizes, 2) for x in (query, key, value)), strict=True)
    prompt_at: dict[int, tuple[Tensor, Tensor]] = {}
    outputs = []
    for segment, (q, k, v) in zip(row.segments, parts, strict=True):
        if segment.prompt_length:
            prompt_k, prompt_v = prompt_at[segment.prompt_start]
            k = torch.cat([prompt_k[:, :, : segment.prompt_length], k], 2)
            v = torch.cat([prompt_v[:, :, : segment.prompt_length], v], 2)
        else:
            prompt_at[segment.start] = k, v
        mask = row.mask(segment, window)
        if softcap:
            out = _capped_attention(q, k, v, mask, scaling, softcap, dropout)
        else:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, 1)


@cache
def _varlen_agrees(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int
) -> bool:
    """Whether the kernel gives what plain attention gives here, forward and backward.

    No GPU has run the kernel for this project yet, so every process proves it on two small trees
    before it is used; where it fails or differs, plain attention is used and a warning says so.
    """
    trees = [Tree([0] * 5, [[0] * 4, [0] * 7]), Tree([0] * 3, [[0] * 6, [0] * 2])]
    row = _Row([(trees[0], 0), (trees[1], 2)], device)
    random = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        values = torch.randn(1, count, len(row.ids), width, generator=random)
        return values.to(device, dtype)

    parts = draw(heads), draw(key_heads), draw(key_heads)
    slope = draw(heads).transpose(1, 2)

    def run(attend: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in parts]
        with torch.enable_grad():
            out = attend(*leaves, row, width**-0.5, None)
            return [out.detach(), *torch.autograd.grad(out, leaves, slope)]

    try:
        pairs = zip(run(_attend_varlen), run(_attend_segments), strict=True)
        worst = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        reason = "" if worst < 0.03 else f"it differs by {worst:.1%}"
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
    if reason:
        log = logging.getLogger(__name__)
        log.warning("scoring without the variable-length attention kernel: %s", reason)
    return not reason


def _capped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float,
    dropout: float,
) -> Tensor:
    """Attention with `softcap * tanh(scores / softcap)`, which no fused CPU kernel has."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    # float32 even in a float64 model, as in transformers' own attention
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
    return F.dropout(weights.to(q.dtype), dropout) @ v


def _attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: _Row,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """All segments in one kernel call.

    Not yet run on a GPU: the segments it describes are tested against an emulation of the kernel's
    documented meaning (causal from the lower right corner); `_varlen_agrees` guards its use.
    """
    from torch.nn.attention.varlen import varlen_attn

    index, query_ends, key_ends, most_queries, most_keys = row.varlen()
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1)[index],
        value[0].transpose(0, 1)[index],
        query_ends,
        key_ends,
        most_queries,
        most_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast(Tensor, out)[None]


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """No mask: `_attend` knows who sees whom."""


ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, _no_mask)


# ---------------------------------------------------------------------------------------------
# The head
# ---------------------------------------------------------------------------------------------


def _head_logps(
    root: Any, hidden: Tensor, targets: Tensor, tile_bytes: int, entropy: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets, and entropies (0 unless asked for), both [scored].

    Args:
        root: Owner of the head and of its scaling and soft cap.
        hidden: Normed decoder output [scored, width].
        targets: Token ids [scored].
        tile_bytes: Size of the largest block of float32 logits.
        entropy: Whether entropies are wanted.
    """
    config, head = root.config, root.get_output_embeddings()
    cap = getattr(config, "final_logit_softcapping", None)
    hidden = hidden / getattr(config, "logits_scaling", 1.0)
    if type(head) is nn.Linear and head.bias is None:
        weight = head.weight
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        with torch.autocast(kind, enabled=False):
            out = _HeadLogps.apply(hidden, weight, targets, cap, tile_bytes, entropy)
        return cast("tuple[Tensor, Tensor]", out)

    # A head with an adapter, a bias or quantised weights: recompute each chunk through the module.
    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden)
        logits = _soft_cap(logits.to(torch.promote_types(logits.dtype, torch.float32)), cap)
        logps = logits.log_softmax(-1)
        ent = -(logps.exp() * logps).sum(-1) if entropy else logps.new_zeros(len(logps))
        return logps.gather(-1, targets[:, None]).squeeze(-1), ent.detach()

    rows = max(1, tile_bytes // (4 * config.vocab_size))
    parts = [
        checkpoint(chunk, h, t, use_reentrant=False)
        for h, t in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else torch.tanh(logits / cap) * cap


class _HeadLogps(torch.autograd.Function):
    """`log_softmax(cap(hidden @ weight.T))` at the targets, in tiles.

    With `z = h W^T`, `l = cap tanh(z / cap)` (or `l = z`) and `p = softmax(l)`:

        d logp / d h = l'_y W_y - sum_v p_v l'_v W_v        with l' = 1 - (l / cap)^2
        d logp / d W = (l'_y onehot(y) - p l')^T h

    The sum in the first line is a running, rescaled one, as in flash attention, so it is made in
    the forward pass and only scaled in the backward pass: under a frozen head nothing is computed
    twice. A trained head needs every tile once more, because its gradient mixes all positions;
    tiles are kept, each relative to the peak of its time, or computed again where they are many.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        cap: float | None,
        tile_bytes: int,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        finest = torch.float32 if hidden.device.type == "mps" else torch.float64
        rows, columns = _tile_shape(len(hidden), len(weight), tile_bytes)
        picked = (hidden * weight[targets]).sum(-1, dtype=wide)
        picked = _soft_cap(picked, cap)
        logps = torch.empty(len(hidden), dtype=finest, device=hidden.device)
        entropies = torch.zeros_like(logps)
        log_sums = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        expected = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        size = len(hidden) * len(weight) * weight.element_size()
        keeps = ctx.needs_input_grad[1] and size <= _KEPT_BYTES
        tiles: list[Tensor] = []  # row by row: probabilities, and the peak they are relative to
        for at in _slices(len(hidden), rows):
            h = hidden[at]
            peak = torch.full((len(h), 1), -torch.inf, dtype=wide, device=h.device)
            mass = torch.zeros(len(h), 1, dtype=finest, device=h.device)
            mean = torch.zeros_like(mass)  # of the logits
            direction = torch.zeros_like(h, dtype=wide)  # of the sum over v above
            for w in torch.split(weight, columns):
                logits = _soft_cap((h @ w.T).to(wide), cap)
                higher = torch.maximum(peak, logits.amax(-1, keepdim=True))
                shrink = (peak - higher).exp_()
                peak = higher
                slope = None if cap is None else 1 - (logits / cap).square_()
                whole = logits.clone() if entropy else None
                p = logits.sub_(peak).exp_()
                mass = mass * shrink + p.sum(-1, keepdim=True)
                if whole is not None:
                    mean = mean * shrink + whole.mul_(p).sum(-1, keepdim=True)
                if expected is not None or keeps:
                    p = (p if slope is None else p.mul_(slope)).to(w.dtype)
                if expected is not None:
                    direction = direction.mul_(shrink).add_(p @ w)
                if keeps:
                    tiles += p, peak
            log_sum = peak.to(finest) + mass.log()
            log_sums[at] = log_sum.squeeze(-1).to(wide)
            logps[at] = picked[at].to(finest) - log_sum.squeeze(-1)
            if entropy:
                entropies[at] = (log_sum - mean / mass).squeeze(-1)
            if expected is not None:
                expected[at] = (direction / mass).to(expected.dtype)
        ctx.save_for_backward(hidden, weight, targets, picked, log_sums, expected, *tiles)
        ctx.cap, ctx.tile = cap, (rows, columns)
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, picked, log_sums, expected, *tiles = ctx.saved_tensors
        cap, (rows, columns) = ctx.cap, ctx.tile
        grad = grad.to(log_sums.dtype)[:, None]
        own = 1.0 if cap is None else 1 - (picked / cap).square()[:, None]
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (grad * (own * weight[targets] - expected)).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            scaled = (-grad * hidden).to(hidden.dtype)  # [scored, width]
            grad_weight = torch.empty_like(weight)
            columns_at = _slices(len(weight), columns)
            for column, where in enumerate(columns_at):
                w = weight[where]
                tile_grad = torch.zeros_like(w, dtype=log_sums.dtype)
                for row, at in enumerate(_slices(len(hidden), rows)):
                    factor = scaled[at]
                    if tiles:
                        p, peak = tiles[2 * (row * len(columns_at) + column) :][:2]
                        factor = factor * (peak - log_sums[at][:, None]).exp_().to(factor.dtype)
                    else:
                        logits = _soft_cap((hidden[at] @ w.T).to(log_sums.dtype), cap)
                        slope = None if cap is None else 1 - (logits / cap).square_()
                        p = logits.sub_(log_sums[at][:, None]).exp_()
                        p = (p if slope is None else p.mul_(slope)).to(w.dtype)
                    if p.dtype == tile_grad.dtype:
                        torch.addmm(tile_grad, p.T, factor, out=tile_grad)
                    else:
                        tile_grad += p.T @ factor
                grad_weight[where] = tile_grad
            grad_weight.index_add_(0, targets, (-own * scaled).to(grad_weight.dtype))
        return grad_hidden, grad_weight, None, None, None, None


def _tile_shape(rows: int, columns: int, tile_bytes: int) -> tuple[int, int]:
    """Rows and columns of a float32 tile: four times as wide as high, to reuse what is loaded."""
    height = max(1, int((tile_bytes / 16) ** 0.5))
    return min(rows, height), min(columns, max(1, tile_bytes // (4 * min(rows, height))))


def _slices(total: int, step: int) -> list[slice]:
    return [slice(begin, begin + step) for begin in range(0, total, step)]


# ---------------------------------------------------------------------------------------------
# Plain rows
# ---------------------------------------------------------------------------------------------


def _score_rows(
    model: nn.Module, trees: Sequence[Tree], max_tokens: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and response index of every scored token, by padded forwards."""
    device = next(model.parameters()).device
    rows = [(tree.prompt, response) for tree in trees for response in tree.responses]
    widths = [len(p) + len(r) for p, r in rows]
    nothing = torch.zeros(0, device=device)
    parts = [(nothing, nothing, torch.zeros(0, dtype=torch.int64, device=device))]
    for batch in _batches(widths, max_tokens):
        width = widths[batch[0]]
        first = min(len(rows[i][0]) for i in batch) - 1  # the earliest prediction of a response
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        real, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for line, i in enumerate(batch):
            prompt, response = rows[i]
            ids[line, : widths[i]] = torch.tensor(prompt + response)
            real[line, : widths[i]] = 1
            scored[line, len(prompt) : widths[i]] = True
        ids, real = ids.to(device), real.to(device)
        logits = model(
            input_ids=ids, attention_mask=real, use_cache=False, logits_to_keep=width - first
        ).logits
        at = scored.to(device)[:, first + 1 :]
        logits = logits[:, :-1][at]
        logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        entropies = -(logps.detach().exp() * logps.detach()).sum(-1)
        owners = torch.tensor(batch, device=device).repeat_interleave(at.sum(-1))
        targets = ids[:, first + 1 :][at]
        parts.append((logps.gather(-1, targets[:, None]).squeeze(-1), entropies, owners))
    tokens, entropies, owners = (torch.cat(column) for column in zip(*parts, strict=True))
    return tokens, entropies, owners


def _batches(widths: Sequence[int], max_tokens: int | None) -> Iterator[list[int]]:
    """Indices, longest first, grouped so that a padded group holds at most `max_tokens`."""
    batch: list[int] = []
    for index in sorted(range(len(widths)), key=lambda i: -widths[i]):
        if batch and max_tokens and widths[batch[0]] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
