"""The displacement alarm: the probability of a fall by counting all signs, which rows ring it, and how often it is
right at other lengths of replies and other numbers of pairs, simulated by numbers of test_alarm_runs.py's trainings."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
import pytest

from keel.eval.alarms import Alarm, Limits, find_alarms
from keel.eval.displacement import GROUPS, chance_of_fall, displacement_row
from keel.eval.grading import ModelEvaluation, evaluate_model
from keel.train.offline import Change, displacement_figures
from keel.types import Completion, Grade, Message, Prompt


@pytest.mark.parametrize(
    "difference",
    [[-1.0, -1.0, -2.0, 0.5, -0.5], [-1.3, -1.3, -1.3, -1.3, 0.0, 0.0, 0.2], [1.0, 0.5, 2.0], [-0.7, 0.7, -0.7, -0.7]],
)
def test_the_chance_of_a_fall_is_the_share_of_signs_that_fall_as_far(difference: list[float]) -> None:
    sums = [
        sum(s * d for s, d in zip(signs, difference, strict=True)) for signs in product((1, -1), repeat=len(difference))
    ]
    exact = float(np.mean(np.array(sums) <= sum(difference) + 1e-9))
    assert chance_of_fall(np.array(difference)) == pytest.approx(exact, abs=0.012)


def test_no_difference_is_no_fall() -> None:
    assert chance_of_fall(np.zeros(9)) == 1.0
    assert chance_of_fall(np.full(40, -0.1)) < 1e-4


class Harm:
    """Grades by the reply's first letter: h does harm."""

    def grade(self, prompts: list[Prompt], completions: list[Completion]) -> list[Grade]:
        return [Grade(0.0 if c.text[0] == "h" else 1.0, {"harmful": c.text[0] == "h"}) for c in completions]


PROMPTS = [Prompt(f"p{i}", (Message("user", f"q{i}"),), "harmful" if i < 30 else "fact") for i in range(60)]


def _model(harmful: int) -> ModelEvaluation:
    replies = [(Completion("harm" if i < harmful else "no", (1, 2)),) for i in range(60)]
    return evaluate_model("m", PROMPTS, replies, Harm())  # type: ignore[arg-type]


def _measured(of_all: float, **kinds: float) -> dict[str, object]:
    return {"steps": 40, "displacement/chosen_per_token": of_all, "displacement/kinds": kinds}


def test_both_must_have_happened_on_the_same_kind_of_prompt() -> None:
    before, after = _model(3), _model(15)  # 12 of 30 more do harm
    alarm = _only(_measured(-0.1, harmful=-0.9, fact=0.2), after, before)
    assert (alarm.name, alarm.stage, alarm.step, alarm.value, alarm.bound) == ("displacement", "dpo", 40, -0.9, -0.5)
    assert "on prompts of kind harmful became less probable, by 0.90 nats a token" in alarm.message
    assert "went from 0.90 to 0.50 (harmful 10% -> 50%)" in alarm.message
    assert alarm.remedy.endswith(".")
    assert _only(_measured(-0.9), after, before).value == -0.9  # the fall is seen over all prompts too
    silent: list[dict[str, object]] = [
        _measured(-0.1, harmful=-0.4, fact=-0.9),  # facts were displaced, and are as good as before
        _measured(0.4, harmful=0.4),
        _measured(-0.1, harmless=-9.0),  # a kind that nobody was asked about
        {"steps": 40, "displacement/chosen_per_token": None, "displacement/kinds": {}},
        {"steps": 40},
    ]
    for measured in silent:
        assert find_alarms("dpo", [displacement_row(measured, after, before)]) == []
    assert find_alarms("dpo", [displacement_row(_measured(-9.0, harmful=-9.0), before, before)]) == []
    assert find_alarms("dpo", [displacement_row(_measured(-9.0, harmful=-9.0), before, after)]) == []


def _only(measured: dict[str, object], after: ModelEvaluation, before: ModelEvaluation) -> Alarm:
    (alarm,) = find_alarms("dpo", [displacement_row(measured, after, before)])
    return alarm


def test_all_kinds_share_the_chance_of_a_false_alarm() -> None:
    before, after = _model(3), _model(10)  # 7 worse, none better: 1 in 128
    row = displacement_row(_measured(-0.9), after, before)
    (group,) = row[GROUPS]  # type: ignore[misc]
    assert group.chance == pytest.approx(2**-7, rel=0.2)
    assert len(find_alarms("dpo", [row])) == 1
    assert find_alarms("dpo", [displacement_row(_measured(-0.9, harmful=-0.9, fact=-0.9), after, before)]) == []
    assert find_alarms("dpo", [row], Limits(displaced_false_alarms=1e-3)) == []
    assert find_alarms("dpo", [row], Limits(displacement=-1.0)) == []


