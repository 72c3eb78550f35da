"""What programs call, with a token (docs/api.md). The rules are the pages': the same services, the same roles, blind
before the vote."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query, Request, Security
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPBearer
from pydantic import AwareDatetime, BaseModel
from starlette.responses import JSONResponse, StreamingResponse

from keel import __version__
from keel.store.records import WorkKind
from keel.store.tokens import Token
from keel.types import UserError
from keel.web.app import v1_forms as forms
from keel.web.app.fields import Line, PathHandle
from keel.web.app.security import Guard, bearer, program
from keel.web.app.services import services
from keel.web.app.v1_forms import Key
from keel.web.service.labelling import Screen
from keel.web.service.manage import Whose

router = APIRouter(prefix="/api/v1", dependencies=[Security(HTTPBearer(auto_error=False))])
described = APIRouter(prefix="/api/v1")
Annotator = Annotated[Token, Depends(program("annotator"))]
Reviewer = Annotated[Token, Depends(program("reviewer"))]
Admin = Annotated[Token, Depends(program("admin"))]
Cursor = Annotated[int, Query(ge=0, le=2**31 - 1)]
Limit = Annotated[int, Query(ge=1, le=1000)]
Since = Annotated[AwareDatetime | None, Query(description="with its zone: 2026-11-28T12:00:00Z")]
T = TypeVar("T")


def _once(
    request: Request, token: Token, key: str, sent: BaseModel, call: Callable[[str], dict[str, Any]]
) -> JSONResponse:
    """The write's answer; that of the first time where it is sent again."""
    asked = f"{request.method} {request.url.path}\n{sent.model_dump_json()}"
    said, again = services(request).tokens.once(token, key, asked, call)
    return JSONResponse(said, headers={"Idempotency-Replayed": "true"} if again else None)


# --------------------------------------------------------------------------------------------------------------- who


@router.get("/me")
def me(token: Annotator) -> forms.Me:
    return forms.Me(name=token.account.name, role=token.account.role, token=token.name, per_minute=token.per_minute)


async def _anybody(request: Request) -> None:
    """Somebody who is signed in, or a program with a token."""
    guard: Guard = request.app.state.guard
    if bearer(request):
        await guard.token(request, "annotator")
    else:
        await guard.require(request, "annotator")


_anybody.least = "annotator"  # type: ignore[attr-defined]


@described.get("/openapi.json", include_in_schema=False, dependencies=[Depends(_anybody)])
def openapi() -> JSONResponse:
    """The routes, their parameters and answers, as OpenAPI 3.1."""
    told = "What programs may do in Keel's labelling app. Tokens are made under Manage, API."
    found = get_openapi(title="Keel", version=__version__, description=told, routes=router.routes)
    return JSONResponse(found)


# ----------------------------------------------------------------------------------------------- prompts, responses


@router.get("/prompts")
def prompts(request: Request, token: Admin, after: Line = "", limit: Limit = 100) -> list[forms.PromptOut]:
    return [forms.PromptOut(**row) for row in services(request).reading.prompts(after, limit)]


@router.post("/prompts", response_model=forms.AddedPrompts)
def add_prompts(request: Request, token: Admin, key: Key, sent: forms.Rows) -> JSONResponse:
    """Rows as in a file of prompts. Those that are there already stay as they are. All are kept, or none."""
    read, imports = services(request).sources.read_prompts, services(request).imports
    if read is None:
        raise UserError("this server can't read prompts")

    def add(_: str) -> dict[str, Any]:
        return {"prompts": imports.prompts(lambda: _read(sent.rows, read), token.account.name)}

    return _once(request, token, key, sent, add)


@router.get("/responses")
def responses(
    request: Request, token: Admin, prompt: Line | None = None, after: Cursor = 0, limit: Limit = 100
) -> list[forms.ResponseOut]:
    return [forms.ResponseOut(**row) for row in services(request).reading.responses(prompt, after, limit)]


@router.post("/responses", response_model=forms.AddedResponses)
def add_responses(request: Request, token: Admin, key: Key, sent: forms.ResponseRows) -> JSONResponse:
    """Rows as in a file of responses to judge: pairs, lists, or one response a row; pairs of them are queued."""
    read, imports = services(request).sources.read_unjudged, services(request).imports
    if read is None:
        raise UserError("this server can't read responses")

    def add(_: str) -> dict[str, Any]:
        by = token.account.name
        rows = sent.rows
        added = imports.responses(
            lambda: _read(rows, lambda path: read(path, sent.unlabelled)), sent.pairs, sent.overlap, by
        )
        return asdict(added)

    return _once(request, token, key, sent, add)


