"""The tables of the feedback store, the same on SQLite and PostgreSQL. migrations/ builds them; this file is what the
queries are written against, and a test holds the two together.

What people did is never overwritten: a judgement that is taken back keeps its row (``undone_at``), and ``events``
refuses updates and deletes by trigger, but for the erasure of personal data (erase.py).
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    false,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime, stored in UTC: SQLite keeps no zone, so it is put on at reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        assert value is None or value.tzinfo is not None, "times in the store are aware"
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def json_column() -> JSON:
    return JSON(none_as_null=True)


def handle_column() -> Column[str]:
    """What a browser calls a row by: 128 random bits, which tell nothing of its number, its kind or its neighbours.
    (It is never NULL; SQLite can't add a column that says so.)"""
    return Column("handle", Text, default=lambda: secrets.token_urlsafe(16))


prompts = Table(
    "prompts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("messages", json_column(), nullable=False),
    Column("kind", Text, nullable=False),
    Column("meta", json_column(), nullable=False),
    Column("created", UtcDateTime, nullable=False),
)

Index("ix_prompts_created", prompts.c.created.desc(), prompts.c.id)  # the newest first, of one file as they stood there

responses = Table(
    "responses",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("prompt_id", ForeignKey("prompts.id"), nullable=False, index=True),
    Column("text", Text, nullable=False),
    Column("finished", Boolean, nullable=False),
    Column("model", Text, nullable=False),  # path of the checkpoint that wrote it; empty when not known
    Column("fingerprint", Text, nullable=False),  # of the checkpoint's weights
    Column("sampling", json_column()),
    # hash of the five columns above: a text that a model gave is one response, however often it is added
    Column("key", Text, nullable=False, unique=True),
    Column("created", UtcDateTime, nullable=False),
)

annotators = Table(
    "annotators",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("kind", Text, nullable=False),  # person | simulated | model | unknown (imported)
    Column("role", Text, nullable=False),  # annotator | reviewer | admin
    Column("created", UtcDateTime, nullable=False),
)

guidelines = Table(
    "guidelines",
    metadata,
    Column("version", Text, primary_key=True),
    Column("text", Text, nullable=False),
    Column("created", UtcDateTime, nullable=False),
    Column("aspects", json_column()),  # [{"name", "question"}, ...]: what each response may be rated on; NULL: nothing
)

# Something to do for `overlap` annotators: compare two responses of one prompt, rank four to nine of them, give one a
# thumb up or down, label one in steps, write a reply to a prompt, or edit a response.
items = Table(
    "items",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("prompt_id", ForeignKey("prompts.id"), nullable=False, index=True),
    Column("batch", Text, nullable=False),  # what it was added for, e.g. one annotate stage; queues do not mix
    Column(
        "key", Text, nullable=False
    ),  # its response ids in ascending order, "12-57"; "write/PROMPT", "edit/57", "thumb/57", "step/57"
    Column("overlap", Integer, nullable=False),
    Column("taken", Integer, nullable=False),  # assignments that hold a slot: leased or judged
    Column("created", UtcDateTime, nullable=False),
    Column("kind", Text, nullable=False, server_default="compare"),  # compare | rank | thumb | step | write | edit
    Column("turn", Float, nullable=False, server_default="0"),  # lower comes first
    # a gold item's known answer: first (the response that was stored first), second, or tie; up or down where one
    # response is judged; where it is judged in steps, the number of the first bad one, or right; NULL: no gold item
    Column("gold", Text),
    # the order in which people get what has the same turn: the queue's number and a random fraction (blind.py)
    Column("place", Float, nullable=False, server_default="0"),
    # it, its prompt or a response of it was taken out of use (removals.py): given to nobody, never trained on
    Column("out", Boolean, nullable=False, server_default=false()),
    UniqueConstraint("batch", "key"),
    # the last guard of "never more than overlap", should a transaction ever be wrong
    CheckConstraint("taken >= 0 AND taken <= overlap", name="taken"),
)
_OPEN = text("taken < overlap")
Index(
    "ix_items_open",  # the next one of a batch
    items.c.batch,
    items.c.kind,
    items.c.turn,
    items.c.id,
    sqlite_where=_OPEN,
    postgresql_where=_OPEN,
)
Index(
    "ix_items_open_any",  # the next one of any batch
    items.c.kind,
    items.c.turn,
    items.c.id,
    sqlite_where=_OPEN,
    postgresql_where=_OPEN,
)
Index("ix_items_place", items.c.kind, items.c.turn, items.c.place, sqlite_where=_OPEN, postgresql_where=_OPEN)
_GOLD = text("gold IS NOT NULL")
Index("ix_items_gold", items.c.kind, items.c.id, sqlite_where=_GOLD, postgresql_where=_GOLD)

item_responses = Table(
    "item_responses",
    metadata,
    Column("item_id", ForeignKey("items.id"), primary_key=True),
    Column("response_id", ForeignKey("responses.id"), primary_key=True),
)

# An item given to an annotator. States: leased (holds a slot), judged (holds a slot; also for what was ranked or
# written), expired (gave its slot back), skipped (gave it back and does not come again).
assignments = Table(
    "assignments",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("item_id", ForeignKey("items.id"), nullable=False),
    Column("annotator_id", ForeignKey("annotators.id"), nullable=False, index=True),
    Column("shown", json_column(), nullable=False),  # response ids in the order shown, left first
    Column("state", Text, nullable=False),
    Column("leased_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Column("skipped_at", UtcDateTime),
    Column("skip_token", Text),  # of the last skip, by the browser: sent again after an undo, it skips nothing
    handle_column(),
    UniqueConstraint("item_id", "annotator_id"),
)
Index("uq_assignments_handle", assignments.c.handle, unique=True)
Index(
    "ix_assignments_leased",
    assignments.c.annotator_id,
    assignments.c.expires_at,
    sqlite_where=text("state = 'leased'"),
    postgresql_where=text("state = 'leased'"),
)

judgements = Table(
    "judgements",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("assignment_id", ForeignKey("assignments.id"), nullable=False),
    Column("token", Text, nullable=False, unique=True),  # made by the client: sent twice, counted once
    Column("choice", Text, nullable=False),
    Column("strength", Float),  # 1 slightly, 2 better, 3 much better; imported margins as they came; NULL: not asked
    Column("seconds", Float),  # NULL: not measured
    Column("guideline", ForeignKey("guidelines.version")),
    Column("reason", Text),
    Column("created", UtcDateTime, nullable=False),
    Column("undone_at", UtcDateTime),
    Column("probability", Float),  # that the preferred one (of a tie, the left one) is the better one; NULL: not given
    CheckConstraint("choice IN ('left', 'right', 'tie', 'both_bad')", name="choice"),
)

# What a model that judges by principles was asked about a pair, and what it said; a row a principle.
ai_labels = Table(
    "ai_labels",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("judgement_id", ForeignKey("judgements.id"), nullable=False),
    Column("principle_id", Text, nullable=False),
    Column("principle_hash", Text, nullable=False),
    Column("constitution", Text, nullable=False),  # its name
    Column("constitution_hash", Text, nullable=False),
    Column("p_left_first", Float),  # that the left response is the better one, read with it shown first; NULL: not read
    Column("p_left_second", Float),
    Column("asked", Text, nullable=False),  # as sent, in the first order; empty for a Python function
    Column("thought", Text),
    Column("created", UtcDateTime, nullable=False),
    Column("asked_second", Text),  # as sent, in the second order; NULL: not kept by the Keel that labelled
    Column("thought_second", Text),
    UniqueConstraint("judgement_id", "principle_id"),
)
Index(
    "ix_judgements_standing",  # an assignment has one judgement that stands, and any number that were taken back
    judgements.c.assignment_id,
    unique=True,
    sqlite_where=text("undone_at IS NULL"),
    postgresql_where=text("undone_at IS NULL"),
)

Index(
    "ix_judgements_undone",  # those that were taken back, among a million that were not
    judgements.c.id,
    sqlite_where=text("undone_at IS NOT NULL"),
    postgresql_where=text("undone_at IS NOT NULL"),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("actor", Text, nullable=False),  # an annotator's name, or the part of Keel that acted
    Column("action", Text, nullable=False),
    Column("entity", Text, nullable=False),
    Column("entity_id", Text, nullable=False),
    Column("old", json_column()),
    Column("new", json_column()),
    Column("guideline", Text),  # the version that was in force for what people did; NULL for what Keel did
)


def event(
    at: datetime,
    actor: str,
    action: str,
    entity: str,
    entity_id: object,
    old: Any,
    new: Any,
    guideline: str | None = None,
) -> dict[str, Any]:
    """A row of ``events``."""
    return {
        "at": at,
        "actor": actor,
        "action": action,
        "entity": entity,
        "entity_id": str(entity_id),
        "old": old,
        "new": new,
        "guideline": guideline,
    }
