"""Who does what: leases, votes, and votes taken back. Each function runs inside its caller's transaction.

An item has ``overlap`` slots. A lease takes one, the judgement keeps it, and a lease that has run out gives it back
when somebody needs it. The slots taken are counted on the item's own row, which is locked while a slot is taken
(``FOR UPDATE SKIP LOCKED`` on PostgreSQL; on SQLite the whole transaction is exclusive), so two annotators who race
for the last slot can't both get it; the table's CHECK constraint stands behind it.

The statements are built once: labelling by program runs them thousands of times.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import Connection, Insert, Row, Select, Table, bindparam, exists, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from keel.store import gold
from keel.store.people_tables import aspect_ratings
from keel.store.records import Assignment, Choice, LeaseLost, WorkKind
from keel.store.rows import prompt_record, storable
from keel.store.tables import (
    annotators,
    assignments,
    event,
    events,
    item_responses,
    items,
    judgements,
    prompts,
    responses,
)
from keel.types import UserError

CHOICES: tuple[Choice, ...] = ("left", "right", "tie", "both_bad")
_DRAW = random.SystemRandom()  # nobody who reads this source can reckon what it gives

_HELD = (
    select(assignments)
    .join(items)
    .where(
        assignments.c.annotator_id == bindparam("annotator"),
        assignments.c.state == "leased",
        assignments.c.expires_at > bindparam("now"),
        assignments.c.handle.not_in(bindparam("holding", expanding=True)),
        items.c.kind == bindparam("kind"),
        items.c.out.is_(False),
    )
    .order_by(assignments.c.id)
    .limit(1)
)
_HELD_IN_BATCH = _HELD.where(items.c.batch == bindparam("batch"))

OPEN_TO = (
    select(items.c.id, items.c.key)
    .where(
        items.c.taken < items.c.overlap,
        items.c.kind == bindparam("kind"),
        items.c.gold.is_(None),
        items.c.out.is_(False),
        ~exists().where(
            assignments.c.item_id == items.c.id,
            assignments.c.annotator_id == bindparam("annotator"),
            assignments.c.state != "expired",
        ),
    )
    .limit(1)
)


def locking(query: Select[Any]) -> tuple[Select[Any], Select[Any]]:
    """The query that passes over items which another transaction is just taking, and the one that waits for them."""
    return query.with_for_update(of=items, skip_locked=True), query.with_for_update(of=items)


_IN_ORDER = OPEN_TO.order_by(items.c.turn, items.c.id)
_OPEN = locking(_IN_ORDER)
_OPEN_IN_BATCH = locking(_IN_ORDER.where(items.c.batch == bindparam("batch")))

_TAKE = update(items).where(items.c.id == bindparam("item")).values(taken=items.c.taken + 1)
_GIVE_BACK = update(items).where(items.c.id == bindparam("item")).values(taken=items.c.taken - 1)
_SET_STATE = update(assignments).where(assignments.c.id == bindparam("assignment")).values(state=bindparam("to"))


def _lease_statement(dialect: Any) -> postgresql.Insert | sqlite.Insert:
    """Insert the assignment, or lease the annotator's own expired one again with the sides it had. No row comes back
    when the annotator holds or has judged the item."""
    new = dialect.insert(assignments)
    again = {"state": "leased", "leased_at": new.excluded.leased_at, "expires_at": new.excluded.expires_at}
    statement: postgresql.Insert | sqlite.Insert = new.on_conflict_do_update(
        index_elements=["item_id", "annotator_id"], set_=again, where=assignments.c.state == "expired"
    ).returning(assignments.c.id, assignments.c.shown, assignments.c.handle)
    return statement


_LEASE = {"postgresql": _lease_statement(postgresql), "sqlite": _lease_statement(sqlite)}

_RUN_OUT = (
    select(assignments.c.id, assignments.c.item_id)
    .join(items)
    .where(assignments.c.state == "leased", assignments.c.expires_at <= bindparam("now"))
    .order_by(assignments.c.id)
    .with_for_update(skip_locked=True)
)

_SCREEN = (
    select(prompts, responses.c.id.label("response_id"), responses.c.text)
    .select_from(items)
    .join(prompts, prompts.c.id == items.c.prompt_id)
    .outerjoin(item_responses, item_responses.c.item_id == items.c.id)
    .outerjoin(responses, responses.c.id == item_responses.c.response_id)
    .where(items.c.id == bindparam("item"))
)

_ASSIGNMENT = (
    select(assignments, annotators.c.name, items.c.kind, items.c.batch)
    .join(annotators)
    .join(items, items.c.id == assignments.c.item_id)
    .where(assignments.c.id == bindparam("assignment"))
    .with_for_update(of=assignments)
)
_ADD_EVENT = insert(events)


def next_assignment(
    connection: Connection,
    annotator_id: int,
    *,
    batch: str | None,
    holding: Collection[str],
    wait: bool,
    now: datetime,
    lease: timedelta,
    seed: int | None,
    kind: WorkKind = "compare",
) -> Assignment | None:
    """The annotator's oldest live lease that is not in ``holding``, else a new one, else None (Store.next_assignment).

    ``seed``: the sides follow from it; None: they are drawn. ``wait``: when every open item is just being taken by
    somebody else, wait and see what they leave. For short transactions only: two long ones that wait for each other
    would deadlock.
    """
    had = held(connection, annotator_id, kind, holding, now, batch)
    if had is not None:
        return had
    values: dict[str, Any] = {"annotator": annotator_id, "kind": kind}
    values |= {} if batch is None else {"batch": batch}
    while True:
        item = open_item(connection, _OPEN if batch is None else _OPEN_IN_BATCH, values, wait)
        if item is None:
            if not reclaim(connection, now):
                return None
            continue
        draw = _DRAW if seed is None else random.Random(f"sides/{seed}/{item.id}/{annotator_id}")
        leased = lease_item(connection, item, annotator_id, draw, now, lease, kind)
        if leased is not None:  # else the same annotator took it in another window meanwhile: look again
            return leased


def held(
    connection: Connection,
    annotator_id: int,
    kind: WorkKind,
    holding: Collection[str],
    now: datetime,
    batch: str | None = None,
) -> Assignment | None:
    """What the annotator was given and has not done, but for what their page has (``holding``)."""
    values: dict[str, Any] = {"annotator": annotator_id, "kind": kind, "now": now, "holding": list(holding)}
    values |= {} if batch is None else {"batch": batch}
    row = connection.execute(_HELD if batch is None else _HELD_IN_BATCH, values).first()
    if row is None:
        return None
    return screen(connection, row.id, row.item_id, row.shown, row.expires_at, kind, row.handle)


def lease_item(
    connection: Connection,
    item: Row[Any],
    annotator_id: int,
    draw: random.Random,
    now: datetime,
    lease: timedelta,
    kind: WorkKind,
) -> Assignment | None:
    """An item that was looked at (id, key) in the annotator's hands, on sides that are drawn; None when it is there
    already."""
    row = {"item_id": item.id, "annotator_id": annotator_id, "shown": _sides(item.key, draw), "state": "leased"}
    row |= {"leased_at": now, "expires_at": now + lease}
    try:
        leased = connection.execute(_LEASE[connection.dialect.name], row).first()
    except IntegrityError as error:  # the item is locked, so it is the annotator that is not there
        raise UserError(f"annotator {annotator_id} is not in the store; add the annotator first") from error
    if leased is None:
        return None
    connection.execute(_TAKE, {"item": item.id})
    return screen(connection, leased.id, item.id, leased.shown, now + lease, kind, leased.handle)


def open_item(
    connection: Connection, query: tuple[Select[Any], Select[Any]], values: dict[str, Any], wait: bool
) -> Row[Any] | None:
    """The first item with a free slot that this annotator has not had, locked."""
    passing, waiting = query
    if not wait or connection.dialect.name != "postgresql":
        return connection.execute(passing, values).first()
    # PostgreSQL keeps the lock on a row that it looked at and that another transaction had just filled. Found nothing,
    # these locks are let go of before waiting: two who hold some out of order and wait for the others' would deadlock.
    with connection.begin_nested() as looking:
        item = connection.execute(passing, values).first()
        if item is None:
            looking.rollback()
    return item if item is not None else connection.execute(waiting, values).first()


def submit(
    connection: Connection,
    assignment_id: int,
    choice: Choice,
    *,
    strength: float | None,
    seconds: float | None,
    client_token: str,
    guideline: str | None,
    reason: str | None,
    now: datetime,
    ratings: Mapping[str, Mapping[str, int]] | None = None,
    annotator_id: int | None = None,
) -> int:
    """Count one vote and return the judgement's id (Store.submit)."""
    check_common(seconds, client_token)
    _check_vote(choice, strength, ratings)
    vote = {"choice": choice, "strength": strength, "seconds": seconds, "guideline": guideline, "reason": reason}
    if reason is not None:
        vote["reason"] = storable(reason)
    also = {"ratings": ratings} if ratings else {}
    id, assignment = record(
        connection, judgements, "judged", "judgement", assignment_id, vote, ("compare",), client_token, now,
        annotator_id, also,
    )  # fmt: skip
    if ratings and assignment is not None:
        rows = [
            {"judgement_id": id, "response_id": assignment.shown[side], "aspect": aspect, "value": value}
            for side, name in enumerate(("left", "right"))
            for aspect, value in ratings.get(name, {}).items()
        ]
        connection.execute(insert(aspect_ratings), rows)
    return id


