"""Simulated annotators judge sampled responses: pairs of them, or each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keel.feedback.pairing import PairChoice, annotate_responses
from keel.feedback.simulated import SimulatedAnnotator
from keel.feedback.thumbs import annotate_thumbs
from keel.feedback.uncertainty import disagreement
from keel.precision import pick_precision
from keel.recipe.annotate import AnnotateStage
from keel.recipe.stage import PreferenceBase
from keel.reward.ensemble import Candidate
from keel.run import write_json
from keel.stages.context import StageContext
from keel.stages.scoring import reward_model_scorer
from keel.store import Response, Store


def run_annotate(stage: AnnotateStage, context: StageContext) -> dict[str, Any]:
    """Has simulated annotators judge sampled responses, in pairs or by themselves, through the store's queue."""
    annotators = context.python(stage.annotators)(context.recipe.seed)
    made_by = context.parent(stage.responses).summary()["fingerprint"]
    if stage.ask == "thumbs":
        return _thumbs(stage, context, annotators, made_by)
    with Store(context.store_url) as store:
        summary, truth = annotate_responses(
            store,
            annotators,
            made_by=made_by,
            batch=context.fingerprint,
            choice=_choice(stage, context, store),
            overlap=stage.overlap,
            guideline=stage.guideline,
            seed=context.recipe.seed,
            reporter=context.reporter,
        )
    write_json(context.stage_dir.path / "truth.json", truth)
    return summary


def _thumbs(
    stage: AnnotateStage, context: StageContext, annotators: Sequence[SimulatedAnnotator], made_by: str
) -> dict[str, Any]:
    with Store(context.store_url) as store:
        summary, truth = annotate_thumbs(
            store,
            annotators,
            made_by=made_by,
            batch=context.fingerprint,
            replies=stage.replies,
            liked=stage.liked,
            overlap=stage.overlap,
            guideline=stage.guideline,
            seed=context.recipe.seed,
            reporter=context.reporter,
        )
    write_json(context.stage_dir.path / "truth.json", truth)
    return summary


def _choice(stage: AnnotateStage, context: StageContext, store: Store) -> PairChoice:
    if stage.choice == "random":
        return PairChoice(stage.pairs_per_prompt, stage.pairs)
    batches = set()  # of the votes that its reward models have learned from
    for name in stage.rewards:
        reads = context.seen_by(name)
        reward = reads.stage
        if isinstance(reward, PreferenceBase):
            batches |= {reads.parent(source).fingerprint for source in reward.sources if source in reads.parents}
    asked = {frozenset((j.left.id, j.right.id)) for j in store.judgements() if j.batch in batches}
    fitted = [context.parent(name).summary().get("temperature") or 1.0 for name in stage.rewards]
    precision = pick_precision("auto", context.device)
    scorers = [reward_model_scorer(name, context, precision) for name in stage.rewards]
    prompts = {prompt.id: prompt for prompt in store.prompts()}

    def gains(pairs: Sequence[tuple[Response, Response]]) -> list[float]:
        candidates = [Candidate(prompts[a.prompt_id], a.completion(), b.completion()) for a, b in pairs]
        return disagreement(scorers, fitted, candidates)

    return PairChoice(stage.pairs_per_prompt, stage.pairs, gains, frozenset(asked))
