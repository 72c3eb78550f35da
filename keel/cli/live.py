"""What a run shows while it works, and the tables at its end.

On a terminal, a table of the stages that is redrawn in place; elsewhere, a plain line every few seconds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

PLAIN_EVERY = 5.0  # seconds between two plain lines
# The figures that tell most about a stage come first; four are shown.
FIGURES = (
    "objective/scores",
    "objective/kl",
    "eval/gold",
    "loss",
    "eval/loss",
    "accuracy",
    "rewards/accuracies",
    "rewards/margins",
    "completions/mean_length",
    "policy/entropy_avg",
)
SHOWN = 4


@dataclass
class _Row:
    """One stage's line. ``task`` is what the stage is at; a stage may have several tasks, one after the other."""

    name: str
    state: Literal["waiting", "running", "done", "failed"] = "waiting"
    task: str = ""
    done: int = 0
    total: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""
    started: float = 0.0
    task_started: float = 0.0
    task_first: int = 0
    seconds: float = 0.0


class Progress:
    """A `keel.types.Reporter` that knows the run's stages. Use it as a context manager; ``stage(name)`` says which
    stage is at work. ``beside``: what is said with each stage that ends, and under the table."""

    def __init__(
        self, stages: Sequence[str], console: Console | None = None, beside: Callable[[], str] = lambda: ""
    ) -> None:
        self.console = console or Console()
        self._beside = beside
        self._rows = {name: _Row(name) for name in stages}
        self._row = _Row("")
        self._live: Live | None = None
        self._spinner = Spinner("dots")
        self._last_line = 0.0

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live = Live(
                get_renderable=self._table, console=self.console, refresh_per_second=4, vertical_overflow="visible"
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        row = self._row = self._rows.setdefault(name, _Row(name))
        row.state, row.started = "running", time.monotonic()
        self._line(f"{name}: started")
        try:
            yield
        except BaseException:
            row.state, row.seconds = "failed", time.monotonic() - row.started
            raise
        row.state, row.seconds = "done", time.monotonic() - row.started
        self._line(f"{name}: done in {duration(row.seconds)}{_figures(row, ', ')}{self._said_beside('  ')}")

    def finished_before(self, name: str) -> None:
        """Marks a stage that need not run."""
        row = self._rows[name]
        row.state, row.note = "done", "up to date"
        self._line(f"{name}: up to date")

    def _said_beside(self, before: str) -> str:
        said = self._beside()
        return before + said if said else ""

    # ------------------------------------------------------------------------------------------------- Reporter

    def start(self, task: str, total: int) -> None:
        row = self._row
        row.task, row.total, row.done, row.figures = task, total, 0, {}
        row.task_started, row.task_first = time.monotonic(), 0

    def advance(self, steps: int = 1, **figures: float) -> None:
        row = self._row
        row.done += steps
        if not figures and row.task_first == 0 and row.done == steps and steps > 1:
            row.task_first = steps  # a resumed stage skips what it has: that says nothing about its speed
        row.figures.update(figures)
        if self._live is None and time.monotonic() - self._last_line >= PLAIN_EVERY:
            self._line(f"{row.name}: {row.task} {row.done}/{row.total}{_figures(row, ' ')}{_eta(row, '  ')}")

    def note(self, text: str) -> None:
        if self._live is None:
            self._line(text)
        else:
            self.console.print(Text(text, style="dim"))

    # --------------------------------------------------------------------------------------------------- drawing

    def _line(self, text: str) -> None:
        if self._live is None:
            self._last_line = time.monotonic()
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _table(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        for _ in range(5):
            table.add_column(no_wrap=True)
        marks: dict[str, RenderableType] = {
            "waiting": Text("·", style="dim"),
            "running": self._spinner,
            "done": Text("✓", style="green"),
            "failed": Text("✗", style="red"),
        }
        for row in self._rows.values():
            running = row.state == "running"
            seconds = time.monotonic() - row.started if running else row.seconds
            bar = ProgressBar(total=max(row.total, 1), completed=row.done, width=20, pulse=row.total == 0)
            task = f"{row.task} " if row.task and row.task != row.name else ""
            table.add_row(
                marks[row.state],
                Text(row.name, style="bold" if running else "dim" if row.state == "waiting" else ""),
                bar if running else Text(""),
                Text(duration(seconds) if seconds else "", style="cyan"),
                Text(f"{task}{_figures(row, '').strip()}{_eta(row, '  ') if running else ''}" or row.note, style="dim"),
            )
        said = self._said_beside("")
        return Group(table, Text(said, style="dim")) if said else table


def _figures(row: _Row, before: str) -> str:
    names = [name for name in FIGURES if name in row.figures]
    names += [name for name in row.figures if name not in FIGURES]
    shown = "  ".join(f"{name.removeprefix('objective/')}={row.figures[name]:.4g}" for name in names[:SHOWN])
    return before + shown if shown else ""


def _eta(row: _Row, before: str) -> str:
    fresh = row.done - row.task_first
    if fresh < 1 or row.done >= row.total:
        return ""
    return f"{before}{duration((time.monotonic() - row.task_started) / fresh * (row.total - row.done))} left"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} min"
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d} h"


