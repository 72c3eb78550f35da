"""Policies at equal KL: curves by hand, a plain bootstrap, a KL that is known by enumeration, checkpoints on the way
that are the weights of their moment, and a whole run."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_run import write_fake_run
from pydantic import ValidationError
from rich.console import Console
from test_report import Page
from test_stages import data_files, run, write_jsonl
from test_train import FAST, LikesO, context, sft_model, weights  # noqa: F401 (a fixture)
from tiny import preferences, prompt
from torch import Tensor
from transformers import AutoModelForCausalLM

import keel.eval.checkpoints
import keel.train.loop
from keel.check.machine import disk
from keel.check.models import _evaluated
from keel.cli.finished import find_model
from keel.cli.live import closing
from keel.data.chat import Chat
from keel.eval.frontier import Curve, Frontier, Measured, curves_of, first_reach, read_frontier, statements
from keel.eval.frontier import summary as frontier_summary
from keel.model.checkpoint import load_policy
from keel.pipeline.run import plan
from keel.recipe.dpo import DpoStage
from keel.recipe.eval import EvalStage, FrontierConfig
from keel.recipe.graph import parents
from keel.recipe.grpo import GrpoStage
from keel.recipe.offline import MeasureConfig
from keel.recipe.recipe import Recipe
from keel.recipe.sections import OptimConfig, Source
from keel.recipe.sft import SftStage
from keel.report import build_report
from keel.report.kinds import title
from keel.report.wording import two_places
from keel.run import RunDir, seed_rng
from keel.train.dpo import Dpo, train_dpo
from keel.train.grpo import train_grpo
from keel.train.kept import due
from keel.train.offline import Liked, measure_offline
from keel.types import Prompt, UserError

# ------------------------------------------------------------------------------------------------- curves, by hand


def _reached(kl: list[float], gold: list[float], nats: float) -> float:
    root, value = np.sqrt(np.array([kl])), np.array(gold)[None, :, None]
    return float(first_reach(root, value, nats)[0, 0])


def test_gold_is_straight_in_the_root_of_the_kl() -> None:
    kl, gold = [0.0, 1.0, 4.0, 9.0], [0.0, 0.5, 0.7, 0.4]
    assert _reached(kl, gold, 1.0) == 0.5  # a checkpoint itself
    assert _reached(kl, gold, 2.25) == pytest.approx(0.6)  # halfway from 1 to 2
    assert _reached(kl, gold, 7.84) == pytest.approx(0.7 - 0.8 * 0.3)
    assert _reached(kl, gold, 9.0) == pytest.approx(0.4)  # its last one
    assert math.isnan(_reached(kl, gold, 9.01))  # and nothing beyond it


def test_a_curve_that_turns_back_is_read_where_it_first_gets_so_far() -> None:
    kl, gold = [0.0, 4.0, 1.0, 9.0], [0.0, 1.0, 2.0, 3.0]
    assert _reached(kl, gold, 2.25) == pytest.approx(0.75)  # on the way out; 2.0 to 3.0 comes after the turn
    assert _reached(kl, gold, 6.25) == pytest.approx(2.75)  # root 2.5, of which 1 to 3 is the last part
    assert _reached([0.0, 4.0, 1.0], gold[:3], 4.0) == 1.0
    assert math.isnan(_reached([0.0, 4.0, 1.0], gold[:3], 5.0))
    assert _reached([0.0, 4.0, 4.0, 9.0], gold, 4.0) == 1.0  # two checkpoints at one place


def _flat(gold: float, kl: float, prompts: int = 4) -> Measured:
    return Measured((gold,) * prompts, (kl,) * prompts, (7.0,) * prompts, 1.0)


BASE = ("sft", _flat(0.25, 0.0))


def test_a_method_is_the_mean_of_the_runs_that_get_there() -> None:
    curves = [
        Curve("dpo", "s0", (BASE, ("s0", _flat(1.25, 4.0)))),
        Curve("dpo", "s1", (BASE, ("s1", _flat(2.25, 9.0)))),
        Curve("ipo", "ipo", (BASE, ("ipo", _flat(0.75, 4.0)))),
    ]
    frontier = Frontier(curves, 100)
    cell = frontier.at("dpo", 4.0)
    assert (cell.reached, cell.curves, cell.length) == (2, 2, 7.0)
    assert cell.gold is not None
    assert cell.gold[0] == pytest.approx((1.25 + (0.25 + 2 * 2.0 / 3)) / 2)
    assert cell.gain is not None
    assert cell.gain[0] == pytest.approx(cell.gold[0] - 0.25)  # type: ignore[operator]
    far = frontier.at("dpo", 6.25)
    assert (far.reached, far.gold and far.gold[0]) == (1, pytest.approx(0.25 + 2.5 * 2.0 / 3))
    assert frontier.at("ipo", 6.25).gold is None
    assert frontier.gap("dpo", "ipo", 6.25).gold is None
    gap = frontier.gap("dpo", "ipo", 4.0)
    assert gap.gold is not None
    assert gap.gold[0] == pytest.approx(cell.gold[0] - 0.75)  # type: ignore[operator]


def test_the_runs_of_a_method_vary_as_a_mean_of_as_many() -> None:
    """Prompts that are all alike leave the runs alone: the resamples' variance is s^2 / n."""
    golds = [0.1, 0.4, 1.3, 0.2]
    curves = [Curve("m", str(i), (BASE, (str(i), _flat(gold, 4.0)))) for i, gold in enumerate(golds)]
    mean_RF, _ = Frontier(curves, 20_000)._of("m", 4.0)
    assert mean_RF[0, 0] == pytest.approx(0.5)
    assert mean_RF[1:, 0].var() == pytest.approx(np.var(golds, ddof=1) / 4, rel=0.04)


