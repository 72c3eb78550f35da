"""What the compiled code of training does, as plain tensor operations: the reference that it is held against, and what
runs without it (``keel.kernels.dispatch``). ``keel.kernels.training`` does each in one pass over memory.

``keel.kernels.decoding`` has its plain twin in ``keel.rollout.llama.Decoder``, the choice of tokens in
``keel.rollout.tokens.choose``.

Shape suffixes besides those of ``keel.types``: ``D`` width of a head; ``G`` heads side by side, ``N`` rows of a grid
times heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021) in the half-split layout of Hugging Face checkpoints, where both halves are
    alike: cosines and sines [T, D / 2]."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def of(cos_TD: Tensor, sin_TD: Tensor) -> Rotary:
        half = cos_TD.shape[1] // 2
        return Rotary(cos_TD[:, :half].float().contiguous(), sin_TD[:, :half].float().contiguous())


@dataclass(frozen=True)
class Grid:
    """Some of the tokens, those from ``begin_B[0]`` to ``begin_B[-1]``, laid out as [B, L] for attention's products:
    row b holds the tokens from ``begin_B[b]`` on, filled from the left; cells behind them are 0. ``visible`` (bool
    [1 or B, L, L]) says which keys (last) a query sees, never one behind it; None: all that are not behind it."""

    begin_B: Tensor
    batch: int
    longest: int
    visible: Tensor | None
    heads: int
    kv_heads: int

    def cells(self) -> tuple[slice, Tensor, Tensor]:
        """The tokens, their rows and their places there."""
        tokens = slice(int(self.begin_B[0]), int(self.begin_B[-1]))
        row_T = torch.repeat_interleave(torch.arange(self.batch), self.begin_B.diff())
        return tokens, row_T, torch.arange(tokens.start, tokens.stop) - self.begin_B[row_T]

    def seen(self) -> Tensor:
        """``visible``, always there."""
        if self.visible is not None:
            return self.visible
        return torch.ones(1, self.longest, self.longest, dtype=torch.bool).tril()


def add_norm(x_TH: Tensor, delta_TH: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x += delta, in place; -> (h = x / rms(x) in ``dtype``, 1 / rms(x) [T, 1]) (RMS norm, Zhang and Sennrich 2019)."""
    if delta_TH is not None:
        x_TH.add_(delta_TH)
    inverse = inverse_rms(x_TH, eps)
    return torch.mul(x_TH, inverse).to(dtype), inverse


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which is kept, in few operations."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def norm_backward(
    residual_TH: Tensor | None, dh_TH: Tensor, h_TH: Tensor, inverse_T1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (dx = residual + (dh - h * mean(dh * h)) / rms(x), float32; dx in h's precision; sum over tokens of dh * h)"""
    both = dh_TH.float() * h_TH.float()
    dx = torch.addcmul(dh_TH.float(), h_TH.float(), both.mean(-1, keepdim=True), value=-1).mul_(inverse_T1)
    if residual_TH is not None:
        dx.add_(residual_TH)
    return dx, dx.to(h_TH.dtype), both.sum(0)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """-> (dgate, dup)"""
    return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate) * dy


def turned(x_TGD: Tensor, rotary: Rotary, back: bool = False) -> Tensor:
    """Rotary positions applied, or undone, in float32."""
    left, right = x_TGD.float().chunk(2, -1)
    cos, sin = rotary.cos[: len(x_TGD), None], rotary.sin[: len(x_TGD), None]
    sin = -sin if back else sin
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def to_grid(x_TGD: Tensor, grid: Grid, columns: range, rotary: Rotary | None = None, scale: float = 1.0) -> Tensor:
    """Some heads of the grid's tokens, turned by their positions and scaled where there is a ``rotary``:
    [T, G, D] -> [B * len(columns), L, D]."""
    tokens, row_T, place_T = grid.cells()
    x = x_TGD[:, columns.start : columns.stop]
    if rotary is not None:
        x = (turned(x, rotary) * scale).to(x.dtype)
    out = x.new_zeros(grid.batch, grid.longest, *x.shape[1:])
    out[row_T, place_T] = x[tokens]
    return out.transpose(1, 2).contiguous().flatten(0, 1)


