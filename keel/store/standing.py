"""What was done, whose it is and on what: the query that all readers of votes, rankings and writings begin with."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Select, Table, select

from keel.recipe.declared import Voter
from keel.store.records import VOTER_KINDS
from keel.store.tables import annotators, assignments, items


def done(table: Table, *columns: Any) -> Select[Any]:
    """``columns`` of all that is in ``table`` (judgements, rankings, thumbs, writings), what was taken back too, joined
    with its assignment, item and annotator."""
    return (
        select(*columns)
        .select_from(table.join(assignments, assignments.c.id == table.c.assignment_id))
        .join(items, items.c.id == assignments.c.item_id)
        .join(annotators, annotators.c.id == assignments.c.annotator_id)
    )


def standing(table: Table, *columns: Any) -> Select[Any]:
    """`done` without what was taken back."""
    return done(table, *columns).where(table.c.undone_at.is_(None))


def by(who: Voter) -> ColumnElement[bool]:
    """Whose it is."""
    return annotators.c.kind.in_(VOTER_KINDS[who])
