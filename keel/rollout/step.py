"""One decoding step of a Llama-family model, in functions that TorchScript compiles.

A step is some 150 operations of a few microseconds each. Run one by one from Python, half of the time goes into Python,
and threads wait for each other's interpreter lock between any two; compiled, a step is one call that needs neither.
(torch names torch.compile as TorchScript's successor, but that needs a C++ compiler and most of a minute.)

Everything here also runs as plain Python: prefill does, and the tests compare the two.

Shape suffixes besides those of ``keel.types``: ``S`` slots; ``W`` the columns of the cache.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from keel.model.fused import inverse_rms, rotate


class Linear(NamedTuple):
    """A linear layer's weights, or those of several that read the same input, whose outputs stand side by side."""

    weights: list[Tensor]  # of a CPU's compiled steps one, as ``keel.kernels.matmul`` packs it
    biases: list[Tensor]  # none, or one for each weight
    outputs: int


class Layer(NamedTuple):
    norm: Tensor | None  # None: multiplied into the weights of ``qkv``
    qkv: Linear
    q_norm: Tensor | None  # Qwen3: RMS norm of each head
    k_norm: Tensor | None
    o: Linear
    norm_mlp: Tensor | None
    gate_up: Linear
    down: Linear


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    eps: float


def decode(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor,
    bias_S1W: Tensor,
    layers: list[Layer],
    caches: list[Tensor],
    low: torch.dtype,
    shape: Shape,
) -> Tensor:
    """Embeddings [S, H] float32 of a token a slot -> hidden states before the final norm. Writes the token's keys and
    values into the caches ([2, S, kv_heads, W, head_dim]) at ``rows`` of head_dim each; ``bias_S1W`` hides what is not
    filled. Matrix products in ``low``."""
    S = x.shape[0]
    for i, layer in enumerate(layers):
        cache = caches[i]
        W = cache.shape[3]
        q, kv = project(x, cos, sin, layer, low, shape)
        cache.view(-1, shape.head_dim).index_copy_(0, rows, kv.view(-1, shape.head_dim).to(cache.dtype))
        q = q.contiguous().view(S * shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim).to(cache.dtype)
        keys, values = cache[0].flatten(0, 1), cache[1].flatten(0, 1)
        scores = torch.bmm(q, keys.transpose(1, 2)).view(S, shape.heads, W)
        probs = torch.softmax(torch.add(bias_S1W, scores, alpha=shape.scale), -1).to(cache.dtype)
        out = torch.bmm(probs.view(S * shape.kv_heads, -1, W), values)
        x = after_attention(x, out.view(S, shape.heads * shape.head_dim), layer, low, shape)
    return x


def project(x: Tensor, cos: Tensor, sin: Tensor, layer: Layer, low: torch.dtype, shape: Shape) -> tuple[Tensor, Tensor]:
    """x: [..., H] -> q [..., heads, head_dim], keys and values [2, ..., kv_heads, head_dim], with rotary positions;
    float32."""
    qkv = linear(normed(x, layer.norm, shape.eps).to(low), layer.qkv).unflatten(-1, [-1, shape.head_dim]).float()
    qk = qkv.narrow(-2, 0, shape.heads + shape.kv_heads)
    v = qkv.narrow(-2, shape.heads + shape.kv_heads, shape.kv_heads)
    if layer.q_norm is not None:
        q, k = qk.narrow(-2, 0, shape.heads), qk.narrow(-2, shape.heads, shape.kv_heads)
        qk = torch.cat([normed(q, layer.q_norm, shape.eps), normed(k, layer.k_norm, shape.eps)], -2)
    turned = rotate(qk, cos, sin)
    return turned.narrow(-2, 0, shape.heads), torch.stack([turned.narrow(-2, shape.heads, shape.kv_heads), v])


def after_attention(x: Tensor, attended: Tensor, layer: Layer, low: torch.dtype, shape: Shape) -> Tensor:
    """The rest of a layer. ``x`` is overwritten."""
    x += linear(attended.to(low), layer.o)
    gate, up = linear(normed(x, layer.norm_mlp, shape.eps).to(low), layer.gate_up).chunk(2, -1)
    x += linear(F.silu(gate).mul_(up), layer.down)
    return x


def linear(x: Tensor, layer: Linear) -> Tensor:
    outputs: list[Tensor] = []
    for i, weight in enumerate(layer.weights):
        outputs.append(F.linear(x, weight, layer.biases[i] if len(layer.biases) > 0 else None))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm: x / sqrt(mean(x^2) + eps), times ``weight``."""
    h = x * inverse_rms(x, eps)
    return h if weight is None else h.mul_(weight)
