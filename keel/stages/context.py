"""What a stage's runner is given: what its kind declares, and nothing else.

A finished stage is known by a fingerprint of what its kind declares (`keel.recipe.stage.StageBase`). Whatever a runner
read besides could change, and the stage would not run again. So that is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, cast

from keel.recipe.checkpoints import kept_folder, stage_of
from keel.recipe.constitution import Constitution, Principle, principles_of
from keel.recipe.declared import WITH_PEOPLE, StoreRead
from keel.recipe.graph import parents, stages_there, store_read
from keel.recipe.judges import PythonRef
from keel.recipe.recipe import Recipe, Stage
from keel.recipe.sections import DataConfig, Source
from keel.recipe.steps import PythonStepsRef, Thinking
from keel.reward.python_ref import load_python
from keel.run.rundir import RunDir, StageDir
from keel.types import Prompt, Reporter, UserError

STEP_LABELS = "step_labels.jsonl"  # in the folder of a stage that makes step labels


def _of_answers(function: Callable[..., Any], thinking: Thinking) -> Callable[..., Any]:
    """A function of prompt and reply that is shown the reply's answer alone."""

    @wraps(function)
    def of_answer(prompt: Prompt, text: str) -> Any:
        return function(prompt, thinking.shown(text))

    return of_answer


class UndeclaredRead(Exception):
    """A runner reads what its kind of stage does not declare: a mistake in the program, not in a recipe."""


class DeclaredData:
    """The recipe's data section with the settings that a stage's kind declares, and no others."""

    def __init__(self, data: DataConfig, stage: Stage, names: tuple[str, ...]) -> None:
        self.whole = data
        self._stage = stage
        self._names = names

    def __getattr__(self, name: str) -> Any:
        if name in DataConfig.model_fields and name not in self._names:
            raise _undeclared(self._stage, f"data.{name}", "reads")
        return getattr(self.whole, name)


def _undeclared(stage: Stage, what: str, where: str) -> UndeclaredRead:
    kind = type(stage).__name__
    return UndeclaredRead(
        f"stage {stage.name} reads {what}, which {kind} does not declare; add it to {kind}.{where}, so that the stage "
        "runs again when it changes"
    )


