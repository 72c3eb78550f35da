"""The tables of the labelling app, beside those that training knows (tables.py): what people do besides comparing,
who they are, and how they sign in. Secrets (passwords, links, sessions) are kept as hashes alone.
"""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from keel.store.tables import UtcDateTime, handle_column, json_column, metadata

_STANDS = text("undone_at IS NULL")

# ------------------------------------------------------------------------------------------------- what people do

aspect_ratings = Table(
    "aspect_ratings",
    metadata,
    Column("judgement_id", ForeignKey("judgements.id"), primary_key=True),
    Column("response_id", ForeignKey("responses.id"), primary_key=True),
    Column("aspect", Text, primary_key=True),
    Column("value", Integer, nullable=False),  # 1 (bad) to 5 (good)
    CheckConstraint("value BETWEEN 1 AND 5", name="value"),
)

rankings = Table(
    "rankings",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("assignment_id", ForeignKey("assignments.id"), nullable=False),
    Column("token", Text, nullable=False, unique=True),
    Column("tiers", json_column(), nullable=False),  # response ids, best tier first: [[12], [9, 30], [4]]
    Column("seconds", Float),
    Column("guideline", ForeignKey("guidelines.version")),
    Column("reason", Text),
    Column("created", UtcDateTime, nullable=False),
    Column("undone_at", UtcDateTime),
)
Index("ix_rankings_standing", rankings.c.assignment_id, unique=True, sqlite_where=_STANDS, postgresql_where=_STANDS)

# A demonstration (original_id is NULL) or the edit of a response.
writings = Table(
    "writings",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("assignment_id", ForeignKey("assignments.id"), nullable=False),
    Column("token", Text, nullable=False, unique=True),
    Column("text", Text, nullable=False),
    Column("original_id", ForeignKey("responses.id")),
    Column("seconds", Float),
    Column("guideline", ForeignKey("guidelines.version")),
    Column("created", UtcDateTime, nullable=False),
    Column("undone_at", UtcDateTime),
)
Index("ix_writings_standing", writings.c.assignment_id, unique=True, sqlite_where=_STANDS, postgresql_where=_STANDS)

# One response by itself: thumbs up or down.
thumbs = Table(
    "thumbs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("assignment_id", ForeignKey("assignments.id"), nullable=False),
    Column("token", Text, nullable=False, unique=True),
    Column("up", Boolean, nullable=False),
    Column("seconds", Float),
    Column("guideline", ForeignKey("guidelines.version")),
    Column("reason", Text),
    Column("created", UtcDateTime, nullable=False),
    Column("undone_at", UtcDateTime),
)
Index("ix_thumbs_standing", thumbs.c.assignment_id, unique=True, sqlite_where=_STANDS, postgresql_where=_STANDS)

# An item that asks for labels on a reply's steps: how it is cut, for good, and how it came into the queue.
step_items = Table(
    "step_items",
    metadata,
    Column("item_id", ForeignKey("items.id"), primary_key=True),
    Column("steps", json_column(), nullable=False),  # a keel.recipe.steps.Steps
    Column("drawn", Text, nullable=False),  # at random, or ranked by what it teaches: figures need random ones
    CheckConstraint("drawn IN ('random', 'ranked')", name="drawn"),
)

# The steps of one response, judged one after the other.
step_labels = Table(
    "step_labels",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("assignment_id", ForeignKey("assignments.id"), nullable=False),
    Column("token", Text, nullable=False, unique=True),
    Column("labels", json_column(), nullable=False),  # a step each: good, neutral, bad, unsure; null: not judged
    Column("outcome", Text, nullable=False),
    Column("reasons", json_column(), nullable=False),  # why the first bad step is bad: sum, number, follow, check
    Column("correction", Text),  # what should stand in the place of the first bad step
    Column("note", Text),  # why it was given up, or what is wrong with the problem
    Column("reference_shown", Boolean, nullable=False),  # whether the reference answer was on the screen
    Column("seconds", Float),
    Column("step_seconds", json_column(), nullable=False),  # a step each; null: not measured
    Column("guideline", ForeignKey("guidelines.version")),
    Column("created", UtcDateTime, nullable=False),
    Column("undone_at", UtcDateTime),
    CheckConstraint("outcome IN ('solution', 'found_error', 'give_up', 'bad_problem')", name="outcome"),
)
Index(
    "ix_step_labels_standing",
    step_labels.c.assignment_id,
    unique=True,
    sqlite_where=_STANDS,
    postgresql_where=_STANDS,
)

