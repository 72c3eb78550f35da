"""Sampled responses -> comparisons in the store's queue -> judgements by simulated annotators."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from keel.feedback.simulated import SimulatedAnnotator, Task, label, true_probability
from keel.feedback.uncertainty import best_first
from keel.stats import expected_agreement, noise_ceiling
from keel.store import Response, Store
from keel.types import Reporter, UserError

Gains = Callable[[Sequence[tuple[Response, Response]]], Sequence[float]]
"""What a vote on each pair would be worth."""


@dataclass(frozen=True, slots=True)
class PairChoice:
    """Which pairs are asked: of each prompt at most ``per_prompt``, in all at most ``count`` (None: no limit), none of
    ``asked`` (pairs of response ids). Drawn at random, or those of the greatest ``gains``."""

    per_prompt: int
    count: int | None = None
    gains: Gains | None = None
    asked: frozenset[frozenset[int]] = frozenset()


@dataclass(frozen=True, slots=True)
class Overlap:
    """A share of the pairs, drawn at random, is judged ``times`` times, to measure agreement; the others once."""

    share: float = 0.0
    times: int = 2


def make_comparisons(
    responses: Sequence[Response], choice: PairChoice, overlap: float, seed: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of response ids of one prompt each: (those that one annotator judges, those that two do).

    A share ``overlap`` of all pairs, drawn at random, is judged twice, to measure agreement. UserError when there is
    no pair to ask.
    """
    rng = random.Random(f"comparisons {seed}")
    by_prompt: dict[str, list[Response]] = {}
    for response in responses:
        by_prompt.setdefault(response.prompt_id, []).append(response)
    groups = [
        [(a, b) for a, b in combinations(group, 2) if frozenset((a.id, b.id)) not in choice.asked]
        for group in by_prompt.values()
    ]
    if not any(groups):
        raise UserError(
            "no prompt has two different responses that were not compared yet; raise sampling.temperature, candidates "
            "or per_prompt, or add prompts"
        )
    found = _at_random(groups, choice, rng) if choice.gains is None else _best(groups, choice, choice.gains)
    pairs = [(a.id, b.id) for a, b in found]
    twice = set(rng.sample(range(len(pairs)), round(overlap * len(pairs))))
    return [p for i, p in enumerate(pairs) if i not in twice], [pairs[i] for i in sorted(twice)]


_Pair = tuple[Response, Response]


def _at_random(groups: Sequence[Sequence[_Pair]], choice: PairChoice, rng: random.Random) -> list[_Pair]:
    drawn = [pair for every in groups for pair in rng.sample(every, min(choice.per_prompt, len(every)))]
    return drawn if choice.count is None or choice.count >= len(drawn) else rng.sample(drawn, choice.count)


def _best(groups: Sequence[Sequence[_Pair]], choice: PairChoice, gains: Gains) -> list[_Pair]:
    pairs = [pair for every in groups for pair in every]
    prompts = [a.prompt_id for a, _ in pairs]
    return [pairs[i] for i in best_first(gains(pairs), prompts, choice.per_prompt, choice.count)]


def annotate_responses(
    store: Store,
    annotators: Sequence[SimulatedAnnotator],
    task: Task,
    choice: PairChoice,
    overlap: Overlap,
    reporter: Reporter,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Judges pairs of the task's responses in its queue.

    Returns (summary, {vote's id: probability that the population prefers its chosen response}); the second is what
    only a simulation knows, and is the reward model's noise ceiling. Stopped and done again, it gives the same.
    """
    responses = [response for response in store.responses() if response.fingerprint == task.made_by]
    once, twice = make_comparisons(responses, choice, overlap.share, task.seed)
    with store.session() as session:
        session.add_comparisons(once, overlap=1, batch=task.batch)
        session.add_comparisons(twice, overlap=overlap.times, batch=task.batch)
    summary = label(store, annotators, task.seed, task.guideline, reporter, task.batch)
    truth: dict[str, float] = {}
    for vote in store.preferences(task.batch):
        if not vote.tie:
            truth[vote.id] = true_probability(annotators, vote.prompt, vote.chosen, vote.rejected)
    known = list(truth.values())
    summary |= {"pairs": len(once) + len(twice)}
    summary |= {"expected_agreement": expected_agreement(known), "ceiling": noise_ceiling(known)}
    return summary, truth