def _noisy(rng: np.random.Generator, worth_N: np.ndarray, gold: float, kl: float) -> Measured:
    n = len(worth_N)
    length_N = rng.integers(5, 9, n) + 0.0
    gold_N, kl_N = worth_N + gold + 0.3 * rng.normal(size=n), rng.normal(kl, 2.0, n) if kl else np.zeros(n)
    return Measured(tuple(gold_N), tuple(kl_N), tuple(length_N), 1.0)


def _plain(a: Curve, b: Curve, nats: float, resamples: int) -> tuple[list[float], list[float]]:
    """Gold of ``a`` there, and its lead over ``b``: prompts drawn one by one, as a textbook says."""
    rng = np.random.default_rng(5)
    golds, gaps = [], []
    for _ in range(resamples):
        drawn = rng.integers(0, len(a.points[0][1].kl), len(a.points[0][1].kl))
        found = []
        for curve in (a, b):
            points = [(np.mean([p.kl[i] for i in drawn]), np.mean([p.gold[i] for i in drawn])) for _, p in curve.points]
            roots = [math.sqrt(max(float(kl), 0.0)) for kl, _ in points]
            found.append(np.interp(math.sqrt(nats), roots, [gold for _, gold in points]))  # they rise here
        golds.append(float(found[0]))
        gaps.append(float(found[0] - found[1]))
    return golds, gaps


def test_intervals_are_those_of_a_plain_paired_bootstrap_over_prompts() -> None:
    rng = np.random.default_rng(2)
    worth_N = rng.normal(size=60)  # some prompts are harder, for every checkpoint
    base = ("sft", _noisy(rng, worth_N, 0.0, 0.0))
    a = Curve("a", "a", (base, ("a1", _noisy(rng, worth_N, 0.6, 3.0)), ("a2", _noisy(rng, worth_N, 0.8, 9.0))))
    b = Curve("b", "b", (base, ("b1", _noisy(rng, worth_N, 0.3, 3.0)), ("b2", _noisy(rng, worth_N, 0.4, 9.0))))
    frontier = Frontier([a, b], 4000)
    golds, gaps = _plain(a, b, 5.0, 1000)
    cell, gap = frontier.at("a", 5.0), frontier.gap("a", "b", 5.0)
    assert cell.gold is not None
    assert gap.gold is not None
    assert cell.gold[1:] == pytest.approx(np.quantile(golds, [0.025, 0.975]), abs=0.05)
    assert gap.gold[1:] == pytest.approx(np.quantile(gaps, [0.025, 0.975]), abs=0.02)
    assert np.ptp(gaps) < 0.7 * np.ptp(golds), "pairing is what is tested"
    assert gap.parted
    assert not frontier.gap("a", "a", 5.0).parted
    assert frontier.gap("b", "a", 5.0).gold == pytest.approx([-gap.gold[0], -gap.gold[2], -gap.gold[1]])  # type: ignore[operator]


