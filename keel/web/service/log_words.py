"""The log as a page shows it: each entry as a sentence, and those alone that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, select

from keel.store.tables import events
from keel.types import UserError

Values = Mapping[str, Any]
Words = Callable[[str, Values, Values], str]
"""(the entity's id, old values, new values) -> what was done, after the name of who did it."""

WORK = {
    "judgement": "a comparison",
    "ranking": "a ranking",
    "thumb": "a thumb",
    "step judgement": "the steps of a reply",
    "writing": "a reply",
    "principle answer": "a question about a principle",
}


@dataclass(frozen=True, slots=True)
class Entries:
    """Entries by ``who``, with one action (``what``), about one kind of thing, on one ``day`` (2026-11-28, UTC), older
    than entry ``before``. Empty, or 0: any."""

    who: str = ""
    what: str = ""
    about: str = ""
    day: str = ""
    before: int = 0
    limit: int = 200


EVERYTHING = Entries()


def entries(connection: Connection, wanted: Entries) -> list[dict[str, Any]]:
    """The newest first, each with its ``words``."""
    query = select(events).order_by(events.c.id.desc()).limit(wanted.limit)
    for column, value in (
        (events.c.actor, wanted.who),
        (events.c.action, wanted.what),
        (events.c.entity, wanted.about),
    ):
        query = query.where(column == value) if value else query
    if wanted.day:
        try:
            start = datetime.combine(date.fromisoformat(wanted.day), datetime.min.time(), UTC)
            query = query.where(events.c.at >= start, events.c.at < start + timedelta(days=1))
        except (ValueError, OverflowError):
            raise UserError(f"{wanted.day} is no day; give one such as 2026-11-28") from None
    if wanted.before:
        query = query.where(events.c.id < wanted.before)
    rows = [dict(row) for row in connection.execute(query).mappings()]
    return [row | {"words": words(row)} for row in rows]


def words(row: Mapping[str, Any]) -> str:
    """What an entry says was done: "judged a comparison (item 12): left, much better"."""
    old, new = (value if isinstance(value, dict) else {"": value} for value in (row["old"], row["new"]))
    say = _WORDS.get((row["action"], row["entity"]))
    if say is not None:
        return say(row["entity_id"], old, new)
    if row["action"] == "asked for":
        return f"asked for {row['entity_id']} items: {row['entity']}"
    what = WORK.get(row["entity"], row["entity"])
    item = new.get("item", old.get("item"))
    where = f" (item {item})" if item is not None else "" if row["entity"] in WORK else f" {row['entity_id']}"
    did = "took back" if row["action"] == "undone" else row["action"]
    return f"{did} {what}{where}".rstrip() + _result(row["entity"], new)


def _result(entity: str, new: Values) -> str:
    """What a piece of work says."""
    if entity == "judgement" and "choice" in new:
        strength = {1: ", slightly better", 2: ", better", 3: ", much better"}.get(new.get("strength") or 0, "")
        return f": {str(new['choice']).replace('_', ' ')}{strength}"
    if entity == "thumb" and "up" in new:
        return ": up" if new["up"] else ": down"
    if entity == "step judgement" and "outcome" in new:
        return f": {str(new['outcome']).replace('_', ' ')}"
    return ""


def _item(id: str, old: Values, new: Values) -> str:
    if new.get("gold"):
        return f"made item {id} a gold item: {new['gold']}"
    if "gold" in new:
        return f"made item {id} no gold item any more; {new['overlap']} people are to judge it"
    return f"changed how many people judge item {id}: {old.get('overlap')} to {new.get('overlap')}"


def _batch(id: str, old: Values, new: Values) -> str:
    return f"changed how many people judge an item of the queue {id or '(no name)'} to {new.get('overlap')}"


def _account(id: str, old: Values, new: Values) -> str:
    told = [f"{name} {old[name]} to {value}" if name in old else f"{name} {value}" for name, value in new.items()]
    return f"changed the account of {id}: {', '.join(told) or 'the password'}"


def _word(id: str, old: Values, new: Values) -> str:
    if not new.get("choice"):
        return f"took back the last word on item {id}"
    return f"settled item {id}: {new['choice']}" + (f", because: {new['reason']}" if new.get("reason") else "")


def _setting(new: Values) -> str:
    return ", ".join(f"{name} {value}".strip() for name, value in new.items() if value is not None) or "nothing"


def _because(new: Values, name: str = "reason") -> str:
    return f": {new[name]}" if new.get(name) else ""


_WORDS: Mapping[tuple[str, str], Words] = {
    ("changed", "item"): _item,
    ("changed", "batch"): _batch,
    ("changed", "account"): _account,
    ("changed", "setting"): lambda id, old, new: f"set {id.replace('_', ' ')} to {_setting(new)}",
    ("changed", "prompt"): lambda id, old, new: f"changed {' and '.join(new)} of prompt {id}",
    ("adjudicated", "item"): _word,
    ("added", "batch"): lambda id, old, new: f"added {new.get('items')} items to the queue {id or '(no name)'}",
    ("added", "annotator"): lambda id, old, new: f"added the annotator {id} ({new.get('kind')})",
    ("added", "account"): lambda id, old, new: f"made an account for {id} ({new.get('role')})",
    ("added", "guideline"): lambda id, old, new: f"published version {id} of the guideline",
    ("put first", "batch"): lambda id, old, new: f"put the queue {id or '(no name)'} first",
    ("ordered", "queue"): lambda id, old, new: "changed the order of the open comparisons",
    ("flagged", "flag"): lambda id, old, new: f"flagged item {new.get('item')}{_because(new, 'text')}",
    ("resolved", "flag"): lambda id, old, new: f"resolved flag {id}",
    ("skipped", "assignment"): lambda id, old, new: f"skipped item {new.get('item')}{_because(new)}",
    ("unskipped", "assignment"): lambda id, old, new: f"took back the skip of item {old.get('item')}",
    ("signed in", "account"): lambda id, old, new: "signed in",
    ("made", "link"): lambda id, old, new: f"made a link, as {new.get('role')}",
    ("used", "link"): lambda id, old, new: "used a link",
    ("withdrew", "link"): lambda id, old, new: "withdrew a link",
    ("made", "token"): lambda id, old, new: f"made token {id}, as {new.get('role')}",
    ("ended", "token"): lambda id, old, new: f"ended token {id}",
    ("made", "webhook"): lambda id, old, new: f"made webhook {id}",
    ("ended", "webhook"): lambda id, old, new: f"ended webhook {id}",
    ("sent again", "webhook"): lambda id, old, new: f"had what webhook {id} did not take sent again",
    ("paused", "webhook"): lambda id, old, new: f"paused webhook {id}, which failed for days",
    ("imported", "prompts"): lambda id, old, new: f"imported {id} prompts",
    ("imported", "responses"): lambda id, old, new: f"imported responses into the queue {id}",
    ("voted", "arena vote"): lambda id, old, new: f"voted in the arena{_result('judgement', new)}",
    ("took out", "item"): lambda id, old, new: f"took item {id} out of use{_because(new)}",
    ("took out", "response"): lambda id, old, new: f"took response {id} out of use{_because(new)}",
    ("took out", "prompt"): lambda id, old, new: f"took prompt {id} out of use{_because(new)}",
}

# What the page's filters offer
ACTIONS = (
    "judged", "ranked", "gave", "labelled", "wrote", "answered", "undone", "skipped", "unskipped", "flagged",
    "resolved", "adjudicated", "took out", "put back", "erased", "imported", "added", "changed", "asked for",
    "put first", "ordered", "voted", "published", "edited", "signed in", "made", "used", "withdrew",
    "ended", "sent again", "paused",
)  # fmt: skip
ENTITIES = (
    *WORK, "item", "assignment", "flag", "batch", "queue", "prompt", "prompts", "response", "responses", "guideline",
    "constitution", "arena vote", "annotator", "account", "link", "token", "webhook", "setting", "person",
    "training",
)  # fmt: skip
