"""Which of two responses: the three ways to say it, and how one becomes another.

A screen has ``left`` and ``right``. The store has ``first`` (the response that was stored first) and ``second``,
whatever side they were shown on. A training record has ``chosen`` and ``rejected``. A tie is a tie in each; both bad is
one too, since it prefers neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

Side = Literal["left", "right"]
OnScreen = Literal["left", "right", "tie"]
InStore = Literal["first", "second", "tie"]
InRecord = Literal["chosen", "rejected", "tie"]
Choice = Literal["left", "right", "tie", "both_bad"]
T = TypeVar("T")

SIDES: tuple[Side, Side] = ("left", "right")
CHOICES: tuple[Choice, ...] = ("left", "right", "tie", "both_bad")
OTHER: Mapping[Side, Side] = {"left": "right", "right": "left"}


def preferred(choice: Choice, shown: Sequence[T]) -> T | None:
    """Of the two ``shown``, left first, the one that was preferred; None for a tie and for both bad."""
    return shown[SIDES.index(choice)] if choice in SIDES else None


def in_store(choice: Choice, shown: Sequence[Any]) -> InStore:
    """What was said on a screen in the store's terms. ``shown``: the responses' ids, left first, or whatever else says
    which of them is the first."""
    if choice not in SIDES:
        return "tie"
    return "first" if (choice == "left") == (shown[0] < shown[1]) else "second"


def on_screen(word: InStore, shown: Sequence[Any]) -> OnScreen:
    """What is said in the store's terms on the screen where ``shown`` stood, left first."""
    if word == "tie":
        return "tie"
    return "left" if (word == "first") == (shown[0] < shown[1]) else "right"


def chosen_side(choice: Choice) -> Side:
    """Where the record's ``chosen`` stood on the screen: in a tie, on the left."""
    return "right" if choice == "right" else "left"


def turned(pair: tuple[T, T], chosen: Side) -> tuple[T, T]:
    """(left, right) of (chosen, rejected), and the other way round. KeyError for no side: they come from files."""
    first, second = pair
    return {"left": (first, second), "right": (second, first)}[chosen]


def in_record(said: OnScreen, chosen: Side) -> InRecord:
    """What is said of a screen in terms of a record whose ``chosen`` stood on the side ``chosen``."""
    if said == "tie":
        return "tie"
    return "chosen" if said == chosen else "rejected"


def of_record(word: InRecord, chosen: Side) -> OnScreen:
    """What is said of a record in terms of the screen, where its ``chosen`` stood on the side ``chosen``. KeyError for
    other words: they come from files."""
    return "tie" if word == "tie" else side_of(word, chosen)


def side_of(word: Literal["chosen", "rejected"], chosen: Side) -> Side:
    sides: Mapping[str, Side] = {"chosen": chosen, "rejected": OTHER[chosen]}
    return sides[word]
