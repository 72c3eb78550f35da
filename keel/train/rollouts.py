"""Rollouts: episodes sampled with the policy as it is, scored, and measured under policy, reference and critic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from keel.data.collate import micro_batches_by_prompt, pack_by_prompt
from keel.model.logprobs import token_logprobs
from keel.model.measure import Pass, measure
from keel.objective.policy import StepValues, episode_scores, overlong_share
from keel.objective.traces import StepBaseline
from keel.precision import autocast
from keel.recipe.online import OnlineBase
from keel.rollout.episodes import EpisodeSampler
from keel.rollout.tokens import MISMATCH_BOUND
from keel.train.context import TrainContext
from keel.train.drawing import Drawn, Draws
from keel.train.figures import Measured, joined, present, rollout_figures
from keel.types import Encoded, Episode, Judge, PackedBatch, Scorer, Scores, UserError

KL_AT_START = 1e-5  # nats a sequence: above it, the reference is not the model that training starts from
# Nats a token: up to it, `auto` takes the sampler's log-probabilities. It moves a ratio by 0.2%, where clipping begins
# at 20%. On the harbor's base model it is 6e-7 in float32; in bfloat16 about 1e-3 (embedded) and 5e-3 (transformers).
SAMPLER_BOUND = 2e-3
# One episode in so many is measured by the trainer even where the sampler's log-probabilities are taken.
PROBE_EVERY = 8
CLIPPED_BOUND = 0.1  # share of the scores that `reward_clip` may cut before a line says so


class Shaped(NamedTuple):
    """Scores as they are learned from: clipped where the recipe says so, cut completions (and long ones, where it says
    so) penalised. ``terms_NK``: the same of each of several rewards, before their weights. ``steps``: the values of the
    episodes' steps, clipped alike, where the scorer knows any."""

    score_N: Tensor
    terms_NK: Tensor | None
    steps: StepValues | None
    finished_N: Tensor
    offsets: Tensor
    step_baseline: StepBaseline = "steps"


@dataclass(frozen=True)
class Episodes:
    """One rollout, measured. Episode n owns ``x_C[offsets[n]:offsets[n + 1]]`` of the tensors over completion tokens;
    all of them are on the CPU. ``shaped_N``, ``steps``, ``terms_NK``: see :class:`Shaped`. ``sampled_logp_C``: what the
    sampler said of its tokens, where ``old_logp_C`` is the trainer's word or a step's own."""

    rows: list[Encoded]
    offsets: Tensor
    old_logp_C: Tensor
    ref_logp_C: Tensor | None
    value_C: Tensor | None
    shaped_N: Tensor
    figures: dict[str, float]
    steps: StepValues | None = None
    terms_NK: Tensor | None = None
    finished_N: Tensor | None = None
    sampled_logp_C: Tensor | None = None
    step_baseline: StepBaseline = "steps"

    @property
    def lengths(self) -> list[int]:
        return [int(length) for length in self.offsets.diff()]

    @property
    def shaped(self) -> Shaped:
        ended_N = torch.ones(len(self.rows), dtype=torch.bool) if self.finished_N is None else self.finished_N
        return Shaped(self.shaped_N, self.terms_NK, self.steps, ended_N, self.offsets, self.step_baseline)


