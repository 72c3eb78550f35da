"""GRPO: its objective against TRL's numbers and hand-computed values, its training on tiny models; and whose
log-probabilities PPO and GRPO divide by."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_stages import data_files, run, write_jsonl
from test_train import FAST, LikesO, context
from tiny import demonstrations, prompt, save_tiny
from torch import Tensor

from keel.data.collate import pack, pack_by_prompt
from keel.model.checkpoint import load_policy
from keel.objective import group
from keel.objective.ratio import TokenTerms, grpo_loss
from keel.recipe.grpo import GrpoStage
from keel.recipe.ppo import PpoStage
from keel.recipe.sections import OptimConfig, SamplingConfig
from keel.recipe.sft import SftStage
from keel.rollout.cpu import CpuDecoder
from keel.rollout.sampler import Sampler, make_sampler
from keel.train import online
from keel.train import rollouts as rollouts_module
from keel.train.grpo import Grpo, train_grpo
from keel.train.loop import _update
from keel.train.online import make_rollouts
from keel.train.optim import make_optimizer
from keel.train.ppo import train_ppo
from keel.train.rollouts import RolloutCollector
from keel.train.sft import train_sft
from keel.types import Completion, Encoded, PackedBatch, UserError

TRL = json.loads((Path(__file__).parent / "oracles" / "trl_grpo.json").read_text())
REWARDS = [{"source": {"kind": "python", "ref": "x:y"}}]
PROMPTS = [prompt(n) for n in range(50)]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def stage(**settings: Any) -> GrpoStage:
    common = {"name": "grpo", "rewards": REWARDS, "sampling": {"max_new_tokens": 8}, "rollout_batch": 32}
    return GrpoStage.model_validate({**common, "group_size": 4, "optim": FAST, **settings})


@pytest.fixture(scope="module")
def sft_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("sft")
    c = context(tmp, "sft", save_tiny(tmp / "base"))
    train_sft(SftStage(name="sft", optim=FAST, batch_size=8), demonstrations(60), c)
    return c.stage.path


# ------------------------------------------------------------------------------------------------- the objective


def test_advantages_by_hand() -> None:
    # Group 1: mean 2, deviations -1, 0, 1, unbiased standard deviation 1. Group 2: mean 4, deviations twice those.
    scores = f64(1, 2, 3, 2, 4, 6)
    assert group.group_advantages(scores, 3, scale="none").tolist() == [-1, 0, 1, -2, 0, 2]
    scaled = group.group_advantages(scores, 3)
    assert scaled.tolist() == pytest.approx([-1 / 1.0001, 0, 1 / 1.0001, -2 / 2.0001, 0, 2 / 2.0001])


@pytest.mark.parametrize("scale", ["group", "batch", "mean", "none"])
def test_a_group_of_equal_scores_teaches_nothing(scale: Any) -> None:
    """Exactly nothing: the mean of six times 0.1 differs from 0.1, and a rounding error over EPS would be a signal."""
    scores = torch.cat([torch.full((6,), 1e4 + 0.1), torch.full((6,), 0.1), torch.arange(6.0)])
    advantages = group.group_advantages(scores, 6, scale)
    assert advantages[:12].eq(0).all()
    assert advantages[12:].ne(0).all()
    assert group.without_spread(scores, 6).tolist() == [True, True, False]


def test_advantages_know_no_other_group_and_no_shift() -> None:
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    together = group.group_advantages(scores, 4)
    assert not together.requires_grad
    torch.testing.assert_close(together[4:8], group.group_advantages(scores[4:8], 4))
    shifted = scores + f64(5, -3, 100).repeat_interleave(4)
    torch.testing.assert_close(group.group_advantages(shifted, 4), together)


def test_token_weights_by_hand() -> None:
    lengths = torch.tensor([1, 4])
    assert group.token_weights(lengths, "token", 10).tolist() == pytest.approx([1 / 5, 1 / 5])
    assert group.token_weights(lengths, "sequence", 10).tolist() == pytest.approx([1 / 2, 1 / 8])
    assert group.token_weights(lengths, "constant", 10).tolist() == pytest.approx([1 / 20, 1 / 20])


def test_the_loss_by_hand() -> None:
    # Ratios 2 and 1/2 with advantage 1: held at 1.3, free at 1/2; with advantage -1: free at 2, held at 0.9.
    logp = f64(2, 0.5, 2, 0.5).log()
    zero, advantage = torch.zeros(4, dtype=torch.float64), f64(1, 1, -1, -1)
    offsets, terms = torch.tensor([0, 1, 4]), TokenTerms(low=0.1, high=0.3)
    loss, low, high, _ = grpo_loss(logp, zero, advantage, offsets, terms)
    assert loss.tolist() == pytest.approx([-1.3, -0.5, 2.0, 0.9])
    assert (low.tolist(), high.tolist()) == ([False, False, False, True], [True, False, False, False])
    # k3 of log-ratio ln 2 is 1/2 - 1 + ln 2; of -ln 2 it is 2 - 1 - ln 2.
    with_kl = grpo_loss(logp, zero, advantage, offsets, replace(terms, beta=0.5), zero).loss_C
    ln2 = 0.6931471805599453
    added = (with_kl - loss).tolist()
    assert added == pytest.approx([0.5 * (ln2 - 0.5), 0.5 * (1 - ln2), 0.5 * (ln2 - 0.5), 0.5 * (1 - ln2)])


@pytest.mark.parametrize(
    ("name", "scale", "beta"), [("token", "group", None), ("sequence", "group", None), ("constant", "none", 0.0)]
)
def test_the_loss_equals_trl(name: Any, scale: Any, beta: float | None) -> None:
    settings, expected = TRL["settings"], TRL["expected"][name]
    lengths = torch.tensor(TRL["lengths"])
    advantage = group.group_advantages(f64(*TRL["scores"]), settings["group_size"], scale)
    torch.testing.assert_close(advantage, f64(*TRL["advantages"][scale]))
    new, old, ref = (f64(*TRL[key]) for key in ("new", "old", "ref"))
    new.requires_grad_()
    terms = TokenTerms(
        low=settings["clip_low"], high=settings["clip_high"], beta=settings["beta"] if beta is None else beta
    )
    offsets = torch.tensor([0, *TRL["lengths"]]).cumsum(0)
    loss_C, low_C, high_C, _ = grpo_loss(new, old, advantage.repeat_interleave(lengths), offsets, terms, ref)
    weights = group.token_weights(lengths, name, TRL["max_new_tokens"]).double()
    loss = (loss_C * weights.repeat_interleave(lengths)).sum()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    (grad,) = torch.autograd.grad(loss, new)
    torch.testing.assert_close(grad, f64(*expected["grad"]), rtol=1e-6, atol=1e-9)
    assert (low_C | high_C).double().mean().item() == pytest.approx(expected["clipped"], rel=1e-6)
    assert 0 < expected["clipped"] < 1


# ------------------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout_batch": 30}, "rollout_batch counts completions and 30 is no multiple of group_size = 4"),
        ({"group_size": 1}, "greater than or equal to 2"),
        ({"rollout_batch": 8, "minibatches": 3}, "a rollout has 2 prompts, which do not make 3 minibatches"),
        ({"sampling": {"temperature": 0}}, "GRPO learns from differences between samples"),
        ({"sampling": {"top_p": 0.9}}, "make GRPO's ratios those of another distribution"),
        ({"old_logprobs": "mine"}, "'auto', 'sampler' or 'trainer'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage(**settings)


def test_an_adaptive_penalty_needs_the_kl_of_every_episode() -> None:
    adaptive = {"name": "ppo", "rewards": REWARDS, "kl": {"coef": 0.1, "target": 4.0}}
    assert PpoStage.model_validate(adaptive).old_logprobs == "trainer"
    with pytest.raises(ValueError, match=r"kl\.target steers by the KL of the whole rollout"):
        PpoStage.model_validate({**adaptive, "old_logprobs": "auto"})


@pytest.mark.parametrize(("group_size", "minibatches"), [(1, 4), (4, 4), (4, 6), (2, 5)])
def test_each_step_has_whole_groups(group_size: int, minibatches: int) -> None:
    settings = {"name": "ppo", "rewards": REWARDS, "rollout_batch": 24, "epochs": 2}
    config = PpoStage.model_validate({**settings, "group_size": group_size, "minibatches": minibatches})
    rows = [Encoded((n // group_size, 50 + n), (False, True)) for n in range(24)]
    steps = list(online.minibatches(rows, config, seed=0, iteration=3))
    assert len(steps) == 2 * minibatches  # what the schedule counts on
    for epoch in (steps[:minibatches], steps[minibatches:]):
        assert sorted(i for part, _ in epoch for i in part) == list(range(24))
    for part, batches in steps:
        assert sorted(i for batch in batches for i in batch) == sorted(part)
        assert all(i // group_size * group_size + j in part for i in part for j in range(group_size))
    assert steps[0][0] != steps[minibatches][0]  # another order in another epoch


# --------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("beta", [0.0, 0.02])
def test_grpo_raises_the_reward(beta: float, sft_model: Path, tmp_path: Path) -> None:
    c = context(tmp_path, "grpo", sft_model)
    config = stage(episodes=32 * 20, optim=OptimConfig(lr=1e-2), beta=beta)
    summary = train_grpo(config, PROMPTS, LikesO(), sft_model if beta else None, c)
    rows = c.stage.metrics.rows()
    assert sum(row["objective/scores"] for row in rows[-3:]) / 3 > rows[0]["objective/scores"] + 1
    assert summary["episodes"] == 640
    assert 0 <= summary["frac_reward_zero_std"] <= 1
    if beta:
        assert abs(summary["kl_at_start"]) <= 1e-5
        assert rows[-1]["objective/kl_k3"] > 0
    else:  # no reference, no KL
        assert summary["kl_at_start"] is None
        assert not any("objective/kl" in row for row in rows)


def test_the_kl_in_the_loss_holds_the_policy_back(sft_model: Path, tmp_path: Path) -> None:
    ends = []
    for name, beta in (("free", 0.0), ("kept", 1.0)):
        c = context(tmp_path, name, sft_model)
        config = stage(episodes=32 * 20, optim=OptimConfig(lr=1e-2), beta=beta, old_logprobs="trainer")
        train_grpo(
            config, PROMPTS, LikesO(), sft_model, c
        )  # a reference by name: the KL is measured without a beta too
        ends.append(c.stage.metrics.rows()[-1]["objective/kl"])
    assert ends[1] < 0.5 * ends[0]


@pytest.mark.parametrize("normalise", ["token", "sequence", "constant"])
def test_accumulation_changes_nothing(normalise: str, sft_model: Path, tmp_path: Path) -> None:
    """One step over a rollout, whole or split into micro-batches: the same loss and gradient."""
    ends = []
    for batch_tokens in (100_000, 60):
        c = context(tmp_path, f"{normalise}_{batch_tokens}", sft_model)
        config = stage(batch_tokens=batch_tokens, minibatches=1, normalise=normalise, beta=0.5)
        rollouts = make_rollouts(config, PROMPTS, LikesO(), sft_model, c)
        algorithm = Grpo(rollouts, config)
        (micros,) = algorithm.updates(0)
        assert (len(micros) > 3) == (batch_tokens == 60)
        optimizer = make_optimizer(algorithm.modules, config.optim, {})
        figures = _update(algorithm, optimizer, micros, config, c, 0)
        ends.append((figures["loss"][0], figures["grad_norm"][0]))
    assert ends[0][0] == pytest.approx(ends[1][0], abs=1e-5)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-4)


def test_a_shared_prompt_changes_no_number(sft_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured, the loss and the gradient, against every completion behind a copy of its own."""
    tokens: list[int] = []

    def counting(packing: Any) -> Any:
        def packed(rows: Sequence[Encoded], device: str) -> PackedBatch:
            batch: PackedBatch = packing(rows, device)
            tokens[-1] += batch.num_tokens
            return batch

        return packed

    found = []
    for packing in (pack, pack_by_prompt):
        tokens.append(0)
        for module in (online, rollouts_module):
            monkeypatch.setattr(module, "pack_by_prompt", counting(packing))
        # Micro-batches so small that they cut through groups; two steps, so that groups are cut by steps too.
        config = stage(batch_tokens=50, minibatches=2, beta=0.5, old_logprobs="trainer")
        c = context(tmp_path, packing.__name__, sft_model)
        rollouts = make_rollouts(config, PROMPTS, LikesO(), save_tiny(tmp_path / "ref", 1), c)
        rollouts.same_start = False  # another reference, or its part of the gradient would be 0
        algorithm = Grpo(rollouts, config)
        episodes = rollouts.collect(0)
        losses = []
        for micros in algorithm.updates(0):
            for micro in micros:
                loss, _ = micro()
                loss.backward()
                losses.append(float(loss.detach()))
        gradients = {name: p.grad for name, p in rollouts.policy.named_parameters() if p.grad is not None}
        found.append((episodes, losses, gradients))
    (apart, losses, gradients), (shared, shared_losses, shared_gradients) = found
    assert tokens[1] < 0.8 * tokens[0]
    assert shared.rows == apart.rows
    for name in ("old_logp_C", "ref_logp_C"):
        torch.testing.assert_close(getattr(shared, name), getattr(apart, name), atol=1e-5, rtol=0)
    assert shared_losses == pytest.approx(losses, abs=1e-5)
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_the_kl_is_0_at_the_start_behind_a_shared_prompt(sft_model: Path, tmp_path: Path) -> None:
    """To the bit: policy and reference are measured in the same packing."""
    config = stage(old_logprobs="trainer")
    rollouts = make_rollouts(config, PROMPTS, LikesO(), sft_model, context(tmp_path, "g", sft_model))
    episodes = rollouts.collect(0)
    assert episodes.ref_logp_C is not None
    assert torch.equal(episodes.old_logp_C, episodes.ref_logp_C)
    assert episodes.figures["objective/kl"] == 0.0


