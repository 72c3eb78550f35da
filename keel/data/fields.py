"""One field of a row -> a checked value. Each function raises ``RowError`` with the field, what was expected, and what
was found. In CSV every cell is a text: lists and objects are written as JSON there, an empty cell is no value.
"""

from __future__ import annotations

import json
import math
from typing import Any

from keel.data.rows import RowError, shown
from keel.types import Message, Role

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer word
    "user": "user",
    "human": "user",  # ShareGPT's words
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "refusal")


def text(row: dict[str, Any], field: str, empty: bool = True) -> str:
    """A string, or content parts of type text, which are joined; ``empty``: may it be blank?"""
    value = row[field]
    if isinstance(value, list):
        value = _joined_parts(value, field)
    if not isinstance(value, str):
        raise RowError(f"field '{field}': expected a text, got {shown(value)}")
    return _checked(value, field, empty)


def _checked(value: str, field: str, empty: bool = True) -> str:
    if not empty and not value.strip():
        raise RowError(f"field '{field}': expected a text that is not blank, got {shown(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except (
            UnicodeEncodeError
        ) as error:  # JSON can write half a character (a lone surrogate); no tokenizer can read it
            raise RowError(
                f"field '{field}': character {error.start + 1} is half a character (lone surrogate)"
            ) from error
    return value


def _joined_parts(parts: list[Any], field: str) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RowError(
                f"field '{field}': expected a text or content parts {{'type': 'text', 'text': ...}}, got {shown(part)}"
            )
    return "".join(part["text"] for part in parts)


def json_value(row: dict[str, Any], field: str) -> Any:
    """A list or an object, read from JSON where it is given as a text (CSV)."""
    value = row[field]
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"field '{field}': expected a list or an object in JSON, got {shown(value)}") from error


def text_list(row: dict[str, Any], field: str) -> tuple[str, ...]:
    """A list of one or more texts."""
    value = json_value(row, field)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise RowError(f"field '{field}': expected a list of texts, got {shown(value)}")
    return tuple(_checked(item, field) for item in value)


def message_list(row: dict[str, Any], field: str, path: str = "") -> tuple[Message, ...]:
    """Messages with ``role`` and ``content``, or with ShareGPT's ``from`` and ``value``."""
    path = path or field
    value = json_value(row, field) if field in row else None
    if not isinstance(value, list) or not value:
        raise RowError(f"field '{path}': expected a list of messages, got {shown(value)}")
    return tuple(_message(item, f"{path}[{i}]") for i, item in enumerate(value))


def _message(item: Any, path: str) -> Message:
    if not isinstance(item, dict):
        raise RowError(f"field '{path}': expected a message with role and content, got {shown(item)}")
    role_key, content_key = ("from", "value") if item.get("from") is not None else ("role", "content")
    role = ROLES.get(item[role_key]) if isinstance(item.get(role_key), str) else None
    if role is None:
        raise RowError(
            f"field '{path}.{role_key}': expected system, user or assistant, got {shown(item.get(role_key))}"
        )
    for key in UNSUPPORTED:  # they would change what is learned, so they are not passed over
        if item.get(key):
            raise RowError(f"field '{path}.{key}': expected messages of text alone, got {shown(item[key])}")
    if item.get("weight") == 0:
        raise RowError(
            f"field '{path}.weight': a reply that must not be learned is not supported; remove it from the row"
        )
    return Message(role, text({path: item.get(content_key)}, path))


def name(row: dict[str, Any], field: str) -> str:
    """An optional name ("" when absent); whole numbers are taken as names too."""
    value = row.get(field, "")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(f"field '{field}': expected a text, got {shown(value)}")
    return str(value)


def flag(row: dict[str, Any], field: str, default: bool | None = None) -> bool:
    """true or false; 1 and 0 as well, and either of them written as a text."""
    value = row.get(field, "")
    if value == "" and default is not None:
        return default
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    found = known.get(str(value).lower()) if isinstance(value, bool | int | float | str) else None
    if found is None:
        raise RowError(f"field '{field}': expected true or false, got {shown(value)}")
    return found


def number(
    row: dict[str, Any],
    field: str,
    low: float,
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
    except ValueError:
        found = math.nan
    if not low <= found <= high or not math.isfinite(found) or (whole and found != int(found)):
        bounds = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise RowError(f"field '{field}': expected a {'whole ' if whole else ''}number {bounds}, got {shown(value)}")
    return found
