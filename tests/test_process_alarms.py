"""Alarms of process rewards: raised on planted series, all of them, and on hardly any that are clean but noisy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from keel.eval.process_alarms import ProcessLimits, process_alarms

LOOKS, PROMPTS, GROUP = 40, 16, 8
PLANTED: dict[str, dict[str, float]] = {
    "process_steps": {"steps": 4.0},
    "process_step_length": {"tokens": 14.0},
    "process_repeated": {"repeated": 0.4},
    "process_unmatched": {"unmatched": 0.4},
    "process_hacked": {"right": -0.35},
    "process_lucky": {"lucky": 0.3},
}


def rows(seed: int, **change: float) -> list[dict[str, Any]]:
    """A run as it is logged: steps' scores and answers get better, all else stays, but for what changes evenly from the
    middle of the run on to its end. Prompts differ in how hard they are, so that replies to one hang together."""
    draw = np.random.default_rng(seed)
    way_L = np.linspace(0, 1, LOOKS)
    late_L = np.maximum(0, 2 * way_L - 1)
    now = {name: late_L * by for name, by in change.items()}
    replies, steps = PROMPTS * GROUP, PROMPTS * GROUP * 6

    def mean(around: Any, spread: float, count: int) -> np.ndarray:
        return draw.normal(around, spread / math.sqrt(count), LOOKS)

    ability_L = 0.5 + (0.15 * way_L if "right" not in change else 0) + now.get("right", 0)
    right_LP = draw.binomial(GROUP, np.clip(ability_L[:, None] + draw.normal(0, 0.15, (LOOKS, PROMPTS)), 0, 1))
    lucky_LP = draw.binomial(right_LP, (0.15 + now.get("lucky", np.zeros(LOOKS)))[:, None])
    figures = {
        "process/steps": mean(6 + now.get("steps", 0), 1.5, replies),
        "process/tokens_a_step": mean(11 + now.get("tokens", 0), 2, steps),
        "process/tokens_a_step_p95": np.round(mean(14, 4, steps)),
        "process/repeated": draw.binomial(steps, 0.05 + now.get("repeated", np.zeros(LOOKS))) / steps,
        "process/unmatched": draw.binomial(steps, 0.1 + now.get("unmatched", np.zeros(LOOKS))) / steps,
        "process/mean": mean(0.75 + 0.1 * way_L, 0.2, steps),
    }
    figures |= shares("process/outcome", right_LP, np.full_like(right_LP, GROUP))
    figures |= shares("process/lucky", lucky_LP, right_LP)
    return [{"step": look, **{name: float(x[look]) for name, x in figures.items()}} for look in range(LOOKS)]


def shares(name: str, hits_LP: np.ndarray, of_LP: np.ndarray) -> dict[str, np.ndarray]:
    """Of each look, and its standard error where replies to a prompt belong together."""
    share_L = hits_LP.sum(1) / of_LP.sum(1)
    left_LP = hits_LP - share_L[:, None] * of_LP
    error_L = np.sqrt((left_LP**2).sum(1) * PROMPTS / (PROMPTS - 1)) / of_LP.sum(1)
    return {name: share_L, f"{name}_se": error_L}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found_in_all_of_twenty_runs(name: str) -> None:
    for seed in range(20):
        alarms = {alarm.name: alarm for alarm in process_alarms("grpo", rows(seed, **PLANTED[name]))}
        assert name in alarms, seed
        assert alarms[name].step is not None
        assert alarms[name].step > 20  # it turns at look 20
        assert alarms[name].remedy
        assert set(alarms) <= {name, *({"process_hacked"} if name == "process_lucky" else ())}


def test_clean_and_noisy_runs_raise_none() -> None:
    raised = [seed for seed in range(100, 120) if process_alarms("grpo", rows(seed))]
    assert len(raised) <= 1


def test_what_was_not_logged_raises_nothing() -> None:
    assert process_alarms("grpo", [{"step": n, "objective/scores": 1.0} for n in range(10)]) == []
    assert process_alarms("grpo", []) == []


def test_steps_by_hand() -> None:
    counts = [5.0, 5.0, 5.0, 6.4, 6.6, 6.6, 6.4, 6.6, 6.6, 6.6]
    (alarm,) = process_alarms("grpo", [{"step": n, "process/steps": x} for n, x in enumerate(counts)])
    assert (alarm.name, alarm.step, alarm.bound) == ("process_steps", 9, 6.5)  # the third in a row above 5 x 1.3
    fewer = [{"step": n, "process/steps": 5.0 if n < 4 else 3.0} for n in range(8)]
    (alarm,) = process_alarms("grpo", fewer)
    assert (alarm.step, alarm.bound) == (6, 3.5)
    assert "fewer" in alarm.remedy
    assert process_alarms("grpo", fewer, ProcessLimits(steps=0.5)) == []
