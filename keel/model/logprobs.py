"""The only place where logits become log-probabilities and entropy.

A full [T, V] tensor of logits is the largest thing in a training step (and its softmax the second largest), so it is
never made: positions that need a log-probability are scored in chunks, and the backward pass makes each chunk again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from keel.model.packed import hidden_states, inner_model
from keel.model.passes import passes
from keel.types import PackedBatch

CHUNK_ELEMENTS = 4_000_000  # logits made at once: 16 MB in float32, what a CPU's last-level cache can take
KEPT_ELEMENTS = 24_000_000  # probabilities kept for the backward pass rather than made again: 48 MB in bfloat16


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
    hidden_CH = hidden_states(model, batch, source_C)
    return head_logprobs(model, hidden_CH, ids_C, temperature, entropy)


def head_logprobs(
    model: nn.Module, hidden_CH: Tensor, ids_C: Tensor, temperature: float = 1.0, entropy: bool = False
) -> LogProbs:
    """The head's part of :func:`token_logprobs`, for hidden states [C, H] that are there already."""
    inner = inner_model(model)
    head = inner.get_output_embeddings()
    scale, softcap = _logit_transform(inner)
    # The head runs in float32 whatever the precision: rounding logits of size 10 to bfloat16 would move a
    # log-probability by 0.04 nats, more than many a policy update does.
    weight = head.weight.float()
    bias = head.bias.float() if getattr(head, "bias", None) is not None else None
    device = hidden_CH.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
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


def _logit_transform(model: nn.Module) -> tuple[float, float | None]:
    """(factor, soft cap) that some architectures put on their logits (Granite, Cohere; Gemma 2)."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    scale = 1.0
    if getattr(config, "logits_scaling", None):
        scale = 1.0 / config.logits_scaling
    elif getattr(config, "logit_scale", None):
        scale = config.logit_scale
    return scale, getattr(config, "final_logit_softcapping", None)


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
        if any(ctx.needs_input_grad) and softcap is None and tokens * vocabulary <= KEPT_ELEMENTS:
            kept = hidden.new_empty(tokens, vocabulary, dtype=low)
        for part in _chunks(tokens, vocabulary):
            logits = _logits(hidden[part], weight, bias, scale, softcap)
            entropies, probs = ent[part] if entropy else None, None if kept is None else kept[part]
            passes(hidden.device).probabilities(logits, ids[part], logp[part], entropies, probs)
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
        dent = None if grad_ent is None else (grad_ent * scale, ent)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = torch.empty_like(bias) if bias is not None and need_bias else None
        low_hidden = hidden.to(low)
        if kept is not None and dent is None:
            parts = [slice(0, weight.shape[0])]
        else:
            kept, parts = None, _chunks(weight.shape[0], hidden.shape[0])
            own = torch.nn.functional.embedding(ids, weight)
            mine = torch.linalg.vecdot(hidden, own) + (0 if bias is None else bias[ids])
            total = _softcapped(mine * scale, softcap) - logp  # log sum exp
        for part in parts:
            if kept is not None:
                grad = passes(hidden.device).logit_gradient_(kept, ids, g)  # in place: nobody reads them again
            else:
                part_bias = None if bias is None else bias[part]
                logits = _logits(hidden, weight[part], part_bias, scale, softcap)
                grad = _logit_gradient(logits, total, ids - part.start, g, dent, softcap).to(low)
            if grad_hidden is not None:
                grad_hidden += grad @ weight[part].to(low)
            if grad_weight is not None:
                grad_weight[part] = grad.t() @ low_hidden
            if grad_bias is not None:
                grad_bias[part] = grad.sum(0, dtype=torch.float32)
        return grad_hidden, grad_weight, grad_bias, *[None] * 5


def _logit_gradient(
    logits: Tensor, total: Tensor, ids: Tensor, g: Tensor, dent: tuple[Tensor, Tensor] | None, softcap: float | None
) -> Tensor:
    """[C, part of the vocabulary]; ``total``: log sum exp of all logits; ``dent``: entropies' gradients, and they."""
    slope = None if softcap is None else 1 - (logits / softcap) ** 2
    logps = logits.sub_(total[:, None])
    here = ((ids >= 0) & (ids < logits.shape[1])).nonzero().squeeze(1)
    if dent is None:
        grad = logps.exp_().mul_(-g[:, None])
    else:
        grad = logps.exp().mul_(-g[:, None] - (logps + dent[1][:, None]) * dent[0][:, None])
    grad[here, ids[here]] += g[here]
    return grad if slope is None else grad.mul_(slope)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    if hidden.device.type == "cpu" and torch.backends.mkldnn.is_available():
        # oneDNN's float32 product, which torch leaves to MKL otherwise: 10-25% faster here on an AMD processor.
        logits = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
    else:
        logits = torch.nn.functional.linear(hidden, weight, bias)
    if scale != 1.0:
        logits *= scale
    return _softcapped(logits, softcap)


def _softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _chunks(rows: int, columns: int) -> list[slice]:
    """Of the rows, so that a chunk has few elements."""
    size = max(16, CHUNK_ELEMENTS // max(1, columns))
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
