"""Win rates between two models, with bootstrap intervals over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keel.types import UserError

# Scores are sums of floats: two replies of equal worth may differ in the last bits.
TIE_WIDTH = 1e-9


@dataclass(frozen=True, slots=True)
class WinRate:
    """``point`` = wins / (wins + losses), with its interval; all three are None when every comparison tied.

    Ties are left out of the rate and counted in ``ties``, so that ``wins + losses + ties`` is every comparison.
    """

    point: float | None
    low: float | None
    high: float | None
    wins: int
    losses: int
    ties: int

    def as_list(self) -> list[float] | None:
        """``[point, low, high]`` as summary.json keeps it, None when undefined."""
        if self.point is None or self.low is None or self.high is None:
            return None
        return [self.point, self.low, self.high]


def win_rate(
    scores_a: Sequence[float],
    scores_b: Sequence[float],
    groups: Sequence[int] | Sequence[str] | None = None,
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> WinRate:
    """How often A's score is above B's, in comparison i of N.

    scores_a, scores_b: one score per comparison, same length. groups: the prompt that each comparison belongs to
    (default: each its own). The bootstrap (Efron 1979, percentile interval) draws whole prompts, since replies to one
    prompt are not independent; N comparisons of ten prompts know about ten prompts.

    Only a prompt's (wins, losses) matters to the rate. So a resample of G prompts is a multinomial draw over the
    distinct (wins, losses) pairs: exact, and its cost does not grow with G.

    When all decided comparisons fall to one side, every resample repeats it and the percentile interval would be a
    single point. The exact binomial bound (Clopper and Pearson 1934) over the decided prompts is used instead.

    Raises UserError when a score is not a finite number.
    """
    assert len(scores_a) == len(scores_b), "one score of each model per comparison"
    assert groups is None or len(groups) == len(scores_a), "one group per comparison"
    a_N, b_N = np.asarray(scores_a, dtype=np.float64), np.asarray(scores_b, dtype=np.float64)
    broken = np.flatnonzero(~np.isfinite(a_N) | ~np.isfinite(b_N))
    if broken.size:
        raise UserError(f"comparison {broken[0]} has a score that is not a finite number; check the judge's output")

    difference_N = a_N - b_N
    win_N, loss_N = difference_N > TIE_WIDTH, difference_N < -TIE_WIDTH
    wins, losses = int(win_N.sum()), int(loss_N.sum())
    ties = len(difference_N) - wins - losses
    if wins + losses == 0:
        return WinRate(None, None, None, 0, 0, ties)

    group_N = np.arange(len(a_N)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    per_group = np.stack([np.bincount(group_N, win_N), np.bincount(group_N, loss_N)], axis=1)  # [G, 2]
    tail = (1 - level) / 2
    if wins == 0 or losses == 0:
        decided = int((per_group.sum(axis=1) > 0).sum())
        bound = tail ** (1 / decided)
        low, high = (bound, 1.0) if losses == 0 else (0.0, 1 - bound)
    else:
        low, high = _percentile_interval(per_group, n_boot, seed, tail)
    return WinRate(wins / (wins + losses), low, high, wins, losses, ties)


def _percentile_interval(per_group: np.ndarray, n_boot: int, seed: int, tail: float) -> tuple[float, float]:
    """per_group [G, 2]: wins and losses of each prompt."""
    outcomes, counts = np.unique(per_group, axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(per_group), counts / counts.sum(), size=n_boot)
    resampled = draws @ outcomes  # [n_boot, 2]
    decided = resampled.sum(axis=1)
    rates = resampled[decided > 0, 0] / decided[decided > 0]
    low, high = np.quantile(rates, [tail, 1 - tail])
    return float(low), float(high)
