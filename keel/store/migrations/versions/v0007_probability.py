"""How probable it is, as a model that judges says, that the response which it prefers is the better one."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("judgements", sa.Column("probability", sa.Float))
