"""Adding things in bulk: prompts, responses, items, annotators, guidelines. Each function
runs inside its caller's transaction, and adding the same thing twice adds it once, so that a step that was stopped can
be done again."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, TypeVar, get_args

from sqlalchemy import Column, Connection, Row, Table, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from keel.store.records import AnnotatorKind
from keel.store.removals import refresh_new
from keel.store.rows import checked_json, checked_text, messages_json, response_key, storable
from keel.store.tables import (
    annotators,
    event,
    events,
    guidelines,
    item_responses,
    items,
    prompts,
    responses,
)
from keel.types import Prompt, UserError

T = TypeVar("T")
CHUNK = 500  # values in one statement
KINDS = get_args(AnnotatorKind)
_DRAW = random.SystemRandom()


@dataclass(frozen=True, slots=True)
class NewResponse:
    prompt_id: str
    text: str
    finished: bool
    model: str
    fingerprint: str
    sampling: Mapping[str, Any] | None


def check_prompts(connection: Connection, new: Sequence[Prompt]) -> None:
    """UserError where ``add_prompts`` would raise it. Nothing is written."""
    for prompt in prompts_of(connection, rows := _prompt_rows(new, None)):
        if prompt.messages != rows[prompt.id]["messages"]:
            raise _other_messages(prompt.id)


def prompts_of(connection: Connection, ids: Collection[str]) -> Iterator[Row[Any]]:
    """Those that are there already."""
    return rows_of(connection, prompts, prompts.c.id, list(ids))


def _prompt_rows(new: Sequence[Prompt], now: datetime | None) -> dict[str, dict[str, Any]]:
    """By id. UserError where one can't be stored, or an id stands for two."""
    rows: dict[str, dict[str, Any]] = {}
    for prompt in new:
        place = f"prompt {prompt.id!r}"
        for text in (prompt.id, prompt.kind, *(message.content for message in prompt.messages)):
            checked_text(text, place)
        meta = checked_json(prompt.meta, f"meta of {place}")
        row = {"id": prompt.id, "messages": messages_json(prompt), "kind": prompt.kind, "meta": meta, "created": now}
        if rows.setdefault(prompt.id, row)["messages"] != row["messages"]:
            raise _other_messages(prompt.id)
    return rows


def add_prompts(connection: Connection, new: Sequence[Prompt], now: datetime) -> None:
    """See Store.add_prompts."""
    rows = _prompt_rows(new, now)
    known = {row.id: row for row in prompts_of(connection, rows)}
    insert_missing(connection, prompts, [row for id, row in rows.items() if id not in known])
    for id, old in known.items():
        row = rows[id]
        if old.messages != row["messages"]:
            raise _other_messages(id)
        changed = {name: row[name] for name in ("kind", "meta") if row[name] and row[name] != getattr(old, name)}
        if changed:
            connection.execute(update(prompts).where(prompts.c.id == id).values(**changed))
            was = {name: getattr(old, name) for name in changed}
            connection.execute(insert(events), event(now, "keel", "changed", "prompt", id, was, changed))


def add_responses(connection: Connection, new: Sequence[NewResponse], now: datetime) -> list[int]:
    """The responses' ids, in the order of ``new`` (Store.add_responses)."""
    keys = []
    rows = {}
    for reply in new:
        text = storable(reply.text)
        key = response_key(reply.prompt_id, text, reply.finished, reply.model, reply.fingerprint, reply.sampling)
        keys.append(key)
        rows[key] = {
            "prompt_id": reply.prompt_id,
            "text": text,
            "finished": reply.finished,
            "model": reply.model,
            "fingerprint": reply.fingerprint,
            "sampling": reply.sampling,
            "key": key,
            "created": now,
        }
    try:
        insert_missing(connection, responses, list(rows.values()))
    except IntegrityError as error:
        names = ", ".join(sorted({repr(reply.prompt_id) for reply in new})[:3])
        raise UserError(f"prompt {names} is not in the store; add the prompts before their responses") from error
    ids: dict[str, int] = {}
    for chunk in chunks(list(rows)):
        query = select(responses.c.key, responses.c.id).where(responses.c.key.in_(chunk))
        ids |= {row.key: row.id for row in connection.execute(query)}
    return [ids[key] for key in keys]


def add_items(
    connection: Connection, pairs: Sequence[tuple[int, int]], overlap: int, batch: str, now: datetime
) -> list[int]:
    """The items' ids, in the order of ``pairs`` (Store.add_comparisons)."""
    named = sorted({response for pair in pairs for response in pair})
    prompt_of = {row.id: row.prompt_id for row in rows_of(connection, responses, responses.c.id, named)}
    keys = []
    rows = {}
    for pair in pairs:
        first, second = sorted(pair)
        for response in pair:
            if response not in prompt_of:
                raise UserError(f"pair {pair}: response {response} is not in the store; add it first")
        if first == second or prompt_of[first] != prompt_of[second]:
            raise UserError(f"pair {pair}: a comparison needs two different responses of one prompt")
        key = f"{first}-{second}"
        keys.append(key)
        rows[key] = {
            "prompt_id": prompt_of[first],
            "batch": batch,
            "key": key,
            "overlap": overlap,
            "taken": 0,
            "created": now,
        }
    before = items_of(connection, batch, list(rows))
    fresh = [row for key, row in rows.items() if key not in before]
    insert_missing(connection, items, in_places(connection, batch, fresh))
    after = items_of(connection, batch, list(rows))
    members = [
        {"item_id": item.id, "response_id": int(response)}
        for key, item in after.items()
        if key not in before
        for response in key.split("-")
    ]
    insert_missing(connection, item_responses, members)
    refresh_new(connection, [item.id for key, item in after.items() if key not in before])
    if added := len(after) - len(before):
        new = {"items": added, "overlap": overlap}
        connection.execute(insert(events), event(now, "keel", "added", "batch", batch, None, new))
    for item in before.values():
        if item.overlap < overlap:
            connection.execute(update(items).where(items.c.id == item.id).values(overlap=overlap))
            log_overlap(connection, item, overlap, now)
    return [after[key].id for key in keys]


