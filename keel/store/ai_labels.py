"""What a model that judges by principles was asked about a pair, and what it said: the rows that lead from a vote to a
principle. Each function runs inside its caller's transaction."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from sqlalchemy import ColumnElement, Connection, func, insert, select

from keel.store.records import AnnotatorKind
from keel.store.rows import storable
from keel.store.tables import ai_labels, annotators, assignments, items, judgements, prompts

T = TypeVar("T")

AT_ONCE = 500  # tokens in one query


@dataclass(frozen=True, slots=True)
class AiLabel:
    """One principle's part of a vote. ``left_first``, ``left_second``: P(the left reply is better), read with it shown
    first, and second. ``asked``: the text as sent in the first order, empty for a Python function; ``thought``: the
    reasons that were written before the answer. ``asked_second``, ``thought_second``: the same of the second order,
    which older labels have not."""

    principle: str
    principle_hash: str
    constitution: str
    constitution_hash: str
    left_first: float | None
    left_second: float | None
    asked: str = ""
    thought: str | None = None
    asked_second: str | None = None
    thought_second: str | None = None


@dataclass(frozen=True, slots=True)
class Traced:
    """``votes`` of one kind of annotator on prompts of one kind, under one principle ("" where none was asked). A vote
    under several principles counts under each."""

    annotator_kind: AnnotatorKind
    prompt_kind: str
    principle: str
    principle_hash: str
    constitution: str
    votes: int


def add(connection: Connection, judgement_id: int, labels: Sequence[AiLabel], now: datetime) -> None:
    """Puts the labels beside the vote that they make up; once, however often the vote is sent."""
    there = select(ai_labels.c.id).where(ai_labels.c.judgement_id == judgement_id).limit(1)
    if not labels or connection.execute(there).first() is not None:
        return
    rows = [
        {
            "judgement_id": judgement_id,
            "principle_id": label.principle,
            "principle_hash": label.principle_hash,
            "constitution": label.constitution,
            "constitution_hash": label.constitution_hash,
            "p_left_first": label.left_first,
            "p_left_second": label.left_second,
            "asked": storable(label.asked),
            "thought": _kept(label.thought),
            "asked_second": _kept(label.asked_second),
            "thought_second": _kept(label.thought_second),
            "created": now,
        }
        for label in labels
    ]
    connection.execute(insert(ai_labels), rows)


def _kept(text: str | None) -> str | None:
    return None if text is None else storable(text)


def of(connection: Connection, tokens: Collection[str]) -> dict[str, list[AiLabel]]:
    """The labels of each of the votes with these tokens that has any, in the order in which its principles were
    drawn."""
    found: dict[str, list[AiLabel]] = {}
    for some in _parts(list(tokens)):
        query = select(ai_labels, judgements.c.token).join(judgements).where(judgements.c.token.in_(some))
        query = query.order_by(ai_labels.c.id)
        for row in connection.execute(query):
            label = AiLabel(
                row.principle_id, row.principle_hash, row.constitution, row.constitution_hash, row.p_left_first,
                row.p_left_second, row.asked, row.thought, row.asked_second, row.thought_second,
            )  # fmt: skip
            found.setdefault(row.token, []).append(label)
    return found


def labelled(connection: Connection, tokens: Collection[str]) -> set[str]:
    """Those of the votes with these tokens that have labels."""
    found: set[str] = set()
    for some in _parts(list(tokens)):
        query = select(judgements.c.token).distinct().join(ai_labels, ai_labels.c.judgement_id == judgements.c.id)
        found |= set(connection.execute(query.where(judgements.c.token.in_(some))).scalars())
    return found


def trace(connection: Connection, tokens: Collection[str]) -> list[Traced]:
    """What the votes with these tokens (a model's training records) rest on: whose they are, on which kinds of prompts,
    and under which version of which principle."""
    counts: dict[tuple[AnnotatorKind, str, str, str, str], int] = {}
    for some in _parts(list(tokens)):
        for key, votes in _counts(connection, judgements.c.token.in_(some)):
            counts[key] = counts.get(key, 0) + votes
    return [Traced(*key, votes) for key, votes in sorted(counts.items())]


def judged_prompts(connection: Connection) -> set[str]:
    """The prompts on which a model judged pairs by principles."""
    query = select(items.c.prompt_id.distinct()).join(assignments, assignments.c.item_id == items.c.id)
    query = query.join(judgements, judgements.c.assignment_id == assignments.c.id)
    return set(connection.execute(query.join(ai_labels, ai_labels.c.judgement_id == judgements.c.id)).scalars())


def _parts(values: Sequence[T]) -> Iterator[Sequence[T]]:
    return (values[i : i + AT_ONCE] for i in range(0, len(values), AT_ONCE))


def _counts(
    connection: Connection, which: ColumnElement[bool]
) -> Iterator[tuple[tuple[AnnotatorKind, str, str, str, str], int]]:
    said = (ai_labels.c.principle_id, ai_labels.c.principle_hash, ai_labels.c.constitution)
    groups = (annotators.c.kind, prompts.c.kind.label("prompt"), *said)
    query = (
        select(*groups, func.count(judgements.c.id.distinct()))
        .select_from(judgements)
        .join(assignments, assignments.c.id == judgements.c.assignment_id)
        .join(annotators, annotators.c.id == assignments.c.annotator_id)
        .join(items, items.c.id == assignments.c.item_id)
        .join(prompts, prompts.c.id == items.c.prompt_id)
        .outerjoin(ai_labels, ai_labels.c.judgement_id == judgements.c.id)
        .where(which)
        .group_by(*groups)
    )
    for row in connection.execute(query):
        yield (row[0], row[1] or "", row[2] or "", row[3] or "", row[4] or ""), row[5]
