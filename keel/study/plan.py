"""A study as data: a recipe, the arms in which it is varied, seeds, the figures wanted, and what they may conclude.

A study is a YAML file; docs/studies.md explains each key. Nothing here computes or imports what does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

import keel
from keel.recipe.file import Draft, finish, first_problem, packaged, read_draft, set_value
from keel.recipe.recipe import Recipe
from keel.recipe.sections import Strict
from keel.types import UserError

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Settings = dict[str, Any]  # dotted keys, as key=value on the command line

OF_THE_STUDY = ("seed", "store", "name")  # sections of a recipe that a study sets itself
FILES = ("demonstrations", "prompts", "heldout_prompts", "pretraining", "base_text", "facts")  # what fills data, too
ALSO = {
    "constitutional": (
        "red_team", "helpful_prompts", "training_prompts", "helpful_demonstrations", "lessons", "faulty_demonstrations",
        "red_team_test",
    ),
}  # fmt: skip
LEDGERS = ("demonstrations", "prompts", "heldout_prompts", "labelled_steps")  # of ``world: ledgers``
WORLD = "harbor:"  # how a place begins that stands for one of the built-in world's files


class Harbor(Strict):
    """How much of the built-in world each seed gets; the recipe's model is then the built-in base model."""

    demonstrations: int = Field(3200, ge=1)
    prompts: int = Field(2000, ge=1)
    heldout_prompts: int = Field(450, ge=1)
    pretraining_tokens: int = Field(40_000, ge=1)
    base_text_tokens: int = Field(25_000, ge=1)
    facts: int = Field(300, ge=1)
    also: list[Literal["constitutional"]] = Field(
        default_factory=list, description="the files of keel demo --constitutional too, as harbor:NAME"
    )
    world: Literal["harbor", "ledgers"] = Field(
        "harbor",
        description="ledgers: the problems of keel demo --reasoning, and the model that was trained on ledgers",
    )
    labelled: int = Field(2400, ge=1, description="ledgers: replies whose steps the gold has labelled")

    def sizes(self, *names: str) -> dict[str, int]:
        """How much of each is written."""
        return self.model_dump(include=set(names)) if names else self.model_dump(exclude={"also", "world", "labelled"})

    def names(self) -> tuple[str, ...]:
        """Its files, by what stands behind ``harbor:``."""
        if self.world == "ledgers":
            return LEDGERS
        return (*FILES, *(name for one in self.also for name in ALSO[one]))


class Figure(Strict):
    """A number that each arm has on each seed. A *place* is ``STAGE.KEY.KEY``: a stage and the way into its
    ``summary.json``; ``STAGE.metrics.NAME`` is the last value in its metrics; ``run.KEY`` leads into the run's."""

    place: str | list[str] = Field(description="several: their mean")
    minus: str | None = Field(None, description="another place, whose value is taken off")
    measure: str | None = Field(
        None, description="a Python function of a finished run that has the values, in the place of summaries"
    )
    title: str
    better: Literal["more", "less"] | None = None
    form: Literal["number", "percent"] = "number"

    @property
    def places(self) -> tuple[str, ...]:
        return (self.place,) if isinstance(self.place, str) else tuple(self.place)


class Comparison(Strict):
    """Which arm is held against what, and what it means when their intervals part."""

    arm: Name | Literal["each"] = Field("each", description="each: every arm but the one that it is held against")
    against: Name | float = Field(description="another arm, or a number")
    figures: list[str] = Field(min_length=1)
    more: str = Field("", description="what it means when the arm's figure is higher")
    less: str = Field("", description="what it means when it is lower")


class Condition(Strict):
    figure: str
    above: float | None = None
    below: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Condition:
        if (self.above is None) == (self.below is None):
            raise ValueError("a condition has one bound; set above or below")
        return self


class Choice(Strict):
    """Which arms keep all conditions, each with its whole interval."""

    title: str
    where: list[Condition] = Field(min_length=1)


class Plot(Strict):
    """Two figures of every arm and seed against each other."""

    title: str
    x: str
    y: str


class Curves(Strict):
    """Curves that each run has, all of them drawn. The place leads to a list of points, or of ``{points: [...]}``."""

    title: str
    place: str
    x: str = Field(description="a point's key")
    y: str
    x_title: str
    y_title: str
    root: bool = Field(False, description="x is drawn as its square root")


