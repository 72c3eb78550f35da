"""What those who manage the labelling look at: queues, votes without their texts, disagreements, flags, prompts. Each
function runs inside its caller's transaction."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Row, case, exists, func, or_, select

from keel.store.hand_in import WORK_TABLES
from keel.store.paging import Page, Wanted, holds, messages_hold
from keel.store.people_tables import DIFFER, adjudications, flags, item_votes, thumbs
from keel.store.records import AnnotatorKind, Progress, WorkKind
from keel.store.removals import in_use
from keel.store.review import LastWord, last_words
from keel.store.sides import SIDES, InStore, in_store
from keel.store.standing import done, standing
from keel.store.tables import (
    annotators,
    assignments,
    events,
    item_responses,
    items,
    judgements,
    prompts,
    responses,
)

PEOPLE: tuple[AnnotatorKind, ...] = ("person",)  # who is known to be one: an import may not say


@dataclass(frozen=True, slots=True)
class Queue:
    """One batch's items of one kind: ``wanted`` judgements, ``done``, ``held`` in somebody's hands; ``gold`` items are
    counted by themselves, and what was taken out of use is not."""

    batch: str
    kind: str
    items: int
    wanted: int
    done: int
    held: int
    gold: int

    @property
    def open(self) -> int:
        return self.wanted - self.done - self.held


@dataclass(frozen=True, slots=True)
class Vote:
    """A standing judgement without its texts. ``vote``: first (the response stored first), second, tie; ``longer``:
    whether the preferred response is the longer one, None for a tie and for equal lengths; ``responses``: the ids of
    the first and the second; ``settled``: a reviewer's last word on the item, in the terms of ``vote``."""

    item_id: int
    annotator: str
    kind: str
    vote: InStore
    left: bool | None
    longer: bool | None
    gold: str | None
    seconds: float | None
    created: datetime
    batch: str
    guideline: str | None
    strength: float | None = None
    responses: tuple[int, int] = (0, 1)
    settled: str | None = None


@dataclass(frozen=True, slots=True)
class ThumbVote:
    """A standing thumb without its texts; ``gold``: what it should be, on a gold item."""

    item_id: int
    annotator: str
    kind: str
    up: bool
    gold: bool | None
    seconds: float | None


def queues(connection: Connection) -> list[Queue]:
    """The newest first."""
    plain = items.c.gold.is_(None)
    query = (
        select(
            items.c.batch,
            items.c.kind,
            func.sum(case((plain, 1), else_=0)),
            func.sum(case((plain, items.c.overlap), else_=0)),
            func.sum(case((plain, items.c.taken), else_=0)),
            func.sum(case((plain, 0), else_=1)),
        )
        .where(items.c.out.is_(False))
        .group_by(items.c.batch, items.c.kind)
        .order_by(func.max(items.c.id).desc())
    )
    held = (
        select(items.c.batch, items.c.kind, func.count())
        .select_from(assignments.join(items))
        .where(assignments.c.state == "leased", plain, items.c.out.is_(False))
        .group_by(items.c.batch, items.c.kind)
    )
    in_hands = {(row[0], row[1]): int(row[2]) for row in connection.execute(held)}
    found = []
    for batch, kind, count, wanted, taken, gold in connection.execute(query):
        hands = in_hands.get((batch, kind), 0)
        found.append(Queue(batch, kind, int(count), int(wanted), int(taken) - hands, hands, int(gold)))
    return found


def progress(connection: Connection, batch: str | None, kind: WorkKind) -> Progress:
    """See Store.progress."""
    counted = items.c.gold.is_(None), items.c.out.is_(False), items.c.kind == kind
    wanted = select(func.coalesce(func.sum(items.c.overlap), 0)).where(*counted)
    table = WORK_TABLES[kind].table
    given = done(table, func.count(), func.count(table.c.undone_at)).where(
        *counted
    )  # the second: those that are not NULL
    if batch is not None:
        wanted, given = wanted.where(items.c.batch == batch), given.where(items.c.batch == batch)
    total, undone = connection.execute(given).one()
    return Progress(int(connection.execute(wanted).scalar_one()), total - undone, undone)


def votes(connection: Connection, kinds: Collection[AnnotatorKind] = PEOPLE) -> list[Vote]:
    """Every comparison that stands, by annotators of these kinds, oldest first."""
    length = {
        row.id: row.length
        for row in connection.execute(select(responses.c.id, func.length(responses.c.text).label("length")))
    }
    query = (
        standing(judgements, judgements, assignments.c.item_id, assignments.c.shown, items.c.gold, items.c.batch)
        .add_columns(annotators.c.name, annotators.c.kind)
        .order_by(judgements.c.id)
    )
    query = query.where(annotators.c.kind.in_(kinds))
    settled = last_words(connection)
    return [_vote(row, length, settled.get(row.item_id)) for row in connection.execute(query)]


