"""What people are given, so that nobody can reckon what comes: the order in which a queue's items come, the sides, and
whether this one is a gold item are drawn by the operating system's generator; a browser knows an item by its handle.

Simulated annotators go through the same queue by ``Store.next_assignment``, with sides that follow from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Float, Row, bindparam, select, tuple_

from keel.store import gold, queue
from keel.store.records import Assignment, WorkKind
from keel.store.tables import assignments, items

DRAW = random.SystemRandom()
_ORDERED = queue.OPEN_TO.add_columns(items.c.turn, items.c.place).order_by(items.c.turn, items.c.place)
_SINGLE = _ORDERED.where(items.c.key.not_in(gold.HAD))
_BEHIND = tuple_(items.c.turn, items.c.place) > tuple_(bindparam("turn", type_=Float), bindparam("place", type_=Float))
_OPEN, _OPEN_SINGLE = queue.locking(_ORDERED), queue.locking(_SINGLE)
_OPEN_BEHIND, _OPEN_SINGLE_BEHIND = queue.locking(_ORDERED.where(_BEHIND)), queue.locking(_SINGLE.where(_BEHIND))
_FIRST_TURN = (
    select(items.c.turn)
    .where(items.c.taken < items.c.overlap, items.c.kind == bindparam("kind"))
    .where(items.c.gold.is_(None), items.c.out.is_(False))
    .order_by(items.c.turn, items.c.place)
    .limit(1)
)
LOOK_BACK = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class _Passed:
    """What was given last, at which ``turn`` and ``place``; ``first``: the turn of the first open item then; ``since``:
    when the queue was last looked through from its beginning."""

    turn: float
    place: float
    first: float
    since: datetime


class Places:
    """Up to where each person has had what is open: there their next item is looked for. Somebody who is ten thousand
    items ahead of the others, whom those wait for, would else look at all of these each time. What comes free before
    that place goes to others, or to them some minutes later; a queue that is put first is seen at once."""

    def __init__(self) -> None:
        self._passed: dict[tuple[int, str], _Passed] = {}

    def open_item(self, connection: Connection, annotator_id: int, kind: WorkKind, now: datetime) -> Row[Any] | None:
        """The first item with a free slot that this person has not had, locked."""
        values: dict[str, Any] = {"annotator": annotator_id, "kind": kind}
        first = connection.execute(_FIRST_TURN, {"kind": kind}).scalar_one_or_none()
        if first is None:
            return None
        single = kind in gold.SINGLE
        passed = self._passed.get((annotator_id, kind))
        item = None
        if passed is not None and first >= passed.first and now - passed.since < LOOK_BACK:
            since, behind = passed.since, {"turn": passed.turn, "place": passed.place}
            query = _OPEN_SINGLE_BEHIND if single else _OPEN_BEHIND
            item = queue.open_item(connection, query, values | behind, wait=False)
        if item is None:
            since = now
            item = queue.open_item(connection, _OPEN_SINGLE if single else _OPEN, values, wait=True)
        if item is not None:
            self._passed[annotator_id, kind] = _Passed(item.turn, item.place, first, since)
        return item


def next_for(
    connection: Connection,
    annotator_id: int,
    kind: WorkKind,
    holding: Collection[str],
    gold_every: int,
    now: datetime,
    lease: timedelta,
    places: Places,
) -> Assignment | None:
    """What a person does next; None when nothing is left. One in ``gold_every`` (0: none) is a gold item, as long as
    there are any that they have not had, and never when nothing else is left: what came then could be nothing else.

    A gold item costs the database the same steps as another one, so that the time taken tells nothing.
    """
    queue.one_at_a_time(connection, annotator_id)
    had = queue.held(connection, annotator_id, kind, holding, now)
    if had is not None:
        return had
    while True:
        item = places.open_item(connection, annotator_id, kind, now)
        if item is None:
            if not queue.reclaim(connection, now):
                return None
            continue
        known = gold.open_to(connection, annotator_id, kind)
        due = DRAW.random() * gold_every < 1 if gold_every else False
        chosen = DRAW.choice(known) if known and due else item
        leased = queue.lease_item(connection, chosen, annotator_id, DRAW, now, lease, kind)
        if leased is not None:
            return leased


def find(connection: Connection, handle: str, annotator_id: int) -> int:
    """The assignment's id. Somebody else's handle is refused in the words for one that does not exist."""
    query = select(assignments.c.id).where(assignments.c.handle == handle, assignments.c.annotator_id == annotator_id)
    id: int | None = connection.execute(query).scalar_one_or_none()
    if id is None:
        raise queue.not_yours()
    return id
