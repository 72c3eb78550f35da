"""Simulated annotators or a model judge sampled responses: pairs of them, or each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keel.data.chat import Chat
from keel.feedback.compare import EndpointComparer, ScorerComparer
from keel.feedback.judging import judge_responses
from keel.feedback.model_comparer import LanguageModelComparer
from keel.feedback.opinion import Comparer
from keel.feedback.pairing import Overlap, PairChoice, annotate_responses
from keel.feedback.principled import EndpointFeedback, Feedback, ModelFeedback, PrincipledComparer, PythonFeedback
from keel.feedback.simulated import SimulatedAnnotator, Task
from keel.feedback.thumbs import ThumbChoice, annotate_thumbs
from keel.feedback.uncertainty import disagreement
from keel.model.checkpoint import frozen, load_policy
from keel.precision import pick_precision
from keel.recipe.annotate import AnnotateStage
from keel.recipe.judges import ComparerRef, EndpointRef, LanguageModelRef, MixedRef, PythonFeedbackRef, PythonRef
from keel.recipe.sections import SamplingConfig
from keel.recipe.stage import PreferenceBase
from keel.reward.ensemble import Candidate
from keel.reward.scorer import PythonScorer
from keel.rollout.collect import stop_token_ids
from keel.rollout.sampler import make_sampler
from keel.rollout.writer import SamplerWriter, Writer
from keel.run import write_json
from keel.stages.context import StageContext
from keel.stages.judge_card import card_of_annotator
from keel.stages.scoring import mixed_scorer, reward_model_scorer
from keel.store import Response, Store
from keel.store.records import OWN_QUEUE

ANSWERS = "state/answers.jsonl"  # in the stage's folder, until it is done: what an endpoint answered


def run_annotate(stage: AnnotateStage, context: StageContext) -> dict[str, Any]:
    """Has simulated annotators or a model judge sampled responses, in pairs or by themselves, through the queue."""
    made_by = context.parent(stage.responses).summary()["fingerprint"]
    annotators = None if stage.annotators is None else context.python(stage.annotators)(context.recipe.seed)
    if stage.ask == "thumbs":
        assert annotators is not None, "a judge compares pairs"
        return _thumbs(stage, context, annotators, made_by)
    truth: dict[str, float] = {}  # nobody knows it of a model
    with Store(context.store_url) as store:
        choice = _choice(stage, context, store)
        if annotators is not None:
            summary, truth = annotate_responses(
                store,
                annotators,
                Task(made_by, context.fingerprint, stage.guideline, context.recipe.seed),
                choice,
                Overlap(stage.overlap, stage.overlap_times),
                context.reporter,
            )
        else:
            assert stage.judge is not None, "one of the two judges"
            comparer = _comparer(stage.judge, stage, context)
            card = {} if stage.card is None else {"card": card_of_annotator(stage, context, store, comparer)}
            summary = judge_responses(
                store,
                comparer,
                _name(stage.judge),
                made_by=made_by,
                batch=OWN_QUEUE + context.fingerprint,
                choice=choice,
                guideline=stage.guideline,
                seed=context.recipe.seed,
                reporter=context.reporter,
                folder=context.stage_dir.path,
                hard=stage.labels == "hard",
            )
            summary |= card
    write_json(context.stage_dir.path / "truth.json", truth)
    return summary


def _thumbs(
    stage: AnnotateStage, context: StageContext, annotators: Sequence[SimulatedAnnotator], made_by: str
) -> dict[str, Any]:
    with Store(context.store_url) as store:
        summary, truth = annotate_thumbs(
            store,
            annotators,
            Task(made_by, context.fingerprint, stage.guideline, context.recipe.seed),
            ThumbChoice(stage.replies, stage.liked, stage.overlap),
            context.reporter,
        )
    write_json(context.stage_dir.path / "truth.json", truth)
    return summary


def _name(judge: ComparerRef) -> str:
    """What the store calls it."""
    if isinstance(judge, MixedRef):
        return "sum of rewards"
    words = {"python": "function", "python_feedback": "function", "model": "reward model", "language_model": "model"}
    named = judge.ref if isinstance(judge, PythonRef | PythonFeedbackRef) else judge.model
    return f"{words.get(judge.kind, judge.kind)} {named}"


def _principled(judge: ComparerRef, stage: AnnotateStage, context: StageContext) -> Comparer:
    """A comparer that judges by the stage's constitution."""
    constitution, principles = context.constitution()
    seed = context.recipe.seed
    feedback: Feedback
    if isinstance(judge, PythonFeedbackRef):
        feedback = PythonFeedback(context.python(PythonRef(ref=judge.ref)), judge.ref)
    elif isinstance(judge, EndpointRef):
        place = f"{stage.name}.judge.url"
        kept = context.stage_dir.path / ANSWERS
        feedback = EndpointFeedback(judge, place, context.reporter, stage.thought, stage.votes_asked, kept=kept)
    else:
        assert isinstance(judge, LanguageModelRef), "the recipe allows no other"
        comparer = _language_model(judge, context)
        writer = None if stage.thought is None else _writer(comparer, stage.thought, context)
        feedback = ModelFeedback(comparer, writer, stage.thought, seed)
    return PrincipledComparer(feedback, constitution, principles, stage.principles_per_pair, stage.bounds, seed)


