"""Run folders with records of chosen numbers, for the tests of the report."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sso_lightning.records import PairStore, Record

MEANS = {
    ("query", "good"): -0.5,
    ("query", "bad"): -1.0,
    ("query", "original"): -0.6,
    ("good", "good"): -0.4,
    ("good", "bad"): -1.2,
    ("bad", "good"): -0.8,
    ("bad", "bad"): -0.7,
    ("bad", "original"): -0.9,
}
"""avg(y|x) of an ordinary record, nats per token."""


def record(
    name: str,
    *,
    means: Mapping[tuple[str, str], float] | None = None,
    lengths: Mapping[str, int] | None = None,
    **changes: Any,
) -> Record:
    """A record like a sampled one.

    Args:
        name: Its id.
        means: avg(y|x) by (context, response), beside `MEANS`.
        lengths: Tokens of answers; 10 each if not given.
        **changes: Further fields.
    """
    tokens = {"good": 10, "bad": 10, "original": 10} | dict(lengths or {})
    scores = {
        f"policy/{context}/{response}": mean * tokens[response]
        for (context, response), mean in (MEANS | dict(means or {})).items()
    }
    values: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"What of {name}?"}],
        "features": ["Accuracy"],
        "good_principle": "State only what is correct and use exact names and figures.",
        "bad_principle": "Mix up facts and state doubtful things with full confidence.",
        "good_system": "Write an answer that is accurate.",
        "bad_system": "Write an answer that is inaccurate.",
        "good": f"The good one of {name}.",
        "bad": f"The bad one of {name}.",
        "original": f"The plain one of {name}.",
        "prompt_ids": {"query": [1, 2], "good": [1, 2, 3], "bad": [1, 2, 4]},
        "response_ids": {response: [5] * count for response, count in tokens.items()},
        "finish": dict.fromkeys(tokens, "stop"),
        "scores": scores,
        "principle_source": "predefined",
        "safety_mode": "careless",
    }
    return Record(id=name, **(values | changes))


def write_run(
    root: Path,
    sets: Mapping[str, Sequence[Record]],
    *,
    config: str = "model: {objective: {class_path: sso_lightning.objectives.Contrastive}}\n",
    metrics: Sequence[Mapping[str, float]] = (),
    info: Mapping[str, Any] | None = None,
    shard: int = 4,
) -> Path:
    """Write a run folder as a fit does.

    Args:
        root: The folder.
        sets: Folder below `pairs/` to its records.
        config: Text of config.yaml; "" writes none.
        metrics: Rows of metrics.csv; none writes none.
        info: Kept beside every shard: dropped queries, counts.
        shard: Records of a shard.
    """
    for name, records in sets.items():
        store = PairStore(root / "pairs" / name, {"iteration": name})
        for start in range(0, len(records), shard):
            part = records[start : start + shard]
            notes = {"queries": [r.id for r in part], "dropped": {}, "counts": {}, **(info or {})}
            store.write_shard(start // shard, part, notes)
        store.finish({"pairs/kept": len(records)})
    if config:
        (root / "config.yaml").write_text(config)
    if metrics:
        columns = list(dict.fromkeys(key for row in metrics for key in row))
        with (root / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(metrics)
    return root
