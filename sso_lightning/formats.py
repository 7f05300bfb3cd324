"""Pairs in the formats of other trainers, and the files that hold them.

What is written here is read back by `records.load_records`. Text that was asked to be bad keeps
its marks (`MARKS`) as further columns, which the trainers ignore; plain training data takes `good`
only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sso_lightning.errors import InputError
from sso_lightning.records import (
    MARKS,
    Message,
    Record,
    iteration_sets,
    load_records,
    replace_file,
    write_records,
)
from sso_lightning.sources import is_hub, parse_json

COMPARED = {"query": ("good", "bad"), "good": ("good", "bad"), "bad": ("original", "good")}
"""Context to the (chosen, rejected) responses of the term that the 2024 objective trains there."""

Example = dict[str, Any]


def prompt_of(record: Record, context: str = "query") -> list[Message]:
    """The messages of one of the three prompts.

    Args:
        record: The record.
        context: query, or good or bad for the prompt with that principle as system message, after
            the query's own one if it has one.

    Raises:
        InputError: The record has no such system message.
    """
    if context == "query":
        return record.messages
    principle = record.good_system if context == "good" else record.bad_system
    if not principle:
        raise InputError(f"record {record.id!r} has no {context}_system")
    own = [m["content"] for m in record.messages if m["role"] == "system"]
    turns = [m for m in record.messages if m["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join([*own, principle])}, *turns]


def plain_examples(records: Iterable[Record]) -> Iterator[Example]:
    """Turn records into plain training examples, `{"messages": [...]}`.

    Only `good` can come through: no principle, and no text that was asked to be bad.
    """
    for record in records:
        yield {"messages": [*record.messages, _said(record.good)]}


def query_examples(records: Iterable[Record]) -> Iterator[Example]:
    """The queries of records, each once."""
    seen = set()
    for record in records:
        row = {"id": record.id, "messages": record.messages}
        key = json.dumps(row)
        if key not in seen:
            seen.add(key)
            yield row


def preference_examples(records: Iterable[Record], context: str = "query") -> Iterator[Example]:
    """Turn records into conversational preference data as TRL's `DPOTrainer` takes it.

    `load_records` reads them back with the same id, pair and marks.

    Args:
        records: The records.
        context: Prompt of the comparison, see `COMPARED` for its responses.

    Raises:
        InputError: A record lacks the system message or response of that context.
    """
    for record, (prompt, chosen, rejected, marks) in _compared(records, context):
        yield {
            "id": record.id,
            "prompt": prompt,
            "chosen": [_said(chosen)],
            "rejected": [_said(rejected)],
            **marks,
        }


def reward_examples(records: Iterable[Record], context: str = "query") -> Iterator[Example]:
    """The same with whole conversations and no prompt, as TRL's `RewardTrainer` takes it."""
    for record, (prompt, chosen, rejected, marks) in _compared(records, context):
        yield {
            "id": record.id,
            "chosen": [*prompt, _said(chosen)],
            "rejected": [*prompt, _said(rejected)],
            **marks,
        }


def ranking_examples(records: Iterable[Record], context: str = "query") -> Iterator[Example]:
    """The same in LLaMA-Factory's ranking format with ShareGPT's roles.

    Raises:
        InputError: As `preference_examples`, or the turns of a query do not alternate: such rows
            are left out over there.
    """
    tags = {"user": "human", "assistant": "gpt"}
    for record, (prompt, chosen, rejected, marks) in _compared(records, context):
        system = [turn["content"] for turn in prompt if turn["role"] == "system"]
        turns = [turn for turn in prompt if turn["role"] != "system"]
        if [turn["role"] for turn in turns] != [
            ("user", "assistant")[i % 2] for i in range(len(turns))
        ]:
            raise InputError(
                f"record {record.id!r}: user and assistant do not take turns, which LLaMA-Factory "
                "would leave out; leave the record out yourself"
            )
        yield {
            "id": record.id,
            "conversations": [{"from": tags[t["role"]], "value": t["content"]} for t in turns],
            "system": "".join(system),
            "chosen": {"from": "gpt", "value": chosen},
            "rejected": {"from": "gpt", "value": rejected},
            **marks,
        }


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _compared(
    records: Iterable[Record], context: str
) -> Iterator[tuple[Record, tuple[list[Message], str, str, Example]]]:
    for record in records:
        chosen, rejected = (getattr(record, response) for response in COMPARED[context])
        if not (chosen and rejected):
            raise InputError(f"record {record.id!r} has no original, which context bad compares")
        marks = {mark: getattr(record, mark) for mark in MARKS} | {"context": context}
        yield record, (prompt_of(record, context), chosen, rejected, marks)


# ----------------------------------------------------------------------------------------- files

