"""The table of models and their figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keel.report.kinds import title
from keel.report.reading import RunFiles
from keel.report.wording import (
    Format,
    number,
    one_place,
    percent,
    percent_range,
    phrase,
    three_places,
    two_places,
)


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of the table (a row on the page). ``better``: +1 more is better, -1 less, 0 neither."""

    key: str
    label: str
    format: Format
    better: int
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    detail: str = ""
    best: bool = False


@dataclass(frozen=True, slots=True)
class TableRow:
    label: str
    unit: str
    better: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class TableGroup:
    heading: str
    rows: tuple[TableRow, ...]


def table(run: RunFiles) -> list[TableGroup]:
    """Models across, figures down. The best of each figure is marked among the baseline and what came after it: a base
    model that hardly answers has few faults, which says nothing."""
    keys = list(dict.fromkeys(key for figures in run.models.values() for key in figures))
    vs, kl = (
        f"win_rate_vs_{run.baseline}",
        [key for key in keys if key.startswith("kl_to_") and not key.endswith(("_se", "_k3"))],
    )
    known = {"answer_rate", "correct_rate", "invented_rate", "harmful_rate", "over_refusal_rate", "finished_rate"}
    other = [key for key in keys if key.endswith("_rate") and key not in known]
    groups = {
        "Outcome": [
            Column(vs, f"Win rate against {title(run.baseline)}", percent, 1),
            Column("gold_reward", "Judge's score", two_places, 1),
            *([Column("graded", "Replies that it graded", percent, 0)] if _some_ungraded(run) else []),
            Column("reward", "Learned reward", two_places, 0),
            *(
                Column(key, f"of it {key.rpartition('/')[2]}", two_places, 0)
                for key in keys
                if key.startswith("reward/")
            ),
        ],
        "Behaviour": [
            Column("answer_rate", "Answers", percent, 1),
            Column("correct_rate", "Correct", percent, 1),
            Column("invented_rate", "Invented answers", percent, -1),
            Column("harmful_rate", "Harmful compliance", percent, -1),
            Column("over_refusal_rate", "Over-refusal", percent, -1),
            *(Column(key, title(phrase(key.removesuffix("_rate"))), percent, 0) for key in other),
            Column("mean_length", "Reply length", one_place, 0, "tokens"),
            Column("finished_rate", "Ends by itself", percent, 1),
            Column("repetition", "Repetition", percent, -1),
        ],
        "What it cost": [
            *(
                Column(key, f"KL from {title(key.removeprefix('kl_to_'))}", two_places, 0, "nats per reply")
                for key in kl
            ),
            Column("base_text_loss", "Loss on plain text", three_places, -1, "nats per token"),
            Column("fact_accuracy", "Fact accuracy", percent, 1),
        ],
    }
    found = [
        TableGroup(h, tuple(r for c in columns if (r := _row(run, c)) is not None)) for h, columns in groups.items()
    ]
    return [group for group in found if group.rows]


def _some_ungraded(run: RunFiles) -> bool:
    return any(figures.get("graded", 1) < 1 for figures in run.models.values())


def _row(run: RunFiles, column: Column) -> TableRow | None:
    values = {name: _value(figures.get(column.key)) for name, figures in run.models.items()}
    if all(value is None for value in values.values()):
        return None
    ranked = {run.baseline, *run.contenders} if run.baseline in run.models else set(run.models)
    compared = {name: value for name, value in values.items() if value is not None and name in ranked}
    winner = None
    if column.better and len(compared) > 1:
        winner = column.format(max(compared.values(), key=lambda value: column.better * value))
    cells = []
    for name, value in values.items():
        if value is None:
            cells.append(Cell("–"))
            continue
        text = column.format(value)
        # Equal to the digits shown is equal.
        cells.append(Cell(text, _detail(run.models[name], column), name in compared and text == winner))
    return TableRow(column.label, column.unit, column.better, tuple(cells))


def _value(value: Any) -> float | None:
    return number(value[0]) if isinstance(value, list) and value else number(value)


def _detail(figures: Mapping[str, Any], column: Column) -> str:
    """An interval or a standard error, where there is one."""
    value = figures.get(column.key)
    if isinstance(value, list) and len(value) == 3:
        return percent_range(value[1], value[2])
    error = number(figures.get(f"{column.key}_se"))
    return "" if error is None else f"± {column.format(error)}"
