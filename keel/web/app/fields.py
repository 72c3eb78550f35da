"""The types of what comes in from outside, with their bounds: what passes here fits into either database."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Form, Path, Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StringConstraints

from keel.store.records import NewRanking, NewThumb, NewVote, NewWriting, WorkKind
from keel.store.rows import storable
from keel.store.sides import Choice, Side
from keel.store.step_records import MOST_STEPS, REASONS, Mark, NewSteps, Outcome, Reason

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
    """What is said of an assignment, by a page or by a program."""

    seconds: Seconds | None = None
    guideline: Line | None = Field(
        None, description="the version that it was judged under; by default the one in force"
    )


class Comparison(Work):
    choice: Choice
    strength: Literal[1, 2, 3] | None = None
    reason: Text = ""
    ratings: dict[Side, dict[Line, Rating]] = Field(default_factory=dict)

    def vote(self, token: str) -> NewVote:
        return NewVote(
            self.choice,
            self.strength,
            self.reason.strip() or None,
            self.ratings,
            token=token,
            seconds=self.seconds,
            guideline=self.guideline,
        )


class Ranking(Work):
    tiers: list[list[Annotated[int, Field(ge=0, le=8)]]] = Field(
        max_length=9, description="places in shown, best first"
    )
    reason: Text = ""

    def ranking(self, token: str) -> NewRanking:
        return NewRanking(
            self.tiers, self.reason.strip() or None, token=token, seconds=self.seconds, guideline=self.guideline
        )


class Thumb(Work):
    up: StrictBool
    reason: Text = ""

    def thumb(self, token: str) -> NewThumb:
        return NewThumb(
            self.up, self.reason.strip() or None, token=token, seconds=self.seconds, guideline=self.guideline
        )


class StepLabels(Work):
    labels: list[Mark | None] = Field(max_length=MOST_STEPS)
    outcome: Outcome
    reasons: list[Reason] = Field(default_factory=list, max_length=len(REASONS))
    correction: Text = ""
    note: Text = ""
    reference_shown: bool = False
    step_seconds: list[Seconds | None] = Field(default_factory=list, max_length=MOST_STEPS)

    def steps(self, token: str) -> NewSteps:
        correction, note = self.correction.strip() or None, self.note.strip() or None
        return NewSteps(
            self.labels, self.outcome, self.reasons, correction, note, self.reference_shown, self.step_seconds,
            token=token, seconds=self.seconds, guideline=self.guideline,
        )  # fmt: skip


class Writing(Work):
    kind: Literal["write", "edit"]
    text: Text

    def writing(self, token: str) -> NewWriting:
        return NewWriting(self.text, token=token, seconds=self.seconds, guideline=self.guideline)


class FromPage(Strict):
    """What a page sends with everything that was done on it. A program's is in its address and its key."""

    assignment: Handle
    token: Token


class Judged(FromPage, Comparison):
    pass


class Ranked(FromPage, Ranking):
    pass


class Thumbed(FromPage, Thumb):
    pass


class Labelled(FromPage, StepLabels):
    pass


class Wrote(FromPage, Writing):
    pass


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
