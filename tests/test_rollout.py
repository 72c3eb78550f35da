"""The samplers against transformers' ``generate``, plain forward passes, slow filters, and known random numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from keel.data.chat import Chat
from keel.kernels.dispatch import products_of
from keel.model.merged import merged_weights
from keel.model.packed import ATTENTION, enable_packing
from keel.recipe.sections import SamplingConfig
from keel.rollout import embedded as embedded_module
from keel.rollout import llama as llama_module
from keel.rollout import make_sampler
from keel.rollout.collect import Choice, choose_different, sample_replies, similarity, stop_token_ids
from keel.rollout.embedded import EmbeddedSampler, Request
from keel.rollout.hf import TransformersSampler
from keel.rollout.llama import why_unsupported
from keel.rollout.step import decode
from keel.rollout.tokens import choose, filtered_weights, mix64, stream_key, uniforms
from keel.types import Completion, Message, Prompt, UserError
from tests import zoo

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
PROMPTS = [[5, 6, 7], [9], list(range(10, 20)), [5, 6, 7], [20, 21], [30] * 12, [31, 32, 33, 34, 35]]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FULL = {"sliding_window": None}
WINDOW = {"sliding_window": 8}
NARROW = {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
GPT2 = {k: v for k, v in SIZES.items() if k not in NARROW or k.endswith(("_id", "range"))} | {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "llama_tied_bias": ("Llama", SIZES | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3_rope": ("Llama", SIZES | {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", SIZES | FULL),
    "qwen2": ("Qwen2", {k: v for k, v in SIZES.items() if k != "head_dim"} | FULL),
    "qwen3": ("Qwen3", SIZES | FULL),
    "gemma3": (
        "Gemma3",
        SIZES | WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "mistral_window": ("Mistral", SIZES | WINDOW),
    "gpt2": ("GPT2", GPT2),
    "neox": ("GPTNeoX", NARROW),
}


def build(kind: str) -> Any:
    """A small random model. Norm weights and biases are random too: at their initial 1 and 0 nothing would show
    whether they are read."""
    family, sizes = MODELS[kind]
    config = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(family, family) + "Config")(**sizes)
    torch.manual_seed(0)
    model: Any = getattr(transformers, family + {"GPT2": "LMHeadModel"}.get(family, "ForCausalLM"))(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in name and "bias" not in name else 0.0, 0.2)
    return model


EMBEDDED = ("llama", "llama_tied_bias", "llama3_rope", "mistral", "qwen2", "qwen3")
OTHERS = ("gemma3", "mistral_window", "gpt2", "neox")


def greedy(n: int, batch_size: int = 3) -> SamplingConfig:
    return SamplingConfig(temperature=0, max_new_tokens=n, batch_size=batch_size)


def peer_greedy(model: Any, prompt: list[int], n: int, stop: Sequence[int]) -> tuple[int, ...]:
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        max_new_tokens=n, eos_token_id=list(stop) or None, pad_token_id=0,
    )  # fmt: skip
    return tuple(out[0, len(prompt) :].tolist())


def forward_logprobs(model: Any, prompt: list[int], ids: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Log-probabilities of ``ids`` after ``prompt`` by one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0].float()
    logps = torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, -1)
    return logps.gather(1, torch.tensor(ids)[:, None]).squeeze(1)


# ------------------------------------------------------------------------------------------------- against generate


@pytest.mark.parametrize("kind", EMBEDDED + OTHERS)
def test_greedy_equals_generate_and_logprobs_equal_a_plain_forward_pass(kind: str) -> None:
    model = build(kind)
    expected = [peer_greedy(model, p, 20, ()) for p in PROMPTS]
    assert len(set(expected)) > 3  # else the model says the same whatever it is asked
    # Stop tokens that end some completions and not others, the latest possible.
    some = [t for t in range(VOCABULARY) if 0 < sum(t in ids for ids in expected) < len(PROMPTS)]
    stops = sorted(some, key=lambda t: -max(ids.index(t) for ids in expected if t in ids))[:1]
    sampler = make_sampler(model, "auto", stops)
    assert isinstance(sampler, EmbeddedSampler if kind in EMBEDDED else TransformersSampler)
    got = sampler.generate(PROMPTS, greedy(20), seed=0)
    for prompt, full, completion in zip(PROMPTS, expected, got, strict=True):
        want = peer_greedy(model, prompt, 20, stops)
        assert completion.ids == want
        assert completion.finished == (want[-1] in stops)
        assert completion.finished or want == full
        assert torch.allclose(torch.tensor(completion.logprobs), forward_logprobs(model, prompt, want), atol=1e-4)
    assert {c.finished for c in got} == {True, False}


def test_both_backends_sample_the_same_tokens() -> None:
    model = build("qwen3")
    sampling = SamplingConfig(temperature=0.8, top_k=20, top_p=0.9, max_new_tokens=16, batch_size=4)
    first = make_sampler(model, "embedded", [3, 4]).generate(PROMPTS * 3, sampling, 7)
    second = make_sampler(model, "transformers", [3, 4]).generate(PROMPTS * 3, sampling, 7)
    assert [c.ids for c in first] == [c.ids for c in second]
    for a, b, prompt in zip(first, second, PROMPTS * 3, strict=True):
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)
        plain = forward_logprobs(model, prompt, a.ids, 0.8)
        assert torch.allclose(torch.tensor(a.logprobs), plain, atol=1e-4)


def test_a_model_in_training_with_packed_attention_is_left_as_it_was() -> None:
    expected = peer_greedy(build("llama"), PROMPTS[2], 8, ())
    model = build("llama").train()
    assert enable_packing(model)
    for backend in ("embedded", "transformers"):
        assert make_sampler(model, backend, ()).generate([PROMPTS[2]], greedy(8), 0)[0].ids == expected
    assert model.training
    assert model.config._attn_implementation == ATTENTION


def test_weights_are_read_anew_at_each_call_and_lora_is_part_of_them() -> None:
    import peft

    model = build("llama")
    sampler = make_sampler(model, "embedded", ())
    before = sampler.generate(PROMPTS, greedy(8), 0)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.3)
    assert [c.ids for c in sampler.generate(PROMPTS, greedy(8), 0)] == [peer_greedy(model, p, 8, ()) for p in PROMPTS]
    assert sampler.generate(PROMPTS, greedy(8), 0) != before
    plain = [peer_greedy(model, p, 8, ()) for p in PROMPTS]
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    tuned = peft.get_peft_model(model, lora).eval()
    expected = [peer_greedy(tuned, p, 8, ()) for p in PROMPTS]
    assert expected != plain
    for backend in ("embedded", "transformers"):
        assert [c.ids for c in make_sampler(tuned, backend, ()).generate(PROMPTS, greedy(8), 0)] == expected
    with tuned.disable_adapter():
        assert [c.ids for c in make_sampler(tuned, "embedded", ()).generate(PROMPTS, greedy(8), 0)] == plain


def test_bf16_stays_near_fp32() -> None:
    model = build("llama")
    for backend in ("embedded", "transformers"):
        got = make_sampler(model, backend, (), "bf16").generate(PROMPTS, SamplingConfig(max_new_tokens=16), 0)
        for prompt, completion in zip(PROMPTS, got, strict=True):
            exact = forward_logprobs(model, prompt, completion.ids)
            error = (torch.tensor(completion.logprobs) - exact).abs().mean()
            assert 0 < error < 0.15


# ------------------------------------------------------------------------------------------------- slots and limits


@pytest.mark.parametrize("backend", ["embedded", "transformers"])
def test_the_batch_size_does_not_change_what_is_sampled(backend: str) -> None:
    """Many more prompts than slots, lengths that differ, stop tokens: slots are refilled and the batch shrinks."""
    sampler = make_sampler(build("llama"), backend, [2, 3, 4])  # type: ignore[arg-type]
    prompts = [[5 + (i * j) % 50 for j in range(1 + i % 9)] for i in range(40)]
    results = [
        sampler.generate(prompts, SamplingConfig(max_new_tokens=24, batch_size=size), seed=3) for size in (1, 5, 16, 64)
    ]
    assert len({len(c.ids) for c in results[0]}) > 8
    for other in results[1:]:
        assert [c.ids for c in other] == [c.ids for c in results[0]]
    head = sampler.generate(prompts[:7], SamplingConfig(max_new_tokens=24), seed=3)
    assert [c.ids for c in head] == [c.ids for c in results[0][:7]]
    another = sampler.generate(prompts, SamplingConfig(max_new_tokens=24), seed=4)
    assert [c.ids for c in another] != [c.ids for c in results[0]]


def test_threads_decode_the_same_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions are those of a single thread, log-probabilities to rounding, and two runs agree to the last bit;
    samples of a prompt stay in one thread; the caller's thread count is left alone."""
    model = build("llama")
    prompts = [[5 + i // 4, 9, 11] for i in range(24)]
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=12, batch_size=10)
    torch.set_num_threads(1)
    alone = EmbeddedSampler(model, [3]).generate(prompts, sampling, seed=4)
    torch.set_num_threads(2)
    assert EmbeddedSampler(model, [3]).generate(prompts, sampling, seed=4) == alone, "two threads share each product"
    monkeypatch.setattr(embedded_module, "ALONE_SLOTS", 5)
    parts = embedded_module.divided([Request(i, tuple(p), 12) for i, p in enumerate(prompts)], 2)
    assert sorted(r.index for part in parts for r in part) == list(range(24))
    assert not {r.prompt for r in parts[0]} & {r.prompt for r in parts[1]}
    together, again = (EmbeddedSampler(model, [3]).generate(prompts, sampling, seed=4) for _ in range(2))
    assert torch.get_num_threads() == 2
    assert together == again
    assert [c.ids for c in together] == [c.ids for c in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_an_error_in_a_thread_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_module, "ALONE_SLOTS", 1)
    monkeypatch.setattr("keel.rollout.cpu.CpuDecoder.advance", lambda *_: 1 / 0)
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError):
        EmbeddedSampler(build("llama"), []).generate([[1, 2], [3]], SamplingConfig(max_new_tokens=4), seed=0)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("kind", ["llama_tied_bias", "qwen3"])
