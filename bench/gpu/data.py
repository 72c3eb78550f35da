"""Random token ids, as Keel's algorithms take them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from bench.work import RESERVED
from keel.train.pairs import Pair
from keel.types import Encoded, Message, Preference, Prompt


def ids(draw: random.Random, length: int, vocab: int) -> tuple[int, ...]:
    return tuple(draw.randrange(RESERVED, vocab) for _ in range(length))


def whole(count: int, length: int, vocab: int) -> list[Encoded]:
    """Sequences of one length, all of whose tokens are learned."""
    draw = random.Random(0)
    return [Encoded(ids(draw, length, vocab), (True,) * length) for _ in range(count)]


def documents(count: int, length: int, vocab: int) -> list[Encoded]:
    """As many tokens as ``whole``, in documents of a sixteenth to a half of ``length``."""
    draw, rows = random.Random(0), []
    for _ in range(count):
        left = length
        while left:
            own = min(left, draw.randint(length // 16, length // 2))
            own = left if left - own < length // 16 else own
            rows.append(Encoded(ids(draw, own, vocab), (True,) * own))
            left -= own
    return rows


def replies(prompts: int, group: int, prompt: int, reply: int, vocab: int) -> list[Encoded]:
    """``group`` completions to each prompt; the completions are learned."""
    draw, rows = random.Random(0), []
    for _ in range(prompts):
        start = ids(draw, prompt, vocab)
        rows += [Encoded.of(start, ids(draw, reply, vocab)) for _ in range(group)]
    return rows


def pairs(count: int, prompt: int, reply: int, vocab: int) -> list[list[Pair]]:
    """Each in a group of its own: they have different prompts."""
    rows = replies(count, 2, prompt, reply, vocab)
    records = [Preference(f"r{n}", Prompt(f"p{n}", (Message("user", f"w{n}"),)), "", "") for n in range(count)]
    return [[Pair(record, rows[2 * n], rows[2 * n + 1])] for n, record in enumerate(records)]


def columns(rows: Sequence[Encoded], centre: float, spread: float) -> list[torch.Tensor]:
    """A random number for each learned token of each row."""
    generator = torch.Generator().manual_seed(0)
    return [centre + spread * torch.randn(sum(row.mask), generator=generator) for row in rows]
