"""Adding things in bulk: prompts, responses, items, annotators, and judgements that were given elsewhere. Each function
runs inside its caller's transaction, and adding the same thing twice adds it once, so that a step that was stopped can
be done again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, TypeVar, get_args

from sqlalchemy import Column, Connection, Row, Table, case, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from keel.store.people_tables import adjudications
from keel.store.records import AnnotatorKind, Judgement, Response
from keel.store.rows import checked_json, messages_json, response_key, storable
from keel.store.tables import (
    annotators,
    assignments,
    event,
    events,
    guidelines,
    item_responses,
    items,
    judgements,
    prompts,
    responses,
)
from keel.types import Prompt, UserError

T = TypeVar("T")
CHUNK = 500  # values in one statement
KINDS = get_args(AnnotatorKind)


@dataclass(frozen=True, slots=True)
class NewResponse:
    prompt_id: str
    text: str
    finished: bool
    model: str
    fingerprint: str
    sampling: Mapping[str, Any] | None


def add_prompts(connection: Connection, new: Sequence[Prompt], now: datetime) -> None:
    """See Store.add_prompts."""
    rows: dict[str, dict[str, Any]] = {}
    for prompt in new:
        meta = checked_json(prompt.meta, f"meta of prompt {prompt.id!r}")
        row = {"id": prompt.id, "messages": messages_json(prompt), "kind": prompt.kind, "meta": meta, "created": now}
        if rows.setdefault(prompt.id, row)["messages"] != row["messages"]:
            raise _other_messages(prompt.id)
    known = {row.id: row for row in _rows(connection, prompts, prompts.c.id, list(rows))}
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
    for chunk in _chunks(list(rows)):
        query = select(responses.c.key, responses.c.id).where(responses.c.key.in_(chunk))
        ids |= {row.key: row.id for row in connection.execute(query)}
    return [ids[key] for key in keys]


def add_items(
    connection: Connection, pairs: Sequence[tuple[int, int]], overlap: int, batch: str, now: datetime
) -> list[int]:
    """The items' ids, in the order of ``pairs`` (Store.add_comparisons)."""
    named = sorted({response for pair in pairs for response in pair})
    prompt_of = {row.id: row.prompt_id for row in _rows(connection, responses, responses.c.id, named)}
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
    before = _items(connection, batch, list(rows))
    insert_missing(connection, items, [row for key, row in rows.items() if key not in before])
    after = _items(connection, batch, list(rows))
    members = [
        {"item_id": item.id, "response_id": int(response)}
        for key, item in after.items()
        if key not in before
        for response in key.split("-")
    ]
    insert_missing(connection, item_responses, members)
    for item in before.values():
        if item.overlap < overlap:
            connection.execute(update(items).where(items.c.id == item.id).values(overlap=overlap))
            old, new = {"overlap": item.overlap}, {"overlap": overlap}
            connection.execute(insert(events), event(now, "keel", "changed", "item", item.id, old, new))
    return [after[key].id for key in keys]


def add_annotators(connection: Connection, kinds: Mapping[str, str], role: str, now: datetime) -> dict[str, int]:
    """Ids by name; ``kinds`` maps names to kinds (Store.add_annotator)."""
    for name, kind in kinds.items():
        if not name.strip() or kind not in KINDS:
            raise UserError(f"annotator {name!r} of kind {kind!r}: give a name, and one of {', '.join(KINDS)}")
    known = {row.name: row for row in _rows(connection, annotators, annotators.c.name, list(kinds))}
    for row in known.values():
        if kinds[row.name] not in (row.kind, "unknown"):
            raise UserError(f"annotator {row.name!r} is there as {row.kind}; give the {kinds[row.name]} another name")
    new = [
        {"name": name, "kind": kind, "role": role, "created": now} for name, kind in kinds.items() if name not in known
    ]
    insert_missing(connection, annotators, new)
    if new:
        log = [
            event(now, "keel", "added", "annotator", r["name"], None, {"kind": r["kind"], "role": role}) for r in new
        ]
        connection.execute(insert(events), log)
    return {row.name: row.id for row in _rows(connection, annotators, annotators.c.name, list(kinds))}


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
        raise UserError(f"guideline {version!r} is there with another text; give the new text a new version")


