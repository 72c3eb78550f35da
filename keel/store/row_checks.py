"""What an export's rows must hold: another program may have changed them, and a database takes what it is given. Each
function raises ValueError, TypeError or KeyError; whoever reads the file says which row it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, get_args

from keel.store.records import AnnotatorKind
from keel.store.sides import CHOICES, SIDES

Kinds = Mapping[str, type | tuple[type, ...]]

_NONE = type(None)
# What a row's plain values are: of all judgements, and of those on pairs and on single responses.
EVERY: Kinds = {
    **dict.fromkeys(("id", "annotator", "annotator_kind", "prompt_id", "kind", "batch", "created"), str),
    **dict.fromkeys(("reason", "guideline"), (str, _NONE)),
    "seconds": (int, float, _NONE),
    "prompt": list,
    "meta": dict,
}
PAIR: Kinds = {
    **EVERY,
    **dict.fromkeys(("chosen_finished", "rejected_finished"), bool),
    **dict.fromkeys(("edit", "out"), (bool, _NONE)),
    **dict.fromkeys(("probability", "strength"), (int, float, _NONE)),
    **dict.fromkeys(("settled_by", "settled_reason", "settled_at"), (str, _NONE)),
    "ratings": (dict, _NONE),
}
SINGLE: Kinds = {**EVERY, **dict.fromkeys(("label", "finished", "out"), bool)}

_WORDS = ("chosen", "rejected", "tie", None)
_VOTE: Mapping[str, Sequence[Any]] = {"choice": CHOICES, "chosen_side": SIDES, "settled": _WORDS, "gold": _WORDS}


def check_row(row: Mapping[str, Any], kinds: Kinds) -> None:
    """What every kind of judgement has."""
    for name, kind in kinds.items():
        value = row[name]
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise ValueError(f"{name} {value!r}")
    if not row["id"]:
        raise ValueError("id is empty")
    if row["annotator_kind"] not in get_args(AnnotatorKind):
        raise ValueError(f"annotator_kind {row['annotator_kind']!r}")
    _check_time("created", row["created"])
    if row["seconds"] is not None and not 0 <= row["seconds"] < math.inf:
        raise ValueError(f"seconds {row['seconds']}")
    for message in row["prompt"]:
        if not all(isinstance(message[part], str) for part in ("role", "content")):
            raise ValueError(f"prompt {message}")


def check_vote(row: Mapping[str, Any]) -> None:
    """What a vote on a pair has besides."""
    for name, words in _VOTE.items():
        if row[name] not in words:
            raise ValueError(f"{name} {row[name]!r}")
    if type(row["item"]) is not int:
        raise ValueError(f"item {row['item']!r}")
    if row["settled_at"] is not None:
        _check_time("settled_at", row["settled_at"])
    if row["strength"] is not None and not 0 <= row["strength"] < math.inf:
        raise ValueError(f"strength {row['strength']}")
    for side, rated in (row["ratings"] or {}).items():
        if side not in _WORDS[:2] or any(type(value) is not int for value in rated.values()):
            raise ValueError(f"ratings {row['ratings']}")


def check_source(source: Mapping[str, Any]) -> None:
    """What wrote a response."""
    for name in ("model", "fingerprint"):
        if not isinstance(source[name], str):
            raise ValueError(f"{name} {source[name]!r}")
    _check_time("a response's created", source["created"])


def _check_time(name: str, value: str) -> None:
    """A time that has the same moment in UTC, as databases keep it."""
    time = datetime.fromisoformat(value)
    if time.tzinfo is None:
        raise ValueError(f"{name} has no time zone")
    try:
        time.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{name} {value} is before the year 1 or after 9999 in UTC") from None


def reply_text(messages: Any) -> str:
    """Of a reply as a list of one message."""
    (said,) = messages
    if said["role"] != "assistant" or not isinstance(said["content"], str):
        raise ValueError(f"completion {said}")
    return str(said["content"])
