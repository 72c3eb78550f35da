"""A judge's card: may its word on pairs of replies be learned from?

A judge is held against those who know better, people or a gold score, and looked at for what should not matter
(``keel.eval.judge_effects``). Intervals resample prompts with all their pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from keel.eval.calibration import both_ways, brier, ece
from keel.eval.judge_effects import Estimate, JudgedPair, effects_of, pick
from keel.eval.winrate import TIE_WIDTH
from keel.recipe.judge_card import JudgeCard
from keel.stats import bootstrap_interval, proportion

WARN_FLIPS = 0.25


@dataclass(frozen=True)
class Card:
    """``known``: how many of the ``pairs`` people or gold know. ``agreement``: the probability that who knows better
    prefers what the judge does (1/2 for its ties), over the pairs on which they do prefer one. ``ece``, ``brier``: of
    the mean probability, on both ways of a pair; None of a judge that gives none. ``flips``: the share of choices that
    turned with the order. ``effects``: those that can be told; ``untold``: why not, for the others. ``steps``: what a
    step is of length and logprob."""

    pairs: int
    known: int
    against: Literal["people", "gold"]
    agreement: Estimate | None
    ece: float | None
    brier: float | None
    flips: Estimate | None
    effects: dict[str, Estimate]
    untold: dict[str, str]
    steps: dict[str, float]

    def summary(self, bounds: JudgeCard) -> dict[str, Any]:
        """As summary.json has it, with the bounds and, in a sentence each, those that are broken."""
        return {
            "pairs": self.pairs,
            "known": self.known,
            "against": self.against,
            "agreement": _listed(self.agreement),
            "ece": self.ece,
            "brier": self.brier,
            "flips": _listed(self.flips),
            "effects": {name: list(effect) for name, effect in self.effects.items()},
            "untold": self.untold,
            "steps": self.steps,
            "bounds": bounds.bounds(),
            "broken": broken(self, bounds),
        }


def _listed(estimate: Estimate | None) -> list[float] | None:
    return None if estimate is None else list(estimate)


def judge_card(
    pairs: Sequence[JudgedPair],
    against: Literal["people", "gold"],
    probabilities: bool = True,
    resamples: int = 2000,
    seed: int = 0,
) -> Card:
    """The card of who judged ``pairs`` (one at least). ``probabilities``: whether the judge gave any; False: 1, 0 and
    1/2 stand for its choices, and there is no calibration."""
    assert pairs, "a card needs a pair"
    known = [pair for pair in pairs if pair.truth is not None]
    sided = [(pair.prompt, _agreed(pair)) for pair in known if pair.truth != 0.5]
    asked_twice = [(pair.prompt, _flipped(pair)) for pair in pairs if pair.p_left_second is not None]
    errors = None
    if known and probabilities:
        both = both_ways([pair.probability for pair in known], [_truth(pair) for pair in known])
        errors = ece(*both), brier(*both)
    effects, untold, steps = effects_of(pairs, resamples, seed)
    return Card(
        pairs=len(pairs),
        known=len(known),
        against=against,
        agreement=_share(sided, resamples, seed),
        ece=errors[0] if errors else None,
        brier=errors[1] if errors else None,
        flips=_share(asked_twice, resamples, seed),
        effects=effects,
        untold=untold,
        steps=steps,
    )


def _truth(pair: JudgedPair) -> float:
    assert pair.truth is not None
    return pair.truth


def _agreed(pair: JudgedPair) -> float:
    picked = pick(pair.probability)
    return picked * _truth(pair) + (1 - picked) * (1 - _truth(pair))


def _flipped(pair: JudgedPair) -> float:
    assert pair.p_left_second is not None
    return float({pick(pair.p_left_first), pick(pair.p_left_second)} == {0.0, 1.0})


def _share(values: Sequence[tuple[str, float]], resamples: int, seed: int) -> Estimate | None:
    """The mean of what lies in [0, 1], and its 95% interval over prompts. Where all are 0 or all 1, every resample
    repeats it: then it is that of a share of as many as there are prompts (``keel.stats.proportion``)."""
    if not values:
        return None
    prompts, numbers = zip(*values, strict=True)
    point = math.fsum(numbers) / len(numbers)
    interval = None
    if 0 < point < 1:
        group_N = np.unique(np.asarray(prompts), return_inverse=True)[1]
        rows_GF = np.stack([np.bincount(group_N, np.asarray(numbers)), np.bincount(group_N).astype(float)], axis=1)
        interval = bootstrap_interval(rows_GF, lambda sums: sums[:, 0] / sums[:, 1], resamples, seed)
        return (point, *(interval or (0.0, 1.0)))
    share = proportion([point == 1] * len(set(prompts)))
    return point, share.low, share.high


def scored_pair(prompt: str, scores: tuple[float, float], length: tuple[int, int]) -> JudgedPair:
    """As a judge that scores one reply at a time sees two (left, right): the better score is its choice."""
    lead = scores[0] - scores[1]
    said = 0.5 if abs(lead) <= TIE_WIDTH else float(lead > 0)
    return JudgedPair(prompt, said, None, None, length)


# ------------------------------------------------------------------------------------------- bounds

LABELS = {
    "length": "replies a step longer ({step:.0f} characters)",
    "own": "replies of its own model",
    "logprob": "replies a step likelier to its own model ({step:.2g} nats a token)",
    "side": "the reply that is shown first",
}


def too_strong(estimate: Estimate, bound: float) -> bool:
    """Whether an effect is beyond its bound, and not by chance."""
    point, low, high = estimate
    return abs(point) > bound and not low <= 0 <= high


def effect_sentence(card: Card, name: str) -> str:
    point, low, high = card.effects[name]
    moved = "favours" if point > 0 else "avoids"
    return (
        f"it {moved} {LABELS[name].format(step=card.steps.get(name, 1.0))} by {abs(point):.2f} in probability "
        f"(interval {low:+.2f} to {high:+.2f})"
    )


def broken(card: Card, bounds: JudgeCard) -> list[str]:
    """The bounds that the judge breaks, in a sentence each. A bound that the recipe sets and that cannot be measured is
    broken too; an effect that cannot be told is not."""
    found = []
    who = "people" if card.against == "people" else "the gold score"
    if bounds.min_agreement is not None and (card.agreement is None or card.agreement[0] < bounds.min_agreement):
        agrees = (
            f"nothing is known of how far it agrees with {who}, who judged none of the pairs"
            if card.agreement is None
            else f"it agrees with {who} on {_of(card.agreement)} of {card.known} pairs"
        )
        found.append(f"{agrees}, and min_agreement is {bounds.min_agreement:g}")
    if bounds.max_ece is not None and (card.ece is None or card.ece > bounds.max_ece):
        error = "it has no calibration error" if card.ece is None else f"its calibration error is {card.ece:.2f}"
        found.append(f"{error}, and max_ece is {bounds.max_ece:g}")
    if card.flips is not None and card.flips[0] > bounds.max_flips:
        found.append(f"{flips_sentence(card)}, and max_flips is {bounds.max_flips:g}")
    for name, effect in card.effects.items():
        if too_strong(effect, bounds.max_effect):
            found.append(f"{effect_sentence(card, name)}, and max_effect is {bounds.max_effect:g}")
    return found


def flips_sentence(card: Card) -> str:
    assert card.flips is not None
    return f"its choice turned with the order on {_of(card.flips)} of {card.pairs} pairs"


def _of(share: Estimate) -> str:
    return f"{share[0]:.0%} ({share[1]:.0%} to {share[2]:.0%})"