def from_grid(
    x_NLD: Tensor, grid: Grid, columns: range, out_TGD: Tensor, rotary: Rotary | None = None, scale: float = 1.0
) -> None:
    """The transpose of :func:`to_grid`, into some columns of ``out_TGD``."""
    tokens, row_T, place_T = grid.cells()
    x = x_NLD.unflatten(0, (grid.batch, -1)).transpose(1, 2)[row_T, place_T]
    if rotary is not None:
        turns = Rotary(rotary.cos[tokens], rotary.sin[tokens])
        x = turned(x, turns, back=True) * scale
    out_TGD[tokens, columns.start : columns.stop] = x.to(out_TGD.dtype)


def softmax_(scores: Tensor, grid: Grid) -> Tensor:
    """Of the scores of all queries and keys [B, heads, L, L], in any shape, over the visible keys; in place. Queries
    that see none get zeros."""
    seen = grid.seen()[:, None]
    scores_BHLL = scores.view(grid.batch, grid.heads, grid.longest, grid.longest)
    probs = torch.softmax(scores_BHLL.float().masked_fill(~seen, float("-inf")), -1)
    scores_BHLL.copy_(probs.masked_fill_(~seen, 0))
    return scores


def softmax_backward_(dprobs: Tensor, probs: Tensor, grid: Grid) -> Tensor:
    """p * (dp - rowsum(dp * p)), in place of ``dprobs``."""
    both = (dprobs.float() * probs.float()).sum(-1, keepdim=True)
    return dprobs.copy_(probs * (dprobs.float() - both))


def probabilities(
    logits_CV: Tensor, ids_C: Tensor, logp_C: Tensor, entropy_C: Tensor | None, probs_CV: Tensor | None
) -> None:
    """Of float32 ``logits``, which may be overwritten: log-probabilities of ``ids``, entropies and probabilities into
    the tensors that are given."""
    logps = torch.log_softmax(logits_CV, -1)
    logp_C.copy_(logps.gather(1, ids_C[:, None]).squeeze(1))
    if entropy_C is not None:
        entropy_C.copy_(-torch.linalg.vecdot(logps.exp(), logps))
    if probs_CV is not None:
        probs_CV.copy_(logps.exp_())


def logit_gradient_(probs_CV: Tensor, ids_C: Tensor, gradient_C: Tensor) -> Tensor:
    """gradient * (onehot(id) - p), what log p of the ids hands back to the logits; in place of ``probs``."""
    g = gradient_C[:, None].to(probs_CV.dtype)
    return probs_CV.mul_(-g).scatter_add_(1, ids_C[:, None], g)


def logit_gradient(
    logits_CV: Tensor, total_C: Tensor, ids_C: Tensor, gradient_C: Tensor, entropy_C: Tensor,
    entropy_gradient_C: Tensor | None, out_CV: Tensor,
) -> None:  # fmt: skip
    """What log-probabilities and entropies hand back to some columns of the logits, which may be overwritten, into
    ``out``: d logp_y / dz = onehot(y) - p,  dH / dz = -p (log p + H). ``total``: log sum exp of all logits; ``ids``:
    as columns, which need not be among these."""
    logps = logits_CV.sub_(total_C[:, None])
    factor = -gradient_C[:, None]
    if entropy_gradient_C is not None:
        factor = factor - (logps + entropy_C[:, None]) * entropy_gradient_C[:, None]
    grad = logps.exp().mul_(factor)
    here = ((ids_C >= 0) & (ids_C < logits_CV.shape[1])).nonzero().squeeze(1)
    grad[here, ids_C[here]] += gradient_C[here]
    out_CV.copy_(grad)


def multiply(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """x weight' -> [T, O], as ``keel.kernels.matmul`` does it with a packed weight."""
    return x_TI @ weight_OI.t()
