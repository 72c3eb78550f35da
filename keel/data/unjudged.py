"""Rows -> responses that wait for a judgement. Which rows are accepted, with an example of each: docs/data.md.

Model names come along, and people who judge never see them. A row that holds an annotation (a winner, a preference,
which of two was chosen) is refused, unless the caller wants its responses alone: an annotation is not dropped by
accident.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keel.data.collate import messages_hash
from keel.data.fields import json_value, message_list, name, text
from keel.data.rows import BadRows, Most, Row, RowError, read_rows, shown
from keel.data.sources import as_prompt, prompt_of_row, reply_of_row
from keel.types import Message, Prompt, Unjudged

Values = dict[str, Any]
# Columns of two responses, and of the models that wrote them
PAIRS = (
    (("response_a", "response_b"), ("model_a", "model_b")),
    (("response_1", "response_2"), ("model_1", "model_2")),
    (("output_1", "output_2"), ("generator_1", "generator_2")),
    (("chosen", "rejected"), ("chosen_model", "rejected_model")),
    (("one", "other"), ("chosen_model", "rejected_model")),  # of Keel's exports, where neither is preferred
)
TALKS = ("conversation_a", "conversation_b"), ("model_a", "model_b")
ONE = ("response", "completion", "output")  # one response a row; the rows of a prompt belong together
ANSWERS = ("winner", "preference", "chosen", "label", "tie")  # what may say which is better
FORMS = (
    "prompt+responses | messages+responses | prompt+response_a+response_b | instruction+output_1+output_2 | "
    "conversation_a+conversation_b | prompt+response (one a row) | with --unlabelled also prompt+chosen+rejected"
)
Written = tuple[str, str]  # a response's text, and the model that wrote it


def is_unjudged(row: Mapping[str, Any]) -> bool:
    """Whether these are columns of responses alone. Rows with an answer are votes, or demonstrations with a label."""
    asks = any(field in row for field in ("prompt", "messages", "instruction"))
    pairs = any(set(fields) <= row.keys() for fields, _ in PAIRS[:-2])
    one = any(field in row for field in ONE) and "label" not in row
    listed = "responses" in row and "fields" not in row  # Argilla's records have both
    return set(TALKS[0]) <= row.keys() or (asks and (pairs or one or listed))


def read_unjudged(source: str | Path, unlabelled: bool = False, most: Most | None = None) -> list[Unjudged]:
    """The groups of a file, in its order. ``unlabelled``: rows with an answer are taken without it; ``most``: how much
    is taken. UserError names file, line and field for each row that can't be taken: none is left out."""
    bad = BadRows(str(source))
    groups: list[Unjudged] = []
    single: dict[str, list[tuple[Row, Prompt, Written]]] = {}
    for row in read_rows(source, bad, most=most):
        try:
            _refuse_answers(row.values, unlabelled)
            prompt, written, one = _parse(row.values)
            if one:
                single.setdefault(prompt.id, []).append((row, prompt, written[0]))
            else:
                groups.append(_group(prompt, written, f"{row.file}, {row.line}"))
        except RowError as error:
            bad.add(row.file, row.line, str(error))
    for rows in single.values():
        first = rows[0][0]
        try:
            for row, prompt, _ in rows:
                if prompt.messages != rows[0][1].messages:
                    raise RowError(f"field 'prompt_id': {prompt.id!r} names another prompt at {row.file}, {row.line}")
            written = list(dict.fromkeys(one for _, _, one in rows))  # the same row again is the same response
            groups.append(_group(rows[0][1], written, f"{first.file}, {first.line}"))
        except RowError as error:
            bad.add(first.file, first.line, str(error))
    bad.raise_if_any()
    return groups


def _refuse_answers(row: Values, unlabelled: bool) -> None:
    answer = next((field for field in ANSWERS if row.get(field) not in (None, "")), None)
    if answer is not None and not unlabelled:
        raise RowError(
            f"field '{answer}': the row holds an annotation; give --unlabelled to import its responses alone"
        )


