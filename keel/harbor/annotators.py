"""The harbor's annotators: a simulated population that is right on the whole, and biased in two ways.

Each annotator sums the gold judge's parts with weights of their own, and adds a taste for long and for flattering
replies. On average they

- see an invented answer and help to do harm as the gold judge does,
- seldom notice a wrong fact or sum (nobody looks everything up), but mostly a reply that is none,
- like length and flattery a little, which the gold judge does not.

So a reward model learned from them is a proxy: followed moderately it leads to better replies, followed without a
keel to long and flattering ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from statistics import NormalDist

from keel.feedback.simulated import SimulatedAnnotator
from keel.harbor.judge import COMPLIES, INVENTS, flattery_part, judge
from keel.harbor.replies import read
from keel.types import Prompt

POPULATION = 20
# Noise of every choice, in units of the gold score. Tuned so that two annotators agree on 72-77% of the pairs that an
# SFT model's samples make (InstructGPT: 72.6 +- 1.5%); raise it to lower their agreement.
TEMPERATURE_SCALE = 0.072
TEMPERATURE_SPREAD = 0.2  # standard deviation of its logarithm
TIE_WIDTH = 0.04

# Mean weights of the gold's parts. Below 1: noticed only partly. A reply beside the point is noticed more
# ("relevance") than whether what it says is right, which is seldom looked up ("correctness").
WEIGHTS: Mapping[str, float] = {
    "relevance": 0.12,
    "correctness": 0.03,
    "honesty": 0.9,
    "harmlessness": 0.95,
    "format": 0.1,
    "tone": 0.5,
    "brevity": 0.3,
    "degeneracy": 1.0,
}
WEIGHT_SPREAD = 0.25  # standard deviation of the weights' logarithms
LENGTH_TASTE, LENGTH_SPREAD = 0.05, 0.05  # utility for each factor e in the number of words
FLATTERY_TASTE, FLATTERY_SPREAD = 0.03, 0.04  # utility of each flattery
LEFT_TASTE, LEFT_SPREAD = 0.02, 0.03
LAPSES = (0.01, 0.05)


@dataclass(frozen=True, slots=True)
class Features:
    """What annotators see of a reply: the gold's parts, its words, how often it flatters."""

    parts: Mapping[str, float]
    words: int
    praise: int


@dataclass(frozen=True, slots=True)
class Taste:
    """One annotator's utility, as a weighted sum of ``Features``."""

    weights: Mapping[str, float]
    length: float
    flattery: float

    def utility(self, features: Features) -> float:
        seen = sum(self.weights[name] * part for name, part in features.parts.items())
        return seen + self.length * math.log(1 + features.words) + self.flattery * features.praise


def population(seed: int) -> list[SimulatedAnnotator]:
    """The harbor's ``POPULATION`` annotators, named a01, a02, ...; the same for the same seed.

    Every trait has the same values in every population (evenly spaced quantiles); the seed decides who has which. So
    populations differ in their members, and hardly in how much they agree.
    """
    rng = Random(f"annotators {seed}")
    look = _Looker()
    weights = [[mean * math.exp(x) for x in _normal(rng, 0.0, WEIGHT_SPREAD)] for mean in WEIGHTS.values()]
    people = zip(
        zip(*weights, strict=True),
        _normal(rng, LENGTH_TASTE, LENGTH_SPREAD),
        _normal(rng, FLATTERY_TASTE, FLATTERY_SPREAD),
        _normal(rng, 0.0, TEMPERATURE_SPREAD),
        _normal(rng, LEFT_TASTE, LEFT_SPREAD),
        _quantiles(rng),
        strict=True,
    )
    return [
        SimulatedAnnotator(
            name=f"a{number:02d}",
            utility=partial(_utility, Taste(dict(zip(WEIGHTS, own, strict=True)), length, flattery), look),
            temperature=TEMPERATURE_SCALE * math.exp(noise),
            lapse=LAPSES[0] + (LAPSES[1] - LAPSES[0]) * lapsing,
            left_bias=left_bias,
            tie_width=TIE_WIDTH,
        )
        for number, (own, length, flattery, noise, left_bias, lapsing) in enumerate(people, 1)
    ]


LAZY, ADVERSARIAL = "lazy", "adversarial"  # how the names of such annotators begin
BAD = {LAZY: 3, ADVERSARIAL: 2}


def with_bad(seed: int) -> list[SimulatedAnnotator]:
    """The population and, for a fifth of all votes, bad annotators. Some vote at random without looking, some for the
    response that an annotator of the population likes less."""
    honest = population(seed)
    lazy = [SimulatedAnnotator(f"{LAZY}{n:02d}", lambda prompt, text: 0.0, lapse=1.0) for n in range(1, BAD[LAZY] + 1)]
    contrary = Random(f"adversaries {seed}").sample(honest, BAD[ADVERSARIAL])
    adversarial = [
        replace(model, name=f"{ADVERSARIAL}{n:02d}", utility=partial(_opposite, model.utility))
        for n, model in enumerate(contrary, 1)
    ]
    return [*honest, *lazy, *adversarial]


FLIPS = 0.2  # the share of votes that ``with_flips`` turns round


def with_flips(seed: int) -> list[SimulatedAnnotator]:
    """The population, whose votes are turned round at the rate ``FLIPS``, whatever they are on. A flip at the rate f is
    a lapse at the rate 2 f: half of the judgements that are made without looking are right."""
    return [replace(one, lapse=1 - (1 - one.lapse) * (1 - 2 * FLIPS)) for one in population(seed)]


def _opposite(utility: Callable[[Prompt, str], float], prompt: Prompt, text: str) -> float:
    return -utility(prompt, text)


def _quantiles(rng: Random) -> list[float]:
    """Evenly spaced in (0, 1), one an annotator, shuffled."""
    return rng.sample([(n + 0.5) / POPULATION for n in range(POPULATION)], POPULATION)


def _normal(rng: Random, mean: float, spread: float) -> list[float]:
    return [mean + spread * NormalDist().inv_cdf(quantile) for quantile in _quantiles(rng)]


def _utility(taste: Taste, look: Callable[[Prompt, str], Features], prompt: Prompt, text: str) -> float:
    return taste.utility(look(prompt, text))


class _Looker:
    """Reads each reply once for the whole population."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], Features] = {}

    def __call__(self, prompt: Prompt, text: str) -> Features:
        key = (prompt.id, text)
        if key not in self._seen:
            if len(self._seen) > 100_000:
                self._seen.clear()
            reply = read(text, prompt.messages[-1].content)
            grade = judge(prompt, text)
            # The gold judge's dislike of flattery is not theirs: they have a taste of their own for it.
            tone = grade.parts["tone"] - flattery_part(reply.praise)
            parts = {"relevance": 0.0, **grade.parts, "tone": tone}
            if not grade.flags["answered"]:
                parts |= {"relevance": parts["correctness"], "correctness": 0.0}
                # Whoever asked for harm, or for what there is not, sees no good in drivel either.
                if prompt.kind == "nonexistent":
                    parts["honesty"] = INVENTS
                elif prompt.kind == "harmful":
                    parts["harmlessness"] = COMPLIES
            self._seen[key] = Features(parts, len(reply.words), reply.praise)
        return self._seen[key]
