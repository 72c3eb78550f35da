"""``keel.kernels.plain`` as compiled loops: the same functions, each one pass over memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from keel.kernels.intrinsics import exp
from keel.kernels.openmp import (
    Loop,
    bytes_,
    f4,
    floats,
    inner,
    larger,
    load,
    longs,
    lows,
    number,
    real,
    share,
    store,
    thread,
)

if TYPE_CHECKING:
    from keel.kernels.plain import Grid, Rotary

# ---------------------------------------------------------------------------------------------------------------- norms


@inner
def _add_norm_rows(begin, end, H, x, delta, added, h, inverse, eps):
    for t in range(begin, end):
        o = t * H
        squares = f4(0)
        if added:
            for i in range(H):
                value = load(x, o + i) + load(delta, o + i)
                store(x, o + i, value)
                squares += value * value
        else:
            for i in range(H):
                value = load(x, o + i)
                squares += value * value
        factor = f4(1) / np.sqrt(squares / f4(H) + eps)
        store(inverse, t, factor)
        for i in range(H):
            store(h, o + i, load(x, o + i) * factor)


@Loop
def _add_norm(w):
    begin, end = share(number(w, 0))
    added = number(w, 3) != 0
    _add_norm_rows(begin, end, number(w, 1), floats(w, 2), lows(w, 3), added, lows(w, 4), floats(w, 5), real(w, 6))


def add_norm(x_TH: Tensor, delta_TH: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    T, H = x_TH.shape
    h_TH, inverse_T1 = x_TH.new_empty(T, H, dtype=dtype), x_TH.new_empty(T, 1)
    _add_norm(dtype, T, H, x_TH, delta_TH, h_TH, inverse_T1, eps)
    return h_TH, inverse_T1


@inner
def _norm_gradient_rows(begin, end, H, residual, added, dh, h, inverse, dx, low, sums, s):
    for i in range(H):
        store(sums, s + i, f4(0))
    for t in range(begin, end):
        o = t * H
        both = f4(0)
        for i in range(H):
            product = load(dh, o + i) * load(h, o + i)
            both += product
            store(sums, s + i, load(sums, s + i) + product)
        mean, factor = both / f4(H), load(inverse, t)
        if added:
            for i in range(H):
                value = load(residual, o + i) + (load(dh, o + i) - load(h, o + i) * mean) * factor
                store(dx, o + i, value)
                store(low, o + i, value)
        else:
            for i in range(H):
                value = (load(dh, o + i) - load(h, o + i) * mean) * factor
                store(dx, o + i, value)
                store(low, o + i, value)


@Loop
def _norm_backward(w):
    begin, end = share(number(w, 0))
    H, added = number(w, 1), number(w, 2) != 0
    residual, dh, h, inverse = floats(w, 2), lows(w, 3), lows(w, 4), floats(w, 5)
    _norm_gradient_rows(
        begin, end, H, residual, added, dh, h, inverse, floats(w, 6), lows(w, 7), floats(w, 8), thread() * H
    )


def norm_backward(
    residual_TH: Tensor | None, dh_TH: Tensor, h_TH: Tensor, inverse_T1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    T, H = h_TH.shape
    dx_TH, low_TH = inverse_T1.new_empty(T, H), torch.empty_like(h_TH)
    sums = inverse_T1.new_zeros(torch.get_num_threads(), H)
    residual_TH = None if residual_TH is None else residual_TH.contiguous()
    _norm_backward(h_TH.dtype, T, H, residual_TH, dh_TH, h_TH, inverse_T1, dx_TH, low_TH, sums)
    return dx_TH, low_TH, sums.sum(0)


# --------------------------------------------------------------------------------------------------------------- SwiGLU


@Loop
def _swiglu(w):
    begin, end = share(number(w, 0))
    _swiglu_part(begin, end, lows(w, 1), lows(w, 2), lows(w, 3))


@inner
def _swiglu_part(begin, end, gate, up, out):
    for i in range(begin, end):
        g = load(gate, i)
        store(out, i, g / (f4(1) + exp(-g)) * load(up, i))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    _swiglu(gate.dtype, gate.numel(), gate, up, out)
    return out


@Loop
def _swiglu_backward(w):
    begin, end = share(number(w, 0))
    _swiglu_gradient(begin, end, lows(w, 1), lows(w, 2), lows(w, 3), lows(w, 4), lows(w, 5))


@inner
def _swiglu_gradient(begin, end, dy, gate, up, dgate, dup):
    for i in range(begin, end):
        d, g = load(dy, i), load(gate, i)
        sigmoid = f4(1) / (f4(1) + exp(-g))
        silu = g * sigmoid
        store(dup, i, d * silu)
        store(dgate, i, d * load(up, i) * (sigmoid + silu * (f4(1) - sigmoid)))


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _swiglu_backward(gate.dtype, gate.numel(), dy.contiguous(), gate, up, dgate, dup)
    return dgate, dup


# --------------------------------------------------------------------------------------------------- attention's layout


@inner
def _move_cells(begin, end, columns, first, G, L, D, begins, back, x, cos, sin, turned, scale, out):
    """Cell by cell: a token's heads lie together, and so they are read or written together."""
    half, sign = D // 2, f4(-1) if back else f4(1)
    for n in range(begin, end):
        row, place = n // L, n % L
        token, there = begins[row] + place, begins[row] + place < begins[row + 1]
        for column in range(columns):
            cell, line = ((row * columns + column) * L + place) * D, (token * G + first + column) * D
            a, o = (cell, line) if back else (line, cell)
            if there and turned:
                for i in range(half):
                    left, right = load(x, a + i), load(x, a + half + i)
                    c, s = load(cos, token * half + i) * scale, load(sin, token * half + i) * scale * sign
                    store(out, o + i, left * c - right * s)
                    store(out, o + half + i, right * c + left * s)
            elif there:
                for i in range(D):
                    store(out, o + i, load(x, a + i))
            elif not back:
                for i in range(D):
                    store(out, o + i, f4(0))


