"""What online training logs and how it is steered: rewards as they are maximised, clipping, the watching judge's error,
the critic's warm-up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import context
from tiny import Counting, prompt, save_tiny
from torch import nn

from keel.objective.policy import discounted_reward
from keel.recipe.grpo import GrpoStage
from keel.recipe.ppo import PpoStage
from keel.recipe.sections import OptimConfig
from keel.reward.judge import JudgeFromPython
from keel.train.grpo import train_grpo
from keel.train.online import make_rollouts
from keel.train.ppo import Ppo, train_ppo
from keel.train.rollouts import Episodes
from keel.types import Completion, Encoded, Prompt, Scores


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


def ppo(**settings: Any) -> PpoStage:
    base = {
        "name": "ppo", "model": "base", "rewards": [{"source": {"kind": "python", "ref": "x:y"}}],
        "sampling": {"max_new_tokens": 4}, "rollout_batch": 16, "episodes": 64, "minibatches": 2,
    }  # fmt: skip
    return PpoStage.model_validate(base | settings)


class PerCent:
    """A reward from 0 to 100."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        return Scores(torch.tensor([float(20 + sum(c.ids) % 81) for c in completions]))


# ------------------------------------------------------------------------------------------------------- the reward


def test_the_discounted_reward_by_hand() -> None:
    rewards, offsets = torch.tensor([1.0, 2.0, 4.0, -1.0, 8.0]), torch.tensor([0, 3, 5])
    assert discounted_reward(rewards, offsets, 1.0) == (7 + 7) / 2
    assert discounted_reward(rewards, offsets, 0.5) == ((1 + 1 + 1) + (-1 + 4)) / 2


class _Fixed:
    """Rollouts that are known: two completions of 2 and 1 tokens, the second one cut, scores 12 and 2."""

    def __init__(self) -> None:
        self.policy, self.count, self.seed = nn.Linear(1, 1), 1, 0

    def collect(self, iteration: int, values: Any) -> Episodes:
        return Episodes(
            rows=[Encoded((1, 2, 3), (False, True, True)), Encoded((1, 2), (False, True))],
            offsets=torch.tensor([0, 2, 3]),
            old_logp_C=torch.tensor([-1.0, -2.0, -0.5]),
            ref_logp_C=torch.tensor([-1.5, -1.75, -1.5]),
            value_C=torch.zeros(3),
            shaped_N=torch.tensor([10.0, 2.0 - 3.0]),  # clipped to 10; less a missing end's penalty of 3
            figures={"objective/kl": 123.0, "objective/scores": 7.0},  # of a probe: not what is penalised
        )


@pytest.mark.parametrize(("gamma", "expected"), [
    # k1: 0.5, -0.25 | 1.0; rewards at a coefficient of 2: -1, 0.5 + 10 | -2 - 1
    (1.0, (9.5 - 3.0) / 2),
    (0.5, ((-1 + 0.5 * 10.5) - 3.0) / 2),
])  # fmt: skip
def test_rlhf_reward_is_what_ppo_maximises(gamma: float, expected: float) -> None:
    rollouts: Any = _Fixed()
    critic: Any = type("Critic", (), {"model": nn.Linear(1, 1), "values_packed": None})()
    algorithm = Ppo(rollouts, critic, ppo(kl={"coef": 2.0}, gamma=gamma, rollout_batch=2, episodes=2))
    algorithm.rollout(0)
    assert algorithm.figures["objective/rlhf_reward"] == pytest.approx(expected)
    assert algorithm.figures["objective/non_score_reward"] == pytest.approx(-2 * (0.25 + 1.0) / 2)


