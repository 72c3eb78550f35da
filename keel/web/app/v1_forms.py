"""What programs send and are sent under /api/v1, with its bounds."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Header
from pydantic import BaseModel, ConfigDict, Field

from keel.store.people import AccountRole
from keel.store.records import WorkKind
from keel.web.app import fields
from keel.web.app.fields import Handle, Line, Strict, Text

Key = Annotated[
    str,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[\x21-\x7e]{8,200}$",
        description="made by the caller for this one write, at random; the same write sent again counts once",
    ),
]
MOST_ROWS = 10_000


class Rows(Strict):
    rows: list[dict[str, Any]] = Field(min_length=1, max_length=MOST_ROWS, description="as in a file: docs/data.md")


class ResponseRows(Rows):
    pairs: int | None = Field(None, ge=1, le=1000, description="pairs to queue for each prompt; all by default")
    overlap: int = Field(1, ge=1, le=1000, description="people to judge each pair")
    unlabelled: bool = Field(False, description="take the responses of rows with an answer, without it")


class AddedPrompts(BaseModel):
    prompts: int


class AddedResponses(BaseModel):
    """How many were new; 0 of what was there already."""

    groups: int
    prompts: int
    responses: int
    items: int


class PromptOut(BaseModel):
    id: str
    messages: list[dict[str, str]]
    kind: str
    meta: dict[str, Any]
    created: datetime
    in_use: bool


class ResponseOut(BaseModel):
    id: int
    prompt_id: str
    text: str
    finished: bool
    model: str
    created: datetime
    in_use: bool


class Take(Strict):
    kind: WorkKind = "compare"
    holding: list[Handle] = Field(default_factory=list, max_length=16, description="what the caller has already")


class MessageOut(BaseModel):
    role: str
    content: str


class Assignment(BaseModel):
    """``shown``: the responses, left first. Of a reply that is labelled in steps ``steps`` are its parts."""

    id: str
    kind: WorkKind
    messages: list[MessageOut]
    shown: list[str]
    steps: list[str] | None = None
    reference: str | None = None


class Progress(BaseModel):
    """``today``: what this account did since midnight UTC; ``done`` of ``wanted``: everybody's."""

    today: int
    done: int
    wanted: int


class Taken(BaseModel):
    """``assignment`` is null when nothing is left. ``guideline``: the version in force."""

    assignment: Assignment | None
    guideline: str | None
    progress: Progress


class Comparison(fields.Comparison):
    kind: Literal["compare"]


class Ranking(fields.Ranking):
    kind: Literal["rank"]


class Thumb(fields.Thumb):
    kind: Literal["thumb"]


class StepLabels(fields.StepLabels):
    kind: Literal["step"]


Writing = fields.Writing
Work = Annotated[Comparison | Ranking | Thumb | StepLabels | Writing, Field(discriminator="kind")]


class Skip(Strict):
    reason: Line = ""


class Flag(Strict):
    text: Annotated[Text, Field(max_length=2000)] = ""


class Undo(Strict):
    kind: WorkKind


class Hold(Strict):
    assignments: list[Handle] = Field(max_length=16)


class Held(BaseModel):
    gone: list[str]
    done: list[str]


class Counted(BaseModel):
    """It is on the disk."""

    assignment: str


class Votes(BaseModel):
    """``cursor``: where to go on from. An entry's fields: docs/api.md."""

    votes: list[dict[str, Any]]
    cursor: int
    more: bool


class Me(BaseModel):
    name: str
    role: AccountRole
    token: str
    per_minute: int


class _Read(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class QueueOut(_Read):
    batch: str
    kind: str
    items: int
    wanted: int
    done: int
    held: int
    open: int
    gold: int


class GuidelineOut(_Read):
    version: str
    text: str
    aspects: list[tuple[str, str]]
    created: datetime


class Interval(_Read):
    """``interval``: 95%; ``items``: how many it rests on."""

    point: float
    interval: tuple[float, float] | None
    items: int


class AnnotatorOut(_Read):
    """Shares in [0, 1]; null where one is not defined. ``reasons``: why the votes are bad; none for most."""

    annotator: str
    kind: str
    votes: int
    with_others: float | None
    gold: float | None
    gold_votes: int
    left: float | None
    longer: float | None
    ties: float | None
    seconds: float | None
    skips: int
    warnings: list[str]
    reliability: Interval | None
    crowd_bt: Interval | None
    reasons: list[str]


class QualityOut(_Read):
    agreement: Interval | None
    agreement_with_ties: Interval | None
    kappa: float | None
    alpha: Interval | None
    graded_alpha: Interval | None
    annotators: list[AnnotatorOut]