flags = Table(
    "flags",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("assignment_id", ForeignKey("assignments.id"), nullable=False),
    Column("token", Text, nullable=False, unique=True),
    Column("text", Text, nullable=False),
    Column("created", UtcDateTime, nullable=False),
    Column("resolved_at", UtcDateTime),
)

# A reviewer's last word on an item whose votes differ.
adjudications = Table(
    "adjudications",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("item_id", ForeignKey("items.id"), nullable=False),
    Column("annotator_id", ForeignKey("annotators.id"), nullable=False),
    Column("choice", Text, nullable=False),  # first (the response that was stored first), second, tie
    Column("reason", Text),
    Column("created", UtcDateTime, nullable=False),
    Column("undone_at", UtcDateTime),
)
Index(
    "ix_adjudications_standing",
    adjudications.c.item_id,
    unique=True,
    sqlite_where=_STANDS,
    postgresql_where=_STANDS,
)

# An item, a response or a prompt that was taken out of use; it may be put back, unless its texts were erased.
removals = Table(
    "removals",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("item_id", ForeignKey("items.id")),
    Column("response_id", ForeignKey("responses.id")),
    Column("prompt_id", ForeignKey("prompts.id")),
    Column("annotator_id", ForeignKey("annotators.id")),  # who took it out; NULL: it came so from another store
    Column("reason", Text),
    Column("erased", Boolean, nullable=False),
    Column("created", UtcDateTime, nullable=False),
    Column("undone_at", UtcDateTime),
    CheckConstraint(
        "(item_id IS NOT NULL AND response_id IS NULL AND prompt_id IS NULL)"
        " OR (item_id IS NULL AND response_id IS NOT NULL AND prompt_id IS NULL)"
        " OR (item_id IS NULL AND response_id IS NULL AND prompt_id IS NOT NULL)",
        name="one",
    ),
)
Index("ix_removals_item", removals.c.item_id, unique=True, sqlite_where=_STANDS, postgresql_where=_STANDS)
Index("ix_removals_response", removals.c.response_id, unique=True, sqlite_where=_STANDS, postgresql_where=_STANDS)
Index("ix_removals_prompt", removals.c.prompt_id, unique=True, sqlite_where=_STANDS, postgresql_where=_STANDS)

# Each erasure of personal data. While its row is open, which is inside its transaction alone, the database lets texts
# and names in ``events`` be overwritten.
erasures = Table(
    "erasures",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("what", Text, nullable=False),  # person | response | prompt, and its number
    Column("open", Boolean, nullable=False),
)

# What stands of each annotator's work, counted by day, and each comparison's votes by people (tallies.py).
tallies = Table(
    "tallies",
    metadata,
    Column("annotator_id", ForeignKey("annotators.id"), primary_key=True),
    Column("day", Text, primary_key=True),  # on which it was done, in UTC: 2026-11-28
    Column("kind", Text, primary_key=True),
    Column("batch", Text, primary_key=True),
    Column("plain", Boolean, primary_key=True),  # whether on what is in use and no gold item
    Column("done", Integer, nullable=False),
)

item_votes = Table(
    "item_votes",
    metadata,
    Column("item_id", ForeignKey("items.id"), primary_key=True),
    Column("first", Integer, nullable=False),
    Column("second", Integer, nullable=False),
    Column("tie", Integer, nullable=False),
    Column("both_bad", Integer, nullable=False),
)
DIFFER = text("first * (second + tie + both_bad) + second * (tie + both_bad) + tie * both_bad > 0")
Index("ix_item_votes_differ", item_votes.c.item_id, sqlite_where=DIFFER, postgresql_where=DIFFER)

# ---------------------------------------------------------------------------------------------------- the arena

conversations = Table(
    "conversations",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("annotator_id", ForeignKey("annotators.id"), nullable=False, index=True),
    Column("model_left", Text, nullable=False),
    Column("model_right", Text, nullable=False),
    Column("created", UtcDateTime, nullable=False),
    Column("ended_at", UtcDateTime),  # voted on, or given up: nothing is added any more
    handle_column(),
)
Index("uq_conversations_handle", conversations.c.handle, unique=True)

turns = Table(
    "turns",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("conversation_id", ForeignKey("conversations.id"), nullable=False),
    Column("number", Integer, nullable=False),  # 1, 2, ...
    Column("message", Text, nullable=False),
    Column("left", Text),  # NULL: not answered yet
    Column("right", Text),
    Column("created", UtcDateTime, nullable=False),
    Column("token", Text),  # the browser's name for the message: sent again, it is the same turn
    Column("attempt", Integer, nullable=False, server_default="1"),  # counts up when the message is answered anew
    UniqueConstraint("conversation_id", "number"),
)

