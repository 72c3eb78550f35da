"""The models that a run has finished and that can be talked to, found without loading any of them (or torch)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from keel.cli.process import set_threads
from keel.recipe.ppo import PpoStage
from keel.recipe.recipe import Recipe
from keel.recipe.sections import Source
from keel.run import RunDir
from keel.types import UserError

TALKING = ("sft", "dpo", "ppo", "grpo")  # kinds of stages whose model answers

_LOADING = threading.Lock()


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Around the loading of a model. transformers loads one inside settings of the whole process, and two that are
    loaded at once spoil each other. The process's threads are set here too."""
    with _LOADING:
        set_threads(None)
        yield


def trained_models(run: str) -> dict[str, Source]:
    """Checkpoints by stage: what a run directory has trained so far, in the recipe's order."""
    folder = Path(run)
    manifest = RunDir(folder).manifest.read()
    if not manifest:
        return {}
    recipe = Recipe.model_validate(manifest["recipe"])
    done = [s.name for s in recipe.stages if s.kind in TALKING and RunDir(folder).stage(s.name).done]
    return {name: recipe.model.source(folder / name) for name in done}


def find_model(run: str, stage: str | None) -> tuple[str, Source]:
    """(what to call it, its checkpoint) for ``keel chat RUN --stage NAME``.

    Without a name: the last finished sft, dpo, ppo or grpo stage, but no PPO run without a KL penalty (they are there
    to show what goes wrong without one). ``RUN`` may also be a checkpoint's own folder or a hub id.
    """
    folder = Path(run)
    manifest = RunDir(folder).manifest.read()
    if not manifest:
        if stage is not None:
            raise UserError(f"{run}: not a run directory (no manifest.json), so it has no stage {stage!r}")
        return run, Source(run)
    recipe = Recipe.model_validate(manifest["recipe"])
    done = [s for s in recipe.stages if s.kind in TALKING and RunDir(folder).stage(s.name).done]
    names = ["base", *(s.name for s in done)]
    if stage is None:
        kept = [s for s in done if not (isinstance(s, PpoStage) and s.kl.coef == 0 and s.kl.target is None)]
        stage = kept[-1].name if kept else "base"
    if stage not in names:
        raise UserError(f"{run}: no finished stage {stage!r} to talk to; there are {', '.join(names)}")
    return stage, recipe.model.source(None if stage == "base" else folder / stage)
