"""What a query and a record are, and how they are read, stored and exported.

A record holds one query, its pair of opposed principles and the three responses sampled for it.
Records are stored as Parquet shards (`PairStore`) and read from Parquet, JSON or JSON lines
(`load_records`), which also takes the 2024 release's files and plain preference data. Reading
never loses anything silently: whatever cannot be kept is an `InputError` naming file and line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from sso_lightning.errors import InputError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

CONTEXTS = ("query", "good", "bad")
RESPONSES = ("good", "bad", "original")
SCHEMA_VERSION = 1

_ROLES = ("system", "user", "assistant")
_QUERY_KEYS = ("messages", "prompt", "instruction", "query", "question")
_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Query:
    """A conversation that waits for an answer.

    Attributes:
        id: Given in the file, or a hash of the messages.
        messages: Turns, the last one a user's; only the first may be a system message.
        source: File and line the query was read from.
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
        value = _parse_json(value, what)
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
    return scores


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
    "str": _text,
    "int": _integer,
    "bool": _boolean,
    "list[str]": _texts,
}
_FIELDS = {f.name: _READERS.get(f.name) or _READERS[str(f.type)] for f in fields(Record)}


# ----------------------------------------------------------------------------------------- files


def _parse_json(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{where}: not valid JSON ({exc})") from None


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".json":
        try:
            whole = json.loads(data)
        except RecursionError:
            raise InputError(f"{path}: not valid JSON (nested too deeply)") from None
        except json.JSONDecodeError as exc:
            # JSON lines are often named .json: the first line parses, then "extra data" follows
            if exc.msg != "Extra data":
                raise InputError(f"{path}, line {exc.lineno}: not valid JSON ({exc.msg})") from None
        except ValueError as exc:
            raise InputError(f"{path}: not valid JSON ({exc})") from None
        else:
            rows = whole if isinstance(whole, list) else [whole]
            yield from ((f"record {number}", row) for number, row in enumerate(rows, 1))
            return
    # bytes split at line feeds only; str.splitlines would also cut at U+2028 inside a text
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield f"line {number}", _parse_json(line, f"{path}, line {number}")


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # from memory: a path such as date=2024/x.parquet would add partition columns
        rows = pq.read_table(pa.BufferReader(path.read_bytes())).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as exc:
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise InputError(f"{path}: not a readable Parquet file ({reason})") from None
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


@dataclass(frozen=True)
class _Row:
    """One object of a file: its values, and how errors and records name its place."""

    values: dict[str, Any]
    where: str
    source: str

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def what(self, key: str) -> str:
        return f"{self.where}: {key!r}"


def _rows(path: Path, *, may_be_empty: bool = False) -> list[_Row]:
    if path.suffix not in _SUFFIXES:
        raise InputError(f"{path}: unknown file type; give one of {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    read = _parquet_rows if path.suffix == ".parquet" else _json_rows
    rows = []
    try:
        for place, values in read(path):
            if not isinstance(values, dict):
                raise InputError(f"{path}, {place}: must be an object with named values")
            rows.append(_Row(values, f"{path}, {place}", f"{path.name}, {place}"))
    except OSError as exc:
        raise InputError(f"{path}: cannot be read ({exc.strerror})") from exc
    if not rows and not may_be_empty:
        raise InputError(f"{path}: the file is empty")
    return rows


class _Ids:
    """Hands out ids for the rows of one load: the given one, or a hash and an ordinal."""

    def __init__(self) -> None:
        self.seen: dict[tuple[object, ...], str] = {}
        self.repeats: Counter[str] = Counter()

    def __call__(self, row: _Row, messages: list[Message], *scope: object) -> str:
        given = row.get("id") if row.get("id") is not None else row.get("idx")
        if given is None:
            digest = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]
            self.repeats[digest] += 1
            ordinal = self.repeats[digest]
            given = digest if ordinal == 1 else f"{digest}-{ordinal}"
        name = _filled(str(given) if type(given) is int else given, row.what("id"))
        first = self.seen.setdefault((name, *scope), row.where)
        if first != row.where:
            raise InputError(f"{row.where}: the id {name!r} is already used in {first}")
        return name


def _conversation(row: _Row) -> list[Message]:
    """The query of a row, from the first of `_QUERY_KEYS` it has."""
    key = next((key for key in _QUERY_KEYS if row.get(key) is not None), None)
    if key is None:
        raise InputError(f"{row.where}: no query; give one of {', '.join(_QUERY_KEYS)}")
    value = row.get(key)
    if not isinstance(value, str):
        return _query(value, row.what(key))
    text = _filled(value, row.what(key))
    messages: list[Message] = []
    if key == "instruction":  # such rows may carry three more parts of the conversation
        if row.get("input"):
            text = f"{text}\n\n{_text(row.get('input'), row.what('input'))}"
        if row.get("system"):
            messages.append({"role": "system", "content": row.get("system")})
        history = row.get("history") or []
        if not isinstance(history, list) or any(
            not isinstance(turn, list) or len(turn) != 2 for turn in history
        ):
            raise InputError(f"{row.what('history')} must be a list of [query, answer] pairs")
        for turn in history:
            messages.append({"role": "user", "content": turn[0]})
            messages.append({"role": "assistant", "content": turn[1]})
    return _query([*messages, {"role": "user", "content": text}], row.where)


def load_queries(path: str | Path) -> list[Query]:
    """Read queries from JSON lines, JSON or Parquet.

    Each entry has `messages` (a list of role and content), or its text or messages under
    `prompt`, `instruction`, `query` or `question`; `id` is optional.

    Args:
        path: A .jsonl, .json or .parquet file.

    Returns:
        The queries in the order of the file.

    Raises:
        InputError: Naming the file and the line of what is wrong.
    """
    ids = _Ids()
    queries = []
    for row in _rows(Path(path)):
        messages = _conversation(row)
        queries.append(Query(ids(row, messages), messages, row.source))
    return queries


# --------------------------------------------------------------------------------------- records


def _own(row: _Row, ids: _Ids) -> Record:
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
            raise InputError(f"{row.where}: {key!r} is missing")
    return Record(id=ids(row, values["messages"], values.get("iteration", 0)), **values)


def _answer(row: _Row, key: str) -> tuple[list[Message], str]:
    """The turns given before an answer (none for plain text), and the answer."""
    value = row.get(key)
    if value is None:
        raise InputError(f"{row.where}: {key!r} is missing")
    if isinstance(value, str):
        return [], _filled(value, row.what(key))
    turns = _messages(value, row.what(key))
    if turns[-1]["role"] != "assistant":
        raise InputError(f"{row.what(key)} must end with the assistant's answer")
    return turns[:-1], turns[-1]["content"]


def _imported(row: _Row, ids: _Ids) -> Record:
    """A record from the 2024 release's keys or from plain preference data."""
    (before, good), (before_bad, bad) = _answer(row, "chosen"), _answer(row, "rejected")
    if before != before_bad:
        raise InputError(f"{row.where}: the turns before 'chosen' and 'rejected' differ")
    has_query = any(row.get(key) is not None for key in _QUERY_KEYS)
    messages = _conversation(row) if has_query or not before else before
    if before[-len(messages) :] not in ([], messages):
        raise InputError(f"{row.where}: the turns before the answers are not those of the query")
    # the answers may repeat more of the conversation than 'prompt' gives, such as a system message
    messages = _query(before or messages, row.what("chosen"))
    released = row.get("instruction") is not None
    values: dict[str, Any] = {
        "id": ids(row, messages),
        "messages": messages,
        "good": good,
        "bad": bad,
        "query_source": row.source,
        "bad_is_instructed": released,
    }
    systems = {"good_system": "p_system", "bad_system": "n_system"}
    theirs = {**systems, "original": "raw"} if released else {}
    marks = ("bad_is_instructed", "safety_mode", "content_flags")  # kept by preference_examples
    for name, key in {**theirs, **{mark: mark for mark in marks}}.items():
        if row.get(key) is not None:
            values[name] = _FIELDS[name](row.get(key), row.what(key))
    if any(values.get(name) for name in systems):
        values["principle_source"] = row.source
    return Record(**values)


def _records(rows: Iterable[_Row]) -> list[Record]:
    ids = _Ids()
    records = []
    for row in rows:
        if "chosen" in row.values or "rejected" in row.values:
            records.append(_imported(row, ids))
        elif "good" in row.values or "bad" in row.values:
            records.append(_own(row, ids))
        else:
            raise InputError(f"{row.where}: no pair; give good and bad, or chosen and rejected")
    return records


def load_records(path: str | Path) -> list[Record]:
    """Read records of this library, of the authors' 2024 release, or plain preference data.

    * Own records: the fields of `Record`; `messages`, `good` and `bad` are required.
    * The release: `instruction, chosen, rejected` and, where present, `p_system, n_system, raw`
      become query, y+, y-, the two system messages and yo. `bad_is_instructed` is true.
    * Preference data: `prompt, chosen, rejected`, each text or messages; the answers may repeat
      the prompt's messages. `bad_is_instructed` is false unless the row says otherwise.

    Args:
        path: A .jsonl, .json or .parquet file, or a folder of them. A folder with a manifest is
            read by it: listed shards only, each checked against its checksum.

    Returns:
        The records in order; folders by shard number or file name.

    Raises:
        InputError: Naming the file and the line of what is wrong.
    """
    path = Path(path)
    if not path.is_dir():
        return _records(_rows(path))
    if (path / _MANIFEST).exists():
        manifest = _read_manifest(path)
        if not manifest.complete:
            warnings.warn(f"{path}: the set is not complete; reading what it has", stacklevel=2)
        broken = [s.file for s in manifest.shards.values() if not _intact(path, s)]
        if broken:
            raise InputError(f"{path / broken[0]}: does not match its checksum; write it again")
        return _records(_shard_rows(path, manifest))
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    if not files:
        raise InputError(f"{path}: the folder holds no record file ({', '.join(_SUFFIXES)})")
    return _records(row for file in files for row in _rows(file))


def _row_of(record: Record) -> dict[str, Any]:
    """The record's values, checked as they will be when they are read back."""
    return vars(_own(_Row(vars(record), f"record {record.id!r}", ""), _Ids()))


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
        "str": pa.string(),
        "int": pa.int64(),
        "bool": pa.bool_(),
        "list[str]": pa.list_(pa.string()),
    }
    schema = pa.schema([(f.name, kinds.get(f.name) or kinds[str(f.type)]) for f in fields(Record)])
    rows = []
    for record in records:
        row = _row_of(record)
        row["sampler"], row["scores"] = json.dumps(row["sampler"]), [*row["scores"].items()]
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


