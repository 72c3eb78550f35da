"""Raw votes -> the records that training takes, a pure function: the store and its exports keep every vote."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from keel.feedback.agreement import FIRST, SECOND, Vote
from keel.feedback.dawid_skene import reliabilities
from keel.recipe.declared import How
from keel.store.settled import settle
from keel.store.sides import in_store
from keel.types import Preference, UserError


def aggregate(votes: Sequence[Preference], how: How) -> list[Preference]:
    """``raw``: every vote as it is. ``majority``: one record an item, for the response that most of its decided votes
    prefer; an item without a majority is left out. ``weighted``: every vote, weighted by what its annotator's word is
    worth.

    Where a reviewer settled an item (``Preference.settled``), that word is its one record, of weight 1, in each of
    these (``keel.store.settled.settle``); ``weighted`` also judges annotators by it, as by a gold item's answer.

    A vote's worth is 2 eta - 1, where eta is the probability that its annotator is right (from these votes alone, by
    ``dawid_skene.reliabilities``): 1 for one who is never wrong, 0 for one who tosses a coin, and below 0, so that the
    vote is turned round, for one who is mostly wrong. That gives the gradient of Crowd-BT's likelihood, log(eta
    sigmoid(d) + (1 - eta) sigmoid(-d)) (Chen et al. 2013), where the rewards' difference d is small. Losses divide by
    the sum of weights, so only their ratios matter.

    Votes on one pair of responses of one prompt are one item, whichever of the two was chosen. Raises UserError when
    ``weighted`` has nothing to tell annotators apart by.
    """
    if how == "raw":
        return settle(votes)
    return _majority(settle(votes)) if how == "majority" else _weighted(votes)


def item_votes(pairs: Sequence[Preference]) -> list[Vote]:
    """FIRST for the response that comes first in ``Preference.item``."""
    return [Vote(pair.item, pair.annotator, _label(pair)) for pair in pairs]


def _label(pair: Preference) -> str:
    texts = (pair.chosen, pair.chosen_finished), (pair.rejected, pair.rejected_finished)
    return in_store("tie" if pair.tie else "left", texts)  # as if `chosen` had been shown on the left


def _majority(votes: Sequence[Preference]) -> list[Preference]:
    """The first vote of each majority stands for it, under nobody's name, with the mean strength of its side."""
    items: dict[Hashable, list[Preference]] = {}
    for vote in votes:
        items.setdefault(vote.item, []).append(vote)
    records = []
    for same in items.values():
        sides = [[vote for vote in same if _label(vote) == label] for label in (FIRST, SECOND)]
        if len(sides[0]) == len(sides[1]):
            continue
        won = max(sides, key=len)
        records.append(replace(won[0], annotator="", margin=sum(vote.margin for vote in won) / len(won)))
    if not records:
        raise UserError("votes: majority leaves no pair, since every item is a tie; use votes: raw")
    return records


def _weighted(votes: Sequence[Preference]) -> list[Preference]:
    records = settle(votes)
    answers = {record.item: _label(record) for record in records if record.settled}
    reliable = reliabilities(item_votes(votes), answers, bootstrap=0)
    if len(reliable) < 2:
        raise UserError(
            "votes: weighted tells annotators apart by the items that two of them judged, and there is none; have some "
            "judged twice (annotate.overlap), or use votes: raw"
        )
    weighted = []
    for record in records:
        worth = 1.0 if record.settled else 2 * reliable[record.annotator].point - 1
        turned = record.swapped() if worth < 0 and not record.tie else record
        weighted.append(replace(turned, weight=abs(worth)))
    return weighted
