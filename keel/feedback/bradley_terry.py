"""Strengths of models from votes on pairs, with what style adds to them, and intervals over people.

R. A. Bradley and M. E. Terry, "Rank Analysis of Incomplete Block Designs: I" (Biometrika 39, 1952). With strengths b,
and style effects g on what the left reply has more of than the right one (T. Li, A. Angelopoulos and W.-L. Chiang,
"Does Style Matter? Disentangling Style and Substance in Chatbot Arena", 2024), the left model's expected score is

    E[score] = sigmoid(b_left - b_right + style . g)         1: left is better, 0: right is, 1/2: neither

A tie is half a win each: what is estimated is the expected score, whatever makes people say tie. (W.-L. Chiang et al.,
"Chatbot Arena", arXiv:2403.04132, fit the same logistic regression.) That a tie varies less than a coin's toss does not
hurt the intervals: they come from how people differ, not from the model.

Votes of one person belong together. Intervals are those of the jackknife over people: each person's votes are left out
in turn, by one Newton step (the cluster jackknife CV3: J. G. MacKinnon, M. O. Nielsen and M. D. Webb, "Fast and
reliable jackknife and bootstrap methods for cluster-robust inference", J. Applied Econometrics 38, 2023), and Student's
t with one degree of freedom fewer than there are people.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

TOLERANCE = 1e-9  # largest Newton step at which the fit has settled
STEPS = 60
FARTHEST = 30.0  # logits beyond which a fit has no finite end


@dataclass(frozen=True, slots=True)
class Battle:
    """One vote. ``score``: 1 the left model is better, 0 the right one, 1/2 neither. ``style``: what the left reply has
    more of, one number a feature, as long for every battle."""

    person: str
    left: str
    right: str
    score: float
    style: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Fit:
    """``strengths`` [M], in logits, of mean 0, in the order of ``models``; ``effects`` [S], in logits a unit of style.
    ``jackknife``: by person, how far both [M + S] move when that person's votes are left out; None where they cannot
    be left out: without them no strength is left of some model."""

    models: tuple[str, ...]
    strengths: np.ndarray
    effects: np.ndarray
    jackknife: Mapping[str, np.ndarray | None]

    def error(self, contrast: np.ndarray) -> float | None:
        """Standard error of the contrast [M + S] of strengths and effects. None where it hangs on one person: below two
        people, or where without one of them it is not defined."""
        moves = list(self.jackknife.values())
        known = [move for move in moves if move is not None]
        if len(known) < len(moves) or len(known) < 2:
            return None
        shifts = np.array([float(move @ contrast) for move in known])
        return float(np.sqrt((len(shifts) - 1) / len(shifts) * (shifts**2).sum()))


def comparable(battles: Collection[Battle]) -> list[tuple[str, ...]]:
    """The models in parts whose strengths can be compared, the largest first: within a part a chain of votes in which
    the next one did not lose leads from every model to every other (L. R. Ford, "Solution of a Ranking Problem from
    Binary Comparisons", 1957: else some strength is infinite). Two parts never met, or every vote between them went one
    way."""
    beats: dict[str, set[str]] = {}
    for battle in battles:
        beats.setdefault(battle.left, set())
        beats.setdefault(battle.right, set())
        if battle.score > 0:
            beats[battle.left].add(battle.right)
        if battle.score < 1:
            beats[battle.right].add(battle.left)
    reach = {model: _reached(beats, model) for model in beats}
    found: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for model in sorted(beats):
        if model not in seen:
            part = tuple(other for other in sorted(reach[model]) if model in reach[other])
            seen.update(part)
            found.append(part)
    return sorted(found, key=lambda part: (-len(part), part))


def _reached(beats: Mapping[str, Collection[str]], start: str) -> set[str]:
    found, waiting = {start}, [start]
    while waiting:
        fresh = set(beats[waiting.pop()]) - found
        found |= fresh
        waiting += fresh
    return found


def fit(battles: Sequence[Battle], models: Sequence[str]) -> Fit | None:
    """The strengths of one part (``comparable``) by maximum likelihood, from the battles within it. None where style
    leaves no finite answer: where it tells every vote, or is the same thing as which model wrote it."""
    index = {model: at for at, model in enumerate(models)}
    within = [battle for battle in battles if battle.left in index and battle.right in index]
    people = sorted({battle.person for battle in within})
    person_at = {person: at for at, person in enumerate(people)}
    left_B = np.array([index[battle.left] for battle in within])
    right_B = np.array([index[battle.right] for battle in within])
    score_B = np.array([battle.score for battle in within])
    person_B = np.array([person_at[battle.person] for battle in within])
    design_BK = np.zeros((len(within), len(models)))
    rows_B = np.arange(len(within))
    design_BK[rows_B, left_B] = 1
    design_BK[rows_B, right_B] = -1
    design_BK = np.hstack([design_BK, np.array([battle.style for battle in within], float).reshape(len(within), -1)])
    held_KK = np.zeros((design_BK.shape[1],) * 2)  # keeps the mean of the strengths at 0, and changes nothing else
    held_KK[: len(models), : len(models)] = 1
    if np.linalg.cond(design_BK.T @ design_BK + held_KK) > 1e10:
        return None
    value_K = _solve(design_BK, score_B, held_KK)
    if value_K is None:
        return None
    jackknife = _left_out(design_BK, score_B, person_B, value_K, held_KK)
    m = len(models)
    return Fit(tuple(models), value_K[:m], value_K[m:], dict(zip(people, jackknife, strict=True)))


def _solve(design_BK: np.ndarray, score_B: np.ndarray, held_KK: np.ndarray) -> np.ndarray | None:
    """Newton's method, each step halved until the likelihood does not fall."""
    value_K = np.zeros(design_BK.shape[1])
    best = _likelihood(design_BK @ value_K, score_B)
    for _ in range(STEPS):
        expected_B = _sigmoid(design_BK @ value_K)
        bend_KK = (design_BK * (expected_B * (1 - expected_B))[:, None]).T @ design_BK + held_KK
        try:
            step_K = np.linalg.solve(bend_KK, design_BK.T @ (score_B - expected_B))
        except np.linalg.LinAlgError:
            return None
        while (now := _likelihood(design_BK @ (value_K + step_K), score_B)) < best - 1e-12 * abs(best):
            step_K = step_K / 2
        value_K, best = value_K + step_K, now
        if np.abs(value_K).max() > FARTHEST:
            return None
        if np.abs(step_K).max() < TOLERANCE:
            return np.asarray(value_K)
    return None


def _left_out(
    design_BK: np.ndarray, score_B: np.ndarray, person_B: np.ndarray, value_K: np.ndarray, held_KK: np.ndarray
) -> list[np.ndarray | None]:
    """How far the answer moves without each person, by one Newton step from it."""
    expected_B = _sigmoid(design_BK @ value_K)
    weight_B = expected_B * (1 - expected_B)
    bend_KK = (design_BK * weight_B[:, None]).T @ design_BK + held_KK
    order_B = np.argsort(person_B, kind="stable")
    groups = np.split(order_B, np.flatnonzero(np.diff(person_B[order_B])) + 1)
    moves: list[np.ndarray | None] = []
    for mine in groups:
        x_NK = design_BK[mine]
        left_KK = bend_KK - (x_NK * weight_B[mine][:, None]).T @ x_NK
        gone = np.linalg.cond(left_KK) > 1e10
        moves.append(None if gone else np.linalg.solve(left_KK, -x_NK.T @ (score_B[mine] - expected_B[mine])))
    return moves


def _likelihood(logit_B: np.ndarray, score_B: np.ndarray) -> float:
    """The sum of score ln p + (1 - score) ln(1 - p)."""
    return float((score_B * logit_B - np.logaddexp(0, logit_B)).sum())


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))
