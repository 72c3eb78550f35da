"""The answers of two models as they come, and how many may come at once. A place is taken by what is being answered,
and free the moment that nobody waits for it any more, whatever its models do."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

from keel.store.arena import Conversation, Turn
from keel.store.sides import SIDES, Side
from keel.types import Message, UserError
from keel.web.service.sources import ArenaModel

LONGEST_REPLY = 40_000  # characters
MOST_STREAMS = 8  # people answered at once, in the whole app
WAIT_SECONDS = 120.0  # for the next piece of a reply
FAILED = "(The model gave no answer.)"

log = logging.getLogger("keel.web")
Keep = Callable[[Conversation, Side, str], bool]


class Busy(UserError):
    """All places in the arena are taken."""


class Places:
    """One place a person: somebody with many windows can't take them all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # weak: a stream that is dropped unread, on whatever way, is no stream any more
        self._of: WeakValueDictionary[int, Stream] = WeakValueDictionary()

    def take(self, person: int, conversation: int) -> Stream:
        """A place for this person's conversation; what still streams to them ends. Busy when there is none."""
        stream = Stream(conversation)
        with self._lock:
            earlier = self._of.get(person)
            others = [one for one in self._of.values() if one.running and one is not earlier]
            if len(others) >= MOST_STREAMS:
                raise Busy("many people are in the arena just now; send your message again in a moment")
            self._of[person] = stream
        if earlier is not None:
            earlier.close("a message of yours in another window came after this one; load the page again")
        return stream

    def answering(self, person: int, conversation: int) -> bool:
        """Whether this conversation is being answered."""
        stream = self._of.get(person)
        return stream is not None and stream.running and stream.conversation == conversation


class Stream:
    """(side, next piece of its reply), then (side, "") when that side is done. It ends without that for a side whose
    answer broke off or does not count any more; ``why`` says so in words when there is something to say."""

    def __init__(self, conversation: int) -> None:
        self.conversation = conversation
        self.why = ""
        self._feed = _Feed(queue.SimpleQueue(), threading.Event(), set(SIDES))

    @property
    def running(self) -> bool:
        return bool(self._feed.coming) and not self._feed.stop.is_set()

    def begin(self, found: Conversation, models: Sequence[ArenaModel], keep: Keep) -> None:
        """Let the models answer the last turn. What was answered already comes as it is."""
        turn = found.turns[-1]
        if turn.left is not None and turn.right is not None:
            self._feed.coming.clear()
            for side, text in zip(SIDES, (turn.left, turn.right), strict=True):
                self._feed.pieces.put((side, text))
                self._feed.pieces.put((side, ""))
            return
        for side, model in zip(SIDES, models, strict=True):
            work = _Work(side, model, found, self._feed, keep)
            threading.Thread(target=work.run, daemon=True).start()

    def __iter__(self) -> Iterator[tuple[Side, str]]:
        unread = set(SIDES)
        try:
            while unread:
                try:
                    piece = self._feed.pieces.get(timeout=WAIT_SECONDS)
                except queue.Empty:
                    return
                if piece is None or self._feed.stop.is_set():
                    return
                if not piece[1]:
                    unread.discard(piece[0])
                yield piece
        finally:
            self.close()

    def close(self, why: str = "") -> None:
        """Nobody waits for it any more: the place is free, the models stop at their next piece, the reader wakes up."""
        if not self._feed.stop.is_set():
            self.why = why
            self._feed.stop.set()
            self._feed.pieces.put(None)

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Feed:
    """Between the models' threads and the reader. ``coming``: the sides whose answer is still to be kept; None among
    the ``pieces``: there will be no more."""

    pieces: queue.SimpleQueue[tuple[Side, str] | None]
    stop: threading.Event
    coming: set[Side]


@dataclass(frozen=True, slots=True)
class _Work:
    """One model's reply, in a thread of its own: a slow model must not hold up the other one."""

    side: Side
    model: ArenaModel
    found: Conversation
    feed: _Feed
    keep: Keep

    def run(self) -> None:
        text = self._reply()
        if self.feed.stop.is_set():
            return
        if not text:
            text = FAILED
            self.feed.pieces.put((self.side, text))
        try:
            kept = self.keep(self.found, self.side, text)
        except Exception:  # what the page shows must be what is in the store: without it there is no answer
            log.exception("an answer of the arena could not be kept")
            kept = False
        self.feed.coming.discard(self.side)  # before the page hears of it, which may vote at once
        self.feed.pieces.put((self.side, "") if kept else None)

    def _reply(self) -> str:
        text = ""
        try:
            for piece in self.model.reply(messages(self.found.turns, self.side)):
                if self.feed.stop.is_set() or len(text) > LONGEST_REPLY:
                    break
                if piece:
                    text += piece
                    self.feed.pieces.put((self.side, piece))
        except Exception:  # whatever goes wrong with a model, the names and addresses in its message stay here
            log.exception("a model of the arena failed: %s", self.model.name)
        return text


def messages(turns: Sequence[Turn], side: Side) -> list[Message]:
    """One side's conversation so far, its last message the person's."""
    said: list[Message] = []
    for turn in turns:
        said.append(Message("user", turn.message))
        reply = turn.left if side == "left" else turn.right
        if reply is not None:
            said.append(Message("assistant", reply))
    return said
