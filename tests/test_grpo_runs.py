"""Runs of GRPO's family on tiny models: each preset learns, and rollouts are filled up the same way after a kill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from test_train import LikesO, context
from tiny import prompt, save_tiny

from keel.data.collate import epoch_order
from keel.eval.alarms import find_alarms
from keel.recipe.grpo import GrpoStage
from keel.recipe.grpo_presets import PresetName
from keel.recipe.sections import OptimConfig
from keel.reward.scorer import MixedScorer, PythonScorer, RewardPart
from keel.run import Silent
from keel.train.drawing import Drawn, Draws, Refilled
from keel.train.grpo import Grpo, train_grpo
from keel.train.loop import _update
from keel.train.online import make_rollouts
from keel.train.optim import make_optimizer
from keel.types import Completion, Episode, Prompt, Scores, Step

PYTHON = {"source": {"kind": "python", "ref": "x:y"}}
NAMES = get_args(PresetName)
QUICK = ("dapo", "rloo")  # resampling; a KL in the reward
PROMPTS = [prompt(n) for n in range(50)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


def stage(**settings: Any) -> GrpoStage:
    common = {"name": "grpo", "model": "base", "rewards": [PYTHON], "group_size": 4, "rollout_batch": 32}
    return GrpoStage.model_validate({**common, "sampling": {"max_new_tokens": 8}, **settings})


# -------------------------------------------------------------------------------------------------- rollouts that fill


class Source:
    """Says of each reply which prompt it is to, with which seed, and which of the call it is."""

    def __init__(self, prompts: int) -> None:
        self.prompts = [prompt(n) for n in range(prompts)]
        self.calls: list[list[int]] = []

    def sample(self, indices: Sequence[int], seed: int) -> list[Episode]:
        self.calls.append(list(indices)[::2])
        return [Episode(self.prompts[i], (1,), Completion(f"{i} {seed} {j}", (1,))) for j, i in enumerate(indices)]


class ByPrompt:
    """Scores a reply by its prompt's number; its steps are known for even prompts alone."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        numbers = torch.tensor([float(c.text.split()[0]) for c in completions])
        steps = tuple(((Step(0, n),) if n % 2 == 0 else ()) for n in numbers.tolist())
        return Scores(numbers, steps if any(steps) else (), {"half": numbers / 2})


def idle(*prompts: int) -> Any:
    """The prompts' groups teach nothing."""

    def found(drawn: Drawn) -> list[bool]:
        return [int(episode.completion.text.split()[0]) in prompts for episode in drawn.episodes[::2]]

    return found


