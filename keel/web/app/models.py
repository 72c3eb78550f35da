"""The pages about trained models, for reviewers and admins: they name annotators."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from pydantic import AfterValidator, StringConstraints
from starlette.responses import HTMLResponse, Response

from keel.store.rows import storable
from keel.web.app.fields import Line, Number
from keel.web.app.manage import Reviewer
from keel.web.app.render import page
from keel.web.app.services import services
from keel.web.service.models import PAGE, Part

router = APIRouter(prefix="/manage/models", default_response_class=HTMLResponse)
Key = Annotated[str, AfterValidator(storable), StringConstraints(max_length=300), Path()]


@router.get("")
def models(request: Request, session: Reviewer) -> Response:
    return page(request, "manage/models.html", session, models=services(request).models.all())


@router.get("/{model}")
def model(request: Request, session: Reviewer, model: Key) -> Response:
    return page(request, "manage/model.html", session, one=services(request).models.one(model))


@router.get("/{model}/judgements")
def judgements(
    request: Request,
    session: Reviewer,
    model: Key,
    part: Part = "trained",
    annotator: Line | None = None,
    guideline: Line | None = None,
    number: Number = 0,
) -> Response:
    count, works = services(request).models.work(model, part, annotator, guideline, number)
    context: dict[str, Any] = {"model": model, "count": count, "works": works, "number": number, "size": PAGE}
    context |= {"part": part, "annotator": annotator, "guideline": guideline}
    return page(request, "manage/judgements.html", session, **context)
