"""The models that a run has finished and that can be talked to, found without loading any of them (or torch)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from keel.cli.process import set_threads
from keel.recipe.checkpoints import kept_folder, kept_name, stage_of
from keel.recipe.file import Draft, finish
from keel.recipe.recipe import Recipe, Stage
from keel.recipe.sections import SamplingConfig, Source
from keel.run import RunDir
from keel.types import UserError

_LOADING = threading.Lock()


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Around the loading of a model. transformers loads one inside settings of the whole process, and two that are
    loaded at once spoil each other. The process's threads are set here too."""
    with _LOADING:
        set_threads(None)
        yield


def recipe_of(folder: Path) -> Recipe | None:
    """The recipe of the run that lies in a folder; None where none does. UserError where it is none of this Keel's."""
    manifest = RunDir(folder).manifest.read()
    if not manifest:
        return None
    origin = folder / "manifest.json"
    if "recipe" not in manifest:
        raise UserError(f"{origin}: not the manifest of a run; name a run's folder, or a checkpoint's")
    return finish(Draft(manifest["recipe"], str(origin)))


def trained_models(run: str) -> dict[str, Source]:
    """Checkpoints by stage: what a run directory has trained so far, in the recipe's order."""
    folder = Path(run)
    recipe = recipe_of(folder)
    if recipe is None:
        return {}
    return {stage.name: recipe.model.source(folder / stage.name) for stage in _finished(recipe, folder)}


def _finished(recipe: Recipe, folder: Path) -> list[Stage]:
    """The stages whose model answers, as far as they are done."""
    run = RunDir(folder)
    return [stage for stage in recipe.stages if "policy" in stage.makes and run.stage(stage.name).done]


def find_model(run: str, stage: str | None) -> tuple[str, Source]:
    """(what to call it, its checkpoint) for ``keel chat RUN --stage NAME``, or ``NAME@PERCENT`` that NAME kept.

    Without a name: the last finished stage that made a language model, but no PPO run without a KL penalty (they are
    there to show what goes wrong without one). ``RUN`` may also be a checkpoint's own folder or a hub id.
    """
    folder = Path(run)
    recipe = recipe_of(folder)
    if recipe is None:
        if stage is not None:
            raise UserError(f"{run}: not a run directory (no manifest.json), so it has no stage {stage!r}")
        return run, Source(run)
    done = _finished(recipe, folder)
    places: dict[str, Path | None] = {"base": None, **{s.name: folder / s.name for s in done}}
    places |= {kept_name(s.name, at): folder / s.name / kept_folder(at) for s in done for at in s.kept()}
    if stage is None:
        kept = [s for s in done if s.worth_talking_to()]
        stage = kept[-1].name if kept else "base"
    if stage not in places:
        raise UserError(f"{run}: no finished stage {stage!r} to talk to; there are {', '.join(places)}")
    return stage, recipe.model.source(places[stage])


@dataclass(frozen=True, slots=True)
class Answering:
    """How a recipe has a model answer: on which device, and by which choice of tokens."""

    device: str = "auto"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def answering(run: str, name: str) -> Answering:
    """How the model ``name`` of a run answers: as in the evaluation that compares it, else as in its own stage, else as
    in the first that samples from it. What is no run's leaves all choices open."""
    recipe = recipe_of(Path(run))
    if recipe is None:
        return Answering()
    loading_it = [stage for stage in recipe.stages if name in {use.name for use in stage.loads()}]
    compared = [stage for stage in loading_it if stage.compares_models]
    own = [stage for stage in recipe.stages if stage.name == stage_of(name)[0]]
    found = (sampling for stage in (*compared, *own, *loading_it) if (sampling := stage.samples()) is not None)
    return Answering(recipe.device, next(found, SamplingConfig()))
