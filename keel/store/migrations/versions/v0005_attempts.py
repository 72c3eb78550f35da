"""What is sent twice counts once in the arena too, and for skips: the browser's names for them, and which attempt at an
answer a turn is waiting for."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("turns", sa.Column("token", sa.Text))
    op.add_column("turns", sa.Column("attempt", sa.Integer, nullable=False, server_default="1"))
    op.add_column("assignments", sa.Column("skip_token", sa.Text))
