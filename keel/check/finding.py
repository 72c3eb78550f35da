"""What a check found: a sentence with its place and remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from keel.recipe.recipe import Recipe
from keel.types import UserError


@dataclass(frozen=True)
class Finding:
    """``place``: the setting or file; ``sentence``: what is wrong; ``remedy``: what to do. A ``note`` says what is done
    that one might not expect, and is no warning."""

    level: Literal["error", "warning", "note"]
    place: str
    sentence: str
    remedy: str = ""

    def __str__(self) -> str:
        return "; ".join(filter(None, [f"{self.place}: {self.sentence}", self.remedy]))


def broken(error: UserError, place: str = "") -> Finding:
    """A room's own sentence as a finding."""
    head, _, remedy = str(error).rpartition("; ")
    return Finding("error", place or "recipe", head or remedy, remedy if head else "fix it")


def stage_names(recipe: Recipe) -> set[str]:
    return {stage.name for stage in recipe.stages}