def record(
    connection: Connection,
    table: Table,
    action: str,
    entity: str,
    assignment_id: int,
    values: dict[str, Any],
    kinds: Collection[str],
    token: str,
    now: datetime,
    annotator_id: int | None,
    also: dict[str, Any] | None = None,
    widen: bool = False,
) -> tuple[int, Row[Any] | None]:
    """Put what somebody did with an assignment into ``table`` (judgements, rankings, writings) and into the log, where
    ``also`` stands beside ``values``. Returns the row's id, and the assignment; None for it when the token had been
    counted before. ``annotator_id``: whose the assignment must be; None: anybody's. ``widen``: what comes after its
    slot was given to somebody else makes a slot of its own."""
    assignment = connection.execute(_ASSIGNMENT, {"assignment": assignment_id}).first()
    if assignment is None or assignment.kind not in kinds or annotator_id not in (None, assignment.annotator_id):
        raise not_yours()
    known = connection.execute(_by_token(table), {"token": token}).first()
    if known is not None:
        if known.assignment_id != assignment_id:
            raise _token_used(token)
        return int(known.id), None
    if assignment.state == "judged":
        raise UserError("this item is judged already; undo that judgement to change it")
    if assignment.state != "leased":
        try:
            retake(connection, assignment)
        except LeaseLost:
            if not widen:
                raise
            _widen(connection, assignment.item_id, now)
    row = values | {"assignment_id": assignment_id, "token": token, "created": now}
    try:
        made = connection.execute(_insert(table), row).inserted_primary_key
    except IntegrityError as error:
        if "foreign key" in str(error.orig).lower():
            raise UserError(f"guideline {values['guideline']!r} is not in the store; add that version first") from error
        raise _token_used(token) from error  # by another assignment at this very moment
    assert made is not None
    connection.execute(_SET_STATE, {"assignment": assignment_id, "to": "judged"})
    new = values | (also or {}) | {"token": token, "assignment": assignment_id, "item": assignment.item_id}
    new |= {"shown": assignment.shown, "batch": assignment.batch}
    log = event(now, assignment.name, action, entity, made.id, None, new, values["guideline"])
    connection.execute(_ADD_EVENT, log)
    return int(made.id), assignment


