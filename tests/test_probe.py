"""Every kind of architecture against its own forward pass, each sequence by itself: transformers' numbers are the
oracle, and Keel's are those of a batch with neighbours and a fork."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny, tiny_llama
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from zoo import config, make

from keel.data.collate import pack, pack_shared
from keel.model import probe as probe_module
from keel.model.checkpoint import load_policy, load_scalar, prepared
from keel.model.fused import is_fusable
from keel.model.logits import LogitForm, logit_form
from keel.model.logprobs import masked_offsets, sequence_sums, token_logprobs
from keel.model.packed import backbone, hidden_states, road
from keel.model.probe import probe, slow_road
from keel.recipe.sections import LoraConfig
from keel.rollout.llama import why_unsupported
from keel.types import Encoded, UserError

SMALL: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What earlier tests found is no evidence here."""
    probe_module._KEPT.clear()
    yield
    probe_module._KEPT.clear()


def drawn(model: PreTrainedModel, std: float = 0.3, seed: int = 0) -> PreTrainedModel:
    """Weights so large that a leak shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std / max(1, p.dim() - 1))
    return model.eval()


def rows(longest: int = 30, vocabulary: int = 110) -> list[list[Encoded]]:
    """A prompt with two replies, and two sequences of other lengths."""
    draw = random.Random(4)

    def sequence(prompt: list[int], n: int) -> Encoded:
        ids = (*prompt, *(draw.randrange(5, vocabulary) for _ in range(n)))
        return Encoded(ids, (False,) * len(prompt) + (True,) * n)

    prompt = [draw.randrange(5, vocabulary) for _ in range(longest // 2)]
    return [
        [sequence(prompt, longest // 2), sequence(prompt, longest // 3)],
        [sequence(prompt[:3], 4)],
        [sequence(prompt[2:7], longest)],
    ]


def own_logps(model: PreTrainedModel, sequence: Encoded) -> Tensor:
    """Log-probabilities of the learned tokens, by transformers alone."""
    ids = torch.tensor([sequence.ids])
    logps = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
    places = [i for i, learned in enumerate(sequence.mask) if learned]
    return torch.stack([logps[i - 1, sequence.ids[i]] for i in places])


def check_against_its_own(model: PreTrainedModel, expected_road: str, longest: int = 30) -> None:
    batch = rows(longest)
    together = [sequence for row in batch for sequence in row]
    with torch.no_grad():
        expected = torch.cat([own_logps(model, sequence) for sequence in together])
        ready: Any = prepared(model, "cpu", None, False, "CAUSAL_LM", [])
        assert road(ready) == expected_road
        torch.testing.assert_close(token_logprobs(ready, pack_shared(batch)).logp_C, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(token_logprobs(ready, pack(together)).logp_C, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "expected_road"),
    [
        ("lfm2", "padded"),  # short convolutions
        ("granitemoehybrid", "padded"),  # Mamba layers
        ("minimax", "padded"),  # linear attention
        ("recurrent_gemma", "padded"),
        ("falcon_h1", "padded"),
        ("doge", "alone"),  # a mask of its own, which chooses among keys: ties fall otherwise among padding
        ("gpt_oss", "padded"),  # sinks
        ("gemma2", "padded"),  # soft caps in attention and on the logits
        ("bloom", "padded"),  # ALiBi, no attention interface
        ("roberta", "padded"),  # positions that begin at 2
        ("nemotron", "padded"),
        ("deepseek_v2", "packed"),  # value heads narrower than query heads
        ("deepseek_v3", "packed"),
        ("llama4_text", "padded"),  # queries scaled by their place in the row; chunks
        ("cohere", "packed"),
        ("nanochat", "packed"),  # a soft cap that its config does not name
        ("modernbert-decoder", "packed"),  # layers between the decoder and the output layer
        ("qwen3_moe", "packed"),
        ("mistral", "packed"),  # a window
    ],
)
def test_an_architecture_gives_its_own_numbers(name: str, expected_road: str) -> None:
    check_against_its_own(make(name), expected_road)


def test_narrower_values_in_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel.model.packed.PLAIN_ATTENTION_UP_TO", 2)
    check_against_its_own(make("deepseek_v3"), "packed")


def test_llama_4_counts_positions_and_chunks_in_each_sequence() -> None:
    small = config("llama4_text")
    small.floor_scale, small.attn_scale, small.attention_chunk_size = 4, 0.5, 6
    torch.manual_seed(0)
    check_against_its_own(drawn(AutoModelForCausalLM.from_config(small)), "padded")
    small.attn_temperature_tuning = False
    check_against_its_own(drawn(AutoModelForCausalLM.from_config(small)), "packed")


def test_a_window_that_the_model_does_not_read_is_none() -> None:
    """Llama's config may carry a sliding_window; its layers see everything. The sampler reads the same."""
    model = drawn(LlamaForCausalLM(LlamaConfig(**SMALL, sliding_window=4)))
    assert is_fusable(backbone(model))
    assert why_unsupported(model) == ""
    check_against_its_own(model, "packed")


