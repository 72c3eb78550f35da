"""Settings of search at test time: several replies, or several ways to go on, of which the best is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from keel.recipe.declared import Scoring
from keel.recipe.judges import RewardModelRef
from keel.recipe.sections import SamplingConfig, Strict
from keel.recipe.steps import Aggregate, ProcessRef, PythonStepsRef, Steps, Thinking

How = Literal["best_of_n", "majority", "weighted", "beam", "dvts", "lookahead", "revise"]
Pick = Literal["best", "majority", "weighted"]
Read = Literal["auto", "last_number", "marked", "boxed"]

# Whole replies are sampled, and one is picked of them so.
SAMPLED: dict[How, Pick] = {"best_of_n": "best", "majority": "majority", "weighted": "weighted"}
_TREE = {"max_steps", "scorer", "aggregate", "steps", "pick", "read", "thinking"}
_TAKES: dict[How, set[str]] = {
    "best_of_n": {"n", "scorer", "aggregate", "steps"},
    "majority": {"n", "read", "thinking"},
    "weighted": {"n", "scorer", "aggregate", "steps", "read", "thinking"},
    "beam": {"width", "expand", *_TREE},
    "dvts": {"n", "width", *_TREE},
    "lookahead": {"width", "expand", "depth", *_TREE},
    "revise": {"scorer", "aggregate", "steps"},
}
_NEEDS: dict[How, tuple[str, ...]] = {
    "best_of_n": ("n", "scorer"),
    "majority": ("n",),
    "weighted": ("n", "scorer"),
    "beam": ("width", "expand", "scorer"),
    "dvts": ("n", "width", "scorer"),
    "lookahead": ("width", "expand", "depth", "scorer"),
    "revise": (),
}


class SearchConfig(Strict):
    """How a prompt is answered with more compute than one reply takes. What is not finished never answers."""

    how: How = Field(
        description="best_of_n, majority, weighted: whole replies; the best by the scorer, the most frequent answer, "
        "or the answer whose replies' scores sum to the most; beam: step by step, the best ones go on; dvts: several "
        "trees apart, each of one beam; lookahead: beams scored by how a greedy rollout goes on; revise: a reply, a "
        "turn that asks to check it, a second reply"
    )
    n: int | None = Field(None, ge=1, description="replies a prompt; dvts: ways to go on a step, over all its trees")
    width: int | None = Field(None, ge=1, description="beams kept; dvts: ways to go on in each of n / width trees")
    expand: int | None = Field(None, ge=1, description="ways in which each beam goes on")
    depth: int | None = Field(None, ge=1, description="lookahead: steps of the greedy rollout that scores a step")
    max_steps: int | None = Field(None, ge=1, description="steps after which a beam is given up; default: no limit")
    scorer: Annotated[ProcessRef | PythonStepsRef | RewardModelRef, Field(discriminator="kind")] | None = Field(
        None, description="what scores steps, or a reward model for whole replies; revise: a second reply counts where "
        "it scores higher"
    )  # fmt: skip
    aggregate: Aggregate | None = Field(
        None, description="what a reply's steps come to; default: as the scorer's checkpoint says, else min"
    )
    steps: Steps | None = Field(
        None, description="where a step ends; default: as the scorer's checkpoint says, else with its line"
    )
    pick: Pick | None = Field(
        None, description="beam, dvts, lookahead: which of the finished ones answers; default: best"
    )
    read: Read = Field("auto", description="how votes read the answer in a reply")
    thinking: Thinking | None = Field(None, description="votes read the answer behind the thinking alone")
    sampling: SamplingConfig | None = Field(None, description="default: the stage's")
    seed: int | None = Field(None, ge=0, description="of the samples; default: the stage's")

    @property
    def sampled(self) -> bool:
        """Whether whole replies are sampled, of which one is picked."""
        return self.how in SAMPLED

    @property
    def in_steps(self) -> bool:
        """Whether it goes on step by step."""
        return "max_steps" in _TAKES[self.how]

    @property
    def picks(self) -> Pick:
        """Which of the finished replies answers."""
        return SAMPLED.get(self.how) or self.pick or "best"

    @property
    def votes(self) -> bool:
        """Whether answers are read and counted."""
        return self.how != "revise" and self.picks != "best"

    @property
    def trees(self) -> tuple[int, int, int]:
        """(trees apart, beams that each keeps, ways in which a beam goes on)."""
        width = self.width or 1
        return (self.paths // width, 1, width) if self.how == "dvts" else (1, width, self.expand or 1)

    @property
    def paths(self) -> int:
        """The replies that are sampled, or the ways to go on that are sampled at each step, a prompt."""
        return self.n or (self.width or 1) * (self.expand or 1)

    @model_validator(mode="after")
    def _fits_together(self) -> SearchConfig:
        fields, takes = type(self).model_fields, _TAKES[self.how] | {"how", "sampling", "seed", "model"}
        given = [name for name, field in fields.items() if getattr(self, name) != field.default and name not in takes]
        if given:
            raise ValueError(f"{self.how} takes no {given[0]}; leave it out")
        missing = [name for name in _NEEDS[self.how] if getattr(self, name) is None]
        if missing:
            raise ValueError(f"{self.how} needs {' and '.join(missing)}; set {missing[0]}")
        if self.scorer is None and (self.aggregate is not None or self.steps is not None):
            raise ValueError("aggregate and steps are of the scorer, and there is none; set scorer, or leave them out")
        if isinstance(self.scorer, RewardModelRef):
            self._of_whole_replies()
        if self.how == "dvts":
            self._has_trees()
        if self.pick in ("majority", "weighted") and self.trees[0] * self.trees[1] == 1:
            raise ValueError(
                f"pick: {self.pick} is a vote, and one beam ends in one reply; widen it, or leave pick out"
            )
        unread = next((name for name in ("read", "thinking") if getattr(self, name) != fields[name].default), None)
        if unread is not None and not self.votes:
            raise ValueError(
                f"{unread} is how votes read answers, and pick: best has no votes; leave it out, or set pick"
            )
        if self.sampling is not None:
            self.check_sampling(self.sampling, "sampling")
        return self

    def _of_whole_replies(self) -> None:
        if self.in_steps:
            raise ValueError(
                f"a reward model scores whole replies, and {self.how} scores steps; name a process reward model "
                "(kind: process), or search by best_of_n"
            )
        if self.aggregate is not None or self.steps is not None:
            raise ValueError("a reward model scores whole replies: leave aggregate and steps out")

    def _has_trees(self) -> None:
        assert self.n is not None
        assert self.width is not None
        if self.n % self.width:
            raise ValueError(f"dvts divides n = {self.n} by width = {self.width}, which leaves a rest; change one")
        if self.width == 1:
            raise ValueError("dvts with width: 1 leaves nothing to choose from; widen it, or search by best_of_n")

    def check_sampling(self, sampling: SamplingConfig, place: str) -> None:
        """ValueError for a way of sampling from which there is nothing to search. ``place``: where it is set."""
        if sampling.temperature == 0 and self.how != "revise" and self.paths > 1:
            raise ValueError(
                f"{place}.temperature is 0, so all {self.paths} samples of {self.how} are the same; raise it, or set "
                "the search's own sampling"
            )
        ends = self.steps or Steps()
        stop = next((text for text in sampling.stop if self.in_steps and len(ends.split(f"a{text}a")) > 1), None)
        if stop is not None:
            raise ValueError(f"{place}.stop ends a reply at {stop!r}, where a step ends; leave it out")

    def scored_by(self, place: str) -> Iterator[tuple[str, Scoring]]:
        """Its scorer. ``place``: the search's dotted name."""
        if self.scorer is not None:
            yield f"{place}.scorer", self.scorer
