"""A reviewer's last word on a pair, in place of the votes on it. Pure: the votes themselves stay in the store."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from keel.types import Preference


def settle(votes: Sequence[Preference]) -> list[Preference]:
    """The votes, but those on an item that a reviewer settled are one record, at the place of the first of them, that
    says what the reviewer said: the first vote that agrees, or else the first one made to, under nobody's name, with
    the mean strength of those that agree, as certain. Settled twice (in two batches), the later word counts."""
    items: dict[Hashable, list[Preference]] = {}
    for vote in votes:
        items.setdefault(vote.item, []).append(vote)
    settled = {item: same for item, same in items.items() if any(vote.settled for vote in same)}
    records = []
    for vote in votes:
        same = settled.get(vote.item)
        if same is None:
            records.append(vote)
        elif vote is same[0]:
            records.append(_last_word(same))
    return records


def _last_word(same: Sequence[Preference]) -> Preference:
    """The record that stands for the votes on one settled item."""
    last = next(vote for vote in reversed(same) if vote.settled)
    if last.settled == "tie":
        return replace(same[0], tie=True, margin=0.0, annotator="", settled="tie", probability=None)
    word = last if last.settled == "chosen" else last.swapped()  # `chosen` is what the reviewer prefers
    better = word.chosen, word.chosen_finished
    turned = [vote if (vote.chosen, vote.chosen_finished) == better else vote.swapped() for vote in same]
    agree = [new for new, vote in zip(turned, same, strict=True) if new is vote and not vote.tie]
    margin = sum(vote.margin for vote in agree) / len(agree) if agree else 0.0
    return replace((agree or turned)[0], tie=False, margin=margin, annotator="", settled="chosen", probability=None)
