"""Settings of GRPO."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from keel.recipe.stage import OnlineBase


class GrpoStage(OnlineBase):
    """No critic: a completion's baseline is the mean score of its group, the completions of one prompt."""

    help: ClassVar[str] = "optimise a policy for a reward without a critic, by groups of replies"

    kind: Literal["grpo"] = "grpo"
    reference: str | None = Field(None, description="default: model when beta is above 0, else none (no KL is logged)")
    group_size: int = Field(8, ge=2, description="completions per prompt; rollout_batch is a multiple")
    beta: float = Field(0.04, ge=0, description="weight of the KL to the reference in the loss (k3, per token)")
    clip_low: float = Field(0.2, gt=0, lt=1, description="ratios are held above 1 - clip_low")
    clip_high: float = Field(0.2, gt=0, description="ratios are held below 1 + clip_high (DAPO: 0.28)")
    scale_rewards: Literal["group", "none"] = Field(
        "group", description="divide advantages by the standard deviation of their group, or not (Dr. GRPO)"
    )
    normalise: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="mean loss over the step's tokens (DAPO), of means over each completion (GRPO), or the sum over "
        "completions x max_new_tokens (Dr. GRPO)",
    )
    old_logprobs: Literal["auto", "sampler", "trainer"] = Field(
        "auto",
        description="whose log-probabilities the ratios divide by; auto: the sampler's, as long as a probe "
        "agrees with the trainer, and the trainer's at the step itself where each rollout gets one step",
    )

    def kl_weight(self) -> float:
        return self.beta
