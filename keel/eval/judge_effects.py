"""What moves a judge that should not: which reply it was shown first, which is longer, which it wrote itself, which it
finds likelier (Panickssery et al. 2024, Wataoka et al. 2024). One logistic regression tells these apart from what the
replies are worth:

    logit P(left is picked) = a lead + b length + c own + d logprob + e side

Of a gold score the lead is the signed rank of its difference, and a column of its sign stands beside it: a score's own
unit may have heavy tails, and what a line in it misses would be taken for length.

Each column is left minus right, so there is no constant, and it does not matter which reply is called left. A pair is a
row for each order in which it was asked. ``lead`` is how much better the left reply is by those who know; ``own`` is 1
where the judge's own model wrote the left reply alone, -1 for the right one; ``logprob`` the mean log-probability of a
token under the judge's model; ``side`` 1/2 where the left one was shown first, -1/2 where second.

People's votes are noisy, and what they miss of a reply's worth would be taken for length, where longer replies are
better. So where people are those who know, how far they differ on pairs that several judged says how noisy a vote is,
and the coefficients are put right by it (regression calibration: Carroll et al. 2006, ch. 4).

An effect is a difference in probability: P(left is picked) with the left reply half a step ahead of the right one in
that column, less that with it half a step behind, all else as it was, averaged over the rows. A step is the root mean
square of the column over the pairs for length (characters) and log-probability (nats a token), one reply's being own
where the other is not, and first instead of second. Intervals resample prompts with all their pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from keel.eval.winrate import TIE_WIDTH
from keel.stats import percentiles

EFFECTS = ("length", "own", "logprob", "side")
# The effects' intervals hold together: with four of them, in 95% of cards all cover what they estimate (Bonferroni).
LEVEL = 1 - 0.05 / len(EFFECTS)
# Below so many pairs, prompts, pairs that differ in a column, and pairs that several people judged nothing can be told.
FEWEST, PROMPTS, DIFFERENT, REPEATED = 100, 20, 30, 30
ALIKE = 0.95  # of a column's variance, explained by the others: then their effects cannot be told apart
# Of the coefficients, a step of their columns each (Gaussian, mean 0). So weak that it matters only where picks are
# separated, as those of who always takes the longer reply: it keeps that fit finite.
PRIOR_SD = 10.0
LEAST_RELIABLE = 0.1  # share of the truth's variance that is no noise, at the least: a correction divides by it

Estimate = tuple[float, float, float]
"""A figure, and where its interval begins and ends."""


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """Two replies to ``prompt`` as a judge saw them. ``p_left_first``, ``p_left_second``: the probability that the left
    one is better, as read with it shown first and second; the second is None of a judge that reads one reply at a time.

    ``truth``: P(the left one is better) by people or gold (1, 0 or 1/2); ``lead``: how much better it is, in any unit
    (default: truth - 1/2); None where unknown. ``votes``: people's behind the truth (1 for left, 0, 1/2); none behind
    gold, which is taken at its word. ``length``: characters. ``own``: whether the judge's own model wrote it;
    ``logprob``: its mean log-probability a token under that model; None where unknown. Left, then right.
    """

    prompt: str
    p_left_first: float
    p_left_second: float | None
    truth: float | None
    length: tuple[int, int]
    own: tuple[bool, bool] | None = None
    logprob: tuple[float, float] | None = None
    lead: float | None = None
    votes: tuple[float, ...] = ()
    used: float | None = None  # the probability that a label has, where bounds hold it; default: the mean of the orders

    @property
    def probability(self) -> float:
        """That the left one is better, as a label says it."""
        if self.used is not None:
            return self.used
        return self.p_left_first if self.p_left_second is None else (self.p_left_first + self.p_left_second) / 2

    def led(self, lead: float) -> JudgedPair:
        """The same with what a gold score says: by how much the left reply is better."""
        truth = 0.5 if abs(lead) <= TIE_WIDTH else float(lead > 0)
        return replace(self, truth=truth, lead=lead)

    def gap(self, column: str) -> float | None:
        """Left minus right; None where unknown."""
        if column == "better":
            return float(np.sign(self.lead or 0.0))
        if column == "lead":
            return self.lead if self.lead is not None or self.truth is None else self.truth - 0.5
        both: tuple[float, float] | None = {"length": self.length, "own": self.own, "logprob": self.logprob}[column]
        return None if both is None else float(both[0]) - float(both[1])


def pick(probability: float) -> float:
    """1 for the left reply, 0 for the right one, 1/2 for a tie."""
    return 0.5 if math.isclose(probability, 0.5, abs_tol=1e-9) else float(probability > 0.5)


def effects_of(
    pairs: Sequence[JudgedPair], resamples: int, seed: int
) -> tuple[dict[str, Estimate], dict[str, str], dict[str, float]]:
    """The effects that can be told, why the others cannot, and the steps."""
    known = [pair for pair in pairs if pair.gap("lead") is not None]
    untold: dict[str, str] = {}
    columns: list[str] = []
    if (few := _few(known, "have a known truth") or _too_noisy(known)) is not None:
        untold = dict.fromkeys(("length", "own", "logprob"), few)
        known = list(pairs)
    else:
        columns = ["lead"]
        if not any(pair.votes for pair in known):  # gold's own unit may have heavy tails, and pickers may see its sign
            known = _ranked(known)
            columns = ["lead", "better"]
        for name in ("length", "own", "logprob"):
            gaps = [pair.gap(name) for pair in known]
            differ = sum(gap not in (None, 0) for gap in gaps)
            if None in gaps:
                untold[name] = f"it is not known of {gaps.count(None)} of {len(gaps)} pairs"
            elif differ < DIFFERENT:
                untold[name] = f"{differ} pairs differ in it, of the {DIFFERENT} that it takes"
            else:
                columns.append(name)
    twice = all(pair.p_left_second is not None for pair in known)
    if not twice:
        untold["side"] = "the judge reads one reply at a time"
    elif (few := _few(known, "were judged")) is not None:
        untold["side"] = few
    design = _Design.of(known, columns, twice and "side" not in untold)
    if len(design.columns) == 0:
        return {}, untold, {}
    for name, others in design.alike().items():
        untold[name] = f"in these pairs it goes with {others}"
    intervals = design.intervals(resamples, seed)
    effects = {name: intervals[name] for name in EFFECTS if name in intervals and name not in untold}
    steps = {name: design.steps[name] for name in effects if name in ("length", "logprob")}
    return effects, untold, steps


def _ranked(pairs: Sequence[JudgedPair]) -> list[JudgedPair]:
    """The pairs with the ranks of their leads' sizes, signed, in the leads' place: whatever the gold score's unit."""
    lead_P = np.array([pair.gap("lead") for pair in pairs], dtype=np.float64)
    sizes, place_P = np.unique(np.abs(lead_P), return_inverse=True)
    rank_P = np.sign(lead_P) * (place_P + 1) / len(sizes)
    return [replace(pair, lead=float(rank)) for pair, rank in zip(pairs, rank_P, strict=True)]


