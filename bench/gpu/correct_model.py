"""Packed rows against the model's own unpadded forward pass, attention and head against float64, compiled against
eager."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bench.gpu.correct import (
    Check,
    Gap,
    LeftOut,
    Own,
    Said,
    Setting,
    apart,
    copied,
    forked,
    furthest,
    gradients,
    llama,
    low,
    own,
    relative,
    small,
    text,
)
from keel.data.collate import pack_shared
from keel.model import packed
from keel.model.checkpoint import prepared
from keel.model.layout import Layout
from keel.model.logits import LogitForm
from keel.model.logprobs import head_logprobs, token_logprobs
from keel.model.packed import compile_passes, hidden_states, road
from keel.types import Encoded, PackedBatch

PRECISIONS = ("fp32", "bf16")

# ------------------------------------------------------------------------------------- packed against unpadded


@dataclass(frozen=True)
class Kind:
    """One of transformers' types in a small shape. ``longest``: tokens of the longest text that is tried."""

    type: str
    changes: dict[str, Any]
    longest: int = 4096


def _kinds() -> dict[str, Kind]:
    ends = {"vocab_size": 512, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    shape = {**ends, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
             "max_position_embeddings": 8192}  # fmt: skip

    def heads(queries: int, keys: int, width: int) -> dict[str, int]:
        return {"num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": width}

    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 96}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    found = {f"Llama {width}, {q}/{kv} heads": Kind("llama", {**shape, **heads(q, kv, width)})
             for q, kv, width in ((8, 2, 64), (4, 4, 80), (4, 2, 96), (8, 1, 128), (4, 1, 256))}  # fmt: skip
    return found | {
        "Qwen2 64, 14/2 heads": Kind("qwen2", {
            **shape, "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2,
            "tie_word_embeddings": True}),
        "Qwen3 128, 4/2 heads": Kind("qwen3", {**shape, **heads(4, 2, 128)}),
        "Mistral 128, window 96": Kind("mistral", {**shape, **heads(4, 1, 128), "sliding_window": 96}),
        "Gemma 2 256, window 96": Kind("gemma2", {**shape, **heads(4, 2, 256), "sliding_window": 96}, 1024),
        "Gemma 3 64, window 96": Kind("gemma3_text", {**shape, **heads(4, 1, 64), **layers}),
        "GPT-2 64": Kind("gpt2", {**ends, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 8192}),
        "GPT-NeoX 80": Kind("gpt_neox", {**shape, "hidden_size": 320, "num_attention_heads": 4}),
        "Phi-3 96": Kind("phi3", {
            **shape, "hidden_size": 384, "num_attention_heads": 4, "num_key_value_heads": 4,
            "original_max_position_embeddings": 8192}),
        "Qwen3 MoE 64": Kind("qwen3_moe", {**shape, **heads(4, 2, 64), **experts}),
        "LFM2": Kind("lfm2", {
            **shape, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}, 1024),
        "Mamba": Kind("mamba", {**ends, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2}, 150),
    }  # fmt: skip


KINDS = _kinds()
TINY = ("Mistral 128, window 96", "LFM2")


def texts(longest: int, vocab: int, tiny: bool) -> dict[str, list[list[Encoded]]]:
    """Rows for ``pack_shared``."""
    lengths = (1, 110) if tiny else (1, 2, 63, 257, min(1000, longest), longest)
    prompt, replies = (100, (1, 7, 10)) if tiny else (120, (1, 60, 30, 100))
    whole = [[text(n, vocab, i)] for i, n in enumerate(lengths)]
    forks = [forked(prompt, replies, vocab, 7), [text(33, vocab, 8)], forked(17, (1, 2), vocab, 9)]
    return {"whole texts": whole, "forks": forks}


