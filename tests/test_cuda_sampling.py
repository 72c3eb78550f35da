"""The GPU's decoder: on a CPU all of it but the capture, against ``generate``, plain forward passes and the decoder for
any device; its Triton kernels against plain torch, on a CPU by Triton's interpreter (TRITON_INTERPRET=1); and, where
there is a GPU, the captured steps."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import transformers
from test_rollout import EMBEDDED, PROMPTS, VOCABULARY, build, forward_logprobs, peer_greedy
from torch import Tensor

from keel.recipe.sections import SamplingConfig
from keel.rollout import cuda, plain_kernels
from keel.rollout import embedded as embedded_module
from keel.rollout import llama as llama_module
from keel.rollout.embedded import EmbeddedSampler
from keel.rollout.llama import Weights
from keel.rollout.slots import Slots
from keel.rollout.step import Layer, Linear, Shape
from keel.rollout.tokens import choose, filtered_weights, nearest_positive
from keel.types import Completion, UserError

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler takes the GPU's decoder wherever the model lies."""
    monkeypatch.setattr(embedded_module, "on_gpu", lambda model: True)


def greedy(n: int, batch_size: int = 3) -> SamplingConfig:
    return SamplingConfig(temperature=0, max_new_tokens=n, batch_size=batch_size)


