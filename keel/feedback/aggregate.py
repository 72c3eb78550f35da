"""Raw votes -> the records that training takes, a pure function: the store and its exports keep every vote."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

from keel.feedback.agreement import FIRST, SECOND, TIE, Label
from keel.feedback.dawid_skene import posteriors, reliabilities
from keel.recipe.declared import How
from keel.store.settled import settle
from keel.store.sides import in_store
from keel.types import Preference, UserError


def aggregate(votes: Sequence[Preference], how: How) -> list[Preference]:
    """``raw``: every vote as it is. ``majority``: one record an item, for the response that most of its decided votes
    prefer; an item without a majority is left out. ``weighted``: every vote, weighted by what its annotator's word is
    worth. ``posterior``: one record an item, for the response that is more probably the better one, with that
    probability as its soft label.

    Where a reviewer settled an item (``Preference.settled``), that word is its one record, of weight 1, in each of
    these (``keel.store.settled.settle``), a label without any doubt; ``weighted`` and ``posterior`` also judge
    annotators by it, as by a gold item's answer.

    A vote's worth is 2 eta - 1, where eta is the probability that its annotator is right (from these votes alone, by
    ``dawid_skene.reliabilities``): 1 for one who is never wrong, 0 for one who tosses a coin, and below 0, so that the
    vote is turned round, for one who is mostly wrong. That gives the gradient of Crowd-BT's likelihood, log(eta
    sigmoid(d) + (1 - eta) sigmoid(-d)) (Chen et al. 2013), where the rewards' difference d is small. Losses divide by
    the sum of weights, so only their ratios matter.

    The probability is Dawid & Skene's (``dawid_skene.posteriors``) that the response is the truly better one, and half
    of that that neither is: a tie is as much evidence for the one as for the other. Votes enter by what was chosen. A
    vote's own soft label (a model's) is kept by ``raw`` and ``weighted``, and goes with the vote in the other two.

    Votes on one pair of responses of one prompt are one item, whichever of the two was chosen. Raises UserError when
    ``weighted`` or ``posterior`` has nothing to tell annotators apart by.
    """
    if how == "raw":
        return settle(votes)
    if how == "majority":
        return _majority(settle(votes))
    return _weighted(votes) if how == "weighted" else _posterior(votes)


def likelier_first(pair: Preference) -> Preference:
    """The same label with the likelier response as ``chosen``, as figures read it; a tie where neither is."""
    if pair.probability is None or pair.probability > 0.5:
        return pair
    return replace(pair, tie=True) if pair.probability == 0.5 else pair.swapped()


def item_votes(pairs: Sequence[Preference]) -> list[Label]:
    """FIRST for the response that comes first in ``Preference.item``."""
    return [Label(pair.item, pair.annotator, _label(pair)) for pair in pairs]


def _label(pair: Preference) -> str:
    return TIE if pair.tie else _chosen(pair)


def _chosen(pair: Preference) -> str:
    """Which of the item's two stands as ``chosen``."""
    texts = (pair.chosen, pair.chosen_finished), (pair.rejected, pair.rejected_finished)
    return in_store("left", texts)  # as if `chosen` had been shown on the left


def _by_item(votes: Sequence[Preference]) -> dict[Hashable, list[Preference]]:
    items: dict[Hashable, list[Preference]] = {}
    for vote in votes:
        items.setdefault(vote.item, []).append(vote)
    return items


def _majority(votes: Sequence[Preference]) -> list[Preference]:
    """The first vote of each majority stands for it, under nobody's name, with the mean strength of its side."""
    records = []
    for same in _by_item(votes).values():
        sides = [[vote for vote in same if _label(vote) == label] for label in (FIRST, SECOND)]
        if len(sides[0]) == len(sides[1]):
            continue
        won = max(sides, key=len)
        records.append(replace(won[0], annotator="", margin=_mean_margin(won), probability=None))
    if not records:
        raise UserError("votes: majority leaves no pair, since every item is a tie; use votes: raw")
    return records


def _weighted(votes: Sequence[Preference]) -> list[Preference]:
    records = settle(votes)
    answers = {record.item: _label(record) for record in records if record.settled}
    reliable = reliabilities(item_votes(votes), answers, bootstrap=0)
    if len(reliable) < 2:
        raise _nothing_to_tell_by("weighted")
    weighted = []
    for record in records:
        worth = 1.0 if record.settled else 2 * reliable[record.annotator].point - 1
        turned = record
        if worth < 0 and not record.tie:  # the other response, by as much as this one was said to be
            turned = replace(record.swapped(), probability=record.probability)
        weighted.append(replace(turned, weight=abs(worth)))
    return weighted


def _nothing_to_tell_by(how: str) -> UserError:
    return UserError(
        f"votes: {how} tells annotators apart by the items that two of them judged, and there is none; have some "
        "judged twice (annotate.overlap), or use votes: raw"
    )


def _posterior(votes: Sequence[Preference]) -> list[Preference]:
    """A record an item, in the order of their first votes."""
    settled = {record.item: record for record in settle(votes) if record.settled}
    if not settled and len({vote.annotator for vote in votes}) < 2:
        raise _nothing_to_tell_by("posterior")  # what one says twice is no second opinion
    found = posteriors(item_votes(votes), {item: _label(record) for item, record in settled.items()})
    if not found:
        raise _nothing_to_tell_by("posterior")
    return [settled.get(item) or _soft(same, found[item]) for item, same in _by_item(votes).items()]


def _soft(same: Sequence[Preference], classes: Mapping[str, float]) -> Preference:
    """One item's votes as one record under nobody's name: the first vote for the likelier response (where nobody gave
    one, the first vote made to), with the mean strength of its side."""
    first = classes[FIRST] + classes.get(TIE, 0.0) / 2
    if math.isclose(first, 0.5, abs_tol=1e-9):
        return replace(same[0], tie=True, margin=0.0, annotator="", probability=0.5)
    better = FIRST if first > 0.5 else SECOND
    agree = [vote for vote in same if _label(vote) == better]
    stands = (agree or same)[0]
    stands = stands if _chosen(stands) == better else stands.swapped()
    margin = _mean_margin(agree) if agree else 0.0
    return replace(stands, tie=False, margin=margin, annotator="", probability=max(first, 1 - first))


def _mean_margin(votes: Sequence[Preference]) -> float:
    return sum(vote.margin for vote in votes) / len(votes)
