"""The small statistics that several rooms share: shares and figures with their intervals, and what disagreement leaves
to be predicted. Plain numbers in, plain numbers out.

With q the probability that an annotator prefers the first of a pair (no ties):

    two annotators agree            E[q^2 + (1-q)^2]
    the best predictor of one vote  E[max(q, 1-q)]      the noise ceiling of a reward model's accuracy

Both take a vote's annotator to be drawn at random for each vote, so they hold for a large population.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Proportion:
    """A share of ``count`` with its interval."""

    point: float
    low: float
    high: float
    count: int


def clustered_error(values: Sequence[float], groups: Sequence[Hashable]) -> float | None:
    """Standard error of the mean of ``values`` [N] where those of one group (replies to one prompt, say) belong
    together and groups are independent: from the groups' sums of distances from the mean (Liang & Zeger 1986), times
    G / (G - 1) for G groups. With one value a group it is the usual one. None below two groups."""
    middle = math.fsum(values) / len(values)
    sums: dict[Hashable, float] = {}
    for value, group in zip(values, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value - middle
    if len(sums) < 2:
        return None
    return math.sqrt(math.fsum(s * s for s in sums.values()) * len(sums) / (len(sums) - 1)) / len(values)


def proportion(hits: Sequence[bool], groups: Sequence[Hashable] | None = None, level: float = 0.95) -> Proportion:
    """The share that is true, with Wilson's interval (1927), which unlike the normal one stays inside [0, 1] and holds
    for few trials.

    Trials are independent, or those of different ``groups`` are: then the interval is that of as many independent
    trials as would have the same standard error (Kish 1965, the effective sample size), never more than there are; of
    as many trials as groups where all are alike, since nothing then says how far they hang together."""
    n: float = len(hits)
    assert n > 0, "a share needs a trial"
    point = sum(map(bool, hits)) / n
    if groups is not None:
        error = clustered_error([float(hit) for hit in hits], groups)
        alone = point * (1 - point) / (n - 1) if n > 1 else 0.0  # the error's square, were all trials independent
        n = min(n, n * alone / error**2) if error and 0 < point < 1 else min(n, len(set(groups)))
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    middle = (point + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (point * (1 - point) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return Proportion(point, max(middle - half, 0.0), min(middle + half, 1.0), len(hits))


def bootstrap_interval(
    rows_NF: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    times_N: np.ndarray | None = None,
) -> Interval | None:
    """The percentile bootstrap (Efron & Tibshirani 1993, ch. 13) of a figure that depends on N items by sums alone.

    rows_NF: what each item adds to the F sums; ``statistic``: sums [R, F] -> the figure of each [R], NaN where it is
    not defined (those resamples are left out). Drawing N items with replacement is a multinomial draw over the
    different rows: exact, and cheap when many items are alike. ``times_N``: how many items are like each row, where
    that is known. None below two items, or when fewer than half of the resamples have the figure.
    """
    items = len(rows_NF) if times_N is None else int(times_N.sum())
    if items < 2:
        return None
    different, of_N = np.unique(rows_NF, axis=0, return_inverse=True)
    counts = np.bincount(of_N.ravel(), times_N)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(items, counts / counts.sum(), size=resamples)
    return percentiles(statistic(draws @ different), level)


def percentiles(values: np.ndarray, level: float = 0.95) -> Interval | None:
    """Where the middle ``level`` of the values lies; NaNs are left out. None when they are the most."""
    known = values[np.isfinite(values)]
    if 2 * len(known) < len(values) or not len(known):
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def t_quantile(p: float, freedom: int) -> float:
    """The p-quantile (1/2 <= p < 1) of Student's t with ``freedom`` degrees of freedom, by bisection of its closed form
    for whole numbers of them (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""

    def within(t: float) -> float:
        """P(|T| < t)."""
        angle = math.atan(t / math.sqrt(freedom))
        sine, cosine = math.sin(angle), math.cos(angle)
        odd = freedom % 2
        term = total = cosine if odd else 1.0
        for k in range(2 + odd, freedom, 2):
            term *= cosine**2 * (k - 1) / k
            total += term
        if not odd:
            return sine * total
        return 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))

    low, high = 0.0, 1.0
    while within(high) < 2 * p - 1:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 2 * p - 1 else (low, middle)
    return (low + high) / 2


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Student's interval of the mean of independent values, one a seed, say; None below two."""
    n = len(values)
    if n < 2:
        return None
    middle = math.fsum(values) / n
    error = math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (n - 1) / n)
    half = t_quantile((1 + level) / 2, n - 1) * error
    return middle - half, middle + half


def expected_agreement(probabilities: Sequence[float]) -> float | None:
    """E[q^2 + (1-q)^2]: how often two annotators agree; None for no pairs."""
    return math.fsum(q * q + (1 - q) * (1 - q) for q in probabilities) / len(probabilities) if probabilities else None


def noise_ceiling(probabilities: Sequence[float]) -> float | None:
    """E[max(q, 1-q)]: the accuracy on single votes of a model that knows every q. No model can be expected to score
    higher. None for no pairs."""
    return math.fsum(max(q, 1 - q) for q in probabilities) / len(probabilities) if probabilities else None


def ceiling_bounds(agreement: float) -> Interval:
    """(low, high) between which the noise ceiling lies when all that is known is two annotators' raw agreement a.

    For one pair with agreement a = q^2 + (1 - q)^2 the better guess is right with m = (1 + sqrt(2a - 1)) / 2. m is
    concave in a, so over many pairs its mean is at most m(mean a), when all pairs are equally hard, and at least mean
    a, when each is either certain or a coin's toss. Agreement below 1/2 is chance, and is taken as 1/2.
    """
    a = min(max(agreement, 0.5), 1.0)
    return a, (1 + math.sqrt(2 * a - 1)) / 2


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow on either side."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
