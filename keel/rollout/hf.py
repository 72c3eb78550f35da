"""Sampling from any transformers causal language model, through its own forward pass and its own cache.

The loop and the choice of tokens are Keel's, so that log-probabilities, seeds and stop tokens behave as in the embedded
sampler. Slower: a batch is decoded to its end before the next starts.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from keel.config import SamplingConfig
from keel.model.packed import ATTENTION, inner_model
from keel.model.precision import autocast
from keel.rollout.sampler import Precision, choose, context_length, room, stream_key, uniforms
from keel.types import Completion


class TransformersSampler:
    """See ``keel.rollout.sampler.Sampler``. In bf16 the forward pass runs under autocast, the head included: the
    log-probabilities then carry the rounding of bfloat16 logits (about 0.03 nats)."""

    def __init__(self, model: nn.Module, stop_ids: Sequence[int], precision: Precision = "fp32") -> None:
        self.model = model
        self.stop_ids = tuple(stop_ids)
        self.precision = precision
        self.accepts = set(inspect.signature(inner_model(model).forward).parameters)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seed: int) -> list[Completion]:
        limits = room(prompts, sampling.max_new_tokens, context_length(self.model))
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))  # little padding in a batch
        done: dict[int, Completion] = {}
        with _ready(self.model), torch.compiler.set_stance("force_eager"):  # `compile: true` is for training
            for start in range(0, len(order), sampling.batch_size):
                part = order[start : start + sampling.batch_size]
                keys = [stream_key(seed, i) for i in part]
                batch = self._batch([prompts[i] for i in part], [limits[i] for i in part], keys, sampling)
                done.update(zip(part, batch, strict=True))
        return [done[i] for i in range(len(prompts))]

    def _batch(
        self, prompts: list[Sequence[int]], limits: list[int], keys: list[int], sampling: SamplingConfig
    ) -> list[Completion]:
        device = next(self.model.parameters()).device
        stops = torch.tensor(self.stop_ids, dtype=torch.int64, device=device)
        noise = uniforms(keys, max(limits)).to(device)
        limit = torch.tensor(limits, device=device)
        longest = max(map(len, prompts))
        ids = torch.tensor([[*[0] * (longest - len(p)), *p] for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
        rows = torch.arange(len(prompts), device=device)  # the prompts that the batch still holds
        cache: Any = None
        chosen: list[list[int]] = [[] for _ in prompts]
        scores: list[list[float]] = [[] for _ in prompts]
        for count in range(max(limits)):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            logits, cache = self._forward(ids, mask, positions, cache)
            tokens, logprobs = choose(logits, noise[rows, count], sampling)
            going = ~torch.isin(tokens, stops) & (limit[rows] > count + 1)
            for row, token, logprob in zip(rows.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
                chosen[row].append(token)
                scores[row].append(logprob)
            ids, mask = tokens[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            keep = going.nonzero().squeeze(1)
            if len(keep) < len(rows):
                if not len(keep):
                    break
                cache.batch_select_indices(keep)
                rows, ids, mask = rows[keep], ids[keep], mask[keep]
        return [Completion("", tuple(c), tuple(s), c[-1] in self.stop_ids) for c, s in zip(chosen, scores, strict=True)]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """-> (logits [S, V] of the last position, the cache)."""
        inputs: dict[str, Any] = {
            "input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True,
            "position_ids": positions, "logits_to_keep": 1,
        }  # fmt: skip
        optional = ("position_ids", "logits_to_keep")  # ALiBi models take no positions, older ones make all logits
        inputs = {name: value for name, value in inputs.items() if name not in optional or name in self.accepts}
        with autocast(ids.device.type, self.precision):
            out = self.model(**inputs)
        return out.logits[:, -1], out.past_key_values


@contextlib.contextmanager
def _ready(model: nn.Module) -> Iterator[None]:
    """Inference mode of the modules (no dropout), with an attention that knows caches; both are put back."""
    inner = inner_model(model)
    training, packed = model.training, inner.config._attn_implementation == ATTENTION
    model.eval()
    if packed:
        inner.set_attn_implementation("sdpa" if inner._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.train(training)
        if packed:
            inner.set_attn_implementation(ATTENTION)
