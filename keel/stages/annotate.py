"""Simulated annotators judge pairs of sampled responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keel.feedback.pairing import PairChoice, annotate_responses
from keel.feedback.uncertainty import disagreement
from keel.precision import pick_precision
from keel.recipe.annotate import AnnotateStage
from keel.recipe.reward import RewardStage
from keel.reward.ensemble import Candidate
from keel.reward.python_ref import load_python
from keel.run import write_json
from keel.stages.context import StageContext
from keel.stages.inputs import (
    store_url,
)
from keel.stages.scoring import reward_model_scorer
from keel.store import Response, Store


def run_annotate(stage: AnnotateStage, context: StageContext) -> dict[str, Any]:
    """Has simulated annotators judge pairs of sampled responses through the store's queue."""
    annotators = load_python(stage.annotators.ref)(context.recipe.seed)
    made_by = context.parent(stage.responses).summary()["fingerprint"]
    with Store(store_url(context)) as store:
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
    scorers = [reward_model_scorer(name, context, precision) for name in stage.rewards]
    prompts = {prompt.id: prompt for prompt in store.prompts()}

    def gains(pairs: Sequence[tuple[Response, Response]]) -> list[float]:
        candidates = [Candidate(prompts[a.prompt_id], a.completion(), b.completion()) for a, b in pairs]
        return disagreement(scorers, fitted, candidates)

    return PairChoice(stage.pairs_per_prompt, stage.pairs, gains, frozenset(asked))
