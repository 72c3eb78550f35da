"""Judgements that were given elsewhere, into a store: another database's, or those of files. What is there already is
added once. Each function runs inside its caller's transaction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Table, case, insert, select, update

from keel.store import tallies
from keel.store.gold import set_gold
from keel.store.ingest import (
    NewResponse,
    add_annotators,
    add_guideline,
    add_items,
    add_prompts,
    add_responses,
    chunks,
    items_of,
    log_overlap,
    rows_of,
)
from keel.store.people_tables import accounts, adjudications, aspect_ratings, rankings, step_labels, thumbs, writings
from keel.store.records import AnnotatorKind, Judgement, Response
from keel.store.removals import take_out
from keel.store.rows import MARK, storable
from keel.store.sides import SIDES, InStore, OnScreen, in_store
from keel.store.tables import (
    annotators,
    assignments,
    event,
    events,
    guidelines,
    item_responses,
    items,
    judgements,
    responses,
)
from keel.types import UserError


@dataclass(frozen=True, slots=True)
class Entry:
    """Somebody who did an item elsewhere."""

    item: int
    annotator: str
    kind: AnnotatorKind
    shown: list[int]
    created: datetime


def ids_here(connection: Connection, into: Table, entity: str, ids: Sequence[str]) -> dict[str, str]:
    """Under which id each imported piece of work is kept: its own, or ID#ENTITY where another kind of work in the store
    has that one. By its id a judgement is found from the model that learned from it."""
    taken = {
        row.token
        for table in (judgements, rankings, thumbs, step_labels, writings)
        if table is not into
        for row in rows_of(connection, table, table.c.token, list(ids))
    }
    here = {row.token for row in rows_of(connection, into, into.c.token, list(taken))}  # of stores before this rule
    return {id: f"{id}#{entity}" if id in taken - here else id for id in ids}


def tells_apart(replies: Sequence[Response]) -> bool:
    """Whether at most one of the replies of a pair or a ranking was erased elsewhere: of two that were, nothing tells
    which is which, and nobody learns from them."""
    return sum(reply.text == MARK for reply in replies) < 2


class NamesHere:
    """Under which names imported people are known here. Somebody with an account here has not said what a file says
    that they said: NAME of the file is then kept as NAME (imported), as is one who is of another kind here."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._kinds: dict[str, AnnotatorKind | None] = {}  # of the names looked at; None: an account's

    def __call__(self, name: str, kind: AnnotatorKind) -> str:
        here, number = name, 1
        while self._kind(here, kind) != kind:
            here = f"{name} (imported{f' {number}' if number > 1 else ''})"
            number += 1
        return here

    def settler(self, name: str) -> tuple[str, AnnotatorKind]:
        """The name and kind here of somebody who settled items: a file does not say of which kind they are."""
        here, number = name, 1
        while (kind := self._kind(here, "person")) is None:
            here = f"{name} (imported{f' {number}' if number > 1 else ''})"
            number += 1
        return here, kind

    def _kind(self, name: str, new: AnnotatorKind) -> AnnotatorKind | None:
        """The kind of whoever has the name; where nobody has, it is taken by one of the kind ``new``."""
        if name not in self._kinds:
            query = select(annotators.c.kind, accounts.c.annotator_id).outerjoin(accounts)
            row = self._connection.execute(query.where(annotators.c.name == name)).first()
            self._kinds[name] = new if row is None else None if row.annotator_id is not None else row.kind
        return self._kinds[name]


def guideline_here(connection: Connection, version: str | None, now: datetime) -> str | None:
    """Under which name an imported guideline's version is known here. A file does not hold its text: where a version of
    the name has one here, it may be another one, and the imported version is kept as VERSION (imported)."""
    if version is None:
        return None
    text = connection.execute(select(guidelines.c.text).where(guidelines.c.version == version)).scalar_one_or_none()
    here = f"{version} (imported)" if text else version
    add_guideline(connection, here, "", now)
    return here


def assign(connection: Connection, entries: Sequence[Entry], now: datetime) -> tuple[list[str], list[int]]:
    """Under which name each entry is kept, and the id of its assignment, which is done."""
    names = _names(connection, entries)
    kinds = {name: entry.kind for entry, name in zip(entries, names, strict=True)}
    ids = add_annotators(connection, kinds, "annotator", now)
    rows = [
        {
            "item_id": entry.item,
            "annotator_id": ids[name],
            "shown": entry.shown,
            "state": "judged",
            "leased_at": entry.created,
            "expires_at": entry.created,
        }
        for entry, name in zip(entries, names, strict=True)
    ]
    made = connection.execute(insert(assignments).returning(assignments.c.id, sort_by_parameter_order=True), rows)
    return names, list(made.scalars())


