"""Process reward models: what says of each step of a reply how probable it is that it is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keel.data.collate import micro_batches_by_prompt, pack_by_prompt
from keel.data.steps import EncodedSteps, encode_steps
from keel.model.checkpoint import frozen
from keel.model.heads import ScalarModel
from keel.model.modules import context_length
from keel.precision import autocast
from keel.recipe.steps import Aggregate, Steps
from keel.reward.scorer import SCORE_TOKENS
from keel.types import PackedBatch, Prompt, Reporter, StepLabels, UserError, place_of


@dataclass(frozen=True, slots=True)
class ScoredSteps:
    """A labelled reply, and what a model that has not seen its prompt says of each step."""

    record: StepLabels
    scores: tuple[float, ...]


def aggregated(scores: Sequence[float], how: Aggregate) -> float:
    """What the scores of a reply's steps come to; 0 for a reply that says nothing, which has none."""
    if not scores:
        return 0.0
    if how == "min":
        return min(scores)
    if how == "product":
        return math.prod(scores)
    return scores[-1] if how == "last" else math.fsum(scores) / len(scores)


def outcome(record: StepLabels, bound: float) -> float | None:
    """The label of a whole reply's answer: its last step's, which gives it; 0 where that was not judged because a step
    before is wrong (its label is not above ``bound``). None for a reply that is not whole, or where that is open."""
    if not record.finished:
        return None
    wrong = any(label is not None and label <= bound for label in record.labels)
    return record.labels[-1] if record.labels[-1] is not None else 0.0 if wrong else None


def until_error(labels: Sequence[float | None], bound: float) -> tuple[float | None, ...]:
    """The labels up to the first wrong step (not above ``bound``); what follows is as if unjudged."""
    wrong = next((i for i, label in enumerate(labels) if label is not None and label <= bound), len(labels))
    return tuple(label if i <= wrong else None for i, label in enumerate(labels))


def packed_steps(rows: Sequence[EncodedSteps], device: str | torch.device) -> tuple[PackedBatch, Tensor]:
    """(replies behind one copy of their prompt, the place in T of every step's end [W]), in the order of the rows."""
    batch = pack_by_prompt([one.row for one in rows], device)
    ends_B = batch.cu_seqlens[1:].tolist()
    # Counted from a sequence's own end: its beginning may lie with an earlier one.
    places = [last - len(one.row.ids) + end for one, last in zip(rows, ends_B, strict=True) for end in one.ends]
    return batch, torch.tensor(places, device=device)


def step_scores(
    model: ScalarModel,
    rows: Sequence[EncodedSteps],
    batch_tokens: int,
    precision: str,
    reporter: Reporter | None = None,
) -> list[tuple[float, ...]]:
    """The sigmoid of the head at each step's end, one forward pass a reply; replies in order."""
    found: list[tuple[float, ...]] = [()] * len(rows)
    with torch.no_grad(), autocast(model.device.type, precision):
        for group in micro_batches_by_prompt([one.row for one in rows], batch_tokens):
            batch, places_W = packed_steps([rows[i] for i in group], model.device)
            scores = iter(model.raw_at(batch, places_W).float().sigmoid().tolist())
            for i in group:
                found[i] = tuple(next(scores) for _ in rows[i].ends)
            if reporter is not None:
                reporter.advance(len(group))
    return found


