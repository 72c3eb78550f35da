"""The fused layers against transformers' own (eager attention, padded): values, gradients, memory, precision."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from keel.data.collate import pack, pack_shared
from keel.model import layout
from keel.model.fused import is_fusable
from keel.model.logprobs import predicting, token_logprobs
from keel.model.packed import backbone, enable_packing, hidden_states, padded_hidden_states
from keel.types import Encoded, PackedBatch

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 600,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
    "mistral with a window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=7)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
}


def made(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(a model that Keel runs fused, the same by transformers). Norms and biases are far from 1 and 0."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    assert enable_packing(model)
    assert is_fusable(backbone(model))
    return model, reference


def batches(longest: int) -> dict[str, PackedBatch]:
    draw = random.Random(0)

    def sequence(prompt: list[int]) -> Encoded:
        reply = [draw.randrange(97) for _ in range(draw.randrange(1, longest // 2))]
        return Encoded((*prompt, *reply), (False,) * len(prompt) + (True,) * len(reply))

    prompts = [[draw.randrange(97) for _ in range(draw.randrange(2, longest // 2))] for _ in range(5)]
    rows = [[sequence(prompt) for _ in range(3)] for prompt in prompts]
    apart = sorted((s for row in rows for s in row), key=lambda s: len(s.ids))
    return {"apart, shortest first": pack(apart), "behind shared prompts": pack_shared(rows)}


def run(
    forward: Callable[[PreTrainedModel, PackedBatch], Tensor], model: PreTrainedModel, batch: PackedBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states and the gradients of a random projection of them."""
    model.zero_grad()
    hidden = forward(model, batch)
    (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return hidden.detach().float(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", ["apart, shortest first", "behind shared prompts"])
@pytest.mark.parametrize("longest", [40, 300], ids=["plain products", "flash kernel"])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_transformers(name: str, longest: int, layout: str) -> None:
    model, reference = made(name)
    batch = batches(longest)[layout]
    hidden, gradients = run(hidden_states, model, batch)
    expected, expected_gradients = run(padded_hidden_states, reference, batch)
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for n, gradient in gradients.items():
        scale = float(expected_gradients[n].abs().max())
        torch.testing.assert_close(gradient, expected_gradients[n], atol=1e-5 * scale, rtol=1e-5, msg=n)


@pytest.mark.parametrize("few", [0.1, 0.9], ids=["picked before the last layer's end", "picked at the end"])
@pytest.mark.parametrize("name", MODELS)
def test_only_the_wanted_tokens_are_returned_and_learned_from(name: str, few: float) -> None:
    model, reference = made(name)
    batch = batches(40)["behind shared prompts"]
    draw = random.Random(1)
    wanted = torch.tensor([draw.randrange(batch.num_tokens) for _ in range(int(few * batch.num_tokens))])  # some twice
    hidden, gradients = run(lambda m, b: hidden_states(m, b, wanted), model, batch)
    expected, expected_gradients = run(lambda m, b: padded_hidden_states(m, b)[wanted], reference, batch)
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
    for n, gradient in gradients.items():
        scale = float(expected_gradients[n].abs().max())
        torch.testing.assert_close(gradient, expected_gradients[n], atol=1e-5 * scale, rtol=1e-5, msg=n)


def test_a_norm_whose_weight_is_zero_somewhere_learns_too() -> None:
    model, reference = made("llama")
    with torch.no_grad():
        for m in (model, reference):
            m.model.layers[1].input_layernorm.weight[3] = 0
    batch = batches(40)["apart, shortest first"]
    _, gradients = run(hidden_states, model, batch)
    _, expected = run(padded_hidden_states, reference, batch)
    name = "model.layers.1.input_layernorm.weight"
    assert float(expected[name][3].abs()) > 0.1
    torch.testing.assert_close(gradients[name], expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_close_to_float32_as_autocast_over_transformers(name: str) -> None:
    model, reference = made(name)
    batch = batches(40)["apart, shortest first"]
    exact, exact_gradients = run(padded_hidden_states, reference, batch)
    with torch.autocast("cpu", torch.bfloat16):
        ours, our_gradients = run(hidden_states, model, batch)
        theirs, their_gradients = run(padded_hidden_states, reference, batch)

    def error(got: Tensor, expected: Tensor) -> float:
        return float((got - expected).norm() / expected.norm())

    assert 1e-4 < error(ours, exact) < 1.5 * error(theirs, exact)
    for n, gradient in our_gradients.items():
        assert error(gradient, exact_gradients[n]) < 2 * error(their_gradients[n], exact_gradients[n]) + 0.002, n


def test_gradient_checkpointing_keeps_less_and_changes_nothing() -> None:
    model, _ = made("llama")
    model.train()
    batch = batches(40)["apart, shortest first"]

    def kept(recompute: bool) -> tuple[int, dict[str, Tensor]]:
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
            hidden_states(model, batch)
        return sum(saved), run(hidden_states, model, batch)[1]

    whole, gradients = kept(recompute=False)
    less, again = kept(recompute=True)
    assert less < whole / 3
    for n, gradient in gradients.items():
        torch.testing.assert_close(again[n], gradient, atol=0, rtol=0, msg=n)


def test_rows_are_cut_where_that_saves_work() -> None:
    assert layout._buckets([16] * 8) == [range(8)]
    assert layout._buckets([16] * 4 + [128] * 4) == [range(4), range(4, 8)]
    assert layout._buckets([112] * 4 + [128] * 4) == [range(8)]
    assert layout._buckets([128]) == [range(1)]


def test_what_is_not_a_plain_llama_goes_the_other_way() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
    assert not is_fusable(backbone(gpt2))
    gelu = LlamaForCausalLM(LlamaConfig(**SHAPE, hidden_act="gelu"))
    assert not is_fusable(backbone(gelu))
    low = MODELS["llama"]().to(torch.bfloat16)
    assert not is_fusable(backbone(low))
    adapted = MODELS["llama"]()
    adapted.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    assert not is_fusable(backbone(adapted))


@pytest.mark.parametrize("fused", [True, False])
def test_a_weight_that_is_embedding_and_head_gets_both_gradients(fused: bool) -> None:
    """Over two micro-batches, against transformers' padded logits."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True, pad_token_id=0)).eval()
    reference = copy.deepcopy(model)
    assert enable_packing(model)
    backbone(model).keel_unfused = not fused  # type: ignore[assignment]
    for batch in batches(20).values():
        token_logprobs(model, batch).logp_C.sum().backward()
        source_C, ids_C = predicting(batch)
        logits_CV = reference.lm_head(padded_hidden_states(reference, batch)[source_C])
        logits_CV.log_softmax(-1)[torch.arange(len(ids_C)), ids_C].sum().backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert p.grad.layout == torch.strided
        torch.testing.assert_close(p.grad, q.grad, atol=2e-5, rtol=2e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert model.lm_head.weight is model.model.embed_tokens.weight
