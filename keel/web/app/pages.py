"""The pages for everybody: signing in, and the work itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Form, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, RedirectResponse, Response

from keel.store import Unavailable
from keel.store.people import Session
from keel.types import UserError
from keel.web.app.fields import FormLine, Secret
from keel.web.app.limits import PASSWORDS, SIGN_IN_ADDRESS, SIGN_IN_ALL, SIGN_IN_NAME, Buckets
from keel.web.app.render import page
from keel.web.app.security import COOKIE, Guard, TooMany, address, may
from keel.web.app.services import services
from keel.web.service.people import HASHING, SESSION_LASTS, SHORTEST_PASSWORD, WrongPassword

router = APIRouter(default_response_class=HTMLResponse)
Annotator = Annotated[Session, Depends(may("annotator"))]
Password = Annotated[str, Form(max_length=1000)]
T = TypeVar("T")


async def _visitor(request: Request) -> Session | None:
    guard: Guard = request.app.state.guard
    return await guard.visitor(request)


Visitor = Annotated[Session | None, Depends(_visitor)]


class Door:
    """Counts the guesses at the door, each before its password is looked at: a thousand that come at once are a
    thousand. The right one is not counted in the end."""

    def __init__(self) -> None:
        self._names, self._addresses = Buckets(SIGN_IN_NAME), Buckets(SIGN_IN_ADDRESS)
        self._all, self._passwords = Buckets(SIGN_IN_ALL), Buckets(PASSWORDS)
        self._hashing = CapacityLimiter(HASHING)

    def knock(self, name: str, where: str) -> None:
        """TooMany, and nothing is counted, where one of the counts has come to its end."""
        taken: list[tuple[Buckets, str]] = []
        for buckets, key in self._counts(name, where):
            if wait := buckets.take(key):
                _give(taken)
                raise TooMany(wait)
            taken.append((buckets, key))

    def no_guess(self, name: str, where: str) -> None:
        """It was the right password, or none was looked at."""
        _give(self._counts(name, where))

    def _counts(self, name: str, where: str) -> list[tuple[Buckets, str]]:
        spelled = " ".join(name.split()).casefold()  # however it is spaced it is one account's
        return [(self._addresses, where), (self._names, spelled), (self._all, "")]

    def new_password(self, session: Session) -> None:
        if wait := self._passwords.take(str(session.account.annotator_id)):
            raise TooMany(wait)

    async def hashed(self, call: Callable[..., T], *arguments: Any) -> T:
        """Passwords are hashed in a few threads of their own, and whoever waits for one takes up none: all else that
        the app does goes on."""
        return await to_thread.run_sync(call, *arguments, limiter=self._hashing)


def _give(taken: list[tuple[Buckets, str]]) -> None:
    for buckets, key in taken:
        buckets.give(key)


def _to(path: str) -> RedirectResponse:
    return RedirectResponse(path, status_code=303)


def _signed_in(request: Request, cookie: str, path: str = "/compare") -> Response:
    response = _to(path)
    response.set_cookie(
        COOKIE,
        cookie,
        max_age=int(SESSION_LASTS.total_seconds()),
        path="/",
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )
    return response


# ----------------------------------------------------------------------------------------------------------- the door


@router.get("/")
def home() -> Response:
    return _to("/compare")


@router.get("/sign-in")
def sign_in_page(request: Request, visitor: Visitor) -> Response:
    return _to("/compare") if visitor else page(request, "sign_in.html")


@router.post("/sign-in")
async def sign_in(request: Request, visitor: Visitor, name: FormLine, password: Password) -> Response:
    door: Door = request.app.state.door
    door.knock(name, address(request))
    try:
        cookie = await door.hashed(services(request).people.sign_in, name, password)
    except WrongPassword as error:
        response: Response = page(request, "sign_in.html", status=403, name=name, problem=str(error))
        return response
    except Unavailable:
        door.no_guess(name, address(request))
        raise
    door.no_guess(name, address(request))
    return _signed_in(request, cookie)


@router.post("/sign-out")
def sign_out(request: Request, session: Annotator) -> Response:
    services(request).people.sign_out(request.cookies[COOKIE])
    response = _to("/sign-in")
    response.delete_cookie(COOKIE, path="/")
    return response


@router.get("/enter/{secret}")
def enter_page(request: Request, visitor: Visitor, secret: Secret) -> Response:
    """The link is used by the button, not by looking at it: programs that preview links must not use it up."""
    found = services(request).people.link(secret)
    if found is None or found["annotator_id"] is None:
        return _to("/compare") if visitor else page(request, "link_gone.html", status=404)
    return page(request, "enter.html", secret=secret, name=found["name"])


@router.post("/enter/{secret}")
def enter(request: Request, visitor: Visitor, secret: Secret) -> Response:
    cookie = services(request).people.enter(secret)
    return page(request, "link_gone.html", status=404) if cookie is None else _signed_in(request, cookie)


@router.get("/join/{secret}")
def join_page(request: Request, visitor: Visitor, secret: Secret) -> Response:
    found = services(request).people.link(secret)
    if found is None or found["annotator_id"] is not None:
        return page(request, "link_gone.html", status=404)
    return page(request, "join.html", secret=secret, role=found["role"], shortest=SHORTEST_PASSWORD)


@router.post("/join/{secret}")
async def join(request: Request, visitor: Visitor, secret: Secret, name: FormLine, password: Password) -> Response:
    door: Door = request.app.state.door
    found = await run_in_threadpool(services(request).people.link, secret)
    if found is None or found["annotator_id"] is not None:
        gone: Response = page(request, "link_gone.html", status=404)
        return gone
    try:
        cookie = await door.hashed(services(request).people.accept, secret, name, password)
    except Unavailable:
        raise
    except UserError as error:
        context = {"secret": secret, "role": found["role"], "name": name, "shortest": SHORTEST_PASSWORD}
        response: Response = page(request, "join.html", status=400, problem=str(error), **context)
        return response
    return _signed_in(request, cookie, "/guideline")


# ----------------------------------------------------------------------------------------------------------- the work


@router.get("/compare")
def compare(request: Request, session: Annotator) -> Response:
    guideline = services(request).labelling.guideline()
    return work_page(request, session, "compare.html", aspects=guideline.aspects if guideline else ())


def work_page(request: Request, session: Session, template: str, **context: Any) -> Response:
    """A working page. It knows the guideline that it was made with: what is done on it counts under that version."""
    guideline = services(request).labelling.guideline()
    version = guideline.version if guideline else None
    lease = services(request).store.lease.total_seconds()
    found: Response = page(request, template, session, guideline_version=version, lease=lease, **context)
    return found


@router.get("/rank")
def rank(request: Request, session: Annotator) -> Response:
    return work_page(request, session, "rank.html")


@router.get("/thumbs")
def thumbs(request: Request, session: Annotator) -> Response:
    return work_page(request, session, "thumbs.html")


@router.get("/write")
def write(request: Request, session: Annotator) -> Response:
    return work_page(request, session, "write.html", kind="write")


@router.get("/edit")
def edit(request: Request, session: Annotator) -> Response:
    return work_page(request, session, "write.html", kind="edit")


@router.get("/arena")
def arena(request: Request, session: Annotator) -> Response:
    place = services(request).arena
    current = place.current(session.account)
    context: dict[str, Any] = {"conversation": current, "handle": place.handle(current.id) if current else ""}
    return page(request, "arena.html", session, ready=place.ready, **context)


@router.get("/mine")
def mine(request: Request, session: Annotator) -> Response:
    return page(request, "mine.html", session, work=services(request).labelling.mine(session.account))


@router.get("/guideline")
def guideline(request: Request, session: Annotator) -> Response:
    return page(request, "guideline.html", session, guideline=services(request).labelling.guideline())


@router.get("/account")
def account(request: Request, session: Annotator) -> Response:
    return page(request, "account.html", session, shortest=SHORTEST_PASSWORD)


@router.post("/account")
async def set_password(request: Request, session: Annotator, password: Password) -> Response:
    door: Door = request.app.state.door
    door.new_password(session)
    context: dict[str, Any] = {"shortest": SHORTEST_PASSWORD}
    try:
        cookie = await door.hashed(services(request).people.set_password, session.account, password)
    except Unavailable:
        raise
    except UserError as error:
        told = {"status": 400, "problem": str(error), **context}
        response: Response = await run_in_threadpool(page, request, "account.html", session, **told)
        return response
    return _signed_in(request, cookie)
