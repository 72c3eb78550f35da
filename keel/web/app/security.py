"""What stands before every route: headers, the size of bodies, where a request comes from, who it is, and what they may
do. A route names the least role that may use it with ``may("reviewer")``."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from ipaddress import IPv6Address, ip_network
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keel.store.people import ROLES, Account, AccountRole, Session
from keel.store.tokens import Token
from keel.web.app.limits import REQUESTS, Buckets, of_program
from keel.web.app.proxies import parsed

COOKIE = "keel_session"
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
LARGEST_UNASKED = 500_000  # of somebody who is not signed in: the longest reply, of whoever was signed out over it
LARGEST_BODY = 1_000_000
LARGEST_UPLOAD = 64_000_000  # of admins
PROGRAMS = "/api/v1/"  # where tokens are asked for, and cookies are not looked at
UPLOADS = frozenset(
    {"/manage/prompts/import", "/manage/prompts/responses", f"{PROGRAMS}prompts", f"{PROGRAMS}responses"}
)
DOOR = ("/sign-in", "/enter/", "/join/")

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


class NoToken(Exception):
    """A program's request without a token that holds."""


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


LookUp = Callable[[str], Session | None]
LookUpToken = Callable[[str], Token | None]


class Shield:
    """ASGI middleware: puts the headers on every response, and turns away what comes from another site, and what is
    larger than its sender may send. Such a body is not read: the framework would read it before it asks who sends it.
    """

    def __init__(self, app: ASGIApp, look_up: LookUp, look_up_token: LookUpToken) -> None:
        self.app, self._look_up, self._look_up_token = app, look_up, look_up_token

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
        try:
            largest = await self._largest(scope, headers)
        except Exception as error:
            await (await _answer(scope, error))(scope, receive, with_headers)
            return
        await _counted(self.app, largest)(scope, receive, with_headers)

    async def _largest(self, scope: Scope, headers: dict[bytes, bytes]) -> int:
        """How much of the body is read at most. Raises what is to be answered when it is more than its sender may
        send. A small one needs no look into the database."""
        length = _length(headers)
        if length is not None and length <= LARGEST_UNASKED:
            return LARGEST_UNASKED
        if scope["method"] in SAFE:
            raise TooLarge
        account = await self._account(Request(scope))
        if account is None:
            if scope["path"].startswith(PROGRAMS):
                raise NoToken
            if length is None and scope["path"].startswith(DOOR):
                return LARGEST_UNASKED
            # whoever was signed out keeps what they wrote until they are signed in again: it is not too large
            raise TooLarge if scope["path"].startswith(DOOR) else NotSignedIn
        if scope["path"] in UPLOADS:
            if account.role != "admin":
                raise NotAllowed
            largest = LARGEST_UPLOAD
        else:
            largest = LARGEST_BODY
        if length is not None and length > largest:
            raise TooLarge
        return largest

    async def _account(self, request: Request) -> Account | None:
        """Who sends it."""
        found: Session | Token | None = None
        if request.url.path.startswith(PROGRAMS):
            if secret := bearer(request):
                found = await run_in_threadpool(self._look_up_token, secret)
        elif cookie := request.cookies.get(COOKIE):
            found = await run_in_threadpool(self._look_up, cookie)
        return None if found is None else found.account


def _length(headers: dict[bytes, bytes]) -> int | None:
    """How long the body is by its header; None where that is not told before it comes."""
    told = headers.get(b"content-length")
    if told is None:
        return None if b"transfer-encoding" in headers else 0
    return int(told) if told.isdigit() else LARGEST_UPLOAD + 1


async def _answer(scope: Scope, error: Exception) -> Response:
    """What the app says to it. (Its handlers are for what is raised further in.)"""
    handlers = scope["app"].exception_handlers
    handler = next(handlers[kind] for kind in type(error).__mro__ if kind in handlers)
    found: Response = await handler(Request(scope), error)
    return found


def _foreign(headers: dict[bytes, bytes]) -> bool:
    """Whether a browser says that another site sent this."""
    origin = headers.get(b"origin")
    if origin is not None and origin.partition(b"://")[2] != headers.get(b"host"):
        return True
    return headers.get(b"sec-fetch-site", b"none") not in (b"same-origin", b"none")


def _counted(app: ASGIApp, largest: int) -> ASGIApp:
    """The app with bodies that are counted as they come: when one is too large nothing more of it is read, and that is
    the answer, whatever the app makes of half a body."""

    async def counting_app(scope: Scope, receive: Receive, send: Send) -> None:
        so_far = 0

        async def counting() -> Message:
            nonlocal so_far
            message = await receive()
            so_far += len(message.get("body", b""))
            if so_far > largest:
                raise TooLarge
            return message

        async def unless_too_large(message: Message) -> None:
            if so_far <= largest:
                await send(message)

        try:
            await app(scope, counting, unless_too_large)
        except Exception:
            if so_far <= largest:
                raise
        if so_far > largest:
            await (await _answer(scope, TooLarge()))(scope, receive, send)

    return counting_app


class Guard:
    """Who is asking. One for the app; ``may`` and ``program`` make dependencies of it."""

    def __init__(self, look_up: LookUp, look_up_token: LookUpToken) -> None:
        self._look_up, self._look_up_token = look_up, look_up_token
        self._requests = Buckets(REQUESTS)
        self._tokens: dict[int, Buckets] = {}  # by how many requests a minute

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

    async def token(self, request: Request, least: AccountRole) -> Token:
        """The token that came with the request, and nothing else that did."""
        secret = bearer(request)
        token = await run_in_threadpool(self._look_up_token, secret) if secret else None
        if token is None:
            if wait := self._requests.take(f"address {address(request)}"):
                raise TooMany(wait)
            raise NoToken
        buckets = self._tokens.setdefault(token.per_minute, Buckets(of_program(token.per_minute)))
        if wait := buckets.take(str(token.id)):
            raise TooMany(wait)
        if ROLES.index(token.account.role) < ROLES.index(least):
            raise NotAllowed
        return token


def bearer(request: Request) -> str | None:
    """What stands in the Authorization header behind "Bearer"."""
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    return secret.strip() or None if scheme.lower() == "bearer" else None


def address(request: Request) -> str:
    """Where it comes from, as it is counted: of IPv6 the network, since whoever has one address has 2^64."""
    host = request.client.host if request.client else "?"
    found = parsed(host)
    if isinstance(found, IPv6Address):
        return str(ip_network((found, 64), strict=False))
    return host if found is None else str(found)


def may(least: AccountRole) -> Callable[[Request], Awaitable[Session]]:
    """A dependency: the session of somebody with at least this role, whose request is their own."""

    async def dependency(request: Request) -> Session:
        guard: Guard = request.app.state.guard
        return await guard.require(request, least)

    dependency.least = least  # type: ignore[attr-defined]  # tests read it off the routes
    return dependency


def program(least: AccountRole) -> Callable[[Request], Awaitable[Token]]:
    """A dependency: the token of a program that may do what this role may."""

    async def dependency(request: Request) -> Token:
        guard: Guard = request.app.state.guard
        return await guard.token(request, least)

    dependency.least = least  # type: ignore[attr-defined]  # as in ``may``
    return dependency
