"""Annotators as programs: they judge through the store's queue, as people do, and what they prefer is known.

The choice model is the Bradley-Terry model with a side bias and lapses. With the utility difference
``d = u_left - u_right``:

    tie                  when |d| < tie_width, without any draw
    P(left | no tie)     = (1 - lapse) * sigmoid((d + left_bias) / temperature) + lapse / 2

A lapse is a judgement made without looking: a fair coin, and the weakest strength.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from keel.types import Prompt, UserError

# Where a felt preference, in units of the annotator's own temperature, becomes "better" and "much better". In those
# units the strengths do not change when a utility is rescaled together with its temperature.
STRENGTH_EDGES = (1.0, 2.5)

WORDS_PER_SECOND = 4.0  # silent reading, about 240 words a minute (Brysbaert 2019, doi:10.1016/j.jml.2019.104047)
DECIDING_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class Opinion:
    """One simulated judgement. ``strength``: 1 slightly, 2 better, 3 much better; None for a tie. ``seconds`` taken."""

    choice: Literal["left", "right", "tie"]
    strength: int | None
    seconds: float


@dataclass(frozen=True, slots=True)
class SimulatedAnnotator:
    """One member of a simulated population.

    ``utility(prompt, text)``: what this annotator likes, in any unit; ``temperature`` and ``left_bias`` (added to the
    left response's utility) and ``tie_width`` are in the same unit. ``lapse`` is the share of judgements made without
    looking. Raises UserError for a temperature that is not positive, a lapse outside [0, 1] or a negative tie width.
    """

    name: str
    utility: Callable[[Prompt, str], float] = field(repr=False)
    temperature: float = 1.0
    lapse: float = 0.0
    left_bias: float = 0.0
    tie_width: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"annotator {self.name!r}: temperature is {self.temperature}; give a number above 0")
        if not 0 <= self.lapse <= 1:
            raise UserError(f"annotator {self.name!r}: lapse is {self.lapse}; give a share between 0 and 1")
        if not self.tie_width >= 0:
            raise UserError(f"annotator {self.name!r}: tie_width is {self.tie_width}; give 0 or more")

    def difference(self, prompt: Prompt, left: str, right: str) -> float:
        """``u_left - u_right``; UserError when the utility is not a finite number."""
        difference = self.utility(prompt, left) - self.utility(prompt, right)
        if not math.isfinite(difference):
            raise UserError(
                f"annotator {self.name!r}: the utility of prompt {prompt.id!r} is not finite; return a plain number"
            )
        return difference

    def ties(self, prompt: Prompt, left: str, right: str) -> bool:
        return abs(self.difference(prompt, left, right)) < self.tie_width

    def probability_left(self, prompt: Prompt, left: str, right: str) -> float:
        """P(left preferred | no tie), the formula at the top of this file."""
        pull = (self.difference(prompt, left, right) + self.left_bias) / self.temperature
        return (1 - self.lapse) * _sigmoid(pull) + self.lapse / 2

    def judge(self, prompt: Prompt, left: str, right: str, rng: random.Random) -> Opinion:
        """One judgement. It draws, in this order: lapse, time, then the lapse's coin or the preference's noise.

        A preference is felt as ``d + left_bias + temperature * logistic noise`` and its sign is the choice, which has
        exactly the probability above; its size gives the strength, so a choice against the utility is mostly weak.
        """
        words = len(left.split()) + len(right.split())
        lapsed = rng.random() < self.lapse
        seconds = (DECIDING_SECONDS + words / WORDS_PER_SECOND) * rng.lognormvariate(0.0, 0.3)
        difference = self.difference(prompt, left, right)
        if abs(difference) < self.tie_width:
            return Opinion("tie", None, seconds)
        if lapsed:
            return Opinion("left" if rng.random() < 0.5 else "right", 1, seconds)
        uniform = min(max(rng.random(), 1e-12), 1 - 1e-12)
        felt = (difference + self.left_bias) / self.temperature + math.log(uniform / (1 - uniform))
        strength = 1 + sum(abs(felt) >= edge for edge in STRENGTH_EDGES)
        return Opinion("left" if felt > 0 else "right", strength, seconds)


def true_probability(annotators: Sequence[SimulatedAnnotator], prompt: Prompt, a: str, b: str) -> float:
    """The population's q: P(a preferred over b) for an annotator drawn at random among those who would not tie, and
    for sides drawn at random (so a taste for the left side weakens q, but does not move it). 0.5 when all would tie."""
    votes = [
        0.5 * (annotator.probability_left(prompt, a, b) + 1 - annotator.probability_left(prompt, b, a))
        for annotator in annotators
        if not annotator.ties(prompt, a, b)
    ]
    return sum(votes) / len(votes) if votes else 0.5


def draw(*place: object) -> random.Random:
    """A random stream of its own for each place (seed, annotator, prompt, texts): what an annotator says there does
    not depend on what was asked before, so labelling that was stopped goes on to the same judgements."""
    return random.Random(hashlib.sha256("\0".join(map(str, place)).encode()).digest())


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
