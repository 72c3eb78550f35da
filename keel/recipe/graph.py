"""The recipe's stages as a graph: which stage uses which other's result, and what it takes its scores from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from keel.recipe.annotate import AnnotateStage
from keel.recipe.dpo import DpoStage
from keel.recipe.eval import EvalStage
from keel.recipe.judges import EndpointRef, MixedRef, PythonRef, RewardModelRef, RewardTerm
from keel.recipe.ppo import PpoStage
from keel.recipe.recipe import Recipe, Stage
from keel.recipe.report import ReportStage
from keel.recipe.reward import RewardStage
from keel.recipe.sample import SampleStage
from keel.recipe.sft import SftStage
from keel.recipe.stage import PEOPLE, OnlineBase, PreferenceBase, TrainBase
from keel.types import UserError


@dataclass(frozen=True)
class Reference:
    """A recipe field that names a stage: ``place`` is the field's dotted name, ``target`` what it says, ``kinds`` the
    kinds of stage that it may be (it may be a folder or a file too)."""

    place: str
    target: str
    kinds: tuple[str, ...]


_POLICY = ("sft", "dpo", "ppo", "grpo")
_TRUNK = (*_POLICY, "reward")


def sources(stage: Stage) -> Iterator[tuple[str, PythonRef | RewardModelRef | EndpointRef]]:
    """(dotted name of the field, source) of everything that scores, judges or annotates for a stage."""
    if isinstance(stage, AnnotateStage):
        yield "annotators", stage.annotators
    if isinstance(stage, OnlineBase) and stage.watch is not None:
        yield "watch", stage.watch
    if isinstance(stage, SampleStage | OnlineBase | EvalStage):
        yield from _terms("rewards", stage.rewards)
    judge = stage.judge if isinstance(stage, EvalStage) else None
    if isinstance(judge, MixedRef):
        yield from _terms("judge.rewards", judge.rewards)
    elif judge is not None:
        yield "judge", judge


def _terms(place: str, terms: Sequence[RewardTerm]) -> Iterator[tuple[str, PythonRef | RewardModelRef]]:
    for i, term in enumerate(terms):
        yield f"{place}.{i}.source", term.source


def references(stage: Stage) -> Iterator[Reference]:
    """Every field of a stage that names another stage or a checkpoint folder."""
    if isinstance(stage, TrainBase | SampleStage):
        yield Reference("model", stage.model, _TRUNK if isinstance(stage, RewardStage) else _POLICY)
    if isinstance(stage, AnnotateStage):
        yield Reference("responses", stage.responses, ("sample",))
        for i, reward in enumerate(stage.rewards):
            yield Reference(f"rewards.{i}", reward, ("reward",))
    if isinstance(stage, DpoStage | OnlineBase) and stage.reference is not None:
        yield Reference("reference", stage.reference, _POLICY)
    if isinstance(stage, SftStage):
        yield from _named("demonstrations", stage.demonstrations, ("sample",))
    if isinstance(stage, PreferenceBase):
        yield from _named("preferences", stage.preferences, ("annotate",))
    if isinstance(stage, PpoStage) and stage.critic is not None:
        yield Reference("critic", stage.critic, _TRUNK)
    if isinstance(stage, EvalStage):
        for i, model in enumerate(stage.models):
            yield Reference(f"models.{i}", model, _POLICY)
        yield Reference("baseline", stage.baseline, _POLICY)
        if stage.reward is not None:
            yield Reference("reward", stage.reward, ("reward",))
    for place, source in sources(stage):
        if isinstance(source, RewardModelRef):
            yield Reference(f"{place}.model", source.model, ("reward",))


def _named(field: str, value: str | list[str] | None, kinds: tuple[str, ...]) -> Iterator[Reference]:
    """The references of a field that holds nothing, a name, or a list of names."""
    for i, name in enumerate(value if isinstance(value, list) else [value]):
        if name is not None and name != PEOPLE:
            yield Reference(f"{field}.{i}" if isinstance(value, list) else field, name, kinds)


def stages_there(recipe: Recipe) -> str:
    """The end of a sentence about a stage that is not there."""
    return "the stages there are: " + ", ".join(["base", *(stage.name for stage in recipe.stages)])


def parents(recipe: Recipe, stage: Stage) -> tuple[str, ...]:
    """The names of the stages whose results ``stage`` uses, in the recipe's order.

    Raises `UserError` when a field names a stage that comes later, a stage of the wrong kind, or nothing at all.
    """
    names = [other.name for other in recipe.stages]
    before = recipe.stages[: names.index(stage.name)]
    if isinstance(stage, ReportStage):
        return tuple(other.name for other in before)
    found = set()
    for reference in references(stage):
        place, target = f"{stage.name}.{reference.place}", reference.target
        if target in names:
            _check_order(place, target, stage, names)
            kind = recipe.stage(target).kind
            if kind not in reference.kinds:
                raise UserError(
                    f"{place}: {target!r} is a stage of kind {kind}, and this needs one of kind "
                    f"{' or '.join(reference.kinds)}; name another stage"
                )
            found.add(target)
        elif target == "base":
            if not set(reference.kinds) & set(_POLICY):
                raise UserError(f"{place}: 'base' is no {' or '.join(reference.kinds)} stage; {stages_there(recipe)}")
        elif not Path(target).exists() and not target.startswith("hub:"):
            raise UserError(f"{place}: {target!r} is neither a stage nor a file or folder; {stages_there(recipe)}")
    if isinstance(stage, EvalStage):
        rewards = {other.name for other in before if isinstance(other, RewardStage)}
        # the recipe's own is taken, or a gold judge says which of several is best
        default = stage.judge is None or (stage.reward is None and not stage.rewards)
        if default or (len(rewards) > 1 and isinstance(stage.judge, PythonRef)):
            found |= rewards
        # alarms and the guardrail read learning curves
        found |= {other.name for other in before if isinstance(other, OnlineBase) and other.name in stage.models}
    return tuple(name for name in names if name in found)


def _check_order(place: str, target: str, stage: Stage, names: Sequence[str]) -> None:
    if target == stage.name:
        raise UserError(f"{place}: a stage cannot use its own result; name an earlier stage")
    if names.index(target) > names.index(stage.name):
        raise UserError(f"{place}: stage {target!r} comes after {stage.name!r}; put it before, or name an earlier one")


def ancestors(recipe: Recipe, targets: Collection[str]) -> set[str]:
    """The targets and every stage that they rest on. A report is of what there is: it rests on nothing."""
    wanted: set[str] = set()
    for stage in reversed(recipe.stages):
        if stage.name in targets or stage.name in wanted:
            wanted.add(stage.name)
            if not isinstance(stage, ReportStage):
                wanted.update(parents(recipe, stage))
    return wanted
