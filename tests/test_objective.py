"""Objectives against TRL's numbers (tests/oracles), hand-computed values, slow plain loops, and identities."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from keel.objective import kl, masked, policy, preference
from keel.types import PreferenceLoss, UserError

ORACLES = Path(__file__).parent / "oracles"
PREFERENCE = json.loads((ORACLES / "trl_preference.json").read_text())
PPO = json.loads((ORACLES / "trl_ppo.json").read_text())


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(rows: list[dict], name: str) -> Tensor:
    return f64(*(row[name] for row in rows))


# --------------------------------------------------------------------------------------------------------- masked


def test_masked_sum_and_mean_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, float("nan")], [4.0, float("inf"), 7.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked.masked_sum(x, mask).item() == 7.0
    assert masked.masked_sum(x, mask, dim=1).tolist() == [3.0, 4.0]
    assert masked.masked_mean(x, mask).item() == pytest.approx(7 / 3)
    assert masked.masked_mean(x, mask, dim=0).tolist() == [2.5, 2.0, 0.0]  # nothing real in the last column


def test_masked_gradient_reaches_real_elements_only() -> None:
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    masked.masked_mean(x, torch.tensor([True, False, True])).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.5, 0.0, 0.5]


def test_whiten_by_hand() -> None:
    # 1, 2, 3: mean 2, unbiased variance 1; 2, 4, 6: mean 4, standard deviation 2.
    torch.testing.assert_close(masked.whiten(f64(1, 2, 3)), f64(-1, 0, 1), atol=1e-7, rtol=0)
    torch.testing.assert_close(masked.whiten(f64(2, 4, 6), shift_mean=False), f64(3, 4, 5), atol=1e-7, rtol=0)


def test_whiten_ignores_what_is_masked() -> None:
    grid, mask = torch.full((3, 4), float("nan"), dtype=torch.float64), torch.zeros(3, 4, dtype=torch.bool)
    rows, columns = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 0, 0, 1, 2])
    real = randn(0, 6) * 3 + 5
    grid[rows, columns], mask[rows, columns] = real, True
    for shift in (True, False):
        out = masked.whiten(grid, mask, shift)
        torch.testing.assert_close(out[rows, columns], masked.whiten(real, shift_mean=shift))
        assert out[~mask].eq(0).all()
    assert out[rows, columns].std().item() == pytest.approx(1.0)
    assert out[rows, columns].mean().item() == pytest.approx(real.mean().item())


@pytest.mark.parametrize("values", [[3.7], [1e6 + 0.1] * 7, [0.0, 0.0], [0.1] * 1000])
def test_whiten_without_spread_gives_zero(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    assert masked.whiten(x).abs().max() < 1e-3
    torch.testing.assert_close(masked.whiten(x, shift_mean=False), x)


# ----------------------------------------------------------------------------------------------------- preference


def test_reward_losses_equal_trl() -> None:
    rows = PREFERENCE["rewards"]
    chosen, rejected, margin = (column(rows, name) for name in ("chosen", "rejected", "margin"))
    close = torch.testing.assert_close
    close(preference.bradley_terry(chosen, rejected), column(rows, "plain"))
    with_margin = preference.bradley_terry(chosen, rejected, margin)
    close(with_margin, column(rows, "with_margin"))
    center = PREFERENCE["center"] * preference.center_penalty(chosen, rejected)
    close(with_margin + center, column(rows, "with_margin_and_center"))


@pytest.mark.parametrize("name", ["sigmoid", "smoothed", "sigmoid_norm", "ipo"])
def test_dpo_losses_and_gradients_equal_trl(name: str) -> None:
    pairs, beta = PREFERENCE["pairs"], PREFERENCE["beta"]
    form = PreferenceLoss(beta=beta)
    if name in ("sigmoid_norm", "ipo"):  # TRL's IPO averages over tokens
        form = replace(form, length="mean", link="square" if name == "ipo" else "logistic")
    if name == "smoothed":
        form = replace(form, labels="smoothed", label_noise=PREFERENCE["smoothing"])
    sides = []
    for side in ("chosen", "rejected"):
        policy, ref = (f64(*(sum(pair[f"{who}_{side}"]) for pair in pairs)) for who in ("policy", "ref"))
        sides.append(preference.Logps(policy.requires_grad_(), f64(*(len(p[f"ref_{side}"]) for p in pairs)), ref))
    right = preference.label_weights(f64(*(1.0 for _ in pairs)), form.labels, form.label_noise)
    loss = preference.pair_loss(form, *sides, right)
    expected = [pair["trl"][name] for pair in pairs]
    torch.testing.assert_close(loss, column(expected, "loss"))
    grads = torch.autograd.grad(loss.sum(), [side.policy_N for side in sides])
    torch.testing.assert_close(grads[0], column(expected, "grad_chosen"))
    torch.testing.assert_close(grads[1], column(expected, "grad_rejected"))
    # TRL logs rewards of sums whatever the loss averages.
    found = preference.rewards(PreferenceLoss(beta=beta), sides[0])
    torch.testing.assert_close(found, column(expected, "reward_chosen"))


def test_bradley_terry_by_hand() -> None:
    # sigmoid(ln 3) = 3/4: losses ln(4/3) as labelled, ln 4 the wrong way round, half of each for a tie.
    lead, zero = f64(math.log(3)), f64(0)
    assert preference.bradley_terry(lead, zero).item() == pytest.approx(math.log(4 / 3))
    assert preference.bradley_terry(zero, lead).item() == pytest.approx(math.log(4))
    tie = torch.tensor([True])
    half = 0.5 * (math.log(4 / 3) + math.log(4))
    # A margin is ignored on a tie.
    assert preference.bradley_terry(lead, zero, f64(2.0), tie).item() == pytest.approx(half)
    # A margin as large as the lead leaves the odds even.
    assert preference.bradley_terry(lead, zero, lead).item() == pytest.approx(math.log(2))
    smoothed = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)
    assert preference.bradley_terry(lead, zero, label_smoothing=0.1).item() == pytest.approx(smoothed)
    assert preference.center_penalty(f64(3.0), f64(-1.0)).item() == 4.0


def test_reward_shift_changes_nothing_but_the_center_penalty() -> None:
    chosen, rejected, margin = randn(1, 5), randn(2, 5), randn(3, 5).abs()
    tie = torch.tensor([False, True, False, True, False])
    args = (margin, tie, 0.2)
    base = preference.bradley_terry(chosen, rejected, *args)
    torch.testing.assert_close(preference.bradley_terry(chosen + 7, rejected + 7, *args), base)
    assert (
        preference.center_penalty(chosen + 7, rejected + 7).mean() > preference.center_penalty(chosen, rejected).mean()
    )


def test_swapping_a_pair_is_flipping_its_label() -> None:
    """With smoothing e, a swapped pair is the same pair with smoothing 1 - e; a tie does not notice."""
    chosen, rejected, margin = randn(1, 6), randn(2, 6), randn(3, 6).abs()
    close = torch.testing.assert_close
    swapped = preference.bradley_terry(rejected, chosen, margin, label_smoothing=0.3)
    close(swapped, preference.bradley_terry(chosen, rejected, margin, label_smoothing=0.7))
    everything = torch.ones(6, dtype=torch.bool)
    close(
        preference.bradley_terry(chosen, rejected, margin, everything, 0.1),
        preference.bradley_terry(rejected, chosen, margin, everything, 0.1),
    )


def test_dpo_is_ln2_and_ipo_pulls_when_policy_is_reference() -> None:
    sides = [preference.Logps(x, torch.ones(4), x) for x in (randn(1, 4), randn(2, 4))]
    right = f64(1, 1, 0.5, 0.5)
    assert preference.pair_loss(PreferenceLoss(), *sides, right).tolist() == pytest.approx([math.log(2)] * 4)
    # target 1 / (2 * 0.1) = 5, so the loss is 25; a tie is satisfied.
    loss = preference.pair_loss(PreferenceLoss(link="square"), *sides, right)
    assert loss.tolist() == pytest.approx([25, 25, 0, 0])


def test_a_mean_over_tokens_survives_an_empty_completion() -> None:
    replies = preference.Logps(f64(-6.0, 0.0), torch.tensor([4, 0]))
    mean = PreferenceLoss(reference=False, length="mean")
    assert preference.log_ratio(mean, replies).tolist() == [-1.5, 0.0]


def test_preference_losses_stay_finite_far_out() -> None:
    far = torch.tensor([1e4, -1e4])
    for smoothing in (0.0, 0.1):
        assert preference.bradley_terry(far, -far, label_smoothing=smoothing).isfinite().all()


def test_preference_gradients_by_finite_differences() -> None:
    logps = [randn(seed, 4).requires_grad_() for seed in range(2)]
    tie = torch.tensor([False, True, False, False])
    margin, tokens = randn(9, 4).abs(), torch.tensor([3, 1, 4, 2])
    assert gradcheck(lambda a, b: preference.bradley_terry(a, b, margin, tie, 0.1), logps)
    forms = [
        PreferenceLoss(beta=0.3, length="mean", length_margin=0.1),
        PreferenceLoss(link="square", up=(1.0, 0.5), down=(0.2, 0.7)),
        PreferenceLoss(link="reverse_kl", margin=0.2),
        PreferenceLoss(reference=False, transform="log_odds", link="one_minus_sigmoid"),
    ]

    def loss(chosen: Tensor, rejected: Tensor, form: PreferenceLoss) -> Tensor:
        sides = [preference.Logps(-x.exp(), tokens, -margin) for x in (chosen, rejected)]
        return preference.pair_loss(form, *sides, f64(0.9, 0.5, 0.3, 0.8), margin, anchor=0.4)

    for form in forms:
        assert gradcheck(partial(loss, form=form), logps)


# --------------------------------------------------------------------------------------------------------- policy

OFFSETS = torch.tensor([0, 4, 5, 11])


def slow_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition as a double sum: A_t = sum_k (gamma lam)^k delta_{t+k}."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, after, strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (0.95, 1.0)])
def test_gae_against_the_double_sum(gamma: float, lam: float) -> None:
    rewards, values = randn(1, 11), randn(2, 11)
    advantages, returns = policy.gae(rewards, values, OFFSETS, gamma, lam)
    expected = []
    for start, end in itertools.pairwise(OFFSETS):
        expected += slow_gae(rewards[start:end].tolist(), values[start:end].tolist(), gamma, lam)
    assert advantages.tolist() == pytest.approx(expected)
    torch.testing.assert_close(returns, advantages + values)


def test_gae_by_hand() -> None:
    # One completion, gamma 1, lam 1/2: deltas 0 + 2 - 1 = 1 and 3 - 2 = 1; advantages 1 + 1/2 and 1.
    advantages, returns = policy.gae(f64(0, 3), f64(1, 2), torch.tensor([0, 2]), 1.0, 0.5)
    assert advantages.tolist() == [1.5, 1.0]
    assert returns.tolist() == [2.5, 3.0]


def test_gae_with_lam_1_returns_the_rewards_to_come() -> None:
    rewards, values = randn(3, 11), randn(4, 11)
    _, returns = policy.gae(rewards, values, OFFSETS, 1.0, 1.0)
    assert returns[0].item() == pytest.approx(rewards[:4].sum().item())
    assert returns[4].item() == pytest.approx(rewards[4].item())
    assert returns[8].item() == pytest.approx(rewards[8:].sum().item())


def test_gae_knows_no_batch_mates_and_no_gradient() -> None:
    rewards, values = randn(5, 11), randn(6, 11).requires_grad_()
    together, _ = policy.gae(rewards, values, OFFSETS, 0.99, 0.95)
    alone, _ = policy.gae(rewards[5:], values[5:], torch.tensor([0, 6]), 0.99, 0.95)
    torch.testing.assert_close(together[5:], alone, rtol=0, atol=0)
    assert not together.requires_grad


def test_token_rewards_by_hand() -> None:
    kl_C, offsets = f64(0.5, -1.0, 2.0), torch.tensor([0, 2, 3])
    scores = policy.episode_scores(f64(12.0, -3.0), torch.tensor([True, False]), missing_eos_penalty=1.0, clip=10.0)
    assert scores.tolist() == [10.0, -4.0]  # clipped; cut off
    rewards = policy.token_rewards(kl_C, scores, offsets, kl_coef=0.1)
    assert rewards.tolist() == pytest.approx([-0.05, 0.1 + 10.0, -0.2 - 4.0])


def test_an_episode_is_worth_its_score_less_the_kl() -> None:
    kl_C, scores = randn(1, 11), randn(2, 3)
    rewards = policy.token_rewards(kl_C, scores, OFFSETS, kl_coef=0.3)
    for n, (start, end) in enumerate(itertools.pairwise(OFFSETS)):
        assert rewards[start:end].sum().item() == pytest.approx((scores[n] - 0.3 * kl_C[start:end].sum()).item())


def test_an_empty_completion_is_refused() -> None:
    with pytest.raises(AssertionError, match="must have a token"):
        policy.token_rewards(f64(1.0), f64(1.0, 2.0), torch.tensor([0, 0, 1]), 0.1)


def test_ppo_equals_trl() -> None:
    settings, expected = PPO["settings"], {k: torch.tensor(v, dtype=torch.float64) for k, v in PPO["expected"].items()}
    names = ("logprobs", "ref_logprobs", "values", "new_logprobs", "new_values")
    logp, ref, values, new_logp, new_values = (torch.tensor(PPO[name], dtype=torch.float64).flatten() for name in names)
    offsets = torch.arange(0, logp.numel() + 1, len(PPO["values"][0]))
    close = torch.testing.assert_close

    rewards = policy.token_rewards(kl.k1(logp, ref), f64(*PPO["scores"]), offsets, settings["kl_coef"])
    close(rewards, expected["rewards"].flatten())
    advantages, returns = policy.gae(rewards, values, offsets, settings["gamma"], settings["lam"])
    close(returns, expected["returns"].flatten())
    advantages = masked.whiten(advantages)
    close(advantages, expected["advantages"].flatten())

    new_logp.requires_grad_()
    new_values.requires_grad_()
    loss, clipped = policy.clipped_policy_loss(new_logp, logp, advantages, settings["clip"])
    close(loss.mean(), expected["pg_loss"])
    close(clipped.double().mean(), expected["pg_clipfrac"].double(), atol=1e-6, rtol=0)
    value_loss, value_clipped = policy.clipped_value_loss(new_values, values, returns, settings["value_clip"])
    close(value_loss.mean(), expected["vf_loss"])
    close(value_clipped.double().mean(), expected["vf_clipfrac"].double(), atol=1e-6, rtol=0)
    grads = torch.autograd.grad(loss.mean() + value_loss.mean(), (new_logp, new_values))
    close(grads[0], expected["grad_new_logprobs"].flatten())
    close(grads[1], expected["grad_new_values"].flatten())
    assert 0 < clipped.double().mean() < 1
    assert 0 < value_clipped.double().mean() < 1


def test_policy_clip_by_hand() -> None:
    # ratios 2, 2, 1/2, 1/2 with advantages +1, -1, +1, -1 and clip 0.2: the clip acts where the move already went the
    # advantage's way, and never where the move was a mistake.
    ratio = f64(2, 2, 0.5, 0.5)
    logp = ratio.log().requires_grad_()
    loss, clipped = policy.clipped_policy_loss(logp, torch.zeros(4), f64(1, -1, 1, -1), clip=0.2)
    assert loss.tolist() == pytest.approx([-1.2, 2.0, -0.5, 0.8])
    assert clipped.tolist() == [True, False, False, True]
    loss.sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([0.0, 2.0, -0.5, 0.0])


def test_policy_loss_on_policy_is_the_policy_gradient() -> None:
    logp, advantages = randn(1, 8).requires_grad_(), randn(2, 8)
    loss, clipped = policy.clipped_policy_loss(logp, logp.detach(), advantages, clip=0.2)
    torch.testing.assert_close(loss.detach(), -advantages)
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    torch.testing.assert_close(grad, -advantages)
    assert not clipped.any()


def test_policy_loss_stays_finite_far_out() -> None:
    logp = torch.tensor([500.0, -500.0])
    assert policy.clipped_policy_loss(logp, torch.zeros(2), torch.tensor([-3.0, 3.0]), 0.2)[0].isfinite().all()


def test_value_clip_by_hand() -> None:
    # Old value 0, clip 0.2. Return 1, value 0.6: held at 0.2, error 0.8 > 0.4: clipped, loss 0.32, no gradient.
    # Return -1, value 0.6: free error 1.6 > 1.2: loss 1.28, gradient 1.6.
    value = f64(0.6, 0.6).requires_grad_()
    loss, clipped = policy.clipped_value_loss(value, f64(0, 0), f64(1, -1), clip=0.2)
    assert loss.tolist() == pytest.approx([0.32, 1.28])
    assert clipped.tolist() == [True, False]
    loss.sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == pytest.approx([0.0, 1.6])


def test_policy_gradients_by_finite_differences() -> None:
    new, old, target = randn(1, 9).requires_grad_(), randn(2, 9), randn(3, 9)
    assert gradcheck(lambda x: policy.clipped_policy_loss(x, old, target, 0.2)[0], new)
    assert gradcheck(lambda x: policy.clipped_value_loss(x, old, target, 0.2)[0], new)


def test_packed_tokens_and_a_padded_grid_give_the_same_losses() -> None:
    """The padding holds garbage, as peers' does; over a mask the grid's means and gradients are the packed row's."""
    lengths = OFFSETS.diff()
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    packed = [randn(seed, int(OFFSETS[-1])) for seed in range(3)]
    grids = [torch.full(mask.shape, junk, dtype=torch.float64) for junk in (float("nan"), 1e9, -7.0)]
    for grid, x in zip(grids, packed, strict=True):
        grid[mask] = x
    row, grid = packed[0].requires_grad_(), grids[0].requires_grad_()
    for function in (policy.clipped_policy_loss, policy.clipped_value_loss):
        loss_C, clipped_C = function(row, *packed[1:], 0.2)
        loss, clipped = function(grid, *grids[1:], 0.2)
        torch.testing.assert_close(masked.masked_mean(loss, mask), loss_C.mean())
        torch.testing.assert_close(masked.masked_mean(clipped.double(), mask), clipped_C.double().mean())
        (expected,) = torch.autograd.grad(loss_C.mean(), row)
        (found,) = torch.autograd.grad(masked.masked_mean(loss, mask), grid)
        torch.testing.assert_close(found[mask], expected)


