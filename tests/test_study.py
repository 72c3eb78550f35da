"""Studies: what a study file may say, which stages its runs share, what its figures come to by hand, and one tiny study
from the command line to its page."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny import demonstrations, preferences, save_tiny

from keel.cli import main
from keel.cli.study import listing, make_world
from keel.eval.reward_quality import rank_correlation
from keel.harbor import rules
from keel.harbor.annotators import ADVERSARIAL, LAZY, population, with_bad, with_flips
from keel.harbor.facts import World as Harbor
from keel.harbor.prompts import make_prompts
from keel.harbor.replies import read
from keel.pipeline.run import Runner
from keel.recipe.recipe import STAGES, Recipe, Stage
from keel.run import RunDir, Silent
from keel.stages.context import StageContext
from keel.stats import t_interval, t_quantile
from keel.study import run as study_run
from keel.study.figures import MISSING, Value, _mean, measured, read_curves, read_figures
from keel.study.measures import replies
from keel.study.page import render
from keel.study.plan import Curves, Study, World, arm_recipe, read_study, shipped
from keel.study.plan import Harbor as Sizes
from keel.study.results import difference, estimate, summarise
from keel.study.run import Clock, Unit, Work, planned, run_folder, run_units, units_of
from keel.types import Prompt, Reporter, UserError

STUDY: dict[str, Any] = {
    "name": "betas",
    "asks": "Which beta?",
    "minutes": 6,
    "seeds": [0, 1],
    "recipe": {
        "device": "cpu",
        "threads": 1,
        "data": {"max_length": 100},
        "stages": [
            {"kind": "sft", "name": "sft", "model": "base", "epochs": 1, "batch_size": 8, "optim": {"lr": 1e-3}},
            {"kind": "dpo", "name": "dpo", "model": "sft", "batch_size": 16, "optim": {"lr": 1e-3}},
        ],
    },
    "grid": {"beta": {"low": {"dpo.beta": 0.1}, "high": {"dpo.beta": 0.5}}},
    "figures": {
        "margin": {"place": "dpo.rewards/margins", "title": "margin", "better": "more"},
        "loss": {"place": "dpo.metrics.loss", "title": "last loss", "better": "less"},
    },
    "comparisons": [{"arm": "high", "against": "low", "figures": ["margin", "loss"], "more": "So beta shows."}],
    "quick": {"minutes": 1, "seeds": [0]},
}


def changed(**more: Any) -> dict[str, Any]:
    """The study with other top-level keys, a copy."""
    return {**json.loads(json.dumps(STUDY)), **more}


def written(folder: Path, tree: dict[str, Any]) -> str:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A tiny model and its data; a study on them lies beside."""
    save_tiny(tmp_path / "model")
    rows = [{"messages": [{"role": m.role, "content": m.content} for m in d.messages]} for d in demonstrations(24)]
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [
        {"prompt": p.prompt.messages[0].content, "chosen": p.chosen, "rejected": p.rejected} for p in preferences(24)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    tree = changed()
    tree["recipe"]["model"] = {"path": str(tmp_path / "model")}
    tree["recipe"]["data"] |= {
        "demonstrations": str(tmp_path / "demos.jsonl"),
        "preferences": str(tmp_path / "pairs.jsonl"),
    }
    written(tmp_path, tree)
    return tmp_path


# ---------------------------------------------------------------------------------------------------- what it may say


def test_a_grid_has_every_combination_and_settings_are_laid_over_one_another(tmp_path: Path) -> None:
    tree = changed(settings={"dpo.epochs": 2, "dpo.beta": 9})
    tree["recipe"]["model"] = {"path": "m"}
    tree["grid"] = {"beta": {"low": {"dpo.beta": 0.1}, "as_set": {}}, "rate": {"slow": {"dpo.optim.lr": 1e-5}, "x": {}}}
    tree["comparisons"] = []
    tree["quick"] = {"minutes": 1, "settings": {"dpo.epochs": 0.5, "dpo.beta": 3}, "arms": ["low_x", "as_set_x"]}
    place = written(tmp_path, tree)
    made = read_study(place)
    assert list(made.arms) == ["low_slow", "low_x", "as_set_slow", "as_set_x"]
    stage: Any = arm_recipe(made, "low_slow", 7, "sqlite:///s.db", None).stage("dpo")
    recipe = arm_recipe(made, "low_slow", 7, "sqlite:///s.db", None)
    assert (stage.beta, stage.epochs, stage.optim.lr) == (0.1, 2, 1e-5)
    assert (recipe.seed, recipe.store, recipe.name) == (7, "sqlite:///s.db", "betas_low_slow")
    quick = read_study(place, quick=True)
    assert list(quick.arms) == ["low_x", "as_set_x"]
    stages: list[Any] = [arm_recipe(quick, arm, 0, "", None).stage("dpo") for arm in quick.arms]
    assert [(s.beta, s.epochs) for s in stages] == [(0.1, 0.5), (3, 0.5)]
    assert made.minutes == 6
    assert read_study(place, seeds=[3, 4, 5, 3]).minutes == 9  # three seeds in the place of two


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": {}}, r"study\.yaml:\d+: grid: "),
        ({"grid": {"beta": {}}}, "an axis of grid has no values"),
        ({"grid": {"a": {"x": {}, "x_y": {}}, "b": {"y_z": {}, "z": {}}}}, "two arms would be called 'x_y_z'"),
        ({"comparisons": [{"against": "each", "figures": ["margin"]}]}, "there is no arm 'each'"),
        ({"seeds": [1, 1]}, "seeds are different whole numbers"),
        ({"figurs": {}}, "figurs: there is no such key in a study"),
        (
            {"comparisons": [{"against": "lowest", "figures": ["margin"]}]},
            "no arm 'lowest'; the arms are low,",
        ),
        (
            {"comparisons": [{"against": "low", "figures": ["gold"]}]},
            "no figure 'gold'; the figures are margin",
        ),
        ({"choices": [{"title": "x", "where": [{"figure": "margin"}]}]}, "set above or below"),
        ({"quick": {"minutes": 1, "arms": ["none"]}}, "quick.arms: there is no arm 'none'"),
        ({"grid": {"beta": {"data": {}, "high": {}}}, "comparisons": []}, "an arm called data would lie where"),
        ({"recipe": "nowhere"}, "recipe nowhere.yaml is not installed"),
    ],
)
def test_a_wrong_study(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_study(written(tmp_path, changed(**change)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("settings", {"dpo.betta": 1}, "arm low: dpo.betta: there is no such setting; did you mean dpo.beta"),
        ("settings", {"seed": 1}, "seed: a study sets this itself"),
        ("settings", {"dpo.beta": -1}, r"arm high: .*dpo\.beta: input should be greater than 0"),
        ("figures", {"margin": {"place": "ppo.kl", "title": "t"}, "loss": {"place": "dpo.x", "title": "t"}},
         "figures.margin: 'ppo.kl' is no place; .* the stages are sft, dpo"),
        ("curves", [{"title": "t", "place": "ppo.kl", "x": "a", "y": "b", "x_title": "a", "y_title": "b"}],
         "curves: 'ppo.kl' is no place; .* the stages are sft, dpo"),
        ("figures", {**STUDY["figures"], "margin": {"place": "dpo.x", "title": "t", "measure": "no.such:f"}},
         "there is no module"),
    ],
)  # fmt: skip
def test_a_wrong_arm_is_told_before_anything_is_made(files: Path, key: str, value: Any, message: str) -> None:
    tree = yaml.safe_load((files / "study.yaml").read_text())
    tree[key] = value
    if key == "settings" and "dpo.beta" in value:
        tree["grid"] = {"beta": {"low": {"dpo.beta": 0.1}, "high": {}}}

    def none(*_: Any) -> World:
        raise AssertionError("no data before the recipes are right")

    with pytest.raises(UserError, match=message):
        units_of(read_study(written(files, tree | {"harbor": {}})), files / "out", none)
    assert not (files / "out").exists()


# Settings without which a study has nothing to ask: it is skipped where stages do not have them.
NEEDS = {
    "preferences": [("dpo", "keep"), ("dpo", "link"), ("eval", "frontier")],
    "label_noise": [("dpo", "keep"), ("dpo", "label_noise"), ("eval", "frontier")],
    "thumbs_or_pairs": [("dpo", "keep"), ("dpo", "thumbs"), ("annotate", "ask"), ("eval", "frontier")],
    "soft_labels": [("reward", "labels"), ("annotate", "overlap_times")],
}


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_study_makes_a_recipe_of_every_arm(name: str) -> None:
    missing = [f"{kind}.{field}" for kind, field in NEEDS.get(name, ()) if field not in STAGES[kind].model_fields]
    if missing:
        pytest.skip(f"stages have no {', '.join(missing)}")
    for quick in (False, True):
        made = read_study(name, quick)
        sizes = World("model", {n: n for n in made.harbor.names()} if made.harbor else {})
        assert made.study.name == name
        for arm in made.arms:
            recipe = arm_recipe(made, arm, 0, "sqlite:///s.db", sizes)
            study_run.check_places(made.study, recipe)
    assert len(made.arms) >= 2


def test_soft_labels_are_compared_at_equal_steps() -> None:
    """Three votes on a pair are three records, and what is made of them is one: each arm's step has as many pairs."""
    sizes = World("model", {n: n for n in ("demonstrations", "prompts", "heldout_prompts", "pretraining")})
    made = read_study("soft_labels")
    for arm in made.arms:
        for stage in arm_recipe(made, arm, 0, "sqlite:///s.db", sizes).stages:
            if stage.kind == "reward":
                assert (stage.batch_size, stage.epochs) == (24 if stage.votes == "raw" else 8, 2.5)


def test_the_studies_are_listed_with_what_they_ask(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 0
    text = capsys.readouterr().out
    assert set(shipped()) >= {"preferences", "votes", "active", "reward_mix"}
    for name in shipped():
        assert name in text
    assert listing()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["nothing"], "there is no study 'nothing'; Keel has"), (["no.yaml"], "no.yaml: cannot read this study")],
)
def test_a_study_that_is_not_there_is_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", *words]) == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ what runs share


