"""Labels on the steps of single responses."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
JSON = sa.JSON(none_as_null=True)
STANDS = sa.text("undone_at IS NULL")


def upgrade() -> None:
    op.create_table(
        "step_items",
        sa.Column("item_id", sa.Integer, nullable=False),
        sa.Column("steps", JSON, nullable=False),
        sa.Column("drawn", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("item_id", name="pk_step_items"),
        sa.ForeignKeyConstraint(["item_id"], ["items.id"], name="fk_step_items_item_id"),
        sa.CheckConstraint("drawn IN ('random', 'ranked')", name="ck_step_items_drawn"),
    )
    op.create_table(
        "step_labels",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("assignment_id", sa.Integer, nullable=False),
        sa.Column("token", sa.Text, nullable=False),
        sa.Column("labels", JSON, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("reasons", JSON, nullable=False),
        sa.Column("correction", sa.Text),
        sa.Column("note", sa.Text),
        sa.Column("reference_shown", sa.Boolean, nullable=False),
        sa.Column("seconds", sa.Float),
        sa.Column("step_seconds", JSON, nullable=False),
        sa.Column("guideline", sa.Text),
        sa.Column("created", TIME, nullable=False),
        sa.Column("undone_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_step_labels"),
        sa.ForeignKeyConstraint(["assignment_id"], ["assignments.id"], name="fk_step_labels_assignment_id"),
        sa.ForeignKeyConstraint(["guideline"], ["guidelines.version"], name="fk_step_labels_guideline"),
        sa.UniqueConstraint("token", name="uq_step_labels_token"),
        sa.CheckConstraint(
            "outcome IN ('solution', 'found_error', 'give_up', 'bad_problem')", name="ck_step_labels_outcome"
        ),
    )
    op.create_index(
        "ix_step_labels_standing",
        "step_labels",
        ["assignment_id"],
        unique=True,
        sqlite_where=STANDS,
        postgresql_where=STANDS,
    )
