"""Settings of DPO and its descendants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from keel.recipe.declared import Doubt
from keel.recipe.preference_loss import PreferenceLossBase, traps
from keel.recipe.sections import DataConfig
from keel.recipe.stage import PolicyBase, PreferenceBase


class DpoStage(PreferenceLossBase, PreferenceBase, PolicyBase):
    help: ClassVar[str] = "optimise a policy on preferences directly"
    adapter_dropout: ClassVar[bool] = False

    kind: Literal["dpo"] = "dpo"
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(64, ge=1, description="pairs per optimizer step")
    heldout_fraction: float = Field(0.05, gt=0, lt=0.9)

    def held_out(self, data: DataConfig) -> float:
        return self.heldout_fraction

    def doubts(self, products: str) -> Iterator[Doubt]:
        yield from super().doubts(products)
        yield from traps(self.preference_loss(), self.epochs)
