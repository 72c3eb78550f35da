"""How far people agree who labelled the steps of the same replies: on where the first error is, and step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from keel.feedback.agreement import Agreement
from keel.feedback.krippendorff import krippendorff_alpha
from keel.stats import Proportion, proportion

# As numbers, a better step a greater one. Unsure is no label.
VALUES: Mapping[str | None, float] = {"bad": 0.0, "neutral": 1.0, "good": 2.0}


@dataclass(frozen=True, slots=True)
class Judged:
    """One reply to a ``problem`` judged by one person. ``labels``: one a step, None where the step was not judged;
    ``whole``: they found the first bad step, or that there is none; ``random``: the reply was drawn at random."""

    item: int
    problem: str
    labels: tuple[str | None, ...]
    whole: bool
    random: bool

    @property
    def first_error(self) -> int | None:
        """The place of the first bad step, None where there is none. Of ``whole`` ones."""
        return self.labels.index("bad") if "bad" in self.labels else None


@dataclass(frozen=True, slots=True)
class StepAgreement:
    """Of pairs of people on one reply who both judged it ``whole``: ``exact``, how often their first bad step is the
    same one (none is the same as none); ``near``, how often it is that or the next one to it (none is next to nothing).
    ``alpha``: Krippendorff's on steps, bad below neutral below good. A step that one of them did not judge, since it
    follows their first bad one, is a value that is missing. None where nothing was judged twice.

    ``wrong``: how often a reply that was drawn at random has a bad step: those that were chosen for what they teach are
    wrong more often than others. None where none was judged ``whole``."""

    exact: Proportion | None
    near: Proportion | None
    alpha: Agreement | None
    wrong: Proportion | None


def step_agreement(found: Sequence[Judged], bootstrap: int = 2000) -> StepAgreement:
    """Intervals count the pairs and the steps of one reply together, and replies to one problem."""
    on_item: dict[int, list[Judged]] = {}
    for one in found:
        on_item.setdefault(one.item, []).append(one)
    exact, near, items = [], [], []
    for item, judged in on_item.items():
        for a, b in combinations([one.first_error for one in judged if one.whole], 2):
            exact.append(a == b)
            near.append(a == b or (a is not None and b is not None and abs(a - b) == 1))
            items.append(item)
    units: dict[int, list[float]] = {}
    reply_of: dict[int, int] = {}
    for item, judged in on_item.items():
        for place in range(max(len(one.labels) for one in judged)):
            said = [one.labels[place] for one in judged if place < len(one.labels)]
            unit = len(units)
            units[unit], reply_of[unit] = [VALUES[label] for label in said if label in VALUES], item
    drawn = [one for one in found if one.random and one.whole]
    bad = [one.first_error is not None for one in drawn]
    return StepAgreement(
        exact=proportion(exact, items) if exact else None,
        near=proportion(near, items) if near else None,
        alpha=krippendorff_alpha(units, "ordinal", bootstrap, clusters=reply_of),
        wrong=proportion(bad, [one.problem for one in drawn]) if bad else None,
    )
