"""Hidden states of packed batches, for any transformers decoder, without padding.

The linear layers, norms and embeddings of a decoder act on one token at a time, so they may as well run over all real
tokens in a row ([1, T] as far as transformers knows). Only attention must know where sequences begin and end: Keel
registers an attention function of its own with transformers, which lays queries, keys and values out as [B, L] for the
product alone, and a mask function, which asks the model what a query sees of its own sequence: all that is not behind
it, a window, a chunk.

An architecture gains whose tokens meet in such attention alone. Whether they do is not a matter of names:
``keel.model.probe`` measures it when a model is loaded. Others take a slower road (``keel.model.padded``).
"""

from __future__ import annotations

import os
import shutil
from contextvars import ContextVar
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from keel.kernels.plain import Grid, Rotary, turned
from keel.model import fused
from keel.model.layout import ROUND_TOKENS, ROUND_WANTED, Layout, MaskFunction, rounded
from keel.model.modules import backbone as backbone
from keel.model.modules import before_head, check_reach, set_attention
from keel.model.modules import inner_model as inner_model
from keel.model.padded import alone_hidden_states, by_reach
from keel.model.padded import padded_hidden_states as padded_hidden_states
from keel.model.varlen import attend, half_on_gpu
from keel.types import PackedBatch, UserError

ATTENTION = "keel_packed"
PLAIN_ATTENTION_UP_TO = 256  # tokens
COMPILED_FROM = 100_000_000  # parameters
COMPILED_FORMS = 32
FEW_WANTED = 0.8  # of a batch's tokens: up to it, picking them out before the last layer's end pays


def _packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    keel_layout: Layout | None = None,
    **_: object,  # transformers passes what other backends need
) -> tuple[Tensor, None]:
    """transformers' attention interface: -> ([1, T, heads, D], no weights). ``attention_mask`` is what :func:`_mask`
    made. Dropout is ignored: Keel trains without."""
    assert keel_layout is not None, "packed attention is called through keel.model.packed.hidden_states"
    layout, tokens = keel_layout, keel_layout.cells_T.numel()
    foreign = attention_mask is not None and not _is_of(layout, attention_mask)
    if foreign or not (softcap is s_aux is position_bias is None):
        raise UserError(f"{type(module).__name__} has a mask, cap, sink or bias that packed batches do not know")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    half, window = half_on_gpu(query), getattr(attention_mask, "keel_window", None)
    plain = (attention_mask is None or window is not None) and value.shape[-1] == query.shape[-1]
    if half is not None and plain:
        q, k, v = (x[0, :, :tokens].transpose(0, 1).to(half) for x in (query, key, value))
        return _with_rest(attend(q, k, v, layout, scale, window).to(query.dtype), query), None

    def grid(x: Tensor) -> Tensor:  # [1, heads, T, D] -> [B, heads, L, D]; rows past the real tokens stay behind
        return layout.spread(x[0].transpose(0, 1)[:tokens]).transpose(1, 2)

    visible = layout.visible(None) if attention_mask is None else attention_mask[:, 0]
    out = _attend(grid(query), grid(key), grid(value), scale, visible)
    gathered = layout.gather(out.transpose(1, 2)).to(query.dtype)
    return _with_rest(gathered, query), None


def _with_rest(out: Tensor, query: Tensor) -> Tensor:
    """[T, heads, D] -> [1, T, heads, D], with rows for what lies past the real tokens."""
    rest = query.shape[2] - len(out)
    return (F.pad(out, (0, 0, 0, 0, 0, rest)) if rest else out)[None]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None) -> Tensor:
    """Attention over [B, heads, L, D] grids whose rows are filled from the left: causal, which keeps real tokens from
    seeing padding, or as ``visible`` [B or 1, L, L] says."""
    B, heads, L, _ = q.shape
    if q.device.type == "cpu" and L <= PLAIN_ATTENTION_UP_TO:
        # Measured on CPU: for short sequences plain products beat the flash kernel (2.4 times at L = 60 in bfloat16),
        # whose backward is slow there.
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
        bias = _bias(_causal(L, q.device) if visible is None else visible, heads, q.dtype).expand(B * heads, L, L)
        flat_q, flat_k, flat_v = (x.reshape(B * heads, L, -1) for x in (q, k, v))
        scores = torch.baddbmm(bias, flat_q, flat_k.transpose(1, 2), alpha=scale)
        return torch.bmm(torch.softmax(scores.float(), -1).to(flat_v.dtype), flat_v).view(B, heads, L, -1)
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


