"""Replies that people judge step by step: what is asked, what is handed in, and what that is as training records. Each
function runs inside its caller's transaction.

How a reply is cut is settled when it is queued, so that a label always belongs to the step that was looked at. Part of
a queue is drawn at random and says so, whatever order the rest comes in: figures over replies that were chosen for what
they teach would be those of no population.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select, update

from keel.recipe.steps import Steps
from keel.store import people, queue
from keel.store.blind import DRAW
from keel.store.given import some_at_a_time, texts_of, with_context
from keel.store.hand_in import STEPS, record
from keel.store.ingest import insert_missing, rows_of
from keel.store.people_tables import step_items, step_labels
from keel.store.records import AnnotatorKind
from keel.store.removals import in_use
from keel.store.rows import MARK, prompt_record, storable
from keel.store.standing import standing
from keel.store.step_records import MOST_STEPS, Drawn, Mark, Neutral, NewSteps, Outcome, StepJudgement
from keel.store.tables import annotators, assignments, item_responses, items, prompts, responses
from keel.store.work import add_single
from keel.types import Prompt, StepLabels, UserError

BATCH = "steps"
RANDOM_SHARE = 0.2  # of a queue in an order: what is drawn at random all the same
_SPLIT, _REFERENCE = "steps", "step_reference"  # names of settings


# ------------------------------------------------------------------------------------------------------------- settings


def splitter(connection: Connection) -> Steps | None:
    """How replies are cut that are queued from now on; None: nobody has said so."""
    value = people.setting(connection, _SPLIT, None)
    return None if value is None else Steps.model_validate(value)


def set_splitter(connection: Connection, split: Steps, actor: str, now: datetime) -> None:
    if splitter(connection) != split:
        people.set_setting(connection, _SPLIT, split.model_dump(), actor, now)


def reference_allowed(connection: Connection) -> bool:
    """Whether people who label steps may see a prompt's reference answer."""
    return bool(people.setting(connection, _REFERENCE, True))


def allow_reference(connection: Connection, allowed: bool, actor: str, now: datetime) -> None:
    people.set_setting(connection, _REFERENCE, allowed, actor, now)


# ------------------------------------------------------------------------------------------------------- what is wanted


@dataclass(frozen=True, slots=True)
class OpenReply:
    """A reply that is in no queue of steps, cut: two steps or more."""

    id: int
    prompt: Prompt
    steps: tuple[str, ...]


def open_replies(connection: Connection, split: Steps) -> tuple[list[OpenReply], int]:
    """Every reply in use that is in no queue of steps, oldest first, of several with one text the first; and how many
    were left out, since ``split`` makes one step of them. So are those of more than `MOST_STEPS`."""
    asked = set(connection.execute(select(items.c.key).where(items.c.kind == "step")).scalars())
    query = select(responses.c.id, responses.c.text, responses.c.prompt_id).order_by(responses.c.id)
    rows = connection.execute(query.where(in_use(responses.c.prompt_id, responses.c.id))).all()
    seen = {(row.prompt_id, row.text) for row in rows if f"step/{row.id}" in asked}
    fresh = []
    for row in rows:
        if (row.prompt_id, row.text) not in seen:
            seen.add((row.prompt_id, row.text))
            fresh.append((row, split.split(row.text)))
    several = [(row, steps) for row, steps in fresh if 1 < len(steps) <= MOST_STEPS]
    named = sorted({row.prompt_id for row, _ in several})
    prompt = {row.id: prompt_record(row) for row in rows_of(connection, prompts, prompts.c.id, named)}
    single = sum(len(steps) < 2 for _, steps in fresh)
    return [OpenReply(row.id, prompt[row.prompt_id], steps) for row, steps in several], single


def queue_replies(
    connection: Connection,
    split: Steps,
    count: int,
    overlap: int,
    now: datetime,
    gains: Mapping[int, float] | None = None,
) -> int:
    """Queue up to ``count`` replies that were not yet, and say how many. ``gains``: what a label on a reply teaches, by
    its id; those with the greatest gains come first, and where they are too few others behind them, but for
    `RANDOM_SHARE`, which is drawn among all and comes anywhere between. Without it all are drawn at random. UserError
    where every reply has one step."""
    found, single = open_replies(connection, split)
    if single and not found:
        raise UserError(
            f"each of the {single} replies that are left is a single step by {named(split)}; choose another way to cut"
        )
    ids = [reply.id for reply in found]
    count = min(count, len(ids))
    order, ranked = (DRAW.sample(ids, count), None) if gains is None else _in_order(ids, count, gains)
    add_steps(connection, order, split, overlap, BATCH, now, ranked)
    return count


