"""The figures of the Quality page, kept. They are worked out beside the server, and a page waits for them no longer
than somebody would: it shows what is there, and of when that is."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from keel.store import Store, overview
from keel.store.records import AnnotatorKind
from keel.store.vote_columns import VoteReader
from keel.web.service.quality import Quality, quality, with_reliability
from keel.web.service.reliability import UNKNOWN, reliability

Whose = Literal["people", "models", "all"]
# Whose figures the Quality page shows. Those of whom an import does not tell what they are, are in "all" alone.
WHOSE: Mapping[Whose, tuple[AnnotatorKind, ...]] = {
    "people": overview.PEOPLE,
    "models": ("model",),
    "all": ("person", "model", "simulated", "unknown"),
}

STALE = 0.02  # of the votes: as many things may happen before the reliabilities are worked out again
AT_ONCE = 20_000  # votes whose reliabilities take no time to speak of; of more they come after the other figures
CHEAP_SECONDS = 0.5  # figures that took no longer are worked out again whenever anything has happened
OLD_SECONDS = 60.0  # others when they are as old as this
WAIT_SECONDS = 2.0  # how long a page waits for them
log = logging.getLogger("keel.web")


@dataclass(frozen=True, slots=True)
class Kept:
    """``last``: the last event that the figures know of; ``reliable_last``: that the reliabilities know of; ``at``,
    ``reliable_at``: of when they are; ``seconds``: how long the figures took; ``behind``: something has happened since,
    and they are being worked out again, or will be when they are a minute old."""

    quality: Quality
    last: int
    at: datetime
    reliable_last: int
    reliable_at: datetime
    seconds: float
    behind: bool = False


class QualityKeeper:
    def __init__(self, store: Store) -> None:
        self._store, self._reader = store, VoteReader()
        self._kept: dict[Whose, Kept] = {}
        self._changed = threading.Condition()
        self._working: set[Whose] = set()
        self._one_at_a_time = threading.Lock()

    def found(self, who: Whose, wait: float = WAIT_SECONDS) -> Kept | None:
        """The figures, not older than a minute if that takes no longer than to wait for; None when there are none
        yet: ask again."""
        with self._store.transaction(writes=False) as connection:
            last = overview.last_event(connection)
        with self._changed:
            kept = self._kept.get(who)
            if kept is not None and kept.last >= last:
                return kept
            dear = kept is not None and kept.seconds > CHEAP_SECONDS
            if kept is not None and dear and (datetime.now(UTC) - kept.at).total_seconds() < OLD_SECONDS:
                return replace(kept, behind=True)
            self._start(who)
            until = time.monotonic() + wait
            while who in self._working and not self._knows(who, last) and time.monotonic() < until:
                self._changed.wait(until - time.monotonic())
            kept = self._kept.get(who)
            return None if kept is None else replace(kept, behind=kept.last < last)

    def _knows(self, who: Whose, last: int) -> bool:
        return who in self._kept and self._kept[who].last >= last

    def _start(self, who: Whose) -> None:
        if who not in self._working:
            self._working.add(who)
            threading.Thread(target=self._work, args=(who,), daemon=True, name="quality").start()

    def _work(self, who: Whose) -> None:
        try:
            with self._one_at_a_time:
                self._work_out(who)
        except Exception:  # the store may be away: what is kept stays, and the next page asks again
            log.exception("the figures of quality could not be worked out")
        finally:
            with self._changed:
                self._working.discard(who)
                self._changed.notify_all()

    def _work_out(self, who: Whose) -> None:
        start, now, kept = time.monotonic(), datetime.now(UTC), self._kept.get(who)
        with self._store.moment() as connection:
            last = overview.last_event(connection)
            votes = self._reader.read(connection).of_kinds(WHOSE[who])
            skips = overview.skips(connection)
        if kept is not None and last - kept.reliable_last <= STALE * kept.quality.reliability.votes:
            found = quality(votes, skips, kept.quality.reliability)
            self._keep(who, Kept(found, last, now, kept.reliable_last, kept.reliable_at, time.monotonic() - start))
            return
        known = UNKNOWN if kept is None else kept.quality.reliability
        if len(votes) <= AT_ONCE:
            known = reliability(votes)
        found = quality(votes, skips, known)
        seconds = time.monotonic() - start
        if len(votes) > AT_ONCE:
            before = (last, now) if kept is None else (kept.reliable_last, kept.reliable_at)
            self._keep(who, Kept(found, last, now, *before, seconds))
            found = with_reliability(found, reliability(votes))
        self._keep(who, Kept(found, last, now, last, now, seconds))

    def _keep(self, who: Whose, found: Kept) -> None:
        with self._changed:
            self._kept[who] = found
            self._changed.notify_all()
