"""The report."""

from __future__ import annotations

from typing import Any

from keel.recipe.report import ReportStage
from keel.report import build_report
from keel.stages.context import StageContext


def run_report(stage: ReportStage, context: StageContext) -> dict[str, Any]:
    build_report(context.run.path, context.run.report, stage.title)
    return {"report": context.run.report.name}
