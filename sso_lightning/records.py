"""What a query and a record are, and how they are read and stored.

A record holds one query, its pair of opposed principles and the three responses sampled for it.
Records are stored as Parquet shards (`PairStore`) and read from any source (`load_records`), also
in the authors' formats and as plain preference data; `formats` writes those of other trainers.
Reading never loses anything silently: whatever cannot be kept is an `InputError` naming file and
line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

from sso_lightning.errors import InputError
from sso_lightning.sources import Row, parse_json, rows_of

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

CONTEXTS = ("query", "good", "bad")
RESPONSES = ("good", "bad", "original")
MARKS = ("bad_is_instructed", "safety_mode", "content_flags")
"""What every file says of texts that were asked to be bad."""
SCHEMA_VERSION = 2

_ROLES = ("system", "user", "assistant")
_QUERY_KEYS = ("messages", "prompt", "instruction", "query", "question", "conversations")
# where there are answers, `messages` may be a whole conversation that repeats one of them
_ASKED_KEYS = (*_QUERY_KEYS[1:], "messages")
_SHARED = {"human": "user", "gpt": "assistant"}  # ShareGPT's names of the roles


@dataclass(frozen=True)
class Query:
    """A conversation that waits for an answer.

    Attributes:
        id: Given in the file, or a hash of the messages.
        messages: Turns, the last one a user's; only the first may be a system message.
        source: File and line the query was read from, and what the row's own `source` says.
    """

    id: str
    messages: list[Message]
    source: str = ""


@dataclass(kw_only=True)
class Record:
    """One query with its principles, prompts and responses.

    Token ids are those the sampler was given and those it emitted; imported data has none. Dicts
    by context use the keys of `CONTEXTS`, dicts by response those of `RESPONSES`.

    Attributes:
        id: Of the query.
        messages: The query without principle, last turn a user's.
        features: Names of the features steered by, most important first.
        good_principle: Text of p+.
        bad_principle: Text of p-.
        good_system: System message that turns x into x+.
        bad_system: System message that turns x into x-.
        good: y+, cleaned.
        bad: y-, cleaned.
        original: yo, cleaned.
        prompt_ids: Token ids of the three prompts, by context.
        response_ids: Token ids of the three responses, by response.
        finish: Why each response ended: "stop", "length", or "" when unknown.
        iteration: Which set the record belongs to.
        seed: Seed of the run.
        sampler: Settings of the sampler, JSON values only.
        engine: Name of the sampling engine.
        policy: Name or hash of the sampling policy.
        adapter: Name or hash of its adapter.
        template: Hash of the chat template the prompts were rendered with.
        query_source: Where the query comes from.
        principle_source: Where the principles come from.
        safety_mode: "careless", "paper", "off", or "" when unknown.
        bad_is_instructed: True when `bad` was asked to be bad.
        content_flags: Findings of a content classifier; "unscreened" until one ran.
        schema_version: Of this layout.
        scores: Summed log-probabilities in nats, by "policy/<context>/<response>" and
            "reference/<context>/<response>".
        token_scores: Log-probabilities of every token of a response, by the same keys, where an
            objective needs them.
    """

    id: str
    messages: list[Message]
    features: list[str] = field(default_factory=list)
    good_principle: str = ""
    bad_principle: str = ""
    good_system: str = ""
    bad_system: str = ""
    good: str
    bad: str
    original: str = ""
    prompt_ids: dict[str, list[int]] = field(default_factory=dict)
    response_ids: dict[str, list[int]] = field(default_factory=dict)
    finish: dict[str, str] = field(default_factory=dict)
    iteration: int = 0
    seed: int = 0
    sampler: dict[str, Any] = field(default_factory=dict)
    engine: str = ""
    policy: str = ""
    adapter: str = ""
    template: str = ""
    query_source: str = ""
    principle_source: str = ""
    safety_mode: str = ""
    bad_is_instructed: bool = True
    content_flags: list[str] = field(default_factory=lambda: ["unscreened"])
    schema_version: int = SCHEMA_VERSION
    scores: dict[str, float] = field(default_factory=dict)
    token_scores: dict[str, list[float]] = field(default_factory=dict)


def stream_seed(seed: int, *key: object) -> int:
    """Derive a seed that depends on nothing but `seed` and `key`.

    Args:
        seed: Seed of the run.
        *key: What the seed is for, such as (iteration, record id, purpose); compared as text.

    Returns:
        An integer in [0, 2**63), the same on every machine and in every process.
    """
    text = json.dumps([str(part) for part in (seed, *key)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


# ---------------------------------------------------------------------------------------- values


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} holds half of a surrogate pair; mend its encoding") from None
    return value


def _filled(value: Any, what: str) -> str:
    if not _text(value, what).strip():
        raise InputError(f"{what} is empty")
    return str(value)


def _integer(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise InputError(f"{what} must be a 64-bit integer")
    return value


def _boolean(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{what} must be true or false")
    return value


def _texts(value: Any, what: str) -> list[str]:
    if not isinstance(value, list):
        raise InputError(f"{what} must be a list of texts")
    return [_text(item, what) for item in value]


def _messages(value: Any, what: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{what} must be a list of messages, at least one")
    messages = []
    for number, turn in enumerate(value, 1):
        name = f"{what}: message {number}"
        if isinstance(turn, dict) and "from" in turn and "role" not in turn:
            said = turn.get("from")
            role = _SHARED.get(said, said) if isinstance(said, str) else None
            others = {key: item for key, item in turn.items() if key not in ("from", "value")}
            turn = {"role": role, "content": turn.get("value"), **others}
        if not isinstance(turn, dict) or turn.get("role") not in _ROLES:
            raise InputError(f"{name} needs a role, one of {', '.join(_ROLES)}, and a content")
        unknown = [key for key in turn if key not in ("role", "content") and turn[key] is not None]
        if unknown:
            raise InputError(f"{name} has the key {unknown[0]!r}, which is not rendered; remove it")
        if turn["role"] == "system" and number > 1:
            raise InputError(f"{name} is a system message; only the first message may be one")
        content = _filled(turn.get("content"), f"{name}: content")
        messages.append({"role": turn["role"], "content": content})
    return messages


def _query(value: Any, what: str) -> list[Message]:
    messages = _messages(value, what)
    if messages[-1]["role"] != "user":
        raise InputError(f"{what} must end with a user's turn, not with the answer")
    return messages


def _keyed(value: Any, what: str, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """A JSON or Parquet mapping without its empty entries, which stand for absent struct fields."""
    if isinstance(value, list) and all(isinstance(v, tuple) and len(v) == 2 for v in value):
        value = dict(value)  # how pyarrow gives a map
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{what} must be a mapping")
    present = {_text(key, what): item for key, item in value.items() if item is not None}
    unknown = [key for key in present if keys is not None and key not in keys]
    if unknown:
        raise InputError(f"{what} has the unknown key {unknown[0]!r}, not {'/'.join(keys or ())}")
    return present


def _token_ids(value: Any, what: str) -> list[int]:
    if (
        not isinstance(value, list)
        or not all(type(i) is int for i in value)
        or (value and not (min(value) >= 0 and max(value) < 2**31))
    ):
        raise InputError(f"{what} must be a list of token ids")
    return value


def _finish(value: Any, what: str) -> str:
    if value not in ("stop", "length", ""):
        raise InputError(f'{what} must be "stop", "length" or ""')
    return str(value)


def _settings(value: Any, what: str) -> dict[str, Any]:
    if isinstance(value, str):  # Parquet keeps the settings as JSON text
        value = parse_json(value, what)
    if not isinstance(value, dict):
        raise InputError(f"{what} must be a mapping")
    _text(json.dumps(value, ensure_ascii=False), what)
    return value


def _scores(value: Any, what: str) -> dict[str, float]:
    scores = _keyed(value, what)
    for key, score in scores.items():
        if not isinstance(score, float):
            if type(score) is not int or abs(score) >= 2**63:
                raise InputError(f"{what}: {key} must be a number")
            scores[key] = float(score)
        if not math.isfinite(scores[key]):
            raise InputError(f"{what}: {key} is {score}, which is not finite")
    return scores


def _token_scores(value: Any, what: str) -> dict[str, list[float]]:
    scores = _keyed(value, what)
    for key, values in scores.items():
        if not isinstance(values, list):
            raise InputError(f"{what}: {key} must be a list of numbers")
        at = {str(index): number for index, number in enumerate(values)}
        scores[key] = [*_scores(at, f"{what}: {key}").values()]
    return scores


def _version(value: Any, what: str) -> int:
    if _integer(value, what) < 1:
        raise InputError(f"{what} is {value}; versions begin with 1")
    return int(value)


def _by(keys: Sequence[str], read: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    return lambda value, what: {
        key: read(item, f"{what}: {key}") for key, item in _keyed(value, what, keys).items()
    }


# How a stored value becomes a field: by name where the field has a reader of its own, else by type.
_READERS: dict[str, Callable[[Any, str], Any]] = {
    "messages": _query,
    "prompt_ids": _by(CONTEXTS, _token_ids),
    "response_ids": _by(RESPONSES, _token_ids),
    "finish": _by(RESPONSES, _finish),
    "sampler": _settings,
    "scores": _scores,
    "token_scores": _token_scores,
    "schema_version": _version,
    "str": _text,
    "int": _integer,
    "bool": _boolean,
    "list[str]": _texts,
}
_FIELDS = {f.name: _READERS.get(f.name) or _READERS[str(f.type)] for f in fields(Record)}
_JSON_CELLS = {name for name, read in _FIELDS.items() if read is not _text}
_JSON_CELLS |= {"conversations", "history", "principles"}


# --------------------------------------------------------------------------------------- reading

# Fields that only `data.columns` may name, beside those of a query.
_PAIR_KEYS = {
    **{"chosen": "good", "rejected": "bad", "raw": "original"},
    **{"p_system": "good_system", "n_system": "bad_system"},
}
_QUERY_FIELDS = (*_QUERY_KEYS, "id", "input", "system", "history")
_PAIR_FIELDS = (
    *(*_QUERY_FIELDS, *_PAIR_KEYS, *_PAIR_KEYS.values()),
    *("good_principle", "bad_principle", "principles", *MARKS),
)


def _cell(key: str, cell: str, what: str) -> Any:
    """A cell of a table as the value of a field: JSON where the field is not a text."""
    text = cell.strip()
    if key in ("prompt", "chosen", "rejected", "raw", "good", "bad", "original"):
        if text.startswith("[{'"):
            raise InputError(f"{what} looks like messages in Python's notation; write JSON")
        if text.startswith(("[{", "{")):
            with contextlib.suppress(InputError):
                value = parse_json(text, what)
                turns = value if isinstance(value, list) else [value]
                if all(isinstance(x, dict) and ("role" in x or "from" in x) for x in turns):
                    return value
        return cell
    if key == "bad_is_instructed":
        text = text.lower()  # spreadsheets write TRUE
    if key in _JSON_CELLS:
        return parse_json(text, what) if text else None
    return cell


def _read(
    source: str | Path, columns: Mapping[str, str] | None, fields: Sequence[str]
) -> Iterator[Row]:
    """Rows of a source with the columns of those fields; a set of pairs by its manifest."""
    unknown = [key for key in columns or {} if key not in _PAIR_FIELDS]
    if unknown:
        raise InputError(
            f"data.columns: unknown field {unknown[0]!r}; give some of {', '.join(fields)}"
        )
    path = Path(source)
    if (path / _MANIFEST).is_file():
        manifest = _read_manifest(path)
        if not manifest.complete:
            warnings.warn(f"{path}: the set is not complete; reading what it has", stacklevel=3)
        broken = [s.file for s in manifest.shards.values() if not _intact(path, s)]
        if broken:
            raise InputError(f"{path / broken[0]}: does not match its checksum; write it again")
        yield from _shard_rows(path, manifest)
        return
    for row in rows_of(source, {k: v for k, v in (columns or {}).items() if k in fields}):
        if row.cells:
            values = {k: _cell(k, v, row.what(k)) for k, v in row.values.items()}
            row = replace(row, values=values)
        yield row


class _Ids:
    """Hands out ids for the rows of one load: the given one, or a hash and an ordinal."""

    def __init__(self) -> None:
        self.seen: dict[tuple[object, ...], str] = {}
        self.repeats: Counter[str] = Counter()

    def __call__(self, row: Row, messages: list[Message], *scope: object) -> str:
        key = next((key for key in ("id", "idx", "uuid") if row.get(key) is not None), "id")
        given = row.get(key)
        if given is None:
            digest = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]
            self.repeats[digest] += 1
            ordinal = self.repeats[digest]
            given = digest if ordinal == 1 else f"{digest}-{ordinal}"
        name = _filled(str(given) if type(given) is int else given, row.what(key))
        first = self.seen.setdefault((name, *scope), row.where)
        if first != row.where:
            raise InputError(f"{row.where}: the id {name!r} is already used in {first}")
        return name


def _conversation(row: Row, keys: Sequence[str] = _QUERY_KEYS) -> list[Message]:
    """The query of a row, from the first of the keys it has, or the one `data.columns` names."""
    named = [key for key in keys if key in row.columns]
    key = next((key for key in named or keys if row.get(key) is not None), None)
    if key is None and named:
        raise InputError(f"{row.what(named[0])} is missing")
    if key is None:
        raise InputError(f"{row.where}: no query; give one of {', '.join(keys)}")
    value, what = row.get(key), row.what(key)
    if not isinstance(value, str | list):
        raise InputError(f"{what} must be text or a list of messages, not {type(value).__name__}")
    if isinstance(value, str):
        text = _filled(value, what)
        if key == "instruction" and row.get("input"):
            text = f"{text}\n{_text(row.get('input'), row.what('input'))}"
        history = row.get("history") or []
        if not isinstance(history, list) or any(
            not isinstance(turn, list) or len(turn) != 2 for turn in history
        ):
            raise InputError(f"{row.what('history')} must be a list of [query, answer] pairs")
        turns = [
            {"role": role, "content": said}
            for turn in history
            for role, said in zip(("user", "assistant"), turn, strict=True)
        ]
        value, what = [*turns, {"role": "user", "content": text}], row.where
    messages = _query(value, what)
    if row.get("system"):
        system = {"role": "system", "content": _filled(row.get("system"), row.what("system"))}
        if messages[0]["role"] != "system":
            return [system, *messages]
        if messages[0] != system:
            raise InputError(f"{row.what('system')} and the first message differ; keep one")
    return messages


def load_queries(source: str | Path, columns: Mapping[str, str] | None = None) -> list[Query]:
    """Read queries.

    Each row has `messages` or `conversations` (a list of role and content, or of ShareGPT's from
    and value), or its text or messages under `prompt`, `instruction`, `query` or `question`; with
    `system`, `history` and `input` where there are such. `id` is optional.

    Args:
        source: A .jsonl, .json, .parquet, .csv or .tsv file, a folder of them or of
            `save_to_disk`, or hf:OWNER/NAME (see `sources.rows_of`).
        columns: Field to the column that holds it, where the names differ.

    Returns:
        The queries in the order of the file.

    Raises:
        InputError: Naming the file and the line of what is wrong.
    """
    ids = _Ids()
    queries = []
    for row in _read(source, columns, _QUERY_FIELDS):
        messages = _conversation(row)
        origin = row.get("source")
        source = row.source
        if isinstance(origin, str) and origin:
            source = f"{source}: {_text(origin, row.what('source'))}"
        queries.append(Query(ids(row, messages), messages, source))
    return queries


# --------------------------------------------------------------------------------------- records


def _check_pair(row: Row, **answers: str) -> None:
    """Refuse two answers of which nothing can be learnt."""
    for key, text in answers.items():
        _filled(text, row.what(key))
    if len({*answers.values()}) == 1:
        raise InputError(
            f"{row.where}: {' and '.join(map(repr, answers))} are equal; remove the row"
        )


def _own(row: Row, ids: _Ids) -> Record:
    unknown = [key for key in row.values if key not in _FIELDS]
    if unknown:
        raise InputError(f"{row.where}: unknown key {unknown[0]!r}; remove or rename it")
    version = row.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise InputError(
            f"{row.where}: written with schema version {version}, this release reads up to "
            f"{SCHEMA_VERSION}; upgrade sso-lightning"
        )
    values = {
        key: _FIELDS[key](value, row.what(key))
        for key, value in row.values.items()
        if value is not None and key != "id"
    }
    for key in ("messages", "good", "bad"):
        if key not in values:
            raise InputError(f"{row.what(key)} is missing")
    _check_pair(row, good=values["good"], bad=values["bad"])
    return Record(id=ids(row, values["messages"], values.get("iteration", 0)), **values)


def _answer(row: Row, key: str) -> tuple[list[Message], str]:
    """The turns given before an answer (none for plain text), and the answer."""
    value = row.get(key)
    if value is None:
        spelt = next((theirs for theirs, ours in _PAIR_KEYS.items() if ours == key), key)
        raise InputError(f"{row.what(key if key in row.columns else spelt)} is missing")
    if isinstance(value, str):
        return [], _filled(value, row.what(key))
    if not isinstance(value, dict | list):
        kind = type(value).__name__
        raise InputError(f"{row.what(key)} must be text or a list of messages, not {kind}")
    turns = _messages([value] if isinstance(value, dict) else value, row.what(key))
    if turns[-1]["role"] != "assistant":
        raise InputError(f"{row.what(key)} must end with the assistant's answer")
    return turns[:-1], turns[-1]["content"]


def _principles(row: Row) -> dict[str, str]:
    """The principles of a row: as the 2025 release lists them, or under their own names."""
    found = {key: row.get(key) for key in ("good_principle", "bad_principle")}
    listed = row.get("principles")
    if isinstance(listed, list) and listed and all(isinstance(x, dict) for x in listed):
        for key, value in found.items():
            texts = [x[key] for x in listed if x.get(key)]
            if value is None and texts:
                found[key] = "\n\n".join(_text(x, row.what("principles")) for x in texts)
    return {key: _text(value, row.what(key)) for key, value in found.items() if value is not None}


def _imported(row: Row, ids: _Ids) -> Record:
    """A record from the authors' keys or from plain preference data."""
    key = {
        ours: ours if ours in row.columns or theirs not in row.values else theirs
        for theirs, ours in _PAIR_KEYS.items()
    }
    (before, good), (before_bad, bad) = _answer(row, key["good"]), _answer(row, key["bad"])
    if before != before_bad:
        raise InputError(f"{row.where}: the turns before 'chosen' and 'rejected' differ")
    has_query = any(row.get(key) is not None for key in _ASKED_KEYS)
    asked = _conversation(row, _ASKED_KEYS) if has_query or not before else before
    # either may tell more of the conversation than the other, such as a system message
    longer, shorter = (before, asked) if len(before) > len(asked) else (asked, before)
    if longer[len(longer) - len(shorter) :] != shorter:
        raise InputError(f"{row.where}: the turns before the answers are not those of the query")
    messages = _query(longer, row.what(key["good"]))
    _check_pair(row, **{key["good"]: good, key["bad"]: bad})
    values: dict[str, Any] = {
        "id": ids(row, messages),
        "messages": messages,
        "good": good,
        "bad": bad,
        "query_source": row.source,
        **_principles(row),
    }
    systems = ("good_system", "bad_system")
    told = {ours: row.get(key[ours]) for ours in systems if row.get(key[ours]) is not None}
    values |= {ours: _text(value, row.what(key[ours])) for ours, value in told.items()}
    steered = any(values.get(name) for name in (*systems, "good_principle", "bad_principle"))
    # their rows may lack the systems; `input` is what tells alpaca's preference data from them
    released = steered or (row.get("instruction") is not None and "input" not in row.values)
    if (released or "original" in row.columns) and row.get(key["original"]) is not None:
        before_original, values["original"] = _answer(row, key["original"])
        if before_original not in ([], before, messages):
            raise InputError(f"{row.where}: the turns before 'chosen' and 'raw' differ")
    values["bad_is_instructed"] = released
    for mark in MARKS:
        if row.get(mark) is not None:
            values[mark] = _FIELDS[mark](row.get(mark), row.what(mark))
    if steered:
        values["principle_source"] = row.source
    return Record(**values)