def test_every_way_to_decode_gives_the_same_numbers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """numba's kernels; torch's operations, compiled; in plain Python."""
    model = build(kind)
    sampling = SamplingConfig(temperature=0.9, top_k=30, max_new_tokens=24, batch_size=5)
    results = [EmbeddedSampler(model, [3]).generate(PROMPTS * 3, sampling, seed=0)]
    monkeypatch.setattr(llama_module, "products_of", lambda low: None)
    results.append(EmbeddedSampler(model, [3]).generate(PROMPTS * 3, sampling, seed=0))
    monkeypatch.setattr(llama_module, "compiled_decode", lambda: decode)
    results.append(EmbeddedSampler(model, [3]).generate(PROMPTS * 3, sampling, seed=0))
    for other in results[1:]:
        assert [c.ids for c in other] == [c.ids for c in results[0]]
        for one, another in zip(results[0], other, strict=True):
            assert one.logprobs == pytest.approx(another.logprobs, abs=1e-4)


def test_a_processor_that_knows_no_bfloat16_samples_in_it_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its float32 products are not for the head alone: all of a model's weights are packed, or none."""
    sampling = SamplingConfig(max_new_tokens=12, batch_size=5)
    results = []
    for known in ((), (torch.float32,)):
        monkeypatch.setattr(
            llama_module, "products_of", lambda low, known=known: products_of(low) if low in known else None
        )
        results.append(EmbeddedSampler(build("llama"), [3], "bf16").generate(PROMPTS, sampling, seed=0))
    assert results[0] == results[1]


