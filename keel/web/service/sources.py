"""What the composition root hands to the app: models to talk to and to sample from, readers of files. The app itself
imports no model and no data room."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from keel.config import SamplingConfig
from keel.types import Completion, Message, Prompt

Reply = Callable[[Sequence[Message]], Iterator[str]]
Sample = Callable[[Sequence[Prompt], int], list[list[Completion]]]


@dataclass(frozen=True, slots=True)
class ArenaModel:
    """``reply``: a conversation that ends with the person's message -> the reply in pieces, as it comes."""

    name: str
    reply: Reply = field(repr=False)


@dataclass(frozen=True, slots=True)
class SampledModel:
    """``sample``: prompts and how many responses each -> the responses. ``path`` and ``fingerprint`` say what wrote
    them."""

    name: str
    path: str
    fingerprint: str
    sampling: SamplingConfig
    sample: Sample = field(repr=False)


@dataclass(frozen=True, slots=True)
class Sources:
    read_prompts: Callable[[Path], list[Prompt]] | None = None
    arena: Sequence[ArenaModel] = ()
    sampled: Mapping[str, SampledModel] = field(default_factory=dict)
