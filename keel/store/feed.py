"""People's (and models') work as it comes: the log's entries about work, in order, each with what was judged and what
was said. Each function runs inside its caller's transaction."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, Row, Table, func, select, text

from keel.recipe.steps import Steps
from keel.store.given import texts_of
from keel.store.hand_in import WORK_TABLES
from keel.store.ingest import rows_of
from keel.store.people_tables import aspect_ratings, step_items
from keel.store.records import Response, WorkKind
from keel.store.standing import done
from keel.store.tables import annotators, assignments, events, items
from keel.types import Prompt

News = Literal["given", "taken back"]
_TABLES: Mapping[str, Table] = {work.entity: work.table for work in WORK_TABLES.values()}
_ACTIONS = (*{work.action for work in WORK_TABLES.values()}, "imported", "undone")
# What was said, by column: those that a kind of work has.
_SAID = (
    *("choice", "strength", "probability", "tiers", "up", "labels", "outcome", "reasons", "correction", "note"),
    *("text", "reason"),
)
WAIT_SECONDS = 1.0
_WRITERS = text(
    "SELECT virtualtransaction FROM pg_locks WHERE locktype = 'relation' AND relation = 'events'::regclass "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
    "AND mode = 'RowExclusiveLock' AND granted AND pid IS DISTINCT FROM pg_backend_pid()"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that was done. ``cursor``: the log's number, which rises; ``id``: the work's token, the same when it is
    taken back; ``gold``: it measures its annotator and is trained on by nobody, and neither is what is ``out``.
    ``shown``: the responses in the order of the screen. ``said``: by name, with responses by their ids."""

    cursor: int
    news: News
    kind: WorkKind
    id: str
    at: datetime
    annotator: str
    annotator_kind: str
    batch: str
    item: int
    gold: bool
    out: bool
    prompt: Prompt
    shown: tuple[Response, ...]
    said: Mapping[str, Any]


def end(connection: Connection, after: int = 0) -> int:
    """The last entry up to which the log is whole; ``after`` where that can't be told just now.

    PostgreSQL gives an entry its number before it is committed: what has a lower number may show later than what has a
    higher one, and a reader that went on from there would never see it. So those who are writing at this moment are
    waited for, whose entries may have lower numbers than the last one: no writer waits for a reader.
    """
    last = int(connection.execute(select(func.coalesce(func.max(events.c.id), 0))).scalar_one())
    if connection.dialect.name != "postgresql" or last <= after:
        return max(last, after)
    writing = set(connection.execute(_WRITERS).scalars())
    deadline = time.monotonic() + WAIT_SECONDS
    while writing:
        if time.monotonic() > deadline:
            return after
        time.sleep(0.01)
        writing &= set(connection.execute(_WRITERS).scalars())
    return last


def entries(
    connection: Connection, after: int, upto: int, limit: int, since: datetime | None = None
) -> tuple[list[Entry], int]:
    """The first ``limit`` entries behind ``after`` up to ``upto``, not before ``since``; and the entry of the log up
    to which these are all."""
    query = (
        select(events.c.id, events.c.at, events.c.actor, events.c.action, events.c.entity, events.c.entity_id)
        .where(events.c.id > after, events.c.id <= upto)
        .where(events.c.entity.in_(_TABLES), events.c.action.in_(_ACTIONS))
        .order_by(events.c.id)
        .limit(limit)
    )
    if since is not None:
        query = query.where(events.c.at >= since)
    logged: Sequence[Any] = connection.execute(query).all()
    rows: dict[tuple[str, str], Row[Any]] = {}
    for entity in {row.entity for row in logged}:
        ids = sorted({int(row.entity_id) for row in logged if row.entity == entity})
        table = _TABLES[entity]
        works = done(table, table, assignments.c.shown, items.c.id.label("item_id"), items.c.kind, items.c.batch)
        works = works.add_columns(items.c.gold, items.c.out, items.c.prompt_id, annotators.c.name)
        works = works.add_columns(annotators.c.kind.label("annotator_kind")).where(table.c.id.in_(ids))
        rows |= {(entity, str(row.id)): row for row in connection.execute(works)}
    found = [(row, rows[row.entity, row.entity_id]) for row in logged if (row.entity, row.entity_id) in rows]
    texts = texts_of(connection, [id for _, work in found for id in work.shown], [work for _, work in found])
    also = _ratings(connection, found), _cuts(connection, found)
    listed = [_entry(row, work, *texts, *also) for row, work in found]
    return listed, logged[-1].id if len(logged) == limit else upto


def _entry(
    row: Row[Any],
    work: Row[Any],
    prompts: Mapping[str, Prompt],
    responses: Mapping[int, Response],
    ratings: Mapping[int, dict[str, dict[str, int]]],
    cuts: Mapping[int, Steps],
) -> Entry:
    columns = work._mapping
    said = {name: columns[name] for name in _SAID if columns.get(name) is not None}
    said |= {"seconds": work.seconds, "guideline": work.guideline}
    shown = tuple(responses[id] for id in work.shown)
    if row.entity == "judgement" and work.id in ratings:
        said["ratings"] = ratings[work.id]
    if work.item_id in cuts:
        said["steps"] = cuts[work.item_id].split(shown[0].text)
    news: News = "taken back" if row.action == "undone" else "given"
    return Entry(
        row.id, news, work.kind, work.token, row.at, work.name, work.annotator_kind, work.batch, work.item_id,
        work.gold is not None, work.out, prompts[work.prompt_id], shown, said,
    )  # fmt: skip


def _ratings(connection: Connection, found: Sequence[tuple[Row[Any], Row[Any]]]) -> dict[int, dict[str, Any]]:
    """Of each vote, by response and aspect."""
    ids = sorted({work.id for row, work in found if row.entity == "judgement"})
    rated: dict[int, dict[str, Any]] = {}
    for row in rows_of(connection, aspect_ratings, aspect_ratings.c.judgement_id, ids):
        rated.setdefault(row.judgement_id, {}).setdefault(str(row.response_id), {})[row.aspect] = row.value
    return rated


def _cuts(connection: Connection, found: Sequence[tuple[Row[Any], Row[Any]]]) -> dict[int, Steps]:
    """How the replies were cut that were labelled in steps, by item."""
    ids = sorted({work.item_id for _, work in found if work.kind == "step"})
    return {
        row.item_id: Steps.model_validate(row.steps)
        for row in rows_of(connection, step_items, step_items.c.item_id, ids)
    }
