"""Decoding on a GPU: whole steps as CUDA graphs.

A step of a small model takes a GPU about a millisecond, the time to read the weights, but some three hundred launches
from Python. So a step is captured once for a number of slots and replayed: everything in it, the choice of the token
and what becomes of the slots too, stays on the device, and the host looks only now and then at what has ended.
Between the matrix products stand the kernels of ``triton_kernels``, or where there is no Triton of ``plain_kernels``.

The numbers are the trainer's under autocast: products of bfloat16; the residual stream, norms and softmaxes in float32;
logits, products of bfloat16 too, in float32.

All of it but the capture runs on a CPU as well, for the tests. Shape suffixes besides those of ``keel.types``: ``S``
slots; ``D`` width of a head.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keel.recipe.sections import SamplingConfig
from keel.rollout import plain_kernels
from keel.rollout.llama import Weights, rotary_tables
from keel.rollout.slots import Slots
from keel.rollout.step import Linear, linear
from keel.types import UserError

STEPS = 8  # between two looks of the host: what has ended idles for half as many in the mean
SMALLEST_BATCH = 8  # that a batch shrinks to
FEWEST_COLUMNS = 256  # of the cache that a step reads, where it reads as many of each row
SPARE = 0.85  # of the free memory may be the cache's; the rest is for prefills, logits and what torch rounds up
GIGABYTE = 2**30


class CudaDecoder:
    """As ``keel.rollout.llama.Decoder``. The cache of a layer is [2, S, kv_heads, context, D], whole from the start."""

    def __init__(self, model: nn.Module, weights: Weights, slots: int, context: int) -> None:
        self.w, self.context = weights, context
        self.device = device = weights.embedding_VH.device
        self.layers = weights.layers
        self.cos, self.sin = (table.float().contiguous() for table in rotary_tables(model, context, device))
        shape = (2, slots, weights.shape.kv_heads, context, weights.shape.head_dim)
        # Zeros: a product of a weight of 0 with what lay in memory could be no number.
        self.caches = [torch.zeros(shape, dtype=weights.dtype, device=device) for _ in self.layers]
        self.rows = torch.arange(slots, device=device)
        self.ended = torch.zeros(slots, dtype=torch.bool, device=device)
        self.ops: Any = kernels_for(device, weights.shape.head_dim)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # of the present slots, by the columns that a step reads

    def batch_for(self, busy: int) -> int:
        """Powers of two: each size is captured anew."""
        return max(SMALLEST_BATCH, 1 << (busy - 1).bit_length())

    def keep(self, rows: Tensor) -> None:
        self.graphs = {}
        for i in range(len(self.caches)):  # one at a time: two copies of one layer, not of all
            self.caches[i] = self.caches[i][:, rows]
        self.rows, self.ended = self.rows[: len(rows)], self.ended[: len(rows)].clone()

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int], source: Sequence[int]) -> None:
        """Padded on the right, as in ``Decoder.prefill``."""
        longest, device, shape = max(map(len, prompts)), self.device, self.w.shape
        if longest == 0:
            return
        U = len(prompts)
        ids_T = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device).flatten()
        rows_T = torch.arange(U, device=device).repeat_interleave(longest)
        positions_T = torch.arange(longest, device=device).repeat(U)
        to, of = torch.tensor(slots, device=device), torch.tensor(source, device=device)
        here = torch.empty(2, U, shape.kv_heads, longest, shape.head_dim, dtype=self.w.dtype, device=device)
        group = shape.heads // shape.kv_heads

        def attend(i: int, qkv: Tensor) -> Tensor | None:
            q = self.ops.place(qkv, rows_T, positions_T, self.cos, self.sin, self.layers[i], here, shape)
            self.caches[i][:, to, :, :longest] = here[:, of]
            if i + 1 == len(self.layers):
                return None  # nobody reads the last layer's output: the prompt's last token goes through a step
            k, v = (half.repeat_interleave(group, 1) if group > 1 else half for half in here)
            q = q.view(U, longest, shape.heads, shape.head_dim).transpose(1, 2)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=shape.scale)
            return out.transpose(1, 2).reshape(U * longest, -1)

        self._through_layers(ids_T, attend)

    def advance(self, s: Slots, stops: Tensor, sampling: SamplingConfig) -> Tensor:
        """Samples ``STEPS`` tokens in every slot, fewer in those that end: -> [S] bool, which ones did. These are no
        longer active, and nothing more is written to them."""
        self.ended.zero_()
        columns, steps = self._columns(s), STEPS
        graph = self.graphs.get(columns)
        if graph is None:
            # One step as it is: it prepares what no capture may (kernels are compiled, libraries take memory).
            self._step(s, stops, sampling, columns)
            steps -= 1
            if self.device.type == "cuda":
                graph = self.graphs[columns] = captured(lambda: self._step(s, stops, sampling, columns))
        for _ in range(steps):
            if graph is None:
                self._step(s, stops, sampling, columns)
            else:
                graph.replay()
        return self.ended

    def logits(self, tokens_S: Tensor, positions_S: Tensor, columns: int) -> Tensor:
        """[S, V] float32 after one more token a row. ``columns``: more than the largest position."""

        def attend(i: int, qkv: Tensor) -> Tensor:
            layer, cache, shape = self.layers[i], self.caches[i], self.w.shape
            q = self.ops.place(qkv, self.rows, positions_S, self.cos, self.sin, layer, cache, shape)
            return self.ops.attend(q, cache, positions_S, columns, shape)  # type: ignore[no-any-return]

        x, delta = self._through_layers(tokens_S, attend)
        assert self.w.norm is not None
        return product(self.ops.add_norm(x, delta, self.w.norm, self.w.shape.eps, self.w.dtype), self.w.head)

    def _step(self, s: Slots, stops: Tensor, sampling: SamplingConfig, columns: int) -> None:
        logits = self.logits(s.token, s.position, columns)
        at = s.sampled.clamp(max=s.uniforms.shape[1] - 1)[:, None]
        ids, logprobs = self.ops.choose(logits, s.uniforms.gather(1, at).squeeze(1), sampling)
        self.ops.record(s, ids, logprobs, stops, self.ended)

    def _through_layers(
        self, ids_T: Tensor, attend: Callable[[int, Tensor], Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """-> (the residual stream, what is still to be added to it). ``attend(i, qkv)``: layer i's attention, or None
        to end there."""
        ops, dtype, eps = self.ops, self.w.dtype, self.w.shape.eps
        x = F.embedding(ids_T, self.w.embedding_VH).float()
        delta: Tensor | None = None
        for i, layer in enumerate(self.layers):
            attended = attend(i, linear(ops.add_norm(x, delta, layer.norm, eps, dtype), layer.qkv))
            if attended is None:
                break
            h = ops.add_norm(x, linear(attended, layer.o), layer.norm_mlp, eps, dtype)
            delta = linear(ops.gated(*halves(h, layer.gate_up)), layer.down)
        return x, delta

    def _columns(self, s: Slots) -> int:
        """Triton's attention reads each row to its own length; torch's reads of all what the longest needs, in steps
        of powers of two, each captured once."""
        if self.ops is not plain_kernels:
            return self.context
        needed = int(s.position.max()) + STEPS
        return min(self.context, max(FEWEST_COLUMNS, 1 << (needed - 1).bit_length()))


def captured(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The step's launches, without running them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may do what they want
        step()
    return graph


def product(x_SH: Tensor, head: Linear) -> Tensor:
    """Logits [S, V] in float32, of operands in whatever type."""
    (weight,) = head.weights
    if x_SH.dtype == torch.float32:
        logits = F.linear(x_SH, weight)
    elif x_SH.is_cuda:
        logits = torch.mm(x_SH, weight.t(), out_dtype=torch.float32)
    else:
        logits = F.linear(x_SH.float(), weight.float())
    return logits.add_(head.biases[0]) if head.biases else logits


def halves(x: Tensor, part: Linear) -> Sequence[Tensor]:
    """What the two layers of ``part`` make of ``x``."""
    if len(part.weights) == 1:
        return linear(x, part).chunk(2, -1)
    return [F.linear(x, w, part.biases[i] if part.biases else None) for i, w in enumerate(part.weights)]


@cache
def kernels_for(device: torch.device, head_dim: int) -> Any:
    """The module of operations: Triton's where they run."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return plain_kernels
    from keel.rollout import triton_kernels

    if head_dim not in triton_kernels.HEAD_DIMS:
        return plain_kernels
    try:
        triton_kernels.check(device)
    except Exception as error:  # whatever a compiler that is missing or broken raises
        warnings.warn(f"Triton does not compile here ({error}); sampling goes on without it, slower", stacklevel=2)
        return plain_kernels
    return triton_kernels


def slots_that_fit(weights: Weights, slots: int, context: int) -> int:
    """``slots``, or as many as the device's free memory has caches for. UserError when that is none."""
    device, shape = weights.embedding_VH.device, weights.shape
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    numbers = 2 * len(weights.layers) * shape.kv_heads * shape.head_dim * context
    return fewer_slots(free, numbers * weights.dtype.itemsize, slots)


def fewer_slots(free: int, bytes_a_slot: int, slots: int) -> int:
    fit = int(SPARE * (free - GIGABYTE)) // bytes_a_slot
    if fit < 1:
        raise UserError(
            f"sampling: {free / GIGABYTE:.1f} GiB of the device's memory are free, and the cache of one sequence takes "
            f"{bytes_a_slot / GIGABYTE:.1f}; lower sampling.max_new_tokens or train with less memory"
        )
    if fit < slots:
        warnings.warn(f"sampling.batch_size: memory for {fit} sequences at a time, not {slots}", stacklevel=2)
    return min(fit, slots)
