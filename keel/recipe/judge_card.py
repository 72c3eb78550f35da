"""Settings of a judge's card: how good a judge is, measured before its word counts, and the bounds it must keep."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from keel.recipe.judges import PythonRef
from keel.recipe.sections import Strict


class JudgeCard(Strict):
    """Bounds of a judge (``keel.eval.judge_card``). Beyond one of them the stage stops before it does its work."""

    against: Literal["people"] | PythonRef = Field(
        "people",
        description="who knows better: people (their votes in the store on pairs of replies) or a Python function "
        "(prompt, text) -> score",
    )
    pairs: int = Field(200, ge=1, description="pairs that the judge is asked about, at most")
    min_agreement: float | None = Field(None, ge=0, le=1, description="with those who know better; default: no bound")
    max_flips: float = Field(
        0.4, ge=0, le=1, description="share of choices that turn with the order in which the two are shown"
    )
    max_effect: float = Field(
        0.1,
        gt=0,
        le=1,
        description="by how much a length one standard step longer, being the judge's own, being likelier to it, or "
        "being shown first may change the probability of being chosen; an effect whose interval holds 0 is none",
    )
    max_ece: float | None = Field(None, ge=0, le=1, description="expected calibration error; default: no bound")
    force: bool = Field(False, description="go on beyond the bounds; the card says so")

    def bounds(self) -> dict[str, Any]:
        """What the card is held against, as JSON has it: not what is measured."""
        return self.model_dump(mode="json", exclude={"against", "pairs"})
