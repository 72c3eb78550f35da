"""The decoder layers of Llama-family models as a few large operations with backward passes of their own, for training
on a CPU.

transformers' layers run some sixty small operations each, autograd and autocast as many again: in a small model these
passes over memory cost more than the matrix products. Here a layer is six operations:

    projections = NormLinear(x, q, k, v);  attended = Attend(projections);  x = AddLinear(x, attended, o)
    projections = NormLinear(x, gate, up); activated = Swiglu(projections); x = AddLinear(x, activated, down)

The numbers are transformers' own to rounding, values and gradients (tests/test_fused.py compares them with the padded
reference). In bfloat16 the residual stream, the norms and the rotary positions stay in float32, as under autocast.

Shape suffixes besides those of ``keel.types``: ``O`` outputs of a product; ``D`` width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")


def is_fusable(decoder: nn.Module) -> bool:
    """Whether :func:`run_layers` can stand in for the layers of ``decoder``: a known architecture of plain linear
    layers (no adapters, no quantisation, nothing hooked in) with float32 parameters on a CPU."""
    if type(decoder).__name__ not in DECODERS or getattr(decoder, "keel_unfused", False):
        return False
    layers: Any = decoder.layers
    modules = [module for layer in layers for module in layer.modules()]
    linears = [m for m in modules if type(m) is nn.Linear]
    return (
        len(linears) == 7 * len(layers)
        and not any(hasattr(m, "base_layer") or m._forward_hooks or m._forward_pre_hooks for m in modules)
        and decoder.config.hidden_act in ("silu", "swish")  # type: ignore[operator, union-attr]
        and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in decoder.parameters())
    )


@dataclass(frozen=True)
class Grid:
    """Some of the tokens laid out as [B, L] for attention's products: those of ``tokens`` lie at (row_T, place_T).
    ``bias`` ([1 or B * heads, L, L], 0 or -inf) says which keys (last) a query sees."""

    tokens: slice
    row_T: Tensor
    place_T: Tensor
    batch: int
    longest: int
    bias: Tensor


Attention = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""(transformers' attention module, queries, keys and values side by side before rotary positions
[T, heads + 2 * kv_heads, D], cos and sin [T, D]) -> [T, heads * D]"""


