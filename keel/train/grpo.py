"""Group relative policy optimisation (Shao et al. 2024) and its family: a policy loss without a critic. A completion's
baseline comes from scores, those of its group, the completions of one prompt, before all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keel.objective.group import each_normalised, group_advantages, step_advantages, token_weights, without_spread
from keel.objective.kl import k1
from keel.objective.ratio import TokenTerms, grpo_loss, per_completion, sampler_weights
from keel.objective.traces import trace_advantages
from keel.recipe.grpo import GrpoStage, step_conflict
from keel.train.context import TrainContext
from keel.train.drawing import Drawn, Refilled
from keel.train.figures import policy_stats
from keel.train.loop import Stats
from keel.train.online import Batch, Online, Tokens, make_rollouts, train_online
from keel.train.rollouts import Episodes, RolloutCollector, Shaped
from keel.types import Judge, Prompt, Scorer, UserError

# TRL's names for figures that all online training logs.
_AS_TRL = {
    "entropy": "policy/entropy_avg",
    "sampling/sampling_logp_difference/mean": "rollout/logprob_diff",
}


class Grpo(Online[GrpoStage]):
    """GRPO's family for the training loop."""

    def __init__(self, rollouts: RolloutCollector, config: GrpoStage) -> None:
        super().__init__(rollouts, config)
        self.terms = token_terms(config)
        self.kl_in_loss = self.terms.beta > 0
        self.kl_in_reward = config.beta > 0 and not self.kl_in_loss
        # The KL of whole replies is taken before any step, from log-probabilities that somebody vouches for.
        self.old_at_step = config.one_step and config.old_logprobs == "auto" and not self.kl_in_reward
        self.asks_sampler = config.sampler_correction != "off"
        self.refilled: Refilled | None = None
        if config.no_spread == "resample":
            rollouts.draws = self.refilled = Refilled(rollouts.draws, self._idle, config.max_resamples)

    # ---------------------------------------------------------------------------------------------- advantages

    @torch.no_grad()
    def rollout(self, iteration: int) -> Batch:
        episodes = self.rollouts.collect(iteration, old_at_step=self.old_at_step)
        shaped = episodes.shaped
        self._check(shaped)
        valid_N, lengths_N = self._valid(shaped), episodes.offsets.diff()
        steps_C, still_G = self._signal(shaped)
        reward_N, figures = self._reward(episodes)
        if shaped.steps is not None and shaped.step_baseline != "steps":
            advantage_C = self._with_steps(reward_N, shaped)
        else:
            advantage_C = self._outcome(reward_N, shaped, valid_N).repeat_interleave(lengths_N)
            if steps_C is not None:
                advantage_C = advantage_C + steps_C
        self.figures = {
            "frac_reward_zero_std": float(still_G.float().mean()),
            **episodes.figures,
            **{name: episodes.figures[ours] for name, ours in _AS_TRL.items() if ours in episodes.figures},
            **figures,
        }
        out_N = torch.zeros(len(episodes.rows), dtype=torch.bool) if valid_N is None else ~valid_N
        if self.config.no_spread != "keep":
            out_N = out_N | still_G.repeat_interleave(self.config.group_size)
        return Batch.of(episodes, advantage_C, left_out=frozenset(out_N.nonzero().flatten().tolist()))

    def _outcome(self, reward_N: Tensor, shaped: Shaped, valid_N: Tensor | None) -> Tensor:
        config = self.config
        assert config.baseline != "critic", "the recipe refuses it"
        how = (config.group_size, config.scale_rewards, config.baseline, valid_N)
        if config.combine == "sum":
            return group_advantages(reward_N, *how)
        assert shaped.terms_NK is not None, "several rewards have several terms"
        weights = torch.tensor([term.weight for term in config.rewards])
        return each_normalised(shaped.terms_NK, weights, *how)

    def _with_steps(self, reward_N: Tensor, shaped: Shaped) -> Tensor:
        """Advantages of tokens whose steps are held against something of their own."""
        config = self.config
        assert shaped.steps is not None
        assert config.baseline != "critic", "the recipe refuses it"
        return trace_advantages(
            reward_N,
            shaped.steps,
            shaped.offsets,
            config.group_size,
            shaped.step_baseline,
            config.scale_rewards,
            config.baseline,
            self._valid(shaped),
        )

    def _reward(self, episodes: Episodes) -> tuple[Tensor, dict[str, float]]:
        """Each completion's reward, less its KL where that stands there (Ahmadian et al. 2024: of the whole reply)."""
        if not self.kl_in_reward:
            return episodes.shaped_N, {}
        assert episodes.ref_logp_C is not None, "a KL needs a reference"
        kl_N = per_completion(k1(episodes.old_logp_C, episodes.ref_logp_C), episodes.offsets)
        reward_N = episodes.shaped_N - self.config.beta * kl_N
        return reward_N, {
            "objective/non_score_reward": -self.config.beta * float(kl_N.double().mean()),
            "objective/rlhf_reward": float(reward_N.double().mean()),
        }

    def _valid(self, shaped: Shaped) -> Tensor | None:
        """The completions that tell something; None: all of them."""
        return shaped.finished_N if self.config.overlong == "mask" else None

    def _signal(self, shaped: Shaped) -> tuple[Tensor | None, Tensor]:
        """(the steps' part of each token's advantage, the groups whose scores and steps teach nothing)."""
        size, scale, valid_N = self.config.group_size, self.config.scale_rewards, self._valid(shaped)
        columns = shaped.score_N[:, None] if self.config.combine == "sum" else shaped.terms_NK
        assert columns is not None, "several rewards have several terms"
        if self.config.combine == "each":  # what is only watched teaches nothing
            columns = columns[:, [k for k, term in enumerate(self.config.rewards) if term.weight]]
        still_G = torch.stack([without_spread(score_N, size, valid_N) for score_N in columns.unbind(1)]).all(0)
        if shaped.steps is None:
            return None, still_G
        assert scale != "mean", "refused with steps"
        if shaped.step_baseline == "steps":
            steps_C = step_advantages(shaped.steps, shaped.offsets, size, scale, valid_N)
        else:
            steps_C = self._with_steps(shaped.score_N, shaped)
        tokens_G = shaped.offsets.diff().view(-1, size).sum(1).tolist()
        return steps_C, still_G & torch.tensor([not bool(of_group.any()) for of_group in steps_C.split(tokens_G)])

    def _idle(self, drawn: Drawn) -> list[bool]:
        shaped = self.rollouts.shape(drawn)
        self._check(shaped)
        return [bool(still) for still in self._signal(shaped)[1]]

    def _check(self, shaped: Shaped) -> None:
        """UserError for what only the scores can show."""
        config, valid_N = self.config, self._valid(shaped)
        score_N = shaped.score_N if valid_N is None else shaped.score_N[valid_N]
        if config.scale_rewards == "mean" and bool((score_N < 0).any()):
            raise UserError(
                f"{config.name}.scale_rewards: mean needs rewards that are never negative, and one is "
                f"{float(score_N.min()):.3g}; use scale_rewards: group, batch or none"
            )
        if shaped.steps is None:
            return
        for setting, given in config.knows_replies_alone().items():
            if given:
                raise UserError(f"{config.name}: {step_conflict(setting)}")

    # ---------------------------------------------------------------------------------------------------- loss

    def policy_loss(self, tokens: Tokens) -> tuple[Tensor, Stats]:
        weight_C, figures = self._correction(tokens)
        found = grpo_loss(
            tokens.logp, tokens.old_logp, tokens.advantage, tokens.offsets, self.terms, tokens.ref_logp, weight_C
        )
        loss_C, count = found.loss_C, float(tokens.logp.numel())
        low, high = float(found.low_C.sum()), float(found.high_C.sum())
        if found.kl_C is not None:
            figures["kl"] = (float(found.kl_C.detach().sum()), count)
        return loss_C, {
            **policy_stats(loss_C, found.low_C | found.high_C, tokens.logp, tokens.old_logp),
            "clip_ratio/low_mean": (low, count),
            "clip_ratio/high_mean": (high, count),
            "clip_ratio/region_mean": (low + high, count),
            **figures,
        }

    def _correction(self, tokens: Tokens) -> tuple[Tensor | None, dict[str, tuple[float, float]]]:
        """What tokens weigh for their sampler's sake, with figures of it."""
        how = self.config.sampler_correction
        if how == "off":
            return None, {}
        assert tokens.sampled_logp is not None, "it was asked for"
        low, high = self.config.correction_range
        weight_C = sampler_weights(tokens.old_logp, tokens.sampled_logp, how, low, high)
        gap_C, count = tokens.old_logp.detach() - tokens.sampled_logp, float(weight_C.numel())
        outside_C = (gap_C.exp() < low) | (gap_C.exp() > high)
        return weight_C, {
            "sampling/importance_sampling_ratio/mean": (float(weight_C.sum()), count),
            "sampling/corrected": (float(outside_C.sum()), count),
        }

    def mean(self, batch: Batch, step: Sequence[int], group: Sequence[int]) -> Callable[[Tensor], Tensor]:
        config = self.config
        length_N = torch.tensor([batch.tokens([i]) for i in step])
        weights = token_weights(length_N, config.normalise, config.sampling.max_new_tokens)
        weight = dict(zip(step, weights.tolist(), strict=True))

        def weighted(loss_C: Tensor) -> Tensor:
            weight_C = torch.cat([torch.full((batch.tokens([i]),), weight[i]) for i in group])
            return (loss_C * weight_C.to(loss_C.device)).sum()

        return weighted

    # --------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self.refilled.state_dict()} if self.refilled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.refilled:
            self.refilled.load_state_dict(state["draws"])


def token_terms(config: GrpoStage) -> TokenTerms:
    """What the recipe makes a token's loss of."""
    return TokenTerms(
        config.ratio,
        config.clip,
        config.clip_low,
        config.clip_high,
        config.cap,
        config.beta if config.kl.place == "loss" else 0.0,
        config.kl.estimator,
        config.kl.unbiased,
    )


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
    summary = train_online(Grpo(rollouts, config), context)
    return {**summary, "preset": config.preset, "choices": config.choices()}
