"""Supervised fine-tuning."""

from __future__ import annotations

from typing import Any

from keel.recipe.sft import SftStage
from keel.stages.context import StageContext
from keel.stages.inputs import (
    demonstrations,
)
from keel.stages.training import measured, prompts_to_measure, training_context
from keel.train.sft import train_sft


def run_sft(stage: SftStage, context: StageContext) -> dict[str, Any]:
    learned, counts = demonstrations(stage, context)
    training, prompts = training_context(stage, context), prompts_to_measure(stage, context)
    return train_sft(stage, learned, training) | counts | measured(stage, prompts, (), context, training)
