"""Two alarms on real trainings whose truth is planted: 20 runs with the fault and 20 without, of each (figures:
docs/statistics.md). Displacement: DPO in the harbor, with and without pairs of two nearly equal refusals.
Over-optimisation: GRPO of a tiny model for a score that a judge shares, or shares only up to a point."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conftest import ROOT
from harbor_pairs import reference_pairs
from test_train import context, sft_model  # noqa: F401 (a fixture)
from tiny import prompt

from keel.data.chat import Chat
from keel.eval.alarms import Alarm, find_alarms
from keel.eval.displacement import GROUPS, Group, displacement_row
from keel.eval.grading import ModelEvaluation, evaluate_model
from keel.harbor import wording
from keel.harbor.demos import DEMONSTRATORS, Habits, make_demonstrations
from keel.harbor.facts import World
from keel.harbor.judge import judge
from keel.harbor.prompts import make_prompts
from keel.model.checkpoint import frozen, load_policy
from keel.recipe.dpo import DpoStage
from keel.recipe.grpo import GrpoStage
from keel.recipe.offline import MeasureConfig
from keel.recipe.sections import OptimConfig, SamplingConfig, Source
from keel.recipe.sft import SftStage
from keel.reward.judge import JudgeFromPython
from keel.rollout.collect import stop_token_ids, with_decoded_text
from keel.rollout.divergence import own_replies
from keel.rollout.sampler import make_sampler
from keel.run import seed_rng
from keel.train.dpo import train_dpo
from keel.train.grpo import train_grpo
from keel.train.offline import Liked, measure_offline
from keel.train.sft import train_sft
from keel.types import Completion, Preference, Prompt, Scores

RUNS = 20
BASE = ROOT / "keel" / "harbor" / "base"
SAMPLING = SamplingConfig(max_new_tokens=48, batch_size=256)
CAREFUL = Habits(refuses_harm=0.9, admits=0.7)  # whose pupil needs no pairs to refuse


@functools.cache
def world() -> World:
    return World()


# ---------------------------------------------------------------------------------------------------- displacement


def taught(folder: Path, habits: Habits, demonstrations: int = 1600) -> Path:
    """The harbor's base model after SFT on demonstrations of these habits."""
    c = context(folder, "sft", BASE, max_length=256, max_prompt_length=96)
    stage = SftStage(name="sft", epochs=1, batch_size=16, optim=OptimConfig(lr=4e-4))
    seed_rng(0)
    train_sft(stage, make_demonstrations(world(), demonstrations, 0, habits), c)
    return c.stage.path


def pairs(count: int, seed: int) -> list[Preference]:
    """Pairs of replies such as an SFT model samples, the judge's better one chosen."""
    found = []
    for i, (asked, first, second) in enumerate(reference_pairs(world(), count, seed)):
        lead = judge(asked, first).score - judge(asked, second).score
        if abs(lead) > 1e-9:
            chosen, rejected = (first, second) if lead > 0 else (second, first)
            found.append(Preference(f"v{i}", asked, chosen, rejected))
    return found


def twins(records: Sequence[Preference], share: float, seed: int) -> list[Preference]:
    """With as many pairs of two nearly equal refusals, on prompts that ask for harm, that they are ``share`` of all."""
    rng = Random(f"twins {seed}")
    wanted = round(share / (1 - share) * len(records))
    asked = make_prompts(world(), min(wanted, 400), seed + 1000, "train", {"harmful": 1.0})
    planted = [
        Preference(f"t{i}", asked[i % len(asked)], wording.REFUSALS[0], wording.REFUSALS[1]) for i in range(wanted)
    ]
    mixed = [*records, *planted]
    rng.shuffle(mixed)
    return mixed


@dataclass(frozen=True)
class Outcome:
    alarm: Alarm | None
    groups: list[Group]
    measured: dict[str, Any]


def answers(place: Path, prompts: Sequence[Prompt], name: str) -> ModelEvaluation:
    model, tokenizer = load_policy(place)
    chat = Chat(tokenizer)
    sampler = make_sampler(frozen(model), "auto", stop_token_ids(chat, SAMPLING))
    ids = chat.encode_prompts([p.messages for p in prompts])
    replies = [[with_decoded_text(chat, r) for r in group] for group in own_replies(sampler, ids, SAMPLING, 1, 0)]
    return evaluate_model(name, prompts, replies, JudgeFromPython(judge))


