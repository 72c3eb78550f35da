"""A decoding step on a CPU, compiled by numba: but for the matrix products (``keel.kernels.matmul``) each part is one
pass over memory.

A function is compiled when it is first called (some tenths of a second each), and the result kept on the disk. All of
them work row by row, so what a row says does not depend on the others, and release the interpreter lock. bfloat16
numbers come as the uint16 of their bits; arithmetic is float32.

The plain twin of the whole is ``keel.rollout.llama.Decoder``,
and tests/test_kernels.py compares each part with plain torch.

Shape suffixes besides those of ``keel.types``: ``S`` slots; ``D`` width of a head; ``F`` of the feed-forward part;
``O`` outputs of a product. A cache is [slots, kv_heads, capacity, D].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray

from keel.kernels.cache import kernel
from keel.kernels.intrinsics import (
    LANES,
    all_lanes,
    exp,
    get,
    load_vector,
    multiply_add,
    prefetch,
    product,
    put,
    store_vector,
    sum_of,
)
from keel.kernels.matmul import BLOCK as OUTPUTS
from keel.kernels.matmul import as_pointer, multiply_blocks
from keel.kernels.next_token import Sampling, choose
from keel.kernels.openmp import in_threads, load, store

CACHE_LINE = 64  # bytes


# ------------------------------------------------------------------------------------------------- layers


@kernel
def pointer(row: Any) -> Any:
    """The address of an array's numbers. Loops over heads count from it: a slice of an array costs as much as such a
    loop, because numba counts who refers to the array."""
    return as_pointer(row.ctypes.data, row)


@kernel
def normalise(x_TH: Any, out_TH: Any, eps: float) -> None:
    """out = x / sqrt(mean(x^2) + eps)."""
    H = x_TH.shape[1]
    for t in range(x_TH.shape[0]):
        x, out = x_TH[t], out_TH[t]
        squares = np.float32(0.0)
        for i in range(H):
            squares += x[i] * x[i]
        scale = np.float32(1.0 / np.sqrt(squares / H + eps))
        for i in range(H):
            put(out, i, x[i] * scale)


@kernel
def _norm_head(head: Any, weight: Any, eps: float) -> None:
    D = head.shape[0]
    squares = np.float32(0.0)
    for d in range(D):
        squares += head[d] * head[d]
    scale = np.float32(1.0 / np.sqrt(squares / D + eps))
    for d in range(D):
        head[d] = head[d] * scale * weight[d]


@kernel
def _turn(x: Any, cos: Any, sin: Any, at: int, D: int, out: Any, to: int) -> None:
    """The head of width D at ``x`` into ``out`` from ``to`` on; ``at``: where the cosines of its position begin."""
    half = D // 2
    whole = half // LANES * LANES
    for d in range(0, whole, LANES):
        left, right = load_vector(x, d), load_vector(x, half + d)
        minus = product(load_vector(sin, at + d), all_lanes(np.float32(-1.0)))
        store_vector(out, to + d, multiply_add(right, minus, product(left, load_vector(cos, at + d))))
        other = product(right, load_vector(cos, at + half + d))
        store_vector(out, to + half + d, multiply_add(left, load_vector(sin, at + half + d), other))
    for d in range(whole, half):
        left, right = load(x, d), load(x, half + d)
        store(out, to + d, left * load(cos, at + d) - right * load(sin, at + d))
        store(out, to + half + d, right * load(cos, at + half + d) + left * load(sin, at + half + d))


@kernel
def rotate_and_store(
    qkv_TO: Any, cos: Any, sin: Any, q_norm: Any, k_norm: Any, eps: float,
    keys: Any, values: Any, slots_T: Any, positions_T: Any,
) -> None:  # fmt: skip
    """Rotary positions, after the norms of heads where there are such: queries stay in their place, keys and values go
    into the cache at (slot, position)."""
    kv_heads, capacity, D = keys.shape[1:]
    outputs = qkv_TO.shape[1]
    heads = outputs // D - 2 * kv_heads
    head = np.empty(D, np.float32)
    x, k, v, h, c, s = pointer(qkv_TO), pointer(keys), pointer(values), pointer(head), pointer(cos), pointer(sin)
    for t in range(slots_T.shape[0]):
        at = positions_T[t] * D
        for i in range(heads + kv_heads):
            of = t * outputs + i * D
            for d in range(D):
                head[d] = load(x, of + d)
            if q_norm.shape[0] > 0:
                _norm_head(head, q_norm if i < heads else k_norm, eps)
            if i < heads:
                _turn(h, c, s, at, D, x, of)
            else:
                _turn(h, c, s, at, D, k, (slots_T[t] * kv_heads + i - heads) * capacity * D + at)
        for i in range(kv_heads):
            of, to = t * outputs + (heads + kv_heads + i) * D, (slots_T[t] * kv_heads + i) * capacity * D + at
            for d in range(D):
                store(v, to + d, load(x, of + d))


@kernel
def attend(
    qkv_TO: Any, keys: Any, values: Any, slots_T: Any, positions_T: Any, scale: float, out_TO: Any
) -> None:  # fmt: skip
    """Attention of each token's queries over its slot's cache up to its own position. out: [T, heads * D].

    The cache comes from memory, a short stretch for each head: what is read next is asked for while this is computed,
    which takes a third off the time of a small model and more of a larger one.
    """
    kv_heads, capacity, D = keys.shape[1:]
    heads, T = out_TO.shape[1] // D, slots_T.shape[0]
    group, row_bytes, outputs = heads // kv_heads, D * keys.itemsize, qkv_TO.shape[1]
    scores, query = np.empty(capacity, np.float32), np.empty(D, np.float32)
    x, k, v, q, out = pointer(qkv_TO), pointer(keys), pointer(values), pointer(query), pointer(out_TO)
    for t in range(T):
        n = positions_T[t] + 1
        for h in range(heads):
            for d in range(D):
                query[d] = load(x, t * outputs + h * D + d) * np.float32(scale)
            of = (slots_T[t] * kv_heads + h // group) * capacity * D
            following = values.ctypes.data + of * values.itemsize
            for w in range(n):
                for line in range(0, row_bytes, CACHE_LINE):
                    prefetch(following + w * row_bytes + line)
                scores[w] = _dot(q, k, of + w * D, D)
            total = _exponentials(scores, n)
            then, head = (t, h + 1) if h + 1 < heads else (min(t + 1, T - 1), 0)
            following = keys.ctypes.data + (slots_T[then] * kv_heads + head // group) * capacity * row_bytes
            for w in range(n):
                for line in range(0, row_bytes, CACHE_LINE):
                    prefetch(following + w * row_bytes + line)
            _mix(scores, n, total, v, of, D, out, (t * heads + h) * D)


@kernel
def _dot(query: Any, keys: Any, of: int, D: int) -> Any:
    whole = D // LANES * LANES
    products = all_lanes(np.float32(0.0))
    for d in range(0, whole, LANES):
        products = multiply_add(load_vector(query, d), load_vector(keys, of + d), products)
    total = sum_of(products)
    for d in range(whole, D):
        total += load(query, d) * load(keys, of + d)
    return total


@kernel
def _mix(weights: Any, n: int, total: Any, values: Any, of: int, D: int, out: Any, to: int) -> None:
    """The sum of weight * value / total. Two sums side by side, so that one does not wait for the other."""
    whole = D // LANES * LANES
    share = np.float32(1.0) / total
    for d in range(0, whole, LANES):
        even = odd = all_lanes(np.float32(0.0))
        for w in range(0, n - 1, 2):
            even = multiply_add(all_lanes(weights[w]), load_vector(values, of + w * D + d), even)
            odd = multiply_add(all_lanes(weights[w + 1]), load_vector(values, of + (w + 1) * D + d), odd)
        if n % 2 == 1:
            even = multiply_add(all_lanes(weights[n - 1]), load_vector(values, of + (n - 1) * D + d), even)
        store_vector(out, to + d, multiply_add(even, all_lanes(share), product(odd, all_lanes(share))))
    for d in range(whole, D):
        mixed = np.float32(0.0)
        for w in range(n):
            mixed += weights[w] * load(values, of + w * D + d)
        store(out, to + d, mixed * share)


@kernel
def _exponentials(scores: Any, n: int) -> Any:
    """Turns the first n scores into e^(score - the greatest), and returns their sum."""
    most = np.float32(-np.inf)
    for w in range(n):
        most = max(most, scores[w])
    total = np.float32(0.0)
    for w in range(n):
        scores[w] = exp(scores[w] - most)
        total += scores[w]
    return total


@kernel
def swiglu(gate_up: Any, out_TF: Any) -> None:
    """silu(gate) * up of [T, 2 F]."""
    F = out_TF.shape[1]
    for t in range(out_TF.shape[0]):
        gate, up, out = gate_up[t, :F], gate_up[t, F:], out_TF[t]
        for i in range(F):
            g = get(gate[i])
            put(out, i, g / (np.float32(1.0) + exp(-g)) * get(up[i]))


# ------------------------------------------------------------------------------------------------- whole passes


class Network(NamedTuple):
    """A model as kernels read it."""

    embedding_VH: np.ndarray
    products: np.ndarray  # [layers + 1, 4, 4]: weight, bias, outputs, inputs of qkv, o, gate_up, down; last: the head's
    q_norms: np.ndarray  # [layers, D], or [layers, 0]
    k_norms: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    eps: float
    scale: float
    threads: int  # that share a product
    multiply: int  # the address of the loop that they run


class Buffers(NamedTuple):
    """Memory for a tile of tokens, all [TILE, ...]; where a product is read from it has the weights' precision, the
    others are float32."""

    normed: np.ndarray
    qkv: np.ndarray
    attended: np.ndarray
    gate_up: np.ndarray
    activated: np.ndarray
    logits: np.ndarray
    words: np.ndarray  # what threads are told of a product


class State(NamedTuple):
    """The arrays of ``keel.rollout.slots.Slots``, and where in the cache each slot's sequence lies."""

    token: np.ndarray
    position: np.ndarray
    sampled: np.ndarray
    limit: np.ndarray
    active: np.ndarray
    uniforms: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    places: np.ndarray


