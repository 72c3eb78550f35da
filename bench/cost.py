"""What a task needs at the least: floating-point operations, and bytes of weights and cache moved.

The count is of the *need*, not of what some library does: no padding, a prompt read once for all completions that
share it, log-probabilities only of the tokens that are learned, nothing computed twice to save memory, causal
attention at its half of the square. Bytes are those of weights, gradients, optimizer state and KV cache; activations
are left out. Dividing by the machine's measured rates gives the least time, and that by the time taken the share of
the machine's limit. ``tests/test_bench.py`` checks the operations against ``torch.utils.flop_counter``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.work import GRPO_FAMILY, SAMPLING, Shape, Work, conversations, pairs, thumbs

WIDTH = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Phase:
    """Work that runs at a limit of its own: multiplying (flops) or moving (bytes)."""

    flops: float
    bytes: float

    def __mul__(self, times: float) -> Phase:
        return Phase(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Limits:
    """The machine's measured rates: operations a second by precision, and bytes a second."""

    flops: dict[str, float]
    bandwidth: float

    def seconds(self, phases: Sequence[Phase], precision: str) -> float:
        return sum(max(p.flops / self.flops[precision], p.bytes / self.bandwidth) for p in phases)


def forward_flops(shape: Shape, tokens: float, seen: float, scored: float) -> float:
    """One forward pass: ``tokens`` through the layers, ``seen`` (query, key) pairs, ``scored`` positions at the head.
    A multiplication and its addition are two operations."""
    linear = 2 * tokens * shape.layers * shape.layer_weights
    attention = 4 * seen * shape.layers * shape.heads * shape.head_dim
    return linear + attention + 2 * scored * shape.head_weights


def causal(length: float, before: float = 0) -> float:
    """(query, key) pairs of ``length`` tokens that follow ``before`` others."""
    return length * before + length * (length + 1) / 2


TRAINED = 3  # a backward pass multiplies twice for each multiplication of the forward pass


def step_bytes(shape: Shape) -> float:
    """Weights read forwards and backwards and gradients written, then AdamW: weights, gradients and two moments read,
    weights and moments written. Master weights are float32 in either precision."""
    return 4 * shape.parameters * (3 + 7)


def phases(work: Work, shape: Shape, precision: str, units: float) -> list[Phase]:
    """The need of ``work``; ``units`` is what was really done, where that depends on chance (sampled tokens)."""
    if work.task in SAMPLING:
        return sampling(shape, precision, work.examples, work.batch, work.prompt[0], units / work.examples, 1)
    if work.task == "sft":
        rows = [len(ids) for ids in conversations(work, shape.vocab)]
        flops = sum(forward_flops(shape, n, causal(n), n - 1) for n in rows)
        return _training(work, shape, TRAINED * flops)
    if work.task == "kto":
        flops = 0.0
        for asked, reply, _ in thumbs(work, shape.vocab):
            seen = causal(len(asked)) + causal(len(reply), len(asked))
            flops += forward_flops(shape, len(asked) + len(reply), seen, len(reply))
        # The reference reads every reply once, and a reply behind another prompt is read by both.
        return _training(work, shape, (TRAINED + 3) * flops)
    if work.task in ("dpo", "simpo", "reward"):
        flops = 0.0
        for p in pairs(work, shape.vocab):
            prompt, replies = len(p.prompt), (len(p.chosen), len(p.rejected))
            seen = causal(prompt) + sum(causal(n, prompt) for n in replies)
            flops += forward_flops(shape, prompt + sum(replies), seen, 0 if work.task == "reward" else sum(replies))
        # DPO's reference reads every pair once more, forwards.
        return _training(work, shape, (TRAINED + (work.task == "dpo")) * flops)
    return _online(work, shape, precision)


def _training(work: Work, shape: Shape, flops: float) -> list[Phase]:
    return [Phase(flops, work.examples / work.batch * step_bytes(shape))]


def _online(work: Work, shape: Shape, precision: str) -> list[Phase]:
    """PPO: sampling (which gives the old log-probabilities), then reference, critic and reward model once, then
    policy and critic in every epoch. GRPO, as TRL has it by default: sampling, then the policy once."""
    prompt, reply, n, group = work.prompt[0], work.reply[0], work.examples, work.group
    seen = causal(prompt) / group + causal(reply, prompt)
    trunk = forward_flops(shape, prompt / group + reply, seen, 0)
    scored = forward_flops(shape, 0, 0, reply)
    sampled = sampling(shape, precision, n, work.batch, prompt, reply, group)
    steps = work.epochs * n / work.batch
    if work.task in GRPO_FAMILY:
        return [*sampled, Phase(n * TRAINED * (trunk + scored), steps * step_bytes(shape))]
    measured = n * (3 * trunk + scored)
    updates = n * work.epochs * TRAINED * (2 * trunk + scored)
    return [*sampled, Phase(measured, 0), Phase(updates, 2 * steps * step_bytes(shape))]


def sampling(
    shape: Shape, precision: str, requests: int, batch: int, prompt: float, reply: float, group: int
) -> list[Phase]:
    """Prefill, where each pass over the weights serves ``batch`` requests; then decoding, where each step reads all
    the weights for one more token of ``batch`` rows, and each row's cache."""
    width = WIDTH[precision]
    layers = shape.layers * shape.layer_weights * width
    rounds = max(1.0, requests / batch)
    distinct = requests / group
    prefill = Phase(distinct * forward_flops(shape, prompt, causal(prompt), 0), rounds * layers)
    tokens = requests * reply
    seen = requests * causal(reply, prompt)
    cache = seen * 2 * shape.layers * shape.kv_heads * shape.head_dim * width
    steps = tokens / min(batch, requests)
    decode = Phase(forward_flops(shape, tokens, seen, tokens), steps * (layers + shape.head_weights * width) + cache)
    return [prefill, decode]
