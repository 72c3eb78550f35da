"""What a checkpoint is written in, and adapters beside it. The oracles are peft's own merge, in float32, and the
tensors in the files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import PeftModel
from safetensors.torch import load_file
from test_held import BATCH, BF16, F32, ROW, made, saved
from tiny import save_tiny, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from keel.model import merged
from keel.model.checkpoint import load_policy, load_scalar, save
from keel.model.logprobs import token_logprobs
from keel.model.modules import own_attention
from keel.model.packed import inner_model
from keel.recipe.sections import LoraConfig, Source


def written(model: nn.Module, tokenizer: Any, folder: Path) -> dict[str, Tensor]:
    folder.mkdir()
    save(model, tokenizer, folder)
    return load_file(folder / "model.safetensors")


def shaken(model: nn.Module) -> nn.Module:
    """Trained, as far as the file can tell."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize(
    ("stored", "save_as", "expected"),
    [
        (F32, "auto", F32),
        (BF16, "auto", BF16),
        (torch.float16, "auto", torch.float16),
        (BF16, "fp32", F32),
        (F32, "bf16", BF16),
    ],
)
def test_a_checkpoint_is_in_the_precision_of_the_one_it_began_as(
    tmp_path: Path, stored: torch.dtype, save_as: Any, expected: torch.dtype
) -> None:
    saved(tmp_path / "base", "qwen3", stored)
    model, tokenizer = load_policy(Source(str(tmp_path / "base"), save_as=save_as))
    shaken(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = written(model, tokenizer, tmp_path / "out")
    assert set(found) == set(weights)  # the head is the embedding, once
    for name, tensor in found.items():
        assert tensor.dtype == expected
        assert torch.equal(tensor, weights[name].to(expected)), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert own.dtype == expected
    again, _ = load_policy(tmp_path / "out")
    for name, tensor in written(again, tokenizer, tmp_path / "again").items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma3"])
@pytest.mark.parametrize("products", [None, "bf16"])
def test_adapters_are_merged_as_peft_merges_them_and_kept(name: str, products: Any, tmp_path: Path) -> None:
    source = saved(tmp_path / "base", name)
    policy, tokenizer = load_policy(source, lora=LoraConfig(rank=4), products=products)
    before = {n: p.detach().clone() for n, p in shaken(policy).named_parameters()}
    found = written(policy, tokenizer, tmp_path / "out")
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters())  # training may go on
    base = AutoModelForCausalLM.from_pretrained(source.path, dtype=F32)
    own = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).merge_and_unload().state_dict()
    assert {tensor.dtype for tensor in found.values()} == {BF16}
    for key, tensor in found.items():
        assert torch.equal(tensor, own[key].to(BF16)), key
    named = load_policy(Source(str(tmp_path / "out" / "adapter")))[0]  # a folder of adapters is a model
    with torch.no_grad():
        exact = base(input_ids=torch.tensor([ROW])).logits[0].log_softmax(-1)
        found_C = token_logprobs(named, BATCH).logp_C[:16]
    wanted = torch.stack([exact[i - 1, ROW[i]] for i in range(4, 20)])
    torch.testing.assert_close(found_C, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "recurrent_gemma"])
def test_what_is_written_computes_as_the_adapters_do(name: str, tmp_path: Path) -> None:
    """Experts have adapters one inside another; a recurrent layer keeps its state, with what it was computed from."""
    zoo.make(name).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    policy, tokenizer = load_policy(tmp_path / "base", lora=LoraConfig(rank=2))
    shaken(policy)
    with own_attention(inner_model(policy)):
        wanted = policy(input_ids=torch.tensor([ROW]), use_cache=False).logits
    if name == "recurrent_gemma":
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(policy)
    else:
        assert any("experts.base_layer.lora_A" in name for name, _ in policy.named_parameters())
    written(policy, tokenizer, tmp_path / "out")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = own(input_ids=torch.tensor([ROW]), use_cache=False).logits
    torch.testing.assert_close(found, wanted.detach(), atol=1e-4, rtol=1e-4)


def test_a_reward_head_stays_in_float32(tmp_path: Path) -> None:
    source = saved(tmp_path / "base", "qwen2")
    for lora in (None, LoraConfig(rank=2)):
        reward = load_scalar(source, new_head_seed=0, lora=lora)
        reward.set_scale(0.25, 2.0)
        shaken(reward.model)
        folder = tmp_path / ("lora" if lora else "whole")
        found = written(reward.model, reward.tokenizer, folder)
        assert {n: t.dtype for n, t in found.items() if t.dtype != BF16} == {"score.weight": F32}
        again = load_scalar(Source(str(folder), weights="bf16"), products="bf16")
        assert torch.equal(inner_model(again.model).score.weight, found["score.weight"])
        with torch.no_grad():
            own = AutoModelForSequenceClassification.from_pretrained(folder, dtype=F32)
            raw = own(input_ids=torch.tensor([ROW])).logits[0, 0]
            with torch.autocast("cpu", BF16):
                score = again.score_packed(BATCH)[0]
        assert float((score - (raw - 0.25) / 2.0).abs()) < 0.05 * (1 + float(raw.abs()))


def test_one_layer_is_copied_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, _ = load_policy(saved(tmp_path, "qwen2"), lora=LoraConfig(rank=2), products="bf16")
    largest = max(sum(p.numel() for p in m.parameters()) for m in policy.modules() if hasattr(m, "base_layer"))
    copied: list[int] = []
    whole = copy.deepcopy

    def counted(module: Any) -> Any:
        copied.append(sum(p.numel() for p in module.parameters()))
        return whole(module)

    monkeypatch.setattr(merged.copy, "deepcopy", counted)
    (found,) = merged.file_parts(policy, BF16)
    assert copied
    assert max(copied) <= largest
    own = dict(inner_model(policy).named_parameters())
    kept = [n for n, t in found.items() if n in own and t.dtype == own[n].dtype]
    assert kept
    assert all(found[n].data_ptr() == own[n].data_ptr() for n in kept)  # not copied


def test_learned_marks_are_in_the_whole_model_and_beside_the_adapters(tmp_path: Path) -> None:
    model, tokenizer = load_policy(
        Source(str(save_tiny(tmp_path / "base"))), chat_template="chatml", learn_marks=True, lora=LoraConfig(rank=2)
    )
    shaken(model)
    rows = next(p for n, p in model.named_parameters() if n.endswith(".rows")).detach()
    found = written(model, tokenizer, tmp_path / "out")
    embedding = found["model.embed_tokens.weight"]
    at = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert all(any(torch.equal(embedding[i], row) for row in rows) for i in at)
    kept = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert torch.equal(kept["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"], rows)
    assert len(tokenizer) > len(tiny_tokenizer())


def test_buffers_that_a_model_keeps_are_written(tmp_path: Path) -> None:
    model = made("llama")
    model.model.register_buffer("kept", torch.arange(3.0) / 3)
    (found,) = merged.file_parts(model, BF16)
    assert torch.equal(found["model.kept"], torch.arange(3.0) / 3)  # in its own precision: no step trained it
    assert set(found) == set(model.state_dict())
