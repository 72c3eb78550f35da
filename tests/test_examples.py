"""The example that is a file of its own, held against the stage that does the same."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT
from tiny import prompt, save_tiny
from torch import Tensor

from keel.model.checkpoint import load_policy
from keel.pipeline.run import run_pipeline
from keel.recipe.recipe import Recipe
from keel.run import RunDir, Silent
from keel.stages.registry import RUNNERS

FILE = ROOT / "examples" / "ppo_in_one_file.py"
REWARD = "def likes_o(prompt, text):\n    return float(min(4, text.count('o')))\n"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ppo_in_one_file", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_single_file_ppo_is_the_ppo_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two rollouts, two epochs of two steps each: the same figures a rollout and the same weights, to rounding."""
    base, prompts, reward = save_tiny(tmp_path / "base"), tmp_path / "prompts.jsonl", tmp_path / "reward.py"
    texts = [prompt(n).messages[0].content for n in range(20)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    reward.write_text(REWARD)
    stage = {
        "kind": "ppo", "name": "ppo", "model": "base", "critic": "base", "critic_lr": 2e-3, "prompts": str(prompts),
        "rewards": [{"source": {"kind": "python", "ref": f"{reward}:likes_o"}}],
        "episodes": 32, "rollout_batch": 16, "minibatches": 2, "epochs": 2, "sampling": {"max_new_tokens": 8},
        "kl": {"coef": 0.3}, "optim": {"lr": 1e-3, "warmup": 0, "schedule": "constant"}, "precision": "fp32",
    }  # fmt: skip
    recipe = {"name": "x", "model": {"path": str(base)}, "stages": [stage], "seed": 3}
    run = RunDir(tmp_path / "run")
    run_pipeline(Recipe.model_validate(recipe), run, RUNNERS, Silent())
    rows = run.stage("ppo").metrics.rows()

    module = example()
    words = f"--model {base} --prompts {prompts} --reward {reward}:likes_o --rollouts 2 --batch 16 --minibatches 2 "
    words += "--epochs 2 --max-new-tokens 8 --kl-coef 0.3 --lr 1e-3 --critic-lr 2e-3 --seed 3"
    policy = module.main(module.arguments(words.split()))
    lines = [list(map(float, re.findall(r"-?\d+\.\d+", line))) for line in capsys.readouterr().out.splitlines()]
    names = ("objective/scores", "objective/kl", "policy/entropy_avg")
    assert [line[:3] for line in lines] == [pytest.approx([row[name] for name in names], abs=1e-3) for row in rows]

    start, theirs = flat(load_policy(base)[0]), flat(load_policy(run.stage("ppo").path)[0])
    moved = (theirs - start).norm()
    assert moved > 0.1
    assert (flat(policy) - theirs).norm() < 1e-4 * moved


def test_it_is_short_and_its_default_reward_is_what_it_says() -> None:
    assert len(FILE.read_text().splitlines()) <= 200
    module = example()
    reward = module.short_and_finished
    assert reward(prompt(0), "one two three four five six seven eight.") == 1.0
    assert reward(prompt(0), "one two three four five six seven eight") == 0.5
    assert reward(prompt(0), "word " * 60) == -1.0
    with pytest.raises(SystemExit):
        module.arguments(["--batch", "4", "--minibatches", "8"])
