"""What the scores of steps make as a reward, and what advantages tokens get of it: numbers worked out by hand, a slow
plain reference, identities."""

from __future__ import annotations

import math
import random

import pytest
import torch

from keel.objective.group import group_advantages
from keel.objective.policy import StepValues
from keel.objective.traces import trace_advantages
from keel.reward.process_forms import earned

# ------------------------------------------------------------------------------------------------------------ forms


def test_each_form_by_hand() -> None:
    p = [0.9, 0.5, 0.7]
    reply, steps = earned("progress", p, start=0.25)
    assert reply == 0
    assert steps == pytest.approx((0.65, -0.4, 0.2))
    assert earned("sum", p) == (0.0, (0.9, 0.5, 0.7))
    # of two: (0.9 e^-2 + 0.5) / (e^-2 + 1); of three, with the weights 0.0900306, 0.6652410, 0.2447285
    _, lowest = earned("min", p, temperature=0.2)
    assert lowest == pytest.approx((0.9, 0.547681 - 0.9, 0.584958 - 0.547681), abs=1e-6)
    assert earned("gated", p, 2.0, bound=0.5) == (2.0, ())
    assert earned("gated", p, 2.0, bound=0.51) == (0.0, ())


def test_a_wrong_step_pays_with_no_outcome() -> None:
    """Nor does a wrong answer with right steps come to less than one with wrong steps."""
    right, wrong = [0.9, 0.8], [0.9, 0.1]
    for outcome, of_wrong in ((1.0, -1.0), (-1.0, -1.0), (0.0, -1.0), (0.7, 0.0), (-2.5, 0.0), (1.0, 0.5)):
        through = earned("gated", right, outcome, wrong=of_wrong).reply
        shut = earned("gated", wrong, outcome, wrong=of_wrong).reply
        assert through == outcome
        assert shut <= min(outcome, of_wrong, 0.0)
    assert earned("gated", wrong, 0.0, wrong=-1.0).reply == -1.0  # else a gate that says 0 for right changes nothing


def test_without_a_step_nothing_is_earned() -> None:
    for form in ("min", "sum"):
        assert earned(form, []) == (0.0, ())
    assert earned("gated", [], 1.0) == (0.0, ())


def test_progress_pays_no_less_for_a_try_than_for_none() -> None:
    """However low its steps are scored: p_K - p_0 is at least what a reply without a step has."""
    assert earned("progress", [], start=0.5) == (0.0, (-0.5,))
    assert math.fsum(earned("progress", [0.3, 0.1], start=0.5).steps) > math.fsum(earned("progress", []).steps)


def test_a_groups_baseline_takes_the_start_out() -> None:
    """One reply has nothing to score: whatever p_0 is, all learn the same, and it comes out lowest."""

    def advantages(start: float) -> list[float]:
        scores = [[], [0.2], [0.3, 0.4]]
        values = [earned("progress", p, start=start).steps for p in scores]
        steps = StepValues(torch.tensor([v for row in values for v in row]), torch.tensor([1, 4, 6, 8]))
        return trace_advantages(torch.zeros(3), steps, torch.tensor([0, 2, 5, 9]), 3, "returns", "none").tolist()

    assert advantages(0.5) == pytest.approx(advantages(0.0), abs=1e-6)
    assert advantages(0.5) == pytest.approx(advantages(1.0), abs=1e-6)
    assert min(advantages(0.5)) == advantages(0.5)[0]


def test_progress_telescopes_and_the_lowest_is_the_limit() -> None:
    draw = random.Random(0)
    for _ in range(50):
        p = [draw.random() for _ in range(draw.randint(1, 12))]
        assert math.fsum(earned("progress", p, start=0.3).steps) == pytest.approx(p[-1] - 0.3)
        assert math.fsum(earned("min", p, temperature=1e-6).steps) == pytest.approx(min(p), abs=1e-6)
        assert math.fsum(earned("min", p, temperature=1e9).steps) == pytest.approx(math.fsum(p) / len(p))
        weights = [math.exp(-x / 0.1) for x in p]  # PURE's return
        pure = math.fsum(w * x for w, x in zip(weights, p, strict=True)) / math.fsum(weights)
        assert math.fsum(earned("min", p).steps) == pytest.approx(pure)


def test_a_true_step_said_again_pays_in_sum_alone() -> None:
    """A judge that has seen a true step says of its repetition what it said of it."""
    once, twice = [0.9, 0.95, 0.4], [0.9, 0.95, 0.95, 0.4]

    def total(form: str, p: list[float]) -> float:
        return math.fsum(earned(form, p, temperature=1e-3).steps)  # type: ignore[arg-type]

    assert total("progress", twice) == pytest.approx(total("progress", once))
    assert total("min", twice) == pytest.approx(total("min", once))
    assert total("sum", twice) - total("sum", once) == pytest.approx(0.95)
    # nor is it paid where it stands, at the cost of steps before it
    assert earned("min", [0.9, 0.9, 0.9, 0.9]).steps == pytest.approx((0.9, 0, 0, 0))
    assert earned("progress", [0.9, 0.9, 0.9, 0.9], start=0).steps == pytest.approx((0.9, 0, 0, 0))


