"""Every shipped recipe loads, and mistakes in recipes are told clearly."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import keel
from keel.recipe.annotate import AnnotateStage
from keel.recipe.file import Draft, finish, load_recipe, read_draft, split_words
from keel.recipe.ppo import PpoStage
from keel.recipe.recipe import Recipe
from keel.recipe.settings import nearest, settings
from keel.recipe.sft import SftStage
from keel.types import UserError

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))

RECIPE = """\
name: x
model:
  path: ./base
data: {demonstrations: d.jsonl}
stages:
  - kind: sft
    name: first
    optim: {lr: 1e-4}
  - kind: ppo
    name: second
    model: first
    rewards:
      - source: {kind: python, ref: "r.py:f"}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path, ["model.path=./elsewhere"], seed=3)
    assert recipe.model.path == "./elsewhere"
    assert recipe.seed == 3
    assert path.read_text().startswith("#"), "a recipe begins with how it is used"


def test_the_demo_recipe_loads() -> None:
    draft = read_draft(Path(keel.__file__).parent / "harbor" / "demo.yaml")
    draft.tree["model"] = {"path": "x"}
    draft.tree["data"]["pretraining"] = "corpus.jsonl"  # the command fills in both
    recipe = finish(draft)
    assert [s.name for s in recipe.stages if s.kind in ("sft", "dpo", "ppo")] == ["sft", "dpo", "ppo", "ppo_no_kl"]
    ppo, without = recipe.stage("ppo"), recipe.stage("ppo_no_kl")
    assert isinstance(ppo, PpoStage)
    assert isinstance(without, PpoStage)
    # The guardrail is shown by two runs that differ in the KL penalty alone.
    assert without.kl.coef == 0 < ppo.kl.coef
    assert without.model_copy(update={"kl": ppo.kl, "name": "ppo"}) == ppo


def test_the_constitutional_demo_asks_nobody_about_harm() -> None:
    draft = read_draft(Path(keel.__file__).parent / "harbor" / "constitutional.yaml")
    draft.tree["model"] = {"path": "x"}
    recipe = finish(draft)
    asked = [stage.responses for stage in recipe.stages if isinstance(stage, AnnotateStage) and stage.judge is None]
    assert [recipe.stage(name).prompts for name in asked] == ["DATA/helpful_prompts.jsonl"]
    assert {"sl_cai", "sft_best", "dpo", "ppo"} <= set(recipe.stage("eval").models)


