"""Models that do not read the same tokens, and texts beyond the positions: right, or refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_train import PPO, LikesO, context
from tiny import demonstrations, preferences, prompt, save_tiny, tiny_llama
from torch import Tensor

from keel.data.chat import Chat
from keel.data.sources import Fact
from keel.eval.capability import encode_facts, text_loss
from keel.eval.models import EvaluationInputs, evaluate_models
from keel.model.checkpoint import load_policy
from keel.recipe.dpo import DpoStage
from keel.recipe.grpo import GrpoStage
from keel.recipe.ppo import PpoStage
from keel.recipe.sections import SamplingConfig
from keel.recipe.sft import SftStage
from keel.reward.judge import JudgeFromPython
from keel.run import Silent
from keel.train.context import TrainContext
from keel.train.dpo import train_dpo
from keel.train.grpo import train_grpo
from keel.train.ppo import train_ppo
from keel.train.sft import train_sft
from keel.types import UserError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model, and an SFT model to which the chatml template added tokens."""
    tmp = tmp_path_factory.mktemp("models")
    base = save_tiny(tmp / "base")
    c = context(tmp, "sft", base)
    object.__setattr__(c.base_model, "chat_template", "chatml")
    train_sft(SftStage(name="sft", batch_size=32), demonstrations(30), c)
    rows = [load_policy(path)[0].get_input_embeddings().weight.shape[0] for path in (base, c.stage.path)]  # type: ignore[operator]
    assert rows[1] > rows[0], "the template is to add tokens"
    return base, c.stage.path


def _inputs(models: dict[str, Path], baseline: str, texts: list[str]) -> EvaluationInputs:
    return EvaluationInputs(
        models=models, baseline=baseline, prompts=[prompt(n) for n in range(4)], texts=texts, facts=[],
        judge=JudgeFromPython(lambda _, text: float(len(text))), scorer=None, online_runs={}, seed=0, bootstrap=100,
        sampling=SamplingConfig(max_new_tokens=4), show=1, device="cpu", precision="fp32",
    )  # fmt: skip


def test_a_base_model_as_baseline_has_no_kl_to_what_it_cannot_read(models: tuple[Path, Path]) -> None:
    base, sft = models
    summary = evaluate_models(_inputs({"sft": sft, "base": base}, "base", []), Silent())
    assert summary["stages"]["sft"]["kl_to_base"] is None
    assert sum(summary["stages"]["sft"][name] for name in ("wins", "losses", "ties")) == 4
    other_way = evaluate_models(_inputs({"base": base, "sft": sft}, "sft", []), Silent())
    assert other_way["stages"]["sft"]["kl_to_sft"] == pytest.approx(0, abs=1e-5)


def _train(kind: str, reference: Path, c: TrainContext) -> None:
    if kind == "dpo":
        train_dpo(DpoStage(name="dpo"), preferences(20), reference, c)
    elif kind == "ppo":
        train_ppo(PpoStage(**PPO, episodes=32), [prompt(0)], LikesO(), reference, None, c)  # type: ignore[arg-type]
    else:
        train_grpo(GrpoStage.model_validate({**PPO, "name": "grpo"}), [prompt(0)], LikesO(), reference, c)


@pytest.mark.parametrize("kind", ["dpo", "ppo", "grpo"])
def test_a_reference_must_know_the_policys_tokens(kind: str, models: tuple[Path, Path], tmp_path: Path) -> None:
    base, sft = models
    says = rf"{kind}\.reference \(.*base\): it cannot read .*: it has rows for 328 tokens, and '<\|im_end\|>' is number"
    with pytest.raises(UserError, match=says):
        _train(kind, base, context(tmp_path, kind, sft))


def test_a_text_beyond_the_positions_is_measured_in_pieces(models: tuple[Path, Path]) -> None:
    base, _ = models
    model, tokenizer = load_policy(base)
    ids = Chat(tokenizer).encode_text("the captain sails from port to port " * 80).ids
    assert len(ids) > 2 * 256
    plain = tiny_llama().eval()
    losses: list[Tensor] = []
    for start in range(0, len(ids), 256):
        part = torch.tensor([ids[start : start + 256]])
        with torch.no_grad():
            logp = plain(part).logits[0, :-1].log_softmax(-1)
        losses.append(-logp.gather(1, part[0, 1:, None]).flatten())
    loss = text_loss(model, [Chat(tokenizer).encode_text("the captain sails from port to port " * 80)], longest=256)
    assert loss.mean == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert loss.count == 1
    summary = evaluate_models(_inputs({"base": base}, "base", ["the captain sails from port to port " * 80]), Silent())
    assert summary["stages"]["base"]["base_text_loss"] == pytest.approx(loss.mean, rel=1e-5)


def test_a_fact_beyond_the_positions_is_named(models: tuple[Path, Path]) -> None:
    _, tokenizer = load_policy(models[0])
    rows = [Fact("a", "the ship is", (" good", " salt"), 0), Fact("b", "the ship is " * 100, (" good", " salt"), 0)]
    with pytest.raises(UserError, match=r"data\.facts row 2: it has \d+ tokens with a choice and the model takes 256"):
        encode_facts(tokenizer, rows, 256)
