"""The samplers against ``generate``, the trainer's log-probabilities and exact probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from bench.gpu.correct import Check, Gap, Said, Setting, copied, furthest, llama, low, row_logps, small, text
from keel.data.collate import pack_by_prompt
from keel.model.checkpoint import prepared
from keel.model.logprobs import token_logprobs
from keel.precision import Precision
from keel.recipe.sections import SamplingConfig
from keel.rollout.sampler import make_sampler
from keel.rollout.tokens import choose
from keel.types import Completion, Encoded

VOCAB = 512
TIE = 1e-4  # nats: of tokens so near, rounding chooses
Prompts = Sequence[Sequence[int]]


def models() -> dict[str, PreTrainedModel]:
    shape = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return {
        "embedded, Llama": llama(VOCAB, 128, num_attention_heads=8),
        "transformers, GPT-2": small("gpt2", **shape, n_embd=64, n_layer=2, n_head=4, n_positions=1024),
        "transformers, Gemma 3": small(
            "gemma3_text", **shape, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, layer_types=["sliding_attention", "full_attention"], sliding_window=16,
            max_position_embeddings=1024,
        ),
    }  # fmt: skip


def sampler(name: str, setting: Setting) -> Said:
    device, tiny = setting.device, setting.tiny
    model = models()[name]
    plain = copied(model, device)
    ours = prepared(model, device, None, False, "CAUSAL_LM", [])
    lengths, new = ((3, 9), 6) if tiny else ((1, 3, 17, 64, 200, 31, 90, 5, 150, 8, 44, 12), 48)
    prompts = [text(n, VOCAB, i).ids for i, n in enumerate(lengths)]
    greedy = SamplingConfig(temperature=0, max_new_tokens=new, batch_size=4)
    backend: Any = name.split(",")[0]

    def sampled(precision: Precision, sampling: SamplingConfig, what: Prompts, seed: int = 0) -> list[Completion]:
        return make_sampler(ours, backend, (), precision).generate(what, sampling, seed)

    found = sampled("fp32", greedy, prompts)
    yield Gap("fp32, greedy against generate: other tokens", _other(plain, prompts, found, device), 0)
    for size in (1, 3, 64):
        again = sampled("fp32", greedy.model_copy(update={"batch_size": size}), prompts)
        lead = max(_lead(plain, p, a.ids, b.ids, device) for p, a, b in zip(prompts, found, again, strict=True))
        yield Gap(f"fp32, greedy, batches of {size} against 4: lead of the other token, nats", lead, TIE)
    drawing = SamplingConfig(max_new_tokens=new, batch_size=5)
    bounds: dict[Precision, tuple[float, float]] = {"fp32": (1e-3, 1e-4), "bf16": (0.05, 5e-3)}
    for precision, (most, mean) in bounds.items():
        replies = sampled(precision, drawing, prompts, 3)
        rows = [text_of(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        apart = _against_trainer(ours, rows, replies, device, precision)
        if precision == "bf16":  # a model that is itself further off in bfloat16 makes both so
            rough, right = (torch.cat([row_logps(plain, row, device, p).detach() for row in rows]) for p in bounds)
            most, mean = max(most, 2 * furthest(rough, right)), max(mean, 2 * float((rough - right).abs().mean()))
        yield Gap(f"{precision}, log-probabilities against the trainer's: largest, nats", float(apart.max()), most)
        yield Gap(f"{precision}, log-probabilities against the trainer's: mean, nats", float(apart.mean()), mean)
        same = sampled(precision, drawing, prompts, 3)
        yield Gap(f"{precision}, the same seed again: other completions",
                  sum(a.ids != b.ids for a, b in zip(replies, same, strict=True)), 0)  # fmt: skip
    for temperature in (1.0, 0.6):
        yield _frequencies(plain, sampled, prompts[1], temperature, 2000 if tiny else 20_000, device)


def _other(plain: PreTrainedModel, prompts: Prompts, found: Sequence[Completion], device: str) -> int:
    """Completions with a token that ``generate`` of the prompt alone did not take, and that no tie explains."""
    plain.generation_config = GenerationConfig()
    count = 0
    for prompt, completion in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt], device=device)
        with torch.no_grad():
            right = plain.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=len(completion.ids),
                min_new_tokens=len(completion.ids), pad_token_id=0,
            )[0, len(prompt) :].tolist()  # fmt: skip
        count += _lead(plain, prompt, completion.ids, right, device) > TIE
    return count


@torch.no_grad()
def _lead(
    plain: PreTrainedModel, prompt: Sequence[int], one: Sequence[int], other: Sequence[int], device: str
) -> float:
    """By how much the model's own forward pass prefers one token where the two first differ; 0 where they do not."""
    if list(one) == list(other):
        return 0.0
    n = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    logps = plain(input_ids=torch.tensor([[*prompt, *one[:n]]], device=device)).logits[0, -1].double().log_softmax(-1)
    return abs(float(logps[one[n]] - logps[other[n]]))


def text_of(prompt: Sequence[int], reply: Completion) -> Encoded:
    return Encoded.of(prompt, reply.ids)


