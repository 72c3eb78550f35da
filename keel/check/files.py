"""Which files a recipe and its stages name, and how they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from keel.check.finding import Finding, stage_names
from keel.data.rows import BadRows, Reading
from keel.recipe.declared import PEOPLE
from keel.recipe.recipe import Recipe
from keel.recipe.sections import DataConfig
from keel.recipe.steps import StepsRead
from keel.types import Demonstration, LabelledCompletion, Preference, Prompt, StepLabels, UserError

HELDOUT = "data.heldout_prompts"


@dataclass(frozen=True, slots=True)
class Rows:
    """What was read, by the setting that names it."""

    demonstrations: dict[str, list[Demonstration]] = field(default_factory=dict)
    prompts: dict[str, list[Prompt]] = field(default_factory=dict)
    preferences: dict[str, list[Preference]] = field(default_factory=dict)
    thumbs: dict[str, list[LabelledCompletion]] = field(default_factory=dict)
    labels: dict[str, list[StepLabels]] = field(default_factory=dict)

    def judged(self) -> Iterator[Prompt]:
        """The prompts of the pairs, of the single replies and of those in labelled steps."""
        yield from (pair.prompt for some in self.preferences.values() for pair in some)
        yield from (one.prompt for some in self.thumbs.values() for one in some)
        yield from (one.prompt for some in self.labels.values() for one in some)


def reading(data: DataConfig, place: str, found: list[Finding]) -> Reading:
    """As the stages read it; what they would note or leave out becomes a finding."""

    def skipped(bad: BadRows) -> None:
        rows = "".join(f"\n  {line}" for line in bad.first())
        found.append(Finding("warning", place, f"{bad.summary} and are left out (data.on_bad_row: skip){rows}"))

    return Reading(data.on_bad_row, lambda text: found.append(Finding("note", place, text)), skipped)


def demonstration_files(recipe: Recipe) -> list[tuple[str, str]]:
    """(the setting that names it, file) of everything that SFT stages learn from, but for what lies in the store.
    UserError for a stage that names none where the recipe has none either."""
    place, default = "data.demonstrations", recipe.data.demonstrations
    leaning = [stage for stage in recipe.stages if stage.files().get("demonstrations") == ()]
    if leaning and default is None:
        raise UserError(f"{place} is not set and stage kind {leaning[0].kind} needs it; set {place}=FILE")
    return [*([(place, default)] if leaning and default is not None else []), *_named(recipe, "demonstrations")]


def prompt_files(recipe: Recipe) -> list[tuple[str, str]]:
    """(the setting that names it, file) of the prompts that the recipe and its stages name."""
    own = [("data.prompts", recipe.data.prompts), (HELDOUT, recipe.data.heldout_prompts)]
    return [*((place, source) for place, source in own if source is not None), *_named(recipe, "prompts")]


def preference_files(recipe: Recipe) -> list[tuple[str, str]]:
    """(the setting that names it, file) of the pairs that the recipe and its stages name."""
    default = recipe.data.preferences
    return [*([("data.preferences", default)] if default else []), *_named(recipe, "preferences")]


def thumb_files(recipe: Recipe) -> Iterator[tuple[str, str, tuple[float, float] | None]]:
    """(the setting that names it, file, bounds of ratings) of the single replies that stages name."""
    bounds = {stage.name: stage.rating_bounds() for stage in recipe.stages}
    for place, file in _named(recipe, "thumbs"):
        yield place, file, bounds[place.partition(".")[0]]


def step_files(recipe: Recipe) -> Iterator[tuple[str, str, StepsRead]]:
    """(the setting that names it, file, how it is read) of the labelled steps that stages name."""
    how = {stage.name: stage.steps_read() for stage in recipe.stages}
    for place, file in _named(recipe, "labels"):
        if (read := how[place.partition(".")[0]]) is not None:
            yield place, file, read


def bench_files(recipe: Recipe) -> list[tuple[str, str]]:
    """(the setting that names it, file) of RewardBench 2's rows."""
    return list(_named(recipe, "reward_bench"))


def card_files(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(the setting that names it, file) of the replies that process rewards' cards change."""
    for stage in recipe.stages:
        for place, file in stage.cards():
            if file not in stage_names(recipe) and Path(file).exists():  # else the graph says so
                yield f"{stage.name}.{place}", file


def _named(recipe: Recipe, setting: str) -> Iterator[tuple[str, str]]:
    """(the setting that names it, file) of the files in one setting of the stages."""
    made = {PEOPLE, *stage_names(recipe)}
    for stage in recipe.stages:
        named = stage.files().get(setting, ())
        files = (named,) if isinstance(named, str) else [name for name in named if name not in made]
        yield from ((f"{stage.name}.{setting}", file) for file in files)
