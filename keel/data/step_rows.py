"""Rows of replies whose steps are labelled: Keel's own, which are TRL's, and the files of PRM800K and Math-Shepherd.

A label is a number in [0, 1], or None where nobody judged the step. PRM800K has -1, 0 and 1: ``neutral`` says what 0
counts as. What the lists of these files leave out between two steps, a newline, is put there, as the splitter has it.
A marker is put behind the last step too where the file would have it there: not behind one that a row with markers of
its own leaves without, nor behind half a step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from keel.data.collate import messages_hash
from keel.data.fields import Fields, flag, json_value, name, number, text, text_list
from keel.data.parts import ask, prompt_of
from keel.data.rows import LeftOut, RowError, UnknownForm, shown
from keel.recipe.steps import Steps
from keel.types import Message, Prompt, StepLabels

Neutral = Literal["good", "bad", "out"]
FORMS = "prompt+completions+labels | question+label (PRM800K) | input+label (Math-Shepherd)"
MARK = "ки"  # Math-Shepherd's, at the end of a step

_SEPARATORS = {"line": "\n", "blank_line": "\n\n"}
_NEUTRAL: dict[Neutral, float | None] = {"good": 1.0, "bad": 0.0, "out": None}
_FIRST = re.compile(r"[Ss]tep 1:")


def step_labels(row: Fields, steps: Steps, neutral: Neutral) -> list[StepLabels]:
    """The labelled replies of a row: one; of PRM800K's, one for the solution and one for each alternative step."""
    if {"prompt", "completions", "labels"} <= row.keys():
        return [_listed(row, steps)]
    if "question" in row and isinstance(row.get("label"), dict):
        return _prm800k(row, steps, {None: None, -1: 0.0, 0: _NEUTRAL[neutral], 1: 1.0})
    if "input" in row and isinstance(row.get("label"), str):
        return [_math_shepherd(row, steps)]
    raise UnknownForm


def joined(parts: Sequence[str], steps: Steps, ended: bool | None = None) -> tuple[str, ...]:
    """Steps with what separates them: as they stand where a row has it, else what ``steps`` cuts at. ``ended``: whether
    a marker ends the last step too; None: where the row has several steps, and no marker behind any."""
    marker = steps.marker or ""
    between = _SEPARATORS.get(steps.by) or (f" {marker}\n" if marker.strip() else marker)

    def is_cut(part: str, following: str) -> bool:
        blank = following[: len(following) - len(following.lstrip())]
        if marker:
            return re.search(rf"{re.escape(marker)}\s*\Z", part + blank) is not None
        return "\n" in part[len(part.rstrip()) :] + blank

    there = [is_cut(part, following) for part, following in pairwise(parts)]
    if ended is None:
        ended = bool(there) and not any(there)
    last = f" {marker}" if ended and marker.strip() and not is_cut(parts[-1], "") else ""
    cut = [part if done else part + between for part, done in zip(parts, there, strict=False)]
    return (*cut, parts[-1] + last)


def _record(
    id: str,
    prompt: Prompt,
    steps: tuple[str, ...],
    labels: tuple[float | None, ...],
    finished: bool = True,
    annotator: str = "",
) -> StepLabels:
    """A record with the row's ``id``; without one, with a hash of its content."""
    said = (*prompt.messages, *(Message("assistant", step) for step in steps))
    by, cut = f" by {annotator}" if annotator else "", "" if finished else " cut"
    content = messages_hash(said, salt=f"steps {labels}{by}{cut}")
    return StepLabels(id or content, prompt, steps, labels, finished, annotator)


def _blank(parts: Sequence[str], field: str) -> None:
    if (empty := next((i for i, part in enumerate(parts) if not part.strip()), None)) is not None:
        raise RowError(f"field '{field}': step {empty + 1} is blank; take it out, with its label")


# ----------------------------------------------------------------------------------------------- Keel's own, and TRL's


def _listed(row: Fields, steps: Steps) -> StepLabels:
    messages, parts = ask(row), text_list(row, "completions")
    given = json_value(row, "labels")
    if not isinstance(given, list) or len(given) != len(parts):
        raise RowError(f"field 'labels': expected a list of {len(parts)} labels, one a completion, got {shown(given)}")
    _blank(parts, "completions")
    labels = tuple(
        None if label is None else number({"labels": label}, "labels", low=0.0, high=1.0, truth=True) for label in given
    )
    prompt = prompt_of(row, messages, name(row, "prompt_id"))
    finished = flag(row, "finished", default=True)
    cut = joined(parts, steps, None if finished else False)
    return _record(name(row, "id"), prompt, cut, labels, finished, name(row, "annotator"))


# ------------------------------------------------------------------------------------------------------------- PRM800K


def _prm800k(row: Fields, steps: Steps, ratings: Mapping[Any, float | None]) -> list[StepLabels]:
    """The solution that the labeler went along (the chosen completions, or what people wrote in their place), and each
    other completion behind the steps before it, which are labelled once. Where nothing was chosen, the first one is the
    solution's own step: in phase 2 that at which labelling stopped. Left out, and counted: questions that measure or
    screen labelers, and broken problems."""
    question, label = _object(row, "question"), _object(row, "label")
    for field in ("is_quality_control_question", "is_initial_screening_question"):
        if flag(row, field, default=False):
            raise LeftOut("questions for quality control or screening")
    reason = label.get("finish_reason")
    if reason not in ("solution", "found_error", "give_up", "bad_problem"):
        raise RowError(
            f"field 'label.finish_reason': expected solution, found_error, give_up or bad_problem, got {shown(reason)}"
        )
    if reason == "bad_problem":
        raise LeftOut("problems that a labeler found broken")
    asked = Message("user", text({"question.problem": question.get("problem")}, "question.problem", empty=False))
    answer = question.get("ground_truth_answer")
    prompt = Prompt(messages_hash([asked]), (asked,), meta={} if answer is None else {"answer": answer})
    along: list[tuple[str, float | None]] = []
    found: list[StepLabels] = []
    labeler = name(row, "labeler")

    def record(said: Sequence[tuple[str, float | None]], finished: bool) -> StepLabels:
        parts, labels = zip(*said, strict=True)
        return _record("", prompt, joined(parts, steps, ended=True), tuple(labels), finished, labeler)

    for chosen, others in _candidates(label, ratings):
        before = [(said, None) for said, _ in along]
        found += [record([*before, other], finished=False) for other in others]
        if chosen is not None:
            along.append(chosen)
    if not along:
        raise RowError("field 'label.steps': expected at least one completion, got none")
    return [record(along, finished=reason == "solution"), *found]


