"""Handles and a drawn order, so that nothing an annotator sees can be computed; what was taken out of use; and the one
way to change the log: the erasure of personal data, which leaves a row of its own behind."""

import random
import secrets

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
STANDS = "undone_at IS NULL"
CHUNK = 5000

# An event may be changed while an erasure is open, in the columns that can hold a name or a text, and in no other.
SQLITE = [
    "DROP TRIGGER events_no_update",
    """CREATE TRIGGER events_no_update BEFORE UPDATE ON events
       WHEN NOT EXISTS (SELECT 1 FROM erasures WHERE open) OR NEW.id <> OLD.id OR NEW.at <> OLD.at
         OR NEW.action <> OLD.action OR NEW.entity <> OLD.entity OR NEW.guideline IS NOT OLD.guideline
       BEGIN SELECT RAISE(ABORT, 'events are append-only'); END""",
    """CREATE TRIGGER erasures_no_update BEFORE UPDATE ON erasures
       WHEN NOT OLD.open OR NEW.open OR NEW.id <> OLD.id OR NEW.at <> OLD.at OR NEW.what <> OLD.what
       BEGIN SELECT RAISE(ABORT, 'erasures are append-only'); END""",
    """CREATE TRIGGER erasures_no_delete BEFORE DELETE ON erasures
       BEGIN SELECT RAISE(ABORT, 'erasures are append-only'); END""",
    """CREATE TRIGGER erasures_no_replace BEFORE INSERT ON erasures
       WHEN EXISTS (SELECT 1 FROM erasures WHERE id = NEW.id)
       BEGIN SELECT RAISE(ABORT, 'erasures are append-only'); END""",
]
POSTGRESQL = [
    """CREATE OR REPLACE FUNCTION keel_append_only() RETURNS trigger LANGUAGE plpgsql AS
       $$ BEGIN
         IF TG_OP = 'UPDATE' AND EXISTS (SELECT 1 FROM erasures WHERE open) THEN
           IF NEW.id = OLD.id AND NEW.at = OLD.at AND NEW.action = OLD.action AND NEW.entity = OLD.entity
             AND NEW.guideline IS NOT DISTINCT FROM OLD.guideline THEN RETURN NEW; END IF;
         END IF;
         RAISE EXCEPTION 'events are append-only';
       END $$""",
    """CREATE FUNCTION keel_erasures_append_only() RETURNS trigger LANGUAGE plpgsql AS
       $$ BEGIN
         IF TG_OP = 'UPDATE' THEN
           IF OLD.open AND NOT NEW.open AND NEW.id = OLD.id AND NEW.at = OLD.at AND NEW.what = OLD.what
             THEN RETURN NEW; END IF;
         END IF;
         RAISE EXCEPTION 'erasures are append-only';
       END $$""",
    """CREATE TRIGGER erasures_no_change BEFORE UPDATE OR DELETE ON erasures
       FOR EACH ROW EXECUTE FUNCTION keel_erasures_append_only()""",
    """CREATE TRIGGER erasures_no_truncate BEFORE TRUNCATE ON erasures
       FOR EACH STATEMENT EXECUTE FUNCTION keel_erasures_append_only()""",
]


def upgrade() -> None:
    _handles("assignments")
    _handles("conversations")
    op.add_column("items", sa.Column("place", sa.Float, nullable=False, server_default="0"))
    op.add_column("items", sa.Column("out", sa.Boolean, nullable=False, server_default=sa.false()))
    _places()
    _index("ix_items_place", "items", ["kind", "turn", "place"], "taken < overlap")
    _index("ix_items_gold", "items", ["kind", "id"], "gold IS NOT NULL")
    _removals()
    op.create_table(
        "erasures",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("what", sa.Text, nullable=False),
        sa.Column("open", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_erasures"),
    )
    for statement in SQLITE if op.get_bind().dialect.name == "sqlite" else POSTGRESQL:
        op.execute(statement)


def _handles(table: str) -> None:
    op.add_column(table, sa.Column("handle", sa.Text))  # SQLite adds no column that must have a value
    rows = sa.table(table, sa.column("id"), sa.column("handle"))
    change = sa.update(rows).where(rows.c.id == sa.bindparam("row")).values(handle=sa.bindparam("new"))
    ids = op.get_bind().execute(sa.select(rows.c.id)).scalars().all()
    for start in range(0, len(ids), CHUNK):
        some = [{"row": id, "new": secrets.token_urlsafe(16)} for id in ids[start : start + CHUNK]]
        op.get_bind().execute(change, some)
    op.create_index(f"uq_{table}_handle", table, ["handle"], unique=True)


def _places() -> None:
    """Queues one after the other, as they were made; the items of each in an order drawn at random."""
    items = sa.table("items", sa.column("id"), sa.column("batch"), sa.column("place"))
    change = sa.update(items).where(items.c.id == sa.bindparam("row")).values(place=sa.bindparam("new"))
    number: dict[str, int] = {}
    draw = random.SystemRandom()
    found = op.get_bind().execute(sa.select(items.c.id, items.c.batch).order_by(items.c.id)).all()
    for start in range(0, len(found), CHUNK):
        some = [
            {"row": row.id, "new": number.setdefault(row.batch, len(number)) + draw.random()}
            for row in found[start : start + CHUNK]
        ]
        op.get_bind().execute(change, some)


def _removals() -> None:
    op.create_table(
        "removals",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("item_id", sa.Integer),
        sa.Column("response_id", sa.Integer),
        sa.Column("prompt_id", sa.Text),
        sa.Column("annotator_id", sa.Integer),
        sa.Column("reason", sa.Text),
        sa.Column("erased", sa.Boolean, nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("undone_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_removals"),
        sa.ForeignKeyConstraint(["item_id"], ["items.id"], name="fk_removals_item_id"),
        sa.ForeignKeyConstraint(["response_id"], ["responses.id"], name="fk_removals_response_id"),
        sa.ForeignKeyConstraint(["prompt_id"], ["prompts.id"], name="fk_removals_prompt_id"),
        sa.ForeignKeyConstraint(["annotator_id"], ["annotators.id"], name="fk_removals_annotator_id"),
        sa.CheckConstraint(
            "(item_id IS NOT NULL AND response_id IS NULL AND prompt_id IS NULL)"
            " OR (item_id IS NULL AND response_id IS NOT NULL AND prompt_id IS NULL)"
            " OR (item_id IS NULL AND response_id IS NULL AND prompt_id IS NOT NULL)",
            name=op.f("ck_removals_one"),
        ),
    )
    for name in ("item", "response", "prompt"):
        _index(f"ix_removals_{name}", "removals", [f"{name}_id"], STANDS, unique=True)


def _index(name: str, table: str, columns: list[str], where: str, unique: bool = False) -> None:
    clause = sa.text(where)
    op.create_index(name, table, columns, unique=unique, sqlite_where=clause, postgresql_where=clause)
