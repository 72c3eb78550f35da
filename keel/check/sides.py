"""What is learned from against what is measured: sides that have nothing, prompts and texts that are on both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from keel.check.files import HELDOUT, Rows, reading
from keel.check.finding import Finding, broken, stage_names
from keel.data.collate import messages_hash, split_by_prompt
from keel.data.sources import read_texts
from keel.recipe.declared import PEOPLE
from keel.recipe.recipe import Recipe
from keel.stages.inputs import training_side
from keel.types import Demonstration, LabelledCompletion, Message, Preference, StepLabels, UserError

Learned = Demonstration | Preference | LabelledCompletion | StepLabels


def side_findings(recipe: Recipe, rows: Rows) -> Iterator[Finding]:
    """Each stage holds prompts out, and must have some to learn from, as it will find itself."""
    data, made = recipe.data, {PEOPLE, *stage_names(recipe)}
    read: dict[str, Mapping[str, Sequence[Learned]]]
    read = {"demonstrations": rows.demonstrations, "preferences": rows.preferences, "thumbs": rows.thumbs}
    read["labels"] = rows.labels
    for stage in recipe.stages:
        share = stage.held_out(data)
        field = next((name for name in read if name in stage.files()), None)
        if share is None or field is None or made & set(stage.files()[field]):
            continue
        place = f"{stage.name}.{field}"
        own = read[field].get(place if stage.files()[field] else f"data.{field}", [])
        try:
            training = split_by_prompt(own, share, recipe.seed)[0] if own else []
        except UserError as error:
            yield broken(error, place)
            continue
        tied = [isinstance(row, Preference) and row.tie for row in training]
        if tied and all(tied):
            yield Finding("error", place, "every pair to train on is a tie", "add decided pairs")
    pool = rows.prompts.get("data.prompts", [])
    heldout = {messages_hash(prompt.messages) for prompt in rows.prompts.get(HELDOUT, [])}
    named = None if data.heldout_prompts is None else heldout
    asking = [s for s in recipe.stages if "prompts" in s.reads(data) and "prompts" not in s.files()]
    if pool and any(named is None or s.makes for s in asking):
        try:
            training_side(pool, named, data, recipe.seed)
        except UserError as error:
            yield broken(error, "data.prompts")


def leaks(rows: Rows) -> Iterator[Finding]:
    """Held-out prompts that training sees. The stages leave those among data.prompts out of sampling and training."""
    heldout, place = rows.prompts.get(HELDOUT, []), HELDOUT
    taught = [row for some in rows.demonstrations.values() for row in some]
    learned = {messages_hash(_shown(row.messages[:-1])) for row in taught if not row.plain}
    learned |= {messages_hash(prompt.messages) for prompt in rows.judged()}
    sampled = {messages_hash(prompt.messages) for prompt in rows.prompts.get("data.prompts", [])}
    hashes = [messages_hash(prompt.messages) for prompt in heldout]
    if both := sum(h in learned for h in hashes):
        sentence = f"{both} of {len(heldout)} are in the demonstrations or preferences too"
        yield Finding("error", place, sentence, "take them out of either: the evaluation would measure memorisation")
    if both := sum(h in sampled for h in hashes):
        sentence = f"{both} of {len(heldout)} are in data.prompts too and will be left out there"
        yield Finding("warning", place, sentence, "take them out of either to silence this warning")


def _shown(messages: Sequence[Message]) -> list[Message]:
    """Messages as a prompt has them: which of them are learned says nothing there."""
    return [replace(message, learned=True) for message in messages]


def text_findings(recipe: Recipe, found: list[Finding]) -> Iterator[Finding]:
    data = recipe.data
    named = {"data.base_text": data.base_text, "data.pretraining": data.pretraining}
    measured, mixed = (
        set(read_texts(source, reading(data, place, found))) if source else set() for place, source in named.items()
    )
    if both := len(measured & mixed):
        sentence = f"{both} of {len(measured)} texts are in data.pretraining too"
        yield Finding(
            "error", "data.base_text", sentence, "take them out of either: the loss on them would measure memorisation"
        )
