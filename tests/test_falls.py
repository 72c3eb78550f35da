"""The over-optimisation alarm against simulated runs whose truth is known: how often it fires over a whole run where
gold never falls, and how often it sees a fall that is there.

A look is a batch of prompts: its mean and the standard error over the prompts, both computed here from draws. Where
``wobble`` is given, the truth itself moves about its curve as an AR(1) process, as the means of consecutive batches of
a noisy policy do, and the standard errors know nothing of it.
"""

from __future__ import annotations

import numpy as np
import pytest

from keel.eval.alarms import Limits
from keel.eval.falls import largest_fall

RUNS = 300
LEVEL = Limits().gold_false_alarms
NO_FALL = {
    "flat": lambda x: 0 * x,
    "rising": lambda x: x,
    "saturating": lambda x: 1 - np.exp(-8 * x),
    "step": lambda x: (x > 0.2) * 1.0,
}


def _looks(
    rng: np.random.Generator, truth_n: np.ndarray, error: float, prompts: int, tail: str, wobble: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Means and their standard errors [RUNS, n] over ``prompts`` draws a look."""
    shape = (RUNS, len(truth_n), prompts)
    draws = {
        "normal": lambda: rng.standard_normal(shape),
        "heavy": lambda: rng.standard_t(3, shape) / 3**0.5,
        "left": lambda: 1 - rng.exponential(1, shape),
    }[tail]() * (error * prompts**0.5)  # fmt: skip
    size, alike = wobble
    walk = rng.standard_normal((RUNS, len(truth_n)))
    for look in range(1, len(truth_n)):
        walk[:, look] = alike * walk[:, look - 1] + (1 - alike**2) ** 0.5 * walk[:, look]
    means = truth_n + draws.mean(2) + size * error * walk
    return means, draws.std(2, ddof=1) / prompts**0.5


def _share(means: np.ndarray, errors: np.ndarray) -> float:
    proxy = np.arange(means.shape[1])
    return float(np.mean([largest_fall(m, e, proxy, LEVEL) is not None for m, e in zip(means, errors, strict=True)]))


@pytest.mark.parametrize(("tail", "prompts", "wobble"), [
    ("normal", 32, (0.0, 0.0)), ("heavy", 16, (0.0, 0.0)), ("left", 8, (0.0, 0.0)),
    ("normal", 32, (0.5, 0.5)), ("normal", 32, (0.5, 0.7)), ("heavy", 16, (0.7, 0.5)),
])  # fmt: skip
def test_a_run_that_never_falls_raises_no_alarm(tail: str, prompts: int, wobble: tuple[float, float]) -> None:
    """5% is the promise; at a true rate of 8% one of these would be seen above it as good as surely."""
    for number, (shape, n) in enumerate([*((shape, 24) for shape in NO_FALL), ("flat", 10), ("flat", 60)]):
        truth_n = NO_FALL[shape](np.linspace(0, 1, n))
        rng = np.random.default_rng(number)
        assert _share(*_looks(rng, truth_n, 0.15, prompts, tail, wobble)) <= 0.05, (shape, n)


def _risen_and_fallen(n: int, fall: float, peak: float) -> np.ndarray:
    """From 0 to 1 at ``peak`` of the run, then ``fall`` down to its end."""
    x = np.linspace(0, 1, n)
    return np.where(x < peak, x / peak, 1 - fall * (x - peak) / (1 - peak))


@pytest.mark.parametrize(("n", "fall", "peak", "error", "seen"), [
    (10, 1.0, 0.5, 0.1, 0.75), (20, 1.0, 0.5, 0.2, 0.85), (32, 1.0, 0.5, 0.2, 0.95), (60, 1.0, 0.5, 0.2, 0.99),
    (20, 0.5, 0.5, 0.1, 0.75), (32, 0.5, 0.5, 0.1, 0.9), (60, 0.5, 0.5, 0.2, 0.6),
    (20, 0.25, 0.5, 0.05, 0.5), (32, 0.25, 0.5, 0.05, 0.7), (60, 0.25, 0.5, 0.1, 0.4),
    (20, 1.0, 0.8, 0.2, 0.7), (32, 1.0, 0.8, 0.2, 0.85), (60, 0.5, 0.8, 0.1, 0.95),
])  # fmt: skip
def test_a_fall_is_seen(n: int, fall: float, peak: float, error: float, seen: float) -> None:
    """Rates that the docs state (docs/statistics.md), less what 300 runs may differ by."""
    truth_n = _risen_and_fallen(n, fall, peak)
    assert _share(*_looks(np.random.default_rng(n), truth_n, error, 32, "normal", (0.0, 0.0))) >= seen - 0.06


def test_where_and_how_far_it_fell() -> None:
    gold = [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    found = largest_fall(gold, [0.05] * 8, range(8), LEVEL)
    assert found is not None
    assert (found.begin, found.end, found.last) == (2, 6, 6)
    assert (found.before, found.after) == (1.0, 0.25)
    assert found.after < found.bound < found.before


def test_what_is_no_over_optimisation() -> None:
    fallen = [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    assert largest_fall(fallen, [0.05] * 8, [0.0] * 8, LEVEL) is None  # the proxy did not rise: no exploit
    assert largest_fall(fallen, [2.0] * 8, range(8), LEVEL) is None  # within the noise
    assert largest_fall(fallen[3:], [0.01] * 5, range(5), LEVEL) is None  # too few looks
    assert largest_fall([1.0] * 9, [0.0] * 9, range(9), LEVEL) is None  # a judge without spread
    assert largest_fall(fallen, [0.0] * 8, range(8), LEVEL) is not None


def test_many_looks_are_taken_together() -> None:
    """A fall at look 900 of 1000 is found there; noise of as many looks is not."""
    rng = np.random.default_rng(0)
    truth = np.where(np.arange(1000) < 900, 1.0, 0.0)
    found = largest_fall(truth + 0.3 * rng.standard_normal(1000), [0.3] * 1000, range(1000), LEVEL)
    assert found is not None
    assert found.last >= 850
    assert found.end <= 910
    assert largest_fall(0.3 * rng.standard_normal(1000), [0.3] * 1000, range(1000), LEVEL) is None
