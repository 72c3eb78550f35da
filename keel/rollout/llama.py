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

from keel.model.packed import inner_model

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # the others depend on the length of the sequence
COLUMNS = 16  # the cache is read in multiples of this,
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
class Layer:
    norm_in: Tensor
    q: Linear
    k: Linear
    v: Linear
    q_norm: Tensor | None  # Qwen3: RMS norm of each head
    k_norm: Tensor | None
    o: Linear
    norm_mlp: Tensor
    gate: Linear
    up: Linear
    down: Linear

    @staticmethod
    def of(module: Any, dtype: torch.dtype) -> Layer:
        attention, mlp = module.self_attn, module.mlp
        normed = hasattr(attention, "q_norm")
        return Layer(
            norm_in=module.input_layernorm.weight.float(),
            q=Linear.of(attention.q_proj, dtype),
            k=Linear.of(attention.k_proj, dtype),
            v=Linear.of(attention.v_proj, dtype),
            q_norm=attention.q_norm.weight.float() if normed else None,
            k_norm=attention.k_norm.weight.float() if normed else None,
            o=Linear.of(attention.o_proj, dtype),
            norm_mlp=module.post_attention_layernorm.weight.float(),
            gate=Linear.of(mlp.gate_proj, dtype),
            up=Linear.of(mlp.up_proj, dtype),
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
        attention = inner.model.layers[0].self_attn
        return Weights(
            embedding_VH=inner.model.embed_tokens.weight,
            layers=tuple(Layer.of(layer, dtype) for layer in inner.model.layers),
            norm=inner.model.norm.weight.float(),
            # The head stays in float32, as in the trainer's log-probabilities (keel.model.logprobs).
            head=Linear.of(inner.lm_head, torch.float32),
            act=inner.model.layers[0].mlp.act_fn,
            eps=inner.config.rms_norm_eps,
            scale=attention.scaling,
            heads=inner.config.num_attention_heads,
            kv_heads=inner.config.num_key_value_heads,
            head_dim=attention.head_dim,
            dtype=dtype,
        )


# ------------------------------------------------------------------------------------------------- forward pass


class Decoder:
    """The forward pass over a cache of ``slots`` rows: ``prefill`` fills rows, ``step`` reads one token a row.

    Keys are kept as [S, kv_heads, head_dim, capacity] and values as [S, kv_heads, capacity, head_dim]: the layouts in
    which the two products of a single query are fastest on a CPU. The capacity grows as sequences do.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, slots: int, context: int) -> None:
        self.w = Weights.of(model, dtype)
        device = self.w.embedding_VH.device
        positions = torch.arange(context, device=device)[None]
        cos, sin = inner_model(model).model.rotary_emb(torch.zeros(1, device=device), positions)  # type: ignore[operator, union-attr]
        self.cos, self.sin = cos[0], sin[0]  # [context, head_dim]
        self.capacity = 0
        shape = (slots, self.w.kv_heads, self.w.head_dim, 0)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in self.w.layers]
        self.values = [key.transpose(2, 3) for key in self.keys]

    def reserve(self, columns: int) -> None:
        """Room for ``columns`` tokens in each row."""
        if columns <= self.capacity:
            return
        # Half as much again, or growing would copy the cache every few steps.
        self.capacity = round_up(max(columns, self.capacity * 3 // 2), COLUMNS)
        for i, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            more = self.capacity - key.shape[3]
            self.keys[i], self.values[i] = F.pad(key, (0, more)), F.pad(value, (0, 0, 0, more))

    def keep(self, rows: Tensor) -> None:
        """Drops the other rows."""
        self.keys = [key[rows] for key in self.keys]
        self.values = [value[rows] for value in self.values]

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
            q, k, v = self._qkv(layer, x, cos, sin)  # [U, L, heads, head_dim]
            self.keys[i][rows, :, :, :longest] = k.permute(0, 2, 3, 1)[from_rows]
            self.values[i][rows, :, :longest] = v.transpose(1, 2)[from_rows]
            if i + 1 == len(w.layers):
                break  # nobody reads the last layer's output: the prompt's last token goes through `step`
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=w.scale,
                enable_gqa=w.heads != w.kv_heads,
            )  # fmt: skip
            x = self._after_attention(layer, x, out.transpose(1, 2).flatten(2))

    def step(self, tokens_S: Tensor, positions_S: Tensor, columns: int) -> Tensor:
        """Logits [S, V] float32 after one more token a row. ``columns``: more than the largest position."""
        self.reserve(columns)
        w, S = self.w, tokens_S.shape[0]
        W = round_up(columns, COLUMNS)  # the capacity is a multiple too
        rows = torch.arange(S, device=tokens_S.device)
        cos, sin = self.cos[positions_S, None], self.sin[positions_S, None]
        hidden = torch.arange(W, device=tokens_S.device) > positions_S[:, None]
        bias_S1W = torch.zeros(S, 1, W, device=tokens_S.device).masked_fill_(hidden[:, None], float("-inf"))
        group = w.heads // w.kv_heads
        x = F.embedding(tokens_S, w.embedding_VH).float()
        for i, layer in enumerate(w.layers):
            q, k, v = self._qkv(layer, x, cos, sin)  # [S, heads, head_dim]
            key, value = self.keys[i], self.values[i]
            key[rows, :, :, positions_S] = k
            value[rows, :, positions_S] = v
            scores = torch.bmm(q.view(S * w.kv_heads, group, w.head_dim), key.flatten(0, 1)[:, :, :W])
            scores = torch.add(bias_S1W, scores.view(S, w.heads, W), alpha=w.scale)
            probs = torch.softmax(scores, -1).to(w.dtype).view(S * w.kv_heads, group, W)
            out = torch.bmm(probs, value.flatten(0, 1)[:, :W])
            x = self._after_attention(layer, x, out.view(S, w.heads * w.head_dim))
        return w.head(self._norm(x, w.norm))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.w.eps)

    def _qkv(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [..., H] -> q [..., heads, head_dim], k and v [..., kv_heads, head_dim], with rotary positions."""
        w = self.w
        h = self._norm(x, layer.norm_in).to(w.dtype)
        q = layer.q(h).unflatten(-1, (w.heads, w.head_dim)).float()
        k = layer.k(h).unflatten(-1, (w.kv_heads, w.head_dim)).float()
        v = layer.v(h).unflatten(-1, (w.kv_heads, w.head_dim))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        return _rotate(q, cos, sin).to(w.dtype), _rotate(k, cos, sin).to(w.dtype), v

    def _after_attention(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        x = x + layer.o(attended)
        h = self._norm(x, layer.norm_mlp).to(self.w.dtype)
        return x + layer.down(self.w.act(layer.gate(h)) * layer.up(h))


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) in the half-split layout of Hugging Face checkpoints."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
