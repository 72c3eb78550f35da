"""One model's replies on the held-out prompts -> its figures; several models -> the table against a baseline.

Nothing here samples or loads a model: replies come in as records, the judge and the reward model as objects. So the
same code grades a checkpoint, a file of replies, or a test's hand-written ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from keel.eval.winrate import WinRate, win_rate
from keel.objective.kl import k1, k3
from keel.rollout.episodes import repetition
from keel.types import Completion, Grade, Judge, Prompt, Scorer, UserError


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean of ``count`` independent values with its standard error (None below two values)."""

    mean: float
    se: float | None
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        assert values, "an estimate needs a value"
        n = len(values)
        mean = math.fsum(values) / n
        if n < 2:
            return Estimate(mean, None, n)
        variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
        return Estimate(mean, math.sqrt(variance / n), n)


@dataclass(frozen=True, slots=True)
class GradedReply:
    prompt: Prompt
    completion: Completion
    grade: Grade | None
    reward: float | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """Means over prompts (a prompt's own value is the mean over its replies).

    score: the judge's, over the replies that it graded, None where it graded none; graded: their share; reward: the
    learned model's, None without one; flags: by the judge's flag name, over the prompts where the question applies
    (their number is in ``count``); length: tokens of a reply, its end token included;
    finished: share of replies that ended by themselves; repetition: see ``repetition``.
    """

    score: Estimate | None
    graded: float
    reward: Estimate | None
    flags: Mapping[str, Estimate]
    length: Estimate
    finished: Estimate
    repetition: Estimate


@dataclass(frozen=True, slots=True)
class ModelEvaluation:
    """``replies[i]`` are the graded replies to prompt i, in the order of the prompts; ``by_kind`` by Prompt.kind;
    ``reward_parts``: the mean of each term of a mixed reward, before weighting."""

    name: str
    replies: tuple[tuple[GradedReply, ...], ...]
    figures: Figures
    by_kind: Mapping[str, Figures] = field(default_factory=dict)
    reward_parts: Mapping[str, float] = field(default_factory=dict)


def evaluate_model(
    name: str,
    prompts: Sequence[Prompt],
    replies: Sequence[Sequence[Completion]],
    judge: Judge,
    scorer: Scorer | None = None,
) -> ModelEvaluation:
    """Grades every reply, once by the judge and once by the scorer when there is one.

    replies: for each prompt at least one completion. Raises UserError without prompts, or when the judge returns
    another number of grades than replies or a score that is not finite. A reply without a grade (None) is left out of
    the judge's figures.
    """
    if not prompts:
        raise UserError(f"model {name!r} has no prompts to be evaluated on; give data.heldout_prompts")
    asked = [p for p, group in zip(prompts, replies, strict=True) for _ in group]
    given = list(chain.from_iterable(replies))
    assert all(replies), "every prompt needs a reply"
    grades = judge.grade(asked, given)
    if len(grades) != len(given):
        raise UserError(f"the judge returned {len(grades)} grades for {len(given)} replies of model {name!r}")
    for prompt, grade in zip(asked, grades, strict=True):
        if grade is not None and not math.isfinite(grade.score):
            raise UserError(f"the judge's score of model {name!r} on prompt {prompt.id!r} is {grade.score}")
    scores = scorer.score(asked, given) if scorer is not None else None
    rewards = scores.total_N.tolist() if scores else [None] * len(given)
    parts = {part: float(score_N.mean()) for part, score_N in scores.parts.items()} if scores else {}

    graded = iter([GradedReply(*row) for row in zip(asked, given, grades, rewards, strict=True)])
    rows = tuple(tuple(next(graded) for _ in group) for group in replies)
    by_kind: dict[str, list[tuple[GradedReply, ...]]] = {}
    for row in rows:
        if row[0].prompt.kind:
            by_kind.setdefault(row[0].prompt.kind, []).append(row)
    kinds = {kind: _figures(group) for kind, group in by_kind.items()}
    return ModelEvaluation(name, rows, _figures(rows), kinds, parts)


