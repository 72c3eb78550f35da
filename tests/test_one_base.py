"""One base, four roles: one copy of the weights, and the numbers of four models of their own."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_stages import assistant, run
from tiny import preferences, prompt, save_tiny
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from keel.data.collate import pack
from keel.model.checkpoint import load_scalar
from keel.model.logprobs import token_logprobs
from keel.model.packed import backbone
from keel.model.shared_base import SharedBase
from keel.recipe.ppo import PpoStage
from keel.recipe.recipe import Recipe
from keel.recipe.reward import RewardStage
from keel.recipe.sections import DataConfig, LoraConfig, ModelConfig, OptimConfig, SamplingConfig
from keel.reward.scorer import RewardModelScorer
from keel.run import RunDir, Silent
from keel.train.context import TrainContext
from keel.train.online import make_rollouts
from keel.train.ppo import train_ppo
from keel.train.reward import train_reward
from keel.train.roles import roles_of
from keel.types import Completion, Encoded, Prompt, Scores, UserError

ROOT = Path(__file__).parent.parent
LORA = LoraConfig(rank=4)
PROMPTS = [prompt(n) for n in range(40)]


def context(tmp: Path, name: str, model: Path, shared: SharedBase | None = None) -> TrainContext:
    stage = RunDir(tmp / "run").stage(name)
    stage.begin(name)
    torch.manual_seed(7)  # new adapters are drawn from the global generator
    settings = ModelConfig(path=str(model), lora=LORA)
    return TrainContext(stage, Silent(), model, settings, DataConfig(), "cpu", "fp32", 0, shared)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def reward(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model trained with adapters on the base."""
    c = context(tmp_path_factory.mktemp("reward"), "reward", base)
    train_reward(RewardStage(name="reward", optim=OptimConfig(lr=1e-2), batch_size=8, epochs=4), preferences(60), c)
    return c.stage.path


def ppo_stage(**changes: Any) -> PpoStage:
    settings: dict[str, Any] = {
        "name": "ppo",
        "rewards": [{"source": {"kind": "model", "model": "reward"}}],
        "sampling": SamplingConfig(max_new_tokens=8),
        "rollout_batch": 16,
        "episodes": 64,
        "epochs": 2,
        "optim": OptimConfig(lr=1e-2),
        "one_base": True,
    }
    return PpoStage(**settings | changes)


def scorer_of(shared: SharedBase, reward: Path) -> RewardModelScorer:
    model = shared.reward_model(reward)
    model.model.requires_grad_(False)
    return RewardModelScorer(model, 4096)


def ppo(tmp: Path, base: Path, reward: Path, **changes: Any) -> TrainContext:
    shared = SharedBase(base, "cpu", LORA)
    c = context(tmp, "ppo", base, shared)
    train_ppo(ppo_stage(**changes), PROMPTS, scorer_of(shared, reward), base, reward, c)
    return c


def test_a_training_stages_models_are_made_in_one_place() -> None:
    """Whoever else in the room loads a model would not put it on one base, nor spread it over devices."""
    makes = re.compile(r"\b(load_policy|load_scalar|SharedBase\()")
    found = {path.name for path in (ROOT / "keel" / "train").glob("*.py") if makes.search(path.read_text("utf-8"))}
    assert found == {"roles.py", "offline.py"}  # the latter reads a finished checkpoint, as an evaluation does


def held_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Of distinct storages."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
    return sum(storages.values())


