"""The section that compares policies at equal KL: a plot of all runs, a table of methods, what it shows in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from keel.report.charts import Palette
from keel.report.kinds import title
from keel.report.plots import COLOURS, Point, Series, line_chart
from keel.report.reading import RunFiles
from keel.report.wording import number, one_place, plain, two_places


@dataclass(frozen=True, slots=True)
class FrontierCell:
    """``text``: the judge's score there, or that it is not reached; ``detail``: its interval; ``gain``: what it is
    beyond the baseline's, with its interval."""

    text: str
    detail: str = ""
    gain: str = ""
    runs: str = ""


@dataclass(frozen=True, slots=True)
class FrontierRow:
    method: str
    colour: int
    cells: tuple[FrontierCell, ...]


@dataclass(frozen=True, slots=True)
class FrontierSection:
    baseline: str
    prompts: int
    per_prompt: int
    plot: Markup | None
    nats: tuple[str, ...]
    rows: tuple[FrontierRow, ...]
    statements: tuple[str, ...]


def frontier(run: RunFiles, palette: Palette) -> FrontierSection | None:
    """None where the evaluation has no frontier."""
    found = run.summary.get("frontier")
    if not found:
        return None
    methods = list(dict.fromkeys(curve["method"] for curve in found["curves"]))
    colours = _colours(methods, palette)
    rows = [
        FrontierRow(title(method), colours[method], tuple(map(_cell, _of(found["table"], method))))
        for method in methods
    ]
    return FrontierSection(
        baseline=title(str(found["against"])),
        prompts=int(found["prompts"]),
        per_prompt=int(found.get("per_prompt", 1)),
        plot=_plot(found, methods, colours),
        nats=tuple(f"{nats:g} nats" for nats in found["at"]),
        rows=tuple(rows),
        statements=tuple(found.get("statements", ())),
    )


def _colours(methods: Sequence[str], palette: Palette) -> dict[str, int]:
    """A method that is a stage has that one's colour; no two of the first six methods share one."""
    wanted = [palette[method] for method in methods]
    if 0 not in wanted and len(set(wanted)) == len(wanted):
        return dict(zip(methods, wanted, strict=True))
    return {method: 1 + i % (COLOURS - 1) for i, method in enumerate(methods)}


def _of(table: Sequence[Mapping[str, Any]], method: str) -> list[Mapping[str, Any]]:
    return [cell for cell in table if cell["method"] == method]


def _cell(cell: Mapping[str, Any]) -> FrontierCell:
    gold, gain = cell.get("gold"), cell.get("gain")
    if not gold:
        return FrontierCell("not graded" if cell.get("ungraded") else "not reached")
    runs = "" if cell["reached"] == cell["curves"] else f"{cell['reached']} of {cell['curves']} runs"
    said = ""
    if gain:
        between = _between(gain)
        said = f"{'+' if gain[0] >= 0 else ''}{two_places(gain[0])}" + (f" ({between})" if between else "")
    return FrontierCell(two_places(gold[0]), _between(gold), said, runs)


def _between(value: Sequence[float | None]) -> str:
    low, high = number(value[1]), number(value[2])
    return f"{two_places(low)} to {two_places(high)}" if low is not None and high is not None else ""


def _plot(found: Mapping[str, Any], methods: Sequence[str], colours: Mapping[str, int]) -> Markup | None:
    series: list[Series] = []
    for method in methods:
        runs = [curve for curve in found["curves"] if curve["method"] == method]
        for place, curve in enumerate(runs):
            points = [
                Point(math.sqrt(max(kl, 0.0)), gold)
                for point in curve["points"]
                if (kl := number(point.get("kl"))) is not None and (gold := number(point.get("gold"))) is not None
            ]
            # Beyond the palette's colours the same ones come again, dashed.
            dashed = methods.index(method) // (COLOURS - 1) % 2 == 1
            series.append(Series(title(method), tuple(points), colours[method], dashed, marks=True, again=place > 0))
    if not any(one.points for one in series):
        return None
    asked = [math.sqrt(nats) for nats in found["at"]]
    at = ", ".join(plain(nats) for nats in found["at"])
    note = f"Every training run from the baseline on, a mark a checkpoint. Upright lines: {at} nats (√KL "
    note += ", ".join(one_place(root) for root in asked) + ")."
    return line_chart(
        "frontier", "Gold at equal KL", series, "√KL (KL in nats a reply)", "judge’s mean score", x_include=(0.0,),
        note=note, guides=asked,
    )  # fmt: skip