_LAYOUT: ContextVar[Layout] = ContextVar("the layout of the batch that a model is run over")


def _mask(
    *, mask_function: MaskFunction, local_size: int | None = None, allow_is_causal_skip: bool = True, **_: object
) -> Tensor | None:
    """transformers' mask interface: what the model says that a query sees, [B or 1, 1, L, L] over the layout's grid.
    None: all that is not behind it, which the layout knows by itself."""
    if mask_function is causal_mask_function and allow_is_causal_skip:
        return None
    return _grid_mask(mask_function, local_size)


@torch.compiler.disable
def _grid_mask(mask_function: MaskFunction, local_size: int | None) -> Tensor:
    layout = _LAYOUT.get()
    mask = layout.masked(mask_function)
    window = None if local_size is None else layout.visible(local_size)
    mask_B1LL = mask[:, None]
    if local_size is not None and (window is None or torch.equal(mask, window)):
        mask_B1LL.keel_window = local_size  # type: ignore[attr-defined]  # a window, and no chunk: kernels know those
    return mask_B1LL


def _is_of(layout: Layout, mask: Tensor) -> bool:
    shape = (1, layout.longest, layout.longest)
    return mask.dtype == torch.bool and mask.shape[1:] == shape and len(mask) in (1, layout.batch)


Road = Literal["packed", "padded", "alone"]
_HIDDEN_STATES = {"padded": padded_hidden_states, "alone": alone_hidden_states}


def road(model: nn.Module) -> Road:
    """How a model's batches are computed: as one row; with padding; or, where nothing else is right, each sequence by
    itself."""
    return getattr(inner_model(model), "keel_road", "padded")  # type: ignore[return-value]


