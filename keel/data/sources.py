"""Rows -> records. Which rows are accepted, with an example of each: docs/data.md.

Every reader takes a ``source``: a JSONL, JSON, CSV or Parquet file, a folder of them, or ``hub:owner/name[:split]``.
Rows that cannot be read are an error (``UserError`` with file, line, field, what was expected and what was found, up
to five rows in one message); none is dropped. A record without an ``id`` gets a hash of its content, so the same row
has the same id in every file. Rows may repeat; two different rows of one id are an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from keel.data.collate import messages_hash
from keel.data.fields import flag, json_value, message_list, name, number, text, text_list
from keel.data.rows import BadRows, Row, RowError, read_rows, shown
from keel.types import Demonstration, LabelledCompletion, Message, Preference, Prompt, Settled, StepLabels

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fact:
    """A text to be continued and its choices; ``answer`` is the index of the right one."""

    id: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


class _Identified(Protocol):
    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=_Identified)


# ------------------------------------------------------------------------------------------------------ the readers


def read_demonstrations(source: str | Path) -> list[Demonstration]:
    """Rows ``messages``, ``conversations``, ``prompt``+``completion``, ``instruction``+``output``, or ``text``."""
    forms = "messages | conversations | prompt+completion | instruction[+input]+output | text"
    return _read(source, _demonstration, forms)


def read_prompts(source: str | Path) -> list[Prompt]:
    """Rows ``prompt``, ``messages`` (that wait for the assistant), or ``instruction``; optional ``id``, ``kind``,
    ``meta``. Any other column is kept in the prompt's ``meta`` too, where a reward function finds it."""
    return _read(source, _prompt_row, "prompt | messages | instruction[+input]")


def read_preferences(source: str | Path) -> list[Preference]:
    """Rows ``prompt``+``chosen``+``rejected``, ``chosen``+``rejected`` conversations that share their beginning, or
    OpenAI's ``input``+``preferred_output``+``non_preferred_output``; optional ``margin``, ``tie``, ``annotator``,
    ``chosen_finished`` and ``rejected_finished`` (false: the reply was cut at the length limit), ``settled`` (a
    reviewer's last word on the pair: chosen, rejected or tie). A row with ``gold`` or ``out`` (of Keel's own export)
    is left out: its answer was known, and such votes measure their annotator; or its pair was taken out of use.

    Two equal replies are a tie, whatever the row says: neither can be better.
    """
    forms = "prompt+chosen+rejected | chosen+rejected | input+preferred_output+non_preferred_output"
    return _read(source, _preference, forms)


def read_labelled(source: str | Path) -> list[LabelledCompletion]:
    """Rows ``prompt``+``completion``+``label`` (true or false), as KTO uses."""
    return _read(source, _labelled, "prompt+completion+label")


def read_steps(source: str | Path) -> list[StepLabels]:
    """Rows ``prompt``+``completions``+``labels``: the steps of a reply and a label in [0, 1] (or true, false) each."""
    return _read(source, _steps, "prompt+completions+labels")


def read_texts(source: str | Path) -> list[str]:
    """Rows ``text``: plain text, as a base model reads it."""
    return [d.messages[0].content for d in _read(source, _plain_text, "text")]


def read_facts(source: str | Path) -> list[Fact]:
    """Rows ``prompt``+``choices``+``answer``: the answer is a choice's index (from 0) or its text."""
    return _read(source, _fact, "prompt+choices+answer")


def _read(source: str | Path, parse: Callable[[Values], R], forms: str) -> list[R]:
    bad = BadRows(str(source))
    records: list[R] = []
    first: dict[str, tuple[R, Row]] = {}
    prompts: dict[str, tuple[Prompt, Row]] = {}
    for row in read_rows(source, bad):
        try:
            record = parse(row.values)
            _same_or_error(first, "id", record.id, record, row)
            prompt = getattr(record, "prompt", None)
            if isinstance(prompt, Prompt):
                _same_or_error(prompts, "prompt_id", prompt.id, replace(prompt, kind="", meta={}), row)
            records.append(record)
        except _LeftOut:
            continue
        except _UnknownForm:
            there = ", ".join(row.values) or "none"
            bad.add(row.file, row.line, f"columns are {there}; expected {forms}")
        except RowError as error:
            bad.add(row.file, row.line, str(error))
    bad.raise_if_any()
    return records


class _LeftOut(Exception):
    """The row is none to learn from."""


class _UnknownForm(Exception):
    """The row's columns fit none of the accepted forms."""


T = TypeVar("T")


def _same_or_error(seen: dict[str, tuple[T, Row]], column: str, key: str, record: T, row: Row) -> None:
    earlier, where = seen.setdefault(key, (record, row))
    if earlier == record:
        return
    place = f"{where.file}, {where.line}"
    if column in row.values:
        raise RowError(f"field '{column}': {key!r} already names a different row ({place}); give each its own")
    raise RowError(f"the same content stands with another kind, meta or prompt_id at {place}; give the rows ids")