@cache
def _by_token(table: Table) -> Select[Any]:
    return select(table.c.id, table.c.assignment_id).where(table.c.token == bindparam("token"))


@cache
def _insert(table: Table) -> Insert:
    return insert(table)


def undo(
    connection: Connection,
    done_id: int,
    *,
    now: datetime,
    lease: timedelta,
    table: Table = judgements,
    entity: str = "judgement",
    annotator_id: int | None = None,
) -> Assignment:
    """Take a judgement (or a row of rankings or writings) back and give its assignment to the annotator again
    (Store.undo). ``annotator_id``: who must have done it; None: anybody."""
    owner = connection.execute(select(table.c.assignment_id).where(table.c.id == done_id)).scalar_one_or_none()
    # the assignment is locked before the judgement is looked at, as in submit
    assignment = None if owner is None else connection.execute(_ASSIGNMENT, {"assignment": owner}).one()
    if assignment is None or annotator_id not in (None, assignment.annotator_id):
        raise UserError(f"{entity} {done_id} is not in the store")
    done = connection.execute(select(table).where(table.c.id == done_id)).one()
    if done.undone_at is not None:
        raise UserError(f"this {entity} has been taken back already")
    connection.execute(update(table).where(table.c.id == done_id).values(undone_at=now))
    lease_again(connection, assignment.id, now, lease)
    said = ("choice", "strength", "reason", "tiers", "text", "original_id")
    old = {name: getattr(done, name) for name in said if name in table.c}
    log = event(now, assignment.name, "undone", entity, done_id, old, None, done.guideline)
    connection.execute(_ADD_EVENT, log)
    return screen(
        connection, assignment.id, assignment.item_id, assignment.shown, now + lease, assignment.kind, assignment.handle
    )


