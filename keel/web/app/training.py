"""The admins' page about training again: start it, watch it, stop it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from keel.types import UserError
from keel.web.app.manage import Admin, done
from keel.web.app.render import page
from keel.web.app.services import services
from keel.web.service.sources import Training

router = APIRouter(prefix="/manage/training", default_response_class=HTMLResponse)


def _training(request: Request) -> Training:
    training = services(request).sources.training
    if training is None:
        raise UserError("this server was started without a run; start it with keel label RUN to train from here")
    return training


@router.get("")
def show(request: Request, session: Admin) -> Response:
    training = services(request).sources.training
    status = training.status() if training else None
    votes = services(request).manage.votes(status.trained_at if status else None)
    found: Response = page(request, "manage/training.html", session, training=status, votes=votes)
    return found


@router.post("/start")
def start(request: Request, session: Admin) -> Response:
    _training(request).start(session.account.name)
    services(request).manage.log_training("started", session.account.name)
    return done("/training", "Training has begun. People can go on labelling.")


@router.post("/stop")
def stop(request: Request, session: Admin) -> Response:
    _training(request).stop()
    services(request).manage.log_training("stopped", session.account.name)
    return done("/training", "Asked to stop.")
