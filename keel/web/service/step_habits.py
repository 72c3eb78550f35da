"""How people label steps: what they find, and with whom they agree. A figure that is not defined is None."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from keel.feedback.step_agreement import Judged, StepAgreement, step_agreement
from keel.store.gold import RIGHT
from keel.store.steps import StepVote


@dataclass(frozen=True, slots=True)
class StepHabits:
    """One annotator. ``outcomes``: how often each; ``exact``: the share of the ``compared`` other people on the
    same replies whose first bad step is the same; ``seconds``: a judged step's, the median over replies; ``reference``:
    the share of replies judged with the reference answer on the screen."""

    annotator: str
    kind: str
    given: int
    outcomes: Counter[str]
    exact: float | None
    compared: int
    gold: float | None
    gold_given: int
    seconds: float | None
    reference: float


@dataclass(frozen=True, slots=True)
class StepQuality:
    annotators: list[StepHabits]
    agreement: StepAgreement


def step_quality(found: Sequence[StepVote]) -> StepQuality:
    """Gold items are easy by choice, and are left out of agreement and shares."""
    plain = [vote for vote in found if vote.gold is None]
    mine: dict[str, list[StepVote]] = {}
    for vote in found:
        mine.setdefault(vote.annotator, []).append(vote)
    habits = [_habits(name, given, plain) for name, given in mine.items()]
    return StepQuality(
        annotators=sorted(habits, key=lambda one: (-one.given, one.annotator)),
        agreement=step_agreement([_judged(vote) for vote in plain if vote.outcome != "bad_problem"]),
    )


def _ended(vote: StepVote) -> bool:
    return vote.outcome in ("solution", "found_error")


def _judged(vote: StepVote) -> Judged:
    return Judged(vote.item_id, vote.prompt_id, vote.labels, _ended(vote), vote.drawn == "random")


def _first(vote: StepVote) -> str:
    place = _judged(vote).first_error
    return RIGHT if place is None else str(place + 1)


def _habits(name: str, given: Sequence[StepVote], plain: Sequence[StepVote]) -> StepHabits:
    items = {vote.item_id: vote for vote in given if vote.gold is None and _ended(vote)}
    others = [vote for vote in plain if vote.annotator != name and vote.item_id in items and _ended(vote)]
    same = [_first(vote) == _first(items[vote.item_id]) for vote in others]
    gold = [_ended(vote) and _first(vote) == vote.gold for vote in given if vote.gold is not None]
    steps = [(vote.seconds, sum(label is not None for label in vote.labels)) for vote in given]
    paces = [seconds / count for seconds, count in steps if seconds is not None and count]
    return StepHabits(
        annotator=name,
        kind=given[0].kind,
        given=len(given),
        outcomes=Counter(vote.outcome for vote in given),
        exact=sum(same) / len(same) if same else None,
        compared=len(same),
        gold=sum(gold) / len(gold) if gold else None,
        gold_given=len(gold),
        seconds=median(paces) if paces else None,
        reference=sum(vote.reference_shown for vote in given) / len(given),
    )
