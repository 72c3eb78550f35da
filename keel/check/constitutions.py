"""Constitutions that stages draw from: the file, the names of its principles and tags, how many can be drawn."""

from __future__ import annotations

from collections.abc import Iterator

from keel.check.finding import Finding, broken
from keel.data.rows import Reading
from keel.data.sources import read_prompts
from keel.recipe.constitution import principles_of
from keel.recipe.recipe import Recipe, Stage
from keel.types import UserError


def constitution_findings(stage: Stage, recipe: Recipe) -> Iterator[Finding]:
    """What is wrong with the constitution of a stage that has one; a note where it cannot draw every principle."""
    use = stage.principles()
    if use is None:
        return
    place = f"{stage.name}.constitution"
    try:
        _, principles = principles_of(use, stage.name)
    except UserError as error:
        yield broken(error, place)
        return
    named = stage.files().get("prompts") or recipe.data.prompts
    if use.draws is None or not isinstance(named, str):
        return
    try:
        prompts = read_prompts(named, Reading(recipe.data.on_bad_row))
    except UserError:  # another finding
        return
    if len(prompts) * use.draws < len(principles):
        sentence = (
            f"it has {len(principles)} principles to draw from, and draws {len(prompts) * use.draws} times at most "
            f"({use.draws} a prompt, {len(prompts)} prompts)"
        )
        yield Finding("note", place, sentence, "some are never drawn; give it more prompts, or name fewer principles")
