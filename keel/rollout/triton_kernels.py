"""The operations of ``keel.rollout.plain_kernels`` as Triton kernels: one launch where torch takes several. A decoding
step reads every weight once; at batches that a GPU reads in a millisecond, launches of a few microseconds each would
take as long again.

The attention reads a row of the cache up to its own length, not to the longest; where slots are few, several programs
share a row's keys, and a second kernel joins what they found (Dao et al. 2023, "Flash-Decoding").

The only file that imports Triton. Shapes as in ``plain_kernels``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from keel.recipe.sections import SamplingConfig
from keel.rollout.slots import Slots
from keel.rollout.step import Layer, Shape
from keel.rollout.tokens import filtered_weights

HEAD_DIMS = (64, 80, 96, 128, 256)
PROGRAMS = 1024  # that an attention is split into at least, if its keys are many enough
FEWEST_KEYS = 128  # of one program
LOGITS = 4096  # of one program


def padded(n: int) -> int:
    return int(triton.next_power_of_2(n))


# ------------------------------------------------------------------------------------------------------- layers


@triton.jit
def _add_norm(x_ptr, delta_ptr, weight_ptr, out_ptr, eps, width, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < width
    here = tl.program_id(0).to(tl.int64) * width + at
    x = tl.load(x_ptr + here, mask=inside, other=0.0)
    if HAS_DELTA:
        x += tl.load(delta_ptr + here, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_ptr + here, x, mask=inside)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + here, (x * inverse * weight).to(out_ptr.dtype.element_ty), mask=inside)


def add_norm(x_TH: Tensor, delta_TH: Tensor | None, weight_H: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(x_TH, dtype=dtype)
    T, H = x_TH.shape
    delta = x_TH if delta_TH is None else delta_TH
    warps = 4 if H <= 2048 else 8
    _add_norm[(T,)](x_TH, delta, weight_H, out, eps, H, delta_TH is not None, padded(H), num_warps=warps)
    return out


@triton.jit
def _place(
    qkv_ptr, rows_ptr, positions_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, q_ptr, keys_ptr, values_ptr, capacity,
    eps, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, NORMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half: tl.constexpr = DIM // 2
    i = tl.arange(0, BLOCK)
    inside = i < half
    source = qkv_ptr + (token * (HEADS + 2 * KV_HEADS) + head) * DIM + i
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(positions_ptr + token)
    row = tl.load(rows_ptr + token)
    if head < HEADS + KV_HEADS:
        if NORMS:
            inverse = 1.0 / tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / DIM + eps)
            is_query = head < HEADS
            q_a = tl.load(q_norm_ptr + i, mask=inside, other=0.0)
            q_b = tl.load(q_norm_ptr + half + i, mask=inside, other=0.0)
            k_a = tl.load(k_norm_ptr + i, mask=inside, other=0.0)
            k_b = tl.load(k_norm_ptr + half + i, mask=inside, other=0.0)
            a = a * inverse * tl.where(is_query, q_a, k_a)
            b = b * inverse * tl.where(is_query, q_b, k_b)
        angle = position * DIM + i
        cos_a = tl.load(cos_ptr + angle, mask=inside, other=0.0)
        cos_b = tl.load(cos_ptr + angle + half, mask=inside, other=0.0)
        sin_a = tl.load(sin_ptr + angle, mask=inside, other=0.0)
        sin_b = tl.load(sin_ptr + angle + half, mask=inside, other=0.0)
        turned = a * cos_a - b * sin_a
        b = b * cos_b + a * sin_b
        a = turned
    low_a, low_b = a.to(q_ptr.dtype.element_ty), b.to(q_ptr.dtype.element_ty)
    if head < HEADS:
        to = q_ptr + (token * HEADS + head) * DIM + i
        tl.store(to, low_a, mask=inside)
        tl.store(to + half, low_b, mask=inside)
    elif head < HEADS + KV_HEADS:
        to = keys_ptr + ((row * KV_HEADS + head - HEADS) * capacity + position) * DIM + i
        tl.store(to, low_a, mask=inside)
        tl.store(to + half, low_b, mask=inside)
    else:
        to = values_ptr + ((row * KV_HEADS + head - HEADS - KV_HEADS) * capacity + position) * DIM + i
        tl.store(to, low_a, mask=inside)
        tl.store(to + half, low_b, mask=inside)


def place(
    qkv_TO: Tensor, rows_T: Tensor, positions_T: Tensor, cos: Tensor, sin: Tensor, layer: Layer, cache: Tensor,
    shape: Shape,
) -> Tensor:  # fmt: skip
    q = torch.empty(len(qkv_TO), shape.heads, shape.head_dim, dtype=cache.dtype, device=cache.device)
    norms = layer.q_norm is not None
    _place[(len(qkv_TO), shape.heads + 2 * shape.kv_heads)](
        qkv_TO, rows_T, positions_T, cos, sin, layer.q_norm if norms else cos, layer.k_norm if norms else cos, q,
        cache[0], cache[1], cache.shape[3], shape.eps, shape.heads, shape.kv_heads, shape.head_dim, norms,
        padded(shape.head_dim // 2), num_warps=1,
    )  # fmt: skip
    return q


@triton.jit
def _gated(gate_ptr, up_ptr, out_ptr, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_ptr + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + at, (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=inside)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Of two tensors [T, I] of equal strides."""
    T, width = gate.shape
    out = torch.empty(T, width, dtype=gate.dtype, device=gate.device)
    _gated[(T, triton.cdiv(width, 1024))](gate, up, out, width, gate.stride(0), 1024)
    return out


