"""What stands is counted: each annotator's work by day, each comparison's votes by people. And votes that were taken
back, and the newest prompts, are found without reading all others."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

DIFFER = sa.text("first * (second + tie + both_bad) + second * (tie + both_bad) + tie * both_bad > 0")
UNDONE = sa.text("undone_at IS NOT NULL")

_DAY = {"sqlite": "substr(done.created, 1, 10)", "postgresql": "to_char(done.created AT TIME ZONE 'UTC', 'YYYY-MM-DD')"}
_LEFT_IS_FIRST = {
    "sqlite": "json_extract(a.shown, '$[0]') < json_extract(a.shown, '$[1]')",
    "postgresql": "CAST(a.shown ->> 0 AS integer) < CAST(a.shown ->> 1 AS integer)",
}
_WORK = " UNION ALL ".join(
    f"SELECT assignment_id, created FROM {table} WHERE undone_at IS NULL"
    for table in ("judgements", "rankings", "thumbs", "step_labels", "writings")
)


def fill(dialect: str) -> list[str]:
    """The statements that count what is there, into empty tables."""
    left = f"(({_LEFT_IS_FIRST[dialect]}) = (j.choice = 'left'))"
    sides = {
        "first": f"j.choice IN ('left', 'right') AND {left}",
        "second": f"j.choice IN ('left', 'right') AND NOT {left}",
        "tie": "j.choice = 'tie'",
        "both_bad": "j.choice = 'both_bad'",
    }
    sums = ", ".join(f"sum(CASE WHEN {which} THEN 1 ELSE 0 END)" for which in sides.values())
    return [
        f"""INSERT INTO tallies (annotator_id, day, kind, batch, plain, done)
            SELECT a.annotator_id, {_DAY[dialect]}, i.kind, i.batch, (i.gold IS NULL AND NOT i.out), count(*)
            FROM ({_WORK}) AS done
            JOIN assignments AS a ON a.id = done.assignment_id JOIN items AS i ON i.id = a.item_id
            GROUP BY 1, 2, 3, 4, 5""",
        f"""INSERT INTO item_votes (item_id, {", ".join(sides)})
            SELECT a.item_id, {sums}
            FROM judgements AS j JOIN assignments AS a ON a.id = j.assignment_id
            JOIN annotators AS who ON who.id = a.annotator_id
            WHERE j.undone_at IS NULL AND who.kind = 'person' GROUP BY a.item_id""",
    ]


def upgrade() -> None:
    op.create_table(
        "tallies",
        sa.Column("annotator_id", sa.Integer, nullable=False),
        sa.Column("day", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("batch", sa.Text, nullable=False),
        sa.Column("plain", sa.Boolean, nullable=False),
        sa.Column("done", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("annotator_id", "day", "kind", "batch", "plain", name="pk_tallies"),
        sa.ForeignKeyConstraint(["annotator_id"], ["annotators.id"], name="fk_tallies_annotator_id"),
    )
    op.create_table(
        "item_votes",
        sa.Column("item_id", sa.Integer, nullable=False),
        *(sa.Column(name, sa.Integer, nullable=False) for name in ("first", "second", "tie", "both_bad")),
        sa.PrimaryKeyConstraint("item_id", name="pk_item_votes"),
        sa.ForeignKeyConstraint(["item_id"], ["items.id"], name="fk_item_votes_item_id"),
    )
    op.create_index("ix_item_votes_differ", "item_votes", ["item_id"], sqlite_where=DIFFER, postgresql_where=DIFFER)
    op.create_index("ix_judgements_undone", "judgements", ["id"], sqlite_where=UNDONE, postgresql_where=UNDONE)
    op.create_index("ix_prompts_created", "prompts", [sa.text("created DESC"), "id"])
    for statement in fill(op.get_bind().dialect.name):
        op.execute(statement)
