"""The GPU's results as people read them: ``gpu.md``, tables, and ``gpu.html``, with plots (Keel's own charts)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from bench.report import KEEL, rate_text, ratio_text
from keel.report.plots import Bar, axis, interval_chart
from keel.report.wording import percent, plain

Cases = Mapping[str, Mapping[str, Any]]
Column = tuple[str, Callable[[Any], str]]

TITLES = {
    "correctness": "Correctness",
    "training": "Training",
    "peers": "Beside TRL",
    "sampling": "Sampling",
    "steps": "Where a step's time goes",
    "memory": "Memory",
}


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"


def _milliseconds(value: float) -> str:
    return f"{1000 * value:,.1f} ms"


def _split(parts: Mapping[str, float]) -> str:
    whole = sum(parts.values())
    return ", ".join(f"{name} {percent(seconds / whole)}" for name, seconds in parts.items()) if whole else ""


# What a table shows of a case, in this order, where the piece's cases have it.
COLUMNS: Mapping[str, Column] = {
    "tokens_a_second": ("tokens a second", plain),
    "completions_a_second": ("completions a second", plain),
    "of_datasheet": ("MFU", percent),
    "of_measured": ("of the measured rate", percent),
    "of_limit": ("of the limit", percent),
    "milliseconds_a_step": ("ms a step", plain),
    "floor_milliseconds_a_step": ("at the least", plain),
    "step": ("a step", _milliseconds),
    "seconds": ("seconds", plain),
    "above": ("above what was there", _gib),
    "head_gradient": ("the head's gradient", _gib),
    "peak": ("peak memory", _gib),
    "parts": ("time split", _split),
    "split": ("time split", _split),
}


def read(folder: Path) -> list[dict[str, Any]]:
    """All pieces' results that lie in ``folder``, by device and in the pieces' order."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("gpu-*.json"))]
    order = list(TITLES)
    return sorted(found, key=lambda result: (result["machine"]["device"], order.index(result["piece"])))


def write(folder: Path) -> list[Path]:
    """Writes gpu.md and gpu.html from the results that lie in ``folder``; nothing where there are none."""
    results = read(folder)
    if not results:
        return []
    tables, page = folder / "gpu.md", folder / "gpu.html"
    tables.write_text(markdown(results))
    page.write_text(html(results))
    return [tables, page]


# ------------------------------------------------------------------------------------------------------------- tables


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    lines = ["# Bench: GPU", "", "Written by `python -m bench gpu`; what is measured, and how: bench/README.md.", ""]
    device = None
    for result in results:
        if result["machine"]["device"] != device:
            device = result["machine"]["device"]
            lines += [f"## {device}", "", about(result["machine"]), ""]
        lines += [f"### {TITLES[result['piece']]}", "", *table_of(result), ""]
    return "\n".join(lines)


def table_of(result: Mapping[str, Any]) -> list[str]:
    if "checks" in result:
        return checks_table(result["checks"])
    return (peers_table if result["piece"] == "peers" else cases_table)(result.get("cases", {}))


