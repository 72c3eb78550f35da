"""Talking to two hidden models at once. Their names leave this file with the vote only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from keel.store import Store, arena, guidelines
from keel.store.arena import Conversation, Turn
from keel.store.people import Account
from keel.store.sides import Choice, Side
from keel.types import UserError
from keel.web.service.sources import ArenaModel
from keel.web.service.streams import FAILED, Busy, Places, Stream

LONGEST_MESSAGE = 8_000  # characters
MOST_TURNS = 20

__all__ = ["FAILED", "Arena", "Busy", "Shown"]


@dataclass(frozen=True, slots=True)
class Shown:
    """A conversation as its page shows it. ``names``: (left, right), after the vote only."""

    id: int
    turns: tuple[Turn, ...]
    ended: bool
    names: tuple[str, str] | None


class Arena:
    def __init__(self, store: Store, models: Sequence[ArenaModel]) -> None:
        self._store = store
        self._models = {model.name: model for model in models}
        self._places = Places()

    @property
    def ready(self) -> bool:
        return len(self._models) >= 2

    @property
    def names(self) -> list[str]:
        return list(self._models)

    def start(self, person: Account) -> int:
        if not self.ready:
            raise UserError("the arena needs two models; start keel label with --arena for each")
        left, right = random.SystemRandom().sample(sorted(self._models), 2)
        with self._store.transaction(writes=True) as connection:
            return arena.start(connection, person.annotator_id, left, right, self._store.now)

    def handle(self, id: int) -> str:
        """What a browser calls a conversation by."""
        with self._store.transaction(writes=False) as connection:
            return arena.handle_of(connection, id)

    def find(self, person: Account, handle: str) -> int:
        """The id of this person's conversation. UserError when it is not theirs, or is none."""
        with self._store.transaction(writes=False) as connection:
            return arena.find(connection, handle, person.annotator_id)

    def current(self, person: Account) -> Shown | None:
        """The conversation that this person is in."""
        with self._store.transaction(writes=False) as connection:
            id = arena.open_conversation(connection, person.annotator_id)
            return None if id is None else _shown(arena.conversation(connection, id, person.annotator_id))

    def say(self, person: Account, id: int, message: str, token: str | None = None, turn: int | None = None) -> Stream:
        """Send a message to both. The conversation and its models are looked at before the first piece is asked for,
        so a UserError comes at once, and Busy when all places are taken.

        A person has one place: what still streams to them elsewhere ends. ``token``, ``turn``: see keel.store.arena.
        """
        message = message.strip()
        if not 0 < len(message) <= LONGEST_MESSAGE:
            raise UserError(f"a message has 1 to {LONGEST_MESSAGE} characters")
        with self._store.transaction(writes=False) as connection:
            found = arena.conversation(connection, id, person.annotator_id)
        arena.next_turn(found, token, turn)  # what can't be said ends nothing that is being said
        if len(found.turns) > MOST_TURNS:
            raise UserError(f"after {MOST_TURNS} turns a conversation ends; vote, please")
        models = [self._models.get(name) for name in (found.model_left, found.model_right)]
        if None in models:
            raise UserError("a model of this conversation is not served any more; start a new one")
        stream = self._places.take(person.annotator_id, id)
        try:
            with self._store.transaction(writes=True) as connection:
                found = arena.say(
                    connection, id, person.annotator_id, message, token=token, number=turn, now=self._store.now
                )
        except BaseException:
            stream.close()
            raise
        stream.begin(found, [model for model in models if model is not None], self._keep)
        return stream

    def _keep(self, found: Conversation, side: Side, text: str) -> bool:
        with self._store.transaction(writes=True) as connection:
            return arena.answer(connection, found.id, found.turns[-1], side, text)

    def vote(
        self, person: Account, id: int, choice: Choice, token: str, reason: str | None, turn: int | None = None
    ) -> Shown:
        """Count the vote; the names come back. ``turn``: see keel.store.arena. UserError while an answer is coming."""
        if self._places.answering(person.annotator_id, id):
            raise UserError("the models are still answering; vote once both have answered")
        with self._store.transaction(writes=True) as connection:
            guideline = guidelines.current_guideline(connection)
            found = arena.vote(
                connection,
                id,
                person.annotator_id,
                choice,
                token=token,
                reason=reason or None,
                guideline=guideline.version if guideline else None,
                now=self._store.now,
                turn=turn,
            )
        return Shown(found.id, found.turns, True, (found.model_left, found.model_right))


def _shown(found: Conversation) -> Shown:
    return Shown(found.id, found.turns, found.ended, None)