def unpadded(kind: Kind, setting: Setting) -> Said:
    """Hidden states, log-probabilities and gradients of packed rows against each text's own pass."""
    device, model = setting.device, small(kind.type, **kind.changes)
    plain = copied(model, device)
    ours = prepared(model, device, None, False, "CAUSAL_LM", [])
    for name, rows in texts(kind.longest, 512, setting.tiny).items():
        flat = [sequence for row in rows for sequence in row]
        right, rough = own(plain, flat, device), own(plain, flat, device, "bf16")
        for precision in PRECISIONS:
            found, where = _ours(ours, rows, device, precision), f"{name}, {precision}, road {road(ours)}"
            own_hidden = _laid_down(right, rows)
            if precision == "fp32":
                yield Gap(f"{where}: log-probabilities, nats", furthest(found.logp, right.logp), 1e-4)
                yield Gap(f"{where}: hidden states, of their norm", relative(found.hidden, own_hidden), 1e-4)
                yield Gap(f"{where}: gradients, of their norm", apart(found.gradients, right.gradients), 1e-4)
                continue
            # Experts and sharp attention tip over in bfloat16: twice the model's own error under autocast is no fault.
            hidden, slopes = relative(_laid_down(rough, rows), own_hidden), apart(rough.gradients, right.gradients)
            yield Gap(f"{where}: hidden states, of their norm", relative(found.hidden, own_hidden),
                      max(2e-2, 2 * hidden))  # fmt: skip
            yield Gap(f"{where}: gradients, of their norm", apart(found.gradients, right.gradients),
                      max(3e-2, 2 * slopes))  # fmt: skip


def _ours(model: nn.Module, rows: Sequence[Sequence[Encoded]], device: str, precision: str) -> Own:
    batch = pack_shared(rows, device)
    with low(device, precision):
        with torch.no_grad():
            hidden = hidden_states(model, batch)
        logp = token_logprobs(model, batch).logp_C
    logp.sum().backward()
    return Own(hidden.float(), logp.detach(), gradients(model))


def _laid_down(right: Own, rows: Sequence[Sequence[Encoded]]) -> Tensor:
    """Of hidden states of whole sequences, those of tokens that a packed batch holds: a row's prompt once."""
    lengths = [len(sequence.ids) for row in rows for sequence in row]
    parts = iter(right.hidden.split(lengths))
    return torch.cat([next(parts)[len(s.prompt_ids) if i else 0 :] for row in rows for i, s in enumerate(row)])


# --------------------------------------------------------------------------------------------------- attention


