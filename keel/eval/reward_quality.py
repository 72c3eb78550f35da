"""How good a reward model is on pairs that it has not seen: accuracy against the noise ceiling, and calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from keel.eval.calibration import both_ways, ece, reliability
from keel.stats import ceiling_bounds, noise_ceiling
from keel.types import Preference


def reward_quality(
    heldout: Sequence[tuple[Preference, float, int, int]],
    truth: Mapping[str, float],
    agreement: float | None,
    seed: int,
) -> dict[str, Any]:
    """Figures over held-out pairs ``(record, raw score of chosen - rejected, tokens of each)``; ties are left out.

    ``truth``: by pair id, the probability that the population prefers the record's chosen response, where it is known
    (simulated annotators): then the ceiling E[max(q, 1-q)] is exact and ``accuracy_on_truth`` says how often the model
    sides with the population's majority. Else ``ceiling`` is the upper bound that the agreement allows, if any.
    """
    decided = [row for row in heldout if not row[0].tie]
    if not decided:
        return {"accuracy": None, "ceiling": None, "ece": None, "annotator_agreement": agreement}
    right = [1.0 if lead > 0 else 0.5 if lead == 0 else 0.0 for _, lead, _, _ in decided]
    n = len(right)
    accuracy = sum(right) / n
    probs, outcomes = both_ways([_sigmoid(lead) for _, lead, _, _ in decided], [1.0] * n)
    known = [(truth[record.id], lead) for record, lead, _, _ in decided if record.id in truth]
    ceiling = noise_ceiling([q for q, _ in known])
    if ceiling is None and agreement is not None:
        ceiling = ceiling_bounds(agreement)[1]
    longer = [(lead > 0) == (a > b) for _, lead, a, b in decided if a != b]
    return {
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / n),
        "ceiling": ceiling,
        "ceiling_from": "truth" if known else "agreement" if agreement is not None else None,
        "accuracy_on_truth": sum((q > 0.5) == (lead > 0) for q, lead in known) / len(known) if known else None,
        "expected_accuracy": sum(q if lead > 0 else 1 - q for q, lead in known) / len(known) if known else None,
        "ece": ece(probs, outcomes),
        "reliability": [asdict(b) for b in reliability(probs, outcomes)],
        "decided_pairs": n,
        "annotator_agreement": agreement,
        "prefers_longer": sum(longer) / len(longer) if longer else None,
    }


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
