"""Settings of judging pairs by simulated annotators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from keel.recipe.declared import Makes, Reference, Scoring
from keel.recipe.judges import PythonRef
from keel.recipe.stage import PreferenceBase, StageBase, Surroundings
from keel.recipe.thumbs import ThumbsBase


class AnnotateStage(StageBase):
    help: ClassVar[str] = "have simulated annotators judge pairs of responses"
    makes: ClassVar[tuple[Makes, ...]] = ("votes",)
    uses_model: ClassVar[bool] = False
    stored: ClassVar[Literal["nothing", "copy", "all"]] = "all"

    later: ClassVar[frozenset[str]] = frozenset({"ask", "liked", "replies"})

    kind: Literal["annotate"] = "annotate"
    responses: str = "sample"
    annotators: PythonRef = Field(description="returns the simulated population: a callable seed -> list of annotators")
    pairs_per_prompt: int = Field(1, ge=1, description="pairs of one prompt, at most")
    pairs: int | None = Field(None, ge=1, description="pairs in all, at most; default: those of every prompt")
    choice: Literal["random", "uncertain"] = Field(
        "random", description="which pairs: at random, or those on which the reward models named in rewards disagree"
    )
    rewards: list[str] = Field(
        default_factory=list,
        description="reward stages that choose (choice: uncertain); what they were trained on is not asked again",
    )
    overlap: float = Field(0.1, ge=0, le=1, description="share of pairs judged twice, to measure agreement")
    guideline: str = "1"
    ask: Literal["pairs", "thumbs"] = Field(
        "pairs", description="which of two responses is better, or thumbs up or down on single ones"
    )
    liked: float = Field(
        0.5, gt=0, lt=1, description="ask: thumbs: an annotator's bar lets this share of all responses pass"
    )
    replies: int | None = Field(None, ge=1, description="ask: thumbs: responses in all, at most; default: every one")

    def references(self) -> Iterator[Reference]:
        yield from super().references()
        yield Reference("responses", self.responses, ("responses",))
        for i, reward in enumerate(self.rewards):
            yield Reference(f"rewards.{i}", reward, ("reward model",))

    def scored_by(self) -> Iterator[tuple[str, Scoring]]:
        yield "annotators", self.annotators

    def check_in(self, recipe: Surroundings) -> None:
        super().check_in(recipe)
        self._check_readers(recipe)
        alone = {stage.name for stage in recipe.stages if isinstance(stage, AnnotateStage) and stage.overlap == 0}
        for other in recipe.stages:
            if not isinstance(other, PreferenceBase) or other.votes != "weighted":
                continue
            if self.name in other.sources and alone.issuperset(other.sources):
                raise ValueError(
                    f"{other.name}.votes: weighted tells annotators apart by what two of them judged, and "
                    f"{other.sources[0]}.overlap is 0; raise it or use votes: raw"
                )

    def _check_readers(self, recipe: Surroundings) -> None:
        """Pairs and thumbs are learned from by fields of their own."""
        for other in recipe.stages:
            if isinstance(other, PreferenceBase) and self.ask == "thumbs" and self.name in other.sources:
                raise ValueError(
                    f"{other.name}.preferences: {self.name} asks for thumbs on single responses (ask: thumbs); name it "
                    f"in the thumbs of a dpo stage, or set {self.name}.ask: pairs"
                )
            if isinstance(other, ThumbsBase) and self.ask == "pairs" and self.name in other.thumb_sources:
                raise ValueError(
                    f"{other.name}.thumbs: {self.name} asks for pairs; name it in preferences, beside thumbs or alone, "
                    f"or set {self.name}.ask: thumbs"
                )

    @model_validator(mode="after")
    def _what_is_asked(self) -> AnnotateStage:
        if self.ask == "pairs" and (self.replies is not None or self.liked != 0.5):
            raise ValueError("replies and liked go with ask: thumbs; set it, or leave them out")
        if self.ask == "thumbs" and (self.choice != "random" or self.pairs is not None or self.pairs_per_prompt != 1):
            raise ValueError(
                "pairs, pairs_per_prompt and choice say which pairs are asked, and ask is thumbs; use replies"
            )
        return self

    @model_validator(mode="after")
    def _who_chooses(self) -> AnnotateStage:
        if self.choice == "uncertain" and len(set(self.rewards)) < 2:
            raise ValueError(
                "choice: uncertain compares reward models; name two reward stages or more in rewards, with seeds of "
                "their own"
            )
        if self.choice == "random" and self.rewards:
            raise ValueError("rewards choose pairs with choice: uncertain; set it, or leave rewards out")
        return self