Candidate = tuple[str, float | None]


def _candidates(
    label: Mapping[str, Any], ratings: Mapping[Any, float | None]
) -> Iterator[tuple[Candidate | None, list[Candidate]]]:
    """(what the solution goes on with, the other completions) of each step."""
    steps = label.get("steps")
    if not isinstance(steps, list) or not steps:
        raise RowError(f"field 'label.steps': expected a list of steps, got {shown(steps)}")
    for i, step in enumerate(steps):
        path = f"label.steps[{i}]"
        if not isinstance(step, dict):
            raise RowError(f"field '{path}': expected an object, got {shown(step)}")
        completions, written, at = (step.get(k) for k in ("completions", "human_completion", "chosen_completion"))
        if completions is not None and not isinstance(completions, list):
            raise RowError(f"field '{path}.completions': expected a list or null, got {shown(completions)}")
        rated = [_rated(one, f"{path}.completions[{j}]", ratings) for j, one in enumerate(completions or [])]
        if at is not None and (isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < len(rated)):
            raise RowError(
                f"field '{path}.chosen_completion': expected one of {len(rated)} completions, got {shown(at)}"
            )
        if at is None and written is not None:
            yield _written(written, f"{path}.human_completion"), rated
            continue
        if at is None and rated and any(isinstance(s, dict) and s.get("completions") for s in steps[i + 1 :]):
            raise RowError(f"field '{path}.chosen_completion': null, and steps follow; expected one of the completions")
        place = 0 if at is None else at
        yield (rated[place] if rated else None), rated[:place] + rated[place + 1 :]


def _rated(one: Any, path: str, ratings: Mapping[Any, float | None]) -> Candidate:
    if not isinstance(one, dict) or not isinstance(one.get("text"), str) or not one["text"].strip():
        raise RowError(f"field '{path}': expected an object with a text, got {shown(one)}")
    rating = one.get("rating")
    if isinstance(rating, bool) or not isinstance(rating, int | float | None) or rating not in ratings:
        raise RowError(f"field '{path}.rating': expected -1, 0, 1 or null, got {shown(rating)}")
    return one["text"], None if one.get("flagged") else ratings[rating]


def _written(value: Any, path: str) -> Candidate:
    """What a person wrote where every completion was bad: a good step."""
    said = value.get("text") if isinstance(value, dict) else value
    if not isinstance(said, str) or not said.strip():
        raise RowError(f"field '{path}': expected a text or an object with one, got {shown(value)}")
    return said, 1.0


def _object(row: Fields, field: str) -> dict[str, Any]:
    value = json_value(row, field)
    if not isinstance(value, dict):
        raise RowError(f"field '{field}': expected an object, got {shown(value)}")
    return value


# -------------------------------------------------------------------------------------------------------- Math-Shepherd


def _math_shepherd(row: Fields, steps: Steps) -> StepLabels:
    """``input`` is the problem and its solution with a mark behind each step, ``label`` the same text with + or - in
    the place of each mark. The problem ends where "Step 1:" begins; without one, with its question mark. A mark within
    the problem is none of a step's."""
    said, judged = text(row, "input", empty=False), text(row, "label", empty=False)
    pieces = said.split(MARK)
    if len(pieces) < 2:
        raise RowError(f"field 'input': expected steps that end with {MARK}, got {shown(said)}")
    signs = _signs_of(pieces, judged)
    first = next((i for i, piece in enumerate(pieces) if _FIRST.search(piece)), 0)
    begins = _FIRST.search(pieces[first])
    border = begins.start() if begins else pieces[0].rfind("?") + 1
    problem = "".join((*pieces[:first], pieces[first][:border])).strip()
    if not problem:
        raise RowError("field 'input': expected a problem before 'Step 1:', or one that ends with a question mark")
    parts = [piece.strip() for piece in (pieces[first][border:], *pieces[first + 1 :])]
    labels: list[float | None] = [*signs[first:], None]
    ended = not parts[-1]  # nothing behind the last mark
    if ended:
        parts, labels = parts[:-1], labels[:-1]
    _blank(parts, "input")
    asked = Message("user", problem)
    prompt = Prompt(messages_hash([asked]), (asked,), name(row, "task"))
    return _record(name(row, "id"), prompt, joined(parts, steps, ended), tuple(labels))


def _signs_of(pieces: Sequence[str], judged: str) -> list[float | None]:
    signs: list[float | None] = []
    at = 0
    for piece in pieces[:-1]:
        at += len(piece)
        sign = judged[at : at + 1]
        if judged[at - len(piece) : at] != piece or sign not in ("+", "-"):
            raise RowError(
                f"field 'label': expected the text of input with + or - in the place of each {MARK}, and it differs at "
                f"step {len(signs) + 1}: {shown(judged[max(0, at - 20) : at + 10])}"
            )
        signs.append(float(sign == "+"))
        at += 1
    return signs
