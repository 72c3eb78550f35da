"""Step labels through a recipe: a tiny model's replies labelled and learned from, a stage that is killed, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from test_stages import run, write_jsonl
from tiny import save_tiny

from keel.check import check_recipe
from keel.cli import main
from keel.cli.label_steps import order_of
from keel.data.sources import read_steps
from keel.recipe.recipe import Recipe
from keel.rollout.continuations import Continuations
from keel.run import RunDir
from keel.stages.context import STEP_LABELS
from keel.store.steps import OpenReply
from keel.types import Message, Prompt, UserError

JUDGE = """
def right(prompt, text):
    return float(text.strip().endswith("yes"))

def steps(prompt, steps):
    return [1.0 if "one" in step else 0.2 for step in steps]
"""
SAMPLING = {"max_new_tokens": 16, "batch_size": 64}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], RunDir]:
    """A model that has learned to write lines, its replies, labels of them and of replies of the stage's own, a process
    reward model."""
    tmp = tmp_path_factory.mktemp("labels")
    save_tiny(tmp / "base")
    (tmp / "judge.py").write_text(JUDGE)
    lines = ("one\nthe ship\nyes", "two\nsalt\nno", "one\nsalt\nyes", "two\nthe ship\nno")
    rows = [{"prompt": f"what is {n % 9}", "completion": lines[n % 4], "answer": "yes"} for n in range(48)]
    demos = write_jsonl(tmp / "demos.jsonl", [{"prompt": r["prompt"], "completion": r["completion"]} for r in rows])
    asked = [{"prompt": r["prompt"], "answer": r["answer"]} for r in rows[:9]]
    right = {"kind": "python", "ref": f"{tmp}/judge.py:right"}
    steps = {"kind": "python_steps", "ref": f"{tmp}/judge.py:steps"}
    common = {"model": "sft", "k": 4, "sampling": SAMPLING}
    recipe = {
        "model": {"path": str(tmp / "base")},
        "data": {
            "demonstrations": demos,
            "prompts": write_jsonl(tmp / "prompts.jsonl", asked),
            "heldout_prompts": write_jsonl(tmp / "heldout.jsonl", [{"prompt": "unseen", "answer": "yes"}]),
        },
        "device": "cpu",
        "stages": [
            {"kind": "sft", "name": "sft", "model": "base", "epochs": 6, "batch_size": 8, "optim": {"lr": 1e-2}},
            {"kind": "sample", "name": "sample", "model": "sft", "per_prompt": 3, "sampling": SAMPLING},
            {"kind": "step_labels", "name": "mc", "responses": "sample", "verify": right, **common},
            {"kind": "step_labels", "name": "own", "per_prompt": 2, "verify": {"kind": "verify"}, "judge": steps,
             "estimate": "soft", "replies": 12, "choose": "convincing", "scorer": steps, **common},
            {"kind": "process_reward", "name": "prm", "model": "sft", "labels": ["mc", "own"]},
        ],
    }  # fmt: skip
    return tmp, recipe, run(recipe, tmp / "run")


def test_replies_are_labelled_and_learned_from(made: tuple[Path, dict[str, Any], RunDir]) -> None:
    _, _, directory = made
    mc, own = directory.stage("mc"), directory.stage("own")
    records = read_steps(mc.path / STEP_LABELS)
    summary = mc.summary()
    assert len(records) == summary["replies"] == directory.stage("sample").summary()["responses"]
    assert any(len(record.steps) > 1 for record in records)
    assert {record.annotator for record in records} == {"mc"}
    assert {label for record in records for label in record.labels} <= {0.0, 1.0, None}
    assert all(record.labels[-1] == float(record.text.strip().endswith("yes")) for record in records if record.finished)
    assert all(record.prompt.meta["answer"] == "yes" for record in records), "the answer goes with the prompt"
    judged = sum(label is not None for record in records for label in record.labels)
    assert (summary["labelled_steps"], summary["k"], summary["label"], summary["consensus"]) == (
        judged,
        4,
        "hard",
        None,
    )
    assert summary["generated_tokens"] > 0
    summary, labels = own.summary(), [label for r in read_steps(own.path / STEP_LABELS) for label in r.labels]
    assert summary["chosen"]["random"] == 2
    assert sum(summary["chosen"].values()) == summary["replies"] == 12
    assert summary["consensus"]["agree"] == summary["labelled_steps"] == sum(label is not None for label in labels)
    assert all(label * 4 == int(label * 4) for label in labels if label is not None)
    rows = [json.loads(line) for line in (own.path / "convincing.jsonl").read_text().splitlines()]
    assert [row["priority"] for row in rows] == sorted((row["priority"] for row in rows), reverse=True)
    first = rows[0]
    asked = Prompt("p", (Message("user", first["prompt"][0]["content"]),))
    order = order_of(str(own.path / "convincing.jsonl"))
    open_ = [OpenReply(1, asked, tuple(first["completions"])), OpenReply(2, asked, ("else",))]
    assert order(open_) == {1: first["priority"]}, "people can be asked in the same order"
    learned = directory.stage("prm").summary()
    assert learned["rows"] + learned["heldout_rows"] + learned["unjudged_rows"] == len(records) + 12


def test_killed_it_goes_on_to_the_same_bits(
    made: tuple[Path, dict[str, Any], RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first round of prefixes: what was sampled is there, and is not sampled again."""
    _, recipe, whole = made
    out, sample, name = tmp_path / "run", Continuations.sample, "own"
    stages = [stage for stage in recipe["stages"] if stage["name"] in ("sft", name)]

    def dies(self: Continuations, prefixes: Any) -> None:
        sample(self, prefixes)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Continuations, "sample", dies)
        with pytest.raises(KeyboardInterrupt):
            run({**recipe, "stages": stages}, out)
    had = json.loads((out / name / "state" / "tallies.jsonl").read_text())
    assert had

    def goes_on(self: Continuations, prefixes: Any) -> None:
        assert had.keys() <= self.known.keys()
        sample(self, prefixes)

    monkeypatch.setattr(Continuations, "sample", goes_on)
    again = run({**recipe, "stages": stages}, out)
    assert (again.stage(name).path / STEP_LABELS).read_bytes() == (whole.stage(name).path / STEP_LABELS).read_bytes()
    assert again.stage(name).summary() == whole.stage(name).summary()


