"""Thumbs on single responses as records and as files, out of a store and into it.

A row of a file is what KTO's trainers read (``prompt``, ``completion`` as message lists, ``label``), with Keel's own
columns beside it, so that nothing is lost on the way out and in again. Those that ``keel.store.exchange`` has too mean
the same; ``gold`` is ``up`` or ``down``, and ``completion_source`` what wrote the response. The functions on a
connection run inside their caller's transaction.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, insert

from keel.store import tallies
from keel.store.exchange import prompt_of, source_columns, source_of
from keel.store.given import some_at_a_time, texts_of, with_context
from keel.store.gold import set_gold
from keel.store.imports import Entry, as_new, assign, guideline_here, ids_here, take_slot
from keel.store.ingest import add_prompts, add_responses, rows_of
from keel.store.people_tables import thumbs
from keel.store.records import AnnotatorKind, Response, Thumb
from keel.store.removals import take_out
from keel.store.row_checks import SINGLE, check_row, reply_text
from keel.store.row_files import Type, arrow_table, from_json, rows_of_file, write_rows
from keel.store.rows import MARK, messages_json, storable
from keel.store.store import Store
from keel.store.tables import event, events, items
from keel.store.work import add_thumbs
from keel.types import LabelledCompletion, UserError

COLUMNS = (
    *("id", "prompt", "completion", "label", "finished", "annotator", "annotator_kind", "prompt_id", "kind", "meta"),
    *("seconds", "guideline", "reason", "created", "batch", "gold", "out", "completion_source"),
)
_JSON_COLUMNS = ("meta", "completion_source")
_ANSWERS = {True: "up", False: "down"}


def given(connection: Connection, batch: str | None, kinds: Collection[AnnotatorKind] | None = None) -> list[Thumb]:
    """Every thumb that stands, in the order they came; ``kinds``: of annotators of these kinds alone."""
    return [one for one in stream(connection, batch) if kinds is None or one.annotator_kind in kinds]


def stream(connection: Connection, batch: str | None) -> Iterator[Thumb]:
    """Every thumb that stands, in the order they came, read as they are asked for."""
    for rows in some_at_a_time(connection, with_context(thumbs, batch).add_columns(items.c.gold)):
        asked, replies = texts_of(connection, [row.shown[0] for row in rows], rows)
        for row in rows:
            yield Thumb(
                row.token, row.batch, row.name, row.annotator_kind, asked[row.prompt_id], replies[row.shown[0]], row.up,
                row.seconds, row.guideline, row.reason, row.created, None if row.gold is None else row.gold == "up",
                row.out,
            )  # fmt: skip


def add(connection: Connection, new: Sequence[Thumb], batch: str | None, now: datetime) -> int:
    """Add thumbs of another store, or of files; how many were new. One is known by its token."""
    called = ids_here(connection, thumbs, "thumb", [one.token for one in new])
    new = [replace(one, token=called[one.token]) for one in new]
    tokens = [one.token for one in new]
    there = {row.token for row in rows_of(connection, thumbs, thumbs.c.token, tokens)}
    known = {one.token: one for one in given(connection, None) if one.token in there} if there else {}
    first: dict[str, Thumb] = {}
    for one in new:
        if not one.token:
            raise UserError("a thumb without an id can't be imported; give it one")
        if not _same(known.get(one.token) or first.setdefault(one.token, one), one):
            raise UserError(f"the thumb {one.token!r} is there with other contents; give the new one another id")
    new = list({one.token: one for one in new if one.token not in known}.values())
    if not new:
        return 0
    add_prompts(connection, [one.prompt for one in new], now)
    versions = {version: guideline_here(connection, version, now) for version in {one.guideline for one in new}}
    shown = add_responses(connection, [as_new(one.response) for one in new], now)
    places = [one.batch if batch is None else batch for one in new]
    asked: dict[tuple[str, int], int] = {}  # (batch, response) -> item
    for place in dict.fromkeys(places):
        here = list(dict.fromkeys(id for id, at in zip(shown, places, strict=True) if at == place))
        ids = add_thumbs(connection, here, 1, place, now)
        asked |= {(place, id): item for id, item in zip(here, ids, strict=True)}
    entries = []
    for one, response, place in zip(new, shown, places, strict=True):
        take_slot(connection, asked[place, response], now)
        entries.append(Entry(asked[place, response], one.annotator, one.annotator_kind, [response], one.created))
    names, assigned = assign(connection, entries, now)
    for one, entry, name, place, assignment in zip(new, entries, names, places, assigned, strict=True):
        said = {"up": one.up, "reason": None if one.reason is None else storable(one.reason), "seconds": one.seconds}
        said |= {"guideline": versions[one.guideline], "token": one.token}
        row = said | {"assignment_id": assignment, "created": one.created}
        made = connection.execute(insert(thumbs), row).inserted_primary_key
        assert made is not None
        told = said | {"assignment": assignment, "item": entry.item, "shown": entry.shown, "batch": place}
        told |= {"created": one.created.isoformat()}
        log = event(now, name, "imported", "thumb", made.id, None, told, versions[one.guideline])
        connection.execute(insert(events), log)
    tallies.change_assignments(connection, assigned, 1)
    _make_gold(connection, {e.item: one.gold for e, one in zip(entries, new, strict=True) if one.gold is not None}, now)
    for item in sorted({entry.item for entry, one in zip(entries, new, strict=True) if one.out}):
        take_out(connection, "item", item, "", None, now)
    return len(new)


def _same(here: Thumb, one: Thumb) -> bool:
    """Whether two thumbs of one id are one. What a reply said that was erased here is not known any more."""
    said = here.prompt.id, here.response.text
    return here.up == one.up and (said[1] == MARK or said == (one.prompt.id, storable(one.response.text)))


def _make_gold(connection: Connection, answers: Mapping[int, bool], now: datetime) -> None:
    """Gold items elsewhere are gold items here, unless they have an answer here already."""
    for row in list(rows_of(connection, items, items.c.id, sorted(answers))):
        if row.gold is None:
            set_gold(connection, row.id, _ANSWERS[answers[row.id]], "keel", now)


def from_example(example: LabelledCompletion, annotator: str, now: datetime, time: int = 1) -> Thumb:
    """A labelled reply of somebody's file. ``annotator`` stands in for one who is not named; ``time``: how often the
    file has had this id, which several people's thumbs on one reply may share."""
    reply = Response(0, example.prompt.id, example.completion, example.finished, "", "", None, now)
    token = example.id if time == 1 else f"{example.id}#{time}"
    return Thumb(
        token, "import", example.annotator or annotator, "unknown", example.prompt, reply, example.label,
        None, None, None, now,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- files


def export(store: Store, path: Path, batch: str | None = None, plain: bool = False) -> int:
    """Write every thumb to ``path`` (as ``exchange.write`` does); how many rows. ``plain``: prompt, completion and
    label alone, without those on gold items and on what is out."""
    with store.moment() as connection:
        return write_rows(rows(connection, batch, plain), path, table)


def rows(connection: Connection, batch: str | None = None, plain: bool = False) -> Iterator[dict[str, Any]]:
    """What ``export`` writes."""
    for one in stream(connection, batch):
        if not plain:
            yield _row(one)
        elif one.examples():
            yield _own(one)


def read(path: str | Path) -> list[Thumb]:
    """The thumbs of a file that ``export`` made. UserError names the file and the row."""
    found = []
    for number, row in enumerate(rows_of_file(Path(path)), start=1):
        try:
            found.append(_thumb(row | from_json(row, _JSON_COLUMNS)))
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"{path}, row {number}: {type(error).__name__} {error}: no row of a Keel export of thumbs"
            ) from error
    return found