def attention(setting: Setting) -> Said:
    """Keel's attention over packed tokens, and its gradients, against a plain softmax in float64. What is multiplied is
    a bfloat16 number for both."""
    lengths, forks = ((1, 9, 40), (20, 3, 5)) if setting.tiny else ((1, 130, 17, 1500), (200, 1, 60, 300))
    heads = ((4, 2, 64, None), (4, 2, 64, 16)) if setting.tiny else (
        (8, 8, 64, None), (14, 2, 64, None), (4, 2, 80, None), (6, 2, 96, None), (32, 8, 128, None), (8, 1, 128, 100),
        (4, 1, 256, None), (4, 2, 256, 100), (4, 2, 64, 1), (4, 2, 40, None),
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        for queries, keys, width, window in heads:
            for name, rows in (("whole", [(n, ()) for n in lengths]), ("forks", [(forks[0], forks[1:]), (33, ())])):
                found = _attention(setting.device, dtype, queries, keys, width, window, rows)
                shape = f"{str(dtype)[6:]}, {queries}/{keys} heads of {width}, window {window}, {name}"
                worst = max(found, key=lambda part: found[part] if math.isfinite(found[part]) else math.inf)
                yield Gap(f"{shape}: worst {worst}, of its norm", found[worst], bound)


def _attention(
    device: str, dtype: torch.dtype, queries: int, keys: int, width: int, window: int | None,
    rows: Sequence[tuple[int, Sequence[int]]],
) -> dict[str, float]:  # fmt: skip
    """``rows``: (tokens of a text, or of a prompt; tokens of the replies behind it)."""
    sequences = [forked(p, replies, 99, i) if replies else [text(p, 99, i)] for i, (p, replies) in enumerate(rows)]
    batch, seen = pack_shared(sequences, device), _seen(rows)
    tokens = batch.num_tokens
    generator = torch.Generator().manual_seed(0)
    drawing = [torch.randn(1, h, tokens, width, generator=generator) for h in (queries, keys, keys, queries)]
    q, k, v, out_slope = (x.bfloat16().to(device) for x in drawing)
    inputs, wide = ([x.to(kind, copy=True).requires_grad_() for x in (q, k, v)] for kind in (dtype, torch.float64))
    found = _keels(inputs, batch, window)
    right = _softmax(wide[0], wide[1], wide[2], seen, window)
    found.backward(out_slope.transpose(1, 2).to(found.dtype))
    right.backward(out_slope.transpose(1, 2).double())
    parts = {"output": relative(found, right)}
    for name, mine, theirs in zip(("query", "key", "value"), inputs, wide, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        parts[f"gradient of {name}"] = relative(mine.grad, theirs.grad)
    return parts


def _keels(inputs: Sequence[Tensor], batch: PackedBatch, window: int | None) -> Tensor:
    """By the two functions that transformers' layers call: [1, T, heads, D]."""
    packed.enable_packing(llama())
    layout = Layout.of(batch)
    sees = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    token = packed._LAYOUT.set(layout)
    try:
        mask = ALL_MASK_ATTENTION_FUNCTIONS[packed.ATTENTION](mask_function=sees, local_size=window)
        call = ALL_ATTENTION_FUNCTIONS[packed.ATTENTION]
        return call(nn.Identity(), *inputs, mask, keel_layout=layout)[0]  # type: ignore[no-any-return]
    finally:
        packed._LAYOUT.reset(token)


def _seen(rows: Sequence[tuple[int, Sequence[int]]]) -> list[tuple[Tensor, int]]:
    """For each sequence (places in T of its tokens, how many of them are laid down with another sequence)."""
    found: list[tuple[Tensor, int]] = []
    end = 0
    for prompt, replies in rows:
        begins = torch.arange(end, end + prompt)
        end += prompt
        for i, reply in enumerate(replies or (0,)):
            found.append((torch.cat([begins, torch.arange(end, end + reply)]), prompt if i else 0))
            end += reply
    return found


def _softmax(q: Tensor, k: Tensor, v: Tensor, seen: Sequence[tuple[Tensor, int]], window: int | None) -> Tensor:
    """[1, heads, T, D] -> [1, T, heads, D]"""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    parts = []
    for places, shared in seen:
        place = torch.arange(len(places), device=q.device)
        behind = place[:, None] - place[None, :]
        hidden = (behind < 0) | (behind >= (window or len(places)))
        own_q, own_k, own_v = (x[0][:, places.to(q.device)] for x in (q, k, v))
        scores = (own_q @ own_k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(hidden, -math.inf)
        parts.append((scores.softmax(-1) @ own_v)[:, shared:])
    return torch.cat(parts, 1).transpose(0, 1)[None]


# -------------------------------------------------------------------------------------------------------- head


def head(setting: Setting) -> Said:
    """Log-probabilities, entropies and their gradients of the head's chunks against float64, vocabulary 151,936."""
    vocab, hidden_size, tokens = (5000, 16, 20) if setting.tiny else (151_936, 512, 300)
    forms: dict[str, tuple[LogitForm, float, bool]] = {
        "plain": (LogitForm(), 1.0, False),
        "scale, temperature, bias": (LogitForm(0.5), 0.7, True),
        "soft cap, temperature, bias": (LogitForm(1.0, 5.0), 1.3, True),
    }
    model: Any = llama(vocab, hidden_size, num_hidden_layers=1, tie_word_embeddings=False)
    bias = 0.1 * torch.randn(vocab, generator=torch.Generator().manual_seed(1))
    for name, (form, temperature, biased) in forms.items():
        twin = copy.deepcopy(model)
        twin.lm_head.weight.data = twin.lm_head.weight.data.bfloat16().float()
        twin.lm_head.bias = nn.Parameter(bias.clone()) if biased else None
        twin.to(setting.device).keel_logits = form
        for precision in PRECISIONS:
            for entropy in (False, True):
                found = _head(twin, tokens, form, temperature, entropy, setting.device, precision)
                for part, error in found.items():
                    # bfloat16 numbers are multiplied: they lose nothing, what is left is sums in float32.
                    values = part in ("log-probabilities", "entropies")
                    bound = 1e-4 if values or precision == "fp32" else 1e-2
                    unit = "nats" if values else "of their norm"
                    yield Gap(f"{name}, {precision}{', entropy' * entropy}: {part}, {unit}", error, bound)


def _head(
    model: Any, tokens: int, form: LogitForm, temperature: float, entropy: bool, device: str, precision: str
) -> dict[str, float]:
    weight, bias = model.lm_head.weight, model.lm_head.bias
    generator = torch.Generator().manual_seed(2)
    drawing = torch.randn(tokens, weight.shape[1], generator=generator).bfloat16().float().to(device)
    ids = torch.randint(0, len(weight), (tokens,), generator=generator).to(device)
    slopes = torch.randn(2, tokens, generator=generator).to(device)
    trained = [drawing.requires_grad_(), weight] + ([] if bias is None else [bias])
    model.zero_grad(set_to_none=True)
    with low(device, precision):
        said = head_logprobs(model, drawing, ids, temperature, entropy)
    total = (said.logp_C * slopes[0]).sum()
    if said.entropy_C is not None:
        total = total + (said.entropy_C * slopes[1]).sum()
    mine = torch.autograd.grad(total, trained)
    wide = [x.detach().double().requires_grad_() for x in trained]
    logits = F.linear(*wide) * form.scale
    if form.softcap:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    logps = F.log_softmax(logits / temperature, -1)
    right, right_entropy = logps.gather(1, ids[:, None]).squeeze(1), -(logps.exp() * logps).sum(1)
    theirs = torch.autograd.grad((right * slopes[0]).sum() + entropy * (right_entropy * slopes[1]).sum(), wide)
    found = {"log-probabilities": furthest(said.logp_C, right)}
    if said.entropy_C is not None:
        found["entropies"] = furthest(said.entropy_C, right_entropy)
    names = ("gradient of hidden states", "gradient of weight", "gradient of bias")
    return found | {name: relative(a, b) for name, a, b in zip(names, mine, theirs, strict=False)}


# ----------------------------------------------------------------------------------------------------- compiled


def compiled(setting: Setting) -> Said:
    """Loss and gradients of the compiled decoder against the eager one's."""
    device = setting.device
    for name in ("Llama 64, 8/2 heads", "Mistral 128, window 96"):
        kind = KINDS[name]
        shape = {**kind.changes, "num_hidden_layers": 1} if setting.tiny else kind.changes
        eager, fast = (prepared(small(kind.type, **shape), device, None, False, "CAUSAL_LM", []) for _ in range(2))
        # Inductor takes half a minute on a CPU; what is traced and how batches reach it is the same.
        compile_passes(fast, "eager" if setting.tiny else "inductor")
        for case, rows in list(texts(600, 512, setting.tiny).items())[: 1 if setting.tiny else None]:
            for precision in PRECISIONS[: 1 if setting.tiny else None]:
                right, found = _ours(eager, rows, device, precision), _ours(fast, rows, device, precision)
                loss = abs(float(found.logp.sum() - right.logp.sum())) / found.logp.numel()
                what, bf16 = f"{name}, {case}, {precision}", precision == "bf16"
                yield Gap(f"{what}: loss, nats a token", loss, 5e-3 if bf16 else 1e-5)
                yield Gap(f"{what}: gradients, of their norm", apart(found.gradients, right.gradients),
                          3e-2 if bf16 else 1e-4)  # fmt: skip
        if setting.tiny:
            yield LeftOut("forks, bf16, Mistral", "this is enough to see that it runs")
            return


CHECKS = (
    *(Check(f"packed, {name}", partial(unpadded, kind), name in TINY) for name, kind in KINDS.items()),
    Check("attention", attention),
    Check("head", head),
    Check("compile", compiled),
)
