"""What stages have in common that train a language model on what others wrote: at their end they can sample."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from keel.recipe.declared import ROWS, prompt_pool
from keel.recipe.sections import DataConfig, SamplingConfig, Strict
from keel.recipe.stage import PolicyBase


class MeasureConfig(Strict):
    """Replies of its own that a stage samples when it is trained, to say how far it went from where it started: the KL
    a reply, their length, and how the probability of the replies that it learned to prefer has changed."""

    prompts: int = Field(512, ge=2, description="held-out prompts, the first of them")
    per_prompt: int = Field(2, ge=1, description="replies to each")
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _samples_the_policy(self) -> MeasureConfig:
        if self.sampling != self.sampling.at_one():
            raise ValueError(
                "the KL is that of the policy at temperature 1; leave temperature, top_k, top_p and min_p out of "
                "measure.sampling"
            )
        return self


class OfflineBase(PolicyBase):
    later: ClassVar[frozenset[str]] = frozenset({"measure"})

    measure: MeasureConfig | None = Field(
        None, description="sample at the end and say how far the policy went from its start; default: not"
    )

    def reads(self, data: DataConfig) -> tuple[str, ...]:
        asked = (*prompt_pool(data), *ROWS) if self.measure is not None else ()
        return tuple(dict.fromkeys((*super().reads(data), *asked)))

    def samples(self) -> SamplingConfig | None:
        return None if self.measure is None else self.measure.sampling
