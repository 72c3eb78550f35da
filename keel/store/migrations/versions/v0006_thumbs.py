"""Thumbs up and down on single responses."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
STANDS = sa.text("undone_at IS NULL")


def upgrade() -> None:
    op.create_table(
        "thumbs",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("assignment_id", sa.Integer, nullable=False),
        sa.Column("token", sa.Text, nullable=False),
        sa.Column("up", sa.Boolean, nullable=False),
        sa.Column("seconds", sa.Float),
        sa.Column("guideline", sa.Text),
        sa.Column("reason", sa.Text),
        sa.Column("created", TIME, nullable=False),
        sa.Column("undone_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_thumbs"),
        sa.ForeignKeyConstraint(["assignment_id"], ["assignments.id"], name="fk_thumbs_assignment_id"),
        sa.ForeignKeyConstraint(["guideline"], ["guidelines.version"], name="fk_thumbs_guideline"),
        sa.UniqueConstraint("token", name="uq_thumbs_token"),
    )
    op.create_index(
        "ix_thumbs_standing",
        "thumbs",
        ["assignment_id"],
        unique=True,
        sqlite_where=STANDS,
        postgresql_where=STANDS,
    )
