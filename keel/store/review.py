"""What reviewers write: overlap, order, the last word on a pair, flags."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, case, func, insert, select, update

from keel.store.people_tables import adjudications, aspect_ratings, flags
from keel.store.sides import InStore
from keel.store.tables import annotators, assignments, event, events, items
from keel.types import UserError


def set_overlap(connection: Connection, batch: str, kind: str, overlap: int, actor: str, now: datetime) -> int:
    """How many people are to judge each item of a queue; where more have, that many. Returns how many items changed."""
    if not 1 <= overlap <= 1000:
        raise UserError(f"overlap is {overlap}; give 1 to 1000 people an item")
    value = case((items.c.taken > overlap, items.c.taken), else_=overlap)
    plain = items.c.batch == batch, items.c.kind == kind, items.c.gold.is_(None), items.c.out.is_(False)
    wanted = select(func.coalesce(func.sum(items.c.overlap), 0)).where(*plain)
    old = {"kind": kind, "wanted": int(connection.execute(wanted).scalar_one())}
    changed = connection.execute(update(items).where(*plain, items.c.overlap != value).values(overlap=value)).rowcount
    new = {"kind": kind, "overlap": overlap, "items": changed, "wanted": int(connection.execute(wanted).scalar_one())}
    connection.execute(insert(events), event(now, actor, "changed", "batch", batch, old, new))
    return changed


def put_first(connection: Connection, batch: str, kind: str, actor: str, now: datetime) -> None:
    """A queue's items come before all others from now on, in the order among each other that they have."""
    # whole numbers: what is ranked lies between two (priority.py)
    first = math.floor(connection.execute(select(func.coalesce(func.min(items.c.turn), 0.0))).scalar_one())
    these = items.c.batch == batch, items.c.kind == kind
    last = math.ceil(connection.execute(select(func.coalesce(func.max(items.c.turn), 0.0)).where(*these)).scalar_one())
    connection.execute(update(items).where(*these).values(turn=items.c.turn + (first - 1 - last)))
    connection.execute(
        insert(events), event(now, actor, "put first", "batch", batch, None, {"kind": kind, "turn": first - 1})
    )


def adjudicate(
    connection: Connection,
    item_id: int,
    annotator_id: int,
    choice: str | None,
    reason: str | None,
    actor: str,
    now: datetime,
) -> None:
    """A reviewer's last word on an item, or (None) none any more; an earlier one is taken back."""
    if choice not in (None, "first", "second", "tie"):
        raise UserError(f"the choice {choice!r} is unknown; give first, second or tie")
    # of two reviewers at once the second comes after the first, and their word stands in its place
    item = select(items.c.kind).where(items.c.id == item_id).with_for_update(key_share=True)
    kind = connection.execute(item).scalar_one_or_none()
    if kind is None:
        raise UserError(f"there is no comparison {item_id}")
    if kind != "compare":
        raise UserError(
            f"item {item_id} is no comparison ({kind}), and only those have a last word; take it out of use, or make "
            "it a gold item, and what was said of it trains nothing"
        )
    if choice is not None and not _judged(connection, item_id):
        raise UserError(
            f"nobody has judged comparison {item_id}, so there are no votes whose place a last word could take; judge "
            "it yourself"
        )
    standing = adjudications.c.item_id == item_id, adjudications.c.undone_at.is_(None)
    old = connection.execute(select(adjudications.c.choice).where(*standing)).scalar_one_or_none()
    connection.execute(update(adjudications).where(*standing).values(undone_at=now))
    new = None
    if choice is not None:
        new = {"choice": choice, "reason": reason}
        row = {"item_id": item_id, "annotator_id": annotator_id, "created": now}
        connection.execute(insert(adjudications), row | new)
    connection.execute(insert(events), event(now, actor, "adjudicated", "item", item_id, old and {"choice": old}, new))


def _judged(connection: Connection, item_id: int) -> bool:
    """Whether a vote on the item stands."""
    given = assignments.c.item_id == item_id, assignments.c.state == "judged"
    return connection.execute(select(assignments.c.id).where(*given).limit(1)).first() is not None


@dataclass(frozen=True, slots=True)
class LastWord:
    """A reviewer's word on an item that stands: first (the response that was stored first), second or tie."""

    choice: InStore
    by: str
    reason: str | None
    created: datetime


def last_words(connection: Connection) -> dict[int, LastWord]:
    """By item."""
    query = select(adjudications, annotators.c.name).join(annotators).where(adjudications.c.undone_at.is_(None))
    return {row.item_id: LastWord(row.choice, row.name, row.reason, row.created) for row in connection.execute(query)}


def ratings(connection: Connection, judgement_ids: Sequence[int]) -> dict[int, dict[int, dict[str, int]]]:
    """By judgement and response, what was given on each aspect with these judgements (some hundred)."""
    found: dict[int, dict[int, dict[str, int]]] = {}
    for row in connection.execute(select(aspect_ratings).where(aspect_ratings.c.judgement_id.in_(judgement_ids))):
        found.setdefault(row.judgement_id, {}).setdefault(row.response_id, {})[row.aspect] = row.value
    return found


def resolve_flag(connection: Connection, id: int, actor: str, now: datetime) -> None:
    where = flags.c.id == id, flags.c.resolved_at.is_(None)
    if connection.execute(update(flags).where(*where).values(resolved_at=now)).rowcount:
        old, new = {"resolved": False}, {"resolved": True}
        connection.execute(insert(events), event(now, actor, "resolved", "flag", id, old, new))
