"""Searches that sample whole replies: best-of-n, majority, weighted votes. Several share one pool of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keel.recipe.search import SearchConfig
from keel.recipe.sections import SamplingConfig
from keel.rollout.tokens import stream_key
from keel.search.growing import Grower
from keel.search.paths import Costs, Found, Path
from keel.search.picking import Ballot, pick
from keel.search.ranking import Ranker
from keel.types import Prompt


def sample_stream(seed: int, place: int, sample: int) -> int:
    """The stream of a prompt's samples: the first has that of plain sampling, whatever else is drawn."""
    return stream_key(seed if sample == 0 else stream_key(seed, -sample), place)


def draw(grower: Grower, places: Sequence[int], n: int, sampling: SamplingConfig, seed: int) -> list[list[Path]]:
    """``n`` whole replies to each of the prompts at ``places``. The first of them are those that fewer would be."""
    asked = [Path(place, sample_stream(seed, place, i)) for place in places for i in range(n)]
    drawn = grower.whole(asked, sampling)
    return [drawn[at : at + n] for at in range(0, len(drawn), n)]


@dataclass(frozen=True)
class Pool:
    """Samples of each prompt, the finished ones scored where there is something that scores."""

    groups: Sequence[Sequence[Path]]
    ranker: Ranker | None

    @staticmethod
    def of(groups: Sequence[Sequence[Path]], prompts: Sequence[Prompt], ranker: Ranker | None) -> Pool:
        if ranker is None:
            return Pool(groups, None)
        whole = [path for group in groups for path in group if path.state == "finished"]
        scored = iter(ranker.score(prompts, whole, Costs.of(len(prompts))))
        return Pool([[next(scored) if p.state == "finished" else p for p in group] for group in groups], ranker)

    def found(self, config: SearchConfig, ballot: Ballot | None, first: int, n: int) -> list[Found]:
        """What ``config`` finds in ``n`` samples of each prompt, from sample ``first`` on: as if no more were drawn.
        A reply that was cut is not scored, and does not answer."""
        results = []
        for group in self.groups:
            part = group[first : first + n]
            whole = tuple(path for path in part if path.state == "finished")
            answer = pick(whole, config.picks, self.ranker, ballot)
            read = sum(len(path.ids) for path in whole) if self.ranker is not None else 0
            results.append(Found(answer, whole, len(part) - len(whole), sum(len(path.ids) for path in part), read))
        return results