def checks_table(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Correctness: each comparison's error beside its bound, or why there is none."""
    lines = ["| check | comparison | | error | bound |", "|---|---|---|---|---|"]
    for row in checks:
        figures = f"{row['error']:.2g} | {row['bound']:.2g}" if "error" in row else f"{row.get('why', '')} |"
        lines.append(f"| {row['check']} | {row['what']} | {row['state']} | {figures} |")
    return lines


def about(machine: Mapping[str, Any]) -> str:
    """The device's rates and what ran on it, in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    sheet = f" (its makers: {rate_text(machine['datasheet'], 'FLOP/s')})" if "datasheet" in machine else ""
    memory = f", {_gib(machine['memory'])}" if "memory" in machine else ""
    return (
        f"Measured: products {rate_text(machine['flops']['bf16'], 'FLOP/s')} bf16{sheet}, "
        f"{rate_text(machine['flops']['fp32'], 'FLOP/s')} fp32, memory {rate_text(machine['bandwidth'], 'B/s')}"
        f"{memory}. {versions}."
    )


def cases_table(cases: Cases) -> list[str]:
    """A row a case; what a case lacks, or why it was not measured, stands in its row."""
    shown = [key for key in COLUMNS if any(key in case for case in cases.values())]
    if not shown:
        return [f"- {name}: {outcome(case)}" for name, case in cases.items()]
    lines = [
        "| | " + " | ".join(COLUMNS[key][0] for key in shown) + " |",
        "|---|" + "---|" * len(shown),
    ]
    for name, case in cases.items():
        why = reason(case)
        cells = [why] + [""] * (len(shown) - 1) if why else [cell(key, case) for key in shown]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def cell(key: str, case: Mapping[str, Any]) -> str:
    return COLUMNS[key][1](case[key]) if key in case else ""


def reason(case: Mapping[str, Any]) -> str:
    """Why a case has no figures; empty where it has."""
    problem = f"failed: {case['problem']}" if "problem" in case else ""
    return problem or (f"not measured: {case['left_out']}" if "left_out" in case else "")


def outcome(case: Mapping[str, Any]) -> str:
    """A case's figures in a line."""
    hidden = ("when", "took", "traceback")
    return reason(case) or ", ".join(f"{key} {value}" for key, value in case.items() if key not in hidden)


def peers_table(cases: Cases) -> list[str]:
    lines = ["| | contender | precision | rate | peak memory | Keel to it |", "|---|---|---|---|---|---|"]
    for name, case in cases.items():
        if reason(case):
            lines.append(f"| {name} | | | {reason(case)} | | |")
            continue
        ratios = {found["peer"]: ratio_text(found) for found in case["ratios"]}
        for who, row in case["contenders"].items():
            if "rate" not in row:
                lines.append(f"| {name} | {who} | | not measured: {row['problem']} | | |")
                continue
            figures = f"{row['precision']} | {plain(row['rate'])} | {row['peak_mb']:,.0f} MiB"
            lines.append(f"| {name} | {who} | {figures} | {ratios.get(who, '')} |")
    return lines


# --------------------------------------------------------------------------------------------------------------- page


def html(results: Sequence[Mapping[str, Any]]) -> str:
    body = [Markup("<h1>Bench: GPU</h1>")]
    device = None
    for result in results:
        if result["machine"]["device"] != device:
            device = result["machine"]["device"]
            body.append(Markup("<h2>{}</h2><p class=intro>{}</p>").format(device, about(result["machine"])))
        body += charts(result["piece"], result.get("cases", {}))
    css = files("keel.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape("Bench: GPU")}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{css}\nmain{{max-width:60rem;margin:2rem auto;'
        f"padding:0 1rem}}</style><main>{Markup('').join(body)}</main></html>\n"
    )


# piece -> the figures that are drawn, each with its title, its unit and how a value is written.
DRAWN: Mapping[str, Sequence[tuple[str, str, str, Callable[[Any], str]]]] = {
    "training": (
        ("tokens_a_second", "Training: tokens a second", "a second", plain),
        ("of_datasheet", "Training: model FLOPs utilisation", "of the makers' rate", percent),
    ),
    "sampling": (("tokens_a_second", "Sampling: tokens a second", "a second", plain),),
    "steps": (("completions_a_second", "PPO and GRPO: completions a second", "a second", plain),),
    "memory": (("peak", "Peak memory", "bytes", _gib),),
}


def charts(piece: str, cases: Cases) -> list[Markup]:
    found = []
    for key, title, unit, written in DRAWN.get(piece, ()):
        rows = [(name, case[key], shares(case)) for name, case in cases.items() if key in case]
        found += [bars(title, unit, rows, written)] if rows else []
    if piece == "peers":
        for name, case in cases.items():
            named = case.get("contenders", {}).items()
            rows = [(who, row["rate"], f"{row['peak_mb']:,.0f} MiB") for who, row in named if "rate" in row]
            found += [bars(f"{name}: {case['unit']}", "a second", rows, plain)] if rows else []
    splits = [(name, case.get("split") or case.get("parts")) for name, case in cases.items()]
    text = "; ".join(f"{name}: {_split(parts)}" for name, parts in splits if parts)
    return found + ([Markup("<p class=note>Time split. {}</p>").format(text)] if text else [])


def shares(case: Mapping[str, Any]) -> str:
    """What is said beside a bar."""
    of = [("of_datasheet", "MFU"), ("of_limit", "of the limit")]
    return ", ".join(f"{percent(case[key])} {name}" for key, name in of if key in case)


def bars(title: str, unit: str, rows: Sequence[tuple[str, float, str]], written: Callable[[Any], str]) -> Markup:
    drawn = [
        Bar(name, value, value, value, KEEL if ours(name) else 0, written(value), beside)
        for name, value, beside in rows
    ]
    return interval_chart(title, drawn, axis([bar.high for bar in drawn], unit, include=(0.0,)))


def ours(name: str) -> bool:
    return not name.startswith(("generate", "continuous", "TRL"))
