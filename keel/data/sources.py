"""Rows -> records. Which rows are accepted, with an example of each: docs/data.md.

Every reader takes a ``source`` (a JSONL, JSON, CSV or Parquet file, a folder of them, or
``hub:owner/name[:config][:split]``) and a ``Reading``. Rows that cannot be read are an error: a ``UserError`` with
file, line, field, what was expected and what was found, up to five rows in one message. Or they are left out and
reported; none is dropped silently. A record without an ``id`` gets a hash of its content, so the same row has the same
id in every file. Rows may repeat; two different rows of one id are an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from keel.data.collate import messages_hash
from keel.data.columns import (
    ANSWER,
    EVEN,
    HISTORY,
    MATERIAL,
    OWN,
    PAIRED,
    PROBABILITY,
    QUESTION,
    SHOWN,
    SYSTEM,
    TAUGHT,
    Refused,
    refuse,
)
from keel.data.fields import (
    Fields,
    earlier_rounds,
    flag,
    message_list,
    name,
    number,
    text,
    text_list,
    utterance,
)
from keel.data.labelled import FORMS, Bounds, labelled
from keel.data.parts import (
    after_prompt,
    answer_in,
    ask,
    ask_instruction,
    ask_question,
    conversation,
    implicit_prompt,
    named,
    prompt_of,
    solution_of,
    system_of,
    the_reply,
    waits,
    with_system,
)
from keel.data.rows import (
    BadRows,
    LeftOut,
    Reading,
    Row,
    RowError,
    Undecided,
    UnknownForm,
    printable,
    read_rows,
    shown,
)
from keel.data.step_rows import FORMS as STEP_FORMS
from keel.data.step_rows import Neutral, step_labels
from keel.data.values import plain
from keel.recipe.steps import Steps
from keel.types import Demonstration, LabelledCompletion, Message, Preference, Prompt, Settled, StepLabels

PLAIN_READING = Reading()
LINES = Steps()
NAMED = 12  # unused columns that a note lists


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


def read_demonstrations(source: str | Path, reading: Reading = PLAIN_READING) -> list[Demonstration]:
    """Rows ``messages``, ``conversations``, ``prompt``+``completion``, ``instruction``+``output``, or ``text``.
    Beside an instruction ``context`` is ``input``, and ``response`` is ``output``. Of a ``question`` (``problem``) the
    ``solution`` is learned, or the ``answer``, which in GSM8K's files is one."""
    forms = "messages | conversations | prompt+completion | instruction[+input]+output | question+answer | text"
    return _read(source, _demonstration, forms, reading, TAUGHT)


def read_prompts(source: str | Path, reading: Reading = PLAIN_READING) -> list[Prompt]:
    """Rows ``prompt``, ``messages`` (that wait for the assistant), ``instruction``, or ``question``/``problem`` (whose
    ``answer`` may stand at the end of a worked solution, as in GSM8K's and MATH's files); optional ``id``, ``kind``,
    ``meta``. Any other column is kept in the prompt's ``meta`` too, where a reward function finds it."""
    return _read(source, _prompt_row, "prompt | messages | instruction[+input] | question[+answer]", reading)


def read_preferences(source: str | Path, reading: Reading = PLAIN_READING) -> list[Preference]:
    """Rows ``prompt``+``chosen``+``rejected``, ``chosen``+``rejected`` conversations that share their beginning, or
    OpenAI's ``input``+``preferred_output``+``non_preferred_output``; optional ``margin``, ``tie``, ``annotator``,
    ``chosen_finished`` and ``rejected_finished`` (false: the reply was cut at the length limit), ``settled`` (a
    reviewer's last word on the pair: chosen, rejected or tie), ``probability`` (that the chosen reply is the better
    one, a soft label; ``columns.PROBABILITY`` has its other names). A row with ``gold`` or ``out`` (of Keel's own
    export) is left out: its answer was known, and such votes measure their annotator; or its pair was taken out of use.

    Two equal replies are a tie, whatever the row says: neither can be better. A tie's probability is a half.
    """
    forms = "prompt+chosen+rejected | chosen+rejected | input+preferred_output+non_preferred_output"
    return _read(source, _preference, forms, reading, PAIRED)


