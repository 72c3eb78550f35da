"""Llama-family models by Keel's own forward pass, on the trainer's own parameters.

``Weights`` names a model's tensors, in the form in which products are fastest. ``Decoder`` runs the layers over a
key-value cache whose rows are the slots of the embedded sampler.

Shape suffixes besides those of ``keel.types``: ``S`` slots; ``W`` the columns of the cache that a step reads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keel.kernels.dispatch import products_of
from keel.model.fused import window
from keel.model.merged import is_plain_lora, merged_weight
from keel.model.packed import inner_model
from keel.recipe.sections import SamplingConfig
from keel.rollout.slots import Slots
from keel.rollout.step import Layer, Linear, Shape, after_attention, decode, linear, normed, project
from keel.rollout.tokens import choose

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # the others depend on the length of the sequence
COLUMNS = 16  # the cache grows in multiples of this, because each new shape of a matrix product costs oneDNN about
# half a millisecond to prepare: the time of the product itself in a small model
ROWS = 8  # prefills are padded and batches shrink to multiples of this, for the same reason
JOINED_UP_TO = 2**25  # numbers in weights that a GPU multiplies at once, copied for it: as in a model of 1.7 billion


# ------------------------------------------------------------------------------------------------- parameters


def why_unsupported(model: nn.Module) -> str:
    """Why the embedded sampler cannot run ``model``, or an empty string when it can."""
    inner: Any = inner_model(model)
    if type(inner).__name__ not in ARCHITECTURES:
        return f"{type(inner).__name__} is not one of {', '.join(ARCHITECTURES)}"
    config = inner.config
    windows = [found for layer in inner.model.layers if (found := window(layer.self_attn)) is not None]
    if windows and min(windows) < config.max_position_embeddings:
        return f"its sliding window of {min(windows)} is shorter than its context"
    if config.rope_parameters["rope_type"] not in FIXED_ROPE:
        return f"its rotary embedding is of the type {config.rope_parameters['rope_type']}"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}"
    if config.hidden_size % 2 or config.intermediate_size % 2:
        return "its layers have odd numbers of inputs"
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
    return type(module) is nn.Linear or is_plain_lora(module)


def _bias(module: Any) -> Tensor | None:
    return getattr(module, "base_layer", module).bias


def _linear(
    modules: Sequence[Any], dtype: torch.dtype, products: Any, norm: Tensor | None = None, apart: bool = False
) -> tuple[Tensor | None, Linear]:
    """(the norm that is still to be multiplied in, the layer). Weights of the right type are used where they are; else
    they are copied anyway: side by side, with the norm's, and packed by ``products`` where there is such. Where norms
    are to stay ``apart``, small weights lie side by side too: a GPU is slow at small products."""
    weights = [merged_weight(module) for module in modules]
    biases = [bias for bias in map(_bias, modules) if bias is not None]
    outputs = sum(len(weight) for weight in weights)
    stored = all(weight.dtype == dtype for weight in weights)
    copied = not stored or (apart and sum(w.numel() for w in weights) <= JOINED_UP_TO)
    if not copied and not products:
        return norm, Linear(weights, [b.to(dtype) for b in biases], outputs)
    if apart:
        weight = weights[0].to(dtype) if len(weights) == 1 else torch.cat([weight.to(dtype) for weight in weights])
        return norm, Linear([weight], [torch.cat(biases).to(dtype)] if biases else [], outputs)
    weight = (weights[0] if len(weights) == 1 and norm is None else torch.cat(weights)).float()
    if norm is not None:
        weight *= norm
    if products:
        packed = products.Packed.of(weight, dtype)
        return None, Linear([packed.numbers], [torch.cat(biases).float()] if biases else [], outputs)
    return None, Linear([weight.to(dtype)], [torch.cat(biases).to(dtype)] if biases else [], outputs)


def _layer(module: Any, dtype: torch.dtype, products: Any, apart: bool) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    has_norms = hasattr(attention, "q_norm")
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    gates = (mlp.gate_proj, mlp.up_proj)
    norm, qkv = _linear(projections, dtype, products, module.input_layernorm.weight, apart)
    norm_mlp, gate_up = _linear(gates, dtype, products, module.post_attention_layernorm.weight, apart)
    return Layer(
        norm=norm,
        qkv=qkv,
        q_norm=attention.q_norm.weight.float() if has_norms else None,
        k_norm=attention.k_norm.weight.float() if has_norms else None,
        o=_linear((attention.o_proj,), dtype, products, apart=apart)[1],
        norm_mlp=norm_mlp,
        gate_up=gate_up,
        down=_linear((mlp.down_proj,), dtype, products, apart=apart)[1],
    )


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's parameters, those of the matrix products in ``dtype``; read anew for each call of ``generate``."""

    embedding_VH: Tensor
    layers: list[Layer]
    norm: Tensor | None  # None: multiplied into the head
    head: Linear
    shape: Shape
    dtype: torch.dtype
    packed: bool  # by ``keel.kernels.matmul``, for ``keel.rollout.cpu``

    @staticmethod
    def of(model: nn.Module, dtype: torch.dtype, apart: bool = False) -> Weights:
        """``apart``: norms not multiplied into weights, and the head in ``dtype`` like the others, for
        ``keel.rollout.cuda``."""
        inner: Any = inner_model(model)
        attention = inner.model.layers[0].self_attn
        # Logits stay in float32, as in the trainer's log-probabilities (keel.model.logprobs).
        embedding = inner.model.embed_tokens.weight
        products = products_of(dtype) if embedding.device.type == "cpu" and not apart else None
        low = dtype if products or apart else torch.float32
        norm, head = _linear((inner.lm_head,), low, products, inner.model.norm.weight, apart)
        return Weights(
            embedding_VH=embedding,
            layers=[_layer(layer, dtype, products, apart) for layer in inner.model.layers],
            norm=norm,
            head=head,
            shape=Shape(
                heads=inner.config.num_attention_heads,
                kv_heads=inner.config.num_key_value_heads,
                head_dim=attention.head_dim,
                scale=attention.scaling,
                eps=inner.config.rms_norm_eps,
            ),
            dtype=dtype,
            packed=products is not None,
        )


