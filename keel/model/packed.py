"""Hidden states of packed batches, for any transformers decoder, without padding.

The linear layers, norms and embeddings of a decoder act on one token at a time, so they may as well run over all real
tokens in a row ([1, T] as far as transformers knows). Only attention must know where sequences begin and end: Keel
registers an attention function of its own with transformers, which lays queries, keys and values out as [B, L] for the
product alone. Any architecture that uses transformers' attention interface gains; others take the padded path, which
is also the slow reference of the tests.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from keel.model import fused
from keel.model.passes import Grid, Rotary, turned
from keel.types import PackedBatch, UserError

ATTENTION = "keel_packed"
PLAIN_ATTENTION_UP_TO = 256  # tokens
# oneDNN generates code for every new shape of a matrix product, which can cost as much as the product. Batches of
# slightly different sizes are therefore rounded up to few sizes on a CPU.
ROUND_TOKENS, ROUND_WANTED, ROUND_LENGTH = 64, 32, 16
FEW_WANTED = 0.8  # of a batch's tokens: up to it, picking them out before the last layer's end pays


@dataclass(frozen=True)
class Layout:
    """Where the T packed tokens lie in a [B, L] grid: ``cells_T`` are their places in the flattened grid.

    Where sequences share a beginning the causal mask does not say which keys a query sees: then ``allowed`` (bool
    [B, L, L]) does, and ``positions`` ([B, L]) are the tokens' places in their own sequence. Else ``cu_seqlens`` (int32
    [B + 1]) are the sequences' offsets in T.
    """

    cells_T: Tensor
    batch: int
    longest: int
    cu_seqlens: Tensor | None = None
    allowed: Tensor | None = None
    positions: Tensor | None = None

    @staticmethod
    def of(batch: PackedBatch) -> Layout:
        """A row of the grid for each sequence, or for each that is whole with those that fork from it behind it."""
        lengths = batch.lengths()
        device = lengths.device
        sequence_T = torch.repeat_interleave(torch.arange(batch.num_sequences, device=device), lengths)
        if batch.fork_B is None:
            longest = _rounded(int(lengths.max()), ROUND_LENGTH, device)
            cells_T, cu_seqlens = sequence_T * longest + batch.positions_T, batch.cu_seqlens.int()
            return Layout(cells_T, batch.num_sequences, longest, cu_seqlens)
        whole_B = batch.fork_B < 0
        row_B = whole_B.long().cumsum(0) - 1
        begin_R = batch.cu_seqlens[:-1][whole_B]
        row_T = row_B[sequence_T]
        place_T = torch.arange(batch.num_tokens, device=device) - begin_R[row_T]
        longest = _rounded(int(place_T.max()) + 1, ROUND_LENGTH, device)
        layout = Layout(row_T * longest + place_T, len(begin_R), longest)
        fork_B = torch.where(whole_B, -1, batch.fork_B - begin_R[row_B])  # as a place in the row
        sequence, fork = layout.spread(sequence_T, -1), layout.spread(fork_B[sequence_T], -1)
        place = torch.arange(longest, device=device)
        own = (sequence[:, :, None] == sequence[:, None, :]) & (place[:, None] >= place[None, :])
        allowed = own | (place[None, None, :] <= fork[:, :, None])
        return replace(layout, allowed=allowed, positions=layout.spread(batch.positions_T))

    @staticmethod
    def whole(batch: PackedBatch) -> Layout:
        """A row of the grid for each sequence, its tokens at their positions: a forked one's shared cells stay free."""
        sequence_T = torch.repeat_interleave(
            torch.arange(batch.num_sequences, device=batch.ids_T.device), batch.lengths()
        )
        longest = _rounded(int(batch.positions_T.max()) + 1, ROUND_LENGTH, batch.ids_T.device)
        return Layout(sequence_T * longest + batch.positions_T, batch.num_sequences, longest)

    def visible(self, window: int | None) -> Tensor | None:
        """[B or 1, L, L] True where a query (row) may see a key (column); None: all that are not behind it."""
        if window is None or window >= self.longest:
            return self.allowed
        positions = self.positions
        if positions is None:
            positions = torch.arange(self.longest, device=self.cells_T.device)[None]
        distance = positions[:, :, None] - positions[:, None, :]
        near = distance < window
        return near & (distance >= 0 if self.allowed is None else self.allowed)

    def grids(self, window: int | None, heads: int, kv_heads: int) -> list[Grid]:
        """The layout cut where rows of different lengths meet (micro-batches are sorted), so that attention does not
        pad all rows to the longest."""
        lengths_B = torch.bincount(self.cells_T // self.longest, minlength=self.batch)
        begin_B = torch.cat([lengths_B.new_zeros(1), lengths_B.cumsum(0)])
        lengths = [_rounded(n, ROUND_LENGTH, self.cells_T.device) for n in lengths_B.tolist()]
        visible = self.visible(window)
        grids = []
        for rows in _buckets(lengths):
            longest = max(lengths[rows.start : rows.stop])
            seen = visible
            if seen is not None:
                own = slice(rows.start, rows.stop) if len(seen) > 1 else slice(None)
                seen = seen[own, :longest, :longest].contiguous()
            grids.append(Grid(begin_B[rows.start : rows.stop + 1], len(rows), longest, seen, heads, kv_heads))
        return grids

    def spread(self, x_TF: Tensor, fill: float | int = 0) -> Tensor:
        """[T, ...] -> [B, L, ...]"""
        grid = x_TF.new_full((self.batch * self.longest, *x_TF.shape[1:]), fill)
        return grid.index_copy(0, self.cells_T, x_TF).view(self.batch, self.longest, *x_TF.shape[1:])

    def gather(self, grid: Tensor) -> Tensor:
        """[B, L, ...] -> [T, ...]"""
        return grid.reshape(self.batch * self.longest, *grid.shape[2:]).index_select(0, self.cells_T)


def _packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    keel_layout: Layout | None = None,
    **_: object,  # transformers passes what other backends need
) -> tuple[Tensor, None]:
    """transformers' attention interface: -> ([1, T, heads, D], no weights). Dropout is ignored: Keel trains without."""
    assert keel_layout is not None, "packed attention is called through keel.model.packed.hidden_states"
    if softcap is not None or s_aux is not None:
        raise UserError(
            f"{type(module).__name__} uses soft-capped or sink attention, which packed batches do not support"
        )
    layout, tokens = keel_layout, keel_layout.cells_T.numel()
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    half = _half_on_gpu(query)
    if layout.cu_seqlens is not None and half is not None:
        q, k, v = (x.to(half) for x in (query, key, value))
        return _varlen(q, k, v, layout.cu_seqlens, layout.longest, scale, sliding_window).to(query.dtype), None

    def grid(x: Tensor) -> Tensor:  # [1, heads, T, D] -> [B, heads, L, D]; rows past the real tokens stay behind
        return layout.spread(x[0].transpose(0, 1)[:tokens]).transpose(1, 2)

    out = _attend(grid(query), grid(key), grid(value), scale, layout.visible(sliding_window))
    gathered = layout.gather(out.transpose(1, 2)).to(query.dtype)
    return F.pad(gathered, (0, 0, 0, 0, 0, query.shape[2] - tokens))[None], None


