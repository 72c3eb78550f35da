"""Llama-family models by Keel's own forward pass, on the trainer's own parameters.

``Weights`` names a model's tensors (in float32 nothing is copied but what LoRA adds). ``Decoder`` runs the layers over
a key-value cache whose rows are the slots of the embedded sampler.

Shape suffixes besides those of ``keel.types``: ``S`` slots; ``W`` the columns of the cache that a step reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keel.model.fused import rotate
from keel.model.packed import inner_model

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # the others depend on the length of the sequence
COLUMNS = 16  # the cache grows in multiples of this,
ROWS = 8  # prefills are padded and batches shrink to multiples of this: each new shape of a matrix product costs oneDNN
# about half a millisecond to prepare, the time of the product itself in a small model


# ------------------------------------------------------------------------------------------------- parameters


def why_unsupported(model: nn.Module) -> str:
    """Why the embedded sampler cannot run ``model``, or an empty string when it can."""
    inner: Any = inner_model(model)
    if type(inner).__name__ not in ARCHITECTURES:
        return f"{type(inner).__name__} is not one of {', '.join(ARCHITECTURES)}"
    config = inner.config
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return f"its sliding window of {window} is shorter than its context"
    if config.rope_parameters["rope_type"] not in FIXED_ROPE:
        return f"its rotary embedding is of the type {config.rope_parameters['rope_type']}"
    if type(inner.model.embed_tokens) is not nn.Embedding:
        return f"its embedding is a {type(inner.model.embed_tokens).__name__}"
    linears = [inner.lm_head]
    for layer in inner.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        linears += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return next((f"it has a {type(m).__name__} of an unknown kind" for m in linears if not _is_readable(m)), "")


def _is_readable(module: Any) -> bool:
    """A plain linear layer, or one with plain LoRA (no DoRA or other variant, no bias of its own)."""
    if type(module) is nn.Linear:
        return True
    plain_lora = hasattr(module, "get_delta_weight") and type(getattr(module, "base_layer", None)) is nn.Linear
    return plain_lora and not module.lora_variant and not any(module.lora_bias.values())


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(module: Any, dtype: torch.dtype) -> Linear:
        base = getattr(module, "base_layer", module)
        weight = base.weight
        if base is not module and not module.disable_adapters and not module.merged:
            for adapter in module.active_adapters:
                if adapter in module.lora_A:
                    weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
        return Linear(weight.to(dtype), None if base.bias is None else base.bias.to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class NormLinear:
    """Linear layers that read the same RMS norm, their outputs side by side. Weights that must be cast are copies
    anyway: they are laid together, with the norm's own weights multiplied in (``norm`` is None then)."""

    norm: Tensor | None
    parts: tuple[Linear, ...]
    dtype: torch.dtype
    eps: float

    @staticmethod
    def of(norm: Tensor, modules: Sequence[Any], dtype: torch.dtype, eps: float) -> NormLinear:
        parts = tuple(Linear.of(module, norm.dtype) for module in modules)
        if norm.dtype == dtype:
            return NormLinear(norm, parts, dtype, eps)
        weight = torch.cat([part.weight for part in parts]).mul_(norm).to(dtype)
        biases = [part.bias for part in parts if part.bias is not None]
        return NormLinear(None, (Linear(weight, torch.cat(biases).to(dtype) if biases else None),), dtype, eps)

    def __call__(self, x: Tensor) -> Tensor:
        h = normed(x, self.norm, self.eps).to(self.dtype)
        return self.parts[0](h) if len(self.parts) == 1 else torch.cat([part(h) for part in self.parts], -1)