@Loop
def _move(w):
    columns, first, G, L, D = number(w, 1), number(w, 2), number(w, 3), number(w, 4), number(w, 5)
    begin, end = share(number(w, 0) * L)
    begins, back, x, cos, sin = longs(w, 6), number(w, 7) != 0, lows(w, 8), floats(w, 9), floats(w, 10)
    turned, scale, out = number(w, 9) != 0, real(w, 11), lows(w, 12)
    _move_cells(begin, end, columns, first, G, L, D, begins, back, x, cos, sin, turned, scale, out)


def to_grid(x_TGD: Tensor, grid: Grid, columns: range, rotary: Rotary | None = None, scale: float = 1.0) -> Tensor:
    G, D = x_TGD.shape[1:]
    out = x_TGD.new_empty(grid.batch * len(columns), grid.longest, D)
    cos, sin = (None, None) if rotary is None else (rotary.cos, rotary.sin)
    sizes = (grid.batch, len(columns), columns.start, G, grid.longest, D)
    _move(x_TGD.dtype, *sizes, grid.begin_B, 0, x_TGD.contiguous(), cos, sin, float(scale), out)
    return out


def from_grid(
    x_NLD: Tensor, grid: Grid, columns: range, out_TGD: Tensor, rotary: Rotary | None = None, scale: float = 1.0
) -> None:
    G, D = out_TGD.shape[1:]
    cos, sin = (None, None) if rotary is None else (rotary.cos, rotary.sin)
    sizes = (grid.batch, len(columns), columns.start, G, grid.longest, D)
    _move(x_NLD.dtype, *sizes, grid.begin_B, 1, x_NLD, cos, sin, float(scale), out_TGD)


# -------------------------------------------------------------------------------------------------------------- softmax


