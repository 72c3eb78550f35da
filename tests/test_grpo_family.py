"""GRPO's family: each name's loss and gradient against TRL's numbers and by hand, the identities that hold between the
choices, and that a split of a step changes nothing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

from keel.objective.group import each_normalised, group_advantages, step_advantages, token_weights, without_spread
from keel.objective.policy import StepValues, episode_scores, overlong_share
from keel.objective.ratio import TokenTerms, grpo_loss, sampler_weights
from keel.recipe.grpo import GrpoStage
from keel.recipe.grpo_presets import PresetName
from keel.train.grpo import Grpo
from keel.train.online import Batch
from keel.train.rollouts import Episodes
from keel.types import Encoded, UserError

TRL = json.loads((Path(__file__).parent / "data" / "trl_grpo_family.json").read_text())
PYTHON = {"source": {"kind": "python", "ref": "x:y"}}
NAMES = get_args(PresetName)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def stage(**settings: Any) -> GrpoStage:
    common = {"name": "grpo", "rewards": [PYTHON], "group_size": 4, "rollout_batch": 12}
    return GrpoStage.model_validate({**common, **settings})


# ------------------------------------------------------------------------- an algorithm on given log-probabilities


class Given:
    """Rollouts that are known."""

    def __init__(self, **columns: Any) -> None:
        self.policy, self.count = nn.Linear(1, 1), 1
        self.context = SimpleNamespace(device="cpu", seed=0)
        self.draws = SimpleNamespace(
            source=SimpleNamespace(prompts=[0]),
            scorer=None,
            config=stage(),
            context=self.context,
        )
        lengths = columns.pop("lengths")
        self.episodes = Episodes(
            rows=[Encoded.of((1,), (2,) * n) for n in lengths],
            offsets=torch.tensor([0, *lengths]).cumsum(0),
            value_C=None,
            figures={},
            **{"ref_logp_C": None, **columns},
        )

    def collect(self, iteration: int, values: Any = None, old_at_step: bool = False) -> Episodes:
        return self.episodes


def algorithm_of(config: GrpoStage, **columns: Any) -> Grpo:
    rollouts: Any = Given(**columns)
    return Grpo(rollouts, config)


def loss_of(algorithm: Grpo, batch: Batch, new_C: Tensor, shards: Sequence[Sequence[int]]) -> Tensor:
    """The loss of one optimizer step over the episodes of ``shards``, each a micro-batch."""
    new = new_C.split([column.numel() for column in batch.old_logp])
    step = sorted(i for shard in shards for i in shard)
    total = torch.zeros((), dtype=torch.float64)
    for shard in shards:
        tokens = algorithm._tokens(batch, shard, torch.cat([new[i] for i in shard]))
        total = total + algorithm.mean(batch, step, shard)(algorithm.policy_loss(tokens)[0])
    return total


def of_trl(config: GrpoStage, shift: float = 0.0) -> tuple[Grpo, Batch, Tensor]:
    columns = {f"{name}_logp_C": f64(*TRL[name]) for name in ("old", "ref")}
    algorithm = algorithm_of(config, lengths=TRL["lengths"], shaped_N=f64(*TRL["scores"]) + shift, **columns)
    return algorithm, algorithm.rollout(0), f64(*TRL["new"]).requires_grad_()


LONG = {"sampling": {"max_new_tokens": TRL["max_new_tokens"]}}
AS_TRL: dict[str, dict[str, Any]] = {
    "grpo": {"preset": "grpo"},
    "dr_grpo": {"preset": "dr_grpo"},
    "dapo": {"preset": "dapo", "no_spread": "keep"},  # TRL has no resampling
    "lite_ppo": {"preset": "lite_ppo"},
    "gspo": {"preset": "gspo", "minibatches": 2},
    "gspo_wide": {"preset": "gspo", "minibatches": 2, "clip_low": 0.02, "clip_high": 0.03, "beta": 0.04},
    "cispo": {"preset": "cispo"},
    "cispo_tight": {"preset": "cispo", "cap": 1.2, "beta": 0.04},
    "capped": {"preset": "dapo", "no_spread": "keep", "cap": 1.4},
    "unbiased": {"preset": "grpo", "kl": {"unbiased": True}},
    "unbiased_sequence": {
        "preset": "gspo",
        "minibatches": 2,
        "clip_low": 0.02,
        "clip_high": 0.03,
        "beta": 0.04,
        "kl": {"unbiased": True},
    },
}


@pytest.mark.parametrize("name", AS_TRL)
def test_a_presets_loss_gradient_and_figures_equal_trls(name: str) -> None:
    expected = TRL["expected"][name]
    algorithm, batch, new = of_trl(stage(**LONG, **AS_TRL[name]))
    loss = loss_of(algorithm, batch, new, [range(12)])
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5, abs=1e-7)
    (grad,) = torch.autograd.grad(loss, new)
    torch.testing.assert_close(grad, f64(*expected["grad"]), rtol=1e-5, atol=1e-7)
    figures = algorithm.policy_loss(algorithm._tokens(batch, range(12), new))[1]
    ours = {name: total / count for name, (total, count) in figures.items()}
    theirs = dict(expected["figures"])
    if "cispo_clip_ratio" in theirs:
        theirs["clip_ratio/high_mean"] = theirs.pop("cispo_clip_ratio")
    compared = [key for key in theirs if key in ours]
    assert compared
    if algorithm.config.ratio == "sequence":  # TRL counts replies there, Keel always tokens
        compared = [key for key in compared if not key.startswith("clip_ratio")]
    for key in compared:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6), key
    if name in ("dapo", "capped", "cispo_tight"):
        assert 0 < ours["clip_ratio/high_mean"] < 1


def test_rloos_advantages_and_gradient_equal_trls() -> None:
    """TRL's loss is of the whole reply's ratio and a mean over replies: on-policy its gradient is max_new_tokens times
    that of the sum over tokens by replies x max_new_tokens."""
    algorithm, batch, _ = of_trl(stage(**LONG, preset="rloo"))
    torch.testing.assert_close(
        torch.stack([column[0] for column in batch.advantage]), f64(*TRL["advantages_rloo"]["with_kl"])
    )
    old = f64(*TRL["old"]).requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(algorithm, batch, old, [range(12)]), old)
    torch.testing.assert_close(grad * TRL["max_new_tokens"], f64(*TRL["rloo"]["grad"]), rtol=1e-5, atol=1e-7)


def test_advantages_equal_trls_where_some_completions_tell_nothing() -> None:
    """What is left out is in no mean and no deviation, and its advantage is 0."""
    scores, valid = f64(*TRL["scores"]), torch.ones(12, dtype=torch.bool)
    valid[TRL["unscorable"]] = False
    gone = scores.clone()
    gone[~valid] = 1e6
    for scale, expected in TRL["advantages_with_gaps"].items():
        torch.testing.assert_close(group_advantages(gone, 4, scale, "group", valid), f64(*expected))
    torch.testing.assert_close(
        group_advantages(gone, 4, "none", "others", valid), f64(*TRL["advantages_rloo"]["with_gaps"])
    )
    for scale, expected in TRL["advantages"].items():
        torch.testing.assert_close(group_advantages(scores, 4, scale), f64(*expected))
        everyone = torch.ones(12, dtype=torch.bool)
        torch.testing.assert_close(group_advantages(scores, 4, scale, "group", everyone), f64(*expected))


def test_each_reward_by_itself_equals_trl() -> None:
    scores = torch.stack([f64(*TRL["scores"]), f64(*TRL["second"])], 1)
    found = each_normalised(scores, f64(*TRL["weights"]), 4)
    torch.testing.assert_close(found, f64(*TRL["advantages_of_each"]), rtol=1e-5, atol=1e-6)
    # A reward's unit does not count, as it does in a sum.
    stretched = scores * f64(1.0, 1000.0)
    torch.testing.assert_close(each_normalised(stretched, f64(*TRL["weights"]), 4), found, rtol=1e-3, atol=1e-3)


# ----------------------------------------------------------------------------------------------------------- by hand

# Two groups of two: scores 1, 0 | 1, 1; replies of 1, 2, 1, 1 tokens with ratios 1.5 | 0.5, 1 | 1 | 1. All old
# log-probabilities are -1, and so are the reference's. Of the first group mean 1/2, deviation sqrt(1/2); of all four
# deviation 1/2.
RATIOS = (1.5, 0.5, 1.0, 1.0, 1.0)
A = 0.5 / (math.sqrt(0.5) + 1e-4)
B = 0.5 / (0.5 + 1e-4)
LN = [math.log(ratio) for ratio in RATIOS]
KL = 0.04 * ((1 / 1.5 - 1 + LN[0]) / 4 + (2 - 1 + LN[1]) / 8)  # k3 = 1 / r - 1 + ln r
BY_HAND: dict[str, float] = {
    "grpo": A * (-1.2 / 4 + (0.8 + 1.0) / 8) + KL,
    "dr_grpo": 0.5 * (-1.2 + 0.8 + 1.0) / (4 * 5),
    "dapo": A * (-1.28 + 0.8 + 1.0) / 3,  # the second group is in no mean
    "lite_ppo": B * (-1.2 + 0.8 + 1.0) / 5,
    "rloo": (-1.0 * (LN[0] - 1) + 1.0 * (LN[1] - 1) + 1.0 * (LN[2] - 1)) / (4 * 5),
    "reinforce_pp": B * (-1.2 + 0.8 + 1.0) / 5,
    "gspo": A * (-1.0004 + 0.9997) / 4,
    "cispo": B * (-1.5 * (LN[0] - 1) + 0.5 * (LN[1] - 1) + 1.0 * (LN[2] - 1)) / 5,
    "maxrl": (-1.2 + 0.8 + 1.0) / 5,  # advantages 0.5 / 0.5
}


def small(config: GrpoStage, **columns: Any) -> Grpo:
    minus = torch.full((5,), -1.0, dtype=torch.float64)
    given = {"lengths": [1, 2, 1, 1], "shaped_N": f64(1, 0, 1, 1), "old_logp_C": minus, "ref_logp_C": minus}
    return algorithm_of(config, **{**given, **columns})


def pairs(**settings: Any) -> GrpoStage:
    common = {"group_size": 2, "rollout_batch": 8, "sampling": {"max_new_tokens": 5}}
    return stage(**{**common, **settings})


@pytest.mark.parametrize("name", NAMES)
def test_a_presets_loss_by_hand(name: str) -> None:
    algorithm = small(pairs(preset=name))
    batch = algorithm.rollout(0)
    kept = [i for i in range(4) if i not in batch.left_out]
    assert kept == ([0, 1] if name == "dapo" else [0, 1, 2, 3])
    assert algorithm.figures["frac_reward_zero_std"] == 0.5
    loss = loss_of(algorithm, batch, f64(*RATIOS).log() - 1, [kept])
    assert loss.item() == pytest.approx(BY_HAND[name], rel=1e-6)


def test_a_kl_in_the_reward_by_hand() -> None:
    """Of each whole reply, before the baseline: KLs 1 | 3 | 0 | 2 at 0.5 take 0.5, 1.5, 0, 1 from scores 1, 0, 1, 1."""
    ref = f64(-2, -2, -3, -1, -3)
    algorithm = small(pairs(preset="rloo", beta=0.5), ref_logp_C=ref)
    batch = algorithm.rollout(0)
    assert [column.tolist() for column in batch.advantage] == [[2.0], [-2.0, -2.0], [1.0], [-1.0]]
    assert algorithm.figures["objective/non_score_reward"] == -0.5 * (1 + 3 + 0 + 2) / 4
    assert algorithm.figures["objective/rlhf_reward"] == (0.5 - 1.5 + 1 + 0) / 4
    assert algorithm.figures["frac_reward_zero_std"] == 0.5  # of the scores
    assert not algorithm.kl_in_loss
    assert not algorithm.old_at_step  # the KL asks for log-probabilities before the step


def test_advantages_by_hand() -> None:
    scores = f64(1, 0, 0, 0, 1, 1, 1, 0)

    def found(scale: Any, baseline: Any) -> list[float]:
        return group_advantages(scores, 4, scale, baseline).tolist()

    assert found("none", "none") == scores.tolist()
    assert found("none", "batch") == [0.5, -0.5, -0.5, -0.5, 0.5, 0.5, 0.5, -0.5]
    assert found("none", "others") == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3, 1 / 3, 1 / 3, 1 / 3, -1])
    assert found("mean", "group") == pytest.approx([3, -1, -1, -1, 1 / 3, 1 / 3, 1 / 3, -1])
    deviation = math.sqrt(8 * 0.25 / 7) + 1e-4
    assert found("batch", "group") == pytest.approx(
        [x / deviation for x in (0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, -0.75)]
    )
    assert group_advantages(f64(-1, 1, 0, 0), 2, "mean").tolist() == [0, 0, 0, 0]  # no mean above 0


def test_others_are_the_slow_way_and_group_over_its_size_less_one() -> None:
    scores = torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slow = [
        float(scores[i] - (scores[g * 8 : g * 8 + 8].sum() - scores[i]) / 7)
        for g in range(3)
        for i in range(g * 8, g * 8 + 8)
    ]
    found = group_advantages(scores, 8, "none", "others")
    assert found.tolist() == pytest.approx(slow)
    torch.testing.assert_close(found, group_advantages(scores, 8, "none") * 8 / 7)


@pytest.mark.parametrize("scale", ["group", "batch", "mean", "none"])
@pytest.mark.parametrize("baseline", ["group", "others"])
def test_a_groups_advantages_sum_to_0(scale: Any, baseline: Any) -> None:
    scores = torch.rand(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sums = group_advantages(scores, 8, scale, baseline).view(3, 8).sum(1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-9, rtol=0)


def test_the_page_has_the_weights_by_successes() -> None:
    """docs/algorithms.md prints the sum of |advantage| of a prompt that is solved k times of 8."""
    page = (ROOT / "docs" / "algorithms.md").read_text()
    header = re.search(r"^\| successes of 8 \|(.+)\|$", page, re.M)
    assert header is not None
    solved = [int(cell) for cell in header.group(1).split("|")]
    for scale in ("group", "none", "mean"):
        row = re.search(rf"^\| `scale_rewards: {scale}`[^|]*\|(.+)\|$", page, re.M)
        assert row is not None, scale
        for k, cell in zip(solved, row.group(1).split("|"), strict=True):
            scores = f64(*[1.0] * k, *[0.0] * (8 - k))
            weight = float(group_advantages(scores, 8, scale).abs().sum())
            assert weight == pytest.approx(float(cell), abs=0.0051), (scale, k)


# -------------------------------------------------------------------------------------------------------- identities


def gradient(terms: TokenTerms, weight: str, new: Tensor, old: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([3, 1, 4, 2])
    offsets = torch.tensor([0, 3, 4, 8, 10])
    advantage = torch.randn(4, generator=generator, dtype=torch.float64).repeat_interleave(lengths)
    weight_C = token_weights(lengths, weight, 9).double().repeat_interleave(lengths)  # type: ignore[arg-type]
    loss = (grpo_loss(new, old, advantage, offsets, terms).loss_C * weight_C).sum()
    (grad,) = torch.autograd.grad(loss, new)
    return grad


@pytest.mark.parametrize("weight", ["token", "sequence", "constant"])
def test_at_ratio_1_every_clip_has_the_same_gradient(weight: str) -> None:
    new = -torch.rand(10, generator=torch.Generator().manual_seed(4), dtype=torch.float64).requires_grad_()
    plain = gradient(TokenTerms(clip="none"), weight, new, new.detach())
    for terms in (TokenTerms(), TokenTerms(cap=3.0), TokenTerms(clip="detached", cap=5.0)):
        torch.testing.assert_close(gradient(terms, weight, new, new.detach()), plain, atol=1e-12, rtol=0)
        elsewhere = gradient(terms, weight, new, new.detach() - 0.9)
        assert (elsewhere - plain).abs().max() > 1e-3
    if weight == "sequence":  # a reply's one ratio too, where each reply counts alike
        found = gradient(TokenTerms(ratio="sequence"), weight, new, new.detach())
        torch.testing.assert_close(found, plain, atol=1e-12, rtol=0)


def test_the_unbiased_kls_have_the_kls_gradient() -> None:
    """Against the exact KL of two tables of probabilities, as a mean over a third that sampled. A plain k3's gradient
    is another one, even where the policy sampled itself; a plain k2's is right there."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    ref, other = (torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    offsets = torch.tensor([0, 6])

    def gradient_of(old: Tensor | None, estimator: Any, unbiased: bool) -> Tensor:
        new = logits.log_softmax(0)
        sampled = new.detach() if old is None else old
        terms = TokenTerms(beta=1.0, estimator=estimator, unbiased=unbiased)
        kl = grpo_loss(new, sampled, torch.zeros(6, dtype=torch.float64), offsets, terms, ref).kl_C
        assert kl is not None
        return torch.autograd.grad((sampled.exp() * kl).sum(), logits)[0]

    new = logits.log_softmax(0)
    exact = torch.autograd.grad((new.exp() * (new - ref)).sum(), logits)[0]
    for old in (None, other):
        for estimator in ("k2", "k3"):
            torch.testing.assert_close(gradient_of(old, estimator, True), exact, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(gradient_of(None, "k2", False), exact, atol=1e-12, rtol=1e-9)
    for old, estimator in ((None, "k3"), (other, "k2"), (other, "k3")):
        assert (gradient_of(old, estimator, False) - exact).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------- splits of a step


@pytest.mark.parametrize("name", NAMES)
def test_a_split_of_a_step_changes_no_presets_loss_or_gradient(name: str) -> None:
    """Into micro-batches, or over devices that add up their gradients: groups torn apart, and in another order."""
    algorithm, batch, new = of_trl(stage(**LONG, preset=name, rollout_batch=16, overlong="penalty"), shift=10.0)
    kept = [i for i in range(12) if i not in batch.left_out]
    assert len(kept) == (8 if name == "dapo" else 12)
    whole = loss_of(algorithm, batch, new, [kept])
    (expected,) = torch.autograd.grad(whole, new)
    assert expected.abs().max() > 1e-4
    order = [kept[i] for i in torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))]
    for shards in ([order[:5], order[5:6], order[6:]], [[i] for i in order], [kept[::2], kept[1::2]]):
        split = loss_of(algorithm, batch, new, shards)
        torch.testing.assert_close(split, whole, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(torch.autograd.grad(split, new)[0], expected, atol=1e-9, rtol=1e-9)


# ------------------------------------------------------------------------- what is left out, long, or off the sampler


@pytest.mark.parametrize(("choice", "out", "micros"), [("keep", set(), [1, 1]), ("drop", {2, 3}, [0, 1])])
def test_groups_without_a_signal_are_dropped(choice: str, out: set[int], micros: list[int]) -> None:
    algorithm = small(pairs(no_spread=choice, beta=0.0))
    assert algorithm.rollout(0).left_out == out
    assert algorithm.figures["frac_reward_zero_std"] == 0.5
    assert sorted(len(step) for step in algorithm.updates(0)) == micros  # a step may have nothing to learn from


def test_cut_replies_are_left_out_of_loss_and_baseline() -> None:
    """Scores 4, 0 (cut), 1, 3 in one group of four: mean 8/3 of the three that ended."""
    ended = torch.tensor([True, False, True, True])
    config = stage(overlong="mask", scale_rewards="none", rollout_batch=4, minibatches=1, beta=0.0)
    algorithm = small(config, shaped_N=f64(4, 0, 1, 3), finished_N=ended)
    batch = algorithm.rollout(0)
    assert batch.left_out == {1}
    first = [float(column[0]) for column in batch.advantage]
    assert first == pytest.approx([4 - 8 / 3, 0, 1 - 8 / 3, 3 - 8 / 3])
    alone = small(config, shaped_N=f64(4, 0, 4, 4), finished_N=ended)
    alone.rollout(0)
    assert alone.figures["frac_reward_zero_std"] == 1.0  # the one that differs tells nothing
    assert without_spread(f64(1, 2, 3, 4), 2, torch.tensor([True, False, False, False])).tolist() == [True, True]


def test_steps_of_replies_left_out_count_in_no_mean() -> None:
    steps = StepValues(f64(1, 9, 3), torch.tensor([0, 1, 2]))
    valid = torch.tensor([True, False, True])
    found = step_advantages(steps, torch.tensor([0, 1, 2, 3]), 3, "none", valid)
    assert found.tolist() == [-1, 0, 1]
    # Over the deviation of all steps: 1, 9, 3, 5 of two groups have means 5 and 4.
    steps = StepValues(f64(1, 9, 3, 5), torch.tensor([0, 1, 2, 3]))
    found = step_advantages(steps, torch.arange(5), 2, "batch")
    deviation = float(f64(1, 9, 3, 5).std()) + 1e-4
    assert found.tolist() == pytest.approx([-4 / deviation, 4 / deviation, -1 / deviation, 1 / deviation])


def test_a_soft_penalty_by_hand() -> None:
    """DAPO's: 0 up to 16 of 20 tokens, then (16 - L) / 4; a cut reply pays whole, however short the model's context
    made it."""
    lengths = torch.tensor([5, 16, 18, 20, 7])
    share = overlong_share(lengths, 20, 0.8)
    assert share.tolist() == pytest.approx([0, 0, 0.5, 1, 0])
    ended = torch.tensor([True, True, True, False, False])
    assert episode_scores(torch.ones(5), ended, 2.0, None, share).tolist() == pytest.approx([1, 1, 0, -1, -1])
    assert episode_scores(torch.ones(5), ended, 2.0).tolist() == [1, 1, 1, -1, -1]


def test_what_the_samplers_difference_weighs() -> None:
    trainer, sampler = f64(0.5, 0.4, 0.1, 0.9).log(), f64(0.5, 0.1, 0.4, 0.6).log()  # ratios 1, 4, 1/4, 1.5
    assert sampler_weights(trainer, sampler, "clip", 0.0, 2.0).tolist() == pytest.approx([1, 2, 0.25, 1.5])
    assert sampler_weights(trainer, sampler, "mask", 0.5, 5.0).tolist() == pytest.approx([1, 4, 0, 1.5])


def test_a_correction_weighs_the_policys_term_alone() -> None:
    old = f64(-1, -1, -1, -1, -1)
    sampled = old - f64(4.0, 1.0, 1.5, 1.0, 1.0).log()
    config = pairs(sampler_correction="clip", beta=0.5, old_logprobs="trainer")
    plain, weighed = (
        small(config.model_copy(update={"sampler_correction": "off"})),
        small(config, sampled_logp_C=sampled),
    )
    logp = f64(*RATIOS).log() - 1

    def losses(algorithm: Grpo) -> tuple[Tensor, dict[str, tuple[float, float]]]:
        batch = algorithm.rollout(0)
        loss, figures = algorithm.policy_loss(algorithm._tokens(batch, range(4), logp))
        return loss - 0.5 * (old - logp).exp().sub(1).sub(old - logp), dict(figures)

    (without, _), (found, figures) = losses(plain), losses(weighed)
    torch.testing.assert_close(found, without * f64(2.0, 1.0, 1.5, 1.0, 1.0))
    assert figures["sampling/importance_sampling_ratio/mean"] == (pytest.approx(6.5), 5.0)
    assert figures["sampling/corrected"] == (1.0, 5.0)


def test_one_step_a_rollout_corrects_by_the_steps_own_numbers() -> None:
    config = pairs(sampler_correction="mask", minibatches=1, beta=0.0)
    algorithm = small(config, sampled_logp_C=f64(-1, -1, -1, -1, -1))
    assert algorithm.old_at_step
    batch = algorithm.rollout(0)
    logp = f64(-1 + math.log(6), -1, -1 + math.log(1.5), -1, -1)
    loss, _ = algorithm.policy_loss(algorithm._tokens(batch, range(4), logp))
    assert loss.tolist() == pytest.approx([0, A, 1.5 * A, 0, 0], abs=1e-9)  # at ratio 1, times 0, 1, 1.5


def test_each_reward_by_itself_in_a_rollout() -> None:
    """Rewards 1, 0 | 5, 5 and 0, 100 | 3, 1 of weights 1 and 2: with two of each, +-c for one that differs."""
    terms = torch.stack([f64(1, 0, 5, 5), f64(0, 100, 3, 1)], 1)
    second = {"source": {"kind": "python", "ref": "x:z"}, "weight": 2.0}
    config = pairs(combine="each", rewards=[PYTHON, second], beta=0.0)
    algorithm = small(config, terms_NK=terms)
    advantage = torch.stack([column[0] for column in algorithm.rollout(0).advantage])
    c = math.sqrt(0.5)
    raw = f64(c - 2 * c, -c + 2 * c, 2 * c, -2 * c)
    torch.testing.assert_close(advantage, raw / raw.std(), rtol=1e-3, atol=1e-3)
    assert algorithm.figures["frac_reward_zero_std"] == 0.0  # the second group has one in its second reward


@pytest.mark.parametrize(
    ("settings", "shaped", "message"),
    [
        (
            {"preset": "maxrl"},
            (1.0, -0.5, 1.0, 1.0),
            r"scale_rewards: mean needs rewards that are never negative.*-0\.5",
        ),
        ({"preset": "gspo"}, (1.0, 0.0, 1.0, 1.0), "ratio: sequence knows whole replies alone"),
        ({"baseline": "batch", "scale_rewards": "none"}, (1.0, 0.0, 1.0, 1.0), "baseline: batch knows whole"),
    ],
)
def test_what_only_the_scores_show_is_refused(settings: Any, shaped: Any, message: str) -> None:
    steps = StepValues(f64(1, 2), torch.tensor([0, 3]))
    with pytest.raises(UserError, match=message):
        small(pairs(**settings), shaped_N=f64(*shaped), steps=steps).rollout(0)
