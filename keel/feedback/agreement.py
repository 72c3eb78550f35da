"""How far annotators agree.

A figure that is not defined (no item was judged twice, chance agreement is 1) is None, never 0 or NaN. Intervals are
percentile bootstraps over items (``keel.stats.bootstrap_interval``): votes on one item belong together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from keel.stats import bootstrap_interval
from keel.store import Judgement
from keel.store.sides import in_store

FIRST, SECOND, TIE = "first", "second", "tie"
MIRROR = {FIRST: SECOND, SECOND: FIRST, TIE: TIE}  # which response was stored first means nothing

Votes = Mapping[int, Sequence[str]]  # item -> its votes


@dataclass(frozen=True, slots=True)
class Label:
    """One annotator's label of one item."""

    item: Hashable
    annotator: str
    label: str


@dataclass(frozen=True, slots=True)
class Agreement:
    """``point``: a share in [0, 1], or a coefficient that is 1 for perfect agreement and 0 for chance; ``interval``:
    its 95% bootstrap interval, None with fewer than 2 items; ``items``: how many items it rests on."""

    point: float
    interval: tuple[float, float] | None
    items: int


def named_votes(judgements: Iterable[Judgement]) -> list[Label]:
    """FIRST for the response that was stored first, whatever side it was shown on, SECOND for the other one, or TIE.
    Both bad is a tie: it prefers neither."""
    return [
        Label(vote.item_id, vote.annotator, in_store(vote.choice, (vote.left.id, vote.right.id))) for vote in judgements
    ]


def votes_by_item(judgements: Iterable[Judgement]) -> dict[int, list[str]]:
    """Each item's votes (``named_votes``) in the order of their annotators' names."""
    items: dict[int, list[tuple[str, str]]] = {}
    judgements = list(judgements)
    for judgement, vote in zip(judgements, named_votes(judgements), strict=True):
        items.setdefault(judgement.item_id, []).append((vote.annotator, vote.label))
    return {item: [label for _, label in sorted(named, key=lambda pair: pair[0])] for item, named in items.items()}


def vote_pairs(votes: Votes, ties: bool = False) -> list[tuple[str, str]]:
    """Every pair of votes on one item. ``ties``: whether a tie is a vote of its own, which agrees with a tie alone;
    else ties are left out before pairing."""
    return [pair for item in sorted(votes) for pair in combinations(_kept(votes[item], ties), 2)]


def raw_agreement(votes: Votes, ties: bool = False, bootstrap: int = 2000, seed: int = 0) -> Agreement | None:
    """The share of pairs of votes on one item that are equal, each item weighing the same however often it was judged:
    the mean over items with two votes or more of (equal pairs / pairs). ``ties`` as in ``vote_pairs``. None when no
    item has two votes."""
    kinds = (FIRST, SECOND, TIE) if ties else (FIRST, SECOND)
    counts = [[list(said).count(kind) for kind in kinds] for said in votes.values()]
    return agreement_of_counts(np.array(counts).reshape(-1, len(kinds)), bootstrap, seed)


def agreement_of_counts(counts_IK: np.ndarray, bootstrap: int = 2000, seed: int = 0) -> Agreement | None:
    """`raw_agreement` of items of which it is known how often each of K things was said."""
    counts_DK, times_D = np.unique(counts_IK, axis=0, return_counts=True)
    total_D = counts_DK.sum(axis=1)
    counts_DK, times_D, total_D = (x[total_D > 1] for x in (counts_DK, times_D, total_D))
    share_D = (counts_DK * (counts_DK - 1)).sum(axis=1) / (total_D * (total_D - 1))
    rows_DF = np.stack([share_D, np.ones(len(share_D))], axis=1)
    return _estimate(rows_DF, lambda sums: sums[:, 0] / sums[:, 1], times_D, bootstrap, seed)


def cohens_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa (1960): (p_o - p_e) / (1 - p_e) for pairs of labels by a first and a second rater on the same
    things. p_o: share of equal pairs; p_e: the share expected if each rater gave labels at their own rates by chance.
    None without pairs, and when p_e is 1 (both raters always gave one and the same label)."""
    labels = sorted({label for pair in pairs for label in pair})
    counts = Counter(pairs)
    return kappa_of_counts(np.array([[counts[a, b] for b in labels] for a in labels]))


def kappa_of_counts(counts_KK: np.ndarray) -> float | None:
    """`cohens_kappa` of how often each pair of K labels was given."""
    n = int(counts_KK.sum())
    first_K, second_K = counts_KK.sum(axis=-1), counts_KK.sum(axis=0)
    expected = float(first_K @ second_K) / n**2 if n else 1.0
    if not n or (np.count_nonzero(first_K) == 1 and expected == 1):
        return None
    return float((np.trace(counts_KK) / n - expected) / (1 - expected))


def _estimate(
    rows_DF: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], times_D: np.ndarray, bootstrap: int, seed: int
) -> Agreement | None:
    """The figure of the sum of all rows, each as often as it is there, with its interval; None where it is not
    defined."""
    items = int(times_D.sum())
    if not items:
        return None
    point = float(statistic((times_D @ rows_DF)[None])[0])
    if not np.isfinite(point):
        return None
    return Agreement(point, bootstrap_interval(rows_DF, statistic, bootstrap, seed, times_N=times_D), items)


def _kept(votes: Sequence[str], ties: bool) -> list[str]:
    return [vote for vote in votes if ties or vote != TIE]