def _vote(row: Row[Any], length: Mapping[int, int], word: LastWord | None) -> Vote:
    left, longer = None, None
    if row.choice in SIDES:
        left = row.choice == "left"
        better, other = row.shown if left else reversed(row.shown)
        longer = None if length[better] == length[other] else length[better] > length[other]
    return Vote(
        row.item_id, row.name, row.kind, in_store(row.choice, row.shown), left, longer, row.gold, row.seconds,
        row.created, row.batch, row.guideline, row.strength, (min(row.shown), max(row.shown)),
        word.choice if word else None,
    )  # fmt: skip


def thumb_votes(connection: Connection, kinds: Collection[AnnotatorKind] = PEOPLE) -> list[ThumbVote]:
    """Every thumb that stands, by annotators of these kinds, oldest first."""
    query = standing(thumbs, assignments.c.item_id, annotators.c.name, annotators.c.kind, thumbs.c.up, items.c.gold)
    query = query.add_columns(thumbs.c.seconds).where(annotators.c.kind.in_(kinds)).order_by(thumbs.c.id)
    return [
        ThumbVote(row.item_id, row.name, row.kind, row.up, None if row.gold is None else row.gold == "up", row.seconds)
        for row in connection.execute(query)
    ]


def skips(connection: Connection) -> dict[str, int]:
    """How often each annotator skipped."""
    query = select(annotators.c.name, func.count()).select_from(assignments.join(annotators))
    query = query.where(assignments.c.state == "skipped").group_by(annotators.c.name)
    return {row[0]: int(row[1]) for row in connection.execute(query)}


def browse(
    connection: Connection, kind: WorkKind, batch: str | None, gold: bool, wanted: Wanted
) -> Page[dict[str, Any]]:
    """Items of a kind with their texts, oldest first: what gold items are picked from. ``wanted.find``: in the
    prompt."""
    query = select(items, prompts.c.messages).join(prompts).where(items.c.kind == kind, items.c.out.is_(False))
    query = query.where(items.c.gold.is_not(None) if gold else items.c.gold.is_(None))
    if batch is not None:
        query = query.where(items.c.batch == batch)
    if wanted.find:
        query = query.where(messages_hold(prompts.c.messages, wanted.find))
    rows = connection.execute(wanted.of(query.order_by(items.c.id))).mappings()
    page = wanted.page(dict(row) for row in rows)
    return Page(with_texts(connection, page), wanted, page.more)


