"""Adapters as files: alone or merged, on one another, of each kind, and the memory that merging takes. The oracles are
peft, which loads what was written, and the operating system's count of memory."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from test_saved import shaken
from tiny import save_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from keel.check.models import _adapter_rate
from keel.data.collate import pack
from keel.model import nf4
from keel.model.checkpoint import has_reward_head, load_policy, load_scalar, positions, save
from keel.model.logprobs import token_logprobs
from keel.model.merged import file_parts
from keel.model.packed import inner_model
from keel.model.places import root
from keel.recipe.recipe import Recipe
from keel.recipe.sections import LoraConfig, ModelConfig, Source
from keel.types import Encoded, UserError

IDS = (9, 8, 7, 6, 5, 4, 3, 2, 11, 12, 40, 41, 42)
BATCH = pack([Encoded(IDS, (False, *[True] * 12))])


def said(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return token_logprobs(model, BATCH).logp_C


def by_transformers(model: Any) -> Tensor:
    ids = torch.tensor([IDS])
    with torch.no_grad():
        logp = model.eval()(input_ids=ids).logits[0].log_softmax(-1)
    return logp[:-1].gather(1, ids[0, 1:, None])[:, 0]


def kept(model: nn.Module, tokenizer: Any, folder: Path) -> Path:
    folder.mkdir()
    save(model, tokenizer, folder)
    return folder


@pytest.mark.parametrize("kind", [{"rslora": True}, {"dora": True}, {"dora": True, "rslora": True}])
def test_each_kind_is_what_peft_and_transformers_load(kind: dict[str, bool], tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    model, tokenizer = load_policy(base, lora=LoraConfig(rank=4, **kind))
    torch.testing.assert_close(said(model), said(load_policy(base)[0]))  # new adapters add nothing
    out = kept(shaken(model), tokenizer, tmp_path / "out")
    settings = PeftConfig.from_pretrained(str(out / "adapter"))
    assert (settings.use_rslora, settings.use_dora) == (kind.get("rslora", False), kind.get("dora", False))
    wanted = said(model)
    assert float((wanted - said(load_policy(base)[0])).abs().max()) > 0.05
    own = AutoModelForCausalLM.from_pretrained(base)
    found = [
        by_transformers(PeftModel.from_pretrained(own, str(out / "adapter"))),
        by_transformers(AutoModelForCausalLM.from_pretrained(out)),
        said(load_policy(out)[0]),
        said(load_policy(out / "adapter")[0]),
    ]
    for one in found:
        torch.testing.assert_close(one, wanted, atol=2e-5, rtol=1e-5)


def test_adapters_that_were_not_merged_are_models_for_what_follows(tmp_path: Path) -> None:
    """SFT with marks of its own, a policy on top of it, a reward model on that: each of adapters alone."""
    base = save_tiny(tmp_path / "base")
    lora = LoraConfig(rank=2, merged=False)
    sft, tokenizer = load_policy(base, chat_template="chatml", learn_marks=True, lora=lora)
    inner_model(sft).generation_config.eos_token_id = [3, 5]
    first = kept(shaken(sft), tokenizer, tmp_path / "sft")
    assert {path.name for path in first.iterdir()} == {"adapter"}
    wanted = said(sft)
    torch.testing.assert_close(said(load_policy(first)[0]), wanted, atol=1e-5, rtol=1e-5)
    own = AutoModelForCausalLM.from_pretrained(base)
    own.resize_token_embeddings(len(tokenizer))
    peer = PeftModel.from_pretrained(own, str(first / "adapter"))
    torch.testing.assert_close(by_transformers(peer), wanted, atol=1e-5, rtol=1e-5)
    added = [len(tokenizer) - 1, len(tokenizer) - 2]
    rows = inner_model(sft).get_input_embeddings().weight[added]
    torch.testing.assert_close(peer.get_input_embeddings()(torch.tensor([added]))[0], rows)

    dpo, read = load_policy(first, lora=lora)
    assert read.keel_ends == (3, 5)
    second = kept(shaken(dpo), read, tmp_path / "dpo")
    assert PeftConfig.from_pretrained(str(second / "adapter")).base_model_name_or_path == str(first)
    torch.testing.assert_close(said(load_policy(second)[0]), said(dpo), atol=1e-5, rtol=1e-5)
    assert load_policy(second)[1].keel_ends == (3, 5)
    assert positions(second) == 256
    assert root(Source(str(second))).path == str(base)

    reward = load_scalar(second, new_head_seed=0, lora=lora)
    reward.set_scale(0.25, 2.0)
    shaken(reward.model)
    third = kept(reward.model, reward.tokenizer, tmp_path / "reward")
    assert has_reward_head(third)
    with torch.no_grad():
        again = load_scalar(third)
        assert (again.foreign, again.mean, again.std) == (False, 0.25, 2.0)
        torch.testing.assert_close(again.score_packed(BATCH), reward.score_packed(BATCH), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="scores or sorts texts"):
        load_policy(third)
    shutil.rmtree(base)
    with pytest.raises(UserError, match="base: no such folder"):
        load_policy(second)


def test_an_adapter_beside_a_merged_reward_model_has_its_scale(tmp_path: Path) -> None:
    reward = load_scalar(save_tiny(tmp_path / "base"), new_head_seed=0, lora=LoraConfig(rank=2))
    reward.set_scale(0.5, 3.0)
    out = kept(shaken(reward.model), reward.tokenizer, tmp_path / "out")
    with torch.no_grad():
        scores = [load_scalar(place).score_packed(BATCH) for place in (out, out / "adapter")]
        torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-5)
        whole = AutoModelForSequenceClassification.from_pretrained(out)(torch.tensor([IDS])).logits[0, 0]
    torch.testing.assert_close(scores[1][0], (whole - 0.5) / 3.0, atol=1e-5, rtol=1e-5)


def test_adapters_that_lead_back_to_themselves_are_one_sentence(tmp_path: Path) -> None:
    model, tokenizer = load_policy(save_tiny(tmp_path / "base"), lora=LoraConfig(rank=2, merged=False))
    out = kept(model, tokenizer, tmp_path / "out")
    config = out / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(out)}))
    with pytest.raises(UserError, match="lead back to themselves"):
        load_policy(out)


def test_a_hub_id_of_adapters_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache on this machine, as its client lays it out."""
    base = save_tiny(tmp_path / "base")
    model, tokenizer = load_policy(base, lora=LoraConfig(rank=2, merged=False))
    out = kept(shaken(model), tokenizer, tmp_path / "out")
    folder, commit = tmp_path / "hub" / "models--someone--adapters", "0" * 40
    shutil.copytree(out / "adapter", folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    (folder / ".no_exist" / commit).mkdir(parents=True)
    code = (
        "import sys, torch; sys.path[:0] = ['tests']\n"
        "from test_adapters import said\n"
        "from keel.model.checkpoint import load_policy, has_reward_head\n"
        "from keel.recipe.sections import ModelConfig\n"
        "model, tokenizer = load_policy(ModelConfig(path='x').source('hub:someone/adapters'))\n"
        "assert not has_reward_head('someone/adapters')\n"
        "print(said(model).sum().item())\n"
    )
    found = _python(code, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    assert float(found.split()[-1]) == pytest.approx(float(said(model).sum()), abs=1e-3)


def test_settings_that_came_later_leave_old_runs_as_they_are() -> None:
    old = {"rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": "all-linear"}
    assert ModelConfig(path="x", lora=LoraConfig()).settings()["lora"] == old
    assert ModelConfig(path="x", lora=LoraConfig(dora=True)).settings()["lora"] == old | {"dora": True}
    assert ModelConfig(path="x").settings() == ModelConfig(path="x").model_dump(mode="json")


# ---------------------------------------------------------------------------------------------------------- memory

MERGING = """
import resource, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from tiny import tiny_tokenizer
from keel.model import checkpoint, held, probe
from keel.model.checkpoint import prepared, save
from keel.recipe.sections import LoraConfig
from pathlib import Path

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

checkpoint.probe = lambda model: None  # a pass over the model is not what is measured
config = LlamaConfig(vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=5,
                     num_attention_heads=8, tie_word_embeddings=True, pad_token_id=1, eos_token_id=0)
model = prepared(LlamaForCausalLM(config), "cpu", LoraConfig(rank=4), False, "CAUSAL_LM", [])
size = sum(p.numel() * 4 for p in model.parameters()) / 2**20
layer = sum(p.numel() * 4 for p in model.get_base_model().model.layers[0].parameters()) / 2**20
with torch.no_grad():
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.fill_(0.01)
before = peak()
folder = Path(sys.argv[1]); folder.mkdir()
save(model, tiny_tokenizer(), folder)
print(size, layer, before, peak())
"""


def _python(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([".", "tests"]), "OMP_NUM_THREADS": "1"} | environment,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.wide
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_merging_takes_the_memory_of_a_layer(tmp_path: Path) -> None:
    size, layer, before, peak = map(float, _python(MERGING, str(tmp_path / "out")).split())
    assert size > 300
    # A part is at least 64 MiB, a layer's is 64.4; the rest is a linear layer's copies and what writing takes. It was
    # 152 MiB, 2.4 layers. A second copy of the model would be `size`, 324 MiB.
    assert peak - before < 3 * layer < 0.6 * size, (size, layer, before, peak)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 6
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    adapters = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    name = "model.layers.4.mlp.down_proj"
    down_A, down_B = (adapters[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
    assert torch.equal(down_B, torch.full_like(down_B, 0.01))
    assert float((own.get_submodule(name).weight - 8.0 * down_B @ down_A).std()) == pytest.approx(0.02, rel=0.05)


def test_parts_are_whole_layers_and_hold_every_weight_once(tmp_path: Path) -> None:
    model, tokenizer = load_policy(save_tiny(tmp_path / "base"))
    parts = list(file_parts(model, torch.float32, least=1))
    assert [len(part) for part in parts] == [3, 9, 9]  # embedding, head and norm first
    assert {name for part in parts for name in part} == set(model.state_dict())
    out = kept(model, tokenizer, tmp_path / "out")
    assert (out / "model.safetensors").exists()


# --------------------------------------------------------------------------------------------------------- four bits


def test_four_bits_stand_below_plain_adapters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ModelConfig(path="x", weights="nf4", lora=LoraConfig()).source().weights == "nf4"
    for lora in (None, LoraConfig(dora=True)):
        with pytest.raises(ValueError, match=r"set model\.lora, without dora"):
            ModelConfig(path="x", weights="nf4", lora=lora)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"keel-rlhf\[qlora\]"):
        nf4.require()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_adapters_over_four_bits_train_and_are_merged_into_what_they_stood_on(tmp_path: Path) -> None:
    source = Source(str(save_tiny(tmp_path / "base")), weights="nf4")
    model, tokenizer = load_policy(source, lora=LoraConfig(rank=4), products="fp32")
    linears = [module for module in model.modules() if nf4.is_quantised(module)]
    assert len(linears) == 14
    assert all(layer.weight.quant_state.nested for layer in linears)  # the scales' own scales
    weights = sum(layer.in_features * layer.out_features for layer in linears)
    assert sum(layer.weight.nbytes for layer in linears) == weights / 2
    first = said(model)
    assert torch.equal(said(load_policy(source, products="fp32")[0]), first)  # the reference: no KL to begin with
    plain = said(load_policy(source.path)[0])
    assert 0 < float((first - plain).abs().max()) < 0.5

    out = kept(model, tokenizer, tmp_path / "out")
    rounded = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(by_transformers(rounded), first, atol=1e-4, rtol=1e-4)
    level = rounded.model.layers[0].mlp.down_proj.weight.detach().flatten()[:64].unique()
    assert len(level) <= 16  # a block of NF4

    torch.manual_seed(0)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = -token_logprobs(model, BATCH).logp_C.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.3
    second = kept(model, tokenizer, tmp_path / "second")
    torch.testing.assert_close(
        by_transformers(AutoModelForCausalLM.from_pretrained(second)), said(model), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("stage", "lr", "remedy"),
    [
        ({"kind": "sft"}, 1e-5, "set it to about 0.0001"),
        ({"kind": "sft"}, 5e-5, None),
        ({"kind": "dpo", "model": "base"}, 1e-6, "set it to about 1e-05"),
        ({"kind": "dpo", "model": "base"}, 5e-6, None),
        ({"kind": "reward", "model": "base"}, 2e-5, "set it to about 0.0001"),
    ],
)
def test_a_whole_models_rate_is_doubted_for_adapters(stage: dict[str, Any], lr: float, remedy: str | None) -> None:
    for lora in (None, {"rank": 4}):
        settings = {"model": {"path": "x", "lora": lora}, "stages": [stage | {"name": "s", "optim": {"lr": lr}}]}
        recipe = Recipe.model_validate(settings)
        found = list(_adapter_rate(recipe.stages[0], recipe))
        assert [finding.remedy for finding in found] == ([remedy] if lora and remedy else [])
