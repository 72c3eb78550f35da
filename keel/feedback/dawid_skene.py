"""Annotator reliability by Dawid & Skene's model, without knowing a single right answer.

A. P. Dawid and A. M. Skene, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm", Applied
Statistics 28 (1979), 20-28. An item has a true class, and an annotator who meets class j says l with a probability
pi_jl of their own; given the class, annotators err independently. Classes, error rates and the classes' prevalence are
found together by EM.

On comparisons the classes are FIRST and SECOND, or these and TIE. Which response was stored first means nothing, so
there the model is made to say the same when all items are turned round (``mirror``).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keel.feedback.agreement import FIRST, MIRROR, SECOND, TIE, Agreement, Label
from keel.stats import percentiles

TINY = 1e-300  # stands for a probability of 0 where a logarithm is taken
TOLERANCE = 1e-7  # largest change of a class probability at which EM has settled
ITERATIONS = 2000


@dataclass(frozen=True, slots=True)
class DawidSkene:
    """What the fit found. ``prior``: each class's prevalence [K]. ``errors``: by annotator, [K, K]: row the true class,
    column what was said, rows sum to 1. ``posterior``: by item, the probability of each class [K]."""

    classes: tuple[str, ...]
    prior: np.ndarray
    errors: Mapping[str, np.ndarray]
    posterior: Mapping[Hashable, np.ndarray]
    log_likelihood: float


@dataclass(frozen=True, slots=True)
class _Coded:
    """Votes as numbers: item, annotator and label of each of V votes, and the names behind them."""

    item_V: np.ndarray
    annotator_V: np.ndarray
    label_V: np.ndarray
    items: list[Hashable]
    annotators: list[str]
    classes: tuple[str, ...]
    known_I: np.ndarray  # class where it is known, else -1
    turned_K: np.ndarray  # each class's mirror image, or itself


def dawid_skene(
    votes: Sequence[Label],
    known: Mapping[Any, str] | None = None,
    mirror: Mapping[str, str] | None = None,
    shrink: float = 0.0,
) -> DawidSkene:
    """Fits the model to ``votes``; an annotator may label an item several times.

    ``known``: the true class of gold items. ``mirror``: classes that exchange places when items are turned round.
    ``shrink``: each annotator's error rates are drawn towards those of all with the weight of this many votes a class;
    0 is the paper's maximum likelihood, which calls somebody with a single vote perfect. EM begins with each item's
    share of votes (the paper's eq. 3.1), so the solution found is the one near the majority.
    """
    coded = _coded(votes, known or {}, mirror or {})
    prior_K, errors_AKK, posterior_IK, likelihood_I = _em(coded, _shares(coded), np.ones(len(coded.items)), shrink)
    return DawidSkene(
        coded.classes,
        prior_K,
        dict(zip(coded.annotators, errors_AKK, strict=True)),
        dict(zip(coded.items, posterior_IK, strict=True)),
        float(np.log(np.maximum(likelihood_I, TINY)).sum()),
    )


def reliabilities(
    votes: Sequence[Label],
    known: Mapping[Any, str] | None = None,
    shrink: float = 1.0,
    bootstrap: int = 200,
    seed: int = 0,
) -> dict[str, Agreement]:
    """By annotator, the probability that a decided vote on a comparison is for the truly better response: 1 always, 1/2
    a coin, below it against the others. Ties are left out. Interval: the bootstrap over items.

    Only items with two decided votes, or whose answer is known, tell annotators apart; ``Agreement.items`` counts the
    annotator's. One who has none stands where all do together, with a wide interval at best. Empty when there is no
    such item at all.
    """
    decided = [vote for vote in votes if vote.label != TIE]
    items = {item: n for n, item in enumerate(dict.fromkeys(vote.item for vote in decided))}
    annotators = sorted({vote.annotator for vote in votes})
    place = {name: n for n, name in enumerate(annotators)}
    answers = {items[item]: answer for item, answer in (known or {}).items() if item in items and answer != TIE}
    known_I = np.full(len(items), -1)
    known_I[list(answers)] = [answer == SECOND for answer in answers.values()]
    return reliabilities_of(
        np.array([items[vote.item] for vote in decided], dtype=np.int64),
        np.array([place[vote.annotator] for vote in decided], dtype=np.int64),
        np.array([vote.label == SECOND for vote in decided], dtype=np.int64),
        known_I,
        annotators,
        shrink,
        bootstrap,
        seed,
    )


def reliabilities_of(
    item_V: np.ndarray,
    annotator_V: np.ndarray,
    second_V: np.ndarray,
    known_I: np.ndarray,
    annotators: Sequence[str],
    shrink: float = 1.0,
    bootstrap: int = 200,
    seed: int = 0,
) -> dict[str, Agreement]:
    """`reliabilities` of V decided votes as numbers: which of I items, which of the ``annotators``, and whether SECOND.
    ``known_I``: 0 for FIRST, 1 for SECOND, -1 where the answer is not known."""
    telling_V = (np.bincount(item_V, minlength=len(known_I)) > 1)[item_V] | (known_I[item_V] >= 0)
    if not telling_V.any():
        return {}
    coded, weight_I = _alike_together(
        item_V[telling_V], annotator_V[telling_V], second_V[telling_V], known_I, annotators
    )
    _, errors_AKK, posterior_IK, _ = _em(coded, _shares(coded), weight_I, shrink)
    rng = np.random.default_rng(seed)
    draws_RA = np.empty((bootstrap, len(coded.annotators)))
    for draw_A in draws_RA:
        weights = rng.multinomial(int(weight_I.sum()), weight_I / weight_I.sum()).astype(np.float64)
        draw_A[:] = _em(coded, posterior_IK, weights, shrink, tolerance=1e-4)[1][:, 0, 0]
    everyone = Agreement(float(_pooled(coded, posterior_IK, weight_I)[0, 0]), None, 0)
    found = dict.fromkeys(annotators, everyone)
    items = np.bincount(coded.annotator_V, weight_I[coded.item_V], len(coded.annotators))
    for place, name in enumerate(coded.annotators):
        found[name] = Agreement(float(errors_AKK[place, 0, 0]), percentiles(draws_RA[:, place]), int(items[place]))
    return found


def posteriors(
    votes: Sequence[Label], known: Mapping[Any, str] | None = None, shrink: float = 1.0
) -> dict[Hashable, dict[str, float]]:
    """By item, the probability of each class: that FIRST or SECOND is the better response or, where somebody said so,
    that neither is (TIE).

    Prevalences and error rates are those of the items with two votes or a known answer, as in `reliabilities`: an item
    with a single vote says nothing of who errs, and counted as it stands it makes its annotator look right. Then every
    item is classified by them (eq. 2.5), one that nobody else judged too. Whoever has no telling item errs as all do
    together. Empty when there is no telling item.
    """
    answers = dict(known or {})
    times: dict[Hashable, int] = {}
    for vote in votes:
        times[vote.item] = times.get(vote.item, 0) + 1
    telling = [vote for vote in votes if times[vote.item] > 1 or vote.item in answers]
    if not telling:
        return {}
    ties = TIE in answers.values() or any(vote.label == TIE for vote in votes)
    classes = (FIRST, SECOND, TIE) if ties else (FIRST, SECOND)
    fit = _coded(telling, answers, MIRROR, classes)
    weight_I = np.ones(len(fit.items))
    prior_K, errors_AKK, posterior_IK, _ = _em(fit, _shares(fit), weight_I, shrink)
    own = dict(zip(fit.annotators, errors_AKK, strict=True))
    everyone_KK = _pooled(fit, posterior_IK, weight_I)
    coded = _coded(votes, answers, MIRROR, classes)
    errors_AKK = np.stack([own.get(name, everyone_KK) for name in coded.annotators])
    posterior_IK, _ = _classify(coded, prior_K, errors_AKK)
    return {
        item: dict(zip(classes, row, strict=True)) for item, row in zip(coded.items, posterior_IK.tolist(), strict=True)
    }


def _alike_together(
    item_V: np.ndarray, annotator_V: np.ndarray, second_V: np.ndarray, known_I: np.ndarray, annotators: Sequence[str]
) -> tuple[_Coded, np.ndarray]:
    """Comparisons on which the same annotators said the same, or all of it the other way round, as one item, and how
    many there are of each [I]: the model can't tell them apart, and EM costs what the different ones cost.

    Items are alike when the sums of random numbers that stand for their votes are: that two others have one sum in
    2^64 is likelier to be a fault of the machine."""
    first_I = np.full(len(known_I), np.iinfo(np.int64).max)
    np.minimum.at(first_I, item_V, 2 * annotator_V + second_V)
    turn_I = first_I % 2
    said_V = second_V ^ turn_I[item_V]
    answer_I = np.where(known_I >= 0, known_I ^ turn_I, known_I)
    drawn = np.random.default_rng(0).integers(2**64, size=2 * len(annotators) + 3, dtype=np.uint64)
    sum_I = drawn[answer_I]  # -1, 0, 1: the last, the first, the second
    np.add.at(sum_I, item_V, drawn[2 + 2 * annotator_V + said_V])
    there_I = np.bincount(item_V, minlength=len(known_I)) > 0
    items_I = np.flatnonzero(there_I)[np.argsort(_first_places(item_V), kind="stable")]
    _, of_D, times_D = np.unique(sum_I[items_I], return_index=True, return_counts=True)
    order_D = np.argsort(of_D)  # as they come
    kept_D = items_I[of_D[order_D]]
    place_I = np.full(len(known_I), -1)
    place_I[kept_D] = np.arange(len(kept_D))
    kept_V = place_I[item_V] >= 0
    present, annotator_K = np.unique(annotator_V[kept_V], return_inverse=True)
    coded = _Coded(
        place_I[item_V[kept_V]],
        annotator_K.ravel(),
        said_V[kept_V],
        list(range(len(kept_D))),
        [annotators[n] for n in present],
        (FIRST, SECOND),
        answer_I[kept_D],
        np.array([1, 0]),
    )
    return coded, times_D[order_D].astype(np.float64)


def _first_places(item_V: np.ndarray) -> np.ndarray:
    """Where each of the items that are there comes first, in the order of their numbers."""
    return np.unique(item_V, return_index=True)[1]


def _coded(
    votes: Sequence[Label], known: Mapping[Any, str], mirror: Mapping[str, str], classes: tuple[str, ...] = ()
) -> _Coded:
    assert votes, "a fit needs votes"
    items = list(dict.fromkeys(vote.item for vote in votes))
    annotators = sorted({vote.annotator for vote in votes})
    classes = classes or tuple(sorted({vote.label for vote in votes} | set(known.values())))
    item_at, annotator_at, class_at = ({x: i for i, x in enumerate(xs)} for xs in (items, annotators, classes))
    return _Coded(
        np.array([item_at[vote.item] for vote in votes]),
        np.array([annotator_at[vote.annotator] for vote in votes]),
        np.array([class_at[vote.label] for vote in votes]),
        items,
        annotators,
        classes,
        np.array([class_at[known[item]] if item in known else -1 for item in items]),
        np.array([class_at[mirror.get(label, label)] for label in classes]),
    )


def _shares(coded: _Coded) -> np.ndarray:
    """The share of each item's votes that each class has [I, K]."""
    counts_IK = np.zeros((len(coded.items), len(coded.classes)))
    np.add.at(counts_IK, (coded.item_V, coded.label_V), 1.0)
    return counts_IK / counts_IK.sum(axis=1, keepdims=True)


def _em(
    coded: _Coded, posterior_IK: np.ndarray, weight_I: np.ndarray, shrink: float, tolerance: float = TOLERANCE
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(prior [K], errors [A, K, K], posterior [I, K], likelihood of each item [I]) after EM from ``posterior_IK``, each
    item counting ``weight_I`` times."""
    posterior_IK = _with_known(coded, posterior_IK)
    for _ in range(ITERATIONS):
        weighted_IK = posterior_IK * weight_I[:, None]
        prior_K = weighted_IK.sum(axis=0) / weight_I.sum()  # eq. 2.4
        prior_K = (prior_K + prior_K[coded.turned_K]) / 2
        counts_AKK = _counts(coded, weighted_IK)  # eq. 2.3
        counts_AKK += shrink * _rates(counts_AKK.sum(axis=0))
        errors_AKK = _rates(counts_AKK)
        before_IK = posterior_IK
        posterior_IK, likelihood_I = _classify(coded, prior_K, errors_AKK)
        if np.abs(posterior_IK - before_IK)[weight_I > 0].max() < tolerance:
            break
    return prior_K, errors_AKK, posterior_IK, likelihood_I


def _counts(coded: _Coded, weighted_IK: np.ndarray) -> np.ndarray:
    """How often each annotator said l of items of class j [A, K, K], by the items' probabilities of being it."""
    a, k = len(coded.annotators), len(coded.classes)
    place_V = coded.annotator_V * k + coded.label_V
    by_class = [np.bincount(place_V, weighted_IK[coded.item_V, j], a * k).reshape(a, k) for j in range(k)]
    counts_AKK = np.stack(by_class, axis=1)
    turned = coded.turned_K
    return (counts_AKK + counts_AKK[:, turned][:, :, turned]) / 2


def _pooled(coded: _Coded, posterior_IK: np.ndarray, weight_I: np.ndarray) -> np.ndarray:
    """The error rates of all annotators together [K, K]."""
    return _rates(_counts(coded, posterior_IK * weight_I[:, None]).sum(axis=0))


def _rates(counts: np.ndarray) -> np.ndarray:
    """Rows that sum to 1; a row without any count is the same for all."""
    total = counts.sum(axis=-1, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, TINY), 1 / counts.shape[-1])


def _classify(coded: _Coded, prior_K: np.ndarray, errors_AKK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(posterior [I, K], likelihood [I]) of the items: eqs. 2.5 and 2.6."""
    log_AKK = np.log(np.maximum(errors_AKK, TINY))
    log_IK = np.tile(np.log(np.maximum(prior_K, TINY)), (len(coded.items), 1))
    for j in range(len(coded.classes)):
        log_V = log_AKK[coded.annotator_V, j, coded.label_V]
        log_IK[:, j] += np.bincount(coded.item_V, log_V, len(coded.items))
    top_I = log_IK.max(axis=1)
    joint_IK = np.exp(log_IK - top_I[:, None])
    sum_I = joint_IK.sum(axis=1)
    return _with_known(coded, joint_IK / sum_I[:, None]), np.exp(top_I) * sum_I


def _with_known(coded: _Coded, posterior_IK: np.ndarray) -> np.ndarray:
    gold = coded.known_I >= 0
    if not gold.any():
        return posterior_IK
    return np.where(gold[:, None], np.eye(len(coded.classes))[np.maximum(coded.known_I, 0)], posterior_IK)


# One whose reliability is, with 95% confidence, below that of most others by this much is worth a look.
NOTABLE = 0.1


def unreliable(reliable: Mapping[str, Agreement], notable: float = NOTABLE) -> set[str]:
    """Whose whole interval lies ``notable`` or more below the median of those that there is something to tell by."""
    known = [one.point for one in reliable.values() if one.items]
    return {
        name
        for name, one in reliable.items()
        if one.interval is not None and one.interval[1] < float(np.median(known)) - notable
    }