def _in_order(ids: Sequence[int], count: int, gains: Mapping[int, float]) -> tuple[list[int], set[int]]:
    """``count`` replies in the order in which they are asked about, and those that were not drawn at random."""
    drawn = DRAW.sample(ids, min(count, max(1, round(RANDOM_SHARE * count))))
    rest = [id for id in ids if id not in set(drawn)]
    best = sorted((id for id in rest if id in gains), key=lambda id: (-gains[id], id))
    others = [id for id in rest if id not in gains]
    ranked = [*best, *DRAW.sample(others, len(others))][: count - len(drawn)]
    places = set(DRAW.sample(range(count), len(drawn)))
    at_random, by_gain = iter(drawn), iter(ranked)
    return [next(at_random) if place in places else next(by_gain) for place in range(count)], set(ranked)


def add_steps(
    connection: Connection,
    response_ids: Sequence[int],
    split: Steps,
    overlap: int,
    batch: str,
    now: datetime,
    ranked: Collection[int] | None = None,
) -> list[int]:
    """Items that ask for labels on the steps of each response; their ids. ``ranked``: they come in the order given, and
    these stand where they do for what they teach; the others, and without it all, were drawn at random. UserError for a
    response of one step."""
    for row in rows_of(connection, responses, responses.c.id, sorted(set(response_ids))):
        if len(split.split(row.text)) < 2:
            raise UserError(f"response {row.id} is a single step by {named(split)}; choose another way to cut")
    ids = add_single(connection, "step", response_ids, overlap, batch, now)
    chosen = [(id, "random" if ranked is None or response not in ranked else "ranked")
              for id, response in zip(ids, response_ids, strict=True)]  # fmt: skip
    there = {row.item_id for row in rows_of(connection, step_items, step_items.c.item_id, ids)}
    rows = [{"item_id": id, "steps": split.model_dump(), "drawn": drawn} for id, drawn in chosen if id not in there]
    insert_missing(connection, step_items, rows)
    if ranked is not None:
        for place, id in enumerate(ids, start=1):  # between two whole numbers, as ranked pairs are (priority.py)
            if id not in there:
                turn = place / (len(ids) + 1) - 1
                connection.execute(update(items).where(items.c.id == id).values(turn=turn))
    return ids


def named(split: Steps) -> str:
    return f"{split.by} {split.marker!r}" if split.marker else split.by


# --------------------------------------------------------------------------------------------------------- what is done


@dataclass(frozen=True, slots=True)
class Sheet:
    """What a page shows of a reply: its steps, and the reference answer where there is one and it may be shown."""

    steps: tuple[str, ...]
    reference: str | None


def sheet(connection: Connection, item_id: int, prompt: Prompt, reply: str) -> Sheet:
    answer = prompt.meta.get("answer")
    shown = answer is not None and answer != "" and reference_allowed(connection)
    return Sheet(_cut(connection, item_id, reply), str(answer) if shown else None)


def _cut(connection: Connection, item_id: int, reply: str) -> tuple[str, ...]:
    split = connection.execute(select(step_items.c.steps).where(step_items.c.item_id == item_id)).scalar_one()
    return Steps.model_validate(split).split(reply)


