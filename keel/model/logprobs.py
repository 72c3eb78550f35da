"""The only place where logits become log-probabilities and entropy.

A full [T, V] tensor of logits is the largest thing in a training step (and its softmax the second largest), so it is
never made: positions that need a log-probability are scored in chunks, and the backward pass makes each chunk again.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from keel.kernels import dispatch, plain
from keel.kernels.dispatch import products_of
from keel.model.logits import logit_form
from keel.model.merged import head_weight
from keel.model.modules import head_of, inner_model
from keel.model.packed import hidden_states
from keel.types import PackedBatch

# Logits made at once: on a CPU 16 MB in float32, what its last-level cache can take; on a GPU 256 MB, products large
# enough for all of it.
CHUNK_ELEMENTS = {"cpu": 4_000_000, "cuda": 64_000_000}
# Probabilities kept for the backward pass rather than made again: 48 MB in bfloat16; on a GPU 2.6 GB, a batch of 8k
# tokens under a vocabulary of 152k.
KEPT_ELEMENTS = {"cpu": 24_000_000, "cuda": 1_280_000_000}


@dataclass(frozen=True)
class LogProbs:
    """logp_C: log-probability (nats) of each masked token; entropy_C: entropy (nats) of the distribution it was drawn
    from, or None when not asked for. Order: the True positions of ``mask_T``."""

    logp_C: Tensor
    entropy_C: Tensor | None


def predicting(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """(positions in T whose hidden state predicts a masked token, ids of those tokens), both [C]."""
    before_T = torch.arange(-1, batch.num_tokens - 1, device=batch.ids_T.device)
    if batch.fork_B is not None:
        forked = batch.fork_B >= 0
        before_T[batch.cu_seqlens[:-1][forked]] = batch.fork_B[forked]
    target = batch.mask_T.nonzero().squeeze(1)
    return before_T[target], batch.ids_T[target]


def token_logprobs(model: nn.Module, batch: PackedBatch, temperature: float = 1.0, entropy: bool = False) -> LogProbs:
    """Log-probabilities of the tokens where ``batch.mask_T`` is True, under ``softmax(logits / temperature)``."""
    source_C, ids_C = predicting(batch)
    inner = inner_model(model)
    weight, _ = head_weight(head_of(inner))
    if torch.is_grad_enabled() and weight is getattr(inner.get_input_embeddings(), "weight", None):
        rows, weight = _BothEnds.apply(weight)
        hidden_CH = hidden_states(model, batch, source_C, rows)
    else:
        hidden_CH = hidden_states(model, batch, source_C)
    return head_logprobs(model, hidden_CH, ids_C, temperature, entropy, weight)


class _BothEnds(torch.autograd.Function):
    """A weight that is embedding and head, once for each: the embedding's gradient, of a few rows, is then added to the
    head's in place. Left to autograd both are whole matrices, the largest of a small model under a large vocabulary."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor | None, whole: Tensor | None) -> Tensor | None:  # type: ignore[override]
        if whole is None:
            return None if rows is None else rows.to_dense()
        return whole if rows is None else whole.add_(rows)


def head_logprobs(
    model: nn.Module,
    hidden_CH: Tensor,
    ids_C: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    weight: Tensor | None = None,
) -> LogProbs:
    """The head's part of :func:`token_logprobs`, for hidden states [C, H] that are there already; ``weight``: the
    head's, if not as the model has it."""
    inner = inner_model(model)
    own, bias = head_weight(head_of(inner))
    form = logit_form(model)
    scale, softcap = form.scale, form.softcap
    # Logits are float32 whatever the precision: rounded to bfloat16, those of size 10 would move a log-probability by
    # 0.04 nats, more than many a policy update does. What is multiplied is rounded, which on the harbor's base model
    # moves one by 0.0004 in the mean, a third of what layers in bfloat16 do.
    weight = own if weight is None else weight
    bias = None if bias is None else bias.float()
    device = hidden_CH.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    if not (weight.is_cuda and weight.dtype == low):  # there it is multiplied as it is, without a copy in float32
        weight = weight.float()
    with torch.autocast(device, enabled=False):
        logp, ent = _HeadLogProbs.apply(
            hidden_CH.float(),
            weight,
            bias,
            ids_C,
            scale / temperature,
            softcap / temperature if softcap else None,
            entropy,
            low,
        )
    return LogProbs(logp, ent if entropy else None)


