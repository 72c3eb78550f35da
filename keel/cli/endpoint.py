"""Replies of an OpenAI-compatible ``/chat/completions``, streamed."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from typing import Any

from keel.types import Message, UserError

TIMEOUT = 60.0  # seconds without a sign of life
LONGEST_LINE = 1_000_000


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to whatever host it names."""

    def redirect_request(self, *_: Any) -> None:
        return None


def endpoint_reply(
    url: str, model: str, key_env: str, temperature: float, limit: int
) -> Callable[[Sequence[Message]], Iterator[str]]:
    """A function from a conversation to the reply's pieces. The key is read from the environment variable ``key_env``
    and goes into the Authorization header alone; without the variable none is sent. UserError for an address that is
    none; the pieces raise UserError when the endpoint does not answer."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise UserError("--arena: an endpoint is NAME@https://host/v1, without user or password")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    address = urllib.parse.urlunsplit(parts._replace(path=path, fragment=""))
    key = os.environ.get(key_env, "").strip()
    opener = urllib.request.build_opener(_NoRedirects)

    def reply(messages: Sequence[Message]) -> Iterator[str]:
        body = {
            "model": model,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "temperature": temperature,
            "max_tokens": limit,
            "stream": True,
        }
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with opener.open(request, timeout=TIMEOUT) as response:
                yield from _pieces(iter(lambda: response.readline(LONGEST_LINE), b""))
        except urllib.error.HTTPError as error:
            raise UserError(f"the endpoint of {model} answered with status {error.code}") from None
        except (OSError, HTTPException) as error:
            raise UserError(f"the endpoint of {model} does not answer ({type(error).__name__})") from None

    return reply


def _pieces(lines: Iterator[bytes]) -> Iterator[str]:
    """The text in a stream of server-sent events; lines that are no data (comments, other fields) are passed over."""
    for line in lines:
        name, _, data = line.decode("utf-8", "replace").strip().partition(":")
        if name != "data":
            continue
        if data.strip() == "[DONE]":
            return
        try:
            piece = json.loads(data)["choices"][0]["delta"].get("content")
        except (ValueError, LookupError, AttributeError, TypeError):
            continue
        if isinstance(piece, str):
            yield piece
