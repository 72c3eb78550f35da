"""Pretraining text mixed into a policy's training: the loss against transformers' own, that it keeps what training
would forget, and that nothing changes where it is not asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pipeline import World
from test_stages import loop_recipe, run
from test_train import context, weights
from tiny import WORDS, demonstrations, preferences, prompt, save_tiny
from transformers import AutoModelForCausalLM

from keel.check import check_recipe
from keel.data.chat import Chat
from keel.eval.capability import text_loss
from keel.model.checkpoint import load_policy
from keel.pipeline.run import plan
from keel.recipe.dpo import DpoStage
from keel.recipe.grpo import GrpoStage
from keel.recipe.ppo import PpoStage
from keel.recipe.recipe import Recipe
from keel.recipe.reward import RewardStage
from keel.recipe.sections import OptimConfig
from keel.recipe.sft import SftStage
from keel.recipe.stage import PtxConfig
from keel.train.context import TrainContext
from keel.train.dpo import train_dpo
from keel.train.grpo import train_grpo
from keel.train.ppo import Ppo, train_ppo
from keel.train.ptx import Ptx
from keel.train.sft import train_sft
from keel.types import Completion, Prompt, Scores

TEXTS = [" ".join(WORDS[(n * k + n) % len(WORDS)] for k in range(5 + 3 * n)) for n in range(12)]
MIX = PtxConfig(coef=0.7, batch_size=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learned TEXTS and a little of the demonstrations."""
    tmp = tmp_path_factory.mktemp("ptx")
    c = replace(context(tmp, "sft", save_tiny(tmp / "base")), texts=TEXTS)
    optim = OptimConfig(lr=3e-3)
    train_sft(SftStage(name="sft", optim=optim, batch_size=8, epochs=6, ptx=MIX), demonstrations(60), c)
    return c.stage.path


def loss_on_texts(path: Path) -> float:
    policy, tokenizer = load_policy(path)
    return text_loss(policy, [Chat(tokenizer).encode_text(text) for text in TEXTS]).mean


@pytest.mark.parametrize("batch_tokens", [20, 100_000])
def test_the_share_of_a_step_against_transformers_loss(model: Path, tmp_path: Path, batch_tokens: int) -> None:
    """Loss and gradient, in one batch and in many; a text longer than the limit counts as its pieces."""
    stage = SftStage(name="sft", ptx=MIX, batch_tokens=batch_tokens)
    policy, tokenizer = load_policy(model)
    ptx = Ptx(policy, tokenizer, stage, replace(context(tmp_path, "x", model, max_length=16), texts=TEXTS))
    micros = ptx(3)
    assert (len(micros) > 1) == (batch_tokens == 20)
    total, tokens, shares = 0.0, 0.0, 0.0
    for micro in micros:
        loss, stats = micro()
        loss.backward()
        shares += float(loss.detach())
        total, tokens = total + stats["loss/ptx_avg"][0], tokens + stats["loss/ptx_avg"][1]
    ours = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    plain = AutoModelForCausalLM.from_pretrained(model)
    seen = [TEXTS[i] for i in ptx.schedule.batch(3)]
    assert len(set(seen)) == 5
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in seen]
    rows = [row[i : i + 16] for row in ids for i in range(0, len(row), 16)]
    pieces = [torch.tensor([row]) for row in rows if len(row) > 1]
    assert len(pieces) > 5
    count = sum(piece.shape[1] - 1 for piece in pieces)
    slow = 0.7 * sum(plain(piece, labels=piece).loss * (piece.shape[1] - 1) for piece in pieces) / count
    slow.backward()
    theirs = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
    assert tokens == count
    assert shares == pytest.approx(float(slow.detach()), abs=1e-5)
    assert 0.7 * total / tokens == pytest.approx(shares, abs=1e-5)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_every_text_is_seen_before_one_comes_again(model: Path, tmp_path: Path) -> None:
    stage = SftStage(name="sft", ptx=PtxConfig(coef=1.0, batch_size=3))
    policy, tokenizer = load_policy(model)
    ptx = Ptx(policy, tokenizer, stage, replace(context(tmp_path, "x", model), texts=TEXTS), begin=2)
    assert ptx(0) == ptx(1) == []
    seen = [i for step in range(4) for i in ptx.schedule.batch(step)]
    assert sorted(seen) == list(range(12))
    assert len(ptx(2)) == 1
    assert len(ptx(10_000)) == 1  # texts have no end


class _Liking:
    def score(self, prompts: list[Prompt], completions: list[Completion]) -> Scores:
        return Scores(torch.tensor([float("captain" in c.text) for c in completions]))


