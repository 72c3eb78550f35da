"""The process reward model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keel.data.collate import messages_hash
from keel.data.sources import read_steps
from keel.data.steps import cut_otherwise
from keel.eval.process_quality import Judged, aggregate_accuracies, process_quality
from keel.recipe.process_reward import ProcessRewardStage
from keel.recipe.steps import Aggregate
from keel.reward.process import ScoredSteps, outcome
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
    accuracies: dict[Aggregate, float] = {}

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
        return max(accuracies, key=accuracies.__getitem__, default="min")

    summary, heldout = train_process(stage, records, training_context(stage, context), choose)
    judged = [_judged(one, stage) for one in heldout]
    quality = process_quality(judged, summary["aggregate"], stage.label_bound, context.recipe.seed)
    return {**summary, "cut_otherwise": len(cut), "aggregates": accuracies, "heldout": quality}


def _judged(one: ScoredSteps, stage: ProcessRewardStage) -> Judged:
    """With what is known of the reply's answer: what its labels say."""
    record, label = one.record, outcome(one.record, stage.label_bound)
    right = None if label is None else label > stage.label_bound
    return Judged(one.scores, record.labels, messages_hash(record.prompt.messages), right)
