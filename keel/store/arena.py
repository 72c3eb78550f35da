"""Conversations with two hidden models. Each function runs inside its caller's transaction and looks only at
conversations of the given annotator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, insert, select, update

from keel.store.ballots import ballots
from keel.store.people_tables import arena_votes, conversations, turns
from keel.store.rows import storable
from keel.store.tables import annotators, event, events
from keel.types import UserError


@dataclass(frozen=True, slots=True)
class Turn:
    """``left``, ``right``: the replies, None while one is still to come. ``token``: the browser's name for the message;
    ``attempt``: how often it has been sent."""

    number: int
    message: str
    left: str | None
    right: str | None
    token: str | None = None
    attempt: int = 1

    @property
    def answered(self) -> bool:
        return self.left is not None and self.right is not None


@dataclass(frozen=True, slots=True)
class Conversation:
    id: int
    model_left: str
    model_right: str
    ended: bool
    turns: tuple[Turn, ...]


def start(connection: Connection, annotator_id: int, left: str, right: str, now: datetime) -> int:
    """A new conversation's id; one of theirs that is open is given up."""
    mine = conversations.c.annotator_id == annotator_id, conversations.c.ended_at.is_(None)
    connection.execute(update(conversations).where(*mine).values(ended_at=now))
    row = {"annotator_id": annotator_id, "model_left": left, "model_right": right, "created": now}
    made = connection.execute(insert(conversations), row).inserted_primary_key
    assert made is not None
    return int(made.id)


def conversation(connection: Connection, id: int, annotator_id: int, lock: bool = False) -> Conversation:
    query = select(conversations).where(conversations.c.id == id, conversations.c.annotator_id == annotator_id)
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise UserError("this conversation is not here; start a new one")
    said = connection.execute(select(turns).where(turns.c.conversation_id == id).order_by(turns.c.number))
    return Conversation(
        id,
        row.model_left,
        row.model_right,
        row.ended_at is not None,
        tuple(Turn(row.number, row.message, row.left, row.right, row.token, row.attempt) for row in said),
    )


def handle_of(connection: Connection, id: int) -> str:
    """What a browser calls the conversation by."""
    return str(connection.execute(select(conversations.c.handle).where(conversations.c.id == id)).scalar_one())


def find(connection: Connection, handle: str, annotator_id: int) -> int:
    """The conversation's id. Somebody else's handle is refused in the words for one that does not exist."""
    query = select(conversations.c.id).where(
        conversations.c.handle == handle, conversations.c.annotator_id == annotator_id
    )
    id: int | None = connection.execute(query).scalar_one_or_none()
    if id is None:
        raise UserError("this conversation is not here; start a new one")
    return id


def open_conversation(connection: Connection, annotator_id: int) -> int | None:
    query = select(conversations.c.id).where(
        conversations.c.annotator_id == annotator_id, conversations.c.ended_at.is_(None)
    )
    id: int | None = connection.execute(query.order_by(conversations.c.id.desc()).limit(1)).scalar_one_or_none()
    return id


def say(
    connection: Connection,
    id: int,
    annotator_id: int,
    message: str,
    *,
    token: str | None,
    number: int | None,
    now: datetime,
) -> Conversation:
    """Add the person's next message; the conversation with it as its last turn.

    A message whose answers broke off is replaced by the next one. The same ``token`` is the same message: its turn is
    answered anew, or found with its answers when both are there. ``number``: which turn the person's page takes it for;
    UserError when the conversation is somewhere else by now.
    """
    so_far = conversation(connection, id, annotator_id, lock=True)
    turn = next_turn(so_far, token, number)
    message = storable(message)
    last = so_far.turns[-1] if so_far.turns else None
    if last is None or turn > last.number:
        row = {"conversation_id": id, "number": turn, "message": message, "created": now, "token": token}
        connection.execute(insert(turns), row)
    elif not last.answered:
        anew = {"message": message, "left": None, "right": None, "token": token, "attempt": last.attempt + 1}
        connection.execute(update(turns).where(*_turn(id, turn)).values(**anew))
    elif last.message != message:
        raise UserError("this client token was used for another message; make a new one each time")
    return conversation(connection, id, annotator_id)


def next_turn(so_far: Conversation, token: str | None, number: int | None) -> int:
    """The number of the turn that the person's next message is (``say``)."""
    if so_far.ended:
        raise UserError("this conversation has ended; start a new one")
    last = so_far.turns[-1] if so_far.turns else None
    again = last is not None and (not last.answered or (token is not None and last.token == token))
    turn = len(so_far.turns) + (0 if again else 1)
    if number not in (None, turn):
        raise UserError("this conversation went on in another window; load the page again")
    return turn


