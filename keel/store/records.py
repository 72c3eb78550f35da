"""What the store hands out: frozen records, no database rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import combinations
from typing import Any, Literal

from keel.recipe.declared import Voter
from keel.store.sides import CHOICES, SIDES, Choice, OnScreen, Side, chosen_side, in_record, preferred, turned
from keel.types import Completion, LabelledCompletion, Preference, Prompt, UserError

AnnotatorKind = Literal["person", "simulated", "model", "unknown"]
# Whose votes an annotator's are. Where an import says nothing of its annotators, they are taken for people.
VOTER_KINDS: Mapping[Voter, tuple[AnnotatorKind, ...]] = {
    "people": ("person", "unknown"),
    "models": ("model",),
    "simulated": ("simulated",),
}
WorkKind = Literal["compare", "rank", "thumb", "step", "write", "edit"]
# How the queues begin in which a stage of a recipe had a model judge: those votes are that stage's, as those of its
# simulated annotators are, and no model's votes "in the store".
OWN_QUEUE = "annotate/"


class LeaseLost(UserError):
    """A judgement came after its lease had run out and somebody else had been given the slot."""


class Unavailable(UserError):
    """The database did not answer, was locked for too long, or has no room left. Nothing of the step was kept, and the
    same step may do later."""


@dataclass(frozen=True, slots=True)
class Response:
    """A reply with what made it: the checkpoint (path and fingerprint) and the sampling settings, None when unknown."""

    id: int
    prompt_id: str
    text: str
    finished: bool
    model: str
    fingerprint: str
    sampling: Mapping[str, Any] | None
    created: datetime

    def completion(self) -> Completion:
        return Completion(self.text, finished=self.finished)


@dataclass(frozen=True, slots=True)
class Assignment:
    """One item in one annotator's hands until ``expires_at``. It names no model: judging is blind. ``shown`` are the
    responses' texts in the order of the screen, left first: two to compare, four to nine to rank, one to edit, to
    give a thumb or to label in steps, none where a reply is to be written. ``handle`` is what a browser calls it by;
    ``id`` tells how many came before, and ``prompt.meta`` holds the graders' notes: a page for people must not send
    these."""

    id: int
    item_id: int
    prompt: Prompt
    shown: tuple[str, ...]
    expires_at: datetime
    handle: str
    kind: WorkKind = "compare"

    @property
    def left(self) -> str:
        return self.shown[0]

    @property
    def right(self) -> str:
        return self.shown[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWork:
    """What everything has that somebody hands in for an assignment.

    ``token``: the client's own unique name for it; sent again, it is counted once. ``seconds``: the time taken;
    ``guideline``: the version by which it was done; None where not known. UserError for what can't be.
    """

    token: str
    seconds: float | None = None
    guideline: str | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None and not 0 <= self.seconds < float("inf"):
            raise UserError(f"seconds is {self.seconds}; give the time taken, 0 or more, or None")
        check_token(self.token)


def check_token(token: str) -> None:
    if not token:
        raise UserError("the client token is empty; make a unique one for each judgement")


@dataclass(frozen=True, slots=True)
class NewVote(NewWork):
    """A vote as it comes in. ``strength``: 1 slightly, 2 better, 3 much better, for ``left`` and ``right``;
    ``ratings``: of each side on the guideline's aspects, 1 to 5, as ``{"left": {"helpful": 4}, ...}``;
    ``probability`` that the preferred one (of a tie, the left one) is the better one, where the annotator gives it."""

    choice: Choice
    strength: int | None = None
    reason: str | None = None
    ratings: Mapping[Side, Mapping[str, int]] = field(default_factory=dict)
    probability: float | None = None

    def __post_init__(self) -> None:
        NewWork.__post_init__(self)  # super() does not know a class with slots
        if self.choice not in CHOICES:
            raise UserError(f"choice {self.choice!r} is unknown; choose one of {', '.join(CHOICES)}")
        if self.strength is not None and (self.choice not in SIDES or self.strength not in (1, 2, 3)):
            raise UserError(
                f"strength {self.strength} does not go with {self.choice!r}; give 1, 2 or 3 for a side, none for a tie"
            )
        for side, values in self.ratings.items():
            if side not in SIDES or any(value not in (1, 2, 3, 4, 5) for value in values.values()):
                raise UserError("ratings are 1 to 5 for each aspect of left and right")
        if self.probability is not None and not 0 <= self.probability <= 1:
            raise UserError(f"probability is {self.probability}; give one from 0 to 1, or None")


@dataclass(frozen=True, slots=True)
class NewRanking(NewWork):
    """A ranking as it comes in. ``tiers``: places on the screen (0, 1, ...), best first, equals together."""

    tiers: Sequence[Sequence[int]]
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class NewThumb(NewWork):
    """Thumbs up or down as it comes in."""

    up: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class NewWriting(NewWork):
    """A reply to a prompt, or an edit of a response, as it comes in."""

    text: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """One raw vote with all that is known of it.

    ``token`` names it across databases. ``strength``: 1 slightly, 2 better, 3 much better, None for a tie or when it
    was not asked. ``seconds``, ``guideline``, ``reason``: None when not known. ``settled``: what a reviewer said of the
    item in the end, in terms of the sides of this vote; None while nobody did. ``gold``: the known answer of a gold
    item, in the same terms: such a vote is never trained on. ``ratings``: of each side on the guideline's aspects.
    ``out``: the item was taken out of use, so the vote is not trained on either. ``probability``: that the preferred
    response (of a tie, the left one) is the better one, as the annotator said; None where not given.
    """

    token: str
    batch: str
    item_id: int
    annotator: str
    annotator_kind: AnnotatorKind
    prompt: Prompt
    left: Response
    right: Response
    choice: Choice
    strength: float | None
    seconds: float | None
    guideline: str | None
    reason: str | None
    created: datetime
    settled: OnScreen | None = None
    settled_by: str | None = None
    gold: OnScreen | None = None
    ratings: Mapping[Side, Mapping[str, int]] = field(default_factory=dict)
    out: bool = False
    probability: float | None = None
    settled_reason: str | None = None
    settled_at: datetime | None = None

    @property
    def replies(self) -> tuple[Response, ...]:
        return self.left, self.right

    @property
    def preferred(self) -> Response | None:
        """The response that was preferred; None for a tie and for both bad."""
        return preferred(self.choice, (self.left, self.right))

    @property
    def as_recorded(self) -> tuple[Response, Response]:
        """The training record's chosen and rejected response."""
        return turned((self.left, self.right), chosen_side(self.choice))

    def preferences(self) -> list[Preference]:
        """The vote as training records: none on a gold item, whose answer was known, nor on one that is out."""
        return [] if self.gold or self.out else [self.preference()]

    def preference(self) -> Preference:
        """The vote as a training record. In a tie (both bad is one) the left response stands as ``chosen``."""
        chosen, rejected = self.as_recorded
        return Preference(
            id=self.token,
            prompt=self.prompt,
            chosen=chosen.text,
            rejected=rejected.text,
            chosen_finished=chosen.finished,
            rejected_finished=rejected.finished,
            tie=self.preferred is None,
            margin=self.strength or 0.0,
            annotator=self.annotator,
            settled=in_record(self.settled, chosen_side(self.choice)) if self.settled else "",
            probability=self.probability,
        )


