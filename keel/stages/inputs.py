"""What a recipe's stages read, by the names that the recipe calls it: demonstrations, preferences, thumbs, steps,
prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from keel.data.collate import messages_hash, prompt_messages, split_by_prompt
from keel.data.rows import BadRows, Reading
from keel.data.sources import read_demonstrations, read_labelled, read_preferences, read_prompts
from keel.feedback.aggregate import aggregate, likelier_first
from keel.feedback.stored import training_demonstrations, training_steps, training_thumbs, training_votes
from keel.recipe.declared import PEOPLE
from keel.recipe.sections import DataConfig
from keel.recipe.sft import SftStage
from keel.recipe.stage import PreferenceBase, StageBase
from keel.recipe.thumbs import ThumbsBase
from keel.recipe.verify import VerifyRef
from keel.reward.checks import known_answer
from keel.run import atomic_write_text, read_json
from keel.stages.context import StageContext
from keel.store.rows import storable
from keel.store.step_records import Neutral
from keel.types import (
    Completion,
    Demonstration,
    LabelledCompletion,
    Message,
    Preference,
    Prompt,
    StepLabels,
    UserError,
    place_of,
)

T = TypeVar("T")

KEPT = "demonstrations.jsonl"  # in the folder of a stage that makes demonstrations
PAIRS = "pairs.jsonl"  # in the folder of a stage that makes pairs


BAD_ROWS = "bad_rows.jsonl"  # in a stage's folder: the rows that it left out, with what is wrong with each


def reading(context: StageContext) -> Reading:
    """How the stage reads the recipe's data: with ``data.on_bad_row: skip`` the rows that cannot be read are listed in
    its folder, and the first few in a note."""

    def skipped(bad: BadRows) -> None:
        path = context.stage_dir.path / BAD_ROWS
        before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = [json.dumps({"file": file, "line": line, "problem": problem}) for file, line, problem in bad.found]
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, "".join(f"{row}\n" for row in dict.fromkeys([*before, *rows])))
        first = "".join(f"\n  {line}" for line in bad.first())
        context.reporter.note(f"{bad.summary} and are left out; all of them are in {path}{first}")

    return Reading(context.recipe.data.on_bad_row, context.reporter.note, skipped)


# -------------------------------------------------------------------------------------------------- demonstrations


def demonstrations(
    stage: SftStage, context: StageContext
) -> tuple[list[tuple[str, list[Demonstration]]], dict[str, int]]:
    """What ``stage`` learns from, each with what names it, and how many of them people wrote in the store. A stage that
    makes demonstrations has them in its folder; a sample stage's are the replies that it kept, as far as they ended by
    themselves."""
    sources = stage.sources or tuple(filter(None, [context.recipe.data.demonstrations]))
    if not sources:
        raise UserError(f"stage {stage.name}: no demonstrations; set data.demonstrations=FILE")
    made = {other.name for other in context.recipe.stages if "demonstrations" in other.makes}
    named = context.file if stage.sources else str
    files = [(s, context.parent(s).path / KEPT if s in made else named(s)) for s in sources if s != PEOPLE]
    found = [(source, read_demonstrations(file, reading(context))) for source, file in files]
    if PEOPLE not in sources:
        return found, {}
    stored = training_demonstrations(context.own_folder().path, context.store_url)
    people = _without_heldout(stored, prompt_messages, "demonstrations", context)
    if not people and not any(rows for _, rows in found):
        raise UserError(f"stage {stage.name}: nobody has written anything in the store yet; keel label serves it")
    return [*found, (PEOPLE, people)], {"people_demonstrations": len(people)}


def write_demonstrations(path: Path, shown: Sequence[Demonstration]) -> None:
    """Writes conversations whose last message alone is learned."""
    rows = [{"id": one.id, "messages": [*_shown(one.messages[:-1]), _plain(one.messages[-1])]} for one in shown]
    _write_rows(path, rows)


def write_pairs(path: Path, pairs: Sequence[Preference]) -> None:
    """Writes pairs that nobody voted on, as `keel.data.sources.read_preferences` reads them."""
    rows = [
        {
            "id": pair.id,
            "prompt_id": pair.prompt.id,
            **({"kind": pair.prompt.kind} if pair.prompt.kind else {}),
            "prompt": [_plain(message) for message in pair.prompt.messages],
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "annotator": pair.annotator,
        }
        for pair in pairs
    ]
    _write_rows(path, rows)


def write_step_labels(path: Path, stage: str, records: Sequence[StepLabels]) -> None:
    """Writes labelled replies as `keel.data.sources.read_steps` reads them, numbered behind the stage's name."""
    rows = [
        {
            "id": f"{stage}:{number}",
            "prompt_id": one.prompt.id,
            **({"kind": one.prompt.kind} if one.prompt.kind else {}),
            **({"meta": dict(one.prompt.meta)} if one.prompt.meta else {}),
            "prompt": [_plain(message) for message in one.prompt.messages],
            "completions": [storable(step) for step in one.steps],
            "labels": list(one.labels),
            "finished": one.finished,
            "annotator": one.annotator,
        }
        for number, one in enumerate(records)
    ]
    _write_rows(path, rows)


