"""Best of n by several weighted rewards, filtering by their sum, learning from what was kept, and evaluation by the
same mix. The oracle: the same samples drawn without a choice, scored and sorted here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from test_stages import data_files, run, write_jsonl
from tiny import Counting, prompt, save_tiny, tiny_tokenizer

from keel.check import check_recipe
from keel.data.chat import Chat
from keel.model.checkpoint import load_scalar
from keel.pipeline.run import plan
from keel.recipe.recipe import Recipe
from keel.recipe.sections import SamplingConfig
from keel.reward.scorer import RewardModelScorer
from keel.rollout.collect import Choice, sample_replies
from keel.run import RunDir
from keel.stages.inputs import KEPT
from keel.store import Store
from keel.types import Completion, Message, Prompt, Scores, UserError

# ------------------------------------------------------------------------------------------------------ the choice


class Script:
    """A sampler whose replies are written down: three a prompt, the last one cut at the limit."""

    texts = ("good", "a good good ship", "good good good good")

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seed: int) -> list[Completion]:
        encode = tiny_tokenizer().encode
        ids = [tuple(encode(self.texts[i % 3], add_special_tokens=False)) for i in range(len(prompts))]
        return [Completion("", (*x, 0) if i % 3 < 2 else x, (), i % 3 < 2) for i, x in enumerate(ids)]


class Goods:
    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        assert [p.id for p in prompts] == ["p0", "p0", "p1", "p1"], "cut replies are not even scored"
        return Scores(torch.tensor([float(c.text.count("good")) for c in completions]))


@pytest.mark.parametrize(
    ("keep", "bound", "kept"),
    [
        (1, 0.0, [("a good good ship", 2.0)]),
        (2, 0.0, [("a good good ship", 2.0), ("good", 1.0)]),
        (3, 1.5, [("a good good ship", 2.0)]),
        (3, 9.0, []),
    ],
)
def test_the_best_whole_replies_are_kept(keep: int, bound: float, kept: list[tuple[str, float]]) -> None:
    prompts = [prompt(0), prompt(1)]
    chat, sampling = Chat(tiny_tokenizer()), SamplingConfig()
    choice = Choice(keep, candidates=3, scorer=Goods(), min_score=bound)
    found = sample_replies(Script(), chat, prompts, sampling, choice, 0, Counting())
    assert [[(c.text, c.reward) for c in group] for group in found] == [kept, kept]


# -------------------------------------------------------------------------------------------------- through a recipe


def helpful(prompt: Prompt, text: str) -> float:
    return float(len(text))


def harmless(prompt: Prompt, text: str) -> float:
    return -float(text.count("e"))


HERE = str(Path(__file__))
MIX = [
    {"source": {"kind": "python", "ref": f"{HERE}:helpful"}, "weight": 0.5},
    {"source": {"kind": "python", "ref": f"{HERE}:harmless"}, "weight": 2.0},
]


def total(text: str) -> float:
    return 0.5 * len(text) - 2.0 * text.count("e")


def mixed_recipe(tmp: Path, **sample: Any) -> dict[str, Any]:
    prompts = [{"prompt": prompt(n).messages[0].content} for n in range(30)]
    save_tiny(tmp / "base")
    short = {"max_new_tokens": 60, "batch_size": 64, "temperature": 1.0}
    return {
        "model": {"path": str(tmp / "base"), "chat_template": "keel"},
        "data": {**data_files(tmp), "prompts": write_jsonl(tmp / "prompts.jsonl", prompts)},
        "stages": [
            {"kind": "sft", "name": "sft", "epochs": 8, "batch_size": 8, "optim": {"lr": 5e-3}},
            {"kind": "sample", "name": "best", "per_prompt": 1, "candidates": 6, "sampling": short, **sample},
            {"kind": "sft", "name": "raft", "model": "sft", "demonstrations": "best", "epochs": 1},
            {
                "kind": "eval",
                "name": "eval",
                "models": ["sft", "raft"],
                "judge": {"kind": "mixed", "rewards": MIX},
                "rewards": MIX,
                "sampling": short,
                "bootstrap": 100,
            },
        ],
    }


def test_the_best_of_n_is_learned_from_and_evaluated_by_the_same_mix(tmp_path: Path) -> None:
    everything = mixed_recipe(tmp_path, per_prompt=6, max_similarity=1.0)
    everything["stages"] = everything["stages"][:2]
    drawn = run(everything, tmp_path / "run")
    with Store(drawn.store_url) as store:
        candidates: dict[str, list[str]] = {}
        for reply in store.responses():
            if reply.finished:
                candidates.setdefault(reply.prompt_id, []).append(reply.text)
    bests = {max(map(total, texts)) for texts in candidates.values()}
    assert len(bests) > 5, "a test of a choice needs something to choose"

    recipe = mixed_recipe(tmp_path, rewards=MIX)
    done = run(recipe, tmp_path / "run")
    rows = [json.loads(line) for line in (done.stage("best").path / KEPT).read_text().splitlines()]
    assert len(rows) == len(candidates)
    for row in rows:
        assert row["reward"] == pytest.approx(total(row["messages"][-1]["content"]), abs=1e-4)
    assert {round(row["reward"], 3) for row in rows} == {round(best, 3) for best in bests}
    summary = done.stage("best").summary()
    assert summary["reward"] == pytest.approx(sum(row["reward"] for row in rows) / len(rows))
    learned = done.stage("raft").summary()
    assert learned["demonstrations"] + learned["heldout"] == len(rows)

    figures = done.summary()["stages"]["raft"]
    parts = {name.rpartition(":")[2]: mean for name, mean in figures.items() if name.startswith("reward/")}
    assert figures["reward"] == pytest.approx(0.5 * parts["helpful"] + 2.0 * parts["harmless"], abs=1e-4)
    assert figures["gold_reward"] == pytest.approx(figures["reward"], abs=1e-4)
    assert done.summary()["judge"] == f"0.5 × {HERE}:helpful + 2 × {HERE}:harmless"

    # What is chosen by other weights is another choice, and what learned from it is stale with it.
    recipe["stages"][1]["rewards"] = [MIX[0], {**MIX[1], "weight": 3.0}]
    states = {step.stage.name: step.state for step in plan(Recipe.model_validate(recipe), done)}
    assert states == {"sft": "done", "best": "stale", "raft": "stale", "eval": "stale"}


def test_a_filter_leaves_out_what_scores_lower(tmp_path: Path) -> None:
    recipe = mixed_recipe(tmp_path, rewards=MIX, per_prompt=6, min_reward=4.0)
    recipe["stages"] = recipe["stages"][:2]
    done = run(recipe, tmp_path / "run")
    summary = done.stage("best").summary()
    rows = [json.loads(line) for line in (done.stage("best").path / KEPT).read_text().splitlines()]
    rewards = [row["reward"] for row in rows]
    assert len(rewards) == summary["responses"]
    assert min(rewards) >= 4.0
    prompts = {row["messages"][0]["content"] for row in rows}
    assert summary["prompts_without"] == summary["prompts"] - len(prompts) > 0
    recipe["stages"][1]["min_reward"] = 1e6
    with pytest.raises(UserError, match=r"stage best: no response is left; .*min_reward; change one of the two"):
        run(recipe, tmp_path / "run")


def test_the_shipped_recipe_mixes_two_reward_models(tmp_path: Path) -> None:
    """Helpful and harmless, each trained on pairs of its own, weigh in the choice, the filter and the evaluation."""
    recipe: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "best_of_n.yaml").read_text())
    files = mixed_recipe(tmp_path)
    first = run(files | {"stages": files["stages"][:1]}, tmp_path / "first")
    recipe |= {"model": {"path": str(first.stage("sft").path)}}
    recipe["data"] = {"prompts": files["data"]["prompts"], "max_length": 200, "max_prompt_length": 60}
    short = {"max_new_tokens": 60, "batch_size": 64}
    pairs = {"preferences": files["data"]["preferences"], "batch_size": 8, "optim": {"lr": 1e-3}}
    changes = {
        "helpful": pairs,
        "harmless": pairs | {"seed": 5},
        "best": {"candidates": 4, "sampling": short},
        "sft": {"batch_size": 8},
        "eval": {"sampling": short, "bootstrap": 100},
    }
    for stage in recipe["stages"]:
        stage |= changes.get(stage["name"], {})
    done = run(recipe, tmp_path / "run")
    rows = [json.loads(line) for line in (done.stage("best").path / KEPT).read_text().splitlines()]
    prompts = [Prompt(str(i), (Message("user", row["messages"][0]["content"]),)) for i, row in enumerate(rows)]
    replies = [Completion(row["messages"][-1]["content"]) for row in rows]
    helps, harms = (
        RewardModelScorer(load_scalar(done.stage(name).path), 4096).score(prompts, replies).reply_N.tolist()
        for name in ("helpful", "harmless")
    )
    assert helps != harms
    for row, helpful, harmless in zip(rows, helps, harms, strict=True):
        assert row["reward"] == pytest.approx(helpful + 0.5 * harmless, abs=0.03, rel=0.01)  # bfloat16, perhaps
        assert row["reward"] >= 0
    for figures in done.summary()["stages"].values():
        assert figures["reward"] == pytest.approx(
            figures["reward/helpful"] + 0.5 * figures["reward/harmless"], abs=1e-3
        )
        assert figures["gold_reward"] == pytest.approx(figures["reward"], abs=1e-3)
    page = done.report.read_text()
    assert all(text in page for text in ("1 × helpful + 0.5 × harmless", "of it helpful", "the best of many replies"))


def test_ppo_shows_each_term_of_a_mixed_reward(tmp_path: Path) -> None:
    recipe = mixed_recipe(tmp_path)
    short = {"max_new_tokens": 8, "batch_size": 16}
    ppo = {"kind": "ppo", "name": "ppo", "rewards": MIX, "episodes": 16, "rollout_batch": 8, "sampling": short}
    recipe["stages"] = [recipe["stages"][0] | {"epochs": 1}, ppo]
    for row in run(recipe, tmp_path / "run").stage("ppo").metrics.rows():
        parts = {name.rpartition(":")[2]: x for name, x in row.items() if name.startswith("objective/scores/")}
        assert row["objective/scores"] == pytest.approx(0.5 * parts["helpful"] + 2 * parts["harmless"], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_reward": 1.0}, "name them in rewards"),
        ({"rewards": MIX, "candidates": 1}, "there are 1 of them; raise candidates or set min_reward"),
    ],
)
def test_a_choice_without_anything_to_choose(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(mixed_recipe(tmp_path, **changes))


def test_check_looks_at_what_rewards_name(tmp_path: Path) -> None:
    broken = [{"source": {"kind": "python", "ref": f"{HERE}:helpfull"}}, {"source": {"kind": "model", "model": "nope"}}]
    recipe = mixed_recipe(tmp_path, rewards=broken)
    recipe["stages"][2]["demonstrations"] = ["best", "eval"]
    recipe["stages"][3] |= {"judge": {"kind": "mixed", "rewards": broken}, "rewards": broken}
    found = [
        str(f) for f in check_recipe(Recipe.model_validate(recipe), RunDir(tmp_path / "run")) if f.level == "error"
    ]
    for place in ("best.rewards.0.source", "eval.rewards.0.source", "eval.judge.rewards.0.source"):
        assert any(f.startswith(f"{place}: ") and "did you mean 'helpful'" in f for f in found), found
    assert any("best.rewards.1.source.model: 'nope' is neither a stage" in f for f in found)
    assert any("raft.demonstrations.1: stage 'eval' comes after 'raft'" in f for f in found)
