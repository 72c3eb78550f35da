"""How annotators give thumbs: how often up, and with whom they agree. A figure that is not defined is None."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

from keel.store.overview import ThumbVote


@dataclass(frozen=True, slots=True)
class ThumbHabits:
    """Shares; ``with_others`` of the ``compared`` other thumbs on the same responses."""

    annotator: str
    kind: str
    given: int
    up: float
    with_others: float | None
    compared: int
    gold: float | None
    gold_given: int
    seconds: float | None  # median


def thumb_habits(found: Sequence[ThumbVote]) -> list[ThumbHabits]:
    """Each annotator's, the busiest first. Gold items are easy by choice, and are left out of the agreement."""
    on_item: dict[int, list[ThumbVote]] = {}
    mine: dict[str, list[ThumbVote]] = {}
    for vote in found:
        on_item.setdefault(vote.item_id, []).append(vote)
        mine.setdefault(vote.annotator, []).append(vote)
    habits = []
    for name, given in mine.items():
        plain = [vote for vote in given if vote.gold is None]
        same = [vote.up == other.up for vote in plain for other in on_item[vote.item_id] if other.annotator != name]
        gold = [vote.up == vote.gold for vote in given if vote.gold is not None]
        seconds = [vote.seconds for vote in given if vote.seconds is not None]
        habits.append(
            ThumbHabits(
                name, given[0].kind, len(given), mean(vote.up for vote in given), mean(same) if same else None,
                len(same), mean(gold) if gold else None, len(gold), median(seconds) if seconds else None,
            )
        )  # fmt: skip
    return sorted(habits, key=lambda one: (-one.given, one.annotator))
