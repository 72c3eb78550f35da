"""The pages of constitutions: read by all, drafted and published by admins; questions about one principle; why a model
said what it said."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Query, Request, UploadFile
from pydantic import Field
from starlette.responses import HTMLResponse, Response

from keel.recipe.constitution import read_constitution
from keel.store.people import Session
from keel.store.principles import Answer, Question
from keel.types import UserError
from keel.web.app.fields import FormLine, FormText, Handle, Strict, Token
from keel.web.app.manage import done
from keel.web.app.markdown import conversation, render
from keel.web.app.render import page
from keel.web.app.security import may
from keel.web.app.services import services

router = APIRouter(default_response_class=HTMLResponse)
api = APIRouter(prefix="/api/principles")
Annotator = Annotated[Session, Depends(may("annotator"))]
Reviewer = Annotated[Session, Depends(may("reviewer"))]
Admin = Annotated[Session, Depends(may("admin"))]


class Asked(Strict):
    holding: list[Handle] = Field(default_factory=list, max_length=64)


class Answered(Strict):
    question: Handle
    token: Token
    answer: Answer


class Skipped(Strict):
    question: Handle
    token: Token


class TakenBack(Strict):
    question: Handle | None = None


def question_json(question: Question | None) -> dict[str, Any] | None:
    """All that a browser is told of a question."""
    if question is None:
        return None
    messages = conversation([(m.role, m.content) for m in question.messages])
    reply, principle = render(question.reply), question.principle
    return {"id": question.handle, "messages": messages, "reply": reply, "principle": principle}


@router.get("/constitution")
def constitution(request: Request, session: Annotator) -> Response:
    return page(request, "constitution.html", session, found=services(request).constitutions.all())


@router.get("/principles")
def principles(request: Request, session: Annotator) -> Response:
    return page(request, "principles.html", session)


@api.post("/next")
def next_question(request: Request, session: Annotator, asked: Asked) -> dict[str, Any]:
    question, answered = services(request).constitutions.next(session.account, asked.holding)
    return {"question": question_json(question), "answered": answered}


@api.post("/answer")
def answer(request: Request, session: Annotator, given: Answered) -> dict[str, Any]:
    services(request).constitutions.answer(session.account, given.question, given.answer, given.token)
    return {}


@api.post("/skip")
def skip(request: Request, session: Annotator, skipped: Skipped) -> dict[str, Any]:
    services(request).constitutions.skip(session.account, skipped.question, skipped.token)
    return {}


@api.post("/undo")
def undo(request: Request, session: Annotator, asked: TakenBack) -> dict[str, Any]:
    question, answered = services(request).constitutions.undo(session.account, asked.question)
    return {"question": question_json(question), "answered": answered}


# ---------------------------------------------------------------------------------------------- reviewers and admins


@router.get("/manage/constitution")
def managed(request: Request, session: Reviewer) -> Response:
    called = services(request).constitutions
    context: dict[str, Any] = {"found": called.all(), "figures": called.figures(), "used": called.used()}
    return page(request, "manage/constitution.html", session, **context)


@router.get("/manage/constitution/{name}/{number}", response_class=Response)
def download(request: Request, session: Reviewer, name: str, number: Annotated[int, Field(ge=1, le=10**6)]) -> Response:
    content = services(request).constitutions.file(name, number)
    head = {"Content-Disposition": f'attachment; filename="{name}-{number}.yaml"'}
    return Response(content, media_type="application/yaml", headers=head)


@router.post("/manage/constitution/import")
def import_file(request: Request, session: Admin, file: UploadFile) -> Response:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "constitution.yaml"
        path.write_bytes(file.file.read())
        try:
            read = read_constitution(str(path))
        except UserError as error:
            raise UserError(str(error).replace(str(path), Path(file.filename or "the file").name)) from None
    number = services(request).constitutions.publish_file(read, session.account)
    return done("/constitution", f"{read.name}: version {number} is published.")


@router.post("/manage/constitution/draft")
def draft(request: Request, session: Admin, name: FormLine) -> Response:
    services(request).constitutions.make_draft(name, session.account)
    return done("/constitution", "The draft is there; nobody is asked by it until it is published.")


@router.post("/manage/constitution/drop")
def drop(request: Request, session: Admin, name: FormLine) -> Response:
    services(request).constitutions.drop_draft(name, session.account)
    return done("/constitution", "The draft is thrown away.")


@router.post("/manage/constitution/principle")
def principle(
    request: Request,
    session: Admin,
    name: FormLine,
    seen: FormLine,
    id: FormLine,
    text: FormText = "",
    critique: FormText = "",
    revision: FormText = "",
    choose: FormText = "",
    weight: Annotated[float, Form()] = 1.0,
    tags: FormLine = "",
    out: Annotated[bool, Form()] = False,
    added: Annotated[bool, Form()] = False,
) -> Response:
    words = {"text": text, "critique": critique, "revision": revision, "choose": choose}
    plain = {key: said.replace("\r\n", "\n") for key, said in words.items()}
    values = plain | {"weight": weight, "tags": [tag.strip() for tag in tags.split(",") if tag.strip()]}
    services(request).constitutions.change(name, id, None if out else values, seen, session.account, added)
    return done("/constitution", f"{id} is out of the draft." if out else f"{id} is kept in the draft.")


@router.post("/manage/constitution/publish")
def publish(request: Request, session: Admin, name: FormLine, seen: FormLine) -> Response:
    number = services(request).constitutions.publish(name, seen, session.account)
    return done("/constitution", f"{name}: version {number} is published.")


@router.get("/manage/why")
def why(request: Request, session: Reviewer, vote: Annotated[str, Query(max_length=200)]) -> Response:
    return page(request, "manage/why.html", session, why=services(request).constitutions.why(vote, session.account))
