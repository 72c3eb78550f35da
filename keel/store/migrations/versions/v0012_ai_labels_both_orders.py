"""What a model that judges by principles was asked in the second order too, and what it wrote before its answer."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("ai_labels", sa.Column("asked_second", sa.Text))
    op.add_column("ai_labels", sa.Column("thought_second", sa.Text))
