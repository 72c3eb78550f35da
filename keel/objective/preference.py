"""Losses on preferences in one form: one value a record, in nats; reduction is the caller's.

The reward of a reply is r = beta * T(log p - log p_ref), the log-probabilities summed over its tokens or their mean,
with a reference or without. With f the link, z = r_w - r_l, m the margin and u = r - beta * anchor, a pair costs::

    pair * [P f(z - m) + (1 - P) f(-z - m)]                                         the contrast of the two
    + P [up0 f(u_w) + up1 f(-u_w) + down0 f(u_l) + down1 f(-u_l)] + (1 - P) [...]    each by itself; [...]: swapped

P is how much the label weighs, 1 - P the opposite one: 1 for a label as it stands, 1/2 for a tie, a probability for a
soft label; beyond 1 where the flips of a known rate are taken out again. So swapping the two replies and P with 1 - P
changes nothing, and a tie does not know which reply is called chosen. ``PreferenceLoss`` (keel.types) holds the
choices, ``keel.recipe.preference_loss`` the published losses as choices.

Legend: N records. [N] tensors of one dtype, float32 or wider.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from keel.types import Labels, Link, PreferenceLoss

SURE = 1e-6  # nats a token: a reply that is more probable than this is taken as this probable, so that odds are finite


class Logps(NamedTuple):
    """N replies: log-probabilities summed over the reply's tokens (nats) under the policy and, where there is one, the
    reference; numbers of tokens."""

    policy_N: Tensor
    tokens_N: Tensor
    reference_N: Tensor | None = None


def log_ratio(form: PreferenceLoss, replies: Logps) -> Tensor:
    """T(log p - log p_ref) -> [N], nats a sequence, or a token for ``length: mean``. What the reward is beta times."""
    policy_N, reference_N = replies.policy_N, replies.reference_N if form.reference else None
    assert reference_N is not None or not form.reference, "this loss compares with a reference"
    if form.length == "mean":
        tokens_N = replies.tokens_N.clamp(min=1)
        policy_N = policy_N / tokens_N
        reference_N = None if reference_N is None else reference_N / tokens_N
    ratio_N = policy_N if reference_N is None else policy_N - reference_N
    return log_odds(ratio_N) if form.transform == "log_odds" else ratio_N


def log_odds(logp_N: Tensor) -> Tensor:
    """log p - log(1 - p) -> [N]. By ``expm1``: 1 - exp(log p) would be 0 in float32 long before p is 1."""
    logp_N = logp_N.clamp(max=-SURE)
    return logp_N - torch.log(-torch.expm1(logp_N))


def rewards(form: PreferenceLoss, replies: Logps) -> Tensor:
    """beta * T(log p - log p_ref) -> [N]: the reward that the policy stands for, up to a function of the prompt
    (Rafailov et al. 2023, eq. 5)."""
    return form.beta * log_ratio(form, replies)


def label_weights(probability_N: Tensor, labels: Labels, noise: float = 0.0) -> Tensor:
    """How much each label weighs against the opposite one -> [N]. ``probability_N``: that the reply called chosen is
    the better one: 1 for a plain label, 1/2 for a tie.

    ``soft`` takes it as it is, ``hard`` rounds it. ``smoothed`` mixes in the opposite label at the rate ``noise``
    (Mitchell 2023). ``debiased`` does the reverse: of labels that are flipped at that rate, the expected loss is that
    of the labels before (Natarajan et al. 2013; Chowdhury et al. 2024, "Provably Robust DPO", eq. 12).
    """
    if labels == "hard":
        return (torch.sign(probability_N - 0.5) + 1) / 2
    if labels == "smoothed":
        return probability_N + noise * (1 - 2 * probability_N)
    if labels == "debiased":
        return (probability_N - noise) / (1 - 2 * noise)
    return probability_N


def pair_loss(
    form: PreferenceLoss,
    chosen: Logps,
    rejected: Logps,
    right_N: Tensor,
    strength_N: Tensor | None = None,
    anchor: float = 0.0,
) -> Tensor:
    """The module's formula -> [N], without the NLL (:func:`imitation`).

    ``right_N``: P, of :func:`label_weights`. ``strength_N``: the votes' strengths, >= 0 (ODPO, Amini et al. 2024).
    ``anchor``: a log-ratio (nats), the same for the whole optimizer step. ``length_margin`` for each token that the
    chosen reply is longer counts as reached already (R-DPO, Park et al. 2024): what a label owes to length is not asked
    of the policy.
    """
    wrong_N = 1 - right_N
    chosen_N, rejected_N = rewards(form, chosen), rewards(form, rejected)
    lead_N, margin_N = chosen_N - rejected_N, torch.full_like(right_N, form.margin)
    if form.strength_margin and strength_N is not None:
        margin_N = margin_N + form.strength_margin * strength_N
    if form.length_margin:
        lead_N = lead_N + form.length_margin * (chosen.tokens_N - rejected.tokens_N)
    loss_N = torch.zeros_like(lead_N)
    if form.pair:
        loss_N = contrast(form.link, lead_N, right_N, wrong_N, form.beta, margin_N)
        loss_N = loss_N if form.pair == 1 else form.pair * loss_N
    if form.points:
        loss_N = loss_N + _point(form, chosen_N, right_N, wrong_N, anchor)
        loss_N = loss_N + _point(form, rejected_N, wrong_N, right_N, anchor)
    return loss_N


def reply_loss(form: PreferenceLoss, replies: Logps, good_N: Tensor, anchor: float = 0.0) -> Tensor:
    """The module's formula for single replies -> [N]. ``good_N``: of :func:`label_weights`, where the probability is
    that the reply is good: 1 for a thumb up, 0 for one down. ``anchor``: as in :func:`pair_loss`."""
    assert form.unpaired, "this loss compares two replies"
    return _point(form, rewards(form, replies), good_N, 1 - good_N, anchor)


def imitation(chosen: Logps, rejected: Logps, right_N: Tensor) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood of the better reply, its tokens), [N] each and as expected under the labels: a tie has
    half of both replies. No reply is made less likely by it, whatever the labels. The published losses (CPO, ORPO,
    IRPO) in TRL divide the sum over a batch by its tokens; that is the caller's."""
    right_N = right_N.clamp(0, 1)
    nll_N = -(right_N * chosen.policy_N + (1 - right_N) * rejected.policy_N)
    return nll_N, right_N * chosen.tokens_N + (1 - right_N) * rejected.tokens_N


