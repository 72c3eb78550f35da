"""What people gave as records, out of a store; rankings and edits from another one into it. Each function runs inside
its caller's transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, Select, Table, insert, select

from keel.store import tallies
from keel.store.imports import Entry, as_new, assign, guideline_here, ids_here, take_slot, tells_apart
from keel.store.ingest import add_prompts, add_responses, rows_of
from keel.store.people_tables import rankings, writings
from keel.store.records import Edit, Judgement, Ranking, Response
from keel.store.removals import take_out
from keel.store.review import last_words, ratings
from keel.store.rows import prompt_record, response_record, storable
from keel.store.sides import SIDES, on_screen
from keel.store.standing import standing
from keel.store.tables import annotators, assignments, event, events, items, judgements, prompts, responses
from keel.store.work import add_edits, add_rankings
from keel.types import Prompt, UserError


def judgements_given(connection: Connection, batch: str | None) -> list[Judgement]:
    """Every raw vote that stands, in the order they came."""
    rows = connection.execute(with_context(judgements, batch).add_columns(items.c.gold)).all()
    settled = last_words(connection)
    rated = ratings(connection)
    asked = {row.id: prompt_record(row) for row in connection.execute(select(prompts))}
    replies = {row.id: response_record(row) for row in connection.execute(select(responses))}
    return [
        Judgement(
            token=row.token,
            batch=row.batch,
            item_id=row.item_id,
            annotator=row.name,
            annotator_kind=row.annotator_kind,
            prompt=asked[row.prompt_id],
            left=replies[row.shown[0]],
            right=replies[row.shown[1]],
            choice=row.choice,
            strength=row.strength,
            seconds=row.seconds,
            guideline=row.guideline,
            reason=row.reason,
            created=row.created,
            settled=on_screen(settled[row.item_id].choice, row.shown) if row.item_id in settled else None,
            settled_by=settled[row.item_id].by if row.item_id in settled else None,
            settled_reason=settled[row.item_id].reason if row.item_id in settled else None,
            settled_at=settled[row.item_id].created if row.item_id in settled else None,
            gold=None if row.gold is None else on_screen(row.gold, row.shown),
            ratings={
                side: rated[row.id][response]
                for side, response in zip(SIDES, row.shown, strict=True)
                if response in rated.get(row.id, ())
            },
            out=row.out,
            probability=row.probability,
        )
        for row in rows
    ]


def rankings_given(connection: Connection, batch: str | None) -> list[Ranking]:
    """Every ranking that stands, in the order they came."""
    rows = connection.execute(with_context(rankings, batch)).all()
    asked, replies = texts_of(connection, [id for row in rows for id in row.shown], rows)
    return [
        Ranking(
            row.token, row.batch, row.name, row.annotator_kind, asked[row.prompt_id],
            tuple(replies[id] for id in row.shown),
            tuple(tuple(row.shown.index(id) for id in tier) for tier in row.tiers),
            row.seconds, row.guideline, row.reason, row.created, row.out,
        )
        for row in rows
    ]  # fmt: skip


def edits_given(connection: Connection, batch: str | None) -> list[Edit]:
    """Every edit that stands, in the order they came."""
    rows = connection.execute(with_context(writings, batch).where(writings.c.original_id.is_not(None))).all()
    asked, replies = texts_of(connection, [row.original_id for row in rows], rows)
    return [
        Edit(
            row.token, row.batch, row.name, row.annotator_kind, asked[row.prompt_id], replies[row.original_id],
            row.text, row.seconds, row.guideline, row.created, row.out,
        )
        for row in rows
    ]  # fmt: skip


def with_context(table: Table, batch: str | None) -> Select[Any]:
    """All that stands in a table of work, in the order it came, with whose it is and on what."""
    query = standing(
        table, table, assignments.c.item_id, assignments.c.shown, items.c.prompt_id, items.c.batch, items.c.out,
        annotators.c.name, annotators.c.kind.label("annotator_kind"),
    ).order_by(table.c.id)  # fmt: skip
    return query if batch is None else query.where(items.c.batch == batch)


def texts_of(
    connection: Connection, ids: Sequence[int], rows: Sequence[Row[Any]]
) -> tuple[Mapping[str, Prompt], Mapping[int, Response]]:
    """The prompts of ``rows`` and the responses of these ids."""
    named = sorted({row.prompt_id for row in rows})
    asked = {row.id: prompt_record(row) for row in rows_of(connection, prompts, prompts.c.id, named)}
    found = rows_of(connection, responses, responses.c.id, sorted(set(ids)))
    return asked, {row.id: response_record(row) for row in found}


# ------------------------------------------------------------------------------------------------------------------ in


def add_given(connection: Connection, given: Sequence[Ranking | Edit], batch: str | None, now: datetime) -> int:
    """Add rankings and edits of another store; how many were new. One is known by its token."""
    for into, entity, kind in ((rankings, "ranking", Ranking), (writings, "writing", Edit)):
        called = ids_here(connection, into, entity, [one.token for one in given if isinstance(one, kind)])
        given = [replace(one, token=called[one.token]) if isinstance(one, kind) else one for one in given]
    given = [one for one in given if isinstance(one, Edit) or tells_apart(one.shown)]
    known: dict[str, Any] = {}
    for table in (rankings, writings):
        tokens = [one.token for one in given]
        known |= {row.token: row for row in rows_of(connection, table, table.c.token, tokens)}
    new = [one for one in given if one.token not in known]
    for one in given:
        if isinstance(one, Edit) and one.token in known and known[one.token].text != storable(one.text):
            raise UserError(f"the edit {one.token!r} is in the store with another text; give the new one another id")
    if not new:
        return 0
    add_prompts(connection, [one.prompt for one in new], now)
    versions = {version: guideline_here(connection, version, now) for version in {one.guideline for one in new}}
    shown, entries = [], []
    for one in new:
        replies = one.shown if isinstance(one, Ranking) else (one.original,)
        ids = add_responses(connection, [as_new(reply) for reply in replies], now)
        item = _item(connection, one, ids, one.batch if batch is None else batch, now)
        shown.append(ids)
        entries.append(Entry(item, one.annotator, one.annotator_kind, ids, one.created))
    names, assigned = assign(connection, entries, now)
    outs = []
    for one, ids, entry, name, assignment in zip(new, shown, entries, names, assigned, strict=True):
        said: dict[str, Any] = {"seconds": one.seconds, "guideline": versions[one.guideline]}
        if isinstance(one, Ranking):
            table, entity = rankings, "ranking"
            reason = None if one.reason is None else storable(one.reason)
            said |= {"tiers": [[ids[place] for place in tier] for tier in one.tiers], "reason": reason}
        else:
            table, entity = writings, "writing"
            said |= {"text": storable(one.text), "original_id": ids[0]}
        row = said | {"assignment_id": assignment, "token": one.token, "created": one.created}
        made = connection.execute(insert(table), row).inserted_primary_key
        assert made is not None
        told = said | {"token": one.token, "assignment": assignment, "item": entry.item, "shown": ids}
        told |= {"batch": one.batch if batch is None else batch, "created": one.created.isoformat()}
        connection.execute(insert(events), event(now, name, "imported", entity, made.id, None, told, said["guideline"]))
        outs += [entry.item] if one.out else []
    tallies.change_assignments(connection, assigned, 1)
    for item in outs:
        take_out(connection, "item", item, "", None, now)
    return len(new)


def _item(connection: Connection, one: Ranking | Edit, ids: list[int], batch: str, now: datetime) -> int:
    """The item that was ranked or edited, with a slot for this one, which is taken."""
    if isinstance(one, Ranking):
        (id,) = add_rankings(connection, [ids], 1, batch, now)
    else:
        (id,) = add_edits(connection, ids, 1, batch, now)
    take_slot(connection, id, now)
    return id
