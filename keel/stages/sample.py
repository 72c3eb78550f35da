"""Responses sampled from a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from keel.data.chat import Chat
from keel.model.checkpoint import frozen, load_policy
from keel.precision import Precision, pick_precision
from keel.recipe.sample import SampleStage
from keel.recipe.search import SearchConfig
from keel.rollout.collect import CHUNK, Choice, sample_replies, stop_token_ids
from keel.rollout.episodes import encode_prompts
from keel.rollout.sampler import make_sampler
from keel.rollout.tokens import stream_key
from keel.search.run import search
from keel.stages.context import StageContext
from keel.stages.inputs import (
    KEPT,
    training_prompts,
    write_kept,
)
from keel.stages.scoring import mixed_scorer
from keel.stages.search import make_tools
from keel.stages.thinking import require_opened
from keel.store import Store
from keel.types import Completion, Prompt, UserError


def run_sample(stage: SampleStage, context: StageContext) -> dict[str, Any]:
    """Samples responses into the store, under this stage's fingerprint, and into a file that SFT can learn from."""
    require_opened(stage, context)
    recipe = context.recipe
    source = context.source(stage.model)
    precision = pick_precision("auto", context.device)
    model, tokenizer = load_policy(source, device=context.device, products=precision)
    frozen(model)
    chat = Chat(tokenizer)
    prompts, _ = encode_prompts(chat, training_prompts(stage.prompts, context), recipe.data, context.reporter)
    of_search: dict[str, Any] = {}
    sampling = (stage.search.sampling if stage.search is not None else None) or stage.sampling
    if stage.search is None:
        replies = _sampled(stage, context, model, chat, prompts, precision)
    else:
        replies, of_search = _searched(stage, stage.search, context, model, chat, prompts, precision)
    everything = [reply for group in replies for reply in group]
    if not everything:
        why = f"every one was cut at sampling.max_new_tokens = {sampling.max_new_tokens} or "
        why += "scored below min_reward" if stage.search is None else "says no answer that could be read"
        raise UserError(f"stage {stage.name}: no response is left; {why}; change one of the two")
    fingerprint = context.fingerprint
    with Store(context.store_url) as store, store.session() as session:
        session.add_prompts(prompts)
        for prompt, group in zip(prompts, replies, strict=True):
            session.add_responses(prompt.id, group, source.path, sampling, fingerprint)
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
        **of_search,
    }


def _sampled(
    stage: SampleStage, context: StageContext, model: nn.Module, chat: Chat, prompts: Sequence[Prompt],
    precision: Precision,
) -> list[list[Completion]]:  # fmt: skip
    sampler = make_sampler(model, stage.sampling.backend, stop_token_ids(chat, stage.sampling), precision)
    choice = Choice(
        stage.per_prompt,
        stage.candidates,
        stage.max_similarity,
        mixed_scorer(stage.rewards, context, precision) if stage.rewards else None,
        -math.inf if stage.min_reward is None else stage.min_reward,
    )
    seed = stage.seed_of(context.recipe.seed)
    return sample_replies(sampler, chat, prompts, stage.sampling, choice, seed, context.reporter)


def _searched(
    stage: SampleStage, config: SearchConfig, context: StageContext, model: nn.Module, chat: Chat,
    prompts: Sequence[Prompt], precision: Precision,
) -> tuple[list[list[Completion]], dict[str, Any]]:  # fmt: skip
    """What a search finds for each prompt, nothing where it finds none; and what that cost."""
    sampling = config.sampling or stage.sampling
    tools = make_tools(config, model, chat, sampling, context, precision)
    seed = stage.seed_of(context.recipe.seed) if config.seed is None else config.seed
    found = []
    for start in range(0, len(prompts), CHUNK):  # as replies are sampled: a search of one sample is that sample
        part = prompts[start : start + CHUNK]
        found += search(config, tools, part, sampling, stream_key(seed, start), context.reporter)
    costs = {
        "how": config.how,
        "n": config.paths,
        "generated_tokens": sum(one.generated for one in found),
        "scored_tokens": sum(one.scored for one in found),
        "unfinished": sum(one.unfinished for one in found),
        "unanswered": sum(one.answer is None for one in found),
    }
    return [[] if one.answer is None else [one.answer] for one in found], {"search": costs}
