"""Small charts as SVG. Colours and sizes come from the style sheet: the content policy allows no inline styles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from keel.feedback.standings import Standing
from keel.store.tallies import DayDone
from keel.web.service.quality import Day

WIDTH, HEIGHT, BASE = 640, 150, 118


def pace_chart(days: Sequence[DayDone]) -> Markup:
    """What was done a day as bars."""
    most = max((day.done for day in days), default=0)
    if not most:
        return Markup("")
    step = WIDTH / max(14, len(days))
    parts = []
    for number, day in enumerate(days):
        height = (BASE - 24) * day.done / most
        x, middle = number * step, number * step + step / 2
        label = f"{day.day:%d %b}: {day.done} by {day.annotators} {'person' if day.annotators == 1 else 'people'}"
        parts.append(
            f"<g><title>{escape(label)}</title>"
            f'<rect class="bar" x="{x + step * 0.18:.1f}" y="{BASE - height:.1f}" width="{step * 0.64:.1f}" '
            f'height="{height:.1f}" rx="3"/>'
            f'<text class="tick" x="{middle:.1f}" y="{BASE - height - 6:.1f}" text-anchor="middle">{day.done}</text>'
            f'<text class="tick" x="{middle:.1f}" y="{BASE + 20}" text-anchor="middle">{day.day:%d %b}</text></g>'
        )
    return _svg("Judgements a day", parts)


def agreement_chart(days: Sequence[Day]) -> Markup:
    """Agreement of all votes up to each day, as a line from 50% (chance, for two sides) to 100%."""
    points = [(day, day.agreement) for day in days if day.agreement is not None]
    if len(points) < 2:
        return Markup("")
    low = min(0.5, *(agreement for _, agreement in points))
    step = (WIDTH - 90) / (len(points) - 1)
    places = [
        (45 + number * step, BASE - (BASE - 20) * (agreement - low) / (1 - low))
        for number, (_, agreement) in enumerate(points)
    ]
    parts = []
    for share in (low, (1 + low) / 2, 1.0):
        y = BASE - (BASE - 20) * (share - low) / (1 - low)
        parts.append(f'<line class="grid" x1="40" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="34" y="{y + 4:.1f}" text-anchor="end">{100 * share:.0f}%</text>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f'<polyline class="line" points="{line}"/>')
    for (x, y), (day, agreement) in zip(places, points, strict=True):
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4">')
        parts.append(f"<title>{escape(f'{day.day:%d %b}: {100 * agreement:.0f}%')}</title></circle>")
    for number in (0, len(points) - 1):
        x, anchor = places[number][0], "start" if number == 0 else "end"
        parts.append(f'<text class="tick" x="{x:.1f}" y="{BASE + 20}" text-anchor="{anchor}">')
        parts.append(f"{points[number][0].day:%d %b}</text>")
    return _svg("Agreement so far", parts)


def _svg(title: str, parts: Sequence[str], height: int = HEIGHT) -> Markup:
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
    return Markup(head + "".join(parts) + "</svg>")


def standings_chart(standings: Sequence[Standing]) -> Markup:
    """The ratings of the largest part with their intervals, a row a model, the best on top."""
    rated = [(one, one.rating) for one in standings if one.part == 1 and one.rating is not None]
    if len(rated) < 2:
        return Markup("")
    ends = [end for one, rating in rated for end in (one.low or rating, one.high or rating)]
    step = next(
        size
        for size in itertools.chain((25, 50, 100, 200, 500, 1000), itertools.count(2000, 1000))
        if (max(ends) - min(ends)) / size <= 6
    )
    low, high = step * math.floor(min(ends) / step), step * (math.floor(max(ends) / step) + 1)
    left, row, base = 210, 30, 30 * len(rated) + 8

    def x(rating: float) -> float:
        return left + (WIDTH - left - 24) * (rating - low) / (high - low)

    parts = []
    for tick in range(low, high + 1, step):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="0" y2="{base}"/>')
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{base + 18}" text-anchor="middle">{tick}</text>')
    for number, (one, rating) in enumerate(rated):
        y = row * number + row / 2 + 2
        name = one.model if len(one.model) <= 30 else f"…{one.model[-29:]}"
        told = "" if one.low is None or one.high is None else f", 95% interval {one.low:.0f} to {one.high:.0f}"
        parts.append(f"<g><title>{escape(f'{one.model}: {rating:.0f}{told}')}</title>")
        parts.append(f'<text class="tick name" x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        if one.low is not None and one.high is not None:
            parts.append(f'<line class="line" x1="{x(one.low):.1f}" x2="{x(one.high):.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot" cx="{x(rating):.1f}" cy="{y}" r="5"/></g>')
    return _svg("Ratings with their 95% intervals", parts, base + 26)
