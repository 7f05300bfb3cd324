"""Do SSO's pairs make better reward models than PBAA's? Measured in the sandbox.

    python benchmarks/reward_study.py --seeds 3

Seed s has base model s and the runs `sso` and `pbaa` of `sandbox_study.py`, which are used as they
lie in `--out` or made first. From each seed's base model a reward model is trained on every entry
of `SETS` with the recipe `configs/sandbox/reward.yaml`, several times with other heads and orders,
and ranks answers to held-out queries whose quality is known exactly. Finished trainings are not
repeated. The tables of `benchmarks/results/reward.md` are what this writes.

Rate and epochs are those of `GRID` that rank plain answers best after training on seed 0's prompted
pairs of iteration 0: chosen before any method's own pairs were trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import fmean as mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from benchmarks.sandbox_study import build_base, run_one, spread, table
from sso_lightning.formats import records_of
from sso_lightning.policy import PolicyConfig, load_model, load_tokenizer
from sso_lightning.principles import Draw
from sso_lightning.prompts import ChatRenderer
from sso_lightning.records import Query, load_queries, stream_seed
from sso_lightning.rewardbench import Item, reward_scorer
from sso_lightning.sampling import Request, TransformersSampler
from sso_lightning.sandbox import world
from sso_lightning.sandbox.principles import SandboxPrinciples

ROOT = Path(__file__).resolve().parent.parent
LAST, FEW, MANY = 4, 64, 192
GRID = [(lr, epochs) for lr in (5e-4, 1e-3, 2e-3) for epochs in (3, 8)]
SETS: dict[str, tuple[str, tuple[str, ...], int]] = {
    "prompted": ("prompting alone: pairs of iteration 0", ("prompted",), 1),
    "sso": ("SSO's pairs of the last iteration", ("sso",), 1),
    "pbaa": ("PBAA's pairs of the last iteration", ("pbaa",), 1),
    "few": (f"{FEW} exactly labelled pairs", ("few",), 1),
    "few_long": (f"{FEW} labelled, 4 times the epochs", ("few",), 4),
    "few_prompted": (f"{FEW} labelled + prompting alone", ("few", "prompted"), 1),
    "few_sso": (f"{FEW} labelled + SSO's", ("few", "sso"), 1),
    "few_pbaa": (f"{FEW} labelled + PBAA's", ("few", "pbaa"), 1),
    "many": (f"{MANY} exactly labelled pairs", ("many",), 1),
}
"""Name to (label, sets of pairs that are mixed with equal weights, factor on the epochs).

