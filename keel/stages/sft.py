"""Supervised fine-tuning."""

from __future__ import annotations

from typing import Any

from keel.recipe.sft import SftStage
from keel.stages.context import StageContext
from keel.stages.inputs import (
    demonstrations,
)
from keel.stages.training import measured, prompts_to_measure, training_context
from keel.train.sft import Share, train_sft


def run_sft(stage: SftStage, context: StageContext) -> dict[str, Any]:
    sources, counts = demonstrations(stage, context)
    training, prompts = training_context(stage, context), prompts_to_measure(stage, context)
    mix = None
    if stage.mix is not None:
        weights = dict(zip(stage.sources, stage.mix, strict=True))
        mix = [Share(source, records, weights[source]) for source, records in sources]
    learned = [record for _, records in sources for record in records]
    summary = train_sft(stage, learned, training, mix)
    return summary | counts | measured(stage, prompts, (), context, training)
