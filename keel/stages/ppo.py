"""PPO."""

from __future__ import annotations

from typing import Any

from keel.recipe.ppo import PpoStage
from keel.stages.context import StageContext
from keel.stages.inputs import (
    training_prompts,
)
from keel.stages.scoring import mixed_scorer
from keel.stages.thinking import require_opened
from keel.stages.training import decoding, require_chat_template, training_context, watching_judge
from keel.train.ppo import train_ppo
from keel.train.roles import roles_of


def run_ppo(stage: PpoStage, context: StageContext) -> dict[str, Any]:
    require_opened(stage, context)
    training = training_context(stage, context)
    models = stage.reward_models()
    critic = stage.critic or (models[0] if models else None)
    decode = decoding(stage, context)
    scorer = mixed_scorer(stage.rewards, context, training.precision, roles_of(stage, training), decode)
    reference = context.model_path(stage.reference or stage.model)
    prompts = training_prompts(stage.prompts, context)
    require_chat_template(stage, prompts, context)
    critic_path = context.model_path(critic) if critic else None
    return train_ppo(stage, prompts, scorer, reference, critic_path, training, watching_judge(stage, context))
