"""Decoding on a CPU: oneDNN's matrix products, and everything between them in the kernels of ``keel.rollout.kernels``.

A small model's step is hundreds of passes over memory when each operation is torch's own. Here a step is one compiled
call, a layer in it four products and five kernels. Tokens lie in a row without padding, each with its slot and its
position: prompts and single tokens go through the same code, and a token's attention reads what its own sequence has
so far, no more.

Shape suffixes besides those of ``keel.types``: ``S`` slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from keel.config import SamplingConfig
from keel.rollout import kernels
from keel.rollout.llama import ROWS, Weights, rotary_tables, round_up
from keel.rollout.shim import AVAILABLE, Handles
from keel.rollout.slots import Slots
from keel.rollout.step import Linear

__all__ = ["AVAILABLE", "CpuDecoder"]

FEWEST_COLUMNS = 64


def raw(x: Tensor) -> np.ndarray:
    """The tensor's memory, as kernels take it."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


class CpuDecoder:
    """As ``keel.rollout.llama.Decoder``. The cache is [layers, 2, slots, kv_heads, capacity, head_dim]: a slot that is
    dropped leaves its place in it empty."""

    def __init__(self, model: nn.Module, weights: Weights, slots: int, context: int) -> None:
        self.w, self.context = weights, context
        self.device = torch.device("cpu")
        self.places = np.arange(slots)  # of the slots, in the cache
        shape = weights.shape
        self.cache = torch.empty(len(weights.layers), 2, slots, shape.kv_heads, 0, shape.head_dim, dtype=weights.dtype)
        layers = weights.layers
        parts = [part for layer in layers for part in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        self.products = Handles(t for part in (*parts, *[weights.head] * 4) for t in _tensors(part))
        cos, sin = rotary_tables(model, context, self.device)
        embedding = weights.embedding_VH.detach()
        self.net = kernels.Network(
            embedding_VH=raw(embedding if embedding.dtype == torch.bfloat16 else embedding.float()),
            products=self.products.addresses.reshape(-1, 4, 2),
            q_norms=_stacked([layer.q_norm for layer in layers]),
            k_norms=_stacked([layer.k_norm for layer in layers]),
            cos=raw(cos), sin=raw(sin), eps=shape.eps, scale=shape.scale,
        )  # fmt: skip
        self.buffers = _Buffers(weights, slots)

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int], source: Sequence[int]) -> None:
        lengths = [len(p) for p in prompts]
        if max(lengths) == 0:
            return
        self._reserve(max(lengths))
        places = self.places[list(slots)]
        first = [places[source.index(u)] for u in range(len(prompts))]  # where each prompt is computed
        ids = np.array([token for p in prompts for token in p])
        positions = np.concatenate([np.arange(n) for n in lengths])
        buffers = _Buffers(self.w, len(ids))
        kernels.layers(
            self.net, buffers.arrays, raw(self.cache), ids, np.repeat(first, lengths), positions, to_the_end=False
        )
        for u, place in zip(source, places, strict=True):
            if place != first[u]:
                self.cache[:, :, place, :, : lengths[u]] = self.cache[:, :, first[u], :, : lengths[u]]

    def advance(self, s: Slots, stops: Tensor, sampling: SamplingConfig) -> Tensor:
        """Samples tokens in every slot, until a sequence ends: -> [S] bool, which ones did, none of them where the
        cache must grow first."""
        columns = int(s.position.max()) + 1
        self._reserve(columns)
        if len(s.token) != self.buffers.tokens:
            self.buffers = _Buffers(self.w, len(s.token))
        ended_S = torch.zeros(len(s.token), dtype=torch.bool)
        state = kernels.State(**{name: x.numpy() for name, x in s.tensors().items()}, places=self.places)
        kernels.decode(
            self.net, self.buffers.arrays, raw(self.cache), state, stops.numpy(), self.cache.shape[4] - columns + 1,
            sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, ended_S.numpy(),
        )  # fmt: skip
        return ended_S

    def keep(self, rows: Tensor) -> None:
        self.places = self.places[rows.numpy()]

    def _reserve(self, columns: int) -> None:
        """Room for ``columns`` tokens in each slot: half as much again as there was, so that copies are few."""
        old = self.cache
        capacity = old.shape[4]
        if columns > capacity:
            grown = min(max(columns, FEWEST_COLUMNS, capacity * 3 // 2), self.context)
            self.cache = torch.empty(*old.shape[:4], grown, old.shape[5], dtype=old.dtype)
            self.cache[..., :capacity, :] = old


class _Buffers:
    """Memory for a pass over ``tokens``."""

    def __init__(self, weights: Weights, tokens: int) -> None:
        self.tokens = tokens
        rows = round_up(tokens, ROWS)
        shape, H = weights.shape, weights.embedding_VH.shape[1]
        feed_forward = weights.layers[0].down.weights[0].shape[1]

        def zeros(width: int, dtype: torch.dtype = weights.dtype) -> Tensor:
            return torch.zeros(rows, width, dtype=dtype)

        self.tensors = zeros(H), zeros(shape.heads * shape.head_dim), zeros(feed_forward), zeros(H, torch.float32)
        self.handles = Handles(self.tensors)
        normed, attended, activated, final = map(raw, self.tensors)
        x_TH = np.empty((tokens, H), np.float32)
        self.arrays = kernels.Buffers(x_TH, normed, attended, activated, final, self.handles.addresses)


def _tensors(product: Linear) -> tuple[Tensor, Tensor | None]:
    return product.weights[0], product.biases[0] if product.biases else None


def _stacked(norms: Sequence[Tensor | None]) -> np.ndarray:
    """[layers, head_dim], or [layers, 0] where heads have no norms."""
    return np.stack([np.zeros(0, np.float32) if norm is None else norm.detach().numpy() for norm in norms])