class Quick(Strict):
    """What ``--quick`` changes: enough to see that everything works, too little to conclude from."""

    seeds: list[int] | None = Field(None, min_length=1)
    arms: list[str] | None = Field(None, min_length=1, description="these alone; default: all")
    grid: dict[Name, dict[Name, Settings]] | None = Field(None, description="in the place of the study's")
    settings: Settings = Field(default_factory=dict)
    harbor: Harbor | None = None
    minutes: float = Field(gt=0, description="expected on two cores")


class Study(Strict):
    name: Name
    asks: str = Field(description="the question, one line")
    minutes: float = Field(gt=0, description="expected on two cores")
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    harbor: Harbor | None = Field(None, description="data and model of the built-in world; default: the recipe's own")
    recipe: dict[str, Any] | str = Field(description="written out, or a file, or one of Keel's recipes by name")
    settings: Settings = Field(default_factory=dict, description="changes to the recipe for all arms")
    grid: dict[Name, dict[Name, Settings]] = Field(
        min_length=1, description="axes: for each the names of its values, and the settings that each changes"
    )
    figures: dict[Name, Figure] = Field(min_length=1)
    comparisons: list[Comparison] = Field(default_factory=list)
    choices: list[Choice] = Field(default_factory=list)
    plots: list[Plot] = Field(default_factory=list)
    curves: list[Curves] = Field(default_factory=list)
    interval: float = Field(0.95, gt=0.5, lt=1, description="level of the intervals")
    quick: Quick

    def arms(self, quick: bool = False) -> dict[str, Settings]:
        """Every combination of the axes' values: its name, and the settings that it changes."""
        axes = self.quick.grid if quick and self.quick.grid is not None else self.grid
        made = {}
        for values in product(*(axis.items() for axis in axes.values())):
            changed: Settings = {}
            for _, settings in values:
                changed |= settings
            arm = "_".join(name for name, _ in values)
            if arm in made:
                raise ValueError(f"grid: two arms would be called {arm!r}; rename a value of an axis")
            made[arm] = changed
        if quick and self.quick.arms is not None:
            return {name: made[name] for name in self.quick.arms if name in made}
        return made

    @model_validator(mode="after")
    def _names_lead_somewhere(self) -> Study:
        if any(not axis for grid in (self.grid, self.quick.grid or {}) for axis in grid.values()):
            raise ValueError("an axis of grid has no values; name some, or leave it out")
        for seeds in (self.seeds, self.quick.seeds or []):
            if min(seeds, default=0) < 0 or len(set(seeds)) < len(seeds):
                raise ValueError("seeds are different whole numbers from 0")
        arms = self.arms()
        if "data" in {*arms, *self.arms(quick=True)}:
            raise ValueError("grid: an arm called data would lie where the study's data do; rename it")
        for comparison in self.comparisons:
            for named, every in ((comparison.arm, "each"), (comparison.against, None)):
                if isinstance(named, str) and named != every and named not in arms:
                    raise ValueError(f"comparisons: there is no arm {named!r}; the arms are {', '.join(arms)}")
            self._known(comparison.figures, "comparisons")
        for choice in self.choices:
            self._known([condition.figure for condition in choice.where], "choices")
        for plot in self.plots:
            self._known([plot.x, plot.y], "plots")
        if unknown := set(self.quick.arms or ()) - set(self.arms(quick=True)):
            raise ValueError(f"quick.arms: there is no arm {min(unknown)!r}; the arms are {', '.join(arms)}")
        return self

    def _known(self, figures: Sequence[str], where: str) -> None:
        for figure in figures:
            if figure not in self.figures:
                raise ValueError(f"{where}: there is no figure {figure!r}; the figures are {', '.join(self.figures)}")


@dataclass(frozen=True)
class Plan:
    """A study that was read. ``draft``: its recipe before any change; ``quick``: as ``--quick`` has it."""

    study: Study
    draft: Draft
    origin: str
    seeds: tuple[int, ...]
    arms: Mapping[str, Settings]
    harbor: Harbor | None
    minutes: float
    quick: bool = False


