"""Runs as one HTML file that needs nothing else: no network, no server, no other file.

The tables, alarms and charts are plain HTML, made here; `page.js` drives the browser of pairs from
the data inside the page. Texts of records reach the page as JSON whose
markup is escaped, and the script puts them there as text. A content security policy allows the
page's own script by its hash and nothing else, so nothing of a record can run or load.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from sso_lightning.records import RESPONSES
from sso_lightning.report.facts import FLAGS, findings, folded
from sso_lightning.report.figures import (
    NUMBERS,
    curve_charts,
    distributions,
    drift_of,
    numbers_of,
    set_charts,
)
from sso_lightning.report.health import RULES, Bounds, Reading, readings
from sso_lightning.report.read import Example, PairSet, Run
from sso_lightning.version import __version__

RECORD_BYTES = 6_000_000
"""What the records shown may take of the page, which is to stay under ten million."""
TEXT_LIMITS = (20_000, 6_000, 2_000, 600)
"""Characters of a text that are shown: the first limit under which the alarms' records fit."""
TOKEN_LIMIT = 1500

SUMMARY = {
    "model.policy.path": "model",
    "model.policy.lora": "LoRA",
    "model.policy.quantize": "quantised",
    "model.objective.class_path": "objective",
    "model.objective.init_args": "",
    "model.generator.objective.class_path": "generator's objective",
    "model.optimizer.class_path": "optimizer",
    "model.optimizer.init_args.lr": "learning rate",
    "model.schedule.kind": "schedule",
    "trainer.max_epochs": "iterations",
    "data.queries": "queries",
    "data.pairs": "pairs",
    "data.queries_per_iteration": "queries per iteration",
    "data.batch_size": "batch size",
    "pairs.sampler": "",
    "pairs.principles": "",
    "pairs.reference": "reference",
    "pairs.filters": "filters",
    "seed_everything": "seed",
}
"""Settings of the summary, by beginning of the dotted key."""


# ------------------------------------------------------------------------------------------ records


class _Records:
    """The records on the page: those that prove alarms, then as many of the draw as fit."""

    def __init__(self, runs: list[Run], fired: Iterable[Reading], most: int) -> None:
        self.strings: list[str] = []
        self._places: dict[str, int] = {}
        self.views: list[dict[str, Any]] = []
        self.at: dict[tuple[int, int, str], int] = {}
        sets = [(r, s, pairs) for r, run in enumerate(runs) for s, pairs in enumerate(run.sets)]
        proofs = {id(example) for reading in fired for example in reading.examples}
        held = [
            (r, s, example)
            for r, s, pairs in sets
            for example in _once([e for kept in pairs.strongest.values() for e in kept])
            if id(example) in proofs
        ]
        pieces = [_Pieces(run) for run in runs]
        self.limit = TEXT_LIMITS[-1]
        for limit in TEXT_LIMITS:
            if sum(_size(e, limit) for _, _, e in held) <= RECORD_BYTES / 2:
                self.limit = limit
                break
        left = RECORD_BYTES - sum(_size(e, self.limit) for _, _, e in held)
        each = max(most - len(held), 0) // max(len(sets), 1)
        drawn = [(r, s, example) for r, s, p in sets for example in p.sample[:each]]
        # the draw is by id, so that what is left out is the same in every set
        for r, s, example in sorted(drawn, key=lambda item: item[2].order):
            left -= _size(example, self.limit)
            if left < 0:
                break
            held.append((r, s, example))
        for r, s, example in sorted(held, key=lambda item: (item[0], item[1], item[2].order)):
            key = (r, s, example.record.id)
            if key not in self.at:
                self.at[key] = len(self.views)
                self.views.append(self._view(r, s, example, pieces[r]))

    def _intern(self, text: str) -> int:
        if text not in self._places:
            self._places[text] = len(self.strings)
            self.strings.append(text)
        return self._places[text]

    def _view(self, run: int, number: int, example: Example, pieces: _Pieces) -> dict[str, Any]:
        record, limit = example.record, self.limit
        texts = {name: getattr(record, name) for name in RESPONSES}
        principles = (
            *(record.good_principle, record.bad_principle),
            *(record.good_system, record.bad_system),
        )
        return {
            "id": record.id,
            "r": run,
            "s": number,
            "f": record.features,
            "q": [[turn["role"], turn["content"][:limit]] for turn in record.messages],
            "p": [self._intern(text[:limit]) for text in principles],
            "a": [text[:limit] for text in texts.values()],
            "cut": {name: len(text) for name, text in texts.items() if len(text) > limit},
            "n": {name: _short(value) for name, value in example.numbers.items()},
            "g": list(example.flags),
            "fold": folded(record),
            "c": findings(record),
            "unscreened": "unscreened" in record.content_flags,
            "instructed": record.bad_is_instructed,
            "notes": example.notes,
            "from": [record.query_source, record.principle_source],
            "finish": record.finish,
            **pieces.of(record),
        }


