"""The preflight: finds what would go wrong before compute is spent on it.

``check_recipe`` looks at a whole recipe (``keel check``), data included. ``preflight`` is its cheap part, run before
each stage: errors stop the run, warnings are noted.
"""

from __future__ import annotations

from keel.check.constitutions import constitution_findings
from keel.check.cutting import one_step_findings
from keel.check.finding import Finding, broken, stage_names
from keel.check.machine import disk, extras, loggers, precision, python_refs
from keel.check.models import model_findings, tokenizer_findings
from keel.model import nf4
from keel.recipe.checkpoints import stage_of
from keel.recipe.graph import parents
from keel.recipe.recipe import Recipe, Stage
from keel.run import RunDir, resolve_device
from keel.stages.context import StageContext
from keel.types import UserError


def preflight(stage: Stage, context: StageContext) -> None:
    """The cheap checks before a stage: `UserError` for errors, a note for each warning."""
    found = [*loggers(context.recipe), *disk(context.recipe, stage, context.run)]
    training = stage.training()
    if training is not None:
        found += precision(training, context.device)
        path = context.model_path(training.model)
        if path.is_dir() or training.model == "base":
            found += tokenizer_findings(training, str(path), context.recipe)
    for finding in found:
        if finding.level == "error":
            raise UserError(str(finding))
        if not finding.place.startswith(f"{stage.name}.model (") or _first_to_start(stage, context.recipe):
            context.reporter.note(f"warning: {finding}")


def _first_to_start(stage: Stage, recipe: Recipe) -> bool:
    """Whether a warning about the model that ``stage`` starts from is news: a stage that made that model, or started
    from it too, has said it."""
    trained = [training for other in recipe.stages if (training := other.training()) is not None]
    starts = [training for training in trained if stage_of(training.model)[0] not in stage_names(recipe)]
    first = {training.model: training.name for training in reversed(starts)}
    return stage.name in first.values()


def check_recipe(recipe: Recipe, run: RunDir) -> list[Finding]:
    """Everything that can be found without training. Finished stages in ``run`` are looked at too. Never raises
    `UserError`: that is a finding."""
    found: list[Finding] = []
    try:
        device = resolve_device(recipe.device)
    except UserError as error:
        return [broken(error, "device")]
    found += loggers(recipe)
    for stage in recipe.stages:
        try:
            parents(recipe, stage)
        except UserError as error:
            found.append(broken(error, stage.name))
        found += disk(recipe, stage, run)
        training = stage.training()
        if training is not None:
            found += precision(training, device)
        found += constitution_findings(stage, recipe)
        found += python_refs(stage)
        found += extras(stage)
        found += one_step_findings(stage, run)
        if resolved := stage.resolved():
            found.append(Finding("note", stage.name, resolved))
    if recipe.model.weights == "nf4":
        try:
            nf4.require()
        except UserError as error:
            found.append(broken(error, "model.weights"))
    found += model_findings(recipe, run)
    return list(dict.fromkeys(found))
