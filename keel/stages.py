"""One function per stage kind: it opens the stage's inputs, calls the room that does the work, and returns the summary
that the run keeps. This is where recipes' names become paths, records, models and judges."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from keel.config import (
    AnnotateStage,
    DpoStage,
    EndpointRef,
    EvalStage,
    GrpoStage,
    JudgeRef,
    MixedRef,
    OnlineBase,
    PolicyBase,
    PpoStage,
    PythonRef,
    ReportStage,
    RewardModelRef,
    RewardStage,
    RewardTerm,
    SampleStage,
    SftStage,
    TrainBase,
)
from keel.data.chat import Chat
from keel.data.collate import messages_hash, split_by_prompt
from keel.data.sources import read_facts, read_texts
from keel.eval.capability import encode_facts
from keel.eval.evaluation import EvaluationInputs, OnlineRun, evaluate_models
from keel.eval.reward_quality import gold_accuracy, reward_quality
from keel.feedback.aggregate import aggregate
from keel.feedback.pairing import PairChoice, annotate_responses
from keel.feedback.uncertainty import disagreement
from keel.inputs import (
    KEPT,
    demonstrations,
    heldout_prompts,
    preferences,
    reading,
    store_url,
    training_prompts,
    write_kept,
)
from keel.model.checkpoint import frozen, load_policy, load_scalar, load_tokenizer, positions
from keel.model.precision import Precision, pick_precision
from keel.model.trunk import Trunk
from keel.report import build_report
from keel.reward.ensemble import Candidate
from keel.reward.judge import EndpointJudge, JudgeFromPython, JudgeFromScorer
from keel.reward.python_ref import load_python
from keel.reward.scorer import MixedScorer, PythonScorer, RewardModelScorer, RewardPart, frozen_scorer
from keel.rollout.collect import sample_replies, stop_token_ids
from keel.rollout.episodes import encode_prompts
from keel.rollout.sampler import make_sampler
from keel.run import StageContext, write_json
from keel.store import Response, Store
from keel.train.context import TrainContext
from keel.train.dpo import train_dpo
from keel.train.grpo import train_grpo
from keel.train.ppo import train_ppo
from keel.train.reward import train_reward
from keel.train.sft import train_sft
from keel.types import Judge, Preference, Prompt, Scorer, UserError

# ------------------------------------------------------------------------------------------------------- training


def run_sft(stage: SftStage, context: StageContext) -> dict[str, Any]:
    learned, counts = demonstrations(stage, context)
    return train_sft(stage, learned, _training(stage, context)) | counts


def run_reward(stage: RewardStage, context: StageContext) -> dict[str, Any]:
    learned = preferences(stage, context)
    _sees_whole(stage, [pair.prompt for pair in learned.pairs], context)
    how = partial(aggregate, how=stage.votes)
    summary, heldout = train_reward(stage, learned.pairs, _training(stage, context), how)
    return summary | learned.counts | reward_quality(heldout, learned.truth, learned.agreement, context.recipe.seed)


def run_dpo(stage: DpoStage, context: StageContext) -> dict[str, Any]:
    learned = preferences(stage, context)
    _sees_whole(stage, [pair.prompt for pair in learned.pairs], context)
    reference = context.model_path(stage.reference or stage.model)
    how = partial(aggregate, how=stage.votes)
    return train_dpo(stage, learned.pairs, reference, _training(stage, context), how) | learned.counts


def run_ppo(stage: PpoStage, context: StageContext) -> dict[str, Any]:
    training = _training(stage, context)
    models = [term.source.model for term in stage.rewards if isinstance(term.source, RewardModelRef)]
    critic = stage.critic or (models[0] if models else None)
    scorer = _mixed(stage.rewards, context, training.precision, training.trunk)
    reference = context.model_path(stage.reference or stage.model)
    prompts = training_prompts(stage.prompts, context)
    _sees_whole(stage, prompts, context)
    critic_path = context.model_path(critic) if critic else None
    return train_ppo(stage, prompts, scorer, reference, critic_path, training, _watch(stage))


def run_grpo(stage: GrpoStage, context: StageContext) -> dict[str, Any]:
    training = _training(stage, context)
    scorer = _mixed(stage.rewards, context, training.precision, training.trunk)
    named = stage.reference or (stage.model if stage.beta > 0 else None)
    reference = context.model_path(named) if named else None
    prompts = training_prompts(stage.prompts, context)
    _sees_whole(stage, prompts, context)
    return train_grpo(stage, prompts, scorer, reference, training, _watch(stage))


def _sees_whole(stage: TrainBase, prompts: Sequence[Prompt], context: StageContext) -> None:
    """A model without a chat template is asked the last message alone: training would leave out the others unseen."""
    source = context.source(stage.model)
    several = sum(len(prompt.messages) > 1 for prompt in prompts)
    if several and Chat(load_tokenizer(source)).plain:
        raise UserError(
            f"{stage.name}.model ({source.path}): it has no chat template, and of {several} of the "
            f"{len(prompts)} prompts, which have several messages, it would see the last one alone; start from an SFT "
            "stage, which gives it a template"
        )


def _watch(stage: OnlineBase) -> Judge | None:
    return JudgeFromPython(load_python(stage.watch.ref)) if stage.watch else None


def _training(stage: TrainBase, context: StageContext) -> TrainContext:
    recipe = context.recipe
    mixed = recipe.data.pretraining if isinstance(stage, PolicyBase) and stage.ptx is not None else None
    source, lora = context.source(stage.model), recipe.model.lora
    precision = pick_precision(stage.precision, context.device)
    on_one_base = isinstance(stage, OnlineBase) and stage.one_base
    if lora and lora.dropout and not isinstance(stage, SftStage | RewardStage):
        context.reporter.note(f"{stage.name}: model.lora.dropout is 0 here, where log-probabilities are compared")
    return TrainContext(
        stage=context.stage_dir,
        reporter=context.reporter,
        model_path=Path(source.path),
        base_model=recipe.model,
        data=recipe.data,
        device=context.device,
        precision=precision,
        seed=recipe.seed,
        positions=positions(source),
        texts=read_texts(mixed, reading(context)) if mixed is not None else (),
        trunk=Trunk(source, context.device, lora, precision) if on_one_base and lora else None,
    )


# ----------------------------------------------------------------------------------------------- sampling and labels


def run_sample(stage: SampleStage, context: StageContext) -> dict[str, Any]:
    """Samples responses into the store, under this stage's fingerprint, and into a file that SFT can learn from."""
    recipe = context.recipe
    source = context.source(stage.model)
    precision = pick_precision("auto", context.device)
    model, tokenizer = load_policy(source, device=context.device, products=precision)
    frozen(model)
    chat = Chat(tokenizer)
    sampler = make_sampler(model, stage.sampling.backend, stop_token_ids(chat, stage.sampling), precision)
    prompts, _ = encode_prompts(chat, training_prompts(stage.prompts, context), recipe.data, context.reporter)
    replies = sample_replies(
        sampler,
        chat,
        prompts,
        stage.sampling,
        stage.per_prompt,
        recipe.seed,
        context.reporter,
        candidates=stage.candidates,
        max_similarity=stage.max_similarity,
        scorer=_mixed(stage.rewards, context, precision) if stage.rewards else None,
        min_score=-math.inf if stage.min_reward is None else stage.min_reward,
    )
    everything = [reply for group in replies for reply in group]
    if not everything:
        raise UserError(
            f"stage {stage.name}: no response is left; every one was cut at sampling.max_new_tokens = "
            f"{stage.sampling.max_new_tokens} or scored below min_reward; change one of the two"
        )
    fingerprint = _fingerprint(context)
    with Store(store_url(context)) as store, store.session() as session:
        session.add_prompts(prompts)
        for prompt, group in zip(prompts, replies, strict=True):
            session.add_responses(prompt.id, group, source.path, stage.sampling, fingerprint)
    write_kept(context.stage_dir.path / KEPT, prompts, replies)
    rewards = [reply.reward for reply in everything if reply.reward is not None]
    return {
        "prompts": len(prompts),
        "responses": len(everything),
        "fingerprint": fingerprint,
        "distinct_pairs": sum(len(group) >= 2 for group in replies),
        "mean_length": sum(len(reply.ids) for reply in everything) / len(everything),
        "finished_rate": sum(reply.finished for reply in everything) / len(everything),
        **({"reward": sum(rewards) / len(rewards), "prompts_without": replies.count([])} if rewards else {}),
    }


