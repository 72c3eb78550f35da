"""What GRPO's family computes on groups of completions of one prompt (Shao et al. 2024, "DeepSeekMath", section 4.1):
advantages without a critic, and the weight of each token in an update's loss. The loss is in ``ratio``.

Legend as in ``policy``: N completions with C tokens in all, ``offsets`` int64 [N+1]. A group's completions follow one
another: group g owns ``x_N[g * group_size:(g + 1) * group_size]``. Where some completions tell nothing (cut ones that
the recipe leaves out), ``valid_N`` is False there: no baseline and no deviation counts them, their advantage is 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from keel.objective.masked import masked_mean, masked_sum
from keel.objective.policy import StepValues, gae

# Keeps a group whose scores hardly differ from being blown up to unit spread; TRL's constant, in units of the score.
EPS = 1e-4

Baseline = Literal["group", "others", "batch", "none"]
Scale = Literal["group", "batch", "mean", "none"]
Aggregation = Literal["token", "sequence", "constant"]


def group_advantages(
    score_N: Tensor,
    group_size: int,
    scale: Scale = "group",
    baseline: Baseline = "group",
    valid_N: Tensor | None = None,
) -> Tensor:
    """Score less a baseline, over a scale. -> [N], without gradient. N is the whole rollout: what is a mean or a
    deviation over the batch is so before the rollout is split into steps and micro-batches.

    ``baseline``: the mean of the group (Shao et al. 2024, section 4.1.2), the mean of the ``others`` of the group
    (Kool et al. 2019; Ahmadian et al. 2024, "RLOO"), which is S / (S - 1) times as much of a group of S, the mean of
    the ``batch`` (Hu 2025, "REINFORCE++"), or ``none``.
    ``scale``: the standard deviation (unbiased) of the ``group``, or of the ``batch`` ("Lite PPO", arXiv 2508.08221),
    plus EPS; the group's ``mean`` ("MaxRL", arXiv 2602.02710: a prompt then weighs as in the gradient of the logarithm
    of its success rate; 0 where the mean is not above 0); or ``none`` (Liu et al. 2025, "Dr. GRPO", section 3: the
    division gives extra weight to prompts that are nearly always or never solved).

    A group whose scores are all the same has advantages of exactly 0 where the baseline is its own: it teaches nothing.
    """
    assert group_size > 1, "a group's baseline needs two completions"
    assert score_N.numel() % group_size == 0, "groups and completions differ in number"
    groups = score_N.detach().view(-1, group_size)
    valid = None if valid_N is None else valid_N.view(-1, group_size)
    of_group = baseline in ("group", "others")
    centred = groups
    if baseline != "none":
        centred = groups - (_mean(groups, valid) if of_group else _mean_of_all(groups, valid))
    if baseline == "others":
        count = torch.tensor(group_size) if valid is None else valid.sum(1, keepdim=True)
        centred = centred * count / (count - 1).clamp(min=1)
    if scale == "group":
        centred = centred / (_deviation(groups, valid) + EPS)
    elif scale == "batch":
        everyone = None if valid is None else valid.view(1, -1)
        centred = centred / (_deviation(groups.view(1, -1), everyone) + EPS)
    elif scale == "mean":
        mean = _mean(groups, valid)
        centred = torch.where(mean > 0, centred / mean, 0)
    if of_group:
        # The mean of equal numbers may differ from them by a rounding error, which the division would make a signal.
        centred = torch.where(without_spread(score_N, group_size, valid_N)[:, None], 0, centred)
    return (centred if valid is None else torch.where(valid, centred, 0)).flatten()


def each_normalised(
    score_NK: Tensor,
    weight_K: Tensor,
    group_size: int,
    scale: Scale = "group",
    baseline: Baseline = "group",
    valid_N: Tensor | None = None,
) -> Tensor:
    """Advantages from K rewards, each by itself (:func:`group_advantages`), then their weighted sum over its standard
    deviation (unbiased, plus EPS) in the batch -> [N]. "GDPO", arXiv 2601.05242: where rewards are summed first, the
    one that varies most decides alone, and different mixtures come to one advantage.
    """
    of_each_NK = torch.stack(
        [group_advantages(score_N, group_size, scale, baseline, valid_N) for score_N in score_NK.unbind(1)], 1
    )
    total_N = of_each_NK @ weight_K.to(of_each_NK)
    # Its mean over the batch is 0 already, as it is over each group.
    everyone = None if valid_N is None else valid_N[None]
    return total_N / (_deviation(total_N[None], everyone).squeeze() + EPS)


def step_advantages(
    steps: StepValues, offsets: Tensor, group_size: int, scale: Scale = "group", valid_N: Tensor | None = None
) -> Tensor:
    """The values of a group's steps less their mean and, as ``scale`` says, divided by their standard deviation or by
    that of all steps, as in :func:`group_advantages`; a token's advantage is the sum over the steps of its completion
    that end at it or after it. -> [C], without gradient. Shao et al. 2024, section 4.1.3 ("process supervision").

    Steps whose group has no others, or only equal ones, teach nothing; nor is there anything behind the last step.
    """
    assert scale != "mean", "steps have values of either sign"
    row_S = torch.searchsorted(offsets, steps.place_S, right=True) - 1
    kept_S = torch.ones_like(row_S, dtype=torch.bool) if valid_N is None else valid_N[row_S]
    group_S = row_S // group_size
    normal_S = torch.zeros_like(steps.value_S)
    for group in group_S.unique():
        inside_S = (group_S == group) & kept_S
        if (count := int(inside_S.sum())) > 1:
            normal_S[inside_S] = group_advantages(steps.value_S[inside_S], count, "none" if scale == "batch" else scale)
    if scale == "batch" and int(kept_S.sum()) > 1:
        normal_S = normal_S / (steps.value_S[kept_S].std() + EPS)
    earned_C = normal_S.new_zeros(int(offsets[-1])).index_add(0, steps.place_S, normal_S)
    to_go_C, _ = gae(earned_C, torch.zeros_like(earned_C), offsets, gamma=1.0, lam=1.0)  # no values: rewards to go
    return to_go_C


def without_spread(score_N: Tensor, group_size: int, valid_N: Tensor | None = None) -> Tensor:
    """Where all scores of a group are the same, or there are not two -> [N / group_size] bool. Equality is asked, not a
    small deviation: the mean of equal numbers is not always that number."""
    groups = score_N.view(-1, group_size)
    if valid_N is None:
        low, high = groups.aminmax(dim=1)
        return low == high
    valid = valid_N.view(-1, group_size)
    infinity = torch.full_like(groups, torch.inf)
    return torch.where(valid, groups, infinity).amin(1) >= torch.where(valid, groups, -infinity).amax(1)


def token_weights(lengths_N: Tensor, normalise: Aggregation, max_new_tokens: int) -> Tensor:
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


# ------------------------------------------------------------------------------------------------------- statistics


def _mean(groups: Tensor, valid: Tensor | None) -> Tensor:
    """Of each row [.., 1]."""
    return groups.mean(1, keepdim=True) if valid is None else masked_mean(groups, valid, 1)[:, None]


def _mean_of_all(groups: Tensor, valid: Tensor | None) -> Tensor:
    return groups.mean() if valid is None else masked_mean(groups, valid)


def _deviation(groups: Tensor, valid: Tensor | None) -> Tensor:
    """Of each row [.., 1], unbiased; 0 of a single number."""
    if valid is None:
        return groups.std(1, keepdim=True)
    square = masked_sum((groups - _mean(groups, valid)) ** 2, valid, 1)
    return (square / (valid.sum(1) - 1).clamp(min=1)).sqrt()[:, None]
