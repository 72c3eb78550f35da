"""What training takes of a store, as hashes: whether a stage must be trained again is told without reading the texts.

The texts of prompts and responses never change (erased ones are out), so their numbers stand for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, func, or_, select

from keel.recipe.declared import Voter
from keel.store.engine import exists
from keel.store.people_tables import adjudications, rankings, step_labels, tallies, thumbs, writings
from keel.store.records import OWN_QUEUE
from keel.store.standing import by, standing
from keel.store.store import Store
from keel.store.tables import annotators, assignments, items, judgements


@dataclass(frozen=True, slots=True)
class VoteHashes:
    """``people``, ``models``: of all their judgements that stand and are trained on (none on gold items and on what is
    out), but for those that a stage had a model give. ``withdrawn``, ``withdrawn_models``: of a stage's own, simulated
    or a model's, that no longer are as they came, since somebody made their items gold items, took them out or settled
    them. ``written``: of all replies that people wrote or edited, on what is in use. ``thumbs``: of people's thumbs on
    single replies; ``steps``: of their labels on the steps of replies. Empty where there are none."""

    people: str = ""
    withdrawn: str = ""
    written: str = ""
    models: str = ""
    thumbs: str = ""
    withdrawn_models: str = ""
    steps: str = ""

    def facts(self) -> dict[str, str]:
        """For a fingerprint. What is of models, ``thumbs`` and ``steps`` are left out where there are none: so were
        they before they were told apart, and runs without any stay done."""
        always = ("people", "withdrawn", "written")
        return {name: value for name, value in asdict(self).items() if value or name in always}


def vote_hashes(location: str | Path) -> VoteHashes:
    """The hashes of the store at ``location``, which is not made when it is not there."""
    if not exists(location):
        return VoteHashes()
    with Store(location) as store, store.transaction(writes=False) as connection:
        return VoteHashes(
            people=_hash(_judged(connection, "people")),
            withdrawn=_hash(_withdrawn(connection, by("simulated"))),
            written=_hash(_written(connection)),
            models=_hash(_judged(connection, "models")),
            withdrawn_models=_hash(_withdrawn(connection, and_(by("models"), _OWN))),
            thumbs=_hash(_thumbs(connection)),
            steps=_hash(_steps(connection)),
        )


_OWN = items.c.batch.startswith(OWN_QUEUE)


def _by(who: Voter, batch: ColumnElement[str] = items.c.batch) -> ColumnElement[bool]:
    """Whose it is, where a stage's own are no model's votes."""
    return and_(by(who), ~batch.startswith(OWN_QUEUE)) if who == "models" else by(who)


@dataclass(frozen=True, slots=True)
class VoteCount:
    """Judgements that stand and that training would take; ``new``: since then."""

    all: int
    new: int


def count_votes(connection: Connection, who: Voter, since: datetime | None) -> VoteCount:
    """How many there are of ``who``, and how many came after ``since`` (None: all of them did)."""
    query = select(func.coalesce(func.sum(tallies.c.done), 0)).join(
        annotators, annotators.c.id == tallies.c.annotator_id
    )
    batch = tallies.c.batch
    count = int(
        connection.execute(query.where(tallies.c.plain, tallies.c.kind != "write", _by(who, batch))).scalar_one()
    )
    if since is None:
        return VoteCount(count, count)
    new = 0
    for table in (judgements, rankings, writings, thumbs, step_labels):
        query = standing(table, func.count()).where(items.c.gold.is_(None), items.c.out.is_(False))
        query = query.where(_by(who), table.c.created > since)
        if table is writings:
            query = query.where(writings.c.original_id.is_not(None))
        new += int(connection.execute(query).scalar_one())
    return VoteCount(count, new)


def _judged(connection: Connection, who: Voter) -> Iterable[tuple[Any, ...]]:
    values = {
        judgements: (judgements.c.token, judgements.c.choice, judgements.c.strength, assignments.c.shown),
        rankings: (rankings.c.token, rankings.c.tiers),
        writings: (writings.c.token, writings.c.original_id, writings.c.text),
    }
    for table, columns in values.items():
        soft = (judgements.c.probability,) if table is judgements else ()
        query = standing(table, *columns, annotators.c.name, *soft).order_by(table.c.id)
        query = query.where(items.c.gold.is_(None), items.c.out.is_(False), _by(who))
        if table is writings:  # a demonstration is no preference
            query = query.where(writings.c.original_id.is_not(None))
        for row in connection.execute(query):
            hard = soft and row.probability is None  # as it was before votes had one
            yield (table.name, *(row[:-1] if hard else row))
    yield from _settled(connection, _by(who))


def _withdrawn(connection: Connection, whose: ColumnElement[bool]) -> Iterable[tuple[Any, ...]]:
    query = standing(judgements, judgements.c.token).where(or_(items.c.gold.is_not(None), items.c.out), whose)
    query = query.order_by(judgements.c.id)
    yield from map(tuple, connection.execute(query))
    query = standing(thumbs, thumbs.c.token).where(or_(items.c.gold.is_not(None), items.c.out), whose)
    yield from map(tuple, connection.execute(query.order_by(thumbs.c.id)))
    yield from _settled(connection, whose)


def _thumbs(connection: Connection) -> Iterable[tuple[Any, ...]]:
    query = standing(thumbs, thumbs.c.token, thumbs.c.up, assignments.c.shown, annotators.c.name)
    query = query.where(items.c.gold.is_(None), items.c.out.is_(False), by("people")).order_by(thumbs.c.id)
    yield from map(tuple, connection.execute(query))


def _steps(connection: Connection) -> Iterable[tuple[Any, ...]]:
    said = step_labels.c.token, step_labels.c.labels, step_labels.c.outcome, step_labels.c.correction
    query = standing(step_labels, *said, assignments.c.shown, annotators.c.name).order_by(step_labels.c.id)
    yield from map(tuple, connection.execute(query.where(items.c.gold.is_(None), items.c.out.is_(False), by("people"))))


def _written(connection: Connection) -> Iterable[tuple[Any, ...]]:
    query = standing(writings, writings.c.token, writings.c.text).where(items.c.out.is_(False), by("people"))
    query = query.order_by(writings.c.id)
    yield from map(tuple, connection.execute(query))


def _settled(connection: Connection, whose: ColumnElement[bool]) -> Iterable[tuple[Any, ...]]:
    """Reviewers' last words on the items that annotators of a kind judged: training takes them in the votes' place."""
    judged = standing(judgements, assignments.c.item_id).where(whose)
    query = (
        select(adjudications.c.item_id, adjudications.c.choice)
        .join(items, items.c.id == adjudications.c.item_id)
        .where(adjudications.c.undone_at.is_(None), items.c.gold.is_(None), items.c.out.is_(False))
        .where(adjudications.c.item_id.in_(judged))
        .order_by(adjudications.c.item_id)
    )
    yield from (("settled", *row) for row in connection.execute(query))


def _hash(rows: Iterable[tuple[Any, ...]]) -> str:
    digest, some = hashlib.sha256(), False
    for row in rows:
        digest.update(f"{row!r}\n".encode())
        some = True
    return digest.hexdigest() if some else ""
