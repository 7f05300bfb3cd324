"""SSO, its ablations and its baseline in the sandbox, over several seeds and base models.

    python benchmarks/sandbox_study.py --seeds 3 --workers 2

Every run is `sso-lightning fit` of a shipped recipe with the changes named in `VARIANTS`. Seed s
uses base model s (`sso-lightning sandbox --seed s`) and run seed s, so the spread covers base
models too. Runs that are finished are not repeated. Writes `benchmarks/results/sandbox.md`, whose
numbers are all measured here.

Methods are compared after equal iterations and, as they move the policy at different speeds, at
equal policy quality and at equal movement of the plain policy (KL to the start).
"""

from __future__ import annotations

import argparse
import copy
import csv
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import itertools

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from sso_lightning.losses import PreferenceLoss
from sso_lightning.objectives import BASE, STEER_GOOD, SelfSteering, Term
from sso_lightning.policy import POLICY, speaking
from sso_lightning.records import load_queries, stream_seed
from sso_lightning.sampling import Request, TransformersSampler
from sso_lightning.sandbox.demo import MEASURES, draw

ROOT = Path(__file__).resolve().parent.parent
SSO, PBAA = "sso_2024", "pbaa"
HALF = "--model.optimizer.init_args.lr=2.5e-4"
VARIANTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "sso": ("SSO, W on every term", SSO, ()),
    "scope": ("SSO, W on steering only", SSO, ("--model.objective.init_args.scope=steering",)),
    "pbaa": ("PBAA", PBAA, ()),
    "pbaa_slow": ("PBAA, half the learning rate", PBAA, (HALF,)),
    "anchored_k3": ("Anchored, k3 (ours)", "anchored", ()),
    "anchored_square": (
        "Anchored, square (ours)",
        "anchored",
        ("--model.objective.init_args.form=square",),
    ),
    "generator_current": (
        "2025, generator from the current policy",
        "sso_2025",
        ("--trainer.max_epochs=8",),
    ),
    "generator_first": (
        "2025, generator from the first policy",
        "sso_2025",
        ("--trainer.max_epochs=8", "--model.generator.start=first"),
    ),
    "without_w": ("SSO without W", "without_weight", ()),
    "without_g": ("SSO without G", "without_steering", ()),
    "bad_for_original": (
        "SSO with y- for yo",
        SSO,
        (
            "--model.objective=benchmarks.sandbox_study.SteeringWithBad",
            "--model.objective.init_args.base=IPO",
            "--model.objective.init_args.base.init_args.beta=5.0",
        ),
    ),
    "paper_beta": (
        "SSO, the paper's beta .2, g .1",
        SSO,
        (
            "--model.objective.init_args.base.init_args.beta=0.2",
            "--model.objective.init_args.steering=0.1",
        ),
    ),
}
"""Name to (label, recipe, changes)."""

FAST_GENERATOR = ("--model.generator.lr=1.0e-3",)
GENERATORS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    name + fast: (label + more, f"sso_2025{recipe}", changes)
    for fast, more, changes in (("", "", ()), ("_fast", ", twice the rate", FAST_GENERATOR))
    for name, label, recipe in (
        ("both", "L+ and L-", ""),
        ("only_good", "L+ alone", "_only_good"),
        ("only_bad", "L- alone", "_only_bad"),
        ("bad_for_original", "L- with y- for yo", "_bad_for_original"),
    )
}
"""Name to (label, recipe, changes): one iteration of the 2025 method."""

CONTROLS = {"quality": (0.60, 0.65, 0.70), "kl_to_start": (0.02, 0.04, 0.06)}


class SteeringWithBad(SelfSteering):
    """The 2024 objective with L(x-, y-, y+) where the paper has L(x-, yo, y+)."""

    def __init__(self, base: PreferenceLoss, steering: float = 1.0) -> None:
        """See `SelfSteering`."""
        super().__init__(base, steering=steering)
        self.terms = (BASE, STEER_GOOD, Term("bad", "bad", "bad", "good"))


