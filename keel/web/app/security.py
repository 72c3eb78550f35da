"""What stands before every route: headers, the size of bodies, where a request comes from, who it is, and what they may
do. A route names the least role that may use it with ``may("reviewer")``."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keel.store.people import ROLES, AccountRole, Session
from keel.web.app.limits import REQUESTS, Buckets

COOKIE = "keel_session"
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
LARGEST_BODY = 1_000_000
LARGEST_UPLOAD = 64_000_000
UPLOADS = frozenset({"/manage/prompts/import", "/manage/prompts/responses"})

CONTENT_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = (
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),  # a sign-in link must not travel to other sites
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
)


class NotSignedIn(Exception):
    pass


class NotAllowed(Exception):
    pass


class Forged(Exception):
    """An unsafe request without the session's token."""


class TooLarge(Exception):
    pass


class TooMany(Exception):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds


class Shield:
    """ASGI middleware: puts the headers on every response, and turns away what is too large or comes from another
    site."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        # an address with a version in it changes with the file; a script imports another one by its bare name
        kept_for_good = scope["path"].startswith("/static/") and scope["query_string"].startswith(b"v=")
        static = scope["path"].startswith("/static/")

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                fresh = (
                    b"public, max-age=31536000, immutable" if kept_for_good else b"no-cache" if static else b"no-store"
                )
                kept = [pair for pair in message["headers"] if pair[0] not in (b"cache-control", b"server")]
                message["headers"] = [*kept, *HEADERS, (b"cache-control", fresh)]
                if scope["scheme"] == "https":
                    message["headers"].append((b"strict-transport-security", b"max-age=31536000"))
            await send(message)

        if scope["method"] not in SAFE and _foreign(headers):
            await PlainTextResponse("this request comes from another site", 403)(scope, receive, with_headers)
            return
        largest = LARGEST_UPLOAD if scope["path"] in UPLOADS else LARGEST_BODY
        try:
            length = int(headers.get(b"content-length", b"0"))
        except ValueError:
            length = largest + 1
        if length > largest:
            await PlainTextResponse("this is too large", 413)(scope, receive, with_headers)
            return
        await self.app(scope, _counted(receive, largest), with_headers)


def _foreign(headers: dict[bytes, bytes]) -> bool:
    """Whether a browser says that another site sent this."""
    origin = headers.get(b"origin")
    if origin is not None and origin.partition(b"://")[2] != headers.get(b"host"):
        return True
    return headers.get(b"sec-fetch-site", b"none") not in (b"same-origin", b"none")


def _counted(receive: Receive, largest: int) -> Callable[[], Awaitable[Message]]:
    """A body that names no length is counted as it comes."""
    so_far = 0

    async def counting() -> Message:
        nonlocal so_far
        message = await receive()
        so_far += len(message.get("body", b""))
        if so_far > largest:
            raise TooLarge
        return message

    return counting


class Guard:
    """Who is asking. One for the app; ``may`` makes a dependency of it."""

    def __init__(self, look_up: Callable[[str], Session | None]) -> None:
        self._look_up = look_up
        self._requests = Buckets(REQUESTS)

    async def visitor(self, request: Request) -> Session | None:
        """The session of whoever is asking, if any; the address is limited when there is none."""
        cookie = request.cookies.get(COOKIE)
        session = None
        if cookie:
            session = await run_in_threadpool(self._look_up, cookie)
        key = f"session {session.account.annotator_id}" if session is not None else f"address {address(request)}"
        if wait := self._requests.take(key):
            raise TooMany(wait)
        return session

    async def require(self, request: Request, least: AccountRole) -> Session:
        session = await self.visitor(request)
        if session is None:
            raise NotSignedIn
        if ROLES.index(session.account.role) < ROLES.index(least):
            raise NotAllowed
        if request.method not in SAFE:
            sent = request.headers.get("x-csrf")
            if sent is None:
                sent = str((await request.form()).get("csrf", ""))
            if not hmac.compare_digest(sent.encode("utf-8", "replace"), session.csrf.encode()):
                raise Forged
        return session


def address(request: Request) -> str:
    return request.client.host if request.client else "?"


def may(least: AccountRole) -> Callable[[Request], Awaitable[Session]]:
    """A dependency: the session of somebody with at least this role, whose request is their own."""

    async def dependency(request: Request) -> Session:
        guard: Guard = request.app.state.guard
        return await guard.require(request, least)

    dependency.least = least  # type: ignore[attr-defined]  # tests read it off the routes
    return dependency
