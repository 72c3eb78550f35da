"""Attention on a GPU over sequences that lie one behind another, without a grid and without padding."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from keel.model.layout import Layout

# Heads that share keys: an option that newer versions ask for, and that older ones (2.11) take without a word.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def half_on_gpu(query: Tensor) -> torch.dtype | None:
    """The precision in which the kernels take their inputs: the half precision of a GPU's products. None where they do
    not run."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    halves = (torch.bfloat16, torch.float16)
    width = query.shape[-1]
    return dtype if query.is_cuda and dtype in halves and width % 8 == 0 and width <= 256 else None


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None) -> Tensor:
    """Causal attention, [T, heads, D], [T, kv_heads, D] twice -> [T, heads, D]; a query sees the last ``window`` tokens
    of its sequence, its own among them (None: all).

    By torch's flash attention; where all sequences are of one length, by cuDNN's. That is nearly twice as fast on a
    Hopper chip: 577 TFLOP/s forwards and 406 backwards on an H100, where flash attention has 291 and 238. (cuDNN takes
    other lengths too, but plans anew at every call and, in torch 2.11, gave wrong gradients.)"""
    if layout.even and window is None and q.shape[-1] <= 128:
        return _cudnn(q, k, v, layout, scale)
    keys = layout.keys
    if keys.index_K is not None:
        k, v = k.index_select(0, keys.index_K), v.index_select(0, keys.index_K)
    seen = (-1 if window is None else window - 1, 0)  # so many tokens before a query's own, none behind it
    grouped = _GROUPED if k.shape[1] != q.shape[1] else {}
    out = varlen_attn(
        q, k, v, layout.cu_seqlens, keys.cu_seqlens, layout.longest_own, keys.longest, scale=scale, window_size=seen,
        **grouped,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def _cudnn(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    q, k, v = (x.unflatten(0, (layout.batch, layout.longest)).transpose(1, 2) for x in (q, k, v))
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    operation = torch.ops.aten._scaled_dot_product_cudnn_attention
    found = operation(q, k, v, None, gradients, 0.0, True, False, scale=scale)
    return found[0].transpose(1, 2).flatten(0, 1)  # type: ignore[no-any-return]
