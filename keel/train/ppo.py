"""Proximal policy optimisation against a reward under a KL penalty (Schulman et al. 2017; Ziegler et al. 2019;
Ouyang et al. 2022). One iteration is one rollout and the optimizer steps over it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keel.data.collate import pack_by_prompt
from keel.model.checkpoint import has_reward_head, load_scalar, load_tokenizer
from keel.model.heads import ScalarModel
from keel.model.logprobs import token_logprobs
from keel.objective.kl import AdaptiveKl, FixedKl, k1
from keel.objective.masked import whiten
from keel.objective.policy import (
    clipped_policy_loss,
    clipped_value_loss,
    discounted_reward,
    entropy_bonus,
    explained_variance,
    gae,
    token_rewards,
)
from keel.recipe.ppo import PpoStage
from keel.train.context import TrainContext
from keel.train.loop import Micro, Stats, train
from keel.train.online import Rollouts, finish, make_rollouts, minibatches, policy_stats
from keel.train.ptx import Ptx
from keel.types import Encoded, Judge, Prompt, Scorer, UserError


@dataclass(frozen=True)
class Rollout:
    """What one rollout's optimizer steps read: one entry an episode, tensors over its completion tokens."""

    rows: list[Encoded]
    old_logp: list[Tensor]
    old_value: list[Tensor]
    advantage: list[Tensor]
    returns: list[Tensor]


