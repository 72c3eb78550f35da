"""Every comparison that stands, as arrays: what figures over a million votes are worked out of, in tens of megabytes.

What was read once is kept, and the next time what came since is read alone. A vote itself never changes; what is known
of its item and its responses may, and is read each time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import date
from typing import Any

import numpy as np
from sqlalchemy import Connection, Float, Integer, Select, case, cast, func, select

from keel.store import tallies
from keel.store.overview import Vote
from keel.store.people_tables import adjudications
from keel.store.records import AnnotatorKind
from keel.store.tables import annotators, assignments, events, items, judgements, responses

FIRST, SECOND, TIE, NONE = 0, 1, 2, -1  # what a vote, a known answer or a last word says
WORDS = ("first", "second", "tie")
EPOCH = date(1970, 1, 1).toordinal()
_READ = 20_000  # rows


@dataclass(frozen=True, slots=True)
class VoteColumns:
    """V votes, oldest first. ``annotator_V``: places in ``names``, which are in order; ``vote_V``, ``gold_V``,
    ``settled_V``: FIRST (the response that was stored first), SECOND, TIE, or NONE; ``left_V``: 1 where the left
    response is preferred, 0 the right one, NONE for a tie; ``longer_V``: the same of the longer one; ``day_V``: days
    since 1970, UTC; ``seconds_V``, ``strength_V``: NaN where not known; ``first_V``, ``second_V``: responses."""

    names: list[str]
    kinds: list[str]
    item_V: np.ndarray
    annotator_V: np.ndarray
    vote_V: np.ndarray
    left_V: np.ndarray
    longer_V: np.ndarray
    gold_V: np.ndarray
    settled_V: np.ndarray
    seconds_V: np.ndarray
    strength_V: np.ndarray
    day_V: np.ndarray
    first_V: np.ndarray
    second_V: np.ndarray

    def __len__(self) -> int:
        return len(self.item_V)

    @classmethod
    def of(cls, votes: Sequence[Vote]) -> VoteColumns:
        """The same of votes that are at hand one by one."""
        kinds = {vote.annotator: vote.kind for vote in votes}
        names = sorted(kinds)
        place = {name: n for n, name in enumerate(names)}

        def column(values: Iterable[Any], kind: Any) -> np.ndarray:
            return np.array(list(values), dtype=kind)

        def known(values: Iterable[str | None]) -> np.ndarray:
            return column((NONE if value is None else WORDS.index(value) for value in values), np.int8)

        def sides(values: Iterable[bool | None]) -> np.ndarray:
            return column((NONE if value is None else value for value in values), np.int8)

        return cls(
            names,
            [kinds[name] for name in names],
            column((vote.item_id for vote in votes), np.int64),
            column((place[vote.annotator] for vote in votes), np.int64),
            known(vote.vote for vote in votes),
            sides(vote.left for vote in votes),
            sides(vote.longer for vote in votes),
            known(vote.gold for vote in votes),
            known(vote.settled for vote in votes),
            column((np.nan if vote.seconds is None else vote.seconds for vote in votes), np.float64),
            column((np.nan if vote.strength is None else vote.strength for vote in votes), np.float64),
            column((vote.created.date().toordinal() - EPOCH for vote in votes), np.int32),
            column((vote.responses[0] for vote in votes), np.int64),
            column((vote.responses[1] for vote in votes), np.int64),
        )

    def where(self, mask_V: np.ndarray) -> VoteColumns:
        """Some of the votes, with all names."""
        arrays = {one.name: getattr(self, one.name) for one in fields(self) if one.name.endswith("_V")}
        return replace(self, **{name: array[mask_V] for name, array in arrays.items()})

    def of_kinds(self, kinds: Collection[AnnotatorKind]) -> VoteColumns:
        """The votes of annotators of these kinds, who alone are named."""
        chosen = [n for n, kind in enumerate(self.kinds) if kind in kinds]
        place = np.full(len(self.names) + 1, NONE, dtype=np.int64)
        place[chosen] = np.arange(len(chosen))
        found = self.where(place[self.annotator_V] != NONE)
        return replace(
            found,
            names=[self.names[n] for n in chosen],
            kinds=[self.kinds[n] for n in chosen],
            annotator_V=place[found.annotator_V],
        )


# what is read of a vote once: (name, type)
_VOTE = {
    "id": np.int64, "item": np.int64, "annotator": np.int64, "choice": np.int8, "left": np.int64, "right": np.int64,
    "seconds": np.float64, "strength": np.float64, "day": np.int32,
}  # fmt: skip
_LENGTH = {"id": np.int64, "length": np.int64}


class VoteReader:
    """Keeps what it has read. One thread at a time."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._votes = {name: np.empty(0, kind) for name, kind in _VOTE.items()}
        self._lengths = {name: np.empty(0, kind) for name, kind in _LENGTH.items()}
        self._event = 0

    def read(self, connection: Connection) -> VoteColumns:
        """All votes that stand, on a connection that ``Store.moment`` gives."""
        last = connection.execute(select(func.coalesce(func.max(events.c.id), 0))).scalar_one()
        erased = select(events.c.id).where(events.c.id > self._event, events.c.action == "erased").limit(1)
        if self._event and connection.execute(erased).first() is not None:  # texts have become shorter
            self._forget()
        self._go_on(connection)
        # a transaction that was begun before others may end after them: its votes have lower numbers
        if len(self._votes["id"]) != tallies.all_done(connection, "compare"):
            self._forget()
            self._go_on(connection)
        self._event = last
        return self._columns(connection)

    def _go_on(self, connection: Connection) -> None:
        votes, lengths = self._votes, self._lengths
        back = select(judgements.c.id).where(judgements.c.undone_at.is_not(None))
        undone = np.array(connection.execute(back).scalars().all(), dtype=np.int64)
        stays = ~np.isin(votes["id"], undone)
        if not stays.all():
            votes = {name: array[stays] for name, array in votes.items()}
        newest = int(self._votes["id"].max(initial=0))
        self._votes = _longer(votes, _read(connection, _votes_after(connection, newest), _VOTE))
        query = select(responses.c.id, func.length(responses.c.text)).order_by(responses.c.id)
        query = query.where(responses.c.id > int(lengths["id"].max(initial=0)))
        self._lengths = _longer(lengths, _read(connection, query, _LENGTH))

    def _columns(self, connection: Connection) -> VoteColumns:
        votes, lengths = self._votes, self._lengths
        query = select(annotators.c.name, annotators.c.kind, annotators.c.id)
        who = sorted((row.name, row.kind, row.id) for row in connection.execute(query))
        place = np.zeros(max((id for _, _, id in who), default=0) + 1, dtype=np.int64)
        place[[id for _, _, id in who]] = np.arange(len(who))
        left, right, choice = votes["left"], votes["right"], votes["choice"]
        tie = choice == 2
        left_V = np.where(tie, NONE, choice == 0).astype(np.int8)
        left_first = left < right
        better, other = (np.where(choice == 0, *pair) for pair in ((left, right), (right, left)))
        lead = _at(lengths, better) - _at(lengths, other)
        word = select(adjudications.c.item_id, adjudications.c.choice).where(adjudications.c.undone_at.is_(None))
        gold = select(items.c.id, items.c.gold).where(items.c.gold.in_(WORDS), items.c.kind == "compare")
        return VoteColumns(
            [name for name, _, _ in who],
            [kind for _, kind, _ in who],
            votes["item"],
            place[votes["annotator"]],
            np.where(tie, TIE, np.where(left_first == (choice == 0), FIRST, SECOND)).astype(np.int8),
            left_V,
            np.where(tie | (lead == 0), NONE, lead > 0).astype(np.int8),
            _of_items(connection, gold, votes["item"]),
            _of_items(connection, word, votes["item"]),
            votes["seconds"],
            votes["strength"],
            votes["day"],
            np.minimum(left, right),
            np.maximum(left, right),
        )