# ---------------------------------------------------------------------------------------------------- attention


@triton.jit
def _attend(
    q_ptr, keys_ptr, values_ptr, positions_ptr, out_ptr, parts_ptr, sums_ptr, capacity, scale, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One slot, one head of keys and values, one part of its keys."""
    slot = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    group: tl.constexpr = HEADS // KV_HEADS
    g = tl.arange(0, GROUP)
    d = tl.arange(0, WIDTH)
    query = slot * HEADS + kv_head * group + g  # [GROUP]
    mine = (g < group)[:, None] & (d < DIM)[None, :]
    q = tl.load(q_ptr + query[:, None] * DIM + d[None, :], mask=mine, other=0.0)
    length = tl.load(positions_ptr + slot).to(tl.int32) + 1
    each = tl.cdiv(tl.cdiv(length, SPLITS), KEYS) * KEYS
    start = split * each
    stop = tl.minimum(start + each, length)
    base = (slot * KV_HEADS + kv_head) * capacity * DIM
    best = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    sums = tl.zeros([GROUP, WIDTH], tl.float32)
    for first in range(start, stop, KEYS):
        n = first + tl.arange(0, KEYS)
        at = base + n[:, None] * DIM + d[None, :]
        mask = (n < stop)[:, None] & (d < DIM)[None, :]
        k = tl.load(keys_ptr + at, mask=mask, other=0.0)
        v = tl.load(values_ptr + at, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where((n < stop)[None, :], scores, float("-inf"))
        top = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp(scores - top[:, None])
        fade = tl.exp(best - top)
        sums = sums * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        total = total * fade + tl.sum(weights, 1)
        best = top
    if SPLITS == 1:
        out = sums / total[:, None]
        tl.store(out_ptr + query[:, None] * DIM + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mine)
    else:
        part = query * SPLITS + split
        tl.store(parts_ptr + part[:, None] * DIM + d[None, :], sums, mask=mine)
        tl.store(sums_ptr + part * 2, best, mask=g < group)
        tl.store(sums_ptr + part * 2 + 1, total, mask=g < group)


@triton.jit
def _join(parts_ptr, sums_ptr, out_ptr, DIM: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    """One slot and head: what the parts of its keys gave, weighted. A part without keys has weight 0."""
    query = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    part = query * SPLITS + tl.arange(0, SPLITS)
    best = tl.load(sums_ptr + part * 2)
    weight = tl.exp(best - tl.max(best, 0))
    total = tl.sum(weight * tl.load(sums_ptr + part * 2 + 1), 0)
    sums = tl.load(parts_ptr + part[:, None] * DIM + d[None, :], mask=(d < DIM)[None, :], other=0.0)
    out = tl.sum(weight[:, None] * sums, 0) / total
    tl.store(out_ptr + query * DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < DIM)


def attend(q_SHD: Tensor, cache: Tensor, positions_S: Tensor, columns: int, shape: Shape) -> Tensor:
    S, device = len(q_SHD), cache.device
    heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
    useful = min(-(-PROGRAMS // (S * kv_heads)), max(1, columns // FEWEST_KEYS), 64)
    splits = padded(useful)
    width = padded(dim)
    keys = max(16, min(128, 16384 // (width * cache.element_size())))
    out = torch.empty(S, heads * dim, dtype=cache.dtype, device=device)
    parts = torch.empty(S * heads * splits * dim if splits > 1 else 1, dtype=torch.float32, device=device)
    sums = torch.empty(S * heads * splits * 2, dtype=torch.float32, device=device)
    _attend[(S, kv_heads, splits)](
        q_SHD, cache[0], cache[1], positions_S, out, parts, sums, cache.shape[3], shape.scale, heads, kv_heads, dim,
        splits, max(16, padded(heads // kv_heads)), width, keys, "ieee", num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _join[(S * heads,)](parts, sums, out, dim, splits, width, num_warps=2)
    return out


# ----------------------------------------------------------------------------------------------- the next token


@triton.jit
def _block_sums(logits_ptr, tops_ptr, sums_ptr, width, scale, BLOCK: tl.constexpr):
    """The largest logit of each block, and the sum of exp(logit - largest)."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * width + at, mask=at < width, other=float("-inf")) * scale
    top = tl.max(x, 0)
    origin = tl.where(top == float("-inf"), 0.0, top)
    here = row * tl.num_programs(1) + block
    tl.store(tops_ptr + here, top)
    tl.store(sums_ptr + here, tl.sum(tl.exp(x - origin), 0))


@triton.jit
def _draw(
    logits_ptr, tops_ptr, sums_ptr, uniforms_ptr, ids_ptr, logprobs_ptr, width, blocks, scale, GREEDY: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The block in which the cumulative weight reaches u * total, then the token in it. Sums made in parts may rise
    where nothing is added, and two ways to add may differ: only a token of positive weight is ever taken."""
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BLOCKS)
    tops = tl.load(tops_ptr + row * blocks + b, mask=b < blocks, other=float("-inf"))
    sums = tl.load(sums_ptr + row * blocks + b, mask=b < blocks, other=0.0)
    top = tl.max(tops, 0)
    weights = sums * tl.exp(tops - top)
    total = tl.sum(weights, 0)
    rest = 0.0
    if GREEDY:
        block = tl.min(tl.where(tops == top, b, BLOCKS), 0)
    else:
        up_to = tl.cumsum(weights, 0)
        target = tl.load(uniforms_ptr + row) * tl.max(up_to, 0)
        block = tl.min(tl.where((up_to >= target) & (weights > 0), b, BLOCKS), 0)
        block = tl.where(block < BLOCKS, block, tl.max(tl.where(weights > 0, b, 0), 0))
        rest = target - tl.sum(tl.where(b < block, weights, 0.0), 0)
    block = tl.minimum(block, blocks - 1)  # where the logits are no numbers; the log-probability then says so
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * width + at, mask=at < width, other=float("-inf")) * scale
    if GREEDY:
        token = tl.min(tl.where(x == top, at, width), 0)
    else:
        likely = tl.exp(x - top)
        token = tl.min(tl.where((tl.cumsum(likely, 0) >= rest) & (likely > 0), at, width), 0)
        token = tl.where(token < width, token, tl.max(tl.where(likely > 0, at, 0), 0))
    token = tl.minimum(token, width - 1)
    tl.store(ids_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, tl.load(logits_ptr + row * width + token) * scale - top - tl.log(total))


def drawn(logits_SV: Tensor, uniforms_S: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """As ``choose``, without filters. Reads the logits once; a softmax, its sums and a search take five passes."""
    S, V = logits_SV.shape
    blocks = triton.cdiv(V, LOGITS)
    tops, sums = (torch.empty(S, blocks, dtype=torch.float32, device=logits_SV.device) for _ in range(2))
    ids = torch.empty(S, dtype=torch.int64, device=logits_SV.device)
    logprobs = torch.empty(S, dtype=torch.float32, device=logits_SV.device)
    scale = 1.0 / (temperature or 1.0)
    _block_sums[(S, blocks)](logits_SV, tops, sums, V, scale, LOGITS, num_warps=8)
    _draw[(S,)](
        logits_SV, tops, sums, uniforms_S, ids, logprobs, V, blocks, scale, temperature == 0, padded(blocks), LOGITS,
        num_warps=8,
    )  # fmt: skip
    return ids, logprobs


@triton.jit
def _edge(weights_ptr, needs_ptr, edges_ptr, width, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest number of which it holds that the weights that are not below it are ``need`` in number, or in sum.
    Positive floats are in the order of their bits, so 30 halvings find it below 2."""
    row = tl.program_id(0).to(tl.int64)
    need = tl.load(needs_ptr + row)
    low = tl.full([], 0, tl.int32)
    high = tl.full([], 0x40000000, tl.int32)
    for _ in range(30):
        middle = (low + high) // 2
        edge = middle.to(tl.float32, bitcast=True)
        found = tl.zeros([BLOCK], tl.float32)
        for first in range(0, width, BLOCK):
            at = first + tl.arange(0, BLOCK)
            weights = tl.load(weights_ptr + row * width + at, mask=at < width, other=-1.0)
            found += tl.where(weights >= edge, 1.0 if COUNT else weights, 0.0)
        enough = tl.sum(found, 0) >= need
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    tl.store(edges_ptr + row, low.to(tl.float32, bitcast=True))


def edge(weights_SV: Tensor, needs_S1: Tensor, count: bool) -> Tensor:
    edges = torch.empty_like(needs_S1)
    _edge[(len(weights_SV),)](weights_SV, needs_S1, edges, weights_SV.shape[1], count, LOGITS, num_warps=16)
    return edges


def kth_edge(weights_SV: Tensor, k: int) -> Tensor:
    return edge(weights_SV, torch.full_like(weights_SV[:, :1], k), True)


def nucleus_edge(weights_SV: Tensor, top_p: float) -> Tensor:
    return edge(weights_SV, top_p * weights_SV.sum(-1, keepdim=True), False)


def choose(logits_SV: Tensor, uniforms_S: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    filters = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    if sampling.temperature == 0 or not filters:
        return drawn(logits_SV, uniforms_S, sampling.temperature)
    probs_SV = torch.softmax(logits_SV / sampling.temperature, -1)
    ids, _ = drawn(filtered_weights(probs_SV, sampling, kth_edge, nucleus_edge).log_(), uniforms_S, 1.0)
    return ids, probs_SV.gather(1, ids[:, None]).log_().squeeze(1)


# ------------------------------------------------------------------------------------------------- bookkeeping


@triton.jit
def _record(
    token_ptr, position_ptr, sampled_ptr, limit_ptr, active_ptr, all_ids_ptr, all_logprobs_ptr, ids_ptr, logprobs_ptr,
    stops_ptr, ended_ptr, length, stops, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    if tl.load(active_ptr + slot) != 0:
        token = tl.load(ids_ptr + slot)
        count = tl.load(sampled_ptr + slot)
        tl.store(all_ids_ptr + slot * length + count, token)
        tl.store(all_logprobs_ptr + slot * length + count, tl.load(logprobs_ptr + slot))
        tl.store(token_ptr + slot, token)
        tl.store(position_ptr + slot, tl.load(position_ptr + slot) + 1)
        tl.store(sampled_ptr + slot, count + 1)
        i = tl.arange(0, BLOCK)
        stop = tl.load(stops_ptr + i, mask=i < stops, other=-1)
        if (tl.sum((stop == token).to(tl.int32), 0) > 0) | (count + 1 >= tl.load(limit_ptr + slot)):
            tl.store(active_ptr + slot, tl.zeros([], tl.int64))
            tl.store(ended_ptr + slot, tl.full([], 1, tl.int8))


def record(s: Slots, ids_S: Tensor, logprobs_S: Tensor, stops: Tensor, ended_S: Tensor) -> None:
    _record[(len(ids_S),)](
        s.token, s.position, s.sampled, s.limit, s.active, s.ids, s.logprobs, ids_S, logprobs_S, stops,
        ended_S.view(torch.int8), s.ids.shape[1], len(stops), padded(max(1, len(stops))), num_warps=1,
    )  # fmt: skip


def check(device: Any) -> None:
    """Raises where Triton cannot compile for the device: it needs a C compiler."""
    gated(torch.zeros(1, 16, device=device), torch.zeros(1, 16, device=device))