def parameters_of(models: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [p for model in models for p in model.parameters()]


def roles(base: Path, reward: Path, tmp: Path) -> dict[str, nn.Module]:
    """The four models of a PPO stage, as its own code makes them."""
    shared = SharedBase(base, "cpu", LORA)
    c, stage = context(tmp, "roles", base, shared), ppo_stage()
    scorer = scorer_of(shared, reward)
    rollouts = make_rollouts(stage, PROMPTS, scorer, base, c)
    assert rollouts.reference is not None
    critic = roles_of(stage, c).critic(reward)
    models = {"policy": rollouts.policy, "reference": rollouts.reference, "reward": scorer.reward_model.model}
    return models | {"critic": critic.model}


def test_the_base_is_in_memory_once(base: Path, reward: Path, tmp_path: Path) -> None:
    models = roles(base, reward, tmp_path)
    one = sum(p.numel() * p.element_size() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    adapters = {
        name: sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "lora_" in n or "score" in n)
        for name, model in models.items()
    }
    assert adapters["reference"] == 0
    assert 0 < adapters["policy"] < one / 2
    assert held_bytes(parameters_of(models.values())) == one + sum(adapters.values())
    apart = [copy.deepcopy(model) for model in models.values()]
    assert held_bytes(parameters_of(apart)) == 4 * one + sum(adapters.values())
    # What is trained belongs to one role alone, and is nothing of the base.
    trained = {n: {id(p) for p in m.parameters() if p.requires_grad} for n, m in models.items()}
    assert trained["policy"]
    assert trained["critic"]
    assert not trained["policy"] & trained["critic"]
    assert not trained["reference"] | trained["reward"]
    assert not (trained["policy"] | trained["critic"]) & {id(p) for p in models["reference"].parameters()}


def test_the_same_numbers_as_four_models_apart(
    base: Path, reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = ppo(tmp_path / "together", base, reward)
    monkeypatch.setattr(SharedBase, "_tree", lambda self: copy.deepcopy(self.model))
    apart = ppo(tmp_path / "apart", base, reward)
    rows = [c.stage.metrics.rows() for c in (together, apart)]
    assert len(rows[0]) == 4
    assert rows[0][-1]["objective/kl"] > 0.01
    assert rows[0][0]["objective/kl"] == 0
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"time", "seconds"}:
            assert a[name] == pytest.approx(b[name], abs=1e-5), name
    states = [AutoModelForCausalLM.from_pretrained(c.stage.path).state_dict() for c in (together, apart)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], atol=1e-5, rtol=1e-5)


def test_policy_and_reference_agree_to_the_bit(base: Path, reward: Path, tmp_path: Path) -> None:
    """Before the first step, though one has adapters and the other could take the fused layers."""
    models = roles(base, reward, tmp_path)
    batch = pack([Encoded(tuple(range(10, 60)), (False,) + (True,) * 49)] * 3)
    with torch.no_grad():
        for parameter in models["reference"].parameters():
            parameter.mul_(20 if parameter.ndim > 1 else 1)  # or rounding would hardly show
        policy, reference = (token_logprobs(models[name], batch).logp_C for name in ("policy", "reference"))
        assert torch.equal(policy, reference)
        backbone(models["reference"]).keel_unfused = False  # type: ignore[assignment]
        assert not torch.equal(policy, token_logprobs(models["reference"], batch).logp_C)


def some_rows() -> list[Encoded]:
    replies = [[5, 9, 0], [30, 31, 32, 33], [7]]
    return [Encoded((6, 7, 8, *reply), (False,) * 3 + (True,) * len(reply)) for reply in replies]


def test_reward_and_critic_are_the_merged_checkpoint(base: Path, reward: Path) -> None:
    """What was trained with adapters and saved merged is the oracle; the scale comes along."""
    merged = load_scalar(reward)
    assert (merged.mean, merged.std) != (0.0, 1.0)
    shared = SharedBase(base, "cpu", LORA)
    batch = pack(some_rows())
    for checkpointing in (False, True):
        on_base = shared.reward_model(reward, checkpointing)
        with torch.no_grad():
            torch.testing.assert_close(on_base.score_packed(batch), merged.score_packed(batch), atol=1e-5, rtol=0)
            torch.testing.assert_close(on_base.values_packed(batch), merged.values_packed(batch), atol=1e-5, rtol=0)
        assert on_base.values_packed(batch).requires_grad


def test_a_new_critic_is_the_base_with_a_drawn_head(base: Path) -> None:
    batch = pack(some_rows())
    plain = load_scalar(base, new_head_seed=3)
    with torch.no_grad():
        torch.testing.assert_close(
            SharedBase(base, "cpu", LORA).new_critic(3, False).values_packed(batch), plain.values_packed(batch)
        )