def enable_packing(model: PreTrainedModel) -> bool:
    """Puts ``model`` on the packed road; False when its architecture has no attention interface. Whether that road is
    right, ``keel.model.probe`` knows."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _mask)
    if not getattr(model, "_supports_attention_backend", False):
        return False
    if model.config._attn_implementation != ATTENTION:
        model.keel_attention = model.config._attn_implementation  # type: ignore[assignment]
        set_attention(model, ATTENTION)
    model.keel_road = "packed"  # type: ignore[assignment]
    return True


def compute_alike(model: nn.Module, other: nn.Module) -> None:
    """Has ``model`` and ``other`` computed by the same operations: with equal weights they then agree to the bit, where
    fused layers and layers with adapters that do nothing yet, or in bfloat16, would agree to rounding."""
    decoders = backbone(model), backbone(other)
    alike = all(map(fused.is_fusable, decoders))
    for decoder in decoders:
        decoder.keel_unfused = not alike  # type: ignore[assignment]
    if _is_compiled(other):
        compile_passes(model)


def compile_passes(model: nn.Module, backend: str = "inductor") -> None:
    """Compiles the passes of the decoder's layers (at their first use), for any shape: one layer, whose code the others
    share; the whole decoder where transformers does not mark its layers. On a CPU passes without gradients stay plain.
    UserError where there is no compiler."""
    if _is_compiled(model):
        return
    if not _has_compiler():
        raise UserError("compile: true needs a C++ compiler; install g++, or use compile: false")
    # Of one layer's code: policy, reference and critic, with and without gradients, with and without shared beginnings.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_FORMS)
    decoder = backbone(model)
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in layers or [decoder]:
        module.compile(dynamic=True, backend=backend)
    decoder.keel_compiled = True  # type: ignore[assignment]


def pays_to_compile(model: nn.Module) -> bool:
    """What ``compile: auto`` means: on a GPU, for models that are worth the half minute (1.7B trains 1.6 times as fast
    on an H100) and whose tokens meet in attention alone."""
    inner = inner_model(model)
    large = sum(p.numel() for p in inner.parameters()) >= COMPILED_FROM
    return large and road(model) == "packed" and next(inner.parameters()).is_cuda and _has_compiler()


def _has_compiler() -> bool:
    """A C++ compiler, which torch needs for a CPU's code, and Triton for what starts a GPU's."""
    compilers = (os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl")
    return any(shutil.which(compiler) for compiler in compilers if compiler)


def _is_compiled(model: nn.Module) -> bool:
    return getattr(backbone(model), "keel_compiled", False)


def hidden_states(
    model: nn.Module, batch: PackedBatch, wanted_W: Tensor | None = None, rows_VH: Tensor | None = None
) -> Tensor:
    """Last hidden states (after the final norm) of every token of a packed batch [T, H], or of the tokens at the places
    ``wanted_W`` [W, H], which costs less. ``rows_VH``: what the model's embedding may be read from; it gets a sparse
    gradient."""
    check_reach(model, batch)
    if not torch.is_grad_enabled() and _is_compiled(model) and batch.ids_T.device.type == "cpu":
        # Measuring stays plain there: small models are measured little, and sampled by other code.
        with torch.compiler.set_stance("force_eager"):
            return _hidden_states(model, batch, wanted_W, None)
    return _hidden_states(model, batch, wanted_W, rows_VH)


def _hidden_states(model: nn.Module, batch: PackedBatch, wanted_W: Tensor | None, rows_VH: Tensor | None) -> Tensor:
    parts = by_reach(model, batch)
    if parts is None and road(model) == "packed":
        return _packed_hidden_states(model, batch, wanted_W, rows_VH)
    way = _HIDDEN_STATES.get(road(model), _packed_hidden_states)
    hidden = way(model, batch) if parts is None else parts.joined(way)
    return hidden if wanted_W is None else hidden.index_select(0, wanted_W)


def _packed_hidden_states(
    model: nn.Module, batch: PackedBatch, wanted_W: Tensor | None = None, rows_VH: Tensor | None = None
) -> Tensor:
    tokens, device = batch.num_tokens, batch.ids_T.device
    spare = rounded(tokens, ROUND_TOKENS, device) - tokens
    ids, positions = F.pad(batch.ids_T, (0, spare))[None], F.pad(batch.positions_T, (0, spare))[None]
    decoder: Any = backbone(model)
    compiled = _is_compiled(model) and torch.is_grad_enabled()  # else plain; on a GPU nothing is fusable
    if not compiled and fused.is_fusable(decoder) and not getattr(inner_model(model), "keel_between", False):
        if rows_VH is not None and type(decoder.embed_tokens) is nn.Embedding:
            embedded = F.embedding(ids[0], rows_VH, decoder.embed_tokens.padding_idx, sparse=True)
        else:
            embedded = decoder.embed_tokens(ids[0])
        cos, sin = decoder.rotary_emb(embedded, position_ids=positions)
        attention = _FusedAttention(Layout.of(batch))
        if wanted_W is not None and len(wanted_W) < FEW_WANTED * tokens:
            padded_W = F.pad(wanted_W, (0, rounded(len(wanted_W), ROUND_WANTED, device) - len(wanted_W)))
            hidden = fused.run_layers(decoder, embedded, cos[0], sin[0], attention, padded_W)[: len(wanted_W)]
        else:
            hidden = fused.run_layers(decoder, embedded, cos[0], sin[0], attention)[:tokens]
            hidden = hidden if wanted_W is None else hidden.index_select(0, wanted_W)
        return decoder.norm(hidden)
    layout = Layout.of(batch)
    _ = layout.allowed if device.type == "cpu" else layout.keys  # here, not in compiled code
    token = _LAYOUT.set(layout)
    try:
        # With a mask of its own, transformers does not look for sequences in the row.
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
        hidden = before_head(model, inputs, {"keel_layout": layout})[0]
    finally:
        _LAYOUT.reset(token)
    return hidden[:tokens] if wanted_W is None else hidden.index_select(0, wanted_W)


class _FusedAttention:
    """``fused.Attention`` over a layout. Grids and their masks are made once for all layers."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.grids: dict[int | None, list[Grid]] = {}

    def __call__(self, block: Any, qkv: Tensor, rotary: Rotary) -> Tensor:
        layout, window = self.layout, fused.window(block)
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
