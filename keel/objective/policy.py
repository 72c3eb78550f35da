"""What PPO computes on completions: rewards per token, advantages, clipped losses (Schulman et al. 2017).

Legend: N completions with C tokens in all, laid end to end; ``offsets`` int64 [N+1] says where each begins, so that
completion n owns ``x_C[offsets[n]:offsets[n + 1]]``. Every completion has at least one token. There is no padding and
hence no mask: a mean over C is a mean over real tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# exp(20) is far beyond any clip range, and far from overflowing float32 when multiplied by an advantage.
MAX_LOG_RATIO = 20.0


class StepValues(NamedTuple):
    """What S steps of completions are worth [S], and at which of the C tokens each ends (int64 [S])."""

    value_S: Tensor
    place_S: Tensor


def episode_scores(
    score_N: Tensor,
    finished_N: Tensor,
    missing_eos_penalty: float = 0.0,
    clip: float | None = None,
    long_N: Tensor | None = None,
) -> Tensor:
    """Scores as PPO uses them -> [N]: clipped to [-clip, clip], then less ``missing_eos_penalty`` where the completion
    was cut at the length limit (``finished_N`` False), which no reward model trained on whole replies can judge. One
    that ended loses the share ``long_N`` of it (:func:`overlong_share`)."""
    if clip is not None:
        score_N = score_N.clamp(-clip, clip)
    ended_N = score_N if long_N is None else score_N - missing_eos_penalty * long_N
    return torch.where(finished_N, ended_N, score_N - missing_eos_penalty)


def overlong_share(lengths_N: Tensor, limit: int, begin: float) -> Tensor:
    """How much of a penalty for its length each completion has -> [N]: 0 up to ``begin * limit`` tokens, from there on
    rising evenly to 1 at ``limit`` (Yu et al. 2025, "DAPO", section 3.4). ``begin`` is below 1."""
    free = begin * limit
    return ((lengths_N - free) / (limit - free)).clamp(0, 1)


def token_rewards(
    kl_C: Tensor, score_N: Tensor, offsets: Tensor, kl_coef: float, steps: StepValues | None = None
) -> Tensor:
    """-kl_coef * kl on every token, the score on each completion's last real token (its end token if it has one), and
    each step's value on the token where it ends. -> [C]. Ziegler et al. 2019, eq. 2, spread over tokens; ``kl_C`` is
    the k1 estimate (:func:`keel.objective.kl.k1`), whose sum is unbiased for the sequence, so an episode's rewards sum
    to score + steps - kl_coef * KL.
    """
    _check(offsets, kl_C, score_N)
    rewards_C = (-kl_coef * kl_C).index_add(0, offsets[1:] - 1, score_N.to(kl_C.dtype))
    return rewards_C if steps is None else rewards_C.index_add(0, steps.place_S, steps.value_S.to(kl_C.dtype))


def discounted_reward(rewards_C: Tensor, offsets: Tensor, gamma: float) -> float:
    """What PPO maximises: the mean over completions of their tokens' rewards, that of token t (from 0) times gamma^t.
    (:func:`token_rewards`: score less kl_coef * KL where gamma is 1.)"""
    _check(offsets, rewards_C)
    place_C = torch.arange(rewards_C.numel(), device=rewards_C.device) - offsets[:-1].repeat_interleave(offsets.diff())
    return float((rewards_C.double() * gamma ** place_C.double()).sum()) / (offsets.numel() - 1)


def gae(rewards_C: Tensor, values_C: Tensor, offsets: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), within each completion. -> (advantages_C,
    returns_C), without gradient.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + V_t. Nothing follows the
    last token: V and A beyond it are 0, for a cut completion too (its penalty stands for what would have followed).
    """
    _check(offsets, rewards_C)
    rewards_C, values_C = rewards_C.detach(), values_C.detach()
    lengths = offsets.diff()
    rows_C = torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)
    columns_C = torch.arange(rewards_C.numel(), device=lengths.device) - offsets[rows_C]
    longest = int(lengths.max())
    # One step of the recursion serves all completions. Zeros to their right are what "nothing follows" means.
    rewards_NL = rewards_C.new_zeros(lengths.numel(), longest).index_put((rows_C, columns_C), rewards_C)
    values_NL = values_C.new_zeros(lengths.numel(), longest + 1).index_put((rows_C, columns_C), values_C)
    deltas_NL = rewards_NL + gamma * values_NL[:, 1:] - values_NL[:, :-1]
    advantages_NL = torch.zeros_like(deltas_NL)
    running_N = deltas_NL.new_zeros(lengths.numel())
    for t in reversed(range(longest)):
        running_N = deltas_NL[:, t] + gamma * lam * running_N
        advantages_NL[:, t] = running_N
    advantages_C = advantages_NL[rows_C, columns_C]
    return advantages_C, advantages_C + values_C


def clipped_policy_loss(
    logp_C: Tensor,
    old_logp_C: Tensor,
    advantage_C: Tensor,
    clip: float,
    clip_high: float | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) with ratio = policy / sampling policy: Schulman et al. 2017,
    eq. 7. -> (loss_C, clipped_C), clipped_C (bool) being where the clip holds the token's gradient at zero.

    ``clip_high``: an upper bound of its own, 1 + clip_high (Yu et al. 2025, "DAPO", section 3.1); None: ``clip``.
    ``cap``, a ratio above 1 + clip_high: no ratio counts for more, which bounds the loss of tokens with a negative
    advantage too (Ye et al. 2020, "dual-clip PPO"). What it holds is not in clipped_C, as in TRL.
    """
    high = clip if clip_high is None else clip_high
    ratio_C = (logp_C - old_logp_C).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    free_C = -advantage_C * (ratio_C if cap is None else ratio_C.clamp(max=cap))
    held_C = -advantage_C * ratio_C.clamp(1 - clip, 1 + high)
    return torch.maximum(free_C, held_C), held_C > free_C


def clipped_value_loss(value_C: Tensor, old_value_C: Tensor, return_C: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Half the squared error of the value, or of the value held within ``clip`` of the old one, whichever is larger.
    -> (loss_C, clipped_C). From the PPO authors' implementation; detail 9 of Huang et al. 2022 ("The 37 Implementation
    Details of PPO").
    """
    free_C = (value_C - return_C) ** 2
    held_C = (old_value_C + (value_C - old_value_C).clamp(-clip, clip) - return_C) ** 2
    return 0.5 * torch.maximum(free_C, held_C), held_C > free_C


def entropy_bonus(entropy_C: Tensor, coef: float) -> Tensor:
    """-coef * entropy -> [C]: added to the policy loss, it rewards staying undecided."""
    return -coef * entropy_C


def explained_variance(values_C: Tensor, returns_C: Tensor) -> Tensor:
    """1 - Var[return - value] / Var[return] -> scalar tensor: 1 for a perfect critic, 0 for a constant, below 0 for a
    harmful one. 0 when the returns do not vary, since there is then nothing to explain."""
    total = returns_C.var(correction=0)
    left = (returns_C - values_C).var(correction=0)
    # Rounding alone gives equal returns a variance of about (eps * return)^2.
    varies = total > torch.finfo(total.dtype).eps * (returns_C**2).mean()
    return torch.where(varies, 1 - left / total, torch.zeros_like(total))


def _check(offsets: Tensor, x_C: Tensor, x_N: Tensor | None = None) -> None:
    assert bool((offsets.diff() > 0).all()), "every completion must have a token"
    assert int(offsets[-1]) == x_C.numel(), "offsets and tokens differ in number"
    assert x_N is None or x_N.numel() == offsets.numel() - 1, "offsets and completions differ in number"