@dataclass(frozen=True, slots=True)
class Layer:
    qkv: NormLinear
    q_norm: Tensor | None  # Qwen3: RMS norm of each head
    k_norm: Tensor | None
    o: Linear
    gate_up: NormLinear
    down: Linear

    @staticmethod
    def of(module: Any, dtype: torch.dtype, eps: float) -> Layer:
        attention, mlp = module.self_attn, module.mlp
        has_norms = hasattr(attention, "q_norm")
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        return Layer(
            qkv=NormLinear.of(module.input_layernorm.weight, projections, dtype, eps),
            q_norm=attention.q_norm.weight.float() if has_norms else None,
            k_norm=attention.k_norm.weight.float() if has_norms else None,
            o=Linear.of(attention.o_proj, dtype),
            gate_up=NormLinear.of(module.post_attention_layernorm.weight, (mlp.gate_proj, mlp.up_proj), dtype, eps),
            down=Linear.of(mlp.down_proj, dtype),
        )


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's parameters, those of the matrix products in ``dtype``; read anew for each call of ``generate``."""

    embedding_VH: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Linear
    act: Callable[[Tensor], Tensor]
    eps: float
    scale: float
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @staticmethod
    def of(model: nn.Module, dtype: torch.dtype) -> Weights:
        inner: Any = inner_model(model)
        attention, eps = inner.model.layers[0].self_attn, inner.config.rms_norm_eps
        return Weights(
            embedding_VH=inner.model.embed_tokens.weight,
            layers=tuple(Layer.of(layer, dtype, eps) for layer in inner.model.layers),
            norm=inner.model.norm.weight.float(),
            # The head stays in float32, as in the trainer's log-probabilities (keel.model.logprobs).
            head=Linear.of(inner.lm_head, torch.float32),
            act=inner.model.layers[0].mlp.act_fn,
            eps=eps,
            scale=attention.scaling,
            heads=inner.config.num_attention_heads,
            kv_heads=inner.config.num_key_value_heads,
            head_dim=attention.head_dim,
            dtype=dtype,
        )


# ------------------------------------------------------------------------------------------------- forward pass


