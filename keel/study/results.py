"""Figures of all arms and seeds -> a table, comparisons and choices, each with its interval; and the sentences that
these allow. What is said follows from the intervals by one rule: nothing is concluded where they do not part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from keel.report.wording import plain
from keel.stats import percentiles, t_interval
from keel.study.figures import MISSING, Value
from keel.study.plan import Choice, Comparison, Condition, Figure, Plan

RESAMPLES = 2000
Method = Literal["seeds", "prompts", "none"]
METHODS: Mapping[Method, str] = {
    "seeds": "Student's t over the seeds",
    "prompts": "bootstrap over seeds and, within each, its prompts",
    "none": "no interval, where there is one value, or most resamples have none",
}
BySeed = Mapping[int, Value]
Values = Mapping[str, Mapping[int, Mapping[str, Value]]]  # arm -> seed -> figure


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval, and by which method; None where there is nothing to say."""

    mean: float | None
    low: float | None
    high: float | None
    method: Method
    seeds: int

    def less(self, number: float) -> Estimate:
        """Of the figure with ``number`` taken off."""
        mean, low, high = (None if value is None else value - number for value in (self.mean, self.low, self.high))
        return Estimate(mean, low, high, self.method, self.seeds)


def estimate(by_seed: BySeed, level: float) -> Estimate:
    """The mean over seeds."""
    known = [value for value in by_seed.values() if value.value is not None]
    return _estimate([v.value for v in known if v.value is not None], [_draws(value) for value in known], level)


def difference(ours: BySeed, theirs: BySeed, level: float) -> Estimate:
    """The mean difference over the seeds on which both have a value. Both share what they were made from, seed by seed
    and prompt by prompt, and are compared so."""
    both = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    both = [(a, b) for a, b in both if a.value is not None and b.value is not None]
    gaps = [a.value - b.value for a, b in both if a.value is not None and b.value is not None]
    return _estimate(gaps, [_draws_of_gap(a, b) for a, b in both], level)


def _draws(value: Value) -> np.ndarray | None:
    """The figure on resamples of its prompts [R]; None where it says nothing of them."""
    if value.draws:
        return np.array(value.draws)
    return _resampled(np.array(list(value.rows.values())), _ratio) if len(value.rows) > 1 else None


def _draws_of_gap(a: Value, b: Value) -> np.ndarray | None:
    if a.draws and len(a.draws) == len(b.draws):
        return np.array(a.draws) - np.array(b.draws)
    common = [(*a.rows[group], *b.rows[group]) for group in a.rows if group in b.rows]
    return _resampled(np.array(common), lambda x: _ratio(x[:, :2]) - _ratio(x[:, 2:])) if len(common) > 1 else None


def _ratio(sums_R2: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums_R2[:, 0] / sums_R2[:, 1])


