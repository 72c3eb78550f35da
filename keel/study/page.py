"""A study's result as one HTML page that needs nothing else. It is made of ``study.json`` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from keel.report.plots import COLOURS, Axis, Bar, Point, Series, axis, interval_chart, line_chart
from keel.report.wording import Format, duration, percent, plain
from keel.run import atomic_write_text

FORMS: Mapping[str, Format] = {"number": plain, "percent": percent}
TOGETHER = COLOURS - 1  # arms that have a colour of their own in one plot; of more, each has a plot
NO_VALUE = "–"


def build_page(result: Mapping[str, Any], out: Path) -> Path:
    """Writes the page of a study's result to ``out`` (replacing it whole) and returns ``out``."""
    atomic_write_text(out, render(result))
    return out


def render(result: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("keel.study", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = resources.files("keel.report").joinpath("page.css").read_text(encoding="utf-8")
    said = result["comparisons"]
    return environment.get_template("page.html.j2").render(
        css=Markup(css),
        result=result,
        byline=_byline(result),
        told=[row["sentence"] for row in said if row["verdict"] in ("more", "less")],
        untold=[row["sentence"] for row in said if row["verdict"] not in ("more", "less")],
        figures=result["figures"],
        charts=[chart for name in result["figures"] if (chart := _chart(result, name)) is not None],
        rows=[(arm, [cell(result, name, arm) for name in result["figures"]]) for arm in result["arms"]],
        arms=[(arm, ", ".join(f"{key}={value}" for key, value in s.items())) for arm, s in result["arms"].items()],
        plots=[
            *(plot for wanted in result["plots"] for plot in _plots(result, wanted)),
            *(plot for wanted in result["curves"] for plot in _curves(result, wanted)),
        ],
    )


def _byline(result: Mapping[str, Any]) -> list[str]:
    seeds = result["seeds"]
    parts = [f"{len(result['arms'])} arms", f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"]
    if result.get("seconds"):
        parts.append(f"{duration(result['seconds'])} of computing")
    return parts


def _row(result: Mapping[str, Any], figure: str, arm: str) -> Mapping[str, Any]:
    return next(row for row in result["table"] if row["figure"] == figure and row["arm"] == arm)


def _span(row: Mapping[str, Any], form: Format) -> str:
    return "" if row["low"] is None else f"{form(row['low'])} to {form(row['high'])}"


def cell(result: Mapping[str, Any], name: str, arm: str) -> dict[str, str]:
    """The mean, its interval, and every seed's value."""
    row, form = _row(result, name, arm), FORMS[result["figures"][name]["form"]]
    seeds = [NO_VALUE if value is None else form(value) for value in row["by_seed"].values()]
    return {
        "mean": NO_VALUE if row["mean"] is None else form(row["mean"]),
        "span": _span(row, form),
        "seeds": ", ".join(seeds) if len(seeds) > 1 else "",
    }


def _colour(result: Mapping[str, Any], arm: str) -> int:
    return 1 + list(result["arms"]).index(arm) % TOGETHER


def _chart(result: Mapping[str, Any], name: str) -> Markup | None:
    """A row an arm: the mean with its interval, and every seed."""
    figure = result["figures"][name]
    form = FORMS[figure["form"]]
    bars, without = [], []
    for arm in result["arms"]:
        row = _row(result, name, arm)
        if row["mean"] is None:
            without.append(arm)
            continue
        single = tuple(value for value in row["by_seed"].values() if value is not None)
        low, high = (row["mean"] if row[end] is None else row[end] for end in ("low", "high"))
        text = form(row["mean"])
        bars.append(Bar(arm, row["mean"], low, high, _colour(result, arm), text, _span(row, form), single))
    if not bars:
        return None
    shown = [value for bar in bars for value in (bar.low, bar.high, *bar.single)]
    better = {"more": " (higher is better)", "less": " (lower is better)", None: ""}[figure["better"]]
    caption = f"{figure['title']}{better}"
    if without:
        caption += f". Without a value: {', '.join(without)}"
    return interval_chart(caption, bars, _scale(shown, form))


def _scale(values: Sequence[float], form: Format) -> Axis:
    return axis(values, "", (), form)


def _plots(result: Mapping[str, Any], wanted: Mapping[str, str]) -> list[Markup]:
    """One figure against another, a mark for every seed. Many arms have a plot each, with the others in grey."""
    points = {arm: _points(result, wanted, arm) for arm in result["arms"]}
    points = {arm: found for arm, found in points.items() if found}
    if not points:
        return []
    title, x, y = wanted["title"], result["figures"][wanted["x"]], result["figures"][wanted["y"]]

    def chart(key: str, heading: str, series: Sequence[Series]) -> Markup:
        return line_chart(key, heading, series, x["title"], y["title"], y_format=FORMS[y["form"]])

    def series(arm: str) -> Series:
        return Series(arm, points[arm], _colour(result, arm), marks=True, line=False)

    if len(points) <= TOGETHER:
        return [chart(f"plot {title}", title, [series(arm) for arm in points])]
    plots = []
    for arm in points:
        rest = tuple(point for other, found in points.items() if other != arm for point in found)
        others = Series("the others", rest, 0, marks=True, faint=True, line=False)
        plots.append(chart(f"plot {title} {arm}", f"{title}: {arm}", [others, series(arm)]))
    return plots


def _curves(result: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Markup]:
    """A plot an arm: its curves of all seeds, those of the others in grey."""
    lines = [(line["arm"], tuple(Point(x, y) for x, y in line["points"])) for line in wanted["lines"]]
    plots = []
    for arm in dict.fromkeys(arm for arm, _ in lines):
        own = [points for other, points in lines if other == arm]
        rest = [points for other, points in lines if other != arm]
        series = [Series("the others", points, 0, faint=True, again=i > 0) for i, points in enumerate(rest)]
        series += [Series(arm, points, _colour(result, arm), marks=True, again=i > 0) for i, points in enumerate(own)]
        title = f"{wanted['title']}: {arm}"
        plots.append(line_chart(f"curves {title}", title, series, wanted["x_title"], wanted["y_title"]))
    return plots


def _points(result: Mapping[str, Any], wanted: Mapping[str, str], arm: str) -> tuple[Point, ...]:
    x, y = (_row(result, wanted[axis], arm)["by_seed"] for axis in ("x", "y"))
    return tuple(Point(x[seed], y[seed]) for seed in x if x[seed] is not None and y[seed] is not None)
