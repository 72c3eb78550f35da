"""A stage's figures over its steps: one JSON object a line in ``metrics.jsonl``, and other sinks beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from keel.run.files import atomic_write_text, refusals_as_user_errors

Figures = Mapping[str, float]


class Sink(Protocol):
    """Another place that figures go to (TensorBoard, Weights & Biases)."""

    def write(self, step: int, figures: Figures) -> None: ...
    def close(self) -> None: ...


class MetricsLog:
    """Appends rows ``{"step": step, name: figure, ...}``; each row is handed to the system before `write` returns.

    ``resume_step``: the first step that will be written again. Rows at or past it are dropped when the log opens, and
    so is a last line that a kill tore. So a resumed run leaves the same file as one that was never killed. None keeps
    every whole row. Figures that are not finite are written as null, which is what JSON has.

    ``sinks`` are opened at the first row with the resumed step, so that they can drop what comes after it too.
    """

    def __init__(
        self, path: Path, resume_step: int | None = None, sinks: Sequence[Callable[[int | None], Sink]] = ()
    ) -> None:
        self.path = path
        self._openers = tuple(sinks)
        self._sinks: list[Sink] | None = None
        self._file: TextIO | None = None
        self._resume_step = resume_step
        self._cut()

    def resume(self, step: int) -> None:
        """Drops the rows at or past ``step``: call it once the state to go on from is loaded, before writing."""
        self.close()
        self._resume_step = step
        self._cut()

    def write(self, step: int, figures: Figures) -> None:
        """Adds a row. ``figures`` may hold Python numbers or tensors of one element."""
        row = {name: float(figure) for name, figure in figures.items()}
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        if self._sinks is None:
            self._sinks = [open_sink(self._resume_step) for open_sink in self._openers]
        with refusals_as_user_errors(self.path):
            printable = {name: figure if math.isfinite(figure) else None for name, figure in row.items()}
            self._file.write(json.dumps({"step": step, **printable}) + "\n")
            self._file.flush()
        for sink in self._sinks:
            sink.write(step, row)

    def rows(self) -> list[dict[str, Any]]:
        """Every row so far, in order."""
        return list(_whole_rows(self.path))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        for sink in self._sinks or ():
            sink.close()
        self._sinks = None

    def _cut(self) -> None:
        if not self.path.exists():
            return
        limit = math.inf if self._resume_step is None else self._resume_step
        kept = "".join(json.dumps(row) + "\n" for row in _whole_rows(self.path) if row["step"] < limit)
        if kept != self.path.read_text(encoding="utf-8", errors="replace"):
            atomic_write_text(self.path, kept)


def _whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            return  # torn by a kill: nothing whole can follow
        yield row