class Fake:
    """Runs studies with runners that only write down that they were called."""

    def __init__(self, out: Path) -> None:
        self.out, self.ran = out, list[str]()
        self.fail_at = ""

    def units(self, tree: dict[str, Any]) -> list[Unit]:
        def no_world(*_: Any) -> World:
            raise AssertionError

        return planned(units_of(read_study(written(self.out.parent, tree)), self.out, no_world))

    def go(self, tree: dict[str, Any]) -> list[str]:
        self.ran = []
        units = self.units(tree)
        expected = len(Work.of(units).left)

        @contextlib.contextmanager
        def showing(unit: Unit, names: Collection[str]) -> Iterator[tuple[dict[str, Runner], Reporter]]:
            def runner(stage: Stage, context: StageContext) -> dict[str, Any]:
                place = f"{unit.seed} {unit.arm} {stage.name}"
                if place == self.fail_at:
                    self.fail_at = ""
                    raise KeyboardInterrupt
                self.ran.append(place)
                (context.stage_dir.path / "weights").write_text(place)
                return {"value": float(unit.seed), "made": place}

            yield dict.fromkeys(STAGES, runner), Silent()

        run_units(units, showing)
        if not self.fail_at:
            assert len(self.ran) == expected
        return self.ran


@pytest.fixture
def fake(files: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setattr(study_run, "preflight", None)
    return Fake(files / "out")


def test_equal_stages_are_computed_once_and_each_run_is_whole(fake: Fake, files: Path) -> None:
    tree = yaml.safe_load((files / "study.yaml").read_text())
    assert fake.go(tree) == ["0 low sft", "0 low dpo", "0 high dpo", "1 low sft", "1 low dpo", "1 high dpo"]
    own, other = (RunDir(run_folder(fake.out, arm, 1)) for arm in ("low", "high"))
    assert other.stage("sft").summary()["made"] == "1 low sft"
    assert other.manifest.read()["stages"]["sft"]["taken_from"] == os.path.join("..", "low", "sft")
    assert own.stage("sft").fingerprint == other.stage("sft").fingerprint
    assert os.stat(own.path / "sft" / "weights").st_ino == os.stat(other.path / "sft" / "weights").st_ino
    assert fake.go(tree) == []
    # An arm that comes later finds what was made before it; a stage that is no more equal is not taken.
    tree["grid"]["beta"]["higher"] = {"dpo.beta": 0.9}
    assert fake.go(tree) == ["0 higher dpo", "1 higher dpo"]
    tree["grid"]["beta"]["high"]["sft.epochs"] = 2
    assert fake.go(tree) == ["0 high sft", "0 high dpo", "1 high sft", "1 high dpo"]
    assert own.stage("sft").summary()["made"] == "1 low sft"  # the link of another run is as it was


def test_changed_data_is_no_reason_to_take_what_was_made_of_the_old(fake: Fake, files: Path) -> None:
    tree = yaml.safe_load((files / "study.yaml").read_text())
    fake.go(tree)
    with (files / "demos.jsonl").open("a") as file:
        file.write((files / "demos.jsonl").read_text().splitlines()[0] + "\n")
    assert fake.go(tree) == ["0 low sft", "0 low dpo", "0 high dpo", "1 low sft", "1 low dpo", "1 high dpo"]
    assert RunDir(run_folder(fake.out, "high", 0)).stage("sft").summary()["made"] == "0 low sft"


@pytest.mark.parametrize("where", ["0 low sft", "0 high dpo", "1 low dpo"])
def test_a_study_that_is_stopped_goes_on_where_it_was(fake: Fake, files: Path, where: str) -> None:
    tree = yaml.safe_load((files / "study.yaml").read_text())
    whole = ["0 low sft", "0 low dpo", "0 high dpo", "1 low sft", "1 low dpo", "1 high dpo"]
    fake.fail_at = where
    with pytest.raises(KeyboardInterrupt):
        fake.go(tree)
    before = list(fake.ran)
    assert before == whole[: whole.index(where)]
    assert fake.go(tree) == whole[whole.index(where) :]


def test_a_stage_that_was_begun_and_not_finished_is_not_taken(fake: Fake, files: Path) -> None:
    tree = yaml.safe_load((files / "study.yaml").read_text())
    fake.go(tree)
    mark = run_folder(fake.out, "low", 0) / "sft" / "stage.json"
    half = json.loads(mark.read_text()) | {"done": False}
    mark.unlink()  # a link: written to in place, the other run's would change too
    mark.write_text(json.dumps(half))
    (run_folder(fake.out, "high", 0) / "sft" / "stage.json").unlink()
    assert fake.go(tree) == ["0 low sft"]
    assert RunDir(run_folder(fake.out, "high", 0)).stage("sft").summary()["made"] == "0 low sft"


def test_the_time_left_is_that_of_like_stages(fake: Fake, files: Path) -> None:
    units = fake.units(yaml.safe_load((files / "study.yaml").read_text()))
    work = Work.of(units)
    assert (work.runs, work.stages, work.done, work.shared, len(work.left)) == (4, 8, 0, 2, 6)
    clock = Clock(work, minutes=1)
    assert clock.left() == pytest.approx(60)
    clock.ended("sft", "sft", 20.0)
    assert clock.left() == pytest.approx(20 + 4 * 10)  # the other seed's sft took as long; the rest is a guess
    clock.ended("dpo", "dpo", 5.0)
    assert clock.left() == pytest.approx(20 + 3 * 5)
    for kind in ("dpo", "dpo", "dpo", "sft"):
        clock.ended(kind, kind, 1.0)
    assert clock.left() == 0


def test_the_built_in_world_is_made_once_for_a_seed(tmp_path: Path) -> None:
    sizes = Sizes(demonstrations=4, prompts=4, heldout_prompts=4, pretraining_tokens=20, base_text_tokens=20, facts=2)
    world = make_world(sizes, 3, tmp_path / "data")
    stamp = os.stat(world.files["prompts"]).st_mtime_ns
    assert make_world(sizes, 3, tmp_path / "data") == world
    assert os.stat(world.files["prompts"]).st_mtime_ns == stamp
    more = make_world(sizes.model_copy(update={"prompts": 5}), 3, tmp_path / "data")
    assert len(Path(more.files["prompts"]).read_text().splitlines()) == 5
    assert Path(world.model).is_dir()


# ------------------------------------------------------------------------------------------------- what figures say


def finished_run(folder: Path) -> RunDir:
    run = RunDir(folder)
    for name, summary in {"sft": {"loss": 1.5}, "dpo": {"deep": {"list": [{"x": 4}, 7.0]}, "none": None}}.items():
        stage = run.stage(name)
        stage.begin(name)
        if name == "dpo":
            stage.metrics.write(0, {"loss": 3.0, "eval/loss": 2.0})
            stage.metrics.write(1, {"loss": 2.5})
        stage.finish(summary)
    return run


MEASURES = """
def of_run(run, recipe):
    with open(run.path / "asked", "a") as file:
        file.write("x")
    return {stage.name: {"hits": {"value": 0.5, "rows": {"a": [1, 2], "b": [1, 2]}}} for stage in recipe.stages}
"""


def test_places_lead_to_values(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    run.write_summary({"stages": {"dpo": {"kl": 3.0}}})
    (tmp_path / "measures.py").write_text(MEASURES)
    ref = f"{tmp_path / 'measures.py'}:of_run"
    places: dict[str, Any] = {
        "plain": {"place": "sft.loss"},
        "listed": {"place": "dpo.deep.list.1"},
        "in_list": {"place": "dpo.deep.list.0.x"},
        "mean": {"place": ["sft.loss", "dpo.deep.list.1"]},
        "minus": {"place": "dpo.deep.list.1", "minus": "sft.loss"},
        "metric": {"place": "dpo.metrics.loss"},
        "rare": {"place": "dpo.metrics.eval/loss"},
        "whole": {"place": "run.stages.dpo.kl"},
        "null": {"place": "dpo.none"},
        "nowhere": {"place": "dpo.deep.list.9"},
        "half": {"place": ["sft.loss", "dpo.none"]},
        "measured": {"place": "dpo.hits", "measure": ref},
        "both": {"place": ["sft.hits", "dpo.hits"], "measure": ref},
        "gap": {"place": "dpo.hits", "minus": "sft.hits", "measure": ref},
    }
    tree = changed(figures={name: {"title": name, **figure} for name, figure in places.items()}, comparisons=[])
    tree["recipe"]["model"] = {"path": "m"}
    made = read_study(written(tmp_path, tree))
    recipe = arm_recipe(made, "low", 0, "", None)
    found = read_figures(made.study, recipe, run)
    values = {name: value.value for name, value in found.items()}
    assert values == {
        "plain": 1.5, "listed": 7.0, "in_list": 4.0, "mean": 4.25, "minus": 5.5, "metric": 2.5, "rare": 2.0,
        "whole": 3.0, "null": None, "nowhere": None, "half": None, "measured": 0.5, "both": 0.5, "gap": 0.0,
    }  # fmt: skip
    assert found["measured"].rows == {"a": (1, 2), "b": (1, 2)}
    assert found["both"].rows == {"a": (2, 4), "b": (2, 4)}
    assert found["gap"].rows == {"a": (0, 2), "b": (0, 2)}
    assert (run.path / "asked").read_text() == "x"  # asked once, and again when the function changes
    (tmp_path / "measures.py").write_text(MEASURES + "\n")
    measured(ref, recipe, run)
    assert (run.path / "asked").read_text() == "xx"
    wrongs = {"nan": ("return {'a': {'b': float('nan')}}", "plain finite"), "zero": ("return 1 / 0", "ZeroDivision")}
    for name, (wrong, says) in wrongs.items():
        (tmp_path / f"{name}.py").write_text(f"def of_run(run, recipe):\n    {wrong}\n")
        with pytest.raises(UserError, match=says):
            measured(f"{tmp_path / name}.py:of_run", recipe, run)


def test_a_mean_of_ratios_has_an_interval_that_holds_it() -> None:
    """Of places whose denominators differ: the ratio of all sums is another number, here 0.2 and not 0.5."""
    few = Value(0.9, {str(i): (0.9 * n, n) for i, n in enumerate((1.0, 2.0) * 20)})
    many = Value(0.1, {str(i): (0.1 * n, n) for i, n in enumerate((9.0, 11.0) * 20)})
    found = _mean([few, many])
    interval = estimate({0: found}, 0.95)
    assert (found.value, interval.low, interval.high) == pytest.approx((0.5, 0.5, 0.5))
    assert interval.method == "prompts"


def test_what_most_resamples_lack_is_not_called_one_seed(tmp_path: Path) -> None:
    tree = changed(seeds=[0, 1])
    tree["recipe"]["model"] = {"path": "m"}
    made = read_study(written(tmp_path, tree))
    lost = {seed: {"margin": Value(1.0, draws=(math.nan,) * 100), "loss": MISSING} for seed in (0, 1)}
    told = {seed: {"margin": Value(0.0, draws=(0.0,) * 100), "loss": MISSING} for seed in (0, 1)}
    said = [row["sentence"] for row in summarise(made, {"low": told, "high": lost})["comparisons"]]
    assert any("most resamples have no value" in sentence for sentence in said)
    assert not any("one seed" in sentence for sentence in said)


def test_a_run_killed_while_it_took_a_stage_over_takes_it_again(
    fake: Fake, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = yaml.safe_load((files / "study.yaml").read_text())

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study_run, "_linked", killed)
        with pytest.raises(KeyboardInterrupt):
            fake.go(tree)
    fake.go(tree)
    for stage in ("sft", "dpo"):
        run = RunDir(run_folder(fake.out, "high", 0))
        entry = run.manifest.read()["stages"][stage]
        assert (entry["status"], run.stage(stage).is_done(entry["fingerprint"])) == ("done", True)


def test_curves_are_read_with_whatever_they_hold(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_summary(
        {"f": {"curves": [{"points": [{"kl": 4.0, "gold": 1.0}, {"kl": None, "gold": 2.0}]}], "none": []}}
    )
    curves = Curves(title="t", place="run.f.curves", x="kl", y="gold", x_title="x", y_title="y", root=True)
    assert read_curves(curves, run) == [[(2.0, 1.0)]]
    assert read_curves(curves.model_copy(update={"place": "run.f.none"}), run) == []
    assert read_curves(curves.model_copy(update={"place": "run.g.none"}), run) == []


def test_students_quantiles_are_those_of_the_tables() -> None:
    """Abramowitz & Stegun 1964, table 26.10, at 0.975."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042}
    assert {n: round(t_quantile(0.975, n), 3) for n in table} == table
    assert t_quantile(0.995, 2) == pytest.approx(9.925, abs=5e-4)
    low, high = t_interval([1.0, 2.0, 4.0]) or (math.nan, math.nan)
    assert (low + high) / 2 == pytest.approx(7 / 3)
    assert (high - low) / 2 == pytest.approx(4.3027 * math.sqrt(7 / 3 / 3), rel=1e-4)  # s^2 = 7/3
    assert t_interval([1.0]) is None


def numbers(*values: float | None) -> dict[int, Value]:
    return {seed: Value(value) for seed, value in enumerate(values)}


def test_differences_are_paired_by_seed() -> None:
    """Seeds differ by much more than arms do: only the paired difference is clear."""
    a, b = numbers(1.1, 5.2, 9.3), numbers(1.0, 5.1, 9.0)
    found = difference(a, b, 0.95)
    assert found.mean == pytest.approx(0.5 / 3)
    half = 4.3027 * math.sqrt(0.04 / 3 / 3)  # gaps 0.1, 0.1, 0.3: s^2 = 0.0133
    assert (found.low, found.high) == pytest.approx((0.5 / 3 - half, 0.5 / 3 + half), rel=1e-3)
    assert found.method == "seeds"
    assert estimate(a, 0.95).high - estimate(a, 0.95).low > 10  # type: ignore[operator]
    assert difference(numbers(1, None, 3), numbers(None, 1, 1), 0.95) == difference({2: Value(3)}, {2: Value(1)}, 0.95)
    assert difference(numbers(None), numbers(1.0), 0.95).mean is None


def test_the_bootstrap_pairs_prompts_and_knows_the_seeds_spread() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(400)  # some prompts are hard for both arms
    ours = {str(i): (float(h > 0.45), 1.0) for i, h in enumerate(hard)}
    theirs = {str(i): (float(h > 0.50), 1.0) for i, h in enumerate(hard)}
    a, b = ({0: Value(float(np.mean([x for x, _ in rows.values()])), rows)} for rows in (ours, theirs))
    gap = difference(a, b, 0.95)
    assert gap.method == "prompts"
    share = float(np.mean((hard > 0.45) & (hard <= 0.50)))  # where they differ
    half = 1.96 * math.sqrt(share * (1 - share) / 400)
    assert gap.mean == pytest.approx(share)
    assert gap.low == pytest.approx(share - half, abs=0.006)
    assert gap.high == pytest.approx(share + half, abs=0.006)
    # Prompts that are all alike leave the seeds' own spread: the standard error of a mean of three, s / sqrt(3).
    alike = {seed: Value(v, {str(i): (v, 1.0) for i in range(50)}) for seed, v in enumerate((0.1, 0.2, 0.6))}
    found = estimate(alike, 0.6827)
    assert found.high is not None
    assert found.low is not None
    assert (found.high - found.low) / 2 == pytest.approx(math.sqrt(0.07 / 3), rel=0.25)  # s^2 = 0.07
    # Resamples that a figure brings along are paired as they come.
    draws = tuple(rng.normal(size=1000))
    moved = {0: Value(1.0, draws=tuple(d + 1 for d in draws))}
    same = difference(moved, {0: Value(0.0, draws=draws)}, 0.95)
    assert (same.low, same.high) == pytest.approx((1.0, 1.0))
    gone = {0: Value(1.0, draws=(math.nan,) * 1000)}
    assert estimate(gone, 0.95).low is None


def result_of(tmp_path: Path, low: list[float | None], high: list[float | None], **more: Any) -> dict[str, Any]:
    tree = changed(seeds=list(range(len(low))), **more)
    tree["recipe"]["model"] = {"path": "m"}
    made = read_study(written(tmp_path, tree))
    by_seed = {"low": low, "high": high}
    values = {
        arm: {seed: {"margin": Value(value), "loss": MISSING} for seed, value in enumerate(own)}
        for arm, own in by_seed.items()
    }
    return summarise(made, values)


@pytest.mark.parametrize(
    ("low", "high", "verdict", "said"),
    [
        ([1.0, 2.0, 3.0], [2.0, 3.1, 3.9], "more", "margin: high is above low by 1"),
        ([2.0, 3.1, 3.9], [1.0, 2.0, 3.0], "less", "which is worse."),
        ([1.0, 2.0, 3.0], [1.5, 1.5, 3.2], "unclear", "high and low cannot be told apart: 0.067 (−1.21"),
        ([1.0], [5.0], "one value", "differs from low by 4 on one seed, which tells nothing."),
        ([1.0, None], [None, 5.0], "missing", "cannot be compared with low, since on no seed both have a value."),
        ([1.0, 2.0, None], [2.0, 3.0, 4.0], "more", "(without seed 2, where there is no value)"),
    ],
)
def test_nothing_is_concluded_where_intervals_do_not_part(
    tmp_path: Path, low: list[float | None], high: list[float | None], verdict: str, said: str
) -> None:
    row = result_of(tmp_path, low, high)["comparisons"][0]
    assert row["verdict"] == verdict
    assert said in row["sentence"]
    assert ("So beta shows." in row["sentence"]) == (verdict == "more")


def test_a_number_is_compared_with_and_arms_are_chosen_by_whole_intervals(tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "comparisons": [{"against": 1.5, "figures": ["margin"]}],
        "choices": [{"title": "Large", "where": [{"figure": "margin", "above": 1.0}]}],
    }
    result = result_of(tmp_path, [2.0, 2.1, 2.2], [0.5, 1.5, 2.9], **more)
    assert [(row["arm"], row["verdict"]) for row in result["comparisons"]] == [("low", "more"), ("high", "unclear")]
    assert result["comparisons"][0]["mean"] == pytest.approx(0.6)
    (choice,) = result["choices"]
    assert (choice["kept"], choice["open"]) == (["low"], ["high"])
    assert choice["sentence"] == "Large: low. Not told, since an interval lies across a bound or is missing: high."
    less = result_of(tmp_path, [2.0, 2.1, 2.2], [0.1, 0.2, 0.3], **more)["choices"][0]
    assert (less["kept"], less["open"]) == (["low"], [])


def test_the_page_has_every_seed_and_needs_nothing_else(tmp_path: Path) -> None:
    plots = [{"title": "One against the other", "x": "margin", "y": "margin"}]
    result = result_of(tmp_path, [1.0, 2.0, None], [2.0, 3.1, 3.9], plots=plots)
    lines = [{"arm": arm, "seed": 0, "points": [[0.0, 1.0], [1.0, 2.0]]} for arm in ("low", "high", "high")]
    result |= {"curves": [{"title": "Curves", "x_title": "x", "y_title": "y", "lines": lines}], "seconds": 61.0}
    page = render(result)
    assert page.count('class="single"') == 5  # every value of the one figure that has any
    assert "1, 2, –" in page
    assert "margin: high is above low" in page
    assert "Of so many comparisons" in page
    assert "://" not in page
    assert "<script" not in page
    assert page.count('<figure class="plot">') == 3  # the plot, and a plot of curves an arm
    assert render(result) == page
    assert "The figures mean nothing" in render(result | {"quick": True})


def test_replies_are_read_prompt_by_prompt(tmp_path: Path) -> None:
    def reply(score: float, correct: bool | None) -> dict[str, Any]:
        return {"text": "t", "finished": True, "score": score, "reward": None, "flags": {"correct": correct}}

    run = RunDir(tmp_path / "run")
    samples = [
        {"prompt": "p", "kind": "", "replies": {"a": reply(1.0, True), "b": reply(0.5, False)}},
        {"prompt": "p", "kind": "", "replies": {"a": reply(0.0, None), "b": reply(0.5, None)}},
    ]
    run.write_summary({"samples": samples})
    found = replies(run, None)  # type: ignore[arg-type]
    assert {model: {name: one["value"] for name, one in own.items()} for model, own in found.items()} == {
        "a": {"score": 0.5, "correct": 1.0},
        "b": {"score": 0.5, "correct": 0.0},
    }
    assert list(found["a"]["score"]["rows"].values()) == [[1.0, 1.0], [0.0, 1.0]]


def test_replies_are_all_there_or_refused(tmp_path: Path) -> None:
    """Ten prompts are kept by default, and a figure of these is not that of all."""
    file = tmp_path / "heldout.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{n}"}) + "\n" for n in range(12)))
    evaluation: dict[str, Any] = {"kind": "eval", "name": "ev", "models": ["base"], "baseline": "base"}
    recipe: dict[str, Any] = {"model": {"path": "base"}, "data": {"heldout_prompts": str(file)}, "stages": [evaluation]}
    tree: dict[str, Any] = {
        "name": "kept", "asks": "Is all there?", "minutes": 1, "seeds": [0], "recipe": recipe,
        "grid": {"arm": {"one": {}}}, "quick": {"minutes": 1},
        "figures": {"score": {"measure": "keel.study.measures:replies", "place": "base.score", "title": "score"}},
    }  # fmt: skip
    study = tmp_path / "kept.yaml"
    study.write_text(json.dumps(tree))
    sentence = (
        r"ev\.show: .* needs the replies to all 12 prompts, and the evaluation keeps those to 10; set ev\.show=12"
    )
    with pytest.raises(UserError, match=f"arm one: {sentence}"):
        units_of(read_study(str(study)), tmp_path / "out", make_world)
    evaluation["show"] = 12
    study.write_text(json.dumps(tree))
    assert len(units_of(read_study(str(study)), tmp_path / "out", make_world)) == 1
    run = RunDir(tmp_path / "run")
    run.write_summary({"samples": [{}] * 10, "stages": {"base": {"prompts": 12}}})
    with pytest.raises(UserError, match=sentence):
        replies(run, Recipe.model_validate(recipe))


# -------------------------------------------------------------------------------------------------------- the harbor


def test_votes_are_flipped_at_the_known_rate() -> None:
    """P(first) of a flipped vote is 0.8 p + 0.2 (1 - p)."""
    prompt = make_prompts(Harbor(), 1, 0, "train")[0]
    for honest, noisy in zip(population(0), with_flips(0), strict=True):
        p = honest.probability_of_first(prompt, "I do not know that.", "zzz zzz")
        assert noisy.name == honest.name
        assert p is not None
        flipped = noisy.probability_of_first(prompt, "I do not know that.", "zzz zzz")
        assert flipped == pytest.approx(0.8 * p + 0.2 * (1 - p))


def test_the_rule_for_sums_and_facts_knows_nothing_else() -> None:
    prompts = make_prompts(Harbor(), 120, 0, "train")
    sums = next(p for p in prompts if p.kind == "arithmetic")
    assert rules.sums_and_facts(sums, f"It is {sums.meta['answer']}.") == 2.0
    assert rules.sums_and_facts(sums, f"It is {int(sums.meta['answer']) + 1}.") == -2.0
    others: list[Prompt] = [p for p in prompts if p.kind not in rules.CHECKED]
    assert {rules.sums_and_facts(p, "It is 7.") for p in others} == {0.0}


def test_spearman_by_hand() -> None:
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 9.0, 100.0])) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 1.0, 3.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-math.sqrt(3) / 2)
    assert rank_correlation(np.array([1.0, 1.0]), np.array([0.0, 1.0])) is None


def test_a_fifth_of_the_annotators_spoil_it() -> None:
    people = with_bad(0)
    honest = {annotator.name: annotator for annotator in population(0)}
    bad = [annotator for annotator in people if annotator.name not in honest]
    assert len(bad) / len(people) == 0.2
    assert [a.name for a in people[: len(honest)]] == list(honest)
    world, rng = Harbor(), random.Random(0)
    prompts = make_prompts(world, 60, 3, "train")
    good, poor = "I do not know that.", "zzz zzz zzz zzz zzz zzz zzz zzz"
    assert read(good, prompts[0].messages[-1].content) != read(poor, prompts[0].messages[-1].content)
    sides = {a.name: [a.judge(p, good, poor, rng).choice for p in prompts] for a in people}
    for name, said in sides.items():
        left = said.count("left") / len(said)
        if name.startswith(LAZY):
            assert 0.3 < left < 0.7
            assert "tie" not in said
        elif name.startswith(ADVERSARIAL):
            assert left < 0.3
        else:
            assert left > 0.6


# ----------------------------------------------------------------------------------------------------- a whole study


def test_a_tiny_study_from_the_command_line(files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["study", str(files / "study.yaml"), "--seed", "1", "--out", str(files / "out")]
    assert main(words) == 0
    said = capfd.readouterr().out
    assert "2 runs of 4 stages: 3 to compute, 1 shared" in said
    assert "seed 1, high: dpo: started" in said
    assert "left in all" in said
    result = json.loads((files / "out" / "study.json").read_text())
    margins = {row["arm"]: row["by_seed"] for row in result["table"] if row["figure"] == "margin"}
    for arm in ("low", "high"):
        summary = json.loads((files / "out" / "seed1" / arm / "dpo" / "summary.json").read_text())
        assert margins[arm] == {"1": summary["rewards/margins"]}
    assert margins["low"] != margins["high"]
    assert (files / "out" / "index.html").read_text().startswith("<!doctype html>")
    assert main(words) == 0
    assert "0 to compute, 0 shared with another run, 4 done" in capfd.readouterr().out
    # One run alone, by hand: what is shared is what it would have made.
    assert main(["run", "--out", str(files / "out" / "seed1" / "high")]) == 0
    assert "sft: up to date" in capfd.readouterr().out


def test_a_study_whose_recipe_the_check_refuses_computes_nothing(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = yaml.safe_load((files / "study.yaml").read_text())
    tree["recipe"]["data"]["preferences"] = str(files / "none.jsonl")
    assert main(["study", written(files, tree), "--out", str(files / "out"), "--quick"]) == 2
    assert "arm low, seed 0: " in capsys.readouterr().err
    assert not list((files / "out").rglob("stage.json"))


def test_a_study_is_strict() -> None:
    with pytest.raises(ValueError, match="extra"):
        Study.model_validate(changed(more=1) | {"recipe": "sft"})
