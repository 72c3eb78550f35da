"""What readers of other labelling tools' files share: how a project calls its fields, and judgements of what was said.
The tools themselves: ``argilla.py`` and ``label_studio.py``; their table: ``forms.py``.

Those tools let a project name its fields as it likes. ``Names`` says what they are called; where it is silent they are
found by the names that the tools' own templates use. What is no vote is left, and each thing that is left is said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import combinations
from typing import Any

from keel.store.records import Judgement, Response
from keel.store.sides import SIDES, Choice, Side
from keel.types import Prompt

PROMPTS = ("prompt", "instruction", "question", "input", "query", "context", "text")
FIRST_WORDS, SECOND_WORDS = {"left", "first", "a", "1"}, {"right", "second", "b", "2"}
TIE_WORDS = {"tie", "equal", "same", "draw", "both", "bothgood", "similar"}
BAD_WORDS = {"bothbad", "neither"}
REASONS = ("reason", "comment", "explanation", "rationale", "justification", "why", "feedback")
MODELS = ("model", "generator")

Row = Mapping[str, Any]
Ask = Callable[[Any], Prompt]
"""What a row holds as the prompt (a text, messages) -> the prompt."""


class ForeignError(Exception):
    """What is wrong with a row, and what to do about it."""


@dataclass(frozen=True, slots=True)
class Names:
    """What a project calls its fields: the ``prompt``, the ``responses`` in the order shown, the ``question``."""

    prompt: str | None = None
    responses: tuple[str, ...] = ()
    question: str | None = None


@dataclass(slots=True)
class Taken:
    """What a row gave: its ``votes``; in words what was ``left``, one by one; and ``notes`` on what was taken."""

    votes: list[Judgement] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Said:
    """What one person said of one row: an order of responses (by field, its rank: 1 is best, equals are a tie), or
    that both are bad, and what came beside it."""

    token: str
    annotator: str
    ranks: Mapping[str, int]
    both_bad: bool = False
    seconds: float | None = None
    created: datetime | None = None
    reason: str | None = None
    strength: int | None = None
    ratings: dict[str, dict[str, int]] = field(default_factory=dict)  # by response's field, by aspect


# ------------------------------------------------------------------------------------------------- what was said


def choice_of(said: Any, shown: Sequence[str]) -> Choice:
    """A label's word as a choice between the fields ``shown``; a field's own name goes before any word."""
    word = bare(said)
    for side, name in zip(SIDES, shown, strict=True):
        if word == bare(name):
            return side
    if word in FIRST_WORDS | SECOND_WORDS:
        return "left" if word in FIRST_WORDS else "right"
    if word in TIE_WORDS | BAD_WORDS:
        return "tie" if word in TIE_WORDS else "both_bad"
    raise ForeignError(
        f"the answer {said!r} is none of {shown[0]}, {shown[1]}, left, right, tie, both bad; rename it in the file, or "
        "say which question compares them with --question NAME"
    )


def ranks_of(choice: Choice, shown: Sequence[str]) -> dict[str, int]:
    return {shown[0]: 2 if choice == "right" else 1, shown[1]: 2 if choice == "left" else 1}


def field_of(said: Any, fields: Row) -> str:
    """The field that a ranking's option names."""
    for name in fields:
        if bare(name) == bare(said):
            return name
    raise ForeignError(f"the ranking names {said!r}, and the fields are {', '.join(fields)}; rename one of them")


def is_reason(question: str) -> bool:
    """Whether a question for a text asks why, by its name. Another text may be a corrected reply: no reason."""
    return any(word in bare(question) for word in REASONS)


