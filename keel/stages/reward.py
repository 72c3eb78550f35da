"""The reward model."""

from __future__ import annotations

from functools import partial
from typing import Any

from keel.eval.reward_quality import reward_quality
from keel.feedback.aggregate import aggregate
from keel.recipe.reward import RewardStage
from keel.stages.context import StageContext
from keel.stages.inputs import (
    preferences,
)
from keel.stages.training import require_chat_template, training_context
from keel.train.reward import train_reward


def run_reward(stage: RewardStage, context: StageContext) -> dict[str, Any]:
    learned = preferences(stage, context)
    require_chat_template(stage, [pair.prompt for pair in learned.pairs], context)
    how = partial(aggregate, how=stage.votes)
    summary, heldout = train_reward(stage, learned.pairs, training_context(stage, context), how)
    return summary | learned.counts | reward_quality(heldout, learned.truth, learned.agreement, context.recipe.seed)
