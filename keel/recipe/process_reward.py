"""Settings of a process reward model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from keel.recipe.declared import (
    MODELS,
    PEOPLE,
    ROWS,
    WITH_PEOPLE,
    Makes,
    ModelUse,
    Reference,
    Scoring,
    StoreRead,
    listed,
    source_references,
)
from keel.recipe.sections import DataConfig
from keel.recipe.stage import TrainBase
from keel.recipe.steps import Aggregate, PythonStepsRef, Steps, StepsRead
from keel.recipe.verify import VerifyRef


class ProcessRewardStage(TrainBase):
    help: ClassVar[str] = "train a process reward model on labelled steps"
    makes: ClassVar[tuple[Makes, ...]] = ("process reward model",)
    starts_from: ClassVar[tuple[Makes, ...]] = (*MODELS, "process reward model")
    later: ClassVar[frozenset[str]] = frozenset({"gold", "until_error"})

    kind: Literal["process_reward"] = "process_reward"
    model: str = "sft"
    labels: str | list[str] = Field(
        description="step_labels stages, or files of labelled steps (rows prompt+completions+labels, PRM800K's, "
        "Math-Shepherd's), or people, what people said of steps in the store; several in a list"
    )
    verify: VerifyRef | None = Field(
        None,
        description="holds a reply's answer against the prompt's: what level: outcome learns, and by what figures tell "
        "right replies; default: the last step's label says whether the answer is right",
    )
    level: Literal["steps", "outcome"] = Field(
        "steps",
        description="steps: each judged step is learned; outcome: the last one alone, whose label says whether the "
        "reply's answer is right (an outcome reward model); of whole replies",
    )
    steps: Steps = Field(
        Steps(), description="where a step ends, in training and whenever the model scores; kept in its checkpoint"
    )
    neutral: Literal["good", "bad", "out"] = Field(
        "good", description="what a step that is neither right nor wrong counts as (PRM800K's 0); out: as unjudged"
    )
    until_error: bool = Field(
        False,
        description="learn a reply's steps up to its first wrong one alone, as PRM800K's labellers judged them: what "
        "follows an error says little of itself. Good with aggregate: min; figures of steps are of these steps too",
    )
    aggregate: Literal["auto"] | Aggregate = Field(
        "auto",
        description="what a reply's steps come to, kept in the checkpoint; auto: what most often puts the right one of "
        "two replies to a held-out problem first",
    )
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(64, ge=1, description="replies per optimizer step")
    heldout_fraction: float = Field(0.1, gt=0, lt=0.9, description="problems kept out, to measure on")
    label_bound: float = Field(
        0.5, ge=0, lt=1, description="a step is right where its label is above it: in figures, not in the loss"
    )
    gold: PythonStepsRef | None = Field(
        None,
        description="a function of prompt and steps that knows the truth of each (1 or 0): it stands beside the scores "
        "in the report's traces; default: the labels do",
    )

    @property
    def sources(self) -> tuple[str, ...]:
        """``labels`` as a list."""
        return listed(self.labels)

    def references(self) -> Iterator[Reference]:
        yield from super().references()
        yield from source_references("labels", self.labels, "step labels")

    def scored_by(self) -> Iterator[tuple[str, Scoring]]:
        if self.verify is not None:
            yield "verify", self.verify
        if self.gold is not None:
            yield "gold", self.gold

    def from_store(self, voted: Collection[str]) -> StoreRead:
        return StoreRead(steps=frozenset({"people"} if PEOPLE in self.sources else ()))

    def reads(self, data: DataConfig) -> tuple[str, ...]:
        people = WITH_PEOPLE if PEOPLE in self.sources else ()
        return (*people, *ROWS, *super().reads(data))

    def files(self) -> Mapping[str, str | tuple[str, ...]]:
        return {"labels": tuple(name for name in self.sources if name != PEOPLE)}

    def steps_read(self) -> StepsRead:
        answer = "" if self.verify is None else self.verify.field
        return StepsRead(self.steps, self.neutral, self.level == "outcome", self.label_bound, answer)

    def held_out(self, data: DataConfig) -> float:
        return self.heldout_fraction

    def loads(self) -> Iterator[ModelUse]:
        yield ModelUse(self.model, policy=False, scalar=True)

    @model_validator(mode="after")
    def _fits_together(self) -> ProcessRewardStage:
        if not self.sources:
            raise ValueError("labels is an empty list; name files or step_labels stages")
        if self.level == "outcome" and self.until_error:
            raise ValueError(
                "level: outcome learns of a reply's last step, so until_error leaves nothing; leave it out"
            )
        if self.level == "outcome" and self.aggregate not in ("auto", "last"):
            raise ValueError(
                f"level: outcome judges a reply by its last step, so aggregate is last, not {self.aggregate}; leave it "
                "out"
            )
        if self.level == "outcome" and self.gold is not None:
            raise ValueError("gold is the truth of steps, and level: outcome judges none; leave it out")
        return self
