"""Settings of sampling responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from keel.recipe.declared import ROWS, Makes, ModelUse, Reference, Scoring, cards_of, prompt_pool, terms
from keel.recipe.judges import Rewards
from keel.recipe.search import SearchConfig
from keel.recipe.sections import DataConfig, SamplingConfig
from keel.recipe.stage import StageBase, Surroundings, start_has_template


class SampleStage(StageBase):
    help: ClassVar[str] = "sample responses to prompts"
    makes: ClassVar[tuple[Makes, ...]] = ("responses", "demonstrations")
    stored: ClassVar[Literal["nothing", "copy", "all"]] = "copy"
    later: ClassVar[frozenset[str]] = frozenset({"seed", "search"})

    kind: Literal["sample"] = "sample"
    seed: int | None = Field(
        None, ge=0, description="of the samples: give each of several rounds its own; default: the recipe's"
    )
    model: str = "sft"
    prompts: str | None = Field(None, description="default: data.prompts")
    per_prompt: int = Field(4, ge=1, description="responses kept a prompt")
    candidates: int = Field(
        0, ge=0, description="responses sampled a prompt before near-duplicates are removed; 0: per_prompt"
    )
    max_similarity: float = Field(
        0.95,
        ge=0,
        le=1,
        description="token-set similarity at which two responses are the same; 0 keeps the least similar",
    )
    rewards: Rewards = Field(
        default_factory=list,
        description="best-of-n: the kept responses are those of the candidates with the highest weighted sum; default: "
        "none, they are the first that differ",
    )
    min_reward: float | None = Field(None, description="responses whose reward is lower are left out")
    search: SearchConfig | None = Field(
        None, description="the kept response is the one that a search finds; default: responses are sampled"
    )
    sampling: SamplingConfig = SamplingConfig()

    def scored_by(self) -> Iterator[tuple[str, Scoring]]:
        yield from terms("rewards", self.rewards)
        if self.search is not None:
            yield from self.search.scored_by("search")

    def cards(self) -> Iterator[tuple[str, str]]:
        yield from cards_of("rewards", self.rewards)

    def references(self) -> Iterator[Reference]:
        yield Reference("model", self.model, ("policy",))
        yield from super().references()

    def reads(self, data: DataConfig) -> tuple[str, ...]:
        return (*prompt_pool(data), *ROWS)

    def files(self) -> Mapping[str, str | tuple[str, ...]]:
        return {} if self.prompts is None else {"prompts": self.prompts}

    def loads(self) -> Iterator[ModelUse]:
        yield ModelUse(self.model)

    def seed_of(self, recipe_seed: int) -> int:
        return recipe_seed if self.seed is None else self.seed

    def searches(self) -> Mapping[str, SearchConfig]:
        return {} if self.search is None else {self.name: self.search}

    def converses(self) -> Iterator[str]:
        if self.search is not None and self.search.how == "revise":
            yield self.model

    def samples(self) -> SamplingConfig:
        return self.sampling

    def check_in(self, recipe: Surroundings) -> None:
        super().check_in(recipe)
        start_has_template(self, self.model, recipe)

    @model_validator(mode="after")
    def _search_alone(self) -> SampleStage:
        if self.search is None:
            return self
        if self.rewards or self.candidates:
            raise ValueError("search says which response is kept; leave rewards and candidates out, or leave it out")
        if self.per_prompt != 1:
            raise ValueError(f"a search gives one response a prompt, and per_prompt is {self.per_prompt}; set it to 1")
        if self.search.sampling is None:
            self.search.check_sampling(self.sampling, "sampling")
        return self

    @model_validator(mode="after")
    def _something_to_choose(self) -> SampleStage:
        if self.min_reward is not None and not self.rewards:
            raise ValueError("min_reward is a bound on the sum of rewards; name them in rewards, or leave it out")
        if self.rewards and self.min_reward is None and self.candidates <= self.per_prompt:
            raise ValueError(
                f"rewards choose per_prompt = {self.per_prompt} of the candidates, and there are "
                f"{max(self.candidates, self.per_prompt)} of them; raise candidates or set min_reward"
            )
        return self