def run_layers(decoder: Any, x_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor, attention: Attention) -> Tensor:
    """The decoder's layers over a row of tokens: embeddings [T, H] -> hidden states [T, H] before the final norm, both
    float32. Matrix products run in autocast's precision where it is on. ``x_TH`` may be overwritten."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    recompute = decoder.gradient_checkpointing and decoder.training and torch.is_grad_enabled()
    with torch.autocast("cpu", enabled=False):
        for layer in decoder.layers:
            if recompute:
                x_TH = checkpoint(_layer, layer, x_TH, cos_TD, sin_TD, attention, dtype, False, use_reentrant=False)
            else:
                x_TH = _layer(layer, x_TH, cos_TD, sin_TD, attention, dtype, True)
    return x_TH


def _layer(
    layer: Any, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, dtype: torch.dtype, overwrite: bool
) -> Tensor:
    block, mlp = layer.self_attn, layer.mlp
    qkv = norm_linear(x, layer.input_layernorm, (block.q_proj, block.k_proj, block.v_proj), dtype)
    qkv = qkv.unflatten(-1, (-1, block.head_dim))
    if hasattr(block, "q_norm"):  # Qwen3
        heads, kv_heads = (linear.out_features // block.head_dim for linear in (block.q_proj, block.k_proj))
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        qkv = torch.cat([block.q_norm(q).to(dtype), block.k_norm(k).to(dtype), v], dim=1)
    x = add_linear(x, attention(block, qkv, cos, sin), block.o_proj, dtype, overwrite)
    projections = norm_linear(x, layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), dtype)
    return add_linear(x, Swiglu.apply(projections), mlp.down_proj, dtype, True)


def norm_linear(x_TH: Tensor, norm: Any, linears: Sequence[nn.Linear], dtype: torch.dtype) -> Tensor:
    """Several linear layers after one RMS norm: [T, H] -> [T, O_1 + O_2 + ...] in ``dtype``."""
    biases = [linear.bias for linear in linears]
    bias = None if biases[0] is None else torch.cat(biases)  # type: ignore[arg-type]
    return NormLinear.apply(x_TH, norm.weight, bias, norm.variance_epsilon, dtype, *(m.weight for m in linears))


def add_linear(x_TH: Tensor, a_TI: Tensor, linear: nn.Linear, dtype: torch.dtype, overwrite: bool) -> Tensor:
    """x + linear(a), in place of ``x`` where ``overwrite``."""
    return AddLinear.apply(x_TH, a_TI, linear.weight, linear.bias, dtype, overwrite)


class NormLinear(torch.autograd.Function):
    """y = W (n * x / rms(x)): the norm's weights n go into the product's, which are fewer than the activations.

    With h = x / rms(x):  dx = (dh - h * mean(dh * h)) / rms(x).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, norm: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype, *weights: Tensor
    ) -> Tensor:
        inverse = inverse_rms(x, eps)
        h = torch.mul(x, inverse).to(dtype)
        weight = torch.cat(weights).mul_(norm).to(dtype)
        ctx.save_for_backward(h, inverse, weight, norm, *weights)
        return F.linear(h, weight, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        h, inverse, weight, norm, *weights = ctx.saved_tensors
        dx = dnorm = dbias = None
        dweights: Any = [None] * len(weights)
        if ctx.needs_input_grad[0]:
            dh = dy @ weight
            dx = torch.addcmul(dh, h, _row_means(dh, h).to(h.dtype), value=-1).float().mul_(inverse)
        if any(ctx.needs_input_grad[5:]) or ctx.needs_input_grad[1]:
            dweight = (dy.t() @ h).float()
            dnorm = torch.cat(weights).mul_(dweight).sum(0)
            dweights = dweight.mul_(norm).split([w.shape[0] for w in weights])
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0, dtype=torch.float32)
        return dx, dnorm, dbias, None, None, *dweights


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which is kept: an RMS norm's factor (Zhang and Sennrich 2019)
    in few operations."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _row_means(a: Tensor, b: Tensor) -> Tensor:
    """[T, 1] float32 means of a * b over each row."""
    return (a * b).sum(-1, keepdim=True, dtype=torch.float32).div_(a.shape[-1])


