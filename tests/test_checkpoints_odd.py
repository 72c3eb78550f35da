"""Checkpoints as they are found: settings that transformers reads and does not write, quantised weights, broken
pickles, other tasks' heads, adapters that lie on a shared weight, beside a whole model, or cannot be merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import save_tiny, tiny_llama, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from keel.check import starting
from keel.model.checkpoint import load_policy, load_scalar, save
from keel.model.modules import inner_model, own_attention
from keel.recipe.recipe import Recipe
from keel.recipe.sections import LoraConfig
from keel.types import UserError

IDS = torch.tensor([list(range(10, 40))])


def changed(folder: Path, name: str, **fields: Any) -> Path:
    """A tiny checkpoint with other fields in one of its JSON files."""
    path = save_tiny(folder) / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))
    return folder


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("generation_config.json", {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 0}),
        ("config.json", {"output_attentions": True}),
        ("config.json", {"output_hidden_states": True}),
    ],
)
def test_what_can_be_read_can_be_saved(file: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """The first is Llama 2's. transformers writes none of the first two again once something was changed."""
    base = changed(tmp_path / "base", file, **fields)
    model, tokenizer = load_policy(base)
    model.generation_config.pad_token_id = 5  # type: ignore[union-attr]
    (tmp_path / "saved").mkdir()
    save(model, tokenizer, tmp_path / "saved")
    if file == "generation_config.json":
        assert GenerationConfig.from_pretrained(tmp_path / "saved").temperature == 0.6
    torch.testing.assert_close(logits(tmp_path / "saved"), logits(save_tiny(tmp_path / "plain")))


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        ("config.json", {"bos_token_id": "x"}, "Validation error for field 'bos_token_id': TypeError"),
        ("config.json", {"pad_token_id": 99999}, "Padding_idx must be within num_embeddings"),
        (
            "config.json",
            {"quantization_config": {"quant_method": "fp8"}},
            "its weights are quantised (fp8), and Keel computes with plain ones; name the model that it was made from, "
            "or load it with FineGrainedFP8Config(dequantize=True)",
        ),
        ("config.json", {"quantization_config": {"quant_method": "mxfp4"}}, "(mxfp4)"),
        ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "(gptq)"),
        ("generation_config.json", {"eos_token_id": "0"}, "generation_config.json has '0' as eos_token_id"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(file: str, fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_policy(changed(tmp_path / "base", file, **fields))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pickle_of_no_weights_is_one_sentence(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"garbage" * 50)
    with pytest.raises(UserError, match="could not load this causal language model: Weights only load failed"):
        load_policy(base)


def adapter(folder: Path, base: Path, config: peft.PeftConfig) -> Path:
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_on_a_shared_weight_are_refused(target: str, tmp_path: Path) -> None:
    """Merged into an embedding that is the head too they would change both: by 70 nats a token, not by rounding."""
    base = save_tiny(tmp_path / "base")
    with pytest.raises(UserError, match=r"model\.lora\.targets: adapters lie on the embedding or the head"):
        load_policy(base, lora=LoraConfig(rank=2, targets=[target]))
    found = adapter(tmp_path / "adapter", base, peft.LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="its adapters lie on the embedding or the head"):
        load_policy(found)


def test_adapters_on_a_head_of_its_own_are_merged(tmp_path: Path) -> None:
    config = tiny_llama().config
    config.tie_word_embeddings = False
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = load_policy(tmp_path / "base", lora=LoraConfig(rank=2, targets=["lm_head", "embed_tokens"]))
    with torch.no_grad(), own_attention(inner_model(model)):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
        expected = model(input_ids=IDS, use_cache=False).logits
    (tmp_path / "saved").mkdir()
    save(model, tokenizer, tmp_path / "saved")
    torch.testing.assert_close(logits(tmp_path / "saved"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
            "adapters of this kind cannot be merged",
        ),
        (
            peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM"),
            "Impossible to merge LoRA with `lora_bias=True`",
        ),
    ],
)
def test_adapters_that_cannot_be_merged_are_one_sentence(config: peft.PeftConfig, words: str, tmp_path: Path) -> None:
    found = adapter(tmp_path / "adapter", save_tiny(tmp_path / "base"), config)
    with pytest.raises(UserError, match=words):
        load_policy(found)


def policy_of(folder: Path) -> list[str]:
    """What `keel check` finds in a recipe that only samples from a model."""
    stages = [{"kind": "sample", "name": "sample", "model": "base"}]
    recipe = Recipe.model_validate({"name": "r", "model": {"path": str(folder)}, "stages": stages})
    return [str(finding) for finding in starting.own_numbers(recipe) if finding.level == "error"]


def test_a_check_finds_quantised_weights_before_they_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub model's configuration is read before its weights are fetched."""
    folder = changed(tmp_path / "base", "config.json", quantization_config={"quant_method": "mxfp4"})
    monkeypatch.setattr(starting, "_weights_here", lambda source: False)
    (error,) = policy_of(folder)
    assert "quantised (mxfp4)" in error
    assert "Mxfp4Config(dequantize=True)" in error
    assert policy_of(save_tiny(tmp_path / "plain")) == []


def test_another_tasks_model_is_no_policy(tmp_path: Path) -> None:
    """Its embedding would serve as the head of a language model, where the two are tied."""
    base = save_tiny(tmp_path / "base")
    scorer = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=1)
    shutil.copytree(base, tmp_path / "scorer")
    scorer.save_pretrained(tmp_path / "scorer")
    assert load_scalar(tmp_path / "scorer").foreign
    with pytest.raises(UserError, match=r"scorer: by its configuration \(LlamaForSequenceClassification\) it scores"):
        load_policy(tmp_path / "scorer")
    (error,) = policy_of(tmp_path / "scorer")
    assert "it is no policy" in error
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    peft.get_peft_model(scorer, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="adapters of a sequence classifier"):
        load_policy(tmp_path / "adapter")
    renamed = changed(tmp_path / "renamed", "config.json", architectures=["LlamaForTokenClassification"])
    with pytest.raises(UserError, match=r"LlamaForTokenClassification.*; .* correct the configuration"):
        load_policy(renamed)


def test_adapters_beside_a_whole_model_are_refused(tmp_path: Path) -> None:
    """transformers would compute with both, which neither folder's name says."""
    base = save_tiny(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    found = adapter(tmp_path / "adapter", base, config)
    both = shutil.copytree(base, tmp_path / "both")
    shutil.copytree(found, both, dirs_exist_ok=True)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(both)
    assert any("lora_" in name for name, _ in loaded.named_parameters())
    with pytest.raises(UserError, match=r"both: it holds a whole model and adapters too.* move adapter_config\.json"):
        load_policy(both)
    # A configuration alone is no model: some trainers write it beside their adapters.
    alone = load_policy(found)[0].state_dict()
    shutil.copy(base / "config.json", found)
    torch.testing.assert_close(load_policy(found)[0].state_dict(), alone)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(alone[name], load_policy(base)[0].state_dict()[name], atol=1e-3)
