"""A language model as a table, sampled as a `keel.rollout.sampler.Sampler`: what it writes after a text is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

from tiny import tiny_tokenizer

from keel.recipe.sections import SamplingConfig
from keel.rollout.tokens import stream_key, uniforms
from keel.types import Completion

END = 0  # the tiny tokenizer's <|end|>


@cache
def encoded(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer().encode(text, add_special_tokens=False))


@cache
def decoded(ids: tuple[int, ...]) -> str:
    return str(tiny_tokenizer().decode(list(ids)))


@dataclass
class Tabular:
    """``options(question, reply so far)`` -> the texts that may come next with their probabilities; one that ends with
    "!" ends the reply there, without the sign. A text is drawn by the random number of its first token."""

    options: Callable[[str, str], Sequence[tuple[str, float]]]
    stops: frozenset[int] = frozenset({END})
    calls: list[int] = field(default_factory=list)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seed: int,
        streams: Sequence[int] | None = None,
    ) -> list[Completion]:
        self.calls.append(len(prompts))
        keys = [stream_key(seed, i) for i in range(len(prompts))] if streams is None else streams
        numbers = uniforms(keys, sampling.max_new_tokens + 1).tolist()
        return [self._one(list(p), sampling, of) for p, of in zip(prompts, numbers, strict=True)]

    def _one(self, prompt: list[int], sampling: SamplingConfig, numbers: list[float]) -> Completion:
        new: list[int] = []
        while True:
            question, _, reply = decoded((*prompt, *new)).partition("\n")
            options = self.options(question, reply)
            text = options[0][0]
            if sampling.temperature == 0:
                text = max(options, key=lambda option: option[1])[0]
            else:
                left = numbers[len(new)]
                for text, probability in options:  # noqa: B007 - the last one stays
                    left -= probability
                    if left <= 0:
                        break
            for token in [*encoded(text.removesuffix("!")), *([END] if text.endswith("!") else [])]:
                new.append(token)
                if token in self.stops or len(new) == sampling.max_new_tokens:
                    return Completion("", tuple(new), (0.0,) * len(new), token in self.stops)