def test_a_kl_that_is_hardly_reached_has_no_interval_and_a_missing_grade_is_left_out() -> None:
    rng = np.random.default_rng(0)
    zeros = np.zeros(40)
    short = _noisy(rng, zeros, 1.0, 5.0)
    nats = float(np.mean(short.kl))
    base = ("sft", _noisy(rng, zeros, 0.0, 0.0))
    frontier = Frontier([Curve("a", "a", (base, ("a", short)))], 500)
    assert frontier.at("a", nats - 1e-9).gold is not None
    assert frontier.at("a", nats + 1e-6).gold is None
    low = dataclasses.replace(short, kl=(*short.kl[:-1], short.kl[-1] + 60))  # one prompt alone gets it so far
    cell = Frontier([Curve("a", "a", (base, ("a", low)))], 500).at("a", nats + 0.8)
    assert cell.gold is not None
    assert cell.gold[1] is not None  # more than half of the resamples hold that prompt
    alone = dataclasses.replace(short, gold=(*[None] * 39, 1.0))
    assert Frontier([Curve("a", "a", (base, ("a", alone)))], 500).at("a", nats - 1e-9).gold[1:] == [None, None]  # type: ignore[index]
    holes = dataclasses.replace(short, gold=(None, *short.gold[1:]))
    cell = Frontier([Curve("a", "a", (base, ("a", holes)))], 500).at("a", nats - 1e-9)
    assert cell.gold is not None
    assert cell.gold[0] == pytest.approx(np.mean(short.gold[1:]), abs=1e-6)  # type: ignore[arg-type]


def test_what_is_said_needs_an_interval_that_leaves_out_nothing() -> None:
    curves = [
        Curve("dpo", "dpo", (BASE, ("dpo", _flat(1.25, 9.0)))),
        Curve("ipo", "ipo", (BASE, ("ipo", _flat(0.75, 4.0)))),
        Curve("slic", "slic", (BASE, ("slic", _flat(0.75, 4.0)))),
    ]
    frontier = Frontier(curves, 100)
    cells = [frontier.at(method, nats) for nats in (4.0, 9.0) for method in frontier.methods]
    said = statements(cells, [gap for nats in (4.0, 9.0) for gap in frontier.gaps(nats)])
    assert said == [
        "4 nats: dpo is above ipo by 0.17 (0.17 to 0.17), slic by 0.17 (0.17 to 0.17).",
        "9 nats: not reached by ipo, slic.",
    ]
    with pytest.raises(UserError, match="different numbers of prompts"):
        Frontier([curves[0], Curve("x", "x", (("sft", _flat(0.0, 0.0, 5)),))])


def test_a_curve_that_gets_there_without_a_grade_is_not_called_short() -> None:
    ungraded = dataclasses.replace(_flat(0.0, 9.0), gold=(None,) * 4)
    curves = [Curve("a", "a", (BASE, ("a", ungraded))), Curve("b", "b", (BASE, ("b", _flat(1.0, 1.0))))]
    frontier = Frontier(curves, 100)
    a, b = (frontier.at(method, 4.0) for method in "ab")
    assert (a.gold, a.reached, a.ungraded) == (None, 0, 1)
    assert (b.gold, b.reached, b.ungraded) == (None, 0, 0)
    assert statements([a, b], frontier.gaps(4.0)) == [
        "4 nats: not reached by b.",
        "4 nats: without a grade are a.",
    ]


# ------------------------------------------------------------------------------------------- a KL that is known


