"""The arena's votes as standings read them: what each says in numbers, and whether it counts. A vote is never thrown
away: one on a conversation in which a model says who it is stays, is marked, and is left out of the standings, until a
reviewer counts it; and they may leave out any other.

What a reviewer decided stands in ``settings``, a row a vote; so do the numbers of a conversation whose texts are
erased, so that no standing changes with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, select, update

from keel.store import people
from keel.store.arena_facts import NAMES, Facts, Finder, own_names, style
from keel.store.ingest import insert_missing
from keel.store.people_tables import arena_votes, conversations, settings, turns
from keel.store.rows import MARK
from keel.store.tables import annotators
from keel.types import UserError

_NAMES = "arena_names"
_PREFIX = "arena vote "
_TOGETHER = 500  # conversations whose texts are in memory at once


@dataclass(frozen=True, slots=True)
class Ballot:
    """``counted``: what a reviewer decided, None where they left it to the names."""

    id: int
    annotator: str
    left: str
    right: str
    choice: str
    created: datetime
    facts: Facts
    counted: bool | None

    @property
    def counts(self) -> bool:
        return self.facts.named is None if self.counted is None else self.counted


def names(connection: Connection) -> list[str]:
    """An admin's list of names, or Keel's."""
    return list(people.setting(connection, _NAMES, list(NAMES)))


def set_names(connection: Connection, chosen: Sequence[str], actor: str, now: datetime) -> None:
    people.set_setting(connection, _NAMES, list(chosen), actor, now)


def looked_for(connection: Connection) -> list[str]:
    """All names that void a vote: what the arena's models are called, and the list."""
    served = connection.execute(select(conversations.c.model_left, conversations.c.model_right).distinct()).all()
    return list(dict.fromkeys([*own_names(sorted({name for row in served for name in row})), *names(connection)]))


def ballots(connection: Connection, known: Mapping[int, Facts] | None = None) -> list[Ballot]:
    """Every vote, the oldest first. ``known``: facts of votes that need not be read again: conversations do not change
    after the vote (for the names looked for, keep them no longer than the list stays)."""
    query = (
        select(arena_votes, conversations.c.model_left, conversations.c.model_right, annotators.c.name)
        .join(conversations, conversations.c.id == arena_votes.c.conversation_id)
        .join(annotators, annotators.c.id == conversations.c.annotator_id)
        .order_by(arena_votes.c.id)
    )
    rows = connection.execute(query).all()
    kept = _kept(connection)
    facts = dict(known or {})
    fresh = [row for row in rows if row.id not in facts]
    facts |= dict(_facts(connection, [(row.id, row.conversation_id, row.turn) for row in fresh], kept))
    return [
        Ballot(
            row.id,
            row.name,
            row.model_left,
            row.model_right,
            row.choice,
            row.created,
            facts[row.id],
            kept.get(row.id, {}).get("counted"),
        )
        for row in rows
    ]


def _facts(
    connection: Connection, votes: Sequence[tuple[int, int, int]], kept: Mapping[int, Mapping[str, Any]]
) -> Iterator[tuple[int, Facts]]:
    """``votes``: (vote, conversation, the turn after which it was given)."""
    finder = Finder(looked_for(connection)) if votes else None
    for start in range(0, len(votes), _TOGETHER):
        some = votes[start : start + _TOGETHER]
        said: dict[int, list[Any]] = {}
        query = select(turns).where(turns.c.conversation_id.in_([talk for _, talk, _ in some]))
        for turn in connection.execute(query.order_by(turns.c.conversation_id, turns.c.number)):
            said.setdefault(turn.conversation_id, []).append(turn)
        for vote, talk, last in some:
            seen = [turn for turn in said[talk] if turn.number <= last]
            left, right = [turn.left or "" for turn in seen], [turn.right or "" for turn in seen]
            assert finder is not None
            if all(text == MARK for text in left + right):
                yield vote, _of_json(kept.get(vote, {}).get("facts"))
            else:
                yield vote, Facts(style(left), style(right), finder.first(left + right))


def keep_facts(connection: Connection, talks: ColumnElement[bool]) -> None:
    """Keep the numbers of conversations, which are to be erased: ``talks`` says of ``conversations`` which."""
    query = select(arena_votes.c.id, arena_votes.c.conversation_id, arena_votes.c.turn).join(conversations).where(talks)
    kept = _kept(connection)
    votes = [(row.id, row.conversation_id, row.turn) for row in connection.execute(query)]
    for vote, facts in _facts(connection, votes, kept):
        said = {"left": facts.left, "right": facts.right, "named": facts.named}
        _keep(connection, vote, {**kept.get(vote, {}), "facts": said})


def decide(connection: Connection, vote_id: int, counted: bool | None, actor: str, now: datetime) -> None:
    """Count the vote, leave it out, or (None) go by the names again. UserError when it is not there."""
    query = select(arena_votes.c.id).where(arena_votes.c.id == vote_id)
    if connection.execute(query.with_for_update()).first() is None:
        raise UserError(f"there is no arena vote {vote_id}")
    old = _kept(connection).get(vote_id, {})
    if old.get("counted") is counted:
        return
    _keep(connection, vote_id, {**old, "counted": counted})
    before, after = {"counted": old.get("counted")}, {"counted": counted}
    action = {True: "counted", False: "left out", None: "left to the names"}[counted]
    people.log(connection, now, actor, action, "arena vote", vote_id, before, after)


def _kept(connection: Connection) -> dict[int, dict[str, Any]]:
    query = select(settings).where(settings.c.name.startswith(_PREFIX, autoescape=True))
    return {int(row.name.removeprefix(_PREFIX)): row.value for row in connection.execute(query)}


def _keep(connection: Connection, vote_id: int, value: dict[str, Any]) -> None:
    name = f"{_PREFIX}{vote_id}"
    insert_missing(connection, settings, [{"name": name, "value": value}])
    connection.execute(update(settings).where(settings.c.name == name).values(value=value))


def _of_json(said: Mapping[str, Any] | None) -> Facts:
    """What was kept; nothing of conversations that an older Keel erased."""
    if said is None:
        return Facts(None, None, None)
    left, right = (tuple(said[side]) if said[side] else None for side in ("left", "right"))
    return Facts(left, right, said["named"])
