"""The types of what comes in from outside, with their bounds: what passes here fits into either database."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Form, Path, Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StringConstraints

from keel.store.records import NewRanking, NewThumb, NewVote, NewWriting, WorkKind
from keel.store.rows import storable
from keel.store.sides import Choice, Side

Id = Annotated[int, Field(ge=1, le=2**31 - 1)]
PathId = Annotated[int, Path(ge=1, le=2**31 - 1)]
Handle = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{22}$")]
PathHandle = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{22}$")]
Token = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{8,64}$")]
Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Line = Annotated[str, AfterValidator(storable), StringConstraints(max_length=500)]
Text = Annotated[str, AfterValidator(storable), StringConstraints(max_length=100_000)]
Secret = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{20,64}$")]

Find = Annotated[Line, Query()]  # what is looked for in a list
Number = Annotated[int, Query(ge=0, le=100_000)]  # of a list's page, from 0

FormLine = Annotated[Line, Form()]
FormText = Annotated[Text, Form()]
FormId = Annotated[Id, Form()]
FormCount = Annotated[int, Form(ge=0, le=100_000)]

TurnNumber = Annotated[int, Field(ge=1, le=1000)]
Rating = Annotated[int, Field(ge=1, le=5)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Next(Strict):
    kind: WorkKind
    holding: list[Handle] = Field(default_factory=list, max_length=16)


class Work(Strict):
    """What a page sends with everything that was done on it."""

    assignment: Handle
    token: Token
    seconds: Seconds | None = None
    guideline: Line | None = None  # the version that the page was made with; by default the one in force


class Judged(Work):
    choice: Choice
    strength: Literal[1, 2, 3] | None = None
    reason: Text = ""
    ratings: dict[Side, dict[Line, Rating]] = Field(default_factory=dict)

    def vote(self) -> NewVote:
        return NewVote(
            self.choice,
            self.strength,
            self.reason.strip() or None,
            self.ratings,
            token=self.token,
            seconds=self.seconds,
            guideline=self.guideline,
        )


class Ranked(Work):
    tiers: list[list[Annotated[int, Field(ge=0, le=8)]]] = Field(max_length=9)
    reason: Text = ""

    def ranking(self) -> NewRanking:
        reason = self.reason.strip() or None
        return NewRanking(self.tiers, reason, token=self.token, seconds=self.seconds, guideline=self.guideline)


class Thumbed(Work):
    up: StrictBool
    reason: Text = ""

    def thumb(self) -> NewThumb:
        reason = self.reason.strip() or None
        return NewThumb(self.up, reason, token=self.token, seconds=self.seconds, guideline=self.guideline)


class Wrote(Work):
    kind: Literal["write", "edit"]
    text: Text

    def writing(self) -> NewWriting:
        return NewWriting(self.text, token=self.token, seconds=self.seconds, guideline=self.guideline)


class Held(Strict):
    assignments: list[Handle] = Field(max_length=16)


class Skipped(Strict):
    assignment: Handle
    kind: WorkKind
    token: Token | None = None
    reason: Line = ""


class Flagged(Strict):
    assignment: Handle
    token: Token
    text: Annotated[str, AfterValidator(storable), StringConstraints(max_length=2_000)] = ""


class Undone(Strict):
    kind: WorkKind
    assignment: Handle | None = None  # the one that the page did last; by default what its person did last anywhere


class Said(Strict):
    token: Token | None = None  # the browser's name for the message: sent again, it is the same turn
    turn: TurnNumber | None = None  # which one the page takes it for
    message: Annotated[str, AfterValidator(storable), StringConstraints(min_length=1, max_length=8_000)]


class Voted(Strict):
    token: Token
    turn: TurnNumber | None = None  # the last one that the page shows
    choice: Choice
    reason: Text = ""
