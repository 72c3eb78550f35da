"""A judge's card: its figures by hand, its regression against plain Newton steps, judges with planted faults found."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from judged import planted

from keel.eval.judge_card import broken, judge_card
from keel.eval.judge_effects import EFFECTS, PRIOR_SD, JudgedPair, fit
from keel.eval.reply_alarms import judge_alarms
from keel.recipe.judge_card import JudgeCard


def pair(prompt: str, first: float, second: float | None, truth: float | None, **more: Any) -> JudgedPair:
    return JudgedPair(prompt, first, second, truth, (10, 10), **more)


def test_agreement_calibration_and_flips_by_hand() -> None:
    """Means .8, .5 (its tie), .3, .65; who knows better says left, left, left with 1/4, nobody of the last."""
    card = judge_card(
        [
            pair("a", 0.9, 0.7, 1.0),
            pair("b", 0.6, 0.4, 1.0),  # turned with the order
            pair("c", 0.2, 0.4, 0.25),
            pair("d", 0.7, 0.6, None),
        ],
        "people",
    )
    assert card.agreement is not None
    assert card.agreement[0] == pytest.approx((1 + 0.5 + 0.75) / 3)
    assert card.flips is not None
    assert card.flips[0] == 1 / 4
    # ways (p, y): (.8, 1) (.2, 0) | (.5, 1) (.5, 0), one bin, no error | (.3, .25) (.7, .75): bins of .8, .2, .3, .7
    assert card.ece == pytest.approx((0.2 + 0.2 + 0 + 0 + 0.05 + 0.05) / 6)
    thirds = 0.25 * 0.7**2 + 0.75 * 0.3**2
    assert card.brier == pytest.approx((0.2**2 + 0.5**2 + thirds) / 3)
    assert (card.pairs, card.known) == (4, 3)


def test_a_judge_of_one_reply_at_a_time_has_no_flips_and_one_without_probabilities_no_calibration() -> None:
    card = judge_card([pair("a", 1.0, None, 1.0), pair("b", 0.0, None, 1.0)], "gold", probabilities=False)
    assert (card.flips, card.ece, card.brier) == (None, None, None)
    assert card.agreement is not None
    assert card.agreement[0] == 0.5


def test_what_all_agree_on_has_an_interval_of_its_prompts_number() -> None:
    """Not of the pairs': ten copies of a pair tell no more than one."""
    few = judge_card([pair("a", 0.9, 0.9, 1.0), pair("b", 0.9, 0.9, 1.0)] * 10, "gold").agreement
    many = judge_card([pair(str(n), 0.9, 0.9, 1.0) for n in range(20)], "gold").agreement
    assert few is not None
    assert many is not None
    assert few[0] == many[0] == 1
    assert few[1] < many[1] < 1


def slow_fit(x: list[list[float]], y: list[float]) -> list[float]:
    """The same likelihood by coordinate-wise Newton steps in plain Python."""
    beta = [0.0] * len(x[0])
    for _ in range(4000):
        for i in range(len(beta)):
            slope, bend = -beta[i] / PRIOR_SD**2, 1 / PRIOR_SD**2
            for row, picked in zip(x, y, strict=True):
                p = 1 / (1 + math.exp(-sum(b * v for b, v in zip(beta, row, strict=True))))
                slope += (picked - p) * row[i]
                bend += p * (1 - p) * row[i] ** 2
            change = slope / bend
            beta[i] += max(-0.5, min(0.5, change))
        if abs(change) < 1e-12:
            break
    return beta


def test_the_regression_is_that_of_a_slow_one() -> None:
    rng = random.Random(0)
    x = [[rng.gauss(0, 1), rng.gauss(0, 1) + 0.2, rng.choice([-0.5, 0.5])] for _ in range(40)]
    y = [float(rng.random() < 1 / (1 + math.exp(-(row[0] - 0.5 * row[1] + row[2])))) for row in x]
    twice = np.array([[1.0] * 40, [2.0, 0.0] * 20])  # a resample too: rows that count twice, and not at all
    found = fit(np.array(x), np.array(y), twice)
    assert found[0] == pytest.approx(slow_fit(x, y), abs=1e-6)
    assert found[1] == pytest.approx(slow_fit(x[0::2] * 2, y[0::2] * 2), abs=1e-6)


