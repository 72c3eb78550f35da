"""What a model that judges by principles was asked about a pair, and what it said."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "ai_labels",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("judgement_id", sa.Integer, nullable=False),
        sa.Column("principle_id", sa.Text, nullable=False),
        sa.Column("principle_hash", sa.Text, nullable=False),
        sa.Column("constitution", sa.Text, nullable=False),
        sa.Column("constitution_hash", sa.Text, nullable=False),
        sa.Column("p_left_first", sa.Float),
        sa.Column("p_left_second", sa.Float),
        sa.Column("asked", sa.Text, nullable=False),
        sa.Column("thought", sa.Text),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_ai_labels"),
        sa.ForeignKeyConstraint(["judgement_id"], ["judgements.id"], name="fk_ai_labels_judgement_id"),
        sa.UniqueConstraint("judgement_id", "principle_id", name="uq_ai_labels_judgement_id"),
    )
