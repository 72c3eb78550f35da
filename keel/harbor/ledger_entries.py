"""Entries of the harbor's ledgers: what comes in and goes out of a store, and how each is often misread.

An entry changes the count of the store by one sum. A trap is an entry with a second reading that convinces: writers
who fall for it all write the same wrong sum, so that a majority of replies agrees on a wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from keel.types import UserError

MOST = 99  # no count is above this, none below 0

# What an entry does to a count: the sign, and how many. None: not a whole number of things.
Change = tuple[str, int | None]


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry with its numbers. ``kind`` is a name in `KINDS`; ``n`` and ``k`` are 0 where the kind has none."""

    kind: str
    n: int = 0
    k: int = 0

    @staticmethod
    def of(row: list[object]) -> Entry:
        """An entry from a prompt's meta.

        Raises:
            UserError: no such entry.
        """
        if len(row) != 3 or row[0] not in KINDS:
            raise UserError(f"ledger entry {row!r} is not one of {', '.join(KINDS)}; export the ledger's prompts again")
        kind, n, k = row
        return Entry(str(kind), int(str(n)), int(str(k)))

    @property
    def text(self) -> str:
        """As the prompt has it."""
        return KINDS[self.kind].text.format(n=self.n, k=self.k)

    @property
    def clause(self) -> str:
        """As a reply repeats it, before its sum."""
        return KINDS[self.kind].clause.format(n=self.n, k=self.k)

    @property
    def trap(self) -> bool:
        return KINDS[self.kind].misread is not None

    @property
    def numbers(self) -> frozenset[int]:
        """The numbers that the entry names."""
        return frozenset(int(word) for word in self.text.replace(",", " ").replace(".", " ").split() if word.isdigit())

    def change(self, count: int) -> Change:
        """The right sum's sign and second number, from ``count``."""
        return KINDS[self.kind].read(count, self.n, self.k)

    def misread(self, count: int) -> Change:
        """Those of who falls for the trap; the right ones where there is no trap."""
        kind = KINDS[self.kind]
        return (kind.misread or kind.read)(count, self.n, self.k)


@dataclass(frozen=True, slots=True)
class _Kind:
    text: str
    clause: str
    read: Callable[[int, int, int], Change]
    misread: Callable[[int, int, int], Change] | None
    draw: Callable[[Random], tuple[int, int]]  # n and k


def _part(count: int, times: int, of: int) -> int | None:
    return times * count // of if count % of == 0 else None


def _amount(rng: Random) -> tuple[int, int]:
    return rng.randint(2, 30), 0


def _few(rng: Random) -> tuple[int, int]:
    return rng.randint(3, 20), 0


def _groups(rng: Random) -> tuple[int, int]:
    return rng.randint(3, 9), rng.randint(2, 6)


def _some_of_them(rng: Random) -> tuple[int, int]:
    n = rng.randint(6, 24)
    return n, rng.randint(2, n - 3)


def _none(rng: Random) -> tuple[int, int]:
    return 0, 0


PLAIN: Mapping[str, _Kind] = {
    "in": _Kind("{n} come in.", "{n} in", lambda s, n, k: ("+", n), None, _amount),
    "out": _Kind("{n} go out.", "{n} out", lambda s, n, k: ("-", n), None, _amount),
    "half": _Kind("Half go out.", "half out", lambda s, n, k: ("-", _part(s, 1, 2)), None, _none),
}
TRAPS: Mapping[str, _Kind] = {
    "each": _Kind(
        "{k} ships come in with {n} each.",
        "{k} ships, {n} each",
        lambda s, n, k: ("+", k * n),
        lambda s, n, k: ("+", n),
        _groups,
    ),
    "price": _Kind(
        "{n} go out at {k} coins each.",
        "{n} out at {k} each",
        lambda s, n, k: ("-", n),
        lambda s, n, k: ("-", n * k),
        _groups,
    ),
    "all_but": _Kind(
        "All but {n} go out.",
        "all but {n} out",
        lambda s, n, k: ("-", s - n if s > n else None),
        lambda s, n, k: ("-", n),
        _few,
    ),
    "all_but_third": _Kind(
        "All but a third go out.",
        "all but a third out",
        lambda s, n, k: ("-", _part(s, 2, 3)),
        lambda s, n, k: ("-", _part(s, 1, 3)),
        _none,
    ),
    "called_off": _Kind(
        "{n} are due in, but are called off.",
        "{n} due",
        lambda s, n, k: ("+", 0),
        lambda s, n, k: ("+", n),
        _few,
    ),
    "back": _Kind(
        "{n} go out and {k} of them come back.",
        "{n} out, {k} back",
        lambda s, n, k: ("-", n - k),
        lambda s, n, k: ("-", n),
        _some_of_them,
    ),
    "not_ours": _Kind(
        "{n} come in, but {k} of them are not for us.",
        "{n} in, {k} not for us",
        lambda s, n, k: ("+", n - k),
        lambda s, n, k: ("+", n),
        _some_of_them,
    ),
}
KINDS: Mapping[str, _Kind] = {**PLAIN, **TRAPS}


def draw_entry(kinds: Mapping[str, _Kind], counts: frozenset[int], rng: Random) -> tuple[Entry, frozenset[int]] | None:
    """An entry of one of ``kinds`` that leaves every one of ``counts`` whole and between 0 and `MOST`, whichever way it
    is read, and the counts after it; None where the draw does not fit. Both readings differ."""
    kind = rng.choice(list(kinds))
    n, k = kinds[kind].draw(rng)
    entry = Entry(kind, n, k)
    after = set()
    for count in counts:
        changes = {entry.change(count), entry.misread(count)}
        if entry.trap and len(changes) == 1:
            return None
        for sign, amount in changes:
            if amount is None:
                return None
            result = count + amount if sign == "+" else count - amount
            if not 0 < result <= MOST:
                return None
            after.add(result)
    return entry, frozenset(after)
