"""Who judges what: leases, votes, and votes taken back. Each function runs inside its caller's transaction.

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

from sqlalchemy import Connection, Row, Select, bindparam, exists, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from keel.store.records import Assignment, Choice, LeaseLost, Progress
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

_HELD = (
    select(assignments, items.c.prompt_id)
    .join(items)
    .where(
        assignments.c.annotator_id == bindparam("annotator"),
        assignments.c.state == "leased",
        assignments.c.expires_at > bindparam("now"),
        assignments.c.id.not_in(bindparam("holding", expanding=True)),
    )
    .order_by(assignments.c.id)
    .limit(1)
)
_HELD_IN_BATCH = _HELD.where(items.c.batch == bindparam("batch"))

_OPEN_TO = (
    select(items.c.id, items.c.key, items.c.prompt_id)
    .where(
        items.c.taken < items.c.overlap,
        ~exists().where(
            assignments.c.item_id == items.c.id,
            assignments.c.annotator_id == bindparam("annotator"),
            assignments.c.state != "expired",
        ),
    )
    .order_by(items.c.id)
    .limit(1)
)
_OPEN_TO_IN_BATCH = _OPEN_TO.where(items.c.batch == bindparam("batch"))


def _locking(query: Select[Any]) -> tuple[Select[Any], Select[Any]]:
    """The query that passes over items which another transaction is just taking, and the one that waits for them."""
    return query.with_for_update(of=items, skip_locked=True), query.with_for_update(of=items)


_OPEN, _OPEN_IN_BATCH = _locking(_OPEN_TO), _locking(_OPEN_TO_IN_BATCH)

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
    ).returning(assignments.c.id, assignments.c.shown)
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
    .join(item_responses, item_responses.c.item_id == items.c.id)
    .join(responses, responses.c.id == item_responses.c.response_id)
    .where(items.c.id == bindparam("item"))
)

_ASSIGNMENT = (
    select(assignments, annotators.c.name)
    .join(annotators)
    .where(assignments.c.id == bindparam("assignment"))
    .with_for_update(of=assignments)
)
_ADD_JUDGEMENT = insert(judgements)
_ADD_EVENT = insert(events)
_BY_TOKEN = select(judgements.c.id, judgements.c.assignment_id).where(judgements.c.token == bindparam("token"))


def next_assignment(
    connection: Connection,
    annotator_id: int,
    *,
    batch: str | None,
    holding: Collection[int],
    wait: bool,
    now: datetime,
    lease: timedelta,
    seed: int,
) -> Assignment | None:
    """The annotator's oldest live lease that is not in ``holding``, else a new one, else None (Store.next_assignment).

    ``wait``: when every open item is just being taken by somebody else, wait and see what they leave. For short
    transactions only: two long ones that wait for each other would deadlock.
    """
    values: dict[str, Any] = {"annotator": annotator_id, "now": now, "holding": list(holding)}
    if batch is not None:
        values["batch"] = batch
    held = connection.execute(_HELD if batch is None else _HELD_IN_BATCH, values).first()
    if held is not None:
        return _assignment(connection, held.id, held.item_id, held.shown, held.expires_at)
    del values["now"], values["holding"]
    while True:
        item = _open_item(connection, values, wait)
        if item is None:
            if not _reclaim(connection, now):
                return None
            continue
        shown = _sides(item.key, seed, item.id, annotator_id)
        row = {"item_id": item.id, "annotator_id": annotator_id, "shown": shown, "state": "leased"}
        row |= {"leased_at": now, "expires_at": now + lease}
        try:
            leased = connection.execute(_LEASE[connection.dialect.name], row).first()
        except IntegrityError as error:  # the item is locked, so it is the annotator that is not there
            raise UserError(f"annotator {annotator_id} is not in the store; add the annotator first") from error
        if leased is not None:  # else the same annotator took it in another window meanwhile: look again
            connection.execute(_TAKE, {"item": item.id})
            return _assignment(connection, leased.id, item.id, leased.shown, now + lease)


def _open_item(connection: Connection, values: dict[str, Any], wait: bool) -> Row[Any] | None:
    """The first item with a free slot that this annotator has not had, locked."""
    passing, waiting = _OPEN_IN_BATCH if "batch" in values else _OPEN
    item = connection.execute(passing, values).first()
    if item is None and wait and connection.dialect.name == "postgresql":
        item = connection.execute(waiting, values).first()
    return item


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
) -> int:
    """Count one vote and return the judgement's id (Store.submit)."""
    _check_vote(choice, strength, seconds, client_token)
    assignment = connection.execute(_ASSIGNMENT, {"assignment": assignment_id}).first()
    if assignment is None:
        raise UserError(f"assignment {assignment_id} is not in the store; ask for the next one")
    known = connection.execute(_BY_TOKEN, {"token": client_token}).first()
    if known is not None:
        if known.assignment_id != assignment_id:
            raise _token_used(client_token)
        return int(known.id)
    if assignment.state == "judged":
        raise UserError(f"assignment {assignment_id} is judged already; undo that judgement to change it")
    if assignment.state == "expired":
        _retake(connection, assignment_id, assignment.item_id)
    vote = {"choice": choice, "strength": strength, "seconds": seconds, "guideline": guideline, "reason": reason}
    if reason is not None:
        vote["reason"] = storable(reason)
    row = vote | {"assignment_id": assignment_id, "token": client_token, "created": now}
    try:
        judgement = connection.execute(_ADD_JUDGEMENT, row).inserted_primary_key
    except IntegrityError as error:
        if "foreign key" in str(error.orig).lower():
            raise UserError(f"guideline {guideline!r} is not in the store; add that version first") from error
        raise _token_used(client_token) from error  # by another assignment at this very moment
    assert judgement is not None
    connection.execute(_SET_STATE, {"assignment": assignment_id, "to": "judged"})
    new = vote | {"assignment": assignment_id, "item": assignment.item_id, "shown": assignment.shown}
    connection.execute(_ADD_EVENT, event(now, assignment.name, "judged", "judgement", judgement.id, None, new))
    return int(judgement.id)


