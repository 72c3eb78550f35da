"""Replies behind prompts that are not theirs, of which KTO's estimate of the KL is made (`kl_anchor`)."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from keel.data.collate import micro_batches, pack
from keel.model.logprobs import sequence_sums, token_logprobs
from keel.objective.preference import Logps, log_ratio
from keel.precision import autocast
from keel.train.context import TrainContext
from keel.types import Encoded, PreferenceLoss

TRIES = 32


def mismatched(rows: Sequence[Encoded], longest: int, seed: int) -> list[Encoded | None]:
    """Each row's prompt with another prompt's reply, at most ``longest`` tokens together; None where none of some tries
    fits. Who is matched with whom follows from ``seed`` alone, once for a run: what a step estimates does not depend on
    how it is cut, and the reference's log-probabilities are computed once."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    found: list[Encoded | None] = [None] * len(rows)
    for place, i in enumerate(order):
        prompt = rows[i].prompt_ids
        for step in range(1, min(TRIES, len(order) - 1) + 1):
            other = rows[order[(place + step) % len(order)]]
            shared = len(other.prompt_ids)
            if other.prompt_ids != prompt and len(prompt) + len(other.ids) - shared <= longest:
                found[i] = behind(rows[i], other)
                break
    return found


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
    rows: Sequence[Encoded],
    references: Sequence[float],
    batch_tokens: int,
    context: TrainContext,
) -> Tensor:
    """The log-ratios [N] of mismatched rows, for ``kl_anchor``. ``references``: what :func:`reply_logps` had of them
    under the reference."""
    policy_N = reply_logps(model, rows, batch_tokens, context)
    tokens_N = torch.tensor([row.predicted for row in rows])
    return log_ratio(form, Logps(policy_N, tokens_N, torch.tensor(references, dtype=policy_N.dtype)))
