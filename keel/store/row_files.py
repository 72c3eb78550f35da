"""Rows as files: JSONL, Parquet or a folder of Hugging Face ``datasets``; files and folders written whole or not at
all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from keel.store import hub
from keel.types import UserError

Type = Literal["messages", "bool", "number", "whole"]
_GROUP = 2_000  # rows of a Parquet file that are in memory at once


def write_rows(rows: Iterable[dict[str, Any]], path: Path, table: Callable[[list[dict[str, Any]]], Any]) -> int:
    """Writes rows as they come, as the ending of ``path`` says; how many. ``table`` makes an Arrow table of some."""
    rows = _Counted(rows)

    def write(temporary: Path) -> None:
        if path.suffix == ".jsonl":
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif path.suffix == ".parquet":
            _parquet(rows, temporary, table)
        elif not path.suffix:
            hub.save(table(list(rows)), temporary)
        else:
            raise UserError(
                f"{path}: exports are .jsonl, .parquet, or a folder for datasets (no ending); name one of these"
            )

    write_whole(path, write)
    return rows.count


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Has ``write`` make a file or folder under a temporary name, which then takes the place of ``path``: all of it or
    nothing. A folder (no ending) must be new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if not path.suffix and path.exists():
            raise UserError(f"{path} is there already; name a new folder, or a file")
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; nothing was written") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


class _Counted:
    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self._rows, self.count = rows, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self._rows:
            self.count += 1
            yield row


def _parquet(rows: Iterable[dict[str, Any]], path: Path, table: Callable[[list[dict[str, Any]]], Any]) -> None:
    import pyarrow.parquet  # slow to import, and not needed for JSONL

    coming = iter(rows)
    first = table(list(islice(coming, _GROUP)))
    with pyarrow.parquet.ParquetWriter(path, first.schema) as file:
        file.write_table(first)
        while some := list(islice(coming, _GROUP)):
            file.write_table(table(some))


def rows_of_file(path: Path) -> list[dict[str, Any]]:
    """The rows of a file or folder that ``write_rows`` made."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet  # slow to import, and not needed for JSONL

            found: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
            return found
        if path.is_dir():
            return hub.load(path)
        lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold other characters that end a line
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}); give a file that Keel exported") from error


def from_json(row: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """What of these columns is JSON in a string, read."""
    return {name: json.loads(row[name]) for name in columns if isinstance(row.get(name), str)}


def arrow_table(
    rows: list[dict[str, Any]], columns: Sequence[str], as_json: Sequence[str], types: Mapping[str, Type]
) -> Any:
    """The rows as an Arrow table with the same columns however many rows there are. ``types``: of columns that are no
    texts; ``as_json``: columns that become JSON in a string."""
    import pyarrow as pa  # slow to import, and not needed for JSONL

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    known = {"messages": messages, "bool": pa.bool_(), "number": pa.float64(), "whole": pa.int64()}
    flat = [row | {name: json.dumps(row[name]) for name in as_json if name in row} for row in rows]
    present = [name for name in columns if not rows or name in rows[0]]
    fields = [(name, known[types[name]] if name in types else pa.string()) for name in present]
    return pa.Table.from_pylist(flat, schema=pa.schema(fields))
