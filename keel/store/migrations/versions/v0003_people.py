"""What the labelling app needs: more kinds of work, gold items, rankings, writings, flags, adjudications, the arena,
accounts, links, sessions."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
STANDS = "undone_at IS NULL"


def upgrade() -> None:
    op.add_column("guidelines", sa.Column("aspects", sa.JSON))
    op.add_column("items", sa.Column("kind", sa.Text, nullable=False, server_default="compare"))
    op.add_column("items", sa.Column("turn", sa.Float, nullable=False, server_default="0"))
    op.add_column("items", sa.Column("gold", sa.Text))
    op.add_column("assignments", sa.Column("skipped_at", TIME))
    op.add_column("events", sa.Column("guideline", sa.Text))
    op.drop_index("ix_items_open", "items")
    _partial("ix_items_open", "items", ["batch", "kind", "turn", "id"], "taken < overlap")
    _partial("ix_items_open_any", "items", ["kind", "turn", "id"], "taken < overlap")
    _work()
    _arena()
    _people()
    _running()


def _work() -> None:
    op.create_table(
        "aspect_ratings",
        sa.Column("judgement_id", sa.Integer, nullable=False),
        sa.Column("response_id", sa.Integer, nullable=False),
        sa.Column("aspect", sa.Text, nullable=False),
        sa.Column("value", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("judgement_id", "response_id", "aspect", name="pk_aspect_ratings"),
        _foreign("aspect_ratings", "judgement_id", "judgements.id"),
        _foreign("aspect_ratings", "response_id", "responses.id"),
        sa.CheckConstraint("value BETWEEN 1 AND 5", name=op.f("ck_aspect_ratings_value")),
    )
    op.create_table(
        "rankings",
        _id(),
        sa.Column("assignment_id", sa.Integer, nullable=False),
        sa.Column("token", sa.Text, nullable=False),
        sa.Column("tiers", sa.JSON, nullable=False),
        sa.Column("seconds", sa.Float),
        sa.Column("guideline", sa.Text),
        sa.Column("reason", sa.Text),
        sa.Column("created", TIME, nullable=False),
        sa.Column("undone_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_rankings"),
        _foreign("rankings", "assignment_id", "assignments.id"),
        _foreign("rankings", "guideline", "guidelines.version"),
        sa.UniqueConstraint("token", name="uq_rankings_token"),
    )
    _partial("ix_rankings_standing", "rankings", ["assignment_id"], STANDS, unique=True)
    op.create_table(
        "writings",
        _id(),
        sa.Column("assignment_id", sa.Integer, nullable=False),
        sa.Column("token", sa.Text, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("original_id", sa.Integer),
        sa.Column("seconds", sa.Float),
        sa.Column("guideline", sa.Text),
        sa.Column("created", TIME, nullable=False),
        sa.Column("undone_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_writings"),
        _foreign("writings", "assignment_id", "assignments.id"),
        _foreign("writings", "original_id", "responses.id"),
        _foreign("writings", "guideline", "guidelines.version"),
        sa.UniqueConstraint("token", name="uq_writings_token"),
    )
    _partial("ix_writings_standing", "writings", ["assignment_id"], STANDS, unique=True)
    op.create_table(
        "flags",
        _id(),
        sa.Column("assignment_id", sa.Integer, nullable=False),
        sa.Column("token", sa.Text, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("resolved_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_flags"),
        _foreign("flags", "assignment_id", "assignments.id"),
        sa.UniqueConstraint("token", name="uq_flags_token"),
    )
    op.create_table(
        "adjudications",
        _id(),
        sa.Column("item_id", sa.Integer, nullable=False),
        sa.Column("annotator_id", sa.Integer, nullable=False),
        sa.Column("choice", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("created", TIME, nullable=False),
        sa.Column("undone_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_adjudications"),
        _foreign("adjudications", "item_id", "items.id"),
        _foreign("adjudications", "annotator_id", "annotators.id"),
    )
    _partial("ix_adjudications_standing", "adjudications", ["item_id"], STANDS, unique=True)


def _arena() -> None:
    op.create_table(
        "conversations",
        _id(),
        sa.Column("annotator_id", sa.Integer, nullable=False),
        sa.Column("model_left", sa.Text, nullable=False),
        sa.Column("model_right", sa.Text, nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("ended_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_conversations"),
        _foreign("conversations", "annotator_id", "annotators.id"),
    )
    op.create_index("ix_conversations_annotator_id", "conversations", ["annotator_id"])
    op.create_table(
        "turns",
        _id(),
        sa.Column("conversation_id", sa.Integer, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("left", sa.Text),
        sa.Column("right", sa.Text),
        sa.Column("created", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_turns"),
        _foreign("turns", "conversation_id", "conversations.id"),
        sa.UniqueConstraint("conversation_id", "number", name="uq_turns_conversation_id"),
    )
    op.create_table(
        "arena_votes",
        _id(),
        sa.Column("conversation_id", sa.Integer, nullable=False),
        sa.Column("token", sa.Text, nullable=False),
        sa.Column("turn", sa.Integer, nullable=False),
        sa.Column("choice", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("guideline", sa.Text),
        sa.Column("created", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_arena_votes"),
        _foreign("arena_votes", "conversation_id", "conversations.id"),
        _foreign("arena_votes", "guideline", "guidelines.version"),
        sa.UniqueConstraint("conversation_id", name="uq_arena_votes_conversation_id"),
        sa.UniqueConstraint("token", name="uq_arena_votes_token"),
        sa.CheckConstraint("choice IN ('left', 'right', 'tie', 'both_bad')", name=op.f("ck_arena_votes_choice")),
    )


def _people() -> None:
    op.create_table(
        "accounts",
        sa.Column("annotator_id", sa.Integer, nullable=False),
        sa.Column("password", sa.Text),
        sa.Column("active", sa.Boolean, nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.PrimaryKeyConstraint("annotator_id", name="pk_accounts"),
        _foreign("accounts", "annotator_id", "annotators.id"),
    )
    op.create_table(
        "links",
        _id(),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("annotator_id", sa.Integer),
        sa.Column("made_by", sa.Text, nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.Column("used_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_links"),
        _foreign("links", "annotator_id", "annotators.id"),
        sa.UniqueConstraint("digest", name="uq_links_digest"),
    )
    op.create_table(
        "sessions",
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("annotator_id", sa.Integer, nullable=False),
        sa.Column("csrf", sa.Text, nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.Column("ended_at", TIME),
        sa.PrimaryKeyConstraint("digest", name="pk_sessions"),
        _foreign("sessions", "annotator_id", "annotators.id"),
    )
    op.create_index("ix_sessions_annotator_id", "sessions", ["annotator_id"])


def _running() -> None:
    op.create_table(
        "settings",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("value", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_settings"),
    )
    op.create_table(
        "sampling_requests",
        _id(),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("prompts", sa.Integer, nullable=False),
        sa.Column("per_prompt", sa.Integer, nullable=False),
        sa.Column("overlap", sa.Integer, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("made_by", sa.Text, nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("ended_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_sampling_requests"),
    )


def _id() -> sa.Column[int]:
    return sa.Column("id", sa.Integer, nullable=False)


def _foreign(table: str, column: str, target: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [target], name=f"fk_{table}_{column}")


def _partial(name: str, table: str, columns: list[str], where: str, unique: bool = False) -> None:
    clause = sa.text(where)
    op.create_index(name, table, columns, unique=unique, sqlite_where=clause, postgresql_where=clause)
