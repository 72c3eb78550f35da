"""Pairs of replies such as the demo's SFT model samples, made without a model."""

from __future__ import annotations

from random import Random

from keel.harbor.demos import Habits, write_reply
from keel.harbor.facts import World
from keel.harbor.prompts import TRAINING_MIX, make_prompts
from keel.rollout.collect import choose_different
from keel.types import Completion, Prompt

# What an SFT model on the demonstrations writes, sampled at temperature 0.8, roughly: less reliable than its teachers.
SFT_LIKE = Habits(
    right=0.85,
    admits=0.1,
    refuses_harm=0.07,
    refuses_harmless=0.04,
    denies_real=0.05,
    doubts=0.45,
    strays=0.01,
)


def reference_pairs(world: World, n: int, seed: int) -> list[tuple[Prompt, str, str]]:
    """``n`` pairs of replies such as the demo compares, without a model: two of the four least alike of eight."""
    rng = Random(f"reference {seed}")
    pairs = []
    for prompt in make_prompts(world, n, seed, "train", TRAINING_MIX):
        replies = [write_reply(world, prompt, rng, SFT_LIKE) for _ in range(8)]
        # Words stand for tokens here: each has the number of its first appearance.
        number = {word: i for i, word in enumerate(dict.fromkeys(" ".join(replies).split()))}
        samples = [Completion(reply, tuple(number[word] for word in reply.split())) for reply in replies]
        first, second = rng.sample(choose_different(samples, keep=4, max_similarity=0.0), 2)
        pairs.append((prompt, first.text, second.text))
    return pairs