# ------------------------------------------------------------------------------------------------- forward pass


def rotary_tables(model: nn.Module, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions below ``context``: [context, head_dim] each."""
    positions = torch.arange(context, device=device)[None]
    cos, sin = inner_model(model).model.rotary_emb(torch.zeros(1, device=device), positions)  # type: ignore[operator, union-attr]
    return cos[0], sin[0]


class Decoder:
    """The forward pass over a cache of ``slots`` rows: ``prefill`` fills rows, ``step`` reads one token a row.

    The cache of a layer is [2, S, kv_heads, capacity, head_dim], keys and values. The capacity follows the longest
    sequence, a few columns at a time, and a step reads all of it: a CPU's batched products over a part of a cache cost
    more than copying the whole now and then.
    """

    def __init__(self, model: nn.Module, weights: Weights, slots: int, context: int) -> None:
        self.w = weights
        self.device = device = self.w.embedding_VH.device
        self.cos, self.sin = rotary_tables(model, context, device)
        self.capacity = 0
        shape = (2, slots, self.w.shape.kv_heads, 0, self.w.shape.head_dim)
        self.caches = [torch.zeros(shape, dtype=weights.dtype, device=device) for _ in self.w.layers]

    def reserve(self, columns: int) -> None:
        """Room for ``columns`` tokens in each row."""
        if columns <= self.capacity:
            return
        self.capacity = round_up(columns, COLUMNS)
        self.caches = [F.pad(cache, (0, 0, 0, self.capacity - cache.shape[3])) for cache in self.caches]

    def batch_for(self, busy: int) -> int:
        """How many slots to go on with, of which ``busy`` are needed."""
        return round_up(busy, ROWS)

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
            q, kv = project(x, cos, sin, layer, w.dtype, w.shape)  # [U, L, heads, head_dim], [2, U, L, kv_heads, ...]
            kv = kv.transpose(2, 3)
            self.caches[i][:, rows, :, :longest] = kv[:, from_rows].to(w.dtype)
            if i + 1 == len(w.layers):
                break  # nobody reads the last layer's output: the prompt's last token goes through `step`
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), kv[0], kv[1], is_causal=True, scale=w.shape.scale,
                enable_gqa=w.shape.heads != w.shape.kv_heads,
            )  # fmt: skip
            x = after_attention(x, out.transpose(1, 2).flatten(2), layer, w.dtype, w.shape)

    def step(self, tokens_S: Tensor, positions_S: Tensor, columns: int) -> Tensor:
        """Logits [S, V] float32 after one more token a row. ``columns``: more than the largest position."""
        self.reserve(columns)
        if columns <= self.capacity - 2 * COLUMNS:  # the long ones are done
            self.capacity = round_up(columns, COLUMNS)
            self.caches = [cache[:, :, :, : self.capacity].contiguous() for cache in self.caches]
        w, S, device = self.w, tokens_S.shape[0], tokens_S.device
        cos, sin = self.cos[positions_S, None], self.sin[positions_S, None]
        hidden = torch.arange(self.capacity, device=device) > positions_S[:, None]
        bias_S1W = torch.zeros(S, 1, self.capacity, device=device).masked_fill_(hidden[:, None], float("-inf"))
        # Where this token's keys and values go, in a cache of rows of head_dim.
        rows = torch.arange(2 * S * w.shape.kv_heads, device=device).view(2, S, w.shape.kv_heads) * self.capacity
        rows = (rows + positions_S[:, None]).flatten()
        x = F.embedding(tokens_S, w.embedding_VH).float()
        x = compiled_decode()(x, cos, sin, rows, bias_S1W, w.layers, self.caches, w.dtype, w.shape)
        return linear(normed(x, w.norm, w.shape.eps), w.head)

    def advance(self, s: Slots, stops: Tensor, sampling: SamplingConfig) -> Tensor:
        """Samples a token in every slot: -> [S] bool, the sequences that ended."""
        logits = self.step(s.token, s.position, int(s.position.max()) + 1)
        at = s.sampled[:, None]
        ids, logprobs = choose(logits, s.uniforms.gather(1, at).squeeze(1), sampling)
        s.ids.scatter_(1, at, ids[:, None])
        s.logprobs.scatter_(1, at, logprobs[:, None])
        s.token = ids
        s.position += s.active
        s.sampled += s.active
        return ((s.sampled >= s.limit) | torch.isin(ids, stops)) & s.active.bool()


@cache
def compiled_decode() -> Callable[..., Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # see keel.rollout.step on its deprecation
        return torch.jit.script(decode)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
