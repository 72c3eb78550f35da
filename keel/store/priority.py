"""The order in which open comparisons are given out: ``items.turn``, lower first.

Whole numbers are queues put before others (review.put_first). Within one of them, what was ranked lies between it and
the number below: ranked pairs come before those that were not, and behind every queue that was put before theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, bindparam, insert, select, update

from keel.store.records import Response
from keel.store.rows import prompt_record, response_record
from keel.store.tables import event, events, item_responses, items, prompts, responses
from keel.types import Prompt

CHUNK = 200  # items of one transaction: who labels waits for no more than that


@dataclass(frozen=True, slots=True)
class OpenPair:
    item_id: int
    prompt: Prompt
    first: Response
    second: Response


_OPEN = items.c.kind == "compare", items.c.gold.is_(None), items.c.out.is_(False), items.c.taken < items.c.overlap


def open_pairs(connection: Connection) -> list[OpenPair]:
    """Every comparison with a free slot, oldest first."""
    query = (
        select(responses, items.c.id.label("item_id"))
        .select_from(items.join(item_responses, item_responses.c.item_id == items.c.id))
        .join(responses, responses.c.id == item_responses.c.response_id)
        .where(*_OPEN)
        .order_by(items.c.id, responses.c.id)
    )
    members: dict[int, list[Response]] = {}
    for row in connection.execute(query):
        members.setdefault(row.item_id, []).append(response_record(row))
    asked = {row.id: prompt_record(row) for row in connection.execute(select(prompts))}
    return [OpenPair(id, asked[pair[0].prompt_id], *pair) for id, pair in members.items()]


def chunks(item_ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(item_ids), CHUNK):
        yield item_ids[start : start + CHUNK]


def give_turns(connection: Connection, item_ids: Sequence[int], gains: Mapping[int, float] | None) -> int:
    """Order these items by their ``gains``, the greatest first, or (None) as they were added; how many were. ``gains``
    holds those of all items that are ranked together. An item that somebody is just taking is passed over: waiting
    for it, while holding others, could deadlock."""
    query = select(items.c.id, items.c.turn).where(items.c.id.in_(item_ids), *_OPEN).order_by(items.c.id)
    found = connection.execute(query.with_for_update(skip_locked=True)).all()
    rank = {id: n for n, id in enumerate(sorted(gains, key=lambda id: (-gains[id], id)), 1)} if gains else {}
    values = [
        {"item": row.id, "to": math.ceil(row.turn) - (1 - rank[row.id] / (len(rank) + 1) if gains else 0.0)}
        for row in found
    ]
    if values:
        connection.execute(update(items).where(items.c.id == bindparam("item")).values(turn=bindparam("to")), values)
    return len(values)


def log_order(connection: Connection, order: str, count: int, models: Sequence[str], actor: str, now: datetime) -> None:
    new = {"order": order, "items": count, "models": list(models)}
    connection.execute(insert(events), event(now, actor, "ordered", "queue", "compare", None, new))
