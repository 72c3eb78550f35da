"""A constitution: the principles by which a model criticises, revises and compares replies (Bai et al. 2022,
arXiv:2212.08073), as a file, with a hash of each principle and of the whole.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random

from pydantic import Field, ValidationError, field_validator, model_validator

import keel
from keel.recipe.declared import PrincipleUse
from keel.recipe.file import first_problem, read_draft
from keel.recipe.sections import Strict
from keel.types import UserError

WHAT = "a constitution is a mapping with name: and principles:"
CONSTITUTION = "constitution.json"  # in a critique stage's folder: the constitution as it was read
HASH = 16  # hex digits that are kept of a hash


def _digest(what: object) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:HASH]


class Principle(Strict):
    """One principle, and how it is asked about."""

    id: str = Field(pattern=r"^[a-z][a-z0-9_-]*$", description="what records, votes and pages call it")
    text: str = Field(min_length=1, description="the principle itself, as people read it")
    critique: str = Field(min_length=1, description="asks what is wrong with the last reply")
    revision: str = Field(min_length=1, description="asks for the reply again, without what is wrong")
    choose: str = Field(min_length=1, description="asks which of two replies, A or B, keeps to it better")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="how often it is drawn, against the others")
    tags: list[str] = Field(default_factory=list, description="names of groups that stages may choose")

    @field_validator("text", "critique", "revision", "choose")
    @classmethod
    def _says_something(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("is blank; write what the model is to be asked")
        return text.strip()

    @property
    def hash(self) -> str:
        """Of all that a model may be shown of it: not of weight and tags, which only decide where it is used."""
        return _digest([self.id, self.text, self.critique, self.revision, self.choose])


class Example(Strict):
    """A worked example (few-shot) that stands before each request. Without ``principle`` it is shown with every one."""

    principle: str | None = None
    prompt: str = Field(min_length=1)
    reply: str = Field(min_length=1)
    critique: str = Field(min_length=1)
    revision: str = Field(min_length=1)

    @field_validator("prompt", "reply", "critique", "revision")
    @classmethod
    def _says_something(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("is blank; write what stands there")
        return text


class Constitution(Strict):
    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    principles: list[Principle] = Field(min_length=1)
    examples: list[Example] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_id_each(self) -> Constitution:
        ids = [principle.id for principle in self.principles]
        twice = next((one for one in ids if ids.count(one) > 1), None)
        if twice is not None:
            raise ValueError(
                f"two principles have the id {twice!r}; records tell principles apart by it, so rename one"
            )
        unknown = next((e.principle for e in self.examples if e.principle is not None and e.principle not in ids), None)
        if unknown is not None:
            raise ValueError(
                f"an example is of the principle {unknown!r}, which is not there; there are {', '.join(ids)}"
            )
        return self

    @property
    def hash(self) -> str:
        return _digest(
            [self.name, [[p.hash, p.weight, p.tags] for p in self.principles], self._examples(self.examples)]
        )

    def chosen(self, ids: Sequence[str] = (), tags: Sequence[str] = ()) -> tuple[Principle, ...]:
        """The principles that are named or have one of the tags; without either, all. ValueError for unknown names."""
        for wanted, known, what in (
            (ids, [p.id for p in self.principles], "principle"),
            (tags, sorted({tag for p in self.principles for tag in p.tags}), "tag"),
        ):
            unknown = next((one for one in wanted if one not in known), None)
            if unknown is not None:
                there = f"there are {', '.join(known)}" if known else "there are none"
                raise ValueError(f"no {what} of {self.name} is called {unknown!r}; {there}")
        if not ids and not tags:
            return tuple(self.principles)
        return tuple(p for p in self.principles if p.id in ids or set(tags) & set(p.tags))

    def examples_for(self, principle: Principle) -> tuple[Example, ...]:
        return tuple(e for e in self.examples if e.principle in (None, principle.id))

    def depends_on(self, ids: Sequence[str] = (), tags: Sequence[str] = ()) -> list[object]:
        """What the result of a stage depends on that draws from these principles: another principle's change leaves
        it alone. As JSON has it."""
        return [[p.hash, p.weight, self._examples(self.examples_for(p))] for p in self.chosen(ids, tags)]

    @staticmethod
    def _examples(examples: Sequence[Example]) -> list[object]:
        return [example.model_dump(mode="json") for example in examples]


def draw(principles: Sequence[Principle], k: int, *place: object) -> tuple[Principle, ...]:
    """``k`` different principles by weight, decided by ``place`` (a seed, a prompt, a round) alone: what is drawn in
    one place depends on no other, and is the same after a restart. All of them, where k is as many.

    The keys of Efraimidis and Spirakis (2006): the k largest of u^(1/weight), by its logarithm, which has no bounds.
    """
    rng = Random(_digest([*map(str, place)]))
    keys = {p.id: -math.log(1 - rng.random()) / p.weight for p in principles}
    return tuple(sorted(principles, key=lambda p: keys[p.id])[:k])


def constitution_file(named: str) -> Path:
    """The file that a recipe calls ``named``: a path, or one that comes with Keel by its name (``assistant``)."""
    shipped = Path(keel.__file__).parent / "constitutions" / f"{named}.yaml"
    return shipped if shipped.exists() and not Path(named).is_file() else Path(named)


def principles_of(
    use: PrincipleUse, stage: str, read: Constitution | None = None
) -> tuple[Constitution, tuple[Principle, ...]]:
    """The constitution that ``stage`` uses, and those of its principles that it draws from. ``read``: its file's
    content, where somebody read it already. `UserError` for what is wrong with the file, for a name that is not in it,
    and where fewer principles can be drawn than the stage draws together."""
    constitution, where = read or read_constitution(use.constitution), constitution_file(use.constitution)
    try:
        chosen = constitution.chosen(use.ids, use.tags)
    except ValueError as error:
        raise UserError(f"stage {stage}: {error} in {where}; correct the stage's list, or the file") from error
    if use.at_once > len(chosen):
        raise UserError(
            f"{stage}.{use.counted_by} is {use.at_once}, and {len(chosen)} can be drawn from {where} "
            f"({', '.join(one.id for one in chosen)}); lower it, or let more be drawn"
        )
    return constitution, chosen


def read_constitution(named: str) -> Constitution:
    """`UserError` with file, line and field for what is wrong with it."""
    draft = read_draft(constitution_file(named), WHAT)
    try:
        return Constitution.model_validate(draft.tree)
    except ValidationError as error:
        raise UserError(first_problem(draft, error, "a constitution", "docs/constitutional.md")) from error
