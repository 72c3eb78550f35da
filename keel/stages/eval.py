"""The evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from keel.data.chat import Chat
from keel.data.collate import messages_hash, split_by_prompt
from keel.data.reward_bench import read_reward_bench
from keel.data.sources import read_facts, read_texts
from keel.eval.capability import encode_facts
from keel.eval.checkpoints import FrontierInputs, measure_frontier
from keel.eval.models import EvaluationInputs, OfflineRun, OnlineRun, evaluate_models
from keel.eval.revisions import Chain, flags_by_revision
from keel.eval.reward_bench import reward_bench
from keel.eval.reward_quality import gold_accuracy
from keel.eval.search import Marks
from keel.eval.tasks import check_tasks, measure_tasks
from keel.model.checkpoint import load_tokenizer, positions
from keel.precision import Precision, pick_precision
from keel.recipe.critique import CritiqueStage
from keel.recipe.eval import EvalStage, FrontierConfig
from keel.recipe.judges import JudgeRef, MixedRef, PythonRef, source_name
from keel.recipe.offline import OfflineBase
from keel.recipe.online import OnlineBase
from keel.recipe.reward import RewardStage
from keel.recipe.sections import Source
from keel.reward.judge import JudgeFromPython
from keel.rollout.episodes import encode_prompts
from keel.stages.context import StageContext
from keel.stages.critique import RECORDS
from keel.stages.inputs import (
    heldout_prompts,
    preferences,
    reading,
    training_prompts,
)
from keel.stages.judge_card import card_of_judge, refuse_beyond
from keel.stages.scoring import default_reward, make_judge, mixed_scorer, reward_model_scorer
from keel.stages.search import Searching
from keel.stages.thinking import require_opened
from keel.types import Judge, Preference, Scorer

SUMMARY = ("stages", "order", "baseline", "judge", "judge_card", "alarms")
OPTIONAL = ("frontier", "revisions", "search", "search_curve", "search_thirds", "reward_bench", "tasks")


def run_eval(stage: EvalStage, context: StageContext) -> dict[str, Any]:
    """Evaluates the models and writes the run's ``summary.json``."""
    require_opened(stage, context)
    recipe = context.recipe
    precision = pick_precision("auto", context.device)
    models = {name: context.source(name) for name in dict.fromkeys([*stage.models, stage.baseline])}
    drawn = _drawn(stage, context)
    places = {name: context.source(name) for runs in drawn.values() for names in runs.values() for name in names}
    prompts = heldout_prompts(stage.prompts, context)
    facts = read_facts(recipe.data.facts, reading(context)) if recipe.data.facts else []
    searched = {name: context.source(name) for name in (one.model or stage.baseline for one in stage.search.values())}
    for source in {
        **models,
        **places,
        **searched,
    }.values():  # each may have a tokenizer of its own, and all are asked the same
        tokenizer = load_tokenizer(source)
        prompts, _ = encode_prompts(Chat(tokenizer), prompts, recipe.data, context.reporter)
        if recipe.data.facts:
            encode_facts(tokenizer, facts, positions(source))  # what is wrong with them is said before anything is paid
    gold = None
    if stage.card is not None and isinstance(stage.card.against, PythonRef):
        gold = JudgeFromPython(context.python(stage.card.against))
    inputs = EvaluationInputs(
        models=models,
        baseline=stage.baseline,
        prompts=prompts,
        texts=read_texts(recipe.data.base_text, reading(context)) if recipe.data.base_text else [],
        facts=facts,
        judge=make_judge(stage.judge, context, precision),
        scorer=_proxy(stage, context, precision),
        sampling=stage.sampling,
        seed=recipe.seed,
        bootstrap=stage.bootstrap,
        show=stage.show,
        device=context.device,
        precision=precision,
        online_runs={
            s.name: OnlineRun(s.kind, s.kl_weight(), context.parent(s.name).metrics.rows())
            for s in recipe.stages
            if isinstance(s, OnlineBase) and s.name in stage.models
        },
        offline_runs={
            s.name: OfflineRun(s.model, context.parent(s.name).summary())
            for s in recipe.stages
            if isinstance(s, OfflineBase) and s.measure is not None and s.name in stage.models
        },
        gold=gold,
        card_pairs=stage.card.pairs if stage.card is not None else 0,
    )
    searching = None
    if stage.search:  # that the judge can count what they find is said before anything is sampled
        searching = Searching(stage, context, prompts, Marks(inputs.judge, prompts), precision)
        searching.check()
    of_people = stage.card is not None and gold is None
    cards = card_of_judge(stage, context, inputs.judge, []) if of_people else None  # before anything is sampled
    benchmarks = dict(_benchmarks(stage, context, models, precision))
    summary = evaluate_models(inputs, context.reporter) | benchmarks
    judged = summary.pop("judged", [])
    if stage.card is not None:
        # A judge beyond its bounds is refused below, when the rest is kept.
        summary["judge_card"] = cards or card_of_judge(stage, context, inputs.judge, judged, refuse=False)
        summary["alarms"] += summary["judge_card"]["alarms"]
    if searching is not None:
        summary |= searching.summary()
    if stage.frontier is not None:
        summary["frontier"] = _frontier(stage, stage.frontier, context, inputs, drawn, places)
    if stage.revisions is not None:
        summary["revisions"] = {stage.revisions: by_revision(stage.revisions, inputs.judge, context)}
    summary["judge"] = _judge_name(stage.judge)
    reward = default_reward(context)
    if reward is not None:
        summary["reward_model"] = context.parent(reward).summary()
    if isinstance(stage.judge, PythonRef):
        summary["reward_models"] = _gold_accuracy(stage, inputs.judge, context, precision)
    context.run.write_summary(summary)
    if stage.card is not None:
        refuse_beyond(stage.name, stage.card, summary["judge_card"], context.stage_dir.path)
    return {name: summary[name] for name in (*SUMMARY, *OPTIONAL) if name in summary}


