"""The pages about trained models, for reviewers and admins: they name annotators."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from pydantic import AfterValidator, StringConstraints
from starlette.responses import HTMLResponse, Response

from keel.store.rows import storable
from keel.web.app.fields import Line
from keel.web.app.manage import Reviewer
from keel.web.app.render import page
from keel.web.service.models import PAGE, Models, Part

router = APIRouter(prefix="/manage/models", default_response_class=HTMLResponse)
Key = Annotated[str, AfterValidator(storable), StringConstraints(max_length=300), Path()]


def _models(request: Request) -> Models:
    models: Models = request.app.state.models
    return models


@router.get("")
def models(request: Request, session: Reviewer) -> Response:
    arena = request.app.state.manage.arena_results()
    return page(request, "manage/models.html", session, models=_models(request).all(), arena=arena)


@router.get("/{model}")
def model(request: Request, session: Reviewer, model: Key) -> Response:
    return page(request, "manage/model.html", session, one=_models(request).one(model))


@router.get("/{model}/judgements")
def judgements(
    request: Request,
    session: Reviewer,
    model: Key,
    part: Part = "trained",
    annotator: Line | None = None,
    guideline: Line | None = None,
    number: Annotated[int, Query(ge=0, le=100_000)] = 0,
) -> Response:
    count, works = _models(request).work(model, part, annotator, guideline, number)
    context: dict[str, Any] = {"model": model, "count": count, "works": works, "number": number, "size": PAGE}
    context |= {"part": part, "annotator": annotator, "guideline": guideline}
    return page(request, "manage/judgements.html", session, **context)
