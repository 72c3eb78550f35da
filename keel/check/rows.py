"""The rows of one file: few, too long, contradicting one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from keel.check.finding import Finding
from keel.data.chat import Chat
from keel.data.collate import messages_hash
from keel.data.steps import cut_otherwise, encode_steps
from keel.recipe.recipe import Recipe, Stage
from keel.recipe.steps import StepsRead
from keel.recipe.verify import VerifyRef
from keel.reward.checks import has_answer
from keel.reward.process import outcome
from keel.types import Encoded, LabelledCompletion, Preference, Prompt, StepLabels, place_of

FEW = 100  # records below which a stage can hardly learn


def few(records: Sequence[object], place: str) -> Iterator[Finding]:
    if len(records) < FEW:
        yield Finding("warning", place, f"only {len(records)} records", f"expect little below {FEW}; add more")


def long_rows(
    rows: Sequence[Encoded], place: str, setting: str, limit: int, over: str, context: int
) -> Iterator[Finding]:
    long = sum(len(row.ids) > limit for row in rows)
    if long and over == "error":
        sentence = f"{long} of {len(rows)} records are longer than {setting} = {limit} tokens"
        yield Finding("error", place, sentence, f"raise {setting} or set data.over_length: skip")
    elif long:
        level: Literal["error", "warning"] = "error" if long == len(rows) else "warning"
        yield Finding(level, place, f"{long} of {len(rows)} records are left out ({setting})", f"raise {setting}")
    kept = [len(row.ids) for row in rows if len(row.ids) <= limit]
    beyond = sum(length > context for length in kept) if context else 0
    if beyond:
        sentence = f"{beyond} of {len(rows)} records are longer than the model's {context} positions"
        yield Finding("error", place, sentence, f"lower {setting} to {context} and set data.over_length: skip")
    empty = sum(not row.predicted for row in rows) if setting == "data.max_length" else 0
    if empty:
        yield Finding("error", place, f"{empty} records have nothing to learn", "take out the empty replies")


def prompt_findings(
    prompts: Sequence[Prompt], place: str, recipe: Recipe, chat: Chat, context: int
) -> Iterator[Finding]:
    """Raises UserError for a prompt that the template refuses."""
    data = recipe.data
    ids = chat.encode_prompts([prompt.messages for prompt in prompts], [place_of(prompt) for prompt in prompts])
    encoded = [Encoded(tuple(prompt), (False,) * len(prompt)) for prompt in ids]
    yield from long_rows(encoded, place, "data.max_prompt_length", data.max_prompt_length, data.over_length, context)
    yield from _answers(recipe, prompts, place)
    yield from _room(recipe, place, max((len(row) for row in ids), default=0), context)


def _answers(recipe: Recipe, prompts: Sequence[Prompt], place: str) -> Iterator[Finding]:
    """Prompts without the answer that a stage holds replies to them against."""
    for stage in recipe.stages:
        fields = {source.field for _, source in stage.scored_by() if isinstance(source, VerifyRef)}
        for field in sorted(fields if place in _asked_from(recipe, stage) else ()):
            yield from _without_answer(prompts, field, stage.name, place)


def _without_answer(prompts: Sequence[Prompt], field: str, stage: str, place: str) -> Iterator[Finding]:
    without = [prompt for prompt in prompts if not has_answer(prompt, field)]
    if without:
        some = f"{len(without)} of {len(prompts)} prompts have no answer in meta.{field}"
        sentence = f"{some}, which {stage} holds replies against; the first is {place_of(without[0])}"
        yield Finding("error", place, sentence, "give each one, or name another field")


def _asked_from(recipe: Recipe, stage: Stage) -> tuple[str, ...]:
    """The settings that name the prompts of a stage, or of the one whose replies it takes. Those of labelled replies
    stand in their own rows."""
    if stage.steps_read() is not None:
        return ()
    for reference in stage.references():
        if reference.makes == ("responses",) and reference.target in {other.name for other in recipe.stages}:
            return _asked_from(recipe, recipe.stage(reference.target))
    if "prompts" in stage.files():
        return (f"{stage.name}.prompts",)
    held = stage.compares_models and recipe.data.heldout_prompts is not None
    return ("data.heldout_prompts",) if held else ("data.prompts",)


def _room(recipe: Recipe, place: str, longest: int, context: int) -> Iterator[Finding]:
    for stage in recipe.stages:
        for sampling in stage.samplings():
            room = context - longest
            if context and sampling.max_new_tokens > room:
                sentence = f"replies to the longest prompt ({longest} tokens) have room for {room} tokens only"
                remedy = f"lower {stage.name}.sampling.max_new_tokens ({sampling.max_new_tokens})"
                yield Finding("warning", place, sentence, remedy)


def reply_findings(
    rows: Sequence[LabelledCompletion], place: str, recipe: Recipe, chat: Chat, context: int
) -> Iterator[Finding]:
    data = recipe.data
    replies = [(r.prompt.messages, r.completion, r.finished) for r in rows]
    encoded = chat.encode_replies(replies, [place_of(r) for r in rows])
    yield from long_rows(encoded, place, "data.max_length", data.max_length, data.over_length, context)
    said: dict[tuple[str, str], set[bool]] = {}
    for row in rows:
        said.setdefault((messages_hash(row.prompt.messages), row.completion), set()).add(row.label)
    if both := sum(len(labels) > 1 for labels in said.values()):
        yield Finding("warning", place, f"{both} replies have thumbs up and down", "keep them if people truly disagree")
    if rows and len({row.label for row in rows}) == 1:
        way = "up" if rows[0].label else "down"
        yield Finding("warning", place, f"all {len(rows)} replies have thumbs {way}", "add some that have not")


def step_findings(
    rows: Sequence[StepLabels], how: StepsRead, place: str, recipe: Recipe, chat: Chat, context: int
) -> Iterator[Finding]:
    """Raises UserError for steps that are none (`keel.data.steps.cut_otherwise`) or end within a token."""
    data = recipe.data
    cut = [] if how.outcome else cut_otherwise(rows, how.steps)
    if cut:
        sentence = f"{len(cut)} of {len(rows)} replies are labelled in other steps than steps.by: {how.steps.by} cuts"
        yield Finding("warning", place, f"{sentence} (first: {place_of(cut[0])})", "set steps.by to what ends a step")
    encoded = encode_steps(chat, [(row.prompt.messages, row.steps) for row in rows], [place_of(row) for row in rows])
    long = [one.row for one in encoded]
    yield from long_rows(long, place, "data.max_length", data.max_length, data.over_length, context)
    if how.answer:
        yield from _without_answer([row.prompt for row in rows], how.answer, place.partition(".")[0], place)
        if how.outcome:  # labels are what the answers come to
            return
    learned = [(outcome(row, how.bound),) if how.outcome else row.labels for row in rows]
    if missing := sum(all(label is None for label in labels) for labels in learned):
        what = "without an end or a judged answer" if how.outcome else "without a judged step"
        level: Literal["error", "warning"] = "error" if missing == len(rows) else "warning"
        sentence = f"{missing} of {len(rows)} replies {what} are left out"
        yield Finding(level, place, sentence, "give labels, or take them out")
    known = {label for labels in learned for label in labels if label is not None}
    if len(known) == 1:
        sentence = f"every judged step has the label {known.pop():g}"
        yield Finding("error", place, sentence, "add replies with steps of both kinds")


def pair_findings(
    preferences: Sequence[Preference], place: str, recipe: Recipe, chat: Chat, context: int
) -> Iterator[Finding]:
    replies = [
        (p.prompt.messages, text, finished)
        for p in preferences
        for text, finished in ((p.chosen, p.chosen_finished), (p.rejected, p.rejected_finished))
    ]
    data = recipe.data
    encoded = chat.encode_replies(replies, [place_of(p) for p in preferences for _ in range(2)])
    yield from long_rows(encoded, place, "data.max_length", data.max_length, data.over_length, context)
    seen = {(messages_hash(p.prompt.messages), p.chosen, p.rejected) for p in preferences if not p.tie}
    contrary = sum((prompt, worse, better) in seen for prompt, better, worse in seen) // 2
    if contrary:
        sentence = f"{contrary} pairs are judged both ways"
        yield Finding("warning", place, sentence, "keep them if annotators truly disagree; else fix the rows")
