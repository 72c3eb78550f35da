"""Sampled responses -> comparisons in the store's queue -> judgements by simulated annotators."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from keel.feedback.simulated import SimulatedAnnotator, label, true_probability
from keel.stats import expected_agreement, noise_ceiling
from keel.store import Response, Store
from keel.types import Reporter, UserError


def make_comparisons(
    responses: Sequence[Response], pairs_per_prompt: int, overlap: float, seed: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of response ids of one prompt each: (those that one annotator judges, those that two do).

    Up to ``pairs_per_prompt`` different pairs a prompt are drawn at random from its responses; a share ``overlap`` of
    all pairs is judged twice, to measure agreement. UserError when no prompt has two responses.
    """
    rng = random.Random(f"comparisons {seed}")
    by_prompt: dict[str, list[int]] = {}
    for response in responses:
        by_prompt.setdefault(response.prompt_id, []).append(response.id)
    pairs: list[tuple[int, int]] = []
    for ids in by_prompt.values():
        every = list(combinations(ids, 2))
        pairs += rng.sample(every, min(pairs_per_prompt, len(every)))
    if not pairs:
        raise UserError("no prompt has two different responses to compare; raise sampling.temperature or candidates")
    twice = set(rng.sample(range(len(pairs)), round(overlap * len(pairs))))
    return [p for i, p in enumerate(pairs) if i not in twice], [pairs[i] for i in sorted(twice)]


def annotate_responses(
    store: Store,
    annotators: Sequence[SimulatedAnnotator],
    made_by: str,
    batch: str,
    pairs_per_prompt: int,
    overlap: float,
    guideline: str,
    seed: int,
    reporter: Reporter,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Judges pairs of the responses with the fingerprint ``made_by``, in the queue ``batch``.

    Returns (summary, {vote's id: probability that the population prefers its chosen response}); the second is what
    only a simulation knows, and is the reward model's noise ceiling. Stopped and done again, it gives the same.
    """
    responses = [response for response in store.responses() if response.fingerprint == made_by]
    once, twice = make_comparisons(responses, pairs_per_prompt, overlap, seed)
    with store.session() as session:
        session.add_comparisons(once, overlap=1, batch=batch)
        session.add_comparisons(twice, overlap=2, batch=batch)
    summary = label(store, annotators, seed, guideline, reporter, batch)
    truth: dict[str, float] = {}
    for vote in store.preferences(batch):
        if not vote.tie:
            truth[vote.id] = true_probability(annotators, vote.prompt, vote.chosen, vote.rejected)
    known = list(truth.values())
    summary |= {"pairs": len(once) + len(twice)}
    summary |= {"expected_agreement": expected_agreement(known), "ceiling": noise_ceiling(known)}
    return summary, truth
