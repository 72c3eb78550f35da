"""A reviewer's last word on a pair, in place of the votes on it. Pure: the votes themselves stay in the store."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from keel.types import Preference


def settle(votes: Sequence[Preference]) -> list[Preference]:
    """The votes, with one record in place of those on each item that a reviewer settled.

    It stands where the first of them stood and says what the reviewer said, as certain. It is the first vote that
    agrees, or the first vote turned round, under nobody's name, with the mean strength of the votes that agree. Where
    an item was settled twice (in two batches), the later word counts.
    """
    return list(replaced(votes, words(votes)))


def words(votes: Iterable[Preference]) -> dict[Hashable, Preference]:
    """The record of each item that a reviewer settled, of all votes on these items."""
    items: dict[Hashable, list[Preference]] = {}
    for vote in votes:
        items.setdefault(vote.item, []).append(vote)
    return {item: _last_word(same) for item, same in items.items() if any(vote.settled for vote in same)}


def replaced(votes: Iterable[Preference], settled: Mapping[Hashable, Preference]) -> Iterator[Preference]:
    """The votes as they come, with the record of each settled item in the place of the first vote on it."""
    prompts = {record.prompt.id for record in settled.values()}
    said: set[Hashable] = set()
    for vote in votes:
        if vote.prompt.id not in prompts or vote.item not in settled:
            yield vote
        elif vote.item not in said:
            said.add(vote.item)
            yield settled[vote.item]


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
