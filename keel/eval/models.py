"""The evaluation stage: every model answers the held-out prompts, is graded, and is measured for what it kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from keel.data.chat import Chat
from keel.data.collate import batches_by_tokens
from keel.data.sources import Fact
from keel.eval.alarms import Alarm, find_alarms
from keel.eval.capability import choice_accuracy, text_loss
from keel.eval.displacement import displacement_row
from keel.eval.grading import ModelEvaluation, compare, evaluate_model, kl_from_reference, side_by_side
from keel.eval.judge_card import scored_pair
from keel.eval.judge_effects import JudgedPair
from keel.eval.overoptimisation import curve, guardrail
from keel.eval.process_alarms import process_alarms
from keel.eval.reply_alarms import reply_alarms
from keel.model.checkpoint import Place, frozen, load_policy
from keel.model.measure import completion_logprobs
from keel.model.modules import context_length
from keel.precision import Precision, autocast
from keel.recipe.sections import SamplingConfig
from keel.rollout.collect import stop_token_ids, with_decoded_text
from keel.rollout.divergence import asked_alike
from keel.rollout.sampler import make_sampler
from keel.types import Completion, Encoded, Judge, Prompt, Reporter, Scorer, place_of

TOKENS = 8192  # tokens in one forward pass


@dataclass(frozen=True)
class OnlineRun:
    """A PPO or GRPO stage: its kind, the weight of its KL penalty, its metrics."""

    kind: str
    kl_weight: float
    rows: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class OfflineRun:
    """A stage that measured its policy at its end: the model that it started from, what it measured (its summary)."""

    start: str
    measured: Mapping[str, Any]


@dataclass(frozen=True)
class EvaluationInputs:
    """``online_runs``: the PPO and GRPO stages among the models; ``offline_runs``: the others that measured theirs.
    ``gold``: what the judge is held against on ``card_pairs`` pairs of a model's reply and the baseline's; None: it is
    not."""

    models: Mapping[str, Place]
    baseline: str
    prompts: Sequence[Prompt]
    texts: Sequence[str]
    facts: Sequence[Fact]
    judge: Judge
    scorer: Scorer | None
    sampling: SamplingConfig
    seed: int
    bootstrap: int
    show: int
    device: str
    precision: Precision
    online_runs: Mapping[str, OnlineRun]
    offline_runs: Mapping[str, OfflineRun] = field(default_factory=dict)
    gold: Judge | None = None
    card_pairs: int = 0


def evaluate_models(inputs: EvaluationInputs, reporter: Reporter) -> dict[str, Any]:
    """The run's ``summary.json`` but for times and lineage: a table of models x figures, samples side by side, the
    guardrail and alarms."""
    reporter.start("eval", len(inputs.models))

    def load(name: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        return load_policy(inputs.models[name], device=inputs.device, products=inputs.precision)

    baseline, reads = load(inputs.baseline)
    frozen(baseline)
    evaluations: list[ModelEvaluation] = []
    extra: dict[str, dict[str, Any]] = {}
    for name in inputs.models:
        loaded = (baseline, reads) if name == inputs.baseline else load(name)
        evaluation, figures = _one_model(name, loaded, (baseline, reads), inputs)
        evaluations.append(evaluation)
        extra[name] = figures
        score = evaluation.figures.score
        reporter.advance(1, **({"judge score": score.mean} if score else {}))
    table = compare(evaluations, inputs.baseline, inputs.bootstrap, inputs.seed)
    summary: dict[str, Any] = {
        "stages": {name: figures | extra[name] for name, figures in table.items()},
        "order": list(inputs.models),
        "baseline": inputs.baseline,
        "samples": side_by_side(evaluations, inputs.show),
        "alarms": [
            alarm.as_dict()
            for alarm in (
                *(a for name, rows in _watched(inputs, evaluations).items() for a in find_alarms(name, rows)),
                *(a for name, run in inputs.online_runs.items() for a in process_alarms(name, run.rows)),
                *_replies_alarms(inputs, evaluations),
            )
        ],
    }
    if inputs.gold is not None:
        summary["judged"] = _judged_pairs(inputs, evaluations, inputs.gold)
    pair = _guardrail_pair(inputs)
    if pair is not None:
        kept, free = pair
        summary["guardrail"] = guardrail(kept, inputs.online_runs[kept].rows, free, inputs.online_runs[free].rows)
    return summary


def _judged_pairs(inputs: EvaluationInputs, evaluations: Sequence[ModelEvaluation], gold: Judge) -> list[JudgedPair]:
    """Each model's reply beside the baseline's, the models taking turns, as the judge and ``gold`` see the two."""
    baseline = next(one for one in evaluations if one.name == inputs.baseline)
    others = [one for one in evaluations if one is not baseline]
    rows = [
        (one.replies[number][0], replied[0])
        for number, replied in enumerate(baseline.replies)
        for one in others
        if one.replies[number][0].completion.text != replied[0].completion.text
    ]
    rows = [(a, b) for a, b in rows if a.grade is not None and b.grade is not None][: inputs.card_pairs]
    prompts = [a.prompt for a, _ in rows]
    left, right = (gold.grade(prompts, [row[side].completion for row in rows]) for side in (0, 1))
    found = []
    for (a, b), one, other in zip(rows, left, right, strict=True):
        assert a.grade is not None
        assert b.grade is not None
        lengths = len(a.completion.text), len(b.completion.text)
        pair = scored_pair(a.prompt.id, (a.grade.score, b.grade.score), lengths)
        found.append(pair if one is None or other is None else pair.led(one.score - other.score))
    return found


def _replies_alarms(inputs: EvaluationInputs, evaluations: Sequence[ModelEvaluation]) -> Iterator[Alarm]:
    baseline = next(one for one in evaluations if one.name == inputs.baseline)
    for evaluation in evaluations:
        if evaluation is not baseline and evaluation.name != "base":  # the model that it all began with is no result
            yield from reply_alarms(evaluation, baseline, inputs.seed)


def _watched(inputs: EvaluationInputs, evaluations: Sequence[ModelEvaluation]) -> dict[str, Sequence[dict[str, Any]]]:
    """What alarms read of each stage among the models: its metrics, or what it and this evaluation measured at its end.
    A stage whose start is not evaluated is held against the baseline."""
    by_name = {evaluation.name: evaluation for evaluation in evaluations}
    rows: dict[str, Sequence[dict[str, Any]]] = {name: run.rows for name, run in inputs.online_runs.items()}
    for name, run in inputs.offline_runs.items():
        start = by_name.get(run.start, by_name[inputs.baseline])
        rows[name] = [displacement_row(run.measured, by_name[name], start)]
    return rows


def _guardrail_pair(inputs: EvaluationInputs) -> tuple[str, str] | None:
    """The first run with a KL penalty and the first of the same kind without, where both measured the KL."""
    runs = {name: run for name, run in inputs.online_runs.items() if curve(run.rows)}
    for a, b in combinations(runs, 2):
        kept, free = (a, b) if runs[a].kl_weight > 0 else (b, a)
        if runs[a].kind == runs[b].kind and runs[kept].kl_weight > 0 and runs[free].kl_weight == 0:
            return kept, free
    return None


def _one_model(
    name: str,
    loaded: tuple[nn.Module, PreTrainedTokenizerBase],
    baseline: tuple[nn.Module, PreTrainedTokenizerBase],
    inputs: EvaluationInputs,
) -> tuple[ModelEvaluation, dict[str, Any]]:
    model, tokenizer = loaded
    frozen(model)
    chat = Chat(tokenizer)
    stops = stop_token_ids(chat, inputs.sampling)
    sampler = make_sampler(model, inputs.sampling.backend, stops, inputs.precision)
    prompt_ids = chat.encode_prompts([p.messages for p in inputs.prompts], [place_of(p) for p in inputs.prompts])
    replies = [with_decoded_text(chat, reply) for reply in sampler.generate(prompt_ids, inputs.sampling, inputs.seed)]
    evaluation = evaluate_model(name, inputs.prompts, [(reply,) for reply in replies], inputs.judge, inputs.scorer)
    figures: dict[str, Any] = {f"kl_to_{inputs.baseline}": None, "base_text_loss": None, "fact_accuracy": None}
    figures |= {f"reward/{part}": mean for part, mean in evaluation.reward_parts.items()}
    if asked_alike(loaded, baseline):
        at_one = inputs.sampling.at_one()
        drawn = replies if at_one == inputs.sampling else sampler.generate(prompt_ids, at_one, inputs.seed)
        kl = _kl(model, baseline[0], prompt_ids, drawn, inputs)
        figures[f"kl_to_{inputs.baseline}"] = kl.k1.mean
        figures[f"kl_to_{inputs.baseline}_se"] = kl.k1.se
        figures[f"kl_to_{inputs.baseline}_k3"] = kl.k3.mean
    with autocast(inputs.device, inputs.precision):
        if inputs.texts:
            loss = text_loss(model, [chat.encode_text(text) for text in inputs.texts], TOKENS, context_length(model))
            figures |= {"base_text_loss": loss.mean, "base_text_loss_se": loss.se}
        if inputs.facts:
            facts = choice_accuracy(model, tokenizer, inputs.facts, TOKENS)
            figures |= {"fact_accuracy": facts.mean, "fact_accuracy_se": facts.se}
    return evaluation, figures


def _kl(
    model: nn.Module,
    baseline: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    replies: Sequence[Completion],
    inputs: EvaluationInputs,
) -> Any:
    """KL(model || baseline) from the model's own samples at temperature 1."""
    rows = [Encoded.of(ids, reply.ids) for ids, reply in zip(prompt_ids, replies, strict=True)]
    batches = batches_by_tokens([len(row.ids) for row in rows], TOKENS)
    with autocast(inputs.device, inputs.precision):
        measured = completion_logprobs([model, baseline], rows, batches, inputs.device)
    policy, reference = zip(*measured, strict=True)
    lengths = [len(logp) for logp in policy]
    return kl_from_reference(torch.cat(policy), torch.cat(reference), torch.tensor([0, *lengths]).cumsum(0))