def add_judgements(connection: Connection, votes: Sequence[Judgement], batch: str | None, now: datetime) -> int:
    """Add judgements of another database, or of files; how many were new (Store.import_preferences)."""
    votes = _new_votes(connection, votes)
    if not votes:
        return 0
    add_prompts(connection, [vote.prompt for vote in votes], now)
    for version in sorted({vote.guideline for vote in votes if vote.guideline is not None}):
        add_guideline(connection, version, "", now)
    left_ids = add_responses(connection, [_as_new(vote.left) for vote in votes], now)
    right_ids = add_responses(connection, [_as_new(vote.right) for vote in votes], now)
    places = [
        _Place(vote, left, right, vote.batch if batch is None else batch)
        for vote, left, right in zip(votes, left_ids, right_ids, strict=True)
    ]
    item_ids = _imported_items(connection, places, now)
    names = _names(connection, places, item_ids)
    kinds = {name: place.vote.annotator_kind for place, name in zip(places, names, strict=True)}
    ids = add_annotators(connection, kinds, "annotator", now)
    rows = [
        {
            "item_id": item_ids[place.batch, place.key],
            "annotator_id": ids[name],
            "shown": [place.left, place.right],
            "state": "judged",
            "leased_at": place.vote.created,
            "expires_at": place.vote.created,
        }
        for place, name in zip(places, names, strict=True)
    ]
    made = connection.execute(insert(assignments).returning(assignments.c.id, sort_by_parameter_order=True), rows)
    votes_of = [
        {
            "assignment_id": assignment_id,
            "token": place.vote.token,
            "choice": place.vote.choice,
            "strength": place.vote.strength,
            "seconds": place.vote.seconds,
            "guideline": place.vote.guideline,
            "reason": None if place.vote.reason is None else storable(place.vote.reason),
            "created": place.vote.created,
        }
        for place, assignment_id in zip(places, made.scalars().all(), strict=True)
    ]
    made = connection.execute(insert(judgements).returning(judgements.c.id, sort_by_parameter_order=True), votes_of)
    log = []
    for name, row, vote, id in zip(names, rows, votes_of, made.scalars().all(), strict=True):
        new = {field: vote[field] for field in ("choice", "strength", "seconds", "guideline", "reason")}
        new |= {"assignment": vote["assignment_id"], "item": row["item_id"], "shown": row["shown"]}
        log.append(event(now, name, "imported", "judgement", id, None, new))
    connection.execute(insert(events), log)
    _settle(connection, places, item_ids, now)
    return len(votes)


def _settle(
    connection: Connection, places: Sequence[_Place], item_ids: Mapping[tuple[str, str], int], now: datetime
) -> None:
    """The reviewers' words that came with the votes, on items that nobody here has settled."""
    words = {item_ids[place.batch, place.key]: place for place in places if place.vote.settled is not None}
    for chunk in _chunks(sorted(words)):
        standing = adjudications.c.item_id.in_(chunk), adjudications.c.undone_at.is_(None)
        for item in connection.execute(select(adjudications.c.item_id).where(*standing)).scalars():
            del words[item]
    by = {place.vote.settled_by or place.vote.annotator for place in words.values()}
    known = {row.name: row.kind for row in _rows(connection, annotators, annotators.c.name, sorted(by))}
    ids = add_annotators(connection, {name: known.get(name, "person") for name in by}, "reviewer", now)
    for item, place in words.items():
        vote, name = place.vote, place.vote.settled_by or place.vote.annotator
        choice = "tie"
        if vote.settled in ("left", "right"):
            choice = "first" if (vote.settled == "left") == (place.left < place.right) else "second"
        row = {"item_id": item, "annotator_id": ids[name], "choice": choice, "created": now}
        connection.execute(insert(adjudications), row)
        connection.execute(insert(events), event(now, name, "adjudicated", "item", item, None, {"choice": choice}))


@dataclass(frozen=True, slots=True)
class _Place:
    """An imported vote with the ids that its responses have here."""

    vote: Judgement
    left: int
    right: int
    batch: str

    @property
    def key(self) -> str:
        return f"{min(self.left, self.right)}-{max(self.left, self.right)}"


