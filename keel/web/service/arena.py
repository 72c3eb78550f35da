"""Talking to two hidden models at once. Their names leave this file with the vote only."""

from __future__ import annotations

import logging
import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from keel.store import Store, arena, people
from keel.store.arena import Conversation, Turn
from keel.store.people import Account
from keel.store.records import Choice
from keel.types import Message, UserError
from keel.web.service.sources import ArenaModel

LONGEST_MESSAGE = 8_000  # characters
LONGEST_REPLY = 40_000
MOST_TURNS = 20
MOST_STREAMS = 8  # conversations answered at once, in the whole app
WAIT_SECONDS = 120.0  # for the next piece of a reply
FAILED = "(The model gave no answer.)"
BUSY = "(Many people are in the arena just now. Send your message again in a moment.)"

log = logging.getLogger("keel.web")
Side = Literal["left", "right"]
SIDES: tuple[Side, Side] = ("left", "right")


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
        self._streams = threading.BoundedSemaphore(MOST_STREAMS)

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

    def say(self, person: Account, id: int, message: str) -> Iterator[tuple[Side, str]]:
        """Send a message to both: (side, next piece of its reply), then (side, "") when that side is done. The
        conversation and its models are looked at before the first piece is asked for, so a UserError comes at once."""
        message = message.strip()
        if not 0 < len(message) <= LONGEST_MESSAGE:
            raise UserError(f"a message has 1 to {LONGEST_MESSAGE} characters")
        with self._store.transaction(writes=True) as connection:
            found = arena.conversation(connection, id, person.annotator_id)
            if len(found.turns) > MOST_TURNS:
                raise UserError(f"after {MOST_TURNS} turns a conversation ends; vote, please")
            models = [self._models.get(name) for name in (found.model_left, found.model_right)]
            if None in models:
                raise UserError("a model of this conversation is not served any more; start a new one")
            found = arena.say(connection, id, person.annotator_id, message, self._store.now)
        return self._stream(found, [model for model in models if model is not None])

    def _stream(self, found: Conversation, models: Sequence[ArenaModel]) -> Iterator[tuple[Side, str]]:
        # here and not before: a stream that is never begun would never give its place back
        if not self._streams.acquire(blocking=False):
            for side in SIDES:
                yield side, BUSY
                yield side, ""
            return
        pieces: queue.Queue[tuple[Side, str]] = queue.Queue()
        stop = threading.Event()
        try:
            for side, model in zip(SIDES, models, strict=True):
                work = _Side(side, model, messages(found.turns, side), pieces, stop, self._keeper(found, side))
                threading.Thread(target=work.run, daemon=True).start()
            waiting = set(SIDES)
            while waiting:
                try:
                    side, piece = pieces.get(timeout=WAIT_SECONDS)
                except queue.Empty:
                    return
                if not piece:
                    waiting.discard(side)
                yield side, piece
        finally:  # also when the browser has gone
            stop.set()
            self._streams.release()

    def _keeper(self, found: Conversation, side: Side) -> Callable[[str], None]:
        def keep(text: str) -> None:
            with self._store.transaction(writes=True) as connection:
                arena.answer(connection, found.id, found.turns[-1].number, side, text)

        return keep

    def vote(self, person: Account, id: int, choice: Choice, token: str, reason: str | None) -> Shown:
        """Count the vote; the names come back."""
        with self._store.transaction(writes=True) as connection:
            guideline = people.current_guideline(connection)
            found = arena.vote(
                connection,
                id,
                person.annotator_id,
                choice,
                token=token,
                reason=reason or None,
                guideline=guideline.version if guideline else None,
                now=self._store.now,
            )
        return Shown(found.id, found.turns, True, (found.model_left, found.model_right))


def _shown(found: Conversation) -> Shown:
    return Shown(found.id, found.turns, found.ended, None)


def messages(turns: Sequence[Turn], side: Side) -> list[Message]:
    """One side's conversation so far, its last message the person's."""
    said: list[Message] = []
    for turn in turns:
        said.append(Message("user", turn.message))
        reply = turn.left if side == "left" else turn.right
        if reply is not None:
            said.append(Message("assistant", reply))
    return said


@dataclass(frozen=True, slots=True)
class _Side:
    """One model's reply, in a thread of its own: a slow model must not hold up the other one."""

    side: Side
    model: ArenaModel
    said: list[Message]
    pieces: queue.Queue[tuple[Side, str]]
    stop: threading.Event
    keep: Callable[[str], None]

    def run(self) -> None:
        text = ""
        try:
            for piece in self.model.reply(self.said):
                if self.stop.is_set() or len(text) > LONGEST_REPLY:
                    break
                if piece:
                    text += piece
                    self.pieces.put((self.side, piece))
        except Exception:  # whatever goes wrong with a model, the names and addresses in its message stay here
            log.exception("a model of the arena failed: %s", self.model.name)
            if not text:
                text = FAILED
                self.pieces.put((self.side, text))
        finally:
            if not self.stop.is_set():
                self.keep(text or FAILED)
            self.pieces.put((self.side, ""))
