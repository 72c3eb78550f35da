"""What lies between the products of ``keel.rollout.cuda``, by torch's operations: what it takes where there is no
Triton, and what ``keel.rollout.triton_kernels`` is held against. Nothing here waits for the device, so that all of
it can be captured.

Shape suffixes besides those of ``keel.types``: ``S`` slots; ``D`` width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from keel.model.fused import inverse_rms, rotate
from keel.rollout.slots import Slots
from keel.rollout.step import Layer, Shape
from keel.rollout.tokens import choose as choose


def add_norm(x_TH: Tensor, delta_TH: Tensor | None, weight_H: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Adds ``delta`` to the residual stream ``x``, float32, in place; -> its RMS norm in ``dtype``."""
    if delta_TH is not None:
        x_TH += delta_TH
    return (x_TH * inverse_rms(x_TH, eps) * weight_H.float()).to(dtype)


def place(
    qkv_TO: Tensor, rows_T: Tensor, positions_T: Tensor, cos: Tensor, sin: Tensor, layer: Layer, cache: Tensor,
    shape: Shape,
) -> Tensor:  # fmt: skip
    """Queries, keys and values side by side [T, (heads + 2 * kv_heads) * D] -> queries [T, heads, D]. Norms and rotary
    positions are applied; keys and values go into ``cache`` [2, rows, kv_heads, capacity, D] at their row and
    position. ``cos`` and ``sin``: [context, D]."""
    parts = qkv_TO.unflatten(1, (-1, shape.head_dim)).float().split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
    q, k, v = parts
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = (part * inverse_rms(part, shape.eps) * norm for part, norm in ((q, layer.q_norm), (k, layer.k_norm)))
    cos_T1D, sin_T1D = cos[positions_T, None], sin[positions_T, None]
    cache[0, rows_T, :, positions_T] = rotate(k, cos_T1D, sin_T1D).to(cache.dtype)
    cache[1, rows_T, :, positions_T] = v.to(cache.dtype)
    return rotate(q, cos_T1D, sin_T1D).to(cache.dtype)


def attend(q_SHD: Tensor, cache: Tensor, positions_S: Tensor, columns: int, shape: Shape) -> Tensor:
    """Attention of one token a slot to what its row of the cache holds up to its position: -> [S, heads * D].
    ``columns``: more than the largest position."""
    S = len(q_SHD)
    keys, values = (half[:, :, :columns].flatten(0, 1) for half in cache)
    q = q_SHD.view(S * shape.kv_heads, -1, shape.head_dim)
    scores = torch.bmm(q, keys.transpose(1, 2)).float().view(S, shape.heads, columns) * shape.scale
    hidden = torch.arange(columns, device=q.device) > positions_S[:, None]
    probs = torch.softmax(scores.masked_fill_(hidden[:, None], float("-inf")), -1).to(cache.dtype)
    return torch.bmm(probs.view(S * shape.kv_heads, -1, columns), values).view(S, -1)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def record(s: Slots, ids_S: Tensor, logprobs_S: Tensor, stops: Tensor, ended_S: Tensor) -> None:
    """Writes a token for each active slot. One that ends is no longer active, and is marked in ``ended``."""
    active = s.active.bool()
    at = s.sampled.clamp(max=s.ids.shape[1] - 1)[:, None]
    s.ids.scatter_(1, at, torch.where(active[:, None], ids_S[:, None], s.ids.gather(1, at)))
    s.logprobs.scatter_(1, at, torch.where(active[:, None], logprobs_S[:, None], s.logprobs.gather(1, at)))
    s.token.copy_(torch.where(active, ids_S, s.token))
    s.position += s.active
    s.sampled += s.active
    # Not torch.isin, which sorts where there are many stops, and then waits.
    ended = active & ((s.sampled >= s.limit) | (ids_S[:, None] == stops).any(1))
    ended_S |= ended
    s.active.masked_fill_(ended, 0)
