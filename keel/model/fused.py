"""The decoder layers of Llama-family models as a few large operations with backward passes of their own, for training
on a CPU.

transformers' layers run some sixty small operations each, autograd and autocast as many again: in a small model these
passes over memory cost more than the matrix products. Here a layer is six operations:

    qkv = NormLinear(x, q, k, v);      attended = Attend(qkv);         x = AddLinear(x, attended, o)
    gate, up = NormLinear(x, gate, up); activated = Swiglu(gate, up);  x = AddLinear(x, activated, down)

The last layer's second half runs only for the tokens that somebody asks for.

The numbers are transformers' own to rounding, values and gradients (tests/test_fused.py compares them with the padded
reference). In bfloat16 the residual stream, the norms and the rotary positions stay in float32, as under autocast.

What looks roundabout has one reason: a pass over a tensor is fast where its innermost dimension is long and contiguous
(three to ten times, measured). So gate and up are tensors of their own, tokens move to attention's grids and back as
whole rows, and rotary positions are one complex product.

Shape suffixes besides those of ``keel.types``: ``O`` outputs of a product; ``D`` width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
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
    """Some of the tokens laid out as [B, L] for attention's products: those of ``tokens``, which lie at ``cells_T`` of
    the flattened grid. ``bias`` ([1 or B * heads, L, L], 0 or -inf) says which keys (last) a query sees. Cells past a
    row's tokens hold some token's numbers: no real query sees them, and they get no gradient."""

    tokens: slice
    cells_T: Tensor
    batch: int
    longest: int
    bias: Tensor
    heads: int
    kv_heads: int

    @cached_property
    def query_rows(self) -> Tensor:
        """[B * heads * L]: for every cell of every head its row in queries and keys side by side [T, heads + kv, D]."""
        return self._rows(self.heads + self.kv_heads, torch.arange(self.heads))

    @cached_property
    def key_rows(self) -> Tensor:
        return self._rows(self.heads + self.kv_heads, self.heads + self._kv_head)

    @cached_property
    def value_rows(self) -> Tensor:
        """The same, in queries, keys and values side by side [T, heads + 2 * kv, D]."""
        return self._rows(self.heads + 2 * self.kv_heads, self.heads + self.kv_heads + self._kv_head)

    @cached_property
    def out_rows(self) -> Tensor:
        """The same, in [T, heads, D]."""
        return self._rows(self.heads, torch.arange(self.heads))

    @cached_property
    def cell_rows(self) -> Tensor:
        """[T * heads]: the way back, each token's row in [B * heads, L, D]."""
        row_T, place_T = self.cells_T // self.longest, self.cells_T % self.longest
        head = torch.arange(self.heads)
        return ((row_T[:, None] * self.heads + head) * self.longest + place_T[:, None]).flatten()

    @cached_property
    def spare_rows(self) -> Tensor:
        """Rows of [B * heads, L, D] that hold no token."""
        spare = torch.ones(self.batch * self.heads * self.longest, dtype=torch.bool)
        spare[self.cell_rows] = False
        return spare.nonzero().squeeze(1)

    @property
    def _kv_head(self) -> Tensor:
        return torch.arange(self.heads) // (self.heads // self.kv_heads)

    def _rows(self, width: int, column: Tensor) -> Tensor:
        token = torch.zeros(self.batch * self.longest, dtype=torch.int64)
        token[self.cells_T] = torch.arange(len(self.cells_T))
        return (token.view(self.batch, 1, self.longest) * width + column[:, None]).flatten()

    def lay_out(self, x_TGD: Tensor, rows: Tensor) -> Tensor:
        """[T, G, D] -> [B * heads, L, D]"""
        flat = x_TGD[self.tokens].flatten(0, 1).index_select(0, rows)
        return flat.view(self.batch * self.heads, self.longest, -1)

    def take_back(self, x_NLD: Tensor, kv: bool = False) -> Tensor:
        """[B * heads, L, D] -> [T, heads, D]; with ``kv`` [T, kv_heads, D], sums over the heads that share one."""
        x = x_NLD.flatten(0, 1).index_select(0, self.cell_rows).view(-1, self.heads, x_NLD.shape[2])
        return x.unflatten(1, (self.kv_heads, -1)).sum(2) if kv and self.kv_heads < self.heads else x


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021) as complex factors [T, heads + kv_heads, D / 2] of :func:`interleaved` queries
    and keys side by side: exp(i * angle), times the attention's scale for queries. ``back``: their conjugates."""

    factors: Tensor
    back: Tensor

    @staticmethod
    def of(cos_TD: Tensor, sin_TD: Tensor, heads: int, kv_heads: int, scale: float) -> Rotary:
        """Of tables in the half-split layout of Hugging Face checkpoints, where both halves are alike."""
        half = cos_TD.shape[1] // 2
        turns = torch.complex(cos_TD[:, :half], sin_TD[:, :half])[:, None]
        factors = torch.cat([(turns * scale).expand(-1, heads, -1), turns.expand(-1, kv_heads, -1)], 1)
        return Rotary(factors, factors.conj().resolve_conj())


