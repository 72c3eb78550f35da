"""Labels on steps as files, out of a store and into it.

A row is what process reward models are trained on (``prompt`` as a message list, ``completions``, ``labels``), with
Keel's own columns beside it, so that nothing is lost on the way out and in again. ``labels`` is what training takes: in
[0, 1] or null, all null where nothing is taken (gold items, what is out, bad problems); ``marks`` is what was said.
``steps`` is how the reply was cut; the other columns mean what they do in `keel.store.thumbs`. Replies whose text was
erased have no row: nothing is left that a label could be on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from sqlalchemy import Connection, insert, select

from keel.recipe.steps import Steps
from keel.store import tallies
from keel.store.exchange import prompt_of, source_columns, source_of
from keel.store.gold import set_gold
from keel.store.imports import Entry, as_new, assign, guideline_here, ids_here, take_slot
from keel.store.ingest import add_prompts, add_responses, chunks, rows_of
from keel.store.people_tables import step_items, step_labels
from keel.store.removals import take_out
from keel.store.row_checks import EVERY, Kinds, check_row
from keel.store.row_files import Type, arrow_table, from_json, rows_of_file
from keel.store.row_files import write_rows as write_file
from keel.store.rows import MARK, messages_json, storable
from keel.store.standing import done
from keel.store.step_records import Drawn, NewSteps, StepJudgement
from keel.store.steps import add_steps, named, stream, values_of
from keel.store.store import Store
from keel.store.tables import event, events, item_responses, items, responses
from keel.types import StepLabels, UserError

COLUMNS = (
    *("id", "prompt", "completions", "labels", "finished", "annotator", "annotator_kind", "prompt_id", "kind", "meta"),
    *("marks", "outcome", "reasons", "correction", "note", "reference_shown", "step_seconds", "seconds", "guideline"),
    *("created", "batch", "drawn", "gold", "out", "steps", "completion_source"),
)
_JSON_COLUMNS = ("meta", "completions", "labels", "marks", "reasons", "step_seconds", "steps", "completion_source")
_ROW: Kinds = {
    **{name: kind for name, kind in EVERY.items() if name != "reason"},
    **dict.fromkeys(("finished", "out", "reference_shown"), bool),
    **dict.fromkeys(("completions", "marks", "reasons", "step_seconds"), list),
    **dict.fromkeys(("correction", "note", "gold"), (str, type(None))),
    **dict.fromkeys(("outcome", "drawn"), str),
    "steps": dict,
}


def export(store: Store, path: Path, batch: str | None = None, plain: bool = False) -> int:
    """Write every judgement of steps to ``path`` (as `keel.store.exchange.write` does); how many rows. ``plain``: what
    training takes of them and no more: prompt, completions and labels, and whether the reply ended, with the lines that
    people wrote in the place of bad steps as rows of their own."""
    with store.moment() as connection:
        return write_file(rows(connection, batch, plain), path, table)


def rows(connection: Connection, batch: str | None = None, plain: bool = False) -> Iterator[dict[str, Any]]:
    """What ``export`` writes."""
    for judged in stream(connection, batch):
        if plain:
            yield from (_own(one) for one in judged.examples())
        else:
            yield _row(judged)


def read(path: str | Path) -> list[StepJudgement]:
    """The judgements of a file that ``export`` made. UserError names the file and the row."""
    found = []
    for number, row in enumerate(rows_of_file(Path(path)), start=1):
        try:
            found.append(_judgement(row | from_json(row, _JSON_COLUMNS)))
        except (AttributeError, KeyError, TypeError, ValueError, IndexError, UserError) as error:
            what = str(error) if isinstance(error, UserError) else f"{type(error).__name__} {error}"
            raise UserError(f"{path}, row {number}: {what}: no row of a Keel export of step labels") from error
    return found


def _own(one: StepLabels) -> dict[str, Any]:
    prompt = messages_json(one.prompt)
    own = {"id": one.id, "prompt": prompt, "completions": list(one.steps), "labels": list(one.labels)}
    return own | {"finished": one.finished}  # a written line ends no reply, and its label is no answer's


def _row(one: StepJudgement) -> dict[str, Any]:
    row = {
        "id": one.token,
        "prompt": messages_json(one.prompt),
        "completions": list(one.steps),
        "labels": list(one.numbers()) if one.learned else [None for _ in one.labels],
        "finished": one.response.finished,
        "annotator": one.annotator,
        "annotator_kind": one.annotator_kind,
        "prompt_id": one.prompt.id,
        "kind": one.prompt.kind,
        "meta": dict(one.prompt.meta),
        "marks": list(one.labels),
        "outcome": one.outcome,
        "reasons": list(one.reasons),
        "correction": one.correction,
        "note": one.note,
        "reference_shown": one.reference_shown,
        "step_seconds": list(one.step_seconds),
        "seconds": one.seconds,
        "guideline": one.guideline,
        "created": one.created.isoformat(),
        "batch": one.batch,
        "drawn": one.drawn,
        "gold": one.gold,
        "out": one.out,
        "steps": one.split.model_dump(),
        "completion_source": source_columns(one.response),
    }
    assert tuple(row) == COLUMNS
    return row


def _judgement(row: dict[str, Any]) -> StepJudgement:
    check_row(row, _ROW)
    try:
        split = Steps.model_validate(row["steps"])
    except ValidationError as error:
        raise ValueError(f"steps {row['steps']}") from error
    parts, marks = tuple(row["completions"]), row["marks"]
    if not all(isinstance(part, str) for part in parts) or split.split("".join(parts)) != parts:
        raise ValueError(f"completions are no steps by {split.by}")
    if len(marks) != len(parts):
        raise ValueError(f"{len(marks)} marks for {len(parts)} completions")
    if row["drawn"] not in get_args(Drawn):
        raise ValueError(f"drawn {row['drawn']!r}")
    said = new_steps(row, row["id"])  # UserError for what does not go together
    prompt = prompt_of(row)
    reply = source_of(row["completion_source"], prompt.id, "".join(parts), row["finished"])
    return StepJudgement(
        row["id"], row["batch"], row["annotator"], row["annotator_kind"], prompt, reply, split, tuple(said.labels),
        said.outcome, tuple(said.reasons), said.correction, said.note, said.reference_shown, said.seconds,
        tuple(said.step_seconds), row["guideline"], datetime.fromisoformat(row["created"]), row["drawn"], row["gold"],
        row["out"],
    )  # fmt: skip


def new_steps(row: Mapping[str, Any], token: str) -> NewSteps:
    """What a row says, checked."""
    return NewSteps(
        row["marks"], row["outcome"], row["reasons"], row["correction"], row["note"], row["reference_shown"],
        row["step_seconds"], token=token, seconds=row["seconds"], guideline=row["guideline"],
    )  # fmt: skip


def add(connection: Connection, new: Sequence[StepJudgement], batch: str | None, now: datetime) -> int:
    """Add judgements of another store; how many were new. One is known by its token."""
    called = ids_here(connection, step_labels, "steps", [one.token for one in new])
    fresh: dict[str, StepJudgement] = {}
    there = _there(connection, list(called.values()))
    for one in (replace(one, token=called[one.token]) for one in new):
        here = there.get(one.token)
        if fresh.get(one.token, one) != one or (here is not None and not _same(here, one)):
            raise UserError(
                f"the step labels {one.token!r} are there with other contents; give the new ones another id"
            )
        if here is None:
            fresh[one.token] = one
    new = list(fresh.values())
    if not new:
        return 0
    add_prompts(connection, [one.prompt for one in new], now)
    versions = {version: guideline_here(connection, version, now) for version in {one.guideline for one in new}}
    shown = add_responses(connection, [as_new(one.response) for one in new], now)
    entries, places = [], []
    for one, response in zip(new, shown, strict=True):
        ranked = {response} if one.drawn == "ranked" else None
        place = _queue(connection, response, one, one.batch if batch is None else batch)
        (item,) = add_steps(connection, [response], one.split, 1, place, now, ranked)
        take_slot(connection, item, now)
        places.append(place)
        entries.append(Entry(item, one.annotator, one.annotator_kind, [response], one.created))
    names, assigned = assign(connection, entries, now)
    for one, entry, place, name, assignment in zip(new, entries, places, names, assigned, strict=True):
        said = values_of(new_steps(_row(one), one.token)) | {"seconds": one.seconds, "token": one.token}
        said |= {"guideline": versions[one.guideline]}
        row = said | {"assignment_id": assignment, "created": one.created}
        made = connection.execute(insert(step_labels), row).inserted_primary_key
        assert made is not None
        told = said | {"assignment": assignment, "item": entry.item, "shown": entry.shown}
        told |= {"batch": place, "created": one.created.isoformat()}
        log = event(now, name, "imported", "step judgement", made.id, None, told, versions[one.guideline])
        connection.execute(insert(events), log)
    tallies.change_assignments(connection, assigned, 1)
    _make_gold(connection, {e.item: one.gold for e, one in zip(entries, new, strict=True) if one.gold}, now)
    for item in sorted({entry.item for entry, one in zip(entries, new, strict=True) if one.out}):
        take_out(connection, "item", item, "", None, now)
    return len(new)


def _queue(connection: Connection, response: int, one: StepJudgement, batch: str) -> str:
    """The queue that holds the reply cut as it was when it was judged: ``batch``, or one beside it where the reply is
    cut otherwise there. A label belongs to the step that was looked at."""
    query = select(step_items.c.steps).join(items, items.c.id == step_items.c.item_id)
    here = connection.execute(query.where(items.c.batch == batch, items.c.key == f"step/{response}")).scalar()
    if here is None or Steps.model_validate(here).split(one.response.text) == one.steps:
        return batch
    return _queue(connection, response, one, f"{batch} (by {named(one.split)})")


def _there(connection: Connection, tokens: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rows of these tokens, what was taken back too, with ``prompt_id`` and ``text`` of the reply."""
    query = (
        done(step_labels, step_labels, items.c.prompt_id, responses.c.text)
        .join(item_responses, item_responses.c.item_id == items.c.id)
        .join(responses, responses.c.id == item_responses.c.response_id)
    )
    found: dict[str, dict[str, Any]] = {}
    for chunk in chunks(tokens):
        rows = connection.execute(query.where(step_labels.c.token.in_(chunk))).mappings()
        found |= {row["token"]: dict(row) for row in rows}
    return found


def _same(here: Mapping[str, Any], one: StepJudgement) -> bool:
    """Whether two judgements of one id are one. What was erased, here or there, is not known any more."""
    new = values_of(new_steps(_row(one), one.token))
    said = all(here[name] == new[name] for name in ("labels", "outcome", "reasons"))
    texts = [(here[name], new[name]) for name in ("correction", "note")]
    known = here["text"] == MARK or (here["prompt_id"], here["text"]) == (one.prompt.id, storable(one.response.text))
    return said and known and all(mine == theirs or MARK in (mine, theirs) for mine, theirs in texts)


def _make_gold(connection: Connection, answers: Mapping[int, str], now: datetime) -> None:
    """Gold items elsewhere are gold items here, unless they have an answer here already."""
    for row in list(rows_of(connection, items, items.c.id, sorted(answers))):
        if row.gold is None:
            set_gold(connection, row.id, answers[row.id], "keel", now)


_TYPES: Mapping[str, Type] = {
    "prompt": "messages",
    **dict.fromkeys(("finished", "out", "reference_shown"), "bool"),
    "seconds": "number",
}


def table(rows: list[dict[str, Any]]) -> Any:
    return arrow_table(rows, COLUMNS, _JSON_COLUMNS, _TYPES)
