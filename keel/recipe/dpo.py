"""Settings of DPO."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from keel.recipe.declared import Reference
from keel.recipe.offline import OfflineBase
from keel.recipe.sections import DataConfig
from keel.recipe.stage import PreferenceBase


class DpoStage(PreferenceBase, OfflineBase):
    help: ClassVar[str] = "optimise a policy on preference pairs directly"
    adapter_dropout: ClassVar[bool] = False

    kind: Literal["dpo"] = "dpo"
    reference: str | None = Field(None, description="default: model")
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(64, ge=1, description="pairs per optimizer step")
    beta: float = Field(0.1, gt=0)
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    length_normalised: bool = Field(False, description="log-ratios per token instead of per sequence")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    heldout_fraction: float = Field(0.05, gt=0, lt=0.9)

    def held_out(self, data: DataConfig) -> float:
        return self.heldout_fraction

    def references(self) -> Iterator[Reference]:
        yield from super().references()
        if self.reference is not None:
            yield Reference("reference", self.reference, ("policy",))

    def compares(self) -> tuple[str, str]:
        return self.model, self.reference or self.model

    @model_validator(mode="after")
    def _check(self) -> DpoStage:
        if self.loss == "ipo" and self.label_smoothing > 0:
            raise ValueError("loss: ipo takes no label_smoothing; set label_smoothing: 0 or use loss: sigmoid")
        return self
