"""The admins' page of exports, and the exports."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.background import BackgroundTask
from starlette.responses import HTMLResponse, Response, StreamingResponse

from keel.web.app.manage import Admin
from keel.web.app.render import page
from keel.web.app.services import services
from keel.web.app.spool import Spool
from keel.web.service.exports import Export

router = APIRouter(prefix="/manage/export", default_response_class=HTMLResponse)


@router.get("")
def export_page(request: Request, session: Admin) -> Response:
    return page(request, "manage/export.html", session)


@router.get("/{what}", response_class=StreamingResponse)
def export(request: Request, session: Admin, what: Export) -> Response:
    manage = services(request).manage
    parts = Spool(lambda folder, wanted: manage.export(what, folder, wanted))
    headers = {"Content-Disposition": f'attachment; filename="{what}"'}
    kind = "application/vnd.apache.parquet" if what.endswith(".parquet") else "application/jsonl"
    return StreamingResponse(parts, headers=headers, media_type=kind, background=BackgroundTask(parts.close))
