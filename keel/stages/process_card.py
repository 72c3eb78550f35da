"""What scores the steps of replies is tried on changed ones (``keel.eval.process_card``) before a stage takes its word,
and the stage stops where it is too bad."""

from __future__ import annotations

from typing import Any

from keel.data.sources import read_steps
from keel.eval.process_card import Measure, known_right, process_card, try_scorer
from keel.recipe.process_card import ProcessCard
from keel.recipe.steps import Steps
from keel.run import write_json
from keel.stages.context import StageContext
from keel.stages.inputs import reading
from keel.types import StepScorer, UserError

FILE = "process_card.json"


def card_of_steps(
    bounds: ProcessCard, scorer: StepScorer, steps: Steps, measure: Measure, context: StageContext
) -> dict[str, Any]:
    """The scorer's card, which also lies in the stage's folder; UserError where a bound is broken and the recipe does
    not force it, and where no reply is known to be right."""
    name, seed = context.stage_dir.name, context.recipe.seed
    labelled = read_steps(context.labels(bounds.replies), reading(context), steps)
    right = known_right(labelled, bounds.count, seed)
    if not right:
        raise UserError(
            f"stage {name}: card.replies is {bounds.replies}, and none of its {len(labelled)} replies is whole with "
            "all its steps labelled right; name other step labels"
        )
    context.reporter.start("process reward's card", len(right))
    card = process_card(try_scorer(right, scorer, steps, seed, measure), bounds, measure)
    context.reporter.advance(len(right))
    write_json(context.stage_dir.path / FILE, card)
    broken: list[str] = card["broken"]
    if broken and not bounds.force:
        more = f" ({len(broken) - 1} more in {context.stage_dir.path / FILE})" if len(broken) > 1 else ""
        raise UserError(
            f"stage {name}: what scores the steps is beyond its bounds: {broken[0]}{more}; train it on such replies, "
            "or set card.force: true"
        )
    return card
