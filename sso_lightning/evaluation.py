"""What a policy was worth after each iteration: scores of single items, kept beside the run.

Whatever measures a policy (a benchmark, a judge, exact ground truth) writes its items' scores with
`write_scores`; what compares iterations reads them back and pairs them by item.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from sso_lightning.errors import InputError
from sso_lightning.records import replace_file

FOLDER = "evaluations"
"""Folder of a run that holds the scores: `METRIC/iteration-NN.jsonl`."""

_METRIC = re.compile(r"[\w.@+=-]+(/[\w.@+=-]+)*")


def write_scores(run: Path, metric: str, iteration: int, scores: Mapping[str, float]) -> Path:
    """Keep the scores of a policy.

    Args:
        run: The run folder.
        metric: What was measured, such as `lm_eval/gsm8k/exact_match`; higher is better.
        iteration: Iterations that the policy was trained for; 0 is the start.
        scores: Item id to score. The same ids in every iteration, so that items can be paired.

    Returns:
        The file.

    Raises:
        InputError: The name cannot be a path, there are no scores, or one is not finite.
    """
    if not _METRIC.fullmatch(metric) or ".." in metric.split("/"):
        raise InputError(f"evaluation: {metric!r} is no name of a metric")
    if not scores:
        raise InputError(f"evaluation: {metric} has no scores")
    for item, score in scores.items():
        if not math.isfinite(score):
            raise InputError(f"evaluation: {metric} of item {item!r} is {score}")
    rows = [json.dumps({"id": item, "score": score}) + "\n" for item, score in scores.items()]
    path = run / FOLDER / metric / f"iteration-{iteration:02d}.jsonl"
    replace_file(path, "".join(rows).encode())
    return path
