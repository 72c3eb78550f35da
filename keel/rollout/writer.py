"""Writers: what answers conversations with texts, whether a model that is sampled here or one behind an endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from keel.data.chat import Chat
from keel.endpoint import Answer, Endpoint, Question
from keel.recipe.judges import EndpointRef
from keel.recipe.sections import SamplingConfig
from keel.rollout.collect import Choice, sample_replies
from keel.rollout.sampler import Sampler
from keel.rollout.tokens import stream_key
from keel.types import Completion, Message, Prompt, Reporter, place_of

_CUT = ("length", "content_filter")  # reasons to end that are not the model's own


class Writer(Protocol):
    def write(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int) -> list[Completion | None]:
        """One reply a prompt, in order. A prompt that stands there twice is answered twice, by draws of their own.

        Of a completion, ``text`` and ``finished`` can be relied on. None stands for a reply that could not be had,
        which only endpoints know: at most ``keel.endpoint.MISSING_BOUND`` of them, more is a UserError. Raises
        UserError for settings that the writer cannot follow.
        """
        ...


class SamplerWriter:
    """A model as a writer. ``sampler`` ends replies at the stop tokens that it was made with (``stop_token_ids``)."""

    def __init__(self, sampler: Sampler, chat: Chat, reporter: Reporter) -> None:
        self.sampler, self.chat, self.reporter = sampler, chat, reporter

    def write(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int) -> list[Completion | None]:
        """Raises UserError naming a prompt that does not fit the model's context."""
        groups = sample_replies(self.sampler, self.chat, prompts, sampling, Choice(), seed, self.reporter)
        return [group[0] for group in groups]


class EndpointWriter:
    """A language model behind an OpenAI-compatible endpoint as a writer.

    ``ref.instructions`` come first as a system message, where they are given. Each prompt has a seed of its own, which
    servers follow as well as they can, or refuse; then they are asked without. A temperature of 1 and a top_p of 1 may
    be refused too: they are what such servers take by themselves. What stands in ``<think>`` is no part of a reply.
    """

    def __init__(self, ref: EndpointRef, place: str, reporter: Reporter, endpoint: Endpoint | None = None) -> None:
        self.ref, self.reporter = ref, reporter
        self.endpoint = endpoint or Endpoint(ref, "writer", "prompts have no reply", place)

    def write(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int) -> list[Completion | None]:
        system = (Message("system", self.ref.instructions),) if self.ref.instructions else ()
        settings = _settings(sampling)
        optional = frozenset({"seed"} | ({"temperature"} if sampling.temperature == 1 else set()))
        questions = [
            Question(
                (*system, *prompt.messages),
                f"answer {place_of(prompt)!r}",
                {**settings, "seed": stream_key(seed, i) % 2**31},  # some servers take 32 bits
                optional,
            )
            for i, prompt in enumerate(prompts)
        ]
        self.reporter.start("writing", len(questions))
        return self.endpoint.ask_many(questions, _completion, self.reporter)


def _settings(sampling: SamplingConfig) -> dict[str, Any]:
    """Sampling settings by the API's names, those that are off left out. top_k and min_p are of vLLM, SGLang and
    llama.cpp; a server without them refuses the request, and says so."""
    settings: dict[str, Any] = {"temperature": sampling.temperature, "max_tokens": sampling.max_new_tokens}
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "stop": []}
    return settings | {name: getattr(sampling, name) for name in off if getattr(sampling, name) != off[name]}


def _completion(_: int, answer: Answer) -> Completion:
    return Completion(answer.spoken.lstrip(), finished=answer.finish not in _CUT)
