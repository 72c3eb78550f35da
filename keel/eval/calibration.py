"""Is a reward model right as often as it says, and as often as anybody could be?

A Bradley-Terry model says P(A is preferred to B) = sigmoid(r_A - r_B). Here ``probs`` are such probabilities [N] in [0,
1], and ``outcomes`` [N] the annotations: 1 where A was preferred, 0 where B was, 1/2 for a tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keel.stats import sigmoid


@dataclass(frozen=True, slots=True)
class Bin:
    """Predictions that lie together: their mean, the mean of their outcomes, and how many they are."""

    predicted: float
    observed: float
    count: int


def both_ways(probs: Sequence[float], outcomes: Sequence[float]) -> tuple[list[float], list[float]]:
    """Every pair also seen from its other side: (p, y) and (1 - p, 1 - y). -> [2N], [2N]

    Pairs are stored as (chosen, rejected), where the outcome is 1 by construction and a calibrated model would look
    timid. With both directions in, which side a pair was written on no longer matters.
    """
    return [*probs, *(1 - p for p in probs)], [*outcomes, *(1 - y for y in outcomes)]


def reliability(probs: Sequence[float], outcomes: Sequence[float], bins: int = 10) -> list[Bin]:
    """The reliability curve: predictions in ``bins`` equal widths of [0, 1], empty ones left out. On the diagonal
    (predicted = observed) the model is calibrated."""
    probs_N, outcomes_N = np.asarray(probs, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    assert len(probs_N) == len(outcomes_N), "one outcome a prediction"
    assert ((probs_N >= 0) & (probs_N <= 1)).all(), "probabilities lie in [0, 1]"
    place_N = np.minimum((probs_N * bins).astype(int), bins - 1)
    curve = []
    for place in np.unique(place_N):
        inside_N = place_N == place
        curve.append(Bin(float(probs_N[inside_N].mean()), float(outcomes_N[inside_N].mean()), int(inside_N.sum())))
    return curve


def ece(probs: Sequence[float], outcomes: Sequence[float], bins: int = 10) -> float:
    """Expected calibration error: the mean distance of the reliability curve from the diagonal, weighted by count (Guo
    et al. 2017, eq. 3). Use :func:`both_ways` on preference pairs.

    0 is perfect, but noise alone keeps it above 0: a perfectly calibrated model whose N predictions fill B bins evenly
    shows about sqrt(2 / pi) sqrt(p(1 - p) B / N), p(1 - p) being the outcomes' typical variance.
    """
    assert len(probs) > 0, "a calibration error needs a prediction"
    return sum(b.count * abs(b.predicted - b.observed) for b in reliability(probs, outcomes, bins)) / len(probs)


def brier(probs: Sequence[float], outcomes: Sequence[float]) -> float:
    """The mean squared error of probabilities against the votes (Brier 1950): 0 at best, 1/4 for one who always says a
    half. An outcome between 0 and 1 is how probable the vote is: then it is y (1 - p)^2 + (1 - y) p^2, and the best is
    the mean of y (1 - y), at p = y."""
    assert len(probs) > 0, "a Brier score needs a prediction"
    return sum(y * (1 - p) ** 2 + (1 - y) * p**2 for p, y in zip(probs, outcomes, strict=True)) / len(probs)


def temperature(leads: Sequence[float], outcomes: Sequence[float] | None = None) -> float:
    """The t that makes P(chosen is preferred) = sigmoid(lead / t) most likely, for leads (chosen minus rejected) [N]
    (Guo et al. 2017, section 4.2). Above 1 the model was overconfident, below 1 underconfident. ``outcomes``: how
    probable it is that chosen is preferred (soft labels); default: 1.

    The likelihood is concave in 1 / t, so bisection finds its maximum. It is held within [1/100, 100]: where every lead
    is right, nothing bounds it.
    """
    outcomes = [1.0] * len(leads) if outcomes is None else outcomes
    low, high = -math.log(100), math.log(100)  # of 1 / t
    for _ in range(60):
        middle = (low + high) / 2
        scale = math.exp(middle)
        slope = sum(
            lead * (y * sigmoid(-lead * scale) - (1 - y) * sigmoid(lead * scale))
            for lead, y in zip(leads, outcomes, strict=True)
        )
        low, high = (middle, high) if slope > 0 else (low, middle)
    return math.exp(-(low + high) / 2)
