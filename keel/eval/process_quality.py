"""How good a process reward model is on problems that it has not seen: does it find the first error, rank steps, say
how sure it is, and does choosing by it give better answers? Pure: numbers in, numbers out.

Problems are independent, replies to one are not: intervals are bootstraps over problems.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, Literal

import numpy as np

from keel.eval.calibration import ece, reliability
from keel.recipe.steps import Aggregate
from keel.reward.process import aggregated
from keel.stats import bootstrap_interval, percentiles

Estimate = list[float | None]
"""[estimate, low, high]; the bounds are None where too few problems say anything of them."""

RESAMPLES = 1000
CANDIDATES = 512  # thresholds that are tried
NO_ERROR = -1


@dataclass(frozen=True, slots=True)
class Judged:
    """A reply's scores, its labels (None: unjudged), and the problem that it answers. ``right``: whether its answer is;
    None where that is not known, or the reply is not whole. ``answer``: what votes group it by, where that is known."""

    scores: tuple[float, ...]
    labels: tuple[float | None, ...]
    problem: Hashable
    right: bool | None = None
    answer: Hashable | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A reply to be chosen or not: its score, the answer that it gives (None: unreadable), whether that is right."""

    score: float
    answer: Hashable | None
    right: bool


# ------------------------------------------------------------------------------------------------------ the first error


def first_error(labels: Sequence[float | None], bound: float) -> int | None:
    """The place of the first step that is not right (its label is not above ``bound``), ``NO_ERROR`` where all are;
    None where a step that nobody judged leaves it open."""
    for i, label in enumerate(labels):
        if label is None:
            return None
        if label <= bound:
            return i
    return NO_ERROR


def found_error(scores: Sequence[float], threshold: float) -> int:
    """The first step whose score is below ``threshold``; ``NO_ERROR`` where none is."""
    return next((i for i, score in enumerate(scores) if score < threshold), NO_ERROR)


def harmonic(error: float, correct: float) -> float:
    """ProcessBench's F1 (Zheng et al. 2024): the harmonic mean of the share of wrong replies whose first error is found
    exactly and of the share of right ones in which none is."""
    return 2 * error * correct / (error + correct) if error + correct else 0.0


@dataclass(frozen=True, slots=True)
class _Sample:
    """A reply whose first error is known. It is judged rightly by thresholds above ``low``, up to ``high``."""

    low: float
    high: float
    wrong: bool
    problem: Hashable

    @staticmethod
    def of(reply: Judged, error: int) -> _Sample:
        if error == NO_ERROR:
            return _Sample(-math.inf, min(reply.scores), False, reply.problem)
        return _Sample(reply.scores[error], min(reply.scores[:error], default=math.inf), True, reply.problem)

    def hit(self, threshold: float) -> bool:
        return self.low < threshold <= self.high


