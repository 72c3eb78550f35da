"""Replies of lines whose truth is simple: a line is wrong when it has salt, and so is every line behind it."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from tiny import prompt

from keel.types import StepLabels

GOOD = ("the ship sails", "from the port", "the captain is good", "to the port", "what a day")
BAD = ("the salt ship", "from salt to rope", "salt is what")


def reply(n: int, rng: Random, unjudged: float = 0.0) -> StepLabels:
    lines, labels = [], []
    wrong = False
    for _ in range(rng.randint(2, 4)):
        bad = rng.random() < 0.3
        wrong = wrong or bad
        lines.append(rng.choice(BAD if bad else GOOD))
        labels.append(None if rng.random() < unjudged else float(not wrong))
    steps = (*(f"{line}\n" for line in lines[:-1]), lines[-1])
    return StepLabels(f"s{n}-{rng.random()}", prompt(n), steps, tuple(labels))


def replies(prompts: int, each: int = 2, seed: int = 0, unjudged: float = 0.0) -> list[StepLabels]:
    rng = Random(seed)
    return [reply(n, rng, unjudged) for n in range(prompts) for _ in range(each)]


def write(path: Path, records: list[StepLabels]) -> Path:
    rows = [
        {"id": one.id, "prompt": one.prompt.messages[0].content, "completions": list(one.steps), "labels": one.labels}
        for one in records
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
