"""The section on search at test time: right answers against tokens, and a table of searches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from keel.report.kinds import title
from keel.report.plots import COLOURS, Point, Series, line_chart
from keel.report.reading import RunFiles
from keel.report.wording import percent, percent_range

THIRDS = ("easy", "middle", "hard")


@dataclass(frozen=True, slots=True)
class SearchCell:
    text: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class SearchRow:
    name: str
    colour: int
    cells: tuple[SearchCell, ...]


@dataclass(frozen=True, slots=True)
class SearchSection:
    """``columns`` name the cells of each row."""

    plot: Markup | None
    columns: tuple[str, ...]
    rows: tuple[SearchRow, ...]


def searches(run: RunFiles) -> SearchSection | None:
    """None where the evaluation has no search."""
    found = run.summary.get("search")
    if not found:
        return None
    curve = run.summary.get("search_curve", ())
    tokens = {(row["name"], row["n"]): row["tokens"] for row in curve}  # a problem that counts; the sums are of all
    colours = {name: 1 + i % (COLOURS - 1) for i, name in enumerate(found)}
    columns = ("right", "a right one is among them", "tokens a problem", "no answer", *THIRDS)
    return SearchSection(
        plot=_plot(curve, colours),
        columns=columns,
        rows=tuple(
            SearchRow(title(name), colours[name], _cells(one, tokens[name, one["n"]])) for name, one in found.items()
        ),
    )


def _cells(one: Mapping[str, Any], tokens: float) -> tuple[SearchCell, ...]:
    return (
        _share(one["accuracy"]),
        SearchCell(percent(one["pass_at_n"])),
        SearchCell(f"{tokens:,.0f}"),
        SearchCell(str(one["unanswered"])),
        *(_share(one["by_third"].get(name)) for name in THIRDS),
    )


def _share(share: Sequence[float] | None) -> SearchCell:
    if share is None:
        return SearchCell("–")
    return SearchCell(percent(share[0]), percent_range(share[1], share[2]))


def _plot(curve: Sequence[Mapping[str, Any]], colours: Mapping[str, int]) -> Markup | None:
    series = []
    for name, colour in colours.items():
        rows = sorted(
            (row for row in curve if row["name"] == name and row["accuracy"]), key=lambda row: float(row["tokens"])
        )
        points = tuple(Point(row["tokens"], row["accuracy"][0], tuple(row["accuracy"][1:])) for row in rows)
        if points:
            series.append(Series(title(name), points, colour, marks=True))
    if not series:
        return None
    return line_chart("search", "Right answers by compute", series, "tokens a problem", "right", y_format=percent)
