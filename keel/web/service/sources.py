"""What the composition root hands to the app: models to talk to and to sample from, what runs have trained, readers of
files. The app itself imports no model and no data room."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from keel.recipe.sections import SamplingConfig
from keel.store.steps import OpenReply
from keel.types import Completion, Message, Prompt, Unjudged

Reply = Callable[[Sequence[Message]], Iterator[str]]
Sample = Callable[[Sequence[Prompt], int], list[list[Completion]]]


@dataclass(frozen=True, slots=True)
class ArenaModel:
    """``reply``: a conversation that ends with the person's message -> the reply in pieces, as it comes."""

    name: str
    reply: Reply = field(repr=False)


@dataclass(frozen=True, slots=True)
class SampledModel:
    """``sample``: prompts and how many responses each -> the responses. ``path`` and ``fingerprint`` say what wrote
    them."""

    name: str
    path: str
    fingerprint: str
    sampling: SamplingConfig
    sample: Sample = field(repr=False)


class Ensemble(Protocol):
    """The run's reward models, as they are now."""

    def names(self) -> list[str]: ...

    def gains(self, pairs: Sequence[tuple[Prompt, Completion, Completion]]) -> list[float]:
        """How much a vote on each pair would tell, by how much the models differ on it."""
        ...


@dataclass(frozen=True, slots=True)
class StageProgress:
    """One stage of a training run. ``state``: running, done, failed, interrupted, or waiting; ``accuracy`` of a reward
    model on its held-out votes, and ``before`` the one that it replaces; how many votes it learned from are whose."""

    name: str
    kind: str
    state: str
    seconds: float
    accuracy: float | None = None
    before: float | None = None
    people_votes: int | None = None
    model_votes: int | None = None
    simulated_votes: int | None = None


@dataclass(frozen=True, slots=True)
class TrainingStatus:
    """The latest training that was started here. ``state``: never (there was none), running, done, failed, stopped.
    ``trained_at``: when the models that are there began to learn from judgements; None when there are none."""

    state: str
    by: str = ""
    started: datetime | None = None
    ended: datetime | None = None
    message: str = ""
    stages: Sequence[StageProgress] = ()
    log: Sequence[str] = ()
    trained_at: datetime | None = None


class Training(Protocol):
    """Training again with the judgements so far, in a process of its own."""

    def start(self, actor: str) -> None:
        """Returns at once. UserError while one is under way."""
        ...

    def stop(self) -> None: ...

    def status(self) -> TrainingStatus: ...


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A stage of a run that trained a model, as its folder tells. ``key``: its name in addresses; ``parents``: keys of
    the models that it was made from, ``others``: names of the other stages whose results it used. ``trained``,
    ``settled``, ``heldout``: ids of the records that it learned from, of those in whose place a reviewer's word was,
    and of those held out; ``trained`` is None when it recorded none. ``started``: when it began to read its data.
    ``learns_from``: demonstrations, preferences or rewards."""

    key: str
    run: str
    name: str
    kind: str
    status: str
    started: datetime | None
    seconds: float | None
    fingerprint: str
    parents: tuple[str, ...]
    others: tuple[str, ...]
    summary: Mapping[str, Any] = field(default_factory=dict)
    trained: tuple[str, ...] | None = None
    settled: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    learns_from: str | None = None


@dataclass(frozen=True, slots=True)
class Sources:
    read_prompts: Callable[[Path], list[Prompt]] | None = None
    arena: Sequence[ArenaModel] = ()
    sampled: Mapping[str, SampledModel] = field(default_factory=dict)  # may change: training makes new ones
    trained: Callable[[], Sequence[TrainedModel]] = tuple
    ensemble: Ensemble | None = None
    training: Training | None = None
    read_unjudged: Callable[[Path, bool], list[Unjudged]] | None = None  # True: without the answers in its rows
    # of the run's critique stages: the hash of each principle by its id, and the summary
    critiques: Callable[[], Sequence[tuple[Mapping[str, str], Mapping[str, Any]]]] = tuple
    # what a label on the steps of each reply teaches, by the reply's id
    step_gains: Callable[[Sequence[OpenReply]], Mapping[int, float]] | None = None
