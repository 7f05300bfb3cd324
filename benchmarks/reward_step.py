"""What a reward model's training step costs: prompts shared by a pair's answers, or plain rows.

    taskset -c 0 python benchmarks/reward_step.py

One process, interleaved rounds: forward, Bradley-Terry loss and backward (no optimizer) of the
same pairs, at the lengths of `step.py`. Prints CPU seconds, median [lowest
highest], and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import torch
from step import MODELS, Case, make_config, make_records
from transformers import Qwen2ForSequenceClassification

from sso_lightning import reward


def make_model(name: str) -> Qwen2ForSequenceClassification:
    """A classifier of the model's size with random weights."""
    torch.manual_seed(0)
    config = make_config(MODELS[name], num_labels=1)
    return Qwen2ForSequenceClassification(config).train()


def step(model: Qwen2ForSequenceClassification, pairs: list[tuple[list[int], list[int]]]) -> float:
    """CPU seconds of one step."""
    model.zero_grad(set_to_none=True)
    start = time.process_time()
    chosen, rejected = reward.rewards_of(model, pairs).view(-1, 2).unbind(1)
    reward.bradley_terry(chosen, rejected).mean().backward()
    return time.process_time() - start


def main() -> None:
    """Print one row per case."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", default=["m32k", "mbody"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | prompt | tokens: padded, real, shared | plain rows | shared | rows / shared |")
    print("|---|---|---|---|---|---|")
    for name in given.models:
        model = make_model(name)
        records = make_records(Case(name, given.batch))
        for prompt in ("query", "good"):
            pairs = [
                tuple(r["prompts"][prompt] + r["responses"][a] for a in ("good", "bad"))
                for r in records
            ]
            rows = 2 * len(pairs) * max(len(row) for pair in pairs for row in pair)
            real = sum(len(row) for pair in pairs for row in pair)
            trees = [reward.tree_of(pair) for pair in pairs]
            shared = sum(len(t.prompt) + sum(map(len, t.responses)) for t in trees)
            plain = mock.patch.object(reward, "shares_prompts", return_value=False)
            times: dict[str, list[float]] = {"rows": [], "shared": []}
            for turn in range(given.rounds + 1):
                with plain:
                    of_rows = step(model, pairs)
                of_trees = step(model, pairs)
                if turn:  # the first round warms up
                    times["rows"].append(of_rows)
                    times["shared"].append(of_trees)
            ratios = [a / b for a, b in zip(times["rows"], times["shared"], strict=True)]
            cells = [
                f"{statistics.median(v):.2f} [{min(v):.2f} {max(v):.2f}]"
                for v in (times["rows"], times["shared"], ratios)
            ]
            what = {"query": "query, 20-120", "good": "principle and query, 120-340"}[prompt]
            print(
                f"| {name} | {what} | {rows}, {real}, {shared} | {' | '.join(cells)} |", flush=True
            )


if __name__ == "__main__":
    main()