def answer(connection: Connection, id: int, turn: Turn, side: str, text: str) -> bool:
    """Keep the reply of one side to this attempt at ``turn``. False, and nothing is kept, when the message was sent
    anew meanwhile or the conversation has ended."""
    conversation = select(conversations).where(conversations.c.id == id, conversations.c.ended_at.is_(None))
    if connection.execute(conversation.with_for_update()).first() is None:
        return False
    where = *_turn(id, turn.number), turns.c.attempt == turn.attempt
    return connection.execute(update(turns).where(*where).values(**{side: storable(text)})).rowcount == 1


def _turn(id: int, number: int) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return turns.c.conversation_id == id, turns.c.number == number


def vote(
    connection: Connection,
    id: int,
    annotator_id: int,
    choice: str,
    *,
    token: str,
    reason: str | None,
    guideline: str | None,
    now: datetime,
    turn: int | None = None,
) -> Conversation:
    """Count a vote, which ends the conversation. The same token counts once. ``turn``: the last one that the person
    has before them; UserError when another one has been answered since."""
    known = connection.execute(select(arena_votes.c.conversation_id).where(arena_votes.c.token == token)).first()
    found = conversation(connection, id, annotator_id, lock=True)
    if known is not None:
        if known.conversation_id != id:
            raise UserError("this client token was used for another vote; make a new one each time")
        return found
    if found.ended:
        raise UserError("this conversation has ended; start a new one")
    answered = [said for said in found.turns if said.answered]
    if not answered:
        raise UserError("vote once both have answered")
    if turn not in (None, answered[-1].number):
        raise UserError("this conversation went on in another window; load the page again")
    said = {"turn": answered[-1].number, "choice": choice, "reason": None if reason is None else storable(reason)}
    row = said | {"conversation_id": id, "token": token, "guideline": guideline, "created": now}
    made = connection.execute(insert(arena_votes), row).inserted_primary_key
    assert made is not None
    connection.execute(update(conversations).where(conversations.c.id == id).values(ended_at=now))
    name = connection.execute(select(annotators.c.name).where(annotators.c.id == annotator_id)).scalar_one()
    new = said | {"conversation": id, "models": [found.model_left, found.model_right]}
    connection.execute(insert(events), event(now, name, "voted", "arena vote", made.id, None, new, guideline))
    return found


def texts(
    connection: Connection, vote_ids: Sequence[int]
) -> dict[int, tuple[str | None, list[tuple[str, str | None, str | None]]]]:
    """Of each vote the reason, and (message, left, right) of every turn until it was given."""
    query = select(arena_votes.c.id, arena_votes.c.reason, arena_votes.c.turn.label("last"), turns)
    query = query.join(turns, turns.c.conversation_id == arena_votes.c.conversation_id)
    query = query.where(arena_votes.c.id.in_(vote_ids), turns.c.number <= arena_votes.c.turn)
    found: dict[int, tuple[str | None, list[tuple[str, str | None, str | None]]]] = {}
    for row in connection.execute(query.order_by(arena_votes.c.id, turns.c.number)):
        found.setdefault(row[0], (row.reason, []))[1].append((row.message, row.left, row.right))
    return found


def votes(connection: Connection) -> list[dict[str, Any]]:
    """Every vote with its conversation, as rows of an export: the two sides as message lists, oldest first.
    ``counted``: whether it counts in the standings; ``named``: the name that a reply gives away."""
    marks = {one.id: one for one in ballots(connection)}
    query = (
        select(arena_votes, conversations.c.model_left, conversations.c.model_right, annotators.c.name)
        .join(conversations, conversations.c.id == arena_votes.c.conversation_id)
        .join(annotators, annotators.c.id == conversations.c.annotator_id)
        .order_by(arena_votes.c.id)
    )
    rows = [dict(row) for row in connection.execute(query).mappings()]
    said: dict[int, list[Mapping[str, Any]]] = {}
    for turn in connection.execute(select(turns).order_by(turns.c.conversation_id, turns.c.number)).mappings():
        said.setdefault(turn["conversation_id"], []).append(dict(turn))
    return [
        {
            "id": row["token"],
            "annotator": row["name"],
            "choice": row["choice"],
            "turn": row["turn"],
            "reason": row["reason"],
            "guideline": row["guideline"],
            "created": row["created"].isoformat(),
            "model_left": row["model_left"],
            "model_right": row["model_right"],
            "counted": marks[row["id"]].counts,
            "named": marks[row["id"]].facts.named,
            "conversation_left": _messages(said[row["conversation_id"]][: row["turn"]], "left"),
            "conversation_right": _messages(said[row["conversation_id"]][: row["turn"]], "right"),
        }
        for row in rows
    ]


def _messages(said: list[Mapping[str, Any]], side: str) -> list[dict[str, str]]:
    return [
        {"role": role, "content": turn[column]}
        for turn in said
        for role, column in (("user", "message"), ("assistant", side))
    ]
