"""What an annotator of whatever kind says of two replies, and the protocol that asks for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from keel.store.ai_labels import AiLabel
from keel.store.sides import OnScreen
from keel.types import Completion, Prompt


@dataclass(frozen=True, slots=True)
class Opinion:
    """One comparison. ``strength``: 1 slightly, 2 better, 3 much better; None for a tie, or where it was not given.
    ``seconds`` taken, where that means something.

    ``probability`` that the left reply is the better one, where the annotator gives one; ``orders`` the same as it was
    read with the left reply shown first, and with it shown second. ``reason``: the annotator's words, if any.
    ``labels``: what it said under each principle that it was asked about (`keel.feedback.principled`).
    """

    choice: OnScreen
    strength: int | None = None
    seconds: float | None = None
    probability: float | None = None
    orders: tuple[float, float] | None = None
    reason: str = ""
    labels: tuple[AiLabel, ...] = ()

    @staticmethod
    def of(
        probability: float,
        orders: tuple[float, float] | None = None,
        reason: str = "",
        labels: tuple[AiLabel, ...] = (),
    ) -> Opinion:
        """The likelier reply; a tie at a half."""
        sided: OnScreen = "left" if probability > 0.5 else "right"
        choice: OnScreen = "tie" if math.isclose(probability, 0.5, abs_tol=1e-9) else sided
        return Opinion(choice, probability=probability, orders=orders, reason=reason, labels=labels)

    @property
    def flipped(self) -> bool:
        """Whether the choice turned with the order in which the replies were shown."""
        return self.orders is not None and (self.orders[0] - 0.5) * (self.orders[1] - 0.5) < 0


class Comparer(Protocol):
    def compare(
        self, prompts: Sequence[Prompt], left: Sequence[Completion], right: Sequence[Completion]
    ) -> list[Opinion | None]:
        """One opinion a pair, in order; None where it could not be had. Raises UserError when the annotator fails."""
        ...
