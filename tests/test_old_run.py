"""A run directory that an earlier Keel left still opens, and what is done in it stays done (tests/data/README.md)."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from safetensors.torch import load_file

from keel.cli.ensemble import RunEnsemble
from keel.cli.finished import find_model, trained_models
from keel.cli.label import sampled_models, store_of
from keel.cli.models import trained_stages
from keel.pipeline.run import plan, run_pipeline
from keel.recipe.file import load_recipe
from keel.recipe.recipe import Stage
from keel.report import build_report
from keel.run import RunDir, Silent
from keel.stages.context import StageContext
from keel.stages.registry import RUNNERS
from keel.store import Store

STAGES = ["sft", "sample", "annotate", "reward", "dpo", "eval", "report"]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    with tarfile.open(ROOT / "tests" / "data" / "old_run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / "old_run")
    for module in ("keel.pipeline.fingerprint", "keel.pipeline.run"):  # a later release makes everything again
        monkeypatch.setattr(f"{module}.__version__", "0.1.0")
    return RunDir("run")


def go(run: RunDir, *overrides: str, targets: list[str] | None = None) -> list[str]:
    """Runs the old recipe; returns the stages that had to."""
    ran: list[str] = []

    def shown(kind: str) -> Any:
        def runner(stage: Stage, context: StageContext) -> dict[str, Any]:
            ran.append(stage.name)
            return RUNNERS[kind](stage, context)

        return runner

    recipe = load_recipe("recipe.yaml", overrides)
    run_pipeline(recipe, run, {kind: shown(kind) for kind in RUNNERS}, Silent(), targets)
    return ran


def test_all_of_it_is_done(old: RunDir) -> None:
    steps = plan(load_recipe("recipe.yaml"), old)
    assert [(step.stage.name, step.state) for step in steps] == [(name, "done") for name in STAGES]
    assert go(old) == []


def test_only_what_must_be_is_made_again_and_it_is_said_why(old: RunDir) -> None:
    def stale(*overrides: str) -> dict[str, str]:
        steps = plan(load_recipe("recipe.yaml", overrides), old)
        return {step.stage.name: step.reason for step in steps if step.state != "done"}

    changed = "its settings or data changed"
    assert stale("dpo.beta=0.2") == {"dpo": changed, "eval": "dpo changed", "report": "dpo, eval changed"}
    assert list(stale("sft.epochs=2")) == STAGES
    assert stale("eval.bootstrap=200") == {"eval": changed, "report": "eval changed"}
    shutil.copy("demonstrations.jsonl", "moved.jsonl")
    assert stale("data.demonstrations=moved.jsonl") == {}  # contents count, not names
    Path("heldout.jsonl").write_text('{"prompt": "who sails"}\n')
    assert "sft" not in stale()
    assert {"sample", "eval"} <= set(stale())


def test_another_release_makes_all_of_it_again_and_says_so(old: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("keel.pipeline.fingerprint", "keel.pipeline.run"):
        monkeypatch.setattr(f"{module}.__version__", "0.9.3")
    first, second, *_ = plan(load_recipe("recipe.yaml"), old)
    assert (first.state, first.reason) == ("stale", "Keel 0.1.0 made it, and this is Keel 0.9.3")
    assert second.reason == "sft changed"


def test_what_is_made_again_is_what_it_was(old: RunDir) -> None:
    """The stages that are forgotten here learn from the old folders and the old store, and find the old numbers."""
    before = {name: load_file(old.stage(name).path / "model.safetensors") for name in ("reward", "dpo")}
    table = json.loads((old.path / "summary.json").read_text())["stages"]
    for name in ("reward", "dpo", "eval"):
        shutil.rmtree(old.path / name)
    assert go(old, targets=["reward", "eval"]) == ["reward", "dpo", "eval"]
    for name, weights in before.items():
        after = load_file(old.stage(name).path / "model.safetensors")
        assert after.keys() == weights.keys()
        for key, value in weights.items():
            # Another processor's rounding turns a few of Adam's first steps around.
            assert (after[key] - value).norm() <= 1e-3 * value.norm(), f"{name}: {key}"
    again = old.summary()["stages"]
    for name, figures in table.items():
        for key in ("gold_reward", "mean_length", "prompts", "kl_to_sft"):
            assert again[name].get(key) == pytest.approx(figures.get(key), abs=2e-3), f"{name}: {key}"
    assert go(old) == []


def test_its_report_is_written(old: RunDir) -> None:
    page = build_report(old.path, old.path / "page.html").read_text()
    for words in ("SFT", "DPO", "Reward model", "judgements on pairs", "Base"):
        assert words in page


def test_its_models_are_listed(old: RunDir) -> None:
    assert list(trained_models("run")) == ["sft", "dpo"]
    name, source = find_model("run", None)
    assert (name, Path(source.path)) == ("dpo", Path("run/dpo"))
    assert [(m.name, m.kind, m.status, m.parents, m.others) for m in trained_stages(["run"])] == [
        ("sft", "sft", "done", (), ()),
        ("reward", "reward", "done", ("sft",), ("annotate",)),
        ("dpo", "dpo", "done", ("sft",), ("annotate",)),
    ]
    assert RunEnsemble("run").names() == ["reward"]
    assert [(name, sampling.max_new_tokens) for name, _, _, sampling in sampled_models("run")] == [
        ("sft", 6),
        ("dpo", 6),
    ]
    with Store(store_of("run", None)) as store:
        assert len(store.judgements()) == old.stage("annotate").summary()["judgements"] == 18