# ------------------------------------------------------------------------------------------------ the decoder


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("kind", EMBEDDED)
def test_greedy_equals_generate_and_logprobs_equal_a_plain_forward_pass(kind: str) -> None:
    model = build(kind)
    expected = [peer_greedy(model, p, 20, ()) for p in PROMPTS]
    some = [t for t in range(VOCABULARY) if 0 < sum(t in ids for ids in expected) < len(PROMPTS)]
    stops = sorted(some, key=lambda t: -max(ids.index(t) for ids in expected if t in ids))[:1]
    got = EmbeddedSampler(model, stops).generate(PROMPTS, greedy(20), seed=0)
    for prompt, completion in zip(PROMPTS, got, strict=True):
        want = peer_greedy(model, prompt, 20, stops)
        assert completion.ids == want
        assert completion.finished == (want[-1] in stops)
        assert torch.allclose(torch.tensor(completion.logprobs), forward_logprobs(model, prompt, want), atol=1e-4)
    assert {c.finished for c in got} == {True, False}


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(max_new_tokens=18, batch_size=5),
        SamplingConfig(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, max_new_tokens=18, batch_size=12),
    ],
)
def test_both_decoders_sample_the_same_whenever_the_host_looks(
    sampling: SamplingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = EmbeddedSampler(build("qwen3"), [3, 4])
    other = sampler.generate(PROMPTS * 3, sampling, 7)
    monkeypatch.setattr(embedded_module, "on_gpu", lambda model: True)
    runs: list[list[Completion]] = []
    for steps in (1, 3, 8):
        monkeypatch.setattr(cuda, "STEPS", steps)
        monkeypatch.setattr(cuda, "SMALLEST_BATCH", 2)
        runs.append(sampler.generate(PROMPTS * 3, sampling, 7))
    for run in runs:
        assert [(c.ids, c.finished) for c in run] == [(c.ids, c.finished) for c in other]
        for a, b in zip(run, other, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert len({len(c.ids) for c in other}) > 3  # else nothing waited for anything


@pytest.mark.usefixtures("as_on_gpu")
def test_bf16_stays_near_a_plain_forward_pass_in_float32() -> None:
    model = build("qwen2")
    sampling = SamplingConfig(max_new_tokens=30, batch_size=8)
    drawn = EmbeddedSampler(model, [], "bf16").generate(PROMPTS, sampling, 0)
    wrong = [
        (torch.tensor(c.logprobs) - forward_logprobs(model, p, c.ids)).abs()
        for p, c in zip(PROMPTS, drawn, strict=True)
    ]
    assert 0 < torch.cat(wrong).mean() < 0.1


@pytest.mark.usefixtures("as_on_gpu")
def test_lora_is_part_of_the_weights() -> None:
    import peft

    model = peft.get_peft_model(build("qwen3"), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj", "lm_head"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    got = EmbeddedSampler(model.eval(), []).generate([[5, 6, 7]], greedy(10), 0)[0]
    assert torch.allclose(torch.tensor(got.logprobs), forward_logprobs(model, [5, 6, 7], got.ids), atol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(torch.tensor(got.logprobs), forward_logprobs(model, [5, 6, 7], got.ids), atol=1e-2)


def test_large_parameters_of_the_right_type_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_module, "JOINED_UP_TO", 3000)
    model = build("llama").bfloat16()
    weights = Weights.of(model, torch.bfloat16, apart=True)
    layer, own = weights.layers[1], model.model.layers[1]
    pairs = [(layer.o.weights[0], own.self_attn.o_proj), (layer.gate_up.weights[1], own.mlp.up_proj)]
    pairs += [(layer.down.weights[0], own.mlp.down_proj), (weights.head.weights[0], model.lm_head)]
    pairs.append((layer.qkv.weights[2], own.self_attn.v_proj))
    assert all(mine.data_ptr() == theirs.weight.data_ptr() for mine, theirs in pairs)


def test_whether_products_are_joined_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = EmbeddedSampler(build("llama_tied_bias"), [])
    expected = sampler.generate(PROMPTS, greedy(12), 0)
    monkeypatch.setattr(embedded_module, "on_gpu", lambda model: True)
    monkeypatch.setattr(llama_module, "JOINED_UP_TO", 0)
    for completion, other in zip(sampler.generate(PROMPTS, greedy(12), 0), expected, strict=True):
        assert completion.ids == other.ids
        assert completion.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_an_ended_slot_is_left_alone() -> None:
    model = build("llama")
    decoder = cuda.CudaDecoder(model, Weights.of(model, torch.float32, apart=True), 3, 40)
    s = Slots.empty(3, 12, torch.device("cpu"))
    decoder.prefill([(5, 6), (7,)], [0, 1], [0, 1])
    s.token[:2] = torch.tensor([9, 9])
    s.position[:2] = torch.tensor([2, 1])
    s.limit[:2] = torch.tensor([3, 12])
    s.active[:2] = 1
    s.ids.fill_(-7)
    s.logprobs.fill_(7.0)
    ended = decoder.advance(s, torch.tensor([], dtype=torch.int64), greedy(12))
    assert ended.tolist() == [True, False, False]
    assert s.sampled.tolist() == [3, 8, 0]
    assert s.position.tolist() == [5, 9, 0]
    assert s.active.tolist() == [0, 1, 0]
    assert (s.ids >= 0).sum(1).tolist() == [3, 8, 0]
    assert (s.logprobs <= 0).sum(1).tolist() == [3, 8, 0]
    assert s.token[0] == s.ids[0, 2]


def test_memory_decides_how_many_slots_there_are() -> None:
    gigabyte = 2**30
    assert cuda.fewer_slots(11 * gigabyte, gigabyte // 4, 8) == 8
    with pytest.warns(UserWarning, match="memory for 34 sequences at a time, not 64"):
        assert cuda.fewer_slots(11 * gigabyte, gigabyte // 4, 64) == 34  # 0.85 * 10 GiB
    with pytest.raises(UserError, match=r"lower sampling\.max_new_tokens"):
        cuda.fewer_slots(2 * gigabyte, gigabyte, 8)


def test_a_token_of_weight_0_gives_way_to_the_nearest_other() -> None:
    weights = torch.tensor([[0.0, 0.0, 0.5, 0.0, 0.0, 0.5], [0.2, 0.0, 0.0, 0.0, 0.8, 0.0]])
    for column, expected in enumerate([[2, 0], [2, 0], [2, 0], [2, 4], [5, 4], [5, 4]]):
        assert nearest_positive(weights, torch.full((2, 1), column)).squeeze(1).tolist() == expected


# ------------------------------------------------------------------------------------------------ the kernels


@pytest.fixture
def triton_kernels() -> Any:
    if not (GPU or INTERPRETED):
        pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    from keel.rollout import triton_kernels

    return triton_kernels


def wide(layers: int = 3, hidden: int = 256, vocabulary: int = 5000) -> Any:
    """A small random model whose heads the kernels take."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024,
        initializer_range=0.1, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config).eval().to(DEVICE)


def plain_logprobs(model: Any, prompt: list[int], ids: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]], device=DEVICE)).logits[0].float()
    return torch.log_softmax(logits[len(prompt) - 1 : -1], -1).cpu().gather(1, torch.tensor(ids)[:, None]).squeeze(1)


SHAPES = [(14, 2, 64), (4, 4, 80), (6, 2, 96), (8, 2, 128), (2, 1, 256)]
TYPES = [torch.bfloat16 if GPU else torch.float16, torch.float32]  # the interpreter multiplies bfloat16's bits


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    return a.dtype == b.dtype and torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TYPES)
def test_norms_and_gates_equal_torchs(triton_kernels: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for delta in (None, random(5, 80, dtype=dtype)):
        x, weight = random(5, 80), random(80, dtype=dtype)
        mine, plain = x.clone(), x.clone()
        a = triton_kernels.add_norm(mine, delta, weight, 1e-6, dtype)
        b = plain_kernels.add_norm(plain, delta, weight, 1e-6, dtype)
        assert close(a, b, dtype)
        assert close(mine, plain, torch.float32)
    apart = (random(3, 1100, dtype=dtype), random(3, 1100, dtype=dtype))
    for gate, up in (apart, torch.cat(apart, 1).chunk(2, 1)):
        assert close(triton_kernels.gated(gate, up), plain_kernels.gated(gate, up), dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize("programs", [1, 1024])
def test_attention_equals_torchs(
    triton_kernels: Any, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, programs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(triton_kernels, "PROGRAMS", programs)
    monkeypatch.setattr(triton_kernels, "FEWEST_KEYS", 32)
    torch.manual_seed(0)
    S, capacity = 4, 200
    shape = Shape(heads, kv_heads, dim, dim**-0.5, 1e-6)
    positions = torch.tensor([0, 199, 64, 31], device=DEVICE)
    rows = torch.arange(S, device=DEVICE)
    cos, sin = random(capacity, dim), random(capacity, dim)
    qkv = random(S, (heads + 2 * kv_heads) * dim, dtype=dtype)
    nothing = Linear([], [], 0)
    for norms in (None, random(dim)):
        layer = Layer(norms, nothing, norms, norms, nothing, None, nothing, nothing)
        cache = random(2, S, kv_heads, capacity, dim, dtype=dtype)
        mine, plain = cache.clone(), cache.clone()
        a = triton_kernels.place(qkv, rows, positions, cos, sin, layer, mine, shape)
        b = plain_kernels.place(qkv, rows, positions, cos, sin, layer, plain, shape)
        assert close(a, b, dtype)
        assert close(mine, plain, dtype)
        got = triton_kernels.attend(b, plain, positions, capacity, shape)
        want = plain_kernels.attend(b.float(), plain.float(), positions, capacity, shape).to(dtype)
        assert close(got, want, dtype)


@pytest.mark.parametrize("vocabulary", [61, 5000])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(temperature=0),
        SamplingConfig(),
        SamplingConfig(temperature=0.6),
        SamplingConfig(top_k=7),
        SamplingConfig(top_p=0.8, min_p=0.01),
        SamplingConfig(top_k=40, top_p=0.5),
    ],
)
def test_draws_equal_those_on_a_cpu(triton_kernels: Any, sampling: SamplingConfig, vocabulary: int) -> None:
    torch.manual_seed(0)
    logits = 3 * random(64, vocabulary)
    u = torch.rand(64).clamp_(min=2**-24)
    u[:2] = torch.tensor([2**-24, 1.0])
    ids, logprobs = triton_kernels.choose(logits, u.to(DEVICE), sampling)
    want, want_logprobs = choose(logits.cpu(), u, sampling)
    same = ids.cpu() == want
    assert same.float().mean() > 0.95  # a draw that lies within the rounding of the sums may tip
    assert torch.allclose(logprobs.cpu()[same], want_logprobs[same], atol=1e-5)
    if sampling.temperature:
        probs = torch.softmax(logits.cpu() / sampling.temperature, -1)
        assert (filtered_weights(probs, sampling).gather(1, ids.cpu()[:, None]) > 0).all()


def test_no_token_of_weight_0_is_drawn_and_what_is_no_number_shows(triton_kernels: Any) -> None:
    logits = torch.full((4, 9000), float("-inf"), device=DEVICE)
    logits[:, [17, 5000]] = 0.0  # a whole block, and the last, without any weight
    u = torch.tensor([2**-24, 0.5, 0.75, 1.0], device=DEVICE)
    ids, logprobs = triton_kernels.choose(logits, u, SamplingConfig())
    assert ids.tolist() == [17, 17, 5000, 5000]
    assert torch.allclose(logprobs, torch.full_like(logprobs, 0.5).log())
    for wrong in (float("nan"), float("inf")):
        logits[:, 300] = wrong
        for temperature in (0.0, 1.0):
            _, logprobs = triton_kernels.choose(logits, u, SamplingConfig(temperature=temperature))
            assert logprobs.isnan().all()


def test_tokens_are_recorded_as_by_torch(triton_kernels: Any) -> None:
    torch.manual_seed(0)
    states = [Slots.empty(6, 4, DEVICE) for _ in range(2)]
    ends = [torch.zeros(6, dtype=torch.bool, device=DEVICE) for _ in range(2)]
    stops = torch.tensor([3, 8], device=DEVICE)
    for s, ended, kernels in zip(states, ends, (triton_kernels, plain_kernels), strict=True):
        s.active[:5] = 1
        s.limit[:] = torch.tensor([4, 4, 4, 2, 1, 4])
        for step in range(4):
            ids = (torch.arange(6, device=DEVICE) * 3 + step * 2) % 10
            kernels.record(s, ids, -ids.float(), stops, ended)
    assert all(torch.equal(a, b) for a, b in zip(*(s.tensors().values() for s in states), strict=True))
    assert torch.equal(*ends)
    assert ends[0].any()
    assert not ends[0].all()


def test_the_decoder_by_the_kernels_equals_a_plain_forward_pass(
    triton_kernels: Any, as_on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "kernels_for", lambda device, head_dim: triton_kernels)
    monkeypatch.setattr(cuda, "STEPS", 3)
    monkeypatch.setattr(cuda, "SMALLEST_BATCH", 1)
    model = wide(layers=2, hidden=32, vocabulary=61)
    prompts = [[5, 6, 7], [9], [5, 6, 7], [20] * 8]
    drawn = EmbeddedSampler(model, [3, 4]).generate(prompts, SamplingConfig(max_new_tokens=7, batch_size=3), 0)
    for prompt, completion in zip(prompts, drawn, strict=True):
        want = plain_logprobs(model, prompt, completion.ids)
        assert torch.allclose(torch.tensor(completion.logprobs), want, atol=1e-3)
        assert len(completion.ids) == 7 or completion.finished


# ------------------------------------------------------------------------------------------------ on a GPU

on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("plain", [False, True])
def test_captured_steps_equal_a_plain_forward_pass(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(cuda, "kernels_for", lambda device, head_dim: plain_kernels)
    model = wide()
    prompts = [[n % 5000 for n in range(7 * i, 7 * i + 3 + 11 * i)] for i in range(20)]
    sampling = SamplingConfig(max_new_tokens=300, batch_size=16)
    stops = list(range(0, 5000, 250))
    drawn = EmbeddedSampler(model, stops).generate(prompts, sampling, 0)
    wrong = [
        (torch.tensor(c.logprobs) - plain_logprobs(model, p, c.ids)).abs().max()
        for p, c in zip(prompts, drawn, strict=True)
    ]
    assert max(wrong) < 2e-3
    assert len({len(c.ids) for c in drawn}) > 5
    for completion in drawn:
        assert all(token not in stops for token in completion.ids[:-1])


@on_gpu
def test_looks_change_nothing_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = EmbeddedSampler(wide(), list(range(0, 5000, 250)), "bf16")
    prompts = [[n % 5000 for n in range(7 * i, 7 * i + 3 + 11 * i)] for i in range(16)]
    sampling = SamplingConfig(max_new_tokens=64, batch_size=16)
    runs = []
    for steps in (1, 8):
        monkeypatch.setattr(cuda, "STEPS", steps)
        monkeypatch.setattr(cuda, "SMALLEST_BATCH", 16)  # products of other shapes would round differently
        runs.append([c.ids for c in sampler.generate(prompts, sampling, 3)])
    assert runs[0] == runs[1]


@on_gpu
def test_weights_are_read_anew_on_a_gpu() -> None:
    model = wide()
    sampler = EmbeddedSampler(model, [])
    before = sampler.generate([[5, 6, 7]], greedy(20), 0)[0]
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    after = sampler.generate([[5, 6, 7]], greedy(20), 0)[0]
    assert before.ids != after.ids


@on_gpu
@pytest.mark.parametrize("choose_by", ["torch", "triton"])
def test_frequencies_on_a_gpu_are_those_of_the_softmax(choose_by: str) -> None:
    """Chi-square, and no token of weight 0, over a vocabulary whose sums are made in many parts."""
    kernels: Any = plain_kernels
    if choose_by == "triton":
        from keel.rollout import triton_kernels as kernels  # type: ignore[no-redef]
    torch.manual_seed(0)
    V, S, rounds = 151_936, 256, 40
    logits = torch.full((V,), float("-inf"), device="cuda")
    some = torch.randperm(V, device="cuda")[:200]
    logits[some] = torch.randn(200, device="cuda")
    counts = torch.zeros(V, device="cuda")
    for _ in range(rounds):
        u = 1 - torch.rand(S, device="cuda")
        ids, _ = kernels.choose(logits.expand(S, V).contiguous(), u, SamplingConfig())
        counts += torch.bincount(ids, minlength=V)
    expected = torch.softmax(logits, -1) * S * rounds
    assert counts[expected == 0].sum() == 0
    statistic = ((counts[some] - expected[some]) ** 2 / expected[some]).sum()
    assert statistic < 300  # 199 degrees of freedom: 1 in 100,000 is above 290
