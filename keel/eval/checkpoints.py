"""Measures checkpoints for the frontier: replies of their own at temperature 1, graded, and their KL from the baseline
on the same replies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from keel.data.chat import Chat
from keel.data.collate import messages_hash
from keel.eval.frontier import Frontier, Measured, curves_of, read_checkpoints, summary, write_frontier
from keel.model.checkpoint import Place, frozen, load_policy
from keel.model.packed import compute_alike
from keel.precision import Precision
from keel.recipe.sections import SamplingConfig
from keel.rollout.collect import stop_token_ids, with_decoded_text
from keel.rollout.divergence import asked_alike, log_ratios, own_replies
from keel.rollout.sampler import make_sampler
from keel.run import hash_config
from keel.types import Completion, Judge, Prompt, Reporter, UserError, place_of

Loaded = tuple[nn.Module, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class FrontierInputs:
    """``methods``: by method and by run of it the names of its checkpoints, in the order of training, the baseline
    first; ``places``: where each lies, the baseline's (``against``) included. ``folder``: the evaluation's own."""

    methods: Mapping[str, Mapping[str, Sequence[str]]]
    places: Mapping[str, Place]
    against: str
    at: Sequence[float]
    prompts: Sequence[Prompt]
    judge: Judge
    sampling: SamplingConfig
    per_prompt: int
    seed: int
    bootstrap: int
    device: str
    precision: Precision
    folder: Path


def measure_frontier(inputs: FrontierInputs, reporter: Reporter) -> dict[str, Any]:
    """Measures what is not measured yet and returns the ``frontier`` entry of summary.json. All checkpoints get the
    same prompts and the same random numbers. UserError for a checkpoint that has no KL from the baseline."""
    done = read_checkpoints(inputs.folder)
    asked = [messages_hash(prompt.messages, prompt.kind) for prompt in inputs.prompts]
    prompts = hash_config([asked, inputs.per_prompt])
    reporter.start("frontier", len(inputs.places))
    baseline = _load(inputs.against, inputs)
    for name in inputs.places:
        if name not in done:
            done[name] = _measured(name, baseline, inputs)
            write_frontier(inputs.folder, prompts, inputs.against, inputs.at, inputs.methods, done)
        reporter.advance(1, kl=math.fsum(done[name].kl) / len(done[name].kl))
    frontier = Frontier(curves_of(inputs.methods, done), inputs.bootstrap, inputs.seed)
    return summary(frontier, inputs.against, inputs.at) | {"per_prompt": inputs.per_prompt}


def _load(name: str, inputs: FrontierInputs) -> Loaded:
    model, tokenizer = load_policy(inputs.places[name], device=inputs.device, products=inputs.precision)
    return frozen(model), tokenizer


def _measured(name: str, baseline: Loaded, inputs: FrontierInputs) -> Measured:
    policy = baseline if name == inputs.against else _load(name, inputs)
    model, tokenizer = policy
    if not asked_alike(policy, baseline):
        raise UserError(
            f"frontier: {name} has no KL from {inputs.against}, which is asked without a chat template or in other "
            "tokens; set frontier.against to a model that it could have started from, or leave it out"
        )
    compute_alike(baseline[0], model)
    chat = Chat(tokenizer)
    prompt_ids = chat.encode_prompts([p.messages for p in inputs.prompts], [place_of(p) for p in inputs.prompts])
    sampler = make_sampler(model, inputs.sampling.backend, stop_token_ids(chat, inputs.sampling), inputs.precision)
    drawn = own_replies(sampler, prompt_ids, inputs.sampling, inputs.per_prompt, inputs.seed)
    replies = [[with_decoded_text(chat, reply) for reply in group] for group in drawn]
    ratios = log_ratios(model, baseline[0], prompt_ids, replies, inputs.device, inputs.precision)
    everything = [reply for group in replies for reply in group]
    return Measured(
        gold=_graded(name, replies, inputs),
        kl=tuple(_mean(group) for group in ratios),
        length=tuple(_mean([float(len(reply.ids)) for reply in group]) for group in replies),
        finished=sum(reply.finished for reply in everything) / len(everything),
    )


def _graded(name: str, replies: Sequence[Sequence[Completion]], inputs: FrontierInputs) -> tuple[float | None, ...]:
    """Of each prompt the judge's mean score."""
    asked = [prompt for prompt, group in zip(inputs.prompts, replies, strict=True) for _ in group]
    grades = list(inputs.judge.grade(asked, [reply for group in replies for reply in group]))
    for prompt, grade in zip(asked, grades, strict=True):
        if grade is not None and not math.isfinite(grade.score):
            raise UserError(f"frontier: the judge's score of {name} on prompt {prompt.id!r} is {grade.score}")
    each = iter(grades)
    scores = [[grade.score for _ in group if (grade := next(each)) is not None] for group in replies]
    return tuple(_mean(group) if group else None for group in scores)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
