"""Models of the arena that answer behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from keel.endpoint import Endpoint, Question
from keel.recipe.judges import EndpointRef
from keel.types import Message

# Somebody waits in front of the page: one more try, soon.
RETRIES, BACKOFF = 1, 0.25


def endpoint_reply(
    url: str, model: str, key_env: str, temperature: float, limit: int
) -> Callable[[Sequence[Message]], Iterator[str]]:
    """A function from a conversation to the reply's pieces; the key is read from the environment variable ``key_env``.
    UserError for an address that is none; the pieces raise UserError when the endpoint does not answer."""
    ref = EndpointRef(url=url, model=model, key_env=key_env)
    endpoint = Endpoint(ref, f"endpoint of {model}", place="--arena", retries=RETRIES, backoff=BACKOFF)

    def reply(messages: Sequence[Message]) -> Iterator[str]:
        settings = {"temperature": temperature, "max_tokens": limit}
        return endpoint.stream(Question(messages, "answer", settings, frozenset({"temperature"})))

    return reply