def _few(pairs: Sequence[JudgedPair], what: str) -> str | None:
    prompts = len({pair.prompt for pair in pairs})
    if len(pairs) < FEWEST:
        return f"{len(pairs)} pairs {what}, of the {FEWEST} that it takes"
    return f"they are pairs of {prompts} prompts, of the {PROMPTS} that it takes" if prompts < PROMPTS else None


def _too_noisy(known: Sequence[JudgedPair]) -> str | None:
    voted, repeated = sum(bool(pair.votes) for pair in known), sum(len(pair.votes) > 1 for pair in known)
    if not voted or repeated >= REPEATED:
        return None
    return f"{repeated} pairs were judged by several people, of the {REPEATED} that it takes to know how they differ"


@dataclass(frozen=True)
class _Design:
    """The rows of the regression: x_NF in steps, picks y_N, the prompt of each (0..G-1). ``noise``: of people's votes,
    [N, 2]: the variance of one vote as the pair's own votes show it (NaN for fewer than two), and 1 / their number; in
    the unit of the lead's column. None: the truth is exact."""

    columns: tuple[str, ...]
    x_NF: np.ndarray
    y_N: np.ndarray
    group_N: np.ndarray
    steps: dict[str, float]
    noise_N2: np.ndarray | None = None

    @staticmethod
    def of(pairs: Sequence[JudgedPair], columns: Sequence[str], side: bool) -> _Design:
        gaps_PF = np.array([[pair.gap(name) for name in columns] for pair in pairs], dtype=np.float64)
        steps_F = np.array([1.0 if name == "own" else _step(gaps_PF[:, i]) for i, name in enumerate(columns)])
        gaps_PF = gaps_PF / steps_F
        group_P = np.unique(np.asarray([pair.prompt for pair in pairs]), return_inverse=True)[1]
        first_P = np.array([pick(pair.p_left_first) for pair in pairs])
        steps = dict(zip(columns, steps_F.tolist(), strict=True))
        noise_P2 = _noise(pairs, steps_F[0]) if columns and any(pair.votes for pair in pairs) else None
        if not side:
            mean_P = np.array([pick(pair.probability) for pair in pairs])
            return _Design(tuple(columns), gaps_PF, mean_P, group_P, steps, noise_P2)
        second_P = np.array([pick(pair.p_left_second or 0.0) for pair in pairs])
        half_P = np.full((len(pairs), 1), 0.5)
        x_NF = np.concatenate([np.hstack([gaps_PF, half_P]), np.hstack([gaps_PF, -half_P])])
        noise_N2 = None if noise_P2 is None else np.concatenate([noise_P2, noise_P2])
        y_N, group_N = np.concatenate([first_P, second_P]), np.concatenate([group_P, group_P])
        return _Design((*columns, "side"), x_NF, y_N, group_N, steps, noise_N2)

    def alike(self) -> dict[str, str]:
        """The columns that the others nearly determine, and which of them goes with it most."""
        found = {}
        size_F = np.linalg.norm(self.x_NF, axis=0)
        for i, name in enumerate(self.columns):
            others = [j for j in range(len(self.columns)) if j != i and size_F[j] > 0]
            if name not in EFFECTS or not others:
                continue
            x_N, rest_NF = self.x_NF[:, i], self.x_NF[:, others]
            fit = np.linalg.lstsq(rest_NF, x_N, rcond=None)[0]
            if np.sum((x_N - rest_NF @ fit) ** 2) < (1 - ALIKE) * np.sum(x_N**2):
                most = max(others, key=lambda j: abs(self.x_NF[:, j] @ x_N) / size_F[j])
                found[name] = {"lead": "the truth", "better": "the truth"}.get(self.columns[most], self.columns[most])
        return found

    def intervals(self, resamples: int, seed: int) -> dict[str, Estimate]:
        """Each column's effect, from all rows, and its interval over resampled prompts."""
        ones_1N = np.ones((1, len(self.y_N)))
        beta_1F = fit(self.x_NF, self.y_N, ones_1N)
        point_F = self._effects(beta_1F, ones_1N)[0]
        groups = int(self.group_N.max()) + 1
        rng = np.random.default_rng(seed)
        counts_RG = rng.multinomial(groups, np.full(groups, 1 / groups), size=resamples)
        parts = []
        for begin in range(0, resamples, AT_ONCE):
            weight_RN = counts_RG[begin : begin + AT_ONCE][:, self.group_N].astype(np.float64)
            parts.append(self._effects(fit(self.x_NF, self.y_N, weight_RN, beta_1F), weight_RN))
        drawn_RF = np.concatenate(parts)
        found = {}
        for i, name in enumerate(self.columns):
            interval = percentiles(drawn_RF[:, i], LEVEL)
            if interval is not None:
                found[name] = (float(point_F[i]), *interval)
        return found

    def _effects(self, beta_RF: np.ndarray, weight_RN: np.ndarray) -> np.ndarray:
        """The effect of a step of each column [R, F], in probability, as the module says."""
        eta_RN, own_RF = beta_RF @ self.x_NF.T, self._without_noise(beta_RF, weight_RN)
        found = np.empty_like(beta_RF)
        for i in range(self.x_NF.shape[1]):
            own_R1 = own_RF[:, i : i + 1]
            level_RN = eta_RN - own_R1 * self.x_NF[:, i]
            moved_RN = _sigmoid(level_RN + own_R1 / 2) - _sigmoid(level_RN - own_R1 / 2)
            found[:, i] = (weight_RN * moved_RN).sum(axis=1) / weight_RN.sum(axis=1)
        return found

    def _without_noise(self, beta_RF: np.ndarray, weight_RN: np.ndarray) -> np.ndarray:
        """The coefficients had the lead no noise. Given a noisy lead t and the other columns x, the true one is best
        guessed by r t + (1 - r) d x: d from the regression of t on x, r the share of the rest's variance that is no
        noise. With this guess in t's place the fit is the same, and the coefficients of x are less by (1 - r) / r d
        times that of t."""
        others = [i for i, name in enumerate(self.columns) if name not in ("lead", "better", "side")]
        if self.noise_N2 is None or not others:
            return beta_RF
        x_NF, t_N = self.x_NF[:, others], self.x_NF[:, 0]
        bend_RFF = np.einsum("rn,nf,ng->rfg", weight_RN, x_NF, x_NF, optimize=True) + 1e-9 * np.eye(len(others))
        d_RF = np.linalg.solve(bend_RFF, ((weight_RN * t_N) @ x_NF)[:, :, None])[:, :, 0]
        weight_R = weight_RN.sum(axis=1)
        rest_R = (weight_RN * (t_N - d_RF @ x_NF.T) ** 2).sum(axis=1) / weight_R
        seen_N = np.isfinite(self.noise_N2[:, 0])
        one_vote_R = weight_RN[:, seen_N] @ self.noise_N2[seen_N, 0] / weight_RN[:, seen_N].sum(axis=1)
        noise_R = one_vote_R * (weight_RN @ self.noise_N2[:, 1]) / weight_R
        reliable_R1 = np.maximum(1 - noise_R / rest_R, LEAST_RELIABLE)[:, None]
        found_RF = beta_RF.copy()
        found_RF[:, others] -= (1 - reliable_R1) / reliable_R1 * d_RF * beta_RF[:, :1]
        return found_RF


