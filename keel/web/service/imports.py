"""Files that come in over HTTP while people label: one at a time, looked at whole before anything of it is kept, and
then kept in pieces, a transaction each, between which everybody else has their turn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic, sleep
from typing import TypeVar

from sqlalchemy import Connection

from keel.store import Store, ingest, people, unjudged
from keel.store.unjudged import Added
from keel.types import Prompt, Unjudged, UserError

PIECE = 100  # rows of the database, about, in one transaction
LONGEST_PAUSE = 0.5
MOST_PAIRS = 500_000  # of one file
MOST_OF_ONE = 1_000  # responses to one prompt, and pairs of them
T = TypeVar("T")


class Imports:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._under_way = threading.Lock()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """What was read is in memory: one file at a time."""
        if not self._under_way.acquire(blocking=False):
            raise UserError("another import is under way; send this file when that one is done")
        try:
            yield
        finally:
            self._under_way.release()

    def prompts(self, read: Callable[[], Sequence[Prompt]], actor: str) -> int:
        """Import prompts; how many there are. Those that are there already stay as they are."""
        with self._alone():
            prompts = read()
            with self._store.transaction(writes=False) as connection:
                ingest.check_prompts(connection, prompts)
            self._in_pieces(
                [(1, one) for one in prompts],
                lambda connection, some: ingest.add_prompts(connection, some, self._store.now),
            )
            with self._store.transaction(writes=True) as connection:
                people.log(connection, self._store.now, actor, "imported", "prompts", len(prompts), None, None)
        return len(prompts)

    def responses(self, read: Callable[[], Sequence[Unjudged]], pairs: int | None, overlap: int, actor: str) -> Added:
        """Import responses and queue pairs of them (None: all), each for ``overlap`` people."""
        with self._alone():
            groups = read()
            weighed = [(len(group.responses) + _queued(group, pairs), group) for group in groups]
            if (total := sum(_queued(group, pairs) for group in groups)) > MOST_PAIRS:
                raise UserError(
                    f"that are {total:,} pairs; say how many of each prompt, or split the file: {MOST_PAIRS:,}"
                )
            with self._store.transaction(writes=False) as connection:
                ingest.check_prompts(connection, [group.prompt for group in groups])
            added: list[Added] = []

            def keep(connection: Connection, some: Sequence[Unjudged]) -> None:
                now = self._store.now
                added.append(unjudged.add_unjudged(connection, some, pairs, overlap, unjudged.BATCH, actor, now))

            self._in_pieces(weighed, keep)
        return unjudged.total(added)

    def _in_pieces(self, rows: Sequence[tuple[int, T]], keep: Callable[[Connection, Sequence[T]], None]) -> None:
        for some in _pieces(rows):
            began = monotonic()
            with self._store.transaction(writes=True) as connection:
                keep(connection, some)
            # SQLite has one writer, and locks are given to whoever asks first: as long as this one took, others may
            sleep(min(monotonic() - began, LONGEST_PAUSE))


def _queued(group: Unjudged, pairs: int | None) -> int:
    """How many pairs of the group are queued. UserError where it is too many for one prompt."""
    count = len(group.responses)
    queued = min(count * (count - 1) // 2, pairs or MOST_PAIRS)
    if count > MOST_OF_ONE or queued > MOST_OF_ONE:
        raise UserError(
            f"{group.place}: {count} responses to one prompt, {queued:,} pairs of them; here the most is "
            f"{MOST_OF_ONE:,} of either: say how many pairs, or use keel import"
        )
    return queued


def _pieces(rows: Sequence[tuple[int, T]]) -> Iterator[list[T]]:
    """Rows with their weights, cut where they weigh ``PIECE``."""
    some: list[T] = []
    weight = 0
    for weighs, row in rows:
        some.append(row)
        weight += weighs
        if weight >= PIECE:
            yield some
            some, weight = [], 0
    if some:
        yield some