def test_settings_are_overridden_by_key(recipe: Path) -> None:
    made = load_recipe(
        recipe,
        [
            "first.optim.lr=3e-4",
            "data.max_length=77",
            "second.kl={coef: 0.5}",
            "second.kl.target=4",
            "second.rewards.0.weight=2",
            "model.lora.rank=4",
            "second.sampling.stop=[a, b]",
            "data.prompts=null",
            "name=other",
        ],
    )
    first, second = made.stages
    assert isinstance(first, SftStage)
    assert isinstance(second, PpoStage)
    assert (first.optim.lr, made.data.max_length, made.name) == (3e-4, 77, "other")
    assert (second.kl.coef, second.kl.target, second.rewards[0].weight) == (0.5, 4.0, 2.0)
    assert made.model.lora is not None
    assert made.model.lora.rank == 4
    assert second.sampling.stop == ["a", "b"]
    assert load_recipe(recipe).stages[0].optim.lr == 1e-4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("first.optim.learning_rate=1", "first.optim.learning_rate: there is no such setting"),
        ("frist.optim.lr=1", "did you mean first.optim.lr?"),
        ("data.demonstration=x", "did you mean data.demonstrations?"),
        ("first.optim.lr.x=1", "there is no such setting"),
        ("second.rewards.5.weight=1", "the list has 1 entries"),
        ("first.kind=ppo", "first.kind: there is no such setting"),
        ("model.path=[", "not valid YAML"),
        ("first.epochs=many", "first.epochs: input should be a valid number"),
        ("seed=-1", "seed: input should be greater than or equal to 0 (got -1)"),
        ("first.optim.lr=.inf", "first.optim.lr: input should be a finite number"),
        ("first.epochs=.inf", "first.epochs: input should be a finite number"),
        ("second.kl.coef=.inf", "second.kl.coef: input should be a finite number"),
        ("second.rewards.0.weight=.nan", "second.rewards.0.weight: input should be a finite number"),
        ("first.optim.betas=[0.9, 1.0]", "first.optim.betas.1: input should be less than 1"),
        ("first.optim.eps=-1", "first.optim.eps: input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_override(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(recipe, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "optim: {lr: 1e-4}",
            "optim: {lrr: 1e-4}",
            "r.yaml:8: first.optim.lrr: there is no such setting; did you mean ",
        ),
        (
            "    name: first",
            "    name: first\n    epoch: 3",
            "r.yaml:8: first.epoch: there is no such setting; did you mean",
        ),
        ("  path: ./base", "  pth: ./base", "model.path: is missing"),
        ("kind: sft", "kind: sftt", "r.yaml:6: first: kind 'sftt' is not one of"),
        ("  - kind: sft\n", "  - epochs: 1\n", "its kind: is missing"),
        ("kind: python, ", "kind: pyton, ", "second.rewards.0.source: kind 'pyton'"),
        ("name: second", "name: first", "stage name 'first' is used twice"),
        ("name: second", "name: data", "stage name 'data' is used twice or is a recipe section"),
        ("name: second", "name: Second Stage", "Second Stage.name: string should match pattern"),
        ("name: x\n", "name: x\nname: y\n", "r.yaml:2: name is given twice (first in line 1)"),
        ("model:\n", "model: [\n", "not valid YAML"),
        ("    name: first", "   name: first", "r.yaml:7: not valid YAML"),
    ],
)
def test_a_wrong_recipe(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    assert old in RECIPE
    path.write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert message in str(error.value)


TWICE = """\
name: x
model:
  path: ./base
stages:
  - &first
    kind: sft
    name: first
    optim: &optim {lr: 1e-4}
  - <<: *first
    name: second
    epochs: 3
  - {kind: sft, name: third, optim: *optim}
"""


def test_what_yaml_aliases_share_is_set_in_one_stage_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(TWICE)
    stages = [s for s in load_recipe(path, ["second.optim.lr=2e-4"]).stages if isinstance(s, SftStage)]
    assert [stage.optim.lr for stage in stages] == [1e-4, 2e-4, 1e-4]
    assert [stage.epochs for stage in stages] == [stages[0].epochs, 3, stages[0].epochs]


def test_an_error_in_what_is_merged_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(TWICE.replace("lr: 1e-4", "lrr: 1e-4"))
    with pytest.raises(UserError) as error:
        load_recipe(path)
    first, second, third = str(error.value).splitlines()
    assert "r.yaml:8: first.optim.lrr: " in first
    assert "r.yaml:8: second.optim.lrr: " in second
    assert "r.yaml:8: third.optim.lrr: " in third


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("lr: 1e-4", "lr: -1").replace("name: x", "name: x\nsede: 1"))
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert len(str(error.value).splitlines()) == 2
    assert "did you mean seed?" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a recipe is a mapping"),
        ("- a", "a recipe is a mapping"),
        ("\x00", "not valid YAML"),
        ("a: &a [*a]", "an alias"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_recipe(path)


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot read this recipe"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="one recipe at a time"):
        split_words(["a.yaml", "b.yaml"])


def test_the_listed_settings_are_those_of_the_models() -> None:
    keys = {setting.key: setting for setting in settings(Recipe)}
    assert keys["data.max_length"].default == "1024"
    assert keys["model.path"].default == "required"
    assert keys["model.lora.rank"].type == "integer"
    # An oracle that is not this walk: pydantic's own JSON schema of one section.
    schema = Recipe.model_json_schema()["$defs"]["DataConfig"]["properties"]
    assert {key.removeprefix("data.") for key in keys if key.startswith("data.")} == set(schema)


def test_nearest_prefers_the_whole_key_then_its_last_part() -> None:
    keys = ["sft.optim.lr", "ppo.kl.coef", "data.max_length"]
    assert nearest("sft.optim.l", keys) == "sft.optim.lr"
    assert nearest("coeff", keys) == "ppo.kl.coef"
    assert nearest("zzzz", keys) is None


def test_the_documented_recipes_exist() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    for path in SHIPPED:
        assert path.name in text, f"docs/recipes.md does not speak of {path.name}"
    for block in text.split("```yaml")[1:]:
        yaml.safe_load(block.split("```")[0])


def test_a_preset_does_not_pass_unheard_over_what_a_run_has_written_out() -> None:
    written = load_recipe(ROOT / "recipes" / "grpo.yaml").model_dump(mode="json")
    with pytest.raises(UserError, match=r"grpo\.preset: .*run/manifest\.json leaves nothing open; start from"):
        finish(Draft(written, "run/manifest.json"), ["grpo.preset=dapo"])
    assert finish(Draft(written, "recipe.yaml"), ["grpo.group_size=4"]).stage("grpo").settings()["group_size"] == 4
