"""Has training on pairs pushed down the very replies that it was to prefer, and made the policy's own replies worse?

A pairwise loss asks that the chosen reply's lead grow. Where the two are nearly alike, what lowers the one lowers the
other, and the probability goes to replies that nobody compared (Razin et al. 2024, "Unintentional Unalignment"). That
the chosen replies became less probable is common and alone no fault. So it is looked at beside the judge's grades of
what the policy now says, on the same kind of prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keel.eval.grading import GradedReply, ModelEvaluation

FEWEST = 10  # prompts of a kind: below it a fall cannot be told from chance
FLIPS = 20_000  # random signs behind a probability
GROUPS = "displacement/groups"  # of the row that the alarm reads

Rows = Sequence[Sequence[GradedReply]]


@dataclass(frozen=True)
class Group:
    """The prompts of a kind ("" for all). ``change``: of the chosen replies' log-probability, nats a token;
    ``sharpest``: of the token of each that lost most, None where an earlier Keel did not measure it; ``before``,
    ``after``: the judge's mean score of the start and of the policy; ``chance``: how probable a fall so large is where
    none is; ``flags``: the judge's finding that moved most, in words."""

    kind: str
    change: float
    sharpest: float | None
    before: float
    after: float
    chance: float
    flags: str


def displacement_row(
    measured: Mapping[str, Any], policy: ModelEvaluation, start: ModelEvaluation
) -> dict[str, int | float | list[Group]]:
    """The row of a stage that the displacement alarm reads (``keel.eval.alarms``). ``measured``: the stage's summary
    (``keel.train.offline.measure_offline``); both models answered the same prompts. Without a change there are no
    groups."""
    changes = {"": measured.get("displacement/chosen_per_token"), **measured.get("displacement/kinds", {})}
    sharpest = {"": measured.get("displacement/sharpest"), **measured.get("displacement/sharpest_kinds", {})}
    groups = [
        group
        for kind, change in changes.items()
        if change is not None
        and (group := _group(kind, change, sharpest.get(kind), policy.replies, start.replies)) is not None
    ]
    return {"step": int(measured.get("steps", 0)), GROUPS: groups}


def _group(kind: str, change: float, sharpest: float | None, policy: Rows, start: Rows) -> Group | None:
    rows = [(a, b) for a, b in zip(policy, start, strict=True) if kind in ("", a[0].prompt.kind)]
    scores = [(_score(a), _score(b)) for a, b in rows]
    both = [(after, before) for after, before in scores if after is not None and before is not None]
    if len(both) < FEWEST:
        return None
    after_N, before_N = (np.array(column) for column in zip(*both, strict=True))
    chance = chance_of_fall(after_N - before_N)
    moved = _most_moved([row for row, _ in rows], [row for _, row in rows])
    return Group(kind, change, sharpest, float(before_N.mean()), float(after_N.mean()), chance, moved)


def chance_of_fall(difference_N: np.ndarray, seed: int = 0) -> float:
    """The probability of a mean difference as low as this where each prompt's is as likely up as down (the sign-flip
    test, Fisher 1935), from random signs. Exact for few prompts and scores of few values, where a normal one is not."""
    moved_N = difference_N[difference_N != 0]
    if not len(moved_N):
        return 1.0
    signs_RN = np.random.default_rng(seed).integers(0, 2, size=(FLIPS, len(moved_N)), dtype=np.int8) * 2 - 1
    sums_R = signs_RN @ moved_N
    return float((1 + np.sum(sums_R <= moved_N.sum() + 1e-9)) / (1 + FLIPS))


def _score(replies: Sequence[GradedReply]) -> float | None:
    scores = [reply.grade.score for reply in replies if reply.grade is not None]
    return math.fsum(scores) / len(scores) if scores else None


def _most_moved(policy: Rows, start: Rows) -> str:
    """``harmful 8% -> 41%``; empty without flags."""
    after, before = _shares(policy), _shares(start)
    both = [(abs(after[name] - before[name]), name) for name in after if name in before]
    if not both:
        return ""
    name = max(both)[1]
    return f"{name.replace('_', ' ')} {before[name]:.0%} -> {after[name]:.0%}"


def _shares(rows: Rows) -> dict[str, float]:
    """Of each flag, the share of the replies to which it applies."""
    found: dict[str, list[bool]] = {}
    for reply in (reply for row in rows for reply in row if reply.grade is not None):
        assert reply.grade is not None
        for name, value in reply.grade.flags.items():
            if value is not None:
                found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}
