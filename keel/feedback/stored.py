"""The votes, thumbs, step labels and demonstrations that a training stage takes from the store, kept with the stage:
people go on while it trains, and a killed one must go on with what it began with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from keel.recipe.declared import VOTERS, Voter
from keel.run import read_json, write_json
from keel.store import Store, steps, thumbs
from keel.store.records import OWN_QUEUE, VOTER_KINDS
from keel.store.step_records import CORRECTED, Neutral
from keel.types import Demonstration, LabelledCompletion, Message, Preference, Prompt, StepLabels

FILE = "votes.json"
THUMBS = "thumbs.json"
STEPS = "people_steps.json"
DEMONSTRATIONS = "demonstrations.json"


def training_votes(
    folder: Path, location: str, batches: Sequence[str], whose: Collection[Voter]
) -> dict[Voter, list[Preference]]:
    """``simulated``: the simulated votes of the queues ``batches``; ``people`` and ``models``: theirs in all of the
    store, whichever queue they came from, but that votes which a stage had a model give are those of ``batches`` alone.
    Those that are not in ``whose`` are empty.

    The first call keeps them in ``folder`` (a stage's own), and later ones find them there.
    """
    kept = folder / FILE
    if not kept.exists():
        with Store(location) as store:
            found = {who: _votes_of(store, who, batches) if who in whose else [] for who in VOTERS}
        write_json(kept, {who: [asdict(vote) for vote in votes] for who, votes in found.items()})
        return found
    rows = read_json(kept)
    return {who: [_vote(row) for row in rows.get(who, ())] for who in VOTERS}


def _votes_of(store: Store, who: Voter, batches: Sequence[str]) -> list[Preference]:
    if who == "models":
        given = [one for one in store.all_given() if one.annotator_kind in VOTER_KINDS[who]]
        own = {OWN_QUEUE + batch for batch in batches}
        taken = [one for one in given if not one.batch.startswith(OWN_QUEUE) or one.batch in own]
        return [vote for one in taken for vote in one.preferences()]
    queues = batches if who == "simulated" else [None]
    return [vote for batch in queues for vote in store.preferences(batch, VOTER_KINDS[who])]


def training_thumbs(
    folder: Path, location: str, batches: Sequence[str], whose: Collection[Voter]
) -> dict[Voter, list[LabelledCompletion]]:
    """Thumbs on single responses, as `training_votes` has votes."""
    kept = folder / THUMBS
    if not kept.exists():
        with Store(location) as store, store.transaction(writes=False) as connection:
            found = {who: _thumbs_of(connection, who, batches) if who in whose else [] for who in VOTERS}
        write_json(kept, {who: [asdict(thumb) for thumb in given] for who, given in found.items()})
        return found
    rows = read_json(kept)
    return {who: [_labelled(row) for row in rows[who]] for who in VOTERS}


def _thumbs_of(connection: Connection, who: Voter, batches: Sequence[str]) -> list[LabelledCompletion]:
    queues = batches if who == "simulated" else [None]
    found = [thumb for batch in queues for thumb in thumbs.given(connection, batch, VOTER_KINDS[who])]
    return [example for thumb in found for example in thumb.examples()]


def training_steps(folder: Path, location: str, neutral: Neutral) -> tuple[list[StepLabels], frozenset[str]]:
    """People's labels on the steps of replies, and the ids of those on replies that were drawn at random: figures over
    the others are those of no population, and lines that people wrote are no replies. Kept in ``folder`` as votes
    are."""
    kept = folder / STEPS
    if not kept.exists():
        with Store(location) as store, store.transaction(writes=False) as connection:
            found = steps.labels(connection, neutral, kinds=VOTER_KINDS["people"])
            drawn = steps.labels(connection, neutral, kinds=VOTER_KINDS["people"], drawn="random")
            random = [one.id for one in drawn if not one.id.endswith(CORRECTED)]
        write_json(kept, {"labels": [asdict(one) for one in found], "random": random})
        return found, frozenset(random)
    rows = read_json(kept)
    return [_step_labels(row) for row in rows["labels"]], frozenset(rows["random"])


def _step_labels(row: dict[str, Any]) -> StepLabels:
    return StepLabels(**{**row, "prompt": _prompt(row), "steps": tuple(row["steps"]), "labels": tuple(row["labels"])})


def training_demonstrations(folder: Path, location: str) -> list[Demonstration]:
    """What people wrote in the store, kept in ``folder`` as votes are."""
    kept = folder / DEMONSTRATIONS
    if not kept.exists():
        with Store(location) as store:
            found = store.demonstrations(who="people")
        write_json(kept, [asdict(row) for row in found])
        return found
    return [Demonstration(**{**row, "messages": _messages(row)}) for row in read_json(kept)]


def _vote(row: dict[str, Any]) -> Preference:
    return Preference(**{**row, "prompt": _prompt(row)})


def _labelled(row: dict[str, Any]) -> LabelledCompletion:
    return LabelledCompletion(**{**row, "prompt": _prompt(row), "votes": tuple(row.get("votes", ()))})


def _prompt(row: dict[str, Any]) -> Prompt:
    asked = row["prompt"]
    return Prompt(**{**asked, "messages": _messages(asked)})


def _messages(row: dict[str, Any]) -> tuple[Message, ...]:
    return tuple(Message(**message) for message in row["messages"])
