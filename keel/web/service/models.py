"""From a trained model back to the judgements that shaped it, and forward to those that came since."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from keel.recipe.declared import VOTERS, Voter
from keel.store import Store, lineage, review
from keel.store.lineage import Work
from keel.store.records import VOTER_KINDS
from keel.types import UserError
from keel.web.service.sources import TrainedModel

Part = Literal["trained", "settled", "heldout", "since", "undone", "unused"]
PAGE = 20


@dataclass(frozen=True, slots=True)
class Contributor:
    """What one annotator gave a model. ``accuracy``: the reward model's on their held-out votes (accuracy, low, high,
    votes), None where it has none."""

    name: str
    kind: str
    trained: int
    settled: int
    heldout: int
    first: datetime | None
    last: datetime | None
    guidelines: tuple[str, ...]
    accuracy: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Version:
    """A guideline version under which some of a model's judgements were given; the empty name: none in force."""

    name: str
    count: int
    first: datetime
    last: datetime


@dataclass(frozen=True, slots=True)
class Shaped:
    """A model with the work behind it, its own and its parents'. ``sources``: itself and the ancestors that learned
    from records of people's work; ``known``: whether any of them recorded which. ``parts``: the work by what became of
    it: trained on; ``settled``, where a reviewer's word was trained on in its place; held out; given ``since``; taken
    back since (``undone``); ``unused`` though it was there. ``elsewhere``: records that this store knows nothing of.
    ``words``: reviewers' words given since; ``versions_since``: the guideline's.
    """

    model: TrainedModel
    sources: tuple[TrainedModel, ...]
    known: bool
    parts: Mapping[Part, Sequence[Work]]
    elsewhere: int
    contributors: Sequence[Contributor]
    versions: Sequence[Version]
    words: int
    versions_since: Sequence[str]

    @property
    def whose(self) -> Mapping[Voter, int]:
        """How many of the judgements trained on are whose, of those who gave any."""
        counts = {who: sum(work.annotator_kind in VOTER_KINDS[who] for work in self.parts["trained"]) for who in VOTERS}
        return {who: count for who, count in counts.items() if count}

    @property
    def trained_at(self) -> datetime | None:
        """When the last of the sources read its data: what is given later is ``since``."""
        return _read_at(self.model, self.sources)


@dataclass(frozen=True, slots=True)
class _Known:
    """What the store knows, read once for all models."""

    works: Mapping[str, Work]
    words: Sequence[datetime]
    guidelines: Mapping[str, datetime]

    def work(self, id: str) -> Work | None:
        """The work behind a training record. A ranking's pairs are TOKEN/BETTER-WORSE."""
        return self.works.get(id) or self.works.get(id.rpartition("/")[0])


class Models:
    def __init__(self, store: Store, read: Callable[[], Sequence[TrainedModel]]) -> None:
        self._store, self._read = store, read

    def all(self) -> list[Shaped]:
        models = list(self._read())
        known = self._known() if models else None  # all that anybody did: not for a page without models
        return [_shaped(model, models, known) for model in models if known is not None]

    def one(self, key: str) -> Shaped:
        models = list(self._read())
        model = next((model for model in models if model.key == key), None)
        if model is None:
            raise UserError(f"there is no trained model {key!r}; look under Models")
        return _shaped(model, models, self._known())

    def work(
        self, key: str, part: Part, annotator: str | None, guideline: str | None, number: int
    ) -> tuple[int, list[dict[str, Any]]]:
        """(how many, one page of them with their texts) of a model's work, newest first."""
        chosen = [
            work
            for work in self.one(key).parts[part]
            if annotator in (None, work.annotator) and guideline in (None, work.guideline or "")
        ]
        chosen.sort(key=lambda work: (work.created, work.token), reverse=True)
        with self._store.transaction(writes=False) as connection:
            return len(chosen), lineage.texts(connection, chosen[number * PAGE : (number + 1) * PAGE])

    def _known(self) -> _Known:
        with self._store.transaction(writes=False) as connection:
            words = [word.created for word in review.last_words(connection).values()]
            return _Known(lineage.works(connection), words, lineage.guideline_dates(connection))


