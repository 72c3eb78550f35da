"""The decoder layers of Llama-family models as a few large operations with backward passes of their own, for training
on a CPU.

transformers' layers run some sixty small operations each, autograd and autocast as many again: in a small model these
passes over memory cost more than the matrix products. Here a layer is six operations:

    x, qkv = NormLinear(x, delta, q, k, v);      delta = Linear(Attend(qkv), o)
    x, gate, up = NormLinear(x, delta, gate, up);  delta = Linear(Swiglu(gate, up), down)

What a half layer adds to the residual stream (``delta``) is added by the next norm, which reads the stream anyway, and
on the way back the norm hands out the stream's gradient in both precisions. The last layer's second half runs only for
the tokens that somebody asks for. What happens between the products is in ``keel.kernels.plain``.

The numbers are transformers' own to rounding, values and gradients (tests/test_fused.py compares them with the padded
reference). In bfloat16 the residual stream, the norms and the rotary positions stay in float32, as under autocast.

Shape suffixes besides those of ``keel.types``: ``O`` outputs of a product; ``D`` width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from keel.kernels.dispatch import passes
from keel.kernels.plain import Grid, Rotary
from keel.kernels.plain import inverse_rms as inverse_rms

DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
WINDOWS: dict[str, Callable[[Any], int | None]] = {  # where each takes its window from, whatever else its config says
    "LlamaAttention": lambda block: None,
    "MistralAttention": lambda block: block.config.sliding_window,
    "Qwen2Attention": lambda block: block.sliding_window,
    "Qwen3Attention": lambda block: block.sliding_window,
}


def window(block: Any) -> int | None:
    """How many tokens a query of transformers' attention module sees, its own the last of them; None: all."""
    return WINDOWS[type(block).__name__](block)


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


Attention = Callable[[nn.Module, Tensor, Rotary], Tensor]
"""(transformers' attention module, queries, keys and values side by side before rotary positions
[T, heads + 2 * kv_heads, D], their positions) -> [T, heads * D]"""


def run_layers(
    decoder: Any, x_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor, attention: Attention, wanted_W: Tensor | None = None
) -> Tensor:
    """The decoder's layers over a row of tokens: embeddings [T, H] -> hidden states before the final norm, of all
    tokens [T, H] or of the ``wanted`` places [W, H]; float32. Matrix products run in autocast's precision where it is
    on. ``x_TH`` may be overwritten."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    recompute = decoder.gradient_checkpointing and decoder.training and torch.is_grad_enabled()
    rotary, delta = Rotary.of(cos_TD, sin_TD), None
    with torch.autocast("cpu", enabled=False):
        for layer in decoder.layers:
            wanted = wanted_W if layer is decoder.layers[-1] else None
            inputs = (layer, x_TH, delta, rotary, attention, wanted, dtype)
            if recompute:
                x_TH, delta = checkpoint(_layer, *inputs, False, use_reentrant=False)
            else:
                x_TH, delta = _layer(*inputs, True)
        assert delta is not None, "a decoder has layers"
        return x_TH + delta


def head_counts(block: Any) -> tuple[int, int]:
    """(query heads, key and value heads) of transformers' attention module."""
    return block.q_proj.out_features // block.head_dim, block.k_proj.out_features // block.head_dim


def _layer(
    layer: Any,
    x: Tensor,
    delta: Tensor | None,
    rotary: Rotary,
    attention: Attention,
    wanted: Tensor | None,
    dtype: torch.dtype,
    overwrite: bool,
) -> tuple[Tensor, Tensor]:
    block, mlp = layer.self_attn, layer.mlp
    projections = (block.q_proj, block.k_proj, block.v_proj)
    x, qkv = norm_linear(x, delta, layer.input_layernorm, projections, dtype, False, overwrite)
    qkv = qkv.unflatten(-1, (-1, block.head_dim))
    if hasattr(block, "q_norm"):  # Qwen3
        heads, kv_heads = head_counts(block)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        qkv = torch.cat([block.q_norm(q).to(dtype), block.k_norm(k).to(dtype), v], dim=1)
    attended = attention(block, qkv, rotary)
    if wanted is not None:
        x, attended = x.index_select(0, wanted), attended.index_select(0, wanted)
    delta = linear(attended, block.o_proj, dtype)
    norm, inputs = layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)
    x, gate, up = norm_linear(x, delta, norm, inputs, dtype, True, overwrite)
    return x, linear(Swiglu.apply(gate, up), mlp.down_proj, dtype)


