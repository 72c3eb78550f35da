"""Benchmarks of others: RewardBench 2 by its own definition, and lm-eval's tasks."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from keel.data.reward_bench import read_reward_bench
from keel.eval.reward_bench import reward_bench, reward_bench_figures
from keel.eval.tasks import check_tasks, measure_tasks
from keel.recipe.benchmarks import TasksConfig
from keel.recipe.sections import Source
from keel.report.benchmarks import benchmarks
from keel.report.reading import RunFiles
from keel.run import Silent
from keel.types import Scores, UserError

OWN = {"num_correct": 1, "num_incorrect": 3, "total_completions": 4, "models": ["a"], "additional_metadata": {"x": 1}}


def row(id: str, subset: str, chosen: list[str], rejected: list[str], **more: Any) -> dict[str, Any]:
    own = {**OWN, "num_correct": len(chosen), "num_incorrect": len(rejected)}
    return {"id": id, "prompt": f"ask {id}", "chosen": chosen, "rejected": rejected, "subset": subset, **own, **more}


# A reply's score is the number that it is.
ROWS = [
    row("0", "Math", ["4"], ["1", "2", "3"]),  # right
    row("1", "Math", ["1"], ["4", "2", "3"]),  # wrong
    row("2", "Math", ["4"], ["4", "1", "0"]),  # shared by two: a half
    row("3", "Focus", ["9"], ["1", "2", "3"]),
    row("ref:0", "Ties", ["6"], ["2", "1"]),  # lead 4
    row("tied:0", "Ties", ["9", "8", "7"], ["1", "0"]),  # spread 2, lead 6: both comparisons hold
    row("ref:1", "Ties", ["3"], ["2"]),  # lead 1
    row("tied:1", "Ties", ["9", "6"], ["1", "2"]),  # spread 3, lead 4: the smaller lead is 1
    row("ref:2", "Ties", ["1"], ["2"]),  # wrong, lead -1
    row("tied:2", "Ties", ["5", "5"], ["6"]),  # wrong, spread 0, lead -1
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


class Reads:
    """Scores a reply by the number that it is."""

    def score(self, prompts: Any, completions: Any) -> Scores:
        import torch

        return Scores(torch.tensor([float(one.text) for one in completions]))


def test_the_score_is_the_one_by_hand(tmp_path: Path) -> None:
    found = reward_bench(read_reward_bench(write(tmp_path / "b.jsonl", ROWS)), Reads(), 200, 0)
    tied, ref = 2 / 3, 2 / 3
    # The last pair has no spread: its quotient is minus infinity, of which tanh is -1.
    margin = (math.tanh(4 / 2 - 1) + math.tanh(1 / 3 - 1) - 1) / 3
    ties = 0.3 * tied + 0.3 * ref + 0.2 * 2 / 3 + 0.2 * 1 / 3 + 0.01 * margin
    math_ = (1 + 0 + 0.5) / 3
    assert {name: one["score"] for name, one in found["subsets"].items()} == pytest.approx(
        {"Math": math_, "Focus": 1.0, "Ties": ties}
    )
    assert found["score"] == pytest.approx((math_ + 1 + ties) / 3)
    assert found["ties"] == pytest.approx(
        {
            "tied_accuracy": tied,
            "ref_accuracy": ref,
            "spread_below_lead": 2 / 3,
            "spread_below_smaller_lead": 1 / 3,
            "margin": margin,
            "pairs": 3,
        }
    )
    assert found["missing"] == ["Factuality", "Precise IF", "Safety"]
    assert found["subsets"]["Focus"]["low"] is None  # of one item
    assert 0 <= found["subsets"]["Math"]["low"] < math_ < found["subsets"]["Math"]["high"] <= 1
    assert [found["subsets"][name]["items"] for name in ("Math", "Focus", "Ties")] == [3, 1, 6]


def test_a_perfect_model_and_ties_without_a_partner(tmp_path: Path) -> None:
    rows = [*ROWS[4:6], row("tied:9", "Ties", ["1", "2"], ["3"])]  # which counts among the tied alone
    items = read_reward_bench(write(tmp_path / "b.jsonl", rows))
    found = reward_bench_figures(items, [[6, 2, 1], [9, 9, 9, 1, 0], [1, 2, 3]], 100, 0)
    assert found["ties"]["tied_accuracy"] == 0.5
    assert found["ties"]["pairs"] == 1
    assert found["subsets"]["Ties"]["score"] == pytest.approx(0.3 * 0.5 + 0.3 + 0.2 + 0.2 + 0.01)  # no spread: 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"chosen": []}, "field 'chosen'"),
        ({"chosen": ["4", "5"]}, "one right answer"),
        ({"num_correct": 2}, "num_correct"),
        ({"rejected": "no list"}, "field 'rejected'"),
        ({"subset": " "}, "field 'subset'"),
        ({"subset": "Ties"}, "ref:N or tied:N"),
        ({"subset": None}, "has no subset"),
        ({"id": "tied:1", "subset": "Ties"}, "several"),
        ({"id": "ref:1", "subset": "Ties"}, "no pair"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    rows = [ROWS[3], {**ROWS[0], **changed}]
    if "chosen" in changed:
        rows[1]["num_correct"] = len(changed["chosen"])
    with pytest.raises(UserError, match=said) as error:
        read_reward_bench(write(tmp_path / "b.jsonl", rows))
    assert "b.jsonl" in str(error.value)
    with pytest.raises(UserError, match="is there already"):
        read_reward_bench(write(tmp_path / "b.jsonl", [ROWS[0], ROWS[0]]))


# ------------------------------------------------------------------------------------------------------------ tasks


def task_folder(path: Path) -> Path:
    """A multiple-choice task on a file of its own."""
    path.mkdir()
    asked = [{"q": f"{a}+{b}=", "choices": [str(a + b), "no"], "gold": 0} for a in range(2) for b in range(3)]
    (path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    (path / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs:\n  data_files: {path / 'rows.jsonl'}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: gold\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return path


def test_tasks_through_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from conftest import ROOT

    from keel.data.sources import Fact
    from keel.eval.capability import choice_accuracy
    from keel.model.checkpoint import load_policy

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = task_folder(tmp_path / "mine")
    config = TasksConfig(names=["sums"], folder=str(folder))
    base = Source(str(ROOT / "keel" / "harbor" / "base"))
    found = measure_tasks(config, {"base": base}, "cpu", 0, tmp_path, Silent())
    figures = found["models"]["base"]["sums"]
    value, error = figures["metrics"]["acc"]
    assert figures["samples"] == 6
    model, tokenizer = load_policy(base)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    facts = [Fact(str(i), one["q"], tuple(one["choices"]), one["gold"]) for i, one in enumerate(rows)]
    own = choice_accuracy(model, tokenizer, facts, 512)
    assert error is not None
    assert value == pytest.approx(own.mean)
    with pytest.raises(UserError, match="has no none_such"):
        check_tasks(TasksConfig(names=["sums", "none_such"], folder=str(folder)))
    (folder / "rows.jsonl").unlink()
    again = measure_tasks(config, {"base": base}, "cpu", 0, tmp_path, Silent())  # what is kept is not asked again
    assert again == found


def harness(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for lm-eval, which knows one task, x; gives the list of what is asked of it."""
    import random

    asked: list[str] = []

    def simple_evaluate(model: str, **settings: Any) -> dict[str, Any]:
        random.seed(settings["random_seed"])
        asked.append(model)
        if model == "broken":
            raise ConnectionError("no such data set\nand more")
        figures = {
            "alias": "x",
            "acc,none": 0.5,
            "acc_stderr,none": "N/A",
            "em,strict": 0.25,
            "em_stderr,strict": 0.125,
        }
        return {"results": {"x": figures}, "n-samples": {"x": {"effective": 4, "original": 9}}, "n-shot": {"x": 2}}

    package, models, tasks = (types.ModuleType(n) for n in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks"))
    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    models.HFLM = lambda pretrained, **settings: pretrained  # type: ignore[attr-defined]

    class Manager:
        def __init__(self, include_path: str | None) -> None: ...
        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in names if name == "x"]

    tasks.TaskManager = Manager  # type: ignore[attr-defined]
    for module in (package, models, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("keel.eval.tasks.require", lambda: None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.4")
    return asked


def test_what_the_harness_says_is_kept_and_its_failures_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import random

    asked = harness(monkeypatch)
    config = TasksConfig(names=["x"], limit=4)
    before = random.getstate()
    with pytest.raises(UserError, match=r"stops at sft .ConnectionError: no such data set.; mend") as error:
        measure_tasks(config, {"base": Source("b"), "sft": Source("broken")}, "cpu", 0, tmp_path, Silent())
    assert "more" not in str(error.value)
    assert random.getstate() == before  # the run's own random numbers go on
    found = measure_tasks(config, {"base": Source("b"), "sft": Source("s")}, "cpu", 0, tmp_path, Silent())
    assert asked == ["b", "broken", "s"]
    metrics = {"acc": [0.5, None], "em (strict)": [0.25, 0.125]}
    assert found["models"]["sft"] == {"x": {"metrics": metrics, "samples": 4, "shots": 2}}
    (shown,) = benchmarks(RunFiles("r", {}, {"tasks": found}, ()))
    assert shown.rows[1][1][0].text == "0.250"
    assert shown.rows[1][1][0].detail == "± 0.125"
    assert "first 4 questions" in shown.caption


def test_without_the_package_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(UserError, match="keel-rlhf\\[lm-eval\\]"):
        check_tasks(TasksConfig(names=["x"]))


def test_an_evaluation_with_both_writes_them_into_summary_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tarfile

    from conftest import ROOT

    from keel.cli import main
    from keel.model.checkpoint import load_scalar
    from keel.reward.scorer import RewardModelScorer

    with tarfile.open(ROOT / "tests" / "data" / "old_run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / "old_run")
    file = write(Path("bench.jsonl"), [{**one, "prompt": "a"} for one in ROWS])
    asked = harness(monkeypatch)
    words = ["eval", "eval.reward_bench=bench.jsonl", "--out", "run"]
    assert main([*words, "--tasks", "x, none_such"]) == 2  # before anything is computed
    assert "none_such" in capsys.readouterr().err
    assert asked == []
    assert main([*words, "--tasks", "x"]) == 0
    assert [Path(one).name for one in asked] == ["base", "sft", "dpo"]
    summary = json.loads(Path("run/summary.json").read_text())
    scorer = RewardModelScorer(load_scalar("run/reward"), 1024)
    by_itself = reward_bench(read_reward_bench(file), scorer, 100, 0)
    found = summary["reward_bench"]["reward"]
    assert found["score"] == pytest.approx(by_itself["score"], abs=0.01)  # an evaluation may compute in bfloat16
    assert found["ties"] == pytest.approx(by_itself["ties"], abs=0.01)
    assert summary["tasks"]["models"]["dpo"]["x"]["metrics"]["em (strict)"] == [0.25, 0.125]
    assert main(["report", "--out", "run"]) == 0
    page = Path("run/report.html").read_text()
    for said in ("RewardBench 2", "Math (3 items)", "x: em (strict)", "± 0.125"):
        assert said in page
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    write(file, [{**rows[0], "num_correct": 7}, *rows[1:]])
    assert main(words) == 2
    assert "num_correct" in capsys.readouterr().err