class Ppo:
    """PPO for the training loop."""

    def __init__(self, rollouts: Rollouts, critic: ScalarModel, config: PpoStage) -> None:
        self.modules: Mapping[str, nn.Module] = {"policy": rollouts.policy, "critic": critic.model}
        self.rollouts, self.critic, self.config = rollouts, critic, config
        self.lrs: Mapping[str, float] = {"critic": config.critic_lr} if config.critic_lr is not None else {}
        self.iterations = rollouts.count
        self.updates_per_iteration = config.epochs * config.minibatches
        kl = config.kl
        self.kl = FixedKl(kl.coef) if kl.target is None else AdaptiveKl(kl.coef, kl.target, kl.horizon)
        self.figures: dict[str, float] = {}

    # ---------------------------------------------------------------------------------------------- rollout

    def updates(self, iteration: int) -> Iterator[list[Micro]]:
        data = self._rollout(iteration)
        policy_learns = iteration >= self.config.critic_warmup
        for part, groups in minibatches(data.rows, self.config, self.rollouts.seed, iteration):
            tokens = sum(data.old_logp[i].numel() for i in part)
            # Policy and critic one after the other: one's activations are gone before the other's are made.
            micros = [self._value_micro(data, group, tokens) for group in groups]
            if policy_learns:
                micros += [self._policy_micro(data, group, tokens) for group in groups]
            yield micros

    @torch.no_grad()
    def _rollout(self, iteration: int) -> Rollout:
        config, coef = self.config, self.kl.coef
        episodes = self.rollouts.collect(iteration, self.critic.values_packed)
        old_logp_C, value_C = episodes.old_logp_C, episodes.value_C
        assert episodes.ref_logp_C is not None, "PPO has a reference"
        assert value_C is not None, "PPO has a critic"
        rewards_C = token_rewards(k1(old_logp_C, episodes.ref_logp_C), episodes.shaped_N, episodes.offsets, coef)
        advantage_C, return_C = gae(rewards_C, value_C, episodes.offsets, config.gamma, config.lam)
        n = len(episodes.rows)
        self.figures = episodes.figures | {
            "objective/kl_coef": coef,
            "objective/non_score_reward": float(rewards_C.double().sum() - episodes.shaped_N.double().sum()) / n,
            "objective/rlhf_reward": discounted_reward(rewards_C, episodes.offsets, config.gamma),
            "val/explained_variance": float(explained_variance(value_C, return_C)),
        }
        if config.whiten_advantages:
            advantage_C = whiten(advantage_C)
        columns = (old_logp_C, value_C, advantage_C, return_C)
        return Rollout(episodes.rows, *(list(column.split(episodes.lengths)) for column in columns))

    # ------------------------------------------------------------------------------------------------ losses

    def _policy_micro(self, data: Rollout, part: Sequence[int], tokens: int) -> Micro:
        def compute() -> tuple[Tensor, Stats]:
            config, rollouts = self.config, self.rollouts
            batch = pack_by_prompt([data.rows[i] for i in part], rollouts.device)
            old_logp, advantage = self._columns(part, data.old_logp, data.advantage)
            now = token_logprobs(rollouts.policy, batch, rollouts.temperature, entropy=config.entropy_coef > 0)
            policy_loss, clipped = clipped_policy_loss(now.logp_C, old_logp, advantage, config.clip)
            loss = policy_loss.sum() / tokens
            if now.entropy_C is not None:
                loss = loss + entropy_bonus(now.entropy_C, config.entropy_coef).sum() / tokens
            return loss, policy_stats(policy_loss, clipped, now.logp_C, old_logp)

        return compute

    def _value_micro(self, data: Rollout, part: Sequence[int], tokens: int) -> Micro:
        def compute() -> tuple[Tensor, Stats]:
            batch = pack_by_prompt([data.rows[i] for i in part], self.rollouts.device)
            old_value, returns = self._columns(part, data.old_value, data.returns)
            value = self.critic.values_packed(batch)
            value_loss, clipped = clipped_value_loss(value, old_value, returns, self.config.value_clip)
            count = float(old_value.numel())
            return self.config.value_coef * value_loss.sum() / tokens, {
                "loss/value_avg": (float(value_loss.detach().sum()), count),
                "val/clipfrac_avg": (float(clipped.sum()), count),
            }

        return compute

    def _columns(self, part: Sequence[int], *columns: Sequence[Tensor]) -> list[Tensor]:
        """Each column's tokens of some episodes in a row [C]."""
        return [torch.cat([column[i] for i in part]).to(self.rollouts.device) for column in columns]

    def after(self, iteration: int) -> tuple[dict[str, float], bool]:
        if iteration >= self.config.critic_warmup:  # a policy that stands still has nothing to steer
            self.kl.update(self.figures["objective/kl"], self.config.rollout_batch)
        return self.figures, False

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
    rollouts = make_rollouts(config, prompts, scorer, reference_path, context, watch=watch)
    critic = _critic(config, critic_path, context)
    algorithm = Ppo(rollouts, critic, config)
    begin = config.critic_warmup * algorithm.updates_per_iteration
    texts = Ptx(rollouts.policy, rollouts.chat.tokenizer, config, context, begin)
    steps = train(
        algorithm, config, context.stage, context.reporter, context.device, context.precision, texts, {"policy": begin}
    )
    return finish(rollouts, context, steps)


def _critic(config: PpoStage, path: Path | None, context: TrainContext) -> ScalarModel:
    """A model with the policy's vocabulary: its head comes along where it has one, else a new one is put on. A reward
    model that was taken for want of a ``critic`` and reads other tokens gives way to the policy with a new head."""
    trunk, checkpointing = context.trunk, config.gradient_checkpointing
    policy_tokens = load_tokenizer(context.source()).get_vocab().items()
    if path is not None and not policy_tokens <= load_tokenizer(context.source(path)).get_vocab().items():
        if config.critic is not None:
            raise UserError(
                f"{config.name}: the critic {path} has another tokenizer than the policy, so it cannot value the "
                f"policy's tokens; leave critic out or set it to {config.model}"
            )
        context.reporter.note(f"{config.name}: {path} reads other tokens; the critic begins as the policy")
        path = None
    if path == context.model_path:
        path = None
    if trunk is not None:
        return trunk.reward_model(path, checkpointing) if path else trunk.new_critic(context.seed, checkpointing)
    source = context.source(path)
    return load_scalar(
        source,
        device=context.device,
        lora=context.whole_lora,
        gradient_checkpointing=checkpointing,
        new_head_seed=None if has_reward_head(source) else context.seed,
        products=context.products_over_base,
    )
