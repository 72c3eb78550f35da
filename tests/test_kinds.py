"""A kind of stage stands in one place: it is whole, it reads what it declares and no more, and a new one is small."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from pydantic import Field

from keel.pipeline.fingerprint import Contents, stage_fingerprint
from keel.recipe.annotate import AnnotateStage
from keel.recipe.critique import CritiqueStage
from keel.recipe.declared import StoreRead
from keel.recipe.eval import EvalStage
from keel.recipe.file import load_recipe, packaged
from keel.recipe.graph import parents
from keel.recipe.kinds import stage_kinds
from keel.recipe.ppo import PpoStage
from keel.recipe.process_reward import ProcessRewardStage
from keel.recipe.recipe import STAGES, Recipe
from keel.recipe.reward import RewardStage
from keel.recipe.sample import SampleStage
from keel.recipe.sft import SftStage
from keel.recipe.step_labels import StepLabelsStage
from keel.report.kinds import KINDS
from keel.run import RunDir, Silent
from keel.stages import inputs
from keel.stages.context import StageContext, UndeclaredRead
from keel.stages.process_reward import step_labels
from keel.stages.registry import RUNNERS
from keel.stages.scoring import make_judge, mixed_scorer
from keel.stages.training import watching_judge
from keel.store.trained_on import VoteHashes


@pytest.mark.parametrize("kind", STAGES)
def test_a_kind_is_whole(kind: str) -> None:
    assert STAGES[kind].help
    assert kind in RUNNERS
    assert kind in KINDS, "a row of the report"
    assert kind in {stage.kind for stage in load_recipe(packaged(kind)).stages}
    assert re.search(rf"^\| `{kind}` \| .+ \| .+ \|$", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE)


def test_no_list_of_kinds_has_more() -> None:
    assert set(RUNNERS) == set(KINDS) == set(STAGES)
    # The help reads the files' text, since to import them is slow.
    assert list(stage_kinds().items()) == [(kind, stage.help) for kind, stage in STAGES.items()]


# -------------------------------------------------------------------------------------- what is read is declared


DATA = ("demonstrations", "prompts", "preferences", "heldout_prompts", "pretraining", "base_text", "facts")


class World:
    """A recipe of every reading kind, with a file for each setting of the data."""

    def __init__(self, folder: Path) -> None:
        (folder / "judge.py").write_text("def score(prompt, text):\n    return 0.0\n")
        self.python = {"kind": "python", "ref": f"{folder / 'judge.py'}:score"}
        (folder / "base").mkdir()
        one = dict.fromkeys(("id", "text", "critique", "revision", "choose"), "x")
        (folder / "c.yaml").write_text(json.dumps({"name": "c", "principles": [one]}))
        rows = {name: {"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c", "text": name} for name in DATA}
        for name, row in rows.items():
            (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        steps = {"prompt": "a", "completions": ["b"], "labels": [1]}
        (folder / "steps.jsonl").write_text(json.dumps(steps) + "\n")
        term = {"source": {"kind": "model", "model": "reward"}}
        self.tree: dict[str, Any] = {
            "model": {"path": str(folder / "base")},
            "data": {name: str(folder / f"{name}.jsonl") for name in DATA},
            "device": "cpu",
            "stages": [
                {"kind": "sft", "name": "sft", "demonstrations": ["people"]},
                {"kind": "sft", "name": "plain", "ptx": {"coef": 1.0}},
                {"kind": "sample", "name": "sample"},
                {"kind": "annotate", "name": "annotate", "annotators": self.python},
                {"kind": "reward", "name": "reward", "preferences": "annotate"},
                {"kind": "reward", "name": "pairs"},
                {"kind": "ppo", "name": "ppo", "rewards": [term], "watch": self.python},
                {"kind": "sft", "name": "again", "demonstrations": "sample"},
                {"kind": "reward", "name": "own", "preferences": [f"{folder}/preferences.jsonl"]},
                {"kind": "sample", "name": "more", "prompts": f"{folder}/prompts.jsonl"},
                {"kind": "critique", "name": "critique", "model": "base", "constitution": f"{folder}/c.yaml"},
                {"kind": "reward", "name": "revised", "preferences": "critique"},
                {"kind": "process_reward", "name": "prm", "labels": f"{folder}/steps.jsonl"},
                {"kind": "step_labels", "name": "mc", "responses": "sample", "verify": self.python},
                {
                    "kind": "step_labels",
                    "name": "own_labels",
                    "prompts": f"{folder}/prompts.jsonl",
                    "verify": self.python,
                },
                {"kind": "eval", "name": "eval", "models": ["base", "ppo"], "judge": self.python, "reward": "reward"},
            ],
        }
        self.run = RunDir(folder / "run")
        for stage in self.tree["stages"]:
            self.run.stage(stage["name"]).begin("f")
        (self.run.path / "annotate" / "truth.json").write_text("{}")

    def context(self, name: str) -> StageContext:
        return StageContext(Recipe.model_validate(self.tree), self.run, self.run.stage(name), Silent(), "cpu")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def without(*names: str) -> Callable[..., tuple[str, ...]]:
    """A kind's ``reads`` that forgets some."""
    return lambda self, data: tuple(name for name in (*DATA, "on_bad_row", "heldout_fraction") if name not in names)


