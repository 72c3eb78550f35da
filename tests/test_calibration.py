"""Calibration figures against hand-computed values and simulations whose truth is known."""

from __future__ import annotations

import math
import random
from statistics import stdev

import pytest

from keel.eval.calibration import Bin, both_ways, ece, reliability, temperature
from keel.eval.reward_quality import reward_quality
from keel.eval.winrate import win_rate
from keel.stats import ceiling_bounds, clustered_error, noise_ceiling, proportion, sigmoid
from keel.types import Message, Preference, Prompt


def test_reliability_by_hand() -> None:
    # 0.10 and 0.15 share the bin [0.1, 0.2); 0.9 and 1.0 the last one, which includes 1.
    curve = reliability([0.10, 0.15, 0.9, 1.0], [0, 1, 1, 0.5])
    assert curve == [Bin(pytest.approx(0.125), 0.5, 2), Bin(pytest.approx(0.95), 0.75, 2)]


def test_ece_by_hand() -> None:
    # Half the weight is 0.375 off the diagonal, half 0.2.
    assert ece([0.10, 0.15, 0.9, 1.0], [0, 1, 1, 0.5]) == pytest.approx(0.5 * 0.375 + 0.5 * 0.2)
    assert ece([0.75] * 4, [1, 1, 1, 0]) == 0.0
    assert ece([1.0, 0.0], [0, 1]) == 1.0


def test_probabilities_outside_their_range_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"\[0, 1\]"):
        ece([1.2], [1])


def test_pairs_seen_both_ways() -> None:
    """Stored pairs have outcome 1 always: only both ways does a calibrated model look calibrated, and a pair written
    the other way round look the same."""
    rng = random.Random(0)
    p_better = [rng.uniform(0.5, 1) for _ in range(20_000)]
    as_chosen = [p if rng.random() < p else 1 - p for p in p_better]  # the model's P(chosen beats rejected)
    ones = [1.0] * len(as_chosen)
    assert ece(as_chosen, ones) > 0.2
    assert ece(*both_ways(as_chosen, ones)) < 0.02
    assert both_ways([0.7, 0.5], [1, 0.5]) == (pytest.approx([0.7, 0.5, 0.3, 0.5]), [1, 0.5, 0, 0.5])
    some = [1 - p if i % 2 else p for i, p in enumerate(as_chosen)]
    other = [0.0 if i % 2 else 1.0 for i in range(len(as_chosen))]
    assert ece(*both_ways(some, other)) == pytest.approx(ece(*both_ways(as_chosen, ones)))


def test_the_temperature_of_a_model_that_is_twice_as_sure_as_it_may_be() -> None:
    rng = random.Random(3)
    odds = [rng.gauss(0, 1.5) for _ in range(20_000)]
    leads = [2 * d if rng.random() < sigmoid(d) else -2 * d for d in odds]  # of the reply that was chosen
    assert temperature(leads) == pytest.approx(2.0, rel=0.05)
    assert temperature([lead / 8 for lead in leads]) == pytest.approx(0.25, rel=0.05)
    assert temperature([1.0, 2.0]) == pytest.approx(0.01)  # always right: as sure as can be, and no further


def test_ece_of_a_calibrated_model_is_the_noise_and_an_overconfident_one_is_found() -> None:
    rng = random.Random(1)
    truth = [rng.random() for _ in range(20_000)]
    outcomes = [float(rng.random() < p) for p in truth]
    expected = math.sqrt(2 / math.pi) * math.sqrt(1 / 6 * 10 / len(truth))  # E[p(1 - p)] = 1/6 for uniform p
    assert ece(truth, outcomes) == pytest.approx(expected, rel=0.6)
    logits = [math.log(p / (1 - p)) for p in truth]
    overconfident = [1 / (1 + math.exp(-3 * x)) for x in logits]
    # The distance itself, by numerical integration over p.
    grid = [(i + 0.5) / 1000 for i in range(1000)]
    distance = sum(abs(1 / (1 + math.exp(-3 * math.log(p / (1 - p)))) - p) for p in grid) / 1000
    assert ece(overconfident, outcomes) == pytest.approx(distance, abs=0.01)


def test_noise_ceiling_by_hand_and_by_simulation() -> None:
    assert noise_ceiling([0.9, 0.2, 0.5]) == pytest.approx((0.9 + 0.8 + 0.5) / 3)
    rng = random.Random(2)
    q = [rng.random() for _ in range(20_000)]
    # The all-knowing judge against one noisy label a pair; and two annotators against each other.
    right = sum((p > 0.5) == (rng.random() < p) for p in q) / len(q)
    agree = sum((rng.random() < p) == (rng.random() < p) for p in q) / len(q)
    assert noise_ceiling(q) == pytest.approx(right, abs=0.01)
    low, high = ceiling_bounds(agree)
    best = noise_ceiling(q)
    assert best is not None
    assert low < best < high


