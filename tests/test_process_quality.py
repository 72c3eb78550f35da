"""Figures of process reward models, each against numbers worked out by hand or counted the slow way."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest

from keel.eval.process_quality import (
    Candidate,
    Judged,
    aggregate_accuracies,
    best_of_n,
    chosen_aggregate,
    first_error,
    first_error_f1,
    found_error,
    harmonic,
    pair_accuracy,
    process_quality,
    step_auc,
)


def test_the_first_error_of_labels_and_of_scores() -> None:
    assert first_error((1.0, 1.0), 0.5) == -1
    assert first_error((1.0, 0.5, 0.0), 0.5) == 1
    assert first_error((1.0, 0.25, 0.0), 0.0) == 2, "with a bound of 0 a step that ever came out right is right"
    assert first_error((0.0, None), 0.5) == 0, "what comes behind an error is nobody's business"
    assert first_error((1.0, None, 0.0), 0.5) is None
    assert first_error((1.0, None), 0.5) is None
    assert found_error((0.9, 0.4, 0.1), 0.5) == 1
    assert found_error((0.9, 0.5), 0.5) == -1


def test_processbenchs_f1_by_hand() -> None:
    """Two wrong replies, one whose first error is found exactly and one in which a right step is taken for it: 1/2.
    Three right ones, of which two pass: 2/3. F1 = 2 (1/2) (2/3) / (7/6) = 4/7."""
    replies = [
        Judged((0.9, 0.2, 0.9), (1.0, 0.0, None), "a"),
        Judged((0.3, 0.2), (1.0, 0.0), "a"),
        Judged((0.9, 0.8), (1.0, 1.0), "a"),
        Judged((0.9,), (1.0,), "a"),
        Judged((0.9, 0.4), (1.0, 1.0), "a"),
        Judged((0.0, 0.0), (1.0, None), "a"),  # open: not counted
    ]
    found = first_error_f1(replies, 0.5)  # one problem: there is no half to choose a threshold on
    assert found == {
        "error": 0.5,
        "correct": pytest.approx(2 / 3),
        "f1": [pytest.approx(4 / 7), None, None],
        "bound": 0.5,
        "chosen_on": 0,
        "replies": 5,
    }
    assert harmonic(0.0, 0.0) == 0.0
    assert first_error_f1(replies[:2], 0.5) is None
    assert first_error_f1([], 0.5) is None


def test_the_threshold_is_chosen_on_other_problems_than_it_is_measured_on() -> None:
    """All scores are low, and the wrong ones lower: a threshold between 0.1 and 0.2 finds every error, 0.5 none."""
    replies = [Judged((0.2, 0.1 if wrong else 0.2), (1.0, float(not wrong)), p) for p in range(20) for wrong in (0, 1)]
    found = first_error_f1(replies, 0.5)
    assert found is not None
    assert 0.1 < found["bound"] <= 0.2
    assert (found["chosen_on"], found["replies"]) == (20, 20)
    assert found["f1"] == [1.0, 1.0, 1.0]
    # What the other half says has no say: there the best threshold would be another.
    measured = [Judged((0.2, 0.1 if wrong else 0.2), (1.0, float(not wrong)), p) for p in range(40) for wrong in (0, 1)]
    chosen = first_error_f1(measured, 0.5, seed=3)
    assert chosen is not None
    assert chosen["bound"] == found["bound"]


def test_step_auc_counts_pairs_of_steps() -> None:
    rng = Random(0)
    replies = [
        Judged(
            tuple(rng.choice((0.1, 0.2, 0.5, 0.9)) for _ in range(4)), (1.0, 0.75, None, float(rng.random() < 0.5)), p
        )
        for p in range(8)
    ]
    steps = [(s, y > 0.5) for one in replies for s, y in zip(one.scores, one.labels, strict=True) if y is not None]
    good, bad = [s for s, right in steps if right], [s for s, right in steps if not right]
    assert bad
    slow = sum((g > b) + 0.5 * (g == b) for g in good for b in bad) / (len(good) * len(bad))
    found = step_auc(replies, 0.5)
    assert found is not None
    estimate, low, high = found
    assert estimate == pytest.approx(slow)
    assert low is not None and high is not None  # noqa: PT018
    assert low < slow < high
    assert step_auc([Judged((0.9, 0.1), (1.0, 0.0), 0)], 0.5) == [1.0, None, None]
    assert step_auc([Judged((0.9, 0.1), (1.0, 1.0), 0)], 0.5) is None


def test_pair_accuracy_is_within_problems() -> None:
    assert pair_accuracy([[(0.9, True), (0.1, False)], [(0.1, True), (0.9, False), (0.1, False)]]) == (1 + 0.25) / 2
    assert pair_accuracy([[(0.9, True)], [(0.1, False)]]) is None


def slow_best(replies: list[Candidate], n: int, way: str) -> float:
    """The mean over all choices of n replies."""
    found = []
    for chosen in combinations(replies, n):
        if way == "score":
            top = [one for one in chosen if one.score == max(c.score for c in chosen)]
            found.append(sum(one.right for one in top) / len(top))
        else:
            found.append(float(any(one.right for one in chosen)))
    return sum(found) / len(found)


def test_best_of_n_is_the_mean_over_all_choices() -> None:
    rng = Random(1)
    problems = [
        [Candidate(rng.choice((0.1, 0.4, 0.8)), rng.choice("ab"), rng.random() < 0.4) for _ in range(5)]
        for _ in range(6)
    ]
    curve = best_of_n([*problems, problems[0][:1]])
    assert curve is not None
    assert [(row["n"], row["problems"]) for row in curve] == [(1, 6), (2, 6), (4, 6)]
    for row in curve:
        for way in ("score", "oracle"):
            slow = sum(slow_best(replies, row["n"], way) for replies in problems) / 6
            assert row[way][0] == pytest.approx(slow)
            assert row[way][1] <= slow <= row[way][2]
        assert row["first"] == curve[0]["score"], "one reply is the best of one"


def test_the_majority_by_hand() -> None:
    """Four of a kind of wrong answer, of which two are unreadable: 'b' and 'a' draw, so half is right."""
    replies = [
        Candidate(0.9, "a", True),
        Candidate(0.1, "b", False),
        Candidate(0.1, None, False),
        Candidate(0, None, False),
    ]
    curve = best_of_n([replies])
    assert curve is not None
    assert [row["majority"][0] for row in curve][-1] == 0.5
    assert curve[-1]["score"] == [1.0, None, None]
    unknown = best_of_n([[Candidate(0.9, None, True), Candidate(0.1, None, False)]])
    assert unknown is not None
    assert unknown[0]["majority"] is None
    assert best_of_n([[Candidate(0.9, "a", True)]]) is None
    assert best_of_n([]) is None


def test_an_aggregate_is_not_measured_on_what_it_was_chosen_on() -> None:
    """Noise: of four aggregates the best by chance looks better than the others where it was chosen. No score knows
    which of two replies is right, so one of them is right in half of the problems, however it is chosen."""
    rng, found, same = Random(0), [], []
    for seed in range(40):
        replies = [
            Judged(tuple(rng.random() for _ in range(3)), (None,) * 3, problem, bool(right))
            for problem in range(16)
            for right in (0, 1)
        ]
        accuracies = aggregate_accuracies(replies)
        same.append(process_quality(replies, chosen_aggregate(accuracies), 0.5)["best_of_n"][-1]["score"][0])
        assert same[-1] == max(accuracies.values())
        found.append(process_quality(replies, None, 0.5, seed)["best_of_n"][-1]["score"][0])
    assert sum(same) / 40 > 0.57, "chosen and measured on the same"
    assert abs(sum(found) / 40 - 0.5) < 0.045  # 640 problems: two standard errors are 0.04


def test_each_half_is_scored_as_the_other_chooses() -> None:
    """Whichever two of four problems are a half: in all of them the last step alone tells the right reply."""
    replies = [
        Judged((p, q), (None, None), problem, right)
        for problem in "abcd"
        for p, q, right in ((0.1, 0.8, True), (0.9, 0.2, False))
    ]
    assert chosen_aggregate(aggregate_accuracies(replies)) == "last"
    assert process_quality(replies, None, 0.5)["best_of_n"][-1]["score"][0] == 1.0
    assert process_quality(replies, "min", 0.5)["best_of_n"][-1]["score"][0] == 0.0
    one = process_quality(replies[:2], None, 0.5)["best_of_n"]
    assert one[-1]["score"][0] == 0.0, "of one problem nothing else can choose: it is min, unchosen"
