"""What a stage's runner is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from keel.recipe.graph import stages_there
from keel.recipe.recipe import Recipe
from keel.recipe.sections import Source
from keel.run.rundir import RunDir, StageDir
from keel.types import Reporter, UserError


@dataclass(frozen=True)
class StageContext:
    """What a stage's runner is given. ``device`` is a torch device's name, never ``auto``."""

    recipe: Recipe
    run: RunDir
    stage_dir: StageDir
    reporter: Reporter
    device: str

    @property
    def fingerprint(self) -> str:
        """The stage's own; what it makes for others is marked with it."""
        fingerprint = self.stage_dir.fingerprint
        assert fingerprint is not None, "a stage runs in a folder that was begun"
        return fingerprint

    def parent(self, name: str) -> StageDir:
        """The folder of an earlier stage. `UserError` when the recipe has no such stage."""
        if name not in {stage.name for stage in self.recipe.stages}:
            raise UserError(f"stage {self.stage_dir.name}: no stage is called {name!r}; {stages_there(self.recipe)}")
        return self.run.stage(name)

    def source(self, name: str) -> Source:
        """Where the checkpoint that a recipe calls ``name`` is read from."""
        return self.recipe.model.source(self.model_path(name))

    def model_path(self, name: str) -> Path:
        """Where the checkpoint that a recipe calls ``name`` lies: the recipe's own model for 'base' (possibly a hub
        id), a stage's folder, or an existing folder. `UserError` for anything else."""
        if name == "base":
            return Path(self.recipe.model.path)
        if name in {stage.name for stage in self.recipe.stages}:
            return self.run.stage(name).path
        if Path(name).is_dir():
            return Path(name)
        raise UserError(
            f"stage {self.stage_dir.name}: {name!r} is neither a stage nor a folder; {stages_there(self.recipe)}"
        )
