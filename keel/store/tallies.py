"""What stands, counted: how much each annotator did on each day, and how people voted on each comparison. The counts
change in the transaction that changes what they count, so that no page has to read a million votes to say how many
there are. Each function runs inside its caller's transaction.

An annotator has rows of their own, and so nobody who votes waits for anybody else who does. Rows change in one order,
``tallies`` before ``item_votes``: on PostgreSQL two transactions never wait for each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table, bindparam, func, select, text
from sqlalchemy.dialects import postgresql, sqlite

from keel.store.people_tables import item_votes, rankings, step_labels, tallies, thumbs, writings
from keel.store.records import WorkKind
from keel.store.sides import Choice, in_store
from keel.store.standing import standing
from keel.store.tables import annotators, assignments, items, judgements

TABLES = (judgements, rankings, thumbs, step_labels, writings)
_TABLE_OF: Mapping[str, Table] = dict(
    zip(("compare", "rank", "thumb", "step", "write", "edit"), (*TABLES, writings), strict=True)
)
_BULK_LOCK = 0x74616C6C  # PostgreSQL advisory lock: "tall" in ASCII
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class Counted:
    """One piece of work. ``plain``: on what is in use and no gold item; ``vote``: what a person said of a comparison
    (first, second, tie, both_bad), None for all else."""

    annotator_id: int
    batch: str
    kind: WorkKind
    day: str
    plain: bool
    item_id: int
    vote: str | None

    @property
    def place(self) -> tuple[int, str, str, str, bool]:
        return self.annotator_id, self.day, self.kind, self.batch, self.plain


def change_one(connection: Connection, assignment: Any, choice: Choice | None, created: datetime, by: int) -> None:
    """One piece of work now stands (``by`` is 1), or no longer does (-1). ``assignment``: with its annotator's kind
    (``by``). Its item stays as it is until the end of the transaction: whoever makes it a gold item, or takes it out,
    comes before or after."""
    item = connection.execute(_ITEM, {"item": assignment.item_id}).one()
    _change(connection, [_counted(assignment, item, choice, created)], by)


def _counted(assignment: Any, item: Any, choice: Choice | None, created: datetime) -> Counted:
    vote = None
    if item.kind == "compare" and assignment.by == "person":
        vote = "both_bad" if choice == "both_bad" else in_store(choice or "tie", assignment.shown)
    plain = item.gold is None and not item.out
    day = day_of(created)
    return Counted(assignment.annotator_id, item.batch, item.kind, day, plain, assignment.item_id, vote)


def day_of(at: datetime) -> str:
    return at.astimezone(UTC).date().isoformat()


def change_assignments(connection: Connection, ids: Sequence[int], by: int) -> None:
    """As ``change_one``, of all that stands on these assignments."""
    found = [one for part in _parts(ids) for one in _of(connection, assignments.c.id.in_(part), TABLES)]
    _change(connection, found, by)


def _change(connection: Connection, work: Iterable[Counted], by: int) -> None:
    done: Counter[tuple[int, str, str, str, bool]] = Counter()
    said: dict[int, Counter[str]] = {}
    for one in work:
        done[one.place] += by
        if one.vote is not None:
            said.setdefault(one.item_id, Counter())[one.vote] += by
    _write(connection, done)
    votes = [{"item_id": id} | {column.name: said[id][column.name] for column in _VOTES} for id in sorted(said)]
    if votes:
        connection.execute(_upsert(connection.dialect.name, item_votes), votes)


def now_plain(connection: Connection, item_ids: Sequence[int], kinds: Iterable[str], plain: bool) -> None:
    """These items became plain ones (in use, no gold item), or no longer are. Call it when they have changed."""
    done: Counter[tuple[int, str, str, str, bool]] = Counter()
    tables = {_TABLE_OF[kind] for kind in kinds}
    for part in _parts(item_ids):
        for one in _of(connection, items.c.id.in_(part), tables):
            done[*one.place[:4], plain] += 1
            done[*one.place[:4], not plain] -= 1
    _write(connection, done)


def _write(connection: Connection, done: Counter[tuple[int, str, str, str, bool]]) -> None:
    if len({place[0] for place in done}) > 1 and connection.dialect.name == "postgresql":
        connection.execute(_LOCK)  # two that count several people's work would wait for each other's rows
    names = ("annotator_id", "day", "kind", "batch", "plain")
    rows = [{**dict(zip(names, place, strict=True)), "done": done[place]} for place in sorted(done) if done[place]]
    if rows:
        connection.execute(_upsert(connection.dialect.name, tallies), rows)


_VOTES = (item_votes.c.first, item_votes.c.second, item_votes.c.tie, item_votes.c.both_bad)
_ITEM = (
    select(items.c.batch, items.c.kind, items.c.gold, items.c.out)
    .where(items.c.id == bindparam("item"))
    .with_for_update(read=True)
)
_LOCK = text(f"SELECT pg_advisory_xact_lock({_BULK_LOCK})")


@cache
def _upsert(dialect: str, table: Table) -> postgresql.Insert | sqlite.Insert:
    """Adds to what is counted already."""
    new = postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)
    counts = _VOTES if table is item_votes else (tallies.c.done,)
    return new.on_conflict_do_update(
        index_elements=list(table.primary_key), set_={one.name: one + new.excluded[one.name] for one in counts}
    )


def _of(connection: Connection, which: ColumnElement[bool], tables: Iterable[Table]) -> list[Counted]:
    """What stands on some assignments or items."""
    found = []
    for table in tables:
        choice = [judgements.c.choice] if table is judgements else []
        query = standing(table, table.c.created, assignments.c.annotator_id, assignments.c.item_id, *choice)
        query = query.add_columns(assignments.c.shown, items.c.batch, items.c.kind, items.c.gold, items.c.out)
        query = query.add_columns(annotators.c.kind.label("by")).where(which)
        rows = connection.execute(query).all()
        found += [_counted(row, row, row.choice if choice else None, row.created) for row in rows]
    return found


def _parts(ids: Sequence[int]) -> Iterable[Sequence[int]]:
    return (ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK))


# ------------------------------------------------------------------------------------------------------------- looking


@dataclass(frozen=True, slots=True)
class DayDone:
    """What people did on one day (UTC), and how many of them."""

    day: date
    done: int
    annotators: int


_PERSONS = annotators.c.kind == "person"


def done_by_people(connection: Connection, plain: bool | None = None) -> dict[str, int]:
    """How much stands of each kind of work. ``plain``: on what is in use and no gold item alone."""
    query = select(tallies.c.kind, func.sum(tallies.c.done)).join(annotators).where(_PERSONS).group_by(tallies.c.kind)
    query = query if plain is None else query.where(tallies.c.plain.is_(plain))
    return {row[0]: int(row[1]) for row in connection.execute(query) if row[1]}


def people_at_work(connection: Connection) -> int:
    """How many people have done anything that stands."""
    query = select(func.count(tallies.c.annotator_id.distinct())).join(annotators)
    return int(connection.execute(query.where(_PERSONS, tallies.c.done > 0)).scalar_one())


def last_days(connection: Connection, most: int) -> list[DayDone]:
    """The last days on which people did anything that stands, oldest first."""
    query = (
        select(tallies.c.day, func.sum(tallies.c.done), func.count(tallies.c.annotator_id.distinct()))
        .join(annotators)
        .where(_PERSONS, tallies.c.done > 0)
        .group_by(tallies.c.day)
        .order_by(tallies.c.day.desc())
        .limit(most)
    )
    rows = connection.execute(query).all()
    return [DayDone(date.fromisoformat(day), int(done), people) for day, done, people in reversed(rows)]


def done_on(connection: Connection, annotator_id: int, kind: WorkKind, day: str) -> int:
    """How much one annotator did on a day that stands."""
    mine = tallies.c.annotator_id == annotator_id, tallies.c.day == day, tallies.c.kind == kind
    return int(connection.execute(select(func.coalesce(func.sum(tallies.c.done), 0)).where(*mine)).scalar_one())


def all_done(connection: Connection, kind: WorkKind) -> int:
    """How much stands of a kind of work, by anybody, program or person."""
    query = select(func.coalesce(func.sum(tallies.c.done), 0)).where(tallies.c.kind == kind)
    return int(connection.execute(query).scalar_one())
