"""How often completions of a reply's beginning come to a right end: K a prefix, drawn by the prefix's own seeds.

A prefix is its prompt and token ids. Its completions have streams of random numbers that the seed and the prefix alone
determine, so what is drawn for it depends neither on order nor on what is beside it, and replies that begin alike share
what was drawn (beyond rounding: see `keel.rollout.sampler.Sampler`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from keel.data.chat import Chat
from keel.recipe.sections import SamplingConfig
from keel.rollout.collect import with_decoded_text
from keel.rollout.sampler import Sampler
from keel.rollout.tokens import stream_key
from keel.run.files import refusals_as_user_errors
from keel.types import Completion, Prompt

# Whether each reply, whole and finished, is right.
Right = Callable[[Sequence[Prompt], Sequence[Completion]], Sequence[bool]]


@dataclass(frozen=True, slots=True)
class Prefix:
    """``prompt_ids`` and ``ids``: the prompt's tokens and those of the reply, as far as it goes."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]

    @property
    def key(self) -> str:
        """The same for the same beginning of a reply to the same prompt: 32 hex digits."""
        said = json.dumps([self.prompt.id, self.prompt_ids, self.ids])
        return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Tally:
    """What came of a prefix's completions. ``drawn``: how many there were; ``cut``: those that did not end by
    themselves, none of which is right. ``tokens``: generated, of all of them."""

    drawn: int = 0
    right: int = 0
    cut: int = 0
    tokens: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Continuations:
    """``known``: what was tallied so far, by the prefix's key.

    ``first``: no more of a prefix's ``k`` completions are drawn once one is right: first one, then always as many as
    there were. Whether any of the K is right is the same.

    ``kept``: a file where each call of `sample` leaves a line, and which is read again: what a killed stage had sampled
    is not sampled again. A line that a kill cut in half is passed over, so a call is there whole or not at all, and
    what is sampled together is the same whether the stage was killed or not.
    """

    def __init__(
        self,
        sampler: Sampler,
        chat: Chat,
        right: Right,
        sampling: SamplingConfig,
        k: int,
        seed: int,
        first: bool = False,
        context: int | None = None,
        kept: Path | None = None,
    ) -> None:
        self.sampler, self.chat, self.right, self.sampling = sampler, chat, right, sampling
        self.k, self.seed, self.first, self.context, self.kept = k, seed, first, context, kept
        self.known: dict[str, Tally] = {}
        if kept is not None:
            self._read(kept)

    def sample(self, prefixes: Sequence[Prefix]) -> None:
        """Adds to ``known`` those that are not there, sampled together: completions of one lie side by side, and their
        prompt is read once. A prefix that fills the model's context has no completion that ends."""
        keyed = {prefix.key: prefix for prefix in prefixes}
        new = {key: prefix for key, prefix in keyed.items() if key not in self.known}
        if not new:
            return
        found = {key: Tally() if self._has_room(prefix) else Tally(self.k, 0, self.k) for key, prefix in new.items()}
        while going := {key: self._more(tally) for key, tally in found.items() if self._more(tally)}:
            for key, tally in self._draw({key: (new[key], found[key].drawn, more) for key, more in going.items()}):
                found[key] += tally
        self.known |= found
        if self.kept is not None:
            row = json.dumps({key: astuple(tally) for key, tally in found.items()})
            with refusals_as_user_errors(self.kept), self.kept.open("a", encoding="utf-8") as file:
                file.write(row + "\n")

    def _has_room(self, prefix: Prefix) -> bool:
        return self.context is None or len(prefix.prompt_ids) + len(prefix.ids) < self.context

    def _more(self, tally: Tally) -> int:
        """How many completions are drawn next."""
        if not self.first:
            return self.k - tally.drawn
        return 0 if tally.right else min(max(1, tally.drawn), self.k - tally.drawn)

    def _draw(self, asked: Mapping[str, tuple[Prefix, int, int]]) -> Iterator[tuple[str, Tally]]:
        """(prefix, how many of its completions are there, how many more) by key."""
        wanted = [(key, prefix, there + n) for key, (prefix, there, more) in asked.items() for n in range(more)]
        requests = [(*prefix.prompt_ids, *prefix.ids) for _, prefix, _ in wanted]
        streams = [stream_key(stream_key(self.seed, int(key, 16)), number) for key, _, number in wanted]
        drawn = self.sampler.generate(requests, self.sampling, self.seed, streams)
        right = self._right([prefix for _, prefix, _ in wanted], drawn)
        for (key, _, _), reply, is_right in zip(wanted, drawn, right, strict=True):
            yield key, Tally(1, int(is_right), int(not reply.finished), len(reply.ids))

    def _right(self, prefixes: Sequence[Prefix], drawn: Sequence[Completion]) -> list[bool]:
        """Each whole reply is judged, those that say the same once."""
        judged: dict[tuple[str, str], tuple[Prompt, Completion]] = {}
        asked: list[tuple[str, str] | None] = []
        for prefix, completion in zip(prefixes, drawn, strict=True):
            if not completion.finished:
                asked.append(None)
                continue
            whole = replace(completion, ids=(*prefix.ids, *completion.ids), logprobs=())
            reply = with_decoded_text(self.chat, whole)
            asked.append((prefix.prompt.id, reply.text))
            judged.setdefault((prefix.prompt.id, reply.text), (prefix.prompt, reply))
        verdicts = self.right([prompt for prompt, _ in judged.values()], [reply for _, reply in judged.values()])
        known = dict(zip(judged, verdicts, strict=True))
        return [place is not None and known[place] for place in asked]

    def _read(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text("utf-8", "replace") if path.exists() else ""
        for line in text.split("\n"):
            try:
                self.known |= {str(key): Tally(*map(int, counts)) for key, counts in json.loads(line).items()}
            except (ValueError, TypeError, AttributeError):
                continue
        if text and not text.endswith("\n"):
            with refusals_as_user_errors(path), path.open("a", encoding="utf-8") as file:
                file.write("\n")
