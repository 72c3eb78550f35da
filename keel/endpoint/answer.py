"""What an endpoint answers, and how it is read: whole or as a stream, and never without bound."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2

LARGEST_ANSWER = 16_000_000  # bytes


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer, and the log-probabilities (nats) of what could have stood there, itself included."""

    text: str
    logprobs: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Answer:
    """``finish``: why it ended ("stop", "length", "content_filter", ...; "" where the server does not say).
    ``tokens``: with their log-probabilities, where these were asked for and given."""

    text: str
    finish: str = ""
    tokens: tuple[Token, ...] = ()

    @property
    def spoken(self) -> str:
        """The text without what stands in ``<think>``, which is no answer."""
        return self.text.rpartition("</think>")[2].partition("<think>")[0]


class Unreadable(Exception):
    """What a reader of answers raises: the answer is not what was asked for, and another may be."""


class Again(Exception):
    """A failure that may pass. ``pause``: seconds that the server asked for, or None."""

    def __init__(self, text: str, pause: float | None = None) -> None:
        super().__init__(text)
        self.pause = pause


def _chunks(response: httpx2.Response, ends: float) -> Iterator[bytes]:
    """A response's bytes, as far as they come before a time and are not too many."""
    size = 0
    for chunk in response.iter_bytes():
        size += len(chunk)
        if size > LARGEST_ANSWER:
            raise Unreadable(f"an answer of more than {LARGEST_ANSWER:,} bytes")
        if time.monotonic() > ends:
            raise Again("no answer: timed out, though its bytes kept coming")
        yield chunk


def whole_body(response: httpx2.Response, ends: float) -> bytes:
    return b"".join(_chunks(response, ends))


def body_lines(response: httpx2.Response, ends: float) -> Iterator[bytes]:
    """Cut at newlines alone: a JSON text may hold what str.splitlines takes for the end of a line."""
    rest = b""
    for chunk in _chunks(response, ends):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    yield rest


def parse_answer(data: bytes) -> Answer:
    """Raises Unreadable for what is no chat completion with a text."""
    try:
        choice = json.loads(data)["choices"][0]
        text, finish = _text(choice["message"]["content"]), choice.get("finish_reason")
        tokens = _tokens(choice.get("logprobs"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Unreadable(f"not a chat completion: {data.decode('utf-8', 'replace')}") from None
    if text is None:
        raise Unreadable("a chat completion without text")
    return Answer(text, finish if isinstance(finish, str) else "", tokens)


def _text(content: Any) -> str | None:
    """A message's text, which some servers give in parts, thoughts apart; None without one."""
    if isinstance(content, list):
        parts = [part["text"] for part in content if part.get("type", "text") == "text"]
        return "".join(parts) if parts else None
    return content if isinstance(content, str) else None


def _tokens(logprobs: Any) -> tuple[Token, ...]:
    rows = (logprobs or {}).get("content") or []
    return tuple(
        Token(row["token"], {one["token"]: float(one["logprob"]) for one in (*(row.get("top_logprobs") or ()), row)})
        for row in rows
    )


def streamed_text(lines: Iterator[bytes]) -> Iterator[str]:
    """The text in a stream of server-sent events; lines that are no data (comments, other fields) are passed over.
    Raises Again for a server's error in the stream and for a stream that ends before the answer."""
    ended = False
    for line in lines:
        name, _, data = line.decode("utf-8", "replace").strip().partition(":")
        if name != "data":
            continue
        if data.strip() == "[DONE]":
            return
        try:
            event = json.loads(data)
            if event.get("error"):
                raise Again(f"its stream holds an error: {event['error']}")
            choice = event["choices"][0]
            ended = ended or choice.get("finish_reason") is not None
            piece = _text(choice["delta"].get("content"))
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
            continue
        if piece:
            yield piece
    if not ended:
        raise Again("its stream ended before the answer did")