def with_texts(connection: Connection, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Item rows, each with ``responses``: its texts in the order they were stored."""
    texts: dict[int, list[str]] = {}
    query = (
        select(item_responses.c.item_id, responses.c.text)
        .join(responses, responses.c.id == item_responses.c.response_id)
        .where(item_responses.c.item_id.in_([row["id"] for row in rows]))
        .order_by(responses.c.id)
    )
    for row in connection.execute(query):
        texts.setdefault(row.item_id, []).append(row.text)
    return [row | {"responses": texts.get(row["id"], [])} for row in rows]


def disagreements(connection: Connection, wanted: Wanted) -> tuple[Page[dict[str, Any]], int]:
    """Comparisons on which people's votes differ and no last word was given, with their texts and votes, oldest first;
    and how many there are. ``wanted.find``: in the prompt."""
    settled = exists().where(adjudications.c.item_id == items.c.id, adjudications.c.undone_at.is_(None))
    query = (
        select(items.c.id)
        .select_from(item_votes.join(items))
        .where(DIFFER, items.c.gold.is_(None), items.c.out.is_(False), ~settled)
    )
    if wanted.find:
        query = query.join(prompts).where(messages_hold(prompts.c.messages, wanted.find))
    count = int(connection.execute(select(func.count()).select_from(query.subquery())).scalar_one())
    page = wanted.page(connection.execute(wanted.of(query.order_by(item_votes.c.item_id))).scalars())
    return Page(_cases(connection, page, votes_on(connection, page)), wanted, page.more), count


def settled_lately(connection: Connection, limit: int = 20) -> list[dict[str, Any]]:
    """The comparisons that reviewers settled last, with texts, votes and the ``word``: it may be taken back."""
    query = select(adjudications.c.item_id).where(adjudications.c.undone_at.is_(None))
    ids = list(connection.execute(query.order_by(adjudications.c.id.desc()).limit(limit)).scalars())
    words = last_words(connection)
    cases = [case | {"word": words[case["id"]]} for case in _cases(connection, ids, votes_on(connection, ids))]
    return sorted(cases, key=lambda case: ids.index(case["id"]))


def _cases(
    connection: Connection, ids: Sequence[int], said: Mapping[int, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    shown = select(items, prompts.c.messages).join(prompts).where(items.c.id.in_(ids)).order_by(items.c.id)
    rows = [dict(row) | {"votes": said[row["id"]]} for row in connection.execute(shown).mappings()]
    return with_texts(connection, rows)


def votes_on(connection: Connection, item_ids: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    """Who said what of each item, with the reason."""
    query = (
        standing(judgements, assignments.c.item_id, assignments.c.shown, judgements, annotators.c.name)
        .where(annotators.c.kind == "person")
        .order_by(judgements.c.id)
    )
    said: dict[int, list[dict[str, Any]]] = {id: [] for id in item_ids}
    for start in range(0, len(item_ids), 500):
        part = item_ids[start : start + 500]
        for row in connection.execute(query.where(assignments.c.item_id.in_(part))):
            vote = "both_bad" if row.choice == "both_bad" else in_store(row.choice, row.shown)
            said[row.item_id].append(
                {"annotator": row.name, "vote": vote, "strength": row.strength, "reason": row.reason}
            )
    return said


def open_flags(connection: Connection, wanted: Wanted) -> Page[dict[str, Any]]:
    """Each with its item, prompt and responses (``id``, ``text``, and the ``model`` that wrote it) in the order in
    which whoever flagged it saw them, oldest first. ``wanted.find``: in what was said, or in a name."""
    query = (
        select(flags, annotators.c.name, items.c.id.label("item_id"), items.c.kind, items.c.out, items.c.prompt_id)
        .add_columns(prompts.c.messages, assignments.c.shown)
        .select_from(flags.join(assignments).join(items, items.c.id == assignments.c.item_id))
        .join(prompts, prompts.c.id == items.c.prompt_id)
        .join(annotators, annotators.c.id == assignments.c.annotator_id)
        .where(flags.c.resolved_at.is_(None))
        .order_by(flags.c.id)
    )
    if wanted.find:
        query = query.where(or_(holds(flags.c.text, wanted.find), holds(annotators.c.name, wanted.find)))
    page = wanted.page(dict(row) for row in connection.execute(wanted.of(query)).mappings())
    query = select(responses.c.id, responses.c.text, responses.c.model)
    query = query.where(responses.c.id.in_({id for row in page for id in row["shown"]}))
    replies = {row["id"]: dict(row) for row in connection.execute(query).mappings()}
    rows = [row | {"responses": [replies[id] for id in row["shown"]]} for row in page]
    return Page(rows, wanted, page.more)


def count_flags(connection: Connection) -> int:
    """How many are open."""
    return int(connection.execute(select(func.count()).where(flags.c.resolved_at.is_(None))).scalar_one())


def prompt_figures(connection: Connection) -> dict[str, int]:
    """How many prompts there are, and responses."""
    counts = {"prompts": prompts, "responses": responses}
    return {
        name: int(connection.execute(select(func.count()).select_from(table)).scalar_one())
        for name, table in counts.items()
    }


def newest_prompts(connection: Connection, wanted: Wanted) -> Page[dict[str, Any]]:
    """``wanted.find``: in the messages, or the whole id."""
    replies = select(func.count()).where(responses.c.prompt_id == prompts.c.id).scalar_subquery()
    query = select(prompts.c.id, prompts.c.messages, prompts.c.kind, replies.label("responses"))
    if wanted.find:
        query = query.where(or_(prompts.c.id == wanted.find, messages_hold(prompts.c.messages, wanted.find)))
    query = wanted.of(query.order_by(prompts.c.created.desc(), prompts.c.id))
    return wanted.page(dict(row) for row in connection.execute(query).mappings())


def prompts_with_fewest(connection: Connection, limit: int, but: Collection[str] = ()) -> list[str]:
    """Ids of the prompts with the fewest responses, ``but`` for some: who asks for more wants them there first."""
    replies = select(func.count()).where(responses.c.prompt_id == prompts.c.id).scalar_subquery()
    found = connection.execute(
        select(prompts.c.id).where(in_use(prompts.c.id)).order_by(replies, prompts.c.id)
    ).scalars()
    return list(islice((id for id in found if id not in but), limit))


def last_event(connection: Connection) -> int:
    """The number of the last thing that happened: while it is the same, so is every figure."""
    return int(connection.execute(select(func.coalesce(func.max(events.c.id), 0))).scalar_one())
