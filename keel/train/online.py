"""What training on the policy's own samples shares (PPO, GRPO): rollouts and what is measured on them, the order of
episodes over an update's optimizer steps, and the figures that every such run logs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from keel.data.chat import Chat
from keel.data.collate import epoch_order, micro_batches_by_prompt, pack_by_prompt
from keel.model.checkpoint import load_policy, save
from keel.model.logprobs import masked_offsets, token_logprobs
from keel.model.packed import compute_alike
from keel.objective.kl import k1, k2, k3
from keel.objective.policy import episode_scores
from keel.precision import Precision, autocast
from keel.recipe.stage import OnlineBase
from keel.reward.scorer import MixedScorer
from keel.rollout.collect import stop_token_ids
from keel.rollout.episodes import encode_prompts, repetition, rollout
from keel.rollout.sampler import Sampler, make_sampler
from keel.run import Silent
from keel.stats import clustered_error
from keel.train.context import TrainContext, load_reference
from keel.train.loop import Stats, compile_as_asked
from keel.train.schedule import Schedule
from keel.types import Completion, Encoded, Judge, PackedBatch, Prompt, Reporter, Scorer, Trajectory, UserError

KL_AT_START = 1e-5  # nats a sequence: above it, the reference is not the model that training starts from
MISMATCH_BOUND = 0.5  # nats a token between sampler and trainer: above it, ratios mean nothing
# Nats a token: up to it, `auto` takes the sampler's log-probabilities. It moves a ratio by 0.2%, where clipping begins
# at 20%. On the harbor's base model it is 6e-7 in float32; in bfloat16 about 1e-3 (embedded) and 5e-3 (transformers).
SAMPLER_BOUND = 2e-3
# One episode in so many is measured by the trainer even where the sampler's log-probabilities are taken.
PROBE_EVERY = 8
CLIPPED_BOUND = 0.1  # share of the scores that `reward_clip` may cut before a line says so

Values = Callable[[PackedBatch], Tensor]
"""A critic: packed batch -> values of its masked tokens [C]."""


@dataclass(frozen=True)
class Episodes:
    """One rollout, measured. Episode n owns ``x_C[offsets[n]:offsets[n + 1]]`` of the tensors over completion tokens;
    all of them are on the CPU. ``shaped_N``: the scores as they are learned from, clipped where the recipe says so, cut
    completions penalised."""

    rows: list[Encoded]
    offsets: Tensor
    old_logp_C: Tensor
    ref_logp_C: Tensor | None
    value_C: Tensor | None
    shaped_N: Tensor
    figures: dict[str, float]

    @property
    def lengths(self) -> list[int]:
        return [int(length) for length in self.offsets.diff()]


@dataclass(frozen=True)
class _Measured:
    """One episode, [C] each; None for what was not asked for."""

    logp: Tensor | None
    entropy: Tensor | None
    ref_logp: Tensor | None
    value: Tensor | None


class Rollouts:
    """Samples a batch of prompts with the policy as it is, scores the completions, and measures them under policy,
    reference and critic.

    The episodes of a prompt, ``config.group_size`` of them, follow one another. ``same_start``: the reference is the
    checkpoint that training starts from, which is checked before the first step.
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module | None,
        scorer: Scorer,
        sampler: Sampler,
        chat: Chat,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Sequence[int]],
        config: OnlineBase,
        device: str,
        precision: Precision,
        seed: int,
        watch: Judge | None = None,
        same_start: bool = True,
        reporter: Reporter | None = None,
    ) -> None:
        self.policy, self.reference = policy, reference
        self.scorer, self.sampler, self.chat, self.watch = scorer, sampler, chat, watch
        self.prompts, self.prompt_ids = prompts, prompt_ids
        self.config, self.device, self.precision, self.seed = config, device, precision, seed
        self.same_start, self.reporter = same_start, reporter or Silent()
        self.said_clipped = False
        # What is trained is the distribution that is sampled from: softmax(logits / temperature), of policy and
        # reference alike, so that ratios and KL are exact at any temperature.
        self.temperature = config.sampling.temperature
        self.count = math.ceil(config.episodes / config.rollout_batch)
        per_rollout = config.rollout_batch // config.group_size
        self.schedule = Schedule(len(prompts), per_rollout, self.count * per_rollout / len(prompts), seed)

    @torch.no_grad()
    def collect(self, iteration: int, values: Values | None = None, old_at_step: bool = False) -> Episodes:
        """The rollout of an iteration: a pure function of it, the seed and the weights. ``old_at_step``: the one
        optimizer step over it knows the old log-probabilities itself, so that those of the sampler will do here."""
        config = self.config
        # A group's requests lie side by side: the embedded sampler prefills a prompt once for all of them.
        chosen = [i for i in self.schedule.batch(iteration) for _ in range(config.group_size)]
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
        measured, mismatch = self._measure(rows, episodes, values, old_at_step)
        completions = [e.completion for e in episodes]
        with autocast(self.device, self.precision):
            scores_N = self.scorer.score([e.prompt for e in episodes], completions).float()
        finished_N = torch.tensor([c.finished for c in completions])
        # All from one source: a ratio's error is then the same kind on every token.
        old_logp_C = _joined([m.logp for m in measured])
        if old_logp_C is None:
            old_logp_C = torch.tensor([x for c in completions for x in c.logprobs])
        return Episodes(
            rows,
            torch.tensor([0, *(len(c.ids) for c in completions)]).cumsum(0),
            old_logp_C,
            _joined([m.ref_logp for m in measured]),
            _joined([m.value for m in measured]),
            episode_scores(scores_N, finished_N, config.missing_eos_penalty, config.reward_clip),
            self._figures(iteration, episodes, measured, old_logp_C, scores_N, mismatch),
        )

    # -------------------------------------------------------------------------------------------- measuring

    def _measure(
        self, rows: Sequence[Encoded], episodes: Sequence[Trajectory], values: Values | None, old_at_step: bool
    ) -> tuple[list[_Measured], float]:
        """(what was measured on each episode, mean absolute difference of sampler's and trainer's log-probabilities).

        The policy's forward pass is left out but for a probe where the sampler's own log-probabilities will do. The KL
        and the entropy are then those of the probe: the sampler's numbers, rounded in another order than the
        reference's, would show a KL where there is none.
        """
        mode = self.config.old_logprobs
        probe = range(0, len(rows), 1 if mode == "trainer" else PROBE_EVERY)
        measured = self._forward(rows, probe, values, policy=True)
        sampled = torch.tensor([x for i in probe for x in episodes[i].completion.logprobs])
        mismatch = float((sampled - _present([measured[i].logp for i in probe])).abs().mean())
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
        self, rows: Sequence[Encoded], indices: Sequence[int], values: Values | None, policy: bool
    ) -> dict[int, _Measured]:
        """Measures the rows of ``indices``.

        A group's completions stand behind one copy of their prompt. Policy and reference see the same packing, so that
        while their weights are equal their log-probabilities are too, to the bit: the KL at step 0 is 0.
        """
        found: dict[int, _Measured] = {}
        if not policy and self.reference is None and values is None:
            return {i: _Measured(None, None, None, None) for i in indices}
        with autocast(self.device, self.precision):
            for group in micro_batches_by_prompt([rows[i] for i in indices], self.config.batch_tokens):
                batch = pack_by_prompt([rows[indices[i]] for i in group], self.device)
                own = token_logprobs(self.policy, batch, self.temperature, entropy=True) if policy else None
                columns = (
                    own.logp_C if own else None,
                    own.entropy_C if own else None,
                    token_logprobs(self.reference, batch, self.temperature).logp_C if self.reference else None,
                    values(batch) if values else None,
                )
                lengths = masked_offsets(batch).diff().tolist()
                pieces = [[None] * len(group) if x is None else x.float().cpu().split(lengths) for x in columns]
                for i, *parts in zip(group, *pieces, strict=True):
                    found[indices[i]] = _Measured(*parts)
        return found

    # ---------------------------------------------------------------------------------------------- figures

    def _figures(
        self,
        iteration: int,
        episodes: Sequence[Trajectory],
        measured: Sequence[_Measured],
        old_logp_C: Tensor,
        scores_N: Tensor,
        mismatch: float,
    ) -> dict[str, float]:
        n = len(episodes)
        probe = [m for m in measured if m.logp is not None]
        completions = [e.completion for e in episodes]
        figures = {"episodes": float((iteration + 1) * n)}
        if self.reference is not None:
            figures |= self._kl(iteration, probe)
        figures |= {
            "objective/entropy": float(-old_logp_C.double().sum()) / n,
            "objective/scores": float(scores_N.mean()),
            "objective/scores_std": float(scores_N.std(correction=0)),
            "policy/entropy_avg": float(_present([m.entropy for m in probe]).mean()),
            "completions/mean_length": sum(len(c.ids) for c in completions) / n,
            "completions/clipped_ratio": sum(not c.finished for c in completions) / n,
            "completions/repetition": sum(repetition(c.ids) for c in completions) / n,
            "rollout/logprob_diff": mismatch,
            "rollout/measured": len(probe) / n,
        }
        if self.config.reward_clip is not None:
            figures["objective/reward_clipped"] = self._clipped(scores_N, self.config.reward_clip)
        if isinstance(self.scorer, MixedScorer):
            figures |= {f"objective/scores/{name}": float(x.mean()) for name, x in self.scorer.last_parts.items()}
        if self.watch is not None:
            figures |= _gold([e.prompt for e in episodes], completions, self.watch)
        return figures

    def _clipped(self, scores_N: Tensor, bound: float) -> float:
        """The share of the scores beyond the clip; said once when it is large."""
        share = float((scores_N.abs() > bound).float().mean())
        if share > CLIPPED_BOUND and not self.said_clipped:
            self.said_clipped = True
            self.reporter.note(
                f"{self.config.name}: reward_clip = {bound:g} cuts {share:.0%} of the scores, which makes them all the "
                "same; raise it, leave it out, or give the reward a smaller weight"
            )
        return share

    def _kl(self, iteration: int, probe: Sequence[_Measured]) -> dict[str, float]:
        """KL from the reference, nats a sequence; UserError when it is not 0 before the first step."""
        logp, ref_logp = _present([m.logp for m in probe]), _present([m.ref_logp for m in probe])
        kl = float(k1(logp, ref_logp).double().sum()) / len(probe)
        if iteration == 0 and self.same_start and abs(kl) > KL_AT_START:
            raise UserError(
                f"{self.config.name}: the KL to the reference is {kl:.2g} nats before the first step; "
                "model and reference must be the same checkpoint, or name the reference on purpose"
            )
        return {"objective/kl": kl, "objective/kl_k3": float(k3(logp, ref_logp).double().sum()) / len(probe)}