def contrast(
    link: Link, lead_N: Tensor, right_N: Tensor, wrong_N: Tensor, beta: float, margin_N: Tensor | float = 0.0
) -> Tensor:
    """right f(lead - margin) + wrong f(-lead - margin) -> [N] for the links f that add up so.

    ``square`` and ``reverse_kl`` have the label inside: the lead is drawn to the *expected* target, (right - wrong) *
    (1/2 + margin), in units of beta (Azar et al. 2023, eq. 17: at right + wrong = 1 this is the sum, less what does not
    depend on the policy); and sigmoid(lead - margin) to the label's distribution, which must have no 0 (Ji et al. 2024,
    "EXO", eq. 16).
    """
    if link == "square":
        return ((lead_N - (right_N - wrong_N) * (0.5 + margin_N)) / beta) ** 2
    if link == "reverse_kl":
        lead_N = lead_N - (right_N - wrong_N) * margin_N
        q_N = torch.sigmoid(lead_N)
        right_N, wrong_N = q_N * (F.logsigmoid(lead_N) - right_N.log()), wrong_N.log()
        return right_N + (1 - q_N) * (F.logsigmoid(-lead_N) - wrong_N)
    ahead_N, behind_N = lead_N - margin_N, -lead_N - margin_N
    if link == "logistic":
        return -right_N * F.logsigmoid(ahead_N) - wrong_N * F.logsigmoid(behind_N)
    if link == "hinge":
        return right_N * F.relu(1 - ahead_N) + wrong_N * F.relu(1 - behind_N)
    return right_N * torch.sigmoid(-ahead_N) + wrong_N * torch.sigmoid(-behind_N)


def _point(form: PreferenceLoss, reward_N: Tensor, good_N: Tensor, bad_N: Tensor, anchor: float) -> Tensor:
    """What a reply costs by itself -> [N], where it weighs ``good_N`` as a good one and ``bad_N`` as a bad one."""
    (up_ahead, up_behind), (down_ahead, down_behind) = form.up, form.down
    ahead_N = good_N * up_ahead + bad_N * down_ahead
    behind_N = good_N * up_behind + bad_N * down_behind
    return contrast(form.link, reward_N - form.beta * anchor, ahead_N, behind_N, form.beta)


def kl_anchor(log_ratio_M: Tensor) -> float:
    """KTO's estimate of the KL from the log-ratios of M replies behind prompts that are not theirs: their mean, but no
    less than 0 (Ethayarajh et al. 2024, section 4.1). 0 without any. Take it over a whole optimizer step."""
    return max(0.0, float(log_ratio_M.double().mean())) if log_ratio_M.numel() else 0.0


class RunningMean:
    """The mean of all log-ratios of the optimizer steps so far, and 0 before: BCO's reward shift (Jung et al. 2024). A
    step is measured from those before it, so that it can be cut into micro-batches anywhere; the first one is exact,
    for the policy is the reference then."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0.0

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0

    def add(self, total: float, count: float) -> None:
        self.total, self.count = self.total + total, self.count + count

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.count = state["total"], state["count"]


# ------------------------------------------------------------------------------------------------- the reward model's


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


def _label_probability(like_N: Tensor, tie_N: Tensor | None, label_smoothing: float) -> Tensor:
    """How probable it is that "chosen" is the better one. -> [N]"""
    right_N = torch.full_like(like_N, 1 - label_smoothing)
    return right_N if tie_N is None else torch.where(tie_N, 0.5, right_N)