def test_the_effect_of_the_side_alone_is_the_difference_of_two_shares() -> None:
    """150 pairs without a known truth: the left reply is picked in 120 when first, in 60 when second."""
    pairs = [pair(str(n), float(n < 120), float(n < 60), None) for n in range(150)]
    card = judge_card(pairs, "people", resamples=400)
    # two shares, 80% and 40%, and one coefficient: logit p = +-b/2, so p(first) = (120 + 90) / 300
    assert card.effects["side"][0] == pytest.approx(2 * 210 / 300 - 1, abs=1e-3)
    assert set(card.untold) == {"length", "own", "logprob"}
    assert "0 pairs have a known truth, of the 100" in card.untold["own"]


def test_it_does_not_matter_which_reply_is_called_left() -> None:
    pairs = planted(0, {"length": 1.0, "side": 0.5}, pairs=120)
    rng = random.Random(1)
    turned = [swapped(one) if rng.random() < 0.5 else one for one in pairs]
    there, back = judge_card(pairs, "gold", resamples=100), judge_card(turned, "gold", resamples=100)
    for name in EFFECTS:
        assert there.effects[name] == pytest.approx(back.effects[name], abs=1e-6)
    assert there.agreement == pytest.approx(back.agreement)
    assert there.ece == pytest.approx(back.ece)


def swapped(one: JudgedPair) -> JudgedPair:
    """The left one shown first is the other one shown second."""
    assert one.p_left_second is not None
    assert one.truth is not None
    assert one.own is not None
    assert one.logprob is not None
    assert one.lead is not None
    return replace(
        one,
        p_left_first=1 - one.p_left_second,
        p_left_second=1 - one.p_left_first,
        truth=1 - one.truth,
        length=one.length[::-1],
        own=one.own[::-1],
        logprob=one.logprob[::-1],
        lead=-one.lead,
    )


@pytest.mark.parametrize("shape", ["lognormal", "penalty"])
def test_a_gold_score_with_heavy_tails_accuses_nobody(shape: str) -> None:
    """A judge that sees which reply is better in nine pairs of ten, and nothing of its length. Better replies are
    longer; gold's unit is its own: a few differences are ten times the others, or they are log-normal."""
    accused = 0
    for seed in range(8):
        rng, pairs = random.Random(seed), []
        for n in range(200):
            side = rng.choice([-1, 1])
            heavy = 10.0 if rng.random() < 0.1 else rng.choice([0.25, 0.5, 0.75, 1])
            size = heavy if shape == "penalty" else math.exp(rng.gauss(0, 1.5))
            p = float((side > 0) == (rng.random() < 0.9))
            length = (400 + round(20 * side + 35 * rng.gauss(0, 1)), 400)
            pairs.append(JudgedPair(f"p{n}", p, p, float(side > 0), length, lead=side * size))
        card = judge_card(pairs, "gold", resamples=200)
        accused += any("longer" in sentence for sentence in broken(card, JudgeCard()))
    assert accused == 0


def test_copies_within_a_prompt_make_the_interval_wider() -> None:
    """Four copies of each pair under one prompt: as wide as without them, and wider than if they were independent."""
    once = planted(3, {}, pairs=120, per_prompt=1, sampled=True)
    copies = [one for one in once for _ in range(4)]
    alone = [replace(one, prompt=f"{one.prompt} {n}") for n, one in enumerate(copies)]
    wide, naive, single = (judge_card(some, "gold", resamples=250) for some in (copies, alone, once))
    for name in EFFECTS:
        assert width(wide.effects[name]) > 1.3 * width(naive.effects[name])
        assert width(wide.effects[name]) == pytest.approx(width(single.effects[name]), rel=0.35)


def width(effect: tuple[float, float, float]) -> float:
    return effect[2] - effect[1]


def test_who_always_takes_the_longer_reply_has_a_finite_effect() -> None:
    """Picks that a column separates have no most likely coefficient; the effect is there all the same."""
    pairs = []
    for n, one in enumerate(planted(5, {}, pairs=120)):
        longer = float(one.length[0] > one.length[1])
        pairs.append(replace(one, p_left_first=longer, p_left_second=longer, length=(one.length[0], 400 + n % 2)))
    card = judge_card(pairs, "gold", resamples=200)
    point, low, high = card.effects["length"]
    assert point > 0.7
    assert 0.5 < low <= high <= 1
    assert [sentence for sentence in broken(card, JudgeCard()) if "longer" in sentence]