def test_a_groups_prompt_is_prefilled_once(sft_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = CpuDecoder.prefill

    def counting(self: CpuDecoder, prompts: Any, slots: Any, source: Any) -> None:
        seen.extend(prompts)
        original(self, prompts, slots, source)

    monkeypatch.setattr(CpuDecoder, "prefill", counting)
    config = stage()
    rollouts = make_rollouts(config, PROMPTS, LikesO(), None, context(tmp_path, "g", sft_model))
    episodes = rollouts.collect(0)
    assert len(seen) == 8
    assert len(episodes.rows) == 32
    ids = [row.ids[: row.mask.index(True)] for row in episodes.rows]
    assert all(len(set(ids[g * 4 : g * 4 + 4])) == 1 for g in range(8))
    assert len({row.ids for row in episodes.rows}) > 16  # and yet every member draws for itself


# ------------------------------------------------------------------------- whose log-probabilities ratios divide by


class Off:
    """A sampler whose log-probabilities are off by a constant, as if computed by other kernels."""

    def __init__(self, inner: Sampler, by: float) -> None:
        self.inner, self.by = inner, by

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seed: int) -> list[Completion]:
        found = self.inner.generate(prompts, sampling, seed)
        return [replace(c, logprobs=tuple(x + self.by for x in c.logprobs)) for c in found]