def _figures(rows: Sequence[Sequence[GradedReply]]) -> Figures:
    flags: dict[str, list[float]] = {}
    for row in rows:
        grades = [reply.grade for reply in row if reply.grade is not None]
        for name in dict.fromkeys(chain.from_iterable(grade.flags for grade in grades)):
            answers = [a for grade in grades if (a := grade.flags.get(name)) is not None]
            if answers:
                flags.setdefault(name, []).append(_mean(answers))
    rewards = [[reply.reward for reply in row if reply.reward is not None] for row in rows]
    scores = [[reply.grade.score for reply in row if reply.grade is not None] for row in rows]
    return Figures(
        score=Estimate.of([_mean(row) for row in scores if row]) if any(scores) else None,
        graded=sum(map(len, scores)) / sum(map(len, rows)),
        reward=Estimate.of([_mean(row) for row in rewards]) if all(rewards) else None,
        flags={name: Estimate.of(values) for name, values in flags.items()},
        length=Estimate.of([_mean([len(r.completion.ids) for r in row]) for row in rows]),
        finished=Estimate.of([_mean([r.completion.finished for r in row]) for row in rows]),
        repetition=Estimate.of([_mean([repetition(r.completion.ids) for r in row]) for row in rows]),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# ------------------------------------------------------------------------------------------- KL from the reference


@dataclass(frozen=True, slots=True)
class KlEstimate:
    """KL(policy || reference) in nats per sequence, from the policy's own samples.

    k1: mean over sequences of the summed log-ratio, unbiased, negative at times by noise; k3: the mean of the summed
    k3 of ``keel.objective.kl``, never negative. The standard errors say how far to trust them.
    """

    k1: Estimate
    k3: Estimate


def kl_from_reference(policy_logp_C: Tensor, ref_logp_C: Tensor, offsets: Tensor) -> KlEstimate:
    """policy_logp_C, ref_logp_C: [C] nats of the sampled tokens under both models; offsets: int64 [B+1], where each
    sequence's tokens begin and end in C. Both estimators are summed over a sequence's tokens."""
    assert policy_logp_C.shape == ref_logp_C.shape
    assert int(offsets[-1]) == policy_logp_C.numel()
    policy_C, ref_C = policy_logp_C.double(), ref_logp_C.double()
    return KlEstimate(
        k1=Estimate.of(_segment_sums(k1(policy_C, ref_C), offsets).tolist()),
        k3=Estimate.of(_segment_sums(k3(policy_C, ref_C), offsets).tolist()),
    )


def _segment_sums(values_C: Tensor, offsets: Tensor) -> Tensor:
    running = torch.cat([values_C.new_zeros(1), values_C.cumsum(0)])
    return running[offsets[1:]] - running[offsets[:-1]]


# ------------------------------------------------------------------------------------------- several models, one table

_RATE_NAMES = {"answered": "answer_rate"}


def rate_name(flag: str) -> str:
    """The name in summary.json of a flag's mean: ``correct`` -> ``correct_rate``."""
    return _RATE_NAMES.get(flag, f"{flag}_rate")


def compare(
    evaluations: Sequence[ModelEvaluation], baseline: str, n_boot: int = 2000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """The table of summary.json: for each model its figures, and its win rate against ``baseline``.

    Keys: gold_reward (+ _se), graded, <flag>_rate with ``counts``, reward, mean_length, finished_rate, repetition,
    win_rate_vs_BASELINE ([point, low, high], None where undefined, as for the baseline itself),
    wins / losses / ties, and ``kinds`` with gold_reward, rates and win rate of each kind of prompt.
    The i-th reply of a model meets the i-th reply of the baseline to the same prompt, where both have a grade.

    Raises UserError when the baseline is not among the models or the models answered different prompts.
    """
    by_name = {e.name: e for e in evaluations}
    if baseline not in by_name:
        raise UserError(f"eval baseline {baseline!r} is not among the evaluated models: {', '.join(by_name)}")
    base = by_name[baseline]
    table: dict[str, dict[str, Any]] = {}
    for evaluation in evaluations:
        if [row[0].prompt.id for row in evaluation.replies] != [row[0].prompt.id for row in base.replies]:
            raise UserError(f"models {evaluation.name!r} and {baseline!r} were asked different prompts")
        kinds = {
            kind: _as_dict(figures) | _win_figures(evaluation, base, n_boot, seed, kind)
            for kind, figures in evaluation.by_kind.items()
        }
        table[evaluation.name] = (
            _as_dict(evaluation.figures) | _win_figures(evaluation, base, n_boot, seed) | {"kinds": kinds}
        )
    return table


def versus(
    model: ModelEvaluation, baseline: ModelEvaluation, n_boot: int = 2000, seed: int = 0, kind: str | None = None
) -> WinRate:
    """The model's win rate against the baseline by the judge's score, over all prompts or those of one kind."""
    pairs = [
        (a.grade.score, b.grade.score, number)
        for number, (row_a, row_b) in enumerate(zip(model.replies, baseline.replies, strict=True))
        if kind is None or row_a[0].prompt.kind == kind
        for a, b in zip(row_a, row_b, strict=False)  # one model may have kept fewer distinct replies
        if a.grade is not None and b.grade is not None
    ]
    return win_rate([p[0] for p in pairs], [p[1] for p in pairs], [p[2] for p in pairs], n_boot, seed)


def _win_figures(
    model: ModelEvaluation, baseline: ModelEvaluation, n_boot: int, seed: int, kind: str | None = None
) -> dict[str, Any]:
    if model.name == baseline.name:
        return {f"win_rate_vs_{baseline.name}": None}
    won = versus(model, baseline, n_boot, seed, kind)
    return {
        f"win_rate_vs_{baseline.name}": won.as_list(),
        "wins": won.wins,
        "losses": won.losses,
        "ties": won.ties,
    }


def _as_dict(figures: Figures) -> dict[str, Any]:
    return {
        "gold_reward": figures.score.mean if figures.score else None,
        "gold_reward_se": figures.score.se if figures.score else None,
        "graded": figures.graded,
        **{rate_name(flag): estimate.mean for flag, estimate in figures.flags.items()},
        "reward": figures.reward.mean if figures.reward else None,
        "mean_length": figures.length.mean,
        "finished_rate": figures.finished.mean,
        "repetition": figures.repetition.mean,
        "prompts": figures.length.count,
        "counts": {rate_name(flag): estimate.count for flag, estimate in figures.flags.items()},
    }


def side_by_side(evaluations: Sequence[ModelEvaluation], show: int) -> list[dict[str, Any]]:
    """The ``samples`` of summary.json: ``show`` prompts, the kinds taking turns, with every model's first reply.

    Prompts are taken in their given order, never picked by how a model did on them.
    """
    if not evaluations:
        return []
    queues: dict[str, list[int]] = {}
    for number, row in enumerate(evaluations[0].replies):
        queues.setdefault(row[0].prompt.kind, []).append(number)
    turns: Iterable[int] = (n for turn in zip_longest(*queues.values()) for n in turn if n is not None)
    chosen = [number for number, _ in zip(turns, range(show), strict=False)]
    return [
        {
            "prompt": conversation_text(evaluations[0].replies[number][0].prompt),
            "kind": evaluations[0].replies[number][0].prompt.kind,
            "replies": {e.name: _reply_dict(e.replies[number][0]) for e in evaluations},
        }
        for number in chosen
    ]


def _reply_dict(reply: GradedReply) -> dict[str, Any]:
    return {
        "text": reply.completion.text,
        "finished": reply.completion.finished,
        "score": reply.grade.score if reply.grade else None,
        "reward": reply.reward,
        "flags": dict(reply.grade.flags) if reply.grade else {},
    }


def conversation_text(prompt: Prompt) -> str:
    """A prompt as one reads it: its only message, or each message after its role."""
    if len(prompt.messages) == 1:
        return prompt.messages[0].content
    return "\n".join(f"{m.role}: {m.content}" for m in prompt.messages)