def read_labelled(
    source: str | Path, reading: Reading = PLAIN_READING, bounds: Bounds | None = None
) -> list[LabelledCompletion]:
    """Single replies with thumbs up or down (`keel.data.labelled`). ``bounds``: what makes one of a rating; rows whose
    rating is between them are left out and counted. So are those of Keel's own export that have ``gold`` or ``out``."""
    return _read(source, partial(labelled, bounds=bounds), FORMS, reading, PAIRED)


def read_steps(
    source: str | Path, reading: Reading = PLAIN_READING, steps: Steps = LINES, neutral: Neutral = "good"
) -> list[StepLabels]:
    """Rows ``prompt``+``completions``+``labels``: the steps of a reply and a label in [0, 1] (or true, false; null:
    unjudged) each; PRM800K's and Math-Shepherd's files (`keel.data.step_rows`). ``steps``: what is put between two
    steps that nothing separates; ``neutral``: what PRM800K's rating of 0 counts as."""
    return _read_all(source, partial(step_labels, steps=steps, neutral=neutral), STEP_FORMS, reading)


def read_texts(source: str | Path, reading: Reading = PLAIN_READING) -> list[str]:
    """Rows ``text``: plain text, as a base model reads it."""
    return [d.messages[0].content for d in _read(source, _plain_text, "text", reading)]


def read_facts(source: str | Path, reading: Reading = PLAIN_READING) -> list[Fact]:
    """Rows ``prompt``+``choices``+``answer``: the answer is a choice's index (from 0) or its text."""
    return _read(source, _fact, "prompt+choices+answer", reading)


def _read(
    source: str | Path,
    parse: Callable[[Fields], R],
    forms: str,
    reading: Reading,
    refused: Mapping[str, Refused] = SHOWN,
) -> list[R]:
    return _read_all(source, lambda fields: [parse(fields)], forms, reading, refused)


def _read_all(
    source: str | Path,
    parse: Callable[[Fields], Sequence[R]],
    forms: str,
    reading: Reading,
    refused: Mapping[str, Refused] = SHOWN,
) -> list[R]:
    """``parse``: what a row holds, one record or several."""
    bad = BadRows(str(source))
    records: list[R] = []
    first: dict[str, tuple[R, Row]] = {}
    prompts: dict[str, tuple[Prompt, Row]] = {}
    unused: dict[str, dict[str, None]] = {}  # file -> columns
    undecided = 0
    left_out: Counter[str] = Counter()
    for row in read_rows(source, bad, reading.note, reading.most):
        fields = Fields(row.values)
        try:
            refuse(fields, refused)
            own = [_placed(record, row) for record in parse(fields)]
            for record in own:
                _same_or_error(first, "id", record.id, record, row)
                prompt = getattr(record, "prompt", None)
                if isinstance(prompt, Prompt):
                    _same_or_error(prompts, "prompt_id", prompt.id, replace(prompt, kind="", meta={}), row)
            records += own
            unused.setdefault(row.file, {}).update(dict.fromkeys(fields.unused))
        except Undecided:
            undecided += 1
        except LeftOut as why:
            left_out.update(map(str, why.args))
        except UnknownForm:
            there = ", ".join(row.values) or "none"
            bad.add(row.file, row.line, f"columns are {there}; expected {forms}")
        except RowError as error:
            bad.add(row.file, row.line, str(error))
    reading.settle(bad)
    if undecided:
        reading.undecided(undecided)
        reading.note(f"{source}: {undecided} rows whose rating is neither up nor down are left out")
    for what, count in left_out.items():
        reading.note(f"{source}: {count} {'row is' if count == 1 else 'rows are'} left out: {what}")
    for file, columns in unused.items():
        _note_unused(file, [column for column in columns if column not in OWN], reading)
    return records


def _placed(record: R, row: Row) -> R:
    """The record with its place, where its kind has one."""
    place = f"{row.file}, {row.line}"
    if isinstance(record, Preference | LabelledCompletion | StepLabels):
        return replace(record, place=place, prompt=replace(record.prompt, place=place))
    return replace(record, place=place) if isinstance(record, Demonstration | Prompt) else record


