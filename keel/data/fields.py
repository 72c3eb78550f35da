"""One field of a row -> a checked value. Each function raises ``RowError`` with the field, what was expected, and what
was found. In CSV every cell is a text: lists and objects are written as JSON there, an empty cell is no value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from keel.data.columns import HISTORY, MASK, MESSAGE, TRAINED, WEIGHTS, is_learned, refuse, says_nothing
from keel.data.rows import Row, RowError, shown
from keel.data.values import plain
from keel.types import Message, Role

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer word
    "user": "user",
    **dict.fromkeys(("human", "prompter"), "user"),  # ShareGPT's and OpenAssistant's words
    "assistant": "assistant",
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "chatbot", "ai", "bing", "bard"), "assistant"),
}
_OF_A_MESSAGE = {"role", "from", "content", "value", *WEIGHTS, *TRAINED, MASK, *MESSAGE}


# How JSON and Python write a list of messages: a program that saved it as a text (pandas in CSV) meant the list.
_WRITTEN_OUT = re.compile(
    r"""\s*\[\s*\{\s*(["'])(role|content|from|value)\1\s*:\s*["'].*["']\s*\}\s*\]\s*$""", re.DOTALL
)


class Fields(Mapping[str, Any]):
    """A row's columns that are not null. A value is checked when it is taken (``keel.data.values``), so that one that
    nobody needs may be anything; ``unused`` are those that nobody took. Asking whether one is there takes nothing."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {name: value for name, value in values.items() if not _is_null(value)}
        self._nan = frozenset(name for name, value in values.items() if value is not None and _is_null(value))
        self._taken: set[str] = set()
        self._passed_over: dict[str, None] = {}

    def __getitem__(self, name: str) -> Any:
        self._taken.add(name)
        return plain(self._values[name], name)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def pass_over(self, names: Iterable[str]) -> None:
        """Fields inside a column (``messages[].time``) that nobody needs."""
        self._passed_over.update(dict.fromkeys(names))

    def refuse_nan(self, names: Iterable[str]) -> None:
        """RowError for the first of ``names`` whose value is NaN, where a number that is missing is no answer."""
        if wrong := next((name for name in names if name in self._nan), None):
            raise RowError(f"field '{wrong}': expected a label, got NaN; write null where there is none")

    @property
    def untaken(self) -> list[str]:
        return [name for name in self._values if name not in self._taken]

    @property
    def unused(self) -> list[str]:
        return [*self.untaken, *self._passed_over]


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def checked(row: Row) -> Row:
    """The row with every column checked, for a reader that takes whole rows."""
    return replace(row, values=dict(Fields(row.values)))


def text(row: Mapping[str, Any], field: str, empty: bool = True) -> str:
    """A string, or content parts of type text, which are joined; ``empty``: may it be blank?"""
    value = row[field]
    if isinstance(value, list):
        value = _joined_parts(value, field)
    if not isinstance(value, str):
        raise RowError(f"field '{field}': expected a text, got {shown(value)}")
    if not empty and not value.strip():
        raise RowError(f"field '{field}': expected a text that is not blank, got {shown(value)}")
    return value


def utterance(row: Mapping[str, Any], field: str, empty: bool = True) -> str:
    """A prompt or a reply as a text, which is not the text of a list of messages."""
    said = text(row, field, empty)
    if _WRITTEN_OUT.match(said):
        raise RowError(
            f"field '{field}': expected a text or a list of messages, got messages written out as a text; write the "
            "list itself there, or in CSV its JSON (json.dumps)"
        )
    return said


def _joined_parts(parts: list[Any], field: str) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RowError(
                f"field '{field}': expected a text or content parts {{'type': 'text', 'text': ...}}, got {shown(part)}"
            )
        refuse(part, MESSAGE, f"{field}.")  # a picture beside the text
    return "".join(part["text"] for part in parts)


def json_value(row: Mapping[str, Any], field: str) -> Any:
    """A list or an object, read from JSON where it is given as a text (CSV)."""
    value = row[field]
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"field '{field}': expected a list or an object in JSON, got {shown(value)}") from error
    return plain(found, field)


