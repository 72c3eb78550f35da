"""The process reward model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from keel.data.collate import messages_hash
from keel.data.sources import read_steps
from keel.data.steps import cut_otherwise
from keel.eval.process_quality import Judged, aggregate_accuracies, chosen_aggregate, process_quality
from keel.eval.process_traces import Trace, draw_traces
from keel.recipe.declared import PEOPLE
from keel.recipe.process_reward import ProcessRewardStage
from keel.recipe.steps import Aggregate
from keel.recipe.verify import VerifyRef
from keel.reward.checks import Verify, answer_part, known_answer
from keel.reward.process import PythonSteps, ScoredSteps, outcome
from keel.reward.verify import Verdict, read_answer, same
from keel.run import write_json
from keel.stages.context import STEP_LABELS, StageContext
from keel.stages.inputs import reading, step_labels_of_people
from keel.stages.training import require_chat_template, training_context
from keel.train.process import learned_labels, train_process
from keel.types import Completion, StepLabels, UserError, place_of

TRACES = "traces.json"  # some held-out replies with the scores of their steps, for the report
KNOWN = ("gold", "mc")  # of those who label, the ones that are nobody's name


def step_labels(stage: ProcessRewardStage, context: StageContext) -> tuple[list[StepLabels], frozenset[str]]:
    """The labelled replies of the stages and files that ``stage`` names, and of people; and the ids of those that are
    no fair sample to measure on, since people were asked about them for what they teach."""
    made = {other.name for other in context.recipe.stages if "step labels" in other.makes}
    found: list[StepLabels] = []
    chosen: frozenset[str] = frozenset()
    for name in stage.sources:
        if name == PEOPLE:
            people = step_labels_of_people(context, stage.neutral)
            found += people.labels
            chosen = frozenset(one.id for one in people.labels) - people.random
        else:
            file = context.parent(name).path / STEP_LABELS if name in made else context.file(name)
            found += read_steps(file, reading(context), stage.steps, stage.neutral)
    if not found:
        raise UserError(f"stage {stage.name}: no reply with labelled steps in {', '.join(stage.sources)}")
    return found, chosen


def run_process_reward(stage: ProcessRewardStage, context: StageContext) -> dict[str, Any]:
    records, chosen = step_labels(stage, context)
    answers = _answers(records, stage)
    if stage.verify is not None and stage.level == "outcome":
        records = [_by_answer(one, answers[_reply(one, stage.verify)]) for one in records]
    gold = _gold(records, stage, context)  # before the work: a function that fails is found now
    require_chat_template(stage, [record.prompt for record in records], context)
    cut = cut_otherwise(records, stage.steps) if stage.level == "steps" else []
    if cut:
        context.reporter.note(
            f"{stage.name}: {len(cut)} of {len(records)} replies are labelled in other steps than steps.by: "
            f"{stage.steps.by} cuts (first: {place_of(cut[0])}), and the model will be asked about those"
        )
    accuracies: dict[Aggregate, float] = {}

    def choose(heldout: Sequence[ScoredSteps]) -> Aggregate:
        accuracies.update(aggregate_accuracies([_judged(one, stage, answers) for one in heldout]))
        if stage.level == "outcome":
            return "last"
        if stage.aggregate != "auto":
            return stage.aggregate
        if not accuracies:
            context.reporter.note(
                f"{stage.name}: no held-out problem has a right and a wrong reply, so its aggregate is min, unchosen"
            )
        return chosen_aggregate(accuracies)

    summary, heldout = train_process(stage, records, training_context(stage, context), choose)
    fair = [one for one in heldout if one.record.id not in chosen]
    judged = [_judged(one, stage, answers) for one in fair]
    if not judged:
        context.reporter.note(
            f"{stage.name}: people were asked about every held-out reply for what it teaches, so there are no figures; "
            "have some labelled that are drawn at random"
        )
    chosen_here = stage.level == "steps" and stage.aggregate == "auto"
    how: Aggregate | None = None if chosen_here else summary["aggregate"]
    quality = process_quality(judged, how, stage.label_bound, context.recipe.seed)
    if stage.level == "steps":
        first = quality["first_error"]
        threshold = first["bound"] if first and first["chosen_on"] else None
        traces = [_trace(one.record, its, gold) for one, its in zip(fair, judged, strict=True)]
        drawn = draw_traces(traces, threshold, summary["aggregate"], stage.label_bound, context.recipe.seed)
        write_json(context.stage_dir.path / TRACES, drawn)
    return {**summary, "cut_otherwise": len(cut), "aggregates": accuracies, "heldout": quality}


Reply = tuple[str, str, str, bool]
Answered = tuple[Verdict, str | None]  # what an answer is, and the answer itself


def _judged(one: ScoredSteps, stage: ProcessRewardStage, answers: Mapping[Reply, Answered]) -> Judged:
    """With what is known of the reply's answer: by the prompt's, or else by its last step's label."""
    record = one.record
    problem, labels = messages_hash(record.prompt.messages), learned_labels(record, stage)
    if stage.verify is not None:
        verdict, answer = answers[_reply(record, stage.verify)]
        return Judged(one.scores, labels, problem, verdict == "right" if record.finished else None, answer)
    label = outcome(record, stage.label_bound)
    return Judged(one.scores, labels, problem, None if label is None else label > stage.label_bound)