def first_error_f1(replies: Sequence[Judged], bound: float, seed: int = 0) -> dict[str, Any] | None:
    """``error``, ``correct``: the two shares; ``f1``: [estimate, low, high]; ``bound``: the threshold.

    It is the one with the best F1 on half of the problems (``chosen_on``: how many replies these have), and the shares
    are those of the other half. Where a half lacks wrong or right replies the threshold is 0.5 and nothing is chosen.
    None where there are no replies of both kinds."""
    samples = [_Sample.of(one, error) for one in replies if (error := first_error(one.labels, bound)) is not None]
    problems = sorted({one.problem for one in samples}, key=str)
    random.Random(f"halves {seed}").shuffle(problems)
    choosing = set(problems[: len(problems) // 2])
    halves = [[one for one in samples if (one.problem in choosing) == side] for side in (True, False)]
    threshold, measured, chosen_on = 0.5, samples, 0
    if all(len({one.wrong for one in half}) == 2 for half in halves):
        threshold, measured, chosen_on = best_threshold(halves[0]), halves[1], len(halves[0])
    if len({one.wrong for one in measured}) < 2:
        return None
    sums: dict[Hashable, list[float]] = {}
    for one in measured:
        row = sums.setdefault(one.problem, [0.0] * 4)
        row[2 * one.wrong] += one.hit(threshold)
        row[2 * one.wrong + 1] += 1
    rows_GF = np.array(list(sums.values()))

    def f1(sums_RF: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            correct, error = sums_RF[:, 0] / sums_RF[:, 1], sums_RF[:, 2] / sums_RF[:, 3]
            found: np.ndarray = np.where(error + correct > 0, 2 * error * correct / (error + correct), 0 * error)
            return found

    right, rights, hit, wrongs = rows_GF.sum(0).tolist()
    error, correct = hit / wrongs, right / rights
    interval = bootstrap_interval(rows_GF, f1, RESAMPLES, seed)
    return {
        "error": error,
        "correct": correct,
        "f1": _estimate(harmonic(error, correct), interval),
        "bound": threshold,
        "chosen_on": chosen_on,
        "replies": len(measured),
    }


def best_threshold(samples: Sequence[_Sample]) -> float:
    """The threshold with the best F1; of several, the one nearest to 0.5. Of many replies' scores a choice of
    ``CANDIDATES`` is tried."""
    low_N, high_N = np.array([one.low for one in samples]), np.array([one.high for one in samples])
    wrong_N = np.array([one.wrong for one in samples])
    edges = np.unique(np.concatenate([[0.0, 1.0], low_N, high_N]).clip(0.0, 1.0))
    tried = np.unique(np.concatenate([[0.5], (edges[:-1] + edges[1:]) / 2]))
    if len(tried) > CANDIDATES:
        tried = tried[np.linspace(0, len(tried) - 1, CANDIDATES).astype(int)]
    hits_TN = (low_N < tried[:, None]) & (tried[:, None] <= high_N)
    f1 = [harmonic(hits[wrong_N].mean(), hits[~wrong_N].mean()) for hits in hits_TN]
    best = max(f1)
    return float(min((t for t, value in zip(tried, f1, strict=True) if value == best), key=lambda t: abs(t - 0.5)))


# ------------------------------------------------------------------------------------------------------------ the steps


def step_auc(replies: Sequence[Judged], bound: float, seed: int = 0) -> Estimate | None:
    """How often a right step has a higher score than a wrong one, ties counting half: [estimate, low, high] over all
    judged steps; None without both kinds."""
    steps = [
        (score, label > bound, one.problem)
        for one in replies
        for score, label in zip(one.scores, one.labels, strict=True)
        if label is not None
    ]
    if len({right for _, right, _ in steps}) < 2:
        return None
    steps.sort(key=lambda step: step[0])
    score_S, right_S = np.array([step[0] for step in steps]), np.array([step[1] for step in steps])
    begins = np.flatnonzero(np.diff(score_S, prepend=-np.inf))  # of each run of equal scores
    place = {problem: i for i, problem in enumerate(dict.fromkeys(step[2] for step in steps))}
    problem_S = np.array([place[step[2]] for step in steps])

    def area(weight_RG: np.ndarray) -> np.ndarray:
        weight_RS = weight_RG[:, problem_S].astype(float)
        right = np.add.reduceat(weight_RS * right_S, begins, axis=1)
        wrong = np.add.reduceat(weight_RS * ~right_S, begins, axis=1)
        below = wrong.cumsum(1) - wrong
        with np.errstate(invalid="ignore", divide="ignore"):
            found: np.ndarray = (right * (below + wrong / 2)).sum(1) / (right.sum(1) * wrong.sum(1))
            return found

    groups = len(place)
    estimate = float(area(np.ones((1, groups)))[0])
    if groups < 2:
        return _estimate(estimate, None)
    rng = np.random.default_rng(seed)
    rows = max(1, min(RESAMPLES, 2_000_000 // len(steps)))  # of a block: memory is bounded
    blocks = [min(rows, RESAMPLES - at) for at in range(0, RESAMPLES, rows)]
    drawn = [area(rng.multinomial(groups, [1 / groups] * groups, size=block)) for block in blocks]
    return _estimate(estimate, percentiles(np.concatenate(drawn)))


# ------------------------------------------------------------------------------------------------------ whole replies


def pair_accuracy(problems: Sequence[Sequence[tuple[float, bool]]]) -> float | None:
    """How often, of a right and a wrong reply to one problem, the right one has the higher score (ties: half): the mean
    over problems that have both. ``problems``: each reply's score, and whether it is right. None where none has."""
    shares = []
    for replies in problems:
        right, wrong = ([score for score, is_right in replies if is_right == side] for side in (True, False))
        if right and wrong:
            won = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
            shares.append(won / (len(right) * len(wrong)))
    return math.fsum(shares) / len(shares) if shares else None


AGGREGATES: tuple[Aggregate, ...] = ("min", "product", "last", "mean")  # of equally good ones the first is taken


def aggregate_accuracies(replies: Sequence[Judged]) -> dict[Aggregate, float]:
    """``pair_accuracy`` of each aggregate; nothing where no problem has a right and a wrong reply."""
    problems = _by_problem([one for one in replies if one.right is not None])
    found = {
        how: pair_accuracy([[(aggregated(one.scores, how), bool(one.right)) for one in some] for some in problems])
        for how in AGGREGATES
    }
    return {how: value for how, value in found.items() if value is not None}


def _by_problem(replies: Sequence[Judged]) -> list[list[Judged]]:
    groups: dict[Hashable, list[Judged]] = {}
    for one in replies:
        groups.setdefault(one.problem, []).append(one)
    return list(groups.values())


def chosen_aggregate(accuracies: dict[Aggregate, float]) -> Aggregate:
    """The one by which a right reply most often beats a wrong one; ``min`` where that is not known."""
    return max(accuracies, key=accuracies.__getitem__, default="min")


def _aggregates(problems: Sequence[Sequence[Judged]], aggregate: Aggregate | None, seed: int) -> list[Aggregate]:
    """By which each problem's replies are scored; where ``aggregate`` is None, by what the other half of the problems
    chooses: an aggregate is not measured on what it was chosen on."""
    if aggregate is not None:
        return [aggregate] * len(problems)
    order = sorted(range(len(problems)), key=lambda i: str(problems[i][0].problem))
    random.Random(f"aggregate {seed}").shuffle(order)
    halves = order[::2], order[1::2]
    of: dict[int, Aggregate] = {}
    for half, other in (halves, halves[::-1]):
        said = [one for i in other for one in problems[i]]
        of |= dict.fromkeys(half, chosen_aggregate(aggregate_accuracies(said)))
    return [of[i] for i in range(len(problems))]


def process_quality(
    replies: Sequence[Judged], aggregate: Aggregate | None, bound: float, seed: int = 0
) -> dict[str, Any]:
    """All figures over held-out replies (see docs/metrics.md). ``bound``: a step is right where its label is above.
    ``aggregate``: what a reply's score is for ``best_of_n``; None where it is chosen on these problems, each half of
    which is then scored as the other chooses."""
    judged = [
        (score, label)
        for one in replies
        for score, label in zip(one.scores, one.labels, strict=True)
        if label is not None
    ]
    says, labels = [score for score, _ in judged], [label for _, label in judged]
    known = _by_problem([one for one in replies if one.right is not None])
    choices = [
        [Candidate(aggregated(one.scores, how), one.answer, bool(one.right)) for one in some]
        for some, how in zip(known, _aggregates(known, aggregate, seed), strict=True)
    ]
    return {
        "problems": len({one.problem for one in replies}),
        "replies": len(replies),
        "first_error": first_error_f1(replies, bound, seed),
        "step_auc": step_auc(replies, bound, seed),
        "ece": ece(says, labels) if says else None,
        "calibration": [[b.predicted, b.observed, b.count] for b in reliability(says, labels)] if says else [],
        "best_of_n": best_of_n(choices, seed),
    }


Way = Literal["score", "majority", "first", "oracle"]


def best_of_n(problems: Sequence[Sequence[Candidate]], seed: int = 0) -> list[dict[str, Any]] | None:
    """For n = 1, 2, 4, ... the share of problems that are answered rightly by the best-scored of n replies, by the most
    frequent answer, by one reply, and by the best that there is (pass at n), each [estimate, low, high].

    A problem with more than n replies counts by its mean over all choices of n (the vote: over a hundred drawn ones).
    The last n is the largest that half of the problems have replies for, and those with fewer are left out of all.
    ``majority`` is None where no answers are known. None without problems of two replies or more.
    """
    if not problems:
        return None
    most = 2 ** int(math.log2(median_low(len(replies) for replies in problems) or 1))
    kept = [replies for replies in problems if len(replies) >= most]
    if most < 2:
        return None
    votes = any(one.answer is not None for replies in kept for one in replies)
    ways: dict[Way, Callable[[Sequence[Candidate], int], float]] = {
        "score": _by_score,
        "first": lambda replies, n: sum(one.right for one in replies) / len(replies),
        "oracle": lambda replies, n: 1 - _none_of(sum(one.right for one in replies), len(replies), n),
    }
    curve = []
    for n in (2**k for k in range(most.bit_length())):
        row: dict[str, Any] = {"n": n, "problems": len(kept), "majority": None}
        rng = random.Random(f"vote {seed} {n}")
        shares = {name: [way(replies, n) for replies in kept] for name, way in ways.items()}
        if votes:
            shares["majority"] = [_by_vote(replies, n, rng) for replies in kept]
        curve.append(row | {name: _mean(values, seed) for name, values in shares.items()})
    return curve


def _by_score(replies: Sequence[Candidate], n: int) -> float:
    """The probability that the best-scored of n drawn replies is right; of several best ones, one at random."""
    by_score: dict[float, list[bool]] = {}
    for one in replies:
        by_score.setdefault(one.score, []).append(one.right)
    found, below, ways = 0.0, 0, math.comb(len(replies), n)
    for score in sorted(by_score):
        right = by_score[score]
        upto = below + len(right)
        found += (math.comb(upto, n) - math.comb(below, n)) / ways * (sum(right) / len(right))
        below = upto
    return found


def _none_of(marked: int, count: int, n: int) -> float:
    """The probability that n of ``count`` drawn have none of the marked."""
    return math.comb(count - marked, n) / math.comb(count, n)


def _by_vote(replies: Sequence[Candidate], n: int, rng: random.Random, draws: int = 100) -> float:
    rights = {one.answer for one in replies if one.right}
    found = 0.0
    for _ in range(1 if n == len(replies) else draws):
        votes = Counter(one.answer for one in rng.sample(list(replies), n) if one.answer is not None)
        top = [answer for answer, count in votes.items() if count == max(votes.values())]
        found += sum(answer in rights for answer in top) / len(top) if top else 0.0
    return found / (1 if n == len(replies) else draws)


def _mean(values: Sequence[float], seed: int) -> Estimate:
    rows = np.array([[value, 1.0] for value in values])
    return _estimate(
        math.fsum(values) / len(values), bootstrap_interval(rows, lambda sums: sums[:, 0] / sums[:, 1], RESAMPLES, seed)
    )


def _estimate(value: float, interval: tuple[float, float] | None) -> Estimate:
    low, high = interval or (None, None)
    return [value, low, high]
