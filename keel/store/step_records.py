"""Labels on the steps of a reply: as they come in, and as the store hands them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, get_args

from keel.recipe.steps import Steps
from keel.store.records import AnnotatorKind, NewWork, Response
from keel.store.rows import MARK
from keel.types import Prompt, StepLabels, UserError

Mark = Literal["good", "neutral", "bad", "unsure"]
Outcome = Literal["solution", "found_error", "give_up", "bad_problem"]
Reason = Literal["sum", "number", "follow", "check"]
Drawn = Literal["random", "ranked"]
Neutral = Literal["good", "bad", "out"]

MARKS: tuple[Mark, ...] = get_args(Mark)
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
REASONS: Mapping[Reason, str] = {
    "sum": "the sum is wrong",
    "number": "a wrong number is used",
    "follow": "it does not follow",
    "check": "it can't be checked",
}
_NEUTRAL: Mapping[Neutral, float | None] = {"good": 1.0, "bad": 0.0, "out": None}
MOST_STEPS = 10_000  # of a reply that people are asked about
CORRECTED = "/corrected"  # behind the id of a judgement: the record of the line that was written in a step's place


def first_bad(marks: Sequence[Mark | None]) -> int | None:
    """The place of the first bad step."""
    return marks.index("bad") if "bad" in marks else None


@dataclass(frozen=True, slots=True)
class NewSteps(NewWork):
    """Labels on steps as they come in. ``labels``: one a step, None where it was not judged; ``outcome``: no step is
    bad, one is (what follows it is not judged), it was given up, or the problem is bad. ``reasons``: why the bad step
    is; ``correction``: what should stand in its place; ``note``: why it was given up, or what is wrong with the
    problem; ``step_seconds``: the time taken for each step, None where not known."""

    labels: Sequence[Mark | None]
    outcome: Outcome
    reasons: Sequence[Reason] = ()
    correction: str | None = None
    note: str | None = None
    reference_shown: bool = False
    step_seconds: Sequence[float | None] = ()

    def __post_init__(self) -> None:
        NewWork.__post_init__(self)  # super() does not know a class with slots
        check_said(self.labels, self.outcome, self.reasons, self.correction, self.note)
        if self.step_seconds and len(self.step_seconds) != len(self.labels):
            raise UserError(f"step_seconds has {len(self.step_seconds)} times for {len(self.labels)} steps; give each")
        if any(seconds is not None and not 0 <= seconds < float("inf") for seconds in self.step_seconds):
            raise UserError("step_seconds holds a time that is none; give 0 or more, or None")


def check_said(
    labels: Sequence[Mark | None],
    outcome: Outcome,
    reasons: Sequence[Reason],
    correction: str | None,
    note: str | None,
) -> None:
    """UserError for what does not go together."""
    if wrong := [one for one in labels if one is not None and one not in MARKS]:
        raise UserError(f"the label {wrong[0]!r} is unknown; give {', '.join(MARKS)}, or None")
    if outcome not in OUTCOMES:
        raise UserError(f"the outcome {outcome!r} is unknown; give one of {', '.join(OUTCOMES)}")
    bad = first_bad(labels)
    judged = labels if bad is None else labels[: bad + 1]
    if bad is not None and any(label is not None for label in labels[bad + 1 :]):
        raise UserError(f"a step after step {bad + 1} has a label, and what follows the first bad step has none")
    if outcome in ("solution", "found_error") and None in judged:
        raise UserError(f"step {list(judged).index(None) + 1} has no label; give it one, or give up")
    if outcome == "solution" and (bad is not None or not labels):
        raise UserError("a solution has no bad step; hand in found_error, or take the label back")
    if outcome == "found_error" and bad is None:
        raise UserError("no step is bad; hand in solution, or label the bad one")
    if outcome == "give_up" and bad is not None:
        raise UserError(f"step {bad + 1} is bad, so the error is found; hand in found_error, or take the label back")
    if outcome == "give_up" and not (note and note.strip()):
        raise UserError("say in note why it is given up")
    if wrong_reasons := [reason for reason in reasons if reason not in REASONS]:
        raise UserError(f"the reason {wrong_reasons[0]!r} is unknown; give some of {', '.join(REASONS)}")
    if len(set(reasons)) < len(reasons):
        raise UserError("a reason comes twice; give each once")
    if bad is None and (reasons or correction):
        raise UserError("reasons and a correction belong to a bad step; label it, or leave them out")


@dataclass(frozen=True, slots=True)
class StepJudgement:
    """One reply judged step by step. ``steps``: as it was cut by ``split``; ``drawn``: how it came into the queue.
    ``gold``: of a gold item, where its first bad step is (``right``: it has none), so that this is never trained on;
    ``out``: its item was taken out of use. The rest is what `NewSteps` has."""

    token: str
    batch: str
    annotator: str
    annotator_kind: AnnotatorKind
    prompt: Prompt
    response: Response
    split: Steps
    labels: tuple[Mark | None, ...]
    outcome: Outcome
    reasons: tuple[Reason, ...]
    correction: str | None
    note: str | None
    reference_shown: bool
    seconds: float | None
    step_seconds: tuple[float | None, ...]
    guideline: str | None
    created: datetime
    drawn: Drawn
    gold: str | None = None
    out: bool = False

    @property
    def steps(self) -> tuple[str, ...]:
        return self.split.split(self.response.text)

    @property
    def learned(self) -> bool:
        """Whether it is trained on: not on gold items, on what is out, and on problems that are bad."""
        return self.gold is None and not self.out and self.outcome != "bad_problem"

    def numbers(self, neutral: Neutral = "good") -> tuple[float | None, ...]:
        """The labels in [0, 1]: good is 1, bad 0; unsure is none."""
        value: Mapping[Mark | None, float | None] = {"good": 1.0, "neutral": _NEUTRAL[neutral], "bad": 0.0}
        return tuple(value.get(label) for label in self.labels)

    def examples(self, neutral: Neutral = "good") -> list[StepLabels]:
        """What of it is trained on: the reply as far as it was judged, and, where somebody wrote what should stand in
        the place of the bad step, the steps before it with that line, which is good. The bad step itself, copied, is no
        such line."""
        if not self.learned:
            return []
        found = []
        numbers, steps, bad = self.numbers(neutral), self.steps, first_bad(self.labels)
        if any(number is not None for number in numbers):
            reply = self.response
            found.append(StepLabels(self.token, self.prompt, steps, numbers, reply.finished, self.annotator))
        if self.correction and self.correction != MARK and bad is not None and self.correction != steps[bad].strip():
            written = self.split.split(self.correction)  # one step, or several lines
            known = (*(None for _ in steps[:bad]), *(1.0 for _ in written))
            id, whole = f"{self.token}{CORRECTED}", (*steps[:bad], *written)
            found.append(StepLabels(id, self.prompt, whole, known, False, self.annotator))
        return found
