"""Scorers (``keel.types.Scorer``): what training takes its rewards from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import torch

from keel.data.collate import micro_batches_by_prompt, pack_by_prompt
from keel.model.checkpoint import frozen
from keel.model.heads import ScalarModel
from keel.model.modules import context_length
from keel.precision import autocast
from keel.recipe.steps import Thinking
from keel.reward.python_ref import Grader, grades_of
from keel.reward.trace import Trace
from keel.types import Completion, Encoded, Prompt, Reporter, Scorer, Scores, UserError, place_of

SCORE_TOKENS = 16_384  # tokens in one forward pass where nothing is kept for a backward pass


class PythonScorer:
    """A Python function ``(prompt, text) -> float`` as a scorer; of a Grade it takes the score."""

    def __init__(self, function: Grader) -> None:
        self.function = function

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        """Raises UserError, naming the prompt, when the function fails or its score is not finite."""
        grades = grades_of(self.function, prompts, completions)
        return Scores(torch.tensor([grade.score for grade in grades], dtype=torch.float32))


class RewardModelScorer:
    """A reward model as a scorer.

    It reads the reply's *text*, encoded with the reward model's own tokenizer and template: the policy may have others.
    Replies of similar length share a batch of ``batch_tokens`` tokens, without padding; replies to one prompt share one
    copy of the prompt. A score depends on neither batch mates nor order.

    ``max_length``: tokens of prompt and reply that are allowed; by default what the reward model has positions for.
    ``precision``: of the matrix products (``keel.precision``); the head is float32 always.
    ``thinking``: of a reply that thinks it is shown the answer alone (`keel.recipe.steps.Thinking.shown`).
    """

    def __init__(
        self,
        reward_model: ScalarModel,
        batch_tokens: int,
        reporter: Reporter | None = None,
        max_length: int | None = None,
        precision: str = "fp32",
        thinking: Thinking | None = None,
    ) -> None:
        if reward_model.foreign and reward_model.chat.plain:
            raise UserError(
                f"{reward_model.tokenizer.name_or_path}: this reward model was trained elsewhere, and its tokenizer "
                "has no chat template that would say what it reads; put the one that it was trained with there"
            )
        if reward_model.process is not None:
            raise UserError(
                f"{reward_model.tokenizer.name_or_path}: this is a process reward model, which scores steps and no "
                "replies; name it with kind: process, or name a reward model"
            )
        self.reward_model = reward_model
        self.batch_tokens = batch_tokens
        self.reporter = reporter
        self.max_length = context_length(reward_model.model) if max_length is None else max_length
        self.precision, self.thinking = precision, thinking

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        """Centred and scaled scores. Raises UserError for a reply that is too long, or a score that is not finite."""
        rows = self._encode(prompts, completions)
        scores_N = torch.zeros(len(rows))
        if self.reporter is not None:
            self.reporter.start("scoring", len(rows))
        device = self.reward_model.device
        with torch.no_grad(), autocast(device.type, self.precision):
            for group in micro_batches_by_prompt(rows, self.batch_tokens):
                batch = pack_by_prompt([rows[i] for i in group], device)
                scores_N[torch.tensor(group)] = self.reward_model.score_packed(batch).float().cpu()
                if self.reporter is not None:
                    self.reporter.advance(len(group))
        for prompt, score in zip(prompts, scores_N.isfinite().tolist(), strict=True):
            if not score:
                raise UserError(f"the reward model's score for prompt {prompt.id!r} is not finite; train it again")
        return Scores(scores_N)

    def _encode(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Encoded]:
        if self.reward_model.chat.plain and (several := [prompt for prompt in prompts if len(prompt.messages) > 1]):
            raise UserError(
                f"prompt {several[0].id!r} has several messages, and the reward model, which has no chat template, "
                "would see the last one alone; train it from an SFT stage, which gives it a template"
            )
        shown = [c.text if self.thinking is None else self.thinking.shown(c.text) for c in completions]
        rows = self.reward_model.encode_replies(
            [(prompt.messages, text, c.finished) for prompt, text, c in zip(prompts, shown, completions, strict=True)],
            [place_of(prompt) for prompt in prompts],
        )
        for prompt, row in zip(prompts, rows, strict=True):
            if self.max_length is not None and len(row.ids) > self.max_length:
                raise UserError(
                    f"prompt {prompt.id!r} and its reply have {len(row.ids)} tokens for the reward model, which takes "
                    f"{self.max_length}; lower max_new_tokens or data.max_prompt_length, or use a longer reward model"
                )
        return rows


def frozen_scorer(reward_model: ScalarModel, precision: str, thinking: Thinking | None = None) -> RewardModelScorer:
    """A reward model that is done with training as a scorer."""
    frozen(reward_model.model)
    return RewardModelScorer(reward_model, SCORE_TOKENS, precision=precision, thinking=thinking)


class RewardPart(NamedTuple):
    """One term of a mixed reward. ``outcome``: it says whether a reply's answer is right, which figures of the steps
    are held against; ``right_above``: above which of its scores one is."""

    scorer: Scorer
    weight: float
    name: str
    outcome: bool = False
    right_above: float = 0.5


class MixedScorer:
    """The weighted sum of several scorers (helpful, harmless, a rule, ...): of what each says of a reply, and of its
    steps where it knows any."""

    def __init__(self, parts: Sequence[RewardPart]) -> None:
        names = [part.name for part in parts]
        if not names or len(set(names)) < len(names):
            raise UserError(f"a mixed reward needs terms with names of their own, not {names}")
        self.parts = tuple(parts)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        """``Scores.parts`` are what each term's replies earn in all."""
        found = [part.scorer.score(prompts, completions) for part in self.parts]
        paid = [(part.weight, s) for part, s in zip(self.parts, found, strict=True) if s.steps and part.weight]
        weighted = [
            [tuple(replace(step, value=weight * step.value) for step in steps) for steps in scores.steps]
            for weight, scores in paid
        ]
        baselines = {scores.step_baseline for _, scores in paid}
        if len(baselines) > 1:
            raise UserError("a mixed reward values steps in two ways; leave one of the terms out")
        return Scores(
            torch.stack([part.weight * scores.reply_N for part, scores in zip(self.parts, found, strict=True)]).sum(0),
            tuple(tuple(chain.from_iterable(steps)) for steps in zip(*weighted, strict=True)),
            {part.name: scores.total_N for part, scores in zip(self.parts, found, strict=True)},
            baselines.pop() if baselines else "steps",
            self._traces(found),
        )

    def _traces(self, found: Sequence[Scores]) -> tuple[Trace, ...]:
        """What is known of the replies' steps, with the outcome by the first term that knows it."""
        traces = next((scores.traces for scores in found if scores.traces), ())
        known = [(part, scores) for part, scores in zip(self.parts, found, strict=True) if part.outcome]
        if not known:
            return traces
        part, scores = known[0]
        return tuple(
            replace(trace, outcome=said, right_above=part.right_above) if trace.outcome is None else trace
            for trace, said in zip(traces, scores.total_N.tolist(), strict=bool(traces))
        )