def errors(recipe: dict[str, Any], out: Path) -> list[str]:
    return [str(found) for found in check_recipe(Recipe.model_validate(recipe), RunDir(out)) if found.level == "error"]


def test_a_splitter_that_cuts_nothing_is_refused(
    made: tuple[Path, dict[str, Any], RunDir], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the check where the replies are there, and by the stage before it samples."""
    _, recipe, directory = made
    stages = json.loads(json.dumps(recipe["stages"][:3]))
    stages[2]["steps"] = {"by": "marker", "marker": "@@"}
    bad = {**recipe, "stages": stages}
    assert not errors({**recipe, "stages": recipe["stages"][:3]}, directory.path)
    [found] = errors(bad, directory.path)
    assert "mc.steps: steps.by: marker makes one step of each of" in found
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    out = shutil.copytree(directory.path, tmp_path / "run")
    assert main(["run", str(tmp_path / "bad.json"), "--out", str(out)]) == 2
    assert "set steps.by to what ends a step there" in capsys.readouterr().err
    assert not (out / "mc" / "state" / "tallies.jsonl").exists()


def test_what_scores_steps_cuts_as_the_stage_does(made: tuple[Path, dict[str, Any], RunDir], tmp_path: Path) -> None:
    """A stage of the recipe is seen by the recipe; a folder before anything is sampled."""
    _, recipe, directory = made
    sft, _, mc, own, prm = json.loads(json.dumps(recipe["stages"]))
    del mc["responses"]
    prm |= {"labels": ["mc"], "steps": {"by": "blank_line"}}
    for field in ("judge", "scorer"):
        wrong = {**own, field: {"kind": "process", "model": "prm"}}
        with pytest.raises(ValidationError, match=rf"own.steps: line cuts replies otherwise than own.{field}"):
            Recipe.model_validate({**recipe, "stages": [sft, mc, prm, wrong]})
    folder = shutil.copytree(directory.path / "prm", tmp_path / "prm")
    config = json.loads((folder / "config.json").read_text())
    config["keel_process"]["steps"] = {"by": "blank_line", "marker": None}
    (folder / "config.json").write_text(json.dumps(config))
    out = shutil.copytree(directory.path, tmp_path / "run")
    wrong = {**own, "name": "other", "scorer": {"kind": "process", "model": str(folder)}}
    with pytest.raises(UserError, match=r"other.steps: line cuts replies otherwise than other.scorer"):
        run({**recipe, "stages": [sft, wrong]}, out)
    assert not (out / "other" / "state" / "replies.json").exists()


def test_prompts_without_an_answer_are_found_before_compute(
    made: tuple[Path, dict[str, Any], RunDir], tmp_path: Path
) -> None:
    """Those of the stage whose replies are labelled: its own file, where it names one."""
    _, recipe, _ = made
    stages = json.loads(json.dumps(recipe["stages"][:3]))
    stages[2]["verify"] = {"kind": "verify"}
    assert not errors({**recipe, "stages": stages}, tmp_path / "run")
    without = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "what is 3"}])
    stages[1]["prompts"] = without
    found = errors({**recipe, "stages": stages}, tmp_path / "run")
    assert any("1 of 1 prompts have no answer in meta.answer, which mc holds replies against" in one for one in found)
    with pytest.raises(UserError, match="no answer in 'answer'"):
        run({**recipe, "stages": stages}, tmp_path / "run")