def run_annotate(stage: AnnotateStage, context: StageContext) -> dict[str, Any]:
    """Has simulated annotators judge pairs of sampled responses through the store's queue; exports the votes."""
    annotators = load_python(stage.annotators.ref)(context.recipe.seed)
    made_by = context.parent(stage.responses).summary()["fingerprint"]
    with Store(store_url(context)) as store:
        summary, truth = annotate_responses(
            store,
            annotators,
            made_by=made_by,
            batch=_fingerprint(context),
            choice=_choice(stage, context, store),
            overlap=stage.overlap,
            guideline=stage.guideline,
            seed=context.recipe.seed,
            reporter=context.reporter,
        )
        store.export_preferences(context.stage_dir.path / "preferences.jsonl", batch=_fingerprint(context))
    write_json(context.stage_dir.path / "truth.json", truth)
    return summary


def _choice(stage: AnnotateStage, context: StageContext, store: Store) -> PairChoice:
    if stage.choice == "random":
        return PairChoice(stage.pairs_per_prompt, stage.pairs)
    recipe = context.recipe
    rewards = [recipe.stage(name) for name in stage.rewards]
    annotated = {source for reward in rewards if isinstance(reward, RewardStage) for source in reward.sources}
    batches = {context.parent(s.name).fingerprint for s in recipe.stages if s.name in annotated}
    asked = {frozenset((j.left.id, j.right.id)) for j in store.judgements() if j.batch in batches}
    fitted = [context.parent(name).summary().get("temperature") or 1.0 for name in stage.rewards]
    precision = pick_precision("auto", context.device)
    scorers = [_reward_model(name, context, precision) for name in stage.rewards]
    prompts = {prompt.id: prompt for prompt in store.prompts()}

    def gains(pairs: Sequence[tuple[Response, Response]]) -> list[float]:
        candidates = [Candidate(prompts[a.prompt_id], a.completion(), b.completion()) for a, b in pairs]
        return disagreement(scorers, fitted, candidates)

    return PairChoice(stage.pairs_per_prompt, stage.pairs, gains, frozenset(asked))