def _language_model(judge: LanguageModelRef, context: StageContext) -> LanguageModelComparer:
    precision = pick_precision("auto", context.device)
    model, tokenizer = load_policy(context.source(judge.model), device=context.device, products=precision)
    frozen(model)
    return LanguageModelComparer(model, Chat(tokenizer), context.device, precision, judge.instructions)


def _writer(comparer: LanguageModelComparer, sampling: SamplingConfig, context: StageContext) -> Writer:
    stops = stop_token_ids(comparer.chat, sampling)
    sampler = make_sampler(comparer.model, sampling.backend, stops, comparer.precision)
    return SamplerWriter(sampler, comparer.chat, context.reporter)


def _comparer(judge: ComparerRef, stage: AnnotateStage, context: StageContext) -> Comparer:
    if stage.constitution is not None:
        return _principled(judge, stage, context)
    if isinstance(judge, EndpointRef):
        kept = context.stage_dir.path / ANSWERS
        return EndpointComparer(judge, f"{stage.name}.judge.url", context.reporter, kept=kept)
    if isinstance(judge, LanguageModelRef):
        return _language_model(judge, context)
    assert not isinstance(judge, PythonFeedbackRef), "it is asked under a principle"
    precision = pick_precision("auto", context.device)
    if isinstance(judge, PythonRef):
        return ScorerComparer(PythonScorer(context.python(judge)), stage.judge_temperature or 1.0)
    if isinstance(judge, MixedRef):
        return ScorerComparer(mixed_scorer(judge.rewards, context, precision), stage.judge_temperature or 1.0)
    scorer = reward_model_scorer(judge.model, context, precision, thinking=judge.thinking)
    return ScorerComparer(scorer, stage.judge_temperature or _fitted(judge.model, context) / scorer.reward_model.std)


def _fitted(name: str, context: StageContext) -> float:
    """The temperature of a reward model's raw scores that fits its held-out votes; 1 where it is not known."""
    known = context.parent(name).summary().get("temperature") if name in context.parents else None
    return known or 1.0


def _choice(stage: AnnotateStage, context: StageContext, store: Store) -> PairChoice:
    if stage.choice == "random":
        return PairChoice(stage.pairs_per_prompt, stage.pairs)
    batches = set()  # of the votes that its reward models have learned from
    for name in stage.rewards:
        reads = context.seen_by(name)
        reward = reads.stage
        if isinstance(reward, PreferenceBase):
            made = {reads.parent(source).fingerprint for source in reward.sources if source in reads.parents}
            batches |= made | {f"{OWN_QUEUE}{fingerprint}" for fingerprint in made}
    asked = {frozenset((j.left.id, j.right.id)) for j in store.judgements() if j.batch in batches}
    fitted = [_fitted(name, context) for name in stage.rewards]
    precision = pick_precision("auto", context.device)
    scorers = [reward_model_scorer(name, context, precision) for name in stage.rewards]
    prompts = {prompt.id: prompt for prompt in store.prompts()}

    def gains(pairs: Sequence[tuple[Response, Response]]) -> list[float]:
        candidates = [Candidate(prompts[a.prompt_id], a.completion(), b.completion()) for a, b in pairs]
        return disagreement(scorers, fitted, candidates)

    return PairChoice(stage.pairs_per_prompt, stage.pairs, gains, frozenset(asked))
