"""Sampling from any transformers causal language model, through its own forward pass and its own cache.

The choice of tokens is Keel's, so that log-probabilities, seeds and stop tokens behave as in the embedded sampler. So
is the loop, where left padding is exact; else transformers' own ``generate`` decodes, which knows each architecture's
caches (see ``keel.rollout.roads``). Slower than the embedded sampler: a batch is decoded to its end before the next
starts.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from keel.model.held import in_float32
from keel.model.modules import accepted, context_length, evaluating, inner_model, set_attention
from keel.model.packed import ATTENTION
from keel.model.padded import stretched_beyond
from keel.precision import Precision, autocast
from keel.recipe.sections import SamplingConfig
from keel.rollout.roads import Road, passable
from keel.rollout.tokens import choose, completion_limits, finite, streams_of, uniforms
from keel.types import Completion


class TransformersSampler:
    """See ``keel.rollout.sampler.Sampler``. In bf16 the forward pass runs under autocast, the head included: the
    log-probabilities then carry the rounding of bfloat16 logits (about 0.03 nats).

    ``generate`` raises UserError for an architecture whose samples do not have the log-probabilities that its forward
    pass gives, however they are decoded."""

    def __init__(self, model: nn.Module, stop_ids: Sequence[int], precision: Precision = "fp32") -> None:
        self.model = model
        self.stop_ids = tuple(stop_ids)
        self.precision = precision
        self.accepts = set(inspect.signature(inner_model(model).forward).parameters)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seed: int,
        streams: Sequence[int] | None = None,
    ) -> list[Completion]:
        limits = completion_limits(prompts, sampling.max_new_tokens, context_length(self.model))
        if not prompts:
            return []
        road = self.road(max(len(p) + n for p, n in zip(prompts, limits, strict=True)))
        with _ready(self.model):
            return finite(self.along(road, prompts, limits, sampling, seed, streams))

    @torch.inference_mode()
    def road(self, longest: int) -> Road:
        """How sequences of up to ``longest`` tokens are decoded. UserError as from ``generate``."""
        plain = TransformersSampler(self.model, ())  # as the road is tried: without stops, in full precision
        with _ready(self.model), in_float32(self.model):
            return passable(self.model, longest, plain.along)

    def along(
        self,
        road: Road,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        sampling: SamplingConfig,
        seed: int,
        streams: Sequence[int] | None = None,
    ) -> list[Completion]:
        """One completion for each prompt, of at most ``limits`` tokens. The model is ready (see :func:`_ready`)."""
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))  # little padding in a batch
        alike = [list(same) for _, same in groupby(order, key=lambda i: len(prompts[i]))]
        size = 1 if road.batch == "alone" else sampling.batch_size
        keys = streams_of(seed, len(prompts), streams)
        done: dict[int, Completion] = {}
        for rows in [order] if road.batch == "any" else alike:
            for part in (rows[start : start + size] for start in range(0, len(rows), size)):
                batch = self._padded([prompts[i] for i in part])
                limit = torch.tensor([limits[i] for i in part], device=batch[0].device)
                noise = uniforms([keys[i] for i in part], int(limit.max())).to(batch[0].device)
                decode = self._generate if road.way == "generate" else self._loop
                completions = decode(*batch, limit, noise, sampling, road)
                done.update(zip(part, completions, strict=True))
        return [done[i] for i in range(len(prompts))]

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Prompts padded on the left: (ids [S, L], mask [S, L], 1 where there is a token)."""
        longest, device = max(map(len, prompts)), next(self.model.parameters()).device
        pad = getattr(inner_model(self.model).config.get_text_config(), "pad_token_id", None)
        pad = pad if isinstance(pad, int) and pad >= 0 else 0
        ids = torch.tensor([[*[pad] * (longest - len(p)), *p] for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        return ids, (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()

    def _loop(
        self, ids: Tensor, mask: Tensor, limit: Tensor, noise: Tensor, sampling: SamplingConfig, road: Road
    ) -> list[Completion]:
        stops = torch.tensor(self.stop_ids, dtype=torch.int64, device=ids.device)
        rows = torch.arange(len(ids), device=ids.device)  # the prompts that the batch still holds
        plain = road.way == "plain"
        cache: Any = None
        drawn = Drawn(len(ids))
        for count in range(noise.shape[1]):
            if plain:
                logits = self._plain(ids)
            else:
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                logits, cache = self._forward(ids, mask, positions, cache)
            tokens, logprobs = choose(logits, noise[rows, count], sampling)
            going = ~torch.isin(tokens, stops) & (limit[rows] > count + 1)
            drawn.add(rows, tokens, logprobs)
            ids = torch.cat([ids, tokens[:, None]], 1) if plain else tokens[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            keep = going.nonzero().squeeze(1)
            if len(keep) < len(rows):
                if not len(keep):
                    break
                if cache is not None:
                    cache.batch_select_indices(keep)
                rows, ids, mask = rows[keep], ids[keep], mask[keep]
        return drawn.completions(self.stop_ids)

    def _plain(self, ids: Tensor) -> Tensor:
        """Logits [S, V] after sequences of one length, which come without padding."""
        inner: Any = inner_model(self.model)
        with autocast(ids.device.type, self.precision):
            return inner(**accepted(inner, input_ids=ids, use_cache=False)).logits[:, -1]  # type: ignore[no-any-return]

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

    def _generate(
        self, ids: Tensor, mask: Tensor, limit: Tensor, noise: Tensor, sampling: SamplingConfig, road: Road
    ) -> list[Completion]:
        """By transformers' ``generate``, greedy over what :class:`_Chosen` leaves of the logits."""
        inner: Any = inner_model(self.model)
        chosen = _Chosen(limit, noise, sampling, torch.tensor(self.stop_ids, dtype=torch.int64, device=ids.device))
        settings = GenerationConfig(max_new_tokens=noise.shape[1], do_sample=False, pad_token_id=int(ids[0, 0]))
        with autocast(ids.device.type, self.precision):
            if stretched_beyond(inner.config.get_text_config()) is not None:
                inner(input_ids=ids[:1, -1:])  # a short text: its frequencies go back to where they begin
            inner.generate(
                ids, attention_mask=mask, generation_config=settings, logits_processor=[chosen],
                stopping_criteria=[_Ended(chosen)],
            )  # fmt: skip
        return chosen.drawn.completions(self.stop_ids)


class Drawn:
    """What each row of a batch has drawn so far."""

    def __init__(self, rows: int) -> None:
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.logprobs: list[list[float]] = [[] for _ in range(rows)]

    def add(self, rows: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        for row, token, logprob in zip(rows.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
            self.ids[row].append(token)
            self.logprobs[row].append(logprob)

    def completions(self, stop_ids: Sequence[int]) -> list[Completion]:
        rows = zip(self.ids, self.logprobs, strict=True)
        return [Completion("", tuple(ids), tuple(logprobs), ids[-1] in stop_ids) for ids, logprobs in rows]


class _Chosen(LogitsProcessor):
    """Draws Keel's next tokens, and leaves them as the only possible ones."""

    def __init__(self, limit: Tensor, noise: Tensor, sampling: SamplingConfig, stops: Tensor) -> None:
        self.limit, self.noise, self.sampling, self.stops = limit, noise, sampling, stops
        self.drawn = Drawn(len(limit))
        self.going = torch.ones_like(limit, dtype=torch.bool)
        self.count = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, logprobs = choose(scores, self.noise[:, min(self.count, self.noise.shape[1] - 1)], self.sampling)
        rows = self.going.nonzero().squeeze(1)
        self.drawn.add(rows, tokens[rows], logprobs[rows])
        self.count += 1
        self.going &= ~torch.isin(tokens, self.stops) & (self.limit > self.count)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


class _Ended(StoppingCriteria):
    def __init__(self, chosen: _Chosen) -> None:
        self.chosen = chosen

    def __call__(self, input_ids: Tensor, scores: Any, **_: object) -> Tensor:
        return ~self.chosen.going


@contextlib.contextmanager
def _ready(model: nn.Module) -> Iterator[None]:
    """Inference mode of the modules (no dropout), with an attention that knows caches and none of the settings that a
    checkpoint brings for ``generate``; all are put back."""
    inner: Any = inner_model(model)
    packed = inner.config._attn_implementation == ATTENTION
    settings = inner.generation_config
    inner.generation_config = GenerationConfig()
    if packed:
        loaded = getattr(inner, "keel_attention", None)
        set_attention(inner, loaded or ("sdpa" if inner._supports_sdpa else "eager"))
    try:
        with evaluating(model), torch.compiler.set_stance("force_eager"):  # `compile: true` is for training
            yield
    finally:
        inner.generation_config = settings
        if packed:
            set_attention(inner, ATTENTION)
