"""The experiments on labelling: what their figures come to, by hand, and the annotators that spoil a project."""

from __future__ import annotations

import random

import numpy as np
import pytest

from bench import active, votes
from bench.harbor import prompt_weights
from keel.harbor.annotators import ADVERSARIAL, LAZY, population, with_bad
from keel.harbor.facts import World
from keel.harbor.prompts import make_prompts
from keel.harbor.replies import read


def test_votes_to_reach_by_hand() -> None:
    rounds = (100, 200, 400)
    assert active.votes_to_reach(rounds, [0.5, 0.6, 0.7], 0.6) == pytest.approx(200)
    assert active.votes_to_reach(rounds, [0.5, 0.6, 0.7], 0.65) == pytest.approx(200 * 2**0.5)  # halfway in logarithms
    assert active.votes_to_reach(rounds, [0.5, 0.6, 0.7], 0.4) == 100
    assert active.votes_to_reach(rounds, [0.5, 0.6, 0.7], 0.71) == float("inf")


def point(count: int, right: list[int]) -> active.Point:
    return active.Point(count, np.array(right, dtype=float), 0.5)


def test_what_active_choice_comes_to_by_hand() -> None:
    """Ten prompts of one pair each; both seeds say the same, so every resample that reaches it does so alike."""
    plan = active.Plan((100, 200, 400), 1)
    half, all_right = [1, 0] * 5, [1] * 10
    curves = {
        "random": [point(100, [0] * 10), point(200, half), point(400, all_right)],
        "active": [point(100, [0] * 10), point(200, all_right), point(400, all_right)],
    }
    prompts = [f"p{i}" for i in range(10)]
    found = active.summarise(plan, {0: curves, 1: curves}, {0: prompts, 1: prompts})
    assert found["active_votes"] == pytest.approx(200)
    assert found["active_votes_interval"] == pytest.approx([200, 200])
    assert found["accuracy"] == {"random": [0.0, 0.5, 1.0], "active": [0.0, 1.0, 1.0]}
    worse = curves | {"active": [*curves["random"][:2], point(400, half)]}
    never = active.summarise(plan, {0: worse}, {0: prompts})
    assert never["active_votes"] is None
    assert never["active_votes_interval"] == [None, None]
    result = {"seeds": [0], "members": 1, "quick": False, "cores": 2, "seconds": 60.0, "summary": never}
    page = active.markdown(result | {"curves": {}})
    assert "needs more than 400 votes (95% interval more to more" in page


def test_prompts_are_drawn_whole() -> None:
    weights = prompt_weights(["a", "b", "a", "c", "b"], np.random.default_rng(0))
    assert weights[0] == weights[2]
    assert weights[1] == weights[4]
    assert weights[0] + weights[1] + weights[3] == 3  # three prompts drawn


def test_what_weighting_recovers_by_hand() -> None:
    hits = {"clean": [1] * 10, "raw": [1] * 6 + [0] * 4, "majority": [1] * 7 + [0] * 3, "weighted": [1] * 9 + [0]}
    one = {
        "hits": {way: np.array(right, dtype=float) for way, right in hits.items()},
        "gold": dict.fromkeys(hits, 0.5),
        "prompts": [f"p{i}" for i in range(10)],
        "named": ["lazy01", "a03"],
        "bad": ["lazy01", "adversarial01"],
    }
    found = votes.summarise({0: one, 1: one | {"named": ["lazy01"]}})
    assert found["lost"] == pytest.approx(0.4)
    assert found["recovered"] == pytest.approx({"majority": 0.25, "weighted": 0.75})
    low, high = found["recovered_interval"]["weighted"]
    assert low < 0.75 < high <= 1
    assert (found["named"], found["precision"], found["recall"]) == (3, pytest.approx(2 / 3), 0.5)


def test_a_fifth_of_the_annotators_spoil_it() -> None:
    people = with_bad(0)
    honest = {annotator.name: annotator for annotator in population(0)}
    bad = [annotator for annotator in people if annotator.name not in honest]
    assert len(bad) / len(people) == 0.2
    assert [a.name for a in people[: len(honest)]] == list(honest)
    world, rng = World(), random.Random(0)
    prompts = make_prompts(world, 60, 3, "train")
    good, poor = "I do not know that.", "zzz zzz zzz zzz zzz zzz zzz zzz"
    assert read(good, prompts[0].messages[-1].content) != read(poor, prompts[0].messages[-1].content)
    sides = {a.name: [a.judge(p, good, poor, rng).choice for p in prompts] for a in people}
    for name, said in sides.items():
        left = said.count("left") / len(said)
        if name.startswith(LAZY):
            assert 0.3 < left < 0.7
            assert "tie" not in said
        elif name.startswith(ADVERSARIAL):
            assert left < 0.3
        else:
            assert left > 0.6
