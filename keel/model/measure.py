"""What models say of completions that were sampled: the one place where it is measured. Without gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from keel.data.collate import pack
from keel.model.logprobs import masked_offsets, token_logprobs
from keel.types import Encoded, PackedBatch

Pass = Callable[[PackedBatch], Tensor]
"""A model's pass over a packed batch -> figures of its masked tokens: [C], or [K, C] for K of them."""

Packing = Callable[[Sequence[Encoded], torch.device | str], PackedBatch]


@torch.no_grad()
def measure(
    rows: Sequence[Encoded],
    batches: Sequence[Sequence[int]],
    passes: Sequence[Pass],
    device: torch.device | str,
    packing: Packing = pack,
) -> list[list[Tensor]]:
    """What each pass says of each row's masked tokens: float32 on the CPU, in the order of ``rows``.

    ``batches``: every row's index, once. All passes see the same packed batches, so that models of equal weights give
    equal numbers. The precision is the caller's (``keel.precision.autocast``).
    """
    found: list[list[Tensor]] = [[] for _ in rows]
    for indices in batches:
        batch = packing([rows[i] for i in indices], device)
        lengths = masked_offsets(batch).diff().tolist()
        for one in passes:
            for i, part in zip(indices, one(batch).float().cpu().split(lengths, -1), strict=True):
                found[i].append(part)
    return found


def completion_logprobs(
    models: Sequence[nn.Module],
    rows: Sequence[Encoded],
    batches: Sequence[Sequence[int]],
    device: torch.device | str,
    temperature: float = 1.0,
) -> list[list[Tensor]]:
    """:func:`measure` of each model's log-probabilities (nats) at the sampling temperature."""

    def logprobs(model: nn.Module) -> Pass:
        return lambda batch: token_logprobs(model, batch, temperature).logp_C

    return measure(rows, batches, [logprobs(model) for model in models], device)
