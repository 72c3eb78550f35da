"""Settings of DPO and its descendants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from keel.recipe.declared import Doubt
from keel.recipe.offline import OfflineBase
from keel.recipe.preference_loss import PreferenceLossBase, traps
from keel.recipe.sections import DataConfig
from keel.recipe.thumbs import ThumbsBase


class DpoStage(PreferenceLossBase, ThumbsBase, OfflineBase):
    help: ClassVar[str] = "optimise a policy on preferences directly"
    adapter_dropout: ClassVar[bool] = False
    whole_lr: ClassVar[float] = 1e-6

    kind: Literal["dpo"] = "dpo"
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(64, ge=1, description="pairs, or single replies, per optimizer step")
    heldout_fraction: float = Field(0.05, gt=0, lt=0.9)

    def held_out(self, data: DataConfig) -> float:
        return self.heldout_fraction

    @model_validator(mode="after")
    def _learns_from_thumbs(self) -> DpoStage:
        form = self.preference_loss()
        if self.thumbs is None and (self.desirable_weight or self.undesirable_weight):
            raise ValueError(
                "desirable_weight and undesirable_weight weigh single replies; name them in thumbs, or leave it out"
            )
        if self.thumbs is not None and not form.unpaired:
            raise ValueError(
                f"loss: {self.loss} contrasts two replies, and thumbs are on single ones; use loss: kto, bco or "
                "apo_zero, or leave thumbs out"
            )
        if self.thumbs is not None and form.sft_coef:
            raise ValueError("sft_coef is of a pair's better reply, and thumbs are on single ones; leave it out")
        return self

    def doubts(self, products: str) -> Iterator[Doubt]:
        yield from super().doubts(products)
        yield from traps(self.preference_loss(), self.epochs)
