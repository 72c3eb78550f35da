"""Gold items: pairs, or single responses, with a known answer, which show who is reading. Each function runs inside its
caller's transaction.

Nobody may tell one from the others. It has slots for everybody, and others have few: where that could show, it fares as
one of the others would.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, bindparam, exists, insert, select, update

from keel.recipe.steps import Steps
from keel.store import tallies
from keel.store.people_tables import step_items
from keel.store.tables import assignments, event, events, item_responses, items, responses
from keel.types import UserError

SLOTS = 100_000  # a gold item is for everybody: so many more than have it already
ANSWERS: Mapping[str, tuple[str, ...]] = {"compare": ("first", "second", "tie"), "thumb": ("up", "down")}
RIGHT = "right"  # the answer of a reply in steps without a bad one; else it is the number of the first bad one

_asked = items.alias("asked")
# Single responses that somebody has had in one queue. They are not asked of them again in another, as a gold item
# neither: what comes twice could be nothing else.
HAD = (
    select(_asked.c.key)
    .join(assignments, assignments.c.item_id == _asked.c.id)
    .where(
        assignments.c.annotator_id == bindparam("annotator"),
        assignments.c.state != "expired",
        _asked.c.kind == bindparam("kind"),
    )
)
SINGLE = ("thumb", "step")  # kinds of work on one response, which may be in several queues

_OPEN_TO = select(items.c.id, items.c.key).where(
    items.c.gold.is_not(None),
    items.c.kind == bindparam("kind"),
    items.c.taken < items.c.overlap,
    items.c.out.is_(False),
    ~exists().where(
        assignments.c.item_id == items.c.id,
        assignments.c.annotator_id == bindparam("annotator"),
        assignments.c.state != "expired",
    ),
)


_OPEN_SINGLE = _OPEN_TO.where(items.c.key.not_in(HAD))


def open_to(connection: Connection, annotator_id: int, kind: str) -> list[Row[Any]]:
    """The gold items (id, key) that this annotator has not had."""
    query = _OPEN_SINGLE if kind in SINGLE else _OPEN_TO
    return list(connection.execute(query, {"annotator": annotator_id, "kind": kind}))


def would_be_gone(connection: Connection, assignment: Row[Any], kind: str) -> bool:
    """Whether another item in its place would have gone to somebody else: after a skip as soon as anybody else was
    given something, since what is given back is next in the queue; after its time as the annotator's other items did,
    whose time ran out."""
    others = assignments.join(items)
    mine = assignments.c.annotator_id == assignment.annotator_id
    plain = items.c.gold.is_(None), items.c.kind == kind
    if assignment.state == "skipped":
        later = select(assignments.c.id).select_from(others)
        later = later.where(~mine, *plain, assignments.c.leased_at > assignment.skipped_at).limit(1)
        return connection.execute(later).first() is not None
    beside = select(items.c.taken, items.c.overlap).select_from(others)
    beside = beside.where(mine, *plain, assignments.c.state == "expired")
    row = connection.execute(beside.order_by(assignments.c.expires_at.desc(), assignments.c.id).limit(1)).first()
    return row is not None and row.taken >= row.overlap


def set_gold(connection: Connection, item_id: int, answer: str | None, actor: str, now: datetime) -> None:
    """Make an item a gold item with this answer, or (None) no longer."""
    item = connection.execute(select(items).where(items.c.id == item_id).with_for_update()).first()
    if item is None or item.kind not in (*ANSWERS, "step"):
        raise UserError(f"there is no comparison and no single response {item_id}")
    known = _steps_answers(connection, item_id) if item.kind == "step" else ANSWERS[item.kind]
    if answer is not None and answer not in known:
        raise UserError(f"the answer {answer!r} is unknown; give {' or '.join(known)}")
    overlap = max(_wanted_before(connection, item), item.taken) if answer is None else item.taken + SLOTS
    connection.execute(update(items).where(items.c.id == item_id).values(gold=answer, overlap=overlap))
    if (answer is None) != (item.gold is None) and not item.out:
        tallies.now_plain(connection, [item_id], [item.kind], plain=answer is None)
    old = {"gold": item.gold, "overlap": item.overlap}
    new = {"gold": answer, "overlap": overlap, "batch": item.batch, "kind": item.kind}
    connection.execute(insert(events), event(now, actor, "changed", "item", item_id, old, new))


def _wanted_before(connection: Connection, item: Row[Any]) -> int:
    """How many people were to judge a gold item before it became one: the log knows. An item that is none keeps what
    it has."""
    if item.gold is None:
        return int(item.overlap)
    query = select(events.c.old).where(
        events.c.entity == "item", events.c.entity_id == str(item.id), events.c.action == "changed"
    )
    for old in connection.execute(query.order_by(events.c.id.desc())).scalars():
        if old and "gold" in old and old["gold"] is None:
            return int(old["overlap"])
    return 1


def _steps_answers(connection: Connection, item_id: int) -> tuple[str, ...]:
    query = select(step_items.c.steps, responses.c.text).select_from(
        step_items.join(item_responses, item_responses.c.item_id == step_items.c.item_id).join(responses)
    )
    row = connection.execute(query.where(step_items.c.item_id == item_id)).one()
    count = len(Steps.model_validate(row.steps).split(row.text))
    return (RIGHT, *(str(number) for number in range(1, count + 1)))