def _parse(row: Values) -> tuple[Prompt, list[Written], bool]:
    """(prompt, responses, whether the row is one of several that belong together)."""
    if set(TALKS[0]) <= row.keys():
        return *_talks(row), False
    if "responses" in row:
        return _prompt(row), _listed(row), False
    for fields, models in PAIRS:
        if set(fields) <= row.keys():
            if fields[0] == "chosen" and not row.keys() & {"prompt", "instruction", "messages"}:
                return *_talks(row, fields, models), False
            prompt = _prompt(row)
            pairs = zip(fields, models, strict=True)
            return prompt, [(reply_of_row(row, f, prompt.messages), name(row, m)) for f, m in pairs], False
    for field in ONE:
        if field in row:
            prompt = _prompt(row)
            model = name(row, "model") or name(row, "generator")
            return prompt, [(reply_of_row(row, field, prompt.messages), model)], True
    there = ", ".join(row) or "none"
    raise RowError(f"columns are {there}; expected {FORMS}")


def _prompt(row: Values) -> Prompt:
    if not any(field in row for field in ("prompt", "instruction", "messages")):
        raise RowError(f"columns are {', '.join(row)}; expected {FORMS}")
    prompt = prompt_of_row(row)
    id = name(row, "prompt_id") or name(row, "id")
    return Prompt(id or messages_hash(prompt.messages), prompt.messages, name(row, "kind"))


def _listed(row: Values) -> list[Written]:
    """``responses``: texts, or objects with a text and a model; the models may stand beside them in ``models``."""
    found, models = json_value(row, "responses"), json_value(row, "models") if row.get("models") else None
    if not isinstance(found, list):
        raise RowError(f"field 'responses': expected a list, got {shown(found)}")
    if models is not None and (not isinstance(models, list) or len(models) != len(found)):
        raise RowError(f"field 'models': expected {len(found)} names, one a response, got {shown(models)}")
    written = []
    for number, one in enumerate(found):
        place = f"responses[{number}]"
        if isinstance(one, Mapping):
            key = next((k for k in ("text", "content", "response", "completion", "output") if k in one), "text")
            model = name({"model": one.get("model") or one.get("generator") or ""}, "model")
            written.append((text({place: one.get(key)}, place), model))
        else:
            written.append((text({place: one}, place), name({"models": models[number]}, "models") if models else ""))
    return written


def _talks(
    row: Values, fields: Sequence[str] = TALKS[0], models: Sequence[str] = TALKS[1]
) -> tuple[Prompt, list[Written]]:
    """Two conversations that are the same but for their last message."""
    first, second = (message_list(row, field) for field in fields)
    for field, messages in zip(fields, (first, second), strict=True):
        if messages[-1].role != "assistant":
            raise RowError(f"field '{field}': expected a conversation that ends with the assistant's message")
    if first[:-1] != second[:-1]:
        raise RowError(
            f"fields '{fields[0]}' and '{fields[1]}' differ before their last messages: two replies can be compared "
            "where all before them is the same"
        )
    if len(first) < 2:
        raise RowError(f"field '{fields[0]}': expected a prompt before the reply")
    asked = as_prompt([{"role": message.role, "content": message.content} for message in first[:-1]])
    id = name(row, "question_id") or name(row, "prompt_id") or name(row, "id")
    prompt = Prompt(id or asked.id, asked.messages, name(row, "kind"))
    ends: tuple[Message, Message] = (first[-1], second[-1])
    return prompt, [(end.content, name(row, model)) for end, model in zip(ends, models, strict=True)]


def _group(prompt: Prompt, written: Sequence[Written], place: str) -> Unjudged:
    """UserError, where it stands, unless there are two responses or more that can be told apart."""
    if len(written) < 2:
        raise RowError(f"{len(written)} response to the prompt; expected two or more to compare")
    seen: dict[str, int] = {}
    for number, (reply, _) in enumerate(written, start=1):
        if not reply.strip():
            raise RowError(f"response {number} is empty; leave it out")
        if reply.strip() in seen:
            raise RowError(f"responses {seen[reply.strip()]} and {number} are the same text; nobody can choose")
        seen[reply.strip()] = number
    return Unjudged(prompt, tuple(reply for reply, _ in written), tuple(model for _, model in written), place)
