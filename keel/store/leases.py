"""Keeping what somebody holds while they are still at it. It runs inside its caller's transaction."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, select, update

from keel.store import queue
from keel.store.records import LeaseLost
from keel.store.tables import assignments, items

LONGEST_HOLD = timedelta(hours=12)  # from the lease on: a page that is left open does not keep its items for ever


@dataclass(frozen=True, slots=True)
class Renewed:
    """Of the assignments that a page has, by their handles: which are still its person's, and which are done (judged or
    skipped, in another window perhaps). The others are gone: to somebody else, or out of use."""

    held: tuple[str, ...]
    done: tuple[str, ...]


def renew(
    connection: Connection, handles: Collection[str], annotator_id: int, now: datetime, lease: timedelta
) -> Renewed:
    """The person still has these assignments before them: their leases last longer. One that ran out and was given back
    is leased again while the item has a free slot."""
    queue.one_at_a_time(connection, annotator_id)
    query = (
        select(assignments, items.c.out)
        .join(items)
        .where(assignments.c.handle.in_(handles), assignments.c.annotator_id == annotator_id)
        .order_by(assignments.c.item_id)  # whoever locks several items locks them in this order
        .with_for_update(of=assignments)
    )
    held, done = [], []
    for row in connection.execute(query).all():
        if row.state in ("judged", "skipped"):
            done.append(row.handle)
            continue
        if row.out:  # nobody is given it any more, so a page that held on to it would keep its draft where none sees it
            continue
        if row.state == "leased":
            until = max(row.expires_at, min(now + lease, row.leased_at + LONGEST_HOLD))
            connection.execute(update(assignments).where(assignments.c.id == row.id).values(expires_at=until))
        else:
            try:
                queue.retake(connection, row)
            except LeaseLost:
                continue
            queue.lease_again(connection, row.id, now, lease)
        held.append(row.handle)
    return Renewed(tuple(held), tuple(done))