def _half_on_gpu(query: Tensor) -> torch.dtype | None:
    """The precision in which torch's flash attention takes sequences that lie one behind another: the half precision of
    a GPU's products. None where it does not."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    halves = (torch.bfloat16, torch.float16)
    return dtype if query.is_cuda and dtype in halves and query.shape[-1] % 8 == 0 else None


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """[1, heads, T, D] -> [1, T, heads, D], without a grid, so without any padding."""
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    seen = (-1 if window is None else window - 1, 0)  # so many tokens before a query's own, none behind it
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=seen)
    assert isinstance(out, Tensor)
    return out[None]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None) -> Tensor:
    """Attention over [B, heads, L, D] grids whose rows are filled from the left: causal, which keeps real tokens from
    seeing padding, or as ``visible`` [B or 1, L, L] says."""
    B, heads, L, D = q.shape
    if q.device.type == "cpu" and L <= PLAIN_ATTENTION_UP_TO:
        # Measured on CPU: for short sequences plain products beat the flash kernel (2.4 times at L = 60 in bfloat16),
        # whose backward is slow there.
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
        bias = _bias(_causal(L, q.device) if visible is None else visible, heads, q.dtype).expand(B * heads, L, L)
        flat_q, flat_k, flat_v = (x.reshape(B * heads, L, D) for x in (q, k, v))
        scores = torch.baddbmm(bias, flat_q, flat_k.transpose(1, 2), alpha=scale)
        return torch.bmm(torch.softmax(scores.float(), -1).to(flat_v.dtype), flat_v).view(B, heads, L, D)
    if q.device.type == "cpu":  # the flash kernel's backward is five times slower in bfloat16 than in float32
        q, k, v = q.float(), k.float(), v.float()
    mask = None if visible is None else visible[:, None]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=k.shape[1] != heads
    )


def _causal(L: int, device: torch.device) -> Tensor:
    """[1, L, L] True where a query (row) may see a key (column): all that are not behind it."""
    return torch.ones(1, L, L, dtype=torch.bool, device=device).tril()


def _bias(visible: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, 0 or -inf: [1, L, L] where all rows see alike, else [B * heads, L, L]."""
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
    return bias if len(bias) == 1 else bias.repeat_interleave(heads, dim=0)