def cut_up(connection: Connection, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Item rows with their texts (`keel.store.overview.with_texts`), each with ``cut``, its steps, and ``numbers``, the
    answers that say which step is the first bad one."""
    found = []
    for row in rows:
        cut = _cut(connection, row["id"], row["responses"][0])
        numbers = [(str(number), f"Step {number} is bad") for number in range(1, len(cut) + 1)]
        found.append(row | {"cut": cut, "numbers": numbers})
    return found


def hand_in(
    connection: Connection, assignment_id: int, given: NewSteps, *, annotator_id: int | None, now: datetime
) -> int:
    """Count the labels on a reply's steps, once, and return their id. They count also when the lease ran out and
    somebody else was given the reply: one more does no harm, and takes long to give. ``annotator_id``: whose the
    assignment must be; None: anybody's."""
    query = (
        select(assignments.c.item_id, responses.c.text)
        .join(items, items.c.id == assignments.c.item_id)
        .join(item_responses, item_responses.c.item_id == items.c.id)
        .join(responses, responses.c.id == item_responses.c.response_id)
        .where(assignments.c.id == assignment_id, items.c.kind == "step")
    )
    row = connection.execute(query).first()
    if row is None:
        raise queue.not_yours()
    steps = _cut(connection, row.item_id, row.text)
    if row.text != MARK and len(given.labels) != len(steps):
        raise UserError(f"there are {len(given.labels)} labels for {len(steps)} steps; load the page again")
    id, _ = record(connection, STEPS, assignment_id, given, values_of(given), {}, annotator_id=annotator_id, now=now)
    return id


def values_of(given: NewSteps) -> dict[str, Any]:
    """The columns of its own."""
    return {
        "labels": list(given.labels),
        "outcome": given.outcome,
        "reasons": list(given.reasons),
        "correction": _words(given.correction),
        "note": _words(given.note),
        "reference_shown": given.reference_shown,
        "step_seconds": list(given.step_seconds),
    }


def _words(text: str | None) -> str | None:
    return None if text is None or not text.strip() else storable(text.strip())


def taken_back(connection: Connection, assignment_id: int) -> dict[str, Any] | None:
    """What somebody last handed in for an assignment and took back: it stands on the page again."""
    columns = step_labels.c.labels, step_labels.c.reasons, step_labels.c.correction, step_labels.c.note
    query = select(*columns, step_labels.c.step_seconds, step_labels.c.reference_shown)
    query = query.where(step_labels.c.assignment_id == assignment_id)
    row = connection.execute(query.order_by(step_labels.c.id.desc()).limit(1)).mappings().first()
    return None if row is None else dict(row)


# ------------------------------------------------------------------------------------------------- as training records


def given(
    connection: Connection, batch: str | None = None, kinds: Collection[AnnotatorKind] | None = None
) -> list[StepJudgement]:
    """Every judgement of steps that stands, in the order they came, but those on replies whose text was erased;
    ``kinds``: of annotators of these kinds alone."""
    return [one for one in stream(connection, batch) if kinds is None or one.annotator_kind in kinds]


def stream(connection: Connection, batch: str | None = None) -> Iterator[StepJudgement]:
    """The same of everybody, read as they are asked for."""
    query = with_context(step_labels, batch).join(step_items, step_items.c.item_id == items.c.id)
    for rows in some_at_a_time(connection, query.add_columns(items.c.gold, step_items.c.steps, step_items.c.drawn)):
        asked, replies = texts_of(connection, [row.shown[0] for row in rows], rows)
        for row in rows:
            if replies[row.shown[0]].text != MARK:
                yield StepJudgement(
                    row.token, row.batch, row.name, row.annotator_kind, asked[row.prompt_id], replies[row.shown[0]],
                    Steps.model_validate(row.steps), tuple(row.labels), row.outcome, tuple(row.reasons), row.correction,
                    row.note, row.reference_shown, row.seconds, tuple(row.step_seconds), row.guideline, row.created,
                    row.drawn, row.gold, row.out,
                )  # fmt: skip


def labels(
    connection: Connection,
    neutral: Neutral = "good",
    batch: str | None = None,
    kinds: Collection[AnnotatorKind] | None = None,
    drawn: Drawn | None = None,
) -> list[StepLabels]:
    """What training takes of them. ``neutral``: what a neutral step counts as; ``drawn``: on replies that came so into
    the queue alone."""
    found = [one for one in given(connection, batch, kinds) if drawn in (None, one.drawn)]
    return [example for one in found for example in one.examples(neutral)]


# ----------------------------------------------------------------------------------------------------------- as figures


@dataclass(frozen=True, slots=True)
class StepVote:
    """A standing judgement of steps without its texts; ``gold``: where the first bad step is, on a gold item."""

    item_id: int
    prompt_id: str
    annotator: str
    kind: str
    labels: tuple[Mark | None, ...]
    outcome: Outcome
    gold: str | None
    seconds: float | None
    reference_shown: bool
    drawn: Drawn


def votes(connection: Connection, kinds: Collection[AnnotatorKind]) -> list[StepVote]:
    """Every judgement of steps that stands, by annotators of these kinds, oldest first."""
    query = standing(step_labels, step_labels, assignments.c.item_id, items.c.prompt_id, items.c.gold)
    query = query.add_columns(annotators.c.name, annotators.c.kind, step_items.c.drawn)
    query = query.join(step_items, step_items.c.item_id == items.c.id).where(annotators.c.kind.in_(kinds))
    return [
        StepVote(
            row.item_id, row.prompt_id, row.name, row.kind, tuple(row.labels), row.outcome, row.gold, row.seconds,
            row.reference_shown, row.drawn,
        )
        for row in connection.execute(query.order_by(step_labels.c.id))
    ]  # fmt: skip