_COMPARING: dict[str, Callable[..., Iterator[Example]]] = {
    "trl": preference_examples,
    "reward": reward_examples,
    "llamafactory": ranking_examples,
}
_ONE_SIDED: dict[str, Callable[..., Iterator[Example]]] = {
    "sft": plain_examples,
    "queries": query_examples,
}
FORMATS = ("records", *_COMPARING, *_ONE_SIDED)
_SUFFIXES = (".jsonl", ".json", ".parquet")


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples to one file, whole or not at all.

    Args:
        path: A .jsonl, .json or .parquet file; replaced if it exists.
        examples: All with the same keys.

    Raises:
        InputError: The ending is another one or the disk refuses.
    """
    if path.suffix == ".parquet":
        replace_file(path, _parquet_bytes(examples))
    elif path.suffix == ".json":
        replace_file(path, (json.dumps(examples, ensure_ascii=False, indent=1) + "\n").encode())
    elif path.suffix == ".jsonl":
        lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        replace_file(path, "".join(lines).encode())
    else:
        raise InputError(f"{path}: unknown file type; give one of {', '.join(_SUFFIXES)}")


def _parquet_bytes(examples: Sequence[Example]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.Table.from_pylist(list(examples)).schema
    if "content_flags" in schema.names:  # empty lists alone do not tell what they would hold
        index = schema.get_field_index("content_flags")
        schema = schema.set(index, pa.field("content_flags", pa.list_(pa.string())))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(examples), schema=schema), sink)
    return bytes(sink.getvalue())


def records_of(source: str, iteration: int | None = None) -> list[Record]:
    """The training pairs of a run folder, or the records of any other source.

    Args:
        source: A run folder, or what `load_records` reads.
        iteration: Only this one.

    Raises:
        InputError: There is none.
    """
    path = Path(source)
    if not is_hub(source) and (path / "pairs").is_dir():
        sets = iteration_sets(path)
        if not sets:
            others = ", ".join(sorted(f"pairs/{p.name}" for p in (path / "pairs").iterdir()))
            raise InputError(
                f"{path}: no pairs of an iteration; give one of {others or 'its sets'}"
            )
        records = [record for folder in sets.values() for record in load_records(folder)]
    else:
        records = load_records(source)
    if iteration is not None:
        there = sorted({record.iteration for record in records})
        records = [record for record in records if record.iteration == iteration]
        if not records:
            raise InputError(
                f"{source}: no record of iteration {iteration}; has {', '.join(map(str, there))}"
            )
    if not records:
        raise InputError(f"{source}: holds no record")
    return records


def _with_own_ids(records: Sequence[Record]) -> list[Record]:
    """Records of several iterations with ids that differ: a query returns with the id it had."""
    times = Counter(record.id for record in records)
    return [
        replace(r, id=f"{r.id}/iteration-{r.iteration}") if times[r.id] > 1 else r for r in records
    ]


def export_pairs(
    source: str, out: Path, to: str, *, which: str = "query", iteration: int | None = None
) -> str:
    """Write pairs as a file for another trainer, or for this one.

    Args:
        source: A run folder, or what `load_records` reads.
        out: File to write; must not exist.
        to: One of `FORMATS`.
        which: Prompt of the comparison, for trl, reward and llamafactory.
        iteration: Only this one.

    Returns:
        What was done, for the user.

    Raises:
        InputError: Something of it is not possible; nothing is written then.
    """
    if to not in _COMPARING and which != "query":
        raise InputError(f"--which {which} does not go with --to {to}")
    endings = _SUFFIXES if to != "records" else (".jsonl", ".parquet")
    if out.suffix not in endings:
        raise InputError(f"--out {out}: unknown file type; give one of {', '.join(endings)}")
    if out.exists():
        raise InputError(f"--out {out}: already exists; remove it or give another name")
    records = records_of(source, iteration)
    if to == "records":
        write_records(out, records)
        return _told(out, to, len(records), records)
    if to in _ONE_SIDED:
        examples = [*_ONE_SIDED[to](records)]
        write_examples(out, examples)
        return _told(out, to, len(examples), records, marked=False)
    examples = [*_COMPARING[to](_with_own_ids(records), which)]
    description = _description(out) if to == "llamafactory" else None
    write_examples(out, examples)
    told = _told(out, f"{to}, context {which}", len(examples), records)
    if description:
        replace_file(*description)
        told += f"described as {out.stem!r} in {description[0]}\n"
    return told


def _description(out: Path) -> tuple[Path, bytes]:
    """LLaMA-Factory's dataset_info.json beside the file, with an entry for it."""
    path = out.with_name("dataset_info.json")
    entry = {
        "file_name": out.name,
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {
            "messages": "conversations",
            "system": "system",
            "chosen": "chosen",
            "rejected": "rejected",
        },
    }
    known = parse_json(path.read_bytes(), str(path)) if path.exists() else {}
    if not isinstance(known, dict):
        raise InputError(f"{path}: not an object of data sets; give --out in another folder")
    if known.get(out.stem, entry) != entry:
        raise InputError(f"{path}: has another entry {out.stem!r}; give --out another name")
    text = json.dumps(known | {out.stem: entry}, ensure_ascii=False, indent=2)
    return path, (text + "\n").encode()


def _told(
    out: Path, about: str, written: int, records: Sequence[Record], marked: bool = True
) -> str:
    """What was written of how many records, and under which marks."""
    lines = f"wrote {written} rows of {len(records)} records to {out} ({about})\n"
    if not marked:
        return lines + "texts that were asked to be bad are not in it\n"
    modes = Counter(record.safety_mode or "unknown" for record in records)
    flags = Counter(flag for record in records for flag in record.content_flags)
    found = [f"bad_is_instructed {sum(record.bad_is_instructed for record in records)}"]
    found += [f"safety_mode {mode} {count}" for mode, count in sorted(modes.items())]
    found += [f"content_flags {flag} {count}" for flag, count in sorted(flags.items())]
    return lines + f"marked in it: {', '.join(found)}\n"
