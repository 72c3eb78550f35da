"""Group relative policy optimisation (Shao et al. 2024): PPO's clipped loss without a critic. A completion's baseline
is the mean score of its group, the completions of one prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keel.objective.group import group_advantages, grpo_loss, step_advantages, token_weights, without_spread
from keel.recipe.grpo import GrpoStage
from keel.train.context import TrainContext
from keel.train.online import Batch, Online, make_rollouts, train_online
from keel.train.rollouts import RolloutCollector
from keel.types import Judge, Prompt, Scorer


class Grpo(Online[GrpoStage]):
    """GRPO for the training loop."""

    def __init__(self, rollouts: RolloutCollector, config: GrpoStage) -> None:
        super().__init__(rollouts, config)
        self.kl_in_loss = config.beta > 0
        self.old_at_step = self.updates_per_iteration == 1 and config.old_logprobs == "auto"

    def rollout(self, iteration: int) -> Batch:
        size, scale = self.config.group_size, self.config.scale_rewards == "group"
        episodes = self.rollouts.collect(iteration, old_at_step=self.old_at_step)
        score_N, lengths_N = episodes.shaped_N, episodes.offsets.diff()
        advantage_C = group_advantages(score_N, size, scale).repeat_interleave(lengths_N)
        still_G = without_spread(score_N, size)
        if episodes.steps is not None:
            of_steps_C = step_advantages(episodes.steps, episodes.offsets, size, scale)
            advantage_C = advantage_C + of_steps_C
            tokens_G = lengths_N.view(-1, size).sum(1).tolist()
            still_G &= torch.tensor([not bool(of_group.any()) for of_group in of_steps_C.split(tokens_G)])
        self.figures = episodes.figures | {"frac_reward_zero_std": float(still_G.float().mean())}
        return Batch.of(episodes, advantage_C)

    def policy_loss(
        self, logp_C: Tensor, old_logp_C: Tensor, advantage_C: Tensor, ref_logp_C: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        return grpo_loss(logp_C, old_logp_C, advantage_C, config.clip_low, config.clip_high, ref_logp_C, config.beta)

    def mean(self, batch: Batch, step: Sequence[int], group: Sequence[int]) -> Callable[[Tensor], Tensor]:
        config = self.config
        length_N = torch.tensor([batch.tokens([i]) for i in step])
        weights = token_weights(length_N, config.normalise, config.sampling.max_new_tokens)
        weight = dict(zip(step, weights.tolist(), strict=True))

        def weighted(loss_C: Tensor) -> Tensor:
            weight_C = torch.cat([torch.full((batch.tokens([i]),), weight[i]) for i in group])
            return (loss_C * weight_C.to(loss_C.device)).sum()

        return weighted


def train_grpo(
    config: GrpoStage,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    reference_path: Path | None,
    context: TrainContext,
    watch: Judge | None = None,
) -> dict[str, Any]:
    """Trains the checkpoint at ``context.model_path`` against ``scorer`` and writes it; returns the stage's summary.

    ``reference_path``: None leaves the reference out, its forward pass and the KL's figures with it (``beta`` is 0).
    """
    assert config.beta == 0 or reference_path is not None, "a KL needs a reference"
    rollouts = make_rollouts(config, prompts, scorer, reference_path, context, watch)
    return train_online(Grpo(rollouts, config), context)