def test_ceiling_bounds_are_reached() -> None:
    # All pairs equally hard: q = 0.8, agreement 0.68, ceiling 0.8. Half certain, half coins: both are 0.75.
    assert ceiling_bounds(0.68)[1] == pytest.approx(0.8) == noise_ceiling([0.8, 0.2])
    assert ceiling_bounds(0.75)[0] == noise_ceiling([1.0, 0.5])
    assert ceiling_bounds(0.4) == (0.5, 0.5)
    assert ceiling_bounds(1.0) == (1.0, 1.0)


def test_a_proportion_has_wilsons_interval() -> None:
    # The roots of (p_hat - p)^2 = z^2 p (1 - p) / n, the interval's definition, put back into it.
    n, right = 40, 31
    found = proportion([True] * right + [False] * (n - right))
    assert (found.point, found.count) == (right / n, n)
    for p in (found.low, found.high):
        assert (right / n - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, rel=1e-5)
    assert proportion([True] * 10).high == 1.0
    assert 0.6 < proportion([True] * 10).low < 0.8


def test_a_proportions_interval_covers_the_truth() -> None:
    rng = random.Random(3)
    covered = 0
    for _ in range(1000):
        found = proportion([rng.random() < 0.9 for _ in range(30)])
        covered += found.low <= 0.9 <= found.high
    assert 0.92 <= covered / 1000 <= 0.98


def test_a_clustered_error_by_hand_and_against_the_truth() -> None:
    # Two groups with sums of distances from the mean 1/2 of 1 and -1: sqrt(2 * 2 / 1) / 4.
    assert clustered_error([1, 1, 0, 0], "aabb") == pytest.approx(math.sqrt(2 * 2) / 4)
    values = [0.3, 1.1, -0.4, 2.0]
    assert clustered_error(values, range(4)) == pytest.approx(stdev(values) / 2)
    assert clustered_error([1.0, 2.0], "aa") is None
    # 25 prompts of 8 replies: the spread of many such means, and what one of them says of it.
    rng, means, errors = random.Random(4), [], []
    for _ in range(400):
        drawn = [prompt + rng.gauss(0, 1) for prompt in [rng.gauss(0, 1) for _ in range(25)] for _ in range(8)]
        means.append(sum(drawn) / 200)
        errors.append(clustered_error(drawn, [i // 8 for i in range(200)]))
    assert stdev(means) == pytest.approx(math.sqrt((1 + 1 / 8) / 25), rel=0.1)
    assert sum(errors) / 400 == pytest.approx(math.sqrt((1 + 1 / 8) / 25), rel=0.05)


def test_a_share_over_groups_knows_as_much_as_they_do() -> None:
    """Trials that are copies of each other are one."""
    right = [True] * 15 + [False] * 5
    once, copied = proportion(right), proportion([hit for hit in right for _ in range(6)], [i // 6 for i in range(120)])
    assert (copied.point, copied.count) == (0.75, 120)
    # The clustered variance has G / (G - 1) in it: 19 trials' worth, a little wider than 20.
    assert copied.low == pytest.approx(once.low, abs=0.01)
    assert copied.high == pytest.approx(once.high, abs=0.01)
    assert proportion([True] * 120, [i // 6 for i in range(120)]).low == proportion([True] * 20).low
    assert proportion(right, range(20)).low == pytest.approx(once.low, abs=0.01)


def test_a_reward_models_figures_over_votes_of_few_prompts() -> None:
    """Two prompts of three votes each, one right and one wrong throughout, and a pair that the model cannot tell."""

    def vote(n: int, asked: str) -> Preference:
        return Preference(f"v{n}", Prompt(asked, (Message("user", asked),)), "yes", "no", annotator="ann")

    rows = [(vote(n, "a"), 1.0, 9, 3) for n in range(3)] + [(vote(n, "b"), -1.0, 3, 9) for n in range(3, 6)]
    found = reward_quality(rows, {}, None, 0)
    assert found["accuracy"] == 0.5
    assert found["accuracy_se"] == pytest.approx(0.5)  # of two prompts, not sqrt(1/4 / 6) = 0.2 of six votes
    (ann,) = found["annotators"]
    assert (ann["low"], ann["high"]) == (pytest.approx(proportion([True, False]).low, abs=0.1), pytest.approx(
        proportion([True, False]).high, abs=0.1))  # fmt: skip
    assert found["prefers_longer"] == 1.0
    tied = reward_quality([(vote(0, "a"), 0.0, 9, 3)], {"v0": 0.9}, None, 0)
    halves = ("accuracy", "prefers_longer", "accuracy_on_truth", "expected_accuracy")
    assert [tied[name] for name in halves] == [0.5] * 4  # a toss of a coin, whatever the side


def test_win_rate_is_the_same_accuracy() -> None:
    chosen, rejected = [1.0, 0.2, 0.7, 0.9], [0.5, 0.4, 0.1, 0.3]
    assert win_rate(chosen, rejected).point == proportion([a > b for a, b in zip(chosen, rejected, strict=True)]).point