def nothing(*_: Any) -> list[Any]:
    return []


# (the kind's class, what it forgets, the stage, what its runner does, the sentence)
FORGOTTEN: list[tuple[Any, str, Any, str, Callable[[Any, StageContext], object], str]] = [
    (SftStage, "reads", without("demonstrations"), "plain", inputs.demonstrations, "data.demonstrations"),
    (SftStage, "reads", without("on_bad_row"), "plain", inputs.demonstrations, "data.on_bad_row"),
    (SftStage, "from_store", lambda *_: StoreRead(), "sft", inputs.demonstrations, "the store"),
    (SftStage, "references", nothing, "again", inputs.demonstrations, "stage sample"),
    (SftStage, "references", nothing, "plain", lambda s, c: c.source(s.model), "the checkpoint base"),
    (SftStage, "uses_model", False, "plain",
     lambda s, c: c.source(s.model), "the checkpoint base and the recipe's model section"),
    (RewardStage, "reads", without("preferences"), "pairs", inputs.preferences, "data.preferences"),
    (RewardStage, "references", nothing, "reward", inputs.preferences, "stage annotate"),
    (RewardStage, "from_store", lambda *_: StoreRead(), "reward", inputs.preferences, "the store"),
    (RewardStage, "files", lambda _: {}, "own", inputs.preferences, "the file .*preferences.jsonl"),
    (ProcessRewardStage, "files", lambda _: {}, "prm", step_labels, "the file .*steps.jsonl"),
    (ProcessRewardStage, "reads", without("on_bad_row"), "prm", step_labels, "data.on_bad_row"),
    (SampleStage, "files", lambda _: {}, "more",
     lambda s, c: inputs.training_prompts(s.prompts, c), "the file .*prompts.jsonl"),
    (SampleStage, "reads", without("prompts"), "sample",
     lambda s, c: inputs.training_prompts(s.prompts, c), "data.prompts"),
    (SampleStage, "reads", without("heldout_prompts"), "sample",
     lambda s, c: inputs.training_prompts(s.prompts, c), "data.heldout_prompts"),
    (SampleStage, "stored", "nothing", "sample", lambda s, c: c.store_url, "the store"),
    (EvalStage, "reads", without("heldout_prompts"), "eval",
     lambda s, c: inputs.heldout_prompts(s.prompts, c), "data.heldout_prompts"),
    (EvalStage, "reads", without("facts"), "eval", RUNNERS["eval"], "data.facts"),
    (EvalStage, "scored_by", nothing, "eval", lambda s, c: make_judge(s.judge, c, "fp32"), "the function .*score"),
    (PpoStage, "scored_by", nothing, "ppo", watching_judge, "the function .*score"),
    (PpoStage, "scored_by", nothing, "ppo", lambda s, c: mixed_scorer(s.rewards, c, "fp32"), "stage reward"),
    (CritiqueStage, "principles", lambda _: None, "critique", lambda s, c: c.constitution(), "a constitution"),
    (CritiqueStage, "reads", without("prompts"), "critique",
     lambda s, c: inputs.training_prompts(s.prompts, c), "data.prompts"),
    (CritiqueStage, "references", nothing, "critique", lambda s, c: c.source(s.model), "the checkpoint base"),
    (RewardStage, "references", nothing, "revised", inputs.preferences, "stage critique"),
    (StepLabelsStage, "references", nothing, "mc", lambda s, c: c.parent(s.responses), "stage sample"),
    (StepLabelsStage, "references", nothing, "mc", lambda s, c: c.store_url, "the store"),
    (StepLabelsStage, "references", nothing, "mc", lambda s, c: c.source(s.model), "stage sft"),
    (StepLabelsStage, "scored_by", nothing, "mc", lambda s, c: make_judge(s.verify, c, "fp32"), "the function .*score"),
    (StepLabelsStage, "files", lambda _: {}, "own_labels",
     lambda s, c: inputs.training_prompts(s.prompts, c), "the file .*prompts.jsonl"),
    (AnnotateStage, "scored_by", nothing, "annotate", lambda s, c: c.python(s.annotators), "the function .*score"),
    (AnnotateStage, "references", nothing, "annotate", lambda s, c: c.parent(s.responses), "stage sample"),
]  # fmt: skip


