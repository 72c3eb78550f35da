"""The page on which replies are labelled step by step, what its script calls, and what admins ask for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Form, Request
from pydantic import ValidationError
from starlette.responses import HTMLResponse, Response

from keel.recipe.steps import Steps
from keel.store.people import Session
from keel.store.step_records import REASONS
from keel.types import UserError
from keel.web.app.fields import FormCount, FormLine, Labelled
from keel.web.app.manage import done
from keel.web.app.pages import work_page
from keel.web.app.security import may
from keel.web.app.services import services

router = APIRouter(default_response_class=HTMLResponse)
api = APIRouter(prefix="/api")
Annotator = Annotated[Session, Depends(may("annotator"))]
Admin = Annotated[Session, Depends(may("admin"))]


@router.get("/steps")
def steps(request: Request, session: Annotator) -> Response:
    return work_page(request, session, "steps.html", reasons=REASONS)


@api.post("/steps")
def label(request: Request, session: Annotator, given: Labelled) -> dict[str, Any]:
    labelling = services(request).labelling
    labelling.label_steps(session.account, given.assignment, given.steps(given.token))
    progress = labelling.progress(session.account, "step")
    return {"progress": {"today": progress.today, "done": progress.done, "wanted": progress.wanted}}


@router.post("/manage/steps/queue")
def queue(
    request: Request,
    session: Admin,
    by: Annotated[Literal["line", "blank_line", "marker"], Form()],
    replies: FormCount,
    overlap: FormCount,
    marker: FormLine = "",
) -> Response:
    try:
        split = Steps(by=by, marker=marker or None)
    except ValidationError:
        raise UserError("a marker goes with steps that end with one; give both, or neither") from None
    made = services(request).steps.queue(split, replies, overlap, session.account.name)
    said = f"{made} {'reply' if made == 1 else 'replies'} queued to be labelled in steps."
    return done("/prompts", said if made else "Nothing is left to queue for this: have responses sampled first.")


@router.post("/manage/steps/reference")
def reference(request: Request, session: Admin, allowed: Annotated[bool, Form()] = False) -> Response:
    services(request).steps.allow_reference(allowed, session.account.name)
    return done("/prompts", "Saved.")
