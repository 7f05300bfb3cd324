"""Where rows come from: JSON lines, JSON, CSV, Parquet, folders, `datasets` and its hub.

A row is one object with named values that knows its place, so that every mistake found in it later
can name file and line. Columns with other names are renamed here, before anything is understood.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sso_lightning.errors import InputError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
HUB = "hf:"

_TABLES = (".csv", ".tsv")

_HUB_NAME = re.compile(
    r"hf:(?P<name>[^:@]+)(@(?P<revision>[^:]+))?(:(?P<config>[^/]*)(/(?P<split>.+))?)?"
)
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a folder


@dataclass(frozen=True)
class Row:
    """One object of a file: its values, and how errors and records name its place.

    Attributes:
        values: By column, renamed.
        where: Place for errors, with the whole path.
        source: Place for records, with the file's name only.
        columns: Field to the column that it was read from, where `data.columns` says so.
        cells: Whether the values are the cells of a table of text.
    """

    values: dict[str, Any]
    where: str
    source: str
    columns: Mapping[str, str] = field(default_factory=dict)
    cells: bool = False

    def get(self, key: str) -> Any:
        """The value of a column; None if there is none."""
        return self.values.get(key)

    def what(self, key: str) -> str:
        """A column for an error message, by its name in the file."""
        column = self.columns.get(key, key)
        return f"{self.where}: {column!r}" + ("" if column == key else f" ({key})")


def is_hub(source: str | Path) -> bool:
    """Whether a source is for `datasets.load_dataset` and not a path to read here."""
    return str(source).startswith(HUB)


def parse_json(text: str | bytes, where: str) -> Any:
    """Parse one JSON value.

    Args:
        text: In UTF-8 if it is bytes; a mark at its beginning is passed over.
        where: What it is.

    Raises:
        InputError: Naming `where`.
    """
    try:
        whole = text if isinstance(text, str) else text.decode("utf-8-sig")
        return json.loads(whole, object_pairs_hook=_once)
    except json.JSONDecodeError as exc:
        line = f", line {exc.lineno}" if exc.lineno > 1 else ""
        reason = f"{exc.msg.removesuffix(' at')} at column {exc.colno}"
        raise InputError(f"{where}{line}: not valid JSON ({reason})") from None
    except UnicodeDecodeError as exc:
        reason = f"not UTF-8: byte 0x{exc.object[exc.start]:02x} at {exc.start}"
        raise InputError(f"{where}: not valid JSON ({reason})") from None
    except RecursionError:
        raise InputError(f"{where}: not valid JSON (nested too deeply)") from None
    except ValueError as exc:  # a key that is there twice, a number of thousands of digits
        raise InputError(f"{where}: not valid JSON ({exc})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a key that is there twice one value would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        name = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {name!r} is there twice")
    return values


def _is_lines(data: bytes) -> bool:
    """Whether a .json file holds JSON lines, as many do: there is more after the first value."""
    try:
        json.loads(data)
    except json.JSONDecodeError as exc:
        return exc.msg == "Extra data"
    except (ValueError, RecursionError):
        return False
    return False


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".json" and not _is_lines(data):
        whole = parse_json(data, str(path))
        rows = whole if isinstance(whole, list) else [whole]
        yield from ((f"record {number}", row) for number, row in enumerate(rows, 1))
        return
    # bytes split at line feeds only; str.splitlines would also cut at U+2028 inside a text
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield f"line {number}", parse_json(line, f"{path}, line {number}")


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # from memory: a path such as date=2024/x.parquet would add partition columns
        rows = pq.read_table(pa.BufferReader(path.read_bytes())).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise InputError(f"{path}: not a readable Parquet file ({_first_line(exc)})") from None
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _table_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a CSV or TSV file; the first one names the columns, and a cell is text."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise InputError(f"{path}: not UTF-8 text ({exc.reason}); save it as UTF-8") from None
    mark = "\t" if path.suffix == ".tsv" else ","
    limit = csv.field_size_limit(sys.maxsize)  # answers are longer than the default 128 kB
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    names: list[str] = []
    number = 1
    try:
        for cells in reader:
            place, number = f"line {number}", reader.line_num + 1
            if not cells:
                continue
            if not names:
                names = cells
                twice = [name for name in names if names.count(name) > 1]
                if twice:
                    raise InputError(f"{path}, {place}: two columns are named {twice[0]!r}")
                if len(names) == 1 and any(other in names[0] for other in ",;\t"):
                    raise InputError(
                        f"{path}, {place}: the columns are not separated by {mark!r}; save "
                        "commas as .csv, tabs as .tsv"
                    )
            elif len(cells) != len(names):
                raise InputError(
                    f"{path}, {place}: {len(cells)} cells, but the first line names {len(names)}"
                )
            else:
                yield place, dict(zip(names, cells, strict=True))
    except csv.Error as exc:
        raise InputError(f"{path}, line {number}: not readable as a table ({exc})") from None
    finally:
        csv.field_size_limit(limit)


_READ = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".csv": _table_rows,
    ".tsv": _table_rows,
}


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _split_of(found: Any, source: str, how: str) -> Any:
    """The one table of what `datasets` loaded: the only split, else the one named train."""
    if not isinstance(found, dict):
        return found
    if len(found) == 1:
        return next(iter(found.values()))
    if "train" not in found:
        raise InputError(f"{source}: has the splits {', '.join(map(str, found))}; {how}")
    return found["train"]


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    match = _HUB_NAME.fullmatch(source)
    if not match:
        raise InputError(
            f"{source}: not a name of a data set; write hf:OWNER/NAME, hf:OWNER/NAME:CONFIG or "
            "hf:OWNER/NAME:CONFIG/SPLIT, with @REVISION after NAME if needed"
        )
    import datasets

    given = match.groupdict()
    try:
        found = datasets.load_dataset(
            given["name"],
            given["config"] or None,
            split=given["split"],
            revision=given["revision"],
        )
    except Exception as exc:  # the library's errors have no common base
        raise InputError(f"{source}: cannot be loaded ({_first_line(exc)})") from exc
    table = _split_of(found, source, "name one, as in hf:OWNER/NAME:CONFIG/SPLIT")
    yield from ((f"row {number}", row) for number, row in enumerate(table, 1))


def _saved_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as exc:  # the library's errors have no common base
        raise InputError(f"{folder}: not a folder of save_to_disk ({_first_line(exc)})") from exc
    table = _split_of(found, str(folder), "give the folder of one of them")
    yield from ((f"row {number}", row) for number, row in enumerate(table, 1))


def rows_of(
    source: str | Path, columns: Mapping[str, str] | None = None, *, may_be_empty: bool = False
) -> list[Row]:
    """All rows of a source.

    Args:
        source: A file with one of the endings in `SUFFIXES`, a folder of such files, a folder of
            `datasets`' `save_to_disk`, or `hf:` and what `datasets.load_dataset` takes.
        columns: Field to the name of the column that holds it.
        may_be_empty: Whether no row at all is right.

    Returns:
        The rows in order; those of a folder by file name.

    Raises:
        InputError: Naming the file and the line of what is wrong.
    """
    path = Path(source)
    if is_hub(source):
        return _take(str(source), str(source), _hub_rows(str(source)), columns or {})
    if any((path / name).is_file() for name in _SAVED):
        return _take(str(path), path.name, _saved_rows(path), columns or {})
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise InputError(
                f"{path}: the folder holds no record file ({', '.join(SUFFIXES)}); a data folder "
                f"for the datasets library is given as hf:{path}"
            )
        return [row for file in files for row in rows_of(file, columns)]
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: unknown file type; give one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    rows = _take(
        str(path), path.name, _READ[path.suffix](path), columns or {}, path.suffix in _TABLES
    )
    if not rows and not may_be_empty:
        raise InputError(f"{path}: the file is empty")
    return rows


def _take(
    place: str,
    name: str,
    found: Iterator[tuple[str, Any]],
    columns: Mapping[str, str],
    cells: bool = False,
) -> list[Row]:
    """What was found in one place as rows, with the columns renamed."""
    rows = []
    missing, seen = dict(columns), dict[str, None]()
    try:
        for at, values in found:
            if not isinstance(values, dict):
                raise InputError(f"{place}, {at}: must be an object with named values")
            if missing:
                missing = {f: column for f, column in missing.items() if column not in values}
                seen |= dict.fromkeys(values)
            values = _renamed(values, columns)
            rows.append(Row(values, f"{place}, {at}", f"{name}, {at}", columns, cells))
    except OSError as exc:
        raise InputError(f"{place}: cannot be read ({exc.strerror})") from exc
    if missing and rows:
        wanted, column = next(iter(missing.items()))
        names = ", ".join([*seen][:12]) + (", ..." if len(seen) > 12 else "")
        raise InputError(f"{place}: no column {column!r} for {wanted} (data.columns); has {names}")
    return rows


def _renamed(values: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    if not columns:
        return values
    gone = {*columns, *columns.values()}
    kept = {key: value for key, value in values.items() if key not in gone}
    return kept | {f: values[column] for f, column in columns.items() if column in values}
