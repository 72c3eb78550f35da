"""The order of examples over epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from keel.data.collate import epoch_order


@dataclass(frozen=True)
class EpochSchedule:
    """``size`` examples (or groups) in shuffled epochs, ``batch_size`` of them a step; a pure function of the step, so
    that resuming needs no cursor but the step itself. ``epochs`` may be infinite: then whoever asks ends it."""

    size: int
    batch_size: int
    epochs: float
    seed: int

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.size * self.epochs / self.batch_size))

    @property
    def steps_per_epoch(self) -> int:
        return max(1, math.ceil(self.size / self.batch_size))

    def order(self, epoch: int) -> list[int]:
        """The examples of one epoch, all of them."""
        return epoch_order(self.size, self.seed, epoch)

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of one step; an epoch's tail is filled up from the next epoch."""
        return self.stretch(step * self.batch_size, self.batch_size)

    def stretch(self, begin: int, count: int) -> list[int]:
        """Indices of ``count`` examples, of which ``begin`` others came before; fewer at the end of the last epoch."""
        end = self.size * self.epochs
        places = [p for p in range(begin, begin + count) if p < end]
        orders = {epoch: self.order(epoch) for epoch in dict.fromkeys(place // self.size for place in places)}
        return [orders[place // self.size][place % self.size] for place in places]


@dataclass(frozen=True)
class MixedSchedule(EpochSchedule):
    """Epochs of examples from several sources, of which ``counts[i]`` are of source i and none stands there twice: a
    larger source goes on in the next epoch with others, and begins anew, shuffled anew, when too few are left.

    ``sources``: the indices of each one's examples.
    """

    sources: tuple[tuple[int, ...], ...] = ()
    counts: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, sources: Sequence[Sequence[int]], weights: Sequence[float], batch_size: int, epochs: float, seed: int
    ) -> MixedSchedule:
        """The largest epochs in which the sources stand in the ratio of their weights, rounded down, at least one of
        each. Every source must have an example."""
        counts = in_ratio([len(source) for source in sources], weights)
        return cls(sum(counts), batch_size, epochs, seed, tuple(map(tuple, sources)), counts)

    def order(self, epoch: int) -> list[int]:
        drawn = [
            i for source, count in zip(self.sources, self.counts, strict=True) for i in self._of(source, count, epoch)
        ]
        return [drawn[i] for i in epoch_order(len(drawn), self.seed, epoch)]

    def _of(self, source: Sequence[int], count: int, epoch: int) -> list[int]:
        """One epoch's examples of a source: the next ``count`` of its shuffled order, which serves so many epochs as it
        has whole parts of that size."""
        through, part = divmod(epoch, len(source) // count)
        order = epoch_order(len(source), self.seed, through)
        return [source[i] for i in order[part * count : (part + 1) * count]]


def in_ratio(sizes: Sequence[int], weights: Sequence[float]) -> tuple[int, ...]:
    """How many to take of each for the ratio of the weights, without taking any twice: rounded down, at least one."""
    unit = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    return tuple(max(1, int(unit * weight + 1e-9)) for weight in weights)