def test_a_reward_in_per_cent_has_a_gradient(model: Path, tmp_path: Path) -> None:
    """Held within 10, as was once the default, all scores are 10 and no group has a spread."""
    moved = {}
    for clip in (None, 10.0):
        c = context(tmp_path / str(clip), "grpo", model)
        told = Counting()
        told.note = lambda text, told=told: told.started.append((text, 0))  # type: ignore[method-assign, misc]
        object.__setattr__(c, "reporter", told)
        clipping = {} if clip is None else {"reward_clip": clip}
        stage = GrpoStage.model_validate(
            ppo().model_dump(include={"name", "model", "rewards", "sampling", "rollout_batch", "episodes"})
            | {"group_size": 4, "beta": 0.0, "optim": {"lr": 1e-3}, **clipping}
        )
        train_grpo(stage, [prompt(n) for n in range(8)], PerCent(), None, c)
        rows = c.stage.metrics.rows()
        moved[clip] = (rows[0]["grad_norm"], rows[0]["frac_reward_zero_std"], rows[0].get("objective/reward_clipped"))
        assert sum("reward_clip = 10 cuts 100% of the scores" in text for text, _ in told.started) == (clip is not None)
    assert moved[None][0] > 1e-3
    assert moved[None][1:] == (0.0, None)
    assert moved[10.0] == (0.0, 1.0, 1.0)


def test_the_watching_judges_error_is_over_prompts(model: Path, tmp_path: Path) -> None:
    """Replies to one prompt that all get one grade are one observation: the error is that of the prompts' means."""
    c = context(tmp_path, "ppo", model)
    watch = JudgeFromPython(lambda asked, _: float(int(asked.id[1:]) ** 2))
    stage = ppo(group_size=4)
    rollouts = make_rollouts(stage, [prompt(n) for n in range(4)], PerCent(), model, c, watch)
    figures = rollouts.collect(0).figures
    assert figures["eval/gold"] == pytest.approx((0 + 1 + 4 + 9) / 4)
    assert figures["eval/gold_se"] == pytest.approx(np.std([0, 1, 4, 9], ddof=1) / math.sqrt(4))
    alone = make_rollouts(ppo(group_size=16, minibatches=1), [prompt(3)], PerCent(), model, c, watch).collect(0).figures
    assert "eval/gold_se" not in alone  # one prompt says nothing of others


# ------------------------------------------------------------------------------------------- the critic's warm-up


def test_the_policys_schedule_begins_after_the_critics_warm_up(model: Path, tmp_path: Path) -> None:
    """Of 4 rollouts with 2 steps each, the first two are the critic's: the policy's 4 steps have the warm-up and the
    decay of a run of 4 steps. A warm-up of 2 steps: 1/3, 2/3; then linear to 0: 1, 1/2."""
    rates: list[tuple[float, float]] = []
    c = context(tmp_path, "ppo", model)
    optim = OptimConfig(lr=0.6, warmup=2, schedule="linear", final_lr=0.0)
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: Any) -> Any:
        by_module = {group["module"]: group["lr"] for group in self.param_groups}
        rates.append((by_module["policy"], by_module["critic"]))
        for group in self.param_groups:  # what is asked here is the rate
            group["lr"] = 0.0
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        train_ppo(ppo(critic_warmup=2, optim=optim), [prompt(n) for n in range(16)], PerCent(), model, None, c)
    assert [policy for policy, _ in rates] == pytest.approx([0, 0, 0, 0, 0.2, 0.4, 0.6, 0.3])
    assert [critic for _, critic in rates] == pytest.approx([0.2, 0.4, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert [row["lr"] for row in c.stage.metrics.rows()] == pytest.approx([0, 0, 0.4, 0.3])


def test_a_policy_that_stands_still_steers_no_coefficient(model: Path, tmp_path: Path) -> None:
    c = context(tmp_path, "ppo", model)
    kl = {"coef": 0.1, "target": 5.0, "horizon": 16}
    train_ppo(ppo(critic_warmup=2, kl=kl), [prompt(n) for n in range(16)], PerCent(), model, None, c)
    coefs = [row["objective/kl_coef"] for row in c.stage.metrics.rows()]
    # A KL of about 0 lowers it by the most that the controller may, a fifth a rollout, from the third on.
    assert coefs == pytest.approx([0.1, 0.1, 0.1, 0.08])


def test_a_warm_up_leaves_the_policy_something() -> None:
    with pytest.raises(ValueError, match="4 rollouts and critic_warmup = 4 takes them all"):
        ppo(critic_warmup=4)
