"""Group relative policy optimisation (Shao et al. 2024): PPO's clipped loss without a critic. A completion's baseline
is the mean score of its group, the completions of one prompt. One iteration is one rollout and the optimizer steps
over it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keel.data.collate import pack_by_prompt
from keel.model.logprobs import token_logprobs
from keel.objective.group import group_advantages, grpo_loss, token_weights, without_spread
from keel.recipe.grpo import GrpoStage
from keel.train.context import TrainContext
from keel.train.loop import Micro, Stats, train
from keel.train.online import Rollouts, finish, make_rollouts, minibatches, policy_stats
from keel.train.ptx import Ptx
from keel.types import Encoded, Judge, Prompt, Scorer


@dataclass(frozen=True)
class Rollout:
    """What one rollout's optimizer steps read: one entry an episode, log-probabilities over its completion tokens."""

    rows: list[Encoded]
    old_logp: list[Tensor]
    ref_logp: list[Tensor] | None
    advantage_N: Tensor
    length_N: Tensor


class Grpo:
    """GRPO for the training loop."""

    lrs: Mapping[str, float] = {}

    def __init__(self, rollouts: Rollouts, config: GrpoStage) -> None:
        self.modules: Mapping[str, nn.Module] = {"policy": rollouts.policy}
        self.rollouts, self.config = rollouts, config
        self.iterations = rollouts.count
        self.updates_per_iteration = config.epochs * config.minibatches
        # The policy of a rollout's first step is the one that sampled it. Where there is no other step, the ratio is 1
        # and its gradient that of log p: nothing but the probe need be measured.
        self.old_at_step = self.updates_per_iteration == 1 and config.old_logprobs == "auto"
        self.figures: dict[str, float] = {}

    def updates(self, iteration: int) -> Iterator[list[Micro]]:
        config = self.config
        data = self._rollout(iteration)
        for part, groups in minibatches(data.rows, config, self.rollouts.seed, iteration):
            weights = token_weights(data.length_N[part], config.normalise, config.sampling.max_new_tokens)
            weight = dict(zip(part, weights.tolist(), strict=True))
            yield [self._micro(data, group, [weight[i] for i in group]) for group in groups]

    def _rollout(self, iteration: int) -> Rollout:
        config = self.config
        episodes = self.rollouts.collect(iteration, old_at_step=self.old_at_step)
        still_N = without_spread(episodes.shaped_N, config.group_size)
        self.figures = episodes.figures | {"frac_reward_zero_std": float(still_N.float().mean())}
        lengths, ref_logp_C = episodes.lengths, episodes.ref_logp_C
        return Rollout(
            episodes.rows,
            list(episodes.old_logp_C.split(lengths)),
            list(ref_logp_C.split(lengths)) if ref_logp_C is not None else None,
            group_advantages(episodes.shaped_N, config.group_size, config.scale_rewards == "group"),
            episodes.offsets.diff(),
        )

    def _micro(self, data: Rollout, part: Sequence[int], weights: Sequence[float]) -> Micro:
        def compute() -> tuple[Tensor, Stats]:
            config, device = self.config, self.rollouts.device
            batch = pack_by_prompt([data.rows[i] for i in part], device)
            length_N = data.length_N[part]
            advantage = data.advantage_N[part].repeat_interleave(length_N).to(device)
            weight = torch.tensor(weights).repeat_interleave(length_N).to(device)
            ref_logp = torch.cat([data.ref_logp[i] for i in part]).to(device) if data.ref_logp else None
            logp = token_logprobs(self.rollouts.policy, batch, self.rollouts.temperature).logp_C
            old_logp = logp.detach() if self.old_at_step else torch.cat([data.old_logp[i] for i in part]).to(device)
            loss, clipped = grpo_loss(
                logp, old_logp, advantage, config.clip_low, config.clip_high, ref_logp, config.beta
            )
            return (loss * weight).sum(), policy_stats(loss, clipped, logp, old_logp)

        return compute

    def after(self, iteration: int) -> tuple[dict[str, float], bool]:
        return self.figures, False

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


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
    algorithm = Grpo(rollouts, config)
    texts = Ptx(rollouts.policy, rollouts.chat.tokenizer, config, context)
    steps = train(algorithm, config, context.stage, context.reporter, context.device, context.precision, texts)
    return finish(rollouts, context, steps)
