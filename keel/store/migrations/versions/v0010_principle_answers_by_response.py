"""Who answered about one reply and one principle is found without reading all answers."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

STANDS = sa.text("undone_at IS NULL")


def upgrade() -> None:
    op.create_index(
        "ix_principle_answers_response",
        "principle_answers",
        ["response_id", "principle_hash"],
        sqlite_where=STANDS,
        postgresql_where=STANDS,
    )
