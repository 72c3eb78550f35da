"""Feedback models whose faults are known: which of two replies keeps better to a principle, by the gold judge.

``judge: {kind: python_feedback, ref: "keel.harbor.feedback:order_biased"}`` names one in a recipe. Each is a pure
function of what it is shown, so the same pair has the same answer at every run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

from keel.harbor.principles import keeps
from keel.harbor.replies import read
from keel.recipe.constitution import Principle
from keel.stats import sigmoid
from keel.types import Prompt

ERROR = 0.1
NOISY = 0.25
SUREST = 0.01  # error probability of the surest answer
BIAS = 0.8  # logits: 0.69 in the place of 0.5


def is_own(text: str) -> bool:
    """Whether a text counts as written by the feedback model itself: a half of all texts do, by a hash, so that
    nothing else about them goes with it."""
    return _uniform("own", text) < 0.5


@dataclass(frozen=True, slots=True)
class Feedback:
    """P(the first reply is better): by the part of the gold judge that the principle names, with faults.

    ``error``: share of pairs on which it sides with the worse reply. A pair's own error probability is even between 0
    and twice that (above SUREST), decided by its texts and the same in both orders. The answer says it truly: without
    biases it is calibrated, and some answers are surer than others. Replies that are equal in that part are at 1/2.

    The biases are added to the logit: ``order`` for the reply that is shown first, ``length`` for each factor e in the
    number of words, ``own`` for a reply of which ``is_own`` says so.
    """

    error: float = ERROR
    order: float = 0.0
    length: float = 0.0
    own: float = 0.0
    is_own: Callable[[str], bool] = is_own

    def __call__(self, prompt: Prompt, first: str, second: str, principle: Principle) -> float:
        bias = self.order + self.length * (_log_words(first) - _log_words(second))
        bias += self.own * (self.is_own(first) - self.is_own(second))
        return sigmoid(self._belief(prompt, first, second, principle.id) + bias)

    def _belief(self, prompt: Prompt, first: str, second: str, principle: str) -> float:
        """In logits, without the biases."""
        a, b = (keeps(principle, prompt, text) for text in (first, second))
        if a is None or b is None or math.isclose(a, b, abs_tol=1e-9):
            return 0.0
        pair = (principle, prompt.id, *sorted((first, second)))
        least = min(SUREST, self.error)
        wrong = least + 2 * (self.error - least) * _uniform("how sure", *pair)
        errs = _uniform("errs", *pair) < wrong
        logit = math.log((1 - wrong) / max(wrong, 1e-6))
        return logit if (a > b) != errs else -logit


feedback = Feedback()
exact = Feedback(error=0.0)
noisy = Feedback(error=NOISY)
order_biased = Feedback(order=BIAS)
length_biased = Feedback(length=BIAS)
self_biased = Feedback(own=BIAS)


def _log_words(text: str) -> float:
    return math.log(1 + len(read(text, "").words))


def _uniform(*what: str) -> float:
    """From 0 to 1, by a hash."""
    digest = hashlib.sha256("\0".join(what).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
