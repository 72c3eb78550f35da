"""Packed forward passes against the padded road, chunked log-probabilities against a full softmax, checkpoints as
transformers loads them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import prompt, save_tiny, tiny_llama, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from keel.data.collate import pack, pack_shared
from keel.model import logprobs as logprobs_module
from keel.model import packed as packed_module
from keel.model import varlen as varlen_module
from keel.model.checkpoint import load_policy, load_scalar, save
from keel.model.logits import LogitForm
from keel.model.logprobs import head_logprobs, masked_offsets, sequence_sums, token_logprobs
from keel.model.measure import completion_logprobs
from keel.model.packed import enable_packing, hidden_states, padded_hidden_states
from keel.recipe.sections import LoraConfig
from keel.types import Encoded, PackedBatch, UserError

LENGTHS = [5, 9, 3, 12, 1]


def batch_of(lengths: list[int], vocabulary: int = 100, seed: int = 0) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return pack([Encoded(tuple(row), tuple(i >= 2 for i in range(len(row)))) for row in rows])


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2, "vocab_size": 100}


def shapes() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    window = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**GROUPED)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
        "gemma3": Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, head_dim=8, **window)),
        "gpt2": GPT2LMHeadModel(
            GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
        ),
        "gpt_neox": GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, vocab_size=100)),
    }


@pytest.mark.parametrize("plain_up_to", [256, 2], ids=["plain products", "fused kernel"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox"])
def test_packed_equals_padded(name: str, plain_up_to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "PLAIN_ATTENTION_UP_TO", plain_up_to)
    model = shapes()[name].eval()
    batch = batch_of(LENGTHS)
    reference = padded_hidden_states(model, batch)
    assert enable_packing(model)
    torch.testing.assert_close(hidden_states(model, batch), reference, atol=1e-5, rtol=1e-5)


def varlen_by_hand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What torch's documentation says of ``varlen_attn``, which runs on a GPU alone: [T, heads, D], sequence by
    sequence, ``window_size`` tokens seen to the left (-1: all) and to the right of a query's own."""
    assert enable_gqa or q.shape[1] == k.shape[1] == v.shape[1]
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q >= int(cu_q.diff().max())
    assert max_k >= int(cu_k.diff().max())
    assert window_size[1] == 0
    out = torch.zeros_like(q)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    for (begin, end), (first, last) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        # The last query sees the last key: "aligned to the bottom right corner", as flash attention has it.
        distance = torch.arange(last - first - (end - begin), last - first)[:, None] - torch.arange(last - first)[None]
        seen = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else True)
        scores = torch.einsum("qhd,khd->hqk", q[begin:end], k[first:last]) * scale
        probs = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", probs, v[first:last])
    return out


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox"])
def test_attention_as_on_a_gpu_equals_padded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen_module, "varlen_attn", varlen_by_hand)
    monkeypatch.setattr(packed_module, "half_on_gpu", lambda query: query.dtype)
    model = shapes()[name].eval()
    model.base_model.keel_unfused = True
    batch = batch_of(LENGTHS)
    reference = padded_hidden_states(model, batch)
    assert enable_packing(model)
    torch.testing.assert_close(hidden_states(model, batch), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch's varlen attention runs on CUDA alone")
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_attention_on_a_gpu_equals_padded(name: str) -> None:
    """To what bfloat16 can tell apart, values and gradients."""
    model, batch = shapes()[name].cuda(), batch_of(LENGTHS).to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        reference = padded_hidden_states(model, batch)
        reference.float().square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert enable_packing(model)
    with torch.autocast("cuda", torch.bfloat16):
        got = hidden_states(model, batch)
        got.float().square().sum().backward()
    torch.testing.assert_close(got, reference, atol=0.05, rtol=0.05)
    for p, before in zip((p for p in model.parameters() if p.grad is not None), expected, strict=True):
        assert p.grad is not None
        assert float((p.grad - before).norm()) <= 0.05 * float(before.norm()) + 1e-3


def rows_that_share() -> list[list[Encoded]]:
    """Two prompts (4 and 7 tokens) with 3 and 2 completions, and one sequence by itself."""
    generator = torch.Generator().manual_seed(2)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 100, (n,), generator=generator).tolist())

    rows = []
    for shared, own in ((4, (3, 6, 1)), (7, (2, 5)), (2, (3,))):
        prompt_ids = ids(shared)
        rows.append([Encoded(prompt_ids + ids(n), (False,) * shared + (True,) * n) for n in own])
    return rows