class _HeadLogProbs(torch.autograd.Function):
    """Linear head, softmax and gather in chunks of tokens. The backward pass makes the logits again, in chunks of the
    vocabulary, so that each weight's gradient is written once; but for small batches and vocabularies, whose
    probabilities are kept. Gradients' products run in ``low`` precision.

    With z = logits, p = softmax(z), H = entropy:  d logp_y / dz = onehot(y) - p,  dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        scale: float,
        softcap: float | None,
        entropy: bool,
        low: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        logp = hidden.new_empty(tokens)
        ent = hidden.new_zeros(tokens if entropy else 0)
        kept = None
        if any(ctx.needs_input_grad) and softcap is None and tokens * vocabulary <= _of(KEPT_ELEMENTS, hidden):
            kept = hidden.new_empty(tokens, vocabulary, dtype=low)
        product, scratch = _Product(weight, low), _scratch(hidden, tokens, vocabulary)
        for part in _chunks(tokens, vocabulary, hidden):
            logits = _transformed(product(hidden[part], scratch), bias, scale, softcap)
            entropies, probs = ent[part] if entropy else None, None if kept is None else kept[part]
            _passes(hidden).probabilities(logits, ids[part], logp[part], entropies, probs)
        ctx.save_for_backward(hidden, weight, bias, ids, kept, logp, ent)
        ctx.settings = (scale, softcap, low)
        ctx.set_materialize_grads(False)
        return logp, ent

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_ent: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        hidden, weight, bias, ids, kept, logp, ent = ctx.saved_tensors
        scale, softcap, low = ctx.settings
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        g = torch.zeros_like(logp) if grad_logp is None else grad_logp * scale
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = torch.empty_like(bias) if bias is not None and need_bias else None
        low_hidden = hidden.to(low)

        def add(part: slice, grad: Tensor) -> None:
            """What the gradient of a part of the vocabulary's logits [C, part] gives the others."""
            if grad_hidden is not None:
                grad_hidden.add_(grad @ weight[part].to(low))
            if grad_weight is not None:
                grad_weight[part] = grad.t() @ low_hidden
            if grad_bias is not None:
                grad_bias[part] = grad.sum(0, dtype=torch.float32)

        if kept is not None and grad_ent is None:  # in place: nobody reads the probabilities again
            add(slice(0, len(weight)), _passes(hidden).logit_gradient_(kept, ids, g))
            return grad_hidden, grad_weight, grad_bias, *[None] * 5
        rounded = _Product.rounding(weight, low)
        own = torch.nn.functional.embedding(ids, weight)
        mine = torch.linalg.vecdot(hidden.to(rounded).float(), own.to(rounded).float())[:, None]
        mine = _transformed(mine, None if bias is None else bias[ids, None], scale, softcap).squeeze(1)
        total = mine - logp  # log sum exp
        dent = None if grad_ent is None else grad_ent * scale
        scratch, low_scratch = (_scratch(hidden, len(weight), len(hidden), kind) for kind in (torch.float32, low))
        for part in _chunks(len(weight), len(hidden), hidden):
            logits = _Product(weight[part], low)(hidden, scratch)
            logits = _transformed(logits, None if bias is None else bias[part], scale, softcap)
            slope = None if softcap is None else 1 - (logits / softcap) ** 2
            grad = low_scratch[: logits.numel()].view_as(logits)
            _passes(hidden).logit_gradient(logits, total, ids - part.start, g, ent, dent, grad)
            add(part, grad if slope is None else grad.mul_(slope))
        return grad_hidden, grad_weight, grad_bias, *[None] * 5


def _passes(x: Tensor) -> ModuleType:
    """``keel.kernels.plain``, or what does the same faster where ``x`` lies."""
    if x.device.type == "cpu":
        return dispatch.passes()
    return (_gpu_passes() if x.is_cuda else None) or plain


@functools.cache
def _gpu_passes() -> ModuleType | None:
    try:
        return importlib.import_module("keel.model.gpu_passes")
    except ImportError:  # Triton comes with torch's CUDA builds, not with all of them
        return None


class _Product:
    """x weight' [T, V] of x [T, H], both float32, in float32. Where the machine can, the numbers that are multiplied
    are rounded to ``low``, but not the sums, which is what a linear layer in bfloat16 does."""

    def __init__(self, weight: Tensor, low: torch.dtype) -> None:
        self.low = self.rounding(weight, low)
        self.products = products_of(self.low) if weight.device.type == "cpu" else None
        self.weight: Any = self.products.Packed.of(weight, self.low) if self.products else weight.to(self.low)

    @staticmethod
    def rounding(weight: Tensor, low: torch.dtype) -> torch.dtype:
        """To what the numbers are rounded."""
        rounds = weight.is_cuda or (weight.device.type == "cpu" and weight.shape[1] % 2 == 0 and products_of(low))
        return low if rounds else torch.float32

    def __call__(self, x_TH: Tensor, scratch: Tensor) -> Tensor:
        """In the memory of ``scratch`` where it can."""
        x_TH = x_TH.to(self.low)
        if self.products:
            out = scratch[: len(x_TH) * self.weight.outputs].view(len(x_TH), -1)
            return self.products.multiply(x_TH.contiguous(), self.weight, out)  # type: ignore[no-any-return]
        if self.low != torch.float32:
            out = scratch[: len(x_TH) * len(self.weight)].view(len(x_TH), -1)
            return torch.mm(x_TH, self.weight.t(), out_dtype=torch.float32, out=out)
        return torch.nn.functional.linear(x_TH, self.weight)


def _scratch(like: Tensor, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for the largest of the chunks: one piece for all, because pieces that come and go leave holes."""
    largest = max((part.stop - part.start for part in _chunks(rows, columns, like)), default=0)
    return like.new_empty(largest * columns, dtype=dtype)


def _transformed(logits: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """The logits, which are overwritten, after what some architectures do to them."""
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    return _softcapped(logits, softcap)


def _softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _of(limits: dict[str, int], x: Tensor) -> int:
    return limits.get(x.device.type, limits["cpu"])


def _chunks(rows: int, columns: int, like: Tensor) -> list[slice]:
    """Of the rows, so that a chunk has few elements for the device; in wholes of what products multiply at once."""
    size = max(16, _of(CHUNK_ELEMENTS, like) // max(1, columns))
    size -= size % 64 if size > 64 else 0
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def masked_offsets(batch: PackedBatch) -> Tensor:
    """Offsets [B+1] of each sequence's masked tokens within the [C] tensors that this module returns."""
    running = torch.cat([batch.mask_T.new_zeros(1, dtype=torch.int64), batch.mask_T.long().cumsum(0)])
    return running[batch.cu_seqlens]


def sequence_sums(values_C: Tensor, batch: PackedBatch) -> Tensor:
    """Sums of per-token values over each sequence: [C] -> [B]."""
    counts = masked_offsets(batch).diff()
    rows = torch.repeat_interleave(torch.arange(batch.num_sequences, device=values_C.device), counts)
    return values_C.new_zeros(batch.num_sequences).index_add(0, rows, values_C)
