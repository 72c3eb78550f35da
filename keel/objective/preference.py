"""Losses on pairs: one value a pair, in nats; reduction is the caller's.

Legend: N pairs. ``chosen`` and ``rejected`` are rewards (Bradley-Terry) or completion log-probabilities summed over
tokens (DPO, IPO). ``tie_N`` (bool) marks pairs that the annotator could not tell apart: both labels are then equally
right, so swapping the two sides leaves the loss as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    chosen_N: Tensor,
    rejected_N: Tensor,
    margin_N: Tensor | None = None,
    tie_N: Tensor | None = None,
    label_smoothing: float = 0.0,
    probability_N: Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of the labels when P(a beats b) = sigmoid(r_a - r_b) (Bradley & Terry 1952). -> [N]

    ``margin_N`` (in units of reward, >= 0) is the lead that a pair must have before its loss is small: Llama 2
    (Touvron et al. 2023), eq. 2. ``label_smoothing`` is the probability that a label is the wrong way round; the loss
    is the mixture of both labels'. A tie is the mixture in equal parts, and has no margin. ``probability_N``: soft
    labels, the probability that "chosen" is the better one; default: 1.
    """
    margin_N = torch.zeros_like(chosen_N) if margin_N is None else margin_N
    lead_N = chosen_N - rejected_N
    if probability_N is None:
        right_N = _label_probability(lead_N, tie_N, label_smoothing)
    else:
        right_N = (1 - label_smoothing) * probability_N + label_smoothing * (1 - probability_N)
        right_N = right_N if tie_N is None else torch.where(tie_N, 0.5, right_N)
    if tie_N is not None:
        margin_N = torch.where(tie_N, 0, margin_N)
    return -right_N * F.logsigmoid(lead_N - margin_N) - (1 - right_N) * F.logsigmoid(-lead_N - margin_N)


def center_penalty(chosen_N: Tensor, rejected_N: Tensor) -> Tensor:
    """(r_chosen + r_rejected)^2 -> [N]. Bradley-Terry sees differences only; this settles where zero is (Eisenstein et
    al. 2023, "Helping or Herding?", section 2). Add it with a small coefficient."""
    return (chosen_N + rejected_N) ** 2


def dpo_sigmoid(
    policy_chosen_N: Tensor,
    policy_rejected_N: Tensor,
    ref_chosen_N: Tensor,
    ref_rejected_N: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    tie_N: Tensor | None = None,
) -> Tensor:
    """Bradley-Terry on the implicit rewards beta * log(policy / reference): Rafailov et al. 2023, eq. 7. -> [N]

    ``beta`` weighs the KL to the reference that the closed form assumes. With ``label_smoothing`` this is the
    conservative DPO of Mitchell 2023. For the length-normalised variant pass all four through :func:`per_token`.
    """
    return bradley_terry(
        beta * (policy_chosen_N - ref_chosen_N),
        beta * (policy_rejected_N - ref_rejected_N),
        tie_N=tie_N,
        label_smoothing=label_smoothing,
    )


def ipo(
    policy_chosen_N: Tensor,
    policy_rejected_N: Tensor,
    ref_chosen_N: Tensor,
    ref_rejected_N: Tensor,
    beta: float,
    tie_N: Tensor | None = None,
) -> Tensor:
    """(h - (p - 1/2) / beta)^2 with h the difference of the log-ratios: Azar et al. 2023, eq. 17 (their tau). -> [N]

    p is 1 for a label and 1/2 for a tie, so a labelled pair regresses h to 1 / (2 beta) and a tie to 0. The paper's
    log-probabilities are sums over the completion, and so are these. TRL averages them over the completion's tokens
    instead, and cites the paper's authors for it: pass all four through :func:`per_token` for that. A ``beta`` means
    very different things in the two: a target of 5 nats a sequence at 0.1, or of 5 nats a token.
    """
    lead_N = (policy_chosen_N - ref_chosen_N) - (policy_rejected_N - ref_rejected_N)
    return (lead_N - (_label_probability(lead_N, tie_N, 0.0) - 0.5) / beta) ** 2


def per_token(logp_N: Tensor, tokens_N: Tensor) -> Tensor:
    """Summed log-probabilities over the completion's number of tokens. -> [N], nats per token.

    Log-ratios are differences of these, so feeding a loss with them normalises its log-ratios by length.
    """
    return logp_N / tokens_N.clamp(min=1)


def implicit_reward(policy_N: Tensor, ref_N: Tensor, beta: float) -> Tensor:
    """beta * log(policy / reference) -> [N]: the reward that a DPO policy stands for, up to a function of the prompt
    (Rafailov et al. 2023, eq. 5). For metrics: it carries no gradient."""
    return beta * (policy_N - ref_N).detach()


def _label_probability(like_N: Tensor, tie_N: Tensor | None, label_smoothing: float) -> Tensor:
    """How probable it is that "chosen" is the better one. -> [N]"""
    right_N = torch.full_like(like_N, 1 - label_smoothing)
    return right_N if tie_N is None else torch.where(tie_N, 0.5, right_N)
