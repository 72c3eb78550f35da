"""Advantages of tokens where steps of a reply have values beside the reply's own score: returns to go, held against the
other replies to the prompt. Legend as in ``group``.

A completion's tokens are cut at the steps' ends; what stands behind the last of them (an unfinished step) is a step
worth nothing. G_t is the sum of the values of the steps that end at token t or later.

``returns``, for values that telescope (v_k = p_k - p_{k-1}), whose sum more steps do not raise: p_0 is what the group's
replies come to on average, which makes G of the first step the centred return of group advantages; of a later one it is
p_K - p_{k-1}, already held against what was reached. The mean over the group's tokens is taken off, so that no group
pushes its tokens up or down as a whole. Neither baseline depends on the token that it is taken from.
``tokens``, for values of one sign: from each step the group's mean a token times the step's tokens ("PURE", arXiv
2504.15275, and its issue 2: a baseline a step teaches a policy to avoid what ends steps). A reply of the group's mean
value a token then comes to 0 however long it is: a step pays as far as it is worth more a token than the others.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from keel.objective.group import EPS, Baseline, Scale, group_advantages
from keel.objective.policy import StepValues, gae

# What the values of steps are held against within a group: the mean of all its steps (``step_advantages``), its mean a
# token, or what its replies come to.
StepBaseline = Literal["steps", "tokens", "returns"]

_STILL = 1e-6  # of the largest number that went in: below it a difference is a rounding error


def trace_advantages(
    reward_N: Tensor,
    steps: StepValues,
    offsets: Tensor,
    group_size: int,
    against: StepBaseline,
    scale: Scale = "group",
    baseline: Baseline = "group",
    valid_N: Tensor | None = None,
) -> Tensor:
    """Of each token the reply's centred score plus its centred return to go, over one scale: weights between the two
    stay what they are. -> [C], without gradient; exactly 0 all over a group that teaches nothing, and where ``valid_N``
    is False.

    ``scale``: the deviation of the ``group``'s tokens' advantages from 0, plus EPS; times sqrt(S / (S - 1)) for S
    completions, so that with one step a reply and equal lengths it is the deviation of their returns. Of the ``batch``
    it is that of all that replies come to, as in :func:`group_advantages`, which it is where no step has a value: the
    groups' means differ too, and a reply counts once, by the mean over its tokens. ``others`` as baseline makes it all
    S / (S - 1) times as much.
    """
    assert against != "steps", "step_advantages has those"
    assert scale != "mean", "steps have values of either sign"
    assert baseline in ("group", "others"), "a step is held against its group"
    reward_N = reward_N.detach().double()
    valid_N = torch.ones_like(reward_N, dtype=torch.bool) if valid_N is None else valid_N
    lengths_N = offsets.diff()
    outcome_N = group_advantages(reward_N, group_size, "none", valid_N=valid_N)
    earned = _Earned(steps, offsets, group_size, valid_N)
    steps_C = earned.held_against_returns() if against == "returns" else earned.held_against_tokens()
    count_G = valid_N.view(-1, group_size).sum(1)
    lone_C = (count_G < 2).repeat_interleave(group_size).repeat_interleave(lengths_N)
    factor_G = count_G / (count_G - 1).clamp(min=1)
    total_C = outcome_N.repeat_interleave(lengths_N) + steps_C
    out_C = lone_C | ~valid_N.repeat_interleave(lengths_N)
    total_C = torch.where(out_C, 0, total_C)
    # What went in, by group: rounding errors are as large as it allows.
    size_N = torch.where(valid_N, reward_N.abs(), 0) + earned.total_of(steps.value_S.abs())
    tokens_G = torch.tensor([int(n) for n in lengths_N.view(-1, group_size).sum(1)])
    parts = list(total_C.split(tokens_G.tolist()))
    for g, size in enumerate(size_N.view(-1, group_size).amax(1).tolist()):
        if float(parts[g].abs().max()) <= _STILL * size:
            parts[g] = torch.zeros_like(parts[g])
    if scale == "group":
        there = out_C.split(tokens_G.tolist())
        parts = [
            part / ((part.square().sum() / (~out).sum().clamp(min=1) * factor).sqrt() + EPS)
            for part, out, factor in zip(parts, there, factor_G, strict=True)
        ]
    whole_C = torch.cat(parts)
    if scale == "batch":
        level_N = torch.where(valid_N, reward_N, 0) + earned.total_of(steps.value_S)
        whole_C = whole_C / (_spread(whole_C, level_N, lengths_N, group_size, valid_N) + EPS)
    if baseline == "others":
        whole_C = whole_C * factor_G.repeat_interleave(group_size).repeat_interleave(lengths_N)
    return whole_C.float()


def _spread(held_C: Tensor, level_N: Tensor, lengths_N: Tensor, group_size: int, valid_N: Tensor) -> Tensor:
    """The deviation (unbiased) in the batch of what tokens are worth: ``held_C`` against their group, and the group's
    mean of ``level_N``, what replies come to, against the batch's."""
    n = valid_N.sum()
    count_G = valid_N.view(-1, group_size).sum(1).clamp(min=1)
    between_G = level_N.view(-1, group_size).sum(1) / count_G - level_N.sum() / n.clamp(min=1)
    between_N = between_G.repeat_interleave(group_size)
    row_C = torch.arange(len(lengths_N)).repeat_interleave(lengths_N)
    square_N = torch.zeros_like(level_N).index_add(0, row_C, (held_C + between_N[row_C]).square())
    mean_N = square_N / lengths_N.clamp(min=1)
    return (torch.where(valid_N, mean_N, 0).sum() / (n - 1).clamp(min=1)).sqrt()


