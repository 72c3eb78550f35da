"""What the scores of a reply's steps make as a reward, by form. Plain numbers.

p_1 ... p_K are the scores of the steps in [0, 1], o is the outcome of the whole reply.

    progress  step k is worth p_k - p_{k-1}, p_0 a constant (Setlur et al. 2024, "Rewarding Progress", arXiv
              2410.08146). The sum is p_K - p_0 however many steps there are: more of them earn nothing. A reply
              without a step has come to 0: it has a step worth -p_0.
    min       the sum is m_K, where m_k is the sum of w p over the first k steps, w = softmax(-p / T) ("PURE", arXiv
              2504.15275): as T goes to 0, the lowest score. Step k is worth m_k - m_{k-1}, what it changes. (PURE has
              w_k p_k: a later step then takes weight from earlier ones, whose loss its own tokens do not see.)
    sum       step k is worth p_k (Shao et al. 2024, "DeepSeekMath", section 4.1.3). Each true trifle earns more.
    gated     the reply is worth o where every step reaches ``bound`` (arXiv 2512.07783), else 0, or what a wrong answer
              is worth where that is less: a wrong step never pays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from keel.objective.traces import StepBaseline
from keel.recipe.judges import StepForm

# What each form's values are held against within a group (``keel.objective.traces``).
BASELINES: dict[StepForm, StepBaseline] = {
    "progress": "returns",
    "min": "returns",
    "sum": "tokens",
    "gated": "steps",  # it has no steps' values
}


class Earned(NamedTuple):
    """What the reply is worth as a whole, and each step beside that."""

    reply: float
    steps: tuple[float, ...]


def earned(
    form: StepForm,
    scores: Sequence[float],
    outcome: float = 0.0,
    *,
    temperature: float = 0.1,
    bound: float = 0.5,
    start: float = 0.5,
    wrong: float = 0.0,
) -> Earned:
    """What a reply with these steps' ``scores`` earns. ``start``: p_0; ``wrong``: the outcome of a wrong answer, where
    that is known.

    For a reply without a step that can be scored (nothing was written, or it was cut within the first one) no step
    vouches: that is a score of 0, and a gate stays shut.
    """
    if form == "gated":
        open_ = bool(scores) and min(scores) >= bound
        return Earned(outcome if open_ else min(outcome, wrong, 0.0), ())
    if form == "progress":
        return Earned(0.0, tuple(after - before for before, after in pairwise([start, *(scores or (0.0,))])))
    if form == "sum":
        return Earned(0.0, tuple(scores))
    lowest = [softmin(scores[:k], temperature) for k in range(1, len(scores) + 1)]
    return Earned(0.0, tuple(after - before for before, after in pairwise([0.0, *lowest])))


def softmin(scores: Sequence[float], temperature: float) -> float:
    """The mean of the scores with the weights softmax(-p / T): between their mean and the lowest of them."""
    lowest = min(scores)
    parts = [math.exp((lowest - p) / temperature) for p in scores]  # the largest is 1: nothing overflows
    return math.fsum(part * p for part, p in zip(parts, scores, strict=True)) / math.fsum(parts)
