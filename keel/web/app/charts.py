"""Two small charts as SVG. Colours and sizes come from the style sheet: the content policy allows no inline styles."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from keel.web.service.quality import Day

WIDTH, HEIGHT, BASE = 640, 150, 118


def pace_chart(days: Sequence[Day]) -> Markup:
    """Votes a day as bars."""
    most = max((day.votes for day in days), default=0)
    if not most:
        return Markup("")
    step = WIDTH / max(14, len(days))
    parts = []
    for number, day in enumerate(days):
        height = (BASE - 24) * day.votes / most
        x, middle = number * step, number * step + step / 2
        label = f"{day.day:%d %b}: {day.votes} by {day.annotators} {'person' if day.annotators == 1 else 'people'}"
        parts.append(
            f"<g><title>{escape(label)}</title>"
            f'<rect class="bar" x="{x + step * 0.18:.1f}" y="{BASE - height:.1f}" width="{step * 0.64:.1f}" '
            f'height="{height:.1f}" rx="3"/>'
            f'<text class="tick" x="{middle:.1f}" y="{BASE - height - 6:.1f}" text-anchor="middle">{day.votes}</text>'
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


def _svg(title: str, parts: Sequence[str]) -> Markup:
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    return Markup(head + "".join(parts) + "</svg>")
