"""Who does what: the items that are open, and the leases on them. Each function runs inside its caller's transaction.

An item has ``overlap`` slots. A lease takes one, the judgement keeps it, and a lease that has run out gives it back
when somebody needs it. The slots taken are counted on the item's own row, which is locked while a slot is taken
(``FOR UPDATE SKIP LOCKED`` on PostgreSQL; on SQLite the whole transaction is exclusive), so two annotators who race
for the last slot can't both get it; the table's CHECK constraint stands behind it.

The statements are built once: labelling by program runs them thousands of times.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, Select, bindparam, exists, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from keel.store import gold
from keel.store.records import Assignment, LeaseLost, WorkKind
from keel.store.rows import prompt_record
from keel.store.tables import (
    annotators,
    assignments,
    event,
    events,
    item_responses,
    items,
    prompts,
    responses,
)
from keel.types import UserError

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
SET_STATE = update(assignments).where(assignments.c.id == bindparam("assignment")).values(state=bindparam("to"))


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
    .order_by(assignments.c.item_id, assignments.c.id)  # whoever locks several items locks them in this order
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

_PERSON = (
    select(annotators.c.id)
    .where(annotators.c.id == bindparam("annotator"))
    .with_for_update(key_share=True)  # rows that refer to this one may be added meanwhile
)


def one_at_a_time(connection: Connection, annotator_id: int) -> None:
    """What a person does in two windows comes one after the other, from here to the end of the transaction.

    On PostgreSQL one window may hold their assignment and wait for its item's slot, while another one has locked that
    item and waits to lease them the same assignment again: that would be a deadlock. (SQLite has one writer.)
    """
    if connection.dialect.name == "postgresql":
        connection.execute(_PERSON, {"annotator": annotator_id})


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


def lease_again(connection: Connection, assignment_id: int, now: datetime, lease: timedelta) -> None:
    """What was judged or skipped is in its annotator's hands again, with the slot that it holds."""
    connection.execute(
        update(assignments)
        .where(assignments.c.id == assignment_id)
        .values(state="leased", leased_at=now, expires_at=now + lease, skipped_at=None)
    )


def not_yours() -> UserError:
    return UserError("this item is not yours; ask for the next one")


def retake(connection: Connection, assignment: Row[Any]) -> None:
    """What was skipped, or whose lease ran out and was reclaimed, takes its slot again: as long as nobody else was
    given it."""
    columns = items.c.taken, items.c.overlap, items.c.gold, items.c.kind
    item = connection.execute(select(*columns).where(items.c.id == assignment.item_id).with_for_update()).one()
    if item.taken >= item.overlap or (item.gold is not None and gold.would_be_gone(connection, assignment, item.kind)):
        raise LeaseLost("this item was kept for you until its time ran out; somebody else has it now")
    connection.execute(_TAKE, {"item": assignment.item_id})


def widen(connection: Connection, item_id: int, now: datetime) -> None:
    """One slot more, taken at once. The item's row is locked (``retake``)."""
    item = connection.execute(select(items).where(items.c.id == item_id)).one()
    more = {"overlap": item.overlap + 1, "taken": item.taken + 1}
    connection.execute(update(items).where(items.c.id == item_id).values(**more))
    old, new = ({"batch": item.batch, "kind": item.kind, "overlap": item.overlap + by} for by in (0, 1))
    connection.execute(insert(events), event(now, "keel", "changed", "item", item_id, old, new))


def reclaim(connection: Connection, now: datetime) -> bool:
    """Give back the slots of leases that have run out; True when there were any. Rows that another transaction holds
    are left to it: waiting for them could deadlock."""
    run_out = connection.execute(_RUN_OUT, {"now": now}).all()
    for row in run_out:
        connection.execute(SET_STATE, {"assignment": row.id, "to": "expired"})
        connection.execute(_GIVE_BACK, {"item": row.item_id})
    return bool(run_out)


def _sides(key: str, draw: random.Random) -> list[int]:
    """The item's response ids in a random order."""
    kind, one, rest = key.partition("/")
    if one:  # "edit/57", "thumb/57" and "step/57" show that response, "write/PROMPT" none
        return [] if kind == "write" else [int(rest)]
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
