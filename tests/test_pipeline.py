"""keel.pipeline.run: what is run again and what is not, with runners that only write down that they were called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keel.pipeline.run import plan, run_pipeline
from keel.recipe.graph import ancestors, parents
from keel.recipe.recipe import Recipe, Stage
from keel.run import RunDir, Silent
from keel.stages.context import StageContext
from keel.types import UserError

STAGES: list[dict[str, Any]] = [
    {"kind": "sft", "name": "sft", "model": "base"},
    {"kind": "sample", "name": "sample", "model": "sft"},
    {"kind": "annotate", "name": "annotate", "responses": "sample", "annotators": {"ref": "people.py:population"}},
    {"kind": "reward", "name": "reward", "model": "sft", "preferences": "annotate"},
    {"kind": "dpo", "name": "dpo", "model": "sft", "preferences": "annotate"},
    {
        "kind": "ppo",
        "name": "ppo",
        "model": "sft",
        "critic": "reward",
        "rewards": [{"source": {"kind": "model", "model": "reward"}}],
    },
    {"kind": "eval", "name": "eval", "models": ["base", "dpo", "ppo"], "judge": {"kind": "model", "model": "reward"}},
    {"kind": "report", "name": "report"},
]
NAMES = [stage["name"] for stage in STAGES]


class World:
    """A folder with a model and data, a recipe on it, and a record of which stages ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        self.data = {}
        for name in ("demonstrations", "prompts", "heldout_prompts", "base_text", "facts"):
            (folder / f"{name}.jsonl").write_text(name)
            self.data[name] = str(folder / f"{name}.jsonl")
        (folder / "people.py").write_text("population = None")
        self.run = RunDir(folder / "run")
        self.ran: list[str] = []

    def recipe(self, changes: dict[str, dict[str, Any]] | None = None, **sections: Any) -> Recipe:
        stages = [{**stage, **(changes or {}).get(stage["name"], {})} for stage in STAGES]
        for stage in stages:
            if stage["name"] == "annotate":
                stage["annotators"] = {"ref": f"{self.folder / 'people.py'}:population"}
        tree = {"model": {"path": str(self.folder / "model")}, "data": self.data, "device": "cpu", "stages": stages}
        return Recipe.model_validate({**tree, **sections})

    def go(self, recipe: Recipe | None = None, targets: list[str] | None = None) -> list[str]:
        """Runs; returns the names of the stages that had to."""
        self.ran = []

        def runner(stage: Stage, context: StageContext) -> dict[str, Any]:
            self.ran.append(stage.name)
            return {"name": stage.name}

        run_pipeline(recipe or self.recipe(), self.run, dict.fromkeys(_KINDS, runner), Silent(), targets)
        return self.ran


_KINDS = ("sft", "sample", "annotate", "reward", "dpo", "ppo", "eval", "report")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_second_run_does_nothing(world: World) -> None:
    assert [step.state for step in plan(world.recipe(), world.run)] == ["todo"] * 8
    assert world.go() == NAMES
    assert world.go() == []
    assert {step.state for step in plan(world.recipe(), world.run)} == {"done"}


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"dpo": {"beta": 0.2}}, ["dpo", "eval", "report"]),
        ({"sft": {"epochs": 5}}, NAMES),
        ({"annotate": {"overlap": 0.5}}, ["annotate", "reward", "dpo", "ppo", "eval", "report"]),
        ({"ppo": {"kl": {"coef": 0.0}}}, ["ppo", "eval", "report"]),
        ({"report": {"title": "x"}}, ["report"]),
        ({"sft": {"log_every": 9, "save_every_seconds": 1}}, []),
    ],
)
def test_a_changed_setting_redoes_its_stage_and_what_rests_on_it(
    world: World, change: dict[str, dict[str, Any]], again: list[str]
) -> None:
    world.go()
    assert world.go(world.recipe(change)) == again


