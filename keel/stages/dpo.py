"""DPO."""

from __future__ import annotations

from functools import partial
from typing import Any

from keel.feedback.aggregate import aggregate
from keel.recipe.dpo import DpoStage
from keel.stages.context import StageContext
from keel.stages.inputs import preferences, unpaired
from keel.stages.training import require_chat_template, training_context
from keel.train.dpo import train_dpo
from keel.train.unpaired import train_unpaired


def run_dpo(stage: DpoStage, context: StageContext) -> dict[str, Any]:
    if stage.thumbs is not None:
        return _from_thumbs(stage, context)
    learned = preferences(stage, context)
    require_chat_template(stage, [pair.prompt for pair in learned.pairs], context)
    compared = stage.compares()
    reference = context.model_path(compared[1]) if compared is not None else None
    how = partial(aggregate, how=stage.votes)
    return train_dpo(stage, learned.pairs, reference, training_context(stage, context), how) | learned.counts


def _from_thumbs(stage: DpoStage, context: StageContext) -> dict[str, Any]:
    learned = unpaired(stage, context, stage.votes)
    require_chat_template(stage, [example.prompt for example in learned.examples], context)
    reference = context.model_path(stage.reference or stage.model)
    return train_unpaired(stage, learned.examples, reference, training_context(stage, context)) | learned.counts