def _exact_kl(policy: Any, reference: Any, ids: list[int], stops: tuple[int, ...]) -> float:
    """KL of replies of at most two tokens, by summing over all of them: transformers' own forward passes."""

    def logps(model: Any, rows: list[list[int]]) -> Tensor:
        with torch.no_grad():
            return torch.cat(
                [model(torch.tensor(rows[i : i + 64])).logits[:, -1].log_softmax(-1) for i in range(0, len(rows), 64)]
            ).double()

    ours, theirs = logps(policy, [ids])[0], logps(reference, [ids])[0]
    total = float((ours.exp() * (ours - theirs)).sum())
    further = [token for token in range(len(ours)) if token not in stops]
    second, of_reference = (logps(model, [[*ids, token] for token in further]) for model in (policy, reference))
    inner = (second.exp() * (second - of_reference)).sum(-1)
    return total + float((ours.exp()[further] * inner).sum())


def test_the_sampled_kl_is_the_exact_one_and_displacement_the_models_own(sft_model: Path, tmp_path: Path) -> None:  # noqa: F811
    model, tokenizer = load_policy(sft_model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    model.save_pretrained(tmp_path / "policy")  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path / "policy")
    policy, start = (AutoModelForCausalLM.from_pretrained(place) for place in (tmp_path / "policy", sft_model))
    chat, prompts = Chat(tokenizer), [prompt(n) for n in range(2)]
    exact = [_exact_kl(policy, start, chat.encode_prompt(p.messages), chat.stop_ids) for p in prompts]
    asked = MeasureConfig(prompts=2, per_prompt=400, sampling={"max_new_tokens": 2})  # type: ignore[arg-type]
    liked = [Liked(p, "good day captain") for p in prompts for _ in range(7)] + [Liked(prompts[0], "no", False)]
    found = measure_offline(
        asked,
        Source(str(tmp_path / "policy")),
        Source(str(sft_model)),
        prompts,
        liked,
        context(tmp_path, "x", sft_model),
    )
    assert found["sampled/replies"] == 800
    # 800 independent draws; the error over two prompts would also hold how they differ.
    assert np.mean(exact) > 0.3
    assert found["sampled/kl"] == pytest.approx(np.mean(exact), abs=4 * (2 * np.mean(exact) / 800) ** 0.5)

    def logp(model: Any, one: Liked) -> Tensor:
        row = chat.encode_reply(one.prompt.messages, one.reply, one.finished)
        with torch.no_grad():
            each = model(torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
        picked = each.gather(1, torch.tensor(row.ids[1:])[:, None])[:, 0]
        return picked[torch.tensor(row.mask[1:])]

    changes = [logp(policy, one) - logp(start, one) for one in liked]
    total = float(sum(change.sum() for change in changes))
    assert found["displacement/chosen"] == pytest.approx(total / 15, abs=1e-4)
    assert found["displacement/chosen_per_token"] == pytest.approx(total / sum(map(len, changes)), abs=1e-4)
    assert found["displacement/sharpest"] == pytest.approx(np.mean([float(c.min()) for c in changes]), abs=1e-4)
    assert found["displacement/sharpest"] < 0
    assert list(found["displacement/sharpest_kinds"]) == ["even"]
    assert list(found["displacement/kinds"]) == ["even"]  # eight replies; the odd prompt has seven
    few = asked.model_copy(update={"per_prompt": 2})
    same = measure_offline(
        few, Source(str(sft_model)), Source(str(sft_model)), prompts, liked, context(tmp_path, "y", sft_model)
    )
    assert (same["sampled/kl"], same["displacement/chosen"]) == (0.0, 0.0)


# ------------------------------------------------------------------------------------------- checkpoints on the way


def _stage(**settings: Any) -> DpoStage:
    base = {"name": "dpo", "optim": FAST, "batch_size": 8, "heldout_fraction": 0.1, "save_every_seconds": 0}
    return DpoStage(**(base | settings))


def test_when_a_checkpoint_is_due() -> None:
    assert DpoStage(name="dpo", keep=3).kept() == (25, 50, 75)
    # Runs were made with either, and their fingerprints hold what was written (docs/recipes.md).
    assert DpoStage(name="dpo", keep=3).settings()["keep"] == 3
    assert DpoStage(name="dpo", keep=[25, 50, 75]).settings()["keep"] == [25, 50, 75]
    assert DpoStage(name="dpo", keep=[50, 10, 50]).kept() == (10, 50)
    assert due(_stage(keep=3), 40) == {10: 25, 20: 50, 30: 75}
    assert due(_stage(keep=[1]), 40) == {1: 1}
    with pytest.raises(UserError, match=r"dpo\.keep: a run of 3 iterations has no 3 different .* keep fewer"):
        due(_stage(keep=3), 3)
    with pytest.raises(UserError, match="different checkpoints before its end"):
        due(_stage(keep=[99]), 10)
    with pytest.raises(ValueError, match="may stop before its end"):
        SftStage(name="sft", keep=2)
    with pytest.raises(ValueError, match="at temperature 1"):
        MeasureConfig(sampling={"temperature": 0.7})  # type: ignore[arg-type]


def test_what_is_kept_are_the_weights_of_its_moment_and_nothing_else_changes(
    sft_model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []
    after = Dpo.after

    def watching(self: Dpo, iteration: int) -> Any:
        seen.append(torch.cat([p.detach().flatten().clone() for p in self.modules["policy"].parameters()]))
        return after(self, iteration)

    monkeypatch.setattr(Dpo, "after", watching)
    optim = OptimConfig(lr=1e-2, average=0.4)

    def trained(name: str, **settings: Any) -> Path:
        c = context(tmp_path / name, "dpo", sft_model)
        seed_rng(0)
        train_dpo(_stage(optim=optim, **settings), preferences(60), sft_model, c)
        return c.stage.path

    plain, kept = trained("plain"), trained("kept", keep=[30, 60])
    steps = len(seen) // 2
    assert (kept / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert sorted(p.name for p in kept.glob("at_*")) == ["at_30", "at_60"]
    for percent in (30, 60):
        moment = seen[steps + round(percent * steps / 100) - 1]
        torch.testing.assert_close(weights(kept / f"at_{percent}"), moment, atol=0, rtol=0)
    assert not torch.equal(weights(kept / "at_30"), weights(kept / "at_60"))
    assert AutoModelForCausalLM.from_pretrained(kept / "at_30").num_parameters() > 0


def test_an_online_stage_keeps_its_rollouts_way(sft_model: Path, tmp_path: Path) -> None:  # noqa: F811
    stage = GrpoStage.model_validate(
        {
            "name": "grpo", "rewards": [{"source": {"kind": "python", "ref": "x:y"}}],
            "sampling": {"max_new_tokens": 4},
            "group_size": 4, "rollout_batch": 16, "episodes": 32, "minibatches": 1, "beta": 0.0, "keep": 1,
            "optim": {"lr": 1e-2},
        }
    )  # fmt: skip
    c = context(tmp_path, "grpo", sft_model)
    train_grpo(stage, [prompt(n) for n in range(20)], LikesO(), None, c)
    moved = [weights(c.stage.path / part) for part in ("at_50", ".")]
    assert not torch.equal(moved[0], weights(sft_model))
    assert not torch.equal(moved[0], moved[1])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.wide), 3])
