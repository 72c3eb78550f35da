"""Versions of constitutions, which do not change once they are published, and people's answers about one principle."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
STANDS = sa.text("undone_at IS NULL")

SQLITE = [
    """CREATE TRIGGER constitutions_no_update BEFORE UPDATE ON constitutions WHEN NOT OLD.draft
       BEGIN SELECT RAISE(ABORT, 'published constitutions do not change'); END""",
    """CREATE TRIGGER constitutions_no_delete BEFORE DELETE ON constitutions WHEN NOT OLD.draft
       BEGIN SELECT RAISE(ABORT, 'published constitutions do not change'); END""",
]

POSTGRESQL = [
    """CREATE FUNCTION keel_published() RETURNS trigger LANGUAGE plpgsql AS
       $$ BEGIN RAISE EXCEPTION 'published constitutions do not change'; END $$""",
    """CREATE TRIGGER constitutions_no_change BEFORE UPDATE OR DELETE ON constitutions
       FOR EACH ROW WHEN (NOT OLD.draft) EXECUTE FUNCTION keel_published()""",
]


def upgrade() -> None:
    op.create_table(
        "constitutions",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
        sa.Column("content", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("draft", sa.Boolean, nullable=False),
        sa.Column("author_id", sa.Integer),
        sa.Column("created", TIME, nullable=False),
        sa.Column("published", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_constitutions"),
        sa.ForeignKeyConstraint(["author_id"], ["annotators.id"], name="fk_constitutions_author_id"),
        sa.UniqueConstraint("name", "version", name="uq_constitutions_name"),
    )
    op.create_table(
        "principle_answers",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("handle", sa.Text, nullable=False),
        sa.Column("principle_id", sa.Text, nullable=False),
        sa.Column("principle_hash", sa.Text, nullable=False),
        sa.Column("response_id", sa.Integer, nullable=False),
        sa.Column("annotator_id", sa.Integer, nullable=False),
        sa.Column("answer", sa.Text),
        sa.Column("created", TIME, nullable=False),
        sa.Column("undone_at", TIME),
        sa.Column("token", sa.Text),
        sa.PrimaryKeyConstraint("id", name="pk_principle_answers"),
        sa.ForeignKeyConstraint(["response_id"], ["responses.id"], name="fk_principle_answers_response_id"),
        sa.ForeignKeyConstraint(["annotator_id"], ["annotators.id"], name="fk_principle_answers_annotator_id"),
        sa.UniqueConstraint("token", name="uq_principle_answers_token"),
        sa.UniqueConstraint("handle", name="uq_principle_answers_handle"),
        sa.CheckConstraint("answer IN ('kept', 'broken', 'na', 'unsure')", name="ck_principle_answers_answer"),
    )
    op.create_index(
        "ix_principle_answers_standing",
        "principle_answers",
        ["annotator_id", "response_id", "principle_hash"],
        unique=True,
        sqlite_where=STANDS,
        postgresql_where=STANDS,
    )
    for statement in SQLITE if op.get_bind().dialect.name == "sqlite" else POSTGRESQL:
        op.execute(statement)
