"""What people gave as records, out of a store; rankings and edits from another one into it. Each function runs inside
its caller's transaction."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, Table, insert, select

from keel.store import tallies
from keel.store.imports import Entry, as_new, assign, guideline_here, ids_here, take_slot, tells_apart
from keel.store.ingest import add_prompts, add_responses, rows_of
from keel.store.people_tables import adjudications, rankings, writings
from keel.store.records import Edit, Judgement, Ranking, Response
from keel.store.removals import take_out
from keel.store.review import last_words, ratings
from keel.store.rows import prompt_record, response_record, storable
from keel.store.settled import words
from keel.store.sides import SIDES, on_screen
from keel.store.standing import standing
from keel.store.tables import annotators, assignments, event, events, items, judgements, prompts, responses
from keel.store.work import add_edits, add_rankings
from keel.types import Preference, Prompt, UserError

_READ = 500  # rows


def all_given(
    connection: Connection, batch: str | None, which: ColumnElement[bool] | None = None
) -> Iterator[Judgement | Ranking | Edit]:
    """Every raw vote, then every ranking, then every edit that stands, each in the order they came and read as they are
    asked for: a million take the memory of some hundred. ``which``: on these items alone."""
    yield from judgements_given(connection, batch, which)
    yield from rankings_given(connection, batch, which)
    yield from edits_given(connection, batch, which)


def settled_pairs(connection: Connection, batch: str | None) -> dict[Hashable, Preference]:
    """The records of the items that reviewers settled (`keel.store.settled`)."""
    said = select(items.c.prompt_id).join(adjudications, adjudications.c.item_id == items.c.id)
    which = items.c.prompt_id.in_(said.where(adjudications.c.undone_at.is_(None)))
    return words(pair for one in all_given(connection, batch, which) for pair in one.preferences())


def judgements_given(
    connection: Connection, batch: str | None, which: ColumnElement[bool] | None = None
) -> Iterator[Judgement]:
    """Every raw vote that stands, in the order they came."""
    settled = last_words(connection)
    query = with_context(judgements, batch, which).add_columns(items.c.gold)
    for rows in some_at_a_time(connection, query):
        rated = ratings(connection, [row.id for row in rows])
        asked, replies = texts_of(connection, [id for row in rows for id in row.shown], rows)
        for row in rows:
            word = settled.get(row.item_id)
            yield Judgement(
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
                settled=on_screen(word.choice, row.shown) if word else None,
                settled_by=word.by if word else None,
                settled_reason=word.reason if word else None,
                settled_at=word.created if word else None,
                gold=None if row.gold is None else on_screen(row.gold, row.shown),
                ratings={
                    side: rated[row.id][response]
                    for side, response in zip(SIDES, row.shown, strict=True)
                    if response in rated.get(row.id, ())
                },
                out=row.out,
                probability=row.probability,
            )


def rankings_given(
    connection: Connection, batch: str | None, which: ColumnElement[bool] | None = None
) -> Iterator[Ranking]:
    """Every ranking that stands, in the order they came."""
    for rows in some_at_a_time(connection, with_context(rankings, batch, which)):
        asked, replies = texts_of(connection, [id for row in rows for id in row.shown], rows)
        for row in rows:
            yield Ranking(
                row.token, row.batch, row.name, row.annotator_kind, asked[row.prompt_id],
                tuple(replies[id] for id in row.shown),
                tuple(tuple(row.shown.index(id) for id in tier) for tier in row.tiers),
                row.seconds, row.guideline, row.reason, row.created, row.out,
            )  # fmt: skip


def edits_given(connection: Connection, batch: str | None, which: ColumnElement[bool] | None = None) -> Iterator[Edit]:
    """Every edit that stands, in the order they came."""
    query = with_context(writings, batch, which).where(writings.c.original_id.is_not(None))
    for rows in some_at_a_time(connection, query):
        asked, replies = texts_of(connection, [row.original_id for row in rows], rows)
        for row in rows:
            yield Edit(
                row.token, row.batch, row.name, row.annotator_kind, asked[row.prompt_id], replies[row.original_id],
                row.text, row.seconds, row.guideline, row.created, row.out,
            )  # fmt: skip


def some_at_a_time(connection: Connection, query: Select[Any]) -> Iterator[Sequence[Row[Any]]]:
    """The query's rows, some hundred in memory at once."""
    return connection.execute(query, execution_options={"yield_per": _READ}).partitions()


def with_context(table: Table, batch: str | None, which: ColumnElement[bool] | None = None) -> Select[Any]:
    """All that stands in a table of work, in the order it came, with whose it is and on what."""
    query = standing(
        table, table, assignments.c.item_id, assignments.c.shown, items.c.prompt_id, items.c.batch, items.c.out,
        annotators.c.name, annotators.c.kind.label("annotator_kind"),
    ).order_by(table.c.id)  # fmt: skip
    query = query if which is None else query.where(which)
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
