"""What stages that train a model are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keel.data.chat import Chat
from keel.data.sources import read_texts
from keel.model.checkpoint import load_tokenizer, positions
from keel.model.shared_base import SharedBase
from keel.precision import pick_precision
from keel.recipe.judges import ProcessTerm
from keel.recipe.offline import OfflineBase
from keel.recipe.online import OnlineBase
from keel.recipe.stage import PolicyBase, TrainBase
from keel.reward.judge import JudgeFromPython
from keel.reward.process_term import Decode
from keel.stages.context import StageContext
from keel.stages.inputs import (
    heldout_prompts,
    reading,
)
from keel.train.context import TrainContext
from keel.train.offline import Liked, measure_offline
from keel.types import Judge, Prompt, UserError


def require_chat_template(stage: TrainBase, prompts: Sequence[Prompt], context: StageContext) -> None:
    """A model without a chat template is asked the last message alone: training would leave out the others unseen."""
    source = context.source(stage.model)
    several = sum(len(prompt.messages) > 1 for prompt in prompts)
    if several and Chat(load_tokenizer(source)).plain:
        raise UserError(
            f"{stage.name}.model ({source.path}): it has no chat template, and of {several} of the "
            f"{len(prompts)} prompts, which have several messages, it would see the last one alone; start from an SFT "
            "stage, which gives it a template"
        )


def decoding(stage: OnlineBase, context: StageContext) -> Decode | None:
    """The policy's tokens as text, where rewards fall on the steps that it writes."""
    if not any(isinstance(term.source, ProcessTerm) for term in stage.rewards):
        return None
    return Chat(load_tokenizer(context.source(stage.model))).decode


def watching_judge(stage: OnlineBase, context: StageContext) -> Judge | None:
    return JudgeFromPython(context.python(stage.watch)) if stage.watch else None


def training_context(stage: TrainBase, context: StageContext) -> TrainContext:
    recipe = context.recipe
    mixed = recipe.data.pretraining if isinstance(stage, PolicyBase) and stage.ptx is not None else None
    source, lora = context.source(stage.model), recipe.model.lora
    precision = pick_precision(stage.precision, context.device)
    on_one_base = isinstance(stage, OnlineBase) and stage.one_base
    if lora and lora.dropout and not stage.adapter_dropout:
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
        shared=SharedBase(source, context.device, lora, precision) if on_one_base and lora else None,
    )


def prompts_to_measure(stage: OfflineBase, context: StageContext) -> list[Prompt]:
    """What the trained policy will be asked; none where that is not wanted. Read before training: a file that cannot be
    read is told before anything is paid."""
    return [] if stage.measure is None else heldout_prompts(None, context)


def measured(
    stage: OfflineBase, prompts: Sequence[Prompt], liked: Sequence[Liked], context: StageContext, training: TrainContext
) -> dict[str, Any]:
    """How far the stage's finished checkpoint went from the stage's reference, or from its start where its loss has
    none (`keel.train.offline.measure_offline`); nothing where that is not wanted."""
    if stage.measure is None:
        return {}
    _, held_to = stage.compares() or (stage.model, stage.model)
    policy = context.recipe.model.source(context.stage_dir.path)
    return measure_offline(stage.measure, policy, context.source(held_to), prompts, liked, training)