@pytest.mark.parametrize("case", FORGOTTEN, ids=lambda c: f"{c[3]} forgets {c[1]}: {c[5]}")
def test_a_kind_that_forgets_to_declare_what_it_reads_fails(
    case: tuple[Any, str, Any, str, Callable[[Any, StageContext], object], str],
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, attribute, forgetful, name, read, sentence = case
    monkeypatch.setattr(kind, attribute, forgetful)
    if read is RUNNERS["eval"]:  # it looks for its models first
        monkeypatch.setattr(StageContext, "source", lambda self, name: None)
    context = world.context(name)
    with pytest.raises(UndeclaredRead, match=f"stage {name} reads {sentence}, which {kind.__name__} does not declare"):
        read(context.stage, context)


def test_a_runner_reaches_other_stages_through_its_context_alone() -> None:
    """Everything else that a run's folder has would be read unseen."""
    allowed = {"eval.py": {"write_summary"}, "report.py": {"path", "report"}}
    for file in sorted((ROOT / "keel" / "stages").glob("*.py")):
        used = set(re.findall(r"context\.run\.(\w+)", file.read_text()))
        assert used <= allowed.get(file.name, set()), file.name


def test_an_evaluation_reads_what_its_reward_models_may_read(world: World) -> None:
    context = world.context("eval")
    with pytest.raises(UndeclaredRead):
        inputs.preferences(context.recipe.stage("reward"), context)  # type: ignore[arg-type]
    assert context.seen_by("reward").parent("annotate").name == "annotate"
    with pytest.raises(UndeclaredRead, match="reads stage plain"):
        context.seen_by("plain")


def test_held_out_prompts_count_once_people_have_worked(world: World) -> None:
    """Their work on the evaluation's prompts is left out, so a stage that learns from them depends on which those are.
    Runs in which nobody has worked keep their fingerprints."""

    def fingerprints(votes: VoteHashes) -> dict[str, str]:
        recipe = Recipe.model_validate(world.tree)
        found: dict[str, str] = {}
        for stage in recipe.stages:
            above = dict.fromkeys(parents(recipe, stage), "same")
            found[stage.name] = stage_fingerprint(recipe, stage, above, "cpu", Contents({}), votes)
        return found

    work = VoteHashes(people="p", written="w")
    before, none_before = fingerprints(work), fingerprints(VoteHashes())
    path = Path(world.tree["data"]["heldout_prompts"])
    path.write_text(path.read_text() + '{"prompt": "b"}\n')
    after, none_after = fingerprints(work), fingerprints(VoteHashes())
    assert {n for n in before if before[n] != after[n]} == {
        "sft",
        "reward",
        "sample",
        "more",
        "ppo",
        "critique",
        "own_labels",
        "eval",
    }
    always = {"sample", "more", "ppo", "critique", "own_labels", "eval"}
    assert {n for n in before if none_before[n] != none_after[n]} == always


# ------------------------------------------------------------------------------------------------------ a new kind

TOY = '''"""Settings of a tally."""

from __future__ import annotations

from typing import ClassVar, Literal

from keel.recipe.declared import Makes, prompt_pool
from keel.recipe.sections import DataConfig
from keel.recipe.stage import StageBase


class TallyStage(StageBase):
    help: ClassVar[str] = "answer every prompt with its number of words"
    makes: ClassVar[tuple[Makes, ...]] = ("demonstrations",)
    uses_model: ClassVar[bool] = False

    kind: Literal["tally"] = "tally"
    unit: str = "words"

    def reads(self, data: DataConfig) -> tuple[str, ...]:
        return (*prompt_pool(data), "on_bad_row")
'''

TOY_RUNNER = '''"""A tally."""

from __future__ import annotations

from typing import Any

from keel.recipe.tally import TallyStage
from keel.stages.context import StageContext
from keel.stages.inputs import KEPT, training_prompts, write_kept
from keel.types import Completion


def run_tally(stage: TallyStage, context: StageContext) -> dict[str, Any]:
    prompts = training_prompts(None, context)
    counts = [len(prompt.messages[-1].content.split()) for prompt in prompts]
    replies = [[Completion(f"{count} {stage.unit}")] for count in counts]
    write_kept(context.stage_dir.path / KEPT, prompts, replies)
    return {"tallied": len(prompts), "words": sum(counts)}
'''

TOY_SCRIPT = """
from keel.cli import main
from keel.pipeline.run import plan
from keel.recipe.file import load_recipe
from keel.recipe.graph import parents
from keel.recipe.tally import TallyStage
from keel.run import RunDir
from keel.stages.context import UndeclaredRead

assert main(["run", "recipe.yaml", "--out", "run"]) == 0
recipe = load_recipe("with_sft.yaml")
assert parents(recipe, recipe.stage("sft")) == ("tally",)

run, recipe = RunDir("run"), load_recipe("recipe.yaml")
assert [step.state for step in plan(recipe, run)] == ["done", "done"]
with open("prompts.jsonl", "a") as file:
    file.write('{"prompt": "two words"}\\n')
assert [step.state for step in plan(recipe, run)] == ["stale", "stale"]

try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0

TallyStage.reads = lambda self, data: ("on_bad_row",)  # forgets the prompts
try:
    main(["run", "recipe.yaml", "--out", "run3"])
except UndeclaredRead as error:
    print(error)
else:
    raise AssertionError("the stale result passed for a fresh one")
"""


def test_a_new_kind_touches_five_files(tmp_path: Path, subprocess_env: dict[str, str]) -> None:
    """Two of its own, and a row in three: the union of stages, the runners, the report."""
    package = tmp_path / "keel"
    shutil.copytree(ROOT / "keel", package, ignore=shutil.ignore_patterns("harbor", "web"))
    before = _sources(package)
    (package / "recipe" / "tally.py").write_text(TOY)
    (package / "stages" / "tally.py").write_text(TOY_RUNNER)
    for file, place, line in [
        ("recipe/recipe.py", "\nStage = Annotated[", "from keel.recipe.tally import TallyStage\n"),
        ("recipe/recipe.py", "    SftStage\n", "    TallyStage |\n"),
        ("stages/registry.py", "\nRUNNERS: Mapping", "from keel.stages.tally import run_tally\n"),
        ("stages/registry.py", '    "sft": run_sft,\n', '    "tally": run_tally,\n'),
        ("report/kinds.py", '    "sft": Kind(\n', '    "tally": Kind(facts=(Shown("words counted", "words"),)),\n'),
    ]:
        text = (package / file).read_text()
        assert text.count(place) == 1, f"{file}: {place}"
        (package / file).write_text(text.replace(place, line + place))
    assert len(_sources(package) - before) == 5

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "how many words"}\n')
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "unseen"}\n')
    top = "model: {path: base}\ndata: {prompts: prompts.jsonl, heldout_prompts: heldout.jsonl}\nstages:\n"
    tally = "  - {kind: tally, name: tally}\n"
    (tmp_path / "recipe.yaml").write_text(f"{top}{tally}  - {{kind: report, name: report}}\n")
    (tmp_path / "with_sft.yaml").write_text(f"{top}{tally}  - {{kind: sft, name: sft, demonstrations: tally}}\n")

    def python(*arguments: str) -> str:
        command, env = [sys.executable, *arguments], subprocess_env | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = python("-c", TOY_SCRIPT)
    assert "stage tally reads data.prompts, which TallyStage does not declare; add it to" in said
    assert re.search("tally +answer every prompt", said)
    kept = json.loads((tmp_path / "run" / "tally" / "demonstrations.jsonl").read_text())
    assert kept["messages"][-1] == {"role": "assistant", "content": "3 words"}
    assert "words counted" in (tmp_path / "run" / "report.html").read_text()


def _sources(package: Path) -> set[tuple[str, str]]:
    return {(str(file), file.read_text()) for file in package.rglob("*.py")}


def test_a_setting_that_came_later_leaves_earlier_runs_as_they_are() -> None:
    class Older(RewardStage):
        later = frozenset({"label_smoothing"})

    class Newer(Older):
        later = frozenset({"extra"})
        extra: list[str] = Field(default_factory=list)

    before = {k: v for k, v in RewardStage(name="a").settings().items() if k != "label_smoothing"}
    assert Newer(name="b", log_every=3).settings() == before  # both classes' later settings are left out
    changed = Newer(name="b", label_smoothing=0.1, extra=["x"]).settings()
    assert changed == before | {"label_smoothing": 0.1, "extra": ["x"]}
