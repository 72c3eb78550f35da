"""Constitutions and cards in a run, with runners that write down what they are given: what is used, what stands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import WORDS

from keel.check.constitutions import constitution_findings
from keel.pipeline.run import plan, run_pipeline
from keel.recipe.annotate import AnnotateStage
from keel.recipe.recipe import Recipe, Stage
from keel.recipe.stage import StageBase
from keel.run import RunDir, Silent, write_json
from keel.stages.context import StageContext
from keel.types import UserError

CONSTITUTION = """name: tiny
principles:
  - {id: kind, text: Be kind., critique: c, revision: r, choose: q, tags: [red]}
  - {id: brief, text: Be brief., critique: c, revision: r, choose: q}
"""
JUDGE = {"kind": "python_feedback", "ref": "f.py:f"}


class World:
    """A recipe that draws from a constitution in two stages. ``texts``: what the critique stage was given."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, RunDir(folder / "run")
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in WORDS[:3]))
        self.file = folder / "c.yaml"
        self.file.write_text(CONSTITUTION)
        self.ran: list[str] = []
        self.texts: list[str] = []
        self.meanwhile: Callable[[], object] = lambda: None  # happens while the first stage runs
        self.alarms: list[dict[str, Any]] = []

    def recipe(self, **changes: Any) -> Recipe:
        named = {"constitution": str(self.file)}
        stages = [
            {"kind": "sample", "name": "sample", "model": "base"},
            {"kind": "critique", "name": "critique", "model": "base", **named},
            {"kind": "annotate", "name": "ai", "responses": "sample", "judge": JUDGE, "tags": ["red"], **named},
            {"kind": "reward", "name": "reward", "model": "base", "preferences": "ai"},
            {"kind": "eval", "name": "eval", "models": ["base"], "baseline": "base", "reward": "reward"},
        ]
        stages = [{**stage, **changes.get(str(stage["name"]), {})} for stage in stages]
        data = {"prompts": str(self.folder / "p.jsonl")}
        tree = {"model": {"path": str(self.folder / "model")}, "data": data, "device": "cpu", "stages": stages}
        return Recipe.model_validate(tree)

    def go(self, recipe: Recipe | None = None) -> list[str]:
        """Runs; the names of the stages that had to."""
        self.ran = []
        kinds = ("sample", "critique", "annotate", "reward", "eval")
        run_pipeline(recipe or self.recipe(), self.run, dict.fromkeys(kinds, self.runner), Silent())
        return self.ran

    def runner(self, stage: Stage, context: StageContext) -> dict[str, Any]:
        self.ran.append(stage.name)
        if stage.name == "sample":
            self.meanwhile()
        if stage.name == "critique":
            self.texts = [principle.text for principle in context.constitution()[1]]
        if stage.name == "eval":
            context.run.write_summary({"alarms": [{"stage": "eval", "name": "kl"}]})
        if isinstance(stage, AnnotateStage) and stage.card is not None:
            write_json(context.stage_dir.path / "judge_card.json", {"bounds": stage.card.bounds()})
            return {"card": {"alarms": self.alarms}}
        return {}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_stage_is_given_the_constitution_that_the_run_was_planned_with(world: World) -> None:
    world.meanwhile = lambda: world.file.write_text(CONSTITUTION.replace("Be kind.", "Be cruel."))
    world.go()
    assert world.texts == ["Be kind.", "Be brief."]
    assert [step.stage.name for step in plan(world.recipe(), world.run) if step.state == "stale"] == [
        "critique", "ai", "reward", "eval",
    ]  # fmt: skip
    world.meanwhile = lambda: None
    world.go()
    assert world.texts == ["Be cruel.", "Be brief."]


@pytest.mark.parametrize(
    ("old", "new", "again"),
    [
        ("name: tiny", "name: great", []),  # it is not shown to any model
        ("tags: [red]", "tags: [red, blue]", []),  # nor is that
        ("Be brief.", "Be very brief.", ["critique"]),  # `ai` draws from the red ones
        ("Be kind.", "Be very kind.", ["critique", "ai", "reward", "eval"]),
        ("id: kind", "id: kindness", ["critique", "ai", "reward", "eval"]),
    ],
)
def test_what_models_may_be_shown_decides_what_stands(world: World, old: str, new: str, again: list[str]) -> None:
    world.go()
    world.file.write_text(CONSTITUTION.replace(old, new))
    assert world.go() == again


def test_the_same_principles_in_another_file_leave_all_as_it_is(world: World) -> None:
    world.go()
    world.file = world.file.rename(world.folder / "d.yaml")
    assert world.go() == []
    world.file.write_text(CONSTITUTION.replace("Be kind.", "Be very kind."))
    assert world.go() == ["critique", "ai", "reward", "eval"]


def test_more_principles_a_pair_than_there_are_is_refused_before_anything_runs(world: World) -> None:
    recipe = world.recipe(ai={"principles_per_pair": 2})
    said = r"ai\.principles_per_pair is 2, and 1 can be drawn from .*c\.yaml \(kind\)"
    with pytest.raises(UserError, match=said) as error:
        world.go(recipe)
    (finding,) = constitution_findings(recipe.stage("ai"), recipe)
    assert world.ran == []
    assert "\n" not in str(error.value)
    assert (finding.level, finding.sentence) == ("error", str(error.value).partition(";")[0])
    assert world.go(world.recipe(ai={"principles_per_pair": 2, "tags": []}))


def card(**bounds: Any) -> dict[str, Any]:
    return {"card": {"against": {"ref": "f.py:g"}, **bounds}}


def test_other_bounds_of_a_card_are_held_against_and_no_stage_behind_runs_again(world: World) -> None:
    world.go(world.recipe(ai=card()))
    for bounds in ({"max_flips": 0.9}, {"max_flips": 0.1, "force": True}, {"min_agreement": 0.7}):
        assert world.go(world.recipe(ai=card(**bounds))) == ["ai"]
        assert world.go(world.recipe(ai=card(**bounds))) == []
    assert world.go(world.recipe(ai=card(pairs=7))) == ["ai", "reward", "eval"]


def test_a_run_made_when_bounds_counted_stands_and_so_do_its_labels(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(AnnotateStage, "settings", StageBase.settings)
        before.setattr(AnnotateStage, "card_bounds", StageBase.card_bounds)
        world.go(world.recipe(ai=card(max_flips=0.3)))
    assert world.go(world.recipe(ai=card(max_flips=0.3))) == []
    path = world.run.path / "ai" / "judge_card.json"
    first = json.loads(path.read_text())["bounds"]
    assert world.go(world.recipe(ai=card(max_flips=0.5))) == ["ai"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"first_bounds": first}))  # as the stage itself does
    assert world.go(world.recipe(ai=card(max_flips=0.5))) == []


def test_alarms_of_a_judges_card_are_among_the_runs(world: World) -> None:
    world.alarms = [{"stage": "ai", "name": "order_flips"}]
    world.go(world.recipe(ai=card()))
    for _ in range(2):
        assert [one["stage"] for one in world.run.summary()["alarms"]] == ["eval", "ai"]
        world.go(world.recipe(ai=card(max_flips=0.9)))
    world.alarms = []
    world.go(world.recipe(ai=card(max_flips=0.8)))
    assert [one["stage"] for one in world.run.summary()["alarms"]] == ["eval"]