@pytest.mark.parametrize(
    ("file", "again"),
    [
        ("demonstrations.jsonl", NAMES),
        ("prompts.jsonl", ["sample", "annotate", "reward", "dpo", "ppo", "eval", "report"]),
        ("facts.jsonl", ["eval", "report"]),
        ("people.py", ["annotate", "reward", "dpo", "ppo", "eval", "report"]),
        ("model/config.json", NAMES),
    ],
)
def test_changed_data_redoes_what_read_it(world: World, file: str, again: list[str]) -> None:
    world.go()
    (world.folder / file).write_text("something else")
    assert world.go() == again


def test_moved_data_with_the_same_content_redoes_nothing(world: World) -> None:
    world.go()
    for name in world.data:
        moved = world.folder / f"moved-{name}"
        Path(world.data[name]).rename(moved)
        world.data[name] = str(moved)
    assert world.go() == []


def test_another_seed_redoes_everything(world: World) -> None:
    world.go()
    steps = plan(world.recipe(seed=1), world.run)
    assert {step.state for step in steps} == {"stale"}
    assert steps[0].reason == "its settings or data changed"
    assert steps[-1].reason.startswith("sft, sample")
    assert world.go(world.recipe(seed=1)) == NAMES


def test_targets_run_with_what_they_rest_on(world: World) -> None:
    assert world.go(targets=["dpo"]) == ["sft", "sample", "annotate", "dpo"]
    assert world.go(targets=["report"]) == ["report"]  # of what there is
    assert ancestors(world.recipe(), ["ppo"]) == {"sft", "sample", "annotate", "reward", "ppo"}


def test_an_interrupted_stage_is_entered_again_with_its_state(world: World) -> None:
    def stopped(stage: Stage, context: StageContext) -> dict[str, Any]:
        context.stage_dir.save_state({"step": 7})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pipeline(world.recipe(), world.run, {"sft": stopped}, Silent(), ["sft"])
    entry = world.run.manifest.read()["stages"]["sft"]
    assert entry["status"] == "interrupted"
    step = plan(world.recipe(), world.run)[0]
    assert (step.state, step.reason) == ("todo", "interrupted, goes on from its last saved state")
    seen = []

    def resumed(stage: Stage, context: StageContext) -> dict[str, Any]:
        seen.append(context.stage_dir.load_state())
        return {}

    run_pipeline(world.recipe(), world.run, {"sft": resumed}, Silent(), ["sft"])
    assert seen == [{"step": 7}]
    assert plan(world.recipe(), world.run)[0].state == "done"


def test_an_interrupted_stage_with_other_settings_starts_afresh(world: World) -> None:
    def stopped(stage: Stage, context: StageContext) -> dict[str, Any]:
        context.stage_dir.save_state({"step": 7})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pipeline(world.recipe(), world.run, {"sft": stopped}, Silent(), ["sft"])
    seen = []

    def fresh(stage: Stage, context: StageContext) -> dict[str, Any]:
        seen.append(context.stage_dir.load_state())
        return {}

    run_pipeline(world.recipe({"sft": {"epochs": 9}}), world.run, {"sft": fresh}, Silent(), ["sft"])
    assert seen == [None]


def test_the_manifest_tells_the_lineage(world: World) -> None:
    world.go()
    manifest = world.run.manifest.read()
    assert manifest["seed"] == 0
    assert manifest["device"] == "cpu"
    assert set(manifest["versions"]) == {"keel", "python", "torch", "transformers"}
    assert Recipe.model_validate(manifest["recipe"]) == world.recipe()
    assert list(manifest["stages"]) == NAMES
    stages = manifest["stages"]
    assert stages["reward"]["parents"] == {
        "sft": stages["sft"]["fingerprint"],
        "annotate": stages["annotate"]["fingerprint"],
    }
    assert set(stages["ppo"]["parents"]) == {"sft", "reward"}
    assert set(stages["eval"]["parents"]) == {"sft", "reward", "dpo", "ppo"}  # the baseline is sft
    assert all(entry["status"] == "done" and entry["peak_rss_mb"] > 1 for entry in stages.values())
    assert manifest["data"][str(world.folder / "facts.jsonl")]["sha256"]
    assert world.run.stage("dpo").summary() == {"name": "dpo"}