# ----------------------------------------------------------------------------------------------- evaluation and report


def run_eval(stage: EvalStage, context: StageContext) -> dict[str, Any]:
    """Evaluates the models and writes the run's ``summary.json``."""
    recipe = context.recipe
    precision = pick_precision("auto", context.device)
    models = {name: context.source(name) for name in dict.fromkeys([*stage.models, stage.baseline])}
    prompts = heldout_prompts(stage.prompts, context)
    facts = read_facts(recipe.data.facts, reading(context)) if recipe.data.facts else []
    for source in models.values():  # each may have a tokenizer of its own, and all are asked the same
        tokenizer = load_tokenizer(source)
        prompts, _ = encode_prompts(Chat(tokenizer), prompts, recipe.data, context.reporter)
        if recipe.data.facts:
            encode_facts(tokenizer, facts, positions(source))  # what is wrong with them is said before anything is paid
    inputs = EvaluationInputs(
        models=models,
        baseline=stage.baseline,
        prompts=prompts,
        texts=read_texts(recipe.data.base_text, reading(context)) if recipe.data.base_text else [],
        facts=facts,
        judge=_judge(stage.judge, context, precision),
        scorer=_proxy(stage, context, precision),
        sampling=stage.sampling,
        seed=recipe.seed,
        bootstrap=stage.bootstrap,
        show=stage.show,
        device=context.device,
        precision=precision,
        online_runs={
            s.name: OnlineRun(s.kind, _kl_weight(s), context.run.stage(s.name).metrics.rows())
            for s in recipe.stages
            if isinstance(s, PpoStage | GrpoStage) and s.name in stage.models
        },
    )
    summary = evaluate_models(inputs, context.reporter)
    summary["judge"] = _judge_name(stage.judge)
    reward = next((s for s in recipe.stages if isinstance(s, RewardStage)), None)
    if reward is not None and context.run.stage(reward.name).done:
        summary["reward_model"] = context.run.stage(reward.name).summary()
    if isinstance(stage.judge, PythonRef):
        summary["reward_models"] = _gold_accuracy(stage, inputs.judge, context, precision)
    context.run.write_summary(summary)
    return {name: summary[name] for name in ("stages", "order", "baseline", "judge", "alarms")}