Four times the epochs of the small set are as many steps as a mixture of it with 192 pairs takes.
"""
KINDS = {
    "plain": "plain answers",
    "contexts": "answers under good, bad and no principles",
    "world": "answers composed by the world at random",
    "moved": "plain answers of the last policies",
}
PLAIN = 4  # plain answers per held-out query


@dataclass(frozen=True)
class Answers:
    """Answers to one query with their exact features."""

    query: str
    texts: list[str]
    contexts: list[str]

    def pairs(self, kind: str) -> Iterator[tuple[int, int]]:
        """Better and worse answer of every pair of a kind that differs in quality."""
        if kind == "contexts":  # one answer of each
            places = [self.contexts.index(context) for context in ("plain", "good", "bad")]
        else:
            of = {"moved": ("sso", "pbaa")}.get(kind, (kind,))
            places = [i for i, context in enumerate(self.contexts) if context in of]
        quality = [world.quality(self.query, text) for text in self.texts]
        for a, b in combinations(places, 2):
            if quality[a] != quality[b]:
                yield (a, b) if quality[a] > quality[b] else (b, a)


def sample(
    model: Any, renderer: ChatRenderer, queries: Sequence[Query], count: int, name: str
) -> list[list[str]]:
    """Plain answers, `count` to each query."""
    requests = [
        Request(f"{i}/{k}", renderer.render(q.messages), stream_seed(0, name, q.id, k))
        for i, q in enumerate(queries)
        for k in range(count)
    ]
    texts = _texts(model, renderer, requests)
    return [[texts[f"{i}/{k}"] for k in range(count)] for i in range(len(queries))]


def _texts(model: Any, renderer: ChatRenderer, requests: Sequence[Request]) -> dict[str, str]:
    sampler = TransformersSampler(max_new_tokens=64, max_rows=192)
    samples = sampler.sample(model, requests, stop_ids=renderer.stop_ids)
    return {s.key: renderer.decode(s.ids) for s in samples}


def held_out(
    model: Any, renderer: ChatRenderer, queries: Sequence[Query], last: dict[str, Any]
) -> list[Answers]:
    """Answers that rankings are measured on: the start policy's, the last ones', the world's."""

    def never(asked: Any, tokens: int) -> list[str]:
        raise AssertionError("these principles do not ask the policy")

    moved = {name: sample(policy, renderer, queries, 2, name) for name, policy in last.items()}
    plain = sample(model, renderer, queries, PLAIN, "reward-study")
    steerings = SandboxPrinciples().propose(queries, Draw(1, 0, never))
    requests = [
        Request(f"{i}/{c}", renderer.render(q.messages, system), stream_seed(1, c, q.id))
        for i, (q, s) in enumerate(zip(queries, steerings, strict=True))
        for c, system in (("good", s.good_system), ("bad", s.bad_system))
    ]
    steered = _texts(model, renderer, requests)
    found = []
    for i, query in enumerate(queries):
        text = query.messages[-1]["content"]
        rng = Random(stream_seed(2, query.id))
        composed = [world.render(world.plan_answer(world.ask_of(text), {}, rng)) for _ in range(2)]
        texts = [*plain[i], steered[f"{i}/good"], steered[f"{i}/bad"], *composed]
        contexts = ["plain"] * PLAIN + ["good", "bad", "world", "world"]
        for name, answers in moved.items():
            texts += answers[i]
            contexts += [name] * 2
        found.append(Answers(text, texts, contexts))
    return found


def labelled(model: Any, renderer: ChatRenderer, queries: Sequence[Query]) -> list[dict[str, str]]:
    """Exactly labelled pairs of plain answers to training queries, at most `MANY`."""
    rows = []
    answers = sample(model, renderer, queries[: 2 * MANY], 2, "labelled")
    for query, two in zip(queries, answers, strict=False):
        text = query.messages[-1]["content"]
        worse, better = sorted(two, key=lambda answer: world.quality(text, answer))
        if world.quality(text, better) > world.quality(text, worse):
            rows.append({"prompt": text, "chosen": better, "rejected": worse})
    return rows[:MANY]


