"""Templates -> pages. Everything is escaped unless it was made as Markup; a name that a template misspells fails."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlencode

from fastapi import Request
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from keel.store.people import ROLES, Account, Session
from keel.web.app.latex import plain
from keel.web.app.markdown import conversation, render
from keel.web.app.services import services

SAID = "keel_said"  # the cookie with what the last form did
STATIC = Path(__file__).parent / "static"


def page(request: Request, template: str, session: Session | None = None, status: int = 200, **context: Any) -> Any:
    account = session.account if session else None
    csrf = session.csrf if session else ""
    told = unquote(request.cookies.get(SAID, ""))[:200]
    html = (
        environment()
        .get_template(template)
        .render(
            me=account,
            person=person(request, account) if account else "",
            rank=ROLES.index(account.role) if account else -1,
            csrf=csrf,
            csrf_field=Markup('<input type="hidden" name="csrf" value="{}">').format(csrf),
            path=request.url.path,
            steps_on=account is not None and services(request).steps.on(),
            **{"problem": "", "name": "", "said": told, "guideline_version": None, "lease": None} | context,
        )
    )
    response = HTMLResponse(html, status)
    if told:
        response.delete_cookie(SAID, path="/manage")
    return response


def person(request: Request, account: Account) -> str:
    """Whose a browser's letters are: another store on the same address has a person of the same number."""
    return f"{services(request).store_name}-{account.annotator_id}"


@cache
def environment() -> Environment:
    found = Environment(
        loader=PackageLoader("keel.web.app", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "markdown": render,
        "plain": plain,
        "conversation": _conversation,
        "percent": percent,
        "when": when,
        "count": "{:,.0f}".format,
        "zip": _zip,
        "address": _address,
        "combine": _combine,
    }
    found.globals["static"] = static
    return found


@cache
def static(name: str) -> str:
    """A static file's address, which changes with its content: browsers keep it for good."""
    return f"/static/{name}?v={hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f}%"


def when(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M}"


def _conversation(rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Of messages as the store keeps them."""
    return conversation([(row["role"], row["content"]) for row in rows])


def _zip(first: Sequence[Any], second: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(first, second, strict=True))


def _combine(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    return {**first, **second}


def _address(query: Mapping[str, Any]) -> str:
    """What stands behind an address's question mark; what is empty is left out, but for an empty name of a queue."""
    return urlencode({name: value for name, value in query.items() if value is not None and (value or name == "batch")})
