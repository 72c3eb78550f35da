"""Sampling from architectures with caches and masks of their own, against transformers' ``generate`` of each prompt
alone and the models' own forward passes; and from models that compute no numbers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from keel.model.padded import stretched_beyond
from keel.recipe.sections import SamplingConfig
from keel.rollout import llama as llama_module
from keel.rollout.embedded import EmbeddedSampler
from keel.rollout.hf import TransformersSampler
from keel.rollout.roads import Road
from keel.rollout.tokens import choose, filtered_weights, finite
from keel.types import Completion, UserError
from tests import zoo

PROMPTS = [[9, 20, 33], [40, 50, 61, 70, 80, 9, 11, 12, 13, 14, 15, 16], [31, 29, 28, 77], [55, 44, 33], [66, 77]]
GREEDY = SamplingConfig(temperature=0, max_new_tokens=8, batch_size=4)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def road(model: Any) -> Road:
    return model.keel_road_of_samples


def peer(model: Any, prompt: list[int], n: int) -> tuple[int, ...]:
    model.generation_config = GenerationConfig()
    with torch.no_grad():
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, pad_token_id=0
        )
    return tuple(out[0, len(prompt) :].tolist())


def own_logprobs(model: Any, prompt: list[int], ids: tuple[int, ...], temperature: float = 1.0) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)


CACHES = {
    "mamba": "generate", "mamba2": "generate", "falcon_h1": "generate", "jamba": "generate", "lfm2": "generate",
    "qwen3_next": "generate", "granitemoehybrid": "generate", "bamba": "generate", "openai-gpt": "generate",
    "recurrent_gemma": "generate", "rwkv": "generate", "bart": "generate", "zamba": "generate", "doge": "plain",
    "minimax": "loop", "gemma2": "loop", "gpt_oss": "loop",
}  # fmt: skip


@pytest.mark.parametrize("name", CACHES)
def test_any_cache_samples_what_generate_does_of_the_prompt_alone(name: str) -> None:
    model = zoo.make(name)
    got = TransformersSampler(model, ()).generate(PROMPTS, GREEDY, seed=0)
    assert road(model).way == CACHES[name]
    for prompt, completion in zip(PROMPTS, got, strict=True):
        assert completion.ids == peer(model, prompt, 8)
        if name != "doge":  # whose selected keys may tie, and then depend on the text behind
            want = own_logprobs(model, prompt, completion.ids)
            assert torch.allclose(want, torch.tensor(completion.logprobs), atol=1e-4)


@pytest.mark.parametrize("name", ["lfm2", "recurrent_gemma", "rwkv", "roberta"])
def test_seeds_stops_and_limits_are_keels_on_every_road(name: str) -> None:
    model = zoo.make(name)
    sampling = SamplingConfig(temperature=0.7, max_new_tokens=9, batch_size=2)
    sampler = TransformersSampler(model, ())
    drawn = sampler.generate(PROMPTS, sampling, seed=3)
    other = sampler.generate(PROMPTS, sampling.model_copy(update={"batch_size": 5}), seed=3)
    assert [c.ids for c in other] == [c.ids for c in drawn]
    stop = drawn[1].ids[4]
    cut = TransformersSampler(model, [stop]).generate(PROMPTS, sampling, seed=3)
    for prompt, whole, part in zip(PROMPTS, drawn, cut, strict=True):
        end = whole.ids.index(stop) + 1 if stop in whole.ids else 9
        assert part.ids == whole.ids[:end]
        assert part.finished == (stop in whole.ids)
        want = own_logprobs(model, prompt, part.ids, temperature=0.7)
        assert torch.allclose(want, torch.tensor(part.logprobs), atol=1e-4)


def test_a_model_whose_generate_is_not_its_forward_pass_is_sampled_as_its_forward_pass() -> None:
    model = zoo.make("roberta")  # generate counts its positions otherwise
    got = TransformersSampler(model, ()).generate(PROMPTS, GREEDY, seed=0)
    assert road(model).way == "plain"
    for prompt, completion in zip(PROMPTS, got, strict=True):
        ids = list(prompt)
        for token in completion.ids:
            with torch.no_grad():
                assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


@pytest.mark.parametrize("name", ["xlnet", "xlm", "cpmant"])
def test_a_model_that_looks_ahead_is_refused_by_name(name: str) -> None:
    model = zoo.make(name)
    with pytest.raises(UserError, match=rf"{type(model).__name__} cannot be sampled from"):
        TransformersSampler(model, ()).generate(PROMPTS, GREEDY, seed=0)


def test_settings_that_a_checkpoint_brings_for_generate_change_nothing_and_are_put_back() -> None:
    model: Any = zoo.make("lfm2")
    plain = TransformersSampler(model, ()).generate(PROMPTS, GREEDY, seed=0)
    settings = GenerationConfig(
        eos_token_id=plain[0].ids[1], forced_eos_token_id=5, repetition_penalty=3.0, num_beams=2, min_length=50
    )
    model.generation_config = settings
    assert TransformersSampler(model, ()).generate(PROMPTS, GREEDY, seed=0) == plain
    assert model.generation_config is settings


def stretched(kind: str) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": 0, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
        return LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope)).eval()
    rope = {
        "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    config = Phi3Config(**sizes, rope_parameters=rope, original_max_position_embeddings=16, sliding_window=None)
    return Phi3ForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_stretched_positions_do_not_depend_on_the_batch(kind: str) -> None:
    model = stretched(kind)
    assert stretched_beyond(model.config) == 16
    prompts = [[5, 6, 7], list(range(20, 50)), [8, 9, 10, 11, 12], list(range(60, 72)), list(range(40, 70))]
    got = TransformersSampler(model, ()).generate(prompts, GREEDY, seed=0)
    for prompt, completion in zip(prompts, got, strict=True):
        fresh = stretched(kind)  # the frequencies of one that has seen nothing yet
        assert completion.ids == peer(fresh, prompt, 8)
    assert road(model).batch == "equal"


# ------------------------------------------------------------------------------------------------- no numbers


def broken(what: str) -> Any:
    model: Any = zoo.make("llama")
    with torch.no_grad():
        if what == "norm":
            model.model.norm.weight.fill_(math.nan)
        elif what == "layer":
            model.model.layers[1].mlp.down_proj.weight[3, 5] = math.nan
        elif what == "row":
            model.lm_head.weight[17] = math.nan
        elif what == "infinite":
            model.lm_head.weight[17] = math.inf
        else:
            model.lm_head.weight.fill_(1e38)
    return model


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(max_new_tokens=8), SamplingConfig(top_p=0.9, top_k=20)])
@pytest.mark.parametrize("what", ["norm", "layer", "row", "infinite", "overflow"])
@pytest.mark.parametrize("sampler", ["compiled", "torch", "transformers"])
def test_logits_that_are_no_numbers_end_in_one_sentence(
    sampler: str, what: str, sampling: SamplingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sampler == "torch":
        monkeypatch.setattr(llama_module, "products_of", lambda low: None)
    kind = TransformersSampler if sampler == "transformers" else EmbeddedSampler
    with pytest.raises(UserError, match=r"logits are not finite at token \d+ of the reply to .*; start from") as error:
        kind(broken(what), [3]).generate(PROMPTS, sampling, seed=0)
    assert "\n" not in str(error.value)


def test_what_turns_up_later_names_the_prompt_and_the_token() -> None:
    numbers = Completion("", (5, 6), (-1.0, -2.0), False)
    assert finite([numbers]) == [numbers]
    for bad in (math.nan, -math.inf):
        with pytest.raises(UserError, match="at token 1 of the reply to prompt 1"):
            finite([numbers, Completion("", (5, 6, 7), (-1.0, bad, -1.0), False)])


def test_vllms_logits_that_are_no_numbers_end_in_the_same_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from keel.rollout.vllm import VllmSampler

    sampler = VllmSampler.__new__(VllmSampler)
    sampler.model = zoo.make("llama")
    logprobs = [{4: SimpleNamespace(logprob=-1.0)}, {5: SimpleNamespace(logprob=math.nan)}]
    row = SimpleNamespace(token_ids=[4, 5], logprobs=logprobs)
    sampler.stop_ids = ()
    monkeypatch.setattr(VllmSampler, "_generate", lambda self, *_: [self._completion(row)])
    with pytest.raises(UserError, match="at token 1 of the reply to prompt 0"):
        sampler.generate([[7, 8]], GREEDY, seed=0)


def test_a_token_without_weight_is_never_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 300, generator=generator) * 8
    logits[:, ::3] = -math.inf
    uniforms = torch.cat([torch.full((500,), 2.0**-24), torch.ones(500), torch.rand(1000, generator=generator)])
    for sampling in (SamplingConfig(), SamplingConfig(top_k=7), SamplingConfig(top_p=0.8), SamplingConfig(min_p=0.1)):
        ids, logps = choose(logits, uniforms.clamp(min=2.0**-24), sampling)
        weights = filtered_weights(torch.softmax(logits, -1), sampling)
        assert bool((weights.gather(1, ids[:, None]) > 0).all())
        assert bool(torch.isfinite(logps).all())