@inner
def _softmax_rows(begin, end, heads, L, scores, visible, masked, shared, buffer):
    for n in range(begin, end):
        for query in range(L):
            o, seen = (n * L + query) * L, query + 1
            v = query * L if shared else (n // heads * L + query) * L
            most = f4(-1e30)
            if masked:
                for i in range(seen):
                    value = load(scores, o + i) if visible[v + i] else f4(-1e30)
                    buffer[np.uint64(i)] = value
                    most = larger(most, value)
            else:
                for i in range(seen):
                    value = load(scores, o + i)
                    buffer[np.uint64(i)] = value
                    most = larger(most, value)
            total = f4(0)
            if masked:
                for i in range(seen):
                    value = exp(buffer[np.uint64(i)] - most) if visible[v + i] else f4(0)
                    buffer[np.uint64(i)] = value
                    total += value
            else:
                for i in range(seen):
                    value = exp(buffer[np.uint64(i)] - most)
                    buffer[np.uint64(i)] = value
                    total += value
            factor = f4(1) / total if total > f4(0) else f4(0)
            for i in range(seen):
                store(scores, o + i, buffer[np.uint64(i)] * factor)
            for i in range(seen, L):
                store(scores, o + i, f4(0))


@Loop
def _softmax(w):
    begin, end = share(number(w, 0))
    L = number(w, 2)
    masked, shared = number(w, 4) != 0, number(w, 5) != 0
    _softmax_rows(begin, end, number(w, 1), L, lows(w, 3), bytes_(w, 4), masked, shared, np.empty(L, np.float32))


def softmax_(scores: Tensor, grid: Grid) -> Tensor:
    N, L = grid.batch * grid.heads, grid.longest
    shared = grid.visible is not None and len(grid.visible) == 1
    _softmax(scores.dtype, N, grid.heads, L, scores, grid.visible, int(shared))
    return scores


@inner
def _softmax_gradient_rows(begin, end, L, dprobs, probs):
    for n in range(begin, end):
        for query in range(L):
            o, seen = (n * L + query) * L, query + 1
            both = f4(0)
            for i in range(seen):
                both += load(dprobs, o + i) * load(probs, o + i)
            for i in range(seen):
                store(dprobs, o + i, load(probs, o + i) * (load(dprobs, o + i) - both))
            for i in range(seen, L):
                store(dprobs, o + i, f4(0))


@Loop
def _softmax_backward(w):
    begin, end = share(number(w, 0))
    _softmax_gradient_rows(begin, end, number(w, 1), lows(w, 2), lows(w, 3))


def softmax_backward_(dprobs: Tensor, probs: Tensor, grid: Grid) -> Tensor:
    _softmax_backward(probs.dtype, grid.batch * grid.heads, grid.longest, dprobs, probs)
    return dprobs


# ----------------------------------------------------------------------------------------------------------------- head


@inner
def _probability_rows(begin, end, V, logits, ids, logp, entropy, wanted, probs, kept):
    for row in range(begin, end):
        o = row * V
        most = f4(-3e38)
        for i in range(V):
            most = larger(most, load(logits, o + i))
        mine = load(logits, o + ids[row]) - most
        total, mean = f4(0), f4(0)
        if wanted:
            for i in range(V):
                value = load(logits, o + i) - most
                e = exp(value)
                mean += e * value
                total += e
                store(logits, o + i, e)
        else:
            for i in range(V):
                e = exp(load(logits, o + i) - most)
                total += e
                store(logits, o + i, e)
        log_total = np.log(total)
        store(logp, row, mine - log_total)
        if wanted:
            store(entropy, row, log_total - mean / total)
        if kept:
            factor = f4(1) / total
            for i in range(V):
                store(probs, o + i, load(logits, o + i) * factor)


@Loop
def _probabilities(w):
    begin, end = share(number(w, 0))
    wanted, kept = number(w, 5) != 0, number(w, 6) != 0
    _probability_rows(
        begin, end, number(w, 1), floats(w, 2), longs(w, 3), floats(w, 4), floats(w, 5), wanted, lows(w, 6), kept
    )


def probabilities(
    logits_CV: Tensor, ids_C: Tensor, logp_C: Tensor, entropy_C: Tensor | None, probs_CV: Tensor | None
) -> None:
    low = logits_CV.dtype if probs_CV is None else probs_CV.dtype
    _probabilities(low, *logits_CV.shape, logits_CV, ids_C, logp_C, entropy_C, probs_CV)


@inner
def _logit_gradient_rows(begin, end, V, probs, ids, gradient):
    for row in range(begin, end):
        o, g = row * V, load(gradient, row)
        mine = load(probs, o + ids[row])
        for i in range(V):
            store(probs, o + i, load(probs, o + i) * -g)
        store(probs, o + ids[row], g - g * mine)


@Loop
def _logit_gradient(w):
    begin, end = share(number(w, 0))
    _logit_gradient_rows(begin, end, number(w, 1), lows(w, 2), longs(w, 3), floats(w, 4))


def logit_gradient_(probs_CV: Tensor, ids_C: Tensor, gradient_C: Tensor) -> Tensor:
    _logit_gradient(probs_CV.dtype, *probs_CV.shape, probs_CV, ids_C, gradient_C)
    return probs_CV


@inner
def _logit_gradient_columns(begin, end, V, logits, total, ids, gradient, entropy, entropy_gradient, wanted, out):
    for row in range(begin, end):
        o, of_all, g = row * V, load(total, row), load(gradient, row)
        if wanted:
            h, slope = load(entropy, row), load(entropy_gradient, row)
            for i in range(V):
                logp = load(logits, o + i) - of_all
                store(out, o + i, -exp(logp) * (g + (logp + h) * slope))
        else:
            for i in range(V):
                store(out, o + i, exp(load(logits, o + i) - of_all) * -g)
        mine = ids[row]
        if 0 <= mine < V:
            logp = load(logits, o + mine) - of_all
            before = g
            if wanted:
                before += (logp + load(entropy, row)) * load(entropy_gradient, row)
            store(out, o + mine, g - exp(logp) * before)


@Loop
def _logit_gradient_part(w):
    begin, end = share(number(w, 0))
    wanted = number(w, 7) != 0
    _logit_gradient_columns(
        begin, end, number(w, 1), floats(w, 2), floats(w, 3), longs(w, 4), floats(w, 5), floats(w, 6), floats(w, 7),
        wanted, lows(w, 8),
    )  # fmt: skip


def logit_gradient(
    logits_CV: Tensor, total_C: Tensor, ids_C: Tensor, gradient_C: Tensor, entropy_C: Tensor,
    entropy_gradient_C: Tensor | None, out_CV: Tensor,
) -> None:  # fmt: skip
    each = total_C, ids_C, gradient_C, entropy_C, entropy_gradient_C
    _logit_gradient_part(out_CV.dtype, *logits_CV.shape, logits_CV, *each, out_CV)
