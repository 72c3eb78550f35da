"""What admins take out of a store as files, written row by row: a store of a million votes takes the memory of some
hundred."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, Select, select

from keel.store import Store, arena, exchange, given, principles, step_files, thumbs, whole
from keel.store.people_tables import adjudications, aspect_ratings, rankings, writings
from keel.store.row_files import write_rows
from keel.store.settled import replaced
from keel.store.standing import standing
from keel.store.tables import annotators, assignments, events, items, judgements, prompts
from keel.types import UserError

Export = Literal[
    "votes.jsonl", "votes.parquet", "pairs.jsonl", "thumbs.jsonl", "steps.jsonl", "demonstrations.jsonl",
    "rankings.jsonl", "ratings.jsonl", "adjudications.jsonl", "arena.jsonl", "principles.jsonl", "events.jsonl",
    "whole.jsonl",
]  # fmt: skip

Row = dict[str, Any]
_READ = 500  # rows in memory at once


class Stopped(UserError):
    """Nobody waits for the file any more."""


def export(store: Store, what: Export, folder: Path, wanted: Callable[[], bool] = lambda: True) -> Path:
    """Write one export into ``folder``; its path. Stopped when it is no longer ``wanted``."""
    path = folder / what
    with store.moment() as connection:
        write_rows(_while(rows(connection, what), wanted), path, exchange.table)
    return path


def _while(found: Iterable[Row], wanted: Callable[[], bool]) -> Iterator[Row]:
    for row in found:
        if not wanted():
            raise Stopped("the export was given up")
        yield row


def rows(connection: Connection, what: Export) -> Iterator[Row]:
    """The rows of an export, read as they are asked for."""
    return iter(_ROWS[what](connection))


def _votes(connection: Connection) -> Iterator[Row]:
    return exchange.all_columns(given.all_given(connection, None))


def _pairs(connection: Connection) -> Iterator[Row]:
    settled = given.settled_pairs(connection, None)
    pairs = (pair for one in given.all_given(connection, None) for pair in one.preferences())
    return map(exchange.preference_row, replaced(pairs, settled))


def _demonstrations(connection: Connection) -> Iterator[Row]:
    columns = writings.c.token, writings.c.text, writings.c.guideline, writings.c.created, annotators.c.name
    query = standing(writings, *columns, prompts.c.messages).join(prompts, prompts.c.id == items.c.prompt_id)
    for row in _read(connection, query.where(items.c.out.is_(False)).order_by(writings.c.id)):
        said = [*row["messages"], {"role": "assistant", "content": row["text"]}]
        told = {"annotator": row["name"], "guideline": row["guideline"], "created": row["created"].isoformat()}
        yield {"id": row["token"], "messages": said} | told


def _rankings(connection: Connection) -> Iterator[Row]:
    of = rankings.join(assignments, assignments.c.id == rankings.c.assignment_id).join(annotators)
    query = select(rankings, annotators.c.name.label("annotator"), assignments.c.item_id).select_from(of)
    return _plain(connection, query.order_by(rankings.c.id))


def _ratings(connection: Connection) -> Iterator[Row]:
    query = select(aspect_ratings, judgements.c.token).join(judgements).where(judgements.c.undone_at.is_(None))
    return _plain(connection, query.order_by(*aspect_ratings.primary_key))


def _adjudications(connection: Connection) -> Iterator[Row]:
    query = select(adjudications, annotators.c.name.label("annotator")).join(annotators)
    return _plain(connection, query.order_by(adjudications.c.id))


def _events(connection: Connection) -> Iterator[Row]:
    return _plain(connection, select(events).order_by(events.c.id))


def _plain(connection: Connection, query: Select[Any]) -> Iterator[Row]:
    for row in _read(connection, query):
        yield {name: value.isoformat() if hasattr(value, "isoformat") else value for name, value in row.items()}


def _read(connection: Connection, query: Select[Any]) -> Iterator[Any]:
    yield from connection.execute(query, execution_options={"yield_per": _READ}).mappings()


_ROWS: dict[Export, Callable[[Connection], Iterable[Row]]] = {
    "votes.jsonl": _votes,
    "votes.parquet": _votes,
    "pairs.jsonl": _pairs,
    "thumbs.jsonl": thumbs.rows,
    "steps.jsonl": step_files.rows,
    "demonstrations.jsonl": _demonstrations,
    "rankings.jsonl": _rankings,
    "ratings.jsonl": _ratings,
    "adjudications.jsonl": _adjudications,
    "arena.jsonl": arena.votes,
    "principles.jsonl": principles.given,
    "events.jsonl": _events,
    "whole.jsonl": whole.lines,
}
