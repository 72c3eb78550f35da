"""Steps of replies labelled by where completions from them lead."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from keel.data.chat import Chat
from keel.feedback.convincing import Chosen, Rated, choose_at_random, choose_convincing, gains
from keel.feedback.step_labels import CutReply, Labeller, Reply, agreed, cut_replies
from keel.model.checkpoint import frozen, load_policy
from keel.model.modules import context_length
from keel.precision import Precision, pick_precision
from keel.recipe.judges import RewardModelRef
from keel.recipe.step_labels import StepLabelsStage
from keel.recipe.steps import StepsRef
from keel.recipe.verify import VerifyRef
from keel.reward.process import ProcessScorer, PythonSteps, aggregated
from keel.rollout.collect import Choice, sample_replies, stop_token_ids, with_decoded_text
from keel.rollout.continuations import Continuations, Right
from keel.rollout.episodes import encode_prompts
from keel.rollout.sampler import Sampler, make_sampler
from keel.run import atomic_write_text, read_json, write_json
from keel.stages.context import STEP_LABELS, StageContext
from keel.stages.inputs import answered, training_prompts, write_step_labels
from keel.stages.scoring import make_judge, reward_model_scorer, step_scorer
from keel.stages.thinking import require_opened
from keel.store import Store
from keel.store.rows import storable
from keel.types import Completion, Prompt, UserError

REPLIES = "state/replies.json"  # those that the stage sampled, until it is done
CONVINCING = "convincing.jsonl"  # wrong replies in the order of what the scorer thinks of them
TALLIES = "state/tallies.jsonl"  # what came of the prefixes so far

# What a scorer says of each reply, higher is better.
Thinks = Callable[[Sequence[CutReply]], list[float]]


def run_step_labels(stage: StepLabelsStage, context: StageContext) -> dict[str, Any]:
    """Labels the steps of a sample stage's replies, or of replies that its model gives, into a file."""
    require_opened(stage, context)
    precision = pick_precision("auto", context.device)
    right = right_by(stage, context, precision)
    judge = None if stage.judge is None else _steps_as(stage, "judge", stage.judge, context, precision)
    thinks = _thinks(stage, context, precision)
    stored = None if stage.responses is None else _responses(stage.responses, context)
    asked = training_prompts(stage.prompts, context) if stored is None else answered([p for p, _ in stored], stage)
    asked = list({prompt.id: prompt for prompt in asked}.values())
    model, tokenizer = load_policy(context.source(stage.model), device=context.device, products=precision)
    frozen(model)
    chat, seed = Chat(tokenizer), stage.seed_of(context.recipe.seed)
    sampler = make_sampler(model, stage.sampling.backend, stop_token_ids(chat, stage.sampling), precision)
    prompts, ids = encode_prompts(chat, asked, context.recipe.data, context.reporter)
    encoded = dict(zip((prompt.id for prompt in prompts), ids, strict=True))
    if stored is None:
        replies = _sampled(stage, context, sampler, chat, prompts, encoded, seed)
    else:
        replies = _encoded(chat, [(p, reply) for p, group in stored for reply in group if p.id in encoded])
    cut, left_out = cut_replies(chat, replies, stage.steps)
    if left_out:
        why = {"empty": "say nothing", "uncut": "have steps that do not end with tokens"}
        said = ", ".join(f"{count} {why[name]}" for name, count in left_out.items())
        context.reporter.note(f"{stage.name}: left out {sum(left_out.values())} of {len(replies)} replies: {said}")
    chosen = _chosen(stage, context, cut, right, thinks, seed)
    continuations = Continuations(
        sampler,
        chat,
        right,
        stage.sampling,
        stage.k,
        seed,
        first=stage.estimate == "hard",
        context=context_length(model),
        kept=context.stage_dir.path / TALLIES,
    )
    labelled = Labeller(continuations, stage.estimate, stage.cap, context.reporter).label(
        [cut[place] for place in chosen.places]
    )
    records, consensus = (labelled.records, None) if judge is None else agreed(labelled.records, judge)
    if not any(label is not None for record in records for label in record.labels):
        raise UserError(
            f"stage {stage.name}: no step of {len(records)} replies has a label; raise cap, or change judge"
        )
    figures = labelled.figures
    labels = [label for record in records for label in record.labels]
    figures |= {"labelled_steps": len(labels) - labels.count(None), "unjudged_steps": labels.count(None)}
    write_step_labels(context.stage_dir.path / STEP_LABELS, stage.name, records)
    drawn = {"random": len(chosen.random), "convincing": len(chosen.convincing), "filled": len(chosen.filled)}
    return {
        **figures,
        "left_out": left_out,
        "chosen": drawn if stage.choose == "convincing" else None,
        "k": stage.k,
        "label": stage.estimate,
        "consensus": consensus,
    }


def right_by(stage: StepLabelsStage, context: StageContext, precision: Precision) -> Right:
    """Whether finished replies are right."""
    judge, exact = make_judge(stage.verify, context, precision), isinstance(stage.verify, VerifyRef)

    def right(prompts: Sequence[Prompt], replies: Sequence[Completion]) -> list[bool]:
        grades = judge.grade(prompts, replies)
        return [g is not None and (g.flags["correct"] is True if exact else g.score > 0.5) for g in grades]

    return right


