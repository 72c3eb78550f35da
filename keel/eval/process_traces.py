"""Held-out replies with what a process reward model says of each step, drawn to be looked at. Pure: records in, a table
for ``traces.json`` out, which the report shows without the model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from keel.eval.process_quality import NO_ERROR, Judged, first_error, found_error
from keel.recipe.steps import Aggregate
from keel.reward.process import aggregated
from keel.types import StepLabels

EACH = 6  # replies of each kind that are kept

Kind = Literal["right", "caught", "missed", "lucky", "open"]
KINDS: tuple[Kind, ...] = ("right", "caught", "missed", "lucky", "open")


@dataclass(frozen=True, slots=True)
class Trace:
    """A held-out reply: ``judged`` holds its scores, and as labels what is known of its steps; ``by``: who knows it,
    ``gold``, ``mc`` (Monte Carlo), or empty for anybody else, whose name is nobody's business."""

    record: StepLabels
    judged: Judged
    by: str = ""


def kind_of(judged: Judged, error: int | None, found: int) -> Kind:
    """``right``: no step is wrong. ``caught``: the answer is not right, and the first wrong step is the first that is
    doubted. ``missed``: it is not, or none is doubted. ``lucky``: a step is wrong, and the answer right all the same.
    ``open``: what is known does not say."""
    if error is None or (error == NO_ERROR and judged.right is False):
        return "open"
    if error == NO_ERROR:
        return "right"
    if judged.right:
        return "lucky"
    return "caught" if found == error else "missed"


def draw_traces(
    traces: Sequence[Trace], threshold: float | None, aggregate: Aggregate, bound: float, seed: int = 0
) -> dict[str, Any]:
    """``rows``: the first ``EACH`` of each kind, all of different problems, in an order that ``seed`` draws; ``kinds``:
    how many replies each kind has, and in how many the model's first doubted step is the first wrong one (or none is,
    on both sides). ``threshold``: a step is doubted where its score is below (None: none was chosen, and it is 0.5);
    ``bound``: it is right where its label is above."""
    doubted = 0.5 if threshold is None else threshold
    drawn = sorted(traces, key=lambda one: one.record.id)
    random.Random(f"traces {seed}").shuffle(drawn)
    counts: dict[Kind, list[int]] = {kind: [0, 0] for kind in KINDS}
    shown: dict[Kind, set[Any]] = {kind: set() for kind in KINDS}
    rows = []
    for one in drawn:
        judged = one.judged
        error, found = first_error(judged.labels, bound), found_error(judged.scores, doubted)
        kind = kind_of(judged, error, found)
        counts[kind][0] += 1
        counts[kind][1] += error == found
        if judged.problem in shown[kind] or len(shown[kind]) == EACH:
            continue
        shown[kind].add(judged.problem)
        rows.append(
            {
                "kind": kind,
                "problem": str(judged.problem),
                "prompt": [{"role": m.role, "content": m.content} for m in one.record.prompt.messages],
                "steps": list(one.record.steps),
                "scores": list(judged.scores),
                "labels": list(judged.labels),
                "by": one.by,
                "error": error,
                "found": found,
                "right": judged.right,
                "finished": one.record.finished,
                "score": aggregated(judged.scores, aggregate),
            }
        )
    rows.sort(key=lambda row: KINDS.index(row["kind"]))
    return {
        "replies": len(traces),
        "threshold": doubted,
        "chosen": threshold is not None,
        "aggregate": aggregate,
        "bound": bound,
        "kinds": counts,
        "rows": rows,
    }