def _gold(prompts: Sequence[Prompt], completions: Sequence[Completion], watch: Judge) -> dict[str, float]:
    """The watching judge's mean score, with its standard error over prompts where there are two or more."""
    grades = watch.grade(prompts, completions)
    graded = [(prompt.id, grade.score) for prompt, grade in zip(prompts, grades, strict=True) if grade is not None]
    scores = [score for _, score in graded]
    if not scores:
        return {}
    error = clustered_error(scores, [identity for identity, _ in graded])
    return {"eval/gold": math.fsum(scores) / len(scores)} | ({"eval/gold_se": error} if error is not None else {})


def _joined(columns: Sequence[Tensor | None]) -> Tensor | None:
    """All episodes' tokens in a row [C]; None where some have none."""
    there = [column for column in columns if column is not None]
    return torch.cat(there) if len(there) == len(columns) else None


def _present(columns: Sequence[Tensor | None]) -> Tensor:
    joined = _joined(columns)
    assert joined is not None, "this was to be measured"
    return joined


# ------------------------------------------------------------------------------------------------------- updates


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


def policy_stats(loss_C: Tensor, clipped_C: Tensor, logp_C: Tensor, old_logp_C: Tensor) -> Stats:
    """The figures of a clipped policy loss."""
    logp_C, count = logp_C.detach(), float(logp_C.numel())
    return {
        "loss/policy_avg": (float(loss_C.detach().sum()), count),
        "policy/clipfrac_avg": (float(clipped_C.sum()), count),
        "policy/approxkl_avg": (float(k2(logp_C, old_logp_C).sum()), count),
        "val/ratio": (float((logp_C - old_logp_C).exp().sum()), count),
    }