def _noise(pairs: Sequence[JudgedPair], step: float) -> np.ndarray:
    rows = [
        (np.var(pair.votes, ddof=1) / step**2 if len(pair.votes) > 1 else np.nan, 1 / max(len(pair.votes), 1))
        for pair in pairs
    ]
    return np.array(rows)


AT_ONCE = 250  # resamples that are fitted together
STEPS, LONGEST, CLOSE = 60, 2.0, 1e-8  # of Newton's method: at most so many, each at most so long, until so short


def _step(gap_P: np.ndarray) -> float:
    """The root mean square, 1 for a column of zeros. It is the same whichever reply is called left."""
    return float(np.sqrt(np.mean(gap_P**2))) or 1.0


def fit(x_NF: np.ndarray, y_N: np.ndarray, weight_RN: np.ndarray, start_1F: np.ndarray | None = None) -> np.ndarray:
    """The coefficients [R, F] that make the picks most likely, row i counting ``weight[r, i]`` times, under a Gaussian
    prior of deviation ``PRIOR_SD``: Newton's method for all R fits at once. The function is concave, so there is one
    maximum; steps are shortened, lest the first ones overshoot where picks are nearly separated."""
    resamples, columns = len(weight_RN), x_NF.shape[1]
    beta_RF = np.zeros((resamples, columns)) if start_1F is None else np.repeat(start_1F, resamples, axis=0)
    squares_NQ = (x_NF[:, :, None] * x_NF[:, None, :]).reshape(len(x_NF), -1)
    prior_FF = np.eye(columns) / PRIOR_SD**2
    for _ in range(STEPS):
        p_RN = _sigmoid(beta_RF @ x_NF.T)
        slope_RF = (weight_RN * (y_N - p_RN)) @ x_NF - beta_RF / PRIOR_SD**2
        bend_RFF = ((weight_RN * p_RN * (1 - p_RN)) @ squares_NQ).reshape(resamples, columns, columns) + prior_FF
        step_RF = np.linalg.solve(bend_RFF, slope_RF[:, :, None])[:, :, 0]
        longest_R1 = np.abs(step_RF).max(axis=1, keepdims=True)
        beta_RF = beta_RF + step_RF * np.minimum(1.0, LONGEST / np.maximum(longest_R1, LONGEST))
        if longest_R1.max() < CLOSE:
            break
    return beta_RF


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))  # no overflow on either side