def _plain(message: Message) -> dict[str, Any]:
    return {"role": message.role, "content": message.content}


def _shown(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages that are shown and not learned."""
    return [_plain(m) | ({"weight": 0} if m.role == "assistant" else {}) for m in messages]


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_kept(path: Path, prompts: Sequence[Prompt], replies: Sequence[Sequence[Completion]]) -> None:
    """Writes sampled replies as demonstrations; the replies inside a prompt were not sampled, and are shown only. One
    that was cut at the length limit is none: with an end token behind it, it would teach the model to stop in the
    middle."""
    rows = [
        {
            "messages": [
                *_shown(prompt.messages),
                {"role": "assistant", "content": storable(reply.text)},  # a byte-level model can write NUL
            ],
            **({} if reply.reward is None else {"reward": reply.reward}),
        }
        for prompt, group in zip(prompts, replies, strict=True)
        for reply in group
        if reply.finished
    ]
    _write_rows(path, rows)


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
    """What ``stage`` learns from: the files and stages that it names, else ``data.preferences``. A stage that makes
    pairs has them in its folder, and they are nobody's votes. Beside the votes of annotate stages stand those that
    people and models gave in the store (``voters``)."""
    recipe = context.recipe
    sources = stage.sources or tuple(filter(None, [recipe.data.preferences]))
    if not sources:
        raise UserError(f"stage {stage.name}: no preferences; set data.preferences=FILE or name a stage")
    annotated = {other.name for other in recipe.stages if "votes" in other.makes}
    made = {other.name for other in recipe.stages if "pairs" in other.makes}
    named = context.file if stage.sources else str
    files = [
        context.parent(name).path / PAIRS if name in made else named(name)
        for name in sources
        if name not in {*annotated, PEOPLE}
    ]
    for name in made & set(sources):
        if not context.parent(name).summary()["pairs"]:
            raise UserError(f"stage {stage.name}: {name} made no pairs, for each revision equals what it began with")
    pairs = [likelier_first(pair) for file in files for pair in read_preferences(file, reading(context))]
    if not {*annotated, PEOPLE} & set(sources):
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
    whose = stage.from_store(annotated).voters
    stored = training_votes(context.own_folder().path, context.store_url, batches, whose)
    models, people = (
        _without_heldout(stored[who], lambda vote: vote.prompt.messages, "votes", context)
        for who in ("models", "people")
    )
    if not pairs and not any((people, models, stored["simulated"])):
        raise UserError(f"stage {stage.name}: nobody has judged anything in the store yet; keel label serves it")
    agreement = summaries[0].get("annotator_agreement") if summaries else None
    counts = {"simulated_votes": len(stored["simulated"]), "model_votes": len(models), "people_votes": len(people)}
    return Preferences([*pairs, *stored["simulated"], *models, *people], truth, agreement, counts)


@dataclass(frozen=True)
class Thumbs:
    """``examples``: single replies with thumbs up or down. ``counts``: whose thumbs of the store they are, how many
    replies are halves of pairs, and what was left out."""

    examples: list[LabelledCompletion]
    counts: dict[str, int]


def unpaired(stage: ThumbsBase, context: StageContext) -> Thumbs:
    """What ``stage`` learns from with ``thumbs``: the files and annotate stages that it names, people's thumbs, and
    both replies of each pair of its ``preferences``."""
    annotated = {other.name for other in context.recipe.stages if "votes" in other.makes}
    undecided: list[int] = []
    read = replace(reading(context), undecided=undecided.append)
    files = [context.file(name) for name in stage.thumb_sources if name not in {*annotated, PEOPLE}]
    found = [row for file in files for row in read_labelled(file, read, stage.rating_bounds())]
    counts = {"ratings_left_out": sum(undecided)} if undecided else {}
    whose = stage.from_store(annotated).thumbs
    if whose:
        parents = [context.parent(name) for name in stage.thumb_sources if name in annotated]
        batches = [parent.fingerprint for parent in parents if parent.fingerprint is not None]
        stored = training_thumbs(context.own_folder().path, context.store_url, batches, whose)
        people = _without_heldout(stored["people"], lambda one: one.prompt.messages, "thumbs", context)
        found += [*stored["simulated"], *people]
        counts |= {"simulated_thumbs": len(stored["simulated"]), "people_thumbs": len(people)}
    if stage.sources:
        pairs = preferences(stage, context)
        records = aggregate(pairs.pairs, "raw")
        settled: dict[Hashable, tuple[str, ...]] = {vote.item: () for vote in pairs.pairs if vote.settled}
        for vote in pairs.pairs:
            if vote.item in settled:
                settled[vote.item] += (vote.id,)
        decided = [record for record in records if not record.tie]
        halves = [half for record in decided for half in in_two(record, settled.get(record.item, ()))]
        found += halves
        ties = sum(record.tie for record in records)
        counts |= {**pairs.counts, "halves_of_pairs": len(halves), "ties_left_out": ties}
    if not found:
        raise UserError(
            f"stage {stage.name}: there are no thumbs in what it names in thumbs; keel label serves a store"
        )
    return Thumbs(found, counts)


def in_two(pair: Preference, settled: tuple[str, ...] = ()) -> list[LabelledCompletion]:
    """The better reply of a pair as one with thumbs up, the worse one as one with thumbs down. Both have the pair's id:
    it is that judgement which is learned from. ``settled``: the ids of the votes that a reviewer's word replaced here.
    UserError for a soft label, of which a thumb is no part."""
    if pair.probability not in (None, 1.0):
        raise UserError(
            f"{place_of(pair)}: this pair's label is a probability ({pair.probability:g}), and a thumb is up or down; "
            "learn from such pairs alone (leave thumbs out), or take the probabilities out"
        )
    replies = ((pair.chosen, True, pair.chosen_finished), (pair.rejected, False, pair.rejected_finished))
    votes, by_reviewer = settled or (pair.id,), bool(settled)
    return [
        LabelledCompletion(
            pair.id, pair.prompt, text, up, pair.annotator, finished, pair.weight, pair.place, votes, by_reviewer
        )
        for text, up, finished in replies
    ]


@dataclass(frozen=True)
class StepsOfPeople:
    """``labels``: of people, on the steps of replies. ``random``: the ids of those on replies that were drawn at
    random; the others were asked about for what they teach, so figures are taken of ``random`` ones."""

    labels: list[StepLabels]
    random: frozenset[str]


def step_labels_of_people(context: StageContext, neutral: Neutral = "good") -> StepsOfPeople:
    """What people said of the steps of replies in the store; ``neutral``: what a neutral step counts as."""
    stored, random = training_steps(context.own_folder().path, context.store_url, neutral)
    return StepsOfPeople(_without_heldout(stored, lambda one: one.prompt.messages, "step labels", context), random)


def _without_heldout(
    records: list[T], messages: Callable[[T], Sequence[Message]], what: str, context: StageContext
) -> list[T]:
    """People may have worked on any prompt (its ``messages``); the evaluation's must stay unseen."""
    if not records:  # of a stage that learns from nobody's, which declares no held-out prompts either
        return records
    source = context.recipe.data.heldout_prompts
    if source is None:
        return records
    heldout = _hashes(source, context)
    kept = [record for record in records if messages_hash(messages(record)) not in heldout]
    if len(kept) < len(records):
        context.reporter.note(f"left out {len(records) - len(kept)} {what} on prompts held out for the evaluation")
    return kept


# --------------------------------------------------------------------------------------------------------- prompts


def _hashes(source: str, context: StageContext) -> set[str]:
    return {messages_hash(prompt.messages) for prompt in read_prompts(source, reading(context))}


def _pool(context: StageContext) -> list[Prompt]:
    """Prompts where the recipe names none of their own: those of the demonstrations, else those of the pairs."""
    data = context.recipe.data
    if data.prompts is not None:
        return read_prompts(data.prompts, reading(context))
    if data.demonstrations is not None:
        rows = read_demonstrations(data.demonstrations, reading(context))
        found = [Prompt(d.id, prompt_messages(d), place=d.place) for d in rows if not d.plain]
    elif data.preferences is not None:
        found = [preference.prompt for preference in read_preferences(data.preferences, reading(context))]
    else:
        raise UserError(f"stage {context.stage_dir.name}: no prompts; set data.prompts=FILE")
    return list({messages_hash(p.messages): p for p in found}.values())


def training_prompts(source: str | None, context: StageContext) -> list[Prompt]:
    """Prompts for sampling, PPO and GRPO, without those that the evaluation holds out."""
    return answered(_training_prompts(source, context), context.stage)


def answered(prompts: list[Prompt], stage: StageBase) -> list[Prompt]:
    """The prompts. Raises UserError for one without the answer that the stage holds replies against: before compute."""
    fields = {source.field for _, source in stage.scored_by() if isinstance(source, VerifyRef)}
    for name in sorted(fields):
        for prompt in prompts:
            known_answer(prompt, name)
    return prompts


def _training_prompts(source: str | None, context: StageContext) -> list[Prompt]:
    if source is not None:
        return read_prompts(context.file(source), reading(context))
    data = context.recipe.data
    found = _pool(context)
    heldout = None if data.heldout_prompts is None else _hashes(data.heldout_prompts, context)
    kept = training_side(found, heldout, data, context.recipe.seed)
    if heldout is not None and len(kept) < len(found):
        context.reporter.note(f"left out {len(found) - len(kept)} prompts that are held out for the evaluation")
    return kept


def training_side(pool: Sequence[Prompt], heldout: set[str] | None, data: DataConfig, seed: int) -> list[Prompt]:
    """What of a pool of prompts is trained on. ``heldout``: the hashes of ``data.heldout_prompts``; None where a share
    is split off. UserError where one side has none."""
    if heldout is None:
        return split_by_prompt(pool, data.heldout_fraction, seed)[0]
    kept = [prompt for prompt in pool if messages_hash(prompt.messages) not in heldout]
    if not kept:
        raise UserError("every prompt of data.prompts is in data.heldout_prompts too; give others to train on")
    return kept


def heldout_prompts(source: str | None, context: StageContext) -> list[Prompt]:
    """What the evaluation asks."""
    return answered(_heldout_prompts(source, context), context.stage)


def _heldout_prompts(source: str | None, context: StageContext) -> list[Prompt]:
    data = context.recipe.data
    if source:
        return read_prompts(context.file(source), reading(context))
    if data.heldout_prompts:
        return read_prompts(data.heldout_prompts, reading(context))
    return split_by_prompt(_pool(context), data.heldout_fraction, context.recipe.seed)[1]
