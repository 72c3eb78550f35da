"""What scores and judges for a stage, made from what its recipe names."""

from __future__ import annotations

from collections.abc import Sequence

from keel.model.checkpoint import load_scalar
from keel.precision import Precision
from keel.recipe.judges import EndpointRef, JudgeRef, MixedRef, PythonRef, RewardModelRef, RewardTerm
from keel.recipe.steps import PythonStepsRef, StepsRef
from keel.reward.judge import EndpointJudge, JudgeFromPython, JudgeFromScorer
from keel.reward.process import ProcessScorer, PythonSteps, frozen_process
from keel.reward.scorer import MixedScorer, PythonScorer, RewardModelScorer, RewardPart, frozen_scorer
from keel.stages.context import StageContext
from keel.train.roles import Roles
from keel.types import Judge, Scorer, UserError


def reward_model_scorer(
    name: str, context: StageContext, precision: Precision, roles: Roles | None = None
) -> RewardModelScorer:
    """``roles``: what makes the models of the stage, where it trains some."""
    if roles:
        return frozen_scorer(roles.reward_model(context.model_path(name)), precision)
    return frozen_scorer(load_scalar(context.source(name), device=context.device, products=precision), precision)


def mixed_scorer(
    terms: Sequence[RewardTerm], context: StageContext, precision: Precision, roles: Roles | None = None
) -> Scorer:
    parts = []
    for term in terms:
        if isinstance(term.source, PythonRef):
            scorer: Scorer = PythonScorer(context.python(term.source))
        else:
            scorer = reward_model_scorer(term.source.model, context, precision, roles)
        parts.append(RewardPart(scorer, term.weight, source_name(term.source)))
    if len(parts) == 1 and parts[0].weight == 1.0:
        return parts[0].scorer
    return MixedScorer(parts)


def step_scorer(ref: StepsRef, context: StageContext, precision: Precision) -> ProcessScorer | PythonSteps:
    """What says how good each step of a reply is: a process reward model, or a Python function."""
    if isinstance(ref, PythonStepsRef):
        return PythonSteps(context.python(ref), ref.ref)
    return frozen_process(load_scalar(context.source(ref.model), device=context.device, products=precision), precision)


def source_name(source: PythonRef | RewardModelRef | EndpointRef) -> str:
    return source.ref if isinstance(source, PythonRef) else source.model


def default_reward(context: StageContext) -> str | None:
    """The first reward model that the stage uses."""
    return next((name for name in context.parents if "reward model" in context.recipe.stage(name).makes), None)


def make_judge(ref: JudgeRef | None, context: StageContext, precision: Precision) -> Judge:
    if isinstance(ref, PythonRef):
        return JudgeFromPython(context.python(ref))
    if isinstance(ref, EndpointRef):
        return EndpointJudge(ref, reporter=context.reporter, kept=context.stage_dir.path / "grades.jsonl")
    if isinstance(ref, MixedRef):
        return JudgeFromScorer(mixed_scorer(ref.rewards, context, precision))
    name = ref.model if isinstance(ref, RewardModelRef) else default_reward(context)
    if name is None:
        raise UserError(
            f"stage {context.stage_dir.name}: no judge; set {context.stage_dir.name}.judge, or have a reward stage"
        )
    return JudgeFromScorer(reward_model_scorer(name, context, precision))
