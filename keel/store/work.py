"""What people do besides comparing: rank, give thumbs, write, edit, skip, flag; and what that is as training records.

Each function runs inside its caller's transaction (``Store.transaction``). Whose an assignment is, is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, Select, insert, select, update

from keel.recipe.declared import Voter
from keel.store import queue
from keel.store.hand_in import RANKINGS, THUMBS, WORK_TABLES, WRITINGS, record, undo
from keel.store.ingest import in_places, insert_missing, rows_of
from keel.store.people_tables import flags, writings
from keel.store.records import Assignment, LeaseLost, NewRanking, NewThumb, NewWriting, WorkKind, check_token
from keel.store.removals import refresh_new
from keel.store.rows import storable
from keel.store.standing import by, standing
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
from keel.types import Demonstration, Message, UserError

RANKED = range(4, 10)  # how many responses one ranking may hold (InstructGPT, section 3.4: K between 4 and 9)

# ----------------------------------------------------------------------------------------------------- what is wanted


def add_rankings(
    connection: Connection, groups: Sequence[Sequence[int]], overlap: int, batch: str, now: datetime
) -> list[int]:
    """Items that ask to rank four to nine responses of one prompt; their ids. UserError for any other group."""
    rows, members = [], {}
    for group in groups:
        ids = sorted(set(group))
        found = connection.execute(select(responses.c.prompt_id).where(responses.c.id.in_(ids))).scalars().all()
        if len(ids) not in RANKED or len(found) != len(ids) or len(set(found)) != 1:
            raise UserError(f"responses {list(group)}: a ranking needs 4 to 9 different responses of one prompt")
        key = "-".join(str(id) for id in ids)
        members[key] = ids
        rows.append(_row("rank", found[0], key, overlap, batch, now))
    return _add(connection, rows, members, overlap, now)


def add_writing(
    connection: Connection, prompt_ids: Sequence[str], overlap: int, batch: str, now: datetime
) -> list[int]:
    """Items that ask for a reply to each prompt; their ids."""
    rows = [_row("write", id, f"write/{id}", overlap, batch, now) for id in prompt_ids]
    return _add(connection, rows, {}, overlap, now)


def add_edits(
    connection: Connection, response_ids: Sequence[int], overlap: int, batch: str, now: datetime
) -> list[int]:
    """Items that ask to improve each response; their ids."""
    return add_single(connection, "edit", response_ids, overlap, batch, now)


def add_thumbs(
    connection: Connection, response_ids: Sequence[int], overlap: int, batch: str, now: datetime
) -> list[int]:
    """Items that ask for thumbs up or down on each response; their ids."""
    return add_single(connection, "thumb", response_ids, overlap, batch, now)


def add_single(
    connection: Connection, kind: WorkKind, response_ids: Sequence[int], overlap: int, batch: str, now: datetime
) -> list[int]:
    """Items on one response each."""
    found = rows_of(connection, responses, responses.c.id, sorted(set(response_ids)))
    prompt_of = {row.id: row.prompt_id for row in found}
    missing = next((id for id in response_ids if id not in prompt_of), None)
    if missing is not None:
        raise UserError(f"response {missing} is not in the store; add it first")
    rows = [_row(kind, prompt_of[id], f"{kind}/{id}", overlap, batch, now) for id in response_ids]
    return _add(connection, rows, {f"{kind}/{id}": [id] for id in response_ids}, overlap, now)


def _row(kind: WorkKind, prompt_id: str, key: str, overlap: int, batch: str, now: datetime) -> dict[str, Any]:
    row = {"prompt_id": prompt_id, "batch": batch, "key": key, "overlap": overlap, "taken": 0, "created": now}
    return row | {"kind": kind, "turn": 0.0}


def _add(
    connection: Connection,
    rows: Sequence[dict[str, Any]],
    members: Mapping[str, Sequence[int]],
    overlap: int,
    now: datetime,
) -> list[int]:
    if overlap < 1:
        raise UserError(f"overlap is {overlap}; each item needs at least 1 person")
    here = select(items.c.key).where(items.c.batch.in_({row["batch"] for row in rows}))
    known = set(connection.execute(here).scalars())
    if rows:
        insert_missing(connection, items, in_places(connection, rows[0]["batch"], rows))
    ids = []
    for row in rows:
        query = select(items.c.id).where(items.c.batch == row["batch"], items.c.key == row["key"])
        ids.append(connection.execute(query).scalar_one())
        parts = [{"item_id": ids[-1], "response_id": response} for response in members.get(row["key"], ())]
        insert_missing(connection, item_responses, parts)
    refresh_new(connection, ids)
    if added := sum(row["key"] not in known for row in rows):
        new = {"items": added, "overlap": overlap, "kind": rows[0]["kind"]}
        connection.execute(insert(events), event(now, "keel", "added", "batch", rows[0]["batch"], None, new))
    return ids


def prompts_asked(connection: Connection, kind: WorkKind) -> set[str]:
    """The prompts that have been queued for this kind of work."""
    return set(connection.execute(select(items.c.prompt_id).where(items.c.kind == kind)).scalars())


# --------------------------------------------------------------------------------------------------------- what is done


def rank(
    connection: Connection,
    assignment_id: int,
    ranking: NewRanking,
    *,
    annotator_id: int,
    now: datetime,
) -> int:
    """Count a ranking and return its id."""
    shown = connection.execute(
        select(assignments.c.shown).where(assignments.c.id == assignment_id, assignments.c.annotator_id == annotator_id)
    ).scalar_one_or_none()
    if shown is None:
        raise queue.not_yours()
    tiers = ranking.tiers
    if sorted(place for tier in tiers for place in tier) != list(range(len(shown))) or not all(tiers):
        raise UserError("a ranking places each response once")
    values = {
        "tiers": [[shown[place] for place in tier] for tier in tiers],
        "reason": None if ranking.reason is None else storable(ranking.reason),
    }
    id, _ = record(connection, RANKINGS, assignment_id, ranking, values, {}, annotator_id=annotator_id, now=now)
    return id


def thumb(
    connection: Connection,
    assignment_id: int,
    given: NewThumb,
    *,
    annotator_id: int | None,
    now: datetime,
) -> int:
    """Count a thumb up or down and return its id. ``annotator_id``: whose the assignment must be; None: anybody's."""
    values = {"up": given.up, "reason": None if given.reason is None else storable(given.reason)}
    id, _ = record(connection, THUMBS, assignment_id, given, values, {}, annotator_id=annotator_id, now=now)
    return id