arena_votes = Table(
    "arena_votes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("conversation_id", ForeignKey("conversations.id"), nullable=False, unique=True),
    Column("token", Text, nullable=False, unique=True),
    Column("turn", Integer, nullable=False),  # after which turn
    Column("choice", Text, nullable=False),
    Column("reason", Text),
    Column("guideline", ForeignKey("guidelines.version")),
    Column("created", UtcDateTime, nullable=False),
    CheckConstraint("choice IN ('left', 'right', 'tie', 'both_bad')", name="choice"),
)

# ------------------------------------------------------------------------------------------------- who they are

accounts = Table(
    "accounts",
    metadata,
    Column("annotator_id", ForeignKey("annotators.id"), primary_key=True),
    Column("password", Text),  # argon2; NULL: signs in by link only
    Column("active", Boolean, nullable=False),
    Column("created", UtcDateTime, nullable=False),
)

# A link that may be used once: an invitation (makes an account), or a way in for one that is there.
links = Table(
    "links",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("digest", Text, nullable=False, unique=True),  # SHA-256 of the secret in the link
    Column("role", Text, nullable=False),
    Column("annotator_id", ForeignKey("annotators.id")),  # whose way in; NULL: an invitation
    Column("made_by", Text, nullable=False),
    Column("created", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Column("used_at", UtcDateTime),
)

sessions = Table(
    "sessions",
    metadata,
    Column("digest", Text, primary_key=True),  # SHA-256 of the cookie
    Column("annotator_id", ForeignKey("annotators.id"), nullable=False, index=True),
    Column("csrf", Text, nullable=False),
    Column("created", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Column("ended_at", UtcDateTime),
)

# ------------------------------------------------------------------------------------------------- how it is run

settings = Table(
    "settings",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", json_column(), nullable=False),
)

# Somebody asked for responses to be sampled. States: waiting, running, done, failed.
sampling_requests = Table(
    "sampling_requests",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("model", Text, nullable=False),
    Column("prompts", Integer, nullable=False),  # how many, of those with the fewest responses
    Column("per_prompt", Integer, nullable=False),
    Column("overlap", Integer, nullable=False),
    Column("kind", Text, nullable=False),  # what is made of them: compare | rank | thumb | edit
    Column("state", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("made_by", Text, nullable=False),
    Column("created", UtcDateTime, nullable=False),
    Column("ended_at", UtcDateTime),
)

# ------------------------------------------------------------------------------------------------- constitutions

# Versions 1, 2, ... of each; the newest may be a draft. The database refuses to change one that is published.
constitutions = Table(
    "constitutions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("hash", Text, nullable=False),
    Column("content", json_column(), nullable=False),
    Column("draft", Boolean, nullable=False),
    Column("author_id", ForeignKey("annotators.id")),
    Column("created", UtcDateTime, nullable=False),
    Column("published", UtcDateTime),
    UniqueConstraint("name", "version"),
)

# Whether one reply keeps to one principle, by one person. A row is made when the question is shown.
principle_answers = Table(
    "principle_answers",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("handle", Text, nullable=False, unique=True),  # what the browser knows the question by
    Column("principle_id", Text, nullable=False),
    Column("principle_hash", Text, nullable=False),
    Column("response_id", ForeignKey("responses.id"), nullable=False),
    Column("annotator_id", ForeignKey("annotators.id"), nullable=False),
    Column("answer", Text),  # kept | broken | na (it does not apply) | unsure; NULL: not answered yet, or skipped
    Column("created", UtcDateTime, nullable=False),
    Column("undone_at", UtcDateTime),
    Column("token", Text, unique=True),  # of what was sent: the answer, or that it is skipped
    CheckConstraint("answer IN ('kept', 'broken', 'na', 'unsure')", name="answer"),
)
Index(
    "ix_principle_answers_response",
    principle_answers.c.response_id,
    principle_answers.c.principle_hash,
    sqlite_where=_STANDS,
    postgresql_where=_STANDS,
)
Index(
    "ix_principle_answers_standing",
    principle_answers.c.annotator_id,
    principle_answers.c.response_id,
    principle_answers.c.principle_hash,
    unique=True,
    sqlite_where=_STANDS,
    postgresql_where=_STANDS,
)