def test_a_model_that_has_diverged_is_an_error() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="not finite at token 0 of the reply to prompt"):
            EmbeddedSampler(model, []).generate(PROMPTS, SamplingConfig(temperature=temperature), seed=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_context_ends_a_completion_and_a_prompt_that_fills_it_is_an_error(kind: str) -> None:
    model = build(kind)
    sampler = make_sampler(model, "auto", ())
    prompts = [[7] * 60, [7] * 63, [8, 9]]
    got = sampler.generate(prompts, greedy(10), 0)
    assert [len(c.ids) for c in got] == [4, 1, 10]
    assert not any(c.finished for c in got)
    assert got[0].ids == peer_greedy(model, prompts[0], 4, ())
    with pytest.raises(UserError, match=r"prompt 1 has 64 tokens.* context of 64"):
        sampler.generate([[7], [7] * 64], greedy(10), 0)
    with pytest.raises(UserError, match="prompt 0 has no tokens"):
        sampler.generate([[]], greedy(10), 0)
    assert sampler.generate([], greedy(10), 0) == []


def test_backends_are_chosen_or_refused_with_a_reason() -> None:
    assert why_unsupported(build("llama")) == ""
    assert "sliding window of 8" in why_unsupported(build("mistral_window"))
    with pytest.raises(UserError, match="GPT2LMHeadModel is not one of"):
        make_sampler(build("gpt2"), "embedded", ())


def test_vllm_that_is_missing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'keel-rlhf\[vllm\]'"):
        make_sampler(build("llama"), "vllm", ())


@pytest.mark.parametrize("kind", ["llama_tied_bias", "qwen3"])
def test_merged_weights_are_those_of_a_merged_checkpoint(kind: str) -> None:
    """peft's own merge is the oracle, with an embedding that is trained whole beside the adapters."""
    import peft

    lora = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, modules_to_save=["embed_tokens"]
    )
    model = build(kind)
    plain = {name: tensor.clone() for name, tensor in merged_weights(model)}
    assert plain.keys() == model.state_dict().keys()
    tuned = peft.get_peft_model(model, lora)
    with torch.no_grad():
        tuned.get_input_embeddings().modules_to_save["default"].weight.add_(1.0)
    got = {name: tensor.clone() for name, tensor in merged_weights(tuned)}
    with tuned.disable_adapter():
        for name, tensor in merged_weights(tuned):
            torch.testing.assert_close(tensor, plain[name], atol=0, rtol=0)
    expected = copy.deepcopy(tuned).merge_and_unload().state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)
    changed = [name for name in got if not torch.equal(got[name], plain[name])]
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert "model.embed_tokens.weight" in changed
    assert "model.layers.0.self_attn.k_proj.weight" not in changed


