"""Scores with steps: what they earn, and how PPO and GRPO spread it over a reply's tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_train import context
from tiny import prompt, save_tiny
from torch import Tensor, nn

from keel.objective.group import step_advantages
from keel.objective.policy import StepValues, token_rewards
from keel.recipe.grpo import GrpoStage
from keel.recipe.ppo import PpoStage
from keel.reward.judge import JudgeFromScorer
from keel.reward.scorer import MixedScorer, PythonScorer, RewardPart
from keel.train.grpo import Grpo
from keel.train.online import Batch, make_rollouts
from keel.train.ppo import Ppo
from keel.train.rollouts import Episodes, placed_steps
from keel.types import Completion, Encoded, Episode, Prompt, Scores, Step, UserError

REWARDS = [{"source": {"kind": "python", "ref": "x:y"}}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


def ppo(**settings: Any) -> PpoStage:
    common = {"name": "ppo", "model": "base", "rewards": REWARDS, "rollout_batch": 2, "episodes": 2, "minibatches": 1}
    return PpoStage.model_validate(common | settings)


def grpo(**settings: Any) -> GrpoStage:
    common = {"name": "grpo", "model": "base", "rewards": REWARDS, "beta": 0.0, "rollout_batch": 2, "group_size": 2}
    return GrpoStage.model_validate(common | {"episodes": 2, "minibatches": 1} | settings)


class Fixed:
    """Rollouts that are known: completions of 3 and 2 tokens."""

    def __init__(self, shaped: Sequence[float], steps: StepValues | None) -> None:
        self.policy, self.count, self.shaped, self.steps = nn.Linear(1, 1), 1, shaped, steps

    def collect(self, iteration: int, values: Any = None, old_at_step: bool = False) -> Episodes:
        return Episodes(
            rows=[Encoded.of((1,), (2, 3, 4)), Encoded.of((1,), (5, 6))],
            offsets=torch.tensor([0, 3, 5]),
            old_logp_C=torch.tensor([-1.0, -2.0, -0.5, -1.0, -1.0]),
            ref_logp_C=torch.tensor([-1.5, -2.0, -0.5, -1.0, -0.75]),
            value_C=torch.tensor([0.5, 1.0, 0.0, -1.0, 2.0]),
            shaped_N=torch.tensor(self.shaped),
            figures={"objective/kl": 0.0},
            steps=self.steps,
        )


def steps(*values: tuple[float, int]) -> StepValues:
    return StepValues(torch.tensor([value for value, _ in values]), torch.tensor([place for _, place in values]))


def listed(column: Sequence[Tensor] | None) -> list[list[float]]:
    assert column is not None
    return [tokens.tolist() for tokens in column]


# -------------------------------------------------------------------------------------------------------------- PPO


def test_step_rewards_stand_where_their_steps_end() -> None:
    kl, score, offsets = torch.tensor([1.0, 0.0, 0.0, 2.0, 0.0]), torch.tensor([10.0, 20.0]), torch.tensor([0, 3, 5])
    found = token_rewards(kl, score, offsets, 0.5, steps((1.0, 0), (2.0, 1), (4.0, 1), (-3.0, 4)))
    assert found.tolist() == [-0.5 + 1, 2 + 4, 10, -1, 20 - 3]


def test_ppos_advantages_with_steps_by_hand() -> None:
    """gamma, lambda 0.5; k1 = 0.5, 0, 0 | 0, -0.25 at a coefficient of 2: -1, 0, 0 | 0, 0.5 beside what is earned."""
    rollouts: Any = Fixed([8.0, 4.0], steps((2.0, 0), (6.0, 1), (-1.0, 3)))
    critic: Any = SimpleNamespace(model=nn.Linear(1, 1), values_packed=None)
    algorithm = Ppo(rollouts, critic, ppo(kl={"coef": 2.0}, gamma=0.5, lam=0.5, whiten_advantages=False))
    batch = algorithm.rollout(0)
    # Rewards 1, 6, 8 | -1, 4.5; values 0.5, 1, 0 | -1, 2.
    third = 8 - 0.0
    second = (6 + 0.5 * 0 - 1) + 0.25 * third
    first = (1 + 0.5 * 1 - 0.5) + 0.25 * second
    last = 4.5 - 2.0
    before = (-1 + 0.5 * 2 - -1) + 0.25 * last
    assert listed(batch.advantage) == [[first, second, third], [before, last]]
    assert listed(batch.returns) == [[first + 0.5, second + 1, third], [before - 1, last + 2]]
    assert algorithm.figures["objective/rlhf_reward"] == ((1 + 0.5 * 6 + 0.25 * 8) + (-1 + 0.5 * 4.5)) / 2
    assert algorithm.figures["objective/non_score_reward"] == (-1 + 0.5) / 2  # the KL's part alone


# ------------------------------------------------------------------------------------------------------------- GRPO


def test_step_advantages_by_hand() -> None:
    """Group 1: values 1, 2, 6 of mean 3 and unbiased deviation sqrt((4 + 1 + 9) / 2) = sqrt(7). Group 2 has one step,
    group 3 two equal ones, group 4 two of mean 0.5 and deviation sqrt(0.5): the last two end at one token."""
    offsets = torch.tensor([0, 4, 6, 7, 9, 10, 11, 13, 14])
    values = steps((6.0, 5), (1.0, 1), (2.0, 2), (5.0, 8), (3.0, 9), (3.0, 10), (0.0, 12), (1.0, 12))
    sd = math.sqrt(7) + 1e-4
    expected = [-3 / sd, -3 / sd, -1 / sd, 0, 3 / sd, 3 / sd, *[0] * 5, 0, 0, 0]
    found = step_advantages(values, offsets, 2)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert [i for i, x in enumerate(found.tolist()) if x == 0] == [3, *range(6, 14)]  # to the bit
    centred = step_advantages(values, offsets, 2, scale="none")
    assert centred.tolist() == [-3, -3, -1, 0, 3, 3, *[0] * 8]


@pytest.mark.parametrize("scale", ["group", "none"])
def test_grpos_advantages_with_steps_by_hand(scale: str) -> None:
    """The outcome's advantage on every token, and the steps' to come: scores 8 and 4, values 2, 5 | -1 of mean 2."""
    rollouts: Any = Fixed([8.0, 4.0], steps((2.0, 0), (5.0, 1), (-1.0, 3)))
    algorithm = Grpo(rollouts, grpo(scale_rewards=scale))
    outcome, step = (math.sqrt(8) + 1e-4, 3 + 1e-4) if scale == "group" else (1.0, 1.0)
    first, second = listed(algorithm.rollout(0).advantage)
    assert first == pytest.approx([2 / outcome + (0 + 3) / step, 2 / outcome + 3 / step, 2 / outcome])
    assert second == pytest.approx([-2 / outcome - 3 / step, -2 / outcome])
    assert algorithm.figures["frac_reward_zero_std"] == 0.0


@pytest.mark.parametrize(
    ("shaped", "values", "still"),
    [((1.0, 1.0), None, 1.0), ((1.0, 1.0), ((2.0, 0), (3.0, 4)), 0.0), ((1.0, 1.0), ((2.0, 0), (2.0, 4)), 1.0)],
)
def test_a_group_without_a_signal_has_none_in_its_steps_either(shaped: Any, values: Any, still: float) -> None:
    rollouts: Any = Fixed(shaped, steps(*values) if values else None)
    algorithm = Grpo(rollouts, grpo())
    algorithm.rollout(0)
    assert algorithm.figures["frac_reward_zero_std"] == still


# ------------------------------------------------------------------------------- of a scorer, in a rollout of a model


class AtTheEnd:
    """A score as the one step of a reply, which ends with it; or as the reply's own."""

    def __init__(self, as_steps: bool) -> None:
        self.as_steps = as_steps

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        scores = [float(sum(c.ids) % 17) for c in completions]
        if not self.as_steps:
            return Scores(torch.tensor(scores))
        each = [(Step(len(c.ids) - 1, score),) for c, score in zip(completions, scores, strict=True)]
        return Scores(torch.zeros(len(scores)), tuple(each))


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_one_step_at_the_end_is_the_replys_score(kind: str, model: Path, tmp_path: Path) -> None:
    """An identity of both algorithms, clipping included; only the penalty of cut replies stays the reply's."""
    settings = {"rollout_batch": 8, "episodes": 8, "group_size": 4, "sampling": {"max_new_tokens": 6}}
    settings |= {"missing_eos_penalty": 0.0, "reward_clip": 5.0}
    found: list[tuple[Batch, dict[str, float]]] = []
    for as_steps in (False, True):
        stage = ppo(**settings) if kind == "ppo" else grpo(**settings)
        c = context(tmp_path / str(as_steps), kind, model)
        rollouts = make_rollouts(stage, [prompt(n) for n in range(4)], AtTheEnd(as_steps), model, c)
        critic: Any = SimpleNamespace(model=nn.Linear(1, 1), values_packed=lambda b: torch.zeros(int(b.mask_T.sum())))
        algorithm: Ppo | Grpo = Ppo(rollouts, critic, stage) if isinstance(stage, PpoStage) else Grpo(rollouts, stage)
        found.append((algorithm.rollout(0), algorithm.figures))
    (whole, figures), (stepped, of_steps) = found
    assert torch.cat(list(whole.advantage)).abs().sum() > 0
    torch.testing.assert_close(torch.cat(list(stepped.advantage)), torch.cat(list(whole.advantage)))
    assert of_steps["objective/scores"] == pytest.approx(figures["objective/scores"])
    assert figures["objective/reward_clipped"] > 0
    assert of_steps["objective/reward_clipped"] == figures["objective/reward_clipped"] / 2  # replies' own are all 0


