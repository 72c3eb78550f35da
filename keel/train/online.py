"""What training on the policy's own samples shares (PPO, GRPO): one iteration is one rollout and the optimizer steps
over it. The two differ in the baseline that a token's reward is held against, and in the loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from keel.data.chat import Chat
from keel.data.collate import epoch_order, micro_batches_by_prompt, pack_by_prompt
from keel.model.checkpoint import save
from keel.model.logprobs import token_logprobs
from keel.objective.policy import entropy_bonus
from keel.recipe.online import OnlineBase
from keel.rollout.collect import stop_token_ids
from keel.rollout.episodes import EpisodeSampler, encode_prompts
from keel.rollout.sampler import make_sampler
from keel.train.context import TrainContext
from keel.train.kept import Kept
from keel.train.loop import Algorithm, Micro, Stats, train
from keel.train.ptx import Ptx
from keel.train.roles import roles_of
from keel.train.rollouts import Episodes, RolloutCollector
from keel.types import Encoded, Judge, Prompt, Scorer

Config = TypeVar("Config", bound=OnlineBase)

Column = Sequence[Tensor]
"""One entry an episode, over its completion tokens."""


@dataclass(frozen=True)
class Batch:
    """What a rollout's optimizer steps read. ``value`` and ``returns`` are there for a critic, ``ref_logp`` where there
    is a reference. ``left_out``: the episodes that no step learns from."""

    rows: list[Encoded]
    old_logp: Column
    advantage: Column
    ref_logp: Column | None = None
    value: Column | None = None
    returns: Column | None = None
    sampled_logp: Column | None = None
    left_out: frozenset[int] = frozenset()

    @staticmethod
    def of(
        episodes: Episodes,
        advantage_C: Tensor,
        return_C: Tensor | None = None,
        left_out: frozenset[int] = frozenset(),
    ) -> Batch:
        def split(x_C: Tensor | None) -> Column | None:
            return None if x_C is None else x_C.split(episodes.lengths)

        return Batch(
            episodes.rows,
            episodes.old_logp_C.split(episodes.lengths),
            advantage_C.split(episodes.lengths),
            split(episodes.ref_logp_C),
            split(episodes.value_C),
            split(return_C),
            split(episodes.sampled_logp_C),
            left_out,
        )

    def tokens(self, episodes: Sequence[int]) -> int:
        return sum(self.old_logp[i].numel() for i in episodes)


@dataclass(frozen=True)
class Tokens:
    """The tokens of a micro-batch as the policy's loss reads them [C], its completions in a row, and where each begins
    (``offsets`` int64 [N+1]). ``ref_logp`` and ``sampled_logp`` are there where the algorithm asks for them."""

    logp: Tensor
    old_logp: Tensor
    advantage: Tensor
    offsets: Tensor
    ref_logp: Tensor | None = None
    sampled_logp: Tensor | None = None


class Online(Algorithm, Generic[Config]):
    """The wiring of PPO and GRPO for the training loop."""

    entropy_coef = 0.0
    kl_in_loss = False
    asks_sampler = False  # for what the sampler said of its tokens
    # The policy of a rollout's first step is the one that sampled it. Where there is no other step, the ratio is 1 and
    # its gradient that of log p: nothing but the probe need be measured.
    old_at_step = False

    def __init__(self, rollouts: RolloutCollector, config: Config) -> None:
        self.rollouts, self.config = rollouts, config
        self.modules: Mapping[str, nn.Module] = {"policy": rollouts.policy}
        self.iterations = rollouts.count
        self.updates_per_iteration = config.epochs * config.minibatches
        self.figures: dict[str, float] = {}

    @abstractmethod
    def rollout(self, iteration: int) -> Batch:
        """The iteration's rollout with its advantages; sets ``figures``."""

    @abstractmethod
    def policy_loss(self, tokens: Tokens) -> tuple[Tensor, Stats]:
        """-> (loss_C, figures)."""

    def mean(self, batch: Batch, step: Sequence[int], group: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """What makes a micro-batch's share of the loss of the tokens' losses [C]; ``step``: the episodes that the
        optimizer step learns from, ``group``: the micro-batch's."""
        tokens = batch.tokens(step)
        return lambda loss_C: loss_C.sum() / tokens

    def updates(self, iteration: int) -> Iterator[list[Micro]]:
        batch = self.rollout(iteration)
        for step, groups in minibatches(batch.rows, self.config, self.rollouts.context.seed, iteration):
            if batch.left_out:
                step = [i for i in step if i not in batch.left_out]
                groups = [kept for group in groups if (kept := [i for i in group if i not in batch.left_out])]
            yield self.micros(batch, step, groups, iteration)

    def micros(self, batch: Batch, step: Sequence[int], groups: Sequence[Sequence[int]], iteration: int) -> list[Micro]:
        """One optimizer step."""
        return [self._policy_micro(batch, group, self.mean(batch, step, group)) for group in groups]

    def after(self, iteration: int) -> tuple[dict[str, float], bool]:
        return self.figures, False

    def _policy_micro(self, batch: Batch, group: Sequence[int], mean: Callable[[Tensor], Tensor]) -> Micro:
        def compute() -> tuple[Tensor, Stats]:
            rollouts = self.rollouts
            packed = pack_by_prompt([batch.rows[i] for i in group], rollouts.context.device)
            now = token_logprobs(rollouts.policy, packed, rollouts.temperature, entropy=self.entropy_coef > 0)
            tokens = self._tokens(batch, group, now.logp_C)
            loss_C, figures = self.policy_loss(tokens)
            loss = mean(loss_C)
            if now.entropy_C is not None:
                loss = loss + mean(entropy_bonus(now.entropy_C, self.entropy_coef))
            return loss, figures

        return compute

    def _tokens(self, batch: Batch, group: Sequence[int], logp_C: Tensor) -> Tokens:
        return Tokens(
            logp_C,
            logp_C.detach() if self.old_at_step else self.tokens_of(group, batch.old_logp),
            self.tokens_of(group, batch.advantage),
            torch.tensor([0, *(batch.tokens([i]) for i in group)], device=logp_C.device).cumsum(0),
            self.tokens_of(group, batch.ref_logp) if self.kl_in_loss else None,
            self.tokens_of(group, batch.sampled_logp) if self.asks_sampler else None,
        )

    def tokens_of(self, group: Sequence[int], column: Column | None) -> Tensor:
        """A column's tokens of some episodes in a row [C], on the device."""
        assert column is not None, "this was to be measured"
        return torch.cat([column[i] for i in group]).to(self.rollouts.context.device)


def minibatches(
    rows: Sequence[Encoded], config: OnlineBase, seed: int, iteration: int
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """The optimizer steps over a rollout: (the step's episodes, the same in micro-batches for ``pack_by_prompt``), in
    an order that seed and iteration determine. A prompt's episodes stay together, behind one copy of it."""
    group = config.group_size
    prompts = len(rows) // group
    edges = [prompts * i // config.minibatches for i in range(config.minibatches + 1)]
    for epoch in range(config.epochs):
        order = epoch_order(prompts, seed, iteration * config.epochs + epoch)
        for begin, end in pairwise(edges):
            part = [i * group + j for i in order[begin:end] for j in range(group)]
            batches = micro_batches_by_prompt([rows[i] for i in part], config.batch_tokens)
            yield part, [[part[i] for i in batch] for batch in batches]


# ------------------------------------------------------------------------------------------------ start and end


def make_rollouts(
    config: OnlineBase,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    reference_path: Path | None,
    context: TrainContext,
    watch: Judge | None = None,
) -> RolloutCollector:
    """Makes the policy that is trained, and the reference (None: there is none)."""
    roles = roles_of(config, context)
    policy, tokenizer = roles.policy()
    reference = roles.reference(reference_path, (policy, tokenizer)) if reference_path else None
    chat = Chat(tokenizer)
    sampler = make_sampler(policy, config.sampling.backend, stop_token_ids(chat, config.sampling), context.precision)
    source = EpisodeSampler(
        sampler, chat, *encode_prompts(chat, prompts, context.data, context.reporter), config.sampling
    )
    same_start = reference_path == context.model_path
    return RolloutCollector(policy, reference, source, scorer, config, context, watch, same_start=same_start)


def train_online(algorithm: Online[Any], context: TrainContext, policy_begins: int = 0) -> dict[str, Any]:
    """Trains and writes the policy; returns the stage's summary. ``policy_begins``: the first optimizer step that it
    learns from."""
    rollouts, config = algorithm.rollouts, algorithm.config
    tokenizer = rollouts.source.chat.tokenizer
    texts = Ptx(rollouts.policy, tokenizer, config, context, policy_begins)
    kept = Kept(rollouts.policy, tokenizer, config, context, algorithm.iterations)
    steps = train(algorithm, config, context, texts, {"policy": policy_begins}, kept)
    with context.stage.checkpoint() as folder:
        dtype = save(rollouts.policy, tokenizer, folder)
    rows = context.stage.metrics.rows()
    shown = (
        "objective/",
        "completions/",
        "eval/",
        "policy/entropy",
        "val/explained",
        "rollout/",
        "frac_reward",
        "process/",
    )
    return {
        "episodes": rollouts.count * config.rollout_batch,
        "steps": steps,
        "dtype": dtype,
        "kl_at_start": rows[0].get("objective/kl"),
        **{name: value for name, value in rows[-1].items() if name.startswith(shown)},
    }