def add_judgements(connection: Connection, votes: Sequence[Judgement], batch: str | None, now: datetime) -> int:
    """Add judgements of another database, or of files; how many were new (Store.import_preferences)."""
    ids = ids_here(connection, judgements, "judgement", [vote.token for vote in votes])
    whole = [vote for vote in votes if tells_apart(vote.replies)]
    votes = _new_votes(connection, [replace(vote, token=ids[vote.token]) for vote in whole])
    if not votes:
        return 0
    add_prompts(connection, [vote.prompt for vote in votes], now)
    versions = {version: guideline_here(connection, version, now) for version in {vote.guideline for vote in votes}}
    left_ids = add_responses(connection, [as_new(vote.left) for vote in votes], now)
    right_ids = add_responses(connection, [as_new(vote.right) for vote in votes], now)
    places = [
        _Place(vote, left, right, vote.batch if batch is None else batch)
        for vote, left, right in zip(votes, left_ids, right_ids, strict=True)
    ]
    item_ids = _imported_items(connection, places, now)
    entries = [
        Entry(item_ids[p.batch, p.key], p.vote.annotator, p.vote.annotator_kind, [p.left, p.right], p.vote.created)
        for p in places
    ]
    names, assigned = assign(connection, entries, now)
    rows = [
        {
            "assignment_id": assignment_id,
            "token": place.vote.token,
            "choice": place.vote.choice,
            "strength": place.vote.strength,
            "seconds": place.vote.seconds,
            "guideline": versions[place.vote.guideline],
            "reason": None if place.vote.reason is None else storable(place.vote.reason),
            "created": place.vote.created,
            "probability": place.vote.probability,
        }
        for place, assignment_id in zip(places, assigned, strict=True)
    ]
    made = connection.execute(insert(judgements).returning(judgements.c.id, sort_by_parameter_order=True), rows)
    log, rated = [], []
    for name, place, entry, row, id in zip(names, places, entries, rows, made.scalars().all(), strict=True):
        new: dict[str, Any] = {
            field: row[field] for field in ("choice", "strength", "seconds", "guideline", "reason", "token")
        }
        new |= {"assignment": row["assignment_id"], "item": entry.item, "shown": entry.shown, "batch": place.batch}
        ratings = {side: dict(given) for side, given in place.vote.ratings.items()}
        new |= {"created": place.vote.created.isoformat()} | ({"ratings": ratings} if ratings else {})
        new |= {} if row["probability"] is None else {"probability": row["probability"]}
        log.append(event(now, name, "imported", "judgement", id, None, new, versions[place.vote.guideline]))
        rated += [
            {"judgement_id": id, "response_id": response, "aspect": aspect, "value": value}
            for side, response in zip(SIDES, (place.left, place.right), strict=True)
            for aspect, value in ratings.get(side, {}).items()
        ]
    connection.execute(insert(events), log)
    if rated:
        connection.execute(insert(aspect_ratings), rated)
    tallies.change_assignments(connection, assigned, 1)
    _make_gold(connection, places, item_ids, now)
    for item in sorted({item_ids[place.batch, place.key] for place in places if place.vote.out}):
        take_out(connection, "item", item, "", None, now)
    _settle(connection, places, item_ids, now)
    return len(votes)


def _settle(
    connection: Connection, places: Sequence[_Place], item_ids: Mapping[tuple[str, str], int], now: datetime
) -> None:
    """The reviewers' words that came with the votes, on items that nobody here has settled."""
    words = {item_ids[place.batch, place.key]: place for place in places if place.vote.settled is not None}
    for chunk in chunks(sorted(words)):
        standing = adjudications.c.item_id.in_(chunk), adjudications.c.undone_at.is_(None)
        for item in connection.execute(select(adjudications.c.item_id).where(*standing)).scalars():
            del words[item]
    here = NamesHere(connection)
    by = {item: here.settler(place.vote.settled_by or place.vote.annotator) for item, place in words.items()}
    ids = add_annotators(connection, dict(by.values()), "reviewer", now)
    for item, place in words.items():
        vote, name = place.vote, by[item][0]
        choice = place.said_of_item(vote.settled or "tie")
        said = {"choice": choice, "reason": None if vote.settled_reason is None else storable(vote.settled_reason)}
        row = {"item_id": item, "annotator_id": ids[name], "created": vote.settled_at or now}
        connection.execute(insert(adjudications), row | said)
        connection.execute(insert(events), event(now, name, "adjudicated", "item", item, None, said))


