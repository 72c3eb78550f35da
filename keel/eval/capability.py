"""What alignment cost: the loss on plain text and the accuracy on multiple-choice facts, before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from keel.data.collate import micro_batches, micro_batches_by_prompt, pack, pack_by_prompt, pieces
from keel.eval.grading import Estimate
from keel.model.logprobs import sequence_sums, token_logprobs
from keel.model.modules import evaluating
from keel.types import Encoded, UserError


class MultipleChoice(Protocol):
    """A question in the form of a text to be continued; ``answer`` is the index of the right choice."""

    @property
    def prompt(self) -> str: ...
    @property
    def choices(self) -> Sequence[str]: ...
    @property
    def answer(self) -> int: ...


def text_loss(
    model: nn.Module, texts: Sequence[Encoded], batch_tokens: int = 8192, longest: int | None = None
) -> Estimate:
    """Nats per predicted token over plain texts (every token of all texts weighs the same). A text beyond ``longest``,
    the model's positions, is measured in pieces.

    The standard error is that of a ratio of sums over texts (tokens of one text are not independent). ``count`` is the
    number of texts. Raises UserError when no text has a token to predict.
    """
    cut = [pieces(text, longest or max(1, len(text.ids))) for text in texts]
    kept = [parts for parts in cut if parts]
    if not kept:
        raise UserError("data.base_text has no text of two tokens or more; give longer rows or leave it out")
    sums = _summed_logprobs(model, [piece for parts in kept for piece in parts], batch_tokens)
    losses_N = torch.stack([-part.sum() for part in sums.split([len(parts) for parts in kept])])
    tokens_N = torch.tensor([sum(piece.predicted for piece in parts) for parts in kept], dtype=torch.float64)
    loss = float(losses_N.sum() / tokens_N.sum())
    n = len(kept)
    if n < 2:
        return Estimate(loss, None, n)
    spread = float((losses_N - loss * tokens_N).square().sum()) * n / (n - 1)
    return Estimate(loss, math.sqrt(spread) / float(tokens_N.sum()), n)


def choice_accuracy(
    model: nn.Module, tokenizer: Any, rows: Sequence[MultipleChoice], batch_tokens: int = 8192
) -> Estimate:
    """Share of rows whose right choice has the highest summed log-probability after the prompt.

    No chat template: the model continues a text, so that a base model and its assistants are asked the same thing.
    Prompt and choice are encoded together, as they would stand in a text. The score begins at the first token that is
    not common to all of a row's choices and its prompt. A tokenizer may merge the prompt's end with the choice's
    beginning, and what all share cancels out. No normalisation by length. Equal scores: the first choice.

    Raises UserError naming the row when it has fewer than two choices, an answer out of range, no text before the
    point where the choices part, or a choice that adds no token to the prompt.
    """
    encoded = encode_facts(tokenizer, rows)
    scores = _summed_logprobs(model, encoded, batch_tokens).split([len(row.choices) for row in rows])
    right = [float(int(score.argmax()) == row.answer) for score, row in zip(scores, rows, strict=True)]
    return Estimate.of(right)


def encode_facts(tokenizer: Any, rows: Sequence[MultipleChoice], longest: int | None = None) -> list[Encoded]:
    """Every choice of every row after its prompt. Raises UserError as :func:`choice_accuracy` does, and for a row
    beyond ``longest``, the model's positions."""
    if not rows:
        raise UserError("data.facts has no rows; give some or leave it out")
    encoded: list[Encoded] = []
    for number, row in enumerate(rows, start=1):
        choices = _encode_choices(tokenizer, row, number)
        most = max(len(choice.ids) for choice in choices)
        if longest is not None and most > longest:
            raise UserError(
                f"data.facts row {number}: it has {most} tokens with a choice and the model takes {longest}; shorten it"
            )
        encoded += choices
    return encoded


def _encode_choices(tokenizer: Any, row: MultipleChoice, number: int) -> list[Encoded]:
    if len(row.choices) < 2 or not 0 <= row.answer < len(row.choices):
        raise UserError(
            f"data.facts row {number}: needs two choices or more and an answer that is the index of one of them"
        )
    whole = [_encode(tokenizer, row.prompt + choice) for choice in row.choices]
    start = _common_prefix([_encode(tokenizer, row.prompt), *whole])
    if start == 0:
        raise UserError(f"data.facts row {number}: no text comes before the choices; give the row a prompt")
    for choice, ids in zip(row.choices, whole, strict=True):
        if len(ids) == start:
            raise UserError(
                f"data.facts row {number}: the choice {choice!r} adds no token to the prompt, so it would always win "
                "(its log-probability is 0); give it a text"
            )
    return [Encoded(tuple(ids), tuple(place >= start for place in range(len(ids)))) for ids in whole]


def _encode(tokenizer: Any, text: str) -> list[int]:
    """With the beginning-of-text token of models that have one, without an end token: the text goes on."""
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    for place, tokens in enumerate(zip(*sequences, strict=False)):
        if len(set(tokens)) > 1:
            return place
    return min(len(sequence) for sequence in sequences)


def _summed_logprobs(model: nn.Module, sequences: Sequence[Encoded], batch_tokens: int) -> Tensor:
    """Summed log-probability of each sequence's masked tokens, float64 [N] on the CPU. Packed by length; what stands
    before the first masked token is run once for all that share it."""
    sums_N = torch.zeros(len(sequences), dtype=torch.float64)
    device = next(model.parameters()).device
    shared = any(sequence.prompt_ids for sequence in sequences)
    lengths = [len(sequence.ids) for sequence in sequences]
    groups = micro_batches_by_prompt(sequences, batch_tokens) if shared else micro_batches(lengths, batch_tokens)
    with torch.no_grad(), evaluating(model):
        for indices in groups:
            batch = (pack_by_prompt if shared else pack)([sequences[i] for i in indices], device)
            logp_C = token_logprobs(model, batch).logp_C
            sums_N[indices] = sequence_sums(logp_C.double(), batch).cpu()
    return sums_N
