"""What is counted in a store beside the rows themselves, and the rows counted again."""

from __future__ import annotations

from typing import Any

from sqlalchemy import text

from keel.store import Store
from keel.store.people_tables import item_votes, tallies

_SHOWN = {"sqlite": "json_extract(a.shown, '$[{}]')", "postgresql": "(a.shown->>{})::int"}
_DAY = {"sqlite": "substr(w.created, 1, 10)", "postgresql": "to_char(w.created at time zone 'utc', 'YYYY-MM-DD')"}


def recounted(store: Store) -> tuple[dict[Any, int], dict[int, list[int]]]:
    """What stands, counted from the rows themselves, one by one."""
    done: dict[Any, int] = {}
    said: dict[int, list[int]] = {}
    with store.transaction(writes=False) as connection:
        kind = connection.dialect.name
        for table in ("judgements", "rankings", "thumbs", "step_labels", "writings"):
            choice = "w.choice" if table == "judgements" else "NULL"
            rows = connection.execute(
                text(
                    f"SELECT a.annotator_id, {_DAY[kind]}, i.kind, i.batch, i.gold, i.out, i.id, p.kind, {choice}, "
                    f"{_SHOWN[kind].format(0)}, {_SHOWN[kind].format(1)} FROM {table} w "
                    "JOIN assignments a ON a.id = w.assignment_id JOIN items i ON i.id = a.item_id "
                    "JOIN annotators p ON p.id = a.annotator_id WHERE w.undone_at IS NULL"
                )
            )
            for who, day, work, batch, gold, out, item, by, vote, left, right in rows:
                place = (who, day, work, batch, gold is None and not out)
                done[place] = done.get(place, 0) + 1
                if table == "judgements" and by == "person":
                    first = {"left": left < right, "right": right < left}.get(vote)
                    column = {"tie": 2, "both_bad": 3}.get(vote, 0 if first else 1)
                    said.setdefault(item, [0, 0, 0, 0])[column] += 1
    return done, said


def kept(store: Store) -> tuple[dict[Any, int], dict[int, list[int]]]:
    with store.transaction(writes=False) as connection:
        done = {(r.annotator_id, r.day, r.kind, r.batch, r.plain): r.done for r in connection.execute(tallies.select())}
        said = {row.item_id: list(row[1:]) for row in connection.execute(item_votes.select())}
    return {place: n for place, n in done.items() if n}, {item: votes for item, votes in said.items() if any(votes)}
