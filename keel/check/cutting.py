"""Replies that are there already, cut into steps as a stage will."""

from __future__ import annotations

import json
from collections.abc import Iterator

from keel.check.finding import Finding
from keel.feedback.step_labels import one_step_each
from keel.recipe.recipe import Stage
from keel.run import RunDir
from keel.stages.inputs import KEPT


def one_step_findings(stage: Stage, run: RunDir) -> Iterator[Finding]:
    """A splitter that makes one step of every reply of a stage that is done."""
    cuts = stage.cuts()
    if cuts is None:
        return
    name, steps = cuts
    path = run.path / name / KEPT
    if not path.exists():
        return
    texts = [json.loads(line)["messages"][-1]["content"] for line in path.read_text("utf-8").splitlines()]
    said = [text for text in texts if text.strip()]
    if said and all(len(steps.split(text)) == 1 for text in said):
        sentence, _, remedy = one_step_each(steps, len(said)).partition("; ")
        yield Finding("error", f"{stage.name}.steps", sentence, remedy)
