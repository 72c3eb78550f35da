"""The votes and demonstrations that a training stage takes from the store, kept with the stage: people go on while it
trains, and a killed one must go on with what it began with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from keel.run import read_json, write_json
from keel.store import Store
from keel.store.records import AnnotatorKind
from keel.types import Demonstration, Message, Preference, Prompt

Voters = Literal["all", "people", "simulated"]
SIMULATED: tuple[AnnotatorKind, ...] = ("simulated",)
PEOPLE: tuple[AnnotatorKind, ...] = ("person", "model", "unknown")  # whose votes were imported, too
FILE = "votes.json"
DEMONSTRATIONS = "demonstrations.json"


def training_votes(folder: Path, location: str, batches: Sequence[str], voters: Voters) -> dict[str, list[Preference]]:
    """``simulated``: the simulated votes of the queues ``batches``; ``people``: all others in the store, whichever
    queue they came from. Those that ``voters`` leaves out are empty.

    The first call keeps them in ``folder`` (a stage's own), and later ones find them there.
    """
    kept = folder / FILE
    if not kept.exists():
        found: dict[str, list[Preference]] = {"simulated": [], "people": []}
        with Store(location) as store:
            if voters != "people":
                found["simulated"] = [vote for batch in batches for vote in store.preferences(batch, SIMULATED)]
            if voters != "simulated":
                found["people"] = store.preferences(None, PEOPLE)
        write_json(kept, {who: [asdict(vote) for vote in votes] for who, votes in found.items()})
        return found
    return {who: [_vote(row) for row in rows] for who, rows in read_json(kept).items()}


def training_demonstrations(folder: Path, location: str) -> list[Demonstration]:
    """What people wrote in the store, kept in ``folder`` as votes are."""
    kept = folder / DEMONSTRATIONS
    if not kept.exists():
        with Store(location) as store:
            found = store.demonstrations()
        write_json(kept, [asdict(row) for row in found])
        return found
    return [Demonstration(**{**row, "messages": _messages(row)}) for row in read_json(kept)]


def _vote(row: dict[str, Any]) -> Preference:
    asked = row["prompt"]
    return Preference(**{**row, "prompt": Prompt(**{**asked, "messages": _messages(asked)})})


def _messages(row: dict[str, Any]) -> tuple[Message, ...]:
    return tuple(Message(**message) for message in row["messages"])
