"""A run folder as numbers: every record is counted, one shard in memory at a time.

Nothing is written, so a run that is going on can be read. What is damaged or missing is named in
`Run.problems`, never passed over in silence.
"""

from __future__ import annotations

import csv
import hashlib
import heapq
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from sso_lightning.errors import InputError, hide_keys
from sso_lightning.evaluation import read_scores
from sso_lightning.principles import principle_rates
from sso_lightning.records import RESPONSES, PairStore, Record, load_records, stream_seed
from sso_lightning.report.facts import (
    Lore,
    Repeats,
    findings,
    flags_of,
    folded,
    leak_of,
    lore_of,
    measures_of,
)

PROOFS = {
    **dict.fromkeys(("truth_gap", "gap_logp", "logp_good", "logp_bad"), -1.0),
    **{f"length_{name}": 1.0 for name in RESPONSES},
    **{f"characters_{name}": 1.0 for name in RESPONSES},
    **{f"{k}_{name}": 1.0 for k in ("truncated", "leak", "duplicate") for name in RESPONSES},
    "fallback": 1.0,
}
"""Measures of which each set keeps its strongest records, and whether large (1) or small ones."""
STRONGEST = 3

HISTOGRAMS: dict[str, tuple[float, float, int]] = {
    "weight": (0.5, 1.0, 25),
    **{f"on_policy_{name}": (0.0, 1.0, 20) for name in RESPONSES},
    "gap_logp": (-2.0, 2.0, 32),
}
"""Measure to lowest value, highest value and bins; what lies outside counts in the outer bins."""
LENGTH_BINS = 17  # 1, 2 to 3, 4 to 7, ... tokens

_SET = re.compile(r"(iteration|generator)-(\d+)|(offline\S*|predict)")


@dataclass
class Example:
    """A record that is shown: what the page needs of it, without its token ids."""

    order: int
    record: Record
    numbers: dict[str, float]
    flags: tuple[str, ...]
    notes: dict[str, str]
    """What was found: "leak_good" to the words, "duplicate_good" to the other record's id."""

    def __lt__(self, other: Example) -> bool:
        """By a number drawn from the seed and the record's id."""
        return self.order < other.order


@dataclass
class PairSet:
    """One set of pairs: counts and means over all its records, and a few of them.

    Attributes:
        name: Folder below `pairs/`.
        kind: "iteration", "generator" or "other".
        number: Of the iteration.
        complete: Whether the run finished the set.
        records: Records read.
        means: Measure to its mean over the records that have it.
        errors: Measure to the standard error of its mean.
        known: Measure to the number of records that have it.
        reported: What the run wrote about the set itself (`pairs/...`).
        dropped: Reason to queries.
        features: Feature to records.
        cells: (features, flags) to records: what every filter of the page counts with.
        marks: Records by what they are marked as: safety mode, content flags, instructed, folded.
        histograms: Measure to counts, bins as in `HISTOGRAMS`; `length_...` by powers of two.
        ids: Hashes of the queries' ids, to see how many the next set shares.
        strongest: Measure to the records that show it best, strongest first.
        sample: Records drawn by their ids, first ones first.
    """

    name: str
    kind: str
    number: int
    complete: bool
    records: int = 0
    means: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    known: dict[str, int] = field(default_factory=dict)
    reported: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    features: Counter[str] = field(default_factory=Counter)
    cells: Counter[tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=Counter)
    marks: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, list[int]] = field(default_factory=dict)
    ids: set[int] = field(default_factory=set)
    strongest: dict[str, list[Example]] = field(default_factory=dict)
    sample: list[Example] = field(default_factory=list)