def test_training_leaves_the_base_alone_and_writes_a_whole_model(base: Path, reward: Path, tmp_path: Path) -> None:
    before = {n: t.clone() for n, t in AutoModelForCausalLM.from_pretrained(base).state_dict().items()}
    shared = SharedBase(base, "cpu", LORA)
    c = context(tmp_path, "ppo", base, shared)
    train_ppo(ppo_stage(), PROMPTS, scorer_of(shared, reward), base, None, c)  # with a new critic
    for name, tensor in shared.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    trained = AutoModelForCausalLM.from_pretrained(c.stage.path)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    assert not (c.stage.path / "adapter_config.json").exists()


def test_gradient_checkpointing_changes_no_number(base: Path, reward: Path, tmp_path: Path) -> None:
    """Its second forward pass runs while the loss of another role is differentiated."""
    plain = ppo(tmp_path / "plain", base, reward).stage.metrics.rows()
    saving = ppo(tmp_path / "saving", base, reward, gradient_checkpointing=True).stage.metrics.rows()
    for a, b in zip(plain, saving, strict=True):
        for name in ("loss", "objective/kl", "loss/value_avg", "grad_norm/policy", "grad_norm/critic"):
            assert a[name] == pytest.approx(b[name], abs=1e-5), name


class Interrupted(Exception):
    pass


class Failing:
    """A scorer that stops the run at its third rollout."""

    def __init__(self, inner: RewardModelScorer) -> None:
        self.inner, self.calls = inner, 0

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        self.calls += 1
        if self.calls == 3:
            raise Interrupted
        return self.inner.score(prompts, completions)


def test_an_interrupted_run_ends_with_the_same_weights(base: Path, reward: Path, tmp_path: Path) -> None:
    whole = ppo(tmp_path / "whole", base, reward, save_every_seconds=0)
    shared = SharedBase(base, "cpu", LORA)
    c = context(tmp_path / "cut", "ppo", base, shared)
    stage = ppo_stage(save_every_seconds=0)
    with pytest.raises(Interrupted):
        train_ppo(stage, PROMPTS, Failing(scorer_of(shared, reward)), base, reward, c)
    torch.manual_seed(1234)  # other adapters to begin with: all is in the state
    again = SharedBase(base, "cpu", LORA)
    resumed = TrainContext(c.stage, Silent(), base, c.base_model, DataConfig(), "cpu", "fp32", 0, again)
    train_ppo(stage, PROMPTS, scorer_of(again, reward), base, reward, resumed)
    states = [AutoModelForCausalLM.from_pretrained(x.stage.path).state_dict() for x in (whole, resumed)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


# ------------------------------------------------------------------------------------------------------- refusals


def test_adapters_of_another_base_are_refused(base: Path, reward: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="trained on another base than"):
        SharedBase(other, "cpu", LORA).reward_model(reward)
    without = tmp_path / "without"
    shutil.copytree(reward, without)
    shutil.rmtree(without / "adapter")
    with pytest.raises(UserError, match="no adapters there"):
        SharedBase(base, "cpu", LORA).reward_model(without)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": None}, "set model.lora"),
        ({"reference": "base"}, "leave ppo.reference out"),
        ({"reward_model": "base"}, "reward must be a reward stage with model: sft"),
        ({"critic": "sft"}, "sft must be a reward stage"),
    ],
)
def test_recipes_that_cannot_share_a_base(change: dict[str, Any], message: str) -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "ppo_one_base.yaml").read_text())
    _, reward_stage, ppo_section, *_ = recipe["stages"]
    if "lora" in change:
        del recipe["model"]["lora"]
    if "reward_model" in change:
        reward_stage["model"] = change["reward_model"]
    ppo_section |= {k: v for k, v in change.items() if k in ("reference", "critic")}
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [pytest.param("llama", marks=pytest.mark.wide), "gpt2"])
def test_the_recipe_runs(architecture: str, tmp_path: Path) -> None:
    recipe = assistant(tmp_path, architecture, "ppo_one_base")
    recipe["model"]["lora"] = {"rank": 4}
    done = run(recipe, tmp_path / "run")
    assert done.stage("ppo").summary()["kl_at_start"] == pytest.approx(0, abs=1e-5)
    assert AutoModelForCausalLM.from_pretrained(done.stage("ppo").path)
    folder = done.stage("reward").path
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_labels == 1
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 4