class _Earned:
    """The steps' values at their places, and the groups of their completions."""

    def __init__(self, steps: StepValues, offsets: Tensor, group_size: int, valid_N: Tensor) -> None:
        self.steps, self.offsets, self.size, self.valid_N = steps, offsets, group_size, valid_N
        self.row_S = torch.searchsorted(offsets, steps.place_S, right=True) - 1
        self.lengths_N = offsets.diff()
        self.values_C = torch.zeros(int(offsets[-1]), dtype=torch.double)
        self.values_C.index_add_(0, steps.place_S, steps.value_S.double())
        # Each step's last token, and each completion's.
        self.ends_E = torch.cat([steps.place_S, offsets[1:] - 1]).unique()

    def total_of(self, value_S: Tensor) -> Tensor:
        """The sum over each completion's steps [N]; 0 of those that are left out."""
        total_N = torch.zeros(len(self.lengths_N), dtype=torch.double).index_add(0, self.row_S, value_S.double())
        return torch.where(self.valid_N, total_N, 0)

    def held_against_returns(self) -> Tensor:
        total_G = self.total_of(self.steps.value_S).view(-1, self.size).sum(1)
        mean_N = (total_G / self._count_G()).repeat_interleave(self.size)
        first_N = self.ends_E[torch.searchsorted(self.ends_E, self.offsets[:-1])]
        to_go_C = self._to_go(self.values_C.index_add(0, first_N, -mean_N))
        return to_go_C - self._mean_of_tokens(to_go_C)

    def held_against_tokens(self) -> Tensor:
        paid_C = self._mean_of_tokens(self.values_C)
        lengths_E = torch.diff(self.ends_E, prepend=torch.tensor([-1]))
        return self._to_go(self.values_C.index_add(0, self.ends_E, -lengths_E * paid_C[self.ends_E]))

    def _count_G(self) -> Tensor:
        return self.valid_N.view(-1, self.size).sum(1).clamp(min=1)

    def _mean_of_tokens(self, x_C: Tensor) -> Tensor:
        """The mean over the tokens of each token's group that count, at each token [C]."""
        group_C = (torch.arange(len(self.lengths_N)) // self.size).repeat_interleave(self.lengths_N)
        counts_C = self.valid_N.repeat_interleave(self.lengths_N)
        groups = len(self.lengths_N) // self.size
        sum_G = torch.zeros(groups, dtype=torch.double).index_add(0, group_C[counts_C], x_C[counts_C])
        count_G = torch.bincount(group_C[counts_C], minlength=groups).clamp(min=1)
        return (sum_G / count_G)[group_C]

    def _to_go(self, x_C: Tensor) -> Tensor:
        rest_C, _ = gae(x_C, torch.zeros_like(x_C), self.offsets, gamma=1.0, lam=1.0)
        return rest_C
