"""The part on reasoning: how well process reward models judge steps, with worked replies; what searches find; and what
rewards for steps did to the policies that learned from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from keel.report.charts import Palette
from keel.report.kinds import kind_of, title
from keel.report.plots import Point, Series, line_chart, reliability_chart
from keel.report.reading import RunFiles, StageFiles
from keel.report.searches import SearchSection, searches
from keel.report.sections import Fact
from keel.report.traces import AGGREGATES, Traces, traces
from keel.report.wording import Format, number, one_place, percent, percent_range, three_places, two_places

_STEPS, _MEAN = "process/steps", "process/mean"
_WAYS = {  # of choosing among replies to a problem: words, colour, and whether it is one that can be had
    "score": ("the best-scored reply", 2, True),
    "majority": ("the most frequent answer", 1, True),
    "first": ("any reply", 0, False),
    "oracle": ("any of them is right", 3, False),
}
_FIGURES: Mapping[str, tuple[str, Format]] = {  # of a policy that is rewarded for its steps
    _STEPS: ("steps a reply", one_place),
    _MEAN: ("score of a step", two_places),
    "process/min": ("lowest of a reply", two_places),
    "process/outcome": ("outcome", two_places),
    "process/lucky": ("right, a step doubted", percent),
    "process/pass_at_1": ("pass at 1", percent),
    "process/pass_at_group": ("pass at group", percent),
}


@dataclass(frozen=True, slots=True)
class ProcessModel:
    """``judges``: a step, or an answer."""

    name: str
    judges: str
    facts: tuple[Fact, ...]
    plots: tuple[Markup, ...]
    traces: Traces | None


@dataclass(frozen=True, slots=True)
class Change:
    """A figure at the end, and at the start; empty where it was not logged."""

    now: str
    before: str


@dataclass(frozen=True, slots=True)
class PolicyRow:
    name: str
    colour: int
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Policies:
    """What became of the steps of those that are rewarded for them. ``broken``: (policy, what of the card of its
    process reward model is beyond a bound). ``alarms``: as in ``summary.json``."""

    columns: tuple[str, ...]
    rows: tuple[PolicyRow, ...]
    plot: Markup | None
    broken: tuple[tuple[str, str], ...]
    alarms: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Reasoning:
    models: tuple[ProcessModel, ...]
    searches: SearchSection | None
    policies: Policies | None


def reasoning(run: RunFiles, palette: Palette) -> Reasoning | None:
    """None for a run without a process reward model, a search, or a reward for steps."""
    models = tuple(_model(stage, palette) for stage in run.stages if kind_of(stage.kind).traced and stage.summary)
    found = Reasoning(models, searches(run), _policies(run, palette))
    return found if any((found.models, found.searches, found.policies)) else None


# ----------------------------------------------------------------------------------------------------------- the models


def _model(stage: StageFiles, palette: Palette) -> ProcessModel:
    heldout = stage.summary.get("heldout") or {}
    return ProcessModel(
        title(stage.name),
        "answer" if stage.summary.get("level") == "outcome" else "step",
        tuple(_facts(stage.summary, heldout)),
        tuple(_plots(stage.name, heldout, palette)),
        traces(stage.traces),
    )


def _facts(summary: Mapping[str, Any], heldout: Mapping[str, Any]) -> list[Fact]:
    facts = []
    outcome = summary.get("level") == "outcome"
    if replies := heldout.get("replies"):
        problems = heldout["problems"]
        facts.append(Fact("Held-out replies", f"{replies:,} to {problems:,} problem{'s' * (problems != 1)}"))
    if first := heldout.get("first_error"):
        facts.append(Fact("F1 of the first error", _estimate(first["f1"], percent)))
        facts.append(Fact("Wrong replies: that step found", percent(first["error"])))
        facts.append(Fact("Right replies: no step doubted", percent(first["correct"])))
    if auc := heldout.get("step_auc"):
        what = "reply" if outcome else "step"
        facts.append(Fact(f"A right {what} scores above a wrong one", _estimate(auc, percent)))
    if (error := number(heldout.get("ece"))) is not None:
        facts.append(Fact("Expected calibration error", three_places(error)))
    if how := summary.get("aggregate"):
        facts.append(Fact("A reply’s score", AGGREGATES[how]))
    return facts


def _estimate(found: Sequence[float | None], form: Format) -> str:
    """A share, with its interval where there is one."""
    point, low, high = (number(value) for value in found)
    if point is None:
        return "–"
    return form(point) + (f" ({percent_range(low, high)})" if low is not None and high is not None else "")


def _plots(name: str, heldout: Mapping[str, Any], palette: Palette) -> list[Markup]:
    plots = []
    if rows := heldout.get("best_of_n"):
        series = []
        for way, (label, colour, real) in _WAYS.items():
            known = [(row["n"], row[way]) for row in rows if row.get(way)]
            points = tuple(Point(n, share[0], _interval(share) if real else None) for n, share in known)
            if points:
                series.append(Series(label, points, colour, dashed=not real, marks=True))
        if series:
            key, ns = f"{name} best of n", [row["n"] for row in rows]
            plots.append(
                line_chart(
                    key, "Choosing among n replies", series, "n", "right", (0.0, 1.0), y_format=percent, x_ticks=ns
                )
            )
    if bins := [tuple(row) for row in heldout.get("calibration") or ()]:
        note = "Steps grouped by their score; on the diagonal the model is calibrated."
        plots.append(reliability_chart(f"{name} steps", "Calibration", bins, palette[name], note))
    return plots


def _interval(share: Sequence[float | None]) -> tuple[float, float] | None:
    low, high = (number(bound) for bound in share[1:])
    return None if low is None or high is None else (low, high)


# --------------------------------------------------------------------------------------------------------- the policies


def _policies(run: RunFiles, palette: Palette) -> Policies | None:
    logged = [(stage, [row for row in stage.rows if number(row.get(_STEPS)) is not None]) for stage in run.stages]
    rewarded = [(stage, rows) for stage, rows in logged if rows]
    if not rewarded:
        return None
    keys = [key for key in _FIGURES if any(_logged(rows, key) for _, rows in rewarded)]
    names = {stage.name for stage, _ in rewarded}
    return Policies(
        columns=tuple(_FIGURES[key][0] for key in keys),
        rows=tuple(
            PolicyRow(title(stage.name), palette[stage.name], tuple(_change(rows, key) for key in keys))
            for stage, rows in rewarded
        ),
        plot=_scores(rewarded, palette),
        broken=tuple((title(stage.name), said) for stage, _ in rewarded for said in stage.card.get("broken", ())),
        alarms=tuple(
            alarm
            for alarm in run.summary.get("alarms", ())
            if alarm["stage"] in names and str(alarm.get("name", "")).startswith("process_")
        ),
    )


def _logged(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [value for row in rows if (value := number(row.get(key))) is not None]


def _change(rows: Sequence[Mapping[str, Any]], key: str) -> Change:
    values, form = _logged(rows, key), _FIGURES[key][1]
    if not values:
        return Change("–", "")
    return Change(form(values[-1]), form(values[0]) if len(values) > 1 else "")


def _scores(rewarded: Sequence[tuple[StageFiles, Sequence[Mapping[str, Any]]]], palette: Palette) -> Markup | None:
    series = []
    for stage, rows in rewarded:
        points = tuple(
            Point(float(row["step"]), value)
            for row in rows
            if (value := number(row.get(_MEAN))) is not None and number(row.get("step")) is not None
        )
        if points:
            series.append(Series(title(stage.name), points, palette[stage.name], marks=len(points) <= 30))
    if not series:
        return None
    return line_chart("process scores", "What the steps are worth", series, "step", "mean score of a step")
