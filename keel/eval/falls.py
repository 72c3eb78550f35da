"""Has a series of noisy means fallen, or is that noise? One test of a whole run, looked at after its end.

Looking again and again at whether the latest mean lies below the best so far finds a fall in nearly every run: the best
of many noisy means is the luckiest one. Here the mean over some looks is compared with the mean over the last ones, for
many choices of both. The bound is that of the largest of all these comparisons. So the chance of a false alarm is that
of the run and not of a look.

Where the truth never falls, an earlier window's true mean is at most a later one's. So every comparison can only be
smaller than on a constant truth: a bound for the flat truth holds for any that rises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

FEWEST = 6  # looks: below it noise cannot be told from a fall
MOST = 64  # looks: more are taken together, neighbours into one, which leaves the noise of each smaller
SIMULATED = 4000  # runs of pure noise behind the bound


@dataclass(frozen=True, slots=True)
class Fall:
    """``before``, ``after``: the means over looks ``begin`` to ``end`` (not included) and over those from ``last`` on;
    ``bound``: what ``after`` would have to be below to count. ``errors``: standard errors between the two means."""

    begin: int
    end: int
    last: int
    before: float
    after: float
    bound: float
    errors: float


def largest_fall(means: Sequence[float], errors: Sequence[float], proxy: Sequence[float], level: float) -> Fall | None:
    """The clearest fall of ``means`` [n] to the end of a run while ``proxy`` [n] rose; None when there is none.

    errors: the standard error of each mean. They do not include how the truth wobbles from look to look: a policy's
    steps are noisy, and neighbouring looks share them. So they are scaled up by the residuals of a smooth curve through
    the means, and by how alike neighbouring residuals are. ``level``: the chance of a false alarm over the whole run
    when looks are independent; what it comes to when they are not, docs/statistics.md says.
    """
    assert len(means) == len(errors) == len(proxy), "one error and one proxy a mean"
    if len(means) < FEWEST:
        return None
    groups = np.array_split(np.arange(len(means)), min(len(means), MOST))
    begins = [int(group[0]) for group in groups]
    size_n = np.diff([*begins, len(means)])
    sums = (np.add.reduceat(np.asarray(x, dtype=np.float64), begins) for x in (means, proxy, np.square(errors)))
    mean_n, proxy_n, variance_n = (total / size_n**power for total, power in zip(sums, (1, 1, 2), strict=True))
    variance_n = _with_wobble(mean_n, np.maximum(variance_n, variance_n.mean()))
    windows_K, contrast_Kn, squared_Kn = _contrasts(len(mean_n))
    error_K = np.sqrt(squared_Kn @ variance_n)
    fall_K = np.where(contrast_Kn @ proxy_n < 0, (contrast_Kn @ mean_n) / error_K, -np.inf)
    clearest, bound = int(fall_K.argmax()), _bound(len(mean_n), level)
    if fall_K[clearest] <= bound:
        return None
    begin, end, last = windows_K[clearest]
    before, after = float(mean_n[begin:end].mean()), float(mean_n[last:].mean())
    first = [*begins, len(means)]
    allowed = before - bound * float(error_K[clearest])
    return Fall(first[begin], first[end], first[last], before, after, allowed, float(fall_K[clearest]))


def _with_wobble(mean_n: np.ndarray, variance_n: np.ndarray) -> np.ndarray:
    """The variances times the long-run variance of a polynomial's residuals, in their units, and at least 1. That is
    residual variance x (1 + r) / (1 - r), r the correlation of neighbours. The fit takes some of that correlation away,
    about one part in n for each of its parameters, which is put back."""
    n = len(mean_n)
    degree = min((n + 20) // 10, 5)
    basis_nD, _ = np.linalg.qr(np.vander(np.linspace(-1, 1, n), degree + 1))
    floor = np.finfo(np.float64).eps * (np.abs(mean_n).max() + 1)  # a judge without spread has errors of 0
    variance_n = np.maximum(variance_n, floor**2)
    left_n = (mean_n - basis_nD @ (basis_nD.T @ mean_n)) / np.sqrt(variance_n)
    total = float(left_n @ left_n)
    alike = float(left_n[1:] @ left_n[:-1]) / total if total > 0 else 0.0
    alike = min(max(alike + (degree + 1) / n, 0.0), 0.75)
    return variance_n * max(1.0, total / (n - degree - 1) * (1 + alike) / (1 - alike))


@lru_cache(maxsize=MOST)
def _contrasts(n: int) -> tuple[list[tuple[int, int, int]], np.ndarray, np.ndarray]:
    """(begin, end, last) of each comparison, the weights [K, n] that make it of the means, and their squares: windows
    of 2, 4, 8, ... looks, against the last 2, 4, 8, ... of the run."""
    sizes = [2**k for k in range(1, n.bit_length()) if 2**k < n]
    windows = [
        (begin, begin + size, n - late)
        for late in sizes
        for size in sizes
        for begin in range(0, n - late - size + 1, max(1, size // 4))
    ]
    weights = np.zeros((len(windows), n))
    for row, (begin, end, last) in zip(weights, windows, strict=True):
        row[begin:end] = 1 / (end - begin)
        row[last:] = -1 / (n - last)
    return windows, weights, weights**2


@lru_cache(maxsize=MOST)
def _bound(n: int, level: float) -> float:
    """What the largest comparison of n looks at pure noise exceeds with probability ``level``, in standard errors."""
    _, contrast_Kn, _ = _contrasts(n)
    noise_Rn = np.random.default_rng(0).standard_normal((SIMULATED, n))
    largest_R = (noise_Rn @ (contrast_Kn / np.linalg.norm(contrast_Kn, axis=1, keepdims=True)).T).max(axis=1)
    return float(np.quantile(largest_R, 1 - level))