def write(
    connection: Connection,
    assignment_id: int,
    writing: NewWriting,
    *,
    annotator_id: int,
    now: datetime,
) -> int:
    """Count a demonstration or an edit and return its id. It counts also when its lease ran out and somebody else was
    given the item: one more text does no harm, and takes long to write."""
    text = storable(writing.text).strip()
    if not text:
        raise UserError("the reply is empty; write one, or skip")
    query = select(assignments.c.shown, responses.c.text).outerjoin_from(
        assignments.join(items), item_responses, item_responses.c.item_id == items.c.id
    )
    query = query.outerjoin(responses, responses.c.id == item_responses.c.response_id)
    row = connection.execute(query.where(assignments.c.id == assignment_id)).first()
    original = row.shown[0] if row is not None and row.shown else None
    if row is not None and original is not None and row.text.strip() == text:
        raise UserError("the reply is as it was; improve it, or skip when it needs nothing")
    values = {"text": text, "original_id": original}
    id, _ = record(connection, WRITINGS, assignment_id, writing, values, {}, annotator_id=annotator_id, now=now)
    return id


def skip(
    connection: Connection,
    assignment_id: int,
    reason: str,
    *,
    token: str | None,
    guideline: str | None,
    annotator_id: int,
    now: datetime,
) -> None:
    """Give an item back for good. Skipped once more, it stays skipped; the same token counts once."""
    queue.one_at_a_time(connection, annotator_id)
    assignment = _mine(connection, assignment_id, annotator_id)
    if assignment.state == "skipped" or (token is not None and assignment.skip_token == token):
        return
    if assignment.state == "judged":
        raise UserError("this item is judged already; undo that judgement to skip it")
    changes = {"state": "skipped", "skipped_at": now, "skip_token": token}
    connection.execute(update(assignments).where(assignments.c.id == assignment_id).values(**changes))
    if assignment.state == "leased":
        given_back = items.c.taken - 1
        connection.execute(update(items).where(items.c.id == assignment.item_id).values(taken=given_back))
    new = {"assignment": assignment_id, "item": assignment.item_id, "reason": storable(reason)}
    log = event(now, assignment.name, "skipped", "assignment", assignment_id, None, new, guideline)
    connection.execute(insert(events), log)


def flag(
    connection: Connection,
    assignment_id: int,
    text: str,
    *,
    token: str,
    guideline: str | None,
    annotator_id: int,
    now: datetime,
) -> None:
    """Tell the reviewers that something is wrong with an item. The same token counts once."""
    check_token(token)
    assignment = _mine(connection, assignment_id, annotator_id)
    if connection.execute(select(flags.c.id).where(flags.c.token == token)).first() is not None:
        return
    row = {"assignment_id": assignment_id, "token": token, "text": storable(text), "created": now}
    made = connection.execute(insert(flags), row).inserted_primary_key
    assert made is not None
    new = {"assignment": assignment_id, "item": assignment.item_id, "text": row["text"]}
    connection.execute(insert(events), event(now, assignment.name, "flagged", "flag", made.id, None, new, guideline))


