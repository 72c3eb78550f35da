"""How far the judgements can be trusted: agreement over time, and each annotator's habits. A figure that is not
defined is None."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from statistics import median

from keel.feedback.agreement import Agreement, cohens_kappa, raw_agreement, vote_pairs
from keel.store.overview import Vote

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
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Quality:
    agreement: Agreement | None  # ties left out
    agreement_with_ties: Agreement | None
    kappa: float | None
    days: list[Day]
    annotators: list[Habits]


def quality(votes: Sequence[Vote], skips: dict[str, int]) -> Quality:
    by_item = _by_item(votes)
    return Quality(
        raw_agreement(by_item, bootstrap=500),
        raw_agreement(by_item, ties=True, bootstrap=500),
        cohens_kappa(vote_pairs(by_item, ties=True)),
        days(votes),
        habits(votes, skips),
    )


def _by_item(votes: Sequence[Vote]) -> dict[int, list[str]]:
    """Each item's votes in the order of the annotators' names. Gold items are left out: they are easy by choice."""
    named: dict[int, list[tuple[str, str]]] = {}
    for vote in votes:
        if vote.gold is None:
            named.setdefault(vote.item_id, []).append((vote.annotator, vote.vote))
    return {item: [vote for _, vote in sorted(said)] for item, said in named.items()}


def days(votes: Sequence[Vote], most: int = 30) -> list[Day]:
    """The last days on which anything was judged."""
    by_day: dict[date, list[Vote]] = {}
    for vote in votes:
        by_day.setdefault(vote.created.date(), []).append(vote)
    found = []
    so_far: list[Vote] = []
    for day in sorted(by_day):
        so_far += by_day[day]
        agreement = raw_agreement(_by_item(so_far), bootstrap=1)
        names = {vote.annotator for vote in by_day[day]}
        found.append(Day(day, len(by_day[day]), len(names), agreement.point if agreement else None))
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
