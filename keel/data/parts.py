"""What the forms of rows share: how a prompt is put together, and what of a row is the reply."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from keel.data.answers import MARK, final_answer
from keel.data.collate import messages_hash
from keel.data.columns import MATERIAL, OPTIONS, SOLUTION, SYSTEM, says_nothing
from keel.data.fields import Fields, earlier_rounds, json_value, message_list, name, text, utterance
from keel.data.rows import RowError, shown
from keel.types import Message, Prompt

_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def prompt_of(row: Fields, messages: tuple[Message, ...], id: str) -> Prompt:
    meta = json_value(row, "meta") if row.get("meta") not in (None, "") else {}
    if not isinstance(meta, dict):
        raise RowError(f"field 'meta': expected an object, got {shown(meta)}")
    return Prompt(id or messages_hash(messages), messages, name(row, "kind"), meta)


def named(row: Fields, names: Sequence[str], what: str) -> str:
    """Under which of ``names`` the row has a text ("": none). RowError where several have different ones."""
    given = {name: text(row, name) for name in names if name in row}
    texts = {name: value for name, value in given.items() if value.strip()}
    if len(set(texts.values())) > 1:
        raise RowError(f"fields {' and '.join(texts)} give different {what}; keep one")
    return next(iter(texts or given), "")


def system_of(row: Fields) -> tuple[Message, ...]:
    """The system message that a column gives, under whichever of its names."""
    name = named(row, SYSTEM, "system messages")
    system = text(row, name) if name else ""
    return (Message("system", system),) if system.strip() else ()


def with_system(row: Fields, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages behind the system message of a column, which may stand among them already."""
    if earlier_rounds(row):
        raise RowError("field 'history': the row has messages already; put the earlier rounds among them")
    system = system_of(row)
    if not system or messages[0] == system[0]:
        return messages
    if any(message.role == "system" for message in messages):
        name = next(name for name in SYSTEM if name in row)
        raise RowError(f"field '{name}': the messages have another system message; keep one")
    return system + messages


def conversation(row: Fields, field: str, taught: bool = False) -> tuple[Message, ...]:
    return with_system(row, message_list(row, field, taught=taught))


def ask(row: Fields, taught: bool = False) -> tuple[Message, ...]:
    """What is asked. In a demonstration (``taught``), replies in a list of messages were given before and are shown
    only; those of a history are learned, as LLaMA-Factory does."""
    if isinstance(row["prompt"], list):
        messages = waits(conversation(row, "prompt"), "prompt")
        return tuple(replace(m, learned=not taught or m.role != "assistant") for m in messages)
    asked = utterance(row, "prompt", empty=False)
    if (written := _TURN.match(asked)) and written[1] == "Human":
        return _asked_in_writing(row, taught)
    return (*system_of(row), *earlier_rounds(row, taught), Message("user", asked))


def _asked_in_writing(row: Fields, taught: bool) -> tuple[Message, ...]:
    """A dialogue as Anthropic's HH data writes it, up to the "Assistant:" that waits for the reply."""
    turns = _transcript(row, "prompt")
    if turns[-1].role == "assistant" and not turns[-1].content.strip():
        turns = turns[:-1]
    messages = with_system(row, waits(turns, "prompt"))
    return tuple(replace(m, learned=not taught or m.role != "assistant") for m in messages)


def ask_instruction(row: Fields, taught: bool = False) -> tuple[Message, ...]:
    about = named(row, MATERIAL, "inputs")
    parts = [utterance(row, "instruction", empty=False), text(row, about) if about else ""]
    asked = Message("user", "\n\n".join(part for part in parts if part))
    return (*system_of(row), *earlier_rounds(row, taught), asked)


def ask_question(row: Fields, field: str) -> tuple[Message, ...]:
    """A question that is asked alone. What it cannot be answered without would have to be shown with it."""
    beside = next((name for name in (*OPTIONS, *MATERIAL) if name in row and not says_nothing(row[name])), None)
    if beside:
        raise RowError(f"field '{beside}': it is not shown with the {field}; write both into a column prompt")
    asked = Message("user", utterance(row, field, empty=False))
    return (*system_of(row), *earlier_rounds(row), asked)


def solution_of(row: Fields) -> str:
    """The worked solution of a question, or its bare answer; "" where it has neither."""
    field = next((name for name in SOLUTION if name in row and not says_nothing(row[name])), "")
    return utterance(row, field) if field else ""


def answer_in(row: Fields) -> dict[str, Any]:
    """A question's ``answer``, and its ``solution`` where that says more."""
    solution = row.get("solution")
    given = row.get("answer")
    if isinstance(given, str) and MARK in given and solution is None:
        solution, given = given, final_answer(given)
    if given is None and isinstance(solution, str):
        given = final_answer(solution)
    return {name: value for name, value in (("answer", given), ("solution", solution)) if value is not None}


def waits(messages: tuple[Message, ...], field: str) -> tuple[Message, ...]:
    if messages[-1].role != "user":
        raise RowError(
            f"field '{field}': expected messages that end with the user's, got the {messages[-1].role}'s last"
        )
    return messages


def after_prompt(row: Fields, field: str, prompt: Sequence[Message], taught: bool = False) -> tuple[Message, ...]:
    """A reply as a text, or as messages: those after the prompt's, which may be repeated in front (without the system
    message that a column gave)."""
    if isinstance(row[field], list):
        messages = message_list(row, field, taught=taught)
    else:
        written, asked = utterance(row, field), row.get("prompt")
        if not isinstance(asked, str) or not _TURN.match(asked):
            return (Message("assistant", written),)
        if not _TURN.match(written):  # the prompt's dialogue ends with "Assistant:", and a blank behind that
            return (Message("assistant", written.removeprefix(" ")),)
        messages = _transcript(row, field)
    turns = [(m.role, m.content) for m in prompt]
    for repeated in (turns, turns[1:] if turns[0][0] == "system" else turns):
        if [(m.role, m.content) for m in messages[: len(repeated)]] == repeated:
            return messages[len(repeated) :]
    return messages


def the_reply(row: Fields, field: str, prompt: Sequence[Message]) -> str:
    return _only_reply(after_prompt(row, field, prompt), field)


def _only_reply(messages: Sequence[Message], field: str) -> str:
    if len(messages) > 1 and {m.role for m in messages} == {"assistant"}:
        raise RowError(
            f"field '{field}': {len(messages)} turns of the assistant in a row, and a reply is one; join them, or "
            "leave such rows out with data.on_bad_row: skip"
        )
    if [m.role for m in messages] != ["assistant"]:
        roles = ", ".join(m.role for m in messages) or "none"
        raise RowError(f"field '{field}': expected one message of the assistant after the prompt, got {roles}")
    return messages[0].content


def implicit_prompt(row: Fields) -> tuple[tuple[Message, ...], str, str]:
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
    return waits(chosen[:shared], "chosen"), *replies


def _transcript(row: Fields, field: str) -> tuple[Message, ...]:
    """The written-out dialogues of Anthropic's HH data: turns that begin with "Human:" and "Assistant:"."""
    parts = _TURN.split(text(row, field))
    if len(parts) < 3 or parts[0].strip():
        raise RowError(
            f"field '{field}': expected messages, or turns that begin with Human: and Assistant:, because the row has "
            f"no prompt; got {shown(row[field])}"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return tuple(Message(roles[speaker], content) for speaker, content in turns)  # type: ignore[arg-type]
