"""The tables of the API for programs: tokens, what writes were answered, webhooks and what was sent to them."""

from __future__ import annotations

from sqlalchemy import CheckConstraint, Column, ForeignKey, Index, Integer, Table, Text, UniqueConstraint, text

from keel.store.tables import UtcDateTime, json_column, metadata

# What a program signs in with, in the name of an account and with at most its role.
tokens = Table(
    "tokens",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("digest", Text, nullable=False, unique=True),  # SHA-256 of the secret
    Column("name", Text, nullable=False),  # what its maker calls it
    Column("annotator_id", ForeignKey("annotators.id"), nullable=False, index=True),
    Column("role", Text, nullable=False),
    Column("per_minute", Integer, nullable=False),  # requests
    Column("made_by", Text, nullable=False),
    Column("created", UtcDateTime, nullable=False),
    Column("last_used", UtcDateTime),  # to the minute
    Column("ended_at", UtcDateTime),
    CheckConstraint("role IN ('annotator', 'reviewer', 'admin')", name="role"),
)

# A write's answer, for whoever sends the write again. Neither the key nor the body stands here, only hashes of them.
answers = Table(
    "answers",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("token_id", ForeignKey("tokens.id"), nullable=False),
    Column("key", Text, nullable=False),
    Column("asked", Text, nullable=False),
    Column("answer", json_column(), nullable=False),
    Column("created", UtcDateTime, nullable=False, index=True),
    UniqueConstraint("token_id", "key"),
)

# Where news of work are sent. ``cursor``: the event up to which they were delivered. A process that delivers holds the
# row by ``leased_by`` until ``leased_until``.
webhooks = Table(
    "webhooks",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("url", Text, nullable=False),
    Column("secret", Text, nullable=False),  # what deliveries are signed with: it is needed as it is
    Column("cursor", Integer, nullable=False),
    Column("made_by", Text, nullable=False),
    Column("created", UtcDateTime, nullable=False),
    Column("leased_by", Text),
    Column("leased_until", UtcDateTime),
    Column("paused_at", UtcDateTime),  # it failed for too long; nothing is sent until an admin says so
    Column("ended_at", UtcDateTime),
)

# The events after ``after`` up to ``upto``, sent together: one delivery at a time of each webhook, again until it is
# taken. The texts are read when it is sent.
deliveries = Table(
    "deliveries",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False, unique=True),  # what the receiver knows it by
    Column("webhook_id", ForeignKey("webhooks.id"), nullable=False),
    Column("after", Integer, nullable=False),
    Column("upto", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_at", UtcDateTime, nullable=False),
    Column("status", Integer),  # of the last answer; NULL: there was none
    Column("problem", Text),  # why the last attempt failed
    Column("created", UtcDateTime, nullable=False),
    Column("delivered_at", UtcDateTime),
)
_OPEN = text("delivered_at IS NULL")
Index("ix_deliveries_open", deliveries.c.webhook_id, unique=True, sqlite_where=_OPEN, postgresql_where=_OPEN)
