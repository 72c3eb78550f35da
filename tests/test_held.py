"""Weights that are only read, in bfloat16. The oracle is transformers' own forward pass over the checkpoint in float32,
under autocast; bytes are counted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import prompt, tiny_llama, tiny_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from keel.data.collate import pack
from keel.model import held
from keel.model.checkpoint import frozen, load_policy, load_scalar
from keel.model.held import in_float32, is_held, stored_dtype
from keel.model.logprobs import token_logprobs
from keel.model.packed import compute_alike, inner_model
from keel.model.shared_base import SharedBase
from keel.precision import autocast, held_dtype
from keel.recipe.grpo import GrpoStage
from keel.recipe.recipe import Recipe
from keel.recipe.sections import DataConfig, LoraConfig, ModelConfig, OptimConfig, SamplingConfig, Source
from keel.recipe.sft import SftStage
from keel.reward.scorer import PythonScorer
from keel.rollout.hf import TransformersSampler
from keel.rollout.sampler import make_sampler
from keel.run import RunDir, Silent
from keel.train.context import TrainContext
from keel.train.grpo import train_grpo
from keel.types import Encoded

BF16, F32 = torch.bfloat16, torch.float32
SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 0,
}
ROW = tuple(range(7, 27))
BATCH = pack([Encoded(ROW, (False,) * 4 + (True,) * 16), Encoded(ROW[5:12], (False,) + (True,) * 6)])


def made(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    model: PreTrainedModel = {
        "llama": lambda: tiny_llama(),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),  # biases
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)),  # norms of heads
        "gpt2": lambda: GPT2LMHeadModel(  # Conv1D, layer norms, learned positions
            GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, n_positions=64)
        ),
        "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=8)),
        "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8)),
        "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts)),
    }[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # so that logits spread, and norms and biases are numbers that round
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


NAMES = ("llama", "qwen2", "qwen3", "gpt2", "gemma", "gemma3", "qwen3_moe")


def saved(folder: Path, name: str = "llama", dtype: torch.dtype = BF16) -> Source:
    made(name).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Source(str(folder), weights="bf16")


def size(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def logps(model: nn.Module) -> Tensor:
    with torch.no_grad(), autocast("cpu", "bf16"):
        return token_logprobs(model, BATCH).logp_C


# ------------------------------------------------------------------------------------------------------ what is held


@pytest.mark.parametrize(
    ("weights", "products", "device", "stored", "expected"),
    [
        ("auto", "bf16", "cuda", BF16, BF16),
        ("auto", "bf16", "cuda:1", BF16, BF16),
        ("auto", "bf16", "cuda", F32, F32),  # nothing is lost
        ("auto", "bf16", "cuda", torch.float16, F32),
        ("auto", "bf16", "cuda", None, F32),
        ("auto", "fp32", "cuda", BF16, F32),
        ("auto", None, "cuda", BF16, F32),  # trained
        ("auto", "bf16", "cpu", BF16, F32),  # the compiled layers
        ("bf16", "bf16", "cpu", F32, BF16),
        ("bf16", "fp32", "cuda", BF16, F32),
        ("bf16", None, "cuda", BF16, F32),
        ("fp32", "bf16", "cuda", BF16, F32),
    ],
)
def test_held_dtype(weights: Any, products: Any, device: str, stored: Any, expected: torch.dtype) -> None:
    assert held_dtype(weights, products, device, stored) == expected


def test_stored_dtype_is_that_of_every_number(tmp_path: Path) -> None:
    for dtype in (BF16, torch.float16, F32):
        assert stored_dtype(saved(tmp_path / str(dtype), dtype=dtype)) == dtype
    sharded = tmp_path / "sharded"
    made("qwen2").to(BF16).save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert stored_dtype(Source(str(sharded))) == BF16
    file = tmp_path / str(BF16) / "model.safetensors"
    weights = load_file(file)
    norm, matrix = (next(name for name in weights if part in name) for part in ("norm", "q_proj"))
    save_file(weights | {norm: weights[norm].float() + 1e-5}, file, {"format": "pt"})
    assert stored_dtype(Source(str(file.parent))) == BF16
    model = load_policy(Source(str(file.parent), weights="bf16"), products="bf16")[0]
    assert torch.equal(model.get_parameter(norm), weights[norm].float() + 1e-5)  # read as it is
    save_file(weights | {matrix: weights[matrix].float()}, file, {"format": "pt"})
    assert stored_dtype(Source(str(file.parent))) is None
    config = json.loads((sharded / "config.json").read_text())
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    assert stored_dtype(Source(str(tmp_path / "bare"))) is None  # whatever its config says


@pytest.mark.parametrize("name", NAMES)
def test_a_held_model_is_the_float32_model_under_autocast(name: str, tmp_path: Path) -> None:
    source = replace(saved(tmp_path, name), weights="bf16" if name != "qwen3_moe" else "auto")
    model = (_on_gpu_rules if name == "qwen3_moe" else _held)(source)  # experts stay in float32 there
    assert is_held(model)
    exact = load_policy(source)[0]
    assert not is_held(exact)
    compute_alike(exact, model)
    torch.testing.assert_close(logps(model), logps(exact), atol=0, rtol=0)
    own = AutoModelForCausalLM.from_pretrained(source.path, dtype=F32).eval()
    with torch.no_grad(), torch.autocast("cpu", BF16):
        rows = [own(input_ids=torch.tensor([row])).logits[0].float().log_softmax(-1) for row in (ROW, ROW[5:12])]
    reference = [rows[0][i - 1, ROW[i]] for i in range(4, 20)] + [rows[1][i - 1, ROW[5 + i]] for i in range(1, 7)]
    assert float((logps(model) - torch.stack(reference)).abs().max()) < 0.1  # of bfloat16 logits
    with torch.no_grad(), in_float32(model):
        wide = token_logprobs(model, BATCH).logp_C
    with torch.no_grad():
        torch.testing.assert_close(wide, token_logprobs(exact, BATCH).logp_C, atol=2e-5, rtol=0)
    assert all(p.dtype == BF16 for n, p in model.named_parameters() if n.endswith("q_proj.weight"))


def _held(source: Source) -> nn.Module:
    return load_policy(source, products="bf16")[0]


def _on_gpu_rules(source: Source) -> nn.Module:
    with mock.patch("keel.model.loading.held_dtype", return_value=BF16):
        return load_policy(source, products="bf16")[0]


def test_bytes_by_role(tmp_path: Path) -> None:
    source = saved(tmp_path, "qwen2")
    whole = load_policy(source)[0]
    matrices = sum(p.numel() for p in whole.parameters() if p.ndim == 2)
    rest = sum(p.numel() for p in whole.parameters() if p.ndim != 2)
    assert size(whole.parameters()) == 4 * (matrices + rest)
    reference = frozen(load_policy(source, products="bf16")[0])
    assert size(reference.parameters()) == 2 * matrices + 4 * rest
    policy = load_policy(source, lora=LoraConfig(rank=2), products="bf16")[0]
    adapters = [p for p in policy.parameters() if p.requires_grad]
    assert {p.dtype for p in adapters} == {F32}
    assert size(policy.parameters()) == 2 * matrices + 4 * rest + size(adapters)
    reward = load_scalar(source, new_head_seed=0, products="bf16").model
    head = inner_model(reward).score.weight
    assert head.dtype == F32
    body = sum(p.numel() for n, p in whole.named_parameters() if p.ndim == 2 and "lm_head" not in n)
    assert size(reward.parameters()) == 2 * body + 4 * (rest + head.numel())


def test_one_base_holds_its_matrices_once(tmp_path: Path) -> None:
    source = saved(tmp_path, "qwen2")
    shared = SharedBase(source, "cpu", LoraConfig(rank=2), "bf16")
    policy, _ = shared.policy(False)
    critic = shared.new_critic(0, False)
    reference = shared.reference()
    assert inner_model(critic.model).score.weight.dtype == F32
    seen = {id(p): p for m in (policy, critic.model, reference) for p in m.parameters() if not p.requires_grad}
    spare = [p for n, p in critic.model.named_parameters() if not p.requires_grad and "score" in n]
    assert size(seen.values()) == size(shared.model.parameters()) + size(spare)
    torch.testing.assert_close(logps(policy), logps(reference), atol=0, rtol=0)
    with torch.no_grad(), autocast("cpu", "bf16"):
        assert critic.values_packed(BATCH).dtype == F32


def test_a_model_that_does_more_with_its_weights_is_put_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "KINDS", (nn.Linear, type(made("gemma3").get_input_embeddings())))
    source = saved(tmp_path, "gemma3")  # whose embedding rounds its factor to its weight's precision
    assert not is_held(load_policy(source, products="bf16")[0])


# ------------------------------------------------------------------------------------------------------ what is done


def test_adapters_learn_on_a_held_base_that_stays_as_it_is(tmp_path: Path) -> None:
    source = saved(tmp_path, "qwen2")
    policy = load_policy(source, lora=LoraConfig(rank=4), products="bf16", gradient_checkpointing=True)[0]
    base = {n: p.detach().clone() for n, p in policy.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        with autocast("cpu", "bf16"):
            loss = -token_logprobs(policy, BATCH).logp_C.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    for name, parameter in policy.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name
            assert parameter.dtype == base[name].dtype


def test_gradients_of_adapters_are_those_over_a_float32_base(tmp_path: Path) -> None:
    source = saved(tmp_path, "qwen2")
    found = []
    for products in (None, "bf16"):
        torch.manual_seed(0)
        policy = load_policy(source, lora=LoraConfig(rank=4), products=products)[0]
        with autocast("cpu", "bf16"):
            token_logprobs(policy, BATCH).logp_C.sum().backward()
        found.append([p.grad for p in policy.parameters() if p.requires_grad])
    for exact, low in zip(*found, strict=True):
        torch.testing.assert_close(low, exact, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_samplers_draw_from_a_held_model(name: str, tmp_path: Path) -> None:
    model = frozen(load_policy(saved(tmp_path, name), products="bf16")[0])
    sampling = SamplingConfig(max_new_tokens=6, temperature=1.0)
    prompts = [[7, 8, 9], [30, 31, 32, 33, 34]]
    samplers = [TransformersSampler(model, (), "bf16")]
    if name == "llama":
        samplers.append(make_sampler(model, "embedded", (), "bf16"))
    for sampler in samplers:
        for given, drawn in zip(prompts, sampler.generate(prompts, sampling, 0), strict=True):
            ids = (*given, *drawn.ids)
            mask = tuple(i >= len(given) for i in range(len(ids)))
            with torch.no_grad(), in_float32(model):
                own = token_logprobs(model, pack([Encoded(ids, mask)])).logp_C
            assert float((own - torch.tensor(drawn.logprobs)).abs().max()) < 0.1


def test_a_policy_with_learned_marks_on_a_held_base(tmp_path: Path) -> None:
    source = saved(tmp_path, "qwen2")
    model, _ = load_policy(source, chat_template="chatml", learn_marks=True, lora=LoraConfig(rank=2), products="bf16")
    rows = [p for n, p in model.named_parameters() if n.endswith(".rows")]
    assert rows
    assert all(p.dtype == F32 for p in rows)
    with autocast("cpu", "bf16"):
        token_logprobs(model, BATCH).logp_C.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == F32 for p in rows)


def test_half_weights_need_half_products() -> None:
    stage = SftStage(name="sft", precision="fp32")
    with pytest.raises(ValueError, match=r"sft.precision is fp32; set model.weights: auto"):
        Recipe(model=ModelConfig(path="x", weights="bf16"), stages=[stage])


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_the_kl_to_a_held_reference_begins_at_0(lora: LoraConfig | None, tmp_path: Path) -> None:
    saved(tmp_path / "base", "llama")
    stage = RunDir(tmp_path / "run").stage("grpo")
    stage.begin("grpo")
    settings = ModelConfig(path=str(tmp_path / "base"), weights="bf16", lora=lora)
    context = TrainContext(stage, Silent(), tmp_path / "base", settings, DataConfig(), "cpu", "bf16", 0)
    config = GrpoStage(
        name="grpo",
        rewards=[{"source": {"kind": "python", "ref": "x:y"}}],
        group_size=4,
        rollout_batch=16,
        episodes=32,
        minibatches=1,
        old_logprobs="trainer",
        sampling=SamplingConfig(max_new_tokens=8),
        optim=OptimConfig(lr=1e-2),
    )
    scorer = PythonScorer(lambda _, text: float(len(text)))
    with mock.patch("keel.train.roles.load_policy", wraps=load_policy) as loaded:
        summary = train_grpo(config, [prompt(n) for n in range(8)], scorer, tmp_path / "base", context)
    assert [call.kwargs["products"] for call in loaded.call_args_list] == [lora and "bf16", "bf16"]  # policy, reference
    assert abs(summary["kl_at_start"]) <= 1e-5
    assert summary["dtype"] == "bfloat16"
    assert stored_dtype(Source(str(stage.path))) == BF16
