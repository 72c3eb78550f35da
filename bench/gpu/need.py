"""How many operations a training step needs: what *model FLOPs utilisation* (MFU) divides by.

A matrix of w weights costs 2w operations a token forwards, and in training 6w: as much again for the gradient of its
inputs, and for its own. Below adapters the weights have no gradient, which leaves 4w; the adapters themselves cost 6w.
A tied embedding counts as the head alone: looking a row up multiplies nothing. Attention costs 4 x head_dim x heads a
layer for each (query, key) pair, three times that in training; with causal attention half of the square is needed, and
half is counted. What gradient checkpointing computes again is not counted. ``bench/cost.py`` counts the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.cost import TRAINED, causal, forward_flops
from bench.gpu.models import Architecture


def trained(
    shape: Architecture, lengths: Sequence[int], scored: float, rank: int | None = None, shared: float = 0
) -> float:
    """Operations of one training step over sequences of ``lengths`` tokens, of which the head scores ``scored``.
    ``rank``: of adapters on all linear layers; ``shared``: tokens at the beginning of each sequence that are computed
    for another one."""
    tokens = float(sum(lengths) - shared * len(lengths))
    seen = sum(causal(n) for n in lengths) - len(lengths) * causal(shared)
    attention = forward_flops(shape, 0, seen, 0)
    matrices = forward_flops(shape, tokens, 0, scored)
    if rank is None:
        return TRAINED * (matrices + attention)
    return 2 * matrices + TRAINED * attention + TRAINED * 2 * tokens * shape.adapters(rank)