# ------------------------------------------------------------------------------------------------------- advantages


def test_advantages_by_hand() -> None:
    # Two steps of two tokens with the scores .8 and .6; one of two tokens with .4.
    offsets, none = torch.tensor([0, 4, 6]), torch.zeros(2)
    places = torch.tensor([1, 3, 5])
    progress = StepValues(torch.tensor([0.3, -0.2, -0.1]), places)
    # p_0 is the mean of .6 and .4: .1 .1 -.2 -.2 | -.1 -.1, less their mean -1/15
    found = trace_advantages(none, progress, offsets, 2, "returns", "none")
    assert found.tolist() == pytest.approx([1 / 6, 1 / 6, -2 / 15, -2 / 15, -1 / 30, -1 / 30], abs=1e-6)
    # 1.8 on six tokens: .3 a token, .6 a step
    found = trace_advantages(none, StepValues(torch.tensor([0.8, 0.6, 0.4]), places), offsets, 2, "tokens", "none")
    assert found.tolist() == pytest.approx([0.2, 0.2, 0.0, 0.0, -0.2, -0.2], abs=1e-6)
    # an outcome of 1 against 0 beside that, and both over the tokens' deviation from 0, times sqrt(2)
    whole = trace_advantages(torch.tensor([1.0, 0.0]), progress, offsets, 2, "returns", "group")
    plain = [1 / 6 + 0.5, 1 / 6 + 0.5, -2 / 15 + 0.5, -2 / 15 + 0.5, -1 / 30 - 0.5, -1 / 30 - 0.5]
    scale = math.sqrt(2 * math.fsum(x * x for x in plain) / 6) + 1e-4
    assert whole.tolist() == pytest.approx([x / scale for x in plain], abs=1e-5)


def test_one_step_a_reply_is_grpo() -> None:
    """Of equal lengths, where what a reply is worth is what its one step is."""
    torch.manual_seed(0)
    score_N, offsets = torch.rand(8), torch.arange(9) * 3
    steps = StepValues(score_N, offsets[1:] - 1)
    for against in ("returns", "tokens"):
        for baseline in ("group", "others"):
            for scale in ("group", "none"):
                found = trace_advantages(torch.zeros(8), steps, offsets, 4, against, scale, baseline)  # type: ignore[arg-type]
                expected = group_advantages(score_N, 4, scale, baseline).repeat_interleave(3)  # type: ignore[arg-type]
                assert torch.allclose(found, expected, atol=2e-3 if scale == "group" else 1e-6)


def _slowly(
    values: list[list[tuple[int, float]]], lengths: list[int], valid: list[bool], against: str
) -> list[list[float]]:
    """One group's, token by token; ``values``: (place in the reply, value) of each step."""
    n = range(len(lengths))
    if against == "tokens":
        paid = sum(v for i in n if valid[i] for _, v in values[i]) / sum(lengths[i] for i in n if valid[i])
        found = []
        for i in n:
            ends = sorted({place for place, _ in values[i]} | {lengths[i] - 1})
            row = []
            for t in range(lengths[i]):
                left = sum(v for place, v in values[i] if place >= t)
                begin = max([end + 1 for end in ends if end < t], default=0)  # of the step that t is in
                row.append(left - paid * (lengths[i] - begin))
            found.append(row)
        return found
    mean = sum(v for i in n if valid[i] for _, v in values[i]) / sum(valid)
    found = []
    for i in n:
        first = min({place for place, _ in values[i]} | {lengths[i] - 1})
        found.append([
            sum(v for place, v in values[i] if place >= t) - (mean if t <= first else 0) for t in range(lengths[i])
        ])  # fmt: skip
    every = [x for i in n if valid[i] for x in found[i]]
    return [[x - sum(every) / len(every) for x in row] for row in found]


