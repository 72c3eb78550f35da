"""Settings of critique and revision by a constitution (SL-CAI; Bai et al. 2022, arXiv:2212.08073, section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from keel.recipe.declared import ROWS, Makes, ModelUse, PrincipleUse, Reference, prompt_pool
from keel.recipe.judges import EndpointRef
from keel.recipe.sections import DataConfig, SamplingConfig
from keel.recipe.stage import StageBase, Surroundings, start_has_template


class CritiqueStage(StageBase):
    help: ClassVar[str] = "have a model criticise and revise its replies by the principles of a constitution"
    makes: ClassVar[tuple[Makes, ...]] = ("demonstrations", "pairs")

    kind: Literal["critique"] = "critique"
    seed: int | None = Field(None, ge=0, description="of the principles and the samples; default: the recipe's")
    model: str | None = Field(None, description="what answers, criticises and revises: a stage, a folder, or 'base'")
    writer: EndpointRef | None = Field(None, description="in its place: a language model behind an endpoint")
    prompts: str | None = Field(None, description="default: data.prompts")
    constitution: str = Field(description="a file, or the name of one that comes with Keel")
    principle_ids: list[str] = Field(
        default_factory=list, description="principles that are drawn from, with those of tags; default: all"
    )
    tags: list[str] = Field(default_factory=list, description="groups of principles that are drawn from")
    replies: int = Field(1, ge=1, description="first replies to each prompt, each of which is revised")
    revisions: int = Field(4, ge=1, description="how often a reply is revised, each time by a principle drawn anew")
    critique: bool = Field(True, description="criticise before each revision; off: the revision is asked for directly")
    few_shots: int | None = Field(
        None, ge=0, description="how many of the constitution's examples stand before each request; default: all"
    )
    give: Literal["all", "last"] = Field(
        "all",
        description="which revisions become demonstrations: all that were finished, or the last of each chain that was",
    )
    sampling: SamplingConfig = SamplingConfig()

    def references(self) -> Iterator[Reference]:
        if self.model is not None:
            yield Reference("model", self.model, ("policy",))
        yield from super().references()

    def converses(self) -> Iterator[str]:
        if self.model is not None:
            yield self.model

    def principles(self) -> PrincipleUse:
        draws = self.replies * self.revisions
        return PrincipleUse(self.constitution, tuple(self.principle_ids), tuple(self.tags), draws)

    def reads(self, data: DataConfig) -> tuple[str, ...]:
        return (*prompt_pool(data), *(("on_bad_row",) if self.model is None else ROWS))

    def files(self) -> Mapping[str, str | tuple[str, ...]]:
        return {} if self.prompts is None else {"prompts": self.prompts}

    def loads(self) -> Iterator[ModelUse]:
        if self.model is not None:
            yield ModelUse(self.model)

    def needs_model(self) -> bool:
        return self.model is not None

    def seed_of(self, recipe_seed: int) -> int:
        return recipe_seed if self.seed is None else self.seed

    def samples(self) -> SamplingConfig | None:
        return None if self.model is None else self.sampling

    def check_in(self, recipe: Surroundings) -> None:
        super().check_in(recipe)
        if self.model is not None:
            start_has_template(self, self.model, recipe)

    @model_validator(mode="after")
    def _who_writes(self) -> CritiqueStage:
        if (self.model is None) == (self.writer is None):
            raise ValueError("who writes? name a model or a writer (an endpoint), one of the two")
        return self
