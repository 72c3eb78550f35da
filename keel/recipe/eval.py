"""Settings of an evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from keel.recipe.judges import JudgeRef, RewardTerm
from keel.recipe.sections import SamplingConfig
from keel.recipe.stage import StageBase


class EvalStage(StageBase):
    kind: Literal["eval"] = "eval"
    models: list[str] = Field(min_length=1)
    baseline: str = "sft"
    judge: JudgeRef | None = Field(None, description="default: the recipe's reward stage")
    reward: str | None = Field(None, description="reward stage or folder whose mean score is reported")
    rewards: list[RewardTerm] = Field(
        default_factory=list, description="several of them, whose weighted sum is reported beside each one's mean"
    )
    prompts: str | None = Field(None, description="default: data.heldout_prompts")
    sampling: SamplingConfig = SamplingConfig()
    bootstrap: int = Field(2000, ge=100)
    show: int = Field(10, ge=0, description="prompts shown side by side in the report")

    @model_validator(mode="after")
    def _one_proxy(self) -> EvalStage:
        if self.reward is not None and self.rewards:
            raise ValueError("reward names one model and rewards several with their weights; leave one of them out")
        return self