@torch.no_grad()
def _against_trainer(
    ours: Any, rows: Sequence[Encoded], replies: Sequence[Completion], device: str, precision: str
) -> Tensor:
    with low(device, precision):
        logp = token_logprobs(ours, pack_by_prompt(rows, device)).logp_C.cpu()
    return (logp - torch.tensor([x for r in replies for x in r.logprobs])).abs()


def _frequencies(
    plain: PreTrainedModel, sampled: Any, prompt: Sequence[int], temperature: float, draws: int, device: str
) -> Gap:
    """Pearson's chi-square of how often each next token was drawn; its bound is passed by one right sampler in 10^4."""
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=1, batch_size=4096)
    replies = sampled("fp32", sampling, [prompt] * draws, 11)
    counts = torch.bincount(torch.tensor([r.ids[0] for r in replies]), minlength=VOCAB).double()
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([prompt], device=device)).logits[0, -1].double().cpu()
    expected = draws * (logits / temperature).softmax(-1)
    often = expected >= 5
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    statistic = float(((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum())
    return Gap(f"fp32, {draws} draws at temperature {temperature}, {len(counts)} bins: chi-square", statistic,
               _chi_square(len(counts) - 1, 3.719))  # fmt: skip


def _chi_square(freedom: int, z: float) -> float:
    """What chi-square passes as seldom as a normal number passes ``z`` (Wilson and Hilferty 1931)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + z * math.sqrt(part)) ** 3


# ------------------------------------------------------------------------------------------- the choice of a token


def chosen(setting: Setting) -> Said:
    """No token of weight 0 is ever drawn, and none that a filter takes out."""
    device, tiny = setting.device, setting.tiny
    vocab, rows, draws = (3000, 64, 4000) if tiny else (151_936, 512, 1_000_000)
    generator = torch.Generator(device).manual_seed(0)
    plain = SamplingConfig()
    for name in ("spread", "peaked", "all but one of weight 0"):
        never = torch.rand(vocab, generator=generator, device=device) < 0.3
        never[: vocab // 50] = never[-vocab // 50 :] = True
        never[vocab // 3 : vocab // 2] = True
        if name.startswith("all"):
            never[:] = True
            never[vocab // 2] = False
        spread = 8.0 if name == "peaked" else 1.0
        wrong, count = 0, 0
        while count < draws // 3:
            logits = spread * torch.randn(rows, vocab, generator=generator, device=device)
            logits[:, never] = -math.inf
            for _ in range(8):
                uniforms = 1 - torch.rand(rows, generator=generator, device=device)
                uniforms[:4] = torch.tensor([1.0, 2.0**-24, 1 - 2.0**-24, 0.5], device=device)
                ids, logps = choose(logits, uniforms, plain)
                wrong += int(never[ids].sum()) + int((~logps.isfinite()).sum())
                count += rows
        yield Gap(f"{name}, {count} draws: of weight 0", wrong, 0)
    for sampling in (
        SamplingConfig(top_k=5), SamplingConfig(top_p=0.6), SamplingConfig(min_p=0.2), SamplingConfig(top_p=0.999),
        SamplingConfig(top_k=50, top_p=0.8, min_p=0.01, temperature=0.7),
    ):  # fmt: skip
        logits = 3 * torch.randn(8, vocab, generator=generator, device=device)
        uniforms = 1 - torch.rand(40 if tiny else 400, 8, generator=generator, device=device)
        ids = torch.stack([choose(logits, u, sampling)[0] for u in uniforms])
        logps = choose(logits, uniforms[-1], sampling)[1]
        right = (logits.double() / sampling.temperature).log_softmax(-1).gather(1, ids[-1][:, None]).squeeze(1)
        what = ", ".join(f"{name} {value:g}" for name, value in sampling.model_dump(exclude_defaults=True).items())
        kept = [_left(row, sampling) for row in logits.cpu()]
        outside = sum(len(set(column) - left) for column, left in zip(ids.t().tolist(), kept, strict=True))
        yield Gap(f"{what}: tokens drawn that are filtered out", outside, 0)
        yield Gap(f"{what}: log-probabilities before filters, nats", furthest(logps, right), 1e-4)


def _left(logits: Tensor, sampling: SamplingConfig) -> set[int]:
    """What the filters leave of a row, by sorting in float64; a token as likely as the last one to rounding, too."""
    probs, order = (logits.double() / sampling.temperature).softmax(-1).sort(descending=True)
    edge = 0.0
    if sampling.top_k:
        edge = float(probs[sampling.top_k - 1])
    kept = probs * (probs >= edge)
    if sampling.top_p < 1:
        reached = int((kept.cumsum(0) < (sampling.top_p + 1e-5) * kept.sum()).sum())
        edge = max(edge, float(kept[min(reached, len(kept) - 1)]))
    edge = max(edge, sampling.min_p * float(probs[0]))
    return set(order[probs >= edge * (1 - 1e-5)].tolist())


CHECKS = (
    *(Check(f"sampler, {name}", partial(sampler, name), not name.endswith("Gemma 3")) for name in models()),
    Check("choose", chosen),
)