class Seed:
    """The files of one seed."""

    def __init__(self, seed: int, out: Path) -> None:
        """Make what is not there: base model, runs, labelled pairs, held-out answers."""
        self.seed, self.out = seed, out
        self.base = out / f"base-{seed}"
        build_base((seed, out))
        for name in ("sso", "pbaa"):
            run_one((name, seed, out))
        self.folder = out / f"reward-{seed}"
        self.folder.mkdir(exist_ok=True)
        answers = self.folder / "answers.json"
        if not answers.exists():
            start = PolicyConfig(str(self.base / "model"))
            model, renderer = (
                load_model(start, trainable=False),
                ChatRenderer(load_tokenizer(start)),
            )
            last = {
                name: load_model(PolicyConfig(str(out / f"{name}-{seed}/export")), trainable=False)
                for name in ("sso", "pbaa")
            }
            rows = labelled(model, renderer, load_queries(self.base / "train.jsonl"))
            for name, count in (("few", FEW), ("many", MANY)):
                lines = [json.dumps(row) + "\n" for row in rows[:count]]
                (self.folder / f"{name}.jsonl").write_text("".join(lines))
            queries = load_queries(self.base / "validation.jsonl")
            found = [vars(each) for each in held_out(model, renderer, queries, last)]
            answers.write_text(json.dumps(found))
        self.answers = [Answers(**each) for each in json.loads(answers.read_text())]

    def source(self, name: str) -> dict[str, Any]:
        """Where the pairs of a set lie, as `data.sets` takes it."""
        if name in ("few", "many"):
            return {"path": str(self.folder / f"{name}.jsonl")}
        run, _, iteration = name.partition("@")
        if name == "prompted":
            run, iteration = "sso", "0"
        return {
            "path": str(self.out / f"{run}-{self.seed}"),
            "iteration": int(iteration or LAST),
        }

    def of_pairs(self, name: str) -> dict[str, float]:
        """Exact accuracy and gap of the pairs of a set, and the gap of every feature."""
        source = self.source(name)
        records = records_of(source["path"])
        kept = [r for r in records if source.get("iteration") in (None, r.iteration)]
        text = [(r.messages[-1]["content"], r.good, r.bad) for r in kept]
        both = [(world.quality(q, good), world.quality(q, bad)) for q, good, bad in text]
        lacking = dict.fromkeys((each.name for each in world.FEATURES), 0.0)
        scores = [[world.score(q, answer) or lacking for answer in two] for q, *two in text]
        of_features = {
            f"feature/{name}": mean(good[name] - bad[name] for good, bad in scores)
            for name in lacking
        }
        return of_features | {
            "count": len(both),
            "accuracy": mean((g > b) + 0.5 * (g == b) for g, b in both),
            "gap": mean(g - b for g, b in both),
            "quality": mean(g for g, _ in both),
        }

    def rank(self, name: str, lr: float, epochs: int, repeat: int) -> dict[str, float]:
        """Train on a set unless that is done; shares of held-out pairs ranked rightly."""
        label = f"{name}-{lr:g}-{epochs}-{repeat}"
        result = self.folder / f"{label}.json"
        if not result.exists():
            run = self.folder / label
            _, names, times = SETS.get(name, ("", (name,), 1))
            train(self.base, [self.source(n) for n in names], run, lr, times * epochs, repeat)
            result.write_text(json.dumps(self._ranking(run / "export")))
            shutil.rmtree(run)
        found: dict[str, float] = json.loads(result.read_text())
        return found

    def _ranking(self, model: Path) -> dict[str, float]:
        items = [
            Item(
                str(i), "", [{"role": "user", "content": each.query}], each.texts, 1, False, str(i)
            )
            for i, each in enumerate(self.answers)
        ]
        rewards = reward_scorer(str(model), batch=64)(items)
        found = {}
        for kind in KINDS:
            won = [
                own[a] > own[b]
                for each, own in zip(self.answers, rewards, strict=True)
                for a, b in each.pairs(kind)
            ]
            found[kind] = mean(won)
            found[f"{kind}/count"] = len(won)
        # which features are rewarded: among plain answers that differ in one
        for feature in world.FEATURES:
            won = []
            for each, own in zip(self.answers, rewards, strict=True):
                scores = [world.score(each.query, text) for text in each.texts]
                for a, b in combinations(range(PLAIN), 2):
                    first, second = scores[a], scores[b]
                    if first and second and first[feature.name] != second[feature.name]:
                        won.append(
                            (own[a] > own[b]) == (first[feature.name] > second[feature.name])
                        )
            found[f"feature/{feature.name}"] = mean(won)
        return found


def train(
    base: Path, sets: list[dict[str, Any]], run: Path, lr: float, epochs: int, repeat: int
) -> None:
    """One run of the recipe."""
    from sso_lightning.cli import RewardCLI
    from sso_lightning.cli import run as command

    argv = ["fit", "--config", str(ROOT / "configs/sandbox/reward.yaml")]
    files = {
        "trainer.default_root_dir": run,
        "trainer.max_epochs": epochs,
        "trainer.callbacks": "[]",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "model.policy.path": base / "model",
        "model.optimizer.init_args.lr": lr,
        "data.sets": json.dumps(sets),
        "data.val_sets": "[]",
        "data.batch_size": 16,
        "seed_everything": repeat,
        "overwrite": "true",
    }
    command([*argv, *(f"--{key}={value}" for key, value in files.items())], RewardCLI)


def choose(seed: Seed) -> tuple[float, int]:
    """Rate and epochs, by prompted pairs alone."""
    return max(GRID, key=lambda at: seed.rank("prompted", *at, 0)["plain"])


