"""``keel arena``: the standings of the arena's models."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from keel.cli.exchange import store_location
from keel.feedback.standings import COLUMNS, Standing, Standings, Table, as_json, rows, standings
from keel.run import atomic_write_text
from keel.store import Store
from keel.store.ballots import ballots
from keel.types import UserError

ENDINGS = (".json", ".csv")


def write_standings(place: str, file: str | None) -> str:
    """Writes the standings of a store to ``file`` (.json or .csv); what to print, the standings themselves without a
    file. UserError for another ending, before the store is read."""
    path = None if file is None else Path(file)
    if path is not None and path.suffix.lower() not in ENDINGS:
        raise UserError(f"{file}: standings are written as {' or '.join(ENDINGS)}; give the file one of these endings")
    with Store(store_location(place)) as store, store.transaction(writes=False) as connection:
        found = standings(ballots(connection))
    if path is None:
        return _text(found)
    if path.suffix.lower() == ".json":
        atomic_write_text(path, json.dumps(as_json(found), ensure_ascii=False, indent=2) + "\n")
    else:
        atomic_write_text(path, _csv(found))
    return f"{file}: {len(found.plain.standings)} models, {found.counted} votes counted, {found.voided} left out"


def _csv(found: Standings) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(found))
    return text.getvalue()


def _text(found: Standings) -> str:
    if not found.counted:
        left_out = f" that counts ({found.voided} left out)" if found.voided else ""
        return f"no vote{left_out} in the arena; people give them in keel label"
    lines = [f"{found.counted} votes by {found.people} people, {found.voided} left out"]
    lines += [f"! {warning}" for warning in found.warnings]
    lines += _lines("without control of style", found.plain)
    if found.controlled is None:
        lines += ["", "no standings at equal style: style tells every vote, or is the same as which model wrote it"]
    else:
        lines += _lines("with control of style (length, headers, lists, bold)", found.controlled)
        for effect in found.controlled.effects:
            between = "" if effect.low is None else f" ({effect.low:+.0f} to {effect.high:+.0f})"
            lines.append(f"  more {effect.feature}: {effect.points:+.0f} points a standard deviation{between}")
    return "\n".join(lines)


def _lines(title: str, table: Table) -> list[str]:
    widest = max(len(one.model) for one in table.standings)
    return ["", title, *(_line(one, widest) for one in table.standings)]


def _line(one: Standing, widest: int) -> str:
    rank = "-" if one.best is None else f"{one.best}" if one.best == one.worst else f"{one.best}-{one.worst}"
    rating = "-" if one.rating is None else f"{one.rating:.0f}"
    between = "" if one.low is None else f"({one.low:.0f} to {one.high:.0f})"
    part = f"part {one.part}" if one.part > 1 else ""
    said = f"{rank:>7}  {one.model:<{widest}}  {rating:>5} {between:<14}  {one.votes} votes"
    return "; ".join(filter(None, (said, part, one.note)))