@pytest.mark.parametrize("packing", ["plain products", "fused kernel", "padded", "as on a gpu"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox"])
def test_a_shared_prompt_changes_no_number(name: str, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities and gradients, against every completion behind a copy of its own."""
    monkeypatch.setattr(packed_module, "PLAIN_ATTENTION_UP_TO", 2 if packing == "fused kernel" else 256)
    model = shapes()[name].eval()
    if packing == "as on a gpu":
        monkeypatch.setattr(varlen_module, "varlen_attn", varlen_by_hand)
        monkeypatch.setattr(packed_module, "half_on_gpu", lambda query: query.dtype)
        model.base_model.keel_unfused = True
    rows = rows_that_share()
    apart = pack([sequence for row in rows for sequence in row])
    together = pack_shared(rows)
    assert together.num_tokens == apart.num_tokens - 2 * 4 - 7

    def measured(batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        logp = token_logprobs(model, batch).logp_C
        sums = sequence_sums(logp, batch)
        (sums * torch.arange(1.0, len(sums) + 1)).sum().backward()
        return logp.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, gradients = measured(apart)
    if packing != "padded":
        assert enable_packing(model)
    got, got_gradients = measured(together)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for n, gradient in got_gradients.items():
        torch.testing.assert_close(gradient, gradients[n], atol=1e-4, rtol=1e-4, msg=n)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_packed_gradients_equal_padded(name: str) -> None:
    model = shapes()[name].eval()
    batch = batch_of(LENGTHS)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        token_logprobs(model, batch).logp_C.sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    padded = gradients()
    assert enable_packing(model)
    for n, grad in gradients().items():
        torch.testing.assert_close(grad, padded[n], atol=1e-4, rtol=1e-4, msg=n)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox"])
def test_log_probabilities_equal_a_full_softmax(name: str) -> None:
    model = shapes()[name].eval()
    batch = batch_of(LENGTHS)
    expected, entropies = [], []
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        ids = batch.ids_T[start:end]
        logs = torch.log_softmax(model(input_ids=ids[None]).logits[0].float() / 0.7, -1)
        for position in range(2, len(ids)):
            expected.append(logs[position - 1, ids[position]])
            entropies.append(-(logs[position - 1].exp() * logs[position - 1]).sum())
    enable_packing(model)
    got = token_logprobs(model, batch, temperature=0.7, entropy=True)
    torch.testing.assert_close(got.logp_C, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert got.entropy_C is not None
    torch.testing.assert_close(got.entropy_C, torch.stack(entropies), atol=1e-5, rtol=1e-5)


def test_completions_are_measured_in_the_order_that_they_came(tmp_path: Path) -> None:
    """In whatever batches: each model's log-probabilities of each completion, as transformers' own pass gives them."""
    models = [load_policy(save_tiny(tmp_path / str(seed), seed))[0] for seed in (0, 1)]
    completions = [((6, 7, 8), (9, 10)), ((20,), (21, 22, 23, 24)), ((6, 7, 8), (30,))]
    rows = [Encoded.of(asked, reply) for asked, reply in completions]
    found = completion_logprobs(models, rows, [[2, 0], [1]], "cpu", temperature=0.7)
    for (asked, reply), of_row in zip(completions, found, strict=True):
        for model, logps in zip((tiny_llama(0), tiny_llama(1)), of_row, strict=True):
            with torch.no_grad():
                every = (model.eval()(torch.tensor([[*asked, *reply]])).logits[0] / 0.7).log_softmax(-1)
            expected = [float(every[len(asked) - 1 + n, token]) for n, token in enumerate(reply)]
            assert logps.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_head_gradients_equal_autograd_whatever_the_chunk(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logprobs_module.CHUNK_ELEMENTS, "cpu", 1)  # chunks of 16 tokens
    model = tiny_llama()
    model.keel_logits = LogitForm(1.3, softcap)  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(37, 32, generator=generator, requires_grad=True)
    ids = torch.randint(0, 300, (37,), generator=generator)
    weights = torch.randn(37, generator=generator)
    got = head_logprobs(model, hidden, ids, entropy=True)
    assert got.entropy_C is not None
    (got.logp_C * weights + 0.3 * got.entropy_C * weights).sum().backward()
    head = model.lm_head.weight
    got_hidden, got_head = hidden.grad.clone(), head.grad.clone()

    hidden.grad = head.grad = None
    logits = 1.3 * hidden @ head.t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logs = torch.log_softmax(logits, -1)
    entropy = -(logs.exp() * logs).sum(-1)
    (logs.gather(1, ids[:, None]).squeeze(1) * weights + 0.3 * entropy * weights).sum().backward()
    torch.testing.assert_close(got_hidden, hidden.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got_head, head.grad, atol=1e-5, rtol=1e-4)


def test_sums_by_sequence() -> None:
    batch = batch_of([5, 3, 2, 4])  # 3, 1, 0 and 2 masked tokens
    values = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 30.0])
    assert masked_offsets(batch).tolist() == [0, 3, 4, 4, 6]
    assert sequence_sums(values, batch).tolist() == [6.0, 10.0, 0.0, 50.0]


def test_reward_does_not_depend_on_the_batch_and_transformers_agrees(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "base")
    scorer = load_scalar(path, new_head_seed=0)
    scorer.set_scale(0.25, 2.0)
    out = tmp_path / "reward"
    out.mkdir()
    save(scorer.model, scorer.tokenizer, out)
    loaded = load_scalar(out)
    assert (loaded.mean, loaded.std) == (0.25, 2.0)
    texts = ["good day", "the captain sails from the port to the ship", "no"]
    rows = [loaded.chat.encode_reply(prompt(1).messages, text) for text in texts]
    with torch.no_grad():
        together = loaded.score_packed(pack(rows))
        alone = torch.cat([loaded.score_packed(pack([row])) for row in rows])
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)
        peer = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
        tokenizer = tiny_tokenizer()
        width = max(len(row.ids) for row in rows)
        pads = [[tokenizer.pad_token_id] * (width - len(row.ids)) for row in rows]
        ids = torch.tensor([[*row.ids, *pad] for row, pad in zip(rows, pads, strict=True)])
        mask = (ids != tokenizer.pad_token_id).long()
        raw = peer(input_ids=ids, attention_mask=mask).logits[:, 0]
        torch.testing.assert_close((raw - 0.25) / 2.0, together, atol=1e-5, rtol=1e-5)


def test_lora_keeps_the_reward_head_and_merges_on_saving(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "base")
    scorer = load_scalar(path, new_head_seed=0, lora=LoraConfig(rank=2))
    with torch.no_grad():
        for name, p in scorer.model.named_parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    assert any("score" in name for name, p in scorer.model.named_parameters() if p.requires_grad)
    batch = pack([scorer.chat.encode_reply(prompt(2).messages, "good day")])
    out = tmp_path / "reward"
    out.mkdir()
    save(scorer.model, scorer.tokenizer, out)
    with torch.no_grad():
        torch.testing.assert_close(load_scalar(out).raw_packed(batch), scorer.raw_packed(batch), atol=1e-5, rtol=1e-4)


def test_a_template_with_new_tokens_grows_the_embeddings(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "base")
    model, tokenizer = load_policy(path, chat_template="chatml")
    out = tmp_path / "out"
    out.mkdir()
    save(model, tokenizer, out)
    peer = AutoModelForCausalLM.from_pretrained(out)
    assert peer.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") < peer.get_input_embeddings().weight.shape[0]


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "base")
    batch = batch_of(LENGTHS)
    grads = []
    for checkpointing in (False, True):
        model, _ = load_policy(path, gradient_checkpointing=checkpointing)
        token_logprobs(model, batch).logp_C.sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("load", [load_policy, lambda path: (load_scalar(path, new_head_seed=0).model, None)])
def test_a_model_does_not_hang_on_its_file(load: Callable[[Path], tuple[torch.nn.Module, Any]], tmp_path: Path) -> None:
    """transformers maps the file into memory: training would copy it page by page, and see what others write to it."""
    save_tiny(tmp_path)
    model, _ = load(tmp_path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with (tmp_path / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(b"\x55" * (size // 2))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_wrong_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_policy("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json"):
        load_policy(tmp_path / "empty")
    with pytest.raises(UserError, match="no reward head"):
        load_scalar(save_tiny(tmp_path / "base"))
    broken = save_tiny(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="broken"):
        load_policy(broken)
