"""Rows of other labelling tools' exports -> judgements: Argilla's records and Label Studio's tasks.

Both let a project name its fields as it likes. ``Names`` says what they are called; where it is silent they are found
by the names that the tools' own templates use. A row says who voted for what, so each vote is one judgement, with the
time taken and the side where the tool tells them. What nobody decided (skipped, cancelled, a draft) gives none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from typing import Any

from keel.store.records import Judgement, Response
from keel.store.sides import Choice
from keel.types import Prompt

PROMPTS = ("prompt", "instruction", "question", "input", "query", "context", "text")
FIRST_WORDS, SECOND_WORDS = {"left", "first", "a", "1"}, {"right", "second", "b", "2"}
TIE_WORDS = {"tie", "equal", "same", "draw", "neither", "both", "bothgood", "bothbad", "similar"}

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


def is_label_studio(row: Row) -> bool:
    return isinstance(row.get("data"), Mapping) and isinstance(row.get("annotations"), list)


def is_argilla(row: Row) -> bool:
    return bool(_argilla_answers(row))


# ------------------------------------------------------------------------------------------------------ Label Studio


def from_label_studio(task: Row, names: Names, ask: Ask, now: datetime) -> list[Judgement]:
    """A task of the JSON export: ``data``, and ``annotations`` whose ``result`` has a Pairwise (or Choices) answer.
    The annotation's time (``lead_time``) and date come along."""
    data = task["data"]
    found = []
    for annotation in task["annotations"]:
        answers = [
            result
            for result in annotation.get("result") or []
            if result.get("type") in ("pairwise", "choices") and names.question in (None, result.get("from_name"))
        ]
        if annotation.get("was_cancelled") or not answers:
            continue
        answer = answers[0]
        shown = names.responses or _compared(data, answer, names)
        if len(shown) != 2:
            raise ForeignError(f"names {len(shown)} responses, and a comparison has two; give --responses LEFT,RIGHT")
        said = answer["value"].get("selected") or (answer["value"].get("choices") or [""])[0]
        choice = _choice(said, shown)
        who = annotation.get("completed_by")
        left, right = (_text(data, name) for name in shown)
        found.append(
            _judgement(
                token=f"label-studio/{task.get('id')}/{annotation.get('id')}",
                annotator=str(who.get("email") or who.get("id")) if isinstance(who, Mapping) else str(who or ""),
                prompt=ask(data[_prompt_name(data, names)]),
                left=left,
                right=right,
                choice=choice,
                seconds=annotation.get("lead_time"),
                created=_time(annotation.get("created_at"), now),
            )
        )
    return found


def _compared(data: Row, answer: Row, names: Names) -> tuple[str, ...]:
    """The two compared fields: those that the tag names, else the only two that are no prompt."""
    named = tuple(part.strip() for part in str(answer.get("to_name", "")).split(","))
    if len(named) == 2 and all(name in data for name in named):
        return named
    others = tuple(name for name in data if name != _prompt_name(data, names) and isinstance(data[name], str))
    if len(others) == 2:
        return others
    raise ForeignError(
        f"which of the fields {', '.join(data)} are the two responses is not clear; give --responses LEFT,RIGHT"
    )


# ----------------------------------------------------------------------------------------------------------- Argilla


def from_argilla(record: Row, names: Names, ask: Ask, now: datetime) -> list[Judgement]:
    """A record as ``to_json``, ``to_list`` or ``to_datasets`` write it, of version 1 or 2, with the answers to one
    label question (of two responses) or ranking question (of any number; each pair of them is a judgement)."""
    answers = _argilla_answers(record)
    question = names.question or (next(iter(answers)) if len(answers) == 1 else "preference")
    if not answers or (names.question and question not in answers):  # nobody has answered it
        return []
    if question not in answers:
        raise ForeignError(f"it answers {', '.join(answers)}; say which is the comparison with --question NAME")
    nested = record.get("fields")
    fields = nested if isinstance(nested, Mapping) else {k: v for k, v in record.items() if isinstance(v, str)}
    prompt_name = _prompt_name(fields, names)
    prompt = ask(fields[prompt_name])
    key = record.get("id") or record.get("external_id") or prompt.id
    found = []
    for user, status, value in answers[question]:
        user = "" if user is None else str(user)
        if value is None or status in ("draft", "discarded", "pending"):
            continue
        ranks = _ranks(value, fields, prompt_name, names)
        for first, second in combinations(ranks, 2):
            if ranks[first] == ranks[second]:
                choice: Choice = "tie"
            else:
                choice = "left" if ranks[first] < ranks[second] else "right"
            pair = "" if len(ranks) == 2 else f"/{first},{second}"
            found.append(
                _judgement(
                    token=f"argilla/{key}/{question}/{user}{pair}",
                    annotator=user,
                    prompt=prompt,
                    left=_text(fields, first),
                    right=_text(fields, second),
                    choice=choice,
                    seconds=None,
                    created=now,
                )
            )
    return found


