"""Taking out of use what should not be judged or trained on: an item, a response with all its items, a prompt with all
its. Each function runs inside its caller's transaction.

What is out is given to nobody any more, and votes on it train nothing; every vote stays where it is. Somebody who has
it on the screen may still send what they made of it: that is kept, and used when it is put back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, exists, insert, or_, select, update

from keel.store import tallies
from keel.store.paging import Page, Wanted, holds
from keel.store.people_tables import removals
from keel.store.rows import storable
from keel.store.tables import annotators, event, events, item_responses, items, prompts, responses
from keel.types import UserError

What = Literal["item", "response", "prompt"]
_COLUMNS = {"item": removals.c.item_id, "response": removals.c.response_id, "prompt": removals.c.prompt_id}
_TABLES = {"item": items, "response": responses, "prompt": prompts}
_STANDS = removals.c.undone_at.is_(None)


def take_out(
    connection: Connection,
    what: What,
    id: int | str,
    reason: str,
    annotator_id: int | None,
    now: datetime,
    erased: bool = False,
) -> None:
    """Take it out, or, when it is out already, leave it so. UserError when it is not there."""
    # of two reviewers at once the second finds it out already
    row_of = select(_TABLES[what].c.id).where(_TABLES[what].c.id == id).with_for_update(key_share=True)
    if connection.execute(row_of).first() is None:
        raise UserError(f"there is no {what} {id}")
    known = connection.execute(select(removals.c.id).where(_COLUMNS[what] == id, _STANDS)).scalar_one_or_none()
    if known is not None:
        if erased:
            connection.execute(update(removals).where(removals.c.id == known).values(erased=True))
        return
    row = {_COLUMNS[what].name: id, "annotator_id": annotator_id, "reason": storable(reason), "created": now}
    connection.execute(insert(removals), row | {"erased": erased})
    new = {"reason": row["reason"], **refresh(connection, _touched(what, id))}
    connection.execute(insert(events), event(now, _name(connection, annotator_id), "took out", what, id, None, new))


def put_back(connection: Connection, removal_id: int, annotator_id: int, now: datetime) -> None:
    """Use again what was taken out. UserError when it is in use, or when nothing is left of it."""
    row = connection.execute(select(removals).where(removals.c.id == removal_id, _STANDS).with_for_update()).first()
    if row is None:
        raise UserError("this is in use already")
    if row.erased:
        raise UserError("its texts were erased: there is nothing to put back")
    what: What = "item" if row.item_id else "response" if row.response_id else "prompt"
    id = row.item_id or row.response_id or row.prompt_id
    connection.execute(update(removals).where(removals.c.id == removal_id).values(undone_at=now))
    back = refresh(connection, _touched(what, id))
    name = _name(connection, annotator_id)
    connection.execute(insert(events), event(now, name, "put back", what, id, None, back))


def _name(connection: Connection, annotator_id: int | None) -> str:
    if annotator_id is None:
        return "keel"
    return str(connection.execute(select(annotators.c.name).where(annotators.c.id == annotator_id)).scalar_one())


def _touched(what: What, id: int | str) -> ColumnElement[bool]:
    """Which items it is about."""
    if what == "item":
        return items.c.id == id
    if what == "prompt":
        return items.c.prompt_id == id
    return items.c.id.in_(select(item_responses.c.item_id).where(item_responses.c.response_id == id))


def refresh(connection: Connection, which: ColumnElement[bool]) -> dict[str, Any]:
    """Bring ``items.out`` up to what is out. ``items``: those that changed; ``wanted``: (queue, kind, judgements) that
    are wanted less, or again, gold items left out: by these a queue's figures follow from the log."""
    of_response = select(item_responses.c.item_id).join(
        removals, removals.c.response_id == item_responses.c.response_id
    )
    out = or_(
        exists().where(removals.c.item_id == items.c.id, _STANDS),
        exists().where(removals.c.prompt_id == items.c.prompt_id, _STANDS),
        items.c.id.in_(of_response.where(_STANDS)),
    )
    change = update(items).where(which, items.c.out != out).values(out=out)
    rows = connection.execute(
        change.returning(items.c.id, items.c.batch, items.c.kind, items.c.overlap, items.c.gold, items.c.out)
    ).all()
    for now_out in (False, True):
        moved = [row for row in rows if row.gold is None and row.out == now_out]
        tallies.now_plain(connection, [row.id for row in moved], {row.kind for row in moved}, plain=not now_out)
    wanted: Counter[tuple[str, str]] = Counter()
    for row in rows:
        wanted[row.batch, row.kind] += 0 if row.gold else row.overlap
    return {"items": sorted(row.id for row in rows), "wanted": [[*place, n] for place, n in sorted(wanted.items())]}


def refresh_new(connection: Connection, item_ids: Sequence[int]) -> None:
    """Items that were just added may be of something that is out."""
    if connection.execute(select(removals.c.id).where(_STANDS).limit(1)).first() is not None:
        for start in range(0, len(item_ids), 500):
            refresh(connection, items.c.id.in_(item_ids[start : start + 500]))


def in_use(prompt_id: ColumnElement[Any], response_id: ColumnElement[Any] | None = None) -> ColumnElement[bool]:
    """Whether a prompt (and a response) is not taken out: what new items may be made of."""
    used = ~exists().where(removals.c.prompt_id == prompt_id, _STANDS)
    return used if response_id is None else used & ~exists().where(removals.c.response_id == response_id, _STANDS)


def standing(connection: Connection, wanted: Wanted) -> Page[dict[str, Any]]:
    """What is out, the last first: ``what``, ``id``, ``by``, ``reason``, ``created``, ``erased``, ``text``.
    ``wanted.find``: in the reason, or in who took it out."""
    query = (
        select(removals, annotators.c.name.label("by"), responses.c.text, prompts.c.messages)
        .select_from(removals)
        .outerjoin(annotators, annotators.c.id == removals.c.annotator_id)
        .outerjoin(items, items.c.id == removals.c.item_id)
        .outerjoin(responses, responses.c.id == removals.c.response_id)
        .outerjoin(prompts, or_(prompts.c.id == removals.c.prompt_id, prompts.c.id == items.c.prompt_id))
        .where(_STANDS)
        .order_by(removals.c.id.desc())
    )
    if wanted.find:
        query = query.where(or_(holds(removals.c.reason, wanted.find), holds(annotators.c.name, wanted.find)))
    page = wanted.page(connection.execute(wanted.of(query)).mappings())
    found = []
    for row in page:
        what = "item" if row["item_id"] else "response" if row["response_id"] else "prompt"
        text = row["text"] if what == "response" else _last(row["messages"])
        found.append(dict(row) | {"what": what, "text": text, "by": row["by"] or "keel"})
    return Page(found, wanted, page.more)


def _last(messages: Sequence[dict[str, str]] | None) -> str:
    return messages[-1]["content"] if messages else ""