@dataclass(frozen=True, slots=True)
class Ranking:
    """One ranking. ``shown``: the responses in the order of the screen; ``tiers``: places in it, best tier first;
    ``out``: its item was taken out of use."""

    token: str
    batch: str
    annotator: str
    annotator_kind: AnnotatorKind
    prompt: Prompt
    shown: tuple[Response, ...]
    tiers: tuple[tuple[int, ...], ...]
    seconds: float | None
    guideline: str | None
    reason: str | None
    created: datetime
    out: bool = False

    @property
    def replies(self) -> tuple[Response, ...]:
        return self.shown

    @property
    def pairs(self) -> list[tuple[int, int, int, int]]:
        """Each pair once, the better one first: both places on the screen, both tiers."""
        tier = {place: number for number, places in enumerate(self.tiers, 1) for place in places}
        return [(a, b, tier[a], tier[b]) for a, b in combinations(tier, 2)]

    def preferences(self) -> list[Preference]:
        """What of it is trained on."""
        return [] if self.out else self.said()

    def said(self) -> list[Preference]:
        """Each pair as a record, two of one tier a tie. Ids are TOKEN/BETTER-WORSE."""
        return [
            Preference(
                id=f"{self.token}/{self.shown[a].id}-{self.shown[b].id}",
                prompt=self.prompt,
                chosen=self.shown[a].text,
                rejected=self.shown[b].text,
                tie=first == second,
                annotator=self.annotator,
                chosen_finished=self.shown[a].finished,
                rejected_finished=self.shown[b].finished,
            )
            for a, b, first, second in self.pairs
        ]


@dataclass(frozen=True, slots=True)
class Edit:
    """A response as somebody improved it. ``out``: its item was taken out of use."""

    token: str
    batch: str
    annotator: str
    annotator_kind: AnnotatorKind
    prompt: Prompt
    original: Response
    text: str
    seconds: float | None
    guideline: str | None
    created: datetime
    out: bool = False

    def preferences(self) -> list[Preference]:
        """What of it is trained on."""
        return [] if self.out else self.said()

    def said(self) -> list[Preference]:
        """The edit over what was edited, as a record."""
        return [
            Preference(
                id=self.token,
                prompt=self.prompt,
                chosen=self.text,
                rejected=self.original.text,
                annotator=self.annotator,
                rejected_finished=self.original.finished,
            )
        ]


@dataclass(frozen=True, slots=True)
class Thumb:
    """One response judged by itself. ``gold``: what a gold item's thumb should be, so that this one is never trained
    on; ``out``: its item was taken out of use."""

    token: str
    batch: str
    annotator: str
    annotator_kind: AnnotatorKind
    prompt: Prompt
    response: Response
    up: bool
    seconds: float | None
    guideline: str | None
    reason: str | None
    created: datetime
    gold: bool | None = None
    out: bool = False

    def examples(self) -> list[LabelledCompletion]:
        """What of it is trained on."""
        return [] if self.out or self.gold is not None else [self.said()]

    def said(self) -> LabelledCompletion:
        """The thumb as a record."""
        reply = self.response
        return LabelledCompletion(self.token, self.prompt, reply.text, self.up, self.annotator, reply.finished)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a queue is: judgements ``wanted`` (the items' overlaps), those that stand, those that were taken back."""

    wanted: int
    judged: int
    undone: int

    @property
    def open(self) -> int:
        return self.wanted - self.judged


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the append-only log: who did what to which entity, its old and new value, and when, and which version
    of the guideline was in force (None for what Keel did by itself)."""

    id: int
    at: datetime
    actor: str
    action: str
    entity: str
    entity_id: str
    old: Any
    new: Any
    guideline: str | None = None