def test_a_killed_run_ends_with_the_same_checkpoints(
    step: int,
    sft_model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed before the first of them, and while the second was written."""
    update, taken = keel.train.loop._update, [0]

    def mortal(*arguments: Any) -> Any:
        taken[0] += 1
        if taken[0] == step + 1:
            raise Killed
        return update(*arguments)

    def go(name: str) -> Path:
        c = context(tmp_path / name, "dpo", sft_model)
        seed_rng(0)
        train_dpo(_stage(keep=[33, 50]), preferences(50), sft_model, c)
        return c.stage.path

    whole = go("whole")
    with monkeypatch.context() as patched:
        patched.setattr(keel.train.loop, "_update", mortal)
        with pytest.raises(Killed):
            go("killed")
    if step == 3:
        (tmp_path / "killed" / "run" / "dpo" / "at_50.tmp-1").mkdir()
    again = go("killed")
    for part in ("at_33", "at_50", "."):
        name = f"{part}/model.safetensors"
        assert (again / name).read_bytes() == (whole / name).read_bytes(), part


# ------------------------------------------------------------------------------------------------ names in recipes


def _recipe(tmp_path: Path, **evaluation: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(tmp_path)},
        "stages": [
            {"kind": "sft", "name": "sft"},
            {"kind": "dpo", "name": "dpo", "keep": [20, 50]},
            {"kind": "dpo", "name": "ipo", "loss": "ipo", "model": "dpo@20"},
            {"kind": "eval", "name": "eval", "models": ["dpo@50"], **evaluation},
        ],
    }


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            "sft@50",
            "sft is a stage of kind sft, which keeps no checkpoints on its way; name one of base, sft, dpo, dpo@20, "
            "dpo@50, ipo",
        ),
        ("dpo@30", "dpo keeps no checkpoint at 30%; name one of dpo, dpo@20, dpo@50, or set dpo.keep=[20,30,50]"),
        (
            "sft@100",
            "'sft@100' is no checkpoint, as what follows @ is no whole per cent from 1 to 99; the stages there",
        ),
    ],
)
def test_a_checkpoint_that_no_stage_keeps_is_one_sentence(model: str, sentence: str, tmp_path: Path) -> None:
    """What it tells people to do can be done: SFT refuses ``keep``."""
    tree = _recipe(tmp_path)
    rewards = [{"source": {"kind": "python", "ref": "keel.harbor.judge:judge"}}]
    tree["stages"][3] = {"kind": "grpo", "name": "grpo", "model": model, "rewards": rewards}
    recipe = Recipe.model_validate(tree)
    with pytest.raises(UserError) as error:
        parents(recipe, recipe.stages[3])
    assert str(error.value).startswith(f"grpo.model: {sentence}")
    with pytest.raises(ValidationError, match="its way has no fixed parts"):
        Recipe.model_validate({**tree, "stages": [{**tree["stages"][0], "keep": [50]}, *tree["stages"][1:3]]})


def test_checkpoints_are_named_in_recipes(tmp_path: Path) -> None:
    tree = _recipe(tmp_path, frontier={"models": {"dpo": ["dpo"], "late": ["dpo@50"], "ipo": ["ipo"]}})
    recipe = Recipe.model_validate(tree)
    ipo, evaluation = recipe.stages[2:]
    assert parents(recipe, ipo) == ("dpo",)
    assert parents(recipe, evaluation) == ("sft", "dpo", "ipo")
    assert isinstance(evaluation, EvalStage)
    assert evaluation.frontier is not None
    assert evaluation.frontier.runs(recipe.stages) == {
        "dpo": {"dpo": ["dpo@20", "dpo@50", "dpo"]},
        "late": {"dpo": ["dpo@50"]},
        "ipo": {"ipo": ["ipo"]},
    }
    assert [title(name) for name in ("dpo@50", "dpo_s1@5", "sft")] == ["DPO at 50%", "DPO s1 at 5%", "SFT"]
    tree["stages"][3]["models"] = ["dpo@30"]
    with pytest.raises(UserError, match=r"eval\.models\.0: dpo keeps no checkpoint at 30%; name one of dpo, dpo@20,"):
        parents(Recipe.model_validate(tree), Recipe.model_validate(tree).stages[3])
    tree["stages"][3]["models"] = ["sft@50"]
    with pytest.raises(
        UserError, match=r"sft, which keeps no checkpoints on its way; name one of base, sft, dpo, dpo@20, dpo@50"
    ):
        parents(Recipe.model_validate(tree), Recipe.model_validate(tree).stages[3])
    tree["stages"][3]["models"] = ["reward@50"]
    with pytest.raises(UserError, match="'reward@50' is neither a stage nor a file"):
        parents(Recipe.model_validate(tree), Recipe.model_validate(tree).stages[3])


@pytest.mark.parametrize(
    ("frontier", "message"),
    [
        ({"models": []}, "models is empty"),
        ({"models": {"dpo": []}}, "models is empty, or a method of it is"),
        ({"models": ["sft", "dpo"]}, "names sft, from which the KL is measured"),
        ({"models": ["dpo"], "at": [0]}, "greater than 0"),
        ({"models": ["dpo"], "at": []}, "at least 1"),
        ({"models": ["dpo"], "at": [5, 2, 5]}, "at names 5 nats twice"),
        ({"models": ["dpo"], "against": "dpo@20"}, "frontier.against is dpo@20, a checkpoint on the way of dpo"),
        ({"models": ["dpo@20"], "against": "dpo"}, "frontier.against is dpo, the end of a run"),
    ],
)
def test_a_wrong_frontier(frontier: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(_recipe(tmp_path, frontier=frontier))


def test_the_check_asks_for_a_template_where_a_kl_is_measured(tmp_path: Path) -> None:
    from tiny import save_tiny

    tree = _recipe(tmp_path, frontier={"models": ["dpo"], "against": "base"})
    tree["model"]["path"] = str(save_tiny(tmp_path / "plain"))
    for against, errors in (("base", 1), ("sft", 0)):  # sft gives the base a template
        tree["stages"][-1]["frontier"]["against"] = against
        recipe = Recipe.model_validate(tree)
        found = [f for f in _evaluated(recipe.stages[-1], recipe) if "has no chat template" in str(f)]
        assert [f.level for f in found] == ["error"] * errors


def test_the_disk_must_hold_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    recipe = Recipe.model_validate(_recipe(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000 * 2 * 6})())
    run_dir = RunDir(tmp_path / "run")
    said = {stage.name: [str(f) for f in disk(recipe, stage, run_dir)] for stage in recipe.stages}
    assert (said["sft"], said["ipo"]) == ([], [])
    assert "dpo may need" in said["dpo"][0]  # five copies while it trains, and two that it keeps


# ------------------------------------------------------------------------------------------------------ a whole run


def likes_good(prompt: Prompt, text: str) -> float:
    return float(text.count("good")) - 0.1 * len(text.split())


def _whole(tmp: Path, model: Path) -> dict[str, Any]:
    short = {"max_new_tokens": 6, "batch_size": 16}
    asked = write_jsonl(tmp / "asked.jsonl", [{"prompt": prompt(n).messages[0].content} for n in range(12)])
    data = {"preferences": data_files(tmp)["preferences"], "heldout_prompts": asked, "max_length": 120}
    dpo = {"kind": "dpo", "model": "base", "batch_size": 8, "optim": {"lr": 2e-2}, "keep": 1}
    return {
        "model": {"path": str(model)},
        "data": data | {"max_prompt_length": 60},
        "stages": [
            dpo | {"name": "dpo", "measure": {"prompts": 6, "sampling": short}},
            dpo | {"name": "ipo", "loss": "ipo"},
            {
                "kind": "eval", "name": "eval", "models": ["dpo", "dpo@50"], "baseline": "base", "bootstrap": 200,
                "sampling": short, "judge": {"kind": "python", "ref": f"{__file__}:likes_good"},
                "frontier": {"models": {"pairs": ["dpo", "ipo"]}, "at": [0.25, 500]},
            },
            {"kind": "report", "name": "report"},
        ],
    }  # fmt: skip


def test_a_run_compares_its_checkpoints_at_equal_kl(
    sft_model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = _whole(tmp_path, sft_model)
    done = run(recipe, tmp_path / "run")
    measured = done.stage("dpo").summary()
    assert measured["sampled/replies"] == 12
    assert measured["displacement/chosen_per_token"] > 0
    summary = done.summary()
    assert summary["stages"]["dpo@50"]["kl_to_base"] < summary["stages"]["dpo"]["kl_to_base"]
    assert summary["alarms"] == []
    frontier = summary["frontier"]
    assert frontier == done.stage("eval").summary()["frontier"]
    assert [(curve["name"], [point["name"] for point in curve["points"]]) for curve in frontier["curves"]] == [
        ("dpo", ["base", "dpo@50", "dpo"]),
        ("ipo", ["base", "ipo@50", "ipo"]),
    ]
    assert frontier["curves"][0]["points"][0]["kl"] == 0
    near, far = frontier["table"]
    assert near["gold"][1] <= near["gold"][0] <= near["gold"][2]
    assert (far["gold"], far["reached"], far["curves"]) == (None, 0, 2)
    terminal = io.StringIO()
    Console(width=120, file=terminal).print(closing([], summary))
    table = terminal.getvalue()
    assert "score at equal KL from base" in table
    assert f"{near['gold'][0]:.2f} [{near['gold'][1]:.2f}, {near['gold'][2]:.2f}]" in table
    page = done.report.read_text()
    assert "Policies at equal KL" in page
    assert "not reached" in page
    assert find_model(str(done.path), "dpo@50")[1].path == str(done.path / "dpo" / "at_50")
    with pytest.raises(UserError, match=r"no finished stage 'dpo@5' .*dpo@50, ipo@50"):
        find_model(str(done.path), "dpo@5")

    # Who reads it again gets the same curves, prompt by prompt.
    recorded = read_frontier(done.stage("eval").path)
    assert (recorded.against, recorded.at) == ("base", (0.25, 500.0))
    cell = Frontier(recorded.curves, 200, 0).at("pairs", 0.25)
    assert cell.gold == near["gold"]
    with pytest.raises(UserError, match="needs a frontier section"):
        read_frontier(done.stage("dpo").path)

    # A killed evaluation measures what is missing, and comes to the same.
    file = done.stage("eval").path / "frontier.json"
    value = json.loads(file.read_text())
    del value["checkpoints"]["ipo"]
    file.write_text(json.dumps(value))
    mark = done.stage("eval").path / "stage.json"
    mark.write_text(mark.read_text().replace("true", "false"))
    names: list[str] = []
    original = keel.eval.checkpoints._measured

    def counted(name: str, *rest: Any) -> Measured:
        names.append(name)
        return original(name, *rest)

    monkeypatch.setattr(keel.eval.checkpoints, "_measured", counted)
    assert run(recipe, tmp_path / "run").summary()["frontier"] == frontier
    assert names == ["ipo"]
    states = {step.stage.name: step.state for step in plan(Recipe.model_validate(recipe), done)}
    assert set(states.values()) == {"done"}


def test_the_report_shows_every_run_and_what_is_not_reached(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run")
    methods = [f"m{i}" for i in range(8)]
    curves = [
        Curve(m, f"{m}_s{s}", (BASE, ("a", _flat(0.3 + i / 10, 1.0 + i)), ("b", _flat(0.5 + s / 10, 4.0 + i))))
        for i, m in enumerate(methods)
        for s in range(2)
    ]
    summary = json.loads((folder / "summary.json").read_text())
    summary["frontier"] = frontier_summary(Frontier(curves, 100), "sft", [2.0, 10.0]) | {"per_prompt": 2}
    (folder / "summary.json").write_text(json.dumps(summary))
    html = build_report(folder, folder / "report.html").read_text()
    page = Page(html)
    assert {link[1:] for link in page.links} <= set(page.ids)
    section = html.split('<section id="frontier"')[1].split("</section>")[0]
    assert section.count("<polyline") == 16  # a line a run, and a name a method
    assert section.split("</figcaption>")[1].split("</ul>")[0].count("<li>") == 8
    assert section.count('class="line dashed"') == 2 + 4  # the palette has six colours: the last two come again, dashed
    assert section.count("guide") == 2
    assert "not reached" in section
    first = summary["frontier"]["table"][0]
    assert two_places(first["gold"][0]) in section
    assert "Policies at equal KL" not in build_report(write_fake_run(tmp_path / "old"), tmp_path / "o.html").read_text()


def test_curves_are_put_together_by_name() -> None:
    curves = curves_of({"m": {"r": ["sft", "x"]}}, {"sft": BASE[1], "x": _flat(1.0, 2.0)})
    assert curves == [Curve("m", "r", (BASE, ("x", _flat(1.0, 2.0))))]
    assert FrontierConfig(models=["dpo", "dpo@20", "ipo"]).methods == {"dpo": ["dpo", "dpo@20"], "ipo": ["ipo"]}