def test_windows_are_where_each_family_has_them() -> None:
    mistral = drawn(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)))
    assert "sliding window of 4" in why_unsupported(mistral)
    check_against_its_own(mistral, "packed")
    qwen = Qwen2Config(**SMALL, sliding_window=5, use_sliding_window=True, max_window_layers=1)
    model = drawn(Qwen2ForCausalLM(qwen))
    assert "sliding window of 5" in why_unsupported(model)
    check_against_its_own(model, "packed")


def test_bert_as_a_decoder_runs_and_as_an_encoder_is_refused() -> None:
    small = {name: value for name, value in SMALL.items() if name not in ("num_key_value_heads",)}
    check_against_its_own(drawn(BertLMHeadModel(BertConfig(**small, is_decoder=True))), "packed")
    with pytest.raises(UserError, match=r"BertLMHeadModel is not causal.*is_decoder"):
        prepared(BertLMHeadModel(BertConfig(**small)), "cpu", None, False, "CAUSAL_LM", [])


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_long_neighbour_does_not_turn_a_short_text(kind: str) -> None:
    """Rotary embeddings of these kinds change where the longest text of a pass is longer than those of pretraining."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0}
    if kind == "longrope":
        factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [4.0, 5.0, 6.0, 7.0]}
        rope |= factors | {"original_max_position_embeddings": 24}
        shape = SMALL | {"max_position_embeddings": 96}
        model: PreTrainedModel = drawn(Phi3ForCausalLM(Phi3Config(**shape, rope_parameters=rope)))
    else:
        rope |= {"factor": 4.0, "original_max_position_embeddings": 24}
        shape = SMALL | {"max_position_embeddings": 24}
        model = drawn(LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope)))
        model.config.max_position_embeddings = 96
    fresh, batch = copy.deepcopy(model), rows(40)
    together = [sequence for row in batch for sequence in row]
    assert min(len(s.ids) for s in together) < 24 < max(len(s.ids) for s in together)
    with torch.no_grad():
        alone = []
        for sequence in sorted(together, key=lambda s: len(s.ids)):  # lengths that grow leave no trace in each other
            alone.append((sequence, own_logps(fresh, sequence)))
        expected = torch.cat([next(found for s, found in alone if s is sequence) for sequence in together])
        ready: Any = prepared(model, "cpu", None, False, "CAUSAL_LM", [])
        for _ in range(2):
            got = token_logprobs(ready, pack_shared(batch)).logp_C
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "changed", "form"),
    [
        ("hyperclovax", {"logits_scaling": 4.0}, LogitForm(4.0)),  # multiplies
        ("granite", {"logits_scaling": 4.0}, LogitForm(0.25)),  # divides
        ("falcon_h1", {"lm_head_multiplier": 0.5}, LogitForm(0.5)),
        ("cohere", {"logit_scale": 0.25}, LogitForm(0.25)),
        ("gemma2", {"final_logit_softcapping": 5.0}, LogitForm(1.0, 5.0)),
        ("nanochat", {"final_logit_softcapping": 2.0}, LogitForm(1.0, 2.0)),
        ("llama", {"logits_scaling": 8.0, "final_logit_softcapping": 3.0, "logit_scale": 2.0}, LogitForm()),  # strays
    ],
)
def test_the_form_of_the_logits_is_what_the_model_does(name: str, changed: dict[str, float], form: LogitForm) -> None:
    small = config(name)
    for key, value in changed.items():
        setattr(small, key, value)
    torch.manual_seed(0)
    model = drawn(AutoModelForCausalLM.from_config(small), std=0.1)
    found = logit_form(model)
    assert (found.softcap is None) == (form.softcap is None)
    assert found.scale == pytest.approx(form.scale, rel=1e-5)
    if form.softcap is not None:
        assert found.softcap == pytest.approx(form.softcap, rel=1e-5)
    check_against_its_own(model, road(probed(model)))


def probed(model: PreTrainedModel) -> PreTrainedModel:
    probe(model)
    model.set_attn_implementation(model.keel_attention)
    return model


class CappedThenScaled(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = 2.5 * 3.0 * torch.tanh(out.logits * 0.5 / 3.0)
        return out


class ScaledByColumn(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * torch.linspace(0.5, 2.0, out.logits.shape[-1])
        return out


def test_a_factor_before_a_cap_and_another_behind_it() -> None:
    model = drawn(CappedThenScaled(LlamaConfig(**SMALL)))
    assert logit_form(model).softcap == pytest.approx(7.5, rel=1e-5)
    assert logit_form(model).scale == pytest.approx(1.25, rel=1e-4)
    check_against_its_own(model, "packed")


def test_logits_of_an_unknown_form_are_refused() -> None:
    with pytest.raises(UserError, match="ScaledByColumn makes its logits by more than"):
        prepared(ScaledByColumn(LlamaConfig(**SMALL)), "cpu", None, False, "CAUSAL_LM", [])


@pytest.mark.parametrize("name", ["lfm2", "mistral", "deepseek_v3", "modernbert-decoder"])
def test_gradients_of_a_preference_loss_are_the_models_own(name: str) -> None:
    """DPO's loss without a reference: -log sigmoid of the difference of two replies' log-probabilities."""
    model, peer = make(name), make(name)
    chosen, rejected = rows()[0]
    own = [own_logps(peer, sequence).sum() for sequence in (chosen, rejected)]
    (-nn.functional.logsigmoid(0.1 * (own[0] - own[1]))).backward()
    ready: Any = prepared(model, "cpu", None, False, "CAUSAL_LM", [])
    batch = pack_shared(rows())
    sums = sequence_sums(token_logprobs(ready, batch).logp_C, batch)
    (-nn.functional.logsigmoid(0.1 * (sums[0] - sums[1]))).backward()
    for (n, p), q in zip(model.named_parameters(), peer.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None or float(p.grad.abs().max()) == 0
            continue
        scale = float(q.grad.abs().max())
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4 * scale + 1e-7, rtol=1e-3, msg=lambda m, n=n: f"{n}: {m}")


# ------------------------------------------------------------------------------------------------- broken ones


class Leaking(LlamaDecoderLayer):
    """Adds the token before, whosever it is, and something of the longest row of the batch."""

    rows_too = True

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(hidden_states, *args, **kwargs)
        out = out + 0.5 * nn.functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1]
        return out + 0.1 * hidden_states.shape[0] if self.rows_too else out


class LeakingInRows(Leaking):
    rows_too = False


class Drawing(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return nn.functional.dropout(super().forward(hidden_states, *args, **kwargs), 0.1, self.training)


def broken(layer: type[LlamaDecoderLayer]) -> PreTrainedModel:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.model.layers[1] = layer(model.config, 1)
    model.config.architectures = [layer.__name__]
    model.config.test_layer = layer.__name__  # another architecture under the same name
    return drawn(model)


@pytest.mark.parametrize(("layer", "expected_road"), [(LeakingInRows, "padded"), (Leaking, "alone")])
def test_a_layer_that_leaks_takes_a_slower_road(layer: type[LlamaDecoderLayer], expected_road: str) -> None:
    model = broken(layer)
    model.model.layers[1].register_forward_hook(lambda *_: None)  # or its linear layers would be run by name
    check_against_its_own(model, expected_road)
    assert ("slower" in slow_road(model)) == (expected_road != "packed")


def test_what_is_drawn_in_training_is_found() -> None:
    with pytest.raises(UserError, match="other numbers in training than in evaluation"):
        prepared(broken(Drawing), "cpu", None, False, "CAUSAL_LM", [])


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        prepared(model, "cpu", None, False, "CAUSAL_LM", [])


def test_the_probe_draws_no_random_number_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    first, _ = load_policy(tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert first.training
    monkeypatch.setattr(probe_module, "_find", lambda model: pytest.fail("asked twice"))
    second, _ = load_policy(tmp_path)
    assert (road(first), road(second)) == ("packed", "packed")
    assert is_fusable(backbone(second))


# ------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(("name", "expected_road"), [("llama", "packed"), ("doge", "alone"), ("minimax", "padded")])
def test_rewards_and_values_are_the_classifiers_own(name: str, expected_road: str) -> None:
    small = config(name)
    small.num_labels, small.pad_token_id = 1, 0
    torch.manual_seed(0)
    model = drawn(AutoModelForSequenceClassification.from_config(small))
    batch = rows()
    together = [sequence for row in batch for sequence in row]
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([s.ids])).logits[0] for s in together])
        prepared(model, "cpu", None, False, "SEQ_CLS", ["score"])
        assert road(model) == expected_road
        packed = pack_shared(batch)
        scores = model.score(hidden_states(model, packed, packed.cu_seqlens[1:] - 1)).squeeze(1)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- adapters, limits


def test_adapters_on_the_output_layer_learn(tmp_path: Path) -> None:
    """Values and gradients against transformers' logits through peft's own layer. (On a tied one they are refused.)"""
    LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False)).save_pretrained(tmp_path)
    model = drawn(AutoModelForCausalLM.from_pretrained(tmp_path))
    ready: Any = prepared(model, "cpu", LoraConfig(rank=2, targets=["lm_head", "q_proj"]), False, "CAUSAL_LM", [])
    with torch.no_grad():
        for n, p in ready.named_parameters():
            if "lora_B" in n:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    batch = rows()
    token_logprobs(ready, pack_shared(batch)).logp_C.sum().backward()
    got = {n: p.grad.clone() for n, p in ready.named_parameters() if p.requires_grad}
    ready.zero_grad()
    model.set_attn_implementation("sdpa")
    sum(own_logps(ready, sequence).sum() for row in batch for sequence in row).backward()
    for n, p in ready.named_parameters():
        if p.requires_grad:
            assert float(p.grad.abs().max()) > 0
            scale = float(p.grad.abs().max())
            torch.testing.assert_close(got[n], p.grad, atol=1e-3 * scale, rtol=1e-3, msg=lambda m, n=n: f"{n}: {m}")


def test_texts_beyond_the_positions_and_tokens_beyond_the_embedding_are_refused() -> None:
    model: Any = prepared(
        LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=64)), "cpu", None, False, "", []
    )
    long = pack([Encoded((5,) * 65, (True,) * 65)])
    with pytest.raises(UserError, match=r"65 tokens is longer than the 64 positions of LlamaForCausalLM"):
        token_logprobs(model, long)
    assert masked_offsets(long).tolist() == [0, 64]
    with pytest.raises(UserError, match=r"embeddings for 120 tokens, and the text has token 120"):
        token_logprobs(model, pack([Encoded((5, 120, 7), (False, True, True))]))


def test_a_reward_model_of_a_file_is_probed_too(tmp_path: Path) -> None:
    scorer = load_scalar(save_tiny(tmp_path), new_head_seed=0)
    assert road(scorer.model) == "packed"
