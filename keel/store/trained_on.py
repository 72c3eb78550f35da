"""What training takes of a store, as hashes: whether a stage must be trained again is told without reading the texts.

The texts of prompts and responses never change (erased ones are out), so their numbers stand for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, Table, or_, select

from keel.store.engine import exists
from keel.store.people_tables import adjudications, rankings, writings
from keel.store.store import Store
from keel.store.tables import annotators, assignments, items, judgements


@dataclass(frozen=True, slots=True)
class VoteHashes:
    """``people``: of all judgements that stand and are trained on (none on gold items and on what is out), but those of
    simulated annotators. ``withdrawn``: of the simulated ones that no longer are as they came, since somebody made
    their items gold items, took them out or settled them. ``written``: of all replies that people wrote or edited, on
    what is in use. Empty where there are none."""

    people: str = ""
    withdrawn: str = ""
    written: str = ""


def vote_hashes(location: str | Path) -> VoteHashes:
    """The hashes of the store at ``location``, which is not made when it is not there."""
    if not exists(location):
        return VoteHashes()
    with Store(location) as store, store.transaction(writes=False) as connection:
        return VoteHashes(_hash(_people(connection)), _hash(_withdrawn(connection)), _hash(_written(connection)))


@dataclass(frozen=True, slots=True)
class PeopleVotes:
    """Judgements that stand and that training would take, by anybody but simulated annotators; ``new``: since then."""

    all: int
    new: int


def people_votes(connection: Connection, since: datetime | None) -> PeopleVotes:
    """How many there are, and how many came after ``since`` (None: all of them did)."""
    count, new = 0, 0
    for table in (judgements, rankings, writings):
        query = (
            _standing(table).with_only_columns(table.c.created).where(items.c.gold.is_(None), items.c.out.is_(False))
        )
        query = query.where(annotators.c.kind != "simulated")
        if table is writings:
            query = query.where(writings.c.original_id.is_not(None))
        times = list(connection.execute(query).scalars())
        count += len(times)
        new += sum(since is None or time > since for time in times)
    return PeopleVotes(count, new)


def _people(connection: Connection) -> Iterable[tuple[Any, ...]]:
    values = {
        judgements: (judgements.c.token, judgements.c.choice, judgements.c.strength, assignments.c.shown),
        rankings: (rankings.c.token, rankings.c.tiers),
        writings: (writings.c.token, writings.c.original_id, writings.c.text),
    }
    for table, columns in values.items():
        query = _standing(table).with_only_columns(*columns, annotators.c.name)
        query = query.where(items.c.gold.is_(None), items.c.out.is_(False), annotators.c.kind != "simulated")
        if table is writings:  # a demonstration is no preference
            query = query.where(writings.c.original_id.is_not(None))
        for row in connection.execute(query):
            yield (table.name, *row)
    yield from _settled(connection, annotators.c.kind != "simulated")


def _withdrawn(connection: Connection) -> Iterable[tuple[Any, ...]]:
    simulated = annotators.c.kind == "simulated"
    query = _standing(judgements).where(or_(items.c.gold.is_not(None), items.c.out), simulated)
    yield from map(tuple, connection.execute(query))
    yield from _settled(connection, simulated)


def _written(connection: Connection) -> Iterable[tuple[Any, ...]]:
    query = _standing(writings).with_only_columns(writings.c.token, writings.c.text).where(items.c.out.is_(False))
    yield from map(tuple, connection.execute(query))


def _settled(connection: Connection, whose: ColumnElement[bool]) -> Iterable[tuple[Any, ...]]:
    """Reviewers' last words on the items that annotators of a kind judged: training takes them in the votes' place."""
    judged = _standing(judgements).with_only_columns(assignments.c.item_id).where(whose).order_by(None)
    query = (
        select(adjudications.c.item_id, adjudications.c.choice)
        .join(items, items.c.id == adjudications.c.item_id)
        .where(adjudications.c.undone_at.is_(None), items.c.gold.is_(None), items.c.out.is_(False))
        .where(adjudications.c.item_id.in_(judged))
        .order_by(adjudications.c.item_id)
    )
    yield from (("settled", *row) for row in connection.execute(query))


def _standing(table: Table) -> Select[Any]:
    return (
        select(table.c.token)
        .select_from(table.join(assignments, assignments.c.id == table.c.assignment_id))
        .join(items, items.c.id == assignments.c.item_id)
        .join(annotators, annotators.c.id == assignments.c.annotator_id)
        .where(table.c.undone_at.is_(None))
        .order_by(table.c.id)
    )


def _hash(rows: Iterable[tuple[Any, ...]]) -> str:
    digest, some = hashlib.sha256(), False
    for row in rows:
        digest.update(f"{row!r}\n".encode())
        some = True
    return digest.hexdigest() if some else ""