def _steps_as(
    stage: StepLabelsStage, field: str, ref: StepsRef, context: StageContext, precision: Precision
) -> ProcessScorer | PythonSteps:
    """What scores steps that are cut as the stage cuts them."""
    scorer = step_scorer(ref, context, precision)
    if isinstance(scorer, ProcessScorer):
        try:
            stage.cuts_alike(field, scorer.steps)
        except ValueError as error:
            raise UserError(str(error)) from error
    return scorer


def _responses(name: str, context: StageContext) -> list[tuple[Prompt, list[Completion]]]:
    """The replies that a stage put into the store, by their prompts."""
    made_by = context.parent(name).summary()["fingerprint"]
    with Store(context.store_url) as store:
        prompts = {prompt.id: prompt for prompt in store.prompts()}
        groups: dict[str, list[Completion]] = {}
        for response in store.responses():
            if response.fingerprint == made_by:
                groups.setdefault(response.prompt_id, []).append(response.completion())
    return [(prompts[id], groups[id]) for id in sorted(groups)]


def _encoded(chat: Chat, replies: Sequence[tuple[Prompt, Completion]]) -> list[Reply]:
    """Replies of which the store has the text alone."""
    rows = chat.encode_replies([(prompt.messages, reply.text, False) for prompt, reply in replies])
    return [
        Reply(prompt, row.prompt_ids, row.ids[len(row.prompt_ids) :], reply)
        for (prompt, reply), row in zip(replies, rows, strict=True)
    ]


def _sampled(
    stage: StepLabelsStage,
    context: StageContext,
    sampler: Sampler,
    chat: Chat,
    prompts: Sequence[Prompt],
    encoded: dict[str, tuple[int, ...]],
    seed: int,
) -> list[Reply]:
    """Replies of the stage's own with their tokens; a stage that was killed finds them again."""
    path = context.stage_dir.path / REPLIES
    if path.exists():
        rows = read_json(path)
        groups = [[with_decoded_text(chat, Completion("", tuple(r), (), end)) for r, end in group] for group in rows]
    else:
        choice = Choice(stage.per_prompt)
        groups = sample_replies(sampler, chat, prompts, stage.sampling, choice, seed, context.reporter)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, [[[list(reply.ids), reply.finished] for reply in group] for group in groups])
    return [
        Reply(prompt, encoded[prompt.id], reply.ids[:-1] if reply.finished else reply.ids, reply)
        for prompt, group in zip(prompts, groups, strict=True)
        for reply in group
    ]


def _chosen(
    stage: StepLabelsStage,
    context: StageContext,
    cut: Sequence[CutReply],
    right: Right,
    thinks: Thinks | None,
    seed: int,
) -> Chosen:
    """Which replies are labelled. What is convincing is left in a file, in whose order people may be asked as well
    (``keel label --steps-order``)."""
    if thinks is None:
        return choose_at_random(len(cut), stage.replies, seed)
    assert stage.replies is not None, "the recipe says how many"
    whole = [i for i, one in enumerate(cut) if one.said.finished]
    verdicts = right([cut[i].prompt for i in whole], [cut[i].said for i in whole])
    rated = [Rated(None)] * len(cut)
    for i, verdict in zip(whole, verdicts, strict=True):
        rated[i] = Rated(verdict)
    wrong = [i for i, one in enumerate(rated) if one.right is False]
    for i, score in zip(wrong, thinks([cut[i] for i in wrong]) if wrong else [], strict=True):
        rated[i] = Rated(False, score)
    worth = gains(dict(enumerate(rated)))
    rows = [
        {
            "prompt": [{"role": message.role, "content": message.content} for message in cut[i].prompt.messages],
            "completions": [storable(step) for step in cut[i].steps],
            "priority": worth[i],
        }
        for i in sorted(worth, key=lambda i: (-worth[i], i))
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_write_text(context.stage_dir.path / CONVINCING, lines)
    return choose_convincing(rated, stage.replies, stage.random_share, seed)


def _thinks(stage: StepLabelsStage, context: StageContext, precision: Precision) -> Thinks | None:
    """What the scorer thinks of replies; None where they are chosen at random. Made before anything is sampled: it may
    not fit."""
    if stage.choose == "random":
        return None
    assert stage.scorer is not None, "the recipe names one"
    if isinstance(stage.scorer, RewardModelRef):
        scorer = reward_model_scorer(stage.scorer.model, context, precision, thinking=stage.scorer.thinking)
        return lambda some: scorer.score([one.prompt for one in some], [one.said for one in some]).total_N.tolist()
    of_steps = _steps_as(stage, "scorer", stage.scorer, context, precision)
    how = of_steps.aggregate if isinstance(of_steps, ProcessScorer) else "min"
    return lambda some: [
        aggregated(scores, how)
        for scores in of_steps.score_steps([one.prompt for one in some], [one.steps for one in some])
    ]