def log_overlap(connection: Connection, item: Row[Any], overlap: int, now: datetime) -> None:
    old, new = {"overlap": item.overlap}, {"overlap": overlap, "batch": item.batch}
    connection.execute(insert(events), event(now, "keel", "changed", "item", item.id, old, new))


def add_annotators(connection: Connection, kinds: Mapping[str, str], role: str, now: datetime) -> dict[str, int]:
    """Ids by name; ``kinds`` maps names to kinds (Store.add_annotator)."""
    for name, kind in kinds.items():
        if not name.strip() or kind not in KINDS:
            raise UserError(f"annotator {name!r} of kind {kind!r}: give a name, and one of {', '.join(KINDS)}")
    known = {row.name: row for row in rows_of(connection, annotators, annotators.c.name, list(kinds))}
    for row in known.values():
        if kinds[row.name] not in (row.kind, "unknown"):
            raise UserError(
                f"annotator {row.name!r} already exists, as {row.kind}; give the {kinds[row.name]} another name"
            )
    new = [
        {"name": name, "kind": kind, "role": role, "created": now} for name, kind in kinds.items() if name not in known
    ]
    insert_missing(connection, annotators, new)
    if new:
        log = [
            event(now, "keel", "added", "annotator", r["name"], None, {"kind": r["kind"], "role": role}) for r in new
        ]
        connection.execute(insert(events), log)
    return {row.name: row.id for row in rows_of(connection, annotators, annotators.c.name, list(kinds))}


def check_simulated(connection: Connection, annotator_id: int) -> None:
    """UserError unless this annotator is there and is a simulated one or a model."""
    kind = connection.execute(select(annotators.c.kind).where(annotators.c.id == annotator_id)).scalar_one_or_none()
    if kind is None:
        raise UserError(f"annotator {annotator_id} is not in the store; add the annotator first")
    if kind not in ("simulated", "model"):
        raise UserError(
            f"annotator {annotator_id} is no simulated one or model; only they may get sides that follow from a seed"
        )


def add_guideline(
    connection: Connection,
    version: str,
    text: str,
    now: datetime,
    aspects: Sequence[Mapping[str, str]] | None = None,
) -> None:
    """See Store.add_guideline."""
    if not version:
        raise UserError("the guideline's version is empty; give it a name such as '1'")
    given = None if aspects is None else [dict(aspect) for aspect in aspects]
    row = {"version": version, "text": text, "created": now, "aspects": given}
    insert_missing(connection, guidelines, [row])
    stored = connection.execute(select(guidelines).where(guidelines.c.version == version)).one()
    if text and (stored.text != text or (aspects is not None and stored.aspects != given)):
        raise UserError(f"guideline {version!r} already exists with another text; give the new text a new version")


def _other_messages(prompt_id: str) -> UserError:
    return UserError(f"prompt {prompt_id!r} already exists with other messages; give the new prompt an id of its own")


def in_places(connection: Connection, batch: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """New rows of a queue with their ``place``: after the queues that are older, among its own at random."""
    if not rows:
        return []
    place = connection.execute(select(items.c.place).where(items.c.batch == batch).limit(1)).scalar_one_or_none()
    if place is None:
        last = connection.execute(select(func.max(items.c.place))).scalar_one()
        place = 0.0 if last is None else last + 1
    return [row | {"place": math.floor(place) + _DRAW.random()} for row in rows]


def items_of(connection: Connection, batch: str, keys: list[str]) -> dict[str, Row[Any]]:
    found: dict[str, Row[Any]] = {}
    for chunk in chunks(keys):
        query = select(items).where(items.c.batch == batch, items.c.key.in_(chunk)).order_by(items.c.id)
        found |= {row.key: row for row in connection.execute(query)}
    return found


def rows_of(connection: Connection, table: Table, column: Column[Any], values: Sequence[Any]) -> Iterator[Row[Any]]:
    """The rows whose ``column`` is among ``values``, by that column's order in each chunk."""
    for chunk in chunks(values):
        yield from connection.execute(select(table).where(column.in_(chunk)).order_by(column)).all()


def insert_missing(connection: Connection, table: Table, rows: Sequence[dict[str, Any]]) -> None:
    """Insert ``rows`` in order; one that somebody else has just added is left as it is."""
    if rows:
        connection.execute(_insert_statement(connection.dialect.name, table), rows)


def insert_new(connection: Connection, table: Table, row: Mapping[str, Any]) -> int | None:
    """The new row's id; None when one of its kind was there, or has just been added by somebody else."""
    made = connection.execute(_insert_statement(connection.dialect.name, table).returning(table.c.id), row)
    id: int | None = made.scalar_one_or_none()
    return id


@cache
def _insert_statement(dialect: str, table: Table) -> postgresql.Insert | sqlite.Insert:
    new = postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)
    return new.on_conflict_do_nothing()


def chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), CHUNK):
        yield values[start : start + CHUNK]
