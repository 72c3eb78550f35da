"""Plots as inline SVG: small, crisp, coloured by CSS variables, so that they follow the page into the dark.

Series differ in colour (Okabe and Ito's palette, safe for colour-blind readers, adjusted for contrast), and also in
their marks and dashes. Every plot has a title and a description that says in words what it shows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from markupsafe import Markup, escape

from keel.report.wording import Format, percent, plain

WIDTH, HEIGHT = 360, 240  # CSS pixels at scale 1; a phone shows one plot across, a desktop three
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 24, 38
COLOURS = 7
MOST_POINTS = 160  # of a line: about two pixels each


@dataclass(frozen=True, slots=True)
class Point:
    """``interval``: (low, high) of y, drawn as an upright bar."""

    x: float
    y: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """``colour`` is an index into the palette; ``marks``: each point is a measurement of its own; ``faint``: drawn
    behind the others; ``line``: points are joined; ``again``: it looks like an earlier one and is not named again."""

    label: str
    points: tuple[Point, ...]
    colour: int = 2
    dashed: bool = False
    marks: bool = False
    faint: bool = False
    line: bool = True
    again: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    low: float
    high: float
    ticks: tuple[float, ...]
    label: str
    format: Format = plain

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def tick_text(self, tick: float) -> str:
        """Ticks of one axis have the same number of decimals."""
        if self.format is percent:
            return percent(tick)
        decimals = max((len(f"{t:.10f}".rstrip("0").partition(".")[2]) for t in self.ticks), default=0)
        return f"{tick:,.{decimals}f}".replace("-", "−")


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a dot-and-interval chart; ``text`` and ``range_text`` say the value and the interval. ``single``: the
    values that it is the mean of, drawn small."""

    label: str
    value: float
    low: float
    high: float
    colour: int
    text: str
    range_text: str
    single: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class DotRow:
    """One row of a dot chart: ``dots`` in the order of the chart's legend, None where a model has no value."""

    label: str
    dots: tuple[float | None, ...]


