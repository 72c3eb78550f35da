"""Which comparisons are worth asking: those on which an ensemble of reward models disagrees.

A model may be undecided about a pair because people are (their votes would teach nothing) or because it has seen too
little. Members of an ensemble, trained on the same votes from different seeds (Lakshminarayanan et al. 2017,
arXiv:1612.01474), agree in the first case and differ in the second.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from statistics import geometric_mean

import numpy as np

from keel.reward.ensemble import Candidate, leads
from keel.reward.scorer import RewardModelScorer


def disagreement(
    scorers: Sequence[RewardModelScorer], temperatures: Sequence[float], pairs: Sequence[Candidate]
) -> list[float]:
    """:func:`bald` of each pair under an ensemble of reward models. ``temperatures``: what fits each member's held-out
    votes. Their geometric mean serves all, so that an overconfident member does not dominate."""
    gains: list[float] = bald(leads(scorers, pairs, geometric_mean(temperatures))).tolist()
    return gains


def bald(leads_MN: np.ndarray) -> np.ndarray:
    """How much a vote on each pair would tell about the model, in nats [N]: 0 where the members agree, at most ln 2.

    leads_MN: each member's logit that the first response of each pair is preferred. With p the members' probabilities,
    H(mean p) - mean H(p): the mutual information between a vote and the model (BALD; Houlsby et al. 2011,
    arXiv:1112.5745, eq. 2, the posterior replaced by the ensemble).
    """
    assert leads_MN.ndim == 2, "a row a member"
    leads_MN = np.asarray(leads_MN, dtype=np.float64)
    yes_MN, no_MN = -np.logaddexp(0, -leads_MN), -np.logaddexp(0, leads_MN)  # logarithms: certain members stay finite
    members = len(leads_MN)
    mean_yes_N = np.logaddexp.reduce(yes_MN, axis=0) - np.log(members)
    mean_no_N = np.logaddexp.reduce(no_MN, axis=0) - np.log(members)
    gain_N = _entropy(mean_yes_N, mean_no_N) - _entropy(yes_MN, no_MN).mean(axis=0)
    return np.asarray(np.maximum(gain_N, 0.0))  # Jensen's inequality, but for rounding


def _entropy(log_yes: np.ndarray, log_no: np.ndarray) -> np.ndarray:
    return np.asarray(-np.exp(log_yes) * log_yes - np.exp(log_no) * log_no)


def best_first(gains: Sequence[float], groups: Sequence[Hashable], per_group: int, count: int | None) -> list[int]:
    """The places of the ``count`` (None: of all) greatest gains, greatest first, with at most ``per_group`` of one
    group: pairs of one prompt tell much of the same. Of equal gains the earlier one comes first."""
    taken: dict[Hashable, int] = {}
    chosen: list[int] = []
    for place in sorted(range(len(gains)), key=lambda i: -gains[i]):
        group = groups[place]
        if taken.get(group, 0) < per_group and (count is None or len(chosen) < count):
            taken[group] = taken.get(group, 0) + 1
            chosen.append(place)
    return chosen
