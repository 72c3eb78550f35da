"""Settings of supervised fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from keel.recipe.stage import PolicyBase, listed


class SftStage(PolicyBase):
    kind: Literal["sft"] = "sft"
    demonstrations: str | list[str] | None = Field(
        None,
        description="a file, a sample stage that chose its replies by rewards, or 'people' (the replies that people "
        "wrote or edited in the store); several in a list; default: data.demonstrations",
    )
    epochs: float = Field(2.0, gt=0)
    batch_size: int = Field(64, ge=1, description="conversations per optimizer step")
    eval_every: int = Field(0, ge=0, description="steps between held-out losses; 0: four times an epoch")
    patience: int = Field(3, ge=1, description="early stopping: held-out losses without a new best")

    @property
    def sources(self) -> tuple[str, ...]:
        """``demonstrations`` as a list."""
        return listed(self.demonstrations)

    @model_validator(mode="after")
    def _keeps_its_best(self) -> SftStage:
        if self.optim.average:
            raise ValueError(
                "sft keeps the weights of its best held-out loss, so there is nothing to average; leave "
                "optim.average out"
            )
        return self
