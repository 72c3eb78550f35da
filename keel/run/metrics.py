"""A stage's figures over its steps: one JSON object a line in ``metrics.jsonl``, and other sinks beside it."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from keel.run.files import atomic_write_text, refusals_as_user_errors
from keel.types import UserError

T = TypeVar("T")

Figures = Mapping[str, float]


class Sink(Protocol):
    """Another place that figures go to (TensorBoard, Weights & Biases, trackio, MLflow)."""

    def write(self, step: int, figures: Figures) -> None: ...
    def close(self) -> None: ...


Opener = Callable[[int | None], Sink]


@dataclass(frozen=True, slots=True)
class LoggedRun:
    """A stage as loggers know it that have runs: ``identity`` says which run it is, ``name`` is what people read."""

    identity: str
    name: str
    folder: Path


class MetricsLog:
    """Appends rows ``{"step": step, name: figure, ...}``; each row is handed to the system before `write` returns.

    ``resume_step``: the first step that will be written again. Rows at or past it are dropped when the log opens, and
    so is a last line that a kill tore. So a resumed run leaves the same file as one that was never killed. None keeps
    every whole row. Figures that are not finite are written as null, which is what JSON has.

    ``sinks``, by their names, are opened at the first row with the resumed step, so that they can drop what comes after
    it too. One that fails is written to no more: it costs a warning and never the run. Only what a person must mend (a
    package that is missing) is a `UserError`, when the sink is opened.
    """

    def __init__(self, path: Path, resume_step: int | None = None, sinks: Mapping[str, Opener] | None = None) -> None:
        self.path = path
        self._openers = dict(sinks or {})
        self._sinks: dict[str, Sink] | None = None
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
            openers = list(self._openers.items())
            opened = {name: self._tried(name, open_sink, self._resume_step) for name, open_sink in openers}
            self._sinks = {name: sink for name, sink in opened.items() if sink is not None}
        with refusals_as_user_errors(self.path):
            printable = {name: figure if math.isfinite(figure) else None for name, figure in row.items()}
            self._file.write(json.dumps({"step": step, **printable}) + "\n")
            self._file.flush()
        for name, sink in list(self._sinks.items()):
            self._tried(name, sink.write, step, row)

    def rows(self) -> list[dict[str, Any]]:
        """Every row so far, in order."""
        return list(_whole_rows(self.path))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        for name, sink in list((self._sinks or {}).items()):
            self._tried(name, sink.close)
        self._sinks = None

    def _tried(self, name: str, act: Callable[..., T], *arguments: Any) -> T | None:
        """What ``act`` of a sink gives. A sink that fails is left out from here on, when the stage is resumed too."""
        try:
            return act(*arguments)
        except UserError:
            raise
        except Exception as error:  # whatever a logger and its server can think of
            self._openers.pop(name, None)
            (self._sinks or {}).pop(name, None)
            said = (str(error).strip().splitlines() or [""])[0]
            why = f"{type(error).__name__}: {without_secrets(said)}" if said else type(error).__name__
            warnings.warn(
                f"{name} gets no more figures ({why}); the run goes on, and {self.path} has them all", stacklevel=2
            )
            return None

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


def without_secrets(text: str) -> str:
    """The text without what addresses may hold besides a place: a name with its password, and queries."""
    return re.sub(r"(://)[^/@\s]+@", r"\1***@", re.sub(r"(://[^\s?]*)\?\S*", r"\1", text))