def ticks(low: float, high: float, most: int = 5) -> tuple[float, ...]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) within [low, high], at most ``most`` + 1 of them."""
    assert high > low
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return tuple(round(i * step, 12) for i in range(first, last + 1))


def axis(
    values: Sequence[float], label: str, include: Sequence[float] = (), fmt: Format = plain, pad: float = 0.05
) -> Axis:
    """An axis that shows all values and ``include``, with a little air."""
    everything = [*values, *include]
    low, high = min(everything), max(everything)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    air = pad * (high - low)
    bottom = low if low in include else low - air
    top = high if high in include else high + air
    return Axis(bottom, top, ticks(bottom, top), label, fmt)


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> tuple[Point, ...]:
    """Means over runs of neighbouring points, so that a long run stays a small page."""
    if len(points) <= most:
        return tuple(points)
    cuts = [round(i * len(points) / most) for i in range(most + 1)]
    groups = [points[a:b] for a, b in pairwise(cuts)]
    return tuple(Point(sum(p.x for p in g) / len(g), sum(p.y for p in g) / len(g)) for g in groups)


# ------------------------------------------------------------------------------------------------ charts with two axes


def line_chart(
    key: str,
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    y_include: Sequence[float] = (),
    x_include: Sequence[float] = (),
    y_format: Format = plain,
    note: str = "",
    guides: Sequence[float] = (),
    x_ticks: Sequence[float] = (),
) -> Markup:
    """Lines over a common x. ``key`` is unique on the page. ``guides``: where upright lines stand. ``x_ticks``: what
    the x axis names, where it is not to be round numbers."""
    shown = [replace(s, points=thinned(s.points)) for s in series if s.points]
    assert shown, "a chart needs points"
    points = [p for s in shown for p in s.points]
    x = axis([p.x for p in points], x_label, x_include, pad=0.0)
    if x_ticks:
        x = replace(x, ticks=tuple(x_ticks))
    y = axis([v for p in points for v in (p.y, *(p.interval or ()))], y_label, y_include, y_format)
    upright = "".join(
        f'<line class="guide" x1="{_px(x, at):.1f}" y1="{TOP}" x2="{_px(x, at):.1f}" y2="{HEIGHT - BOTTOM}"/>'
        for at in guides
        if x.low <= at <= x.high
    )
    body = upright + "".join(_series_svg(s, x, y) for s in sorted(shown, key=lambda s: not s.faint))
    said = "; ".join(f"{s.label} from {y.format(s.points[0].y)} to {y.format(s.points[-1].y)}" for s in shown)
    named = [s for s in shown if not s.again]
    return _figure(key, title, f"{y_label} against {x_label}: {said}.", _frame(x, y) + body, named, note)


def reliability_chart(key: str, title: str, bins: Sequence[tuple[float, float, int]], colour: int, note: str) -> Markup:
    """``bins``: (mean predicted, observed share, count); the area of a dot grows with its count."""
    x = Axis(0, 1, (0, 0.25, 0.5, 0.75, 1), "predicted probability", percent)
    y = Axis(0, 1, (0, 0.25, 0.5, 0.75, 1), "observed share", percent)
    most = max(count for _, _, count in bins)
    line = " ".join(f"{_px(x, p):.1f},{_py(y, o):.1f}" for p, o, _ in bins)
    dots = "".join(
        f'<circle cx="{_px(x, p):.1f}" cy="{_py(y, o):.1f}" r="{2.5 + 5.5 * math.sqrt(count / most):.1f}"/>'
        for p, o, count in bins
    )
    diagonal = f'<line class="guide" x1="{_px(x, 0)}" y1="{_py(y, 0)}" x2="{_px(x, 1)}" y2="{_py(y, 1)}"/>'
    body = f'{diagonal}<g class="s{colour}"><polyline class="line thin" points="{line}"/><g class="dots">{dots}</g></g>'
    said = "; ".join(f"predicted {percent(p)}, observed {percent(o)} ({count})" for p, o, count in bins)
    return _figure(key, title, f"Observed against predicted: {said}.", _frame(x, y) + body, (), note)


def scatter_chart(
    key: str, title: str, points: Sequence[Point], x_label: str, y_label: str, colour: int, note: str
) -> Markup:
    x = axis([p.x for p in points], x_label)
    y = axis([p.y for p in points], y_label)
    dots = "".join(f'<circle cx="{_px(x, p.x):.1f}" cy="{_py(y, p.y):.1f}" r="2.4"/>' for p in points)
    description = f"{len(points)} points, {y_label} against {x_label}. {note}"
    body = f'<g class="s{colour} cloud">{dots}</g>'
    return _figure(key, title, description, _frame(x, y) + body, (), note)


def _figure(key: str, title: str, description: str, body: str, legend: Sequence[Series], note: str) -> Markup:
    slug = re.sub(r"[^a-z0-9]+", "-", key.lower())
    return Markup(
        f'<figure class="plot"><figcaption>{escape(title)}</figcaption>{_legend(legend) if len(legend) > 1 else ""}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{slug}-t {slug}-d">'
        f'<title id="{slug}-t">{escape(title)}</title><desc id="{slug}-d">{escape(description)}</desc>{body}</svg>'
        f"{f'<p class=note>{escape(note)}</p>' if note else ''}</figure>"
    )


def _legend(series: Sequence[Series]) -> str:
    items = "".join(
        f'<li><svg class="s{s.colour}" width="26" height="10" aria-hidden="true">'
        + (f'<line class="{_line_class(s)}" x1="1" y1="5" x2="25" y2="5"/>' if s.line else "")
        + (_mark(s.colour, 13, 5) if s.marks else "")
        + f"</svg>{escape(s.label)}</li>"
        for s in series
    )
    return f'<ul class="legend">{items}</ul>'


def _px(x: Axis, value: float) -> float:
    return LEFT + x.share(value) * (WIDTH - LEFT - RIGHT)


def _py(y: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - y.share(value) * (HEIGHT - TOP - BOTTOM)


def _frame(x: Axis, y: Axis) -> str:
    parts = [f'<text class="axis-label" x="{LEFT - 38}" y="12">{escape(y.label)}</text>']
    for tick in y.ticks:
        at = _py(y, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{y.tick_text(tick)}</text>'
        )
    for tick in x.ticks:
        at = _px(x, tick)
        anchor = "end" if at > WIDTH - RIGHT - 8 else "middle"
        place = f'x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="{anchor}"'
        parts.append(f'<text class="tick" {place}>{x.tick_text(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="axis-label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>'
    )
    return "".join(parts)


def _line_class(series: Series) -> str:
    return "line" + (" dashed" if series.dashed else "") + (" faint" if series.faint else "")


def _series_svg(series: Series, x: Axis, y: Axis) -> str:
    places = [(_px(x, p.x), _py(y, p.y)) for p in series.points]
    line = ""
    if series.line and len(places) > 1:
        joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        line = f'<polyline class="{_line_class(series)}" points="{joined}"/>'
    bars = "".join(
        f'<line class="interval thin" x1="{_px(x, p.x):.1f}" x2="{_px(x, p.x):.1f}" y1="{_py(y, p.interval[0]):.1f}" '
        f'y2="{_py(y, p.interval[1]):.1f}"/>'
        for p in series.points
        if p.interval is not None
    )
    marks = ""
    if series.marks or len(places) == 1:
        marks = "".join(_mark(series.colour, a, b) for a, b in places)
    return f'<g class="s{series.colour}">{bars}{line}{marks}</g>'


def _mark(colour: int, x: float, y: float) -> str:
    """A shape that goes with the colour."""
    shape = colour % 4
    if shape == 0:
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
    if shape == 1:
        return f'<rect class="mark" x="{x - 2.9:.1f}" y="{y - 2.9:.1f}" width="5.8" height="5.8"/>'
    corners = ((0, -4), (4, 0), (0, 4), (-4, 0)) if shape == 2 else ((0, -4), (3.8, 3), (-3.8, 3))
    return f'<polygon class="mark" points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)}"/>'


# ------------------------------------------------------------------------------------- charts with a row for each name


def interval_chart(caption: str, bars: Sequence[Bar], scale: Axis, guide: float | None = None) -> Markup:
    """A dot with its interval in each row, as a table that a screen reader reads out."""
    rows = "".join(
        f'<tr><th scope="row">{escape(bar.label)}</th><td class="track">{_track(scale, guide)}'
        f'<g class="s{bar.colour}"><line class="interval" x1="{_pc(scale, bar.low)}" x2="{_pc(scale, bar.high)}" '
        f'y1="14" y2="14"/><circle class="dot" cx="{_pc(scale, bar.value)}" cy="14" r="6"/>'
        + "".join(f'<circle class="single" cx="{_pc(scale, value)}" cy="14" r="2.6"/>' for value in bar.single)
        + "</g></svg></td>"
        f'<td class="value">{escape(bar.text)} <small>{escape(bar.range_text)}</small></td></tr>'
        for bar in bars
    )
    return Markup(f'<table class="dotrows"><caption>{escape(caption)}</caption>{rows}{_scale_row(scale, True)}</table>')


def dot_chart(caption: str, names: Sequence[tuple[str, int]], rows: Sequence[DotRow], scale: Axis) -> Markup:
    """Several dots in each row, one for each (name, colour)."""
    legend = _legend([Series(name, (), colour, marks=True, line=False) for name, colour in names])
    body = ""
    for row in rows:
        pairs = list(zip(names, row.dots, strict=True))
        marks = "".join(_row_mark(colour, _pc(scale, v)) for (_, colour), v in pairs if v is not None)
        said = "; ".join(f"{name} {scale.format(v)}" for (name, _), v in pairs if v is not None)
        body += (
            f'<tr><th scope="row">{escape(row.label)}</th>'
            f'<td class="track"><span class="vh">{escape(said)}</span>{_track(scale, None)}{marks}</svg></td></tr>'
        )
    inside = f"<caption>{escape(caption)}</caption>{body}{_scale_row(scale, False)}"
    return Markup(f'{legend}<table class="dotrows wide">{inside}</table>')


def _row_mark(colour: int, at: str) -> str:
    return f'<svg class="s{colour}" x="{at}" y="14" overflow="visible"><g class="big">{_mark(colour, 0, 0)}</g></svg>'


def _track(scale: Axis, guide: float | None) -> str:
    lines = "".join(
        f'<line class="grid" x1="{_pc(scale, t)}" x2="{_pc(scale, t)}" y1="0" y2="28"/>' for t in scale.ticks
    )
    if guide is not None:
        lines += f'<line class="guide" x1="{_pc(scale, guide)}" x2="{_pc(scale, guide)}" y1="0" y2="28"/>'
    return f'<svg width="100%" height="28" aria-hidden="true">{lines}'


def _scale_row(scale: Axis, has_value: bool) -> str:
    def anchor(tick: float) -> str:
        share = scale.share(tick)
        return "start" if share < 0.04 else "end" if share > 0.96 else "middle"

    texts = "".join(
        f'<text class="tick" x="{_pc(scale, t)}" y="12" text-anchor="{anchor(t)}">{scale.tick_text(t)}</text>'
        for t in scale.ticks
    )
    return (
        f'<tr class="scale" aria-hidden="true"><td></td><td class="track"><svg width="100%" height="34">{texts}'
        f'<text class="axis-label" x="50%" y="29" text-anchor="middle">{escape(scale.label)}</text></svg></td>'
        f"{'<td></td>' if has_value else ''}</tr>"
    )


def _pc(scale: Axis, value: float) -> str:
    return f"{100 * min(max(scale.share(value), 0.0), 1.0):.2f}%"