def _make_gold(
    connection: Connection, places: Sequence[_Place], item_ids: Mapping[tuple[str, str], int], now: datetime
) -> None:
    """Gold items elsewhere are gold items here, unless they have an answer here already."""
    answers = {
        item_ids[place.batch, place.key]: place.said_of_item(place.vote.gold) for place in places if place.vote.gold
    }
    for chunk in chunks(sorted(answers)):
        query = select(items.c.id).where(items.c.id.in_(chunk), items.c.gold.is_(None)).order_by(items.c.id)
        for item in connection.execute(query).scalars().all():
            set_gold(connection, item, answers[item], "keel", now)


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

    def said_of_item(self, side: OnScreen) -> InStore:
        """What is said of this vote's sides in terms of the item."""
        return in_store(side, (self.left, self.right))


def _new_votes(connection: Connection, votes: Sequence[Judgement]) -> list[Judgement]:
    """Those whose token is not in the store. A token that stands for something else there is an error."""
    tokens = Counter(vote.token for vote in votes)
    for token, times in tokens.items():
        if times > 1:
            raise UserError(f"judgement {token!r} comes {times} times in one import; give each its own id")
    choices = {row.token: row.choice for row in rows_of(connection, judgements, judgements.c.token, list(tokens))}
    shown = (
        select(judgements.c.token, responses.c.text, responses.c.prompt_id)
        .select_from(judgements.join(assignments))
        .join(item_responses, item_responses.c.item_id == assignments.c.item_id)
        .join(responses, responses.c.id == item_responses.c.response_id)
    )
    texts: dict[str, set[tuple[str, str]]] = {}
    for chunk in chunks(list(choices)):
        for row in connection.execute(shown.where(judgements.c.token.in_(chunk))):
            texts.setdefault(row.token, set()).add((row.prompt_id, row.text))
    new = []
    for vote in votes:
        if vote.token not in choices:
            new.append(vote)
            continue
        if any(text == MARK for _, text in texts[vote.token]):
            continue  # its texts were erased here
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
        found = items_of(connection, batch, list(here))
        for key, count in votes.items():
            item = found[key]
            taken = items.c.taken + count  # reckoned by the database: somebody may be taking a slot now
            overlap = case((taken > items.c.overlap, taken), else_=items.c.overlap)
            change = update(items).where(items.c.id == item.id).values(taken=taken, overlap=overlap)
            now_wanted = connection.execute(change.returning(items.c.overlap)).scalar_one()
            if now_wanted != item.overlap:
                log_overlap(connection, item, now_wanted, now)
            ids[batch, key] = item.id
    return ids


def _names(connection: Connection, entries: Sequence[Entry]) -> list[str]:
    """Under which name each entry is kept: its annotator's here, numbered when that one has had the item before."""
    here = NamesHere(connection)
    had = set()
    query = select(assignments.c.item_id, annotators.c.name).join(annotators)
    for chunk in chunks([entry.item for entry in entries]):
        had |= {(row.item_id, row.name) for row in connection.execute(query.where(assignments.c.item_id.in_(chunk)))}
    names = []
    for entry in entries:
        number = 1
        while (entry.item, name := here(f"{entry.annotator}{f'#{number}' if number > 1 else ''}", entry.kind)) in had:
            number += 1
        had.add((entry.item, name))
        names.append(name)
    return names


def take_slot(connection: Connection, item_id: int, now: datetime) -> None:
    """One slot of an item that was done elsewhere, beside those that it has where all are taken."""
    old = connection.execute(select(items).where(items.c.id == item_id)).one()
    taken = items.c.taken + 1  # reckoned by the database: somebody may be taking a slot now
    overlap = case((taken > items.c.overlap, taken), else_=items.c.overlap)
    change = update(items).where(items.c.id == item_id).values(taken=taken, overlap=overlap).returning(items.c.overlap)
    wanted = connection.execute(change).scalar_one()
    if wanted != old.overlap:
        new = {"overlap": wanted, "batch": old.batch, "kind": old.kind}
        log = event(now, "keel", "changed", "item", item_id, {"overlap": old.overlap}, new)
        connection.execute(insert(events), log)


def as_new(reply: Response) -> NewResponse:
    return NewResponse(reply.prompt_id, reply.text, reply.finished, reply.model, reply.fingerprint, reply.sampling)
