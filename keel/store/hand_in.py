"""What somebody did with an assignment: put into its table and into the log once, and taken back. Each function runs
inside its caller's transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import Connection, Insert, Row, Select, Table, bindparam, insert, select, update
from sqlalchemy.exc import IntegrityError

from keel.store import queue, tallies
from keel.store.people_tables import aspect_ratings, rankings, step_labels, thumbs, writings
from keel.store.records import Assignment, LeaseLost, NewVote, NewWork, WorkKind
from keel.store.rows import storable
from keel.store.sides import SIDES
from keel.store.tables import annotators, assignments, event, events, items, judgements
from keel.types import UserError


@dataclass(frozen=True, slots=True)
class WorkTable:
    """Where what was done is kept. ``entity`` and ``action``: what the log calls it. ``widens``: what comes after its
    slot was given to somebody else makes a slot of its own, since one more does no harm."""

    table: Table
    entity: str
    action: str
    widens: bool = False


VOTES = WorkTable(judgements, "judgement", "judged")
RANKINGS = WorkTable(rankings, "ranking", "ranked")
THUMBS = WorkTable(thumbs, "thumb", "gave")
STEPS = WorkTable(step_labels, "step judgement", "labelled", widens=True)
WRITINGS = WorkTable(writings, "writing", "wrote", widens=True)
WORK_TABLES: Mapping[WorkKind, WorkTable] = {
    "compare": VOTES,
    "rank": RANKINGS,
    "thumb": THUMBS,
    "step": STEPS,
    "write": WRITINGS,
    "edit": WRITINGS,
}

_ASSIGNMENT = (
    select(assignments, annotators.c.name, annotators.c.kind.label("by"), items.c.kind, items.c.batch)
    .join(annotators)
    .join(items, items.c.id == assignments.c.item_id)
    .where(assignments.c.id == bindparam("assignment"))
    .with_for_update(of=assignments)
)
_ADD_EVENT = insert(events)
# The columns that say what was said: they stand in the log when it is taken back.
_SAID = (
    *("choice", "strength", "reason", "tiers", "up", "text", "original_id"),
    *("labels", "outcome", "reasons", "correction", "note"),
)


def submit(
    connection: Connection, assignment_id: int, vote: NewVote, *, annotator_id: int | None, now: datetime
) -> int:
    """Count one vote and return the judgement's id (Store.submit)."""
    reason = None if vote.reason is None else storable(vote.reason)
    values: dict[str, Any] = {"choice": vote.choice, "strength": vote.strength, "reason": reason}
    values |= {} if vote.probability is None else {"probability": vote.probability}
    also = {"ratings": vote.ratings} if vote.ratings else {}
    id, assignment = record(connection, VOTES, assignment_id, vote, values, also, annotator_id=annotator_id, now=now)
    if vote.ratings and assignment is not None:
        rows = [
            {"judgement_id": id, "response_id": response, "aspect": aspect, "value": value}
            for side, response in zip(SIDES, assignment.shown, strict=True)
            for aspect, value in vote.ratings.get(side, {}).items()
        ]
        connection.execute(insert(aspect_ratings), rows)
    return id


def record(
    connection: Connection,
    into: WorkTable,
    assignment_id: int,
    new: NewWork,
    values: Mapping[str, Any],
    also: Mapping[str, Any],
    *,
    annotator_id: int | None,
    now: datetime,
) -> tuple[int, Row[Any] | None]:
    """Put what somebody did with an assignment into its table and into the log. ``values``: the table's columns beside
    those that every kind of work has; ``also`` stands beside them in the log. Returns the row's id, and the assignment;
    None for it when the token had been counted before. ``annotator_id``: whose the assignment must be; None:
    anybody's."""
    if annotator_id is not None:
        queue.one_at_a_time(connection, annotator_id)
    assignment = connection.execute(_ASSIGNMENT, {"assignment": assignment_id}).first()
    if assignment is None or WORK_TABLES[assignment.kind] is not into:
        raise queue.not_yours()
    if annotator_id not in (None, assignment.annotator_id):
        raise queue.not_yours()
    known = connection.execute(_by_token(into.table), {"token": new.token}).first()
    if known is not None:
        if known.assignment_id != assignment_id:
            raise _token_used(new.token)
        return int(known.id), None
    if assignment.state == "judged":
        raise UserError("this item is judged already; undo that judgement to change it")
    if assignment.state != "leased":
        try:
            queue.retake(connection, assignment)
        except LeaseLost:
            if not into.widens:
                raise
            queue.widen(connection, assignment.item_id, now)
    did = {**values, "seconds": new.seconds, "guideline": new.guideline, "token": new.token}
    try:
        row = did | {"assignment_id": assignment_id, "created": now}
        made = connection.execute(_insert(into.table), row).inserted_primary_key
    except IntegrityError as error:
        if "foreign key" in str(error.orig).lower():
            raise UserError(f"guideline {new.guideline!r} is not in the store; add that version first") from error
        raise _token_used(new.token) from error  # by another assignment at this very moment
    assert made is not None
    connection.execute(queue.SET_STATE, {"assignment": assignment_id, "to": "judged"})
    told = {**did, **also, "assignment": assignment_id, "item": assignment.item_id}
    told |= {"shown": assignment.shown, "batch": assignment.batch}
    log = event(now, assignment.name, into.action, into.entity, made.id, None, told, new.guideline)
    connection.execute(_ADD_EVENT, log)
    tallies.change_one(connection, assignment, values.get("choice"), now, 1)
    return int(made.id), assignment


@cache
def _by_token(table: Table) -> Select[Any]:
    return select(table.c.id, table.c.assignment_id).where(table.c.token == bindparam("token"))


@cache
def _insert(table: Table) -> Insert:
    return insert(table)


def _token_used(token: str) -> UserError:
    return UserError(f"client token {token!r} was used for another assignment; make a new one each time")


def undo(
    connection: Connection,
    done_id: int,
    *,
    now: datetime,
    lease: timedelta,
    of: WorkTable = VOTES,
    annotator_id: int | None = None,
) -> Assignment:
    """Take a judgement (or a row of rankings, thumbs, step labels or writings) back and give its assignment to the
    annotator again (Store.undo). ``annotator_id``: who must have done it; None: anybody."""
    table, entity = of.table, of.entity
    owner = connection.execute(select(table.c.assignment_id).where(table.c.id == done_id)).scalar_one_or_none()
    # the assignment is locked before the judgement is looked at, as in submit
    assignment = None if owner is None else connection.execute(_ASSIGNMENT, {"assignment": owner}).one()
    if assignment is None or annotator_id not in (None, assignment.annotator_id):
        raise UserError(f"{entity} {done_id} is not in the store")
    done = connection.execute(select(table).where(table.c.id == done_id)).one()
    if done.undone_at is not None:
        raise UserError(f"this {entity} has been taken back already")
    connection.execute(update(table).where(table.c.id == done_id).values(undone_at=now))
    queue.lease_again(connection, assignment.id, now, lease)
    old = {name: getattr(done, name) for name in _SAID if name in table.c}
    log = event(now, assignment.name, "undone", entity, done_id, old, None, done.guideline)
    connection.execute(_ADD_EVENT, log)
    tallies.change_one(connection, assignment, old.get("choice"), done.created, -1)
    return queue.screen(
        connection, assignment.id, assignment.item_id, assignment.shown, now + lease, assignment.kind, assignment.handle
    )