Answer = tuple[Any, Any, Any]  # user, status, value


def _argilla_answers(record: Row) -> dict[str, list[Answer]]:
    """By question, from whichever of Argilla's shapes this is; empty for a row of something else."""
    answers: dict[str, list[Answer]] = {}
    responses = record.get("responses")
    if isinstance(responses, Mapping):  # version 2, nested
        for question, given in responses.items():
            answers[question] = [(a.get("user_id"), a.get("status"), a.get("value")) for a in given or []]
    elif isinstance(responses, list) and "fields" in record:  # version 1, nested
        for response in responses:
            for question, value in (response.get("values") or {}).items():
                said = (response.get("user_id"), response.get("status"), value.get("value"))
                answers.setdefault(question, []).append(said)
    else:
        for name, given in record.items():
            if name.endswith(".responses") and isinstance(given, list):  # version 2, flat
                users = record.get(f"{name}.users") or [None] * len(given)
                states = record.get(f"{name}.status") or [None] * len(given)
                answers[name.removesuffix(".responses")] = list(zip(users, states, given, strict=True))
            elif isinstance(given, list) and given and all(isinstance(a, Mapping) and "user_id" in a for a in given):
                answers[name] = [(a.get("user_id"), a.get("status"), a.get("value")) for a in given]  # version 1, flat
    return answers


def _ranks(value: Any, fields: Row, prompt_name: str, names: Names) -> dict[str, int]:
    """By response's field, in the fields' order, its rank; 1 is best, equal ranks are a tie."""
    if isinstance(value, Mapping):  # how `datasets` gives a list of objects back
        value = [{"value": v, "rank": r} for v, r in zip(value.get("value", []), value.get("rank", []), strict=True)]
    if isinstance(value, list):
        order = {
            _field(entry["value"] if isinstance(entry, Mapping) else entry, fields): int(entry["rank"])
            if isinstance(entry, Mapping)
            else place
            for place, entry in enumerate(value, start=1)
        }
        return {name: order[name] for name in fields if name in order}
    shown = names.responses or tuple(name for name in fields if name not in (prompt_name, "context"))
    if len(shown) != 2:
        raise ForeignError(
            f"which of the fields {', '.join(fields)} are the two responses is not clear; give --responses FIRST,SECOND"
        )
    choice = _choice(value, shown)
    return {shown[0]: 2 if choice == "right" else 1, shown[1]: 2 if choice == "left" else 1}


def _field(said: Any, fields: Row) -> str:
    for name in fields:
        if _bare(name) == _bare(said):
            return name
    raise ForeignError(f"the ranking names {said!r}, and the fields are {', '.join(fields)}; rename one of them")


# ------------------------------------------------------------------------------------------------------------ common


def _choice(said: Any, shown: Sequence[str]) -> Choice:
    word = _bare(said)
    if word == _bare(shown[0]) or word in FIRST_WORDS:
        return "left"
    if word == _bare(shown[1]) or word in SECOND_WORDS:
        return "right"
    if word in TIE_WORDS:
        return "tie"
    raise ForeignError(
        f"the answer {said!r} is none of {shown[0]}, {shown[1]}, left, right, tie; rename it in the file"
    )


def _bare(name: Any) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def _prompt_name(fields: Row, names: Names) -> str:
    name = names.prompt or next((name for name in PROMPTS if name in fields), None)
    if name is None or name not in fields:
        raise ForeignError(f"no prompt among the fields {', '.join(fields)}; name it with --prompt FIELD")
    return name


def _text(fields: Row, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise ForeignError(f"the response {name!r} is {json.dumps(value, default=str)[:40]}; expected a text")
    return value


def _time(value: Any, now: datetime) -> datetime:
    try:
        time = datetime.fromisoformat(str(value))
    except ValueError:
        return now
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _judgement(
    *,
    token: str,
    annotator: str,
    prompt: Prompt,
    left: str,
    right: str,
    choice: Choice,
    seconds: Any,
    created: datetime,
) -> Judgement:
    def response(text: str) -> Response:
        return Response(0, prompt.id, text, True, "", "", None, created)

    return Judgement(
        token=token,
        batch="import",
        item_id=0,
        annotator=annotator or "import",
        annotator_kind="unknown",
        prompt=prompt,
        left=response(left),
        right=response(right),
        choice=choice,
        strength=None,
        seconds=float(seconds) if isinstance(seconds, int | float) and seconds >= 0 else None,
        guideline=None,
        reason=None,
        created=created,
    )
