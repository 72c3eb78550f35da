"""DPO."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from keel.feedback.aggregate import aggregate
from keel.recipe.dpo import DpoStage
from keel.stages.context import StageContext
from keel.stages.inputs import preferences, unpaired
from keel.stages.training import measured, prompts_to_measure, require_chat_template, training_context
from keel.train.dpo import train_dpo
from keel.train.offline import Liked
from keel.train.unpaired import train_unpaired
from keel.types import Preference


def run_dpo(stage: DpoStage, context: StageContext) -> dict[str, Any]:
    if stage.thumbs is not None:
        return _from_thumbs(stage, context)
    learned = preferences(stage, context)
    require_chat_template(stage, [pair.prompt for pair in learned.pairs], context)
    compared = stage.compares()
    reference = context.model_path(compared[1]) if compared is not None else None
    how = partial(aggregate, how=stage.votes)
    training, prompts = training_context(stage, context), prompts_to_measure(stage, context)
    summary = train_dpo(stage, learned.pairs, reference, training, how) | learned.counts
    return summary | measured(stage, prompts, _liked(learned.pairs), context, training)


def _liked(pairs: Sequence[Preference]) -> list[Liked]:
    """The chosen replies, without those of ties and those that a soft label thinks the worse of the two."""
    decided = [pair for pair in pairs if not pair.tie and (pair.probability is None or pair.probability > 0.5)]
    return [Liked(pair.prompt, pair.chosen, pair.chosen_finished) for pair in decided]


def _from_thumbs(stage: DpoStage, context: StageContext) -> dict[str, Any]:
    learned = unpaired(stage, context)
    require_chat_template(stage, [example.prompt for example in learned.examples], context)
    reference = context.model_path(stage.reference or stage.model)
    training, prompts = training_context(stage, context), prompts_to_measure(stage, context)
    summary = train_unpaired(stage, learned.examples, reference, training) | learned.counts
    liked = [Liked(one.prompt, one.completion, one.finished) for one in learned.examples if one.label]
    return summary | measured(stage, prompts, liked, context, training)