def episodes(*lengths: int) -> list[Episode]:
    return [Episode(prompt(n), (1,), Completion("", (9,) * length)) for n, length in enumerate(lengths)]


def test_steps_are_placed_among_all_tokens() -> None:
    scores = Scores(torch.zeros(3), ((Step(1, 5.0), Step(0, -7.0)), (), (Step(2, 1.0),)))
    found = placed_steps(scores, episodes(2, 4, 3), torch.tensor([0, 2, 6, 9]), clip=6.0)
    assert found is not None
    assert found.value_S.tolist() == [5, -6, 1]
    assert found.place_S.tolist() == [1, 0, 8]
    assert placed_steps(Scores(torch.zeros(1)), episodes(2), torch.tensor([0, 2])) is None


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Step(2, 1.0), "'p1': the scorer has a step end at token 2 of a reply of 2"),
        (Step(-1, 1.0), "end at token -1 of a reply of 2"),
        (Step(0, math.nan), "'p1': the scorer values a step at nan; values must be finite"),
    ],
)
def test_a_step_outside_its_reply_is_refused(step: Step, message: str) -> None:
    scores = Scores(torch.zeros(2), ((), (step,)))
    with pytest.raises(UserError, match=message):
        placed_steps(scores, episodes(5, 2), torch.tensor([0, 5, 7]))


class Stepped:
    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        return Scores(torch.tensor([1.0, 2.0]), ((Step(0, 3.0), Step(1, 4.0)), ()))


def test_a_mix_has_all_its_terms_steps() -> None:
    length: Callable[[Prompt, str], float] = lambda _, text: float(len(text))  # noqa: E731
    mixed = MixedScorer(
        [
            RewardPart(Stepped(), 0.5, "steps"),
            RewardPart(PythonScorer(length), 10.0, "length"),
            RewardPart(Stepped(), -1.0, "again"),
        ]
    )
    replies = [Completion("ab", (1, 2)), Completion("abc", (1, 2, 3))]
    scores = mixed.score([prompt(0), prompt(1)], replies)
    assert scores.reply_N.tolist() == [0.5 + 20 - 1, 1 + 30 - 2]
    assert scores.steps == ((Step(0, 1.5), Step(1, 2.0), Step(0, -3.0), Step(1, -4.0)), ())
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "steps": [8, 2],
        "length": [2, 3],
        "again": [8, 2],
    }
    # Where one number is asked for, it is all that the reply earns.
    assert [grade.score for grade in JudgeFromScorer(mixed).grade([prompt(0), prompt(1)], replies)] == [16.0, 29.0]
