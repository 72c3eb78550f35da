"""Files -> rows: JSON Lines, JSON, CSV and Parquet files, folders of them, and data sets of the Hugging Face hub.

What a row means is the business of ``keel.data.sources``; here is only where it stands, so that an error can name it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from keel.data import folders, hub
from keel.types import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
SHOWN = 5  # bad rows that one message lists


@dataclass(frozen=True, slots=True)
class Row:
    """``values`` without the columns that are null; ``file`` and ``line`` ("line 3", "row 3") say where it stands."""

    file: str
    line: str
    values: dict[str, Any]


class RowError(Exception):
    """What is wrong with one row. ``BadRows`` knows where it stands."""


class UnknownForm(Exception):
    """The row's columns fit none of the accepted forms."""


class LeftOut(Exception):
    """The row is none to learn from. Its argument, where it has one, says of what kind it is, and such rows are counted
    in a note."""


class Undecided(LeftOut):
    """The row's rating is neither up nor down."""


@dataclass
class BadRows:
    """Collects what is wrong, so that a user corrects a file once and not row by row."""

    source: str
    rows: int = 0
    found: list[tuple[str, str, str]] = field(default_factory=list)  # file, line, what is wrong

    def add(self, file: str, line: str, problem: str) -> None:
        self.found.append((file, line, printable(problem)))

    def raise_if_any(self) -> None:
        """UserError with up to five bad rows."""
        if self.found:
            raise UserError(f"{self.summary}\n" + "\n".join(f"  {line}" for line in self.first()))

    @property
    def summary(self) -> str:
        return f"{self.source}: {len(self.found)} of {self.rows} rows cannot be read"

    def first(self) -> list[str]:
        """The first five, a line each; rows with the same fault share one."""
        lines: dict[tuple[str, str], list[str]] = {}
        for file, line, problem in self.found:
            lines.setdefault((file, problem), []).append(line)
        shown = []
        for (file, problem), where in list(lines.items())[:SHOWN]:
            others = f" (and {len(where) - 1} more)" if len(where) > 1 else ""
            shown.append(f"{file}, {where[0]}{others}: {problem}")
        return [*shown, "..."] if len(lines) > SHOWN else shown


@dataclass(frozen=True, slots=True)
class Most:
    """The most that is taken from one source: rows, and bytes once it is unpacked."""

    rows: int
    size: int

    def check_size(self, path: Path, size: int) -> None:
        if size > self.size:
            raise UserError(f"{path}: more than {self.size // 1_000_000} MB once it is unpacked; split it")

    def check_rows(self, source: str | Path, rows: int) -> None:
        if rows > self.rows:
            raise UserError(f"{source}: more than {self.rows:,} rows; split it")


def _no_one(what: object) -> None:
    """For who does not ask."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How a source is read. ``on_bad_row``: whether a row that cannot be read is an error, or is left out and handed to
    ``skipped``. ``note`` gets a sentence about what was read otherwise than it is written; ``undecided`` how many rated
    rows are neither up nor down; ``most``: how much of it is taken."""

    on_bad_row: Literal["error", "skip"] = "error"
    note: Callable[[str], None] = _no_one
    skipped: Callable[[BadRows], None] = _no_one
    undecided: Callable[[int], None] = _no_one
    most: Most | None = None

    def settle(self, bad: BadRows) -> None:
        """After the last row: UserError for bad rows, or (``skip``) their names, unless no row could be read."""
        if self.on_bad_row == "error" or len(bad.found) == bad.rows:
            bad.raise_if_any()
        elif bad.found:
            self.skipped(bad)


def read_rows(
    source: str | Path, bad: BadRows, note: Callable[[str], None] = _no_one, most: Most | None = None
) -> Iterator[Row]:
    """The rows of a file, of a folder's files in the order of their names, or of ``hub:owner/name[:config][:split]``.

    A row that is no object goes to ``bad``. Raises UserError when there is nothing to read or it cannot be read, or a
    file holds more than ``most``.
    """
    if str(source).startswith(hub.PREFIX):
        found = _numbered(str(source), hub.load(str(source)), bad)
    else:
        found = _read_local(Path(os.path.expanduser(source)), bad, note, most)  # which leaves a ~ that nobody knows
    for row in found:
        bad.rows += 1
        if most is not None:
            most.check_rows(source, bad.rows)
        yield row
    if not bad.rows and not bad.found:
        raise UserError(f"{source}: no rows; give a file with at least one")


def _read_local(path: Path, bad: BadRows, note: Callable[[str], None], most: Most | None) -> Iterator[Row]:
    chosen = folders.chosen_split(path, note)
    if folders.is_saved(chosen):
        return _numbered(str(chosen), hub.load_saved(chosen), bad)
    return (row for file in _files(path, note) for row in _read_file(file, bad, most))


def _files(path: Path, note: Callable[[str], None]) -> list[Path]:
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder; name a {', '.join(SUFFIXES[:4])} file, a folder of them, or "
            "hub:owner/name[:config][:split]"
        )
    if path.is_dir():
        files = folders.data_files(path, SUFFIXES, note)
        if not files:
            raise UserError(f"{path}: the folder holds no data file; expected names ending in {', '.join(SUFFIXES)}")
        return files
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: unknown kind of file; expected a name ending in {', '.join(SUFFIXES)}")
    return [path]


