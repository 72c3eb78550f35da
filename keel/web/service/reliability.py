"""How reliable each annotator is, by the two models of keel.feedback, and who is named for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from keel.feedback.agreement import TIE, Agreement, Label
from keel.feedback.crowd_bt import Comparison, crowd_bt
from keel.feedback.dawid_skene import reliabilities, unreliable
from keel.store.overview import Vote

# Decided votes a response from which Crowd-BT can tell annotators apart. With fewer a response's score explains any
# vote on it, and everybody seems right; in simulations coins came out at 1 with 1.5 and near 1/2 with 3.
CROWD_BT_LEAST = 3.0


@dataclass(frozen=True, slots=True)
class Reliability:
    """By annotator, each with its 95% interval. ``dawid_skene``: P(a decided vote is for the better response), empty
    while no item was judged twice nor has a known answer. ``crowd_bt``: P(a decided vote says what the responses'
    scores say), empty with fewer than ``CROWD_BT_LEAST`` votes a response. ``votes``: how many both rest on."""

    dawid_skene: Mapping[str, Agreement]
    crowd_bt: Mapping[str, Agreement]
    votes: int
    votes_a_response: float

    def reasons(self, annotator: str) -> tuple[str, ...]:
        """Why this annotator's votes are bad; nothing for most."""
        found = []
        if annotator in unreliable(self.dawid_skene):
            said = _said(self.dawid_skene[annotator], self.dawid_skene)
            found.append(f"picks the better response in {said}")
        if annotator in unreliable(self.crowd_bt):
            found.append(f"says what the responses’ scores say in {_said(self.crowd_bt[annotator], self.crowd_bt)}")
        return tuple(found)


def reliability(votes: Sequence[Vote], bootstrap: int = 100) -> Reliability:
    """Gold items, and those that a reviewer settled, have a known answer."""
    known = {vote.item_id: vote.settled or vote.gold for vote in votes if vote.settled or vote.gold}
    labels = [Label(vote.item_id, vote.annotator, vote.vote) for vote in votes]
    answers = {item: answer for item, answer in known.items() if answer is not None}
    decided = [vote for vote in votes if vote.vote != TIE]
    comparisons = [_comparison(vote) for vote in decided]
    responses = {response for vote in decided for response in vote.responses}
    share = len(decided) / len(responses) if responses else 0.0
    scored = crowd_bt(comparisons, bootstrap=bootstrap // 2).eta if share >= CROWD_BT_LEAST else {}
    return Reliability(reliabilities(labels, answers, bootstrap=bootstrap), scored, len(votes), share)


def _comparison(vote: Vote) -> Comparison:
    first, second = vote.responses
    return Comparison(vote.annotator, *((first, second) if vote.vote == "first" else (second, first)))


def _said(one: Agreement, of: Mapping[str, Agreement]) -> str:
    assert one.interval is not None, "nobody is named without an interval"
    low, high = one.interval
    most = median(other.point for other in of.values() if other.items)
    turned = "; mostly the opposite" if high < 0.5 else "; hardly better than a coin" if low < 0.5 else ""
    return f"{one.point:.0%} of decided votes ({low:.0%} to {high:.0%}; half of all reach {most:.0%}){turned}"