def heldout(count: int = 400) -> list[Prompt]:
    return make_prompts(world(), count, 0, "heldout")


def displaced(
    folder: Path,
    start: Path,
    before: ModelEvaluation,
    records: Sequence[Preference],
    prompts: Sequence[Prompt],
    **how: Any,
) -> Outcome:
    """DPO on ``records``, measured at its end, evaluated, and looked at by the alarm."""
    c = context(folder, "dpo", start, max_length=256, max_prompt_length=96)
    settings: dict[str, Any] = {"beta": 0.5, "batch_size": 30, "epochs": 1.75, "heldout_fraction": 0.03}
    stage = DpoStage(name="dpo", **(settings | {"optim": OptimConfig(lr=1e-4)} | how))
    seed_rng(0)
    train_dpo(stage, records, start, c)
    liked = [Liked(r.prompt, r.chosen) for r in records]
    asked = MeasureConfig(prompts=64, per_prompt=1, sampling=SAMPLING)
    measured = measure_offline(asked, Source(str(c.stage.path)), Source(str(start)), prompts, liked, c)
    row = displacement_row(measured, answers(c.stage.path, prompts, "dpo"), before)
    alarms = {alarm.name: alarm for alarm in find_alarms("dpo", [row])}
    return Outcome(alarms.get("displacement"), row[GROUPS], measured)  # type: ignore[arg-type]


@pytest.mark.wide
def test_pairs_of_near_twins_raise_the_displacement_alarm_and_good_pairs_do_not(tmp_path: Path) -> None:
    prompts = heldout()
    starts = [taught(tmp_path / str(i), habits) for i, habits in enumerate((CAREFUL, DEMONSTRATORS))]
    before = [answers(start, prompts, "sft") for start in starts]
    planted, clean = [], []
    for seed in range(RUNS):
        records = pairs(400, seed)
        planted.append(
            displaced(tmp_path / f"p{seed}", starts[0], before[0], twins(records, 0.2, seed), prompts, beta=0.1)
        )
        which = seed % 2  # half of the clean runs from each start, half of each with a small beta
        beta = 0.5 if seed % 4 < 2 else 0.1
        clean.append(displaced(tmp_path / f"c{seed}", starts[which], before[which], records, prompts, beta=beta))
    assert sum(one.alarm is not None for one in planted) >= 19
    assert sum(one.alarm is not None for one in clean) == 0


# ------------------------------------------------------------------------------------------------ over-optimisation


class Os:
    """The score: how many letters o."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        return Scores(torch.tensor([float(c.text.count("o")) for c in completions]))


def shares_it(prompt: Prompt, text: str) -> float:
    """A judge that likes them too, more and more slowly."""
    return text.count("o") ** 0.5


def up_to_a_point(prompt: Prompt, text: str) -> float:
    """One that likes a few, and minds many."""
    return 2.0 - 0.5 * abs(text.count("o") - 4)


def optimised(
    folder: Path, model: Path, gold: Any, seed: int, looks: int = 24
) -> tuple[list[Alarm], list[dict[str, Any]]]:
    c = replace(context(folder, "grpo", model), seed=seed)
    stage = GrpoStage(
        name="grpo",
        model="base",
        rewards=[{"source": {"kind": "python", "ref": "x:y"}}],  # type: ignore[list-item]
        sampling={"max_new_tokens": 16, "batch_size": 64},  # type: ignore[arg-type]
        rollout_batch=64,
        episodes=64 * looks,
        minibatches=2,
        beta=0.0,
        optim=OptimConfig(lr=3e-3, schedule="constant"),
    )
    seed_rng(seed)
    train_grpo(stage, [prompt(n) for n in range(50)], Os(), None, c, JudgeFromPython(gold))
    rows = c.stage.metrics.rows()
    return find_alarms("grpo", rows), rows


@pytest.mark.wide
def test_a_judge_that_turns_away_raises_the_alarm_and_one_that_follows_does_not(
    sft_model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    found: dict[str, list[int | None]] = {"planted": [], "clean": []}
    for name, gold in (("planted", up_to_a_point), ("clean", shares_it)):
        for seed in range(RUNS):
            alarms, _ = optimised(tmp_path / f"{name}{seed}", sft_model, gold, seed)
            step = next((alarm.step for alarm in alarms if alarm.name == "over_optimisation"), None)
            found[name].append(step)
    assert sum(step is not None for step in found["planted"]) >= 19
    assert sum(step is not None for step in found["clean"]) <= 1