def rating(question: str, about: str, value: Any) -> tuple[str, int] | None:
    """(aspect, 1 to 5) of a rating of the response ``about``; None where it is none that Keel can hold."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 5:
        return None
    aspect = re.sub(rf"^{re.escape(about)}[-_/. ]+|[-_/. ]+{re.escape(about)}$", "", question)
    return aspect or question, value


def judgements(fields: Row, beside: Row, prompt: Prompt, said: Said, now: datetime) -> Taken:
    """Each pair of the responses that ``said`` orders as a judgement, in the fields' order. ``beside``: where the names
    of their models may stand."""
    taken = Taken()
    order = [name for name in fields if name in said.ranks]
    for first, second in combinations(order, 2):
        texts = reply(fields, first), reply(fields, second)
        if texts[0].strip() == texts[1].strip():
            taken.left.append("both responses are the same text")
            continue
        ranks = said.ranks[first], said.ranks[second]
        choice: Choice = "both_bad" if said.both_bad else "tie" if ranks[0] == ranks[1] else "left"
        choice = "right" if ranks[0] > ranks[1] else choice
        rated: dict[Side, dict[str, int]] = {
            side: said.ratings[name]
            for side, name in zip(SIDES, (first, second), strict=True)
            if said.ratings.get(name) and len(order) == 2
        }
        left, right = (
            Response(0, prompt.id, text, True, model_of(name, fields, beside), "", None, now)
            for name, text in zip((first, second), texts, strict=True)
        )
        taken.votes.append(
            Judgement(
                token=said.token if len(order) == 2 else f"{said.token}/{first},{second}",
                batch="import",
                item_id=0,
                annotator=said.annotator or "import",
                annotator_kind="unknown",
                prompt=prompt,
                left=left,
                right=right,
                choice=choice,
                strength=said.strength if choice in SIDES else None,
                seconds=said.seconds,
                guideline=None,
                reason=said.reason,
                created=said.created or now,
                ratings=rated,
            )
        )
    return taken


# ----------------------------------------------------------------------------------------------------- fields


def bare(name: Any) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def prompt_name(fields: Row, names: Names) -> str:
    name = names.prompt or next((name for name in PROMPTS if name in fields), None)
    if name is None or name not in fields:
        raise ForeignError(f"no prompt among the fields {', '.join(fields)}; name it with --prompt FIELD")
    return name


def two_responses(fields: Row, names: Names) -> tuple[str, str]:
    """The two compared fields: those named, else the only two texts that are neither the prompt nor a model's name, or
    of more the only two whose names differ in their ends alone (``answer_a``, ``answer_b``)."""
    found = names.responses or tuple(
        name
        for name, value in fields.items()
        if isinstance(value, str) and name not in (prompt_name(fields, names), "context") and not _names(name)
    )
    if len(found) > 2 and not names.responses:
        stems = [re.sub(r"[-_. ]*(1|2|a|b|left|right|first|second)$", "", name.lower()) for name in found]
        found = tuple(name for name, stem in zip(found, stems, strict=True) if stem and stems.count(stem) == 2)
    if len(found) != 2:
        raise ForeignError(
            f"which of the fields {', '.join(fields)} are the two responses is not clear; give --responses LEFT,RIGHT"
        )
    return found[0], found[1]


def _names(name: str) -> bool:
    return any(word in bare(name) for word in MODELS)


def model_of(response: str, *places: Row) -> str:
    """The model that wrote the response of this field: beside ``response_a`` stands it in ``response_a_model``,
    ``model_a``, ``generator_a`` or the like. Empty where nothing says it."""
    whole = bare(response)
    short = re.sub(r"^(response|answer|output|completion|reply|text|candidate|option)", "", whole) or whole
    wanted = {form for word in MODELS for end in (whole, short) for form in (f"{end}{word}", f"{word}{end}")}
    for place in places:
        for name, value in place.items():
            if bare(name) in wanted and isinstance(value, str) and name != response:
                return value
    return ""


def reply(fields: Row, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise ForeignError(f"the response {name!r} is {json.dumps(value, default=str)[:40]}; expected a text")
    return value


def moment(value: Any, name: str) -> datetime | None:
    """A date as these tools write it, in UTC; None where there is none. ForeignError for what is no date: it would
    pass for now."""
    if value is None or value == "":
        return None
    try:
        time = datetime.fromisoformat(str(value))
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ForeignError(f"{name} is {value!r}; expected a date such as 2026-03-01T10:00:00Z") from None


def duration(value: Any) -> float | None:
    """A time taken, in seconds; None where it is not known."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        return None
    return seconds if 0 <= seconds < float("inf") else None