# ------------------------------------------------------------------------------------------------- the end of a run

_PERCENT: Callable[[float], str] = "{:.0%}".format
_FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("gold_reward", "score", "{:z.2f}".format),
    ("answer_rate", "answers", _PERCENT),
    ("correct_rate", "correct", _PERCENT),
    ("invented_rate", "invents", _PERCENT),
    ("harmful_rate", "harmful", _PERCENT),
    ("over_refusal_rate", "over-refuses", _PERCENT),
    ("kl_to_{baseline}", "KL to {baseline}", "{:z.1f}".format),
    ("base_text_loss", "text loss", "{:.3f}".format),
    ("fact_accuracy", "facts", _PERCENT),
    ("mean_length", "tokens", "{:.0f}".format),
)


def stage_table(entries: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> RenderableType:
    """What each stage did. ``entries``: (name, its manifest entry, its summary)."""
    table = Table(title="What each stage did", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("stage", style="bold")
    table.add_column("time", justify="right", style="cyan")
    table.add_column("result", overflow="fold")
    for name, entry, summary in entries:
        facts = [
            f"{key} {_number(value)}"
            for key, value in summary.items()
            if key != "fingerprint" and isinstance(value, int | float | str)
        ]
        table.add_row(name, duration(float(entry.get("seconds", 0.0))), ", ".join(facts[:6]))
    return table


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def model_table(summary: Mapping[str, Any]) -> RenderableType | None:
    """The compared models, when the run's summary has them; rows that no model has a figure for are left out."""
    models: Mapping[str, Mapping[str, Any]] = summary.get("stages", {})
    if not models:
        return None
    table = Table(title="Models on the held-out prompts", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in models:  # a column for each model: there are fewer of them than figures, and a terminal is narrow
        table.add_column(name, justify="right", style="bold")
    baseline = str(summary.get("baseline", "sft"))
    won = f"win_rate_vs_{baseline}"
    if any(figures.get(won) for figures in models.values()):
        table.add_row(f"wins against {baseline}", *(_win_rate(figures.get(won)) for figures in models.values()))
    for key, title, form in ((k.format(baseline=baseline), t.format(baseline=baseline), f) for k, t, f in _FIGURES):
        cells = [form(figures[key]) if figures.get(key) is not None else "" for figures in models.values()]
        if any(cells):
            table.add_row(title, *cells)
    return table


def _win_rate(rate: Sequence[float | None] | None) -> str:
    if not rate or rate[0] is None or rate[1] is None or rate[2] is None:
        return ""
    return f"{rate[0]:.0%} [{100 * rate[1]:.0f}, {100 * rate[2]:.0f}]"


def reward_table(summary: Mapping[str, Any]) -> RenderableType | None:
    """The recipe's reward models, best first, when the evaluation compared them."""
    models: Mapping[str, Mapping[str, Any]] = summary.get("reward_models", {})
    known = {name: figures["accuracy"] for name, figures in models.items() if figures["accuracy"] is not None}
    if not known:
        return None
    table = Table(title="Reward models on held-out pairs", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("model", style="bold")
    table.add_column("sides with the judge", justify="right")
    table.add_column("pairs", justify="right")
    for name, (point, low, high) in sorted(known.items(), key=lambda entry: -entry[1][0]):
        table.add_row(name, f"{point:.1%} [{low:.1%}, {high:.1%}]", str(models[name]["pairs"]))
    return table


def frontier_table(summary: Mapping[str, Any]) -> RenderableType | None:
    """Methods at equal KL, when the evaluation compared them."""
    found: Mapping[str, Any] = summary.get("frontier", {})
    if not found:
        return None
    heading = f"The judge's score at equal KL from {found['against']}"
    table = Table(title=heading, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("method", style="bold")
    for nats in found["at"]:
        table.add_column(f"{nats:g} nats", justify="right")
    for method in dict.fromkeys(cell["method"] for cell in found["table"]):
        table.add_row(method, *(_reached(cell) for cell in found["table"] if cell["method"] == method))
    return table


def _reached(cell: Mapping[str, Any]) -> str:
    if not cell["gold"]:
        return "not reached"
    point, low, high = cell["gold"]
    return f"{point:z.2f}" if low is None else f"{point:z.2f} [{low:z.2f}, {high:z.2f}]"


def closing(
    entries: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]], summary: Mapping[str, Any]
) -> RenderableType:
    """The tables that there are, one under the other."""
    tables = [stage_table(entries), model_table(summary), reward_table(summary), frontier_table(summary)]
    return Group(*(part for table in tables if table is not None for part in ("", table)))
