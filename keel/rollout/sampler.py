"""The protocol that every sampler follows, and the sampler of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from keel.precision import Precision
from keel.recipe.sections import Backend, SamplingConfig
from keel.rollout.embedded import EmbeddedSampler
from keel.rollout.hf import TransformersSampler
from keel.rollout.llama import why_unsupported
from keel.rollout.vllm import VllmSampler
from keel.types import Completion, UserError


class Sampler(Protocol):
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seed: int,
        streams: Sequence[int] | None = None,
    ) -> list[Completion]:
        """One completion for each prompt (token ids), in the order of the prompts.

        Prompt ``i`` draws from a stream of random numbers that ``(seed, i)`` determines, so neither ``batch_size`` nor
        the order in which sequences finish changes what is sampled (beyond the rounding of a differently shaped
        matrix product, which can tip a draw that lies within it). ``Completion.text`` is left empty. ``streams``: what
        determines each prompt's stream in the place of ``seed`` and its place (``keel.rollout.tokens.stream_key``).

        Raises UserError for an empty prompt and for one that leaves no room in the model's context. A completion that
        reaches the context limit ends there with ``finished=False``.
        """
        ...


def make_sampler(model: nn.Module, backend: Backend, stop_ids: Sequence[int], precision: Precision = "fp32") -> Sampler:
    """The sampler of a backend. It reads ``model``'s parameters anew at each call of ``generate``.

    ``auto`` is the embedded sampler where it knows the architecture, else transformers. ``stop_ids`` end a completion.
    """
    if backend == "vllm":
        return VllmSampler(model, stop_ids, precision)
    reason = why_unsupported(model)
    if backend == "embedded" and reason:
        raise UserError(f"sampling.backend: the embedded sampler does not support this model ({reason}); "
                        "use auto or transformers")  # fmt: skip
    if backend == "transformers" or reason:
        return TransformersSampler(model, stop_ids, precision)
    return EmbeddedSampler(model, stop_ids, precision)
