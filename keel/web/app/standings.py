"""The arena's standings, for reviewers and admins: they name models, and people whose votes weigh much."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, Request
from starlette.responses import HTMLResponse, Response

from keel.web.app.charts import standings_chart
from keel.web.app.fields import FormText, PathId
from keel.web.app.manage import Admin, Reviewer, done
from keel.web.app.render import page
from keel.web.app.services import services
from keel.web.service.standings import PAGE

router = APIRouter(prefix="/manage/arena", default_response_class=HTMLResponse)

DECISIONS = {"count": True, "leave_out": False, "names": None}
SAID = {"count": "Counted.", "leave_out": "Left out.", "names": "Left to the names."}


@router.get("")
def standings(request: Request, session: Reviewer, style: bool = False) -> Response:
    called = services(request).standings
    found = called.found()
    table = found.controlled if style else found.plain
    names, looked_for = called.as_names()
    context: dict[str, Any] = {"found": found, "table": table, "style": style, "names": names, "all_names": looked_for}
    context |= {"chart": standings_chart(table.standings if table else ())}
    return page(request, "manage/arena.html", session, **context)


@router.get("/votes")
def votes(
    request: Request,
    session: Reviewer,
    which: Literal["voided", "all"] = "voided",
    number: Annotated[int, Query(ge=0, le=100_000)] = 0,
) -> Response:
    count, looks = services(request).standings.votes(which == "voided", number)
    context: dict[str, Any] = {"which": which, "count": count, "looks": looks, "number": number, "size": PAGE}
    return page(request, "manage/arena_votes.html", session, **context)


@router.post("/names")
def names(request: Request, session: Admin, names: FormText = "") -> Response:
    services(request).standings.set_names(names, session.account)
    return done("/arena", "Saved: the votes are looked at anew.")


@router.post("/votes/{vote}")
def decide(
    request: Request,
    session: Reviewer,
    vote: PathId,
    decision: Annotated[Literal["count", "leave_out", "names"], Form()],
    which: Annotated[Literal["voided", "all"], Form()] = "voided",
) -> Response:
    services(request).standings.decide(vote, DECISIONS[decision], session.account)
    return done(f"/arena/votes?which={which}", SAID[decision])