def _votes_after(connection: Connection, newest: int) -> Select[Any]:
    if connection.dialect.name == "sqlite":
        day = cast(func.strftime("%s", judgements.c.created), Integer) / 86400
    else:
        day = func.floor(func.extract("epoch", judgements.c.created) / 86400)
    choice = case((judgements.c.choice == "left", 0), (judgements.c.choice == "right", 1), else_=2)
    shown = assignments.c.shown
    query = select(judgements.c.id, assignments.c.item_id, assignments.c.annotator_id, choice)
    query = query.add_columns(shown[0].as_integer(), shown[1].as_integer())
    query = query.add_columns(judgements.c.seconds, judgements.c.strength, cast(day, Float))
    query = query.select_from(judgements.join(assignments, assignments.c.id == judgements.c.assignment_id))
    return query.where(judgements.c.undone_at.is_(None), judgements.c.id > newest).order_by(judgements.c.id)


def _read(connection: Connection, query: Select[Any], kinds: dict[str, Any]) -> dict[str, np.ndarray]:
    parts: list[list[np.ndarray]] = [[np.empty(0, kind)] for kind in kinds.values()]
    for rows in connection.execute(query, execution_options={"yield_per": _READ}).partitions():
        for part, values, kind in zip(parts, zip(*rows, strict=True), kinds.values(), strict=True):
            part.append(np.array(values, dtype=np.float64).astype(kind))  # None becomes NaN
    return {name: np.concatenate(part) for name, part in zip(kinds, parts, strict=True)}


def _longer(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([old[name], new[name]]) for name in old} if len(new["id"]) else old


def _at(lengths: dict[str, np.ndarray], response_V: np.ndarray) -> np.ndarray:
    return lengths["length"][np.searchsorted(lengths["id"], response_V)] if len(response_V) else response_V


def _of_items(connection: Connection, query: Select[Any], item_V: np.ndarray) -> np.ndarray:
    """What the query (item, word) says of each vote's item, or NONE."""
    said = np.full(len(item_V), NONE, dtype=np.int8)
    rows = sorted((id, WORDS.index(word)) for id, word in connection.execute(query))
    if rows and len(item_V):
        ids, words = np.array(rows).T
        at = np.minimum(np.searchsorted(ids, item_V), len(ids) - 1)
        known = ids[at] == item_V
        said[known] = words[at[known]]
    return said
