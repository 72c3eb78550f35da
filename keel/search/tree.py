"""Searches that go on step by step: beams, several trees of one beam each (DVTS), and beams with look-ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from keel.recipe.search import SearchConfig
from keel.recipe.sections import SamplingConfig
from keel.rollout.tokens import stream_key
from keel.search.growing import Grower
from keel.search.paths import Found, Path
from keel.search.picking import Ballot, pick
from keel.search.ranking import Ranker
from keel.search.sampled import sample_stream
from keel.types import Prompt


@dataclass
class _Tree:
    """One tree of one prompt. ``open``: the beams that go on, the best first; ``done``: finished ones, each once. Both
    together are at most ``keep``: what has finished holds its place."""

    number: int
    open: list[Path]
    done: list[Path]
    lost: int = 0  # beams that were cut


@dataclass(frozen=True)
class TreeSearch:
    """Beam search over steps. ``trees`` apart a prompt, each of ``keep`` beams that go on in ``expand`` ways; with
    ``config.depth`` a way's score is that of what a greedy rollout of so many steps makes of it.

    Each round every open beam is continued by a step in all its ways, and what came out is scored, whether it is
    finished or not. The best stay, as many as places are free. A finished one holds its place to the end: it is never
    continued, copied or scored again. What was cut at a limit is no candidate. Two ways that came to the same text are
    one. Of equal scores the earlier way stays, by its parent's rank and its own number.
    """

    config: SearchConfig
    grower: Grower
    ranker: Ranker
    ballot: Ballot | None
    prompts: Sequence[Prompt]
    sampling: SamplingConfig
    seed: int

    def run(self, places: Sequence[int]) -> list[Found]:
        count, _, _ = self.config.trees
        trees = {
            place: [_Tree(i, [Path(place, sample_stream(self.seed, place, i))], []) for i in range(count)]
            for place in places
        }
        rounds = 0
        while any(tree.open for group in trees.values() for tree in group):
            if rounds == self.config.max_steps:
                break
            self._round([tree for group in trees.values() for tree in group if tree.open], rounds)
            rounds += 1
        return [self._found(place, group) for place, group in trees.items()]

    def _round(self, trees: Sequence[_Tree], number: int) -> None:
        """One step further in every tree."""
        asked = [self._ways(tree, number) for tree in trees]
        grown = iter(self.grower.step([path for ways in asked for path in ways], self.sampling))
        groups = [_different([next(grown) for _ in ways], tree.done) for tree, ways in zip(trees, asked, strict=True)]
        scored = iter(self._scored([path for group in groups for path in group if path.state != "cut"]))
        _, keep, _ = self.config.trees
        for tree, group in zip(trees, groups, strict=True):
            candidates = [next(scored) for path in group if path.state != "cut"]
            best = sorted(candidates, key=lambda path: -_score(path))[: keep - len(tree.done)]
            tree.lost += len(group) - len(candidates)
            tree.done += [path for path in best if path.state == "finished"]
            tree.open = [path for path in best if path.state == "open"]

    def _ways(self, tree: _Tree, number: int) -> list[Path]:
        """The ways in which a tree's beams go on. The first goes on by its beam's own random numbers; the others have
        streams that the seed, the prompt's place, the tree, the round and their own number determine."""
        _, keep, expand = self.config.trees
        ways = keep * expand if number == 0 else expand  # of one root: as many as there will be
        streams = stream_key(stream_key(self.seed, -1 - tree.number), -1 - number)
        return [
            path if i == 0 else path.forked(stream_key(stream_key(streams, path.place), rank * ways + i))
            for rank, path in enumerate(tree.open)
            for i in range(ways)
        ]

    def _scored(self, paths: Sequence[Path]) -> list[Path]:
        """The paths with their scores, by look-ahead where it is asked for."""
        ahead = list(paths)
        greedy = self.sampling.model_copy(update={"temperature": 0.0})
        for _ in range(self.config.depth or 0):
            ahead = self.grower.step(ahead, greedy)
        scored = self.ranker.score(self.prompts, ahead, self.grower.costs)
        return [
            replace(path, scores=seen.scores[: len(path.steps)], score=seen.score)
            for path, seen in zip(paths, scored, strict=True)
        ]

    def _found(self, place: int, trees: Sequence[_Tree]) -> Found:
        done = tuple(path for tree in trees for path in tree.done)
        costs = self.grower.costs
        return Found(
            pick(done, self.config.picks, self.ranker, self.ballot),
            done,
            sum(tree.lost + len(tree.open) for tree in trees),
            costs.generated[place],
            costs.scored[place],
        )


def _different(paths: Sequence[Path], done: Sequence[Path]) -> list[Path]:
    """The paths without those that say what another before them does, or what is done."""
    there = {(path.text, path.state): path for path in done}
    return [path for path in paths if there.setdefault((path.text, path.state), path) is path]


def _score(path: Path) -> float:
    assert path.score is not None
    return path.score
