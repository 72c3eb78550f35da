"""Scores of responses and reliabilities of annotators from the same comparisons: Crowd-BT.

X. Chen, P. N. Bennett, K. Collins-Thompson and E. Horvitz, "Pairwise Ranking Aggregation in a Crowdsourced Setting"
(WSDM 2013). Responses have scores s, and the truth of a pair is Bradley-Terry's; annotator k says it with probability
eta_k and the opposite with 1 - eta_k:

    P(k prefers a to b) = eta_k sigmoid(s_a - s_b) + (1 - eta_k) sigmoid(s_b - s_a)          (their eq. 6)

eta_k = 1 is an honest annotator, 1/2 a coin, 0 one who always says the opposite. Unlike in Dawid & Skene's model a
pair of nearly equal responses costs an annotator nothing, and annotators who never judged the same pair are compared
through the responses they share.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from keel.feedback.agreement import Agreement
from keel.stats import percentiles

TOLERANCE = 1e-6  # largest change of a score or a reliability at which the fit has settled
ITERATIONS = 10_000


@dataclass(frozen=True, slots=True)
class Comparison:
    """One decided vote: ``winner`` and ``loser`` name responses."""

    annotator: str
    winner: Hashable
    loser: Hashable


@dataclass(frozen=True, slots=True)
class CrowdBT:
    """``scores``: by response; 0 is the virtual response's. ``eta``: by annotator, with its bootstrap interval when one
    was asked for; ``items`` counts the annotator's votes. ``objective``: the log-likelihood less the penalty."""

    scores: Mapping[Hashable, float]
    eta: Mapping[str, Agreement]
    objective: float


@dataclass(frozen=True, slots=True)
class _Coded:
    annotator_V: np.ndarray
    winner_V: np.ndarray
    loser_V: np.ndarray
    annotators: list[str]
    responses: Sequence[Hashable]
    pair_V: np.ndarray  # which pair of responses a vote is about
    pairs: int


def crowd_bt(
    comparisons: Sequence[Comparison],
    penalty: float = 0.1,
    prior: tuple[float, float] = (1.0, 1.0),
    bootstrap: int = 0,
    seed: int = 0,
) -> CrowdBT:
    """Maximises the penalised log-likelihood by EM. The latent variable is whether a vote says the truth or its
    opposite; scores take one step a round along a bound of the likelihood, so no round makes it smaller.

    ``penalty`` is their lambda (section 3.2): a virtual response of score 0 that each response is preferred to, and
    not preferred to, that many times. It keeps scores finite and settles where zero is. ``prior``: the parameters of
    a Beta distribution of eta, (1, 1) being none. Votes start as honest, so of the solution and its mirror image
    (scores and annotators all turned round) the one is found where the most are. ``bootstrap``: resamples of the pairs
    for the intervals.
    """
    assert comparisons, "a fit needs votes"
    coded = _coded(comparisons)
    scores_N, eta_A, eta = _fitted(coded, penalty, prior, bootstrap, seed)
    scores = dict(zip(coded.responses, scores_N.tolist(), strict=True))
    return CrowdBT(scores, eta, _objective(coded, scores_N, eta_A, penalty, prior))


def etas_of(
    annotator_V: np.ndarray,
    winner_V: np.ndarray,
    loser_V: np.ndarray,
    annotators: Sequence[str],
    bootstrap: int = 0,
    seed: int = 0,
) -> Mapping[str, Agreement]:
    """`CrowdBT.eta` of V decided votes as numbers: which of the ``annotators``, which response won, and which lost."""
    responses, of_2V = np.unique(np.concatenate([winner_V, loser_V]), return_inverse=True)
    winner_V, loser_V = of_2V.ravel().reshape(2, -1)
    present, annotator_V = np.unique(annotator_V, return_inverse=True)
    names = [annotators[n] for n in present]
    coded = _paired(annotator_V.ravel(), winner_V, loser_V, names, range(len(responses)))
    return _fitted(coded, 0.1, (1.0, 1.0), bootstrap, seed)[2]


