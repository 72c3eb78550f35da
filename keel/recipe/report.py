"""Settings of the report."""

from __future__ import annotations

from typing import Literal

from keel.recipe.stage import StageBase


class ReportStage(StageBase):
    kind: Literal["report"] = "report"
    title: str = ""