@pytest.mark.parametrize("against", ["returns", "tokens"])
def test_advantages_are_those_of_a_slow_reference(against: str) -> None:
    draw = random.Random(1)
    for _ in range(20):
        lengths = [draw.randint(2, 9) for _ in range(8)]
        values = [
            [(place, draw.uniform(-1, 1)) for place in sorted(draw.sample(range(length), draw.randint(0, 2)))]
            for length in lengths
        ]
        values[0] = [(0, 0.5)]
        valid = [draw.random() < 0.8 for _ in lengths]
        valid[0] = valid[1] = valid[4] = valid[5] = True
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        placed = [(begin + place, v) for begin, row in zip(offsets.tolist(), values, strict=False) for place, v in row]
        draw.shuffle(placed)  # in any order
        steps = StepValues(torch.tensor([v for _, v in placed]), torch.tensor([p for p, _ in placed]))
        found = trace_advantages(
            torch.zeros(8), steps, offsets, 4, against, "none", valid_N=torch.tensor(valid)  # type: ignore[arg-type]
        )  # fmt: skip
        expected = []
        for g in (slice(0, 4), slice(4, 8)):
            rows = _slowly(values[g], lengths[g], valid[g], against)
            expected += [x if ok else 0.0 for row, ok in zip(rows, valid[g], strict=True) for x in row]
        assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_group_that_teaches_nothing_has_advantages_of_zero() -> None:
    offsets = torch.tensor([0, 3, 5, 9, 12])
    third = 1 / 3
    steps = StepValues(torch.full((5,), third), torch.tensor([2, 4, 8, 9, 11]))  # the second group: one has two steps
    for scale in ("group", "batch", "none"):
        found = trace_advantages(torch.full((4,), 0.1), steps, offsets, 2, "returns", scale)  # type: ignore[arg-type]
        assert found[:5].tolist() == [0.0] * 5
        assert found[5:].abs().min() > 0
        assert found.sum().item() == pytest.approx(0, abs=1e-5) or scale != "none"


def test_more_true_steps_move_no_other_token_with_progress() -> None:
    """The repetition of a true step is worth 0; what the others' tokens return stays, but for the mean over tokens."""

    def run(twice: bool) -> list[float]:
        values = [0.4, 0.0, -0.3, 0.2] if twice else [0.4, -0.3, 0.2]
        places = [1, 3, 5, 7] if twice else [1, 3, 5]
        offsets = torch.tensor([0, 6, 8]) if twice else torch.tensor([0, 4, 6])
        steps = StepValues(torch.tensor(values), torch.tensor(places))
        found = trace_advantages(torch.zeros(2), steps, offsets, 2, "returns", "none").tolist()
        return [found[0] - found[-1], found[-3] - found[-1]]  # the mean over tokens is the same for all

    assert run(True) == pytest.approx(run(False), abs=1e-6)


def test_the_batchs_scale_is_one_whether_steps_have_values_or_not() -> None:
    """Two prompts, an easy one and a hard one. The deviation of 2, 3, 6, 9 (mean 5) is sqrt((9 + 4 + 1 + 16) / 3)."""
    offsets, scores = torch.tensor([0, 2, 5, 6, 8]), torch.tensor([2.0, 3.0, 6.0, 9.0])
    none = StepValues(torch.empty(0), torch.empty(0, dtype=torch.int64))
    spread = 10**0.5 + 1e-4
    by_hand = [-0.5 / spread] * 2 + [0.5 / spread] * 3 + [-1.5 / spread] + [1.5 / spread] * 2
    for against in ("returns", "tokens"):
        found = trace_advantages(scores, none, offsets, 2, against, "batch")  # type: ignore[arg-type]
        assert found.tolist() == pytest.approx(by_hand, abs=1e-6)
        tiny = StepValues(torch.full((4,), 1e-6), offsets[1:] - 1)
        found = trace_advantages(scores, tiny, offsets, 2, against, "batch")  # type: ignore[arg-type]
        assert found.tolist() == pytest.approx(by_hand, abs=1e-5), "nor does a weight near 0 change the step"
    assert group_advantages(scores, 2, "batch").tolist() == pytest.approx([by_hand[i] for i in (0, 2, 5, 6)], abs=1e-6)
    # The same numbers as one step's values at the replies' ends, of equal lengths.
    equal = torch.tensor([0, 3, 6, 9, 12])
    steps = StepValues(scores, equal[1:] - 1)
    found = trace_advantages(torch.zeros(4), steps, equal, 2, "returns", "batch")
    expected = [x / spread for x in (-0.5, 0.5, -1.5, 1.5) for _ in range(3)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_batchs_scale_leaves_out_what_tells_nothing() -> None:
    """Of 2, 3, 6 (mean 11/3) and one that was cut: what is alone in its group counts for the deviation."""
    offsets, scores = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([2.0, 3.0, 6.0, 99.0])
    valid = torch.tensor([True, True, True, False])
    none = StepValues(torch.empty(0), torch.empty(0, dtype=torch.int64))
    spread = ((25 + 4 + 49) / 9 / 2) ** 0.5 + 1e-4
    for found in (
        trace_advantages(scores, none, offsets, 2, "returns", "batch", valid_N=valid),
        group_advantages(scores, 2, "batch", valid_N=valid),
    ):
        assert found.tolist() == pytest.approx([-0.5 / spread, 0.5 / spread, 0.0, 0.0], abs=1e-6)
