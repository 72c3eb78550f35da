"""Settings of a process reward model's card: what a wrong number and what mere style do to it, measured before a policy
learns from it, and the bounds it must keep."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from keel.recipe.sections import Strict


class ProcessCard(Strict):
    """Replies that are known to be right are changed, and what scores their steps must see what matters and no more
    (``keel.eval.process_card``). Beyond a bound the stage stops before it does its work."""

    replies: str = Field(
        description="a step_labels stage or a file of step labels; those whose steps are all labelled right are taken"
    )
    count: int = Field(100, ge=1, description="replies that are changed, at most")
    min_fall: float = Field(
        0.2, gt=0, le=1, description="by how much the score of a step must fall when one of its numbers is changed"
    )
    min_noticed: float = Field(0.8, ge=0, le=1, description="share of changed numbers whose step falls so far")
    max_change: float = Field(
        0.1,
        gt=0,
        le=1,
        description="how much other wording, a repeated true step or thanks at the end may change a reply's lowest "
        "score, or with form: progress its last one, on average",
    )
    force: bool = Field(False, description="go on beyond the bounds; the card says so")


def cards_without_force(settings: Any) -> Any:
    """Settings as a fingerprint has them: to force a card's bounds computes nothing again."""
    if isinstance(settings, list):
        return [cards_without_force(one) for one in settings]
    if not isinstance(settings, dict):
        return settings
    inner = {name: cards_without_force(value) for name, value in settings.items()}
    if isinstance(inner.get("card"), dict):
        inner["card"] = {name: value for name, value in inner["card"].items() if name != "force"}
    return inner