class KLToStart(Callback):
    """Logs `sandbox/kl_to_start`: KL(policy || start) of plain answers, nats per token.

    Exact over the vocabulary at every position of answers that the current policy samples.
    """

    def __init__(self, queries: str, limit: int = 96) -> None:
        """See `SandboxMetrics`."""
        self.queries = load_queries(queries)[:limit]
        self.sampler = TransformersSampler(max_new_tokens=64, max_rows=limit)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the start."""
        self.start = copy.deepcopy(pl_module.policy).eval()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure how far the policy has moved."""
        if getattr(pl_module, "trains_generator", False):
            return
        with speaking(pl_module.policy, POLICY) as policy:
            self._measure(trainer, policy, pl_module.renderer)

    def _measure(self, trainer: pl.Trainer, policy: Any, renderer: Any) -> None:
        requests = [
            Request(q.id, renderer.render(q.messages), stream_seed(0, "kl", q.id))
            for q in self.queries
        ]
        samples = self.sampler.sample(policy, requests, stop_ids=renderer.stop_ids)
        total, tokens = 0.0, 0
        with torch.no_grad():
            for request, sample in zip(requests, samples, strict=True):
                ids = torch.tensor([request.prompt + sample.ids])
                keep = slice(len(request.prompt) - 1, -1)
                p, q = (
                    m(input_ids=ids, use_cache=False).logits[0, keep].double().log_softmax(-1)
                    for m in (policy, self.start)
                )
                total += float((p.exp() * (p - q)).sum())
                tokens += len(sample.ids)
        row = {"sandbox/kl_to_start": total / tokens}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)


def arguments(name: str, seed: int, out: Path) -> list[str]:
    """The command line of one run."""
    family, _, short = name.partition("/")
    if family == "generator":
        _, recipe, changes = GENERATORS[short]
        changes = (*changes, "--trainer.max_epochs=2")
    else:
        _, recipe, changes = VARIANTS[name]
    base = out / f"base-{seed}"
    files = {
        "model.policy.path": base / "model",
        "data.queries": base / "train.jsonl",
        "data.val_queries": base / "validation.jsonl",
        "trainer.default_root_dir": out / f"{name}-{seed}",
        "seed_everything": seed,
    }
    argv = ["fit", "--config", f"configs/sandbox/{recipe}.yaml", *changes]
    argv += [f"--{key}={value}" for key, value in files.items()]
    held_out = f"{base}/validation.jsonl"
    return [
        *argv,
        "--overwrite=true",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        # in place of the recipe's: this base model, and the movement of the policy
        '--trainer.callbacks=[{"class_path": "sso_lightning.sandbox.callbacks.SandboxMetrics", '
        f'"init_args": {{"queries": "{held_out}", "limit": 432}}}}'
        + (
            ""
            if family == "generator"
            else ', {"class_path": "benchmarks.sandbox_study.KLToStart", '
            f'"init_args": {{"queries": "{held_out}"}}}}'
        )
        + "]",
    ]


def run_one(job: tuple[str, int, Path]) -> str:
    """Run one variant with one seed, unless it is finished."""
    name, seed, out = job
    os.chdir(ROOT)
    torch.set_num_threads(1)
    if not (out / f"{name}-{seed}" / "export").exists():
        from sso_lightning.cli import run

        run(arguments(name, seed, out))
    return f"{name}-{seed}"


def build_base(job: tuple[int, Path]) -> None:
    """Build the base model of a seed, unless it is there."""
    from sso_lightning.sandbox.build import is_sandbox, make_sandbox

    seed, out = job
    if not is_sandbox(out / f"base-{seed}"):
        make_sandbox(out / f"base-{seed}", seed=seed, quiet=True)


def curve(folder: Path) -> list[dict[str, float]]:
    """What was measured before training and after each iteration.

    Numbers of a training set stand at the policy that wrote it, so the last row has none.
    """
    rows: dict[int, dict[str, float]] = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            wanted = ("sandbox/", "pairs/on_policy_", "pairs/length_")
            found = {
                k.split("/")[1]: float(v) for k, v in row.items() if v and k.startswith(wanted)
            }
            if found:
                rows.setdefault(int(row["step"]), {"kl_to_start": 0.0}).update(found)
    # a generator phase ends with a row that does not measure the policy
    return [rows[step] for step in sorted(rows) if "quality" in rows[step]]