# -------------------------------------------------------------------------------------------------------- the forms


def _demonstration(row: Values) -> Demonstration:
    if "messages" in row:
        messages = message_list(row, "messages")
    elif "conversations" in row:
        messages = _system(row) + message_list(row, "conversations")
    elif "prompt" in row and "completion" in row:
        messages = _prompt_messages(row)
        messages += _after_prompt(row, "completion", messages)
    elif "instruction" in row and "output" in row:
        messages = (*_instruction(row), Message("assistant", text(row, "output")))
    else:
        return _plain_text(row)
    if "completion" in row and "label" in row and row["label"] in (False, "false", "False"):
        raise RowError("field 'label': false, so the reply is no demonstration; leave out rows with thumbs down")
    if messages[-1].role != "assistant":
        raise RowError(f"the conversation ends with a message of the {messages[-1].role}; expected the assistant's")
    return Demonstration(_id(row) or messages_hash(messages), messages)


def _plain_text(row: Values) -> Demonstration:
    if "text" not in row:
        raise _UnknownForm
    messages = (Message("assistant", text(row, "text", empty=False)),)
    return Demonstration(_id(row) or messages_hash(messages, salt="text"), messages, plain=True)


def _prompt_row(row: Values) -> Prompt:
    if "prompt" in row:
        used = {"prompt", "system"}
        messages = _prompt_messages(row)
    elif "messages" in row:
        used = {"messages"}
        messages = _waits(message_list(row, "messages"), "messages")
    elif "instruction" in row:
        used = {"instruction", "input", "system"}
        messages = _instruction(row)
    else:
        raise _UnknownForm
    prompt = _prompt(row, messages, _id(row))
    extra = {key: value for key, value in row.items() if key not in used | {"id", "kind", "meta"}}
    twice = sorted(extra.keys() & prompt.meta.keys())
    if twice:
        raise RowError(f"field '{twice[0]}' stands both in meta and as a column; keep one")
    return replace(prompt, meta={**prompt.meta, **extra})


def _preference(row: Values) -> Preference:
    if "preferred_output" in row and "non_preferred_output" in row and isinstance(row.get("input"), dict):
        if row["input"].get("tools"):
            raise RowError("field 'input': tools are not supported; expected messages alone")
        messages = _waits(message_list(row["input"], "messages", "input.messages"), "input.messages")
        chosen, rejected = (_reply(row, field, messages) for field in ("preferred_output", "non_preferred_output"))
    elif "chosen" in row and "rejected" in row and "prompt" in row:
        messages = _prompt_messages(row)
        chosen, rejected = (_reply(row, field, messages) for field in ("chosen", "rejected"))
    elif "chosen" in row and "rejected" in row:
        messages, chosen, rejected = _implicit_prompt(row)
    else:
        raise _UnknownForm
    if row.get("gold") or flag(row, "out", default=False):
        raise _LeftOut
    prompt = _prompt(row, messages, _id(row, "prompt_id"))
    tie = flag(row, "tie", default=False) or chosen == rejected
    margin = number(row, "margin", low=0.0, default=0.0)
    annotator = name(row, "annotator")
    ends = (flag(row, "chosen_finished", default=True), flag(row, "rejected_finished", default=True))
    replies = (Message("assistant", chosen), Message("assistant", rejected))
    cut = "" if all(ends) else f" finished {ends}"
    settled = _settled(row)
    word = f" settled {settled}" if settled else ""
    content = messages_hash((*messages, *replies), salt=f"preference {tie} {margin} {annotator}{cut}{word}")
    return Preference(_id(row) or content, prompt, chosen, rejected, tie, margin, annotator, *ends, 1.0, settled)


def _settled(row: Values) -> Settled:
    """A reviewer's last word on the pair; empty (an empty cell, too) where there is none."""
    value = row.get("settled", "")
    if value not in ("", "chosen", "rejected", "tie"):
        raise RowError(f"field 'settled': expected chosen, rejected, tie or nothing, got {shown(value)}")
    settled: Settled = value
    return settled


def _labelled(row: Values) -> LabelledCompletion:
    if not {"prompt", "completion", "label"} <= row.keys():
        raise _UnknownForm
    messages = _prompt_messages(row)
    reply = _reply(row, "completion", messages)
    label = flag(row, "label")
    content = messages_hash((*messages, Message("assistant", reply)), salt=f"label {label}")
    return LabelledCompletion(_id(row) or content, _prompt(row, messages, _id(row, "prompt_id")), reply, label)


def _steps(row: Values) -> StepLabels:
    if not {"prompt", "completions", "labels"} <= row.keys():
        raise _UnknownForm
    messages = _prompt_messages(row)
    steps = text_list(row, "completions")
    given = json_value(row, "labels")
    if not isinstance(given, list) or len(given) != len(steps):
        raise RowError(f"field 'labels': expected a list of {len(steps)} labels, one a completion, got {shown(given)}")
    labels = tuple(number({"labels": label}, "labels", low=0.0, high=1.0, truth=True) for label in given)
    content = messages_hash((*messages, *(Message("assistant", s) for s in steps)), salt=f"steps {labels}")
    return StepLabels(_id(row) or content, _prompt(row, messages, _id(row, "prompt_id")), steps, labels)