def undo_last(
    connection: Connection,
    kind: WorkKind,
    annotator_id: int,
    *,
    guideline: str | None,
    now: datetime,
    lease: timedelta,
    assignment_id: int | None = None,
) -> tuple[Assignment, str] | None:
    """Take back what this annotator did last in this kind of work, a skip included: the assignment, theirs again, and
    what was taken back (judged, skipped); None when there is nothing to take back. ``assignment_id``: what was done
    with this one, whatever came after it; when it is in their hands already, that comes as "held", and sent again an
    undo takes back nothing else. What was taken out of use since is passed over: nobody is shown it again."""
    queue.one_at_a_time(connection, annotator_id)
    did = WORK_TABLES[kind]
    mine = [assignments.c.annotator_id == annotator_id, items.c.kind == kind, items.c.out.is_(False)]
    if assignment_id is not None:
        mine.append(assignments.c.id == assignment_id)
    ids = did.table.c.id
    done = standing(did.table, ids, did.table.c.created).where(*mine).order_by(ids.desc()).limit(1)
    last = connection.execute(done).first()
    given_back = select(assignments).join(items).where(*mine, assignments.c.state == "skipped")
    skipped = connection.execute(given_back.order_by(assignments.c.skipped_at.desc()).limit(1)).first()
    if skipped is not None and (last is None or skipped.skipped_at > last.created):
        return _unskip(connection, skipped, kind, guideline, now, lease), "skipped"
    if last is not None:
        return undo(connection, last.id, now=now, lease=lease, of=did, annotator_id=annotator_id), "judged"
    held = select(assignments).join(items).where(*mine, assignments.c.state == "leased")
    row = None if assignment_id is None else connection.execute(held).first()
    if row is None:
        return None
    return queue.screen(connection, row.id, row.item_id, row.shown, row.expires_at, kind, row.handle), "held"


def _unskip(
    connection: Connection, skipped: Row[Any], kind: WorkKind, guideline: str | None, now: datetime, lease: timedelta
) -> Assignment:
    try:
        queue.retake(connection, skipped)
    except LeaseLost:
        raise UserError("somebody else has the item that you skipped now; it can't be taken back") from None
    queue.lease_again(connection, skipped.id, now, lease)
    name = connection.execute(select(annotators.c.name).where(annotators.c.id == skipped.annotator_id)).scalar_one()
    log = event(now, name, "unskipped", "assignment", skipped.id, {"item": skipped.item_id}, None, guideline)
    connection.execute(insert(events), log)
    return queue.screen(connection, skipped.id, skipped.item_id, skipped.shown, now + lease, kind, skipped.handle)


def _mine(connection: Connection, assignment_id: int, annotator_id: int) -> Row[Any]:
    query = (
        select(assignments, annotators.c.name)
        .join(annotators)
        .where(assignments.c.id == assignment_id, assignments.c.annotator_id == annotator_id)
        .with_for_update(of=assignments)
    )
    assignment = connection.execute(query).first()
    if assignment is None:
        raise queue.not_yours()
    return assignment


# ------------------------------------------------------------------------------------------------- as training records


def demonstrations(connection: Connection, batch: str | None, who: Voter | None) -> list[Demonstration]:
    """See Store.demonstrations."""
    query = (
        standing(writings, writings.c.token, writings.c.text, prompts.c.messages)
        .join(prompts, prompts.c.id == items.c.prompt_id)
        .where(items.c.out.is_(False))
        .order_by(writings.c.id)
    )
    query = query if who is None else query.where(by(who))
    found = []
    for row in connection.execute(query if batch is None else query.where(items.c.batch == batch)):
        asked = [Message(message["role"], message["content"]) for message in row.messages]
        found.append(Demonstration(row.token, (*asked, Message("assistant", row.text))))
    return found


def done_by(kind: WorkKind, annotator_id: int, limit: int) -> Select[Any]:
    """What one annotator did last that stands: the rows of the kind's table, with the prompt's messages."""
    table = WORK_TABLES[kind].table
    return (
        standing(table, table, prompts.c.messages)
        .join(prompts, prompts.c.id == items.c.prompt_id)
        .where(assignments.c.annotator_id == annotator_id, items.c.kind == kind)
        .order_by(table.c.id.desc())
        .limit(limit)
    )
