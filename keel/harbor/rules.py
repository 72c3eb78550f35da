"""Rewards by rule: what a program can check of a reply, beside a reward model that people's votes have taught."""

from __future__ import annotations

from keel.harbor.judge import judge
from keel.types import Prompt

CHECKED = ("fact", "arithmetic")  # kinds of prompt with one right answer
RIGHT, WRONG = 2.0, -2.0  # a quarter of the prompts is checked: scores then have a standard deviation of about 1


def sums_and_facts(prompt: Prompt, text: str) -> float:
    """Whether a sum or a fact is right, 0 elsewhere. On replies of an SFT model to the demo's prompts the standard
    deviation is about 1, as that of a reward model's scores is: weights of the two compare."""
    if prompt.kind not in CHECKED:
        return 0.0
    return RIGHT if judge(prompt, text).flags["correct"] else WRONG
