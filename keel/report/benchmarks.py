"""The section on benchmarks of others: RewardBench 2 and lm-eval's tasks, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keel.report.kinds import title
from keel.report.reading import RunFiles
from keel.report.wording import number, percent, percent_range, phrase, three_places


@dataclass(frozen=True, slots=True)
class BenchCell:
    text: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class BenchTable:
    """``columns`` are models' names, ``rows`` (label, a cell a model)."""

    heading: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[BenchCell, ...]], ...]


def benchmarks(run: RunFiles) -> list[BenchTable]:
    """Empty where the evaluation has none."""
    found = [_reward_bench(run.summary.get("reward_bench")), _tasks(run.summary.get("tasks"))]
    return [table for table in found if table is not None]


def _reward_bench(found: Mapping[str, Any] | None) -> BenchTable | None:
    if not found:
        return None
    subsets = list(dict.fromkeys(name for one in found.values() for name in one["subsets"]))
    rows = [("Mean over subsets", tuple(BenchCell(percent(one["score"])) for one in found.values()))]
    rows += [
        (f"{subset} ({_first(found, subset)['items']:,} items)", tuple(_subset(one, subset) for one in found.values()))
        for subset in subsets
    ]
    missing = next(iter(found.values()))["missing"]
    less = f" The file has no {', '.join(missing)}: the mean is not the published one." if missing else ""
    caption = f"Share of prompts whose right answer scores highest; Ties by their own formula. 95% intervals.{less}"
    return BenchTable("RewardBench 2", caption, tuple(title(name) for name in found), tuple(rows))


def _first(found: Mapping[str, Any], subset: str) -> Mapping[str, Any]:
    first: Mapping[str, Any] = next(one["subsets"][subset] for one in found.values() if subset in one["subsets"])
    return first


def _subset(one: Mapping[str, Any], subset: str) -> BenchCell:
    figures = one["subsets"][subset]
    low, high = figures["low"], figures["high"]
    return BenchCell(percent(figures["score"]), "" if low is None else percent_range(low, high))


def _tasks(found: Mapping[str, Any] | None) -> BenchTable | None:
    if not found:
        return None
    models: Mapping[str, Any] = found["models"]
    keys = list(dict.fromkeys((t, m) for one in models.values() for t, some in one.items() for m in some["metrics"]))
    rows = [
        (
            f"{task}: {phrase(metric)}",
            tuple(_figure(one.get(task, {}).get("metrics", {}).get(metric)) for one in models.values()),
        )
        for task, metric in keys
    ]
    limit = found.get("limit")
    part = f" Only the first {limit:,} questions of each: no figures to compare with others'." if limit else ""
    caption = f"By lm-eval {found['lm_eval']}; ± one standard error.{part}"
    return BenchTable("Tasks", caption, tuple(title(name) for name in models), tuple(rows))


def _figure(pair: Sequence[float | None] | None) -> BenchCell:
    if pair is None or number(pair[0]) is None:
        return BenchCell("–")
    value, error = pair
    assert value is not None
    return BenchCell(three_places(value), "" if error is None else f"± {three_places(error)}")
