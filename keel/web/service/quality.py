"""How far the judgements can be trusted: agreement over time, each annotator's reliability and habits, and who is named
for bad votes. A figure that is not defined is None."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import date

import numpy as np

from keel.feedback.agreement import Agreement, agreement_of_counts, kappa_of_counts
from keel.feedback.krippendorff import alpha_of_counts
from keel.store.vote_columns import EPOCH, FIRST, NONE, SECOND, TIE, VoteColumns
from keel.web.service.reliability import Reliability, reliability

ENOUGH = 20  # votes below which nothing is said of an annotator
HASTY_SECONDS = 2.0
GOLD_LEAST = 0.7
SIDE_MOST = 2.6  # standard errors of a fair coin: 1% of fair annotators are named wrongly


@dataclass(frozen=True, slots=True)
class Day:
    day: date
    votes: int
    annotators: int
    agreement: float | None  # of all votes up to this day's end


@dataclass(frozen=True, slots=True)
class Habits:
    """One annotator. Shares are in [0, 1]; ``left`` and ``longer`` of the votes that are no ties."""

    annotator: str
    kind: str
    votes: int
    with_others: float | None  # share of votes that the majority of the others shares, where they have one
    compared: int  # how many votes that rests on
    gold: float | None
    gold_votes: int
    left: float | None
    longer: float | None
    ties: float | None
    seconds: float | None  # median
    skips: int
    warnings: tuple[str, ...]  # habits worth a look; they name nobody
    reliability: Agreement | None = None  # by Dawid & Skene
    crowd_bt: Agreement | None = None
    reasons: tuple[str, ...] = ()  # why the votes are bad; nothing for most


@dataclass(frozen=True, slots=True)
class Quality:
    """``alpha``: Krippendorff's, of first, second and tie as names; ``graded_alpha``: of what was said with its
    strength, on an ordinal scale. These and kappa say the same whichever response was stored first."""

    agreement: Agreement | None  # ties left out
    agreement_with_ties: Agreement | None
    kappa: float | None
    alpha: Agreement | None
    graded_alpha: Agreement | None
    days: list[Day]
    annotators: list[Habits]
    reliability: Reliability

    @property
    def named(self) -> list[Habits]:
        """Those whose votes are bad."""
        return [one for one in self.annotators if one.reasons]


def quality(votes: VoteColumns, skips: dict[str, int], reliable: Reliability | None = None) -> Quality:
    """``reliable``: worked out before, over most of these votes; by default now, over all of them."""
    reliable = reliability(votes) if reliable is None else reliable
    plain = votes.where(votes.gold_V == NONE)  # gold items are easy by choice
    counts_IK = _counts(plain)
    return Quality(
        agreement_of_counts(counts_IK[:, :TIE], bootstrap=500),
        agreement_of_counts(counts_IK, bootstrap=500),
        _kappa(plain),
        alpha_of_counts(counts_IK[:, [SECOND, TIE, FIRST]], np.array([-1.0, 0.0, 1.0]), "nominal", bootstrap=500),
        _graded_alpha(plain),
        days(votes),
        [_judged(one, reliable) for one in habits(votes, skips)],
        reliable,
    )


def with_reliability(found: Quality, reliable: Reliability) -> Quality:
    """The figures with other reliabilities."""
    return replace(found, annotators=[_judged(one, reliable) for one in found.annotators], reliability=reliable)


def _counts(votes: VoteColumns, values_V: np.ndarray | None = None, size: int = 3) -> np.ndarray:
    """How often each vote (FIRST, SECOND, TIE, or another of ``size`` values) was given, an item a row."""
    items, place_V = np.unique(votes.item_V, return_inverse=True)
    cells = place_V.ravel() * size + (votes.vote_V if values_V is None else values_V)
    return np.bincount(cells, minlength=len(items) * size).reshape(len(items), size)


def _kappa(votes: VoteColumns) -> float | None:
    """Cohen's kappa of all pairs of votes, each counted both ways round: which response was stored first means
    nothing, and chance must not hang on it."""
    order = np.lexsort([votes.annotator_V, votes.item_V])  # of a pair, the first is the first by name
    item_V, vote_V = votes.item_V[order], votes.vote_V[order].astype(np.int64)
    counts_KK = np.zeros((3, 3), dtype=np.int64)
    for step in range(1, len(order)):
        same = item_V[step:] == item_V[:-step]
        if not same.any():
            break
        cells = 3 * vote_V[:-step][same] + vote_V[step:][same]
        counts_KK += np.bincount(cells, minlength=9).reshape(3, 3)
    turned = [SECOND, FIRST, TIE]
    return kappa_of_counts(counts_KK + counts_KK[turned][:, turned])


def _graded_alpha(votes: VoteColumns) -> Agreement | None:
    """Of values: 1 for the first response, -1 for the second, 0 for a tie, times the strength, 1 where there is
    none."""
    side_V = np.array([1.0, -1.0, 0.0])[votes.vote_V]
    value_V = side_V * np.where(np.nan_to_num(votes.strength_V) == 0, 1.0, votes.strength_V) + 0.0  # no -0
    given = np.unique(value_V)
    values = np.union1d(given, -given)
    counts_IV = _counts(votes, np.searchsorted(values, value_V), len(values))
    return alpha_of_counts(counts_IV, values, "ordinal", bootstrap=500)


def _judged(one: Habits, reliable: Reliability) -> Habits:
    return replace(
        one,
        reliability=reliable.dawid_skene.get(one.annotator),
        crowd_bt=reliable.crowd_bt.get(one.annotator),
        reasons=reliable.reasons(one.annotator),
    )


def days(votes: VoteColumns, most: int = 30) -> list[Day]:
    """The last days on which anybody voted, each with the agreement (ties left out) of all votes until then."""
    items, place_V = np.unique(votes.item_V, return_inverse=True)
    counts_IK = np.zeros((len(items), 2), dtype=np.int64)
    share_I = np.full(len(items), np.nan)  # of equal pairs, of items with two votes or more
    found = []
    order = np.argsort(votes.day_V, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(votes.day_V[order])) + 1) if len(order) else ():
        counted = rows[(votes.gold_V[rows] == NONE) & (votes.vote_V[rows] != TIE)]
        here = place_V.ravel()[counted]
        np.add.at(counts_IK, (here, votes.vote_V[counted]), 1)
        touched = np.unique(here)
        counts = counts_IK[touched]
        total = counts.sum(axis=1)
        with np.errstate(invalid="ignore"):
            share_I[touched] = (counts * (counts - 1)).sum(axis=1) / (total * (total - 1))
        known = share_I[np.isfinite(share_I)]
        day = date.fromordinal(EPOCH + int(votes.day_V[rows[0]]))
        people = len(np.unique(votes.annotator_V[rows]))
        found.append(Day(day, len(rows), people, float(known.mean()) if len(known) else None))
    return found[-most:]


def habits(votes: VoteColumns, skips: dict[str, int]) -> list[Habits]:
    """Each annotator's habits, the busiest first."""
    place_V = np.unique(votes.item_V, return_inverse=True)[1]
    others_VK = _counts(votes)[place_V.ravel()]
    others_VK[np.arange(len(votes)), votes.vote_V] -= 1
    best_V = np.sort(others_VK, axis=1)
    majority_V = best_V[:, -1] > best_V[:, -2]  # an even split has no majority
    shared_V = others_VK.argmax(axis=1) == votes.vote_V
    order = np.argsort(votes.annotator_V, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(votes.annotator_V[order])) + 1) if len(order) else []
    found = [_habits(votes, rows, majority_V, shared_V, skips) for rows in parts]
    return sorted(found, key=lambda one: (-one.votes, one.annotator))


