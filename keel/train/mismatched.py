"""Replies behind prompts that are not theirs, of which KTO's estimate of the KL is made (`kl_anchor`)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from keel.data.collate import micro_batches, pack
from keel.model.logprobs import sequence_sums, token_logprobs
from keel.objective.preference import Logps, log_ratio
from keel.precision import autocast
from keel.recipe.dpo import DpoStage
from keel.train.context import TrainContext
from keel.types import Encoded, PreferenceLoss, UserError

TRIES = 32  # other prompts' replies that are looked at for each row


@dataclass(frozen=True)
class Stranger:
    """``row``: a prompt with another prompt's reply; ``reference``: that reply's log-probability (nats) under it."""

    row: Encoded
    reference: float = 0.0


def mismatched(rows: Sequence[Encoded], longest: int, seed: int) -> list[Encoded | None]:
    """Each row's prompt with another prompt's reply, at most ``longest`` tokens together; None where none of some tries
    fits. Who is matched with whom follows from ``seed`` alone, once for a run: what a step estimates does not depend on
    how it is cut, and the reference's log-probabilities are computed once."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    prompts = [rows[i].prompt_ids for i in order]
    found: list[Encoded | None] = [None] * len(rows)
    if len(set(prompts)) < 2:
        return found
    ahead = _next_of_another(prompts)
    for place, i in enumerate(order):
        there = place
        for _ in range(TRIES):
            there = (there + 1) % len(order)
            if prompts[there] == prompts[place]:
                there = ahead[there]
            other = rows[order[there]]
            if len(prompts[place]) + len(other.ids) - len(prompts[there]) <= longest:
                found[i] = behind(rows[i], other)
                break
    return found


def _next_of_another(prompts: Sequence[tuple[int, ...]]) -> list[int]:
    """For each place the next one, round again at the end, that has another prompt. There are two at least."""
    count = len(prompts)
    ahead = [0] * count
    for place in reversed(range(2 * count)):
        here, after = place % count, (place + 1) % count
        ahead[here] = ahead[after] if prompts[here] == prompts[after] else after
    return ahead


def matched(rows: Sequence[Encoded], stage: DpoStage, context: TrainContext) -> list[Encoded | None]:
    """:func:`mismatched` for a stage's training rows. UserError where not one has a match."""
    longest = min(context.data.max_length, context.positions or context.data.max_length)
    found = mismatched(rows, longest, context.seed)
    if any(row is not None for row in found):
        return found
    why = f"{stage.name}: {stage.loss} estimates a KL from replies to other prompts, and"
    if len({row.prompt_ids for row in rows}) == 1:
        raise UserError(f"{why} all {len(rows)} replies are to one; add prompts, or use loss: apo_zero or bco")
    raise UserError(
        f"{why} no prompt has room for one within {longest} tokens; raise data.max_length, or use loss: apo_zero or bco"
    )


def of_step(own: Sequence[Stranger | None], everyone: Sequence[Stranger], iteration: int) -> list[Stranger]:
    """What the KL of a step is estimated from: the strangers of its own records, and where none of them has one, as
    many of the run's, others for each step."""
    there = [stranger for stranger in own if stranger is not None]
    count = min(len(own), len(everyone))
    return there or [everyone[(iteration * count + i) % len(everyone)] for i in range(count)]


def behind(prompt: Encoded, reply: Encoded) -> Encoded:
    """The prompt of one row with the reply of another."""
    asked, shared = prompt.prompt_ids, len(reply.prompt_ids)
    return Encoded((*asked, *reply.ids[shared:]), (False,) * len(asked) + reply.mask[shared:])


def reply_logps(model: nn.Module, rows: Sequence[Encoded], batch_tokens: int, context: TrainContext) -> Tensor:
    """Log-probabilities [N] (nats a sequence) of the rows' replies, without gradient, on the CPU."""
    out = torch.zeros(len(rows))
    with torch.no_grad(), autocast(context.device, context.precision):
        for part in micro_batches([len(row.ids) for row in rows], batch_tokens):
            batch = pack([rows[i] for i in part], context.device)
            out[torch.tensor(part)] = sequence_sums(token_logprobs(model, batch).logp_C, batch).float().cpu()
    return out


def mismatched_ratios(
    form: PreferenceLoss,
    model: nn.Module,
    strangers: Sequence[Stranger],
    batch_tokens: int,
    context: TrainContext,
) -> Tensor:
    """The log-ratios [N] of mismatched rows, for ``kl_anchor``."""
    rows, references = [one.row for one in strangers], [one.reference for one in strangers]
    policy_N = reply_logps(model, rows, batch_tokens, context)
    tokens_N = torch.tensor([row.predicted for row in rows])
    return log_ratio(form, Logps(policy_N, tokens_N, torch.tensor(references, dtype=policy_N.dtype)))