def _resampled(rows_GF: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    different, counts = np.unique(rows_GF, axis=0, return_counts=True)
    times_RG = np.random.default_rng(0).multinomial(len(rows_GF), counts / counts.sum(), size=RESAMPLES)
    return statistic(times_RG @ different)


def _estimate(values: Sequence[float], draws: Sequence[np.ndarray | None], level: float) -> Estimate:
    if not values:
        return Estimate(None, None, None, "none", 0)
    middle = math.fsum(values) / len(values)
    known = [own for own in draws if own is not None]
    method: Method = "prompts" if len(known) == len(values) else "seeds"
    found = percentiles(_over_seeds(known), level) if method == "prompts" else t_interval(values, level)
    if found is None:
        return Estimate(middle, None, None, "none", len(values))
    return Estimate(middle, *found, method, len(values))


def _over_seeds(draws: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over n seeds in resamples of seeds and, within each, of prompts. n - 1 seeds are drawn: so the mean of n
    has its own variance (McCarthy & Snowden 1985)."""
    if len(draws) == 1:
        return draws[0]
    rng = np.random.default_rng(1)
    places = []
    for _ in draws[1:]:
        drawn_SR = np.stack([rng.choice(own, RESAMPLES) for own in draws])
        places.append(drawn_SR[rng.integers(len(draws), size=RESAMPLES), np.arange(RESAMPLES)])
    return np.asarray(np.mean(places, axis=0))


# -------------------------------------------------------------------------------------------------------- the result


def summarise(plan: Plan, values: Values) -> dict[str, Any]:
    """The ``study.json`` but for what only the runs know."""
    study, level = plan.study, plan.study.interval

    def of(arm: str, figure: str) -> dict[int, Value]:
        return {seed: values[arm].get(seed, {}).get(figure, MISSING) for seed in plan.seeds}

    table = []
    for figure in study.figures:
        for arm in plan.arms:
            own = of(arm, figure)
            by_seed = {str(seed): value.value for seed, value in own.items()}
            table.append({"figure": figure, "arm": arm, "by_seed": by_seed, **asdict(estimate(own, level))})
    comparisons = [
        _compared(comparison, figure, arm, study.figures[figure], of, level)
        for comparison in study.comparisons
        for figure in comparison.figures
        for arm in _arms(comparison, plan.arms)
        if not isinstance(comparison.against, str) or comparison.against in plan.arms
    ]
    return {
        "name": study.name,
        "asks": study.asks,
        "quick": plan.quick,
        "seeds": list(plan.seeds),
        "arms": {arm: dict(settings) for arm, settings in plan.arms.items()},
        "figures": {name: figure.model_dump(mode="json") for name, figure in study.figures.items()},
        "level": level,
        "methods": {used: METHODS[used] for used in dict.fromkeys(row["method"] for row in (*table, *comparisons))},
        "table": table,
        "comparisons": comparisons,
        "choices": [_chosen(choice, plan, of, level) for choice in study.choices],
        "by_chance": round((1 - level) * sum(row["low"] is not None for row in comparisons), 2),
        "plots": [plot.model_dump() for plot in study.plots],
    }


Of = Callable[[str, str], dict[int, Value]]


def _arms(comparison: Comparison, arms: Mapping[str, Any]) -> list[str]:
    named = list(arms) if comparison.arm == "each" else [comparison.arm]
    return [arm for arm in named if arm in arms and arm != comparison.against]


def _compared(comparison: Comparison, name: str, arm: str, figure: Figure, of: Of, level: float) -> dict[str, Any]:
    ours, against = of(arm, name), comparison.against
    if isinstance(against, str):
        theirs = of(against, name)
        found = difference(ours, theirs, level)
    else:
        theirs = dict.fromkeys(ours, Value(against))
        found = estimate(ours, level).less(against)
    verdict = _verdict(found)
    gaps = {
        str(seed): a - b
        for seed in ours
        if (a := ours[seed].value) is not None and (b := theirs[seed].value) is not None
    }
    missing = [seed for seed in ours if str(seed) not in gaps]
    sentence = _sentence(figure, arm, against, found, verdict, missing)
    means = {"more": comparison.more, "less": comparison.less}.get(verdict, "")
    return {
        "figure": name,
        "arm": arm,
        "against": against,
        "by_seed": gaps,
        **asdict(found),
        "verdict": verdict,
        "sentence": " ".join(filter(None, [sentence, means])),
    }


def _verdict(found: Estimate) -> Literal["more", "less", "unclear", "one value", "missing"]:
    if found.mean is None:
        return "missing"
    if found.low is None or found.high is None:
        return "one value"
    return "more" if found.low > 0 else "less" if found.high < 0 else "unclear"


def amount(value: float, figure: Figure) -> str:
    """A difference as it is said."""
    return f"{100 * value:z.1f} points".replace("-", "−") if figure.form == "percent" else plain(value)


def _sentence(
    figure: Figure, arm: str, against: str | float, found: Estimate, verdict: str, missing: Sequence[int]
) -> str:
    other = against if isinstance(against, str) else plain(against)
    head = f"{figure.title}:"
    if found.mean is None:
        return f"{head} {arm} cannot be compared with {other}, since on no seed both have a value."
    gap = amount(abs(found.mean), figure)
    without = f" (without seed {', '.join(map(str, missing))}, where there is no value)" if missing else ""
    if found.low is None or found.high is None:
        gap = amount(found.mean, figure)
        if found.seeds > 1:  # its resamples fall short
            return f"{head} {arm} differs from {other} by {gap}, and most resamples have no value{without}: not told."
        return f"{head} {arm} differs from {other} by {gap} on one seed, which tells nothing."
    low, high = sorted((found.low, found.high), key=abs)
    if verdict == "unclear":
        low, high = found.low, found.high
        span = f"{amount(low, figure)} to {amount(high, figure)}"
        return f"{head} {arm} and {other} cannot be told apart: {amount(found.mean, figure)} ({span}){without}."
    span = f"{amount(abs(low), figure)} to {amount(abs(high), figure)}"
    good = figure.better and ("better" if figure.better == verdict else "worse")
    word = "above" if verdict == "more" else "below"
    return f"{head} {arm} is {word} {other} by {gap} ({span}){f', which is {good}' if good else ''}{without}."


def _chosen(choice: Choice, plan: Plan, of: Of, level: float) -> dict[str, Any]:
    """Which arms keep every condition with their whole interval; which might, since an interval lies across a bound."""
    kept, open_ = [], []
    for arm in plan.arms:
        known = [estimate(of(arm, condition.figure), level) for condition in choice.where]
        # An arm without a value on some seed is not chosen by those that have one.
        standing = [
            _keeps(condition, found) if found.seeds == len(plan.seeds) else None
            for condition, found in zip(choice.where, known, strict=True)
        ]
        if all(standing):
            kept.append(arm)
        elif all(known is not False for known in standing):
            open_.append(arm)
    said = f"{choice.title}: {', '.join(kept) or 'none'}."
    if open_:
        said += f" Not told, since an interval lies across a bound or is missing: {', '.join(open_)}."
    return {"title": choice.title, "kept": kept, "open": open_, "sentence": said}


def _keeps(condition: Condition, found: Estimate) -> bool | None:
    """None: not told."""
    if found.low is None or found.high is None:
        return None
    if condition.above is not None:
        return True if found.low > condition.above else False if found.high < condition.above else None
    assert condition.below is not None, "a condition has one bound"
    return True if found.high < condition.below else False if found.low > condition.below else None
