"""Settings of sampling responses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from keel.recipe.judges import RewardTerm
from keel.recipe.sections import SamplingConfig
from keel.recipe.stage import StageBase


class SampleStage(StageBase):
    kind: Literal["sample"] = "sample"
    model: str = "sft"
    prompts: str | None = Field(None, description="default: data.prompts")
    per_prompt: int = Field(4, ge=1, description="responses kept a prompt")
    candidates: int = Field(0, ge=0, description="responses sampled a prompt before near-duplicates go; 0: per_prompt")
    max_similarity: float = Field(
        0.95, ge=0, le=1, description="token-set similarity at which two responses are the same; 0: the least alike"
    )
    rewards: list[RewardTerm] = Field(
        default_factory=list,
        description="best-of-n: the kept responses are those of the candidates with the highest weighted sum; default: "
        "none, they are the first that differ",
    )
    min_reward: float | None = Field(None, description="responses whose reward is lower are left out")
    sampling: SamplingConfig = SamplingConfig()

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