def plain_examples(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Turn records into plain training examples, `{"messages": [...]}`.

    Only `good` can come through: no principle, and no text that was asked to be bad.
    """
    for record in records:
        yield {"messages": [*record.messages, {"role": "assistant", "content": record.good}]}


def preference_examples(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Turn records into conversational preference examples that keep the marks on `bad`.

    `load_records` reads them back with the same id, pair and marks.
    """
    for record in records:
        yield {
            "id": record.id,
            "prompt": record.messages,
            "chosen": [{"role": "assistant", "content": record.good}],
            "rejected": [{"role": "assistant", "content": record.bad}],
            "bad_is_instructed": record.bad_is_instructed,
            "safety_mode": record.safety_mode,
            "content_flags": record.content_flags,
        }


# ----------------------------------------------------------------------------------------- store

_MANIFEST = "manifest.json"


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
        values = _parse_json(path.read_bytes(), str(path))
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


def _shard_rows(folder: Path, manifest: _Manifest) -> Iterator[_Row]:
    for _, shard in sorted(manifest.shards.items()):
        yield from _rows(folder / shard.file, may_be_empty=True)


class PairStore:
    """One set of records in a folder, written shard by shard and safe against crashes.

    A shard counts as written once the manifest lists it with its checksum; both are renamed into
    place whole. Opening a folder continues it: what is missing can be written, nothing twice.

    Args:
        folder: Made if it does not exist.
        identity: JSON values that say what the set is (seed, iteration, policy, ...). A folder
            begun with another identity is refused; None takes the folder as it is.

    Raises:
        InputError: The folder is not such a set, or another one.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any] | None = None) -> None:
        self.folder = Path(folder)
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
        self._set_broken_aside()

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