def _note_unused(file: str, columns: Sequence[str], reading: Reading) -> None:
    if columns:
        more = f" and {len(columns) - NAMED} more" if len(columns) > NAMED else ""
        some = f"{', '.join(printable(column) for column in columns[:NAMED])}{more}"
        one = len(columns) == 1
        reading.note(f"{file}: {'column' if one else 'columns'} {some} {'is' if one else 'are'} not used")


T = TypeVar("T")


def _same_or_error(seen: dict[str, tuple[T, Row]], column: str, key: str, record: T, row: Row) -> None:
    earlier, where = seen.setdefault(key, (record, row))
    if earlier == record:
        return
    place = f"{where.file}, {where.line}"
    if column in row.values:
        raise RowError(f"field '{column}': {key!r} already names a different row ({place}); give each its own")
    raise RowError(f"the same content is there with another kind, meta or prompt_id at {place}; give the rows ids")


# -------------------------------------------------------------------------------------------------------- the forms


def _demonstration(row: Fields) -> Demonstration:
    if "messages" in row:
        messages = conversation(row, "messages", taught=True)
    elif "conversations" in row:
        messages = conversation(row, "conversations", taught=True)
    elif "prompt" in row and "completion" in row:
        asked = ask(row, taught=True)
        messages = asked + after_prompt(row, "completion", asked, taught=True)
    elif "instruction" in row and (answer := named(row, ANSWER, "replies")):
        messages = (*ask_instruction(row, taught=True), Message("assistant", utterance(row, answer)))
    elif "text" not in row and (question := next((field for field in QUESTION if field in row), "")):
        if not (solution := solution_of(row)):
            raise UnknownForm
        messages = (*ask_question(row, question), Message("assistant", solution))
    else:
        return _plain_text(row)
    if messages[-1].role != "assistant":
        raise RowError(f"the conversation ends with a message of the {messages[-1].role}; expected the assistant's")
    begins = next(message for message in messages if message.role != "system")
    if begins.role == "assistant" and begins.learned:
        raise RowError(
            "the conversation begins with the assistant's message; put the user's before it, give it weight: 0, or "
            "take it out (a text without a question is a row of text)"
        )
    if not any(message.learned for message in messages if message.role == "assistant"):
        raise RowError("none of its replies is learned (each has a weight of 0); leave the row out")
    return Demonstration(name(row, "id") or messages_hash(messages), messages)


def _plain_text(row: Fields) -> Demonstration:
    if "text" not in row:
        raise UnknownForm
    if system_of(row) or earlier_rounds(row):
        raise RowError("field 'text': it is learned whole, without the system message or history beside it; keep one")
    messages = (Message("assistant", text(row, "text", empty=False)),)
    return Demonstration(name(row, "id") or messages_hash(messages, salt="text"), messages, plain=True)


def _prompt_row(row: Fields) -> Prompt:
    answered: dict[str, Any] = {}
    if "prompt" in row:
        messages = ask(row)
    elif "messages" in row:
        messages = waits(conversation(row, "messages"), "messages")
    elif "instruction" in row:
        messages = ask_instruction(row)
    elif question := next((field for field in QUESTION if field in row), ""):
        messages, answered = ask_question(row, question), answer_in(row)
    else:
        raise UnknownForm
    prompt = prompt_of(row, messages, name(row, "id"))
    extra = answered | {plain(name, name): row[name] for name in row.untaken}
    twice = sorted(extra.keys() & prompt.meta.keys())
    if twice:
        raise RowError(f"field '{twice[0]}' is both in meta and a column; keep one")
    return replace(prompt, meta={**prompt.meta, **extra})