def _read_file(path: Path, bad: BadRows, most: Most | None) -> Iterator[Row]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        return _read_parquet(path, bad, most)
    if name.endswith(".jsonl"):
        return _read_jsonl(path, bad, most)
    return _read_csv(path, bad, most) if name.endswith(".csv") else _read_json(path, bad, most)


def _text(path: Path, most: Most | None) -> str:
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            data = file.read() if most is None else file.read(most.size + 1)  # no more of it is ever unpacked
        if most is not None:
            most.check_size(path, len(data))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8 text; save the file as UTF-8"
        ) from error


def _row(path: str | Path, line: str, values: Any, bad: BadRows) -> Iterator[Row]:
    """The row, or nothing and an entry among the bad ones."""
    if isinstance(values, dict):
        yield Row(str(path), line, {str(key): value for key, value in values.items() if value is not None})
    else:
        bad.rows += 1
        bad.add(str(path), line, f"expected an object of fields, got {shown(values)}")


def _read_jsonl(path: Path, bad: BadRows, most: Most | None) -> Iterator[Row]:
    # Only "\n" ends a line: str.splitlines would also cut at U+2028 and others, which may stand inside JSON strings.
    for number, line in enumerate(_text(path, most).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line, object_pairs_hook=_once)
        except RowError as error:
            bad.rows += 1
            bad.add(str(path), f"line {number}", str(error))
        except (ValueError, RecursionError) as error:
            bad.rows += 1
            bad.add(str(path), f"line {number}", f"expected one JSON object a line, got broken JSON ({error})")
        else:
            yield from _row(path, f"line {number}", values, bad)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a name that stands twice, JSON's readers keep the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise RowError(f"field '{next(name for name in names if names.count(name) > 1)}' stands twice; keep one")
    return found


def _read_json(path: Path, bad: BadRows, most: Most | None) -> Iterator[Row]:
    text = _text(path, most)
    if not text.strip():
        return
    try:
        values = json.loads(text, object_pairs_hook=_once)
    except RowError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        hint = "; a file of one JSON object a line is named .jsonl" if "Extra data" in str(error) else ""
        raise UserError(f"{path}: broken JSON ({error}){hint}") from error
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a list of objects, got {shown(values)}")
    for number, row in enumerate(values, start=1):
        yield from _row(path, f"item {number}", row, bad)


def _read_csv(path: Path, bad: BadRows, most: Most | None) -> Iterator[Row]:
    text = _text(path, most)
    limit = csv.field_size_limit(sys.maxsize)  # the module's default refuses replies of more than 131,072 characters
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        columns = next(reader, [])
        twice = {c for c in columns if columns.count(c) > 1}
        if twice:
            raise UserError(f"{path}, line 1: column {', '.join(sorted(twice))} is there twice; rename one")
        start = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(columns):
                bad.rows += 1
                bad.add(str(path), f"line {start}", f"expected {len(columns)} cells, got {len(cells)}")
            elif cells:
                values = zip(columns, map(_cell, cells), strict=True)
                yield from _row(path, f"line {start}", dict(values), bad)
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: broken CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _cell(text: str) -> Any:
    """A CSV's cell: its text, or the messages that are JSON in it; other lists are read by the fields that want one."""
    if not text.startswith("[{"):
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    messages = all(isinstance(item, dict) and item.keys() & {"role", "from"} for item in found)
    return found if messages else text


def _read_parquet(path: Path, bad: BadRows, most: Most | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise UserError(f"{path}: column {', '.join(twice)} stands twice; rename one")
            number = size = 0
            for batch in table.iter_batches(batch_size=_rows_at_once(path, table.metadata, most)):
                size += batch.nbytes
                if most is not None:
                    most.check_size(path, size)
                for values in batch.to_pylist():
                    number += 1
                    yield from _row(path, f"row {number}", values, bad)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # such as times that Python cannot hold
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from error


def _rows_at_once(path: Path, metadata: Any, most: Most | None) -> int:
    """How many rows of a Parquet file are unpacked at a time. A dictionary holds a value once for all rows that have
    it, so a few bytes may stand for as many as can be thought of."""
    if most is None:
        return 4096
    most.check_rows(path, metadata.num_rows)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    most.check_size(path, sum(group.total_byte_size for group in groups))
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    longest = max((c.total_uncompressed_size for c in columns if c.has_dictionary_page), default=1)
    return max(1, min(4096, most.size // max(1, longest)))


def _numbered(source: str, rows: Iterator[Any], bad: BadRows) -> Iterator[Row]:
    for number, values in enumerate(rows, start=1):
        yield from _row(source, f"row {number}", values, bad)


def shown(value: Any) -> str:
    """A value as an error shows it: its kind and how it begins."""
    kinds = {dict: "an object", list: "a list", str: "the text", bool: "the truth value", type(None): "null"}
    kind = kinds.get(type(value), "the number" if isinstance(value, int | float) else f"a {type(value).__name__}")
    if value is None:
        return kind
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # names that are no texts, circles, numbers without end
        return kind
    return f"{kind} {printable(text if len(text) <= 60 else text[:57] + '...')}"


def printable(text: str) -> str:
    """``text`` as a terminal takes it: half characters and the signs that steer a screen are spelled out."""
    whole = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return whole.translate({code: f"\\x{code:02x}" for code in (*range(10), *range(11, 32), 127)})