def _records(rows: Iterable[Row]) -> list[Record]:
    ids = _Ids()
    records = []
    for row in rows:
        if row.columns or "chosen" in row.values or "rejected" in row.values:
            records.append(_imported(row, ids))
        elif "good" in row.values or "bad" in row.values:
            records.append(_own(row, ids))
        else:
            raise InputError(f"{row.where}: no pair; give good and bad, or chosen and rejected")
    return records


def load_records(source: str | Path, columns: Mapping[str, str] | None = None) -> list[Record]:
    """Read records of this library, of the authors' releases, or plain preference data.

    * Own records: the fields of `Record`; `messages`, `good` and `bad` are required.
    * The releases: a query, `chosen`, `rejected` and, where present, `p_system, n_system, raw,
      principles` become y+, y-, the two system messages, yo and the principles; texts (2024) or
      messages (2025). `bad_is_instructed` is true for rows with a system message or principle,
      and for `instruction` without `input`.
    * Preference data: a query as in `load_queries`, `chosen` and `rejected`, each text, a message
      or messages. The answers may repeat the query's messages, which need not be given twice.
      `bad_is_instructed` is false unless the row says otherwise.

    Args:
        source: As for `load_queries`. A folder with a manifest is read by it: listed shards only,
            each checked against its checksum.
        columns: Field to the column that holds it, where the names differ. Rows are then read as
            one of the last two formats, and other columns are ignored.

    Returns:
        The records in order; folders by shard number or file name.

    Raises:
        InputError: Naming the file and the line of what is wrong.
    """
    return _records(_read(source, columns, _PAIR_FIELDS))