def at(points: Sequence[dict[str, float]], key: str, level: float, want: str) -> float | None:
    """`want` where `key` first rises through `level`, interpolated between iterations."""
    for before, after in itertools.pairwise(points):
        if before[key] <= level <= after[key] and after[key] > before[key]:
            share = (level - before[key]) / (after[key] - before[key])
            return before[want] + share * (after[want] - before[want])
    return None


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation, and how many runs got there if not all did."""
    found = [v for v in values if v is not None]
    if not values:
        return ""
    if not found:
        return "not reached"
    text = f"{statistics.fmean(found):.3f}"
    if len(found) > 1:
        text += f" ± {statistics.stdev(found):.3f}"
    return text if len(found) == len(values) else f"{text} ({len(found)} of {len(values)})"


def mean_curve(runs: Sequence[Sequence[dict[str, float]]]) -> list[dict[str, float]]:
    """Means over seeds of what `demo.draw` shows, point by point."""
    return [
        {key: statistics.fmean(p[key.removeprefix("sandbox/")] for p in points) for key in MEASURES}
        for points in zip(*runs, strict=True)
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def report(curves: dict[str, list[list[dict[str, float]]]]) -> str:
    """All tables."""
    parts = []
    measures = {
        "signal_accuracy": "Signal accuracy: share of pairs whose y+ is really better",
        "quality": "Quality of the plain policy",
        "quality_bad": "Quality of y- (low is obedient)",
        "well_formed": "Well-formed answers, all three kinds",
        "kl_to_start": "Movement: KL(policy || start), nats per token",
        "on_policy_bad": "On-policyness of the training set's y-: mean of exp(avg(y-|x))",
        "on_policy_good": "On-policyness of the training set's y+",
        "length_original": "Tokens of a plain answer in the training set",
    }
    count = max(len(c) for runs in curves.values() for c in runs)
    for key, title in measures.items():
        head = ["variant", "start", *(f"after {i}" for i in range(1, count))]
        rows = [
            [VARIANTS[name][0]]
            + [
                spread([c[i][key] for c in runs if i < len(c) and key in c[i]])
                for i in range(count)
            ]
            for name, runs in curves.items()
        ]
        parts.append(f"## {title}\n\n{table(head, rows)}")
    for key, levels in CONTROLS.items():
        head = ["variant", *(f"{key} {level:g}" for level in levels)]
        rows = [
            [VARIANTS[name][0]]
            + [spread([at(c, key, v, "signal_accuracy") for c in runs]) for v in levels]
            for name, runs in curves.items()
        ]
        parts.append(f"## Signal accuracy at equal {key}\n\n{table(head, rows)}")
    best = [
        [VARIANTS[name][0], spread([max(p["quality"] for p in c) for c in runs])]
        for name, runs in curves.items()
    ]
    parts.append(f"## Best quality of any iteration\n\n{table(['variant', 'quality'], best)}")
    return "\n\n".join(parts)


def generator_row(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Measures of prompting alone and of the trained generator, on held-out queries.

    On-policyness and lengths are those of the pairs that each wrote for the training queries.
    """
    values: dict[str, float] = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            values = {**{k: float(v) for k, v in row.items() if v}, **values}  # the first of each

    def measures(kind: str, pairs: str) -> dict[str, float]:
        ours = {key: values[f"sandbox/{kind}{key}"] for key in GENERATOR_MEASURES[:4]}
        return ours | {key: values[f"{pairs}pairs/{key}"] for key in GENERATOR_MEASURES[4:]}

    return measures("", "generator_"), measures("generator_", "")


GENERATOR_MEASURES = (
    *("signal_accuracy", "gap", "quality_good", "quality_bad"),
    *("on_policy_good", "on_policy_bad", "contrast_good", "contrast_bad"),
)


def generator_report(out: Path, seeds: Sequence[int]) -> str:
    """The trained generators against prompting alone, after one generator phase."""
    found = {
        name: [generator_row(out / f"generator/{name}-{seed}") for seed in seeds]
        for name in GENERATORS
    }
    rows = [
        ["prompting alone", *(spread([p[k] for p, _ in found["both"]]) for k in GENERATOR_MEASURES)]
    ]
    for name, (label, *_) in GENERATORS.items():
        rows.append([label, *(spread([g[k] for _, g in found[name]]) for k in GENERATOR_MEASURES)])
    return table(["generator", *GENERATOR_MEASURES], rows)


def main() -> int:
    """Build the bases, run the variants, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS], default=[*VARIANTS])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--tables", type=Path, help="write the tables to this file as well")
    parser.add_argument("--picture", type=Path, help="draw the means of sso and pbaa to this file")
    parser.add_argument(
        "--generators", action="store_true", help="the generators of the 2025 method instead"
    )
    given = parser.parse_args()
    seeds = range(given.seeds)
    out = given.out.resolve()
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        pool.map(build_base, [(seed, out) for seed in seeds], chunksize=1)
        names = [f"generator/{n}" for n in GENERATORS] if given.generators else given.variants
        jobs = [(name, seed, out) for seed in seeds for name in names]
        for done in pool.imap_unordered(run_one, jobs):
            print("finished", done, flush=True)
    if given.generators:
        print(generator_report(out, seeds))
        return 0
    curves = {name: [curve(out / f"{name}-{seed}") for seed in seeds] for name in given.variants}
    text = report(curves)
    if given.tables:
        given.tables.write_text(text + "\n")
    print(text)
    if given.picture:
        draw({VARIANTS[n][0]: mean_curve(curves[n]) for n in ("sso", "pbaa")}, given.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
