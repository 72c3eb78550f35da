"""Judged pairs with a planted truth: what a judge of known faults says."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

from keel.eval.judge_effects import JudgedPair


def planted(
    seed: int,
    biases: Mapping[str, float],
    pairs: int = 300,
    per_prompt: int = 2,
    sampled: bool = False,
    people: int = 0,
    repeated: float = 1.0,
) -> list[JudgedPair]:
    """A judge whose log-odds are twice the lead, which has deviation 1, and noise of deviation 1, plus ``biases`` times
    length (steps of about 40 characters; better replies tend to be longer), own, log-probability (goes with own), and
    side. ``sampled``: it says 1 or 0 by that probability. ``people``: the truth is so many of their votes (of a share
    ``repeated`` of the pairs, else one), at odds of twice the lead; 0: gold."""
    rng = random.Random(f"planted {seed}")
    found = []
    for n in range(pairs):
        lead = rng.gauss(0, 1)
        length, own = round(20 * lead + 35 * rng.gauss(0, 1)), rng.choice([-1, 0, 1])
        logprob = 0.5 * own + 0.7 * rng.gauss(0, 1)
        columns = {"length": length / 40, "own": own, "logprob": logprob}
        odds = 2 * lead + rng.gauss(0, 1) + sum(biases.get(name, 0.0) * value for name, value in columns.items())
        first, second = (_sigmoid(odds + side * biases.get("side", 0.0)) for side in (0.5, -0.5))
        if sampled:
            first, second = float(rng.random() < first), float(rng.random() < second)
        times = 0 if not people else people if rng.random() < repeated else 1
        votes = tuple(float(rng.random() < _sigmoid(2 * lead)) for _ in range(times))
        found.append(
            JudgedPair(
                prompt=f"prompt {n // per_prompt}",
                p_left_first=first,
                p_left_second=second,
                truth=sum(votes) / times if votes else float(lead > 0),
                length=(400 + length, 400),
                own=(own == 1, own == -1),
                logprob=(logprob, 0.0),
                lead=None if votes else lead,
                votes=votes,
            )
        )
    return found


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
