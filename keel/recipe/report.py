"""Settings of the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from keel.recipe.stage import StageBase


class ReportStage(StageBase):
    help: ClassVar[str] = "write a run's HTML page"
    uses_model: ClassVar[bool] = False
    of_what_is_there: ClassVar[bool] = True

    kind: Literal["report"] = "report"
    title: str = ""

    def also_uses(self, before: Sequence[StageBase]) -> Iterator[str]:
        yield from (stage.name for stage in before)
