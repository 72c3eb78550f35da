"""The preference losses: against TRL's numbers, worked by hand, by their symmetries and limits; their settings; and how
a DPO stage computes what belongs to a whole step."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from pydantic import ValidationError
from tiny import preferences, prompt, tiny_llama
from torch import Tensor

from keel.objective.preference import (
    Logps,
    RunningMean,
    imitation,
    kl_anchor,
    label_weights,
    log_odds,
    pair_loss,
    reply_loss,
    rewards,
)
from keel.recipe.dpo import DpoStage
from keel.recipe.preference_loss import PRESETS
from keel.recipe.sections import DataConfig, ModelConfig, OptimConfig
from keel.run import RunDir, Silent
from keel.train.context import TrainContext
from keel.train.dpo import Dpo, train_dpo
from keel.train.loop import Algorithm
from keel.train.mismatched import Stranger, mismatched
from keel.train.pairs import Pair
from keel.types import Encoded, Preference, PreferenceLoss, UserError

TRL = json.loads((ROOT / "tests" / "data" / "trl_preference_family.json").read_text())
ADDITIVE = ("logistic", "hinge", "one_minus_sigmoid")


def stage(**settings: Any) -> DpoStage:
    return DpoStage(name="dpo", **settings)


def form_of(**settings: Any) -> PreferenceLoss:
    return stage(**settings).preference_loss()


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two(policy: list[float], reference: list[float], tokens: list[int]) -> tuple[Logps, Logps]:
    """One pair: (chosen, rejected) each."""
    chosen, rejected = (
        Logps(*(torch.tensor([x[i]], dtype=torch.float64) for x in (policy, tokens, reference))) for i in (0, 1)
    )
    return chosen, rejected


def several(seed: int, n: int = 6) -> tuple[Logps, Logps]:
    sides = [Logps(-randn(seed + i, n).abs() * 8, torch.arange(1, n + 1) + i, -randn(seed + 9 + i, n).abs() * 8)
             for i in (0, 1)]  # fmt: skip
    return sides[0], sides[1]


# ------------------------------------------------------------------------------------------------------------ TRL

SETTINGS: dict[str, dict[str, Any]] = {
    "dpo, length mean": {"loss": "dpo", "length": "mean", "beta": 5.0},
    "dpo, link hinge": {"loss": "dpo", "link": "hinge"},
    "ipo, length mean": {"loss": "ipo", "length": "mean"},
    "bco, anchor none": {"loss": "bco", "anchor": "none"},
    "kto, KL below 0": {"loss": "kto"},
    "apo_zero, unpaired": {"loss": "apo_zero"},
}


def trl_batch() -> tuple[Logps, Logps]:
    def side(which: str) -> Logps:
        sums = [[sum(pair[f"{who}_{which}"]) for pair in TRL["pairs"]] for who in ("policy", "ref")]
        tokens = [len(pair[f"policy_{which}"]) for pair in TRL["pairs"]]
        policy = torch.tensor(sums[0], dtype=torch.float64).requires_grad_()
        return Logps(policy, torch.tensor(tokens), torch.tensor(sums[1], dtype=torch.float64))

    return side("chosen"), side("rejected")


@pytest.mark.parametrize("name", TRL["losses"])
def test_losses_and_gradients_equal_trl(name: str) -> None:
    form = form_of(**SETTINGS.get(name, {"loss": name}))
    chosen, rejected = trl_batch()
    right = torch.ones(len(TRL["pairs"]), dtype=torch.float64)
    right = label_weights(right, form.labels, form.label_noise)
    policy, reference = (torch.tensor(x) for x in TRL["kl"]["below" if name.endswith("below 0") else "above"])
    anchor = kl_anchor(policy - reference) if form.anchor == "kl" else 0.0
    if name == "kto":
        assert anchor == pytest.approx((1.25 + 1.5 + 0.75) / 3)
    loss = pair_loss(form, chosen, rejected, right, anchor=anchor).mean()
    if form.sft_coef:
        nll, tokens = imitation(chosen, rejected, right)
        loss = loss + form.sft_coef * nll.sum() / tokens.sum()
    if form.anchor == "kl" or name == "apo_zero, unpaired":  # TRL means over both replies of every pair
        loss = loss / 2
        single = [reply_loss(form, side, good, anchor) for side, good in ((chosen, right), (rejected, 1 - right))]
        torch.testing.assert_close(torch.cat(single).mean(), loss)
    expected = TRL["losses"][name]
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5, abs=1e-5)
    grads = torch.autograd.grad(loss, (chosen.policy_N, rejected.policy_N))
    for grad, side in zip(grads, ("chosen", "rejected"), strict=True):
        assert grad.tolist() == pytest.approx(expected[f"grad_{side}"], rel=1e-5, abs=1e-5)


def test_every_preset_that_trl_has_is_there() -> None:
    without = {"cdpo", "ipo", "slic", "odpo", "r_dpo", "bco", "sigmoid"}  # or with another choice of the recipe's
    assert {name for name in TRL["losses"] if "," not in name} == set(PRESETS) - without


# ----------------------------------------------------------------------------------------------------------- by hand


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ls(x: float) -> float:
    return math.log(sigmoid(x))


def odds(logp: float) -> float:
    return logp - math.log(1 - math.exp(logp))


Q = sigmoid(0.3)
# The chosen reply has 4 tokens, log p = -3 and log p_ref = -5; the rejected one 2, -6 and -5: log-ratios 2 and -1.
BY_HAND = {
    "dpo": -ls(0.3),
    "sigmoid": -ls(0.3),
    "cdpo": -0.9 * ls(0.3) - 0.1 * ls(-0.3),
    "robust": (-0.9 * ls(0.3) + 0.1 * ls(-0.3)) / 0.8,
    "ipo": (3 - 5) ** 2,
    "slic": 0.0 + 0.1 * 3 / 4,  # it leads by 3 nats, and 1 is asked
    "simpo": -ls(2 * (-3 / 4 + 6 / 2) - 1),
    "cpo": -ls(0.3) + 3 / 4,
    "orpo": -0.1 * ls(odds(-3 / 4) - odds(-6 / 2)) + 3 / 4,
    "irpo": -ls(0.3) + 3 / 4,
    "odpo": -ls(0.3 - 2),  # a vote of strength 2
    "r_dpo": -ls(0.3 + 0.05 * 2),
    "exo": Q * math.log(Q / 0.999) + (1 - Q) * math.log((1 - Q) / 0.001),
    "nca": -ls(0.02) - 0.5 * ls(-0.02) - 0.5 * ls(0.01),
    "bco": -ls(0.01 * (2 - 0.5)) - ls(0.01 * (0.5 + 1)),  # the anchor at half a nat
    "apo_zero": 1 - sigmoid(0.2) + sigmoid(-0.1),
    "apo_down": sigmoid(0.2) + 1 - sigmoid(0.3),
    "kto": 1 - sigmoid(0.1 * (2 - 0.5)) + 1 - sigmoid(0.1 * (0.5 + 1)),
    "sppo": (2 - 500) ** 2 + (-1 + 500) ** 2,
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_pair_by_hand(name: str) -> None:
    form = form_of(loss=name)
    chosen, rejected = two([-3, -6], [-5, -5], [4, 2])
    right = label_weights(torch.ones(1, dtype=torch.float64), form.labels, form.label_noise)
    anchor = 0.5 if form.anchor != "none" else 0.0
    loss = pair_loss(form, chosen, rejected, right, torch.tensor([2.0], dtype=torch.float64), anchor)
    nll, tokens = imitation(chosen, rejected, right)
    assert (loss + form.sft_coef * nll / tokens).item() == pytest.approx(BY_HAND[name], rel=1e-9)


def test_links_by_hand() -> None:
    chosen, rejected = two([-3, -6], [-5, -5], [4, 2])  # h = 3
    one = torch.ones(1, dtype=torch.float64)

    def loss(right: float, **settings: Any) -> float:
        return pair_loss(form_of(**settings), chosen, rejected, right * one).item()

    assert loss(1, link="hinge") == pytest.approx(1 - 0.3)
    assert loss(0, link="hinge") == pytest.approx(1 + 0.3)
    assert loss(1, link="hinge", margin=0.5) == pytest.approx(1 - 0.3 + 0.5)
    assert loss(1, link="one_minus_sigmoid") == pytest.approx(1 - sigmoid(0.3))
    assert loss(0.75, loss="ipo") == pytest.approx((3 - 0.25 / 0.1) ** 2)  # the target is (P - 1/2) / beta
    assert loss(0.5, loss="ipo") == pytest.approx(9)
    assert loss(1, loss="ipo", margin=0.25) == pytest.approx((3 - (0.5 + 0.25) / 0.1) ** 2)
    assert loss(1, loss="dpo", reference="none") == pytest.approx(-ls(0.3))
    assert loss(1, loss="dpo", length="mean", beta=4) == pytest.approx(-ls(4 * (2 / 4 + 1 / 2)))


def test_labels_by_hand() -> None:
    probability = torch.tensor([1.0, 0.5, 0.2, 0.0], dtype=torch.float64)
    assert label_weights(probability, "soft").tolist() == [1.0, 0.5, 0.2, 0.0]
    assert label_weights(probability, "hard").tolist() == [1.0, 0.5, 0.0, 0.0]
    assert label_weights(probability, "smoothed", 0.1).tolist() == pytest.approx([0.9, 0.5, 0.26, 0.1])
    assert label_weights(probability, "debiased", 0.1).tolist() == pytest.approx([1.125, 0.5, 0.125, -0.125])


def test_dpo_is_to_the_bit_what_it_was() -> None:
    """The lines of Keel 0.1 for ``loss: sigmoid`` and ``length_normalised``, in float32."""
    chosen, rejected = (Logps(*(x.float() if x.is_floating_point() else x for x in side)) for side in several(3, 64))
    tie = torch.arange(64) % 5 == 0
    for normalised, beta in ((False, 0.1), (True, 2.0)):
        ends = []
        for old in (True, False):
            c, r = (side.policy_N.clone().requires_grad_() for side in (chosen, rejected))
            if old:
                ours, theirs = (c, r), (chosen.reference_N, rejected.reference_N)
                if normalised:
                    ours = (c / chosen.tokens_N.clamp(min=1), r / rejected.tokens_N.clamp(min=1))
                    theirs = (theirs[0] / chosen.tokens_N.clamp(min=1), theirs[1] / rejected.tokens_N.clamp(min=1))
                lead = beta * (ours[0] - theirs[0]) - beta * (ours[1] - theirs[1])
                right = torch.where(tie, 0.5, torch.full_like(lead, 1.0))
                zero = torch.zeros_like(lead)
                logsigmoid = torch.nn.functional.logsigmoid
                loss = -right * logsigmoid(lead - zero) - (1 - right) * logsigmoid(-lead - zero)
            else:
                form = form_of(length_normalised=normalised, beta=beta)
                right = label_weights(torch.where(tie, 0.5, torch.ones(64, dtype=torch.float64)), form.labels)
                sides = chosen._replace(policy_N=c), rejected._replace(policy_N=r)
                loss = pair_loss(form, *sides, right.float(), torch.zeros(64))
            ends.append((loss.detach(), *torch.autograd.grad(loss.sum(), (c, r))))
        for before, after in zip(*ends, strict=True):
            assert torch.equal(before, after)


# ------------------------------------------------------------------------------------------------ symmetries and limits


def with_margins(name: str) -> PreferenceLoss:
    """The preset with every margin that its contrast can have."""
    form = PRESETS[name]
    return form if form.pair == 0 else replace(form, margin=0.3, strength_margin=0.2, length_margin=0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_swapping_a_pair_is_turning_its_label_round(name: str) -> None:
    form, (chosen, rejected) = with_margins(name), several(20)
    right = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    strength = randn(5, 6).abs()
    there = pair_loss(form, chosen, rejected, right, strength, 0.2)
    back = pair_loss(form, rejected, chosen, 1 - right, strength, 0.2)
    torch.testing.assert_close(there, back)
    assert not torch.allclose(there, pair_loss(form, chosen, rejected, 1 - right, strength, 0.2))
    tie = torch.full_like(right, 0.5)
    torch.testing.assert_close(
        pair_loss(form, chosen, rejected, tie, strength, 0.2), pair_loss(form, rejected, chosen, tie, strength, 0.2)
    )
    for one, other in zip(imitation(chosen, rejected, right), imitation(rejected, chosen, 1 - right), strict=True):
        torch.testing.assert_close(one, other)


def gradient(form: PreferenceLoss, sides: tuple[Logps, Logps], right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c, r = (side.policy_N.clone().requires_grad_() for side in sides)
    loss = pair_loss(form, sides[0]._replace(policy_N=c), sides[1]._replace(policy_N=r), right)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (c, r))


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].link != "reverse_kl"])
def test_a_soft_label_is_the_mixture_of_both_labels(name: str) -> None:
    """Losses add up, but for squares, whose gradients do: their target is the expected one."""
    form, sides = with_margins(name), several(40)
    p = torch.linspace(-0.2, 1.2, 6, dtype=torch.float64)
    soft, up, down = (gradient(form, sides, x) for x in (p, torch.ones_like(p), torch.zeros_like(p)))
    for i in range(3):
        if i or form.link in ADDITIVE:
            torch.testing.assert_close(soft[i], p * up[i] + (1 - p) * down[i])


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].link != "reverse_kl"])
def test_debiased_labels_undo_flips_of_their_rate(name: str) -> None:
    """In expectation over labels that are flipped with probability e, the gradient is that of the true labels."""
    form, sides, e = with_margins(name), several(60), 0.2
    truth = torch.tensor([1.0, 1, 0, 1, 0, 1], dtype=torch.float64)
    kept, flipped = (gradient(form, sides, label_weights(x, "debiased", e)) for x in (truth, 1 - truth))
    clean = gradient(form, sides, truth)
    for i in (1, 2):
        torch.testing.assert_close((1 - e) * kept[i] + e * flipped[i], clean[i])


def at_margin(name: str, lead: float) -> tuple[float, float]:
    """(loss, its derivative) where the reward of the chosen reply leads by ``lead``."""
    form = form_of(loss=name)
    logp = torch.tensor([lead / form.beta], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    right = label_weights(torch.ones(1, dtype=torch.float64), form.labels, form.label_noise)
    loss = pair_loss(form, Logps(logp, zero, zero), Logps(zero, zero, zero), right)
    (grad,) = torch.autograd.grad(loss, logp)
    return loss.item(), grad.item() / form.beta


def test_what_the_noisy_losses_do_far_out() -> None:
    # Debiased labels pay for ever more distance; smoothed ones stop at log((1 - e) / e).
    assert [round(at_margin("robust", lead)[0], 2) for lead in (2, 5, 20, 100)] == [-0.12, -0.62, -2.5, -12.5]
    assert at_margin("cdpo", math.log(9))[1] == pytest.approx(0)
    assert at_margin("cdpo", 2)[1] < 0 < at_margin("cdpo", 2.4)[1]
    # At the start EXO pulls 3.5 times as hard as DPO, so betas and learning rates are not comparable.
    assert at_margin("exo", 0)[1] == pytest.approx(-1.7267, abs=1e-4)
    assert at_margin("dpo", 0)[1] == pytest.approx(-0.5)
    assert at_margin("exo", math.log(999))[1] == pytest.approx(0)  # the label's own odds


def test_a_longer_chosen_reply_needs_less_of_the_policy_under_r_dpo() -> None:
    one = torch.ones(1, dtype=torch.float64)
    pulls = []
    for tokens in ([9, 3], [3, 3], [3, 9]):
        loss, grad, _ = gradient(form_of(loss="r_dpo"), two([-3, -6], [-5, -5], tokens), one)
        pulls.append(-grad.item())
        assert loss.item() == pytest.approx(-ls(0.3 + 0.05 * (tokens[0] - tokens[1])))
    assert pulls[0] < pulls[1] < pulls[2]


def test_no_nll_makes_a_reply_less_likely() -> None:
    chosen, rejected = two([-3, -6], [-5, -5], [4, 2])
    for right, nll, tokens in ((1.0, 3, 4), (0.0, 6, 2), (0.5, 4.5, 3), (1.125, 3, 4), (-0.125, 6, 2)):
        found = imitation(chosen, rejected, torch.tensor([right], dtype=torch.float64))
        assert [x.item() for x in found] == [nll, tokens]


@pytest.mark.parametrize("name", PRESETS)
def test_losses_and_gradients_are_finite_far_out_in_float32(name: str) -> None:
    form = PRESETS[name]
    far = torch.tensor([-1e4, -1e-9, 0.0, -1e-9, -1e4, -30.0])
    tokens, reference = torch.tensor([1, 9, 2, 1, 500, 1]), torch.tensor([-1.0, -1e4, 0.0, -2.0, -3.0, -1e4])
    for chosen, rejected in ((far, far.flip(0)), (far, far), (far.flip(0), far)):
        sides = Logps(chosen, tokens, reference), Logps(rejected, tokens.flip(0), reference.flip(0))
        for right in (label_weights(torch.ones(6), form.labels, form.label_noise), torch.full((6,), 0.5)):
            for found in gradient(form, sides, right):
                assert found.dtype == torch.float32
                assert found.isfinite().all()


def test_log_odds_keep_their_precision_near_one() -> None:
    # 1 - exp(-1e-5) is 0.99999e-5: in float32 a plain 1 - exp would be off by a third of a per cent.
    logp = torch.tensor([-1e-5, -math.log(2), -20.0])
    assert log_odds(logp).tolist() == pytest.approx([-math.log(1e-5), 0.0, -20.0], rel=1e-5, abs=1e-6)


def test_the_anchors() -> None:
    assert kl_anchor(torch.tensor([1.0, -4.0, 6.0])) == 1.0
    assert kl_anchor(torch.tensor([1.0, -4.0])) == 0.0
    assert kl_anchor(torch.tensor([])) == 0.0
    mean = RunningMean()
    assert mean.value == 0.0
    mean.add(3.0, 2)
    resumed = RunningMean()
    resumed.load_state_dict(json.loads(json.dumps(mean.state_dict())))
    resumed.add(-1.0, 2)
    assert resumed.value == 0.5


def test_a_loss_that_contrasts_needs_two_replies() -> None:
    with pytest.raises(AssertionError, match="compares two replies"):
        reply_loss(PRESETS["dpo"], several(1)[0], torch.ones(6))
    assert [name for name, form in PRESETS.items() if form.unpaired] == ["nca", "bco", "apo_zero", "kto", "sppo"]


def test_a_single_reply_is_half_of_a_pair() -> None:
    chosen, rejected = several(80)
    right = torch.linspace(0, 1, 6, dtype=torch.float64)
    for name in ("nca", "bco", "apo_zero", "kto", "sppo"):
        form = PRESETS[name]
        apart = reply_loss(form, chosen, right, 0.3) + reply_loss(form, rejected, 1 - right, 0.3)
        torch.testing.assert_close(pair_loss(form, chosen, rejected, right, anchor=0.3), apart)


# ----------------------------------------------------------------------------------------------------------- settings

OLD = {"loss": "sigmoid", "beta": 0.1, "length_normalised": False, "label_smoothing": 0.0, "reference": None}
OLD_KEYS = {
    "kind", "model", "optim", "batch_tokens", "precision", "gradient_checkpointing", "compile", "ptx", "preferences",
    "voters", "votes", "reference", "epochs", "batch_size", "beta", "loss", "length_normalised", "label_smoothing",
    "heldout_fraction",
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "old"),
    [
        ({}, {}),
        ({"loss": "dpo"}, {}),
        ({"loss": "sigmoid", "label_smoothing": 0.0}, {}),
        ({"loss": "sigmoid", "reference": "sft"}, {"reference": "sft"}),
        ({"loss": "ipo"}, {"loss": "ipo"}),
        ({"length_normalised": True, "beta": 2.0}, {"length_normalised": True, "beta": 2.0}),
        ({"length": "mean", "beta": 2.0}, {"length_normalised": True, "beta": 2.0}),
        ({"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ({"loss": "cdpo"}, {"label_smoothing": 0.1}),
        ({"labels": "smoothed", "label_noise": 0.2, "sft_coef": 0.0}, {"label_smoothing": 0.2}),
    ],
)
def test_what_keel_had_before_is_said_as_it_was_then(settings: dict[str, Any], old: dict[str, Any]) -> None:
    """So that runs made then still stand, whatever the loss is called now."""
    said = stage(**settings).settings()
    assert set(said) == OLD_KEYS
    assert said["model"] == "sft"
    assert {name: said[name] for name in OLD} == OLD | old


def test_what_is_new_is_said_by_what_it_computes() -> None:
    same = stage(loss="dpo", reference="none", beta=2.0, length="mean", margin=1.0)
    assert same.preference_loss() == PRESETS["simpo"]
    assert stage(loss="simpo", reference="none").settings() == same.settings()
    assert stage(loss="simpo").settings() != stage(loss="simpo", margin=0.5).settings()
    assert "preference_loss" in stage(labels="hard").settings()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"label_noise": 0.1}, "label_noise is read by labels: smoothed"),
        ({"loss": "exo", "labels": "soft"}, "the reverse KL from a label that is sure is infinite; set labels"),
        ({"loss": "exo", "label_noise": 0.0}, "the reverse KL from a label that is sure"),
        ({"loss": "exo", "labels": "debiased"}, "the reverse KL from a label that is sure"),
        ({"link": "reverse_kl"}, "the reverse KL from a label that is sure"),
        ({"loss": "orpo", "reference": "sft"}, "orpo takes the odds of a probability"),
        ({"loss": "kto", "reference": "none"}, "kto asks whether a reply became likelier than under the reference"),
        ({"loss": "bco", "margin": 1.0}, "margin is between two replies, and bco judges each by itself"),
        ({"loss": "kto", "length_margin": 1.0}, "length_margin is between two replies"),
        ({"loss": "nca", "link": "hinge"}, "nca has a link of its own"),
        ({"loss": "bco", "pair_weight": 1.0}, "bco has weights of its own; leave pair_weight out"),
        ({"anchor": "kl"}, "anchor is what single replies are measured from"),
        ({"length_normalised": True, "length": "sum"}, "length_normalised is an older name for length"),
        ({"label_smoothing": 0.1, "labels": "hard"}, "label_smoothing is an older name for labels and label_noise"),
        ({"label_smoothing": 0.1, "label_noise": 0.2}, "label_smoothing is an older name"),
        ({"loss": "dpo2"}, "Input should be"),
        ({"label_noise": 0.5, "labels": "debiased"}, "less than 0.5"),
    ],
)
def test_what_does_not_fit_together_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError) as error:
        stage(**settings)
    assert problem in str(error.value)


def test_presets_fill_what_is_left_open() -> None:
    assert form_of(loss="simpo", beta=10.0) == replace(PRESETS["simpo"], beta=10.0)
    assert form_of(loss="slic", reference="sft", sft_coef=0.0, beta=0.05).reference  # RSO
    assert form_of(labels="debiased").label_noise == 0.1
    assert form_of(loss="cdpo", labels="debiased") == PRESETS["robust"]
    assert form_of(loss="cdpo", labels="hard").label_noise == 0.0
    assert form_of(loss="orpo", pair_weight=0.5).pair == 0.5
    assert stage(loss="simpo").compares() is None
    assert stage(loss="dpo", reference="none").compares() is None
    assert [r.place for r in stage(loss="dpo", reference="none").references()] == ["model"]
    assert stage(model="a", reference="b").compares() == ("a", "b")


def test_the_choices_are_said_in_a_line() -> None:
    assert stage(loss="simpo").resolved() == (
        "loss simpo, reward 2 x log-probability a token, no reference, link logistic, two replies contrasted, "
        "labels soft, margin 1"
    )
    assert stage(loss="kto").resolved() == (
        "loss kto, reward 0.1 x log-ratio a reply, reference sft, link one_minus_sigmoid, each reply by itself, from "
        "anchor kl, labels soft"
    )
    assert "link square (target 500 nats)" in stage(loss="sppo").resolved()
    assert "log-odds a token, no reference, link logistic, two replies contrasted, times 0.1" in (
        stage(loss="orpo").resolved()
    )
    assert "labels smoothed at 0.001" in stage(loss="exo").resolved()


@pytest.mark.parametrize(
    ("settings", "warnings"),
    [
        *[({"loss": name}, []) for name in PRESETS],  # no preset warns of itself
        ({"length": "mean"}, ["beta 0.1 is one for sums over a reply"]),
        ({"loss": "ipo", "length": "mean"}, ["it draws replies 5 nats a token apart"]),
        ({"loss": "simpo", "length": "sum"}, ["beta 2 is one for nats a token"]),
        ({"beta": 5.0}, ["beta 5 is one for nats a token"]),
        ({"loss": "simpo", "margin": 4.0}, ["margin 4 asks for a lead of 2 nats a token"]),
        ({"loss": "robust", "epochs": 3}, ["no least loss, and 3 epochs push on and on"]),
        ({"loss": "robust", "link": "square", "epochs": 3}, []),
    ],
)
def test_the_check_warns_of_scales(settings: dict[str, Any], warnings: list[str]) -> None:
    found = [doubt.sentence for doubt in stage(**settings).doubts("fp32")]
    assert len(found) == len(warnings)
    assert all(words in sentence for words, sentence in zip(warnings, found, strict=True))


def test_the_page_of_recipes_has_every_preset_with_its_defaults() -> None:
    rows = {
        line.split("|")[1].strip(" `"): line
        for line in (ROOT / "docs" / "recipes.md").read_text().splitlines()
        if line.startswith("| `")
    }
    for name, form in PRESETS.items():
        if name != "sigmoid":
            assert f"β {form.beta:g}" in rows[name], name


# ---------------------------------------------------------------------------------------------------- a step as a whole


def context(tmp: Path, name: str, model: Path = Path("none")) -> TrainContext:
    folder = RunDir(tmp / "run").stage(name)
    folder.begin(name)
    return TrainContext(folder, Silent(), model, ModelConfig(path=str(model)), DataConfig(), "cpu", "fp32", 0)


def encoded_pairs(count: int) -> list[Pair]:
    """Pairs of random tokens, two to a prompt, with ties, soft labels, weights and numbers of a reference."""
    draw = torch.Generator().manual_seed(7)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, 250, (n,), generator=draw).tolist())

    pairs = []
    for i in range(count):
        asked = ids(5) if i % 2 == 0 else pairs[-1].prompt_ids
        record = Preference(
            str(i), prompt(i // 2), "a", "b", tie=i == 3, weight=1.0 + i % 3, probability=0.8 if i == 4 else None
        )
        chosen, rejected = (Encoded.of(asked, ids(3 + (i * k) % 7)) for k in (2, 3))
        pairs.append(Pair(record, chosen, rejected, reference=(-40.0, -42.0)))
    others = mismatched([pair.chosen for pair in pairs], 100, seed=0)
    return [
        replace(pair, stranger=Stranger(row, -60.0)) for pair, row in zip(pairs, others, strict=True) if row is not None
    ]


def trained_once(algorithm: Algorithm, iteration: int = 0) -> tuple[float, Tensor, int]:
    """(loss, gradient, micro-batches) of one step, without moving the weights."""
    model = algorithm.modules["policy"]
    model.zero_grad()
    total = 0.0
    for micros in algorithm.updates(iteration):
        for micro in micros:
            loss, _ = micro()
            loss.backward()
            total += loss.item()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return total, torch.cat(grads).clone(), len(micros)


@pytest.mark.parametrize("loss", ["dpo", "orpo", "bco", "kto"])
def test_how_a_step_is_cut_changes_nothing(loss: str, tmp_path: Path) -> None:
    pairs, model = encoded_pairs(8), tiny_llama()
    ends = []
    for batch_tokens in (100_000, 40):
        config = stage(loss=loss, batch_size=8, batch_tokens=batch_tokens, epochs=2)
        algorithm = Dpo(model, [[pair] for pair in pairs], [], config, context(tmp_path, f"{loss}_{batch_tokens}"))
        first, second = trained_once(algorithm), trained_once(algorithm, 1)
        assert (first[2] > 3) == (batch_tokens == 40)
        ends.append((first, second, algorithm.state_dict()))
        if loss == "kto":
            assert algorithm.anchor > 0
        if loss == "bco":  # the second step is measured from the first one's mean
            assert algorithm.mean.count == 4 * sum(pair.record.weight for pair in pairs)
            assert abs(second[0] - first[0]) > 1e-4
    for whole, cut in zip(ends[0][:2], ends[1][:2], strict=True):
        assert whole[0] == pytest.approx(cut[0], abs=1e-5)
        torch.testing.assert_close(whole[1], cut[1], rtol=1e-4, atol=1e-6)


def test_a_resumed_stage_measures_from_the_same_mean(tmp_path: Path) -> None:
    pairs, config = encoded_pairs(6), stage(loss="bco", batch_size=6, epochs=3)
    algorithms = [Dpo(tiny_llama(), [[p] for p in pairs], [], config, context(tmp_path, name)) for name in ("a", "b")]
    trained_once(algorithms[0])
    algorithms[1].load_state_dict(json.loads(json.dumps(algorithms[0].state_dict())))
    one, other = (trained_once(algorithm, 1) for algorithm in algorithms)
    assert one[0] == other[0]
    assert Dpo(tiny_llama(), [pairs], [], stage(), context(tmp_path, "c")).state_dict() == {}


def test_a_mismatched_reply_is_never_of_its_own_prompt() -> None:
    rows = [pair.chosen for pair in encoded_pairs(20)]
    found = mismatched(rows, 100, seed=3)
    replies = {
        row.prompt_ids: [r.ids[len(row.prompt_ids) :] for r in rows if r.prompt_ids == row.prompt_ids] for row in rows
    }
    for row, other in zip(rows, found, strict=True):
        assert other is not None
        assert other.prompt_ids == row.prompt_ids
        assert other.ids[len(row.prompt_ids) :] not in replies[row.prompt_ids]
        assert other.predicted == len(other.ids) - len(row.prompt_ids)
    assert found == mismatched(rows, 100, seed=3) != mismatched(rows, 100, seed=4)
    assert mismatched(rows[:2], 100, seed=0) == [None, None]  # one prompt
    assert all(row is None or len(row.ids) <= 9 for row in mismatched(rows, 9, seed=0))


@pytest.fixture(scope="module")
def sft_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template."""
    from tiny import demonstrations, save_tiny

    from keel.recipe.sft import SftStage
    from keel.train.sft import train_sft

    tmp = tmp_path_factory.mktemp("sft")
    c = context(tmp, "sft", save_tiny(tmp / "base"))
    train_sft(SftStage(name="sft", optim=OptimConfig(lr=3e-3), batch_size=8), demonstrations(20), c)
    return c.stage.path