class ProcessScorer:
    """A process reward model as a scorer of steps (`keel.types.StepScorer`).

    It reads texts, encoded with its own tokenizer and template: the policy may have others. A step's score depends on
    what stands up to its end: not on what follows, on batch mates, or on order. So of a reply that is not finished the
    steps have the scores that they keep.

    ``steps``, ``aggregate``, ``level``: as its checkpoint says; how it cuts replies, and what a reply's scores come to.
    ``read``, ``in_pieces``: how many replies it was handed, and in how many of them a step had no end among the tokens
    (`keel.data.steps.encode_steps`); ``note`` is told once, of the first.
    """

    def __init__(
        self,
        model: ScalarModel,
        batch_tokens: int = SCORE_TOKENS,
        precision: str = "fp32",
        reporter: Reporter | None = None,
        max_length: int | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        if model.process is None:
            raise UserError(
                f"{model.tokenizer.name_or_path}: this is no process reward model, for its config has no keel_process; "
                "name a process_reward stage or its folder"
            )
        self.model, self.batch_tokens, self.precision, self.reporter = model, batch_tokens, precision, reporter
        self.max_length = context_length(model.model) if max_length is None else max_length
        self.note, self.read, self.in_pieces = note, 0, 0
        self.steps = Steps.model_validate(model.process["steps"])
        self.aggregate: Aggregate = model.process["aggregate"]
        self.level: str = model.process["level"]

    def score_steps(self, prompts: Sequence[Prompt], replies: Sequence[tuple[str, ...]]) -> Sequence[tuple[float, ...]]:
        """Raises UserError for a reply that is too long, or that has no finite score. What says nothing is worth 0, and
        so is what the tokenizer has no token for."""
        asked = [i for i, steps in enumerate(replies) if "".join(steps).strip()]
        encoded = self._encode([prompts[i] for i in asked], [replies[i] for i in asked])
        asked = [i for i, row in zip(asked, encoded, strict=True) if row.ends]
        rows = [row for row in encoded if row.ends]
        found = [(0.0,) * len(steps) for steps in replies]
        if self.reporter is not None:
            self.reporter.start("scoring", len(rows))
        scored = step_scores(self.model, rows, self.batch_tokens, self.precision, self.reporter)
        for i, scores in zip(asked, scored, strict=True):
            if not all(map(math.isfinite, scores)):
                raise UserError(f"the scores of the steps for prompt {prompts[i].id!r} are not finite; train it again")
            found[i] = scores
        return found

    def _encode(self, prompts: Sequence[Prompt], replies: Sequence[tuple[str, ...]]) -> list[EncodedSteps]:
        if self.model.chat.plain and (several := [prompt for prompt in prompts if len(prompt.messages) > 1]):
            raise UserError(
                f"prompt {several[0].id!r} has several messages, and the process reward model, which has no chat "
                "template, would see the last one alone; train it from an SFT stage, which gives it a template"
            )
        asked = [(prompt.messages, steps) for prompt, steps in zip(prompts, replies, strict=True)]
        rows = encode_steps(self.model.chat, asked, [place_of(prompt) for prompt in prompts])
        for prompt, one in zip(prompts, rows, strict=True):
            if self.max_length is not None and len(one.row.ids) > self.max_length:
                raise UserError(
                    f"prompt {prompt.id!r} and its reply have {len(one.row.ids)} tokens for the process reward model, "
                    f"which takes {self.max_length}; lower max_new_tokens or data.max_prompt_length"
                )
        self._count(rows)
        return rows

    def _count(self, rows: Sequence[EncodedSteps]) -> None:
        told = self.in_pieces > 0
        self.read += len(rows)
        self.in_pieces += sum(row.in_pieces for row in rows)
        if self.note is not None and self.in_pieces and not told:
            self.note(
                f"{self.in_pieces} of the first {self.read} replies have a step that ends in a token of the process "
                "reward model, or signs that its tokenizer does not give back; they are read in pieces, each step to "
                "its own end"
            )


def frozen_process(model: ScalarModel, precision: str, note: Callable[[str], None] | None = None) -> ProcessScorer:
    """A process reward model that is done with training as a scorer."""
    frozen(model.model)
    return ProcessScorer(model, precision=precision, note=note)


class PythonSteps:
    """A Python function ``(prompt, steps) -> numbers in [0, 1]``, one a step, as a scorer of steps."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function, self.name = function, name

    def score_steps(self, prompts: Sequence[Prompt], replies: Sequence[tuple[str, ...]]) -> Sequence[tuple[float, ...]]:
        """Raises UserError, naming the prompt, when the function fails or its answer is not one number a step."""
        return [self._of(prompt, steps) for prompt, steps in zip(prompts, replies, strict=True)]

    def _of(self, prompt: Prompt, steps: tuple[str, ...]) -> tuple[float, ...]:
        try:
            found = tuple(float(score) for score in self.function(prompt, list(steps)))
        except UserError:
            raise
        except Exception as error:  # whatever it raises
            raise UserError(f"{self.name} failed on prompt {prompt.id!r}: {type(error).__name__}: {error}") from error
        if len(found) != len(steps) or not all(0 <= score <= 1 for score in found):
            raise UserError(
                f"{self.name} gave {len(found)} scores for {len(steps)} steps of a reply to prompt {prompt.id!r} "
                f"({', '.join(f'{score:g}' for score in found[:5])}); return one number from 0 to 1 a step"
            )
        return found