@pytest.mark.parametrize(
    ("change", "name", "why"),
    [
        ({"own": (False, False)}, "own", "0 pairs differ in it, of the 30"),
        ({"logprob": None}, "logprob", "it is not known of 120 of 120 pairs"),
        ({"p_left_second": None}, "side", "one reply at a time"),
        ({"prompt": "one"}, "side", "pairs of 1 prompts, of the 20"),
    ],
)
def test_what_cannot_be_told_is_said(change: dict[str, Any], name: str, why: str) -> None:
    card = judge_card([replace(one, **change) for one in planted(0, {}, pairs=120)], "gold", resamples=50)
    assert name not in card.effects
    assert why in card.untold[name]


def test_columns_that_go_together_are_not_told_apart() -> None:
    pairs = [
        replace(one, logprob=(float(one.own[0]), float(one.own[1]))) for one in planted(0, {}, pairs=120) if one.own
    ]
    card = judge_card(pairs, "gold", resamples=50)
    assert card.untold == {"own": "in these pairs it goes with logprob", "logprob": "in these pairs it goes with own"}


def test_one_vote_of_people_a_pair_does_not_tell_what_length_does() -> None:
    """How noisy votes are must be known; else what they miss of a reply's worth would be taken for its length."""
    card = judge_card(planted(0, {}, pairs=120, people=1), "people", resamples=50)
    assert "0 pairs were judged by several people, of the 30" in card.untold["length"]
    assert "side" in card.effects


def test_bounds_are_broken_in_a_sentence_with_figures() -> None:
    card = judge_card([pair(str(n), 0.9, 0.9 if n % 2 else 0.1, float(n % 4 == 0)) for n in range(40)], "gold")
    assert broken(card, JudgeCard(max_flips=0.5, min_agreement=0.1)) == []
    found = broken(card, JudgeCard(min_agreement=0.9, max_ece=0.01))
    assert [sentence.split(" ")[0] for sentence in found] == ["it", "its", "its"]
    assert "turned with the order on 50% (" in found[2]
    assert found[2].endswith("and max_flips is 0.4")
    unknown = judge_card([pair("a", 0.9, 0.9, None)], "people")
    assert broken(unknown, JudgeCard(min_agreement=0.5)) == [
        "nothing is known of how far it agrees with people, who judged none of the pairs, and min_agreement is 0.5"
    ]
    assert [alarm.name for alarm in judge_alarms("annotate", card, 0.1)] == ["order_flips"]


# ------------------------------------------------------------------------------------------- planted judges


BIASES = [("length", 1.5), ("own", 1.25), ("logprob", 1.25), ("side", 1.25)]


@pytest.mark.wide
@pytest.mark.parametrize(("name", "size"), BIASES)
@pytest.mark.parametrize("sampled", [False, True])
def test_planted_biases_are_found(name: str, size: float, sampled: bool) -> None:
    """At 300 pairs of 150 prompts: of 40 judges with one planted fault, 38 or more are found, by that very effect."""
    found = 0
    for seed in range(40):
        card = judge_card(planted(seed, {name: size}, sampled=sampled), "gold", resamples=1000)
        sentences = broken(card, JudgeCard(max_flips=1.0))
        found += any(sentence in sentences[i] for i in range(len(sentences)) for sentence in (WORDS[name],))
    assert found >= 38


WORDS = {"length": "longer", "own": "replies of its own model", "logprob": "likelier", "side": "shown first"}


@pytest.mark.wide
@pytest.mark.parametrize("sampled", [False, True])
def test_clean_judges_are_left_alone(sampled: bool) -> None:
    """Of 20 that go by the truth and chance alone, on pairs where better replies are longer, one at most is refused."""
    alarms = [
        bool(broken(judge_card(planted(seed, {}, sampled=sampled), "gold", resamples=1000), JudgeCard()))
        for seed in range(100, 120)
    ]
    assert sum(alarms) <= 1


@pytest.mark.wide
def test_clean_judges_are_left_alone_by_noisy_people() -> None:
    cards = [
        judge_card(planted(seed, {}, people=2, repeated=0.5), "people", resamples=1000) for seed in range(200, 220)
    ]
    assert sum(bool(broken(card, JudgeCard())) for card in cards) <= 1