def _row_of(record: Record) -> dict[str, Any]:
    """The record's values, checked as they will be when they are read back."""
    return vars(_own(Row(vars(record), f"record {record.id!r}", ""), _Ids()))


def _parquet_bytes(records: Iterable[Record]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    token_ids = pa.list_(pa.int32())

    def struct(keys: Sequence[str], kind: Any) -> Any:
        return pa.struct([(key, kind) for key in keys])

    kinds = {
        "messages": pa.list_(struct(("role", "content"), pa.string())),
        "prompt_ids": struct(CONTEXTS, token_ids),
        "response_ids": struct(RESPONSES, token_ids),
        "finish": struct(RESPONSES, pa.string()),
        "sampler": pa.string(),
        "scores": pa.map_(pa.string(), pa.float64()),
        "token_scores": pa.map_(pa.string(), pa.list_(pa.float64())),
        "str": pa.string(),
        "int": pa.int64(),
        "bool": pa.bool_(),
        "list[str]": pa.list_(pa.string()),
    }
    schema = pa.schema([(f.name, kinds.get(f.name) or kinds[str(f.type)]) for f in fields(Record)])
    rows = []
    for record in records:
        row = _row_of(record)
        row["sampler"] = json.dumps(row["sampler"])
        row |= {key: [*row[key].items()] for key in ("scores", "token_scores")}
        rows.append(row)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    return bytes(sink.getvalue())


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write records to one file, whole or not at all.

    Args:
        path: A .parquet or .jsonl file; replaced if it exists.
        records: What to write.

    Raises:
        InputError: The ending is another one, a record is not valid, or the disk refuses.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        replace_file(path, _parquet_bytes(records))
    elif path.suffix == ".jsonl":
        lines = (json.dumps(_row_of(record), ensure_ascii=False) + "\n" for record in records)
        replace_file(path, "".join(lines).encode())
    else:
        raise InputError(f"{path}: records are written as .parquet or .jsonl")


# ----------------------------------------------------------------------------------------- store

_MANIFEST = "manifest.json"


def iteration_sets(run: Path) -> dict[int, Path]:
    """The sets that a run's iterations trained on, by number and in order.

    Sets that were replaced, when the run went back to an earlier checkpoint, are not among them.
    """
    named = {folder.name.partition("-")[2]: folder for folder in run.glob("pairs/iteration-*")}
    return dict(sorted((int(name), path) for name, path in named.items() if name.isdecimal()))


@dataclass(frozen=True)
class ShardInfo:
    """One written shard: file name, number of records, checksum, and what the writer noted."""

    file: str
    records: int
    sha256: str
    info: dict[str, Any]


@dataclass
class _Manifest:
    identity: dict[str, Any]
    shards: dict[int, ShardInfo] = field(default_factory=dict)
    complete: bool = False
    report: dict[str, Any] = field(default_factory=dict)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """What JSON gives back for `values`, so that a restart finds them equal."""
    return dict(json.loads(json.dumps(values)))


def replace_file(path: Path, data: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one.

    Args:
        path: Where it goes; the folder is made.
        data: What it holds, or a function that writes it.

    Raises:
        InputError: The disk refuses (it is full, say). The old file is still there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)
    except BaseException as exc:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # torch reports a refused write as an error of its own
        refused = exc if isinstance(exc, OSError) else exc.__context__
        if not isinstance(exc, Exception) or not isinstance(refused, OSError):
            raise
        raise InputError(
            f"{path}: cannot be written ({refused.strerror}); mend that and start again, "
            "what was written before is kept"
        ) from exc


def _read_manifest(folder: Path) -> _Manifest:
    path = folder / _MANIFEST
    try:
        values = parse_json(path.read_bytes(), str(path))
        shards = {
            int(entry["index"]): ShardInfo(
                str(entry["file"]), int(entry["records"]), str(entry["sha256"]), dict(entry["info"])
            )
            for entry in values["shards"]
        }
        return _Manifest(
            dict(values["identity"]), shards, bool(values["complete"]), dict(values["report"])
        )
    except OSError as exc:
        raise InputError(f"{path}: cannot be read ({exc.strerror})") from exc
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        if isinstance(exc, InputError):
            raise
        raise InputError(f"{path}: not a manifest of record shards ({exc!r})") from None


def _intact(folder: Path, shard: ShardInfo) -> bool:
    try:
        return hashlib.sha256((folder / shard.file).read_bytes()).hexdigest() == shard.sha256
    except FileNotFoundError:
        return False


def _shard_rows(folder: Path, manifest: _Manifest) -> Iterator[Row]:
    for _, shard in sorted(manifest.shards.items()):
        yield from rows_of(folder / shard.file, may_be_empty=True)


class PairStore:
    """One set of records in a folder, written shard by shard and safe against crashes.

    A shard counts as written once the manifest lists it with its checksum; both are renamed into
    place whole. Opening a folder continues it: what is missing can be written, nothing twice.

    Args:
        folder: Made if it does not exist.
        identity: JSON values that say what the set is (seed, iteration, policy, ...). A folder
            begun with another identity is refused; None takes the folder as it is.
        helps: Only write shards: another process owns the set, has opened it before, and lists
            them by `adopt`.

    Raises:
        InputError: The folder is not such a set, or another one.
    """

    def __init__(
        self, folder: str | Path, identity: dict[str, Any] | None = None, *, helps: bool = False
    ) -> None:
        self.folder = Path(folder)
        self._helps = helps
        if helps:
            self._manifest = _read_manifest(self.folder)
            return
        if (self.folder / _MANIFEST).exists():
            self._manifest = _read_manifest(self.folder)
        else:
            strays = sorted(self.folder.glob("*.parquet"))
            if strays:
                raise InputError(f"{strays[0]}: a shard without {_MANIFEST}; move it elsewhere")
            self._manifest = _Manifest(_plain(identity or {}))
            self._save()
        found = self._manifest.identity
        wanted = found if identity is None else _plain(identity)
        for key in {**found, **wanted}:
            if found.get(key) != wanted.get(key):
                raise InputError(
                    f"{self.folder}: begun with {key} = {found.get(key)!r}, now {key} is "
                    f"{wanted.get(key)!r}; set it back or use another folder"
                )
        for temporary in self.folder.glob(".*.tmp"):
            temporary.unlink()
        self.adopt()
        self._set_broken_aside()

    def adopt(self) -> None:
        """List the shards that helping processes wrote."""
        notes = sorted(self.folder.glob("shard-*.json"))
        for note in notes:
            values = parse_json(note.read_bytes(), str(note))
            self._manifest.shards.setdefault(values.pop("index"), ShardInfo(**values))
        if notes:
            self._save()
        for note in notes:
            note.unlink()

    def _set_broken_aside(self) -> None:
        broken = {i: s for i, s in self.shards().items() if not _intact(self.folder, s)}
        for index, shard in broken.items():
            path = self.folder / shard.file
            if path.exists():
                path.replace(path.with_name(f"{path.name}.bad"))
            warnings.warn(
                f"{path}: missing or damaged, to be written again; what is left is kept as .bad",
                stacklevel=3,
            )
            del self._manifest.shards[index]
        if broken:
            self._manifest.complete, self._manifest.report = False, {}
            self._save()

    def _save(self) -> None:
        values = asdict(self._manifest)
        values["shards"] = [{"index": i, **asdict(shard)} for i, shard in self.shards().items()]
        replace_file(self.folder / _MANIFEST, (json.dumps(values, indent=1) + "\n").encode())

    def shards(self) -> dict[int, ShardInfo]:
        """The written shards by index, in order."""
        return dict(sorted(self._manifest.shards.items()))

    @property
    def identity(self) -> dict[str, Any]:
        """What the set was begun as."""
        return dict(self._manifest.identity)

    @property
    def complete(self) -> bool:
        """Whether `finish` was called and all shards are still whole."""
        return self._manifest.complete

    @property
    def report(self) -> dict[str, Any]:
        """What `finish` was given; empty before."""
        return dict(self._manifest.report)

    def write_shard(self, index: int, records: Sequence[Record], info: dict[str, Any]) -> None:
        """Write one shard, whole or not at all.

        Args:
            index: Place of the shard in the set; not written yet.
            records: May be empty, when every query of the shard was dropped.
            info: JSON values to keep beside it: query ids, dropped counts by reason, ...

        Raises:
            InputError: A record is not valid or the disk refuses; earlier shards stay.
        """
        assert not self.complete, "the set is finished"
        assert index not in self._manifest.shards, f"shard {index} is written"
        path = self.folder / f"shard-{index:05d}.parquet"
        data = _parquet_bytes(records)
        digest = hashlib.sha256(data).hexdigest()
        shard = ShardInfo(path.name, len(records), digest, _plain(info))
        replace_file(path, data)
        self._manifest.shards[index] = shard
        try:
            if self._helps:
                note = json.dumps({"index": index, **asdict(shard)})
                replace_file(path.with_suffix(".json"), note.encode())
            else:
                self._save()
        except InputError:
            del self._manifest.shards[index]
            raise

    def finish(self, report: dict[str, Any]) -> None:
        """Mark the set complete and keep a report of JSON values with it."""
        self._manifest.complete, self._manifest.report = True, _plain(report)
        self._save()

    def read(self) -> list[Record]:
        """All records of the written shards, in the order of the shards."""
        return _records(_shard_rows(self.folder, self._manifest))