def _no_mask(*_: object, **__: object) -> None:
    """The packed attention function knows the boundaries from the layout; transformers need build no mask."""


def enable_packing(model: PreTrainedModel) -> bool:
    """Switches ``model`` to packed attention; False when its architecture has no attention interface."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _no_mask)
    config = model.config.get_text_config()
    unsupported = (
        any(getattr(config, name, None) for name in ("attn_logit_softcapping",)) or config.model_type in _PADDED
    )
    if unsupported or not getattr(model, "_supports_attention_backend", False):
        return False
    model.set_attn_implementation(ATTENTION)
    return True


_PADDED = frozenset({"gpt_oss"})  # attention sinks


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value, operator]


def backbone(model: nn.Module) -> nn.Module:
    """The decoder below the heads."""
    inner = inner_model(model)
    return inner.base_model if inner.base_model is not inner else inner


def compute_alike(model: nn.Module, other: nn.Module) -> None:
    """Has ``model`` computed by the same operations as ``other``: with equal weights they then agree to the bit, where
    fused layers and layers with adapters that do nothing yet would agree to rounding."""
    backbone(model).keel_unfused = not fused.is_fusable(backbone(other))  # type: ignore[assignment]


def compile_training(model: nn.Module, backend: str = "inductor") -> None:
    """Compiles the decoder's passes that gradients flow through (at their first use), for any shape. UserError where
    there is no compiler."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    compilers = (os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl")
    if on_cpu and not any(shutil.which(compiler) for compiler in compilers if compiler):
        raise UserError("compile: true needs a C++ compiler on a CPU; install g++, or use compile: false")
    backbone(model).compile(dynamic=True, backend=backend)


def hidden_states(
    model: nn.Module, batch: PackedBatch, wanted_W: Tensor | None = None, rows_VH: Tensor | None = None
) -> Tensor:
    """Last hidden states (after the final norm) of every token of a packed batch [T, H], or of the tokens at the places
    ``wanted_W`` [W, H], which costs less. ``rows_VH``: what the model's embedding may be read from; it gets a sparse
    gradient."""
    if not torch.is_grad_enabled() and backbone(model)._compiled_call_impl is not None:
        # Measuring stays plain: policy and reference then differ by nothing but their weights, to the bit.
        with torch.compiler.set_stance("force_eager"):
            return _hidden_states(model, batch, wanted_W, None)
    return _hidden_states(model, batch, wanted_W, rows_VH)


def _hidden_states(model: nn.Module, batch: PackedBatch, wanted_W: Tensor | None, rows_VH: Tensor | None) -> Tensor:
    if inner_model(model).config._attn_implementation != ATTENTION:
        hidden = padded_hidden_states(model, batch)
        return hidden if wanted_W is None else hidden.index_select(0, wanted_W)
    tokens, device = batch.num_tokens, batch.ids_T.device
    spare = _rounded(tokens, ROUND_TOKENS, device) - tokens
    ids, positions = F.pad(batch.ids_T, (0, spare))[None], F.pad(batch.positions_T, (0, spare))[None]
    decoder: Any = backbone(model)
    compiled = decoder._compiled_call_impl is not None and torch.is_grad_enabled()
    if not compiled and fused.is_fusable(decoder):
        if rows_VH is not None and type(decoder.embed_tokens) is nn.Embedding:
            embedded = F.embedding(ids[0], rows_VH, decoder.embed_tokens.padding_idx, sparse=True)
        else:
            embedded = decoder.embed_tokens(ids[0])
        cos, sin = decoder.rotary_emb(embedded, position_ids=positions)
        attention = _FusedAttention(Layout.of(batch))
        if wanted_W is not None and len(wanted_W) < FEW_WANTED * tokens:
            padded_W = F.pad(wanted_W, (0, _rounded(len(wanted_W), ROUND_WANTED, device) - len(wanted_W)))
            hidden = fused.run_layers(decoder, embedded, cos[0], sin[0], attention, padded_W)[: len(wanted_W)]
        else:
            hidden = fused.run_layers(decoder, embedded, cos[0], sin[0], attention)[:tokens]
            hidden = hidden if wanted_W is None else hidden.index_select(0, wanted_W)
        return decoder.norm(hidden)
    out = decoder(input_ids=ids, position_ids=positions, use_cache=False, keel_layout=Layout.of(batch))
    hidden = out.last_hidden_state[0]
    return hidden[:tokens] if wanted_W is None else hidden.index_select(0, wanted_W)


