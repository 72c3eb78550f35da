"""Critique and revision by the principles of a constitution."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keel.data.chat import Chat
from keel.model.checkpoint import frozen, load_policy
from keel.model.modules import context_length
from keel.precision import pick_precision
from keel.recipe.constitution import CONSTITUTION
from keel.recipe.critique import CritiqueStage
from keel.rollout.collect import stop_token_ids
from keel.rollout.critique import Chain, Critic, Fits, figures
from keel.rollout.episodes import encode_prompts
from keel.rollout.said import Journal
from keel.rollout.sampler import make_sampler
from keel.rollout.writer import EndpointWriter, SamplerWriter, Writer
from keel.run import atomic_write_text, write_json
from keel.stages.context import StageContext
from keel.stages.inputs import KEPT, PAIRS, training_prompts, write_demonstrations, write_pairs
from keel.types import Demonstration, Message, Preference, Prompt, Reporter, UserError

RECORDS = "records.jsonl"  # in the stage's folder: every chain, a line each, with all that was sent and got
SAID = "state/said.jsonl"  # what was said so far, until the stage is done


@dataclass(frozen=True)
class _Within:
    """A reporter for what works inside a task that was begun: it begins none of its own, and is one step of many."""

    reporter: Reporter

    def start(self, task: str, total: int) -> None:
        pass

    def advance(self, steps: int = 1, **figures: float) -> None:
        pass

    def note(self, text: str) -> None:
        self.reporter.note(text)


def run_critique(stage: CritiqueStage, context: StageContext) -> dict[str, Any]:
    """Has a model, or one behind an endpoint, answer prompts, criticise and revise; writes what it said, and
    demonstrations and pairs to learn from."""
    constitution, principles = context.constitution()
    writer, prompts, fits = _writer(stage, context)
    folder = context.stage_dir.path
    seed, journal = stage.seed_of(context.recipe.seed), Journal(folder / SAID)
    critic = Critic(writer, constitution, principles, stage, seed, journal, context.reporter, fits)
    chains = critic.chains(prompts)
    records = (json.dumps(chain.record(), ensure_ascii=False) for chain in chains)
    atomic_write_text(folder / RECORDS, "".join(f"{record}\n" for record in records))
    write_json(folder / CONSTITUTION, constitution.model_dump(mode="json"))
    found = figures(chains)
    shown = _demonstrations(chains, stage)
    if not shown:
        raise UserError(
            f"stage {stage.name}: no revision is left of {len(chains)} replies ({_counted(found['left_out'])}); look "
            f"at {folder / RECORDS}, raise sampling.max_new_tokens, or take another model"
        )
    write_demonstrations(folder / KEPT, shown)
    pairs, equal = _pairs(chains, stage, constitution.name)
    write_pairs(folder / PAIRS, pairs)
    if found["left_out"]:
        context.reporter.note(f"{_counted(found['left_out'])} of {len(chains)} chains ended early")
    return {
        **found,
        "revisions": stage.revisions,
        "constitution": {"name": constitution.name, "hash": constitution.hash},
        "demonstrations": len(shown),
        "pairs": len(pairs),
        "equal_pairs": equal,
    }


def _counted(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count} {why.replace('_', ' ')}" for why, count in left_out.items())


def _writer(stage: CritiqueStage, context: StageContext) -> tuple[Writer, list[Prompt], Fits | None]:
    """What writes, the prompts that it can be asked, and which conversations fit it."""
    rows, within = training_prompts(stage.prompts, context), _Within(context.reporter)
    prompts = list(
        {prompt.id: prompt for prompt in rows}.values()
    )  # records and what is learned from name a prompt once
    if len(prompts) < len(rows):
        context.reporter.note(f"left out {len(rows) - len(prompts)} prompts that stand there already")
    if stage.model is None:
        assert stage.writer is not None, "one of the two"
        return EndpointWriter(stage.writer, f"{stage.name}.writer.url", within), prompts, None
    source = context.source(stage.model)
    precision = pick_precision("auto", context.device)
    model, tokenizer = load_policy(source, device=context.device, products=precision)
    frozen(model)
    chat = Chat(tokenizer)
    if chat.plain:
        raise UserError(
            f"{stage.name}.model ({source.path}): it has no chat template, and would see the last request alone; start "
            "from an SFT stage, which gives it a template"
        )
    prompts, _ = encode_prompts(chat, prompts, context.recipe.data, context.reporter)
    sampler = make_sampler(model, stage.sampling.backend, stop_token_ids(chat, stage.sampling), precision)
    limit = context_length(model)

    def fits(asked: Sequence[Prompt]) -> list[bool]:
        if limit is None:
            return [True] * len(asked)
        encoded = chat.encode_prompts([one.messages for one in asked], [one.place or one.id for one in asked])
        return [len(ids) < limit for ids in encoded]

    return SamplerWriter(sampler, chat, within), prompts, fits


def _demonstrations(chains: list[Chain], stage: CritiqueStage) -> list[Demonstration]:
    return [
        Demonstration(_name(stage, chain, number), (*chain.prompt.messages, Message("assistant", text)))
        for chain in chains
        for number, text in chain.given(stage.give)
    ]


def _pairs(chains: list[Chain], stage: CritiqueStage, constitution: str) -> tuple[list[Preference], int]:
    """Of each chain the last revision that is given, over the reply that it began with; and how many were equal to
    it. Nobody judged them: the annotator is the constitution."""
    pairs, equal = [], 0
    for chain in chains:
        for number, text in chain.given(stage.give)[-1:]:
            if text == chain.initial.text:
                equal += 1
                continue
            name, by = _name(stage, chain, number), f"constitution:{constitution}"
            pairs.append(Preference(name, chain.prompt, text, chain.initial.text, annotator=by))
    return pairs, equal


def _name(stage: CritiqueStage, chain: Chain, number: int) -> str:
    """What a training stage's record of what it learned from calls a revision."""
    return f"{stage.name}:{chain.prompt.id}:{chain.number}:{number}"
