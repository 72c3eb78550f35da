"""Several reward models on the same pairs: what ``keel.feedback.uncertainty`` compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keel.reward.scorer import RewardModelScorer
from keel.types import Completion, Prompt


@dataclass(frozen=True, slots=True)
class Candidate:
    """Two replies to one prompt that could be compared."""

    prompt: Prompt
    first: Completion
    second: Completion


def leads(scorers: Sequence[RewardModelScorer], pairs: Sequence[Candidate], temperature: float = 1.0) -> np.ndarray:
    """Each model's logit that the first of each pair is preferred [M, N]. Every reply is scored once a model.

    ``temperature`` divides the raw scores' differences (a reward stage's summary has the one that fits its held-out
    votes): a margin in the loss makes a model too sure of itself, and how sure the members are is what counts here.
    """
    replies = {(p.prompt.id, c.text, c.finished): (p.prompt, c) for p in pairs for c in (p.first, p.second)}
    place = {key: i for i, key in enumerate(replies)}
    first_N = [place[p.prompt.id, p.first.text, p.first.finished] for p in pairs]
    second_N = [place[p.prompt.id, p.second.text, p.second.finished] for p in pairs]
    prompts, completions = [prompt for prompt, _ in replies.values()], [reply for _, reply in replies.values()]
    rows = []
    for scorer in scorers:
        score_R = scorer.score(prompts, completions).total_N.double().numpy() * scorer.reward_model.std
        rows.append((score_R[first_N] - score_R[second_N]) / temperature)
    return np.stack(rows)