def _fitted(
    coded: _Coded, penalty: float, prior: tuple[float, float], bootstrap: int, seed: int
) -> tuple[np.ndarray, np.ndarray, Mapping[str, Agreement]]:
    """Scores [N], reliabilities [A], and these by name with their intervals."""
    start = np.zeros(len(coded.responses)), np.full(len(coded.annotators), 0.9)
    weight_V = np.ones(len(coded.winner_V))
    scores_N, eta_A = _fit(coded, weight_V, *start, penalty, prior)
    rng = np.random.default_rng(seed)
    draws_RA = np.empty((bootstrap, len(eta_A)))
    for draw_A in draws_RA:
        drawn = rng.multinomial(coded.pairs, np.full(coded.pairs, 1 / coded.pairs)).astype(np.float64)
        draw_A[:] = _fit(coded, drawn[coded.pair_V], scores_N, eta_A, penalty, prior, tolerance=1e-3)[1]
    votes = np.bincount(coded.annotator_V)
    eta = {
        name: Agreement(float(eta_A[k]), percentiles(draws_RA[:, k]) if bootstrap else None, int(votes[k]))
        for k, name in enumerate(coded.annotators)
    }
    return scores_N, eta_A, eta


def _coded(comparisons: Sequence[Comparison]) -> _Coded:
    annotators = sorted({c.annotator for c in comparisons})
    responses = list(dict.fromkeys(r for c in comparisons for r in (c.winner, c.loser)))
    annotator_at, response_at = ({x: i for i, x in enumerate(xs)} for xs in (annotators, responses))
    winner_V = np.array([response_at[c.winner] for c in comparisons])
    loser_V = np.array([response_at[c.loser] for c in comparisons])
    return _paired(np.array([annotator_at[c.annotator] for c in comparisons]), winner_V, loser_V, annotators, responses)


def _paired(
    annotator_V: np.ndarray,
    winner_V: np.ndarray,
    loser_V: np.ndarray,
    annotators: list[str],
    responses: Sequence[Hashable],
) -> _Coded:
    key_V = np.minimum(winner_V, loser_V) * len(responses) + np.maximum(winner_V, loser_V)
    pairs, pair_V = np.unique(key_V, return_inverse=True)
    return _Coded(annotator_V, winner_V, loser_V, annotators, responses, pair_V.ravel(), len(pairs))


def _fit(
    coded: _Coded,
    weight_V: np.ndarray,
    scores_N: np.ndarray,
    eta_A: np.ndarray,
    penalty: float,
    prior: tuple[float, float],
    tolerance: float = TOLERANCE,
) -> tuple[np.ndarray, np.ndarray]:
    n, k = len(scores_N), len(eta_A)
    # sigmoid's slope is at most 1/4, and a vote moves two scores: half a vote's weight bounds the curvature of each
    touched_N = np.bincount(coded.winner_V, weight_V, n) + np.bincount(coded.loser_V, weight_V, n)
    curvature_N = touched_N / 2 + penalty / 2 + 1e-12
    votes_A = np.bincount(coded.annotator_V, weight_V, k)
    a, b = prior
    for _ in range(ITERATIONS):
        right_V = _sigmoid(scores_N[coded.winner_V] - scores_N[coded.loser_V])
        true_V = eta_A[coded.annotator_V] * right_V
        honest_V = true_V / (true_V + (1 - eta_A[coded.annotator_V]) * (1 - right_V))
        said_A = np.bincount(coded.annotator_V, weight_V * honest_V, k)
        new_eta_A = (said_A + a - 1) / np.maximum(votes_A + a + b - 2, 1e-12)
        new_eta_A = np.clip(np.where(votes_A + a + b - 2 > 0, new_eta_A, eta_A), 1e-9, 1 - 1e-9)
        pull_V = weight_V * (honest_V - right_V)
        slope_N = np.bincount(coded.winner_V, pull_V, n) - np.bincount(coded.loser_V, pull_V, n)
        step_N = (slope_N + penalty * (1 - 2 * _sigmoid(scores_N))) / curvature_N
        change = max(float(np.abs(step_N).max()), float(np.abs(new_eta_A - eta_A).max()))
        scores_N, eta_A = scores_N + step_N, new_eta_A
        if change < tolerance:
            break
    return scores_N, eta_A


def _objective(
    coded: _Coded, scores_N: np.ndarray, eta_A: np.ndarray, penalty: float, prior: tuple[float, float]
) -> float:
    right_V = _sigmoid(scores_N[coded.winner_V] - scores_N[coded.loser_V])
    eta_V = eta_A[coded.annotator_V]
    fit = np.log(eta_V * right_V + (1 - eta_V) * (1 - right_V)).sum()
    held = penalty * (np.log(_sigmoid(scores_N)) + np.log(_sigmoid(-scores_N))).sum()
    believed = ((prior[0] - 1) * np.log(eta_A) + (prior[1] - 1) * np.log(1 - eta_A)).sum()
    return float(fit + held + believed)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))
