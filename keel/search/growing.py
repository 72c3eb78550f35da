"""How a reply grows by a step, on token boundaries.

A step is sampled by sampling on until a token after which the splitter (`keel.recipe.steps.Steps`) says that a step has
ended. Tokens whose text holds a step's end stop the sampler, so what follows is not drawn at all. Where the end is
spread over several tokens (a marker that is no token), the sampler goes on to the reply's end, and what it wrote behind
the step is dropped, and counted. Either way the text decides, and no token is ever cut in two.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from keel.data.chat import Chat
from keel.recipe.sections import SamplingConfig
from keel.recipe.steps import Steps
from keel.rollout.sampler import Sampler
from keel.rollout.tokens import further
from keel.search.paths import Costs, Path, State
from keel.types import Completion


def ended(steps: Steps, text: str) -> tuple[str, ...]:
    """The steps of ``text`` that have ended: whatever is written next begins another. A letter is written next, to
    ask."""
    return steps.split(f"{text}x")[:-1]


def step_ends(tokenizer: PreTrainedTokenizerBase, steps: Steps) -> frozenset[int]:
    """The tokens whose own text holds what ends a step: a line's end, or the whole marker."""
    end = steps.marker or "\n"
    ids = sorted(tokenizer.get_vocab().values())
    texts = tokenizer.batch_decode([[i] for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return frozenset(i for i, text in zip(ids, texts, strict=True) if end in text)


@dataclass(frozen=True)
class Grower:
    """Samples whole replies, or steps of them.

    ``sampler`` stops at ``stops``, which end a reply, and in a search by steps at the step's ends too. ``prompts``: the
    token ids of the prompt at each place. ``context``: tokens that the model has positions for; None: no bound.
    """

    chat: Chat
    sampler: Sampler
    stops: frozenset[int]
    steps: Steps
    prompts: Mapping[int, Sequence[int]]
    context: int | None
    costs: Costs

    def whole(self, paths: Sequence[Path], sampling: SamplingConfig) -> list[Path]:
        """The paths to their ends."""
        return self._grown(paths, [None] * len(paths), sampling)

    def step(self, paths: Sequence[Path], sampling: SamplingConfig) -> list[Path]:
        """The paths, each with one more step that has ended, or at its end."""
        grown = dict(enumerate(paths))
        wanted = {i: len(path.steps) + 1 for i, path in grown.items() if path.state == "open"}
        while wanted:  # several times where a token stops the sampler and ends no step: blank lines, say
            more = self._grown([grown[i] for i in wanted], list(wanted.values()), sampling)
            grown |= zip(wanted, more, strict=True)
            wanted = {i: n for i, n in wanted.items() if grown[i].state == "open" and len(grown[i].steps) < n}
        return list(grown.values())

    def _grown(self, paths: Sequence[Path], wanted: Sequence[int | None], sampling: SamplingConfig) -> list[Path]:
        """The paths after one call of the sampler. ``wanted``: how many ended steps a path needs to stop there."""
        rooms = [self._room(path, sampling) for path in paths]
        going = [i for i, (path, room) in enumerate(zip(paths, rooms, strict=True)) if room > 0 or not path.ids]
        grown = [replace(path, state="cut") for path in paths]
        if not going:
            return grown
        longest = sampling.model_copy(update={"max_new_tokens": max(1, *(rooms[i] for i in going))})
        drawn = self.sampler.generate(
            [[*self.prompts[paths[i].place], *paths[i].ids] for i in going],
            longest,
            0,
            [further(paths[i].stream, len(paths[i].ids) - paths[i].begun) for i in going],
        )
        for i, completion in zip(going, drawn, strict=True):
            # What is beyond its room was drawn because another's is larger: nothing of it is this path's.
            self.costs.drew(paths[i].place, min(len(completion.ids), rooms[i]))
            grown[i] = self._with(paths[i], completion, rooms[i], wanted[i])
        return grown

    def _room(self, path: Path, sampling: SamplingConfig) -> int:
        """Tokens that the reply may still have. Of a prompt that leaves none the sampler complains."""
        most = sampling.max_new_tokens
        if self.context is not None:
            most = min(most, self.context - len(self.prompts[path.place]))
        return most - len(path.ids)

    def _with(self, path: Path, drawn: Completion, room: int, wanted: int | None) -> Path:
        """``path`` and what was drawn behind it, as far as it is wanted and there is room."""
        new = drawn.ids[:room]
        whole = drawn.finished and new == drawn.ids and new[-1] in self.stops
        said = len(new) - whole
        state: State = "finished" if whole else "open" if drawn.finished and new == drawn.ids else "cut"
        keep = len(new)
        if wanted is not None and self._count(path, new[:said]) >= wanted:
            state, keep = "open", said
            if self._count(path, new[: said - 1]) >= wanted:  # it went on behind the step
                keep = bisect_left(range(said), wanted, key=lambda k: self._count(path, new[:k]))
        ids = path.ids + new[:keep]
        text = self.chat.decode(ids[:-1] if state == "finished" else ids, so_far=state == "open")
        steps = self.steps.split(text) if state == "finished" else ended(self.steps, text)
        logprobs = path.logprobs + drawn.logprobs[:keep]
        return replace(path, ids=ids, logprobs=logprobs, state=state, text=text, steps=steps)

    def _count(self, path: Path, new: Sequence[int]) -> int:
        """How many steps have ended after ``new``."""
        return len(ended(self.steps, self.chat.decode([*path.ids, *new], so_far=True)))