class AddLinear(torch.autograd.Function):
    """y = x + W a + b. ``x`` is overwritten where asked: nobody's backward pass needs it (NormLinear keeps h)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, overwrite: bool
    ) -> Tensor:
        low = weight.to(dtype)
        ctx.save_for_backward(a, low)
        product = F.linear(a, low, None if bias is None else bias.to(dtype))
        if not overwrite:
            return x + product
        ctx.mark_dirty(x)
        return x.add_(product)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        a, weight = ctx.saved_tensors
        low = dy.to(a.dtype)
        da = low @ weight if ctx.needs_input_grad[1] else None
        dweight = (low.t() @ a).float() if ctx.needs_input_grad[2] else None
        dbias = dy.sum(0) if ctx.needs_input_grad[3] else None
        return dy, da, dweight, dbias, None, None


class Swiglu(torch.autograd.Function):
    """[gate | up] [T, 2F] -> silu(gate) * up [T, F]."""

    @staticmethod
    def forward(ctx: Any, projections: Tensor) -> Tensor:  # type: ignore[override]
        gate, up = projections.chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(projections, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        projections, activated = ctx.saved_tensors
        gate, up = projections.chunk(2, -1)
        out = torch.empty_like(projections)
        dgate, dup = out.chunk(2, -1)
        torch.mul(activated, dy, out=dup)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return out


class Attend(torch.autograd.Function):
    """Rotary positions and softmax attention, grid after grid.

    qkv: queries, keys and values side by side [T, heads + 2 * kv_heads, D]; cos and sin [T, D] float32.
    -> [T, heads * D], 0 for tokens that lie on no grid.

    With S = scores, P = softmax(S):  dV = P' dO,  dP = dO V',  dS = P * (dP - rowsum(dP * P)),  dQ = dS K,  dK = dS' Q.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, scale: float, grids: Sequence[Grid]
    ) -> Tensor:
        kv_heads = (qkv.shape[1] - heads) // 2
        group = heads // kv_heads
        cos, sin = cos[:, None], sin[:, None]
        turned, v = rotate(qkv[:, :-kv_heads].float(), cos, sin).to(qkv.dtype), qkv[:, -kv_heads:]
        out = qkv.new_zeros(len(qkv), heads, qkv.shape[2])
        saved = []
        for grid in grids:
            q_NLD = _to_grid(turned[grid.tokens, :heads], grid, 1)
            k_NLD = _to_grid(turned[grid.tokens, heads:], grid, group)
            v_NLD = _to_grid(v[grid.tokens], grid, group)
            bias = grid.bias.expand(q_NLD.shape[0], -1, -1)
            probs = torch.softmax(torch.baddbmm(bias, q_NLD, k_NLD.transpose(1, 2), alpha=scale), -1)
            out[grid.tokens] = _from_grid(torch.bmm(probs, v_NLD), grid, heads, 1)
            saved += [q_NLD, k_NLD, v_NLD, probs]
        ctx.save_for_backward(cos, sin, *saved)
        ctx.settings = (heads, kv_heads, scale, grids)
        return out.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        cos, sin, *saved = ctx.saved_tensors
        heads, kv_heads, scale, grids = ctx.settings
        group = heads // kv_heads
        dout = dout.unflatten(-1, (heads, -1))
        dqkv = dout.new_zeros(len(dout), heads + 2 * kv_heads, dout.shape[2])
        for i, grid in enumerate(grids):
            q_NLD, k_NLD, v_NLD, probs = saved[4 * i : 4 * i + 4]
            do_NLD = _to_grid(dout[grid.tokens], grid, 1)
            dprobs = torch.bmm(do_NLD, v_NLD.transpose(1, 2))
            dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
            dq, dk, dv = dqkv[grid.tokens].split([heads, kv_heads, kv_heads], dim=1)
            dq.copy_(_from_grid(torch.bmm(dscores, k_NLD), grid, heads, 1))
            dk.copy_(_from_grid(torch.bmm(dscores.transpose(1, 2), q_NLD), grid, heads, group))
            dv.copy_(_from_grid(torch.bmm(probs.transpose(1, 2), do_NLD), grid, heads, group))
        turned = dqkv[:, :-kv_heads]
        turned.copy_(
            rotate(turned.float(), cos * scale, sin * -scale)
        )  # a rotation's transpose is the rotation backwards
        return dqkv, None, None, None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of [..., D] in the half-split layout of Hugging Face checkpoints;
    ``cos`` and ``sin`` broadcast to it."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _to_grid(x_TGD: Tensor, grid: Grid, group: int) -> Tensor:
    """[T, G, D] -> [B * G * group, L, D], 0 where no token lies; every head ``group`` times."""
    out = x_TGD.new_zeros(grid.batch, x_TGD.shape[1], grid.longest, x_TGD.shape[2])
    out[grid.row_T, :, grid.place_T] = x_TGD
    if group > 1:
        out = out.repeat_interleave(group, dim=1)
    return out.flatten(0, 1)


def _from_grid(x_NLD: Tensor, grid: Grid, heads: int, group: int) -> Tensor:
    """The way back: [B * heads, L, D] -> [T, heads / group, D], sums over the copies of a head."""
    x = x_NLD.unflatten(0, (grid.batch, heads))
    if group > 1:
        x = x.unflatten(1, (-1, group)).sum(2)
    return x[grid.row_T, :, grid.place_T]
