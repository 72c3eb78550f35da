"""What GRPO computes on groups of completions of one prompt (Shao et al. 2024, "DeepSeekMath", section 4.1): advantages
without a critic, the loss of each token, and the weight of each token in an update's loss.

Legend as in ``policy``: N completions with C tokens in all, ``offsets`` int64 [N+1]. A group's completions follow one
another: group g owns ``x_N[g * group_size:(g + 1) * group_size]``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from keel.objective.kl import k3
from keel.objective.policy import StepValues, clipped_policy_loss, gae

# Keeps a group whose scores hardly differ from being blown up to unit spread; TRL's constant, in units of the score.
EPS = 1e-4


def group_advantages(score_N: Tensor, group_size: int, scale: bool = True) -> Tensor:
    """Score less the mean of its group and, with ``scale``, divided by the group's standard deviation (unbiased) + EPS.
    -> [N], without gradient. Shao et al. 2024, section 4.1.2; without ``scale`` Liu et al. 2025 ("Dr. GRPO"), section
    3, which removes the extra weight that the division gives to prompts that are nearly always or never solved.

    A group whose scores are all the same has advantages of exactly 0: it teaches nothing.
    """
    assert group_size > 1, "a group's baseline needs two completions"
    assert score_N.numel() % group_size == 0, "groups and completions differ in number"
    groups = score_N.detach().view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if scale:
        centred = centred / (groups.std(1, keepdim=True) + EPS)
    # The mean of equal numbers may differ from them by a rounding error, which the division would make a signal.
    return torch.where(without_spread(score_N, group_size)[:, None], 0, centred).flatten()


def step_advantages(steps: StepValues, offsets: Tensor, group_size: int, scale: bool = True) -> Tensor:
    """The values of a group's steps less their mean and, with ``scale``, divided by their standard deviation, as in
    :func:`group_advantages`; a token's advantage is the sum over the steps of its completion that end at it or after
    it. -> [C], without gradient. Shao et al. 2024, section 4.1.3 ("process supervision").

    Steps whose group has no others, or only equal ones, teach nothing; nor is there anything behind the last step.
    """
    row_S = torch.searchsorted(offsets, steps.place_S, right=True) - 1
    group_S = row_S // group_size
    normal_S = torch.zeros_like(steps.value_S)
    for group in group_S.unique():
        inside_S = group_S == group
        if (count := int(inside_S.sum())) > 1:
            normal_S[inside_S] = group_advantages(steps.value_S[inside_S], count, scale)
    earned_C = normal_S.new_zeros(int(offsets[-1])).index_add(0, steps.place_S, normal_S)
    to_go_C, _ = gae(earned_C, torch.zeros_like(earned_C), offsets, gamma=1.0, lam=1.0)  # no values: rewards to go
    return to_go_C


def without_spread(score_N: Tensor, group_size: int) -> Tensor:
    """Where all scores of a group are the same -> [N / group_size] bool."""
    low, high = score_N.view(-1, group_size).aminmax(dim=1)
    return low == high


def grpo_loss(
    logp_C: Tensor,
    old_logp_C: Tensor,
    advantage_C: Tensor,
    clip_low: float,
    clip_high: float,
    ref_logp_C: Tensor | None = None,
    beta: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss plus beta * k3(policy || reference) on each token: Shao et al. 2024, eq. 3 and 4, before the
    mean. -> (loss_C, clipped_C). ``advantage_C`` is each completion's advantage on every one of its tokens, and what
    its steps add (:func:`step_advantages`).

    The KL stands in the loss and not in the reward as in PPO: a group's baseline would cancel a penalty that all of its
    completions share. ``ref_logp_C`` may be None when ``beta`` is 0.
    """
    loss_C, clipped_C = clipped_policy_loss(logp_C, old_logp_C, advantage_C, clip_low, clip_high)
    if beta > 0:
        assert ref_logp_C is not None, "a KL needs the reference's log-probabilities"
        loss_C = loss_C + beta * k3(logp_C, ref_logp_C)
    return loss_C, clipped_C


def token_weights(
    lengths_N: Tensor, normalise: Literal["token", "sequence", "constant"], max_new_tokens: int
) -> Tensor:
    """What each completion's tokens weigh in the loss of an update over these N completions -> [N]; the loss is the sum
    of loss x weight over tokens, however it is split into micro-batches.

    ``token``: the mean over all tokens (Yu et al. 2025, "DAPO", section 3.3). ``sequence``: the mean over completions
    of the mean over their tokens (Shao et al. 2024, eq. 3), in which a long completion's tokens weigh less.
    ``constant``: 1 / (N max_new_tokens), the same for every length and every batch (Liu et al. 2025, "Dr. GRPO").
    """
    n = lengths_N.numel()
    if normalise == "sequence":
        return 1.0 / (n * lengths_N.float())
    total = lengths_N.sum().item() if normalise == "token" else n * max_new_tokens
    return torch.full((n,), 1.0 / total)