def _habits(
    votes: VoteColumns, rows: np.ndarray, majority_V: np.ndarray, shared_V: np.ndarray, skips: dict[str, int]
) -> Habits:
    """Of the annotator whose votes these are."""
    who = int(votes.annotator_V[rows[0]])
    name = votes.names[who]
    compared, gold = rows[majority_V[rows]], rows[votes.gold_V[rows] != NONE]
    left, longer = (column[rows][column[rows] != NONE] for column in (votes.left_V, votes.longer_V))
    seconds = votes.seconds_V[rows][np.isfinite(votes.seconds_V[rows])]
    one = Habits(
        annotator=name,
        kind=votes.kinds[who],
        votes=len(rows),
        with_others=_share(shared_V[compared]),
        compared=len(compared),
        gold=_share(votes.vote_V[gold] == votes.gold_V[gold]),
        gold_votes=len(gold),
        left=_share(left == 1),
        longer=_share(longer == 1),
        ties=_share(votes.vote_V[rows] == TIE),
        seconds=float(np.median(seconds)) if len(seconds) else None,
        skips=skips.get(name, 0),
        warnings=(),
    )
    return _with_warnings(one, len(left))


def _with_warnings(one: Habits, sided: int) -> Habits:
    warnings = []
    if one.gold is not None and one.gold_votes >= 5 and one.gold < GOLD_LEAST:
        warnings.append(f"{round(one.gold * one.gold_votes)} of {one.gold_votes} gold items right")
    if one.left is not None and sided >= ENOUGH and abs(one.left - 0.5) > SIDE_MOST * math.sqrt(0.25 / sided):
        warnings.append(f"prefers the {'left' if one.left > 0.5 else 'right'} side")
    if one.seconds is not None and one.votes >= ENOUGH and one.seconds < HASTY_SECONDS:
        warnings.append(f"takes {one.seconds:.1f} s an item")
    if one.with_others is not None and one.compared >= ENOUGH and one.with_others < 0.5:
        warnings.append("mostly against the others")
    if one.ties is not None and one.votes >= ENOUGH and one.ties > 0.8:
        warnings.append("nearly only ties")
    return replace(one, warnings=tuple(warnings))


def _share(found: np.ndarray) -> float | None:
    return int(found.sum()) / len(found) if len(found) else None