def test_one_token_is_enough_where_the_reply_lost_too() -> None:
    """A refusal of 200 tokens leaves at one of them, which is a hundredth of a nat a token."""
    before, after = _model(3), _model(15)

    def found(sharpest: float | None, change: float = -0.03) -> list[Alarm]:
        measured = _measured(-0.01, harmful=change) | {"displacement/sharpest_kinds": {"harmful": sharpest}}
        return find_alarms("dpo", [displacement_row(measured, after, before)])

    (alarm,) = found(-5.0)
    assert (alarm.value, alarm.bound) == (-5.0, -3.0)
    assert "on prompts of kind harmful became less probable, by 5.00 nats at one token each" in alarm.message
    assert found(-2.9) == found(None) == []
    assert found(-5.0, change=0.01) == []  # more probable as a whole
    assert found(-5.0, change=-0.9)[0].value == -0.9


def test_figures_of_changes_by_hand() -> None:
    changes = [Change("a", -4.0, 10, -3.0), Change("a", 1.0, 5, -0.5), *[Change("b", -1.0, 2, -1.0)] * 8]
    found = displacement_figures(changes)
    assert found["displacement/chosen"] == pytest.approx(-11 / 10)
    assert found["displacement/chosen_per_token"] == pytest.approx(-11 / 31)
    assert found["displacement/kinds"] == {"b": -0.5}
    assert found["displacement/sharpest"] == pytest.approx((-3.5 - 8) / 10)
    assert found["displacement/sharpest_kinds"] == {"b": -1.0}


# -------------------------------------------------------------------------------------------------------- simulated


class Scale(NamedTuple):
    """``tokens`` of a reply, ``pairs`` that are looked at, held-out ``prompts`` of each of two kinds."""

    tokens: int
    pairs: int
    prompts: int


SCALES = (Scale(8, 300, 100), Scale(25, 60, 30), Scale(80, 1000, 100), Scale(400, 1024, 200))
RUNS = 20


def _simulated(scale: Scale, planted: bool, seed: int) -> bool:
    """Whether a training rings the alarm. In every one, chosen replies drift by -0.2 to 0 nats a token, each token by
    0.4 about that. In a planted one those to harmful prompts lose 9 to 16 nats besides (so many the trainings lost), at
    four tokens. The judge's mean of a kind was 0.7; it is 0.3 to 0.85 in a clean one, and 0 to 0.1 of harmful prompts
    in a planted one."""
    rng = np.random.default_rng([seed, planted, *scale])
    changes, grades = [], {"before": [], "after": []}  # type: ignore[var-annotated]
    for kind in ("fact", "harmful"):
        gone = planted and kind == "harmful"
        change_RC = rng.uniform(-0.2, 0.0) + 0.4 * rng.standard_normal((scale.pairs // 2, scale.tokens))
        if gone:
            lost_R4 = rng.dirichlet(np.ones(4), len(change_RC)) * rng.uniform(9, 16)
            change_RC[:, :4] -= lost_R4
        changes += [Change(kind, float(c.sum()), len(c), float(c.min())) for c in change_RC]
        likes = rng.uniform(0.0, 0.1) if gone else rng.uniform(0.3, 0.85)
        for name, rate in (("before", 0.7), ("after", likes)):
            grades[name] += [(kind, float(rng.random() < rate)) for _ in range(scale.prompts)]
    prompts = [Prompt(f"p{i}", (Message("user", f"q{i}"),), kind) for i, (kind, _) in enumerate(grades["before"])]
    models = [
        evaluate_model("m", prompts, [(Completion(f"{score}", (1,)),) for _, score in grades[name]], ByText())  # type: ignore[arg-type]
        for name in ("after", "before")
    ]
    return find_alarms("dpo", [displacement_row({"steps": 1, **displacement_figures(changes)}, *models)]) != []


class ByText:
    def grade(self, prompts: list[Prompt], completions: list[Completion]) -> list[Grade]:
        return [Grade(float(c.text), {}) for c in completions]


@pytest.mark.wide
@pytest.mark.parametrize("scale", SCALES)
def test_twins_ring_it_at_every_scale_and_good_pairs_at_none(scale: Scale) -> None:
    assert sum(_simulated(scale, True, seed) for seed in range(RUNS)) >= RUNS - 2
    assert sum(_simulated(scale, False, seed) for seed in range(RUNS)) <= 1


def test_twins_ring_it_where_replies_are_long() -> None:
    scale = Scale(400, 60, 30)
    assert [_simulated(scale, planted, 0) for planted in (True, False)] == [True, False]
