"""The results as people read them: tables in Markdown for a device, and one page with plots (Keel's own charts)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from bench.work import SHAPES, UNITS
from keel.report.plots import Bar, Point, Series, axis, interval_chart, line_chart
from keel.report.wording import percent, plain

TITLES = {
    "sft": "SFT",
    "dpo": "DPO",
    "simpo": "SimPO",
    "kto": "KTO",
    "reward": "Reward model",
    "ppo": "PPO",
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "gspo": "GSPO",
    "cispo": "CISPO",
    "sample_fixed": "Sampling, fixed lengths",
    "sample_varied": "Sampling, lengths varied by a stop token",
}
FIGURES = {"rates": "a second", "peak_mb": "MiB"}
"""The unit of what a curve may show."""
KEEL, OTHERS = 3, (2, 1, 4, 5, 6)  # colours of curves


def read(folder: Path, device: str) -> dict[str, dict[str, Any]]:
    """{task: its results}, in the tasks' order; ``growth`` too when there."""
    found = {}
    for task in (*UNITS, "growth"):
        path = folder / f"{task}-{device}.json"
        if path.exists():
            found[task] = json.loads(path.read_text())
    return found


def devices(folder: Path) -> list[str]:
    """The devices that have results in ``folder``."""
    return sorted(
        {path.stem.partition("-")[2] for task in (*UNITS, "growth") for path in folder.glob(f"{task}-*.json")}
    )


def write(folder: Path, device: str) -> list[Path]:
    """Writes DEVICE.md and DEVICE.html from the results that lie in ``folder``."""
    results = read(folder, device)
    tables, page = folder / f"{device}.md", folder / f"{device}.html"
    tables.write_text(markdown(results, device))
    page.write_text(html(results, device))
    return [tables, page]


# ------------------------------------------------------------------------------------------------------------- tables


def markdown(results: Mapping[str, Mapping[str, Any]], device: str) -> str:
    parts = [f"# Bench: {device}", "", "Written by `python -m bench`; what is measured, and how: bench/README.md.", ""]
    for task, result in results.items():
        if task == "growth":
            parts += ["## How cost grows", ""]
            for found in result["series"].values():
                parts += [*curve_table(found), ""]
            continue
        parts += [f"## {TITLES[task]}", "", f"Rate: {UNITS[task]}.", ""]
        for model, found in result["models"].items():
            parts += [*table(model, found), ""]
    return "\n".join(parts)


def table(model: str, found: Mapping[str, Any]) -> list[str]:
    """One model's lines: rate, memory, share, and the ratio of each of ours to each peer."""
    rows = found["contenders"]
    peers = [name for name in rows if not name.startswith("Keel") and "rate" in rows[name]]
    ratios = {(r["ours"], r["peer"]): r for r in found["ratios"]}
    shape, limits = SHAPES[model], found["machine"]
    lines = [
        f"### Model {model} ({shape.parameters / 1e6:.1f}M parameters)",
        "",
        f"{limits['device']}, {limits['threads']} threads, torch {limits['torch']}; measured matrix products "
        f"{rate_text(limits['flops']['fp32'], 'FLOP/s')} fp32, {rate_text(limits['flops']['bf16'], 'FLOP/s')} bf16, "
        f"memory {rate_text(limits['bandwidth'], 'B/s')}. Load {', '.join(map(str, found['others']['load']))}; other "
        f"programs used {found['others']['other_cores']:.2f} cores on average{busiest(found['others'])}.",
        "",
        "| | precision | rate | peak memory | of the limit | cores used |" + "".join(f" x {name} |" for name in peers),
        "|---|---|---|---|---|---|" + "---|" * len(peers),
    ]
    for name, row in rows.items():
        if "rate" not in row:
            lines.append(f"| {name} | | not measured: {row['problem']} | | | |" + " |" * len(peers))
            continue
        spread = f"{plain(row['rate'])} ({plain(min(row['rates']))}–{plain(max(row['rates']))})"
        cells = [name, row["precision"], spread, f"{row['peak_mb']:,.0f} MiB", percent(row["share_of_limit"])]
        cells += [f"{row['cores']:.1f}"]
        cells += [ratio_text(ratios.get((name, peer))) for peer in peers]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def curve_table(found: Mapping[str, Any]) -> list[str]:
    """One curve's lines: a row a point, a column a contender."""
    points, machine = found["points"], found["machine"]
    names = list(dict.fromkeys(name for p in points for name in (*p[found["shows"]], *p["problems"])))
    lines = [
        f"### {found['title']}",
        "",
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}; {found['when']}.",
        "",
        f"| {found['x_label']} |" + "".join(f" {name} |" for name in names),
        "|---|" + "---|" * len(names),
    ]
    for p in points:
        problems = {name: f"not measured: {why}" for name, why in p["problems"].items()}
        values = problems | {name: plain(value) for name, value in p[found["shows"]].items()}
        lines.append(f"| {p['x']:,.0f} |" + "".join(f" {values.get(name, '')} |" for name in names))
    return lines


