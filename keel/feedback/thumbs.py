"""Sampled responses -> thumbs up and down by simulated annotators, through the store's queue."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from keel.feedback.simulated import SimulatedAnnotator, mean, work_off
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


def annotate_thumbs(
    store: Store,
    annotators: Sequence[SimulatedAnnotator],
    made_by: str,
    batch: str,
    replies: int | None,
    liked: float,
    overlap: float,
    guideline: str,
    seed: int,
    reporter: Reporter,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Thumbs on the responses with the fingerprint ``made_by``, up to ``replies`` of them (drawn at random), in the
    queue ``batch``; a share ``overlap`` is judged twice.

    Returns (summary, {thumb's id: probability that the population gives the response a thumb up}). Stopped and done
    again, it gives the same.
    """
    prompts = {prompt.id: prompt for prompt in store.prompts()}
    made = [response for response in store.responses() if response.fingerprint == made_by]
    rng = random.Random(f"thumbs {seed}")
    if replies is not None and replies < len(made):
        made = rng.sample(made, replies)
    if not made:
        raise UserError("there is no response to judge; have the sample stage keep some")
    bar = bars(annotators, [(prompts[response.prompt_id], response.text) for response in made], liked)
    twice = set(rng.sample(range(len(made)), round(overlap * len(made))))
    with store.transaction(writes=True) as connection:
        for people in (1, 2):
            ids = [response.id for i, response in enumerate(made) if (i in twice) == (people == 2)]
            work.add_thumbs(connection, ids, people, batch, store.now)

    def give(session: Store, annotator: SimulatedAnnotator, assignment: Assignment, token: str) -> None:
        up, seconds = annotator.thumb_at(seed, assignment.prompt, assignment.shown[0], bar[annotator.name])
        given = NewThumb(up, token=token, seconds=seconds, guideline=guideline)
        with session.transaction(writes=True) as connection:
            work.thumb(connection, assignment.id, given, annotator_id=None, now=session.now)

    work_off(store, annotators, "thumb", give, seed, guideline, reporter, batch)
    return _summary(store, annotators, batch, made, bar, prompts)


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
