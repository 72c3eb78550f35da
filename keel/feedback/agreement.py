"""How far annotators agree, and what that leaves for a reward model to reach.

A figure that is not defined (no item was judged twice, chance agreement is 1) is None, never 0 or NaN.

With q the probability that an annotator prefers the first of a pair (no ties):

    two annotators agree            E[q^2 + (1-q)^2]
    the best predictor of one vote  E[max(q, 1-q)]      the noise ceiling of a reward model's accuracy

Both take a vote's annotator to be drawn at random for each vote, so they hold for a large population.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from keel.store import Judgement

FIRST, SECOND, TIE = "first", "second", "tie"

Votes = Mapping[int, Sequence[str]]  # item -> its votes


@dataclass(frozen=True, slots=True)
class Agreement:
    """``point``: a share in [0, 1]; ``interval``: its 95% bootstrap interval, None with fewer than 2 items;
    ``items``: how many items it rests on."""

    point: float
    interval: tuple[float, float] | None
    items: int


def votes_by_item(judgements: Iterable[Judgement]) -> dict[int, list[str]]:
    """Each item's votes in the order of their annotators' names: FIRST for the response that was stored first,
    whatever side it was shown on, SECOND for the other one, or TIE. Both bad is a tie: it prefers neither."""
    votes: dict[int, list[tuple[str, str]]] = {}
    for judgement in judgements:
        preferred = judgement.preferred
        if preferred is None:
            vote = TIE
        else:
            vote = FIRST if preferred.id == min(judgement.left.id, judgement.right.id) else SECOND
        votes.setdefault(judgement.item_id, []).append((judgement.annotator, vote))
    return {item: [vote for _, vote in sorted(named, key=lambda pair: pair[0])] for item, named in votes.items()}


def vote_pairs(votes: Votes, ties: bool = False) -> list[tuple[str, str]]:
    """Every pair of votes on one item. ``ties``: whether a tie is a vote of its own, which agrees with a tie alone;
    else ties are left out before pairing, as the formulas above have none."""
    return [pair for item in sorted(votes) for pair in combinations(_kept(votes[item], ties), 2)]


def raw_agreement(votes: Votes, ties: bool = False, bootstrap: int = 2000, seed: int = 0) -> Agreement | None:
    """The share of pairs of votes on one item that are equal, each item weighing the same however often it was judged:
    the mean over items with two votes or more of (equal pairs / pairs). ``ties`` as in ``vote_pairs``.

    The interval is the percentile bootstrap over items (Efron & Tibshirani 1993, ch. 13): votes on one item belong
    together. None when no item has two votes.
    """
    shares = []
    for item in sorted(votes):
        pairs = list(combinations(_kept(votes[item], ties), 2))
        if pairs:
            shares.append(sum(first == second for first, second in pairs) / len(pairs))
    if not shares:
        return None
    interval = None
    if len(shares) > 1:
        rng = np.random.default_rng(seed)
        values = np.asarray(shares)
        means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(bootstrap)]
        low, high = np.percentile(means, [2.5, 97.5])
        interval = (float(low), float(high))
    return Agreement(sum(shares) / len(shares), interval, len(shares))


def cohens_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa (1960): (p_o - p_e) / (1 - p_e) for pairs of labels by a first and a second rater on the same
    things. p_o: share of equal pairs; p_e: the share expected if each rater gave labels at their own rates by chance.
    None without pairs, and when p_e is 1 (both raters always gave one and the same label)."""
    if not pairs:
        return None
    n = len(pairs)
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    if len(first) == 1 and first.keys() == second.keys():
        return None
    observed = sum(a == b for a, b in pairs) / n
    expected = sum(count * second[label] for label, count in first.items()) / n**2
    return (observed - expected) / (1 - expected)


def expected_agreement(probabilities: Sequence[float]) -> float | None:
    """E[q^2 + (1-q)^2] over pairs with the population's preference q; None for none."""
    return sum(q * q + (1 - q) * (1 - q) for q in probabilities) / len(probabilities) if probabilities else None


def ceiling(probabilities: Sequence[float]) -> float | None:
    """E[max(q, 1-q)]: the accuracy on single votes of a model that knows every q; None for none."""
    return sum(max(q, 1 - q) for q in probabilities) / len(probabilities) if probabilities else None


def _kept(votes: Sequence[str], ties: bool) -> list[str]:
    return [vote for vote in votes if ties or vote != TIE]
