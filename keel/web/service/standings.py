"""The arena's standings as reviewers see them, and what they decide: which votes count, and by which names votes are
voided."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keel.feedback.standings import Standings, standings
from keel.store import Store, arena, ballots
from keel.store.arena_facts import Facts, parse_names
from keel.store.ballots import Ballot
from keel.store.people import Account

PAGE = 20


@dataclass(frozen=True, slots=True)
class Look:
    """A vote with its conversation as a reviewer sees it: ``turns``: (message, left, right)."""

    ballot: Ballot
    reason: str | None
    turns: Sequence[tuple[str, str | None, str | None]]


class ArenaStandings:
    """Votes are read once: a conversation does not change after its vote. All is worked out anew when a vote came, a
    reviewer decided or the names changed."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._working = threading.Lock()  # two who ask at once wait for one answer
        self._facts: dict[int, Facts] = {}
        self._names: list[str] = []
        self._last: list[Ballot] = []
        self._found = standings([])

    def found(self) -> Standings:
        with self._working:
            self._read()
            return self._found

    def as_names(self) -> tuple[list[str], list[str]]:
        """(an admin's list of names or Keel's, all that are looked for)."""
        with self._store.transaction(writes=False) as connection:
            return ballots.names(connection), ballots.looked_for(connection)

    def votes(self, voided: bool, number: int) -> tuple[int, list[Look]]:
        """(how many, one page of them), the newest first: all votes, or those that don't count or that a reviewer
        decided on."""
        with self._working:
            self._read()
            chosen = [one for one in reversed(self._last) if not voided or not one.counts or one.counted is not None]
        some = chosen[number * PAGE : (number + 1) * PAGE]
        with self._store.transaction(writes=False) as connection:
            texts = arena.texts(connection, [one.id for one in some])
        return len(chosen), [Look(one, *texts[one.id]) for one in some]

    def decide(self, vote: int, counted: bool | None, person: Account) -> None:
        with self._store.transaction(writes=True) as connection:
            ballots.decide(connection, vote, counted, person.name, self._store.now)

    def set_names(self, text: str, person: Account) -> None:
        """A name a line; nothing brings Keel's own list back. UserError for what is no name."""
        chosen: Any = parse_names(text) or list(ballots.NAMES)
        with self._store.transaction(writes=True) as connection:
            ballots.set_names(connection, chosen, person.name, self._store.now)

    def _read(self) -> None:
        with self._store.transaction(writes=False) as connection:
            names = ballots.looked_for(connection)
            if names != self._names:
                self._facts, self._names = {}, names
            given = ballots.ballots(connection, self._facts)
        self._facts = {one.id: one.facts for one in given}
        if given != self._last:
            self._last, self._found = given, standings(given)
