"""What people are given, so that nobody can reckon what comes: the order in which a queue's items come, the sides, and
whether this one is a gold item are drawn by the operating system's generator; a browser knows an item by its handle.

Simulated annotators go through the same queue by ``Store.next_assignment``, with sides that follow from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from datetime import datetime, timedelta

from sqlalchemy import Connection, select

from keel.store import gold, queue
from keel.store.records import Assignment, WorkKind
from keel.store.tables import assignments, items

DRAW = random.SystemRandom()
_OPEN = queue.locking(queue.OPEN_TO.order_by(items.c.turn, items.c.place))
_OPEN_SINGLE = queue.locking(queue.OPEN_TO.where(items.c.key.not_in(gold.HAD)).order_by(items.c.turn, items.c.place))


def next_for(
    connection: Connection,
    annotator_id: int,
    kind: WorkKind,
    holding: Collection[str],
    gold_every: int,
    now: datetime,
    lease: timedelta,
) -> Assignment | None:
    """What a person does next; None when nothing is left. One in ``gold_every`` (0: none) is a gold item, as long as
    there are any that they have not had, and never when nothing else is left: what came then could be nothing else.

    A gold item costs the database the same steps as another one, so that the time taken tells nothing.
    """
    queue.one_at_a_time(connection, annotator_id)
    had = queue.held(connection, annotator_id, kind, holding, now)
    if had is not None:
        return had
    values = {"annotator": annotator_id, "kind": kind}
    while True:
        item = queue.open_item(connection, _OPEN_SINGLE if kind in gold.SINGLE else _OPEN, values, wait=True)
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
