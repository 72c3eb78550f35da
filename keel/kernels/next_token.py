"""The next token of each slot, compiled: ``keel.rollout.tokens.choose`` in a few passes over the logits.

Shape suffixes besides those of ``keel.types``: ``S`` slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from keel.kernels.cache import kernel
from keel.kernels.intrinsics import exp, from_bits

BLOCK = 64  # of the vocabulary: sums of so many weights are kept together when a token is drawn


class Sampling(NamedTuple):
    """As in ``keel.recipe.sections.SamplingConfig``."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


@kernel
def _edge(weights_V: Any, need: float, by_mass: bool) -> Any:
    """The largest number such that the weights not below it are ``need`` in all: in number, or by the sum of them.
    Found bit by bit, because positive floats are ordered as their bits are."""
    bits = np.uint32(0)
    for bit in range(30, -1, -1):
        more = np.uint32(bits | np.uint32(1 << bit))
        edge = from_bits(more)
        held = np.float32(0.0)
        if by_mass:
            for v in range(weights_V.shape[0]):
                held += weights_V[v] if weights_V[v] >= edge else np.float32(0.0)
        else:
            for v in range(weights_V.shape[0]):
                held += np.float32(1.0) if weights_V[v] >= edge else np.float32(0.0)
        if held >= need:
            bits = more
    return from_bits(bits)


@kernel
def _drop_below(weights_V: Any, edge: float) -> None:
    for v in range(weights_V.shape[0]):
        weights_V[v] = weights_V[v] if weights_V[v] >= np.float32(edge) else np.float32(0.0)


@kernel
def _draw(weights_V: Any, sums: Any, uniform: float) -> int:
    """The first token whose cumulative weight reaches ``uniform`` of the total, among those that weigh something."""
    V = weights_V.shape[0]
    total = np.float32(0.0)
    for b in range(sums.shape[0]):
        part = np.float32(0.0)
        for v in range(b * BLOCK, min((b + 1) * BLOCK, V)):
            part += weights_V[v]
        total += part
        sums[b] = total
    target = np.float32(uniform) * total
    block = 0
    while sums[block] < target and block + 1 < sums.shape[0]:
        block += 1
    reached = sums[block - 1] if block > 0 else np.float32(0.0)
    drawn = -1
    for v in range(block * BLOCK, min((block + 1) * BLOCK, V)):
        if weights_V[v] > 0:
            drawn = v  # the last one that weighs something, where rounding leaves the sum below the target
            reached += weights_V[v]
            if reached >= target:
                break
    return drawn


@kernel
def choose(logits_SV: Any, uniforms_S: Any, sampling: Sampling, ids_S: Any, logprobs_S: Any) -> None:
    """Into ``ids`` and ``logprobs``; the logits are overwritten."""
    V, temperature = logits_SV.shape[1], sampling.temperature
    sums = np.empty((V + BLOCK - 1) // BLOCK, np.float32)
    inverse = np.float32(1.0 / temperature if temperature > 0 else 1.0)
    for s in range(logits_SV.shape[0]):
        weights = logits_SV[s]
        most = np.float32(-np.inf)
        for v in range(V):
            most = max(most, weights[v])
        likeliest = 0
        if temperature == 0:
            while weights[likeliest] < most and likeliest + 1 < V:
                likeliest += 1
        total = np.float32(0.0)
        for v in range(V):
            weights[v] = exp((weights[v] - most) * inverse)
            total += weights[v]
        if not total >= np.float32(0.5):  # the likeliest alone weighs 1
            raise ValueError("the model's logits are not numbers: its parameters have diverged")
        drawn = likeliest
        if temperature > 0:
            if 0 < sampling.top_k < V:
                _drop_below(weights, _edge(weights, sampling.top_k, False))
            if sampling.top_p < 1:
                left = np.float32(0.0)
                for v in range(V):
                    left += weights[v]
                _drop_below(weights, _edge(weights, sampling.top_p * left, True))
            if sampling.min_p > 0:
                _drop_below(weights, sampling.min_p)  # the likeliest weighs 1
            drawn = _draw(weights, sums, uniforms_S[s])
        ids_S[s] = drawn
        logprobs_S[s] = np.log(weights[drawn] / total)
