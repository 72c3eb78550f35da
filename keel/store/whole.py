"""A whole store as one file, and back: every row of every table as it stands, with its numbers and dates.

The files of votes, thumbs and steps carry work from one store into another that has its own. This one is for moving a
store, or keeping it: a line says which tables there are and how many rows each has, then comes a line a row, in an
order in which each row finds what it refers to. Ways in and out stay behind: links, sessions, passwords, tokens and
webhooks.

A store takes it when it is empty. One that came from it, or that it came from, has all its rows, and is left as it is.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from alembic.runtime.migration import MigrationContext
from sqlalchemy import JSON, Column, Connection, Integer, Table, func, insert, select, tuple_
from sqlalchemy.exc import DataError, IntegrityError, StatementError

import keel.store.api_tables
import keel.store.people_tables  # noqa: F401 (its tables belong to the metadata)
from keel.store.engine import VERSION_TABLE
from keel.store.rows import checked_text
from keel.store.tables import UtcDateTime, metadata
from keel.types import UserError

HEAD = "keel_store"  # of the first line: the schema's revision
SECRET_TABLES = frozenset({"links", "sessions", "tokens", "answers", "webhooks", "deliveries"})
SECRET_COLUMNS = frozenset({("accounts", "password")})
TABLES = tuple(table for table in metadata.sorted_tables if table.name not in SECRET_TABLES)
_READ = 500  # rows


def is_whole(row: Mapping[str, Any]) -> bool:
    """Whether a file's first row says that a whole store follows."""
    return HEAD in row and "rows" in row


def export(connection: Connection, path: Path) -> int:
    """Write the store to a .jsonl or .jsonl.gz file; how many rows. All of it is of one moment, also while people work,
    on the connection that ``Store.moment`` gives."""
    written = 0
    with _new(path) as file:
        for line in lines(connection):
            _write(file, line)
            written += 1
    return written - 1


def lines(connection: Connection) -> Iterator[dict[str, Any]]:
    """What ``export`` writes."""
    counts = {table.name: _count(connection, table) for table in TABLES}
    yield {HEAD: _schema(connection), "rows": counts}
    for table in TABLES:
        query = select(table).order_by(*table.primary_key)
        for row in connection.execute(query, execution_options={"yield_per": _READ}).mappings():
            yield {"table": table.name, "row": _plain(table, row)}


def add(connection: Connection, path: Path) -> int:
    """Fill an empty store with what ``export`` wrote; how many rows. 0: all of them were there already. UserError for
    a store with other work in it, and for a file that is not whole."""
    with _lines(path) as lines:
        counts = _head(connection, path, lines)
        if all(connection.execute(select(table).limit(1)).first() is None for table in metadata.sorted_tables):
            try:
                _fill(connection, path, lines, counts)
            except (IntegrityError, DataError, StatementError) as error:
                reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
                raise UserError(f"{path}: its rows do not fit together ({reason}); export the store again") from error
            return sum(counts.values())
        for table, rows in _rows(path, lines, counts):
            if not _there(connection, table, rows):
                raise UserError(
                    f"{path} holds a whole store, and this one has other work in it; name an empty one, or export the "
                    "votes, thumbs and steps by themselves, which a store takes beside its own"
                )
    return 0


def _fill(connection: Connection, path: Path, lines: Iterator[Any], counts: Mapping[str, int]) -> None:
    for table, rows in _rows(path, lines, counts):
        connection.execute(insert(table), [_stored(table, row) for row in rows])
    if connection.dialect.name == "postgresql":  # the next row's number comes after these
        for table in TABLES:
            keys = list(table.primary_key)
            if len(keys) == 1 and isinstance(keys[0].type, Integer) and not keys[0].foreign_keys and counts[table.name]:
                last = select(func.max(keys[0])).scalar_subquery()
                connection.execute(select(func.setval(func.pg_get_serial_sequence(table.name, keys[0].name), last)))


