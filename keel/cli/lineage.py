"""``keel lineage``: which votes, of which round, shaped which weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel.cli.exchange import store_location
from keel.recipe.recipe import kinds_making
from keel.recipe.rounds import rounds
from keel.run import RunDir, read_json
from keel.store import Store, ai_labels, lineage
from keel.store.engine import exists
from keel.store.records import OWN_QUEUE, VOTER_KINDS
from keel.types import UserError

FILES = "files"  # what a stage learned from that the store knows nothing of


@dataclass(frozen=True, slots=True)
class Learned:
    """What one stage trained on: the ids of the votes (or demonstrations), by the stage that had them made, or made
    them, 'people' or 'models' for those given in the store otherwise, and 'files' for all others. ``round``: 0 where it
    is none."""

    stage: str
    round: int
    trained: Mapping[str, tuple[str, ...]]
    settled: Mapping[str, tuple[str, ...]]
    heldout: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Shaped:
    """A trained stage's weights: what it learned from itself and, nearest first, what the stages learned from that it
    rests on."""

    own: Learned
    through: tuple[Learned, ...]


def shaped(run: str) -> list[Shaped]:
    """Of every stage of the run that recorded what it learned from, in the recipe's order. UserError for a folder that
    holds no run."""
    folder = RunDir(run)
    manifest = folder.manifest.read()
    if not manifest:
        raise UserError(f"{run}: not a run directory (no manifest.json); name one that keel run or keel demo made")
    entries: Mapping[str, Any] = manifest.get("stages", {})
    numbers = {one.policy: one.number for one in rounds(manifest.get("recipe", {}).get("stages", ()))}
    sources = _sources(store_location(run, new=True), entries)
    makers = {name for name, entry in entries.items() if entry.get("kind") in kinds_making("pairs")}
    learned = {}
    for name in entries:
        path = folder.stage(name).path / "judgements.json"
        if path.exists():
            ids = read_json(path)
            parts = [_by_source(ids.get(part, ()), sources, makers) for part in ("trained", "settled", "heldout")]
            learned[name] = Learned(name, numbers.get(name, 0), *parts)
    return [
        Shaped(learned[name], tuple(learned[one] for one in _above(name, entries) if one in learned))
        for name in learned
    ]


def _sources(location: str, entries: Mapping[str, Any]) -> Mapping[str, str]:
    """Where each piece of work in the store came from, by its token."""
    if not exists(location):
        return {}
    stage_of = {entry.get("fingerprint", ""): name for name, entry in entries.items()}
    voter_of = {kind: who for who, kinds in VOTER_KINDS.items() for kind in kinds}
    with Store(location) as store, store.transaction(writes=False) as connection:
        return {
            token: stage_of.get(work.batch.removeprefix(OWN_QUEUE), voter_of[work.annotator_kind])
            for token, work in lineage.works(connection).items()
        }


def _by_source(ids: Sequence[str], sources: Mapping[str, str], makers: Collection[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for id in ids:  # a ranking's pairs are TOKEN/BETTER-WORSE, those of a stage that makes pairs STAGE:...
        made = id.partition(":")[0]
        source = sources.get(id) or sources.get(id.rpartition("/")[0]) or (made if made in makers else FILES)
        found.setdefault(source, []).append(id)
    return {source: tuple(some) for source, some in sorted(found.items())}


def _above(name: str, entries: Mapping[str, Any]) -> Iterator[str]:
    """The stages that a stage rests on, nearest first."""
    seen, waiting = {name}, [name]
    while waiting:
        for parent in entries.get(waiting.pop(0), {}).get("parents", ()):
            if parent not in seen:
                seen.add(parent)
                waiting.append(parent)
                yield parent


# --------------------------------------------------------------------------------------------------------- as text


def describe(run: str, stage: str | None, ids: bool) -> str:
    """Of each trained stage, or of ``stage`` alone; ``ids``: every vote's id, one a line, instead of how many."""
    found = [one for one in shaped(run) if stage in (None, one.own.stage)]
    if not found:
        what = f"no stage {stage!r} that recorded" if stage else "no stage that recorded"
        raise UserError(f"{Path(run)}: {what} what it learned from; look with keel check, or run it first")
    if ids:
        return "\n".join(line for one in found for line in _listed(one))
    location = store_location(run, new=True)
    return "\n".join(line for one in found for line in (*_told(one), *_by_principle(one.own, location)))


def _told(one: Shaped) -> Iterator[str]:
    yield _title(one.own)
    yield f"  learned from {_counts(one.own.trained)}{_besides(one.own)}"
    for above in one.through:
        yield f"  by way of {_title(above)}: {_counts(above.trained)}"


def _by_principle(one: Learned, location: str) -> Iterator[str]:
    """Models' votes by principle and its version, and beside them who else voted on the same kinds of prompts."""
    if not exists(location):
        return
    with Store(location) as store, store.transaction(writes=False) as connection:
        found = ai_labels.trace(connection, [id for ids in one.trained.values() for id in ids])
    asked = [row for row in found if row.principle]
    labels: dict[tuple[str, str, str], int] = {}
    for row in asked:
        key = (row.constitution, row.principle, row.principle_hash)
        labels[key] = labels.get(key, 0) + row.votes
    for (constitution, principle, version), votes in sorted(labels.items()):
        yield f"  under {constitution}/{principle} (version {version[:8]}): {votes:,} votes of models"
    for kind in sorted({row.prompt_kind for row in asked if row.prompt_kind}):
        others = {
            name: sum(row.votes for row in found if row.prompt_kind == kind and row.annotator_kind in kinds)
            for name, kinds in VOTER_KINDS.items()
            if name != "models"
        }
        yield f"  on prompts of kind {kind}: " + ", ".join(f"{n:,} votes of {name}" for name, n in others.items())


def _title(one: Learned) -> str:
    return f"{one.stage} (round {one.round})" if one.round else one.stage


def _counts(parts: Mapping[str, tuple[str, ...]]) -> str:
    return ", ".join(f"{len(ids):,} of {source}" for source, ids in parts.items()) or "nothing"


def _besides(one: Learned) -> str:
    settled, heldout = (sum(map(len, part.values())) for part in (one.settled, one.heldout))
    more = f", {settled:,} settled by a reviewer" if settled else ""
    return more + (f"; {heldout:,} held out" if heldout else "")


def _listed(one: Shaped) -> Iterator[str]:
    """Tab-separated: the trained stage, the stage that learned, what became of it, where it came from, its id."""
    for learned in (one.own, *one.through):
        for part, ids in (("trained", learned.trained), ("settled", learned.settled), ("heldout", learned.heldout)):
            for source, some in ids.items():
                yield from (f"{one.own.stage}\t{learned.stage}\t{part}\t{source}\t{id}" for id in some)