def rollouts_off_by(by: float, mode: str, model: Path, tmp: Path, monkeypatch: pytest.MonkeyPatch) -> RolloutCollector:
    def off(*args: Any, **kwargs: Any) -> Sampler:
        return Off(make_sampler(*args, **kwargs), by)

    monkeypatch.setattr(online, "make_sampler", off)
    config = stage(old_logprobs=mode)
    return make_rollouts(config, PROMPTS, LikesO(), model, context(tmp, f"{mode}{by}", model))


@pytest.mark.parametrize(
    ("mode", "by", "source"),
    [
        ("auto", 0.0, "sampler"),
        ("auto", 5e-4, "sampler"),
        ("auto", 0.01, "trainer"),  # above SAMPLER_BOUND
        ("sampler", 0.01, "sampler"),
        ("trainer", 0.01, "trainer"),
    ],
)
def test_whose_log_probabilities(
    mode: str, by: float, source: str, sft_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a rollout that the trainer measured whole; and the KL is 0 at the start, whatever the sampler says."""
    truth = rollouts_off_by(0.0, "trainer", sft_model, tmp_path, monkeypatch).collect(0)
    found = rollouts_off_by(by, mode, sft_model, tmp_path, monkeypatch).collect(0)
    assert found.rows == truth.rows
    shift = by if source == "sampler" else 0.0
    torch.testing.assert_close(found.old_logp_C, truth.old_logp_C + shift, atol=2e-6, rtol=0)
    assert found.figures["rollout/measured"] == (1 / rollouts_module.PROBE_EVERY if source == "sampler" else 1.0)
    assert found.figures["rollout/logprob_diff"] == pytest.approx(by, abs=1e-5)
    assert found.figures["objective/kl"] == 0.0
    assert found.figures["policy/entropy_avg"] == pytest.approx(truth.figures["policy/entropy_avg"], rel=0.3)
    assert found.ref_logp_C is not None
    torch.testing.assert_close(found.ref_logp_C, truth.ref_logp_C, atol=2e-6, rtol=0)


def test_a_sampler_that_is_far_off_is_refused(sft_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("auto", "sampler", "trainer"):
        with pytest.raises(UserError, match=r"differ by 0\.60 nats a token"):
            rollouts_off_by(0.6, mode, sft_model, tmp_path, monkeypatch).collect(0)


def test_the_policys_pass_over_the_rollout_is_left_out(
    sft_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[int, int] = {}
    original = rollouts_module.token_logprobs

    def counting(model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        counts[id(model)] = counts.get(id(model), 0) + batch.num_sequences
        return original(model, batch, *args, **kwargs)

    monkeypatch.setattr(rollouts_module, "token_logprobs", counting)
    rollouts = rollouts_off_by(0.0, "auto", sft_model, tmp_path, monkeypatch)
    rollouts.collect(0)
    assert counts == {id(rollouts.policy): 4, id(rollouts.reference): 32}


def test_one_step_a_rollout_needs_nobodys_old_log_probabilities(
    sft_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step's loss and gradient are those of a rollout that the trainer measured whole, however far off the sampler
    is; with a second step they are not left out."""

    def one(by: float, mode: str, minibatches: int) -> tuple[Grpo, float, list[Tensor]]:
        rollouts = rollouts_off_by(by, mode, sft_model, tmp_path, monkeypatch)
        config = stage(old_logprobs=mode, minibatches=minibatches, beta=0.1)
        algorithm = Grpo(rollouts, config)
        total = 0.0
        for micro in next(algorithm.updates(0)):
            loss, _ = micro()
            loss.backward()
            total += float(loss.detach())
        return algorithm, total, [p.grad for p in rollouts.policy.parameters() if p.grad is not None]

    _, expected, gradients = one(0.0, "trainer", 1)
    algorithm, loss, found = one(0.2, "auto", 1)
    assert algorithm.figures["rollout/measured"] == 1 / rollouts_module.PROBE_EVERY
    assert loss == pytest.approx(expected, abs=1e-6)
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert one(0.2, "auto", 2)[0].figures["rollout/measured"] == 1.0


def test_a_sampler_that_is_off_is_corrected_for(
    sft_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By 0.2 nats on every token, all of them weigh exp(-0.2)."""
    gradients = []
    for choice in ("off", "clip"):
        rollouts = rollouts_off_by(0.2, "auto", sft_model, tmp_path / choice, monkeypatch)
        algorithm = Grpo(rollouts, stage(minibatches=1, beta=0.0, sampler_correction=choice))
        for micro in next(algorithm.updates(0)):
            loss, figures = micro()
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in rollouts.policy.parameters() if p.grad is not None]))
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[1], gradients[0] * math.exp(-0.2), rtol=1e-4, atol=1e-7)
    total, count = figures["sampling/importance_sampling_ratio/mean"]
    assert total / count == pytest.approx(math.exp(-0.2), rel=1e-5)


@pytest.mark.parametrize("mode", ["sampler", "auto"])
def test_ppo_with_the_samplers_log_probabilities_learns_the_same(mode: str, sft_model: Path, tmp_path: Path) -> None:
    """In float32 they are the trainer's but for rounding: the same rollouts, and scores that go together."""
    rows = {}
    for name in ("trainer", mode):
        c = context(tmp_path, name, sft_model)
        config = PpoStage.model_validate(
            {
                "name": "ppo",
                "rewards": REWARDS,
                "sampling": {"max_new_tokens": 8},
                "rollout_batch": 32,
                "episodes": 32 * 4,
                "optim": FAST,
                "kl": {"coef": 0.05},
                "old_logprobs": name,
            }
        )
        train_ppo(config, PROMPTS, LikesO(), sft_model, None, c)
        rows[name] = c.stage.metrics.rows()
    assert rows[mode][0]["objective/kl"] == 0.0
    for a, b in zip(rows["trainer"], rows[mode], strict=True):
        assert (a["rollout/measured"], b["rollout/measured"]) == (1.0, 1 / rollouts_module.PROBE_EVERY)
        for key in ("objective/scores", "loss/policy_avg", "loss/value_avg", "policy/approxkl_avg"):
            assert b[key] == pytest.approx(a[key], abs=1e-3)


# --------------------------------------------------------------------------------------------------- the pipeline


def score(_: Any, text: str) -> float:
    return float(text.count("o"))


def test_a_pipeline_with_grpo(tmp_path: Path) -> None:
    """SFT, GRPO with and without a reference, evaluation, report; and a stage that starts from GRPO's checkpoint."""
    base = save_tiny(tmp_path / "base")
    prompts = [{"prompt": prompt(n).messages[0].content} for n in range(30)]
    python = {"kind": "python", "ref": f"{__file__}:score"}
    short = {"max_new_tokens": 6, "batch_size": 16}
    common = {
        "kind": "grpo",
        "rewards": [{"source": python}],
        "episodes": 32,
        "rollout_batch": 16,
        "group_size": 4,
        "sampling": short,
        "watch": python,
    }
    recipe = {
        "model": {"path": str(base)},
        "data": {**data_files(tmp_path), "prompts": write_jsonl(tmp_path / "prompts.jsonl", prompts)},
        "stages": [
            {"kind": "sft", "name": "sft", "epochs": 1},
            {**common, "name": "grpo"},
            {**common, "name": "grpo_free", "model": "grpo", "beta": 0.0},
            {
                "kind": "eval",
                "name": "eval",
                "models": ["sft", "grpo", "grpo_free"],
                "judge": python,
                "sampling": short,
                "bootstrap": 100,
            },
            {"kind": "report", "name": "report"},
        ],
    }
    done = run(recipe, tmp_path / "run")
    summary = done.summary()
    assert set(summary["stages"]) == {"sft", "grpo", "grpo_free"}
    assert "guardrail" not in summary  # one of the two measured no KL
    assert done.stage("grpo").summary()["kl_at_start"] == pytest.approx(0, abs=1e-5)
    assert "objective/kl" not in done.stage("grpo_free").summary()
    assert all("eval/gold" in row for row in done.stage("grpo").metrics.rows())
    page = done.report.read_text()
    assert "GRPO" in page
    assert "groups without a signal" in page
    model, _ = load_policy(done.stage("grpo_free").path)
    assert all(p.isfinite().all() for p in model.parameters())
