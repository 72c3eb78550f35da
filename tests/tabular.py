"""A language model as a table, sampled as a `keel.rollout.sampler.Sampler`: what it writes after a text is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tiny import tiny_tokenizer

from keel.recipe.sections import SamplingConfig
from keel.rollout.tokens import stream_key, uniforms
from keel.types import Completion

END = 0  # the tiny tokenizer's <|end|>


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
        return [self._one(list(p), sampling, key) for p, key in zip(prompts, keys, strict=True)]

    def _one(self, prompt: list[int], sampling: SamplingConfig, key: int) -> Completion:
        tokenizer, new = tiny_tokenizer(), []
        numbers = uniforms([key], sampling.max_new_tokens + 1)[0].tolist()
        while True:
            question, _, reply = tokenizer.decode([*prompt, *new]).partition("\n")
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
            ids = tokenizer.encode(text.removesuffix("!"), add_special_tokens=False)
            for token in [*ids, *([END] if text.endswith("!") else [])]:
                new.append(token)
                if token in self.stops or len(new) == sampling.max_new_tokens:
                    return Completion("", tuple(new), (0.0,) * len(new), token in self.stops)
