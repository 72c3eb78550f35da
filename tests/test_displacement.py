"""The displacement alarm: the probability of a fall by counting all signs, and which rows ring it."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from keel.eval.alarms import Alarm, Limits, find_alarms
from keel.eval.displacement import GROUPS, chance_of_fall, displacement_row
from keel.eval.grading import ModelEvaluation, evaluate_model
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
    for measured in (
        _measured(-0.1, harmful=-0.4, fact=-0.9),  # facts were displaced, and are as good as before
        _measured(0.4, harmful=0.4),
        _measured(-0.1, harmless=-9.0),  # a kind that nobody was asked about
        {"steps": 40, "displacement/chosen_per_token": None, "displacement/kinds": {}},
        {"steps": 40},
    ):
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