def _shaped(model: TrainedModel, models: Sequence[TrainedModel], known: _Known) -> Shaped:
    sources = tuple(one for one in _ancestors(model, models) if one.trained is not None)
    at = _read_at(model, sources)
    parts: dict[Part, list[Work]] = {"trained": [], "settled": [], "heldout": []}
    taken: set[str] = set()
    elsewhere = 0
    named: tuple[tuple[Part, list[str]], ...] = (
        ("trained", [id for one in sources for id in one.trained or ()]),
        ("settled", [id for one in sources for id in one.settled]),
        ("heldout", [id for one in sources for id in one.heldout]),
    )
    for part, ids in named:  # what one source held out, and another learned from, was learned from
        for id in dict.fromkeys(ids):
            work = known.work(id)
            if work is None:
                elsewhere += 1
            elif work.token not in taken:
                taken.add(work.token)
                parts[part].append(work)
    others = [work for work in known.works.values() if work.token not in taken and not work.gold]
    standing = [work for work in others if work.undone is None]
    parts["since"] = [work for work in standing if at is not None and work.created >= at]
    parts["unused"] = [work for work in standing if at is not None and work.created < at]
    used = parts["trained"] + parts["settled"] + parts["heldout"]
    parts["undone"] = [work for work in used if work.undone is not None]
    return Shaped(
        model=model,
        sources=sources,
        known=bool(sources),
        parts=parts,
        elsewhere=elsewhere,
        contributors=_contributors(model, parts),
        versions=_versions(used),
        words=sum(at is not None and word >= at for word in known.words),
        versions_since=[name for name, made in known.guidelines.items() if at is not None and made >= at],
    )


def _read_at(model: TrainedModel, sources: Iterable[TrainedModel]) -> datetime | None:
    times = [one.started for one in sources if one.started is not None]
    return max(times) if times else model.started


def _ancestors(model: TrainedModel, models: Sequence[TrainedModel]) -> list[TrainedModel]:
    """The model and those that it was made from, itself first."""
    by_key = {one.key: one for one in models}
    found = {model.key: model}
    waiting = [model]
    while waiting:
        for key in waiting.pop(0).parents:
            if key in by_key and key not in found:
                found[key] = by_key[key]
                waiting.append(by_key[key])
    return list(found.values())


def _contributors(model: TrainedModel, parts: Mapping[Part, Sequence[Work]]) -> list[Contributor]:
    """Those who gave the most first; then those whose held-out votes alone are known, from files."""
    accuracy = {row["annotator"]: row for row in model.summary.get("annotators") or ()}
    given: dict[str, list[Work]] = {}
    counts: Counter[tuple[str, Part]] = Counter()
    shaping: tuple[Part, ...] = ("trained", "settled", "heldout")
    for part in shaping:
        for work in parts[part]:
            given.setdefault(work.annotator, []).append(work)
            counts[work.annotator, part] += 1
    rows = [
        Contributor(
            name=name,
            kind=mine[0].annotator_kind if mine else "unknown",
            trained=counts[name, "trained"],
            settled=counts[name, "settled"],
            heldout=counts[name, "heldout"],
            first=min((work.created for work in mine), default=None),
            last=max((work.created for work in mine), default=None),
            guidelines=tuple(sorted({work.guideline for work in mine if work.guideline})),
            accuracy=accuracy.get(name),
        )
        for name, mine in (given | {name: [] for name in accuracy if name not in given}).items()
    ]
    return sorted(rows, key=lambda row: (-row.trained - row.settled - row.heldout, row.name))


def _versions(used: Sequence[Work]) -> list[Version]:
    dates: dict[str, list[datetime]] = {}
    for work in used:
        dates.setdefault(work.guideline or "", []).append(work.created)
    return [Version(name, len(times), min(times), max(times)) for name, times in sorted(dates.items())]
