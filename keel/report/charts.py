"""A run's plots."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from keel.report.kinds import Panel, kind_of, title
from keel.report.plots import (
    COLOURS,
    Axis,
    Bar,
    DotRow,
    Point,
    Series,
    axis,
    dot_chart,
    interval_chart,
    line_chart,
    reliability_chart,
    scatter_chart,
)
from keel.report.reading import RunFiles, StageFiles
from keel.report.wording import number, percent, percent_range, phrase, two_places


@dataclass(frozen=True, slots=True)
class Palette:
    """A name keeps its colour all over the page. Grey is the base model's."""

    names: tuple[str, ...]

    @staticmethod
    def of(run: RunFiles) -> Palette:
        names = [name for name in (*run.models, *(stage.name for stage in run.stages if stage.rows)) if name != "base"]
        return Palette(tuple(dict.fromkeys(names)))

    def __getitem__(self, name: str) -> int:
        return 1 + self.names.index(name) % (COLOURS - 1) if name in self.names else 0


def learning_curves(run: RunFiles, palette: Palette) -> list[Markup]:
    """Stages of one kind share their panels, one line each, so that they can be compared."""
    kinds = dict.fromkeys(stage.kind for stage in run.stages if stage.rows)
    plots = []
    for kind in kinds:
        stages = [stage for stage in run.of_kind(kind) if stage.rows]
        row = kind_of(kind)
        heading = row.heading or ", ".join(title(stage.name) for stage in stages)
        for panel in row.panels:
            plot = _panel(panel, heading, stages, palette)
            if plot is not None:
                plots.append(plot)
    return plots


def _panel(panel: Panel, heading: str, stages: Sequence[StageFiles], palette: Palette) -> Markup | None:
    drawn = []
    for stage in stages:
        for line in panel.lines:
            points = next((found for key in line.keys if (found := _points(stage.rows, key))), ())
            if not points:
                continue
            parts = [title(stage.name)] if len(stages) > 1 or not line.label else []
            label = " · ".join([*parts, line.label] if line.label else parts)
            few = line.measured and len(points) <= 30
            drawn.append(Series(label, points, palette[stage.name], marks=few, faint=line.faint, dashed=_free(stage)))
    if not drawn:
        return None
    name = f"{heading}: {panel.title}"
    return line_chart(name, name, drawn, "step", panel.unit, panel.include, y_format=panel.format)


def _free(stage: StageFiles) -> bool:
    """A run without a KL penalty is dashed everywhere."""
    found: Any = stage.config
    for part in kind_of(stage.kind).kl_weight.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return number(found) == 0


def _points(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[Point, ...]:
    found = []
    for row in rows:
        x, y = number(row.get("step")), number(row.get(key))
        if x is not None and y is not None:
            found.append(Point(x, y))
    return tuple(found)


# ------------------------------------------------------------------------------------------------------ the evaluation


def win_rates(run: RunFiles, palette: Palette) -> Markup | None:
    bars = []
    for name, figures in run.models.items():
        found = win_interval(figures, run.baseline)
        if found:
            rate, low, high = found
            bars.append(Bar(title(name), rate, low, high, palette[name], percent(rate), percent_range(low, high)))
    if not bars:
        return None
    caption = f"Share of held-out comparisons won against {title(run.baseline)}, ties left out, with 95% intervals"
    return interval_chart(caption, bars, Axis(0, 1, (0, 0.25, 0.5, 0.75, 1), "win rate", percent), guide=0.5)


def win_interval(figures: Mapping[str, Any], baseline: str) -> tuple[float, float, float] | None:
    """(point, low, high) of summary.json's ``win_rate_vs_BASELINE``, None when undefined."""
    found = figures.get(f"win_rate_vs_{baseline}")
    if not isinstance(found, list) or len(found) != 3 or any(number(value) is None for value in found):
        return None
    return float(found[0]), float(found[1]), float(found[2])


def scores_by_kind(run: RunFiles, palette: Palette) -> Markup | None:
    kinds = dict.fromkeys(kind for figures in run.models.values() for kind in figures.get("kinds", {}))
    rows = [
        DotRow(
            phrase(kind),
            tuple(number(figures.get("kinds", {}).get(kind, {}).get("gold_reward")) for figures in run.models.values()),
        )
        for kind in kinds
    ]
    values = [v for row in rows for v in row.dots if v is not None]
    if not values:
        return None
    scale = axis(values, "judge's mean score", (0.0,), two_places)
    names = [(title(name), palette[name]) for name in run.models]
    return dot_chart("The judge's mean score on each kind of held-out prompt", names, rows, scale)


# ------------------------------------------------------------------------------------------------------- the guardrail


def guardrail_plots(run: RunFiles, palette: Palette) -> list[Markup]:
    """Proxy and gold against sqrt(KL) for the run with a KL penalty (first) and the one without (dashed)."""
    runs = run.summary.get("guardrail", {}).get("runs", [])
    if not runs:
        return []
    x_label = "√KL from the reference (KL in nats)"
    plots = []
    for key, heading, field in (
        ("guard proxy", "Proxy: the reward that is trained on", "proxy"),
        ("guard gold", "Gold: what the judge says", "gold"),
    ):
        series = [
            Series(
                title(r["name"]),
                _against_kl(r["points"], field),
                palette[r["name"]],
                dashed=i == 1,
                marks=field == "gold",
            )
            for i, r in enumerate(runs)
        ]
        if any(s.points for s in series):
            plots.append(line_chart(key, heading, series, x_label, "mean score", x_include=(0.0,)))
    gold = [
        Series(title(r["name"]), _points(r["points"], "gold"), palette[r["name"]], dashed=i == 1, marks=True)
        for i, r in enumerate(runs)
    ]
    if any(s.points for s in gold):
        plots.append(line_chart("guard steps", "Gold at equal steps", gold, "step", "mean score", x_include=(0.0,)))
    return plots


def _against_kl(points: Iterable[Mapping[str, Any]], field: str) -> tuple[Point, ...]:
    found = []
    for point in points:
        kl, value = number(point.get("kl")), number(point.get(field))
        if kl is not None and value is not None:
            found.append(Point(math.sqrt(max(kl, 0.0)), value))
    return tuple(found)


# ---------------------------------------------------------------------------------------------------- the reward model


def reward_plots(stage: StageFiles, palette: Palette) -> list[Markup]:
    plots = []
    bins = [(b["predicted"], b["observed"], b["count"]) for b in stage.summary.get("reliability", ()) if b["count"]]
    if bins:
        note = "Pairs grouped by the predicted probability; on the diagonal the model is calibrated."
        plots.append(reliability_chart(f"{stage.name} reliability", "Calibration", bins, palette[stage.name], note))
    scatter = [Point(float(length), float(score)) for length, score in stage.summary.get("length_scatter", ())]
    if len(scatter) > 1:
        r = number(stage.summary.get("length_correlation"))
        note = f"Pearson's r = {two_places(r)}." if r is not None else ""
        plots.append(
            scatter_chart(
                f"{stage.name} length",
                "Score against length",
                scatter,
                "tokens of the reply",
                "score",
                palette[stage.name],
                note,
            )
        )
    return plots
