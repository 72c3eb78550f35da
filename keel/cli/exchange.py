"""``keel export`` and ``keel import``: votes, thumbs and step labels out of a store and into it, and responses that
are to be judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from keel.cli.foreign import Told, read_tool
from keel.data.fields import checked
from keel.data.labelled import is_labelled
from keel.data.rows import BadRows, Row, RowError, read_rows
from keel.data.sources import read_labelled, read_preferences
from keel.data.unjudged import is_unjudged, read_unjudged
from keel.feedback.aggregate import likelier_first
from keel.run import RunDir
from keel.store import Judgement, Store, exchange, given, step_files, thumbs, whole
from keel.store.engine import exists
from keel.store.foreign import Names
from keel.store.forms import TOOLS, tool_of
from keel.store.imports import tells_apart
from keel.store.records import Ranking, Thumb
from keel.store.unjudged import BATCH, add_unjudged
from keel.types import Preference, UserError

Votes = Sequence[exchange.Given] | Sequence[Preference]


def store_location(where: str, new: bool = False) -> str:
    """The store that ``where`` means: a run directory's own, a SQLite file, or a database's URL. ``new``: a file that
    is not there yet may be made."""
    if "://" in where:
        return where
    path = Path(where)
    if path.is_dir():
        run = RunDir(path)
        recipe = run.manifest.read().get("recipe")
        if recipe is None:
            raise UserError(f"{where}: not a run directory (no manifest.json); name one, or a store's file or URL")
        location = str(recipe.get("store") or run.store_url)
        if not new and not exists(location):
            raise UserError(f"{where}: nobody has judged anything in this run yet; serve it with keel label first")
        return location
    if not new and not path.exists():
        raise UserError(f"{where}: no such run directory or store; name a run, a SQLite file, or postgresql://...")
    return where


def export_votes(where: str, out: str, batch: str | None, form: exchange.Form, plain: bool) -> str:
    """Writes the store's votes and says what was written."""
    with Store(store_location(where)) as store:
        written = standing = store.export_preferences(out, batch, form, plain)
        if plain:
            with store.moment() as connection:
                every = given.all_given(connection, batch)
                standing = sum(1 if isinstance(one, Judgement) else len(one.said()) for one in every)
    what = "ties, gold items, votes that a reviewer settled, what was taken out"
    left_out = f"; left out ({what}): {standing - written}" if written < standing else ""
    return f"{written} votes written to {out}{left_out}"


def export_tool(where: str, out: str, batch: str | None, form: str) -> str:
    """Writes the store's votes for another labelling tool, and says what was written and what its form can't hold."""
    tool = TOOLS[form]
    with Store(store_location(where)) as store:
        written = tool.write(store.all_given(batch), Path(out))
    left = [f"\n  not in {tool.title}'s form: {count} x {what}" for what, count in written.left.items() if count]
    return f"{written.answers} votes on {len(written.pairs)} pairs written to {out}" + "".join(left)


def export_thumbs(where: str, out: str, batch: str | None, plain: bool) -> str:
    """Writes the store's thumbs on single responses and says what was written."""
    with Store(store_location(where)) as store:
        return f"{thumbs.export(store, Path(out), batch, plain)} thumbs written to {out}"


def import_thumbs(where: str, files: Sequence[str], annotator: str, batch: str | None) -> str:
    """Adds the files' thumbs to the store, all or none, and says how many were new."""
    read = [thumb for file in files for thumb in read_thumbs(file, annotator)]
    with Store(store_location(where, new=True)) as store, store.transaction(writes=True) as connection:
        new = thumbs.add(connection, read, batch, store.now)
    known = f" ({len(read) - new} were there already)" if new < len(read) else ""
    return f"{new} thumbs imported{known}"


def export_steps(where: str, out: str, batch: str | None, plain: bool) -> str:
    """Writes the store's labels on the steps of replies and says what was written."""
    with Store(store_location(where)) as store:
        return f"{step_files.export(store, Path(out), batch, plain)} replies in steps written to {out}"


def import_steps(where: str, files: Sequence[str], batch: str | None) -> str:
    """Adds the files' step labels to the store, all or none, and says how many were new."""
    read = []
    for file in files:
        bad = BadRows(file)
        _checked(list(read_rows(file, bad)), bad)
        read += step_files.read(file)
    with Store(store_location(where, new=True)) as store, store.transaction(writes=True) as connection:
        new = step_files.add(connection, read, batch, store.now)
    known = f" ({len(read) - new} were there already)" if new < len(read) else ""
    return f"{new} replies in steps imported{known}"