@pytest.mark.parametrize(
    ("loss", "figures"),
    [
        ("simpo", ()),
        ("orpo", ("nll_loss", "log_odds_chosen", "log_odds_ratio")),
        ("kto", ("kl", "kl_at_zero")),
        ("bco", ("delta",)),
    ],
)
def test_a_stage_learns(
    loss: str, figures: tuple[str, ...], sft_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, config = (
        context(tmp_path, "dpo", sft_model),
        stage(loss=loss, optim=OptimConfig(lr=3e-3), batch_size=8, epochs=2, heldout_fraction=0.2),
    )
    if config.compares() is None:  # nothing is loaded to compare with
        monkeypatch.setattr("keel.train.roles.Roles.reference", None)
    summary = train_dpo(config, preferences(50), sft_model if config.compares() else None, c)
    first, last = c.stage.metrics.rows()[0], c.stage.metrics.rows()[-1]
    assert set(figures) <= set(first)
    assert last["rewards/margins"] > first["rewards/margins"]
    assert summary["eval/rewards/accuracies"] > 0.8
    assert summary["choices"]["loss"] == loss
    assert (c.stage.path / "reference_logps.safetensors").exists() == (config.compares() is not None)
    if loss == "kto":
        assert first["kl"] == pytest.approx(0, abs=1e-4)
        assert last["kl"] > 0
        assert 0 <= summary["kl_at_zero"] < 1


def test_a_strength_margin_needs_strengths(sft_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pair says how much better its chosen reply is; give votes a strength"):
        train_dpo(stage(loss="odpo"), preferences(20), sft_model, context(tmp_path, "dpo", sft_model))


def test_soft_labels_reach_the_loss(tmp_path: Path) -> None:
    """A record's probability is its label; ``labels: hard`` rounds it; a tie is one half."""
    plain, names = encoded_pairs(4)[0], itertools.count()

    def loss(config: DpoStage, **changes: Any) -> float:
        pair = replace(plain, record=replace(plain.record, **changes))
        algorithm = Dpo(tiny_llama(), [[pair]], [], config, context(tmp_path, f"s{next(names)}"))
        return trained_once(algorithm)[0]

    sure, tie = loss(stage()), loss(stage(), tie=True)
    wrong = 2 * tie - sure  # the mixture of both labels in equal parts is the tie
    assert loss(stage(), probability=0.7) == pytest.approx(0.7 * sure + 0.3 * wrong)
    assert loss(stage(labels="hard"), probability=0.7) == pytest.approx(sure)
    assert loss(stage(labels="hard"), probability=0.3) == pytest.approx(wrong)
    assert loss(stage(loss="cdpo"), probability=0.7) == pytest.approx(0.66 * sure + 0.34 * wrong)
    odpo = stage(loss="odpo")
    assert loss(odpo, margin=2.0, tie=True) == pytest.approx(tie)  # a tie has no strength
    assert loss(odpo, margin=2.0) > sure
    assert rewards(PRESETS["dpo"], Logps(torch.tensor([-3.0]), torch.tensor([2]), torch.tensor([-5.0]))).item() == (
        pytest.approx(0.2)
    )