def _fact(row: Values) -> Fact:
    if not {"prompt", "choices", "answer"} <= row.keys():
        raise _UnknownForm
    prompt, choices = text(row, "prompt", empty=False), text_list(row, "choices")
    answer = row["answer"]
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise RowError(f"field 'choices': expected two different texts or more, got {shown(list(choices))}")
    if answer in choices:
        index = choices.index(answer)
    else:
        index = int(number(row, "answer", low=0, high=len(choices) - 1, whole=True))
    content = messages_hash([Message("assistant", t) for t in (prompt, *choices)], salt=f"fact {index}")
    return Fact(_id(row) or content, prompt, choices, index)


def as_prompt(value: Any) -> Prompt:
    """A prompt that another tool's row holds, as a text or as messages. RowError when it is neither."""
    messages = _prompt_messages({"prompt": value})
    return Prompt(messages_hash(messages), messages)


def prompt_of_row(row: Values) -> Prompt:
    """The prompt of a row, as a prompt's row has it. RowError when there is none."""
    return _prompt_row(
        {field: row[field] for field in ("prompt", "messages", "instruction", "input", "system") if field in row}
    )


def reply_of_row(row: Values, field: str, prompt: Sequence[Message]) -> str:
    """A reply that is a text, or one message of the assistant after the prompt's, which may be repeated in front."""
    return _reply(row, field, prompt)


# -------------------------------------------------------------------------------------------------- parts of a form


def _id(row: Values, field: str = "id") -> str:
    return name(row, field)


def _prompt(row: Values, messages: tuple[Message, ...], id: str) -> Prompt:
    meta = json_value(row, "meta") if row.get("meta") not in (None, "") else {}
    if not isinstance(meta, dict):
        raise RowError(f"field 'meta': expected an object, got {shown(meta)}")
    return Prompt(id or messages_hash(messages), messages, name(row, "kind"), meta)


def _system(row: Values) -> tuple[Message, ...]:
    system = text(row, "system") if "system" in row else ""
    return (Message("system", system),) if system else ()


def _prompt_messages(row: Values) -> tuple[Message, ...]:
    if isinstance(row["prompt"], list):
        return _waits(message_list(row, "prompt"), "prompt")
    return (*_system(row), Message("user", text(row, "prompt", empty=False)))


def _instruction(row: Values) -> tuple[Message, ...]:
    parts = [text(row, "instruction", empty=False), text(row, "input") if "input" in row else ""]
    return (*_system(row), Message("user", "\n\n".join(part for part in parts if part)))


def _waits(messages: tuple[Message, ...], field: str) -> tuple[Message, ...]:
    if messages[-1].role != "user":
        raise RowError(
            f"field '{field}': expected messages that end with the user's, got the {messages[-1].role}'s last"
        )
    return messages


def _after_prompt(row: Values, field: str, prompt: Sequence[Message]) -> tuple[Message, ...]:
    """A reply as a text, or as messages: those after the prompt's, which may be repeated in front."""
    if not isinstance(row[field], list):
        return (Message("assistant", text(row, field)),)
    messages = message_list(row, field)
    return messages[len(prompt) :] if messages[: len(prompt)] == tuple(prompt) else messages


def _reply(row: Values, field: str, prompt: Sequence[Message]) -> str:
    return _only_reply(_after_prompt(row, field, prompt), field)


def _only_reply(messages: Sequence[Message], field: str) -> str:
    if [m.role for m in messages] != ["assistant"]:
        roles = ", ".join(m.role for m in messages) or "none"
        raise RowError(f"field '{field}': expected one message of the assistant after the prompt, got {roles}")
    return messages[0].content


def _implicit_prompt(row: Values) -> tuple[tuple[Message, ...], str, str]:
    """(prompt, chosen, rejected) of two conversations: they share all messages but the last."""
    chosen, rejected = (
        message_list(row, field) if isinstance(row[field], list) else _transcript(row, field)
        for field in ("chosen", "rejected")
    )
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise RowError("fields 'chosen' and 'rejected' share no first message; expected the same prompt in both")
    replies = _only_reply(chosen[shared:], "chosen"), _only_reply(rejected[shared:], "rejected")
    return _waits(chosen[:shared], "chosen"), *replies


_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def _transcript(row: Values, field: str) -> tuple[Message, ...]:
    """The written-out dialogues of Anthropic's HH data: turns that begin with "Human:" and "Assistant:"."""
    parts = _TURN.split(text(row, field))
    if len(parts) < 3 or parts[0].strip():
        raise RowError(
            f"field '{field}': expected messages, or turns that begin with Human: and Assistant:, because the row has "
            f"no prompt; got {shown(row[field])}"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return tuple(Message(roles[speaker], said) for speaker, said in turns)  # type: ignore[arg-type]