def _own(one: Thumb) -> dict[str, Any]:
    said = one.said()
    completion = [{"role": "assistant", "content": said.completion}]
    return {"prompt": messages_json(said.prompt), "completion": completion, "label": said.label}


def _row(one: Thumb) -> dict[str, Any]:
    row = {
        "id": one.token,
        **_own(one),
        "finished": one.response.finished,
        "annotator": one.annotator,
        "annotator_kind": one.annotator_kind,
        "prompt_id": one.prompt.id,
        "kind": one.prompt.kind,
        "meta": dict(one.prompt.meta),
        "seconds": one.seconds,
        "guideline": one.guideline,
        "reason": one.reason,
        "created": one.created.isoformat(),
        "batch": one.batch,
        "gold": None if one.gold is None else _ANSWERS[one.gold],
        "out": one.out,
        "completion_source": source_columns(one.response),
    }
    assert tuple(row) == COLUMNS
    return row


def _thumb(row: dict[str, Any]) -> Thumb:
    check_row(row, SINGLE)
    prompt = prompt_of(row)
    gold = {"up": True, "down": False, None: None}[row["gold"]]
    reply = source_of(row["completion_source"], prompt.id, reply_text(row["completion"]), row["finished"])
    return Thumb(
        row["id"], row["batch"], row["annotator"], row["annotator_kind"], prompt, reply, row["label"],
        row["seconds"], row["guideline"], row["reason"], datetime.fromisoformat(row["created"]), gold, row["out"],
    )  # fmt: skip


_TYPES: Mapping[str, Type] = {
    **dict.fromkeys(("prompt", "completion"), "messages"),
    **dict.fromkeys(("label", "finished", "out"), "bool"),
    "seconds": "number",
}


def table(rows: list[dict[str, Any]]) -> Any:
    return arrow_table(rows, COLUMNS, _JSON_COLUMNS, _TYPES)
