"""What a search holds: ways to answer a prompt, finished or not, what each scored, and what all of it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from keel.recipe.steps import Steps
from keel.types import Completion

State = Literal["open", "finished", "cut"]


@dataclass(frozen=True, slots=True)
class Path:
    """A reply to the prompt at ``place``, as far as it goes.

    ``state``: open, it can go on; finished, it ended by itself; cut, it reached a limit, and never answers. ``steps``:
    those that have ended, and all of them where it is finished. ``scores``: one a step, where steps were scored;
    ``score``: what the path comes to, where it was scored. ``stream``: where its random numbers start
    (`keel.rollout.tokens.stream_key`), ``begun``: the token that took the first of them.
    """

    place: int
    stream: int
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    state: State = "open"
    text: str = ""
    steps: tuple[str, ...] = ()
    begun: int = 0
    scores: tuple[float, ...] = ()
    score: float | None = None

    def forked(self, stream: int) -> Path:
        """The same path, which goes on by random numbers of its own."""
        return replace(self, stream=stream, begun=len(self.ids))

    def in_steps(self, steps: Steps) -> Path:
        """A finished path, cut into steps as ``steps`` says."""
        return replace(self, steps=steps.split(self.text)) if self.state == "finished" else self

    def reply(self, reward: float | None) -> Completion:
        return Completion(self.text, self.ids, self.logprobs, self.state == "finished", reward)


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found for one prompt. ``answer``: the reply that it gives, with the reward by which it was chosen;
    None where nothing that finished says anything. ``paths``: the finished replies that it was chosen from, each once.
    ``unfinished``: how many others a limit stopped. Tokens: ``generated``, those drawn for it, kept or not, without the
    prompt's own; ``scored``, those of the replies that a scorer was handed, each time."""

    answer: Completion | None
    paths: tuple[Path, ...]
    unfinished: int
    generated: int
    scored: int


@dataclass(slots=True)
class Costs:
    """Tokens by the prompt's place."""

    generated: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)

    @staticmethod
    def of(prompts: int) -> Costs:
        return Costs([0] * prompts, [0] * prompts)

    def drew(self, place: int, tokens: int) -> None:
        self.generated[place] += tokens

    def read(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self.scored[path.place] += len(path.ids)
