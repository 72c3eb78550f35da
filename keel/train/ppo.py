"""Proximal policy optimisation against a reward under a KL penalty (Schulman et al. 2017; Ziegler et al. 2019;
Ouyang et al. 2022). One iteration is one rollout and the optimizer steps over it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keel.config import PpoStage
from keel.data.chat import Chat
from keel.data.collate import epoch_order, pack
from keel.model.checkpoint import frozen, load_policy, load_scalar, save
from keel.model.heads import ScalarModel
from keel.model.logprobs import masked_offsets, token_logprobs
from keel.model.precision import autocast
from keel.objective.kl import AdaptiveKl, FixedKl, k1, k2, k3
from keel.objective.masked import whiten
from keel.objective.policy import (
    clipped_policy_loss,
    clipped_value_loss,
    entropy_bonus,
    episode_scores,
    explained_variance,
    gae,
    token_rewards,
)
from keel.rollout.collect import stop_token_ids
from keel.rollout.episodes import encode_prompts, repetition, rollout
from keel.rollout.sampler import Sampler, make_sampler
from keel.train.context import TrainContext
from keel.train.loop import Micro, Stats, train
from keel.train.offline import Schedule, micro_batches
from keel.types import Encoded, Judge, Prompt, Scorer, Trajectory, UserError

KL_AT_START = 1e-5  # nats a sequence: above it, the reference is not the model that training starts from
MISMATCH_BOUND = 0.5  # nats a token between sampler and trainer: above it, ratios mean nothing


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

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module,
        critic: ScalarModel,
        scorer: Scorer,
        sampler: Sampler,
        chat: Chat,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Sequence[int]],
        config: PpoStage,
        device: str,
        precision: str,
        seed: int,
        watch: Judge | None = None,
        same_start: bool = True,
    ) -> None:
        self.modules: Mapping[str, nn.Module] = {"policy": policy, "critic": critic.model}
        self.policy, self.reference, self.critic = policy, reference, critic
        self.scorer, self.sampler, self.chat, self.watch = scorer, sampler, chat, watch
        self.prompts, self.prompt_ids = prompts, prompt_ids
        self.config, self.device, self.precision, self.seed = config, device, precision, seed
        self.same_start = same_start
        # What is trained is the distribution that is sampled from: softmax(logits / temperature), of policy and
        # reference alike, so that ratios and KL are exact at any temperature.
        self.temperature = config.sampling.temperature
        self.lrs: Mapping[str, float] = {"critic": config.critic_lr} if config.critic_lr is not None else {}
        self.iterations = math.ceil(config.episodes / config.rollout_batch)
        self.updates_per_iteration = config.epochs * config.minibatches
        self.schedule = Schedule(
            len(prompts), config.rollout_batch, self.iterations * config.rollout_batch / len(prompts), seed
        )
        kl = config.kl
        self.kl = FixedKl(kl.coef) if kl.target is None else AdaptiveKl(kl.coef, kl.target, kl.horizon)
        self.figures: dict[str, float] = {}

    # ---------------------------------------------------------------------------------------------- rollout

    def updates(self, iteration: int) -> Iterator[list[Micro]]:
        with torch.no_grad():
            data = self._rollout(iteration)
        config, n = self.config, len(data.rows)
        size = math.ceil(n / config.minibatches)
        policy_learns = iteration >= config.critic_warmup
        for epoch in range(config.epochs):
            order = epoch_order(n, self.seed, iteration * config.epochs + epoch)
            for start in range(0, n, size):
                part = order[start : start + size]
                tokens = sum(data.old_logp[i].numel() for i in part)
                groups = micro_batches([len(data.rows[i].ids) for i in part], config.batch_tokens)
                yield [self._micro(data, [part[i] for i in group], tokens, policy_learns) for group in groups]

    def _rollout(self, iteration: int) -> Rollout:
        config = self.config
        chosen = self.schedule.batch(iteration)
        episodes = rollout(
            self.sampler,
            self.chat,
            [self.prompts[i] for i in chosen],
            [self.prompt_ids[i] for i in chosen],
            config.sampling,
            seed=self.seed * 1_000_003 + iteration,
        )
        rows = [
            Encoded(e.prompt_ids + e.completion.ids, (False,) * len(e.prompt_ids) + (True,) * len(e.completion.ids))
            for e in episodes
        ]
        old_logp, ref_logp, value, entropy = self._measure(rows)
        offsets = torch.tensor([0, *(len(e.completion.ids) for e in episodes)]).cumsum(0)
        completions = [e.completion for e in episodes]
        prompts = [e.prompt for e in episodes]
        with autocast(self.device, self.precision):
            scores_N = self.scorer.score(prompts, completions).float()
        finished_N = torch.tensor([c.finished for c in completions])
        kl_C = k1(old_logp, ref_logp)
        shaped_N = episode_scores(scores_N, finished_N, config.missing_eos_penalty, config.reward_clip)
        rewards_C = token_rewards(kl_C, shaped_N, offsets, self.kl.coef)
        advantage_C, return_C = gae(rewards_C, value, offsets, config.gamma, config.lam)
        self._record(iteration, episodes, old_logp, ref_logp, entropy, scores_N, value, return_C)
        if config.whiten_advantages:
            advantage_C = whiten(advantage_C)
        lengths = offsets.diff().tolist()
        return Rollout(
            rows,
            list(old_logp.split(lengths)),
            list(value.split(lengths)),
            list(advantage_C.split(lengths)),
            list(return_C.split(lengths)),
        )

    def _measure(self, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(policy log-probs, reference log-probs, values, entropies), each [C] on the CPU in the order of ``rows``.

        Policy and reference see the same packing, so that while their weights are equal their log-probabilities are
        too, to the bit: the KL at step 0 is 0.
        """
        parts: dict[int, tuple[Tensor, ...]] = {}
        with autocast(self.device, self.precision):
            for group in micro_batches([len(row.ids) for row in rows], self.config.batch_tokens):
                batch = pack([rows[i] for i in group], self.device)
                policy = token_logprobs(self.policy, batch, self.temperature, entropy=True)
                assert policy.entropy_C is not None
                reference = token_logprobs(self.reference, batch, self.temperature).logp_C
                columns = (policy.logp_C, reference, self.critic.values_packed(batch), policy.entropy_C)
                lengths = masked_offsets(batch).diff().tolist()
                pieces = zip(*(column.float().cpu().split(lengths) for column in columns), strict=True)
                parts.update(zip(group, pieces, strict=True))
        ordered = [parts[i] for i in range(len(rows))]
        logp, ref, value, entropy = (torch.cat([part[k] for part in ordered]) for k in range(4))
        return logp, ref, value, entropy

    def _record(
        self,
        iteration: int,
        episodes: Sequence[Trajectory],
        logp: Tensor,
        ref_logp: Tensor,
        entropy: Tensor,
        scores_N: Tensor,
        value: Tensor,
        returns: Tensor,
    ) -> None:
        n = len(episodes)
        kl = float(k1(logp, ref_logp).double().sum()) / n
        if iteration == 0 and self.same_start and abs(kl) > KL_AT_START:
            raise UserError(
                f"{self.config.name}: the KL to the reference is {kl:.2g} nats before the first step; "
                "model and reference must be the same checkpoint, or name the reference on purpose"
            )
        sampled = torch.tensor([x for e in episodes for x in e.completion.logprobs])
        mismatch = float((sampled - logp).abs().mean())
        if mismatch > MISMATCH_BOUND:
            raise UserError(
                f"{self.config.name}: sampler and trainer differ by {mismatch:.2f} nats a token; "
                "use precision: fp32 or sampling.backend: transformers"
            )
        lengths = [len(e.completion.ids) for e in episodes]
        self.figures = {
            "episodes": float((iteration + 1) * n),
            "objective/kl": kl,
            "objective/kl_k3": float(k3(logp, ref_logp).double().sum()) / n,
            "objective/kl_coef": self.kl.coef,
            "objective/entropy": float(-logp.double().sum()) / n,
            "objective/scores": float(scores_N.mean()),
            "objective/scores_std": float(scores_N.std(correction=0)),
            "objective/non_score_reward": -self.kl.coef * kl,
            "objective/rlhf_reward": float(scores_N.mean()) - self.kl.coef * kl,
            "policy/entropy_avg": float(entropy.mean()),
            "val/explained_variance": float(explained_variance(value, returns)),
            "completions/mean_length": sum(lengths) / n,
            "completions/clipped_ratio": sum(not e.completion.finished for e in episodes) / n,
            "completions/repetition": sum(repetition(e.completion.ids) for e in episodes) / n,
            "rollout/logprob_diff": mismatch,
        }
        if self.watch is not None:
            grades = self.watch.grade([e.prompt for e in episodes], [e.completion for e in episodes])
            gold_N = torch.tensor([grade.score for grade in grades])
            self.figures["eval/gold"] = float(gold_N.mean())
            self.figures["eval/gold_se"] = float(gold_N.std(correction=0)) / n**0.5

    # ------------------------------------------------------------------------------------------------ losses

    def _micro(self, data: Rollout, part: Sequence[int], tokens: int, policy_learns: bool) -> Micro:
        def compute() -> tuple[Tensor, Stats]:
            config = self.config
            batch = pack([data.rows[i] for i in part], self.device)
            old_logp, old_value, advantage, returns = (
                torch.cat([column[i] for i in part]).to(self.device)
                for column in (data.old_logp, data.old_value, data.advantage, data.returns)
            )
            value = self.critic.values_packed(batch)
            value_loss, value_clipped = clipped_value_loss(value, old_value, returns, config.value_clip)
            loss = config.value_coef * value_loss.sum() / tokens
            count = float(old_logp.numel())
            stats = {
                "loss/value_avg": (float(value_loss.detach().sum()), count),
                "val/clipfrac_avg": (float(value_clipped.sum()), count),
            }
            if not policy_learns:
                return loss, stats
            now = token_logprobs(self.policy, batch, self.temperature, entropy=config.entropy_coef > 0)
            policy_loss, clipped = clipped_policy_loss(now.logp_C, old_logp, advantage, config.clip)
            loss = loss + policy_loss.sum() / tokens
            if now.entropy_C is not None:
                loss = loss + entropy_bonus(now.entropy_C, config.entropy_coef).sum() / tokens
            logp = now.logp_C.detach()
            stats |= {
                "loss/policy_avg": (float(policy_loss.detach().sum()), count),
                "policy/clipfrac_avg": (float(clipped.sum()), count),
                "policy/approxkl_avg": (float(k2(logp, old_logp).sum()), count),
                "val/ratio": (float((logp - old_logp).exp().sum()), count),
            }
            return loss, stats

        return compute

    def after(self, iteration: int) -> tuple[dict[str, float], bool]:
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

    ``critic_path``: a reward model (its head comes along); None: the policy's trunk with a new head.
    """
    model, tokenizer = load_policy(
        context.model_path,
        device=context.device,
        lora=context.base_model.lora,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    chat = Chat(tokenizer)
    reference = frozen(load_policy(reference_path, device=context.device)[0])
    critic = load_scalar(
        critic_path or context.model_path,
        device=context.device,
        lora=context.base_model.lora,
        gradient_checkpointing=config.gradient_checkpointing,
        new_head_seed=None if critic_path else context.seed,
    )
    if critic.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{config.name}: the critic {critic_path} has another tokenizer than the policy, so it cannot value the "
            "policy's tokens; set critic to the policy's own stage"
        )
    stops = stop_token_ids(chat, config.sampling)
    sampler = make_sampler(model, config.sampling.backend, stops, context.precision)
    kept, prompt_ids = encode_prompts(chat, prompts, context.data, context.reporter)
    algorithm = Ppo(
        model,
        reference,
        critic,
        scorer,
        sampler,
        chat,
        kept,
        prompt_ids,
        config,
        context.device,
        context.precision,
        context.seed,
        watch,
        same_start=reference_path == context.model_path,
    )
    steps = train(algorithm, config, context.stage, context.reporter, context.device, context.precision)
    with context.stage.checkpoint() as folder:
        save(model, tokenizer, folder)
    rows = context.stage.metrics.rows()
    last = rows[-1]
    shown = ("objective/", "completions/", "eval/", "policy/entropy", "val/explained", "rollout/")
    return {
        "episodes": algorithm.iterations * config.rollout_batch,
        "steps": steps,
        "kl_at_start": rows[0].get("objective/kl"),
        **{name: value for name, value in last.items() if name.startswith(shown)},
    }
