"""Which of the finished replies answers: the best, or one that gives the answer with the most votes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from keel.recipe.search import Pick
from keel.search.paths import Path
from keel.search.ranking import Ranker
from keel.types import Completion


@dataclass(frozen=True)
class Ballot:
    """How votes are counted. ``answer_of``: the answer that a reply gives, None where none can be read, which is no
    vote; ``same``: whether two answers are."""

    answer_of: Callable[[str], str | None]
    same: Callable[[str, str], bool] = str.__eq__


def pick(paths: Sequence[Path], how: Pick, ranker: Ranker | None, ballot: Ballot | None) -> Completion | None:
    """The reply that answers, of finished ones, each with one vote; None where none says anything. Its reward: its
    score, or with ``majority`` the share of the votes that it won by. Of what is equal the first is taken."""
    if how == "best":
        return max(paths, key=_score).reply(max(map(_score, paths))) if paths else None
    assert ballot is not None
    groups: list[tuple[str, list[Path]]] = []
    for path in paths:
        answer = ballot.answer_of(path.text)
        if answer is None:
            continue
        there = next((members for given, members in groups if given == answer or ballot.same(given, answer)), None)
        if there is None:
            groups.append((answer, there := []))
        there.append(path)
    if not groups:
        return None
    if how == "majority":
        won = max((members for _, members in groups), key=len)
        return won[0].reply(len(won) / sum(len(members) for _, members in groups))
    assert ranker is not None
    weigh = ranker.weight
    won = max((members for _, members in groups), key=lambda members: sum(map(weigh, members)))
    best = max(won, key=_score)
    return best.reply(best.score)


def _score(path: Path) -> float:
    assert path.score is not None, "it was scored"
    return path.score