def text_list(row: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """A list of one or more texts."""
    value = json_value(row, field)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise RowError(f"field '{field}': expected a list of texts, got {shown(value)}")
    return tuple(value)


def message_list(row: Mapping[str, Any], field: str, path: str = "", taught: bool = False) -> tuple[Message, ...]:
    """Messages with ``role`` and ``content``, or with ShareGPT's ``from`` and ``value``. ``taught``: the row is a
    demonstration, so that flags and weights say which of them are learned."""
    path = path or field
    value = json_value(row, field) if field in row else None
    if not isinstance(value, list) or not value:
        raise RowError(f"field '{path}': expected a list of messages, got {shown(value)}")
    found = tuple(_message(item, f"{path}[{i}]", taught) for i, item in enumerate(value))
    unknown = set[str]().union(*value) - _OF_A_MESSAGE
    if unknown and isinstance(row, Fields):
        row.pass_over(f"{path}[].{key}" for key in sorted(unknown) if any(item.get(key) is not None for item in value))
    return found


def _message(item: Any, path: str, taught: bool) -> Message:
    if not isinstance(item, dict):
        raise RowError(f"field '{path}': expected a message with role and content, got {shown(item)}")
    role_key = "from" if item.get("from") is not None else "role"
    written, other = item.get(role_key), item.get("role")
    role = ROLES.get(written.strip().lower()) if isinstance(written, str) else None
    if isinstance(other, str) and ROLES.get(other.strip().lower(), role) != role:
        raise RowError(f"field '{path}': role and from differ; keep one")
    if role is None:
        raise RowError(f"field '{path}.{role_key}': expected system, user or assistant, got {shown(written)}")
    refuse(item, MESSAGE, f"{path}.")
    content, value = item.get("content"), item.get("value")
    if content is not None and value is not None and content != value:
        raise RowError(f"field '{path}': content and value differ; keep one")
    message = text({path: value if content is None else content}, path)
    return Message(role, message, is_learned(item, role, path) if taught else True)


def earlier_rounds(row: Mapping[str, Any], taught: bool = False) -> tuple[Message, ...]:
    """The rounds before the prompt: LLaMA-Factory's ``history`` [[question, answer], ...], or messages."""
    if HISTORY not in row or says_nothing(row[HISTORY]):
        return ()
    turns = json_value(row, HISTORY)
    if isinstance(turns, list) and isinstance(turns[0], dict):
        return message_list(row, HISTORY, taught=taught)
    if not isinstance(turns, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn) for turn in turns
    ):
        raise RowError(f"field '{HISTORY}': expected rounds [[question, answer], ...], got {shown(turns)}")
    rounds = ((Message("user", question), Message("assistant", answer)) for question, answer in turns)
    return tuple(message for round in rounds for message in round)


def name(row: Mapping[str, Any], field: str) -> str:
    """An optional name ("" when absent); whole numbers are taken as names too."""
    value = row.get(field, "")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(f"field '{field}': expected a text, got {shown(value)}")
    return str(value)


def flag(row: Mapping[str, Any], field: str, default: bool | None = None) -> bool:
    """true or false; 1 and 0 as well, and either of them written as a text."""
    value = row.get(field, "")
    if value == "" and default is not None:
        return default
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    found = known.get(str(value).lower()) if isinstance(value, bool | int | float | str) else None
    if found is None:
        raise RowError(f"field '{field}': expected true or false, got {shown(value)}")
    return found


_THUMBS = {"up": True, "thumbs_up": True, "desirable": True, "down": False, "thumbs_down": False, "undesirable": False}


def thumb(row: Mapping[str, Any], field: str) -> bool:
    """Up or down, in the words of those who give thumbs, or as a flag has it."""
    value = row[field]
    said = value.strip().lower().replace(" ", "_").replace("-", "_") if isinstance(value, str) else None
    return _THUMBS[said] if said in _THUMBS else flag(row, field)


def number(
    row: Mapping[str, Any],
    field: str,
    low: float = -math.inf,
    high: float = math.inf,
    default: float | None = None,
    whole: bool = False,
    truth: bool = False,
) -> float:
    """A number in [low, high]; ``whole``: an integer; ``truth``: true and false are 1 and 0."""
    value = row.get(field, "")
    if value == "" and default is not None:
        return default
    try:
        refused = (isinstance(value, bool) and not truth) or not isinstance(value, bool | int | float | str)
        found = math.nan if refused else float(value)
    except (ValueError, OverflowError):
        found = math.nan
    if not low <= found <= high or not math.isfinite(found) or (whole and found != int(found)):
        least = "" if low == -math.inf else f" of at least {low:g}"
        bounds = least if high == math.inf else f" from {low:g} to {high:g}"
        raise RowError(f"field '{field}': expected a {'whole ' if whole else ''}number{bounds}, got {shown(value)}")
    return found
