"""How far the judgements can be trusted: agreement over time, each annotator's reliability and habits, and who is named
for bad votes. A figure that is not defined is None."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from statistics import median

from keel.feedback.agreement import MIRROR, TIE, Agreement, cohens_kappa, raw_agreement, vote_pairs
from keel.feedback.krippendorff import VALUES, krippendorff_alpha
from keel.store.overview import Vote
from keel.web.service.reliability import Reliability, reliability

ENOUGH = 20  # votes below which nothing is said of an annotator
HASTY_SECONDS = 2.0
GOLD_LEAST = 0.7
SIDE_MOST = 2.6  # standard errors of a fair coin: 1% of fair annotators are named wrongly


@dataclass(frozen=True, slots=True)
class Day:
    day: date
    votes: int  # everything that was done, rankings and replies too
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


def quality(votes: Sequence[Vote], skips: dict[str, int], reliable: Reliability | None = None) -> Quality:
    """``reliable``: worked out before, over most of these votes; by default now, over all of them."""
    reliable = reliability(votes) if reliable is None else reliable
    by_item = _by_item(votes)
    return Quality(
        raw_agreement(by_item, bootstrap=500),
        raw_agreement(by_item, ties=True, bootstrap=500),
        _kappa(by_item),
        krippendorff_alpha(_values(votes, graded=False), "nominal", bootstrap=500, mirror=True),
        krippendorff_alpha(_values(votes, graded=True), "ordinal", bootstrap=500, mirror=True),
        days(votes),
        [_judged(one, reliable) for one in habits(votes, skips)],
        reliable,
    )


def _kappa(by_item: dict[int, list[str]]) -> float | None:
    """Cohen's kappa of all pairs of votes, each counted both ways round: which response was stored first means
    nothing, and chance must not hang on it."""
    pairs = vote_pairs(by_item, ties=True)
    return cohens_kappa([*pairs, *((MIRROR[a], MIRROR[b]) for a, b in pairs)])


def _values(votes: Sequence[Vote], graded: bool) -> dict[int, list[float]]:
    """Each item's votes as values: 1 for the first response, -1 for the second, 0 for a tie; ``graded``: times the
    strength, 1 where there is none."""
    values: dict[int, list[float]] = {}
    for vote in votes:
        if vote.gold is None:
            side = VALUES[vote.vote]
            values.setdefault(vote.item_id, []).append(side * (vote.strength or 1.0) if graded else side)
    return values


def _judged(one: Habits, reliable: Reliability) -> Habits:
    return replace(
        one,
        reliability=reliable.dawid_skene.get(one.annotator),
        crowd_bt=reliable.crowd_bt.get(one.annotator),
        reasons=reliable.reasons(one.annotator),
    )


def _by_item(votes: Sequence[Vote]) -> dict[int, list[str]]:
    """Each item's votes in the order of the annotators' names. Gold items are left out: they are easy by choice."""
    named: dict[int, list[tuple[str, str]]] = {}
    for vote in votes:
        if vote.gold is None:
            named.setdefault(vote.item_id, []).append((vote.annotator, vote.vote))
    return {item: [vote for _, vote in sorted(said)] for item, said in named.items()}


def days(votes: Sequence[Vote], most: int = 30, others: Sequence[tuple[date, str]] = ()) -> list[Day]:
    """The last days on which anything was done, each with the agreement (ties left out) of all votes until then.
    ``others``: day and annotator of what was done besides comparing."""
    by_day: dict[date, list[Vote]] = {}
    for vote in votes:
        by_day.setdefault(vote.created.date(), []).append(vote)
    also: dict[date, list[str]] = {}
    for day, annotator in others:
        also.setdefault(day, []).append(annotator)
    found = []
    said: dict[int, Counter[str]] = {}
    share: dict[int, float] = {}  # of equal pairs, by item with two votes or more
    total = 0.0
    for day in sorted(by_day.keys() | also.keys()):
        here, more = by_day.get(day, []), also.get(day, [])
        for vote in here:
            if vote.gold is not None or vote.vote == TIE:
                continue
            counts = said.setdefault(vote.item_id, Counter())
            counts[vote.vote] += 1
            if (pairs := math.comb(counts.total(), 2)) > 0:
                equal = sum(math.comb(count, 2) for count in counts.values()) / pairs
                total += equal - share.get(vote.item_id, 0.0)
                share[vote.item_id] = equal
        names = {vote.annotator for vote in here}.union(more)
        found.append(Day(day, len(here) + len(more), len(names), total / len(share) if share else None))
    return found[-most:]


def habits(votes: Sequence[Vote], skips: dict[str, int]) -> list[Habits]:
    """Each annotator's habits, the busiest first."""
    tally: dict[int, Counter[str]] = {}
    for vote in votes:
        tally.setdefault(vote.item_id, Counter())[vote.vote] += 1
    mine: dict[str, list[Vote]] = {}
    for vote in votes:
        mine.setdefault(vote.annotator, []).append(vote)
    found = [_habits(name, given, tally, skips.get(name, 0)) for name, given in mine.items()]
    return sorted(found, key=lambda one: (-one.votes, one.annotator))


def _habits(name: str, given: list[Vote], tally: dict[int, Counter[str]], skipped: int) -> Habits:
    shared = []
    for vote in given:
        others = tally[vote.item_id] - Counter([vote.vote])
        best = others.most_common(2)
        if best and (len(best) == 1 or best[0][1] > best[1][1]):  # an even split has no majority
            shared.append(vote.vote == best[0][0])
    gold = [vote.vote == vote.gold for vote in given if vote.gold is not None]
    left = [vote.left for vote in given if vote.left is not None]
    longer = [vote.longer for vote in given if vote.longer is not None]
    seconds = [vote.seconds for vote in given if vote.seconds is not None]
    one = Habits(
        annotator=name,
        kind=given[0].kind,
        votes=len(given),
        with_others=_share(shared),
        compared=len(shared),
        gold=_share(gold),
        gold_votes=len(gold),
        left=_share(left),
        longer=_share(longer),
        ties=_share([vote.vote == "tie" for vote in given]),
        seconds=median(seconds) if seconds else None,
        skips=skipped,
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


def _share(found: Sequence[bool]) -> float | None:
    return sum(found) / len(found) if found else None
