"""Webhooks and what is sent to them. Each function runs inside its caller's transaction.

Nothing here is written by those who vote: what is to be sent is read from the log, behind each webhook's cursor. So a
vote is never delayed by a webhook, and none is lost by one.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, and_, delete, exists, insert, or_, select, update

from keel.store import feed, people
from keel.store.api_tables import deliveries, webhooks
from keel.store.overview import last_event
from keel.types import UserError

MOST_SENT = 100  # entries in one delivery
HISTORY_KEPT = timedelta(days=30)
# A failed delivery is sent again after 10 s, 20 s, ... up to an hour, for about three days. Then the webhook is paused.
FIRST_WAIT, LONGEST_WAIT, MOST_ATTEMPTS = timedelta(seconds=10), timedelta(hours=1), 80


@dataclass(frozen=True, slots=True)
class Delivery:
    """What is to be sent now: the entries after ``after`` up to ``upto``. ``name``: the same each time it is sent."""

    id: int
    webhook: int
    name: str
    url: str
    secret: str
    after: int
    upto: int
    attempts: int


_ACTIVE = (
    webhooks.c.ended_at.is_(None),
    webhooks.c.paused_at.is_(None),
    or_(webhooks.c.made_by.in_(people.ACTORS), webhooks.c.made_by.in_(people.MAKERS)),
)


def add_webhook(connection: Connection, url: str, secret: str, by: str, now: datetime) -> int:
    """It is sent what comes from now on."""
    people.still_admin(connection, by)
    row = {"url": url, "secret": secret, "cursor": last_event(connection), "made_by": by, "created": now}
    made = connection.execute(insert(webhooks), row).inserted_primary_key
    assert made is not None
    people.log(connection, now, by, "made", "webhook", made.id, None, None)
    return int(made.id)


def end_webhook(connection: Connection, id: int, by: str, now: datetime) -> None:
    """UserError for one that is not there, or ended already."""
    people.still_admin(connection, by)
    if not people.end_ways(connection, webhooks, "webhook", webhooks.c.id == id, by, now):
        raise UserError(f"there is no webhook {id} that holds")


def send_again(connection: Connection, id: int, by: str, now: datetime) -> None:
    """What failed is sent at once, and what came since after it. UserError for a webhook that is not there."""
    people.still_admin(connection, by)
    mine = webhooks.c.id == id, webhooks.c.ended_at.is_(None)
    if not connection.execute(update(webhooks).where(*mine).values(paused_at=None)).rowcount:
        raise UserError(f"there is no webhook {id} that holds")
    waiting = deliveries.c.webhook_id == id, deliveries.c.delivered_at.is_(None)
    connection.execute(update(deliveries).where(*waiting).values(next_at=now, attempts=0))
    people.log(connection, now, by, "sent again", "webhook", id, None, None)


def all_webhooks(connection: Connection) -> list[dict[str, Any]]:
    """Those that have not ended, without their secrets, each with its last delivery: ``attempts``, ``status``,
    ``problem``, ``next_at``, ``sent`` (when it was made), ``delivered_at``; None where nothing was sent yet."""
    shown = (webhooks.c[name] for name in ("id", "url", "made_by", "created", "paused_at", "cursor"))
    rows = connection.execute(select(*shown).where(webhooks.c.ended_at.is_(None)).order_by(webhooks.c.id)).mappings()
    found = []
    for row in rows.all():
        query = select(deliveries).where(deliveries.c.webhook_id == row["id"]).order_by(deliveries.c.id.desc()).limit(1)
        last = connection.execute(query).mappings().first()
        found.append(dict(row) | {"last": None if last is None else dict(last)})
    return found


def due(connection: Connection, now: datetime) -> list[int]:
    """The webhooks for which there may be something to send."""
    open_ones = exists().where(deliveries.c.webhook_id == webhooks.c.id, deliveries.c.delivered_at.is_(None))
    news = webhooks.c.cursor < last_event(connection), ~open_ones
    query = select(webhooks.c.id).where(*_ACTIVE, or_(open_ones.where(deliveries.c.next_at <= now), and_(*news)))
    return list(connection.execute(query.order_by(webhooks.c.id)).scalars())


def take(connection: Connection, id: int, process: str, now: datetime, lease: timedelta) -> Delivery | None:
    """What is to be sent to a webhook now, in this process's hands for ``lease``; None when there is nothing, it is not
    time yet, or another process has it."""
    free = or_(webhooks.c.leased_until.is_(None), webhooks.c.leased_until <= now, webhooks.c.leased_by == process)
    mine = update(webhooks).where(webhooks.c.id == id, free, *_ACTIVE)
    held = mine.values(leased_by=process, leased_until=now + lease).returning(webhooks)
    hook = connection.execute(held).first()
    if hook is None:
        return None
    waiting = select(deliveries).where(deliveries.c.webhook_id == id, deliveries.c.delivered_at.is_(None))
    one = connection.execute(waiting).first()
    if one is None:
        upto = feed.end(connection, hook.cursor)
        found, read = feed.entries(connection, hook.cursor, upto, MOST_SENT)
        if not found:  # what happened concerns nobody here
            connection.execute(update(webhooks).where(webhooks.c.id == id).values(cursor=read))
            return None
        row = {"name": str(uuid.uuid4()), "webhook_id": id, "after": hook.cursor, "upto": read, "attempts": 0}
        connection.execute(insert(deliveries), row | {"next_at": now, "created": now})
        one = connection.execute(waiting).one()
    if one.next_at > now:
        return None
    return Delivery(one.id, id, one.name, hook.url, hook.secret, one.after, one.upto, one.attempts)


def delivered(connection: Connection, sent: Delivery, status: int, now: datetime) -> None:
    """It was taken: the webhook goes on behind it. What was delivered long ago is forgotten."""
    done = {"status": status, "problem": None, "delivered_at": now, "attempts": deliveries.c.attempts + 1}
    mark = update(deliveries).where(deliveries.c.id == sent.id, deliveries.c.delivered_at.is_(None)).values(**done)
    if connection.execute(mark).rowcount:
        further = webhooks.c.id == sent.webhook, webhooks.c.cursor < sent.upto
        connection.execute(update(webhooks).where(*further).values(cursor=sent.upto))
    old = deliveries.c.webhook_id == sent.webhook, deliveries.c.delivered_at < now - HISTORY_KEPT
    connection.execute(delete(deliveries).where(*old))


def failed(connection: Connection, sent: Delivery, status: int | None, problem: str, now: datetime) -> None:
    """It was not taken: it is sent again later, or, after ``MOST_ATTEMPTS``, when an admin says so."""
    attempts = sent.attempts + 1
    wait = min(FIRST_WAIT * 2 ** min(sent.attempts, 20), LONGEST_WAIT)
    told = {"attempts": attempts, "status": status, "problem": problem, "next_at": now + wait}
    open_one = deliveries.c.id == sent.id, deliveries.c.delivered_at.is_(None)
    connection.execute(update(deliveries).where(*open_one).values(**told))
    if attempts >= MOST_ATTEMPTS:
        connection.execute(update(webhooks).where(webhooks.c.id == sent.webhook).values(paused_at=now))
        people.log(connection, now, "keel label", "paused", "webhook", sent.webhook, None, None)