def _benchmarks(
    stage: EvalStage, context: StageContext, models: dict[str, Source], precision: Precision
) -> Iterator[tuple[str, Any]]:
    """Of others' making. They come first: what they cannot read or ask is said before the replies are paid for."""
    if stage.tasks is not None:
        check_tasks(stage.tasks)
    if stage.reward_bench is not None:
        recipe = context.recipe
        items = read_reward_bench(context.file(stage.reward_bench), reading(context))
        names = stage.bench_models(recipe.stages[: recipe.stages.index(stage)])
        yield (
            "reward_bench",
            {
                name: reward_bench(items, reward_model_scorer(name, context, precision), stage.bootstrap, recipe.seed)
                for name in names
            },
        )
    if stage.tasks is not None:
        folder = context.stage_dir.path
        yield (
            "tasks",
            measure_tasks(stage.tasks, models, context.device, context.recipe.seed, folder, context.reporter),
        )


def _frontier(
    stage: EvalStage,
    asked: FrontierConfig,
    context: StageContext,
    inputs: EvaluationInputs,
    drawn: dict[str, dict[str, list[str]]],
    places: dict[str, Source],
) -> dict[str, Any]:
    measured = FrontierInputs(
        methods=drawn,
        places=places,
        against=stage.against,
        at=asked.at,
        prompts=inputs.prompts,
        judge=inputs.judge,
        sampling=stage.sampling,
        per_prompt=asked.per_prompt,
        seed=inputs.seed,
        bootstrap=stage.bootstrap,
        device=context.device,
        precision=inputs.precision,
        folder=context.stage_dir.path,
    )
    return measure_frontier(measured, context.reporter)


def _drawn(stage: EvalStage, context: StageContext) -> dict[str, dict[str, list[str]]]:
    """By method and by run of it the checkpoints of the frontier's curves, each of which begins at the baseline."""
    if stage.frontier is None:
        return {}
    methods = stage.frontier.runs(context.recipe.stages)
    return {method: {run: [stage.against, *names] for run, names in runs.items()} for method, runs in methods.items()}


def by_revision(name: str, judge: Judge, context: StageContext) -> dict[str, Any]:
    """The judge's flags by revision, over the whole chains of the critique stage ``name``. Its prompts are read again:
    what a grader needs of a prompt stands in no record."""
    reads = context.seen_by(name)
    made = reads.stage
    assert isinstance(made, CritiqueStage), "the recipe's reader saw to it"
    prompts = {prompt.id: prompt for prompt in training_prompts(made.prompts, reads)}
    lines = (context.parent(name).path / RECORDS).read_text(encoding="utf-8").split("\n")
    records = [record for record in map(json.loads, filter(None, lines)) if record["kept"]]
    chains = [
        Chain(
            prompts[record["prompt_id"]],
            (record["initial"]["text"], *(revision["revision"] for revision in record["revisions"])),
        )
        for record in records
    ]
    return dict(flags_by_revision(chains, judge))


def _gold_accuracy(stage: EvalStage, judge: Judge, context: StageContext, precision: Precision) -> dict[str, Any]:
    """The judge's comparison of the recipe's reward models, when there are several, on the pairs of prompts that all of
    them held out; by name, empty for one."""
    recipe = context.recipe
    before = recipe.stages[: recipe.stages.index(stage)]
    rewards = [s for s in before if isinstance(s, RewardStage)]
    if len(rewards) < 2:
        return {}
    trained: set[str] = set()
    heldout: list[Preference] = []
    for reward in rewards:
        kept, out = split_by_prompt(
            preferences(reward, context.seen_by(reward.name)).pairs, reward.heldout_fraction, recipe.seed
        )
        trained |= {messages_hash(pair.prompt.messages) for pair in kept}
        heldout += out
    unseen = [pair for pair in heldout if messages_hash(pair.prompt.messages) not in trained]
    scorers = {reward.name: reward_model_scorer(reward.name, context, precision) for reward in rewards}
    return gold_accuracy(unseen, judge, scorers, stage.bootstrap, recipe.seed)


def _proxy(stage: EvalStage, context: StageContext, precision: Precision) -> Scorer | None:
    """What stands for the reward that was trained on."""
    if stage.rewards:
        return mixed_scorer(stage.rewards, context, precision)
    name = stage.reward or default_reward(context)
    return reward_model_scorer(name, context, precision) if name else None


def _judge_name(ref: JudgeRef | None) -> str:
    if isinstance(ref, MixedRef):
        return " + ".join(f"{term.weight:g} × {source_name(term.source)}" for term in ref.rewards)
    return source_name(ref) if ref is not None else "the reward model"