def export_whole(where: str, out: str) -> str:
    """Writes the whole store and says what was written."""
    with Store(store_location(where)) as store, store.moment() as connection:
        rows = whole.export(connection, Path(out))
    return f"the whole store written to {out} ({rows} rows); links, sessions and passwords are left out"


def import_whole(where: str, files: Sequence[str], batch: str | None) -> str:
    """Fills an empty store with a whole one, all or nothing, and says what was new."""
    if len(files) > 1 or batch is not None:
        raise UserError("a whole store is one file, with the batches that it has; give one FILE, and no --batch")
    with Store(store_location(where, new=True)) as store, store.transaction(writes=True) as connection:
        new = whole.add(connection, Path(files[0]))
    if not new:
        return "nothing is new: the store has all of it already"
    return f"{new} rows imported: the whole store; people sign in by new links"


def read_thumbs(file: str, annotator: str) -> list[Thumb]:
    """The thumbs of a Keel export, or of any file of labelled replies."""
    bad = BadRows(file)
    rows = list(read_rows(file, bad))
    bad.raise_if_any()
    if {"completion_source", "batch"} <= rows[0].values.keys():
        _checked(rows, bad)
        return thumbs.read(file)
    now, times = datetime.now(UTC), Counter[str]()
    found = []
    for example in read_labelled(file):
        times[example.id] += 1
        found.append(thumbs.from_example(example, annotator, now, times[example.id]))
    return found


def import_votes(where: str, files: Sequence[str], names: Names, annotator: str, batch: str | None) -> str:
    """Adds the files' votes to the store, all or none, and says how many were new."""
    told = Told()
    votes = [read_votes(file, names, told) for file in files]
    with Store(store_location(where, new=True)) as store, store.session() as session:
        new = sum(session.import_preferences(part, annotator, batch) for part in votes)
    read = sum(len(part) for part in votes)
    erased = sum(not tells_apart(one.replies) for part in votes for one in part if isinstance(one, Judgement | Ranking))
    known = [f"{read - new - erased} were there already"] if new + erased < read else []
    known += [f"{erased} of erased responses left out"] if erased else []
    said = f"{new} votes imported" + (f" ({'; '.join(known)})" if known else "")
    return f"{said}\n{told}" if told.lines else said


def import_unjudged(
    where: str, files: Sequence[str], unlabelled: bool, pairs: int | None, overlap: int, batch: str | None
) -> str:
    """Adds the files' prompts and responses to the store, all or none, and queues pairs of them; says what was new."""
    groups = [group for file in files for group in read_unjudged(file, unlabelled)]
    with Store(store_location(where, new=True)) as store, store.transaction(writes=True) as connection:
        added = add_unjudged(connection, groups, pairs, overlap, batch or BATCH, "keel", store.now)
    return str(added)


def holds(file: str) -> Literal["votes", "thumbs", "steps", "responses", "store"]:
    """What a file's first row is: of a judgement, of a single reply with a thumb or labelled in steps, of responses
    that nobody has judged, or of a whole store."""
    row = next(iter(read_rows(file, BadRows(file))), None)
    if row is not None and whole.is_whole(row.values):
        return "store"
    if row is None or tool_of([row.values]):
        return "votes"
    if {"completions", "labels", "marks"} <= row.values.keys():
        return "steps"
    if is_labelled(row.values):
        return "thumbs"
    return "responses" if is_unjudged(row.values) else "votes"


def read_votes(file: str, names: Names, told: Told | None = None) -> Votes:
    """The votes of a Keel export, an Argilla or Label Studio export, or a file of preference pairs. The rows show which
    of them it is. ``told`` gets what of another tool's file is no vote."""
    bad = BadRows(file)
    rows = list(read_rows(file, bad))
    bad.raise_if_any()
    if {"annotator_kind", "prompt_id", "batch"} <= rows[0].values.keys():
        _checked(rows, bad)
        return exchange.read(file)
    tool = tool_of([row.values for row in rows])
    if tool is not None:
        return read_tool(tool, _checked(rows, bad), bad, names, Told() if told is None else told)
    return [likelier_first(pair) for pair in read_preferences(file)]


def _checked(rows: Sequence[Row], bad: BadRows) -> list[Row]:
    """The rows, with every value one that a store holds."""
    found = []
    for row in rows:
        try:
            found.append(checked(row))
        except RowError as error:
            bad.add(row.file, row.line, str(error))
    bad.raise_if_any()
    return found
