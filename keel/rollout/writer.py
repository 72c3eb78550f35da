"""Writers: what answers conversations with texts, whether a model that is sampled here or one behind an endpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class Answers(Protocol):
    """Replies that a writer gave before it was stopped, by the places of their prompts, and where it puts new ones as
    they come, from whatever thread. ``among``: how many were asked at first, of whom the missing are a share."""

    @property
    def among(self) -> int: ...
    def get(self, place: int) -> Completion | None: ...
    def keep(self, replies: Mapping[int, Completion]) -> None: ...


class Writer(Protocol):
    def write(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int, answers: Answers | None = None
    ) -> list[Completion | None]:
        """One reply a prompt, in order. A prompt that stands there twice is answered twice, by draws of their own.
        What is in ``answers`` need not be asked again, and comes out as if it had been.

        Of a completion, ``text`` and ``finished`` can be relied on. None stands for a reply that could not be had,
        which only endpoints know: at most ``keel.endpoint.MISSING_BOUND`` of them, more is a UserError. Raises
        UserError for settings that the writer cannot follow.
        """
        ...


class SamplerWriter:
    """A model as a writer. ``sampler`` ends replies at the stop tokens that it was made with (``stop_token_ids``)."""

    def __init__(self, sampler: Sampler, chat: Chat, reporter: Reporter) -> None:
        self.sampler, self.chat, self.reporter = sampler, chat, reporter

    def write(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int, answers: Answers | None = None
    ) -> list[Completion | None]:
        """Raises UserError naming a prompt that does not fit the model's context. Prompts are sampled together, so if
        one answer is missing all are drawn again: the same ones."""
        known = [answers.get(i) for i in range(len(prompts))] if answers is not None else []
        if known and None not in known:
            return known
        groups = sample_replies(self.sampler, self.chat, prompts, sampling, Choice(), seed, self.reporter)
        replies = [group[0] for group in groups]
        if answers is not None:
            answers.keep(dict(enumerate(replies)))
        return list(replies)


class EndpointWriter:
    """A language model behind an OpenAI-compatible endpoint as a writer.

    ``ref.instructions`` come first as a system message, where they are given. Each prompt has a seed of its own, which
    servers follow as well as they can, or refuse; then they are asked without. A temperature of 1 and a top_p of 1 may
    be refused too: they are what such servers take by themselves. What stands in ``<think>`` is no part of a reply.
    """

    def __init__(self, ref: EndpointRef, place: str, reporter: Reporter, endpoint: Endpoint | None = None) -> None:
        self.ref, self.reporter = ref, reporter
        self.endpoint = endpoint or Endpoint(ref, "writer", "prompts have no reply", place)

    def write(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int, answers: Answers | None = None
    ) -> list[Completion | None]:
        """Each answer is kept as it comes. Those that are missing are asked for again."""
        replies = [None if answers is None else answers.get(i) for i in range(len(prompts))]
        places = [i for i, reply in enumerate(replies) if reply is None]
        system = (Message("system", self.ref.instructions),) if self.ref.instructions else ()
        settings = sampling_settings(sampling)
        optional = frozenset({"seed"} | ({"temperature"} if sampling.temperature == 1 else set()))
        questions = [
            Question(
                (*system, *prompts[i].messages),
                f"answer {place_of(prompts[i])!r}",
                {**settings, "seed": stream_key(seed, i) % 2**31},  # some servers take 32 bits
                optional,
            )
            for i in places
        ]

        def read(n: int, answer: Answer) -> Completion:
            reply = Completion(answer.spoken.lstrip(), finished=answer.finish not in _CUT)
            if answers is not None:
                answers.keep({places[n]: reply})
            return reply

        self.reporter.start("writing", len(questions))
        among = len(prompts) if answers is None else answers.among
        found = self.endpoint.ask_many(questions, read, self.reporter, among)
        for i, reply in zip(places, found, strict=True):
            replies[i] = reply
        return replies


def sampling_settings(sampling: SamplingConfig) -> dict[str, Any]:
    """Sampling settings by the API's names, those that are off left out. top_k and min_p are of vLLM, SGLang and
    llama.cpp; a server without them refuses the request, and says so."""
    settings: dict[str, Any] = {"temperature": sampling.temperature, "max_tokens": sampling.max_new_tokens}
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "stop": []}
    return settings | {name: getattr(sampling, name) for name in off if getattr(sampling, name) != off[name]}
