"""Sampled responses -> thumbs up and down by simulated annotators, through the store's queue."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keel.feedback.simulated import SimulatedAnnotator, Task, mean, work_off
from keel.store import Assignment, Response, Store, thumbs, work
from keel.store.records import NewThumb
from keel.types import Prompt, Reporter, UserError


def bars(
    annotators: Sequence[SimulatedAnnotator], asked: Sequence[tuple[Prompt, str]], liked: float
) -> dict[str, float]:
    """Each annotator's bar: by its own taste, a share ``liked`` of all responses lies above it."""
    found = {}
    for annotator in annotators:
        utilities = sorted(annotator.utility(prompt, text) for prompt, text in asked)
        above = min(max(round(liked * len(utilities)), 1), len(utilities) - 1) if len(utilities) > 1 else 0
        below = len(utilities) - above
        found[annotator.name] = (utilities[below - 1] + utilities[min(below, len(utilities) - 1)]) / 2
    return found


@dataclass(frozen=True, slots=True)
class ThumbChoice:
    """Which responses are asked: up to ``count`` of them (None: all), drawn at random, a share ``overlap`` twice.
    ``liked``: the share of all responses that lies above an annotator's bar."""

    count: int | None
    liked: float
    overlap: float


def annotate_thumbs(
    store: Store,
    annotators: Sequence[SimulatedAnnotator],
    task: Task,
    choice: ThumbChoice,
    reporter: Reporter,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Thumbs on the task's responses, in its queue.

    Returns (summary, {thumb's id: probability that the population gives the response a thumb up}). Stopped and done
    again, it gives the same.
    """
    prompts = {prompt.id: prompt for prompt in store.prompts()}
    made = [response for response in store.responses() if response.fingerprint == task.made_by]
    rng = random.Random(f"thumbs {task.seed}")
    if choice.count is not None and choice.count < len(made):
        made = rng.sample(made, choice.count)
    if not made:
        raise UserError("there is no response to judge; have the sample stage keep some")
    bar = bars(annotators, [(prompts[response.prompt_id], response.text) for response in made], choice.liked)
    twice = set(rng.sample(range(len(made)), round(choice.overlap * len(made))))
    with store.transaction(writes=True) as connection:
        for people in (1, 2):
            ids = [response.id for i, response in enumerate(made) if (i in twice) == (people == 2)]
            work.add_thumbs(connection, ids, people, task.batch, store.now)

    def give(session: Store, annotator: SimulatedAnnotator, assignment: Assignment, token: str) -> None:
        up, seconds = annotator.thumb_at(task.seed, assignment.prompt, assignment.shown[0], bar[annotator.name])
        given = NewThumb(up, token=token, seconds=seconds, guideline=task.guideline)
        with session.transaction(writes=True) as connection:
            work.thumb(connection, assignment.id, given, annotator_id=None, now=session.now)

    work_off(store, annotators, "thumb", give, task.seed, task.guideline, reporter, task.batch)
    return _summary(store, annotators, task.batch, made, bar, prompts)


def _summary(
    store: Store,
    annotators: Sequence[SimulatedAnnotator],
    batch: str,
    made: Sequence[Response],
    bar: Mapping[str, float],
    prompts: Mapping[str, Prompt],
) -> tuple[dict[str, Any], dict[str, float]]:
    with store.transaction(writes=False) as connection:
        found = thumbs.given(connection, batch)
    liking = {
        response.id: sum(
            annotator.probability_up(prompts[response.prompt_id], response.text, bar[annotator.name])
            for annotator in annotators
        )
        / len(annotators)
        for response in made
    }
    said: dict[int, list[bool]] = {}
    for thumb in found:
        said.setdefault(thumb.response.id, []).append(thumb.up)
    pairs = [ups for ups in said.values() if len(ups) > 1]
    summary = {
        "judgements": len(found),
        "replies": len(said),
        "annotators": len(annotators),
        "up": mean([thumb.up for thumb in found]),
        "annotator_agreement": mean([ups[0] == ups[1] for ups in pairs]),
        "doubly_judged": len(pairs),
    }
    return summary, {thumb.token: liking[thumb.response.id] for thumb in found}
