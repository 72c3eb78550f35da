"""The order of examples over epochs."""

from __future__ import annotations

import math
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

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of one step; an epoch's tail is filled up from the next epoch."""
        return self.stretch(step * self.batch_size, self.batch_size)

    def stretch(self, begin: int, count: int) -> list[int]:
        """Indices of ``count`` examples, of which ``begin`` others came before; fewer at the end of the last epoch."""
        end = self.size * self.epochs
        places = [p for p in range(begin, begin + count) if p < end]
        orders = {place // self.size: [] for place in places}  # type: dict[int, list[int]]
        for epoch in orders:
            orders[epoch] = epoch_order(self.size, self.seed, epoch)
        return [orders[place // self.size][place % self.size] for place in places]