def _once(examples: list[Example]) -> list[Example]:
    return list({id(example): example for example in examples}.values())


def _size(example: Example, limit: int) -> int:
    """Bytes that a record takes on the page, about: markup is escaped to six."""
    record = example.record
    texts = [record.good, record.bad, record.original, record.good_principle]
    texts += [turn["content"] for turn in record.messages]
    shown = "".join(text[:limit] for text in texts)
    escaped = sum(shown.count(mark) for mark in "<>&'\"\n\\")
    tokens = sum(min(len(values), TOKEN_LIMIT) for values in record.token_scores.values())
    return len(shown.encode()) + 5 * escaped + 900 + 14 * tokens


class _Pieces:
    """Token texts by the run's own tokenizer, where it is on this machine."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._tokenizer: Any = None
        self._looked = False

    def of(self, record: Any) -> dict[str, Any]:
        """Token scores by sequence, and the tokens' texts (their ids where those are not known)."""
        scores: dict[str, list[float]] = {}
        for who in ("reference", "policy"):
            for key, values in record.token_scores.items():
                name, _, sequence = key.partition("/")
                if name == who:
                    scores[sequence] = [round(value, 2) for value in values[:TOKEN_LIMIT]]
        if not scores:
            return {}
        responses = {sequence.rpartition("/")[2] for sequence in scores}
        tokens = {name: self._texts(record.response_ids.get(name, ())) for name in responses}
        return {"scores": scores, "tokens": tokens}

    def _texts(self, ids: Any) -> list[str]:
        if not self._looked:
            self._looked = True
            self._tokenizer = self._find()
        if self._tokenizer is None:
            return [f"[{i}]" for i in ids[:TOKEN_LIMIT]]
        return [self._text(i) for i in ids[:TOKEN_LIMIT]]

    def _text(self, index: int) -> str:
        text = str(self._tokenizer.decode([index], skip_special_tokens=False))
        raw = self._tokenizer.id_to_token(index) or ""
        # this kind of vocabulary marks the space before a word, and decoding alone drops it
        return f" {text}" if raw.startswith("\u2581") and not text.startswith(" ") else text

    def _find(self) -> Any:
        from tokenizers import Tokenizer

        paths = [self.run.root / "export" / "tokenizer.json"]
        named = self.run.settings.get("model.policy.path", "")
        if named:
            paths += [self.run.root / named / "tokenizer.json"]
            from pathlib import Path

            paths += [Path(named) / "tokenizer.json"]
        for path in paths:
            if path.is_file():
                return Tokenizer.from_file(str(path))
        return None


def _short(value: float) -> float:
    """Five digits are enough for the eye, and save half of the page."""
    return float(f"{value:.5g}")


# ------------------------------------------------------------------------------------------ tables


def _drifts(run: Run) -> tuple[list[str], dict[str, list[float | None]]]:
    """Columns (set names) and rows of the drift table."""
    last: dict[str, PairSet] = {}
    columns: list[str] = []
    rows: dict[str, list[float | None]] = {}
    for pairs in run.sets:
        if pairs.kind != "other" and pairs.kind in last:
            columns.append(pairs.name)
            for label, value in drift_of(last[pairs.kind], pairs).items():
                rows.setdefault(label, []).append(value)
        last[pairs.kind] = pairs
    known = {label: row for label, row in rows.items() if any(v is not None for v in row)}
    return columns, known


def _summary(run: Run) -> list[tuple[str, str]]:
    rows = []
    for key, value in run.settings.items():
        begin = next((b for b in SUMMARY if key == b or key.startswith(f"{b}.")), None)
        if begin is None or value == "null":
            continue
        short = key.replace(".init_args", "").removesuffix(".class_path")
        label = SUMMARY[begin] if key == begin and SUMMARY[begin] else short
        rows.append((label, value.rpartition(".")[2] if key.endswith("class_path") else value))
    return rows