def _kl_weight(stage: PpoStage | GrpoStage) -> float:
    return stage.kl.coef if isinstance(stage, PpoStage) else stage.beta


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
        kept, out = split_by_prompt(preferences(reward, context).pairs, reward.heldout_fraction, recipe.seed)
        trained |= {messages_hash(pair.prompt.messages) for pair in kept}
        heldout += out
    pairs = [pair for pair in heldout if messages_hash(pair.prompt.messages) not in trained]
    scorers = {reward.name: _reward_model(reward.name, context, precision) for reward in rewards}
    return gold_accuracy(pairs, judge, scorers, stage.bootstrap, recipe.seed)


def run_report(stage: ReportStage, context: StageContext) -> dict[str, Any]:
    build_report(context.run.path, context.run.report, stage.title)
    return {"report": context.run.report.name}


RUNNERS: Mapping[str, Callable[[Any, StageContext], dict[str, Any]]] = {
    "sft": run_sft,
    "sample": run_sample,
    "annotate": run_annotate,
    "reward": run_reward,
    "dpo": run_dpo,
    "ppo": run_ppo,
    "grpo": run_grpo,
    "eval": run_eval,
    "report": run_report,
}


def _fingerprint(context: StageContext) -> str:
    fingerprint = context.stage_dir.fingerprint
    assert fingerprint is not None, "a stage runs in a folder that was begun"
    return fingerprint


# ------------------------------------------------------------------------------------------------ scorers and judges


def _reward_model(
    name: str, context: StageContext, precision: Precision, trunk: Trunk | None = None
) -> RewardModelScorer:
    source = context.source(name)
    if trunk:
        return frozen_scorer(trunk.reward_model(Path(source.path)), precision)
    return frozen_scorer(load_scalar(source, device=context.device, products=precision), precision)


def _mixed(
    terms: Sequence[RewardTerm], context: StageContext, precision: Precision, trunk: Trunk | None = None
) -> Scorer:
    parts = []
    for term in terms:
        if isinstance(term.source, PythonRef):
            scorer: Scorer = PythonScorer(load_python(term.source.ref))
        else:
            scorer = _reward_model(term.source.model, context, precision, trunk)
        parts.append(RewardPart(scorer, term.weight, _source_name(term.source)))
    if len(parts) == 1 and parts[0].weight == 1.0:
        return parts[0].scorer
    return MixedScorer(parts)


def _source_name(source: PythonRef | RewardModelRef | EndpointRef) -> str:
    return source.ref if isinstance(source, PythonRef) else source.model


def _default_reward(context: StageContext) -> str | None:
    return next((stage.name for stage in context.recipe.stages if isinstance(stage, RewardStage)), None)


def _proxy(stage: EvalStage, context: StageContext, precision: Precision) -> Scorer | None:
    """What stands for the reward that was trained on."""
    if stage.rewards:
        return _mixed(stage.rewards, context, precision)
    name = stage.reward or _default_reward(context)
    return _reward_model(name, context, precision) if name else None


def _judge(ref: JudgeRef | None, context: StageContext, precision: Precision) -> Judge:
    if isinstance(ref, PythonRef):
        return JudgeFromPython(load_python(ref.ref))
    if isinstance(ref, EndpointRef):
        return EndpointJudge(ref, reporter=context.reporter, kept=context.stage_dir.path / "grades.jsonl")
    if isinstance(ref, MixedRef):
        return JudgeFromScorer(_mixed(ref.rewards, context, precision))
    name = ref.model if isinstance(ref, RewardModelRef) else _default_reward(context)
    if name is None:
        raise UserError(
            f"stage {context.stage_dir.name}: no judge; set {context.stage_dir.name}.judge, or have a reward stage"
        )
    return JudgeFromScorer(_reward_model(name, context, precision))


def _judge_name(ref: JudgeRef | None) -> str:
    if isinstance(ref, MixedRef):
        return " + ".join(f"{term.weight:g} × {_source_name(term.source)}" for term in ref.rewards)
    return _source_name(ref) if ref is not None else "the reward model"