def _read(rows: Sequence[dict[str, Any]], read: Callable[[Path], T]) -> T:
    """The rows, read as a file's are. UserError names the row: the first is line 1."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
        try:
            return read(path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), "rows")) from None


# -------------------------------------------------------------------------------------------------------- labelling


@router.post("/assignments")
def take(request: Request, token: Annotator, asked: forms.Take) -> forms.Taken:
    """What this account does next: what it was given already and the caller does not hold, else something new."""
    labelling = services(request).labelling
    found, guideline = labelling.next(token.account, asked.kind, asked.holding), labelling.guideline()
    return forms.Taken(
        assignment=None if found is None else _assignment(found),
        guideline=guideline.version if guideline else None,
        progress=forms.Progress(**asdict(labelling.progress(token.account, asked.kind))),
    )


def _assignment(screen: Screen) -> forms.Assignment:
    found = forms.Assignment(
        id=screen.id,
        kind=screen.kind,
        messages=[forms.MessageOut(role=m.role, content=m.content) for m in screen.messages],
        shown=list(screen.shown),
    )
    if screen.sheet is not None:
        found.steps, found.reference = list(screen.sheet.steps), screen.sheet.reference
    return found


@router.post("/assignments/hold")
def hold(request: Request, token: Annotator, asked: forms.Hold) -> forms.Held:
    """These are still being worked on: they stay the account's for longer. Which are gone, and which are done."""
    found = services(request).labelling.hold(token.account, asked.assignments)
    gone = [id for id in asked.assignments if id not in (*found.held, *found.done)]
    return forms.Held(gone=gone, done=list(found.done))


@router.post("/assignments/{handle}", response_model=forms.Counted)
def hand_in(request: Request, token: Annotator, handle: PathHandle, key: Key, work: forms.Work) -> JSONResponse:
    labelling, person = services(request).labelling, token.account

    def add(work_token: str) -> dict[str, Any]:
        if work.kind == "compare":
            labelling.judge(person, handle, work.vote(work_token))
        elif work.kind == "rank":
            labelling.rank(person, handle, work.ranking(work_token))
        elif work.kind == "thumb":
            labelling.thumb(person, handle, work.thumb(work_token))
        elif work.kind == "step":
            labelling.label_steps(person, handle, work.steps(work_token))
        else:
            labelling.write(person, handle, work.writing(work_token))
        return {"assignment": handle}

    return _once(request, token, key, work, add)


@router.post("/assignments/{handle}/skip", response_model=forms.Counted)
def skip(request: Request, token: Annotator, handle: PathHandle, key: Key, given: forms.Skip) -> JSONResponse:
    def call(work_token: str) -> dict[str, Any]:
        services(request).labelling.skip(token.account, handle, given.reason, work_token)
        return {"assignment": handle}

    return _once(request, token, key, given, call)


@router.post("/assignments/{handle}/flag", response_model=forms.Counted)
def flag(request: Request, token: Annotator, handle: PathHandle, key: Key, given: forms.Flag) -> JSONResponse:
    def call(work_token: str) -> dict[str, Any]:
        services(request).labelling.flag(token.account, handle, given.text.strip(), work_token)
        return {"assignment": handle}

    return _once(request, token, key, given, call)


@router.post("/assignments/{handle}/undo", response_model=forms.Counted)
def undo(request: Request, token: Annotator, handle: PathHandle, key: Key, given: forms.Undo) -> JSONResponse:
    """What was done with this assignment is taken back; it is the account's again and comes as the next one."""

    def call(_: str) -> dict[str, Any]:
        if services(request).labelling.undo(token.account, given.kind, handle) is None:
            raise UserError("nothing was done with this assignment that could be taken back")
        return {"assignment": handle}

    return _once(request, token, key, given, call)


# ---------------------------------------------------------------------------------------------------------- reading


@router.get("/votes")
def votes(request: Request, token: Admin, cursor: Cursor = 0, since: Since = None, limit: Limit = 100) -> forms.Votes:
    """Work as it comes, what is taken back too, behind ``cursor``: go on from the answer's."""
    found, cursor, more = services(request).reading.votes(cursor, since, limit)
    return forms.Votes(votes=found, cursor=cursor, more=more)


@router.get("/votes.jsonl", response_class=StreamingResponse)
def all_votes(request: Request, token: Admin, cursor: Cursor = 0, since: Since = None) -> StreamingResponse:
    """The same to the end of what is there, a JSON object a line."""
    return _lines(services(request).reading.all_votes(cursor, since))


@router.get("/preferences.jsonl", response_class=StreamingResponse)
def preferences(request: Request, token: Admin, since: Since = None) -> StreamingResponse:
    """What training takes, as pairs.jsonl under Export: of all, or of what was given since then."""
    return _lines(services(request).reading.preferences(since))


def _lines(rows: Iterator[dict[str, Any]]) -> StreamingResponse:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return StreamingResponse(lines, media_type="application/x-ndjson", headers={"x-accel-buffering": "no"})


# ------------------------------------------------------------------------------------------------------ how it stands


@router.get("/progress")
def progress(request: Request, token: Annotator, kind: WorkKind = "compare") -> forms.Progress:
    return forms.Progress(**asdict(services(request).labelling.progress(token.account, kind)))


@router.get("/quality")
def quality(request: Request, token: Reviewer, who: Whose = "people") -> forms.QualityOut:
    return forms.QualityOut.model_validate(services(request).manage.quality(who))


@router.get("/queues")
def queues(request: Request, token: Reviewer) -> list[forms.QueueOut]:
    return [forms.QueueOut.model_validate(one) for one in services(request).manage.queues()]


@router.get("/guideline")
def guideline(request: Request, token: Annotator) -> forms.GuidelineOut | None:
    """The version in force."""
    found = services(request).labelling.guideline()
    return None if found is None else forms.GuidelineOut.model_validate(found)


@router.get("/guidelines")
def guidelines(request: Request, token: Admin) -> list[forms.GuidelineOut]:
    """All versions, the newest first."""
    return [forms.GuidelineOut.model_validate(one) for one in services(request).manage.guidelines()]
