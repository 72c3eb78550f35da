"""Settings of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from keel.recipe.declared import ROWS, ModelUse, Reference, Scoring, prompt_pool, terms
from keel.recipe.judges import JudgeRef, MixedRef, PythonRef, RewardTerm
from keel.recipe.sections import DataConfig, SamplingConfig
from keel.recipe.stage import StageBase


class EvalStage(StageBase):
    help: ClassVar[str] = "compare models on held-out prompts"
    compares_models: ClassVar[bool] = True

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

    def scored_by(self) -> Iterator[tuple[str, Scoring]]:
        yield from terms("rewards", self.rewards)
        if isinstance(self.judge, MixedRef):
            yield from terms("judge.rewards", self.judge.rewards)
        elif self.judge is not None:
            yield "judge", self.judge

    def references(self) -> Iterator[Reference]:
        for i, model in enumerate(self.models):
            yield Reference(f"models.{i}", model, ("policy",))
        yield Reference("baseline", self.baseline, ("policy",))
        if self.reward is not None:
            yield Reference("reward", self.reward, ("reward model",))
        yield from super().references()

    def also_uses(self, before: Sequence[StageBase]) -> Iterator[str]:
        rewards = [stage.name for stage in before if "reward model" in stage.makes]
        # the recipe's own is taken, or a gold judge says which of several is best
        default = self.judge is None or (self.reward is None and not self.rewards)
        if default or (len(rewards) > 1 and isinstance(self.judge, PythonRef)):
            yield from rewards
        # alarms and the guardrail read learning curves
        yield from (s.name for s in before if s.learns_from == "rewards" and s.name in self.models)

    def reads(self, data: DataConfig) -> tuple[str, ...]:
        return (*prompt_pool(data), "base_text", "facts", *ROWS)

    def files(self) -> Mapping[str, str | tuple[str, ...]]:
        return {} if self.prompts is None else {"prompts": self.prompts}

    def loads(self) -> Iterator[ModelUse]:
        for name in (*self.models, self.baseline):
            yield ModelUse(name)

    def samples(self) -> SamplingConfig:
        return self.sampling

    @model_validator(mode="after")
    def _one_proxy(self) -> EvalStage:
        if self.reward is not None and self.rewards:
            raise ValueError("reward names one model and rewards several with their weights; leave one of them out")
        return self
