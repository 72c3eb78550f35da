"""Between database rows and records."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Row

from keel.store.records import Response
from keel.types import Message, Prompt, UserError

MARK = "[erased]"  # stands where personal data was (erase.py)
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def storable(text: str) -> str:
    """``text`` with the two things that PostgreSQL can't hold (NUL, half a surrogate pair) as U+FFFD, the character
    for what could not be decoded. A model that spells bytes can write them."""
    return _UNSTORABLE.sub("\ufffd", text)


def checked_text(text: str, place: str) -> str:
    """``text``, which is part of what is asked and so may not change; UserError when no database can hold it."""
    if found := _UNSTORABLE.search(text):
        what = "NUL" if found[0] == "\0" else "half a character (lone surrogate)"
        raise UserError(f"{place} can't be stored: character {found.start() + 1} is {what}; take it out")
    return text


def messages_json(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


def checked_json(value: Mapping[str, Any], place: str) -> dict[str, Any]:
    """``value`` as JSON reads it back (tuples become lists); UserError when JSON has no form for something in it."""
    try:
        text = json.dumps(dict(value), allow_nan=False, ensure_ascii=False)
        plain: dict[str, Any] = json.loads(checked_text(text, place))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{place} can't be stored as JSON ({error}); use strings, finite numbers, lists and dicts"
        ) from None
    return plain


def response_key(prompt_id: str, text: str, finished: bool, model: str, fingerprint: str, sampling: object) -> str:
    """What makes a response the same one: its prompt, its text, and what made it."""
    identity = [prompt_id, text, finished, model, fingerprint, sampling]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def prompt_record(row: Row[Any]) -> Prompt:
    messages = tuple(Message(message["role"], message["content"]) for message in row.messages)
    return Prompt(id=row.id, messages=messages, kind=row.kind, meta=row.meta)


def response_record(row: Row[Any]) -> Response:
    return Response(
        id=row.id,
        prompt_id=row.prompt_id,
        text=row.text,
        finished=row.finished,
        model=row.model,
        fingerprint=row.fingerprint,
        sampling=row.sampling,
        created=row.created,
    )
