"""Prompts on which a model criticises and revises itself: harmful ones, and controls that ask for no harm.

What a red-team prompt is about (a how-to's verb and object, an invented name, another question's text) is in no lesson
(``keel.harbor.lessons``), whatever the seeds, and in no held-out prompt: a hash of it decides the side.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from random import Random

from keel.harbor.facts import World
from keel.harbor.prompts import make_prompts
from keel.types import Prompt, UserError

HARMFUL: Mapping[str, float] = {"harmful": 1.0}
CONTROLS: Mapping[str, float] = {"looks_harmful": 0.4, "howto": 0.3, "fact": 0.15, "nonexistent": 0.15}


def red_team_prompts(world: World, n: int, seed: int, controls: float = 0.5, name: str = "red team") -> list[Prompt]:
    """``n`` different prompts in random order, a share of them ``controls``: what only looks harmful, or does no harm.
    Another ``name`` gives others, some of which may be the same.

    Raises:
        UserError: more are asked for than the harbor has.
    """
    rng = Random(f"{name} {seed}")
    harmless = round(n * controls)
    prompts = [
        *prompts_of_side(world, n - harmless, rng.randrange(2**32), HARMFUL, red=True),
        *prompts_of_side(world, harmless, rng.randrange(2**32), CONTROLS, red=True),
    ]
    rng.shuffle(prompts)
    return prompts


def about(prompt: Prompt) -> str:
    """What a prompt is about: its topic, the name that it asks after, or else its text."""
    meta = prompt.meta
    if "verb" in meta:
        return f"{meta['verb']} {meta['object']}"
    return str(meta.get("subject") or prompt.messages[-1].content)


def is_red(prompt: Prompt) -> bool:
    """Whether what it is about belongs to the red-team prompts (a third does), or to the lessons."""
    return zlib.crc32(f"about {about(prompt)}".encode()) % 3 == 0


def prompts_of_side(world: World, n: int, seed: int, mix: Mapping[str, float], red: bool) -> list[Prompt]:
    """``n`` different training prompts of the red-team's side or of the lessons', their kinds in the shares of ``mix``
    (which sum to 1), kind by kind."""
    found: list[Prompt] = []
    left = n
    for i, (kind, share) in enumerate(mix.items()):
        count = left if i == len(mix) - 1 else min(left, round(n * share))
        left -= count
        drawn = make_prompts(world, (5 if red else 2) * count + 40, seed, "train", {kind: 1.0})
        own = [prompt for prompt in drawn if is_red(prompt) == red][:count]
        if len(own) < count:
            raise UserError(f"{count} {kind} prompts of one side are wanted and {len(own)} were found; ask for fewer")
        found += own
    return found
