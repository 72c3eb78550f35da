"""What the pages' scripts call. Everything is JSON; the arena's replies come as one JSON object a line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from keel.store.people import Session
from keel.store.records import WorkKind
from keel.web.app.fields import (
    Flagged,
    Held,
    Judged,
    Next,
    PathHandle,
    Ranked,
    Said,
    Skipped,
    Thumbed,
    Undone,
    Voted,
    Wrote,
)
from keel.web.app.latex import plain
from keel.web.app.markdown import conversation, render, visible
from keel.web.app.render import person
from keel.web.app.security import may
from keel.web.app.services import services
from keel.web.service.labelling import Screen
from keel.web.service.streams import Stream

router = APIRouter(prefix="/api")
Annotator = Annotated[Session, Depends(may("annotator"))]


def item_json(screen: Screen | None) -> dict[str, Any] | None:
    """All that a browser is told of an item."""
    if screen is None:
        return None
    found: dict[str, Any] = {
        "id": screen.id,
        "kind": screen.kind,
        "messages": conversation([(m.role, m.content) for m in screen.messages]),
    }
    if screen.sheet is not None:
        more = {"said": screen.said} if screen.said else {}
        steps = {"steps": list(screen.sheet.steps), "html": [plain(step.rstrip()) for step in screen.sheet.steps]}
        return found | steps | {"reference": screen.sheet.reference} | more
    return found | {"shown": [{"html": render(text), "text": text if visible(text) else ""} for text in screen.shown]}


def _progress(request: Request, session: Session, kind: WorkKind) -> dict[str, Any]:
    done = services(request).labelling.progress(session.account, kind)
    return {"today": done.today, "done": done.done, "wanted": done.wanted}


@router.get("/me")
def me(request: Request, session: Annotator) -> dict[str, Any]:
    """Who is signed in on this browser, and the token that their calls carry: it changes with each sign-in."""
    return {"person": person(request, session.account), "name": session.account.name, "csrf": session.csrf}


@router.post("/next")
def next_item(request: Request, session: Annotator, asked: Next) -> dict[str, Any]:
    labelling = services(request).labelling
    found, guideline = labelling.next(session.account, asked.kind, asked.holding), labelling.guideline()
    progress = _progress(request, session, asked.kind)
    return {"item": item_json(found), "progress": progress, "guideline": guideline.version if guideline else None}


@router.post("/judge")
def judge(request: Request, session: Annotator, given: Judged) -> dict[str, Any]:
    services(request).labelling.judge(session.account, given.assignment, given.vote(given.token))
    return {"progress": _progress(request, session, "compare")}


@router.post("/rank")
def rank(request: Request, session: Annotator, given: Ranked) -> dict[str, Any]:
    services(request).labelling.rank(session.account, given.assignment, given.ranking(given.token))
    return {"progress": _progress(request, session, "rank")}


@router.post("/thumb")
def thumb(request: Request, session: Annotator, given: Thumbed) -> dict[str, Any]:
    services(request).labelling.thumb(session.account, given.assignment, given.thumb(given.token))
    return {"progress": _progress(request, session, "thumb")}


@router.post("/write")
def write(request: Request, session: Annotator, given: Wrote) -> dict[str, Any]:
    services(request).labelling.write(session.account, given.assignment, given.writing(given.token))
    return {"progress": _progress(request, session, given.kind)}


@router.post("/hold")
def hold(request: Request, session: Annotator, asked: Held) -> dict[str, Any]:
    """The page with these assignments is still open. Which are gone, and which are done."""
    found = services(request).labelling.hold(session.account, asked.assignments)
    gone = [id for id in asked.assignments if id not in (*found.held, *found.done)]
    return {"gone": gone, "done": list(found.done)}


@router.post("/skip")
def skip(request: Request, session: Annotator, given: Skipped) -> dict[str, Any]:
    services(request).labelling.skip(session.account, given.assignment, given.reason, given.token)
    return {"progress": _progress(request, session, given.kind)}


@router.post("/flag")
def flag(request: Request, session: Annotator, given: Flagged) -> dict[str, Any]:
    services(request).labelling.flag(session.account, given.assignment, given.text.strip(), given.token)
    return {}


@router.post("/undo")
def undo(request: Request, session: Annotator, asked: Undone) -> dict[str, Any]:
    back = services(request).labelling.undo(session.account, asked.kind, asked.assignment)
    return {"item": item_json(back), "progress": _progress(request, session, asked.kind)}


# ------------------------------------------------------------------------------------------------------------ arena


@router.post("/arena")
def start(request: Request, session: Annotator) -> dict[str, Any]:
    arena = services(request).arena
    return {"id": arena.handle(arena.start(session.account))}


@router.post("/arena/{handle}/say", response_class=StreamingResponse)
def say(request: Request, session: Annotator, handle: PathHandle, said: Said) -> StreamingResponse:
    arena = services(request).arena
    id = arena.find(session.account, handle)
    stream = arena.say(session.account, id, said.message, said.token, said.turn)

    def lines() -> Iterator[str]:
        whole = {"left": "", "right": ""}
        for side, piece in stream:
            whole[side] += piece
            line = {"side": side, "text": piece} if piece else {"side": side, "html": render(whole[side])}
            yield json.dumps(line, ensure_ascii=False) + "\n"
        if stream.why:
            yield json.dumps({"error": stream.why}) + "\n"

    return Streamed(stream, lines())


class Streamed(StreamingResponse):
    """Lines that end when the browser goes: a model that says nothing would hold its place for minutes."""

    def __init__(self, stream: Stream, lines: Iterator[str]) -> None:
        super().__init__(lines, media_type="application/x-ndjson", headers={"x-accel-buffering": "no"})
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def until_gone() -> None:
            await self.listen_for_disconnect(receive)
            self._stream.close()

        watching = asyncio.create_task(until_gone())
        try:
            with suppress(OSError):  # the browser went while something was sent
                await self.stream_response(send)
        finally:
            watching.cancel()
            self._stream.close()


@router.post("/arena/{handle}/vote")
def vote(request: Request, session: Annotator, handle: PathHandle, given: Voted) -> dict[str, Any]:
    arena = services(request).arena
    id = arena.find(session.account, handle)
    shown = arena.vote(session.account, id, given.choice, given.token, given.reason.strip(), given.turn)
    assert shown.names is not None, "a vote shows the names"
    return {"left": shown.names[0], "right": shown.names[1]}
