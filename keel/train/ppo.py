"""Proximal policy optimisation against a reward under a KL penalty (Schulman et al. 2017; Ziegler et al. 2019;
Ouyang et al. 2022). The baseline is a critic's value of each token's state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keel.data.collate import pack_by_prompt
from keel.model.heads import ScalarModel
from keel.objective.kl import AdaptiveKl, FixedKl, k1
from keel.objective.masked import whiten
from keel.objective.policy import (
    clipped_policy_loss,
    clipped_value_loss,
    discounted_reward,
    explained_variance,
    gae,
    token_rewards,
)
from keel.recipe.ppo import PpoStage
from keel.train.context import TrainContext
from keel.train.figures import policy_stats
from keel.train.loop import Micro, Stats
from keel.train.online import Batch, Online, Tokens, make_rollouts, train_online
from keel.train.roles import roles_of
from keel.train.rollouts import RolloutCollector
from keel.types import Judge, Prompt, Scorer


class Ppo(Online[PpoStage]):
    """PPO for the training loop."""

    def __init__(self, rollouts: RolloutCollector, critic: ScalarModel, config: PpoStage) -> None:
        super().__init__(rollouts, config)
        self.modules = {"policy": rollouts.policy, "critic": critic.model}
        self.critic = critic
        self.entropy_coef = config.entropy_coef
        self.lrs = {"critic": config.critic_lr} if config.critic_lr is not None else {}
        kl = config.kl
        self.kl = FixedKl(kl.coef) if kl.target is None else AdaptiveKl(kl.coef, kl.target, kl.horizon)

    @torch.no_grad()
    def rollout(self, iteration: int) -> Batch:
        config, coef = self.config, self.kl.coef
        episodes = self.rollouts.collect(iteration, self.critic.values_packed)
        offsets, value_C, steps = episodes.offsets, episodes.value_C, episodes.steps
        assert episodes.ref_logp_C is not None, "PPO has a reference"
        assert value_C is not None, "PPO has a critic"
        kl_C = k1(episodes.old_logp_C, episodes.ref_logp_C)
        rewards_C = token_rewards(kl_C, episodes.shaped_N, offsets, coef, steps)
        advantage_C, return_C = gae(rewards_C, value_C, offsets, config.gamma, config.lam)
        earned = episodes.shaped_N.double().sum()
        if steps is not None:
            earned = earned + steps.value_S.double().sum()
        self.figures = episodes.figures | {
            "objective/kl_coef": coef,
            "objective/non_score_reward": float(rewards_C.double().sum() - earned) / len(episodes.rows),
            "objective/rlhf_reward": discounted_reward(rewards_C, offsets, config.gamma),
            "val/explained_variance": float(explained_variance(value_C, return_C)),
        }
        return Batch.of(episodes, whiten(advantage_C) if config.whiten_advantages else advantage_C, return_C)

    def policy_loss(self, tokens: Tokens) -> tuple[Tensor, Stats]:
        loss_C, clipped_C = clipped_policy_loss(tokens.logp, tokens.old_logp, tokens.advantage, self.config.clip)
        return loss_C, policy_stats(loss_C, clipped_C, tokens.logp, tokens.old_logp)

    def micros(self, batch: Batch, step: Sequence[int], groups: Sequence[Sequence[int]], iteration: int) -> list[Micro]:
        # Policy and critic one after the other: one's activations are gone before the other's are made.
        critics = [self._value_micro(batch, group, batch.tokens(step)) for group in groups]
        policy_learns = iteration >= self.config.critic_warmup
        return critics + (super().micros(batch, step, groups, iteration) if policy_learns else [])

    def _value_micro(self, batch: Batch, group: Sequence[int], tokens: int) -> Micro:
        def compute() -> tuple[Tensor, Stats]:
            packed = pack_by_prompt([batch.rows[i] for i in group], self.rollouts.context.device)
            old_value, returns = self.tokens_of(group, batch.value), self.tokens_of(group, batch.returns)
            value = self.critic.values_packed(packed)
            value_loss, clipped = clipped_value_loss(value, old_value, returns, self.config.value_clip)
            count = float(old_value.numel())
            return self.config.value_coef * value_loss.sum() / tokens, {
                "loss/value_avg": (float(value_loss.detach().sum()), count),
                "val/clipfrac_avg": (float(clipped.sum()), count),
            }

        return compute

    def after(self, iteration: int) -> tuple[dict[str, float], bool]:
        if iteration >= self.config.critic_warmup:  # a policy that stands still has nothing to steer
            self.kl.update(self.figures["objective/kl"], self.config.rollout_batch)
        return super().after(iteration)

    def state_dict(self) -> dict[str, Any]:
        return {"kl": self.kl.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kl.load_state_dict(state["kl"])


def train_ppo(
    config: PpoStage,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    reference_path: Path,
    critic_path: Path | None,
    context: TrainContext,
    watch: Judge | None = None,
) -> dict[str, Any]:
    """Trains the checkpoint at ``context.model_path`` against ``scorer`` and writes it; returns the stage's summary.

    ``critic_path``: a reward model (its head comes along) or a language model (a new head is put on); None: the policy
    with a new head.
    """
    rollouts = make_rollouts(config, prompts, scorer, reference_path, context, watch)
    critic = roles_of(config, context).critic(critic_path, named=config.critic is not None)
    algorithm = Ppo(rollouts, critic, config)
    return train_online(algorithm, context, config.critic_warmup * algorithm.updates_per_iteration)
