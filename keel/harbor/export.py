"""Write the harbor as files, in the row forms that any user's data has: what ``keel demo`` runs on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from keel.harbor.corpus import base_text_rows, facts_rows
from keel.harbor.demos import FAULTY, make_demonstrations
from keel.harbor.facts import World
from keel.harbor.ledger import BOOKKEEPERS, gold_steps, write_reply
from keel.harbor.ledger import make_demonstrations as make_ledger_demonstrations
from keel.harbor.ledger import make_prompts as make_ledgers
from keel.harbor.lessons import CHOICES, REVISIONS, make_choices, make_revisions
from keel.harbor.prompts import HELPFUL_MIX, TRAINING_MIX, make_prompts
from keel.harbor.redteam import red_team_prompts
from keel.recipe.constitution import read_constitution
from keel.recipe.steps import Steps
from keel.run import atomic_write_text
from keel.types import Demonstration, Message, Prompt

REPLIES = 4  # to a ledger, of labelled ones: a model of steps is measured by how it chooses among them
WORDS_PER_TOKEN = 0.65  # of the harbor's tokenizer on its corpus, numbers and names included


def export(
    out_dir: str | Path,
    seed: int = 0,
    *,
    demonstrations: int = 3200,
    prompts: int = 2000,
    heldout_prompts: int = 450,
    pretraining_tokens: int = 40_000,
    base_text_tokens: int = 25_000,
    facts: int = 300,
) -> None:
    """Write ``demonstrations.jsonl``, ``prompts.jsonl``, ``heldout_prompts.jsonl``, ``pretraining.jsonl``,
    ``base_text.jsonl`` and ``facts.jsonl`` into ``out_dir``, which is made if it is missing. Same seed and sizes: same
    bytes.

    The world is always the one that the shipped base model knows (``World(0)``); ``seed`` decides what is drawn from
    it. Sizes are rows; for text they are tokens, approximately. The text is such as the base model was pretrained on,
    but none of that very text: one file to learn from and one to measure on.

    Raises:
        UserError: more prompts are asked for than the harbor has.
    """
    world, out = World(), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "demonstrations.jsonl", map(_demonstration_row, make_demonstrations(world, demonstrations, seed)))
    _write(out / "prompts.jsonl", map(_prompt_row, make_prompts(world, prompts, seed, "train", TRAINING_MIX)))
    _write(out / "heldout_prompts.jsonl", map(_prompt_row, make_prompts(world, heldout_prompts, seed, "heldout")))
    _write(out / "pretraining.jsonl", _texts(world, pretraining_tokens, Random(f"pretraining {seed}")))
    _write(out / "base_text.jsonl", _texts(world, base_text_tokens, Random(f"base text {seed}")))
    _write(out / "facts.jsonl", facts_rows(world, facts, Random(f"facts {seed}")))


def export_constitutional(
    out_dir: str | Path,
    seed: int = 0,
    *,
    demonstrations: int = 3200,
    red_team: int = 300,
    helpful: int = 900,
    revisions: int = REVISIONS,
    choices: int = CHOICES,
) -> None:
    """Write what `keel demo --constitutional` has beside `export`'s files: ``red_team.jsonl`` (harmful prompts and
    controls), ``helpful_prompts.jsonl`` (training prompts without harmful ones: what people are asked about),
    ``training_prompts.jsonl`` (both), ``helpful_demonstrations.jsonl`` (those of `export`'s ``demonstrations`` that
    answer no harmful prompt) and ``lessons.jsonl`` (demonstrations of critique, revision and choice by the
    principles of ``keel/constitutions/harbor.yaml``). For studies, ``faulty_demonstrations.jsonl`` (by writers who
    flatter and fill in a half of their replies) and ``red_team_test.jsonl`` (other prompts than ``red_team.jsonl``
    has). Sizes are rows. Same seed and sizes: same bytes.

    Raises:
        UserError: more are asked for than the harbor has.
    """
    world, out = World(), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    principles = read_constitution("harbor").principles
    red = red_team_prompts(world, red_team, seed)
    asked = make_prompts(world, helpful, seed, "train", HELPFUL_MIX)
    lessons = make_revisions(world, revisions, seed, principles) + make_choices(world, choices, seed, principles)
    _write(out / "red_team.jsonl", map(_prompt_row, red))
    _write(out / "helpful_prompts.jsonl", map(_prompt_row, asked))
    _write(out / "training_prompts.jsonl", map(_prompt_row, {prompt.id: prompt for prompt in red + asked}.values()))
    shown = make_demonstrations(world, demonstrations, seed)
    harmless = [one for one in shown if not one.id.startswith("demo-harmful-")]
    _write(out / "helpful_demonstrations.jsonl", map(_demonstration_row, harmless))
    _write(out / "lessons.jsonl", map(_lesson_row, lessons))
    faulty = make_demonstrations(world, demonstrations, seed, FAULTY)
    _write(out / "faulty_demonstrations.jsonl", map(_demonstration_row, faulty))
    known = {prompt.id for prompt in red}
    others = [one for one in red_team_prompts(world, red_team, seed, name="red team test") if one.id not in known]
    _write(out / "red_team_test.jsonl", map(_prompt_row, others))


def export_reasoning(
    out_dir: str | Path,
    seed: int = 0,
    *,
    demonstrations: int = 2000,
    prompts: int = 600,
    heldout_prompts: int = 200,
    labelled: int = 2400,
) -> None:
    """Write the ledgers of `keel demo --reasoning`: ``demonstrations.jsonl``, ``prompts.jsonl``,
    ``heldout_prompts.jsonl`` and ``labelled_steps.jsonl`` (replies of bookkeepers, each step labelled by the gold: the
    rows that process reward models learn from). Sizes are rows. Same seed and sizes: same bytes."""
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "demonstrations.jsonl", map(_demonstration_row, make_ledger_demonstrations(demonstrations, seed)))
    _write(out / "prompts.jsonl", map(_prompt_row, make_ledgers(prompts, seed, "train")))
    _write(out / "heldout_prompts.jsonl", map(_prompt_row, make_ledgers(heldout_prompts, seed, "heldout")))
    _write(out / "labelled_steps.jsonl", _labelled_rows(labelled, seed))


def _labelled_rows(n: int, seed: int) -> Iterator[dict[str, Any]]:
    """Four replies a ledger, by bookkeepers who slip as often as a small model does."""
    rng = Random(f"labelled ledgers {seed}")
    habits = replace(BOOKKEEPERS, slips=0.05)
    steps_of = Steps(by="line", marker=None)
    for i, prompt in enumerate(make_ledgers(-(-n // REPLIES), rng.randrange(2**32), "train")):
        for j in range(min(REPLIES, n - REPLIES * i)):
            steps = steps_of.split(write_reply(prompt, rng, habits))
            row = {"prompt_id": prompt.id, **_prompt_row(prompt), "id": f"{prompt.id}-{j}"}
            yield row | {"completions": list(steps), "labels": gold_steps(prompt, steps), "annotator": "gold"}


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _messages(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _demonstration_row(demonstration: Demonstration) -> dict[str, Any]:
    return {"id": demonstration.id, "messages": _messages(demonstration.messages)}


def _lesson_row(lesson: Demonstration) -> dict[str, Any]:
    """A reply that is shown and not learned has a weight of 0."""
    messages = [
        row if message.learned else row | {"weight": 0}
        for row, message in zip(_messages(lesson.messages), lesson.messages, strict=True)
    ]
    return {"id": lesson.id, "messages": messages}


def _prompt_row(prompt: Prompt) -> dict[str, Any]:
    return {"id": prompt.id, "prompt": _messages(prompt.messages), "kind": prompt.kind, "meta": dict(prompt.meta)}


def _texts(world: World, tokens: int, rng: Random) -> list[dict[str, Any]]:
    """Documents until they hold about ``tokens`` tokens."""
    rows: list[dict[str, Any]] = []
    words = 0
    while words < tokens * WORDS_PER_TOKEN:
        (row,) = base_text_rows(world, 1, rng)
        rows.append(row)
        words += len(row["text"].split())
    return rows
