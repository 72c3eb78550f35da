"""How a model may be decoded: which batches and caches give what the model says of a prompt alone.

Left padding is exact where nothing but attention mixes tokens and positions come from the mask. Recurrent layers read
padding, convolutions reach over it, some masks count it; caches differ, and some can be read by the model alone. A
:class:`Road` is one way to decode, and :func:`passable` tries them on a few tokens, fastest first: the right one is
where sampled tokens have the log-probabilities of the model's plain forward pass over the unpadded sequence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from keel.model.modules import accepted, inner_model
from keel.model.padded import stretched_beyond
from keel.model.probe import identity
from keel.recipe.sections import SamplingConfig
from keel.rollout.tokens import not_finite
from keel.types import Completion, UserError

TOLERANCE, LOW_TOLERANCE = 1e-3, 2e-2  # nats; the second on GPUs and in half precision, whose products round
PROBE = SamplingConfig(temperature=1.0, max_new_tokens=6)
# What layers of some kind see or compress at once: behaviour changes once a text is longer.
_SPANS = re.compile(r".*window(_size|_len)?|.*chunk_size|.*chunk_len(gth)?|.*block_size|index_topk|local_attention")


@dataclass(frozen=True, slots=True)
class Road:
    """``way``: Keel's own loop over left-padded batches, which drops rows that are done; transformers' ``generate``,
    with Keel's choice of tokens; or, whatever the architecture does with caches and positions, a plain forward pass
    over all that is there for each token. ``batch``: prompts together, of any length or of equal length, or each
    alone."""

    way: Literal["loop", "generate", "plain"]
    batch: Literal["any", "equal", "alone"]


ROADS = (
    Road("loop", "any"), Road("generate", "any"), Road("generate", "equal"), Road("generate", "alone"),
    Road("plain", "equal"), Road("plain", "alone"),
)  # fmt: skip

_KEPT: dict[tuple[str, frozenset[int]], Road] = {}

Decode = Callable[[Road, Sequence[Sequence[int]], Sequence[int], SamplingConfig, int], list[Completion]]


def passable(model: nn.Module, longest: int, decode: Decode) -> Road:
    """The fastest road that is right for ``model`` and sequences of up to ``longest`` tokens; found out once in a
    process for an architecture with its config. UserError naming the architecture where none is, or where its logits
    are not finite."""
    inner: Any = inner_model(model)
    crossed = frozenset(span for span in spans(inner.config.get_text_config()) if span < longest)
    key = identity(inner), crossed
    if key not in _KEPT:
        _KEPT[key] = _find(model, crossed, longest, decode)
    inner.keel_road_of_samples = _KEPT[key]
    return _KEPT[key]


def spans(config: Any) -> set[int]:
    """The lengths beyond which a model may behave otherwise: of windows, chunks and blocks, and where positions are
    stretched."""
    stated = config.to_dict()
    found = {value for key, value in stated.items() if isinstance(value, int) and value > 1 and _SPANS.fullmatch(key)}
    stretched = stretched_beyond(config)
    return found if stretched is None else found | {stretched}


def _find(model: nn.Module, crossed: frozenset[int], longest: int, decode: Decode) -> Road:
    config = inner_model(model).config.get_text_config()
    stretched = stretched_beyond(config)
    room = longest
    if follows_length := stretched in crossed:  # beyond it a cache's keys were turned otherwise than a plain pass turns
        assert stretched is not None
        room = stretched - PROBE.max_new_tokens
    # Twice the span: a sparse layer picks what a window of that size need not. One padded prompt is beyond it, too.
    span = max((span for span in crossed if span < room - 3), default=1)
    length = min(2 * span + 3, room)
    prompts = _prompts(config.vocab_size, (3, min(span + 2, length), length, length))
    few, most = PROBE.max_new_tokens - 2, PROBE.max_new_tokens
    limits = [most, few, few, most, most]  # some end before others
    trouble = ""
    for road in ROADS:
        if follows_length and road.batch == "any":
            continue
        try:
            completions = decode(road, prompts, limits, PROBE, 0)
            right = _as_alone(model, prompts, completions)
        except UserError:
            raise
        except Exception as error:  # whatever an architecture raises on a road that is not its own
            trouble = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:120]}"
            continue
        if right:
            return road
        trouble = "its log-probabilities are not those of its forward pass, however it is decoded"
    raise UserError(
        f"{type(inner_model(model)).__name__} cannot be sampled from ({trouble}); choose another architecture"
    )


def _prompts(vocabulary: int, lengths: Sequence[int]) -> list[list[int]]:
    """Of tokens from the middle of the vocabulary, where few are special; no token twice but in the last prompt."""
    generator = torch.Generator().manual_seed(0)
    low, high = vocabulary // 4, max(vocabulary // 4 + 1, vocabulary * 3 // 4)
    every = (torch.randperm(high - low, generator=generator) + low).tolist()
    prompts = [[every[(7 * i + n) % len(every)] for n in range(length)] for i, length in enumerate(lengths)]
    return [*prompts, [every[n % 3] for n in range(lengths[-1])]]


def _as_alone(model: nn.Module, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> bool:
    """Whether the completions' log-probabilities are those of a plain forward pass over each sequence alone. Where a
    layer selects among keys that tie, as those of equal tokens do, that pass picks by the text's length: then they must
    be those of the pass over the text before each token. Without equal tokens this is seldom so in a causal model."""
    parameter = next(model.parameters())
    exact = parameter.device.type == "cpu" and parameter.dtype == torch.float32
    tolerance = TOLERANCE if exact else LOW_TOLERANCE
    off = 0
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion.ids]], device=parameter.device)
        own = _next_logprobs(model, ids)[len(prompt) - 1 : -1].cpu()
        for n, (token, logprob) in enumerate(zip(completion.ids, completion.logprobs, strict=True)):
            if not abs(float(own[n, token]) - logprob) <= tolerance:
                before = _next_logprobs(model, ids[:, : len(prompt) + n])[-1]
                if not abs(float(before[token]) - logprob) <= tolerance:
                    return False
                off += prompt is not prompts[-1]
    return 4 * off <= sum(len(c.ids) for c in completions[:-1])


def _next_logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities [L, V] of what follows each token of a sequence [1, L]."""
    inner: Any = inner_model(model)
    logp = torch.log_softmax(inner(**accepted(inner, input_ids=ids, use_cache=False)).logits[0].float(), -1)
    if bool(torch.isnan(logp).any()):
        raise not_finite("a prompt of a few ordinary tokens")
    return logp
