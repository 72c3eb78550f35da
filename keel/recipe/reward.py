"""Settings of a reward model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from keel.recipe.declared import MODELS, Makes, ModelUse
from keel.recipe.sections import DataConfig
from keel.recipe.stage import PreferenceBase


class RewardStage(PreferenceBase):
    help: ClassVar[str] = "train a reward model on preference pairs"
    makes: ClassVar[tuple[Makes, ...]] = ("reward model",)
    starts_from: ClassVar[tuple[Makes, ...]] = MODELS
    later: ClassVar[frozenset[str]] = frozenset({"labels"})

    kind: Literal["reward"] = "reward"
    seed: int | None = Field(None, ge=0, description="of its head and of the order of the pairs; default: the recipe's")
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(64, ge=1, description="pairs per optimizer step")
    margin_weight: float = Field(0.0, ge=0, description="margin in the Bradley-Terry loss a unit of strength (Llama 2)")
    center_coef: float = Field(0.01, ge=0, description="pulls the mean of a pair's rewards to zero")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    labels: Literal["soft", "hard"] = Field(
        "soft",
        description="a record with a probability counts as both labels, in that proportion; hard: as the likelier one",
    )
    heldout_fraction: float = Field(0.1, gt=0, lt=0.9, description="prompts kept out for accuracy and calibration")

    def held_out(self, data: DataConfig) -> float:
        return self.heldout_fraction

    def loads(self) -> Iterator[ModelUse]:
        yield ModelUse(self.model, policy=False, scalar=True)

    def seed_of(self, recipe_seed: int) -> int:
        return recipe_seed if self.seed is None else self.seed
