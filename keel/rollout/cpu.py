"""Decoding on a CPU in compiled code: the matrix products of ``keel.kernels.matmul``, and everything between them in
the kernels of ``keel.kernels.decoding``.

A small model's step is hundreds of passes over memory when each operation is torch's own, and between any two of them
threads wait for the interpreter lock. Here steps are one compiled call, a layer in it four products and six kernels.
Tokens lie in a row without padding, each with its slot and its position: prompts and single tokens go through the same
code, and a token's attention reads what its own sequence has so far, no more.

Shape suffixes besides those of ``keel.types``: ``S`` slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from keel.kernels import decoding as kernels
from keel.kernels import matmul as products
from keel.kernels.next_token import Sampling
from keel.recipe.sections import SamplingConfig
from keel.rollout.llama import ROWS, Weights, rotary_tables, round_up
from keel.rollout.slots import Slots
from keel.rollout.step import Linear

FEWEST_COLUMNS = 128
TILE = 64  # tokens that go through a layer together


def raw(x: Tensor) -> np.ndarray:
    """The tensor's memory, as kernels take it."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


class CpuDecoder:
    """As ``keel.rollout.llama.Decoder``. The cache is [layers, 2, slots, kv_heads, capacity, head_dim]: a slot that is
    dropped leaves its place in it empty."""

    def __init__(self, model: nn.Module, weights: Weights, slots: int, context: int, threads: int) -> None:
        self.w, self.context = weights, context
        self.device = torch.device("cpu")
        self.places = np.arange(slots)  # of the slots, in the cache
        shape = weights.shape
        self.cache = torch.empty(len(weights.layers), 2, slots, shape.kv_heads, 0, shape.head_dim, dtype=weights.dtype)
        layers = weights.layers
        parts = [part for layer in layers for part in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        cos, sin = rotary_tables(model, context, self.device)
        embedding = weights.embedding_VH.detach()
        self.net = kernels.Network(
            embedding_VH=raw(embedding if embedding.dtype == torch.bfloat16 else embedding.float()),
            products=np.array([_product(part) for part in (*parts, *[weights.head] * 4)]).reshape(-1, 4, 4),
            q_norms=_stacked([layer.q_norm for layer in layers]),
            k_norms=_stacked([layer.k_norm for layer in layers]),
            cos=raw(cos), sin=raw(sin), eps=shape.eps, scale=shape.scale,
            threads=threads, multiply=products.multiply_address(weights.dtype),
        )  # fmt: skip
        self.buffers = _buffers(self.net.products, weights.dtype)

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int], source: Sequence[int]) -> None:
        lengths = [len(p) for p in prompts]
        if max(lengths) == 0:
            return
        self._reserve(max(lengths))
        places = self.places[list(slots)]
        first = [places[source.index(u)] for u in range(len(prompts))]  # where each prompt is computed
        ids = np.array([token for p in prompts for token in p])
        positions = np.concatenate([np.arange(n) for n in lengths])
        places_T = np.repeat(first, lengths)
        kernels.layers(
            self.net, self.buffers, raw(self.cache), self._stream(len(ids)), ids, places_T, positions, to_the_end=False
        )
        for u, place in zip(source, places, strict=True):
            if place != first[u]:
                self.cache[:, :, place, :, : lengths[u]] = self.cache[:, :, first[u], :, : lengths[u]]

    def advance(self, s: Slots, stops: Tensor, sampling: SamplingConfig) -> Tensor:
        """Samples tokens in every slot, until a sequence ends: -> [S] bool, which ones did, none of them where the
        cache must grow first."""
        columns = int(s.position.max()) + 1
        self._reserve(columns)
        ended_S = torch.zeros(len(s.token), dtype=torch.bool)
        state = kernels.State(**{name: x.numpy() for name, x in s.tensors().items()}, places=self.places)
        kernels.decode(
            self.net, self.buffers, raw(self.cache), self._stream(len(s.token)), state, stops.numpy(),
            self.cache.shape[4] - columns + 1,
            Sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p), ended_S.numpy(),
        )  # fmt: skip
        return ended_S

    def batch_for(self, busy: int) -> int:
        return round_up(busy, ROWS)

    def keep(self, rows: Tensor) -> None:
        self.places = self.places[rows.numpy()]

    def _stream(self, tokens: int) -> np.ndarray:
        """Memory for the residual stream [T, H]."""
        return np.empty((tokens, self.w.embedding_VH.shape[1]), np.float32)

    def _reserve(self, columns: int) -> None:
        """Room for ``columns`` tokens in each slot: half as much again as there was, so that copies are few."""
        old = self.cache
        capacity = old.shape[4]
        if columns > capacity:
            grown = min(max(columns, FEWEST_COLUMNS, capacity * 3 // 2), self.context)
            self.cache = torch.empty(*old.shape[:4], grown, old.shape[5], dtype=old.dtype)
            self.cache[..., :capacity, :] = old


def _product(part: Linear) -> list[int]:
    """As in ``kernels.Network.products``."""
    weight, bias = part.weights[0], part.biases[0].data_ptr() if part.biases else 0
    return [weight.data_ptr(), bias, part.outputs, weight.numel() // round_up(part.outputs, products.BLOCK)]


def _buffers(sizes: np.ndarray, low: torch.dtype) -> kernels.Buffers:
    """For the products of ``sizes``, as ``kernels.Network.products`` has them."""
    (qkv, hidden), (_, attended), (gate_up, _), (_, activated) = sizes[0, :, 2:].tolist()

    def empty(width: int, dtype: torch.dtype = torch.float32) -> np.ndarray:
        return raw(torch.empty(TILE, width, dtype=dtype))

    return kernels.Buffers(
        empty(hidden, low), empty(qkv), empty(attended, low), empty(gate_up), empty(activated, low),
        empty(int(sizes[-1, 0, 2])), words=np.empty(7, np.int64),
    )  # fmt: skip


def _stacked(norms: Sequence[Tensor | None]) -> np.ndarray:
    """[layers, head_dim], or [layers, 0] where heads have no norms."""
    return np.stack([np.zeros(0, np.float32) if norm is None else norm.detach().numpy() for norm in norms])
