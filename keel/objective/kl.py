"""Estimators of KL(policy || reference) from the policy's own samples, and the controllers of its coefficient.

The estimators are those of Schulman 2020 ("Approximating KL Divergence"): ``logp_C`` and ``ref_logp_C`` are the two
models' log-probabilities of the sampled tokens, in nats, and the result is one value a token. The KL of a *sequence* is
the sum over its tokens (``keel.model.logprobs.sequence_sums``), not their mean; a batch's KL is the mean of those sums.
Targets and reports are in nats per sequence unless they say "per token".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from keel.types import UserError


def k1(logp_C: Tensor, ref_logp_C: Tensor) -> Tensor:
    """log p - log ref: unbiased, high variance, often negative on a single token. What the reward's penalty uses."""
    return logp_C - ref_logp_C


def k2(logp_C: Tensor, ref_logp_C: Tensor) -> Tensor:
    """(log p - log ref)^2 / 2: biased, low variance. PPO's ``approxkl`` between old and new policy."""
    return 0.5 * (logp_C - ref_logp_C) ** 2


def k3(logp_C: Tensor, ref_logp_C: Tensor) -> Tensor:
    """(r - 1) - log r with r = ref / p: unbiased for each token's KL and never negative. What is reported."""
    log_r = ref_logp_C - logp_C
    return torch.expm1(log_r) - log_r


class FixedKl:
    """A coefficient that stays where it is."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, episodes: int) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


class AdaptiveKl(FixedKl):
    """A proportional controller that steers the KL to ``target`` nats per sequence: Ziegler et al. 2019, section 2.2.

    After a rollout of ``episodes`` with mean sequence KL ``kl``: error = clip(kl / target - 1, -0.2, 0.2), and
    coef *= 1 + error * episodes / horizon. Episodes beyond the horizon count as the horizon, which keeps the
    coefficient above zero.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        if coef <= 0:
            raise UserError(
                "kl.coef: an adaptive coefficient cannot grow from 0; set it above 0, or leave out kl.target"
            )
        super().__init__(coef)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, episodes: int) -> None:
        assert math.isfinite(kl), "the KL is not a number"
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * min(episodes / self.horizon, 1.0)
