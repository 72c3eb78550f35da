"""How reliable each annotator is, by the two models of keel.feedback, and who is named for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np

from keel.feedback.agreement import Agreement
from keel.feedback.crowd_bt import etas_of
from keel.feedback.dawid_skene import reliabilities_of, unreliable
from keel.store.vote_columns import NONE, SECOND, TIE, VoteColumns

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


UNKNOWN = Reliability({}, {}, 0, 0.0)  # before anything was worked out


def reliability(votes: VoteColumns, bootstrap: int = 100) -> Reliability:
    """Gold items, and those that a reviewer settled, have a known answer."""
    answer_V = np.where(votes.settled_V != NONE, votes.settled_V, votes.gold_V)
    items, place_V = np.unique(votes.item_V, return_inverse=True)
    known_I = np.full(len(items), NONE)
    known_I[place_V.ravel()] = answer_V
    known_I[known_I == TIE] = NONE  # no answer to a decided vote
    decided_V = votes.vote_V != TIE
    decided, place_V = votes.where(decided_V), place_V.ravel()[decided_V]
    second_V = (decided.vote_V == SECOND).astype(np.int64)
    responses = len(np.union1d(decided.first_V, decided.second_V))
    share = len(decided) / responses if responses else 0.0
    scored: Mapping[str, Agreement] = {}
    if share >= CROWD_BT_LEAST:
        winner_V = np.where(second_V, decided.second_V, decided.first_V)
        loser_V = np.where(second_V, decided.first_V, decided.second_V)
        scored = etas_of(decided.annotator_V, winner_V, loser_V, votes.names, bootstrap=bootstrap // 2)
    given = np.unique(votes.annotator_V)
    found = reliabilities_of(place_V, decided.annotator_V, second_V, known_I, votes.names, bootstrap=bootstrap)
    named = {votes.names[n] for n in given}
    return Reliability({name: one for name, one in found.items() if name in named}, scored, len(votes), share)


def _said(one: Agreement, of: Mapping[str, Agreement]) -> str:
    assert one.interval is not None, "nobody is named without an interval"
    low, high = one.interval
    most = median(other.point for other in of.values() if other.items)
    turned = "; mostly the opposite" if high < 0.5 else "; hardly better than a coin" if low < 0.5 else ""
    return f"{one.point:.0%} of decided votes ({low:.0%} to {high:.0%}; half of all reach {most:.0%}){turned}"