@kernel
def _product(net: Network, words: Any, product: Any, x_TI: Any, out_TO: Any, add: bool) -> None:
    """out (+)= W x + b; bfloat16 or float32 numbers, sums in float32."""
    rows, outputs, inputs = x_TI.shape[0], product[2], product[3]
    if product[1] != 0:
        bias = carray(as_pointer(product[1], out_TO), outputs)
        for t in range(rows):
            for o in range(outputs):
                out_TO[t, o] = bias[o] + (out_TO[t, o] if add else np.float32(0.0))
        add = True
    if net.threads > 1:
        words[0], words[1], words[2], words[6] = rows, outputs, inputs, add
        words[3], words[4], words[5] = x_TI.ctypes.data, product[0], out_TO.ctypes.data
        in_threads(net.multiply, words.ctypes.data, net.threads, 0)
        return
    blocks = (outputs + OUTPUTS - 1) // OUTPUTS
    multiply_blocks(0, blocks, rows, outputs, inputs, pointer(x_TI), as_pointer(product[0], x_TI), pointer(out_TO), add)


@kernel
def layers(
    net: Network, b: Buffers, cache: Any, x_TH: Any, tokens_T: Any, places_T: Any, positions_T: Any, to_the_end: bool
) -> None:
    """Writes the tokens' keys and values into ``cache`` [layers, 2, slots, kv_heads, capacity, D]; ``to_the_end``: and
    what the last layer leaves into ``x`` [T, H]. Layer by layer, in tiles: a layer's weights then stay at hand for all
    tokens, and what lies between its products for a tile."""
    T, H, L, tile = tokens_T.shape[0], x_TH.shape[1], cache.shape[0], b.normed.shape[0]
    for t in range(T):
        for i in range(H):
            x_TH[t, i] = get(net.embedding_VH[tokens_T[t], i])
    for i in range(L):
        keys, values = cache[i, 0], cache[i, 1]
        for begin in range(0, T, tile):
            end = min(begin + tile, T)
            rows = end - begin
            x, places, positions = x_TH[begin:end], places_T[begin:end], positions_T[begin:end]
            normed, qkv, attended = b.normed[:rows], b.qkv[:rows], b.attended[:rows]
            normalise(x, normed, net.eps)
            _product(net, b.words, net.products[i, 0], normed, qkv, False)
            rotate_and_store(
                qkv, net.cos, net.sin, net.q_norms[i], net.k_norms[i], net.eps, keys, values, places, positions
            )
            if i + 1 == L and not to_the_end:
                continue
            attend(qkv, keys, values, places, positions, net.scale, attended)
            _product(net, b.words, net.products[i, 1], attended, x, True)
            normalise(x, normed, net.eps)
            _product(net, b.words, net.products[i, 2], normed, b.gate_up[:rows], False)
            swiglu(b.gate_up[:rows], b.activated[:rows])
            _product(net, b.words, net.products[i, 3], b.activated[:rows], x, True)