class Decoder:
    """The forward pass over a cache of ``slots`` rows: ``prefill`` fills rows, ``step`` reads one token a row.

    The cache of a layer is [2, S, kv_heads, capacity, head_dim], keys and values. The capacity follows the longest
    sequence, a few columns at a time, and a step reads all of it: a CPU's batched products over a part of a cache cost
    more than copying the whole now and then.
    """

    def __init__(self, model: nn.Module, weights: Weights, slots: int, context: int) -> None:
        self.w = weights
        device = self.w.embedding_VH.device
        positions = torch.arange(context, device=device)[None]
        cos, sin = inner_model(model).model.rotary_emb(torch.zeros(1, device=device), positions)  # type: ignore[operator, union-attr]
        self.cos, self.sin = cos[0], sin[0]  # [context, head_dim]
        self.capacity = 0
        shape = (2, slots, self.w.kv_heads, 0, self.w.head_dim)
        self.caches = [torch.zeros(shape, dtype=weights.dtype, device=device) for _ in self.w.layers]

    def reserve(self, columns: int) -> None:
        """Room for ``columns`` tokens in each row."""
        if columns <= self.capacity:
            return
        self.capacity = round_up(columns, COLUMNS)
        self.caches = [F.pad(cache, (0, 0, 0, self.capacity - cache.shape[3])) for cache in self.caches]

    def keep(self, rows: Tensor) -> None:
        """Drops the other rows."""
        self.caches = [cache[:, rows] for cache in self.caches]

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int], source: Sequence[int]) -> None:
        """Computes the keys and values of ``prompts`` once each, and writes those of ``prompts[source[i]]`` to row
        ``slots[i]``. The prompts are padded on the right: the causal mask keeps real tokens from seeing the padding,
        and a step does not look beyond its own position."""
        w, device = self.w, self.cos.device
        longest = max(map(len, prompts))
        if longest == 0:
            return
        longest = min(round_up(longest, ROWS), self.cos.shape[0])
        self.reserve(longest)
        padded = [[*p, *[0] * (longest - len(p))] for p in prompts]
        padded += [[0] * longest] * (round_up(len(padded), ROWS) - len(padded))
        ids = torch.tensor(padded, device=device)
        rows, from_rows = torch.tensor(slots, device=device), torch.tensor(source, device=device)
        cos, sin = self.cos[:longest, None], self.sin[:longest, None]
        x = F.embedding(ids, w.embedding_VH).float()
        for i, layer in enumerate(w.layers):
            q, kv = self._qkv(layer, x, cos, sin)  # [U, L, heads, head_dim], [2, U, L, kv_heads, head_dim]
            kv = kv.transpose(2, 3)
            self.caches[i][:, rows, :, :longest] = kv[:, from_rows].to(self.caches[i].dtype)
            if i + 1 == len(w.layers):
                break  # nobody reads the last layer's output: the prompt's last token goes through `step`
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), kv[0], kv[1], is_causal=True, scale=w.scale, enable_gqa=w.heads != w.kv_heads
            )
            x = self._after_attention(layer, x, out.transpose(1, 2).flatten(2))

    def step(self, tokens_S: Tensor, positions_S: Tensor, columns: int) -> Tensor:
        """Logits [S, V] float32 after one more token a row. ``columns``: more than the largest position."""
        self.reserve(columns)
        if columns <= self.capacity - 2 * COLUMNS:  # the long ones are done
            self.capacity = round_up(columns, COLUMNS)
            self.caches = [cache[:, :, :, : self.capacity].contiguous() for cache in self.caches]
        w, S, device = self.w, tokens_S.shape[0], tokens_S.device
        W = self.capacity
        cos, sin = self.cos[positions_S, None], self.sin[positions_S, None]
        hidden = torch.arange(W, device=device) > positions_S[:, None]
        bias_S1W = torch.zeros(S, 1, W, device=device).masked_fill_(hidden[:, None], float("-inf"))
        # Where this token's keys and values go, in a cache of rows of head_dim.
        rows = torch.arange(2 * S * w.kv_heads, device=device).view(2, S, w.kv_heads) * self.capacity
        rows = (rows + positions_S[:, None]).flatten()
        x = F.embedding(tokens_S, w.embedding_VH).float()
        for layer, cache in zip(w.layers, self.caches, strict=True):
            q, kv = self._qkv(layer, x, cos, sin)  # [S, heads, head_dim], [2, S, kv_heads, head_dim]
            cache.view(-1, w.head_dim).index_copy_(0, rows, kv.view(-1, w.head_dim).to(cache.dtype))
            keys, values = cache.flatten(1, 2)
            q = q.view(S * w.kv_heads, w.heads // w.kv_heads, w.head_dim).to(cache.dtype)
            scores = torch.bmm(q, keys.transpose(1, 2)).view(S, w.heads, W)
            probs = torch.softmax(torch.add(bias_S1W, scores, alpha=w.scale), -1).to(cache.dtype)
            out = torch.bmm(probs.view(S * w.kv_heads, -1, W), values)
            x = self._after_attention(layer, x, out.view(S, w.heads * w.head_dim))
        return w.head(normed(x, w.norm, w.eps))

    def _qkv(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x: [..., H] -> q [..., heads, head_dim], keys and values [2, ..., kv_heads, head_dim], with rotary positions,
        float32."""
        w = self.w
        qkv = layer.qkv(x).unflatten(-1, (-1, w.head_dim)).float()
        qk, v = qkv[..., : -w.kv_heads, :], qkv[..., -w.kv_heads :, :]
        if layer.q_norm is not None:
            q, k = qk[..., : w.heads, :], qk[..., w.heads :, :]
            qk = torch.cat([normed(q, layer.q_norm, w.eps), normed(k, layer.k_norm, w.eps)], -2)
        qk = rotate(qk, cos, sin)
        return qk[..., : w.heads, :].contiguous(), torch.stack([qk[..., w.heads :, :], v])

    def _after_attention(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer; ``x`` is overwritten."""
        x += layer.o(attended.to(self.w.dtype))
        gate, up = layer.gate_up(x).chunk(2, -1)
        x += layer.down(self.w.act(gate).mul_(up))
        return x


def normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm (Zhang and Sennrich 2019) in few operations: x / sqrt(mean(x^2) + eps), times ``weight``."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    h = x * length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return h if weight is None else h.mul_(weight)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