def _new_votes(connection: Connection, votes: Sequence[Judgement]) -> list[Judgement]:
    """Those whose token is not in the store. A token that stands for something else there is an error."""
    tokens = Counter(vote.token for vote in votes)
    for token, times in tokens.items():
        if times > 1:
            raise UserError(f"judgement {token!r} comes {times} times in one import; give each its own id")
    choices = {row.token: row.choice for row in _rows(connection, judgements, judgements.c.token, list(tokens))}
    shown = (
        select(judgements.c.token, responses.c.text, responses.c.prompt_id)
        .select_from(judgements.join(assignments))
        .join(item_responses, item_responses.c.item_id == assignments.c.item_id)
        .join(responses, responses.c.id == item_responses.c.response_id)
    )
    texts: dict[str, set[tuple[str, str]]] = {}
    for chunk in _chunks(list(choices)):
        for row in connection.execute(shown.where(judgements.c.token.in_(chunk))):
            texts.setdefault(row.token, set()).add((row.prompt_id, row.text))
    new = []
    for vote in votes:
        if vote.token not in choices:
            new.append(vote)
            continue
        same = texts[vote.token] == {(vote.prompt.id, storable(reply.text)) for reply in (vote.left, vote.right)}
        if not same or choices[vote.token] != vote.choice:
            raise UserError(
                f"judgement {vote.token!r} is in the store with other contents; give the new one another id"
            )
    return new


def _imported_items(connection: Connection, places: Sequence[_Place], now: datetime) -> dict[tuple[str, str], int]:
    """Item ids by (batch, key), each with slots for its imported votes, and those slots taken."""
    for place in places:
        if place.left == place.right:
            raise UserError(f"judgement {place.vote.token!r}: both responses are the same; leave it out of the import")
    ids = {}
    for batch in sorted({place.batch for place in places}):
        here = {place.key: (place.left, place.right) for place in places if place.batch == batch}
        votes = Counter(place.key for place in places if place.batch == batch)
        add_items(connection, list(here.values()), 1, batch, now)
        found = _items(connection, batch, list(here))
        for key, count in votes.items():
            item = found[key]
            taken = items.c.taken + count  # reckoned by the database: somebody may be taking a slot now
            overlap = case((taken > items.c.overlap, taken), else_=items.c.overlap)
            connection.execute(update(items).where(items.c.id == item.id).values(taken=taken, overlap=overlap))
            ids[batch, key] = item.id
    return ids


def _names(connection: Connection, places: Sequence[_Place], item_ids: Mapping[tuple[str, str], int]) -> list[str]:
    """Under which name each vote is kept: its annotator's, numbered when that one has had the item before."""
    had = set()
    query = select(assignments.c.item_id, annotators.c.name).join(annotators)
    for chunk in _chunks(list(item_ids.values())):
        had |= {(row.item_id, row.name) for row in connection.execute(query.where(assignments.c.item_id.in_(chunk)))}
    names = []
    for place in places:
        item, number = item_ids[place.batch, place.key], 1
        while (item, name := place.vote.annotator + (f"#{number}" if number > 1 else "")) in had:
            number += 1
        had.add((item, name))
        names.append(name)
    return names


def _as_new(reply: Response) -> NewResponse:
    return NewResponse(reply.prompt_id, reply.text, reply.finished, reply.model, reply.fingerprint, reply.sampling)


def _other_messages(prompt_id: str) -> UserError:
    return UserError(f"prompt {prompt_id!r} is there with other messages; give the new prompt an id of its own")


def _items(connection: Connection, batch: str, keys: list[str]) -> dict[str, Row[Any]]:
    found: dict[str, Row[Any]] = {}
    for chunk in _chunks(keys):
        query = select(items).where(items.c.batch == batch, items.c.key.in_(chunk)).order_by(items.c.id)
        found |= {row.key: row for row in connection.execute(query)}
    return found


def _rows(connection: Connection, table: Table, column: Column[Any], values: Sequence[Any]) -> Iterator[Row[Any]]:
    """The rows whose ``column`` is among ``values``, by that column's order in each chunk."""
    for chunk in _chunks(values):
        yield from connection.execute(select(table).where(column.in_(chunk)).order_by(column)).all()


def insert_missing(connection: Connection, table: Table, rows: Sequence[dict[str, Any]]) -> None:
    """Insert ``rows`` in order; one that somebody else has just added is left as it is."""
    if rows:
        connection.execute(_insert_statement(connection.dialect.name, table), rows)


@cache
def _insert_statement(dialect: str, table: Table) -> postgresql.Insert | sqlite.Insert:
    new = postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)
    return new.on_conflict_do_nothing()


def _chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), CHUNK):
        yield values[start : start + CHUNK]