def ratio_text(found: Mapping[str, float] | None) -> str:
    return f"**{found['ratio']:.2f}** ({found['low']:.2f}–{found['high']:.2f})" if found else ""


def rate_text(value: float, unit: str) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}"


def busiest(others: Mapping[str, Any]) -> str:
    named = ", ".join(f"{name} {cores:.2f}" for name, cores in others["busiest"].items())
    return f" ({named})" if named else ""


# --------------------------------------------------------------------------------------------------------------- page


def html(results: Mapping[str, Mapping[str, Any]], device: str) -> str:
    body = [Markup("<h1>Bench: {}</h1>").format(device)]
    for task, result in results.items():
        if task == "growth":
            body += growth_charts(result)
            continue
        body.append(Markup("<h2>{}</h2><p class=intro>{}</p>").format(TITLES[task], UNITS[task]))
        for model, found in result["models"].items():
            chart = rate_chart(task, model, found["contenders"])
            body += [chart] if chart else []
            body += [time_split(found["contenders"])]
    css = files("keel.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Bench: {escape(device)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{css}\nmain{{max-width:60rem;margin:2rem auto;'
        f"padding:0 1rem}}</style><main>{Markup('').join(body)}</main></html>\n"
    )


def rate_chart(task: str, model: str, rows: Mapping[str, Mapping[str, Any]]) -> Markup | None:
    """Median rates with the spread of the repetitions."""
    bars = [
        Bar(
            name,
            row["rate"],
            min(row["rates"]),
            max(row["rates"]),
            3 if name.startswith("Keel") else 0,
            plain(row["rate"]),
            f"{percent(row['share_of_limit'])} of the limit, {row['peak_mb']:,.0f} MiB",
        )
        for name, row in rows.items()
        if "rate" in row
    ]
    if not bars:
        return None
    scale = axis([bar.high for bar in bars], "a second", include=(0.0,))
    return interval_chart(f"{TITLES[task]}, model {model}: {UNITS[task]}", bars, scale)


def time_split(rows: Mapping[str, Mapping[str, Any]]) -> Markup:
    """Where the time of a step goes, for contenders that say so."""
    text = [
        f"{name}: " + ", ".join(f"{part} {percent(s / sum(row['parts'].values()))}" for part, s in row["parts"].items())
        for name, row in rows.items()
        if sum(row.get("parts", {}).values()) > 0
    ]
    return Markup("<p class=note>Time split. {}</p>").format("; ".join(text)) if text else Markup("")


def growth_charts(result: Mapping[str, Any]) -> list[Markup]:
    """What each curve shows against its x, in powers of two, because they span so many."""
    charts = [Markup("<h2>How cost grows</h2>")]
    for name, found in result["series"].items():
        shows = found["shows"]
        contenders = dict.fromkeys(c for point in found["points"] for c in point[shows])
        series = [
            Series(
                contender,
                tuple(Point(math.log2(p["x"]), p[shows][contender]) for p in found["points"] if contender in p[shows]),
                colour=KEEL if contender.startswith("Keel") else OTHERS[i % len(OTHERS)],
                marks=True,
            )
            for i, contender in enumerate(contenders)
        ]
        if any(s.points for s in series):
            label = f"{found['x_label']}, as a power of two"
            drawn = line_chart(name, found["title"], series, label, FIGURES[shows], y_include=(0.0,))
            charts.append(Markup('<div style="max-width: 36rem">{}</div>').format(drawn))
    return charts