def test_entropy_bonus_lowers_the_loss_of_the_undecided() -> None:
    assert policy.entropy_bonus(f64(2.0, 0.5), 0.1).tolist() == pytest.approx([-0.2, -0.05])


def test_explained_variance_by_hand() -> None:
    returns = f64(1, 2, 3, 4)
    assert policy.explained_variance(returns + 5, returns).item() == pytest.approx(1.0)  # a shift is not variance
    assert policy.explained_variance(f64(9, 9, 9, 9), returns).item() == pytest.approx(0.0)
    assert policy.explained_variance(-returns, returns).item() == pytest.approx(-3.0)  # Var[2 r] = 4 Var[r]
    for constant, count in ((0.1, 4), (0.1, 7), (1e4 + 0.3, 11), (0.7, 13)):  # rounding gives some of them a variance
        assert policy.explained_variance(randn(0, count).float(), torch.full((count,), constant)).item() == 0.0


# ------------------------------------------------------------------------------------------------------------- kl


def test_kl_estimators_by_hand() -> None:
    # A token twice as probable under the policy: log-ratio ln 2.
    p, ref = f64(math.log(0.5)), f64(math.log(0.25))
    assert kl.k1(p, ref).item() == pytest.approx(math.log(2))
    assert kl.k2(p, ref).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl.k3(p, ref).item() == pytest.approx(0.5 - 1 + math.log(2))
    assert kl.k1(p, p).item() == kl.k2(p, p).item() == kl.k3(p, p).item() == 0.0


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    """Exact expectations over a small vocabulary, no sampling: sum_v p_v k(v) against the KL's definition."""
    p, ref = torch.softmax(randn(1, 7), 0), torch.softmax(randn(2, 7), 0)
    truth = (p * (p / ref).log()).sum().item()
    assert (p * kl.k1(p.log(), ref.log())).sum().item() == pytest.approx(truth)
    assert (p * kl.k3(p.log(), ref.log())).sum().item() == pytest.approx(truth)
    assert (p * kl.k2(p.log(), ref.log())).sum().item() != pytest.approx(truth, rel=0.02)


