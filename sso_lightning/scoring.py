"""Summed log-probabilities of responses, several of which may share one prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sso_lightning.errors import InputError


@dataclass(frozen=True)
class Tree:
    """One prompt and the responses that continue it, as token ids."""

    prompt: list[int]
    responses: list[list[int]]


def response_logps(
    model: nn.Module,
    trees: Sequence[Tree],
    *,
    max_tokens: int | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Score every response given its prompt.

    Args:
        model: Any transformers causal language model, wrapped by PEFT or not. Train or eval mode
            is left as it is.
        trees: Prompts with their responses.
        max_tokens: Most tokens (padding included) of one forward call; no limit by default. A
            longer single row gets a call of its own.
        chunk_bytes: Size of the largest block of logits that is held at once.

    Returns:
        `(logps, lengths)` over all responses of all trees, in order: summed log-probabilities in
        nats (float64 where the device has it, differentiable) and numbers of tokens (int64).

    Raises:
        InputError: A prompt is empty, so its response's first token has nothing to follow.
    """
    rows = [(tree.prompt, response) for tree in trees for response in tree.responses]
    if any(not prompt for prompt, _ in rows):
        raise InputError("scoring: a prompt has no tokens; give each prompt at least one")
    device = next(model.parameters()).device
    lengths = torch.tensor([len(r) for _, r in rows], dtype=torch.int64, device=device)
    logps: list[Tensor] = [torch.zeros((), device=device)] * len(rows)
    for batch in _batches([len(p) + len(r) for p, r in rows], max_tokens):
        for index, logp in zip(batch, _plain_rows(model, [rows[i] for i in batch]), strict=True):
            logps[index] = logp
    return torch.stack(logps) if logps else torch.zeros(0, device=device), lengths


def _batches(lengths: Sequence[int], max_tokens: int | None) -> Iterator[list[int]]:
    """Indices grouped by length so that each padded group holds at most `max_tokens`."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and max_tokens and lengths[batch[0]] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _plain_rows(model: nn.Module, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """Summed log-probabilities [rows] by one right-padded forward."""
    device = next(model.parameters()).device
    width = max(len(p) + len(r) for p, r in rows)
    first = min(len(p) for p, _ in rows) - 1  # predicts the first response token of any row
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    real = torch.zeros_like(ids)
    scored = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (prompt, response) in enumerate(rows):
        total = len(prompt) + len(response)
        ids[i, :total] = torch.tensor(prompt + response)
        real[i, :total] = 1
        scored[i, len(prompt) : total] = True
    ids, real, scored = ids.to(device), real.to(device), scored.to(device)
    keep = torch.arange(first, width - 1, device=device)
    if not len(keep):
        return torch.zeros(len(rows), device=device)
    logits = model(input_ids=ids, attention_mask=real, use_cache=False, logits_to_keep=keep).logits
    token_logps = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    token_logps = token_logps.log_softmax(-1)
    token_logps = token_logps.gather(-1, ids[:, first + 1 :, None]).squeeze(-1)
    wide = torch.float32 if device.type == "mps" else torch.float64
    return torch.where(scored[:, first + 1 :], token_logps, 0).sum(-1, dtype=wide)