class Telling(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def draws(source: Source) -> Draws:
    config: Any = SimpleNamespace(name="grpo", rollout_batch=8, group_size=2, episodes=64)
    where: Any = SimpleNamespace(seed=3, device="cpu", precision="fp32", reporter=Telling())
    given: Any = source
    return Draws(given, ByPrompt(), config, where)


def test_places_without_a_signal_go_to_the_next_prompts() -> None:
    order = epoch_order(10, 3, 0)
    source = Source(10)
    refilled = Refilled(draws(source), idle(order[1], order[3], order[4]), 10)
    drawn = refilled.rollout(0)
    # Four prompts; the second and the fourth give way to the next two, of which the first gives way again.
    assert source.calls == [order[:4], order[4:6], order[6:7]]
    taken = [int(e.completion.text.split()[0]) for e in drawn.episodes[::2]]
    assert taken == [order[0], order[6], order[2], order[5]]
    assert drawn.scores.reply_N.tolist() == [float(n) for n in taken for _ in range(2)]
    assert drawn.scores.parts["half"].tolist() == [n / 2 for n in taken for _ in range(2)]
    assert [bool(steps) for steps in drawn.scores.steps] == [n % 2 == 0 for n in taken for _ in range(2)]
    assert drawn.figures == {
        "episodes": 14.0,
        "frac_reward_zero_std": 3 / 7,
        "rollout/prompts_drawn": 7 / 4,
        "rollout/unfilled": 0.0,
        "rollout/short": 0.0,
        "rollout/left": 0.0,
        "objective/scores_drawn": sum(n if n % 2 else 2 * n for n in order[:4]) / 4,  # with their steps
    }
    assert len({e.completion.text.split()[1] for e in drawn.episodes}) == 3  # seeds of their own
    # The next rollout begins with the next prompt, here and in a run that was resumed.
    state = refilled.state_dict()
    second = refilled.rollout(1)
    resumed = Refilled(draws(Source(10)), idle(order[1], order[3], order[4]), 10)
    resumed.load_state_dict(state)
    assert resumed.rollout(1).episodes == second.episodes
    assert source.calls[3][:3] == order[7:]


def test_filling_up_has_an_end() -> None:
    source = Source(10)
    refilled = Refilled(draws(source), idle(*range(10)), 3)
    drawn = refilled.rollout(0)
    assert [len(call) for call in source.calls] == [4, 4, 4, 4]
    assert len(drawn.episodes) == 8  # a rollout is whole, and says what is missing
    assert drawn.figures["rollout/unfilled"] == drawn.figures["frac_reward_zero_std"] == 1.0


def test_what_is_left_is_counted_over_the_run_and_said_once() -> None:
    def made(*still: int) -> Refilled:
        return Refilled(draws(Source(10)), idle(*still), 1)

    fine = made()
    fine.rollout(0)
    assert (fine.short, fine.left, fine.context.reporter.notes) == (0, 0, [])  # type: ignore[attr-defined]
    first = made(*range(10))
    figures = [first.rollout(n).figures for n in range(2)]
    assert [(f["rollout/short"], f["rollout/left"]) for f in figures] == [(1.0, 4.0), (2.0, 8.0)]
    (note,) = first.context.reporter.notes  # type: ignore[attr-defined]
    assert note.startswith("grpo: after max_resamples = 1 tries 4 of a rollout's 4 groups still have equal scores")
    resumed = made(*range(10))
    resumed.load_state_dict(first.state_dict())
    figures = [resumed.rollout(2).figures]
    assert (figures[0]["rollout/short"], figures[0]["rollout/left"]) == (3.0, 12.0)
    assert resumed.context.reporter.notes == []  # type: ignore[attr-defined]
    resumed.load_state_dict({"drawn": 8})  # of an earlier Keel
    assert (resumed.drawn, resumed.short, resumed.left) == (8, 0, 0)
    rows = [{"step": n, "rollout/unfilled": 0.25, "rollout/short": n + 1.0, "rollout/left": n + 1.0} for n in range(4)]
    (alarm,) = find_alarms("grpo", rows)
    assert (alarm.name, alarm.step, alarm.value, alarm.bound) == ("unfilled", 2, 0.25, 0.1)
    assert alarm.message.endswith("equal scores. 4 of 4 rollouts were left so, with 4 groups in all.")
    assert find_alarms("grpo", [row | {"rollout/unfilled": 0.05} for row in rows]) == []


def test_rollouts_that_need_no_filling_are_those_without_it() -> None:
    plain, filled = draws(Source(10)), Refilled(draws(Source(10)), idle(), 10)
    for iteration in range(4):
        assert filled.rollout(iteration).episodes == plain.rollout(iteration).episodes


class Killed(Exception):
    pass


class Coarse:
    """1 for a reply with an o, so that many groups are all the same. Dies after ``last`` calls."""

    def __init__(self, last: int = 10**9) -> None:
        self.last = last

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        self.last -= 1
        if self.last < 0:
            raise Killed
        return Scores(torch.tensor([float(c.text.count("o") > 0) for c in completions]))


def test_a_killed_run_that_resamples_ends_with_the_same_bits(model: Path, tmp_path: Path) -> None:
    optim = OptimConfig(lr=3e-3)
    config = stage(preset="dapo", rollout_batch=16, episodes=64, max_resamples=2, save_every_seconds=0.0, optim=optim)
    ends = []
    for name, kills in (("whole", []), ("killed", [3, 1])):
        c = context(tmp_path / name, "grpo", model)
        for last in kills:
            with pytest.raises(Killed):
                train_grpo(config, PROMPTS, Coarse(last), None, c)
        summary = train_grpo(config, PROMPTS, Coarse(), None, c)
        ends.append((summary, c.stage.metrics.rows(), (c.stage.path / "model.safetensors").read_bytes()))
    assert ends[0] == ends[1]
    rows = ends[0][1]
    assert any(row["rollout/prompts_drawn"] > 1 for row in rows), "nothing was resampled"
    assert rows[-1]["episodes"] == pytest.approx(sum(16 * row["rollout/prompts_drawn"] for row in rows))
    assert ends[0][0]["choices"]["no_spread"] == "resample"


# --------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.wide) for name in NAMES]
)
def test_a_preset_learns(name: str, model: Path, tmp_path: Path) -> None:
    c = context(tmp_path, "grpo", model)
    config = stage(preset=name, episodes=32 * 8, optim=OptimConfig(lr=2e-2), overlong="penalty", max_resamples=1)
    summary = train_grpo(config, PROMPTS, LikesO(), model if config.beta else None, c)
    rows = c.stage.metrics.rows()
    first, last = (sum(row["objective/scores"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.2
    assert summary["preset"] == name
    assert summary["choices"]["clip"] == config.clip
    names = {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "entropy"}
    assert names | {"frac_reward_zero_std", "sampling/sampling_logp_difference/mean"} <= set(rows[0])
    assert ("kl" in rows[0]) == (config.beta > 0 and config.kl.place == "loss")


@pytest.mark.parametrize("name", ["gspo", pytest.param("dapo", marks=pytest.mark.wide)])
def test_micro_batches_of_a_model_change_nothing(name: str, model: Path, tmp_path: Path) -> None:
    """A reply's one ratio, and groups that are left out, in a real packing."""
    ends = []
    for batch_tokens in (100_000, 60):
        c = context(tmp_path, f"{name}_{batch_tokens}", model)
        config = stage(preset=name, batch_tokens=batch_tokens, minibatches=1, no_spread="drop", old_logprobs="trainer")
        algorithm = Grpo(make_rollouts(config, PROMPTS, Coarse(), None, c), config)
        (micros,) = algorithm.updates(0)
        assert (len(micros) > 3) == (batch_tokens == 60)
        optimizer = make_optimizer(algorithm.modules, config.optim, {})
        figures = _update(algorithm, optimizer, micros, config, c, 0)
        ends.append((figures["loss"][0], figures["grad_norm"][0]))
    assert ends[0][0] == pytest.approx(ends[1][0], abs=1e-5)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-4)
    assert ends[0][1] > 0


def test_each_of_several_rewards_by_itself(model: Path, tmp_path: Path) -> None:
    """A reward a thousand times the other's size does not drown it: both rise."""
    c = context(tmp_path, "each", model)
    rewards = [PYTHON, {"source": {"kind": "python", "ref": "x:z"}, "weight": 2.0}]
    config = stage(combine="each", rewards=rewards, episodes=32 * 8, beta=0.0, optim=OptimConfig(lr=2e-2))
    letters = PythonScorer(lambda _, text: float(text.count("o")))
    many = PythonScorer(lambda _, text: 1000.0 * text.count("a"))
    scorer = MixedScorer([RewardPart(letters, 1.0, "o"), RewardPart(many, 2.0, "a")])
    train_grpo(config, PROMPTS, scorer, None, c)
    rows = c.stage.metrics.rows()
    for name in ("o", "a"):
        first, last = (sum(row[f"objective/scores/{name}"] for row in part) for part in (rows[:3], rows[-3:]))
        assert last > first


def test_a_step_without_a_signal_changes_nothing(model: Path, tmp_path: Path) -> None:
    c = context(tmp_path, "still", model)
    config = stage(no_spread="drop", beta=0.0, episodes=32)
    rollouts = make_rollouts(config, PROMPTS, Silent(), None, c)
    algorithm = Grpo(rollouts, config)
    before = [p.detach().clone() for p in rollouts.policy.parameters()]
    optimizer = make_optimizer(algorithm.modules, config.optim, {})
    for micros in algorithm.updates(0):
        figures = _update(algorithm, optimizer, micros, config, c, 0)
        assert (figures["loss"], figures["grad_norm"]) == ((0.0, 1.0), (0.0, 1.0))
    assert all(torch.equal(p, old) for p, old in zip(rollouts.policy.parameters(), before, strict=True))


class Silent:
    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        return Scores(torch.zeros(len(completions)))


def test_shaped_scores_of_a_rollout(model: Path, tmp_path: Path) -> None:
    """Long replies pay as their length says, by their own tokens."""
    stops = [chr(n) for n in range(ord("A"), ord("z")) if chr(n).isalpha()]  # single tokens: many replies end
    sampling = {"max_new_tokens": 8, "stop": stops}
    config = stage(overlong="soft", overlong_from=0.5, missing_eos_penalty=2.0, beta=0.0, sampling=sampling)
    rollouts = make_rollouts(config, PROMPTS, Silent(), None, context(tmp_path, "long", model))
    drawn = rollouts.draws.rollout(0)
    expected = [
        -2.0 * (min(max(len(e.completion.ids) - 4, 0) / 4, 1) if e.completion.finished else 1) for e in drawn.episodes
    ]
    assert rollouts.shape(drawn).score_N.tolist() == pytest.approx(expected)
    assert len(set(expected)) > 3
