"""What a recipe's stages read, by the names that the recipe calls it: prompts and preferences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from keel.config import PEOPLE, AnnotateStage, PreferenceBase
from keel.data.collate import messages_hash, prompt_messages, split_by_prompt
from keel.data.sources import read_demonstrations, read_preferences, read_prompts
from keel.feedback.stored import training_votes
from keel.run import StageContext, read_json
from keel.types import Preference, Prompt, UserError


def store_url(context: StageContext) -> str:
    return context.recipe.store or context.run.store_url


# ----------------------------------------------------------------------------------------------------- preferences


@dataclass(frozen=True)
class Preferences:
    """``pairs``: raw votes. ``truth``: by vote id, the probability that the population prefers what was chosen, where
    annotators are simulated. ``agreement``: between them. ``counts``: how many votes of the store are whose."""

    pairs: list[Preference]
    truth: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None
    counts: dict[str, int] = field(default_factory=dict)


def preferences(stage: PreferenceBase, context: StageContext) -> Preferences:
    """What ``stage`` learns from: the files and annotate stages that it names, else ``data.preferences``; beside the
    votes of annotate stages those that people gave in the store (``voters``)."""
    recipe = context.recipe
    sources = stage.sources or tuple(filter(None, [recipe.data.preferences]))
    if not sources:
        raise UserError(f"stage {stage.name}: no preferences; set data.preferences=FILE or name a stage")
    annotated = {other.name for other in recipe.stages if isinstance(other, AnnotateStage)}
    pairs = [pair for name in sources if name not in {*annotated, PEOPLE} for pair in read_preferences(name)]
    if not reads_store(stage, annotated):
        return Preferences(pairs)
    truth: dict[str, float] = {}
    summaries: list[dict[str, Any]] = []
    batches = []
    for name in sources:
        if name in annotated:
            parent = context.parent(name)
            assert parent.fingerprint is not None, "the pipeline runs a stage after its parents"
            batches.append(parent.fingerprint)
            truth |= read_json(parent.path / "truth.json")
            summaries.append(parent.summary())
    voters = "all" if PEOPLE in sources else stage.voters
    stored = training_votes(context.run.stage(stage.name).path, store_url(context), batches, voters)
    people = _without_heldout(stored["people"], context)
    if not pairs and not people and not stored["simulated"]:
        raise UserError(f"stage {stage.name}: nobody has judged anything in the store yet; keel label serves it")
    agreement = summaries[0].get("annotator_agreement") if summaries else None
    counts = {"simulated_votes": len(stored["simulated"]), "people_votes": len(people)}
    return Preferences([*pairs, *stored["simulated"], *people], truth, agreement, counts)


def reads_store(stage: PreferenceBase, annotated: set[str]) -> bool:
    """Whether what the stage learns from lies in the store; ``annotated``: the annotate stages' names."""
    return bool(set(stage.sources) & {*annotated, PEOPLE})


def _without_heldout(votes: list[Preference], context: StageContext) -> list[Preference]:
    """People may have judged any prompt; the evaluation's must stay unseen."""
    source = context.recipe.data.heldout_prompts
    if source is None or not votes:
        return votes
    heldout = _hashes(source)
    kept = [vote for vote in votes if messages_hash(vote.prompt.messages) not in heldout]
    if len(kept) < len(votes):
        context.reporter.note(f"left out {len(votes) - len(kept)} votes on prompts held out for the evaluation")
    return kept


# --------------------------------------------------------------------------------------------------------- prompts


def _hashes(source: str) -> set[str]:
    return {messages_hash(prompt.messages) for prompt in read_prompts(source)}


def _pool(context: StageContext) -> list[Prompt]:
    """Prompts where the recipe names none of their own: those of the demonstrations, else those of the pairs."""
    data = context.recipe.data
    if data.prompts is not None:
        return read_prompts(data.prompts)
    if data.demonstrations is not None:
        found = [Prompt(d.id, prompt_messages(d)) for d in read_demonstrations(data.demonstrations) if not d.plain]
    elif data.preferences is not None:
        found = [preference.prompt for preference in read_preferences(data.preferences)]
    else:
        raise UserError(f"stage {context.stage_dir.name}: no prompts; set data.prompts=FILE")
    return list({messages_hash(p.messages): p for p in found}.values())


def training_prompts(source: str | None, context: StageContext) -> list[Prompt]:
    """Prompts for sampling, PPO and GRPO, without those that the evaluation holds out."""
    if source is not None:
        return read_prompts(source)
    data = context.recipe.data
    found = _pool(context)
    if data.heldout_prompts is None:
        return split_by_prompt(found, data.heldout_fraction, context.recipe.seed)[0]
    heldout = _hashes(data.heldout_prompts)
    kept = [prompt for prompt in found if messages_hash(prompt.messages) not in heldout]
    if len(kept) < len(found):
        context.reporter.note(f"left out {len(found) - len(kept)} prompts that are held out for the evaluation")
    if not kept:
        raise UserError("every prompt of data.prompts is in data.heldout_prompts too; give others to train on")
    return kept


def heldout_prompts(source: str | None, context: StageContext) -> list[Prompt]:
    data = context.recipe.data
    if source or data.heldout_prompts:
        return read_prompts(source or data.heldout_prompts or "")
    return split_by_prompt(_pool(context), data.heldout_fraction, context.recipe.seed)[1]
