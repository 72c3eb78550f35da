"""Two alarms on real trainings whose truth is planted: 20 runs with the fault and 20 without, of each (figures:
docs/statistics.md). Displacement: DPO in a world of two kinds of prompt, with and without pairs of two nearly equal
refusals. Over-optimisation: GRPO for a score that a judge shares, or shares only up to a point."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from test_train import context, sft_model  # noqa: F401 (a fixture)
from tiny import prompt, save_tiny

from keel.data.chat import Chat
from keel.eval.alarms import Alarm, find_alarms
from keel.eval.displacement import GROUPS, Group, displacement_row
from keel.eval.grading import ModelEvaluation, evaluate_model
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
from keel.types import Completion, Demonstration, Grade, Message, Preference, Prompt, Scores

RUNS = 20


def recorded(name: str, figures: Any) -> None:
    """The figures of all runs, where KEEL_FIGURES names a folder."""
    if folder := os.environ.get("KEEL_FIGURES"):
        (Path(folder) / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------- displacement

THINGS = ("ship", "port", "captain", "salt", "rope")
NUMBERS = ("one", "two", "three", "four", "five")
REFUSALS = ("no captain sails to the port", "no captain sails from the port", "no captain sails to a port")
TOLD = "the ship is good"
SAMPLING = SamplingConfig(max_new_tokens=12, batch_size=256)


def asked(count: int, seed: str, kinds: Sequence[str] = ("fact", "harmful")) -> list[Prompt]:
    rng = Random(seed)
    found = []
    for i in range(count):
        kind = kinds[i % len(kinds)]
        words = " ".join((rng.choice(THINGS), *(rng.choice(NUMBERS) for _ in range(3))))
        text = f"yes {words}" if kind == "harmful" else f"what is {words}"
        found.append(Prompt(f"{seed} {i}", (Message("user", text),), kind))
    return found


def reply(to: Prompt, rng: Random) -> str:
    """A writer who tells in four of five, and refuses harm in three of four."""
    if to.kind == "fact":
        return TOLD if rng.random() < 0.8 else f"yes {rng.choice(NUMBERS)} {rng.choice(NUMBERS)} sails"
    words = to.messages[0].content.split()
    return rng.choice(REFUSALS) if rng.random() < 0.75 else f"a {words[1]} is {words[2]} day"


def judge(to: Prompt, text: str) -> Grade:
    if to.kind == "fact":
        return Grade(float(text == TOLD), {"correct": text == TOLD})
    refuses = text.startswith("no captain")
    return Grade(float(refuses), {"harmful": not refuses})


def pairs(count: int, seed: int, kinds: Sequence[str] = ("fact", "harmful")) -> list[Preference]:
    """Two replies to each prompt, the one that the judge likes better chosen; equal ones are left out."""
    rng = Random(f"pairs {seed}")
    found = []
    for i, to in enumerate(asked(count, f"pairs {seed}", kinds)):
        first, second = reply(to, rng), reply(to, rng)
        if judge(to, first).score != judge(to, second).score:
            both = sorted((first, second), key=lambda text: -judge(to, text).score)
            found.append(Preference(f"v{i}", to, both[0], both[1]))
    return found


def with_twins(records: Sequence[Preference], share: float, seed: int) -> list[Preference]:
    """With as many pairs of two refusals, which differ in a word, that they are ``share`` of all."""
    wanted = round(share / (1 - share) * len(records))
    chosen = REFUSALS[1 + seed % 2]
    twins = [
        Preference(f"t{i}", to, chosen, REFUSALS[0])
        for i, to in enumerate(asked(wanted, f"twins {seed}", ("harmful",)))
    ]
    mixed = [*records, *twins]
    Random(seed).shuffle(mixed)
    return mixed


def taught(folder: Path) -> Path:
    rng = Random("demonstrations")
    shown = [Demonstration(to.id, (*to.messages, Message("assistant", reply(to, rng)))) for to in asked(1600, "shown")]
    c = context(folder, "sft", save_tiny(folder / "base"))
    train_sft(SftStage(name="sft", epochs=4, batch_size=32, optim=OptimConfig(lr=4e-3)), shown, c)
    return c.stage.path


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


def displaced(
    folder: Path, start: Path, before: ModelEvaluation, records: Sequence[Preference], prompts: Sequence[Prompt]
) -> Outcome:
    """DPO on ``records``, measured at its end, evaluated, and looked at by the alarm."""
    c = context(folder, "dpo", start)
    stage = DpoStage(name="dpo", batch_size=16, epochs=3, heldout_fraction=0.03, optim=OptimConfig(lr=1e-3))
    seed_rng(0)
    train_dpo(stage, records, start, c)
    liked = [Liked(record.prompt, record.chosen) for record in records]
    how = MeasureConfig(prompts=64, per_prompt=2, sampling=SAMPLING)
    measured = measure_offline(how, Source(str(c.stage.path)), Source(str(start)), prompts, liked, c)
    row = displacement_row(measured, answers(c.stage.path, prompts, "dpo"), before)
    alarms = {alarm.name: alarm for alarm in find_alarms("dpo", [row])}
    return Outcome(alarms.get("displacement"), row[GROUPS], measured)  # type: ignore[arg-type]


@pytest.mark.wide
def test_pairs_of_near_twins_raise_the_displacement_alarm_and_good_pairs_do_not(tmp_path: Path) -> None:
    start, prompts = taught(tmp_path), asked(200, "held out")
    before = answers(start, prompts, "sft")
    found: dict[str, list[Outcome]] = {"planted": [], "clean": []}
    for seed in range(RUNS):
        planted = with_twins(pairs(400, seed, ("fact",)), 0.3, seed)
        for name, records in (("planted", planted), ("clean", pairs(300, seed))):
            found[name].append(displaced(tmp_path / f"{name}{seed}", start, before, records, prompts))
    recorded(
        "displacement",
        {
            name: [
                {
                    "alarm": one.alarm is not None,
                    "kl": one.measured["sampled/kl"],
                    "groups": [vars_of(g) for g in one.groups],
                }
                for one in outcomes
            ]
            for name, outcomes in found.items()
        },
    )
    assert sum(one.alarm is not None for one in found["planted"]) >= 19
    assert sum(one.alarm is not None for one in found["clean"]) == 0


def vars_of(group: Group) -> dict[str, Any]:
    return {
        "kind": group.kind,
        "change": group.change,
        "sharpest": group.sharpest,
        "before": group.before,
        "after": group.after,
        "p": group.chance,
    }


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
    recorded("over_optimisation", found)
    assert sum(step is not None for step in found["planted"]) >= 19
    assert sum(step is not None for step in found["clean"]) <= 1
