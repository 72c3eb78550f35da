"""Supervised fine-tuning."""

from __future__ import annotations

from typing import Any

from keel.recipe.sft import SftStage
from keel.stages.context import StageContext
from keel.stages.inputs import (
    demonstrations,
)
from keel.stages.training import training_context
from keel.train.sft import train_sft


def run_sft(stage: SftStage, context: StageContext) -> dict[str, Any]:
    learned, counts = demonstrations(stage, context)
    return train_sft(stage, learned, training_context(stage, context)) | counts
