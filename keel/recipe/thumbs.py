"""Settings of learning from single replies, each with a thumb up or down, in the place of pairs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

from pydantic import Field, field_validator, model_validator

from keel.recipe.declared import PEOPLE, Reference, StoreRead, Voter, listed, source_references
from keel.recipe.stage import PreferenceBase


class ThumbsBase(PreferenceBase):
    """What stages have in common that learn from pairs or from single replies."""

    later: ClassVar[frozenset[str]] = frozenset({"thumbs", "rating_bound", "desirable_weight", "undesirable_weight"})

    thumbs: str | list[str] | None = Field(
        None,
        description="single replies with thumbs up or down: annotate stages that asked for them, 'people' (people's "
        "thumbs in the store), or files; several in a list. The pairs of preferences, where that is set too, are split "
        "into such replies; default: none, it learns from pairs",
    )
    rating_bound: float | tuple[float, float] | None = Field(
        None,
        description="ratings in the files of thumbs: above it is up, below it down, and equal to it is left out; of "
        "two bounds, above the second, below the first, and whatever is between",
    )
    desirable_weight: float | None = Field(
        None, gt=0, description="of replies with thumbs up; default: from how many there are of either"
    )
    undesirable_weight: float | None = Field(None, gt=0, description="of those with thumbs down; default: likewise")

    @property
    def thumb_sources(self) -> tuple[str, ...]:
        """``thumbs`` as a list."""
        return listed(self.thumbs)

    @field_validator("rating_bound", mode="before")
    @classmethod
    def _a_number(cls, bound: object) -> object:
        if any(isinstance(one, bool) for one in (bound if isinstance(bound, list | tuple) else [bound])):
            raise ValueError("a bound is a number of the ratings' scale, and true or false is none")
        return bound

    def rating_bounds(self) -> tuple[float, float] | None:
        bound = self.rating_bound
        return (bound, bound) if isinstance(bound, float) else bound

    def references(self) -> Iterator[Reference]:
        yield from super().references()
        yield from source_references("thumbs", self.thumbs, "votes")

    @property
    def from_pairs(self) -> bool:
        return self.thumbs is None

    def files(self) -> Mapping[str, str | tuple[str, ...]]:
        if self.thumbs is None:
            return super().files()
        pairs = super().files() if self.sources else {}
        return {**pairs, "thumbs": self.thumb_sources}

    def from_store(self, voted: Collection[str]) -> StoreRead:
        asked: set[Voter] = {"people"} if PEOPLE in self.thumb_sources else set()
        if not set(self.thumb_sources).isdisjoint(voted):
            asked.add("simulated")
        return replace(super().from_store(voted), thumbs=frozenset(asked))

    @model_validator(mode="after")
    def _what_thumbs_take(self) -> ThumbsBase:
        if self.thumbs is not None and not self.thumb_sources:
            raise ValueError("thumbs is an empty list; name files, annotate stages or people, or leave it out")
        if self.thumbs is not None and self.votes != "raw":
            raise ValueError(
                f"votes: {self.votes} makes one record of several votes on a pair, and thumbs are learned from as they "
                "are; leave votes out, or learn from the pairs alone"
            )
        if self.thumbs is not None and not self.sources and self.voters != "all":
            raise ValueError("voters is about votes on pairs; leave it out, or name whose thumbs in thumbs")
        if self.rating_bound is not None and self.thumbs is None:
            raise ValueError("rating_bound makes thumbs of ratings; name their files in thumbs, or leave it out")
        low, high = self.rating_bounds() or (0.0, 0.0)
        if low > high:
            raise ValueError("rating_bound: the first of two bounds is the lower one; swap them")
        return self
