"""Other labelling tools' files, row by row: what was taken, and what was left and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from keel.data.rows import SHOWN, BadRows, Row, RowError
from keel.data.sources import as_prompt
from keel.store import Judgement
from keel.store.foreign import ForeignError, Names
from keel.store.forms import Tool
from keel.types import UserError

NAMED = {"left": "left out", "note": "note"}


@dataclass
class Told:
    """What is said of a file's rows besides its votes: in words, with the lines where it stands, one a time."""

    lines: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # by (what it is, words)

    def add(self, what: str, words: Sequence[str], line: str) -> None:
        for word in words:
            self.lines.setdefault((what, word), []).append(line)

    def __str__(self) -> str:
        """A line for each thing: how many, what, and the first rows that it stands in."""
        said = []
        for (what, words), places in self.lines.items():
            rows = list(dict.fromkeys(places))
            more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
            said.append(f"  {NAMED[what]}: {len(places)} x {words} ({', '.join(rows[:SHOWN])}{more})")
        return "\n".join(said)


def read_tool(tool: Tool, rows: Sequence[Row], bad: BadRows, names: Names, told: Told) -> list[Judgement]:
    """The votes of a tool's export. UserError names each row that can't be read, and then nothing is taken; what is no
    vote is told."""
    now = datetime.now(UTC)
    try:
        names = Names(names.prompt, names.responses, tool.question([row.values for row in rows], names))
    except (ForeignError, KeyError, TypeError, AttributeError, ValueError) as error:
        if not isinstance(error, ForeignError):  # the rows say which of them it is
            _read(tool, rows, bad, names, told, now)
            bad.raise_if_any()
        raise UserError(f"{bad.source}: {error}") from error
    votes = _read(tool, rows, bad, names, told, now)
    bad.raise_if_any()
    for token, times in Counter(vote.token for vote in votes).items():
        if times > 1:
            raise UserError(
                f"{bad.source}: {times} votes have the id {token!r}, so the file has a row twice; leave one of them out"
            )
    if not votes:
        why = f"\n{told}" if told.lines else ""
        raise UserError(
            f"{bad.source}: {len(rows)} rows, and none holds a vote; export the project with its answers{why}"
        )
    return votes


def _read(tool: Tool, rows: Sequence[Row], bad: BadRows, names: Names, told: Told, now: datetime) -> list[Judgement]:
    votes: list[Judgement] = []
    for row in rows:
        try:
            taken = tool.read(row.values, names, as_prompt, now)
        except (ForeignError, RowError) as error:
            bad.add(row.file, row.line, str(error))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            problem = f"not a row of {tool.title}'s export ({type(error).__name__}: {error})"
            bad.add(row.file, row.line, problem)
        else:
            votes += taken.votes
            told.add("left", taken.left, row.line)
            told.add("note", taken.notes, row.line)
    return votes
