"""The words in which a kind of stage says what it is: what it makes, names, loads, reads, and learns from.

Whoever needs to know asks the stage (see `keel.recipe.stage.StageBase`): no other file lists the kinds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from keel.recipe.judges import CheckRef, EndpointRef, ProcessTerm, PythonRef, RewardModelRef, RewardTerm
from keel.recipe.sections import DataConfig
from keel.recipe.steps import ProcessRef, PythonStepsRef

# What other stages may take from a stage. "demonstrations", "pairs": files in its folder that SFT, and what learns from
# preferences, can read. "votes" lie in the store. "step labels": a file in its folder (`keel.data.sources.read_steps`).
Makes = Literal[
    "policy", "reward model", "responses", "demonstrations", "votes", "pairs", "step labels", "process reward model"
]

# What a trained model was shaped by.
LearnsFrom = Literal["demonstrations", "preferences", "rewards"]

Scoring = PythonRef | RewardModelRef | EndpointRef | ProcessRef | PythonStepsRef | CheckRef

MODELS: tuple[Makes, ...] = ("policy", "reward model")  # what can be trained further


@dataclass(frozen=True)
class Reference:
    """A field that names a stage. ``place``: the field's dotted name; ``target``: what it says; ``makes``: the stage
    must make one of these. The target may be a folder or a file too."""

    place: str
    target: str
    makes: tuple[Makes, ...]


# Whose votes: people's, those of models that judge, simulated annotators'.
Voter = Literal["people", "models", "simulated"]
VOTERS: tuple[Voter, ...] = ("people", "models", "simulated")
Voters = Literal["all", Voter]
How = Literal["raw", "majority", "weighted", "posterior"]


@dataclass(frozen=True)
class StoreRead:
    """What a stage learns from in the store: whose votes, whose thumbs on single replies, whose labels on the steps of
    replies, and whether replies that people wrote."""

    voters: frozenset[Voter] = frozenset()
    written: bool = False
    thumbs: frozenset[Voter] = frozenset()
    steps: frozenset[Voter] = frozenset()

    @property
    def on_any_prompt(self) -> bool:
        """Whether it was made outside the recipe, where the evaluation's prompts are not left out."""
        return self.written or bool((self.voters | self.thumbs | self.steps) - {"simulated"})


@dataclass(frozen=True)
class PrincipleUse:
    """A constitution that a stage draws principles from (``keel.recipe.constitution``), and which of them: those named
    or tagged, else all. A change to others leaves the stage's result alone. ``draws``: how many it draws a prompt, at
    most; None where that is not known before. ``at_once``: how many different ones it draws together, by the field
    ``counted_by``."""

    constitution: str
    ids: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    draws: int | None = None
    at_once: int = 1
    counted_by: str = ""


@dataclass(frozen=True)
class ModelUse:
    """A checkpoint that a stage loads, by its name in the recipe: as a language model, with a scalar head, or both."""

    name: str
    policy: bool = True
    scalar: bool = False


@dataclass(frozen=True)
class Doubt:
    """A setting that will hardly do what is meant: the field, what is wrong with it, what to do."""

    field: str
    sentence: str
    remedy: str


# How rows are read: of ``data``, for every kind that reads any.
ROWS = ("max_length", "max_prompt_length", "over_length", "on_bad_row")

# What is read besides where people's work is learned from: they may have worked on any prompt, and what they did on the
# evaluation's is left out.
WITH_PEOPLE = ("heldout_prompts",)


def prompt_pool(data: DataConfig) -> tuple[str, ...]:
    """The settings of ``data`` that say which prompts there are. Without ``data.prompts`` they are those of the
    demonstrations or of the preferences."""
    names = ("prompts", "heldout_prompts", "heldout_fraction")
    return names if data.prompts is not None else (*names, "demonstrations", "preferences")


def terms(place: str, rewards: Sequence[RewardTerm]) -> Iterator[tuple[str, Scoring]]:
    """(dotted name of the field, source) of a list of rewards, and of what a process reward is made of."""
    for i, term in enumerate(rewards):
        where, source = f"{place}.{i}.source", term.source
        if not isinstance(source, ProcessTerm):
            yield where, source
            continue
        yield (where if source.scorer is None else f"{where}.scorer"), source.scores
        if source.outcome is not None:
            yield f"{where}.outcome", source.outcome


def cards_of(place: str, rewards: Sequence[RewardTerm]) -> Iterator[tuple[str, str]]:
    """(dotted name of the field, stage or file) of the replies that the rewards' cards change."""
    for i, term in enumerate(rewards):
        if isinstance(term.source, ProcessTerm) and term.source.card is not None:
            yield f"{place}.{i}.source.card.replies", term.source.card.replies


def listed(sources: str | list[str] | None) -> tuple[str, ...]:
    """A field that holds nothing, a name, or a list of names, as a list."""
    if sources is None:
        return ()
    return (sources,) if isinstance(sources, str) else tuple(sources)


PEOPLE = "people"  # as a source: what people wrote or judged in the store


def source_references(field: str, value: str | list[str] | None, *makes: Makes) -> Iterator[Reference]:
    """The references of a field that holds nothing, a name, or a list of names."""
    for i, name in enumerate(listed(value)):
        if name != PEOPLE:
            yield Reference(f"{field}.{i}" if isinstance(value, list) else field, name, makes)
