"""What the judgements say about each annotator: how reliable, how fast, and which habits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from keel.feedback.agreement import Agreement, named_votes
from keel.feedback.dawid_skene import NOTABLE, reliabilities, unreliable
from keel.stats import Proportion, proportion
from keel.store import Judgement


@dataclass(frozen=True, slots=True)
class AnnotatorFigures:
    """``votes``: judgements that stand; ``ties``: share of them that prefer neither. ``reliability``: P(a decided vote
    is for the better response), by Dawid & Skene; None while no item was judged twice by anybody.

    ``left`` (share of decided votes for the left side; sides are drawn at random, so 1/2 without a side bias) and
    ``longer`` (share for the longer response where lengths differ; compare it with the others', since longer may well
    be better) with Wilson's interval. ``seconds``: median, first and third quartile of the time taken. ``failed``:
    share of gold items judged wrongly. Each is None where there is nothing to tell it from.
    """

    name: str
    kind: str
    votes: int
    ties: float
    reliability: Agreement | None
    left: Proportion | None
    longer: Proportion | None
    seconds: tuple[float, float, float] | None
    failed: Proportion | None


def annotator_figures(
    judgements: Sequence[Judgement], known: Mapping[int, str] | None = None, bootstrap: int = 200, seed: int = 0
) -> list[AnnotatorFigures]:
    """Figures of everybody who judged, by name. ``known``: the right answer of each gold item (FIRST, SECOND or TIE, as
    in ``agreement.named_votes``); both bad is right where a tie is."""
    known = known or {}
    votes = named_votes(judgements)
    reliable = reliabilities(votes, known, bootstrap=bootstrap, seed=seed)
    said = {id(judgement): vote.label for judgement, vote in zip(judgements, votes, strict=True)}
    own: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        own.setdefault(judgement.annotator, []).append(judgement)
    return [
        AnnotatorFigures(
            name=name,
            kind=mine[0].annotator_kind,
            votes=len(mine),
            ties=sum(j.preferred is None for j in mine) / len(mine),
            reliability=reliable.get(name),
            left=_share([j.choice == "left" for j in mine if j.preferred is not None]),
            longer=_share([chose for j in mine if (chose := _chose_longer(j)) is not None]),
            seconds=_quartiles([j.seconds for j in mine if j.seconds is not None]),
            failed=_share([said[id(j)] != known[j.item_id] for j in mine if j.item_id in known]),
        )
        for name, mine in sorted(own.items())
    ]


def doubtful(figures: Sequence[AnnotatorFigures], notable: float = NOTABLE) -> list[str]:
    """Who is clearly less reliable than most: the whole interval lies ``notable`` or more below the median reliability
    of all, or the same is true of gold items (failures more than ``notable`` above the median share)."""
    below = unreliable({f.name: f.reliability for f in figures if f.reliability is not None}, notable)
    failed = [f.failed.point for f in figures if f.failed is not None]
    names = []
    for f in figures:
        inattentive = f.failed is not None and f.failed.low > float(np.median(failed)) + notable
        if f.name in below or inattentive:
            names.append(f.name)
    return names


def _chose_longer(judgement: Judgement) -> bool | None:
    """Whether the response with more characters was preferred; None in a tie and for equal lengths."""
    preferred = judgement.preferred
    left, right = len(judgement.left.text), len(judgement.right.text)
    return None if preferred is None or left == right else len(preferred.text) == max(left, right)


def _share(hits: Sequence[bool]) -> Proportion | None:
    return proportion(hits) if hits else None


def _quartiles(values: Sequence[float]) -> tuple[float, float, float] | None:
    if not values:
        return None
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(middle), float(low), float(high)
