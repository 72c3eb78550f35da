"""The process reward model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keel.data.collate import messages_hash
from keel.data.sources import read_steps
from keel.data.steps import cut_otherwise
from keel.eval.process_quality import NO_ERROR, Judged, aggregate_accuracies, first_error, process_quality
from keel.recipe.process_reward import ProcessRewardStage
from keel.recipe.steps import Aggregate
from keel.reward.process import ScoredSteps
from keel.stages.context import StageContext
from keel.stages.inputs import reading
from keel.stages.training import require_chat_template, training_context
from keel.train.process import train_process
from keel.types import StepLabels, UserError, place_of

STEP_LABELS = "step_labels.jsonl"  # in the folder of a stage that makes step labels


def step_labels(stage: ProcessRewardStage, context: StageContext) -> list[StepLabels]:
    """The labelled replies of the stages and files that ``stage`` names."""
    made = {other.name for other in context.recipe.stages if "step labels" in other.makes}
    files = [context.parent(name).path / STEP_LABELS if name in made else context.file(name) for name in stage.sources]
    found = [row for file in files for row in read_steps(file, reading(context), stage.steps, stage.neutral)]
    if not found:
        raise UserError(f"stage {stage.name}: no reply with labelled steps in {', '.join(stage.sources)}")
    return found


def run_process_reward(stage: ProcessRewardStage, context: StageContext) -> dict[str, Any]:
    records = step_labels(stage, context)
    require_chat_template(stage, [record.prompt for record in records], context)
    cut = cut_otherwise(records, stage.steps) if stage.level == "steps" else []
    if cut:
        context.reporter.note(
            f"{stage.name}: {len(cut)} of {len(records)} replies are labelled in other steps than steps.by: "
            f"{stage.steps.by} cuts (first: {place_of(cut[0])}), and the model will be asked about those"
        )
    accuracies: dict[str, float] = {}

    def choose(heldout: Sequence[ScoredSteps]) -> Aggregate:
        accuracies.update(aggregate_accuracies([_judged(one, stage) for one in heldout]))
        if stage.level == "outcome":
            return "last"
        if stage.aggregate != "auto":
            return stage.aggregate
        if not accuracies:
            context.reporter.note(
                f"{stage.name}: no held-out problem has a right and a wrong reply, so its aggregate is min, unchosen"
            )
        best: Aggregate = max(accuracies, key=accuracies.__getitem__, default="min")  # type: ignore[assignment]
        return best

    summary, heldout = train_process(stage, records, training_context(stage, context), choose)
    judged = [_judged(one, stage) for one in heldout]
    quality = process_quality(judged, summary["aggregate"], stage.label_bound, context.recipe.seed)
    return {**summary, "cut_otherwise": len(cut), "aggregates": accuracies, "heldout": quality}


def _judged(one: ScoredSteps, stage: ProcessRewardStage) -> Judged:
    record = one.record
    return Judged(one.scores, record.labels, messages_hash(record.prompt.messages), is_right(record, stage.label_bound))


def is_right(record: StepLabels, bound: float) -> bool | None:
    """Whether a whole reply's answer is right, as its labels say: its last step, which gives it, is; or a step before
    is wrong and nothing behind was judged. None for what is not whole, or open."""
    if not record.finished:
        return None
    last = record.labels[-1]
    if last is not None:
        return last > bound
    return False if first_error(record.labels, bound) not in (None, NO_ERROR) else None
