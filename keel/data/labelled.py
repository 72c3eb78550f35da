"""Rows of single replies that were judged by themselves, as KTO uses them: the reply, and a thumb or a rating."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keel.data.collate import messages_hash
from keel.data.fields import Fields, flag, name, number, thumb, utterance
from keel.data.parts import ask, ask_instruction, conversation, prompt_of, the_reply, waits
from keel.data.rows import LeftOut, RowError, Undecided, UnknownForm
from keel.types import LabelledCompletion, Message

Bounds = tuple[float, float]
"""A rating below the first is thumbs down, one above the second thumbs up; any other says neither."""

FORMS = "prompt+completion | messages | conversations | instruction+output, each with a label or a rating"
THUMBS, RATINGS = ("label", "kto_tag"), ("rating", "score")


def is_labelled(row: Mapping[str, Any]) -> bool:
    """Whether these are the columns of a single reply with a thumb."""
    forms = {"prompt", "completion"}, {"instruction", "output"}, {"messages"}, {"conversations"}
    one = any(form <= row.keys() for form in forms) and "responses" not in row
    return one and any(field in row for field in THUMBS)


def labelled(row: Fields, bounds: Bounds | None) -> LabelledCompletion:
    """``prompt``+``completion``, ``messages`` or ``conversations`` that end with the reply, or
    ``instruction``+``output``, with a ``label`` (or ``kto_tag``), else with a ``rating`` (or ``score``), which needs
    ``bounds``. Optional ``annotator`` and ``finished`` (false: the reply was cut at the length limit)."""
    row.refuse_nan(THUMBS)
    judged = [field for field in (*THUMBS, *RATINGS) if row.get(field, "") != ""]
    if not judged:
        row.refuse_nan(RATINGS)
        raise UnknownForm
    messages, reply = _answered(row)
    if row.get("gold", "") != "" or flag(row, "out", default=False):
        raise LeftOut
    label = _thumb(row, judged) if judged[0] in THUMBS else _rated(row, judged, bounds)
    rated = [field for field in judged if field in RATINGS]
    if judged[0] in THUMBS and rated and bounds is not None and _rated(row, rated, bounds) != label:
        raise RowError(f"fields '{judged[0]}' and '{rated[0]}' disagree by the stage's rating_bound; keep one")
    annotator, finished = name(row, "annotator"), flag(row, "finished", default=True)
    by, cut = f" by {annotator}" if annotator else "", "" if finished else " cut"
    content = messages_hash((*messages, Message("assistant", reply)), salt=f"label {label}{by}{cut}")
    prompt = prompt_of(row, messages, name(row, "prompt_id"))
    return LabelledCompletion(name(row, "id") or content, prompt, reply, label, annotator, finished)


def _answered(row: Fields) -> tuple[tuple[Message, ...], str]:
    """What was asked, and the reply."""
    if "prompt" in row and "completion" in row:
        messages = ask(row)
        return messages, the_reply(row, "completion", messages)
    field = next((field for field in ("messages", "conversations") if field in row), None)
    if field is not None:
        *asked, reply = conversation(row, field)
        if reply.role != "assistant" or not asked:
            raise RowError(f"field '{field}': expected messages that end with the assistant's reply")
        return waits(tuple(asked), field), reply.content
    if "instruction" in row and "output" in row:
        return ask_instruction(row), utterance(row, "output")
    raise UnknownForm


def _thumb(row: Fields, judged: list[str]) -> bool:
    said = {field: thumb(row, field) for field in judged if field in THUMBS}
    if len(set(said.values())) > 1:
        raise RowError(f"fields {' and '.join(said)} disagree; keep one")
    return said[judged[0]]


def _rated(row: Fields, judged: list[str], bounds: Bounds | None) -> bool:
    ratings = {field: number(row, field) for field in judged}
    if len(set(ratings.values())) > 1:
        raise RowError(f"fields {' and '.join(ratings)} differ; keep one")
    if bounds is None:
        raise RowError(
            f"field '{judged[0]}': a rating is thumbs up above a bound and down below it; set the stage's "
            "rating_bound, or give the row a label"
        )
    if bounds[0] <= ratings[judged[0]] <= bounds[1]:
        raise Undecided
    return ratings[judged[0]] > bounds[1]
