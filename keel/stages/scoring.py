"""What scores and judges for a stage, made from what its recipe names."""

from __future__ import annotations

from collections.abc import Sequence

from keel.model.checkpoint import load_scalar
from keel.precision import Precision
from keel.recipe.judges import (
    CheckRef,
    EndpointRef,
    JudgeRef,
    MixedRef,
    OutcomeRef,
    ProcessTerm,
    PythonRef,
    RewardModelRef,
    RewardTerm,
    judges_steps,
    right_above,
    source_name,
)
from keel.recipe.steps import PythonStepsRef, StepsRef, Thinking
from keel.recipe.verify import VerifyRef
from keel.reward.checks import CheckScorer, make_check
from keel.reward.judge import EndpointJudge, JudgeFromPython, JudgeFromScorer
from keel.reward.process import ProcessScorer, PythonSteps, frozen_process
from keel.reward.process_term import Decode, ProcessTermScorer
from keel.reward.scorer import MixedScorer, PythonScorer, RewardModelScorer, RewardPart, frozen_scorer
from keel.stages.context import StageContext
from keel.stages.process_card import card_of_steps
from keel.train.roles import Roles
from keel.types import Judge, Scorer, UserError


def reward_model_scorer(
    name: str,
    context: StageContext,
    precision: Precision,
    roles: Roles | None = None,
    thinking: Thinking | None = None,
) -> RewardModelScorer:
    """``roles``: what makes the models of the stage, where it trains some. ``thinking``: it is shown answers alone."""
    if roles:
        return frozen_scorer(roles.reward_model(context.model_path(name)), precision, thinking)
    model = load_scalar(context.source(name), device=context.device, products=precision)
    return frozen_scorer(model, precision, thinking)


def mixed_scorer(
    terms: Sequence[RewardTerm],
    context: StageContext,
    precision: Precision,
    roles: Roles | None = None,
    decode: Decode | None = None,
) -> Scorer:
    """``decode``: the tokens of the policy that is trained as text, where rewards fall on them."""
    parts = []
    for term in terms:
        if isinstance(term.source, ProcessTerm):
            scorer: Scorer = _process_scorer(term.source, context, precision, roles, decode)
        else:
            scorer = _outcome_scorer(term.source, context, precision, roles)
        right = isinstance(term.source, PythonRef | VerifyRef)
        name = source_name(term.source)
        parts.append(RewardPart(scorer, term.weight, name, right, right_above(term.source)))
    if len(parts) == 1 and parts[0].weight == 1.0:
        return parts[0].scorer
    return MixedScorer(parts)


def _outcome_scorer(source: OutcomeRef, context: StageContext, precision: Precision, roles: Roles | None) -> Scorer:
    """What scores whole replies."""
    if isinstance(source, PythonRef):
        return PythonScorer(context.python(source))
    if isinstance(source, CheckRef):
        return CheckScorer(make_check(source))
    return reward_model_scorer(source.model, context, precision, roles, source.thinking)


def _process_scorer(
    term: ProcessTerm, context: StageContext, precision: Precision, roles: Roles | None, decode: Decode | None
) -> ProcessTermScorer:
    outcome = None if term.outcome is None else _outcome_scorer(term.outcome, context, precision, roles)
    scores = step_scorer(term.scores, context, precision)
    steps = None
    if isinstance(scores, ProcessScorer):
        steps = scores.steps
        try:
            judges_steps(f"stage {context.stage_dir.name}", term, steps, scores.level == "outcome")
        except ValueError as error:
            raise UserError(str(error)) from error
    scorer = ProcessTermScorer(term, scores, steps, outcome, decode)
    if term.card is not None:
        card_of_steps(term.card, scores, scorer.steps, "last" if term.form == "progress" else "lowest", context)
    return scorer


def step_scorer(ref: StepsRef, context: StageContext, precision: Precision) -> ProcessScorer | PythonSteps:
    """What says how good each step of a reply is: a process reward model, or a Python function."""
    if isinstance(ref, PythonStepsRef):
        return PythonSteps(context.python(ref), ref.ref)
    model = load_scalar(context.source(ref.model), device=context.device, products=precision)
    return frozen_process(model, precision, context.reporter.note)


def default_reward(context: StageContext) -> str | None:
    """The first reward model that the stage uses."""
    return next((name for name in context.parents if "reward model" in context.recipe.stage(name).makes), None)


def make_judge(ref: JudgeRef | None, context: StageContext, precision: Precision) -> Judge:
    if isinstance(ref, PythonRef):
        return JudgeFromPython(context.python(ref))
    if isinstance(ref, EndpointRef):
        return EndpointJudge(ref, reporter=context.reporter, kept=context.stage_dir.path / "grades.jsonl")
    if isinstance(ref, CheckRef):
        return make_check(ref)
    if isinstance(ref, MixedRef):
        return JudgeFromScorer(mixed_scorer(ref.rewards, context, precision))
    name = ref.model if isinstance(ref, RewardModelRef) else default_reward(context)
    if name is None:
        raise UserError(
            f"stage {context.stage_dir.name}: no judge; set {context.stage_dir.name}.judge, or have a reward stage"
        )
    thinking = None if ref is None else ref.thinking
    return JudgeFromScorer(reward_model_scorer(name, context, precision, thinking=thinking))