def lease_again(connection: Connection, assignment_id: int, now: datetime, lease: timedelta) -> None:
    """What was judged or skipped is in its annotator's hands again, with the slot that it holds."""
    connection.execute(
        update(assignments)
        .where(assignments.c.id == assignment_id)
        .values(state="leased", leased_at=now, expires_at=now + lease, skipped_at=None)
    )


def check_common(seconds: float | None, client_token: str) -> None:
    """What everything that is handed in must have."""
    if seconds is not None and not 0 <= seconds < float("inf"):
        raise UserError(f"seconds is {seconds}; give the time taken, 0 or more, or None")
    if not client_token:
        raise UserError("the client token is empty; make a unique one for each judgement")


def _check_vote(choice: str, strength: float | None, ratings: Mapping[str, Mapping[str, int]] | None) -> None:
    if choice not in CHOICES:
        raise UserError(f"choice {choice!r} is unknown; choose one of {', '.join(CHOICES)}")
    if strength is not None and (choice in ("tie", "both_bad") or strength not in (1, 2, 3)):
        raise UserError(f"strength {strength} does not go with {choice!r}; give 1, 2 or 3 for a side, none for a tie")
    for side, values in (ratings or {}).items():
        if side not in ("left", "right") or any(value not in (1, 2, 3, 4, 5) for value in values.values()):
            raise UserError("ratings are 1 to 5 for each aspect of left and right")


def not_yours() -> UserError:
    return UserError("this item is not yours; ask for the next one")


def _token_used(client_token: str) -> UserError:
    return UserError(f"client token {client_token!r} was used for another assignment; make a new one each time")


def retake(connection: Connection, assignment: Row[Any]) -> None:
    """What was skipped, or whose lease ran out and was reclaimed, takes its slot again: as long as nobody else was
    given it."""
    item = connection.execute(
        select(items.c.taken, items.c.overlap, items.c.gold).where(items.c.id == assignment.item_id).with_for_update()
    ).one()
    if item.taken >= item.overlap or (item.gold is not None and gold.would_be_gone(connection, assignment)):
        raise LeaseLost("this item was kept for you until its time ran out; somebody else has it now")
    connection.execute(_TAKE, {"item": assignment.item_id})


def _widen(connection: Connection, item_id: int, now: datetime) -> None:
    """One slot more, taken at once. The item's row is locked (``retake``)."""
    item = connection.execute(select(items).where(items.c.id == item_id)).one()
    more = {"overlap": item.overlap + 1, "taken": item.taken + 1}
    connection.execute(update(items).where(items.c.id == item_id).values(**more))
    old, new = ({"batch": item.batch, "kind": item.kind, "overlap": item.overlap + by} for by in (0, 1))
    connection.execute(_ADD_EVENT, event(now, "keel", "changed", "item", item_id, old, new))


def reclaim(connection: Connection, now: datetime) -> bool:
    """Give back the slots of leases that have run out; True when there were any. Rows that another transaction holds
    are left to it: waiting for them could deadlock."""
    run_out = connection.execute(_RUN_OUT, {"now": now}).all()
    for row in run_out:
        connection.execute(_SET_STATE, {"assignment": row.id, "to": "expired"})
        connection.execute(_GIVE_BACK, {"item": row.item_id})
    return bool(run_out)


def _sides(key: str, draw: random.Random) -> list[int]:
    """The item's response ids in a random order."""
    kind, _, rest = key.rpartition("/")
    if kind:  # "edit/57" shows that response, "write/PROMPT" none
        return [int(rest)] if kind == "edit" else []
    shown = [int(response) for response in key.split("-")]
    draw.shuffle(shown)
    return shown


def screen(
    connection: Connection,
    assignment_id: int,
    item_id: int,
    shown: list[int],
    expires_at: datetime,
    kind: WorkKind,
    handle: str,
) -> Assignment:
    rows = connection.execute(_SCREEN, {"item": item_id}).all()
    texts = {row.response_id: row.text for row in rows}
    screen = tuple(texts[response] for response in shown)
    return Assignment(assignment_id, item_id, prompt_record(rows[0]), screen, expires_at, handle, kind)