def turn(x_TGD: Tensor, factors: Tensor) -> Tensor:
    """:class:`Rotary` factors applied, in float32."""
    y = x_TGD.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    torch.view_as_complex(y.unflatten(-1, (-1, 2))).mul_(factors)
    return y


def interleaved(x: Tensor, dim: int, width: int) -> Tensor:
    """Heads of ``width`` along ``dim``, (0, 1, 2, ...) -> (0, w/2, 1, w/2 + 1, ...): the two numbers that a rotary
    position turns are then neighbours. Products of queries and keys do not see the order."""
    return x.unflatten(dim, (-1, 2, width // 2)).transpose(dim + 1, dim + 2).flatten(dim, dim + 2)


def deinterleaved(x: Tensor, dim: int, width: int) -> Tensor:
    """:func:`interleaved` undone."""
    return x.unflatten(dim, (-1, width // 2, 2)).transpose(dim + 1, dim + 2).flatten(dim, dim + 2)


Attention = Callable[[nn.Module, Tensor, Rotary], Tensor]
"""(transformers' attention module, queries, keys and values side by side before rotary positions, queries and keys
interleaved, [T, heads + 2 * kv_heads, D], their positions) -> [T, heads * D]"""


def run_layers(
    decoder: Any, x_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor, attention: Attention, wanted_W: Tensor | None = None
) -> Tensor:
    """The decoder's layers over a row of tokens: embeddings [T, H] -> hidden states before the final norm, of all
    tokens [T, H] or of the ``wanted`` places [W, H]; float32. Matrix products run in autocast's precision where it is
    on. ``x_TH`` may be overwritten."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    recompute = decoder.gradient_checkpointing and decoder.training and torch.is_grad_enabled()
    block = decoder.layers[0].self_attn
    rotary = Rotary.of(cos_TD, sin_TD, *head_counts(block), block.scaling)
    with torch.autocast("cpu", enabled=False):
        for layer in decoder.layers:
            wanted = wanted_W if layer is decoder.layers[-1] else None
            if recompute:
                x_TH = checkpoint(_layer, layer, x_TH, rotary, attention, wanted, dtype, False, use_reentrant=False)
            else:
                x_TH = _layer(layer, x_TH, rotary, attention, wanted, dtype, True)
    return x_TH


def head_counts(block: Any) -> tuple[int, int]:
    """(query heads, key and value heads) of transformers' attention module."""
    return block.q_proj.out_features // block.head_dim, block.k_proj.out_features // block.head_dim


def _layer(
    layer: Any,
    x: Tensor,
    rotary: Rotary,
    attention: Attention,
    wanted: Tensor | None,
    dtype: torch.dtype,
    overwrite: bool,
) -> Tensor:
    block, mlp = layer.self_attn, layer.mlp
    projections, normed_heads = (block.q_proj, block.k_proj, block.v_proj), hasattr(block, "q_norm")
    width = 0 if normed_heads else block.head_dim
    (qkv,) = norm_linear(x, layer.input_layernorm, projections, dtype, Plan(False, (width, width, 0)))
    qkv = qkv.unflatten(-1, (-1, block.head_dim))
    if normed_heads:  # Qwen3
        heads, kv_heads = head_counts(block)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        q, k = (interleaved(h.to(dtype), 2, block.head_dim) for h in (block.q_norm(q), block.k_norm(k)))
        qkv = torch.cat([q, k, v], dim=1)
    attended = attention(block, qkv, rotary)
    if wanted is not None:
        x, attended = x.index_select(0, wanted), attended.index_select(0, wanted)
    x = add_linear(x, attended, block.o_proj, dtype, overwrite)
    gate, up = norm_linear(x, layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), dtype, Plan(True, (0, 0)))
    return add_linear(x, Swiglu.apply(gate, up), mlp.down_proj, dtype, True)


@dataclass(frozen=True)
class Plan:
    """What :class:`NormLinear` makes of its weights: outputs ``apart``, or side by side; a weight's as
    :func:`interleaved` heads of the width in ``interleaved``, or as they are where that is 0."""

    apart: bool
    interleaved: tuple[int, ...]


def norm_linear(
    x_TH: Tensor, norm: Any, linears: Sequence[nn.Linear], dtype: torch.dtype, plan: Plan
) -> tuple[Tensor, ...]:
    """Several linear layers after one RMS norm: [T, H] -> [T, O_1], [T, O_2], ... or ([T, O_1 + O_2 + ...],) in
    ``dtype``."""
    weights, biases = [linear.weight for linear in linears], []
    for linear, width in zip(linears, plan.interleaved, strict=True):
        if linear.bias is not None:
            biases.append(interleaved(linear.bias, 0, width) if width else linear.bias)
    bias = torch.cat(biases) if biases else None
    return NormLinear.apply(x_TH, norm.weight, bias, norm.variance_epsilon, dtype, plan, *weights)  # type: ignore[no-any-return]


def add_linear(x_TH: Tensor, a_TI: Tensor, linear: nn.Linear, dtype: torch.dtype, overwrite: bool) -> Tensor:
    """x + linear(a), in place of ``x`` where ``overwrite``."""
    return AddLinear.apply(x_TH, a_TI, linear.weight, linear.bias, dtype, overwrite)


class NormLinear(torch.autograd.Function):
    """y = W (n * x / rms(x)): the norm's weights n go into the product's, which are fewer than the activations.

    With h = x / rms(x):  dx = (dh - h * mean(dh * h)) / rms(x),  dn = sum(dh * h) / n.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        plan: Plan,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        inverse = inverse_rms(x, eps)
        h = torch.mul(x, inverse).to(dtype)
        rows = [w.shape[0] for w in weights]
        weight = torch.empty(sum(rows), x.shape[1], dtype=dtype)
        for piece, w, width in zip(weight.split(rows), weights, plan.interleaved, strict=True):
            piece.copy_(interleaved(w * norm, 0, width) if width else w * norm)
        ctx.save_for_backward(h, inverse, weight, norm, *weights)
        ctx.plan = plan
        low_bias = None if bias is None else bias.to(dtype)
        if not plan.apart:
            return (F.linear(h, weight, low_bias),)
        biases = [None] * len(rows) if low_bias is None else low_bias.split(rows)
        return tuple(F.linear(h, w, b) for w, b in zip(weight.split(rows), biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        h, inverse, weight, norm, *weights = ctx.saved_tensors
        rows = [w.shape[0] for w in weights]
        dx = dnorm = dbias = None
        dweights: Any = [None] * len(weights)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            pieces = weight.split(rows) if ctx.plan.apart else (weight,)
            dh = dys[0] @ pieces[0]
            for dy, piece in zip(dys[1:], pieces[1:], strict=True):
                dh.addmm_(dy, piece)
            both = dh * h
            dx = torch.addcmul(dh, h, _row_means(both).to(h.dtype), value=-1).float().mul_(inverse)
        by_tokens = bool(norm.all())  # else dn by way of W: sum(W * dW)
        if any(ctx.needs_input_grad[6:]) or (ctx.needs_input_grad[1] and not by_tokens):
            products = [dy.t() @ h for dy in dys]
            products = products if ctx.plan.apart else products[0].split(rows)
            dweights = [
                (deinterleaved(product, 0, width) if width else product).float()
                for product, width in zip(products, ctx.plan.interleaved, strict=True)
            ]
        if ctx.needs_input_grad[1]:
            if by_tokens:
                dnorm = both.sum(0, dtype=torch.float32).div_(norm)
            else:
                dnorm = torch.stack([(w * dw).sum(0) for w, dw in zip(weights, dweights, strict=True)]).sum(0)
        dweights = [None if dw is None else dw.mul_(norm) for dw in dweights]
        if ctx.needs_input_grad[2]:
            dbias = torch.cat([dy.sum(0, dtype=torch.float32) for dy in dys])
        return dx, dnorm, dbias, None, None, None, *dweights


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which is kept: an RMS norm's factor (Zhang and Sennrich 2019)
    in few operations."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _row_means(x: Tensor) -> Tensor:
    """[T, 1] float32 means over each row."""
    return x.sum(-1, keepdim=True, dtype=torch.float32).div_(x.shape[-1])


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
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        activated = F.silu(gate)
        ctx.save_for_backward(gate, up, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up, activated = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), activated * dy


class Attend(torch.autograd.Function):
    """Rotary positions and softmax attention, grid after grid.

    qkv: queries, keys and values side by side [T, heads + 2 * kv_heads, D]. -> [T, heads * D], 0 for tokens that lie on
    no grid.

    With S = scores, P = softmax(S):  dV = P' dO,  dP = dO V',  dS = P * (dP - rowsum(dP * P)),  dQ = dS K,  dK = dS' Q.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotary: Rotary, grids: Sequence[Grid]) -> Tensor:  # type: ignore[override]
        heads, kv_heads = grids[0].heads, grids[0].kv_heads
        turned = turn(qkv[:, : heads + kv_heads], rotary.factors).to(qkv.dtype)
        out = qkv.new_empty(len(qkv), heads, qkv.shape[2])
        saved = []
        for grid in grids:
            q_NLD, k_NLD = (grid.lay_out(turned, rows) for rows in (grid.query_rows, grid.key_rows))
            v_NLD = grid.lay_out(qkv, grid.value_rows)
            bias = grid.bias.expand(q_NLD.shape[0], -1, -1)
            probs = torch.softmax(torch.baddbmm(bias, q_NLD, k_NLD.transpose(1, 2)), -1)
            out[grid.tokens] = grid.take_back(torch.bmm(probs, v_NLD))
            saved += [q_NLD, k_NLD, v_NLD, probs]
        out[grids[-1].tokens.stop :] = 0
        ctx.save_for_backward(rotary.back, *saved)
        ctx.grids = grids
        return out.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        back, *saved = ctx.saved_tensors
        grids: Sequence[Grid] = ctx.grids
        heads, kv_heads = grids[0].heads, grids[0].kv_heads
        dout = dout.unflatten(-1, (heads, -1))
        dqkv = dout.new_empty(len(dout), heads + 2 * kv_heads, dout.shape[2])
        for i, grid in enumerate(grids):
            q_NLD, k_NLD, v_NLD, probs = saved[4 * i : 4 * i + 4]
            do_NLD = grid.lay_out(dout, grid.out_rows)
            do_NLD.flatten(0, 1).index_fill_(0, grid.spare_rows, 0)
            dprobs = torch.bmm(do_NLD, v_NLD.transpose(1, 2))
            dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
            dq, dk, dv = dqkv[grid.tokens].split([heads, kv_heads, kv_heads], dim=1)
            dq.copy_(grid.take_back(torch.bmm(dscores, k_NLD)))
            dk.copy_(grid.take_back(torch.bmm(dscores.transpose(1, 2), q_NLD), kv=True))
            dv.copy_(grid.take_back(torch.bmm(probs.transpose(1, 2), do_NLD), kv=True))
        dqkv[grids[-1].tokens.stop :] = 0
        dturned = dqkv[:, : heads + kv_heads]
        dturned.copy_(turn(dturned, back))  # a rotation's transpose is the rotation backwards
        return dqkv, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of [..., D] in the half-split layout of Hugging Face checkpoints;
    ``cos`` and ``sin`` broadcast to it."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
