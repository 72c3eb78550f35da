"""The app: services, routes, and what is said when something goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from keel.store import LeaseLost, Store, Unavailable
from keel.types import UserError
from keel.web.app import (
    api,
    constitutions,
    exports,
    manage,
    models,
    pages,
    programs,
    standings,
    steps,
    training,
    v1,
)
from keel.web.app.proxies import Forwarded, networks
from keel.web.app.render import STATIC, page
from keel.web.app.security import Forged, Guard, NotAllowed, NoToken, NotSignedIn, Shield, TooLarge, TooMany
from keel.web.app.services import Services, services
from keel.web.service.addresses import Network
from keel.web.service.arena import Busy
from keel.web.service.sources import Sources
from keel.web.service.tokens import KeyReused

log = logging.getLogger("keel.web")

RETRY_SECONDS = 5
# What a UserError is answered with; the words where its own are not for everybody ("": they are). All others are 400.
# A browser keeps what was answered with 503 and sends it again; 400 and 409 are the last word on it.
REFUSALS: tuple[tuple[type[UserError], int, str], ...] = (
    (LeaseLost, 409, ""),
    (Unavailable, 503, "the database does not answer just now; nothing of this was kept, try it again in a moment"),
    (Busy, 503, ""),
    (KeyReused, 422, ""),
)


def create_app(
    store: Store,
    sources: Sources | None = None,
    proxies: Sequence[str] = (),
    address: str | None = None,
    webhooks_to: Sequence[Network] = (),
) -> FastAPI:
    """The labelling app on ``store``, which must have been prepared (keel.web.service.start). ``proxies``: addresses
    and networks whose word on where a request comes from is believed. ``address``: under which people reach it, for
    links to sign in; by default under whichever a request names. ``webhooks_to``: networks that are not public and may
    be sent to all the same."""
    # no pages about the routes: whoever labels has no use for them, and programs' are described at /api/v1/openapi.json
    app = FastAPI(title="Keel", openapi_url=None, docs_url=None, redoc_url=None)
    app.state.services = Services.of(store, sources or Sources(), webhooks_to)
    app.state.guard = Guard(app.state.services.people.session, app.state.services.tokens.find)
    app.state.door = pages.Door()
    app.state.address = address
    for router in (
        pages.router,
        api.router,
        constitutions.router,
        constitutions.api,
        steps.router,
        steps.api,
        manage.router,
        exports.router,
        models.router,
        standings.router,
        training.router,
        programs.router,
        v1.router,
        v1.described,
    ):
        app.include_router(router)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    found = app.state.services
    app.add_middleware(Shield, look_up=found.people.session, look_up_token=found.tokens.find)
    app.add_middleware(Forwarded, proxies=networks(proxies))
    _errors(app)
    return app


def _errors(app: FastAPI) -> None:
    @app.exception_handler(NotSignedIn)
    async def not_signed_in(request: Request, error: Exception) -> Response:
        if _is_api(request) or request.method != "GET":
            return _problem(request, 401, "you are signed out; sign in again")
        return RedirectResponse("/sign-in", status_code=303)

    @app.exception_handler(NoToken)
    async def no_token(request: Request, error: Exception) -> Response:
        said = "no token that holds came with this; send Authorization: Bearer TOKEN (an admin makes one: Manage, API)"
        response = _problem(request, 401, said)
        response.headers["WWW-Authenticate"] = "Bearer"
        return response

    @app.exception_handler(NotAllowed)
    async def not_allowed(request: Request, error: Exception) -> Response:
        return _problem(request, 403, "your account may not do this; ask an admin for another role")

    @app.exception_handler(Forged)
    async def forged(request: Request, error: Exception) -> Response:
        return _problem(request, 403, "this page is out of date; load it again and repeat what you did")

    @app.exception_handler(TooMany)
    async def too_many(request: Request, error: TooMany) -> Response:
        seconds = max(1, round(error.seconds + 0.5))
        response = _problem(request, 429, f"too many tries; wait {_duration(seconds)}")
        response.headers["Retry-After"] = str(seconds)
        return response

    @app.exception_handler(TooLarge)
    async def too_large(request: Request, error: Exception) -> Response:
        return _problem(request, 413, "this is too large")

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: Exception) -> Response:
        status, said = next(((code, words) for kind, code, words in REFUSALS if isinstance(error, kind)), (400, ""))
        response = _problem(request, status, said or services(request).store.unnamed(str(error)))
        if status == 503:
            response.headers["Retry-After"] = str(RETRY_SECONDS)
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return _problem(request, 422, f"{place}: {first['msg']}" if place else str(first["msg"]))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        said = HTTPStatus(error.status_code).phrase.lower()
        response = _problem(request, error.status_code, "there is no such page" if error.status_code == 404 else said)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        # the path may hold a link's secret: the route's own pattern is logged instead
        route = getattr(request.scope.get("route"), "path", "?")
        log.error("%s %s failed", request.method, route, exc_info=error)
        return _problem(request, 500, "something went wrong on the server; what you did may not have been kept")


def _problem(request: Request, status: int, message: str) -> Response:
    if _is_api(request):
        return JSONResponse({"error": message}, status)
    # a form of a page at /manage/prompts goes to /manage/prompts/import, say
    parts = request.url.path.split("/")
    back = "/".join(parts[:3]) if parts[1] == "manage" and request.method != "GET" else ""
    response: Response = page(request, "problem.html", status=status, message=message, back=back)
    return response


def _is_api(request: Request) -> bool:
    return request.url.path.startswith("/api/")


def _duration(seconds: int) -> str:
    return f"{seconds} s" if seconds < 90 else f"{round(seconds / 60)} minutes"