def norm_linear(
    x_TH: Tensor,
    delta_TH: Tensor | None,
    norm: Any,
    linears: Sequence[nn.Linear],
    dtype: torch.dtype,
    apart: bool,
    overwrite: bool,
) -> tuple[Tensor, ...]:
    """x + delta, in place of ``x`` where ``overwrite``, and several linear layers of its RMS norm:
    [T, H] -> [T, H], [T, O_1], [T, O_2], ... or, if not ``apart``, [T, H], [T, O_1 + O_2 + ...], in ``dtype``."""
    weights = [linear.weight for linear in linears]
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    eps = norm.variance_epsilon
    return NormLinear.apply(x_TH, delta_TH, norm.weight, bias, eps, dtype, apart, overwrite, *weights)  # type: ignore[no-any-return]


def linear(a_TI: Tensor, linear: nn.Linear, dtype: torch.dtype) -> Tensor:
    """A linear layer in ``dtype``."""
    return Linear.apply(a_TI, linear.weight, linear.bias, dtype)


class NormLinear(torch.autograd.Function):
    """x += delta;  y = W (n * x / rms(x)): the norm's weights n go into the product's, which are fewer than the
    activations.

    With h = x / rms(x):  dx += (dh - h * mean(dh * h)) / rms(x),  dn = sum(dh * h) / n.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        norm: Tensor,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        apart: bool,
        overwrite: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        if overwrite:  # nobody's backward pass needs x: the norms keep h
            ctx.mark_dirty(x)
        else:
            x = x.clone()
        h, inverse = passes().add_norm(x, delta, eps, dtype)
        rows = [w.shape[0] for w in weights]
        weight = torch.empty(sum(rows), x.shape[1], dtype=dtype)
        for piece, w in zip(weight.split(rows), weights, strict=True):
            torch.mul(w, norm, out=piece)
        ctx.save_for_backward(h, inverse, weight, norm, *weights)
        ctx.apart = apart
        ctx.set_materialize_grads(False)
        low_bias = None if bias is None else bias.to(dtype)
        if not apart:
            return x, F.linear(h, weight, low_bias)
        biases = [None] * len(rows) if low_bias is None else low_bias.split(rows)
        return x, *(F.linear(h, w, b) for w, b in zip(weight.split(rows), biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, residual: Tensor | None, *dys: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        h, inverse, weight, norm, *weights = ctx.saved_tensors
        rows = [w.shape[0] for w in weights]
        dx = low = dnorm = dbias = None
        dweights: Any = [None] * len(weights)
        if any(ctx.needs_input_grad[:3]):
            pieces = weight.split(rows) if ctx.apart else (weight,)
            dh = dys[0] @ pieces[0]
            for dy, piece in zip(dys[1:], pieces[1:], strict=True):
                dh.addmm_(dy, piece)
            dx, low, sums = passes().norm_backward(residual, dh, h, inverse)
        by_tokens = bool(norm.all())  # else dn by way of W: sum(W * dW)
        if any(ctx.needs_input_grad[8:]) or (ctx.needs_input_grad[2] and not by_tokens):
            products = [dy.t() @ h for dy in dys]
            dweights = products if ctx.apart else products[0].split(rows)
        if ctx.needs_input_grad[2]:
            if by_tokens:
                dnorm = sums.div_(norm)
            else:
                dnorm = torch.stack([(w * dw).sum(0) for w, dw in zip(weights, dweights, strict=True)]).sum(0)
        dweights = [None if dw is None else dw * norm for dw in dweights]
        if ctx.needs_input_grad[3]:
            dbias = torch.cat([dy.sum(0, dtype=torch.float32) for dy in dys])
        return dx, low if ctx.needs_input_grad[1] else None, dnorm, dbias, *[None] * 4, *dweights


class Linear(torch.autograd.Function):
    """y = W a + b."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, a: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        low = weight.to(dtype)
        ctx.save_for_backward(a, low)
        return F.linear(a, low, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        a, weight = ctx.saved_tensors
        da = dy @ weight if ctx.needs_input_grad[0] else None
        dweight = (dy.t() @ a).float() if ctx.needs_input_grad[1] else None
        dbias = dy.sum(0, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        return da, dweight, dbias, None


class Swiglu(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return passes().swiglu(gate, up)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return passes().swiglu_backward(dy, *ctx.saved_tensors)  # type: ignore[no-any-return]


class Attend(torch.autograd.Function):
    """Rotary positions and softmax attention, grid after grid.

    qkv: queries, keys and values side by side [T, heads + 2 * kv_heads, D]. -> [T, heads * D], 0 for tokens that lie on
    no grid.

    With S = scores, P = softmax(S):  dV = P' dO,  dP = dO V',  dS = P * (dP - rowsum(dP * P)),  dQ = dS K,  dK = dS' Q.
    The queries of the heads that share keys and values lie one behind another: [B * kv_heads, heads / kv_heads * L, D].
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, qkv: Tensor, rotary: Rotary, scale: float, grids: Sequence[Grid]
    ) -> Tensor:
        ctx.grids, ctx.rotary, ctx.scale = grids, rotary, scale
        heads, kv_heads = grids[0].heads, grids[0].kv_heads
        q_columns, k_columns, v_columns = _columns(heads, kv_heads)
        out = qkv.new_empty(len(qkv), heads, qkv.shape[2])
        saved = []
        for grid in grids:
            q = passes().to_grid(qkv, grid, q_columns, rotary, scale).view(grid.batch * kv_heads, -1, qkv.shape[2])
            k = passes().to_grid(qkv, grid, k_columns, rotary)
            v = passes().to_grid(qkv, grid, v_columns)
            probs = passes().softmax_(torch.bmm(q, k.transpose(1, 2)), grid)
            attended = torch.bmm(probs, v).view(grid.batch * heads, grid.longest, -1)
            passes().from_grid(attended, grid, q_columns, out, None, 1.0)
            saved += [q, k, v, probs]
        out[int(grids[-1].begin_B[-1]) :] = 0
        ctx.save_for_backward(*saved)
        return out.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        saved, grids, rotary = ctx.saved_tensors, ctx.grids, ctx.rotary
        heads, kv_heads = grids[0].heads, grids[0].kv_heads
        q_columns, k_columns, v_columns = _columns(heads, kv_heads)
        dout = dout.unflatten(-1, (heads, -1))
        dqkv = dout.new_empty(len(dout), heads + 2 * kv_heads, dout.shape[2])
        for i, grid in enumerate(grids):
            q, k, v, probs = saved[4 * i : 4 * i + 4]
            do = passes().to_grid(dout, grid, q_columns).view_as(q)
            ds = passes().softmax_backward_(torch.bmm(do, v.transpose(1, 2)), probs, grid)
            dq = torch.bmm(ds, k).view(grid.batch * heads, grid.longest, -1)
            passes().from_grid(dq, grid, q_columns, dqkv, rotary, ctx.scale)
            passes().from_grid(torch.bmm(ds.transpose(1, 2), q), grid, k_columns, dqkv, rotary)
            passes().from_grid(torch.bmm(probs.transpose(1, 2), do), grid, v_columns, dqkv)
        dqkv[int(grids[-1].begin_B[-1]) :] = 0
        return dqkv, None, None, None


def _columns(heads: int, kv_heads: int) -> tuple[range, range, range]:
    """Where queries, keys and values lie side by side."""
    values = heads + kv_heads
    return range(heads), range(heads, values), range(values, values + kv_heads)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of [..., D] in the half-split layout of Hugging Face checkpoints;
    ``cos`` and ``sin`` broadcast to it."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
