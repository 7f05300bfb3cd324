"""How fast answers are sampled: this library's slots against transformers' `generate`.

    taskset -c 1 python benchmarks/sampling.py --json sampling.json

All variants run interleaved in one process on the same model with random weights, greedily, so
that they must make the same tokens, which is checked. Each request has its own number of new tokens
(as answers end at different points); `generate` is told so by a stopping criterion per row, and
tokens of rows that have ended are not counted for anybody.

| variant | what it does |
|---|---|
| `ours` | `TransformersSampler`, all requests at once |
| `ours-6` | `TransformersSampler` with six slots |
| `generate` | one `generate` call of all rows, left-padded |
| `generate-6` | `generate` in calls of six rows |
| `continuous` | transformers' continuous batching, through `ContinuousBatchingSampler` |

With `--samples K` every prompt is asked K times: `generate` gets `num_return_sequences=K`, and the
slots prefill each prompt once.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step import MODELS, Case, Settings, make_model
from transformers import StoppingCriteria, StoppingCriteriaList

from sso_lightning.continuous import ContinuousBatchingSampler
from sso_lightning.sampling import Request, TransformersSampler


class Limits(StoppingCriteria):
    """End each row at its own length."""

    def __init__(self, limits: list[int], width: int) -> None:
        self.ends = torch.tensor(limits) + width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Tell which rows are done."""
        return (input_ids.shape[1] >= self.ends).to(input_ids.device)


def make_requests(vocabulary: int, prompts: int, samples: int) -> list[Request]:
    """Prompts of 120-270 tokens, answers of 20-300 tokens, both uniform."""
    rng = random.Random(0)
    requests = []
    for i in range(prompts):
        prompt = [rng.randrange(3, vocabulary) for _ in range(rng.randint(120, 270))]
        for j in range(samples):
            requests.append(Request(f"{i}-{j}", prompt, i, rng.randint(20, 300)))
    return requests


def ours(model: Any, requests: list[Request], rows: int) -> list[list[int]]:
    """Answer by slots."""
    sampler = TransformersSampler(temperature=0, max_rows=rows)
    return [sample.ids for sample in sampler.sample(model, requests, stop_ids=[])]


def continuous(model: Any, requests: list[Request], rows: int) -> list[list[int]]:
    """Answer by transformers' own scheduler."""
    sampler = ContinuousBatchingSampler(temperature=0, max_rows=rows)
    return [sample.ids for sample in sampler.sample(model, requests, stop_ids=[])]


def generate(model: Any, requests: list[Request], rows: int, samples: int) -> list[list[int]]:
    """Answer by calls of `generate` on `rows` requests each."""
    answers = []
    model.eval()
    for begin in range(0, len(requests), rows):
        group = requests[begin : begin + rows]
        limits = [r.max_new_tokens or 0 for r in group]
        width = max(len(r.prompt) for r in group)
        distinct = group[::samples]
        ids = torch.tensor([[0] * (width - len(r.prompt)) + r.prompt for r in distinct])
        mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in distinct])
        several: dict[str, Any] = {}
        if samples > 1:  # greedy returns one; a top-1 draw is the same token
            several = {"num_return_sequences": samples, "do_sample": True, "top_k": 1}
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(limits),
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Limits(limits, width)]),
            **({"do_sample": False} | several),
        )
        answers += [
            row[width : width + limit].tolist() for row, limit in zip(out, limits, strict=True)
        ]
    return answers


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="m32k", choices=MODELS)
    parser.add_argument("--prompts", type=int, default=18)
    parser.add_argument("--samples", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--variants", nargs="+", help="only these (see the table)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    settings = Settings(args.device, args.dtype, checkpointing=False, threads=args.threads)
    model = make_model(Case(args.model, 1), settings)
    requests = make_requests(MODELS[args.model][0], args.prompts, args.samples)
    everything = len(requests)
    six = max(6 // args.samples, 1) * args.samples
    variants: dict[str, Callable[[], list[list[int]]]] = {
        "ours": lambda: ours(model, requests, everything),
        f"ours-{six}": lambda: ours(model, requests, six),
        "generate": lambda: generate(model, requests, everything, args.samples),
        f"generate-{six}": lambda: generate(model, requests, six, args.samples),
        "continuous": lambda: continuous(model, requests, everything),
    }
    variants = {name: run for name, run in variants.items() if name in (args.variants or variants)}
    tokens = sum(r.max_new_tokens or 0 for r in requests)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    same: dict[str, bool] = {}
    want: list[list[int]] = []
    for turn in range(2 if args.quick else args.rounds):
        for name in list(variants) if turn % 2 == 0 else reversed(list(variants)):
            begin = time.process_time() if args.device == "cpu" else time.perf_counter()
            answers = variants[name]()
            end = time.process_time() if args.device == "cpu" else time.perf_counter()
            seconds[name].append(end - begin)
            want = want or answers
            same[name] = answers == want
    rows = []
    print("| variant | seconds [spread] | tokens/s | generate / this [spread] | same tokens |")
    print("|---|---|---|---|---|")
    for name, took in seconds.items():
        base = seconds.get("generate", took)
        ratios = [g / t for g, t in zip(base, took, strict=True)]
        row = {
            "model": args.model,
            "prompts": args.prompts,
            "samples": args.samples,
            "variant": name,
            "seconds": round(statistics.median(took), 3),
            "seconds_low": round(min(took), 3),
            "seconds_high": round(max(took), 3),
            "tokens_per_second": round(tokens / statistics.median(took), 1),
            "ratio_to_generate": round(statistics.median(ratios), 3),
            "ratio_low": round(min(ratios), 3),
            "ratio_high": round(max(ratios), 3),
            "same_tokens": same[name],
            "rounds": len(took),
        }
        rows.append(row)
        print(
            f"| {name} | {row['seconds']:.2f} [{row['seconds_low']:.2f} {row['seconds_high']:.2f}]"
            f" | {row['tokens_per_second']:.0f} | {row['ratio_to_generate']:.2f}x"
            f" [{row['ratio_low']:.2f} {row['ratio_high']:.2f}] | {row['same_tokens']} |"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
