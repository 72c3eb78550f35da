"""Which replies are worth labelling step by step: wrong ones that a scorer takes for good (Lightman et al. 2023,
arXiv:2305.20050, section 4.2), beside some at random, over which figures can be had. Plain numbers: the labelling stage
and the app's queue for people choose alike."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Rated:
    """``right``: whether a reply's final answer is; None where it has none, for it was cut, or that is not known.
    ``score``: what a scorer says of the reply, higher is better; None where it was not asked."""

    right: bool | None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """Places among the replies. ``random``: drawn among all of them, so what is measured there holds for all.
    ``convincing``: the wrong ones with the highest scores. ``filled``: where there are not enough of those."""

    random: tuple[int, ...]
    convincing: tuple[int, ...] = ()
    filled: tuple[int, ...] = ()

    @property
    def places(self) -> list[int]:
        """All of them, in order."""
        return sorted((*self.random, *self.convincing, *self.filled))


def gains(rated: Mapping[K, Rated]) -> dict[K, float]:
    """What a look at each convincing reply is worth: its score. Those whose answer is right, or not known to be wrong,
    are not there."""
    return {key: one.score for key, one in rated.items() if one.right is False and one.score is not None}


def choose_at_random(replies: int, count: int | None, seed: int) -> Chosen:
    """Up to ``count`` of so many replies."""
    return Chosen(tuple(sorted(_shuffled(replies, seed)[:count])))


def choose_convincing(rated: Sequence[Rated], count: int, random_share: float, seed: int) -> Chosen:
    """Up to ``count`` replies: ``random_share`` of them (rounded, at least one where it is above 0) at random among
    all, the rest the most convincing ones. Of equal scores the earlier comes first."""
    count = min(count, len(rated))
    order = _shuffled(len(rated), seed)
    drawn = order[: min(count, max(1, round(random_share * count))) if random_share > 0 else 0]
    worth = gains(dict(enumerate(rated)))
    best = sorted(worth.keys() - set(drawn), key=lambda place: (-worth[place], place))[: count - len(drawn)]
    taken = {*drawn, *best}
    filled = [place for place in order if place not in taken][: count - len(taken)]
    return Chosen(tuple(sorted(drawn)), tuple(best), tuple(sorted(filled)))


def _shuffled(count: int, seed: int) -> list[int]:
    return random.Random(f"replies for step labels {seed}").sample(range(count), count)
