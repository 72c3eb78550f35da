"""Every piece of work by its token, which is the id of its training records: what leads from a model back to the
judgements that shaped it. Each function runs inside its caller's transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select

from keel.store.ai_labels import labelled
from keel.store.records import AnnotatorKind, WorkKind
from keel.store.review import last_words
from keel.store.sides import preferred
from keel.store.standing import done
from keel.store.step_records import REASONS
from keel.store.tables import annotators, assignments, guidelines, items, prompts, responses
from keel.store.tallies import TABLES


@dataclass(frozen=True, slots=True)
class Work:
    """One judgement, ranking, thumb, step judgement, demonstration or edit; ``undone``: when it was taken back, None
    while it stands. ``gold``: on a gold item, so never trained on. ``batch``: the queue that it was given in."""

    token: str
    kind: WorkKind
    item_id: int
    annotator: str
    annotator_kind: AnnotatorKind
    guideline: str | None
    created: datetime
    undone: datetime | None
    gold: bool
    batch: str = ""


def works(connection: Connection) -> dict[str, Work]:
    """All of them by token, those taken back too."""
    found = {}
    for table in TABLES:
        query = (
            done(table, table.c.token, table.c.guideline, table.c.created, table.c.undone_at, assignments.c.item_id)
            .add_columns(items.c.kind, items.c.gold, items.c.batch)
            .add_columns(annotators.c.name, annotators.c.kind.label("annotator_kind"))
            .order_by(table.c.id)
        )
        for row in connection.execute(query):
            found[row.token] = Work(
                row.token, row.kind, row.item_id, row.name, row.annotator_kind, row.guideline, row.created,
                row.undone_at, row.gold is not None, row.batch,
            )  # fmt: skip
    return found


def guideline_dates(connection: Connection) -> dict[str, datetime]:
    """When each version of the guideline was made."""
    return {row.version: row.created for row in connection.execute(select(guidelines.c.version, guidelines.c.created))}


def texts(connection: Connection, chosen: Sequence[Work]) -> list[dict[str, Any]]:
    """Each piece of work with all that a reviewer reads of it: ``work``, ``messages``, ``replies`` (dicts of ``text``
    and ``note``: best first for a ranking; what was written, then what was edited), ``said``, ``reason``, ``word`` (a
    reviewer's last word on the item, or None), ``why`` (whether it is told what a model was asked for it)."""
    rows: dict[str, Any] = {}
    tokens = [work.token for work in chosen]
    for table in TABLES:
        query = (
            done(table, table, assignments.c.shown, prompts.c.messages)
            .join(prompts, prompts.c.id == items.c.prompt_id)
            .where(table.c.token.in_(tokens))
        )
        rows |= {row["token"]: row for row in connection.execute(query).mappings()}
    ids = {id for row in rows.values() for id in row["shown"]}
    query = select(responses.c.id, responses.c.text).where(responses.c.id.in_(ids))
    text = {row.id: row.text for row in connection.execute(query)}
    words, why = last_words(connection), labelled(connection, tokens)
    return [
        {"work": work, "messages": rows[work.token]["messages"], "reason": rows[work.token].get("reason")}
        | {"why": work.token in why, "word": words.get(work.item_id), **_said(work.kind, rows[work.token], text)}
        for work in chosen
    ]


def thumb_word(up: bool) -> str:
    """As people read it."""
    return "thumbs up" if up else "thumbs down"


def outcome_words(row: Mapping[str, Any]) -> str:
    """What a row of step labels comes to, as people read it."""
    if row["outcome"] == "found_error":
        return f"step {row['labels'].index('bad') + 1} is the first bad one"
    return {"solution": "no bad step", "give_up": "given up", "bad_problem": "bad problem"}[row["outcome"]]


def _said(kind: WorkKind, row: Any, text: dict[int, str]) -> dict[str, Any]:
    if kind == "compare":
        order = sorted(row["shown"])
        better = preferred(row["choice"], row["shown"])
        replies = [{"text": text[id], "note": "preferred" if id == better else ""} for id in order]
        strength = {1: "slightly better", 2: "better", 3: "much better"}.get(row["strength"] or 0, "")
        return {"replies": replies, "said": {"tie": "tie", "both_bad": "both bad"}.get(row["choice"], strength)}
    if kind == "rank":
        placed = [{"text": text[id], "note": f"place {n}"} for n, tier in enumerate(row["tiers"], 1) for id in tier]
        return {"replies": placed, "said": f"ranked {len(placed)}"}
    if kind == "thumb":
        return {"replies": [{"text": text[id], "note": ""} for id in row["shown"]], "said": thumb_word(row["up"])}
    if kind == "step":
        judged = [{"text": text[id], "note": ""} for id in row["shown"]]
        instead = [{"text": row["correction"], "note": "in the bad step’s place"}] if row["correction"] else []
        why = [*(REASONS[reason] for reason in row["reasons"]), *([row["note"]] if row["note"] else [])]
        return {"replies": judged + instead, "said": outcome_words(row), "reason": "; ".join(why) or None}
    written = [{"text": row["text"], "note": "written"}]
    edited = [{"text": text[row["original_id"]], "note": "before"}] if row["original_id"] else []
    return {"replies": written + edited, "said": ""}