def test_below_adapters_on_experts_lie_the_weights_that_were_there() -> None:
    import peft

    model = zoo.make("qwen3_moe")
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
    tuned = peft.get_peft_model(model, lora)
    with tuned.disable_adapter():
        got = dict(merged_weights(tuned))
    assert got.keys() == plain.keys()
    assert all(torch.equal(got[name], plain[name]) for name in plain)
    with pytest.raises(UserError, match="only plain LoRA"):
        list(merged_weights(tuned))


def test_adapters_of_other_kinds_are_not_merged() -> None:
    import peft

    tuned = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj: only plain LoRA"):
        list(merged_weights(tuned))


# ------------------------------------------------------------------------------------------------- the choice of tokens


def slow_distribution(logits: list[float], c: SamplingConfig) -> list[float]:
    """The filters in plain Python, one after the other."""
    scaled = [x / c.temperature for x in logits]
    total = sum(math.exp(x) for x in scaled)
    probs = {i: math.exp(x) / total for i, x in enumerate(scaled)}
    order = sorted(probs, key=lambda i: -probs[i])
    if c.top_k:
        order = order[: c.top_k]
    mass, nucleus = 0.0, []
    for i in order:
        if c.top_p < 1 and mass >= c.top_p * sum(probs[j] for j in order):
            break
        nucleus.append(i)
        mass += probs[i]
    kept = [i for i in nucleus if probs[i] >= c.min_p * probs[order[0]]]
    total = sum(probs[i] for i in kept)
    return [probs[i] / total if i in kept else 0.0 for i in range(len(logits))]


FILTERS = [
    SamplingConfig(),
    SamplingConfig(temperature=0.5),
    SamplingConfig(top_k=4),
    SamplingConfig(top_p=0.7),
    SamplingConfig(min_p=0.2),
    SamplingConfig(temperature=1.7, top_k=8, top_p=0.8, min_p=0.1),
]


@pytest.mark.parametrize("sampling", FILTERS, ids=lambda c: f"t{c.temperature}k{c.top_k}p{c.top_p}m{c.min_p}")
def test_drawn_frequencies_match_the_filtered_softmax(sampling: SamplingConfig) -> None:
    torch.manual_seed(1)
    logits = torch.randn(12) * 1.5
    expected = torch.tensor(slow_distribution(logits.tolist(), sampling))
    n = 40_000
    ids, logps = choose(logits.expand(n, -1), uniforms([stream_key(5, 5)], n)[0], sampling)
    counts = torch.bincount(ids, minlength=12)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi2 = float(((counts - n * expected)[kept] ** 2 / (n * expected[kept])).sum())
    degrees = int(kept.sum()) - 1
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees)  # about one in several thousand by chance; the seed is fixed
    tempered = torch.log_softmax(logits / (sampling.temperature or 1.0), -1)
    assert torch.allclose(logps, tempered[ids], atol=1e-5)  # at the temperature, unfiltered


@pytest.mark.parametrize("flat", [0.1, 3.0])
def test_filters_equal_those_of_transformers(flat: float) -> None:
    """Flat and peaked rows over a vocabulary longer than the first look at the nucleus."""
    from transformers.generation import logits_process as peer

    torch.manual_seed(2)
    logits = torch.randn(16, 700) * flat
    for c in (SamplingConfig(temperature=0.7, top_k=50), SamplingConfig(top_p=0.9), SamplingConfig(min_p=0.05),
              SamplingConfig(temperature=1.3, top_k=300, top_p=0.6, min_p=0.01)):  # fmt: skip
        scores = peer.TemperatureLogitsWarper(c.temperature)(None, logits)
        scores = peer.TopKLogitsWarper(c.top_k)(None, scores) if c.top_k else scores
        scores = peer.TopPLogitsWarper(c.top_p)(None, scores) if c.top_p < 1 else scores
        scores = peer.MinPLogitsWarper(c.min_p)(None, scores) if c.min_p else scores
        weights = filtered_weights(torch.softmax(logits / c.temperature, -1), c)
        assert torch.allclose(weights / weights.sum(-1, keepdim=True), scores.softmax(-1), atol=1e-6)