def _train(kind: str, c: TrainContext, mix: PtxConfig | None, warmup: int = 0) -> None:
    optim = OptimConfig(lr=1e-2, warmup=0, schedule="constant")
    prompts = [prompt(n) for n in range(16)]
    online = {
        "name": kind, "ptx": mix, "optim": optim, "episodes": 128, "rollout_batch": 32,
        "rewards": [{"source": {"kind": "python", "ref": "x:y"}}], "sampling": {"max_new_tokens": 6},
    }  # fmt: skip
    if kind == "sft":
        train_sft(SftStage(name="sft", ptx=mix, optim=optim, batch_size=8, epochs=2), demonstrations(60), c)
    elif kind == "dpo":
        train_dpo(DpoStage(name="dpo", ptx=mix, optim=optim, batch_size=8, epochs=2), preferences(60), c.model_path, c)
    elif kind == "ppo":
        stage = PpoStage.model_validate({**online, "kl": {"coef": 0.01}, "critic_warmup": warmup})
        train_ppo(stage, prompts, _Liking(), c.model_path, None, c)
    else:
        train_grpo(GrpoStage.model_validate({**online, "group_size": 4}), prompts, _Liking(), c.model_path, c)


# GRPO has PPO's loop.
@pytest.mark.parametrize("kind", ["sft", "dpo", "ppo", pytest.param("grpo", marks=pytest.mark.wide)])
def test_what_training_would_forget_is_kept(kind: str, model: Path, tmp_path: Path) -> None:
    before, after = loss_on_texts(model), {}
    for name, mix in (("without", None), ("with", MIX)):
        c = replace(context(tmp_path / name, kind, model), texts=TEXTS if mix else ())
        _train(kind, c, mix)
        after[name] = loss_on_texts(c.stage.path)
        assert ("loss/ptx_avg" in c.stage.metrics.rows()[-1]) == (mix is not None)
    assert after["without"] > before + 0.3
    assert after["with"] < before + 0.1


def test_only_the_critic_learns_in_its_warm_up(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after: list[torch.Tensor] = []

    def watching(self: Ppo, iteration: int) -> Any:
        after.append(torch.cat([p.detach().flatten().clone() for p in self.modules["policy"].parameters()]))
        return {}, False

    monkeypatch.setattr(Ppo, "after", watching)
    _train("ppo", replace(context(tmp_path, "ppo", model), texts=TEXTS), MIX, warmup=3)
    assert len(after) == 4
    torch.testing.assert_close(after[2], weights(model), atol=0, rtol=0)
    assert float((after[3] - after[2]).abs().max()) > 1e-3


# ------------------------------------------------------------------------------------------------- recipes and runs


def test_a_recipe_must_name_the_text(tmp_path: Path) -> None:
    tree = {"model": {"path": "m"}, "stages": [{"kind": "sft", "name": "sft", "ptx": {"coef": 0.5}}]}
    with pytest.raises(ValueError, match=r"sft\.ptx mixes in plain text; set data\.pretraining=FILE"):
        Recipe.model_validate(tree)
    assert Recipe.model_validate({**tree, "data": {"pretraining": "t.jsonl"}})
    with pytest.raises(ValueError, match="ptx"):
        RewardStage.model_validate({"name": "reward", "ptx": {"coef": 0.5}})


def test_changed_text_redoes_what_mixes_it_in(tmp_path: Path) -> None:
    world = World(tmp_path)
    text = world.folder / "pretraining.jsonl"
    text.write_text("one")
    world.data["pretraining"] = str(text)
    recipe = world.recipe({"ppo": {"ptx": {"coef": 0.5}}})
    world.go(recipe)
    text.write_text("two")
    assert {step.stage.name for step in plan(recipe, world.run) if step.state == "stale"} == {"ppo", "eval", "report"}


def test_a_run_mixes_it_in_and_check_sees_what_leaks(tmp_path: Path) -> None:
    recipe = loop_recipe(tmp_path, None)
    text = tmp_path / "pretraining.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    recipe["data"] |= {"pretraining": str(text), "base_text": str(text)}
    recipe["stages"] = [{**recipe["stages"][0], "ptx": {"coef": 0.5}}]
    done = run(recipe, tmp_path / "run")
    assert all("loss/ptx_avg" in row for row in done.stage(recipe["stages"][0]["name"]).metrics.rows())
    (leak,) = [f for f in check_recipe(Recipe.model_validate(recipe), done) if "pretraining" in f.sentence]
    assert (leak.level, leak.place) == ("error", "data.base_text")
    assert leak.sentence == "12 of 12 texts are in data.pretraining too"