def _there(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the store has these rows. What has happened since may have changed them, but not the log, by which a
    store is known."""
    keys = list(table.primary_key)
    wanted = {tuple(row[key.name] for key in keys): row for row in rows}
    found = {
        tuple(row[key] for key in keys): _plain(table, row)
        for row in connection.execute(select(table).where(tuple_(*keys).in_(list(wanted)))).mappings()
    }
    if table.name == "events":
        return found == wanted
    return found.keys() == wanted.keys()


# ------------------------------------------------------------------------------------------------------------ the file


@contextmanager
def _new(path: Path) -> Iterator[TextIO]:
    """A file to write, which takes the place of an old one when it is whole."""
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{path}: a whole store is written as .jsonl or .jsonl.gz; give the file one of these endings")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _open(temporary, "wt", path.suffix == ".gz") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; nothing was written") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _lines(path: Path) -> Iterator[Iterator[Any]]:
    """What stands on each line."""
    try:
        with _open(path, "rt", path.suffix == ".gz") as file:
            yield (json.loads(line) for line in file)
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({error}); export the store again") from error


def _open(path: Path, mode: str, packed: bool) -> TextIO:
    open_it: Any = gzip.open if packed else open
    file: TextIO = open_it(path, mode, encoding="utf-8", newline="\n")
    return file


def _write(file: TextIO, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def _head(connection: Connection, path: Path, lines: Iterator[Any]) -> dict[str, int]:
    """How many rows of each table come."""
    head = next(lines, None)
    if not isinstance(head, dict) or not is_whole(head):
        raise UserError(f"{path}: no whole store; make one with keel export STORE {path.name} --whole")
    here = _schema(connection)
    if head[HEAD] != here:
        raise UserError(
            f"{path} was written by another Keel (schema {head[HEAD]}, and this one's is {here}); import it with the "
            "Keel that wrote it, and open that store with the newer of the two, which upgrades it"
        )
    counts = head["rows"]
    known = isinstance(counts, dict) and counts.keys() == {table.name for table in TABLES}
    if not known or not all(type(count) is int and count >= 0 for count in counts.values()):
        raise UserError(f"{path}, line 1: the tables are not a store's; export the store again")
    return counts


def _rows(
    path: Path, lines: Iterator[Any], counts: Mapping[str, int]
) -> Iterator[tuple[Table, Sequence[Mapping[str, Any]]]]:
    """The rows, some of one table at a time. UserError for a line that is none, and when there are not as many as the
    first one says."""
    number = 1
    for table in TABLES:
        left = counts[table.name]
        while left:
            rows = []
            for _ in range(min(left, _READ)):
                number += 1
                line = next(lines, None)
                try:
                    if line is None or line["table"] != table.name:
                        raise ValueError(f"a row of {table.name} is missing")
                    _check(table, line["row"])
                except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
                    raise UserError(
                        f"{path}, line {number}: {error}; the file is not whole, export it again"
                    ) from error
                rows.append(line["row"])
            left -= len(rows)
            yield table, rows
    if next(lines, None) is not None:
        raise UserError(f"{path}, line {number + 1}: more rows than the first line says; export it again")


# ------------------------------------------------------------------------------------------------------------- a row


def _plain(table: Table, row: Mapping[Any, Any]) -> dict[str, Any]:
    """A row as it stands in the file."""
    return {column.name: _written(row[column]) for column in _columns(table)}


def _written(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _stored(table: Table, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the file as the database takes it."""
    kept = {column.name: _value(column, row[column.name]) for column in _columns(table)}
    return kept | {name: None for of, name in SECRET_COLUMNS if of == table.name}


def _value(column: Column[Any], value: Any) -> Any:
    return datetime.fromisoformat(value) if value is not None and _is_time(column) else value


def _is_time(column: Column[Any]) -> bool:
    return isinstance(column.type, UtcDateTime)


def _columns(table: Table) -> list[Column[Any]]:
    return [column for column in table.columns if (table.name, column.name) not in SECRET_COLUMNS]


def _check(table: Table, row: Mapping[str, Any]) -> None:
    """ValueError unless the row has the table's columns, with values of their types that either database holds."""
    columns = _columns(table)
    if row.keys() != {column.name for column in columns}:
        raise ValueError(f"the columns of {table.name} are others")
    for column in columns:
        value, place = row[column.name], f"{table.name}.{column.name}"
        if value is None or isinstance(column.type, JSON):
            continue
        kind = str if _is_time(column) else column.type.python_type
        allowed = (int, float) if kind is float else kind
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{place} is {value!r}")
        if isinstance(value, str):
            checked_text(value, place)
        if _is_time(column) and datetime.fromisoformat(str(value)).astimezone(UTC).isoformat() != value:
            raise ValueError(f"{place} is {value!r}, no time in UTC")


def _count(connection: Connection, table: Table) -> int:
    return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


def _schema(connection: Connection) -> str:
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    return str(context.get_current_revision())
