"""The recipe's stages as a graph: which stage uses which other's result."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from keel.recipe.checkpoints import kept_name, stage_of
from keel.recipe.declared import Makes, StoreRead
from keel.recipe.recipe import Recipe, Stage, kinds_making
from keel.recipe.stage import StageBase
from keel.types import UserError


def stages_there(recipe: Recipe) -> str:
    """The end of a sentence about a stage that is not there."""
    return "the stages there are: " + ", ".join(["base", *(stage.name for stage in recipe.stages)])


def parents(recipe: Recipe, stage: Stage) -> tuple[str, ...]:
    """The names of the stages whose results ``stage`` uses, in the recipe's order.

    Raises `UserError` when a field names a stage that comes later, a stage of the wrong kind, or nothing at all.
    """
    names = [other.name for other in recipe.stages]
    before = recipe.stages[: names.index(stage.name)]
    found = set(stage.also_uses(before))
    for reference in stage.references():
        place, target = f"{stage.name}.{reference.place}", reference.target
        kinds = kinds_making(*reference.makes)
        named, percent = stage_of(target)
        if named in names:
            _check_order(place, named, stage, names)
            made = recipe.stage(named)
            if made.kind not in kinds:
                raise UserError(
                    f"{place}: {named!r} is a stage of kind {made.kind}, and this needs one of kind "
                    f"{' or '.join(kinds)}; name another stage"
                )
            if percent is not None and percent not in made.kept():
                raise UserError(f"{place}: {_not_kept(made, percent, before, reference.makes)}")
            found.add(named)
        elif target == "base":
            if "policy" not in reference.makes:
                raise UserError(f"{place}: 'base' is no {' or '.join(kinds)} stage; {stages_there(recipe)}")
        elif not Path(target).exists() and not target.startswith("hub:"):
            raise UserError(f"{place}: {_nothing(target, names)}; {stages_there(recipe)}")
    return tuple(name for name in names if name in found)


def _check_order(place: str, target: str, stage: Stage, names: Sequence[str]) -> None:
    if target == stage.name:
        raise UserError(f"{place}: a stage cannot use its own result; name an earlier stage")
    if names.index(target) > names.index(stage.name):
        raise UserError(f"{place}: stage {target!r} comes after {stage.name!r}; put it before, or name an earlier one")


def _not_kept(stage: Stage, percent: int, before: Sequence[StageBase], makes: Collection[Makes]) -> str:
    """Why there is no checkpoint on ``stage``'s way, and which can be named."""
    if stage.can_keep:
        there = ", ".join([stage.name, *(kept_name(stage.name, other) for other in stage.kept())])
        asked = ",".join(map(str, sorted({*stage.kept(), percent})))
        return (
            f"{stage.name} keeps no checkpoint at {percent}%; name one of {there}, or set {stage.name}.keep=[{asked}]"
        )
    fit = [one for one in before if set(makes) & set(one.makes)]
    names = [name for one in fit for name in (one.name, *(kept_name(one.name, percent) for percent in one.kept()))]
    there = ", ".join([*(["base"] if "policy" in makes else []), *names])
    return f"{stage.name} is a stage of kind {stage.kind}, which keeps no checkpoints on its way; name one of {there}"


def _nothing(target: str, names: Sequence[str]) -> str:
    """What is wrong with a name that is nobody's."""
    stage, at, _ = target.partition("@")
    if at and stage in names:
        return f"{target!r} is no checkpoint, as what follows @ is no whole per cent from 1 to 99"
    return f"{target!r} is neither a stage nor a file or folder"


def store_read(recipe: Recipe, stage: StageBase) -> StoreRead:
    """What ``stage`` learns from in the store."""
    return stage.from_store([other.name for other in recipe.stages if "votes" in other.makes])


def ancestors(recipe: Recipe, targets: Collection[str]) -> set[str]:
    """The targets and every stage that they rest on. A report is of what there is: it rests on nothing."""
    wanted: set[str] = set()
    for stage in reversed(recipe.stages):
        if stage.name in targets or stage.name in wanted:
            wanted.add(stage.name)
            if not stage.of_what_is_there:
                wanted.update(parents(recipe, stage))
    return wanted