def _preference(row: Fields) -> Preference:
    told = any(row.get(word) for word in ("tie", "settled", "gold", "out"))
    given = found if isinstance(found := row.get("input"), dict) else None
    if told and set(EVEN.values()) <= row.keys() and not EVEN.keys() & row.keys():  # nobody's preference
        messages = ask(row) if "prompt" in row else message_list(given or {}, "messages", "input.messages")
        chosen, rejected = (the_reply(row, field, messages) for field in EVEN.values())
    elif "preferred_output" in row and "non_preferred_output" in row and given is not None:
        refuse(given, SHOWN, "input.")
        asked = message_list(given, "messages", "input.messages")
        messages = waits(with_system(row, asked), "input.messages")
        chosen, rejected = (the_reply(row, field, messages) for field in ("preferred_output", "non_preferred_output"))
    elif "chosen" in row and "rejected" in row and "prompt" in row:
        messages = ask(row)
        chosen, rejected = (the_reply(row, field, messages) for field in ("chosen", "rejected"))
    elif "chosen" in row and "rejected" in row:
        asked, chosen, rejected = implicit_prompt(row)
        messages = with_system(row, asked)
    else:
        raise UnknownForm
    if row.get("gold") or flag(row, "out", default=False):
        raise LeftOut
    row.refuse_nan(("tie", *PROBABILITY))
    prompt = prompt_of(row, messages, name(row, "prompt_id"))
    tie = flag(row, "tie", default=False) or chosen == rejected
    margin, annotator = number(row, "margin", low=0.0, default=0.0), name(row, "annotator")
    ends = (flag(row, "chosen_finished", default=True), flag(row, "rejected_finished", default=True))
    replies = (Message("assistant", chosen), Message("assistant", rejected))
    cut = "" if all(ends) else f" finished {ends}"
    settled, probability = _settled(row), _probability(row, tie)
    word = f" settled {settled}" if settled else ""
    soft = "" if probability is None else f" probability {probability}"
    content = messages_hash((*messages, *replies), salt=f"preference {tie} {margin} {annotator}{cut}{word}{soft}")
    return Preference(
        name(row, "id") or content, prompt, chosen, rejected, tie, margin, annotator, *ends, 1.0, settled, probability
    )


def _probability(row: Fields, tie: bool) -> float | None:
    """A soft label under any of its names; None where there is none."""
    given = {field: number(row, field, low=0.0, high=1.0) for field in PROBABILITY if row.get(field, "") != ""}
    if len(set(given.values())) > 1:
        raise RowError(f"field '{next(iter(given))}': {' and '.join(given)} differ; keep one")
    if not given:
        return None
    field, found = next(iter(given.items()))
    if tie and found != 0.5 and flag(row, "tie", default=False):
        raise RowError(f"field '{field}': expected 0.5 in a tie, got {shown(found)}; keep the one or the other")
    return 0.5 if tie else found


def _settled(row: Fields) -> Settled:
    """A reviewer's last word on the pair; empty (an empty cell, too) where there is none."""
    value = row.get("settled", "")
    if value not in ("", "chosen", "rejected", "tie"):
        raise RowError(f"field 'settled': expected chosen, rejected, tie or nothing, got {shown(value)}")
    settled: Settled = value
    return settled


def _fact(row: Fields) -> Fact:
    if not {"prompt", "choices", "answer"} <= row.keys():
        raise UnknownForm
    prompt, choices = text(row, "prompt", empty=False), text_list(row, "choices")
    answer = row["answer"]
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise RowError(f"field 'choices': expected two different texts or more, got {shown(list(choices))}")
    if not all(choices):
        raise RowError("field 'choices': one of them is empty; its log-probability is 0, so it would always win")
    if answer in choices:
        index = choices.index(answer)
    else:
        index = int(number(row, "answer", low=0, high=len(choices) - 1, whole=True))
    content = messages_hash([Message("assistant", t) for t in (prompt, *choices)], salt=f"fact {index}")
    return Fact(name(row, "id") or content, prompt, choices, index)


def as_prompt(value: Any) -> Prompt:
    """A prompt that another tool's row holds, as a text or as messages. RowError when it is neither."""
    messages = ask(Fields({"prompt": value}))
    return Prompt(messages_hash(messages), messages)


def prompt_of_row(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row, as a prompt's row has it. RowError when there is none."""
    fields = ("prompt", "messages", "instruction", *MATERIAL, *SYSTEM, HISTORY)
    return _prompt_row(Fields({field: row[field] for field in fields if field in row}))


def reply_of_row(row: Mapping[str, Any], field: str, prompt: Sequence[Message]) -> str:
    """A reply that is a text, or one message of the assistant after the prompt's, which may be repeated in front."""
    return the_reply(Fields({field: row[field]}), field, prompt)
