"""Erasing personal data: the one thing that overwrites what people did. Each function runs inside its caller's
transaction.

Texts become a mark, in their tables and in the log. The database lets the log be changed only while a row of
``erasures`` is open, which is here alone; that row, and an event that names what was erased and no word of it, stay.
Numbers, choices and times stay too, so that every figure can still be recomputed from the log.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, Table, delete, insert, or_, select, update

from keel.store import tallies
from keel.store.api_tables import answers, tokens, webhooks
from keel.store.ballots import keep_facts
from keel.store.people import ACTORS
from keel.store.people_tables import (
    accounts,
    adjudications,
    arena_votes,
    conversations,
    erasures,
    flags,
    links,
    rankings,
    removals,
    sampling_requests,
    sessions,
    step_labels,
    thumbs,
    turns,
    writings,
)
from keel.store.removals import take_out
from keel.store.rows import MARK
from keel.store.tables import (
    ai_labels,
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

_TEXTS = (
    "reason",
    "text",
    "note",
    "correction",
    "messages",
    "meta",
)  # the fields of the log's values that hold what somebody wrote
_WORK: tuple[tuple[Table, str, str], ...] = (
    (judgements, "judgement", "reason"),
    (rankings, "ranking", "reason"),
    (thumbs, "thumb", "reason"),
    (step_labels, "step judgement", "note"),
    (step_labels, "step judgement", "correction"),
    (writings, "writing", "text"),
    (flags, "flag", "text"),
)


# ------------------------------------------------------------------------------------------------------- what is erased


def erase_person(connection: Connection, name: str, texts: bool, actor: str, now: datetime) -> str:
    """Make somebody nobody: the name, the account, sessions and links are gone; what they judged stays, under the new
    name that is returned. ``texts``: what they wrote goes, too (reasons, flags, replies, the arena's messages); their
    replies are then taken back, since nothing is left to learn from."""
    person = connection.execute(select(annotators).where(annotators.c.name == name)).first()
    if person is None:
        raise UserError(f"there is nobody named {name!r}")
    if name in ACTORS:
        raise UserError(f"the log calls Keel itself {name!r}; it is no person's name")
    new = f"erased person {person.id}"
    with _open(connection, f"person {person.id}", now):
        if texts:
            _erase_words(connection, person.id, now)
        connection.execute(update(annotators).where(annotators.c.id == person.id).values(name=new))
        mine = accounts.c.annotator_id == person.id
        connection.execute(update(accounts).where(mine).values(password=None, active=False))
        connection.execute(delete(sessions).where(sessions.c.annotator_id == person.id))
        connection.execute(delete(links).where(links.c.annotator_id == person.id))
        theirs = select(tokens.c.id).where(tokens.c.annotator_id == person.id)
        connection.execute(delete(answers).where(answers.c.token_id.in_(theirs)))
        connection.execute(delete(tokens).where(tokens.c.annotator_id == person.id))
        for ways in (tokens, webhooks):
            connection.execute(
                update(ways).where(ways.c.made_by == name, ways.c.ended_at.is_(None)).values(ended_at=now)
            )
        open_links = links.c.made_by == name, links.c.used_at.is_(None)
        connection.execute(update(links).where(*open_links).values(used_at=now))
        for table in (links, sampling_requests, tokens, webhooks):
            connection.execute(update(table).where(table.c.made_by == name).values(made_by=new))
        connection.execute(update(events).where(events.c.actor == name).values(actor=new))
        about = events.c.entity.in_(("account", "annotator")), events.c.entity_id == name
        connection.execute(update(events).where(*about).values(entity_id=new))
    by = new if actor == name else actor
    connection.execute(insert(events), event(now, by, "erased", "person", person.id, None, {"texts": texts}))
    return new


def erase_response(connection: Connection, response_id: int, annotator_id: int, actor: str, now: datetime) -> None:
    """A response's text is gone, with its edits and with what was written about its items; it is out for good."""
    if connection.execute(select(responses.c.id).where(responses.c.id == response_id)).first() is None:
        raise UserError(f"there is no response {response_id}")
    with _open(connection, f"response {response_id}", now):
        of_it = select(item_responses.c.item_id).where(item_responses.c.response_id == response_id)
        _erase_items(connection, items.c.id.in_(of_it), now)
        _erase_responses(connection, responses.c.id == response_id)
        take_out(connection, "response", response_id, "", annotator_id, now, erased=True)
        _forget_removal(connection, removals.c.response_id == response_id)
        _blank(connection, [("response", str(response_id))])
    connection.execute(insert(events), event(now, actor, "erased", "response", response_id, None, None))


def erase_prompt(connection: Connection, prompt_id: str, annotator_id: int, actor: str, now: datetime) -> str:
    """A prompt's messages and notes are gone, with its responses and with all that was written on it; it is out for
    good. Its id may hold a name: it gets a new one, which is returned."""
    row = connection.execute(select(prompts).where(prompts.c.id == prompt_id)).first()
    if row is None:
        raise UserError(f"there is no prompt {prompt_id!r}")
    new = f"erased-{secrets.token_hex(8)}"  # a number could be that of an erased prompt of another store
    with _open(connection, new, now):
        _erase_items(connection, items.c.prompt_id == prompt_id, now)
        _erase_responses(connection, responses.c.prompt_id == prompt_id)
        messages = [{"role": message["role"], "content": MARK} for message in row.messages]
        gone = {"id": new, "messages": messages, "kind": row.kind, "meta": {}, "created": row.created}
        connection.execute(insert(prompts), gone)
        for table in (responses, items, removals):
            connection.execute(update(table).where(table.c.prompt_id == prompt_id).values(prompt_id=new))
        named = items.c.prompt_id == new, items.c.kind == "write"
        connection.execute(update(items).where(*named).values(key=f"write/{new}"))
        connection.execute(delete(prompts).where(prompts.c.id == prompt_id))
        take_out(connection, "prompt", new, "", annotator_id, now, erased=True)
        _forget_removal(connection, removals.c.prompt_id == new)
        _blank(connection, [("prompt", prompt_id)])
        about = events.c.entity == "prompt", events.c.entity_id == prompt_id
        connection.execute(update(events).where(*about).values(entity_id=new))
    connection.execute(insert(events), event(now, actor, "erased", "prompt", new, None, None))
    return new


@contextmanager
def _open(connection: Connection, what: str, now: datetime) -> Iterator[None]:
    """Lets the log be changed until the end of the block."""
    made = connection.execute(insert(erasures), {"at": now, "what": what, "open": True}).inserted_primary_key
    assert made is not None
    yield
    connection.execute(update(erasures).where(erasures.c.id == made.id).values(open=False))


# --------------------------------------------------------------------------------------------------- texts, by table


def _erase_words(connection: Connection, annotator_id: int, now: datetime) -> None:
    """What one person wrote."""
    mine = select(assignments.c.id).where(assignments.c.annotator_id == annotator_id)
    _erase_work(connection, mine, now)
    _erase_reasons(connection, adjudications, "item", adjudications.c.item_id, annotator_id)
    removed = removals.c.annotator_id == annotator_id
    rows = connection.execute(select(removals).where(removed)).all()
    _forget_removal(connection, removed)
    _blank(connection, [_removed(row) for row in rows])
    talks = select(conversations.c.id).where(conversations.c.annotator_id == annotator_id)
    keep_facts(connection, conversations.c.annotator_id == annotator_id)
    said = turns.c.conversation_id.in_(talks)
    connection.execute(update(turns).where(said).values(message=MARK))
    for side in (turns.c.left, turns.c.right):  # what a model said to it may repeat it
        connection.execute(update(turns).where(said, side.is_not(None)).values({side: MARK}))
    votes = arena_votes.c.conversation_id.in_(talks)
    ids = connection.execute(select(arena_votes.c.id).where(votes)).scalars().all()
    connection.execute(update(arena_votes).where(votes, arena_votes.c.reason.is_not(None)).values(reason=MARK))
    _blank(connection, [("arena vote", str(id)) for id in ids])


def _erase_items(connection: Connection, which: ColumnElement[bool], now: datetime) -> None:
    """What was written about items, by anybody."""
    ids = select(items.c.id).where(which)
    _erase_work(connection, select(assignments.c.id).where(assignments.c.item_id.in_(ids)), now)
    _erase_reasons(connection, adjudications, "item", adjudications.c.item_id, None, ids)
    out = removals.c.item_id.in_(ids)
    _forget_removal(connection, out)
    _blank(connection, [("item", str(id)) for id in connection.execute(ids).scalars()])


def _erase_work(connection: Connection, of: Select[Any], now: datetime) -> None:
    """The texts of judgements, rankings, thumbs, step labels, writings and flags of some assignments, and the reasons
    of skips. Writings that stand are taken back: a mark is nothing to learn from."""
    standing = select(writings).where(writings.c.assignment_id.in_(of), writings.c.undone_at.is_(None))
    names = select(assignments.c.id, annotators.c.name).join(annotators).where(assignments.c.id.in_(of))
    who = {row.id: row.name for row in connection.execute(names)}
    back = connection.execute(standing).all()
    tallies.change_assignments(connection, [row.assignment_id for row in back], -1)
    for row in back:
        connection.execute(update(writings).where(writings.c.id == row.id).values(undone_at=now))
        old = {"text": MARK, "original_id": row.original_id}
        log = event(now, who[row.assignment_id], "undone", "writing", row.id, old, None, row.guideline)
        connection.execute(insert(events), log)
    told = [("assignment", str(id)) for id in who]
    for table, entity, column in _WORK:
        rows = table.c.assignment_id.in_(of)
        told += [(entity, str(id)) for id in connection.execute(select(table.c.id).where(rows)).scalars()]
        connection.execute(update(table).where(rows, table.c[column].is_not(None)).values({column: MARK}))
    judged = ai_labels.c.judgement_id.in_(select(judgements.c.id).where(judgements.c.assignment_id.in_(of)))
    for column in ("asked", "thought", "asked_second", "thought_second"):  # they hold prompt and replies
        kept = judged, ai_labels.c[column].is_not(None)
        connection.execute(update(ai_labels).where(*kept).values({column: MARK}))
    _blank(connection, told)


def _erase_reasons(
    connection: Connection,
    table: Table,
    entity: str,
    about: ColumnElement[int],
    annotator_id: int | None,
    ids: Select[Any] | None = None,
) -> None:
    """The reasons of reviewers' words, of one reviewer or on some items."""
    which = table.c.annotator_id == annotator_id if ids is None else about.in_(ids)
    found = connection.execute(select(about, annotators.c.name).join(annotators).where(which)).all()
    connection.execute(update(table).where(which, table.c.reason.is_not(None)).values(reason=MARK))
    by = {row[1] for row in found}
    _blank(connection, [(entity, str(row[0])) for row in found], by)


def _erase_responses(connection: Connection, which: ColumnElement[bool]) -> None:
    ids = connection.execute(select(responses.c.id).where(which)).scalars().all()
    for id in ids:  # the key is a hash of the text, by which it could be guessed
        gone = {"text": MARK, "key": f"erased/{id}"}
        connection.execute(update(responses).where(responses.c.id == id).values(**gone))


def _forget_removal(connection: Connection, which: ColumnElement[bool]) -> None:
    connection.execute(update(removals).where(which, removals.c.reason.is_not(None)).values(reason=MARK))


def _removed(row: Any) -> tuple[str, str]:
    what = "item" if row.item_id else "response" if row.response_id else "prompt"
    return what, str(row.item_id or row.response_id or row.prompt_id)


# ------------------------------------------------------------------------------------------------------------ the log


def _blank(connection: Connection, about: Iterable[tuple[str, str]], actors: Iterable[str] | None = None) -> None:
    """Blank the texts in the log's values about these entities, by anybody or by ``actors``."""
    by_entity: dict[str, list[str]] = {}
    for entity, id in about:
        by_entity.setdefault(entity, []).append(id)
    for entity, ids in by_entity.items():
        for start in range(0, len(ids), 500):
            named = events.c.entity == entity, events.c.entity_id.in_(ids[start : start + 500])
            query = select(events.c.id, events.c.old, events.c.new).where(*named)
            query = query.where(or_(events.c.old.is_not(None), events.c.new.is_not(None)))
            if actors is not None:
                query = query.where(events.c.actor.in_(sorted(actors)))
            for row in connection.execute(query).all():
                change = {"old": _without_texts(row.old), "new": _without_texts(row.new)}
                connection.execute(update(events).where(events.c.id == row.id).values(**change))


def _without_texts(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _marked(v) if k in _TEXTS else _without_texts(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_texts(part) for part in value]
    return value


def _marked(value: Any) -> Any:
    """The value with each text in it blanked: what is no text stays, so that the log keeps its form."""
    if isinstance(value, Mapping):
        return {k: v if k == "role" else _marked(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_marked(part) for part in value]
    return MARK if isinstance(value, str) else value
