"""The pages for reviewers and admins. Each change is a form that is answered with a redirect to its page."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote

from fastapi import APIRouter, Depends, Form, Query, Request, UploadFile
from starlette.responses import HTMLResponse, RedirectResponse, Response

from keel.store import Unavailable
from keel.store.paging import Wanted
from keel.store.people import AccountRole, Session
from keel.store.records import WorkKind
from keel.store.removals import What
from keel.store.sides import InStore
from keel.types import UserError
from keel.web.app.charts import agreement_chart, pace_chart
from keel.web.app.fields import Find, FormCount, FormId, FormLine, FormText, Id, Line, Number, PathId
from keel.web.app.render import SAID, page
from keel.web.app.security import may
from keel.web.app.services import address_of, services
from keel.web.service.kept_quality import WHOSE, Whose
from keel.web.service.log_words import ACTIONS, ENTITIES, Entries
from keel.web.service.manage import FIRST

router = APIRouter(prefix="/manage", default_response_class=HTMLResponse)
Reviewer = Annotated[Session, Depends(may("reviewer"))]
Admin = Annotated[Session, Depends(may("admin"))]
T = TypeVar("T")
GoldKind = Literal["compare", "thumb", "step"]


def done(path: str, said: str = "") -> RedirectResponse:
    """Back to the page, which says once what was done. A cookie carries it: an address that did could be handed to an
    admin by anybody."""
    response = RedirectResponse(f"/manage{path}", status_code=303)
    response.set_cookie(SAID, quote(said), max_age=30, path="/manage", httponly=True, samesite="strict")
    return response


# -------------------------------------------------------------------------------------------------------- reviewers


@router.get("")
def overview(request: Request, session: Reviewer) -> Response:
    found = services(request).manage.overview()
    return page(request, "manage/overview.html", session, found=found, pace=pace_chart(found.days))


@router.get("/quality")
def quality(request: Request, session: Reviewer, who: Whose = "people") -> Response:
    kept = services(request).manage.quality_kept(who)
    found = kept.quality if kept else None
    context: dict[str, Any] = {"kept": kept, "found": found, "who": who}
    context |= {"chart": agreement_chart(found.days if found else [])}
    context |= {"thumbs": services(request).manage.thumbs(who), "steps": services(request).steps.quality(WHOSE[who])}
    return page(request, "manage/quality.html", session, **context)


@router.get("/disagreements")
def disagreements(request: Request, session: Reviewer, find: Find = "", number: Number = 0) -> Response:
    manage = services(request).manage
    found, total = manage.disagreements_counted(Wanted(find.strip(), number))
    context: dict[str, Any] = {"items": found, "total": total, "settled": manage.settled()}
    return page(request, "manage/disagreements.html", session, **context)


@router.post("/disagreements/{item}")
def adjudicate(
    request: Request,
    session: Reviewer,
    item: PathId,
    choice: Annotated[Literal[InStore, "none"], Form()],
    reason: FormLine = "",
) -> Response:
    services(request).manage.adjudicate(item, None if choice == "none" else choice, reason, session.account)
    return done(
        "/disagreements", "Taken back: the votes stand for themselves again." if choice == "none" else "Settled."
    )


@router.get("/flags")
def flags(request: Request, session: Reviewer, find: Find = "", number: Number = 0, removed: Number = 0) -> Response:
    manage, find = services(request).manage, find.strip()
    context: dict[str, Any] = {
        "flags": manage.flags(Wanted(find, number)),
        "removed": manage.out(Wanted(find, removed)),
    }
    return page(request, "manage/flags.html", session, **context)


@router.post("/flags/out")
def take_out(
    request: Request,
    session: Reviewer,
    what: Annotated[What, Form()],
    id: FormLine,
    reason: FormLine = "",
    flag: Annotated[Id | None, Form()] = None,
) -> Response:
    services(request).manage.take_out(what, id, reason, flag, session.account)
    return done("/flags", "Taken out: nobody gets it any more, and votes on it train nothing. It can be put back.")


@router.post("/flags/back")
def put_back(request: Request, session: Reviewer, removal: FormId) -> Response:
    services(request).manage.put_back(removal, session.account)
    return done("/flags", "Put back.")


@router.post("/flags/erase")
def erase(
    request: Request, session: Admin, what: Annotated[Literal["response", "prompt"], Form()], id: FormLine
) -> Response:
    services(request).manage.erase(what, id, session.account)
    return done("/flags", "Erased.")


@router.post("/flags/{id}")
def resolve_flag(request: Request, session: Reviewer, id: PathId) -> Response:
    services(request).manage.resolve_flag(id, session.account.name)
    return done("/flags", "Resolved.")


# ------------------------------------------------------------------------------------------------- admins: the work


@router.get("/prompts")
def prompts(request: Request, session: Admin, find: Find = "", number: Number = 0) -> Response:
    called = services(request)
    context: dict[str, Any] = {
        "prompts": called.manage.newest_prompts(Wanted(find.strip(), number, 50)),
        "models": called.sampling.models,
        "requests": called.sampling.requests(),
        "steps": called.steps.settings(),
        "can_read": called.sources.read_prompts is not None,
        "can_read_responses": called.sources.read_unjudged is not None,
    }
    return page(request, "manage/prompts.html", session, **context)


@router.post("/prompts/import")
def import_prompts(request: Request, session: Admin, file: UploadFile) -> Response:
    read = services(request).sources.read_prompts
    if read is None:
        raise UserError("this server can't read files of prompts")
    added = services(request).imports.prompts(lambda: _uploaded(file, read), session.account.name)
    return done("/prompts", f"{added} {'prompt' if added == 1 else 'prompts'} read.")


@router.post("/prompts/responses")
def import_responses(
    request: Request,
    session: Admin,
    file: UploadFile,
    overlap: FormCount = 1,
    pairs: FormCount = 0,
    unlabelled: Annotated[bool, Form()] = False,
) -> Response:
    read = services(request).sources.read_unjudged
    if read is None:
        raise UserError("this server can't read files of responses")
    added = services(request).imports.responses(
        lambda: _uploaded(file, lambda path: read(path, unlabelled)), pairs or None, overlap, session.account.name
    )
    return done("/prompts", f"{added}.")


def _uploaded(file: UploadFile, read: Callable[[Path], T]) -> T:
    name = Path(file.filename or "upload.jsonl").name
    with tempfile.TemporaryDirectory() as folder:
        # the reader names the file in its messages; its ending says what it is
        ending = "".join(Path(name).suffixes[-2:] if name.endswith(".gz") else Path(name).suffixes[-1:])
        path = Path(folder) / f"upload{ending[-20:] or '.jsonl'}"
        with path.open("wb") as copy:
            shutil.copyfileobj(file.file, copy)
        try:
            return read(path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), name)) from None


@router.post("/prompts/sample")
def sample(
    request: Request,
    session: Admin,
    model: FormLine,
    prompts: FormCount,
    per_prompt: FormCount,
    overlap: FormCount,
    kind: Annotated[Literal["compare", "rank", "thumb", "edit"], Form()],
) -> Response:
    services(request).sampling.request(model, prompts, per_prompt, overlap, kind, session.account.name)
    return done("/prompts", "Asked for.")


@router.post("/prompts/ask")
def ask(
    request: Request,
    session: Admin,
    kind: Annotated[Literal["compare", "rank", "thumb", "write", "edit"], Form()],
    prompts: FormCount,
    overlap: FormCount,
) -> Response:
    manage, actor = services(request).manage, session.account.name
    if kind == "write":
        made = manage.ask_for_writing(prompts, overlap, actor)
    else:
        made = manage.ask_for(kind, prompts, overlap, actor)
    said = f"{made} {'item' if made == 1 else 'items'} queued."
    return done("/prompts", said if made else "Nothing is left to queue for this: have responses sampled first.")


@router.get("/queue")
def queue(request: Request, session: Admin, find: Find = "", number: Number = 0) -> Response:
    ordering = services(request).ordering
    queues = services(request).manage.queues(Wanted(find.strip(), number, 50))
    context: dict[str, Any] = {"models": ordering.models, "order": ordering.state()}
    return page(request, "manage/queue.html", session, queues=queues, **context)


@router.post("/queue/order")
def order(request: Request, session: Admin, by: Annotated[Literal["uncertain", "added"], Form()]) -> Response:
    ordering, actor = services(request).ordering, session.account.name
    if by == "added":
        ordering.as_added(actor)
        return done("/queue", "In the order they were added.")
    ordering.uncertain_first(actor)
    return done("/queue", "The pairs are being scored; they are given out in the new order when that is done.")


@router.post("/queue/overlap")
def overlap(
    request: Request, session: Admin, batch: FormLine, kind: Annotated[WorkKind, Form()], overlap: FormCount
) -> Response:
    changed = services(request).manage.set_overlap(batch, kind, overlap, session.account.name)
    services(request).labelling.forget()
    return done("/queue", f"{changed} items changed.")


@router.post("/queue/first")
def first(request: Request, session: Admin, batch: FormLine, kind: Annotated[WorkKind, Form()]) -> Response:
    services(request).manage.put_first(batch, kind, session.account.name)
    return done("/queue", "Put first.")


@router.get("/gold")
def gold(
    request: Request,
    session: Admin,
    kind: GoldKind = "compare",
    batch: Line | None = None,
    find: Find = "",
    number: Number = 0,
) -> Response:
    manage = services(request).manage
    context: dict[str, Any] = {
        "chosen": manage.browse(kind, None, True, 0, 100),
        "items": manage.browse(kind, batch, False, number, find=find.strip()),
        "batches": [queue.batch for queue in manage.queues() if queue.kind == kind],
        "kind": kind,
        "batch": batch,
        "every": manage.gold_every(),
    }
    return page(request, "manage/gold.html", session, **context)


@router.post("/gold/every")
def gold_every(request: Request, session: Admin, every: FormCount) -> Response:
    services(request).manage.set_gold_every(every, session.account.name)
    services(request).labelling.forget()
    return done("/gold", "Saved.")


@router.post("/gold/{item}")
def set_gold(
    request: Request,
    session: Admin,
    item: PathId,
    answer: FormLine,
    kind: Annotated[GoldKind, Form()] = "compare",
) -> Response:
    services(request).manage.set_gold(item, None if answer == "none" else answer, session.account.name)
    return done("/gold" if kind == "compare" else f"/gold?kind={kind}", "Saved.")


# ----------------------------------------------------------------------------------------------- admins: the people


@router.get("/people")
def people(request: Request, session: Admin, find: Find = "", number: Number = 0) -> Response:
    return _people_page(request, session, Wanted(find.strip(), number, 50))


def _people_page(request: Request, session: Session, wanted: Wanted = FIRST, **context: Any) -> Response:
    found = services(request).people
    accounts = wanted.within(one for one in found.accounts() if wanted.find.lower() in one.name.lower())
    shown: dict[str, Any] = {"accounts": accounts, "invitations": found.invitations()}
    return page(request, "manage/people.html", session, **shown | {"link": "", "link_for": ""} | context)


@router.post("/people/invite")
def invite(request: Request, session: Admin, role: Annotated[AccountRole, Form()]) -> Response:
    """The link is shown once, in this response: the store keeps its hash alone."""
    secret = services(request).people.invite(role, session.account.name)
    link = f"{address_of(request)}/join/{secret}"
    return _people_page(request, session, link=link, link_for=f"an invitation for one {role}")


@router.post("/people/link")
def way_in(request: Request, session: Admin, name: FormLine) -> Response:
    secret = services(request).people.way_in(name, session.account.name)
    link = f"{address_of(request)}/enter/{secret}"
    return _people_page(request, session, link=link, link_for=f"a way in for {name}")


@router.post("/people/withdraw")
def withdraw(request: Request, session: Admin, id: FormId) -> Response:
    services(request).people.withdraw(id, session.account.name)
    return done("/people", "Withdrawn.")


@router.post("/people/change")
def change(
    request: Request,
    session: Admin,
    name: FormLine,
    role: Annotated[AccountRole | None, Form()] = None,
    active: Annotated[bool | None, Form()] = None,
) -> Response:
    services(request).people.change(name, session.account.name, role, active)
    return done("/people", "Saved.")


@router.post("/people/erase")
def erase_person(request: Request, session: Admin, name: FormLine, texts: Annotated[bool, Form()] = False) -> Response:
    new = services(request).people.erase(name, texts, session.account.name)
    return done("/people", f"Erased. What they judged is kept as {new}’s.")


# --------------------------------------------------------------------------------------------- admins: guideline, log


@router.get("/guideline")
def guideline(request: Request, session: Admin) -> Response:
    return _guideline_page(request, session)


def _guideline_page(request: Request, session: Session, status: int = 200, **typed: str) -> Response:
    """``typed``: what was typed and could not be taken; by default the version in force, to go on from."""
    versions = services(request).manage.guidelines()
    current = next((one for one in versions if one.text), None)
    shown = {"text": current.text if current else "", "aspects": "", "problem": ""}
    if current is not None:
        shown["aspects"] = "\n".join(f"{name}: {question}" for name, question in current.aspects)
    context: dict[str, Any] = {"versions": versions, "current": current, **shown, **typed}
    response: Response = page(request, "manage/guideline.html", session, status=status, **context)
    return response


@router.post("/guideline")
def add_guideline(request: Request, session: Admin, text: FormText, aspects: FormText = "") -> Response:
    try:
        version = services(request).manage.add_guideline(text, aspects, session.account.name)
    except Unavailable:
        raise
    except UserError as error:
        return _guideline_page(request, session, 400, text=text, aspects=aspects, problem=str(error))
    services(request).labelling.forget()
    return done("/guideline", f"Version {version} is in force.")


@router.get("/events")
def events(
    request: Request,
    session: Admin,
    who: Line = "",
    what: Line = "",
    about: Line = "",
    day: Annotated[str, Query(pattern=r"^(\d{4}-\d{2}-\d{2})?$")] = "",
    before: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
) -> Response:
    wanted = Entries(who.strip(), what, about, day, before)
    found = services(request).manage.events(wanted)
    context: dict[str, Any] = {"events": found, "wanted": wanted, "actions": ACTIONS, "entities": ENTITIES}
    return page(request, "manage/events.html", session, **context, more=len(found) == wanted.limit)
