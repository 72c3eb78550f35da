"""Endpoints: asked once, many at a time, or streamed."""

from __future__ import annotations

import functools
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2

from keel.endpoint.answer import Again, Answer, Unreadable, body_lines, parse_answer, streamed_text, whole_body
from keel.endpoint.connection import address_of, key_in, open_client, retry_after, untrusted
from keel.recipe.judges import EndpointRef
from keel.types import Message, Reporter, UserError

MISSING_BOUND = 0.2  # share of the questions that may go without an answer
LONGEST_STREAM = 600.0  # seconds

_ABOUT_THE_REQUEST = frozenset({400, 413, 422})
_RETRIED = frozenset({408, 429, 500, 502, 503, 504, 529})
_LONGEST_PAUSE = 60.0  # seconds

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation to answer. ``purpose`` is what for, in errors ("grade prompt 'p0'"). ``settings`` are fields of
    the request (temperature, max_tokens, ...); those in ``optional`` are left out for a server that refuses them."""

    messages: Sequence[Message]
    purpose: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()


class _Lost(Exception):
    """The server refuses this request (too long for it, or not to its taste), which costs this answer alone."""


@dataclass(frozen=True, slots=True)
class _Missing:
    """What stands in the place of an answer that could not be had."""

    problem: str


class Endpoint:
    """A language model behind an OpenAI-compatible ``/chat/completions``.

    ``ref.url`` is the API's base (``https://host/v1``) or the whole address. The key comes from the environment
    variable ``ref.key_env`` and goes into the Authorization header alone; without the variable none is sent, as local
    servers like it. Redirects are not followed: they would carry the key to another host. Proxies and trusted
    certificates are those of the environment (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE).

    A busy or failing server (408, 429, 5xx, no connection, no answer within ``timeout`` seconds) and an unreadable
    answer are tried ``retries`` times more. The pauses start at ``backoff`` seconds and double, or last as long as the
    server's Retry-After says. Another status is a UserError at once. An answer that stays unreadable, and a request
    that the server refuses (400, 413, 422), cost that answer alone.

    ``who`` the endpoint is ("judge") and ``missing`` ("replies have no grade") are words for messages, ``place`` is
    where the address was given. Raises UserError for an address or a key that cannot be one.
    """

    def __init__(
        self,
        ref: EndpointRef,
        who: str = "endpoint",
        missing: str = "questions have no answer",
        place: str = "url",
        timeout: float = 60.0,
        retries: int = 5,
        concurrency: int = 8,
        backoff: float = 1.0,
    ) -> None:
        self.url, self.shown = address_of(ref.url, place)
        self.ref, self.who, self.missing, self.place = ref, who, missing, place
        self.timeout, self.retries, self.concurrency, self.backoff = timeout, retries, concurrency, backoff
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        key = key_in(ref.key_env)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self._client = open_client(headers, timeout)
        self._refused: set[str] = set()  # optional settings that this server has refused
        self._limit_name = "max_tokens"

    # ------------------------------------------------------------------------------------------------------ asking

    def ask(self, question: Question, read: Callable[[Answer], T]) -> T:
        """``read`` of the answer. Raises UserError when none comes that it can read."""
        result = self._try(question, read, threading.Event())
        if isinstance(result, _Missing):
            raise self._failure(result.problem)
        return result

    def ask_many(
        self,
        questions: Sequence[Question],
        read: Callable[[int, Answer], T],
        reporter: Reporter | None = None,
        among: int | None = None,
    ) -> list[T | None]:
        """``read`` of each question's place and answer, in order, ``concurrency`` of them under way at a time.

        ``read`` runs in a thread as soon as its answer is there; it raises Unreadable for one to ask for again. None
        stands for an answer that did not come. Raises UserError when the server fails, or when more than
        MISSING_BOUND of them (of ``among``, where others were answered before) are missing.
        """
        total = len(questions) if among is None else among
        stop = threading.Event()
        problems: list[str] = []
        results: list[T | None] = []
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [
                pool.submit(self._try, question, functools.partial(read, i), stop)
                for i, question in enumerate(questions)
            ]
            try:
                for future in futures:
                    result = future.result()
                    if isinstance(result, _Missing):
                        problems.append(result.problem)
                    if len(problems) > MISSING_BOUND * total:
                        share = f"{len(problems)} of {total} {self.missing}, and {MISSING_BOUND:.0%} may go without"
                        raise self._failure(f"{problems[0]} ({share})")
                    results.append(None if isinstance(result, _Missing) else result)
                    if reporter is not None:
                        reporter.advance()
            finally:  # after a failure or Ctrl-C: nobody starts, and nobody waits out a pause
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        if problems and reporter is not None:
            reporter.note(f"{len(problems)} of {total} {self.missing}: the {self.who} {problems[0]}")
        return results

    def stream(self, question: Question) -> Iterator[str]:
        """The answer's text in pieces as they come; ``timeout`` is the longest silence. Tries again only before the
        first piece. Raises UserError, also for a stream that breaks off before the answer's end."""

        def begin() -> tuple[str, Iterator[str]]:
            pieces = self._pieces(question)
            return next(pieces, ""), pieces

        try:
            first, rest = self._retrying(begin, question.purpose, threading.Event())
        except _Lost as error:
            raise self._failure(str(error)) from None
        if first:
            yield first
        try:
            yield from rest
        except (Again, Unreadable) as error:
            raise self._failure(f"could not {question.purpose}: {self._clean(error)}") from None

    # ------------------------------------------------------------------------------------------------------ trying

    def _try(self, question: Question, read: Callable[[Answer], T], stop: threading.Event) -> T | _Missing:
        def once() -> T:
            return read(parse_answer(self._whole(question)))

        try:
            return self._retrying(once, question.purpose, stop)
        except _Lost as error:
            return _Missing(str(error))

    def _retrying(self, once: Callable[[], T], purpose: str, stop: threading.Event) -> T:
        """Raises _Lost for what costs this answer alone, UserError for what fails the server."""
        pause = self.backoff
        for attempt in range(self.retries + 1):
            try:
                return once()
            except _Lost as error:
                raise _Lost(f"could not {purpose}: {error}") from None
            except (Again, Unreadable) as error:
                if attempt == self.retries or stop.is_set():
                    tries = f"after {attempt + 1} tries: " if attempt else ""
                    problem = f"could not {purpose}: {tries}{self._clean(error)}"
                    raise (_Lost(problem) if isinstance(error, Unreadable) else self._failure(problem)) from None
                asked_for = error.pause if isinstance(error, Again) else None
            stop.wait(min(pause if asked_for is None else asked_for, _LONGEST_PAUSE))
            pause *= 2
        raise AssertionError("the last attempt returns or raises")

    def _failure(self, problem: str) -> UserError:
        return UserError(
            f"the {self.who} at {self.shown} {problem}; look after it, or set another {self.who}, and run the same "
            "command again"
        )

    # ------------------------------------------------------------------------------------------------- one request

    def _whole(self, question: Question) -> bytes:
        ends = time.monotonic() + self.timeout
        with self._response(question, {}) as response:
            return whole_body(response, ends)

    def _pieces(self, question: Question) -> Iterator[str]:
        ends = time.monotonic() + LONGEST_STREAM
        with self._response(question, {"stream": True}) as response:
            if response.headers.get("Content-Type", "").startswith("application/json"):
                yield parse_answer(whole_body(response, ends)).text  # a server that does not stream
                return
            yield from streamed_text(body_lines(response, ends))

    @contextmanager
    def _response(self, question: Question, extra: Mapping[str, Any]) -> Iterator[httpx2.Response]:
        """The response to a question that the server accepts. Raises Again for what may pass, _Lost for this request's
        fault, UserError for what will not pass."""
        while True:
            left_out = self._refused & question.optional
            settings = {name: value for name, value in question.settings.items() if name not in left_out}
            if "max_tokens" in settings:
                settings[self._limit_name] = settings.pop("max_tokens")
            messages = [{"role": m.role, "content": m.content} for m in question.messages]
            body = {"model": self.ref.model, "messages": messages, **settings, **extra}
            with self._connected(body) as response:
                if response.is_success:
                    yield response
                    return
                detail = self._detail(response)
                if not self._learns(response.status_code, detail, settings, question.optional):
                    raise self._status(response, detail)

    @contextmanager
    def _connected(self, body: Mapping[str, Any]) -> Iterator[httpx2.Response]:
        try:
            # Not json=...: httpx refuses half a surrogate pair, which a sampled text may hold.
            with self._client.stream("POST", self.url, content=json.dumps(body).encode()) as response:
                yield response
        except httpx2.TimeoutException:
            raise Again("no answer: timed out") from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            if untrusted(error):
                raise UserError(
                    f"the {self.who} at {self.shown} has a certificate that this machine does not trust "
                    f"({self._clean(error)}); name a file with its issuer's in SSL_CERT_FILE, or correct {self.place}"
                ) from None
            raise Again(f"no answer: {error or type(error).__name__}") from None

    def _learns(self, status: int, detail: str, settings: Mapping[str, Any], optional: frozenset[str]) -> bool:
        """Whether the server refuses a setting that it can be asked without."""
        if status not in _ABOUT_THE_REQUEST:
            return False
        if "max_tokens" in settings and "max_completion_tokens" in detail:  # reasoning models' name for it
            self._limit_name = "max_completion_tokens"
            return True
        refused = next((name for name in settings if name in optional and name in detail.lower()), None)
        if refused is not None:  # reasoning models take no temperature
            self._refused.add(refused)
        return refused is not None

    def _status(self, response: httpx2.Response, detail: str) -> Exception:
        status = response.status_code
        if status in _RETRIED:
            return Again(f"status {status}: {detail}", retry_after(response.headers.get("Retry-After")))
        if status in _ABOUT_THE_REQUEST:
            return _Lost(f"status {status}: {detail}")
        remedy = f"correct {self.place}"
        if status in (401, 403):
            remedy = f"set the environment variable {self.ref.key_env}"
        elif 300 <= status < 400:
            remedy = f"it redirects, which would carry the key along; set {self.place} to the address itself"
        elif status == 404:
            remedy = f"{self.place} is the API's base, mostly https://host/v1, and the model must be one of its own"
        return UserError(f"the {self.who} at {self.shown} answered with status {status}: {detail}; {remedy}")

    def _detail(self, response: httpx2.Response) -> str:
        """What the server says of its error, as far as that can be read."""
        try:
            return self._clean(whole_body(response, time.monotonic() + self.timeout).decode("utf-8", "replace"))
        except (httpx2.HTTPError, Unreadable, Again):
            return "no details"

    def _clean(self, message: object) -> str:
        """A message of bounded length on one line, without the key or the address's query (servers quote them)."""
        text = " ".join(str(message).split())
        key = self._client.headers.get("Authorization", "").removeprefix("Bearer ")
        query = urllib.parse.urlsplit(self.url).query
        for secret in (key, query, *(value for _, value in urllib.parse.parse_qsl(query))):
            text = text.replace(secret, "***") if secret else text
        return text[:300]
