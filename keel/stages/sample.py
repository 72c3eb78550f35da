"""Responses sampled from a model."""

from __future__ import annotations

import math
from typing import Any

from keel.data.chat import Chat
from keel.model.checkpoint import frozen, load_policy
from keel.precision import pick_precision
from keel.recipe.sample import SampleStage
from keel.rollout.collect import Choice, sample_replies, stop_token_ids
from keel.rollout.episodes import encode_prompts
from keel.rollout.sampler import make_sampler
from keel.stages.context import StageContext
from keel.stages.inputs import (
    KEPT,
    training_prompts,
    write_kept,
)
from keel.stages.scoring import mixed_scorer
from keel.store import Store
from keel.types import UserError


def run_sample(stage: SampleStage, context: StageContext) -> dict[str, Any]:
    """Samples responses into the store, under this stage's fingerprint, and into a file that SFT can learn from."""
    recipe = context.recipe
    source = context.source(stage.model)
    precision = pick_precision("auto", context.device)
    model, tokenizer = load_policy(source, device=context.device, products=precision)
    frozen(model)
    chat = Chat(tokenizer)
    sampler = make_sampler(model, stage.sampling.backend, stop_token_ids(chat, stage.sampling), precision)
    prompts, _ = encode_prompts(chat, training_prompts(stage.prompts, context), recipe.data, context.reporter)
    choice = Choice(
        stage.per_prompt,
        stage.candidates,
        stage.max_similarity,
        mixed_scorer(stage.rewards, context, precision) if stage.rewards else None,
        -math.inf if stage.min_reward is None else stage.min_reward,
    )
    replies = sample_replies(
        sampler, chat, prompts, stage.sampling, choice, stage.seed_of(recipe.seed), context.reporter
    )
    everything = [reply for group in replies for reply in group]
    if not everything:
        raise UserError(
            f"stage {stage.name}: no response is left; every one was cut at sampling.max_new_tokens = "
            f"{stage.sampling.max_new_tokens} or scored below min_reward; change one of the two"
        )
    fingerprint = context.fingerprint
    with Store(context.store_url) as store, store.session() as session:
        session.add_prompts(prompts)
        for prompt, group in zip(prompts, replies, strict=True):
            session.add_responses(prompt.id, group, source.path, stage.sampling, fingerprint)
    write_kept(context.stage_dir.path / KEPT, prompts, replies)
    rewards = [reply.reward for reply in everything if reply.reward is not None]
    return {
        "prompts": len(prompts),
        "responses": len(everything),
        "fingerprint": fingerprint,
        "distinct_pairs": sum(len(group) >= 2 for group in replies),
        "mean_length": sum(len(reply.ids) for reply in everything) / len(everything),
        "finished_rate": sum(reply.finished for reply in everything) / len(everything),
        **({"reward": sum(rewards) / len(rewards), "prompts_without": replies.count([])} if rewards else {}),
    }
