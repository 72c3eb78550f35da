"""Settings of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from keel.recipe.declared import PEOPLE, ROWS, LearnsFrom, Reference, StoreRead, listed, source_references
from keel.recipe.offline import OfflineBase
from keel.recipe.sections import DataConfig


class SftStage(OfflineBase):
    help: ClassVar[str] = "fine-tune a model on demonstrations"
    learns_from: ClassVar[LearnsFrom | None] = "demonstrations"
    later: ClassVar[frozenset[str]] = frozenset({"mix"})
    gives_template: ClassVar[bool] = True
    can_keep: ClassVar[bool] = False

    kind: Literal["sft"] = "sft"
    demonstrations: str | list[str] | None = Field(
        None,
        description="a file, a sample stage that chose its replies by rewards, a critique stage, or 'people' (the "
        "replies that people wrote or edited in the store); several in a list; default: data.demonstrations",
    )
    mix: list[float] | None = Field(
        None,
        description="weights of what demonstrations lists, in its order: an epoch has rows of each in this ratio, as "
        "many as there are without one twice, and the next epoch goes on with others; default: all rows",
    )
    epochs: float = Field(2.0, gt=0)
    batch_size: int = Field(64, ge=1, description="conversations per optimizer step")
    eval_every: int = Field(0, ge=0, description="steps between held-out losses; 0: four times an epoch")
    patience: int = Field(3, ge=1, description="early stopping: held-out losses without a new best")

    @property
    def sources(self) -> tuple[str, ...]:
        """``demonstrations`` as a list."""
        return listed(self.demonstrations)

    def references(self) -> Iterator[Reference]:
        yield from super().references()
        yield from source_references("demonstrations", self.demonstrations, "demonstrations")

    def held_out(self, data: DataConfig) -> float:
        return data.heldout_fraction

    def reads(self, data: DataConfig) -> tuple[str, ...]:
        return ("demonstrations", "heldout_fraction", *ROWS, *super().reads(data))

    def files(self) -> Mapping[str, str | tuple[str, ...]]:
        return {"demonstrations": self.sources}

    def from_store(self, voted: Collection[str]) -> StoreRead:
        return StoreRead(written=PEOPLE in self.sources)

    @model_validator(mode="after")
    def _mixes_what_it_names(self) -> SftStage:
        if self.mix is None:
            return self
        if len(self.sources) < 2 or len(self.mix) != len(self.sources):
            raise ValueError(
                f"mix has {len(self.mix)} weights and demonstrations names {len(self.sources)}; list two sources or "
                "more, and a weight for each"
            )
        if len(set(self.sources)) < len(self.sources):
            raise ValueError("mix: demonstrations names the same twice; name each once, with a larger weight")
        if min(self.mix) <= 0:
            raise ValueError("mix: a weight is above 0; leave out what has none")
        return self

    @model_validator(mode="after")
    def _keeps_its_best(self) -> SftStage:
        if self.optim.average:
            raise ValueError(
                "sft keeps the weights of its best held-out loss, so there is nothing to average; leave "
                "optim.average out"
            )
        if self.kept():
            raise ValueError(
                "sft keeps the weights of its best held-out loss and may stop before its end, so its way has no fixed "
                "parts; leave keep out, or have stages of fewer epochs"
            )
        return self