@dataclass(frozen=True)
class StageContext:
    """What a stage's runner is given. ``device`` is a torch device's name, never ``auto``.

    ``recipe.data`` has what the stage's kind declares. ``parent``, ``source`` and ``model_path`` lead to the stages and
    folders that it declares, ``file`` to the files, ``python`` to the functions, ``store_url`` to the store. All else
    is an `UndeclaredRead`.
    ``reads_as``: the stage whose declaration counts, where it is not the stage's own. ``constitutions``: as they were
    when fingerprints were made, by what the recipe calls them; what is not there is read now.
    """

    recipe: Recipe
    run: RunDir
    stage_dir: StageDir
    reporter: Reporter
    device: str
    reads_as: str | None = None
    constitutions: Mapping[str, Constitution] = field(default_factory=dict)

    def __post_init__(self) -> None:
        data = self.recipe.data
        whole = data.whole if isinstance(data, DeclaredData) else data
        recipe = self.recipe.model_copy(update={"data": whole})
        stage = recipe.stage(self.reads_as or self.stage_dir.name)
        learned = store_read(recipe, stage)
        of_people = WITH_PEOPLE if learned.on_any_prompt else ()
        declared = DeclaredData(whole, stage, (*stage.reads(whole), *of_people))
        narrowed = recipe.model_copy(update={"data": cast(DataConfig, declared)})
        object.__setattr__(self, "recipe", narrowed)

    @property
    def stage(self) -> Stage:
        """The stage whose declaration counts."""
        return self.recipe.stage(self.reads_as or self.stage_dir.name)

    @property
    def fingerprint(self) -> str:
        """The stage's own; what it makes for others is marked with it."""
        fingerprint = self.stage_dir.fingerprint
        assert fingerprint is not None, "a stage runs in a folder that was begun"
        return fingerprint

    @property
    def parents(self) -> tuple[str, ...]:
        """The names of the stages whose results the stage uses."""
        return parents(self.recipe, self.stage)

    def parent(self, name: str) -> StageDir:
        """The folder of an earlier stage. `UserError` when the recipe has no such stage."""
        if name not in {stage.name for stage in self.recipe.stages}:
            raise UserError(f"stage {self.stage_dir.name}: no stage is called {name!r}; {stages_there(self.recipe)}")
        if name not in self.parents:
            raise _undeclared(self.stage, f"stage {name}", "references or also_uses")
        return self.run.stage(name)

    def seen_by(self, name: str) -> StageContext:
        """What the earlier stage ``name`` may read: its fingerprint is a part of this stage's."""
        self.parent(name)
        return replace(self, reads_as=name)

    def own_folder(self) -> StageDir:
        """The folder of the stage whose declaration counts."""
        return self.run.stage(self.stage.name)

    def source(self, name: str) -> Source:
        """Where the checkpoint that a recipe calls ``name`` is read from."""
        return self.recipe.model.source(self.model_path(name))

    def model_path(self, name: str) -> Path:
        """Where the checkpoint that a recipe calls ``name`` lies: the recipe's own model for 'base' (possibly a hub
        id), a stage's folder or what it kept on its way, or an existing folder. `UserError` for anything else."""
        named, percent = stage_of(name)
        if named in {stage.name for stage in self.recipe.stages}:
            folder = self.parent(named).path
            return folder if percent is None else folder / kept_folder(percent)
        if name != "base" and not Path(name).is_dir() and not name.startswith("hub:"):
            raise UserError(
                f"stage {self.stage_dir.name}: {name!r} is neither a stage, a folder nor hub:owner/name; "
                f"{stages_there(self.recipe)}"
            )
        if name not in {reference.target for reference in self.stage.references()}:
            raise _undeclared(self.stage, f"the checkpoint {name}", "references")
        if not self.stage.needs_model():
            raise _undeclared(self.stage, f"the checkpoint {name} and the recipe's model section", "uses_model")
        return Path(self.recipe.model.path if name == "base" else name)

    def file(self, name: str) -> str:
        """A file that a field of the stage names."""
        if not any(name in ((named,) if isinstance(named, str) else named) for named in self.stage.files().values()):
            raise _undeclared(self.stage, f"the file {name}", "files")
        return name

    def labels(self, name: str) -> str:
        """Where the step labels lie that a recipe calls ``name``: a stage's, or a file."""
        if name not in {reference.target for reference in self.stage.references()}:
            raise _undeclared(self.stage, f"the step labels {name}", "references")
        is_stage = name in {stage.name for stage in self.recipe.stages}
        return str(self.parent(name).path / STEP_LABELS) if is_stage else name

    def python(self, ref: PythonRef | PythonStepsRef) -> Callable[..., Any]:
        """The function that scores, judges or annotates for the stage."""
        if all(source != ref for _, source in self.stage.scored_by()):
            raise _undeclared(self.stage, f"the function {ref.ref}", "scored_by")
        function = load_python(ref.ref)
        thinking = ref.thinking if isinstance(ref, PythonRef) else None
        return function if thinking is None else _of_answers(function, thinking)

    def constitution(self) -> tuple[Constitution, tuple[Principle, ...]]:
        """The constitution that the stage declares, and those of its principles that it draws from. An edit of its
        file since the fingerprints were made is for the next run."""
        use = self.stage.principles()
        if use is None:
            raise _undeclared(self.stage, "a constitution", "principles")
        return principles_of(use, self.stage.name, self.constitutions.get(use.constitution))

    @property
    def store_url(self) -> str:
        replies = any("responses" in reference.makes for reference in self.stage.references())  # they lie there
        if self.stage.stored == "nothing" and not replies and store_read(self.recipe, self.stage) == StoreRead():
            raise _undeclared(self.stage, "the store", "from_store or stored")
        return self.recipe.store or self.run.store_url