def test_the_runs_summary_gets_the_times(world: World) -> None:
    world.run.path.mkdir()
    world.run.write_summary({"stages": {}})
    world.go()
    summary = world.run.summary()
    stages = [value for name, value in summary["seconds"].items() if name != "total"]
    assert len(stages) == 8
    assert summary["seconds"]["total"] == pytest.approx(sum(stages), abs=1e-3)
    assert summary["peak_rss_mb"] > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sft": {"model": "nowhere"}},
            "sft.model: 'nowhere' is neither a stage nor a file or folder; the stages there",
        ),
        ({"sample": {"model": "ppo"}}, "sample.model: stage 'ppo' comes after 'sample'"),
        ({"dpo": {"reference": "dpo"}}, "dpo.reference: a stage cannot use its own result"),
        ({"dpo": {"model": "reward"}}, "dpo.model: 'reward' is a stage of kind reward"),
        ({"dpo": {"preferences": "sample"}}, "dpo.preferences: 'sample' is a stage of kind sample"),
        ({"annotate": {"responses": "base"}}, "annotate.responses: 'base' is no sample stage"),
        (
            {"ppo": {"rewards": [{"source": {"kind": "model", "model": "sft"}}]}},
            "ppo.rewards.0.source.model: 'sft' is a stage of kind sft",
        ),
        ({"eval": {"models": ["base", "typo"]}}, "eval.models.1: 'typo' is neither"),
        ({"eval": {"judge": {"kind": "model", "model": "eval"}}}, "eval.judge.model: a stage cannot use its own"),
    ],
)
def test_references_that_lead_nowhere(world: World, change: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError) as error:
        plan(world.recipe(change), world.run)
    assert str(error.value).startswith(message)
    assert not world.run.path.exists()


def test_a_folder_may_stand_in_for_a_stage(world: World) -> None:
    (world.folder / "other").mkdir()
    (world.folder / "other" / "config.json").write_text("1")
    (world.folder / "pairs.jsonl").write_text("1")
    change = {"dpo": {"model": str(world.folder / "other"), "preferences": str(world.folder / "pairs.jsonl")}}
    recipe = world.recipe(change)
    assert parents(recipe, recipe.stage("dpo")) == ()
    world.go(recipe)
    (world.folder / "other" / "config.json").write_text("2")
    assert world.go(recipe) == ["dpo", "eval", "report"]


def test_the_context_finds_models(world: World) -> None:
    recipe = world.recipe({"ppo": {"reference": str(world.folder), "critic": "base"}})
    context = StageContext(recipe, world.run, world.run.stage("ppo"), Silent(), "cpu")
    assert context.model_path("base") == world.folder / "model"
    assert context.model_path("sft") == world.run.path / "sft"
    assert context.model_path(str(world.folder)) == world.folder
    assert context.parent("sft").path == world.run.path / "sft"
    for find in (context.model_path, context.parent):
        call: Callable[[str], object] = find
        with pytest.raises(UserError, match=r"stage ppo: .*'typo'.*base, sft, sample"):
            call("typo")


def test_a_failing_preflight_stops_before_the_stage_is_touched(world: World) -> None:
    world.go()
    calls: list[str] = []

    def preflight(stage: Stage, context: StageContext) -> None:
        calls.append(stage.name)
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        run_pipeline(world.recipe({"dpo": {"beta": 1}}), world.run, {"dpo": lambda *_: {}}, Silent(), None, preflight)
    assert calls == ["dpo"]
    assert world.run.stage("dpo").summary() == {"name": "dpo"}


def test_an_unreadable_device(world: World) -> None:
    with pytest.raises(UserError, match="device: cuda:99 does not exist"):
        plan(world.recipe(device="cuda:99"), world.run)


def test_the_content_cache_does_not_hide_a_change_of_equal_size(world: World) -> None:
    world.go()
    path = world.folder / "facts.jsonl"
    before = path.read_text()
    path.write_text(before[::-1])
    assert world.go() == ["eval", "report"]
    assert json.loads((world.run.path / "manifest.json").read_text())["data"][str(path)]["sha256"]
