"""The figures that training on the policy's own samples logs, of each rollout and of each optimizer step over it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keel.objective.kl import k1, k2, k3
from keel.rollout.episodes import repetition
from keel.stats import clustered_error
from keel.train.loop import Stats
from keel.types import Completion, Episode, Judge, Prompt


@dataclass(frozen=True)
class Measured:
    """One episode, [C] each; None for what was not asked for."""

    logp: Tensor | None = None
    entropy: Tensor | None = None
    ref_logp: Tensor | None = None
    value: Tensor | None = None

    @staticmethod
    def of(figures: Mapping[str, Tensor]) -> Measured:
        """``figures`` by pass: ``policy`` has two rows, ``ref_logp`` and ``value`` one."""
        logp, entropy = figures.get("policy", (None, None))
        return Measured(logp, entropy, figures.get("ref_logp"), figures.get("value"))


def rollout_figures(
    episodes: Sequence[Episode],
    measured: Sequence[Measured],
    scores_N: Tensor,
    parts: Mapping[str, Tensor],
    watch: Judge | None,
) -> dict[str, float]:
    """The KL from the reference (nats a sequence) is there where a reference was measured."""
    n = len(episodes)
    probe = [m for m in measured if m.logp is not None]
    completions = [e.completion for e in episodes]
    figures = {
        "objective/scores": float(scores_N.mean()),
        "objective/scores_std": float(scores_N.std(correction=0)),
        "policy/entropy_avg": float(present([m.entropy for m in probe]).mean()),
        "completions/mean_length": sum(len(c.ids) for c in completions) / n,
        "completions/clipped_ratio": sum(not c.finished for c in completions) / n,
        "completions/repetition": sum(repetition(c.ids) for c in completions) / n,
        "rollout/measured": len(probe) / n,
    }
    logp, ref_logp = present([m.logp for m in probe]), joined([m.ref_logp for m in probe])
    if ref_logp is not None:
        figures["objective/kl"] = float(k1(logp, ref_logp).double().sum()) / len(probe)
        figures["objective/kl_k3"] = float(k3(logp, ref_logp).double().sum()) / len(probe)
    figures |= {f"objective/scores/{name}": float(part_N.mean()) for name, part_N in parts.items()}
    if watch is not None:
        figures |= _gold([e.prompt for e in episodes], completions, watch)
    return figures


def _gold(prompts: Sequence[Prompt], completions: Sequence[Completion], watch: Judge) -> dict[str, float]:
    """The watching judge's mean score, with its standard error over prompts where there are two or more."""
    grades = watch.grade(prompts, completions)
    graded = [(prompt.id, grade.score) for prompt, grade in zip(prompts, grades, strict=True) if grade is not None]
    scores = [score for _, score in graded]
    if not scores:
        return {}
    error = clustered_error(scores, [identity for identity, _ in graded])
    return {"eval/gold": math.fsum(scores) / len(scores)} | ({"eval/gold_se": error} if error is not None else {})


def joined(columns: Sequence[Tensor | None]) -> Tensor | None:
    """All episodes' tokens in a row [C]; None where some have none."""
    there = [column for column in columns if column is not None]
    return torch.cat(there) if len(there) == len(columns) else None


def present(columns: Sequence[Tensor | None]) -> Tensor:
    """:func:`joined`, of what was to be measured."""
    found = joined(columns)
    assert found is not None, "this was to be measured"
    return found


def policy_stats(loss_C: Tensor, clipped_C: Tensor, logp_C: Tensor, old_logp_C: Tensor) -> Stats:
    """The figures of a clipped policy loss."""
    logp_C, count = logp_C.detach(), float(logp_C.numel())
    return {
        "loss/policy_avg": (float(loss_C.detach().sum()), count),
        "policy/clipfrac_avg": (float(clipped_C.sum()), count),
        "policy/approxkl_avg": (float(k2(logp_C, old_logp_C).sum()), count),
        "val/ratio": (float((logp_C - old_logp_C).exp().sum()), count),
    }
