"""GRPO."""

from __future__ import annotations

from typing import Any

from keel.recipe.grpo import GrpoStage
from keel.stages.context import StageContext
from keel.stages.inputs import (
    training_prompts,
)
from keel.stages.scoring import mixed_scorer
from keel.stages.thinking import require_opened
from keel.stages.training import decoding, require_chat_template, training_context, watching_judge
from keel.train.grpo import train_grpo
from keel.train.roles import roles_of


def run_grpo(stage: GrpoStage, context: StageContext) -> dict[str, Any]:
    require_opened(stage, context)
    training = training_context(stage, context)
    decode = decoding(stage, context)
    scorer = mixed_scorer(stage.rewards, context, training.precision, roles_of(stage, training), decode)
    named = stage.reference or (stage.model if stage.beta > 0 else None)
    reference = context.model_path(named) if named else None
    prompts = training_prompts(stage.prompts, context)
    require_chat_template(stage, prompts, context)
    return train_grpo(stage, prompts, scorer, reference, training, watching_judge(stage, context))
