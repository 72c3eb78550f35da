"""Votes on their way to another labelling tool: a pair of responses with all that people said of it, and what the
tool's form cannot hold, counted.

Rankings go as their pairs. Where a reviewer settled a pair, that word goes in the place of the votes, as everywhere
where something is learned. Gold items and what was taken out of use stay here: over there nothing would mark them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from keel.store.records import Edit, Judgement, Ranking, Response
from keel.store.sides import SIDES, Choice, Side
from keel.types import Prompt

A, B = "response_a", "response_b"
FIELDS = (A, B)
LABELS = (A, B, "tie", "both_bad")  # the four answers, in both tools


@dataclass(frozen=True, slots=True)
class Answer:
    """What one person said of a pair, in its order. ``ratings``: by field, by aspect."""

    annotator: str
    choice: Choice
    created: datetime
    strength: int | None = None
    seconds: float | None = None
    reason: str | None = None
    ratings: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return LABELS[("left", "right", "tie", "both_bad").index(self.choice)]


@dataclass(slots=True)
class Pair:
    """Two responses in the order of their texts' hashes, so that no tool's page tells which was stored first, with
    everybody's answers."""

    id: str
    prompt: Prompt
    responses: tuple[Response, Response]
    answers: list[Answer] = field(default_factory=list)


@dataclass(slots=True)
class Handover:
    """The pairs, and in words what does not go along: how many of each."""

    pairs: list[Pair] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)

    @property
    def answers(self) -> int:
        return sum(len(pair.answers) for pair in self.pairs)


def handover(given: Sequence[Judgement | Ranking | Edit]) -> Handover:
    """The pairs of what was given, each once."""
    out, pairs, words = Handover(), dict[str, Pair](), dict[str, Answer]()
    for one in given:
        if isinstance(one, Edit):
            out.left["edits (export them as trl)"] += 1
        elif one.out:
            out.left["votes on items that were taken out of use"] += 1
        elif isinstance(one, Ranking):
            for a, b, first, second in one.pairs:
                choice: Choice = "tie" if first == second else "left"
                said = Answer(one.annotator, choice, one.created, reason=one.reason)
                _add(pairs, one.prompt, (one.shown[a], one.shown[b]), said)
            out.left["rankings as such (their pairs go along, without the time that they took)"] += 1
        elif one.gold is not None:
            out.left["votes on gold items"] += 1
        else:
            pair, turned = _add(pairs, one.prompt, (one.left, one.right), _said(one, out))
            if one.settled is not None:
                by, when = one.settled_by or "reviewer", one.settled_at or one.created
                word = Answer(by, one.settled, when, reason=one.settled_reason)
                words[pair.id] = _turned(word) if turned else word
    for id, word in words.items():  # the later word counts, as where something is learned
        out.left["votes in whose place goes a reviewer's word"] += len(pairs[id].answers)
        pairs[id].answers = [word]
    out.pairs = list(pairs.values())
    return out


def _said(vote: Judgement, out: Handover) -> Answer:
    if vote.guideline is not None:
        out.left["guideline versions"] += 1
    if vote.probability is not None:
        out.left["probabilities"] += 1
    strength = int(vote.strength) if vote.strength in (1, 2, 3) else None
    if vote.strength is not None and strength is None:
        out.left["strengths that are not 1, 2 or 3"] += 1
    names: dict[Side, str] = dict(zip(SIDES, FIELDS, strict=True))
    ratings = {names[side]: dict(values) for side, values in vote.ratings.items() if values}
    return Answer(vote.annotator, vote.choice, vote.created, strength, vote.seconds, vote.reason, ratings)


def _add(pairs: dict[str, Pair], prompt: Prompt, shown: tuple[Response, Response], said: Answer) -> tuple[Pair, bool]:
    """Put what was said of ``shown`` to the pair of these two responses; the pair, and whether it has them the other
    way round."""
    keys = [hashlib.sha256(f"{prompt.id}\0{reply.text}".encode()).hexdigest() for reply in shown]
    turned = keys[0] > keys[1]
    id = hashlib.sha256("".join(sorted(keys)).encode()).hexdigest()[:20]
    pair = pairs.setdefault(id, Pair(id, prompt, (shown[1], shown[0]) if turned else shown))
    pair.answers.append(_turned(said) if turned else said)
    return pair, turned


def _turned(answer: Answer) -> Answer:
    other: dict[Choice, Choice] = {"left": "right", "right": "left"}
    ratings = {FIELDS[1 - FIELDS.index(name)]: values for name, values in answer.ratings.items()}
    return replace(answer, choice=other.get(answer.choice, answer.choice), ratings=ratings)


def as_messages(pairs: Sequence[Pair]) -> bool:
    """Whether some prompt is more than one message of a user: then all go as lists of messages."""
    return any(len(pair.prompt.messages) != 1 or pair.prompt.messages[0].role != "user" for pair in pairs)


def aspects(pairs: Sequence[Pair]) -> list[str]:
    """What the responses are rated on, in the order in which it comes."""
    rated = (name for pair in pairs for said in pair.answers for values in said.ratings.values() for name in values)
    return list(dict.fromkeys(rated))