class RolloutCollector:
    """Samples a batch of prompts with the policy as it is, scores the completions, and measures them under policy,
    reference and critic.

    The episodes of a prompt, ``config.group_size`` of them, follow one another. ``same_start``: the reference is the
    checkpoint that training starts from, which is checked before the first step.
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module | None,
        source: EpisodeSampler,
        scorer: Scorer,
        config: OnlineBase,
        context: TrainContext,
        watch: Judge | None = None,
        same_start: bool = True,
    ) -> None:
        self.policy, self.reference, self.source = policy, reference, source
        self.scorer, self.watch = scorer, watch
        self.config, self.context, self.same_start = config, context, same_start
        self.said_clipped = False
        # What is trained is the distribution that is sampled from: softmax(logits / temperature), of policy and
        # reference alike, so that ratios and KL are exact at any temperature.
        self.temperature = config.sampling.temperature
        self.draws = Draws(source, scorer, config, context)
        self.count = self.draws.count

    @torch.no_grad()
    def collect(self, iteration: int, values: Pass | None = None, old_at_step: bool = False) -> Episodes:
        """The rollout of an iteration: a pure function of it, the seed and the weights. ``values``: a critic's.
        ``old_at_step``: the one optimizer step over it knows the old log-probabilities itself, so that those of the
        sampler will do here."""
        config = self.config
        drawn = self.draws.rollout(iteration)
        episodes, scores = drawn.episodes, drawn.scores
        completions = [e.completion for e in episodes]
        rows = [Encoded.of(e.prompt_ids, e.completion.ids) for e in episodes]
        measured, mismatch = self._measure(rows, episodes, values, old_at_step)
        sampled_logp_C = torch.tensor([x for c in completions for x in c.logprobs])
        # All from one source: a ratio's error is then the same kind on every token.
        old_logp_C = joined([m.logp for m in measured])
        if old_logp_C is None:
            old_logp_C = sampled_logp_C
        figures = rollout_figures(episodes, measured, scores.total_N.float(), scores.parts, self.watch)
        if self.reference is not None:
            self._check_start(iteration, figures["objective/kl"])
        if config.reward_clip is not None:
            figures["objective/reward_clipped"] = self._clipped(scores, config.reward_clip)
        shaped = self.shape(drawn)
        return Episodes(
            rows,
            shaped.offsets,
            old_logp_C,
            joined([m.ref_logp for m in measured]),
            joined([m.value for m in measured]),
            shaped.score_N,
            {
                "episodes": float((iteration + 1) * len(episodes)),
                "objective/entropy": float(-old_logp_C.double().sum()) / len(episodes),
                "rollout/logprob_diff": mismatch,
                **figures,
                **drawn.figures,
            },
            shaped.steps,
            shaped.terms_NK,
            shaped.finished_N,
            sampled_logp_C,
            shaped.step_baseline,
        )

    def shape(self, drawn: Drawn) -> Shaped:
        """The scores of what was drawn as they are learned from."""
        config, scores = self.config, drawn.scores
        completions = [e.completion for e in drawn.episodes]
        offsets = torch.tensor([0, *(len(c.ids) for c in completions)]).cumsum(0)
        finished_N = torch.tensor([c.finished for c in completions])
        begin, limit = config.overlong_begins(), config.sampling.max_new_tokens
        long_N = overlong_share(offsets.diff(), limit, begin) if begin < 1 else None

        def shaped(score_N: Tensor, clip: float | None) -> Tensor:
            return episode_scores(score_N.float(), finished_N, config.missing_eos_penalty, clip, long_N)

        terms = [shaped(part_N, None) for part_N in scores.parts.values()]
        return Shaped(
            shaped(scores.reply_N, config.reward_clip),
            torch.stack(terms, 1) if terms else None,
            placed_steps(scores, drawn.episodes, offsets, config.reward_clip),
            finished_N,
            offsets,
            scores.step_baseline,
        )

    # -------------------------------------------------------------------------------------------- measuring

    def _measure(
        self, rows: Sequence[Encoded], episodes: Sequence[Episode], values: Pass | None, old_at_step: bool
    ) -> tuple[list[Measured], float]:
        """(what was measured on each episode, mean absolute difference of sampler's and trainer's log-probabilities).

        The policy's forward pass is left out but for a probe where the sampler's own log-probabilities will do. The KL
        and the entropy are then those of the probe: the sampler's numbers, rounded in another order than the
        reference's, would show a KL where there is none.
        """
        mode = self.config.old_logprobs
        probe = range(0, len(rows), 1 if mode == "trainer" else PROBE_EVERY)
        measured = self._forward(rows, probe, values, policy=True)
        sampled = torch.tensor([x for i in probe for x in episodes[i].completion.logprobs])
        mismatch = float((sampled - present([measured[i].logp for i in probe])).abs().mean())
        if mismatch > MISMATCH_BOUND:
            raise UserError(
                f"{self.config.name}: sampler and trainer differ by {mismatch:.2f} nats a token; "
                "use precision: fp32 or sampling.backend: transformers"
            )
        rest = [i for i in range(len(rows)) if i not in probe]
        trusted = mode == "sampler" or old_at_step or mismatch <= SAMPLER_BOUND
        measured |= self._forward(rows, rest, values, policy=not trusted)
        return [measured[i] for i in range(len(rows))], mismatch

    def _forward(
        self, rows: Sequence[Encoded], indices: Sequence[int], values: Pass | None, policy: bool
    ) -> dict[int, Measured]:
        """Measures the rows of ``indices``.

        A group's completions stand behind one copy of their prompt. Policy and reference see the same packing, so that
        while their weights are equal their log-probabilities are too, to the bit: the KL at step 0 is 0.
        """
        passes: dict[str, Pass] = {}
        if policy:
            passes["policy"] = self._own
        if self.reference is not None:
            passes["ref_logp"] = self._of_reference
        if values is not None:
            passes["value"] = values
        if not passes:
            return {i: Measured() for i in indices}
        some = [rows[i] for i in indices]
        batches = micro_batches_by_prompt(some, self.config.batch_tokens)
        with autocast(self.context.device, self.context.precision):
            found = measure(some, batches, list(passes.values()), self.context.device, pack_by_prompt)
        return {
            i: Measured.of(dict(zip(passes, figures, strict=True))) for i, figures in zip(indices, found, strict=True)
        }

    def _own(self, batch: PackedBatch) -> Tensor:
        own = token_logprobs(self.policy, batch, self.temperature, entropy=True)
        assert own.entropy_C is not None, "it was asked for"
        return torch.stack([own.logp_C, own.entropy_C])

    def _of_reference(self, batch: PackedBatch) -> Tensor:
        assert self.reference is not None, "there is one where this is asked"
        return token_logprobs(self.reference, batch, self.temperature).logp_C

    # --------------------------------------------------------------------------------------------- what is wrong

    def _check_start(self, iteration: int, kl: float) -> None:
        if iteration == 0 and self.same_start and abs(kl) > KL_AT_START:
            raise UserError(
                f"{self.config.name}: the KL to the reference is {kl:.2g} nats before the first step; "
                "model and reference must be the same checkpoint, or name the reference on purpose"
            )

    def _clipped(self, scores: Scores, bound: float) -> float:
        """The share of the scores, steps' values included, beyond the clip; said once when it is large."""
        values = torch.cat([scores.reply_N, torch.tensor([step.value for steps in scores.steps for step in steps])])
        share = float((values.abs() > bound).float().mean())
        if share > CLIPPED_BOUND and not self.said_clipped:
            self.said_clipped = True
            self.context.reporter.note(
                f"{self.config.name}: reward_clip = {bound:g} cuts {share:.0%} of the scores, which makes them all the "
                "same; raise it, leave it out, or give the reward a smaller weight"
            )
        return share


def placed_steps(
    scores: Scores, episodes: Sequence[Episode], offsets: Tensor, clip: float | None = None
) -> StepValues | None:
    """The values of the episodes' steps at their places among all completion tokens, each held within ``clip`` of 0;
    None where there are none. UserError for a step that ends outside its reply, or is worth no finite number."""
    values: list[float] = []
    places: list[int] = []
    of_episodes = scores.steps or ((),) * len(episodes)
    for episode, steps, begin in zip(episodes, of_episodes, offsets[:-1].tolist(), strict=True):
        length = len(episode.completion.ids)
        for step in steps:
            if not 0 <= step.end < length:
                raise UserError(
                    f"prompt {episode.prompt.id!r}: the scorer has a step end at token {step.end} of a reply of "
                    f"{length}; ends count the reply's own tokens, from 0"
                )
            if not math.isfinite(step.value):
                raise UserError(
                    f"prompt {episode.prompt.id!r}: the scorer values a step at {step.value}; values must be finite"
                )
            values.append(step.value)
            places.append(begin + step.end)
    if not values:
        return None
    value_S = torch.tensor(values)
    return StepValues(value_S if clip is None else value_S.clamp(-clip, clip), torch.tensor(places))