def _gold(
    records: Sequence[StepLabels], stage: ProcessRewardStage, context: StageContext
) -> dict[Reply, tuple[float, ...]] | None:
    """The truth of each reply's steps, where the recipe names what knows it."""
    if stage.gold is None:
        return None
    function = PythonSteps(context.python(stage.gold), stage.gold.ref)
    marks = function.score_steps([one.prompt for one in records], [one.steps for one in records])
    return {_asked(one): mark for one, mark in zip(records, marks, strict=True)}


def _trace(record: StepLabels, judged: Judged, gold: Mapping[Reply, tuple[float, ...]] | None) -> Trace:
    """With the gold in the place of the labels, where it is known."""
    if gold is None:
        return Trace(record, judged, record.annotator if record.annotator in KNOWN else "")
    return Trace(record, replace(judged, labels=gold[_asked(record)]), "gold")


def _reply(record: StepLabels, ref: VerifyRef) -> Reply:
    """What its verdict depends on. No id: prompts of two files may share one."""
    prompt = record.prompt
    return messages_hash(prompt.messages), known_answer(prompt, ref.field), record.text, record.finished


def _asked(record: StepLabels) -> Reply:
    """What the gold of its steps depends on: all that the prompt says of itself."""
    prompt = record.prompt
    return messages_hash(prompt.messages), json.dumps(prompt.meta, sort_keys=True), record.text, record.finished


def _answers(records: Sequence[StepLabels], stage: ProcessRewardStage) -> dict[Reply, Answered]:
    """What each reply answers, where the recipe says how to hold that against the prompt's. Answers to one problem that
    are the same by value are one for a vote, and written as the first of them; right ones as the prompt's."""
    ref = stage.verify
    if ref is None:
        return {}
    replies = [Completion(one.text, finished=one.finished) for one in records]
    verdicts = Verify(ref).verdicts([one.prompt for one in records], replies)
    found: dict[Reply, Answered] = {}
    given: dict[str, list[str]] = {}  # to each problem
    for one, reply, verdict in zip(records, replies, verdicts, strict=True):
        key = _reply(one, ref)
        part = answer_part(reply.text, ref)
        answer = key[1] if verdict == "right" else None if part is None else read_answer(part, ref.read, one.finished)
        if answer is not None:
            known = given.setdefault(key[0], [])
            answer = next((other for other in known if other == answer or same(other, answer)), answer)
            if answer not in known:
                known.append(answer)
        found[key] = verdict, answer
    return found


def _by_answer(record: StepLabels, answered: Answered) -> StepLabels:
    """With the verdict on its answer in the place of its last step's label, and no other."""
    label = 1.0 if answered[0] == "right" else 0.0
    return replace(record, labels=(*(None,) * (len(record.steps) - 1), label))
