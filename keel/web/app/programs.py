"""The page for what programs may do, for admins: tokens, and webhooks."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from starlette.responses import HTMLResponse, Response

from keel.store import Unavailable
from keel.store.people import AccountRole
from keel.types import UserError
from keel.web.app.fields import FormId, FormLine, FormText
from keel.web.app.manage import Admin, done
from keel.web.app.render import page
from keel.web.app.services import services
from keel.web.service.tokens import MOST_PER_MINUTE, PER_MINUTE

router = APIRouter(prefix="/manage/api", default_response_class=HTMLResponse)
PerMinute = Annotated[int, Form(ge=1, le=MOST_PER_MINUTE)]


@router.get("")
def programs(request: Request, session: Admin) -> Response:
    return _page(request, session)


def _page(request: Request, session: Admin, status: int = 200, **context: Any) -> Response:
    """``secret``: what was just made, shown this once; ``typed``: what could not be taken."""
    found = services(request)
    shown: dict[str, Any] = {
        "tokens": found.tokens.all(),
        "webhooks": found.webhooks.all(),
        "accounts": [one for one in found.people.accounts() if one.active],
        "typed": {"name": "", "of": session.account.name, "role": "annotator", "per_minute": PER_MINUTE, "url": ""},
    }
    shown["typed"] |= context.pop("typed", {})
    response: Response = page(
        request, "manage/api.html", session, status=status, **shown | {"secret": "", "secret_for": ""} | context
    )
    return response


@router.post("/tokens")
def make_token(
    request: Request,
    session: Admin,
    name: FormLine,
    of: FormLine,
    role: Annotated[AccountRole, Form()],
    per_minute: PerMinute = PER_MINUTE,
) -> Response:
    """The secret is shown once, in this response: the store keeps its hash alone."""
    try:
        secret = services(request).tokens.make(name, of, role, session.account.name, per_minute)
    except Unavailable:
        raise
    except UserError as error:
        typed = {"name": name, "of": of, "role": role, "per_minute": per_minute}
        return _page(request, session, 400, problem=str(error), typed=typed)
    return _page(request, session, secret=secret, secret_for=f"a token for {of}")


@router.post("/tokens/end")
def end_token(request: Request, session: Admin, id: FormId) -> Response:
    services(request).tokens.end(id, session.account.name)
    return done("/api", "Ended.")


@router.post("/webhooks")
def make_webhook(request: Request, session: Admin, url: FormText) -> Response:
    try:
        secret = services(request).webhooks.make(url, session.account.name)
    except Unavailable:
        raise
    except UserError as error:
        return _page(request, session, 400, problem=str(error), typed={"url": url})
    return _page(request, session, secret=secret, secret_for="what its deliveries are signed with")


@router.post("/webhooks/end")
def end_webhook(request: Request, session: Admin, id: FormId) -> Response:
    services(request).webhooks.end(id, session.account.name)
    return done("/api", "Ended.")


@router.post("/webhooks/again")
def send_again(request: Request, session: Admin, id: FormId) -> Response:
    services(request).webhooks.send_again(id, session.account.name)
    return done("/api", "It is sent again within seconds.")