def _differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Settings in which the runs differ, without the paths of the runs themselves."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = [(key, [run.settings.get(key, "not set") for run in runs]) for key in keys]
    return [
        (key, values)
        for key, values in rows
        if len({*values}) > 1 and key != "trainer.default_root_dir"
    ]


def _verdict(run: Run, table: list[list[Reading]]) -> dict[str, Any]:
    """What a newcomer should read first."""
    signals = [row[0] for row in table if row[0].value is not None]
    lost = next((reading for reading in signals if reading.fired), None)
    fired = [reading for row in table for reading in row if reading.fired]
    return {
        "lost": lost,
        "known": bool(signals),
        "last": signals[-1] if signals else None,
        "first": fired[0] if fired else None,
        "held_out_end": run.curves.get("sandbox/signal_accuracy", [(0, None)])[-1][1],
    }


# --------------------------------------------------------------------------------------------- page


def _read(name: str) -> str:
    return files("sso_lightning.report").joinpath(name).read_text("utf-8")


def _hash(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def render(runs: list[Run], bounds: Bounds, *, max_records: int, seed: int) -> str:
    """The page.

    Args:
        runs: What `read_runs` gave.
        bounds: Of the alarms.
        max_records: Most records that the page holds, besides those that prove alarms.
        seed: Which records were drawn.
    """
    from jinja2 import Environment, StrictUndefined
    from jinja2.utils import htmlsafe_json_dumps

    tables = [readings(run, bounds) for run in runs]
    fired = [reading for table in tables for row in table for reading in row if reading.fired]
    records = _Records(runs, fired, max_records)
    data = {
        "flags": FLAGS,
        "numbers": NUMBERS,
        "strings": records.strings,
        "records": records.views,
        "runs": [
            {
                "name": run.name,
                "sets": [_set_data(pairs) for pairs in run.sets],
            }
            for run in runs
        ],
    }
    script = _read("page.js")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    template = environment.from_string(_read("page.html.j2"))
    shown = [
        {
            "run": run,
            "table": table,
            "verdict": _verdict(run, table),
            "alarms": _by_rule(table),
            "unknown": [
                rule
                for number, rule in enumerate(RULES)
                if table and all(row[number].value is None for row in table)
            ],
            "numbers": [numbers_of(run, pairs) for pairs in run.sets],
            "drift": _drifts(run),
            "summary": _summary(run),
            "reasons": sorted({reason for pairs in run.sets for reason in pairs.dropped}),
        }
        for run, table in zip(runs, tables, strict=True)
    ]
    return template.render(
        shown=shown,
        rules=RULES,
        labels=NUMBERS,
        set_charts=set_charts(runs),
        distributions=distributions(runs),
        curves=curve_charts(runs),
        differences=_differences(runs) if len(runs) > 1 else [],
        bounds=asdict(bounds),
        place=lambda r, s, example: records.at[r, s, example.record.id],
        folded=folded,
        total=sum(pairs.records for run in runs for pairs in run.sets),
        on_page=len(records.views),
        text_limit=records.limit,
        seed=seed,
        version=__version__,
        css=_read("page.css"),
        script=script,
        hash=_hash(script),
        data=htmlsafe_json_dumps(data, ensure_ascii=False, separators=(",", ":")),
    )


def _set_data(pairs: PairSet) -> dict[str, Any]:
    """What the filters of the page need of a set."""
    cells = [
        [list(features), list(flags), count] for (features, flags), count in pairs.cells.items()
    ]
    return {"name": pairs.name, "records": pairs.records, "cells": cells}


def _by_rule(table: list[list[Reading]]) -> list[list[tuple[int, Reading]]]:
    """Fired readings with the number of their set, one list a rule."""
    grouped = []
    for number in range(len(RULES)):
        fired = [(s, row[number]) for s, row in enumerate(table) if row[number].fired]
        if fired:
            grouped.append(fired)
    return grouped


def _number(value: float | None, sign: bool = False) -> str:
    """A number for a table; what is missing says so."""
    if value is None:
        return "not known"
    if float(value).is_integer() and abs(value) >= 10:
        return f"{value:+,.0f}" if sign else f"{value:,.0f}"
    digits = 1 if abs(value) >= 100 else 3
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
