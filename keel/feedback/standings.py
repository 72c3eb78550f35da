"""The arena's standings: each model's rating with its interval, the ranks it may have, with and without control of
style, and what to beware of. Whoever shows them (the app's page, ``keel arena``) shows these."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from keel.feedback.bradley_terry import Battle, Fit, comparable, fit
from keel.stats import t_quantile
from keel.store.arena_facts import FEATURES, Style
from keel.store.ballots import Ballot

SCORES = {"left": 1.0, "right": 0.0, "tie": 0.5, "both_bad": 0.5}
POINTS = 400 / math.log(10)  # of a logit: 400 points are odds of ten to one, as in chess
MIDDLE = 1000.0  # the mean of the models that are compared
FEW_VOTES, FEW_PEOPLE = 30, 5
UNEVEN = 2.0  # times the median of votes
MUCH = 1 / 3  # of all votes, by one person


@dataclass(frozen=True, slots=True)
class Standing:
    """A model. ``rating`` with its 95% interval, in points; None where the votes allow none (``note`` says why).
    ``best``, ``worst``: the first and the last rank that it may have in its part. ``ties`` counts both bad too."""

    model: str
    part: int  # 1 is the largest; ratings of two parts say nothing of each other
    rating: float | None
    low: float | None
    high: float | None
    best: int | None
    worst: int | None
    won: int
    lost: int
    ties: int
    people: int
    note: str = ""

    @property
    def votes(self) -> int:
        return self.won + self.lost + self.ties


@dataclass(frozen=True, slots=True)
class Effect:
    """What a feature of style is worth: points for one standard deviation more of it, with its 95% interval."""

    feature: str
    points: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Table:
    """Part by part, the best first. ``left_out``: features that are too rare, or can't be told apart from the rest."""

    standings: tuple[Standing, ...]
    effects: tuple[Effect, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Standings:
    """``controlled``: with control of style; None where it can't be had. ``textless``: counted votes whose texts were
    erased before their style was kept, which it lacks."""

    counted: int
    voided: int
    people: int
    textless: int
    plain: Table
    controlled: Table | None
    warnings: tuple[str, ...]


def standings(ballots: Sequence[Ballot]) -> Standings:
    counting = [one for one in ballots if one.counts]
    battles = [Battle(one.annotator, one.left, one.right, SCORES[one.choice]) for one in counting]
    parts, fits = _fitted(battles)
    plain = Table(_table(battles, parts, fits))
    return Standings(
        counted=len(counting),
        voided=len(ballots) - len(counting),
        people=len({one.annotator for one in counting}),
        textless=sum(one.facts.left is None for one in counting),
        plain=plain,
        controlled=_controlled(counting),
        warnings=tuple(_warnings(battles, parts, fits, plain)),
    )


# ------------------------------------------------------------------------------------------------------------- ratings


def _fitted(battles: Sequence[Battle]) -> tuple[list[tuple[str, ...]], list[Fit | None]]:
    """The parts with their fits. A model that one person alone voted on stands apart while others have more: without
    that person there would be nothing left of it, so no interval of the part would be known."""
    by: dict[str, set[str]] = {}
    for battle in battles:
        for model in (battle.left, battle.right):
            by.setdefault(model, set()).add(battle.person)
    apart = {model for model, people in by.items() if len(people) == 1}
    if len(by) - len(apart) < 2:
        apart = set()
    parts = comparable([battle for battle in battles if battle.left not in apart and battle.right not in apart])
    parts += [(model,) for model in sorted(by) if model not in {one for part in parts for one in part}]
    return parts, [fit(battles, part) if len(part) > 1 else None for part in parts]


def _table(battles: Sequence[Battle], parts: Sequence[tuple[str, ...]], fits: Sequence[Fit | None]) -> tuple[Any, ...]:
    tallies: dict[str, Counter[str]] = {}
    people: dict[str, set[str]] = {}
    for battle in battles:
        for model, score in ((battle.left, battle.score), (battle.right, 1 - battle.score)):
            tallies.setdefault(model, Counter())[{1.0: "won", 0.0: "lost"}.get(score, "ties")] += 1
            people.setdefault(model, set()).add(battle.person)
    found = []
    for number, (part, fitted) in enumerate(zip(parts, fits, strict=True), 1):
        rows = []
        for at, model in enumerate(part):
            tally, by = tallies[model], len(people[model])
            rating = low = high = best = worst = None
            note = ""
            if fitted is None:
                note = _alone(tally, by) if len(part) == 1 else "its votes allow no rating"
            else:
                rating = MIDDLE + POINTS * float(fitted.strengths[at])
                low, high = _interval(fitted, _against_mean(fitted, at), rating, POINTS)
                best, worst = _ranks(fitted, at)
                few = tally.total() < FEW_VOTES or by < FEW_PEOPLE
                note = f"few: {tally.total()} votes by {by} {'person' if by == 1 else 'people'}" if few else ""
                if low is None:
                    note = f"{note}{'; ' if note else ''}no interval: it rests on one person"
            counts = tally["won"], tally["lost"], tally["ties"]
            rows.append(Standing(model, number, rating, low, high, best, worst, *counts, by, note))
        found += sorted(rows, key=lambda one: (-(one.rating or 0.0), one.model))
    return tuple(found)


def _alone(tally: Counter[str], by: int) -> str:
    if by == 1:
        return "one person alone voted on it"
    if not tally["lost"] and not tally["ties"]:
        return f"won all of its {tally['won']} votes: how much better it is can't be said"
    if not tally["won"] and not tally["ties"]:
        return f"lost all of its {tally['lost']} votes: how much worse it is can't be said"
    return "every vote between it and each of the others went one way"


def _against_mean(fitted: Fit, at: int) -> np.ndarray:
    contrast_K = np.zeros(len(fitted.strengths) + len(fitted.effects))
    contrast_K[: len(fitted.strengths)] = -1 / len(fitted.strengths)
    contrast_K[at] += 1
    return contrast_K


def _interval(fitted: Fit, contrast_K: np.ndarray, point: float, unit: float) -> tuple[float | None, float | None]:
    error = fitted.error(contrast_K)
    if error is None:
        return None, None
    half = t_quantile(0.975, len(fitted.jackknife) - 1) * unit * error
    return point - half, point + half


def _ranks(fitted: Fit, at: int) -> tuple[int, int]:
    """One more than are surely better, and than are not surely worse. All pairs of the part are judged at once, with a
    chance of 5% that any of these words is wrong (Bonferroni)."""
    models = len(fitted.strengths)
    people = len(fitted.jackknife)
    if people < 2:
        return 1, models
    far = t_quantile(1 - 0.025 / math.comb(models, 2), people - 1)
    better = worse = 0
    for other in range(models):
        contrast_K = np.zeros(models + len(fitted.effects))
        contrast_K[at], contrast_K[other] = 1, -1
        error = fitted.error(contrast_K) if other != at else None
        if error is not None:
            lead = float(fitted.strengths[at] - fitted.strengths[other])
            better += lead < -far * error
            worse += lead > far * error
    return 1 + better, models - worse


# --------------------------------------------------------------------------------------------------------------- style


def differences(left: Style, right: Style) -> tuple[float, ...]:
    """Of each feature (left - right) / (left + right): 40 words beside 20 differ, 520 beside 500 hardly do."""
    return tuple((a - b) / (a + b) if a + b else 0.0 for a, b in zip(left, right, strict=True))


def _controlled(counting: Sequence[Ballot]) -> Table | None:
    """The parts with style in their regressions; the effects are the largest one's. A feature is divided by its root
    mean square (sides are drawn, so its mean is nothing but chance). What is rarest is left out first where no finite
    answer is found."""
    told = [
        (one, differences(one.facts.left, one.facts.right))
        for one in counting
        if one.facts.left is not None and one.facts.right is not None
    ]
    if not told:
        return None
    style_BS = np.array([style for _, style in told])
    size_S = np.sqrt((style_BS**2).mean(axis=0))
    often_S = (style_BS != 0).sum(axis=0)
    kept = sorted((at for at in range(len(FEATURES)) if often_S[at]), key=lambda at: -often_S[at])
    while kept:
        scaled_BS = style_BS[:, kept] / size_S[kept]
        battles = [
            Battle(one.annotator, one.left, one.right, SCORES[one.choice], tuple(style))
            for (one, _), style in zip(told, scaled_BS.tolist(), strict=True)
        ]
        parts, fits = _fitted(battles)
        if fits[0] is not None:
            left_out = tuple(FEATURES[at] for at in range(len(FEATURES)) if at not in kept)
            return Table(_table(battles, parts, fits), _effects(fits[0], kept), left_out)
        kept.pop()
    return None


def _effects(fitted: Fit, kept: Sequence[int]) -> tuple[Effect, ...]:
    found = []
    for number, at in enumerate(kept):
        contrast_K = np.zeros(len(fitted.strengths) + len(kept))
        contrast_K[len(fitted.strengths) + number] = 1
        points = POINTS * float(fitted.effects[number])
        found.append((at, Effect(FEATURES[at], points, *_interval(fitted, contrast_K, points, POINTS))))
    return tuple(effect for _, effect in sorted(found, key=lambda one: one[0]))


# ------------------------------------------------------------------------------------------------------------ warnings


def _warnings(
    battles: Sequence[Battle], parts: Sequence[tuple[str, ...]], fits: Sequence[Fit | None], table: Table
) -> list[str]:
    if not battles:
        return []
    found = []
    if len(parts) > 1:
        found.append(
            f"The models are in {len(parts)} parts that can't be compared: they never met, every vote between them "
            "went one way, or one person alone voted on them. A rating says nothing across parts."
        )
    middle = median(one.votes for one in table.standings)
    uneven = [one for one in table.standings if not middle / UNEVEN <= one.votes <= middle * UNEVEN]
    if uneven:
        said = ", ".join(f"{one.model} {one.votes}" for one in uneven)
        found.append(
            f"Models met unevenly often (the median is {middle:g} votes; {said}): they met other people and other "
            "opponents, perhaps at another time."
        )
    person, count = Counter(battle.person for battle in battles).most_common(1)[0]
    if count > MUCH * len(battles) and len(battles) > 1:
        found.append(f"{person} gave {count} of the {len(battles)} votes: the standings hang much on them.")
    for part, fitted in zip(parts, fits, strict=True):
        found += _influential(part, fitted)
    return found


def _influential(part: Sequence[str], fitted: Fit | None) -> list[str]:
    """Whoever moves a model's rating by more than its standard error by all others (one's own votes widen it)."""
    if fitted is None or len(fitted.jackknife) < 3:
        return []
    moved = []
    for at, model in enumerate(part):
        error = fitted.error(_against_mean(fitted, at))
        for person, move in fitted.jackknife.items():
            if error is None or move is None:
                continue
            others = error**2 - float(move[at]) ** 2 * (len(fitted.jackknife) - 1) / len(fitted.jackknife)
            if move[at] ** 2 > others:
                moved.append((abs(float(move[at])), person, model, POINTS * float(move[at])))
    return [
        f"Without {person}, {model} would stand {abs(points):.0f} points {'higher' if points > 0 else 'lower'}: look "
        "at their votes."
        for _, person, model, points in sorted(moved, reverse=True)[:3]
    ]


# ----------------------------------------------------------------------------------------------------------- as a file

COLUMNS = (
    "style_control", "part", "model", "rating", "low", "high", "best_rank", "worst_rank", "won", "lost", "ties",
    "votes", "people", "note",
)  # fmt: skip


def rows(found: Standings) -> list[dict[str, Any]]:
    """A row a model, first without and then with control of style, with ``COLUMNS``."""
    return [
        {
            "style_control": table is not found.plain,
            "part": one.part,
            "model": one.model,
            "rating": _rounded(one.rating),
            "low": _rounded(one.low),
            "high": _rounded(one.high),
            "best_rank": one.best,
            "worst_rank": one.worst,
            "won": one.won,
            "lost": one.lost,
            "ties": one.ties,
            "votes": one.votes,
            "people": one.people,
            "note": one.note,
        }
        for table in (found.plain, found.controlled)
        if table is not None
        for one in table.standings
    ]


def as_json(found: Standings) -> dict[str, Any]:
    """Everything, as JSON holds it."""
    effects = found.controlled.effects if found.controlled else ()
    return {
        "votes": {"counted": found.counted, "left_out": found.voided, "without_texts": found.textless},
        "people": found.people,
        "standings": rows(found),
        "style": [
            {"feature": e.feature, "points": _rounded(e.points), "low": _rounded(e.low), "high": _rounded(e.high)}
            for e in effects
        ],
        "style_left_out": list(found.controlled.left_out) if found.controlled else list(FEATURES),
        "warnings": list(found.warnings),
    }


def _rounded(points: float | None) -> float | None:
    return None if points is None else round(points, 1)