@kernel
def decode(
    net: Network,
    b: Buffers,
    cache: Any,
    x_SH: Any,
    state: State,
    stops: Any,
    steps: int,
    sampling: Sampling,
    ended_S: Any,
) -> None:
    """Samples a token in every slot, up to ``steps`` times or until a sequence ends; marks in ``ended_S`` which."""
    S, tile = ended_S.shape[0], b.normed.shape[0]
    uniforms_S, logprobs_S = np.empty(S, np.float32), np.empty(S, np.float32)
    for _ in range(steps):
        layers(net, b, cache, x_SH, state.token, state.places, state.position, True)
        for s in range(S):
            uniforms_S[s] = state.uniforms[s, state.sampled[s]]
        for begin in range(0, S, tile):
            end = min(begin + tile, S)
            normed, logits = b.normed[: end - begin], b.logits[: end - begin]
            normalise(x_SH[begin:end], normed, net.eps)
            _product(net, b.words, net.products[-1, 0], normed, logits, False)
            choose(logits, uniforms_S[begin:end], sampling, state.token[begin:end], logprobs_S[begin:end])
        any_ended = False
        for s in range(S):
            if not state.active[s]:
                continue
            state.ids[s, state.sampled[s]] = state.token[s]
            state.logprobs[s, state.sampled[s]] = logprobs_S[s]
            state.position[s] += 1
            state.sampled[s] += 1
            ended_S[s] = state.sampled[s] >= state.limit[s]
            for stop in stops:
                ended_S[s] |= state.token[s] == stop
            any_ended |= ended_S[s]
        if any_ended:
            break
