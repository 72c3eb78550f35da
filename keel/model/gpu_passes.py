"""``keel.kernels.plain`` for the head on a GPU: each one or two readings of the logits, where torch has six to ten
operations. The only file of the trainer that imports Triton, which comes with torch's CUDA builds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns that a program holds at once


def probabilities(
    logits_CV: Tensor, ids_C: Tensor, logp_C: Tensor, entropy_C: Tensor | None, probs_CV: Tensor | None
) -> None:
    """See ``keel.kernels.plain.probabilities``. The sums are carried along with the greatest logit so far (Milakov and
    Gimelshein 2018), so that one reading gives them."""
    rows, columns = logits_CV.shape
    if rows == 0:
        return
    entropy, probs = logp_C if entropy_C is None else entropy_C, logits_CV if probs_CV is None else probs_CV
    with torch.cuda.device(logits_CV.device):
        _probabilities[(rows,)](
            logits_CV, ids_C, logp_C, entropy, probs, columns, entropy_C is not None, probs_CV is not None, BLOCK,
            num_warps=8,
        )  # fmt: skip


def logit_gradient_(probs_CV: Tensor, ids_C: Tensor, gradient_C: Tensor) -> Tensor:
    """See ``keel.kernels.plain.logit_gradient_``."""
    rows, columns = probs_CV.shape
    if rows:
        grid = (rows, triton.cdiv(columns, BLOCK))
        with torch.cuda.device(probs_CV.device):
            _of_probabilities[grid](probs_CV, ids_C, gradient_C, columns, BLOCK, num_warps=8)
    return probs_CV


def logit_gradient(
    logits_CV: Tensor, total_C: Tensor, ids_C: Tensor, gradient_C: Tensor, entropy_C: Tensor,
    entropy_gradient_C: Tensor | None, out_CV: Tensor,
) -> None:  # fmt: skip
    """See ``keel.kernels.plain.logit_gradient``."""
    rows, columns = logits_CV.shape
    if rows == 0:
        return
    known = entropy_gradient_C is not None
    entropy, its_gradient = (entropy_C, entropy_gradient_C) if known else (total_C, total_C)
    with torch.cuda.device(logits_CV.device):
        _of_logits[(rows, triton.cdiv(columns, BLOCK))](
            logits_CV, total_C, ids_C, gradient_C, entropy, its_gradient, out_CV, columns, known, BLOCK, num_warps=8
        )


@triton.jit
def _probabilities(
    logits, ids, logp, entropy, probs, columns, HAS_ENTROPY: tl.constexpr, HAS_PROBS: tl.constexpr, BLOCK: tl.constexpr
):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * columns
    lane = tl.arange(0, BLOCK)
    most = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    weighted = tl.zeros([], tl.float32)  # sum of exp(x - most) * (x - most)
    for first in range(0, columns, BLOCK):
        x = tl.load(start + first + lane, mask=first + lane < columns, other=float("-inf"))
        new = tl.maximum(most, tl.max(x, 0))
        shrink = tl.where(most == float("-inf"), 0.0, tl.exp(most - new))
        gap = tl.where(most == float("-inf"), 0.0, most - new)
        p = tl.exp(x - new)
        if HAS_ENTROPY:
            own = tl.where(p > 0, p * (x - new), 0.0)
            weighted = shrink * (weighted + gap * total) + tl.sum(own, 0)
        total = shrink * total + tl.sum(p, 0)
        most = new
    log_total = tl.log(total)
    mine = tl.load(start + tl.load(ids + row))
    tl.store(logp + row, mine - most - log_total)
    if HAS_ENTROPY:
        tl.store(entropy + row, log_total - weighted / total)
    if HAS_PROBS:
        for first in range(0, columns, BLOCK):
            inside = first + lane < columns
            x = tl.load(start + first + lane, mask=inside, other=float("-inf"))
            p = tl.exp(x - most - log_total)
            tl.store(probs + row * columns + first + lane, p.to(probs.dtype.element_ty), mask=inside)


@triton.jit
def _of_probabilities(probs, ids, gradient, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = probs + row * columns + column
    p = tl.load(place, mask=column < columns, other=0.0).to(tl.float32)
    g = tl.load(gradient + row)
    out = g * (tl.where(column == tl.load(ids + row), 1.0, 0.0) - p)
    tl.store(place, out.to(probs.dtype.element_ty), mask=column < columns)


@triton.jit
def _of_logits(
    logits,
    total,
    ids,
    gradient,
    entropy,
    entropy_gradient,
    out,
    columns,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    logp = tl.load(logits + row * columns + column, mask=inside, other=float("-inf")) - tl.load(total + row)
    p = tl.exp(logp)
    g = tl.load(gradient + row)
    grad = g * (tl.where(column == tl.load(ids + row), 1.0, 0.0) - p)
    if HAS_ENTROPY:
        slope = tl.where(p > 0, p * (logp + tl.load(entropy + row)), 0.0)
        grad -= tl.load(entropy_gradient + row) * slope
    tl.store(out + row * columns + column, grad.to(out.dtype.element_ty), mask=inside)