def test_extreme_random_numbers_choose_allowed_tokens() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 3.0, 0.0, -math.inf]])
    for u in (2.0**-24, 0.5, 1.0):
        ids, logps = choose(logits, torch.tensor([u]), SamplingConfig(top_k=3))
        assert ids.item() in (1, 2, 3)
        assert math.isfinite(logps.item())


def test_random_numbers_are_splitmix64_and_uniform() -> None:
    """The published test vector of SplitMix64 for the seed 1234567."""
    counter = 1234567 + torch.arange(1, 4) * (0x9E3779B97F4A7C15 - (1 << 64))
    got = [z % (1 << 64) for z in mix64(counter).tolist()]
    assert got == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    u = uniforms([stream_key(0, i) for i in range(200)], 200)
    assert u.min() > 0
    assert u.max() <= 1
    counts = torch.histc(u, 50, 0, 1)
    assert float(((counts - 800) ** 2 / 800).sum()) < 49 + 4 * math.sqrt(98)
    assert abs(float(torch.corrcoef(torch.stack([u[:-1].flatten(), u[1:].flatten()]))[0, 1])) < 0.02
    assert torch.equal(uniforms([stream_key(0, 9)], 5)[0], u[9, :5])


# ------------------------------------------------------------------------------------------------- replies


def reply(text: str, *ids: int) -> Completion:
    return Completion(text, ids, (0.0,) * len(ids))


def test_similarity_and_near_duplicates() -> None:
    a, b, c = reply("a", 1, 2, 3, 4), reply("b", 1, 2, 3, 5), reply("c", 7, 8)
    near, copy = reply("a!", 1, 2, 3, 4, 4), reply("a", 1, 2, 3, 4)
    assert [similarity(a, other) for other in (b, c, near)] == [3 / 5, 0, 1]
    assert choose_different([a, copy, near, b, c], 2, 0.9) == [a, b]  # in the order they were drawn
    assert choose_different([a, near, b, c], 2, 0.5) == [a, c]  # b is near too
    assert choose_different([a, near, b], 2, 0.5) == [a, b]  # the least similar of those that wait
    assert choose_different([a, copy, near], 3, 0.9) == [a, near]  # an exact copy is never taken
    assert choose_different([a, copy, copy], 2, 0.9) == [a]


def word_chat() -> Chat:
    vocabulary = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(VOCABULARY - 2)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Chat(transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>"))


class Counting:
    def __init__(self) -> None:
        self.total, self.seen = 0, 0

    def start(self, task: str, total: int) -> None:
        self.total = total

    def advance(self, steps: int = 1, **figures: float) -> None:
        self.seen += steps

    def note(self, text: str) -> None: ...


def test_replies_are_text_without_the_stop_token_and_do_not_depend_on_the_batch() -> None:
    chat = word_chat()
    assert stop_token_ids(chat, SamplingConfig(stop=["w4"])) == (0, 6)
    with pytest.raises(UserError, match="'w4 w5' is 2 tokens"):
        stop_token_ids(chat, SamplingConfig(stop=["w4 w5"]))
    sampler = make_sampler(build("llama"), "auto", (0, 6))
    prompts = [Prompt(f"p{i}", (Message("user", f"w{i} w{i + 1}"),)) for i in range(9)]
    kept = []
    for batch_size in (4, 32):
        reporter = Counting()
        sampling = SamplingConfig(max_new_tokens=12, batch_size=batch_size)
        kept.append(sample_replies(sampler, chat, prompts, sampling, Choice(2, candidates=5), 0, reporter))
        assert reporter.seen == reporter.total == 9 * 5
    assert [[c.ids for c in row] for row in kept[0]] == [[c.ids for c in row] for row in kept[1]]
    assert all(len(row) == 2 and row[0].text != row[1].text for row in kept[0])
    ended = [c for row in kept[0] for c in row if c.finished]
    assert ended
    for c in ended:
        assert c.ids[-1] in (0, 6)
        assert c.text.split() == [f"w{i - 2}" if i > 1 else "<unk>" for i in c.ids[:-1] if i > 1]
