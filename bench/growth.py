"""How cost grows: speed with length, batch and model size, memory with length. The work of each point, few repetitions
of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.work import SHAPES, Work

TOKENS = 4096  # of an optimizer step, whatever the length
NAMES = ("length", "batch", "size", "memory")


@dataclass(frozen=True)
class Place:
    """One point of one curve."""

    x: float
    model: str
    work: Work


@dataclass(frozen=True)
class Curve:
    """``shows``: which figure of its points is drawn, of the two that all of them keep, ``rates`` or ``peak_mb``.
    ``tuned``: peers have the best settings found for them, otherwise their own defaults."""

    name: str
    title: str
    x_label: str
    task: str
    places: tuple[Place, ...]
    shows: str = "rates"
    tuned: bool = True
    repeats: int = 2


def curves(device: str, quick: bool) -> Iterator[Curve]:
    """Those of ``NAMES`` that the device has."""
    small, models = ("S", ("S", "SM", "M")) if device == "cpu" else ("qwen-0.5b", ("S", "M", "qwen-0.5b", "qwen-1.5b"))
    tokens = TOKENS if device == "cpu" else 8 * TOKENS
    lengths = (64, 2048) if quick else (64, 128, 256, 512, 1024, 2048)
    batches = (1, 16) if quick else (1, 4, 16, 64, 256)
    yield Curve(
        "length",
        f"SFT by length, model {small}, {tokens:,} tokens a step: tokens a second",
        "tokens of a conversation",
        "sft",
        tuple(Place(n, small, sft(n, tokens, steps=1 if quick else 2)) for n in lengths),
    )
    yield Curve(
        "batch",
        f"Sampling 32 + 48 tokens by batch, model {small}: tokens a second",
        "sequences decoded together",
        "sample_fixed",
        tuple(Place(n, small, Work("sample_fixed", max(n, 4), n, (32, 32), (48, 48))) for n in batches),
    )
    yield Curve(
        "size",
        "SFT by model size, 128 tokens a conversation: tokens a second",
        "parameters",
        "sft",
        tuple(
            Place(SHAPES[model].parameters, model, sft(128, tokens, steps=1))
            for model in (models[:2] if quick else models)
        ),
    )
    if device == "cpu":
        # Defaults, because the best settings were searched for speed; one repetition, because nothing is timed.
        yield Curve(
            "memory",
            "DPO with a vocabulary of 128,000, 8 pairs a step: peak memory, MiB",
            "tokens of a prompt and one reply",
            "dpo",
            tuple(Place(n, "S-128k", dpo(n)) for n in ((64, 128) if quick else (64, 128, 256, 512))),
            shows="peak_mb",
            tuned=False,
            repeats=1,
        )


def sft(length: int, tokens: int, steps: int) -> Work:
    """Conversations that are all ``length`` long."""
    batch = max(1, tokens // length)
    return Work("sft", steps * batch, batch, prompt=(length // 2, length // 2), reply=(length // 2, length // 2))


def dpo(length: int) -> Work:
    """One optimizer step of so many pairs as TRL takes in one pass by default; prompt and reply are ``length`` long."""
    return Work("dpo", 8, 8, prompt=(length // 2, length // 2), reply=(length // 2, length // 2))
