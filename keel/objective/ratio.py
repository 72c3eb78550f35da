"""The loss of each token in GRPO's family: what is made of its ratio, its advantage and its KL. The three choices are
independent, and each name of the literature is one of their combinations (docs/recipes.md).

Legend as in ``policy``: C completion tokens end to end, ``offsets`` int64 [N+1] says where each completion begins. The
*ratio* is policy / sampling policy, its logarithm ``change_C``. Bounds are ratios or distances from 1, as each says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from keel.objective.kl import k2, k3
from keel.objective.policy import MAX_LOG_RATIO, clipped_policy_loss

Ratio = Literal["token", "sequence"]
Clip = Literal["ppo", "detached", "none"]
Estimator = Literal["k2", "k3"]
Correction = Literal["clip", "mask"]


@dataclass(frozen=True)
class TokenTerms:
    """What a token's loss is made of. ``low``, ``high``: distances from 1, of the ratios 1 - low and 1 + high; ``cap``:
    a ratio. ``beta`` weighs the KL."""

    ratio: Ratio = "token"
    clip: Clip = "ppo"
    low: float = 0.2
    high: float = 0.2
    cap: float | None = None
    beta: float = 0.0
    estimator: Estimator = "k3"
    unbiased: bool = False


class TokenLoss(NamedTuple):
    """[C] each: the loss; where the clip holds a ratio up from below, and down from above; the KL's estimate."""

    loss_C: Tensor
    low_C: Tensor
    high_C: Tensor
    kl_C: Tensor | None


def grpo_loss(
    logp_C: Tensor,
    old_logp_C: Tensor,
    advantage_C: Tensor,
    offsets: Tensor,
    terms: TokenTerms,
    ref_logp_C: Tensor | None = None,
    weight_C: Tensor | None = None,
) -> TokenLoss:
    """The policy's term, times ``weight_C`` where there is one (:func:`sampler_weights`), plus beta * KL(policy ||
    reference), before the mean: Shao et al. 2024, eq. 3 and 4, and its descendants. ``advantage_C``: each completion's
    advantage on every one of its tokens, and what its steps add.

    ``ref_logp_C`` may be None when ``beta`` is 0.
    """
    change_C = log_ratio(logp_C, old_logp_C, offsets if terms.ratio == "sequence" else None)
    loss_C, low_C, high_C = policy_term(logp_C, change_C, advantage_C, terms)
    if weight_C is not None:
        loss_C = loss_C * weight_C
    if terms.beta == 0:
        return TokenLoss(loss_C, low_C, high_C, None)
    assert ref_logp_C is not None, "a KL needs the reference's log-probabilities"
    kl_C = kl_term(logp_C, ref_logp_C, change_C, terms)
    return TokenLoss(loss_C + terms.beta * kl_C, low_C, high_C, kl_C)


def log_ratio(logp_C: Tensor, old_logp_C: Tensor, offsets: Tensor | None = None) -> Tensor:
    """log(policy / sampling policy) of each token -> [C]; with ``offsets`` its mean over the completion, on every token
    of it: the geometric mean of the ratios (Zheng et al. 2025, "GSPO")."""
    change_C = logp_C - old_logp_C
    if offsets is None:
        return change_C
    lengths = offsets.diff()
    return (per_completion(change_C, offsets) / lengths).repeat_interleave(lengths)


def policy_term(logp_C: Tensor, change_C: Tensor, advantage_C: Tensor, terms: TokenTerms) -> tuple[Tensor, ...]:
    """-> (loss_C, low_C, high_C) without the KL.

    ``ppo``: the clipped surrogate, with a second bound where ``cap`` is set (:func:`clipped_policy_loss`).
    ``detached``: -sg(min(ratio, cap)) A log p; the cap bounds a token's weight and never takes its gradient (MiniMax
    2025, "CISPO"). ``none``: -A log p, REINFORCE. At ratio 1 the three have one gradient, -A grad log p.
    """
    if terms.clip == "ppo":
        zero_C = torch.zeros_like(change_C)
        loss_C, clipped_C = clipped_policy_loss(change_C, zero_C, advantage_C, terms.low, terms.high, terms.cap)
        return loss_C, clipped_C & (advantage_C < 0), clipped_C & (advantage_C > 0)
    nowhere_C = torch.zeros_like(logp_C, dtype=torch.bool)
    if terms.clip == "none":
        return -advantage_C * logp_C, nowhere_C, nowhere_C
    assert terms.cap is not None, "detached weights have a cap"
    ratio_C = _ratio(change_C.detach())
    # Only what would have been raised further counts as clipped, as in TRL.
    return -ratio_C.clamp(max=terms.cap) * advantage_C * logp_C, nowhere_C, (ratio_C > terms.cap) & (advantage_C > 0)


def kl_term(logp_C: Tensor, ref_logp_C: Tensor, change_C: Tensor, terms: TokenTerms) -> Tensor:
    """An estimate of KL(policy || reference) on each token -> [C]. With ``unbiased`` it is weighed by the ratio, so
    that its mean over samples of the *sampling* policy is the policy's KL (DeepSeek-AI 2025, "DeepSeek-V3.2").

    The gradient of a plain k3 is not that of the KL, not even at ratio 1: that of ratio * k3 is. k2 has the KL's
    gradient at ratio 1, so that its ratio is a weight and no more: both then have the gradient ratio * k1 * grad log p.
    """
    if terms.estimator == "k2":
        kl_C = k2(logp_C, ref_logp_C)
        return _ratio(change_C.detach()) * kl_C if terms.unbiased else kl_C
    kl_C = k3(logp_C, ref_logp_C)
    return _ratio(change_C) * kl_C if terms.unbiased else kl_C


def sampler_weights(trainer_logp_C: Tensor, sampled_logp_C: Tensor, how: Correction, low: float, high: float) -> Tensor:
    """What tokens weigh whose sampler computes otherwise than the trainer -> [C], without gradient: the ratio of the
    trainer's probability to the sampler's, both of the policy that sampled. ``clip``: held within [low, high] (Yao et
    al. 2025, truncated importance sampling); ``mask``: 0 outside (Ling team 2025, "IcePop")."""
    weight_C = _ratio(trainer_logp_C.detach() - sampled_logp_C)
    if how == "clip":
        return weight_C.clamp(low, high)
    return torch.where((weight_C >= low) & (weight_C <= high), weight_C, 0)


def per_completion(x_C: Tensor, offsets: Tensor) -> Tensor:
    """The sum over each completion's tokens -> [N]."""
    lengths = offsets.diff()
    rows_C = torch.arange(lengths.numel(), device=x_C.device).repeat_interleave(lengths)
    return x_C.new_zeros(lengths.numel()).index_add(0, rows_C, x_C)


def _ratio(change_C: Tensor) -> Tensor:
    return change_C.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
