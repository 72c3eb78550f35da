"""What every sampler shares: the choice of the next token, the random numbers, the checks of the input.

Shape suffixes besides those of ``keel.types``: ``S`` slots, the sequences that are decoded together; ``W`` the columns
of the cache that a step reads.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from keel.recipe.sections import SamplingConfig
from keel.types import Completion, UserError

# Nats a token between a sampler's log-probabilities and the model's own: above it, ratios mean nothing.
MISMATCH_BOUND = 0.5

_GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's step from one number of a stream to the next


def choose(logits_SV: Tensor, uniforms_S: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Draws one token a row: -> (ids [S] int64, log-probabilities [S] float32).

    ``uniforms_S`` in (0, 1] pick the token by the inverse of the cumulative distribution: one random number a token,
    where the Gumbel trick needs V. The log-probabilities (nats) are those of the distribution at the sampling
    temperature (at 1 for greedy) before any filter.
    """
    probs_SV = torch.softmax(logits_SV.float() / (sampling.temperature or 1.0), -1)
    if sampling.temperature == 0:
        ids_S1 = probs_SV.argmax(-1, keepdim=True)
    else:
        weights_SV = filtered_weights(probs_SV, sampling)
        cumulative_SV = weights_SV.cumsum(-1)
        # The first token whose cumulative weight reaches u * total. As u > 0 its own weight is positive; as the total
        # is the last of the sums themselves, u = 1 stays in range whatever the rounding.
        ids_S1 = torch.searchsorted(cumulative_SV, uniforms_S[:, None] * cumulative_SV[:, -1:])
        ids_S1.clamp_(max=probs_SV.shape[1] - 1)  # where the sums are no numbers; the log-probability then says so
        if weights_SV.is_cuda:  # whose sums, made in parts, may rise where nothing is added
            ids_S1 = nearest_positive(weights_SV, ids_S1)
    return ids_S1.squeeze(1), probs_SV.gather(1, ids_S1).log_().squeeze(1)


def nearest_positive(weights_SV: Tensor, ids_S1: Tensor) -> Tensor:
    """The tokens themselves where they have positive weight, else those nearest to them that have."""
    tokens_V = torch.arange(weights_SV.shape[1], dtype=torch.int32, device=weights_SV.device)
    distance_SV = (tokens_V - ids_S1.int()).abs_()
    return distance_SV.masked_fill_(~(weights_SV > 0), weights_SV.shape[1]).argmin(-1, keepdim=True)


def filtered_weights(
    probs_SV: Tensor,
    sampling: SamplingConfig,
    kth_edge: Callable[[Tensor, int], Tensor] | None = None,
    nucleus_edge: Callable[[Tensor, float], Tensor] | None = None,
) -> Tensor:
    """The distribution that tokens are drawn from, not normalised: [S, V] float32, 0 where a filter removes a token.
    ``probs_SV`` are at the sampling temperature.

    Order of the filters, as in transformers and vLLM: temperature, top-k, top-p (of what top-k left), min-p (relative
    to the likeliest token). Tokens exactly as likely as the last that a filter keeps are kept with it. A device with
    better ways to find the weights [S, 1] of these last tokens hands them in.
    """
    weights = probs_SV
    if 0 < sampling.top_k < weights.shape[1]:
        weights = _at_least(weights, (kth_edge or _kth_edge)(weights, sampling.top_k))
    if sampling.top_p < 1:
        weights = _at_least(weights, (nucleus_edge or _nucleus_edge)(weights, sampling.top_p))
    if sampling.min_p > 0:
        weights = _at_least(weights, sampling.min_p * weights.amax(-1, keepdim=True))
    return weights


def _at_least(weights_SV: Tensor, edge_S1: Tensor) -> Tensor:
    return weights_SV.masked_fill(weights_SV < edge_S1, 0.0)


def _kth_edge(weights_SV: Tensor, k: int) -> Tensor:
    """Weight [S, 1] of the k-th likeliest token."""
    return weights_SV.topk(k).values[:, -1:]


def _nucleus_edge(weights_SV: Tensor, top_p: float) -> Tensor:
    """Weight [S, 1] of the least likely token in the smallest set of likeliest tokens that holds ``top_p`` of the mass
    (Holtzman et al. 2020, section 3.1)."""
    vocabulary = weights_SV.shape[1]
    need_S1 = top_p * weights_SV.sum(-1, keepdim=True)
    # Sorting the vocabulary costs more than the rest of a small model's step; the nucleus is nearly always short. But
    # to look whether it is would make a GPU's steps wait for the host.
    for width in (vocabulary,) if weights_SV.is_cuda else (min(128, vocabulary), vocabulary):
        likeliest = weights_SV.topk(width).values
        cumulative = likeliest.cumsum(-1)
        if width == vocabulary or bool((cumulative[:, -1:] >= need_S1).all()):
            break
    inside = (cumulative < need_S1).sum(-1, keepdim=True).clamp(max=width - 1)
    return likeliest.gather(1, inside)


def finite(completions: Sequence[Completion]) -> list[Completion]:
    """The completions; UserError where a log-probability is not a number, as those are of logits that are none."""
    for index, completion in enumerate(completions):
        if not math.isfinite(sum(completion.logprobs)):
            token = next(n for n, logprob in enumerate(completion.logprobs) if not math.isfinite(logprob))
            raise not_finite(f"prompt {index}", token)
    return list(completions)


def not_finite(prompt: str, token: int = 0) -> UserError:
    return UserError(
        f"the model's logits are not finite at token {token} of the reply to {prompt}: its parameters have diverged, "
        "or overflow; start from another checkpoint, lower optim.lr, or use precision: fp32"
    )


def stream_key(seed: int, index: int) -> int:
    """Where the stream of random numbers of a sequence starts: 64 bits, as a signed integer."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def streams_of(seed: int, count: int, streams: Sequence[int] | None) -> list[int]:
    """Where each prompt's stream starts: as given, else by ``seed`` and its place."""
    if streams is None:
        return [stream_key(seed, i) for i in range(count)]
    assert len(streams) == count, "a stream for each prompt"
    return list(streams)


def further(key: int, numbers: int) -> int:
    """Where the stream that starts at ``key`` goes on after ``numbers`` of its numbers."""
    return _signed((key + numbers * _GOLDEN) % (1 << 64))


def uniforms(keys: Sequence[int], length: int) -> Tensor:
    """[N, length] float32 in (0, 1]: the first numbers of each stream, a pure function of its key.

    The generator is SplitMix64 (Steele, Lea and Flood 2014): a hash of a counter, so that there is no state to carry.
    """
    counter = torch.arange(1, length + 1, dtype=torch.int64) * _signed(_GOLDEN)
    bits = mix64(torch.tensor(keys, dtype=torch.int64)[:, None] + counter)
    return (_shift_right(bits, 40) + 1).to(torch.float32) * 2.0**-24


def mix64(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 taken as 64 bits; products and sums wrap."""
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # torch's >> repeats the sign bit


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def completion_limits(prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int | None) -> list[int]:
    """How many tokens each completion may have. Raises UserError for a prompt that leaves none."""
    limits = []
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} has no tokens; give it text, or a tokenizer with a BOS token")
        left = max_new_tokens if context is None else min(max_new_tokens, context - len(prompt))
        if left < 1:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens, which leaves no room for a reply in the model's context of "
                f"{context}; shorten it, or lower data.max_prompt_length and set data.over_length: skip"
            )
        limits.append(left)
    return limits
