"""DPO."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from keel.feedback.aggregate import aggregate
from keel.recipe.dpo import DpoStage
from keel.stages.context import StageContext
from keel.stages.inputs import (
    preferences,
)
from keel.stages.training import measured, prompts_to_measure, require_chat_template, training_context
from keel.train.dpo import train_dpo
from keel.train.offline import Liked
from keel.types import Preference


def run_dpo(stage: DpoStage, context: StageContext) -> dict[str, Any]:
    learned = preferences(stage, context)
    require_chat_template(stage, [pair.prompt for pair in learned.pairs], context)
    reference = context.model_path(stage.reference or stage.model)
    how = partial(aggregate, how=stage.votes)
    training, prompts = training_context(stage, context), prompts_to_measure(stage, context)
    summary = train_dpo(stage, learned.pairs, reference, training, how) | learned.counts
    return summary | measured(stage, prompts, _liked(learned.pairs), context, training)


def _liked(pairs: Sequence[Preference]) -> list[Liked]:
    """The chosen replies, without those of ties and those that a soft label thinks the worse of the two."""
    decided = [pair for pair in pairs if not pair.tie and (pair.probability is None or pair.probability > 0.5)]
    return [Liked(pair.prompt, pair.chosen, pair.chosen_finished) for pair in decided]
