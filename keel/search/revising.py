"""Sequential revision: a reply, a turn that asks to check it, a second reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from keel.recipe.sections import SamplingConfig
from keel.search.growing import Grower
from keel.search.paths import Found, Path
from keel.search.ranking import Ranker
from keel.search.sampled import sample_stream
from keel.types import Message, Prompt, UserError, place_of

CHECK = "Check the lines of your answer. Then write the whole answer again, with what is wrong in it put right."


@dataclass(frozen=True)
class Revising:
    """The second reply answers where it finished, says something and, with a ``ranker``, scores higher than the first;
    else the first, where that finished and says something. ``Found.paths`` are the finished ones in this order."""

    grower: Grower
    ranker: Ranker | None
    prompts: Sequence[Prompt]
    sampling: SamplingConfig
    seed: int

    def run(self, places: Sequence[int]) -> list[Found]:
        """Raises UserError for a tokenizer without a chat template, in which nothing can be asked after a reply."""
        if self.grower.chat.plain:
            raise UserError(
                "revise asks in a second turn, and this model's tokenizer has no chat template; search from a model "
                "that an SFT stage gave one"
            )
        firsts = self.grower.whole([Path(place, sample_stream(self.seed, place, 0)) for place in places], self.sampling)
        seconds = self._seconds([path for path in firsts if path.state == "finished"])
        whole = [path for path in (*firsts, *seconds.values()) if path.state == "finished"]
        if self.ranker is not None:
            scored = self.ranker.score(self.prompts, whole, self.grower.costs)
            known = dict(zip(map(id, whole), scored, strict=True))
            firsts = [known.get(id(path), path) for path in firsts]
            seconds = {place: known.get(id(path), path) for place, path in seconds.items()}
        return [self._found(first, seconds.get(first.place)) for first in firsts]

    def _seconds(self, firsts: Sequence[Path]) -> dict[int, Path]:
        """The second replies by place. A conversation that fills the model's context has none."""
        turns = [
            [*self.prompts[path.place].messages, Message("assistant", path.text), Message("user", CHECK)]
            for path in firsts
        ]
        encoded = self.grower.chat.encode_prompts(turns, [place_of(self.prompts[path.place]) for path in firsts])
        context = self.grower.context
        asked = {
            path.place: ids for path, ids in zip(firsts, encoded, strict=True) if context is None or len(ids) < context
        }
        second = replace(self.grower, prompts=asked)
        paths = [Path(place, sample_stream(self.seed, place, 1)) for place in asked]
        return dict(zip(asked, second.whole(paths, self.sampling), strict=True))

    def _found(self, first: Path, second: Path | None) -> Found:
        costs = self.grower.costs
        whole = tuple(path for path in (first, second) if path is not None and path.state == "finished")
        said = [path for path in whole if path.text.strip()]  # to say nothing is no revision
        answer = said[-1] if said else None
        if len(said) == 2 and self.ranker is not None:
            answer = max(said, key=_score)  # of equal ones the first
        return Found(
            None if answer is None else answer.reply(answer.score),
            whole,
            2 - len(whole),
            costs.generated[first.place],
            costs.scored[first.place],
        )


def _score(path: Path) -> float:
    assert path.score is not None
    return path.score
