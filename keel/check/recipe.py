"""The preflight: finds what would go wrong before compute is spent on it.

``check_recipe`` looks at a whole recipe (``keel check``), data included. ``preflight`` is its cheap part, run before
each stage: errors stop the run, warnings are noted.
"""

from __future__ import annotations

from keel.check.finding import Finding, broken, stage_names
from keel.check.machine import disk, extras, precision, python_refs
from keel.check.models import model_findings, tokenizer_findings
from keel.recipe.graph import parents
from keel.recipe.recipe import Recipe, Stage
from keel.recipe.stage import TrainBase
from keel.run import RunDir, resolve_device
from keel.stages.context import StageContext
from keel.types import UserError


def preflight(stage: Stage, context: StageContext) -> None:
    """The cheap checks before a stage: `UserError` for errors, a note for each warning."""
    found = list(disk(context.recipe, stage, context.run))
    if isinstance(stage, TrainBase):
        found += precision(stage, context.device)
        if context.model_path(stage.model).is_dir() or stage.model == "base":
            found += tokenizer_findings(stage, str(context.model_path(stage.model)), context.recipe)
    for finding in found:
        if finding.level == "error":
            raise UserError(str(finding))
        if not finding.place.startswith(f"{stage.name}.model (") or _first_to_start(stage, context.recipe):
            context.reporter.note(f"warning: {finding}")


def _first_to_start(stage: Stage, recipe: Recipe) -> bool:
    """Whether a warning about the model that ``stage`` starts from is news: a stage that made that model, or started
    from it too, has said it."""
    starts = [
        other for other in recipe.stages if isinstance(other, TrainBase) and other.model not in stage_names(recipe)
    ]
    first = {other.model: other.name for other in reversed(starts)}
    return stage.name in first.values()


def check_recipe(recipe: Recipe, run: RunDir) -> list[Finding]:
    """Everything that can be found without training. Finished stages in ``run`` are looked at too. Never raises
    `UserError`: that is a finding."""
    found: list[Finding] = []
    try:
        device = resolve_device(recipe.device)
    except UserError as error:
        return [broken(error, "device")]
    for stage in recipe.stages:
        try:
            parents(recipe, stage)
        except UserError as error:
            found.append(broken(error, stage.name))
        found += disk(recipe, stage, run)
        if isinstance(stage, TrainBase):
            found += precision(stage, device)
        found += python_refs(stage)
        found += extras(stage)
    found += model_findings(recipe, run)
    return list(dict.fromkeys(found))