def undo(connection: Connection, judgement_id: int, *, now: datetime, lease: timedelta) -> Assignment:
    """Take a judgement back and give its assignment to the annotator again (Store.undo)."""
    owner = connection.execute(
        select(judgements.c.assignment_id).where(judgements.c.id == judgement_id)
    ).scalar_one_or_none()
    if owner is None:
        raise UserError(f"judgement {judgement_id} is not in the store")
    # the assignment is locked before the judgement is looked at, as in submit
    assignment = connection.execute(_ASSIGNMENT, {"assignment": owner}).one()
    judgement = connection.execute(select(judgements).where(judgements.c.id == judgement_id)).one()
    if judgement.undone_at is not None:
        raise UserError(f"judgement {judgement_id} has been taken back already")
    connection.execute(update(judgements).where(judgements.c.id == judgement_id).values(undone_at=now))
    connection.execute(
        update(assignments)
        .where(assignments.c.id == assignment.id)
        .values(state="leased", leased_at=now, expires_at=now + lease)
    )
    old = {"choice": judgement.choice, "strength": judgement.strength, "reason": judgement.reason}
    connection.execute(_ADD_EVENT, event(now, assignment.name, "undone", "judgement", judgement_id, old, None))
    return _assignment(connection, assignment.id, assignment.item_id, assignment.shown, now + lease)


def _check_vote(choice: str, strength: float | None, seconds: float | None, client_token: str) -> None:
    if choice not in CHOICES:
        raise UserError(f"choice {choice!r} is unknown; choose one of {', '.join(CHOICES)}")
    if strength is not None and (choice in ("tie", "both_bad") or strength not in (1, 2, 3)):
        raise UserError(f"strength {strength} does not go with {choice!r}; give 1, 2 or 3 for a side, none for a tie")
    if seconds is not None and not 0 <= seconds < float("inf"):
        raise UserError(f"seconds is {seconds}; give the time taken, 0 or more, or None")
    if not client_token:
        raise UserError("the client token is empty; make a unique one for each judgement")


def _token_used(client_token: str) -> UserError:
    return UserError(f"client token {client_token!r} was used for another assignment; make a new one each time")


def _retake(connection: Connection, assignment_id: int, item_id: int) -> None:
    """A vote whose lease ran out and was reclaimed: it counts as long as nobody else was given the slot."""
    item = connection.execute(
        select(items.c.taken, items.c.overlap).where(items.c.id == item_id).with_for_update()
    ).one()
    if item.taken >= item.overlap:
        raise LeaseLost(f"assignment {assignment_id} ran out and was given to somebody else; ask for the next one")
    connection.execute(_TAKE, {"item": item_id})


def _reclaim(connection: Connection, now: datetime) -> bool:
    """Give back the slots of leases that have run out; True when there were any. Rows that another transaction holds
    are left to it: waiting for them could deadlock."""
    run_out = connection.execute(_RUN_OUT, {"now": now}).all()
    for row in run_out:
        connection.execute(_SET_STATE, {"assignment": row.id, "to": "expired"})
        connection.execute(_GIVE_BACK, {"item": row.item_id})
    return bool(run_out)


def _sides(key: str, seed: int, item_id: int, annotator_id: int) -> list[int]:
    """The item's response ids in a random order that depends on the seed, the item and the annotator alone."""
    shown = [int(response) for response in key.split("-")]
    random.Random(f"sides/{seed}/{item_id}/{annotator_id}").shuffle(shown)
    return shown


def _assignment(
    connection: Connection, assignment_id: int, item_id: int, shown: list[int], expires_at: datetime
) -> Assignment:
    rows = connection.execute(_SCREEN, {"item": item_id}).all()
    texts = {row.response_id: row.text for row in rows}
    screen = tuple(texts[response] for response in shown)
    return Assignment(assignment_id, item_id, prompt_record(rows[0]), screen, expires_at)


def progress(connection: Connection, batch: str | None) -> Progress:
    """See Store.progress."""
    wanted = select(func.coalesce(func.sum(items.c.overlap), 0))
    given = (
        select(func.count(), func.count(judgements.c.undone_at))  # the second counts those that are not NULL
        .select_from(judgements.join(assignments))
        .join(items, items.c.id == assignments.c.item_id)
    )
    if batch is not None:
        wanted, given = wanted.where(items.c.batch == batch), given.where(items.c.batch == batch)
    total, undone = connection.execute(given).one()
    return Progress(int(connection.execute(wanted).scalar_one()), total - undone, undone)