class _FusedAttention:
    """``fused.Attention`` over a layout. Grids and their masks are made once for all layers."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.grids: dict[int | None, list[Grid]] = {}

    def __call__(self, block: Any, qkv: Tensor, rotary: Rotary) -> Tensor:
        # Qwen's attention modules know their window, Mistral's leave it to the configuration.
        layout = self.layout
        window = getattr(block, "sliding_window", getattr(block.config, "sliding_window", None))
        heads, kv_heads = fused.head_counts(block)
        if layout.longest <= PLAIN_ATTENTION_UP_TO:
            if window not in self.grids:
                self.grids[window] = layout.grids(window, heads, kv_heads)
            return fused.Attend.apply(qkv, rotary, block.scaling, self.grids[window])
        tokens = layout.cells_T.numel()
        qk = turned(qkv[:, : heads + kv_heads], rotary).to(qkv.dtype)
        q, k, v = (
            layout.spread(x[:tokens]).transpose(1, 2)
            for x in (*qk.split([heads, kv_heads], dim=1), qkv[:, heads + kv_heads :])
        )
        attended = layout.gather(_attend(q, k, v, block.scaling, layout.visible(window)).transpose(1, 2))
        return F.pad(attended.to(qkv.dtype).flatten(1), (0, 0, 0, len(qkv) - tokens))


BUCKET_GAIN = 0.8  # of the cells of attention's products that must be left for another grid's operations to pay


def _buckets(lengths: Sequence[int]) -> list[range]:
    """Rows cut into runs that are padded to the longest of each: recursively, in two where that saves enough."""

    def cut(rows: range) -> list[range]:
        own = lengths[rows.start : rows.stop]
        before = list(accumulate(own, max))  # the longest up to a row,
        behind = list(accumulate(reversed(own), max))[::-1]  # and from it on
        cells = [i * before[i - 1] ** 2 + (len(own) - i) * behind[i] ** 2 for i in range(1, len(own))]
        if not cells or min(cells) > BUCKET_GAIN * len(own) * before[-1] ** 2:
            return [rows]
        middle = rows.start + 1 + cells.index(min(cells))
        return cut(range(rows.start, middle)) + cut(range(middle, rows.stop))

    return cut(range(len(lengths)))


def _rounded(n: int, multiple: int, device: torch.device) -> int:
    return -(-n // multiple) * multiple if device.type == "cpu" else n


def padded_hidden_states(model: nn.Module, batch: PackedBatch) -> Tensor:
    """The same by the plain road, right padding and a mask: for other architectures, and the tests' reference."""
    layout = Layout.whole(batch)
    ids_BL, real_BL = layout.spread(batch.ids_T), layout.spread(torch.ones_like(batch.ids_T))
    positions_BL = layout.spread(batch.positions_T)
    if batch.fork_B is not None:  # give each its beginning back
        source = layout.cells_T[batch.fork_B.clamp(min=0)] // layout.longest
        for b in (batch.fork_B >= 0).nonzero().flatten().tolist():
            own = int(batch.positions_T[batch.cu_seqlens[b]])
            for grid in (ids_BL, real_BL, positions_BL):
                grid[b, :own] = grid[source[b], :own]
    out = backbone(model)(input_ids=ids_BL, attention_mask=real_BL, position_ids=positions_BL, use_cache=False)
    return layout.gather(out.last_hidden_state)