@dataclass
class Run:
    """One run folder.

    Attributes:
        name: To tell runs apart.
        root: The folder.
        settings: Dotted key of config.yaml to its value as text.
        objective: Class name of the objective; "" if not known.
        alpha: Of W, None where there is none; see `weight_note`.
        weight_note: Why there is no W, or "".
        curves: Column of metrics.csv to (optimizer step, value) pairs.
        sets: In the order in which they were made.
        evaluations: Metric to iterations of training to (mean score, number of items).
        problems: What could not be read.
    """

    name: str
    root: Path
    settings: dict[str, str] = field(default_factory=dict)
    objective: str = ""
    alpha: float | None = None
    weight_note: str = ""
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    sets: list[PairSet] = field(default_factory=list)
    evaluations: dict[str, dict[int, tuple[float, int]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


Cache = MutableMapping[tuple[str, str], PairSet]
"""Sets that were read before, by folder and hash of the manifest."""


def read_runs(
    roots: list[Path], *, seed: int = 0, keep: int = 1500, cache: Cache | None = None
) -> list[Run]:
    """Read run folders.

    Args:
        roots: The folders.
        seed: Which records are kept to be shown.
        keep: Most records of a set that are kept.
        cache: Sets that need not be read again.

    Raises:
        InputError: A folder is not a run's.
    """
    names = Counter(root.resolve().name for root in roots)
    runs = []
    for number, root in enumerate(roots, 1):
        name = root.resolve().name
        if names[name] > 1:
            name = f"{root.resolve().parent.name}/{name} ({number})"
        runs.append(_read_run(root, name, seed, keep, {} if cache is None else cache))
    return runs


def _read_run(root: Path, name: str, seed: int, keep: int, cache: Cache) -> Run:
    if not root.is_dir():
        raise InputError(f"{root}: no such run folder")
    run = Run(name, root)
    folders = _set_folders(root)
    if not folders and not (root / "metrics.csv").is_file():
        raise InputError(f"{root}: not the folder of a run: neither metrics.csv nor pairs/ in it")
    lore = _read_settings(run)
    _read_curves(run)
    _read_evaluations(run)
    for match, folder in folders:
        manifest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
        key = (str(folder.resolve()), manifest)
        if key not in cache:
            pairs, problems = _read_set(match, folder, lore, seed, keep)
            run.problems += problems
            if not problems and pairs.complete:
                cache[key] = pairs
        else:
            pairs = cache[key]
        run.sets.append(pairs)
    return run


def _set_folders(root: Path) -> list[tuple[re.Match[str], Path]]:
    """The sets of a run in order: generator before policy in every iteration, then others."""
    found = []
    for manifest in root.glob("pairs/*/manifest.json"):
        match = _SET.fullmatch(manifest.parent.name)
        if match:
            found.append((match, manifest.parent))
    return sorted(found, key=lambda x: (not x[0][1], int(x[0][2] or 0), x[0][1] or "", x[1].name))


# --------------------------------------------------------------------------------- settings, curves


def _read_evaluations(run: Run) -> None:
    try:
        scores = read_scores(run.root)
    except InputError as error:
        run.problems.append(str(error))
        return
    run.evaluations = {
        metric: {i: (fmean(own.values()), len(own)) for i, own in by.items() if own}
        for metric, by in scores.items()
    }


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _flat(item, f"{place}.{index}")
    else:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        yield place, hide_keys(text)


def _read_settings(run: Run) -> Lore:
    path = run.root / "config.yaml"
    config: Any = None
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        run.problems.append("config.yaml is missing: settings are not known")
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.problems.append(f"config.yaml cannot be read: {' '.join(str(error).split())[:200]}")
    config = config if isinstance(config, dict) else {}
    run.settings = dict(_flat(config))

    def part(*keys: str) -> dict[str, Any]:
        value: Any = config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else {}

    objective = part("model", "objective")
    run.objective = str(objective.get("class_path", "")).rpartition(".")[2]
    arguments = part("model", "objective", "init_args")
    alpha = arguments.get("alpha")
    if not run.objective:
        run.weight_note = "not known: the objective is not known"
    elif not isinstance(alpha, int | float):
        run.weight_note = f"not used: {run.objective} has no alpha"
    elif arguments.get("weight") is False:
        run.weight_note = f"not used: {run.objective} runs with weight: false"
    else:
        run.alpha = float(alpha)
    return lore_of(part("pairs", "principles", "init_args"), run.alpha)


def _read_curves(run: Run) -> None:
    path = run.root / "metrics.csv"
    if not path.is_file():
        run.problems.append("metrics.csv is missing: training curves are not known")
        return
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    odd = 0
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            try:
                step = int(row.get("step") or 0)
            except ValueError:
                odd += 1
                continue
            for name, text in row.items():
                if not text or name in (None, "step", "epoch"):
                    continue
                try:
                    value = float(text)
                except (TypeError, ValueError):
                    value = math.nan
                if math.isfinite(value):
                    curves[name].append((step, value))
                else:
                    odd += 1
    if odd:
        run.problems.append(f"metrics.csv: {odd} values are no finite numbers and are left out")
    run.curves = dict(curves)


# -------------------------------------------------------------------------------------------- sets


def _read_set(
    match: re.Match[str], folder: Path, lore: Lore, seed: int, keep: int
) -> tuple[PairSet, list[str]]:
    # `helps` only reads the manifest: an owner would set damaged shards of a running fit aside
    store = PairStore(folder, helps=True)
    pairs = PairSet(folder.name, match[1] or "other", int(match[2] or 0), store.complete)
    pairs.reported = {
        name.partition("/")[2]: float(value)
        for name, value in store.report.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    problems = [] if store.complete else [f"{folder.name}: the set is not complete"]
    tally = _Tally(pairs, lore, seed, keep)
    dropped: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for shard in store.shards().values():
        path = folder / shard.file
        try:
            whole = hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256
            records = load_records(path) if whole and shard.records else []
        except (OSError, InputError) as error:
            whole, records = False, []
            problems.append(f"{folder.name}: {shard.file} cannot be read ({error})")
        else:
            if not whole:
                problems.append(f"{folder.name}: {shard.file} does not match its checksum")
        if not whole:
            continue
        dropped.update(shard.info.get("dropped") or {})
        counts.update(shard.info.get("counts") or {})
        for record in records:
            tally.add(record)
    pairs.dropped = dict(dropped)
    tally.finish()
    rates = {name.partition("/")[2]: rate for name, rate in principle_rates(counts).items()}
    pairs.means |= rates
    return pairs, problems


class _Tally:
    """Adds up the records of a set and keeps those that are shown."""

    def __init__(self, pairs: PairSet, lore: Lore, seed: int, keep: int) -> None:
        self.pairs, self.lore, self.seed, self.keep = pairs, lore, seed, keep
        self.sums: dict[str, float] = defaultdict(float)
        self.squares: dict[str, float] = defaultdict(float)
        self.repeats = Repeats()
        self.drawn: list[tuple[int, int, Example]] = []
        self.extremes: dict[str, list[tuple[float, int, Example]]] = defaultdict(list)

    def add(self, record: Record) -> None:
        pairs = self.pairs
        numbers = measures_of(record, self.lore)
        notes = {f"duplicate_{name}": first for name, first in self.repeats(record).items()}
        for name in RESPONSES:
            if getattr(record, name):
                if words := leak_of(record, name, self.lore):
                    notes[f"leak_{name}"] = words
                for found in (f"leak_{name}", f"duplicate_{name}"):
                    numbers[found] = float(found in notes)
        flags = flags_of(record, numbers)
        # by the id alone, so that sets and runs with the same queries show the same ones
        order = stream_seed(self.seed, record.id)

        pairs.records += 1
        pairs.ids.add(order)
        for name, value in numbers.items():
            self.sums[name] += value
            self.squares[name] += value * value
            pairs.known[name] = pairs.known.get(name, 0) + 1
            _count(pairs.histograms, name, value)
        pairs.features.update(record.features or ["(none named)"])
        pairs.cells[tuple(record.features), flags] += 1
        pairs.marks.update(_marks(record))
        record.prompt_ids = {}  # most of a record's memory, and not shown
        if not record.token_scores:
            record.response_ids = {}
        self._keep(Example(order, record, numbers, flags, notes))

    def _keep(self, example: Example) -> None:
        """Hold the first records in order of the draw, and the strongest of every measure."""
        number = self.pairs.records  # no two examples are compared
        _push(self.drawn, (-example.order, number, example), self.keep)
        for name, sign in PROOFS.items():
            value = example.numbers.get(name)
            binary = name.startswith(("truncated", "leak", "duplicate", "fallback"))
            if value is not None and (value or not binary):
                _push(self.extremes[name], (sign * value, -number, example), STRONGEST)

    def finish(self) -> None:
        pairs = self.pairs
        pairs.means = {name: total / pairs.known[name] for name, total in self.sums.items()}
        pairs.errors = {
            name: math.sqrt(max(self.squares[name] / n - pairs.means[name] ** 2, 0.0) / n)
            for name, n in pairs.known.items()
        }
        pairs.sample = [example for _, _, example in sorted(self.drawn, reverse=True)]
        pairs.strongest = {
            name: [example for _, _, example in sorted(kept, reverse=True)]
            for name, kept in self.extremes.items()
        }


def _push(heap: list[Any], item: Any, most: int) -> None:
    if len(heap) < most:
        heapq.heappush(heap, item)
    elif heap and heap[0] < item:
        heapq.heapreplace(heap, item)


def _count(histograms: dict[str, list[int]], name: str, value: float) -> None:
    if name.startswith("length_"):
        bins, index = LENGTH_BINS, int(value).bit_length() - 1
    elif name in HISTOGRAMS:
        low, high, bins = HISTOGRAMS[name]
        index = math.floor((value - low) / (high - low) * bins)
    else:
        return
    histograms.setdefault(name, [0] * bins)[min(max(index, 0), bins - 1)] += 1


def _marks(record: Record) -> Iterator[str]:
    yield f"safety mode: {record.safety_mode or 'not known'}"
    yield "asked to be bad" if record.bad_is_instructed else "not asked to be bad"
    if folded(record):
        yield "folded"
    for flag in findings(record):
        yield f"flag: {flag}"
    if "unscreened" in record.content_flags:
        yield "unscreened"
