"""Other labelling tools' files of votes: one row a tool, how its rows are known, read and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from keel.store import argilla, label_studio
from keel.store.foreign import Ask, Names, Row, Taken
from keel.store.handover import Handover
from keel.store.records import Edit, Judgement, Ranking


@dataclass(frozen=True, slots=True)
class Tool:
    """``is_row``: whether a row is the tool's; ``question``: which question of a file's rows compares (ForeignError
    where that is not clear); ``read``: what a row gives, its question being known; ``write``: votes to a file or folder
    that the tool imports."""

    title: str
    is_row: Callable[[Row], bool]
    question: Callable[[Sequence[Row], Names], str | None]
    read: Callable[[Row, Names, Ask, datetime], Taken]
    write: Callable[[Sequence[Judgement | Ranking | Edit], Path], Handover]


TOOLS: Mapping[str, Tool] = {
    "argilla": Tool("Argilla", argilla.is_row, argilla.question, argilla.read, argilla.write),
    "label_studio": Tool(
        "Label Studio", label_studio.is_row, label_studio.question, label_studio.read, label_studio.write
    ),
}


def tool_of(rows: Sequence[Row]) -> Tool | None:
    """Whose export the rows are; None where they are no tool's."""
    return next((tool for tool in TOOLS.values() if any(_is(tool, row) for row in rows)), None)


def _is(tool: Tool, row: Row) -> bool:
    try:
        return tool.is_row(row)
    except (KeyError, TypeError, AttributeError, ValueError):  # it has an export's fields, and something else in them
        return True