def test_k3_is_never_negative_and_exact_near_zero() -> None:
    p = randn(1, 1000).float()
    assert kl.k3(p, p + randn(2, 1000).float() * 3).min() >= 0
    # (r - 1) - log r = x^2 / 2 for small x; a plain exp(x) - 1 would lose it to rounding in float64.
    assert kl.k3(f64(0.0), f64(1e-8)).item() == pytest.approx(5e-17, rel=1e-2, abs=0)


def test_adaptive_kl_by_hand() -> None:
    controller = kl.AdaptiveKl(coef=0.1, target=6.0, horizon=1000)
    controller.update(6.6, episodes=500)  # error 0.1 of which half
    assert controller.coef == pytest.approx(0.1 * 1.05)
    controller.update(60.0, episodes=1000)  # error clipped to 0.2
    assert controller.coef == pytest.approx(0.1 * 1.05 * 1.2)
    controller.update(0.0, episodes=50_000)  # error clipped to -0.2, episodes to the horizon
    assert controller.coef == pytest.approx(0.1 * 1.05 * 1.2 * 0.8)
    before = controller.coef
    controller.update(6.0, episodes=1000)
    assert controller.coef == before


def test_adaptive_kl_steers_a_plant_to_its_target() -> None:
    """A stand-in for PPO whose KL falls as the coefficient rises: from both sides it ends at the target."""
    for start in (0.001, 10.0):
        controller = kl.AdaptiveKl(coef=start, target=5.0, horizon=1000)
        for _ in range(400):
            controller.update(1.0 / controller.coef, episodes=256)
        assert 1.0 / controller.coef == pytest.approx(5.0, rel=0.01)


def test_kl_controllers_resume() -> None:
    adaptive = kl.AdaptiveKl(0.1, 6.0, 1000)
    adaptive.update(9.0, 256)
    resumed = kl.AdaptiveKl(0.1, 6.0, 1000)
    resumed.load_state_dict(json.loads(json.dumps(adaptive.state_dict())))
    for controller in (adaptive, resumed):
        controller.update(3.0, 256)
    assert adaptive.coef == resumed.coef
    fixed = kl.FixedKl(0.2)
    fixed.update(100.0, 256)
    assert fixed.coef == 0.2
    assert fixed.state_dict() == {"coef": 0.2}


def test_adaptive_kl_refuses_to_start_at_zero() -> None:
    with pytest.raises(UserError, match=r"kl\.coef"):
        kl.AdaptiveKl(0.0, 6.0, 1000)