def shipped() -> dict[str, Path]:
    """The studies that come with Keel, by name: in ``recipes/studies`` of a checkout, inside an installed package."""
    package = Path(keel.__file__).parent
    folders = (package / "recipes" / "studies", package.parent / "recipes" / "studies")
    return {path.stem: path for folder in reversed(folders) for path in sorted(folder.glob("*.yaml"))}


def read_study(place: str, quick: bool = False, seeds: Sequence[int] = ()) -> Plan:
    """The study that ``place`` names: one of Keel's, or a file. ``seeds``: others than its own.

    Raises `UserError` for a study that is not there, and for what is wrong in one.
    """
    path = shipped().get(place, Path(place))
    if place not in shipped() and not path.suffix:
        raise UserError(f"there is no study {place!r}; Keel has {', '.join(shipped())}, and any YAML file is one")
    whole = read_draft(path, "a study is a mapping with recipe:, grid: and figures:")
    try:
        study = Study.model_validate(whole.tree)
    except ValidationError as error:
        raise UserError(first_problem(whole, error, "a study", "docs/studies.md")) from error
    chosen = list(dict.fromkeys(seeds)) or (quick and study.quick.seeds) or study.seeds
    return Plan(
        study,
        _recipe_of(study, whole, path),
        str(path),
        tuple(chosen),
        study.arms(quick),
        (quick and study.quick.harbor) or study.harbor,
        study.quick.minutes if quick else study.minutes * len(chosen) / len(study.seeds),
        quick,
    )


def _recipe_of(study: Study, whole: Draft, path: Path) -> Draft:
    if isinstance(study.recipe, dict):
        lines = {place[1:]: line for place, line in whole.lines.items() if place[0] == "recipe" and len(place) > 1}
        return Draft(whole.tree["recipe"], str(path), lines)
    beside = path.parent / study.recipe
    return read_draft(beside if beside.exists() or beside.suffix else packaged(study.recipe))


# -------------------------------------------------------------------------------------------- the recipe of an arm


@dataclass(frozen=True)
class World:
    """What the built-in world has for a seed: the base model's folder, and files by name (``Harbor.names``)."""

    model: str
    files: Mapping[str, str]


def arm_recipe(plan: Plan, arm: str, seed: int, store: str, world: World | None) -> Recipe:
    """The recipe that ``arm`` runs on ``seed``, checked as any recipe is. Settings are applied in this order: the
    study's, those of ``--quick``, the arm's.

    ``store``: the feedback database that the arms of a seed share, where the recipe names none. `UserError` says which
    arm is wrong, and where.
    """
    tree = _copied(plan.draft.tree)
    if world is not None:
        data = {name: file for name, file in world.files.items() if name in FILES}
        for section, given in (("model", {"path": world.model}), ("data", data)):
            if isinstance(tree.get(section) or {}, dict):  # else the recipe's check says what it is
                tree[section] = {**given, **(tree.get(section) or {})}
    draft = Draft(tree, plan.draft.origin, plan.draft.lines)
    try:
        for settings in (plan.study.settings, plan.study.quick.settings if plan.quick else {}, plan.arms[arm]):
            for key, value in settings.items():
                if key.split(".")[0] in OF_THE_STUDY:
                    raise UserError(f"{key}: a study sets this itself; leave it out")
                set_value(draft, key, value)
        draft.tree = _with_files(draft.tree, world)
        draft.tree["name"] = f"{plan.study.name}_{arm}"
        if not draft.tree.get("store"):
            draft.tree["store"] = store
        return finish(draft, (), seed)
    except UserError as error:
        raise UserError(f"{plan.origin}: arm {arm}: {error}") from error


def _copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree


def _with_files(tree: Any, world: World | None) -> Any:
    """The tree with files in the place of ``harbor:NAME``."""
    if isinstance(tree, dict):
        return {key: _with_files(value, world) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_files(value, world) for value in tree]
    if not isinstance(tree, str) or not tree.startswith(WORLD):
        return tree
    name = tree.removeprefix(WORLD)
    if world is None or name not in world.files:
        there = f"is one of {', '.join(world.files)}" if world else "needs harbor: in the study"
        raise UserError(f"{tree}: what follows {WORLD} {there}")
    return world.files[name]