def report(seeds: Sequence[Seed], lr: float, epochs: int, repeats: int) -> str:
    """All tables."""
    means: dict[str, list[dict[str, float]]] = {}
    for name in SETS:
        for seed in seeds:
            runs = [seed.rank(name, lr, epochs, r) for r in range(repeats)]
            means.setdefault(name, []).append(
                {key: mean(run[key] for run in runs) for key in runs[0]}
            )
            print("finished", name, seed.seed, means[name][-1], flush=True)
    by_iteration = []
    for run in ("sso", "pbaa"):
        names = ["prompted", *(f"{run}@{i}" for i in range(1, LAST)), run]
        really = [spread([seed.of_pairs(n)["accuracy"] for seed in seeds]) for n in names]
        by_iteration.append([run.upper(), "pairs that are really better", *really])
        for kind in ("plain", "moved"):
            ranked = [
                spread(
                    [
                        mean(seed.rank(n, lr, epochs, r)[kind] for r in range(repeats))
                        for seed in seeds
                    ]
                )
                for n in names
            ]
            by_iteration.append([run.upper(), f"ranking {KINDS[kind]}", *ranked])
    parts = [f"rate {lr:g}, {epochs} epochs, {repeats} trainings per seed and set"]
    shown = ("prompted", "sso", "pbaa", "few")
    pairs = {name: [seed.of_pairs(name) for seed in seeds] for name in shown}
    rows = [
        [SETS[name][0]]
        + [spread([each[key] for each in found]) for key in ("count", "accuracy", "gap", "quality")]
        for name, found in pairs.items()
    ]
    head = ["pairs", "number", "really better", "gap in quality", "quality of the better"]
    parts.append(f"## The pairs\n\n{table(head, rows)}")
    rows = [
        [
            each.name,
            *(spread([p[f"feature/{each.name}"] for p in found]) for found in pairs.values()),
        ]
        for each in world.FEATURES
    ]
    parts.append(
        "## What the pairs tell apart\n\nShare of better answers that have a feature minus that of "
        f"worse ones.\n\n{table(['feature', *pairs], rows)}"
    )
    for kind, title in KINDS.items():
        counts = ", ".join(f"{m[f'{kind}/count']:.0f}" for m in means["few"])
        rows = [
            [SETS[name][0], spread([m[kind] for m in found]), *(f"{m[kind]:.3f}" for m in found)]
            for name, found in means.items()
        ]
        head = ["trained on", "mean ± sd", *(f"seed {seed.seed}" for seed in seeds)]
        parts.append(f"## Ranking {title} ({counts} pairs)\n\n{table(head, rows)}")
    head = ["pairs of", "", *(f"iteration {i}" for i in range(LAST + 1))]
    parts.append(f"## By iteration\n\n{table(head, by_iteration)}")
    rows = []
    for kind, title in KINDS.items():
        for a, b in (
            *(("sso", "pbaa"), ("sso", "prompted"), ("few_sso", "few"), ("few_sso", "few_long")),
            *(("few_pbaa", "few_long"), ("few_sso", "few_pbaa"), ("few_sso", "few_prompted")),
        ):
            apart = [x[kind] - y[kind] for x, y in zip(means[a], means[b], strict=True)]
            rows.append([title, f"{SETS[a][0]} - {SETS[b][0]}", spread(apart)])
            rows[-1] += [f"{value:+.3f}" for value in apart]
    head = ["on", "difference", "mean ± sd", *(f"seed {seed.seed}" for seed in seeds)]
    parts.append(f"## Differences within seeds\n\n{table(head, rows)}")
    rows = [
        [each.name, *(spread([m[f"feature/{each.name}"] for m in means[n]]) for n in SETS)]
        for each in world.FEATURES
    ]
    parts.append(
        "## What is rewarded\n\nShare of pairs of plain answers that differ in the feature in which"
        f" the answer that has it gets the higher reward.\n\n{table(['feature', *SETS], rows)}"
    )
    return "\n\n".join(parts)


def main() -> int:
    """Make what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="trainings per seed and set")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--tables", type=Path, help="write the tables to this file as well")
    given = parser.parse_args()
    torch.set_num_threads(1)
    out = given.out.resolve()
    first = Seed(0, out)
    lr, epochs = choose(first)
    seeds = [first, *(Seed(seed, out) for seed in range(1, given.seeds))]
    text = report(seeds, lr, epochs, given.repeats)
    tried = [[f"{r:g}", str(e), f"{first.rank('prompted', r, e, 0)['plain']:.3f}"] for r, e in GRID]
    text += f"\n\n## The settings\n\n{table(['rate', 'epochs', 'plain answers'], tried)}"
    if given.tables:
        given.tables.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
