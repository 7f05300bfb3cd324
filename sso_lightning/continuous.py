"""transformers' continuous batching as a sampler: its own scheduler, paged keys and values, graphs.

The engine keeps its own books (which request runs when, in which pages), so a GPU waits less for
the host than between the steps of the built-in loop. On a CPU it is slower (see
`benchmarks/results/sampling.md`); no GPU has run it here: the built-in sampler is the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from sso_lightning.errors import InputError
from sso_lightning.sampling import DrawingSampler, Progress, Request, Sample, eval_mode
from sso_lightning.sharding import causal_lm, is_sharded

_PAGE = 256  # tokens per page, the engine's own default
_SILENCE = 1.0  # seconds between looks at whether the engine's thread is alive


class ContinuousBatchingSampler(DrawingSampler):
    """Answers by transformers' `ContinuousBatchingManager`, on the very weights in training.

    Draws are seeded by the requests of a call, but the engine draws for whole batches: unlike the
    built-in sampler's, an answer depends on its company, and on a GPU on timing. Greedy answers
    are those of `generate`.
    """

    engine = "continuous"

    def __init__(
        self,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_rows: int = 256,
        max_tokens: int | None = None,
        max_batch_tokens: int | None = None,
        max_memory: float = 0.5,
        flash: bool = False,
    ) -> None:
        """Check and keep the settings.

        Args:
            max_new_tokens: Most tokens of an answer, where the request does not say.
            temperature: Divides the logits; 0 takes the likeliest token.
            top_p: Keep the fewest likeliest tokens that hold this much probability; 1 keeps all.
            top_k: Keep this many of the likeliest tokens; 0 keeps all.
            max_rows: Most answers that grow at the same time.
            max_tokens: Most tokens whose keys and values are held at the same time. On a GPU null
                takes what `max_memory` allows, elsewhere 65536.
            max_batch_tokens: Most tokens of one pass. On a GPU null lets the engine choose,
                elsewhere 512.
            max_memory: Share of the GPU's free memory that keys and values may take.
            flash: Switch to flash attention while sampling, where it is installed.

        Raises:
            InputError: A setting is out of its range.
        """
        checks = {
            "max_rows": (max_rows >= 1, "at least 1"),
            "max_tokens": (max_tokens is None or max_tokens >= 1, "at least 1 or null"),
            "max_batch_tokens": (
                max_batch_tokens is None or max_batch_tokens >= 1,
                "at least 1 or null",
            ),
            "max_memory": (0 < max_memory < 1, "between 0 and 1"),
        }
        super().__init__(max_new_tokens, temperature, top_p, top_k, checks)
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.max_batch_tokens = max_batch_tokens
        self.max_memory = max_memory
        self.flash = flash

    def sample(
        self,
        model: nn.Module,
        requests: Sequence[Request],
        *,
        stop_ids: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Sample]:
        """Answer all requests; see `Sampler.sample`.

        Raises:
            InputError: The model is sharded, or the engine fails.
        """
        self.check(requests)
        if not requests:
            return []
        if is_sharded(model):
            raise InputError(
                "ContinuousBatchingSampler: the policy is sharded and does not fit one device; "
                "use TransformersSampler or an engine outside of the process"
            )
        base = causal_lm(model)
        device = next(base.parameters()).device
        # the engine seeds the global generators
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), eval_mode(model), torch.random.fork_rng(devices):
            found = self._run(base, requests, sorted({*stop_ids}), device, progress)
        stops = frozenset(stop_ids)
        return [
            Sample(request.key, ids, "stop" if ids[-1] in stops else "length")
            for request, ids in zip(requests, found, strict=True)
        ]

    def _run(
        self,
        base: Any,
        requests: Sequence[Request],
        stop_ids: list[int],
        device: torch.device,
        progress: Progress | None,
    ) -> list[list[int]]:
        stops = stop_ids or [-1]  # an id that no token has: none ends an answer
        drawn: dict[str, Any] = {"do_sample": False}
        if self.temperature:
            drawn = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
            }
        config = GenerationConfig(
            **drawn, max_new_tokens=self.max_new_tokens, eos_token_id=stops, pad_token_id=0
        )
        with base.continuous_batching_context_manager(
            generation_config=config,
            continuous_batching_config=self._limits(requests, device),
            warmup=device.type == "cuda",
        ) as manager:
            try:
                return self._collect(manager, requests, stops, progress)
            except BaseException:
                # leaving the block would first answer all that waits
                for at in range(len(requests)):
                    manager.cancel_request(str(at))
                raise

    def _collect(
        self,
        manager: Any,
        requests: Sequence[Request],
        stops: list[int],
        progress: Progress | None,
    ) -> list[list[int]]:
        for at, request in enumerate(requests):
            manager.add_request(
                request.prompt,
                request_id=str(at),
                max_new_tokens=self.limit(request),
                eos_token_id=stops,
            )
        answers: dict[str, list[int]] = {}
        while len(answers) < len(requests):
            result = manager.get_result(timeout=_SILENCE)
            if result is None:
                if manager.is_running():
                    continue
                raise InputError("continuous batching: the engine ended before all answers")
            if not result.is_finished():
                continue
            if result.error is not None or not result.generated_tokens:
                key = requests[int(result.request_id)].key
                reason = " ".join(str(result.error).split())
                raise InputError(f"continuous batching: request {key!r}: {reason}")
            answers[result.request_id] = list(result.generated_tokens)
            if progress:
                progress(len(result.generated_tokens), 1)
        return [answers[str(at)] for at in range(len(requests))]

    def _limits(self, requests: Sequence[Request], device: torch.device) -> Any:
        """The engine's sizes; outside of a GPU it cannot find any by itself."""
        blocks, tokens = None, self.max_batch_tokens
        most = self.max_tokens
        if device.type != "cuda":
            most, tokens = most or 65536, tokens or 512
        if most is not None:
            longest = max(len(r.prompt) + self.limit(r) for r in requests)
            blocks = max(-(-most // _PAGE), -(-longest // _PAGE) + 1)
        seeds = repr([(r.seed, r.key) for r in requests]).encode()
        return ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=blocks,
            max_batch_tokens=tokens,
            max_memory_percent=self.max_memory,
            max_requests_per_batch=min(self.max_rows, len(requests)),
            auto_switch_to_flash=self.flash,
            seed=int.from_bytes(sha256(seeds).digest()[:4], "big"),
        )