# ------------------------------------------------------------------------------------------------ start and end


def make_rollouts(
    config: OnlineBase,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    reference_path: Path | None,
    context: TrainContext,
    watch: Judge | None = None,
) -> Rollouts:
    """Loads the policy at ``context.model_path`` to be trained, and the reference (None: there is none)."""
    policy, reference, tokenizer = _policy_and_reference(config, reference_path, context)
    chat = Chat(tokenizer)
    sampler = make_sampler(policy, config.sampling.backend, stop_token_ids(chat, config.sampling), context.precision)
    kept, prompt_ids = encode_prompts(chat, prompts, context.data, context.reporter)
    return Rollouts(
        policy,
        reference,
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
        reporter=context.reporter,
    )


def _policy_and_reference(
    config: OnlineBase, reference_path: Path | None, context: TrainContext
) -> tuple[nn.Module, nn.Module | None, PreTrainedTokenizerBase]:
    trunk, checkpointing = context.trunk, config.gradient_checkpointing
    if trunk is not None:
        policy, tokenizer = trunk.policy(checkpointing)
        reference = trunk.reference() if reference_path else None
    else:
        policy, tokenizer = load_policy(
            context.source(),
            device=context.device,
            lora=context.whole_lora,
            gradient_checkpointing=checkpointing,
            products=context.products_over_base,
            note=context.reporter.note,
        )
        reference = load_reference(reference_path, tokenizer, config.name, context) if reference_path else None
    compile_as_asked(policy, config)
    if reference is not None:
        compute_alike(reference, policy)
    return policy, reference, tokenizer


def finish(rollouts: Rollouts, context: TrainContext, steps: int) -> dict[str, Any]:
    """Writes the policy; returns the stage's summary."""
    with context.stage.checkpoint() as folder:
        dtype = save(rollouts.policy, rollouts.chat.tokenizer, folder)
    rows = context.stage.metrics.rows()
    shown = ("objective/", "completions/", "eval/", "policy/entropy", "val/explained", "rollout/", "frac_reward")
    return {
        "episodes": rollouts.count * rollouts.config.rollout_batch,
        "steps": steps,
        "dtype": dtype,
        "kl_at_start": rows[0].get("objective/kl"),
        **{name: value for name, value in rows[-1].items() if name.startswith(shown)},
    }
