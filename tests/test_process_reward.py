"""Process reward models: the loss against a slow plain reference, scores against transformers, and that one learns."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import labelled_steps
import pytest
import torch
from tiny import Counting, prompt, save_tiny, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from keel.cli import main
from keel.data.chat import install_template
from keel.data.collate import group_by_prompt
from keel.data.steps import cut_otherwise
from keel.eval.process_quality import Judged, process_quality, step_auc
from keel.model.checkpoint import load_scalar, save
from keel.model.heads import ScalarModel
from keel.objective.process import step_loss
from keel.recipe.file import packaged
from keel.recipe.process_reward import ProcessRewardStage
from keel.recipe.sections import DataConfig, LoraConfig, ModelConfig, OptimConfig
from keel.recipe.steps import Steps
from keel.reward.process import ProcessScorer, PythonSteps, ScoredSteps, aggregated, outcome
from keel.reward.scorer import RewardModelScorer
from keel.run import RunDir, Silent, read_json
from keel.stages import process_reward
from keel.train.context import TrainContext
from keel.train.loop import _update
from keel.train.optim import make_optimizer
from keel.train.process import ProcessTraining, _encoded, train_process
from keel.types import Completion, Message, Prompt, StepLabels, UserError

FAST = OptimConfig(lr=3e-3)
HERE = Path(__file__)


def truth(_: Prompt, steps: list[str]) -> list[float]:
    """Of labelled_steps' replies."""
    return [float("salt" not in "".join(steps[: i + 1])) for i in range(len(steps))]


def no_truth(_: Prompt, steps: list[str]) -> list[float]:
    return []


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny model whose tokenizer has a chat template."""
    folder = save_tiny(tmp_path_factory.mktemp("base"))
    tokenizer = tiny_tokenizer()
    install_template(tokenizer, "keel")
    tokenizer.save_pretrained(folder)
    return folder


def context(tmp: Path, model: Path, reporter: Any = None, **data: Any) -> TrainContext:
    stage = RunDir(tmp / "run").stage("prm")
    stage.begin("prm")
    return TrainContext(
        stage, reporter or Silent(), model, ModelConfig(path=str(model)), DataConfig(**data), "cpu", "fp32", 0
    )


def stage(**settings: Any) -> ProcessRewardStage:
    return ProcessRewardStage(**{"name": "prm", "labels": "rows.jsonl", "optim": FAST, "batch_size": 16, **settings})


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Any]]:
    c = context(tmp_path_factory.mktemp("prm"), base)
    config = stage(epochs=6, heldout_fraction=0.2)
    summary, heldout = train_process(config, labelled_steps.replies(90, unjudged=0.1), c, lambda _: "product")
    return c.stage.path, summary, heldout


def scorer(folder: Path, **how: Any) -> ProcessScorer:
    return ProcessScorer(load_scalar(folder), **how)


# ------------------------------------------------------------------------------------------------------------ the loss


def test_the_loss_by_hand() -> None:
    loss = step_loss(torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 0.25, 0.0]))
    p = 1 / (1 + math.exp(-2))
    expected = [math.log(2), -0.25 * math.log(p) - 0.75 * math.log(1 - p), -math.log(1 - 1 / (1 + math.exp(1)))]
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_step_equals_a_slow_plain_reference(base: Path, tmp_path: Path) -> None:
    """transformers' own forward, one reply at a time, probabilities and logarithms as they are written: the mean over
    the judged steps of the whole optimizer step, its gradient, and however it is cut into micro-batches."""
    c, records = context(tmp_path, base), labelled_steps.replies(6, each=3, unjudged=0.3)
    records = [one for one in records if any(label is not None for label in one.labels)]
    records[0] = replace(records[0], labels=tuple(0.3 for _ in records[0].labels))
    found = []
    for batch_tokens in (100_000, 60):
        model = load_scalar(base, new_head_seed=1)
        config = stage(batch_size=100, batch_tokens=batch_tokens, optim=OptimConfig(warmup=0))
        examples = _encoded(records, model.chat, config, c)
        groups = group_by_prompt(examples, lambda example: example.record.prompt)
        algorithm = ProcessTraining(model, groups, [], config, c)
        (micros,) = algorithm.updates(0)
        assert (len(micros) > 2) == (batch_tokens == 60)
        figures = _update(algorithm, make_optimizer(algorithm.modules, config.optim, {}), micros, config, c, 0)
        found.append((figures["loss"][0], figures["grad_norm"][0], figures["accuracy"]))
    peer = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    with torch.no_grad():
        peer.score.weight.copy_(load_scalar(base, new_head_seed=1).model.score.weight)  # type: ignore[union-attr]
    losses, right = [], 0
    for example in examples:
        hidden = peer.model(torch.tensor([example.whole.row.ids])).last_hidden_state[0]
        for end, y in zip(example.whole.ends, example.record.labels, strict=True):
            if y is not None:
                p = torch.sigmoid(peer.score(hidden[end])[0])
                losses.append(-(y * torch.log(p) + (1 - y) * torch.log(1 - p)))
                right += (float(p.detach()) > 0.5) == (y > 0.5)
    slow = torch.stack(losses).mean()
    slow.backward()
    norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in peer.parameters() if p.grad is not None))
    for loss, grad_norm, accuracy in found:
        assert loss == pytest.approx(float(slow.detach()), abs=1e-5)
        assert grad_norm == pytest.approx(norm, rel=1e-4)
        assert accuracy == (right, len(losses))


def test_nothing_of_a_label_is_in_what_the_model_reads(base: Path, tmp_path: Path) -> None:
    c, chat = context(tmp_path, base), load_scalar(base, new_head_seed=0).chat
    record = StepLabels("a", prompt(0), ("the ship\n", "salt\n", "rope"), (1.0, 0.0, None))
    [example] = _encoded([record], chat, stage(), c)
    [other] = _encoded([replace(record, labels=(0.0, 1.0, None))], chat, stage(), c)
    assert example.judged.row == other.judged.row
    text = chat.tokenizer.decode(example.judged.row.ids)
    assert text.endswith("the ship\nsalt"), "what is behind the last judged step is not even run"
    assert example.judged.ends == example.whole.ends[:2]
    assert example.labels == (1.0, 0.0)


def test_what_follows_an_error_may_be_left_out(base: Path, tmp_path: Path) -> None:
    c, chat = context(tmp_path, base), load_scalar(base, new_head_seed=0).chat
    steps = ("the ship\n", "salt\n", "rope\n", "sail")
    records = [
        StepLabels(str(i), prompt(i), steps, labels)
        for i, labels in enumerate([(1.0, 0.4, 1.0, 0.0), (None, 1.0, 1.0, 1.0), (0.0, None, 0.0, None)])
    ]
    learned = [example.labels for example in _encoded(records, chat, stage(until_error=True), c)]
    assert learned == [(1.0, 0.4), (1.0, 1.0, 1.0), (0.0,)]
    whole = [example.labels for example in _encoded(records, chat, stage(), c)]
    assert whole == [(1.0, 0.4, 1.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.0)]
    # What a reply's answer is is said by its last label, learned or not.
    judged = process_reward._judged(ScoredSteps(records[0], (0.9, 0.1, 0.9, 0.9)), stage(until_error=True), {})
    assert (judged.labels, judged.right) == ((1.0, 0.4, None, None), False)


# ---------------------------------------------------------------------------------------------------------- it learns


def test_it_learns_which_steps_are_right(trained: tuple[Path, dict[str, Any], list[Any]], base: Path) -> None:
    folder, summary, heldout = trained
    assert summary["rows"] + summary["heldout_rows"] + summary["unjudged_rows"] == 180
    assert (summary["too_long"], summary["aggregate"]) == (0, "product")
    judged = [Judged(one.scores, one.record.labels, one.record.prompt.id) for one in heldout]
    auc = step_auc(judged, 0.5)
    assert auc is not None
    assert auc[0] is not None
    assert auc[0] > 0.98
    ids = read_json(folder / "judgements.json")
    by_id = {one.id: one.prompt.id for one in labelled_steps.replies(90, unjudged=0.1)}
    assert not {by_id[i] for i in ids["trained"]} & {by_id[i] for i in ids["heldout"]}, "problems lie on one side"
    model = scorer(folder)
    assert (model.steps, model.aggregate, model.level) == (Steps(), "product", "steps")
    asked = [one.record for one in heldout[:5]]
    again = model.score_steps([one.prompt for one in asked], [one.steps for one in asked])
    assert [x for s in again for x in s] == pytest.approx([x for one in heldout[:5] for x in one.scores], abs=1e-5)


def test_a_step_has_transformers_score_whatever_is_beside_or_behind_it(trained: tuple[Path, Any, Any]) -> None:
    folder = trained[0]
    records = labelled_steps.replies(8, seed=5)
    prompts, steps = [one.prompt for one in records], [one.steps for one in records]
    together = scorer(folder).score_steps(prompts, steps)
    alone = scorer(folder, batch_tokens=1).score_steps(prompts, steps)
    turned = scorer(folder, batch_tokens=90).score_steps(prompts[::-1], steps[::-1])[::-1]
    begun = scorer(folder).score_steps(prompts, [s[:1] for s in steps])
    ended = scorer(folder).score_steps(prompts, [(*s[:-1], s[-1] + "\n\n") for s in steps])
    peer = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    chat = load_scalar(folder).chat
    for i, (p, own) in enumerate(zip(prompts, steps, strict=True)):
        for other in (alone[i], turned[i], ended[i]):
            assert other == pytest.approx(together[i], abs=1e-5)
        assert begun[i] == pytest.approx(together[i][:1], abs=1e-5)
        for k, score in enumerate(together[i]):  # a sequence classifier scores the last token of what it is given
            ids = chat.encode_reply(p.messages, "".join(own[: k + 1]).rstrip(), finished=False).ids
            with torch.no_grad():
                assert score == pytest.approx(float(peer(torch.tensor([ids])).logits.sigmoid()), abs=1e-5)
    assert max(map(max, together)) - min(map(min, together)) > 0.5  # or the comparison would prove nothing


def test_an_interrupted_run_ends_with_the_same_bits(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, config = labelled_steps.replies(24), stage(epochs=2, save_every_seconds=0)

    def run(name: str) -> Path:
        c = context(tmp_path / name, base)
        train_process(config, records, c, lambda _: "min")
        return c.stage.path

    whole = run("whole")
    after, steps = ProcessTraining.after, 0

    def stopped(self: ProcessTraining, iteration: int) -> tuple[dict[str, float], bool]:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return after(self, iteration)

    monkeypatch.setattr(ProcessTraining, "after", stopped)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    killed = run("killed")
    assert steps == len((whole / "metrics.jsonl").read_text().splitlines()) + 1, "it went on where it was"
    for file in ("model.safetensors", "config.json", "metrics.jsonl"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.wide
def test_adapters_are_trained_and_a_model_goes_on_from_its_checkpoint(
    trained: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    start, _, heldout = trained
    c = context(tmp_path, start)
    c = replace(c, base_model=ModelConfig(path=str(start), lora=LoraConfig(rank=2)))
    summary, again = train_process(
        stage(heldout_fraction=0.2), labelled_steps.replies(90, unjudged=0.1), c, lambda _: "mean"
    )
    assert summary["steps"] > 0
    assert [one.record.id for one in again] == [one.record.id for one in heldout]
    found = scorer(c.stage.path)
    assert found.aggregate == "mean"
    asked = [one.record for one in again[:5]]
    merged = found.score_steps([one.prompt for one in asked], [one.steps for one in asked])
    assert [x for s in merged for x in s] == pytest.approx([x for one in again[:5] for x in one.scores], abs=1e-4)
    auc = step_auc([Judged(one.scores, one.record.labels, one.record.prompt.id) for one in again], 0.5)
    assert auc is not None
    assert auc[0] is not None
    assert auc[0] > 0.98, "it began where the first one ended"


def test_nothing_is_cut_or_dropped_silently(base: Path, tmp_path: Path) -> None:
    records = labelled_steps.replies(12)
    long = StepLabels("long", prompt(40), ("the ship\n", "rope " * 80), (1.0, 0.0), place="rows.jsonl, line 7")
    none = StepLabels("none", prompt(41), ("the ship",), (None,))
    with pytest.raises(
        UserError, match=r"longer than data.max_length = 64 tokens \(first: rows.jsonl, line 7, \d+ tok"
    ):
        train_process(stage(), [*records, long], context(tmp_path / "a", base, max_length=64), lambda _: "min")
    notes: list[str] = []
    reporter = Counting()
    reporter.note = notes.append  # type: ignore[method-assign]
    c = context(tmp_path / "b", base, reporter, max_length=64, over_length="skip")
    summary, heldout = train_process(stage(), [*records, long, none], c, lambda _: "min")
    assert (summary["too_long"], summary["unjudged_rows"]) == (1, 1)
    assert summary["rows"] + len(heldout) == 24
    assert any("left out 1 of" in note for note in notes)
    assert any("left out 1 replies without a judged step" in note for note in notes)
    same = [replace(one, labels=tuple(1.0 for _ in one.labels)) for one in records]
    with pytest.raises(UserError, match="every judged step has the label 1, so there is nothing to learn"):
        train_process(stage(), same, context(tmp_path / "c", base), lambda _: "min")


# ------------------------------------------------------------------------------------------------------------ scorers


def test_what_a_reply_comes_to() -> None:
    scores = (0.5, 1.0, 0.25)
    assert [aggregated(scores, how) for how in ("min", "product", "last", "mean")] == [0.25, 0.125, 0.25, 1.75 / 3]
    assert aggregated((), "product") == 0.0


def test_what_labels_say_of_an_answer() -> None:
    def of(*labels: float | None, finished: bool = True) -> float | None:
        steps = tuple("a\n" for _ in labels)
        return outcome(StepLabels("a", prompt(0), steps, labels, finished), 0.5)

    assert (of(1.0, 0.0, 0.75), of(1.0, None, 0.0)) == (0.75, 0.0)
    assert of(1.0, 0.0, None) == 0.0, "judging stopped at the first error"
    assert of(1.0, None) is None
    assert of(1.0, 1.0, finished=False) is None


def test_what_a_process_scorer_refuses(trained: tuple[Path, Any, Any], base: Path) -> None:
    model = scorer(trained[0], max_length=40)
    assert model.score_steps([], []) == []
    assert model.score_steps([prompt(0)] * 2, [(), ("\n",)]) == [(), (0.0,)]
    with pytest.raises(
        UserError, match=r"prompt 'p0' and its reply have \d+ tokens for the process reward model, which"
    ):
        model.score_steps([prompt(0)], [("xyz " * 40,)])
    with pytest.raises(UserError, match="is no process reward model, for its config has no keel_process"):
        ProcessScorer(load_scalar(base, new_head_seed=0))
    with pytest.raises(UserError, match="is a process reward model, which scores steps and no replies"):
        RewardModelScorer(load_scalar(trained[0]), 100)


def test_a_reward_model_that_starts_from_one_is_none(trained: tuple[Path, Any, Any], tmp_path: Path) -> None:
    model: ScalarModel = load_scalar(trained[0], take_over=True)
    save(model.model, model.tokenizer, tmp_path)
    assert "keel_process" not in json.loads((tmp_path / "config.json").read_text())
    RewardModelScorer(load_scalar(tmp_path), 100).score([prompt(0)], [Completion("the ship")])


def test_a_python_function_scores_steps() -> None:
    asked = [("the ship\n", "salt\n", "rope"), ("a",)]
    assert PythonSteps(truth, "m:truth").score_steps([prompt(0)] * 2, asked) == [(1.0, 0.0, 0.0), (1.0,)]
    bad: list[tuple[Callable[..., Any], str]] = [
        (lambda p, s: [0.5], r"m:f gave 1 scores for 2 steps of a reply to prompt 'p0' \(0.5\); return one number"),
        (lambda p, s: [0.5, 1.5], "gave 2 scores for 2 steps"),
        (lambda p, s: 1 / 0, "m:f failed on prompt 'p0': ZeroDivisionError"),
    ]
    for function, sentence in bad:
        with pytest.raises(UserError, match=sentence):
            PythonSteps(function, "m:f").score_steps([prompt(0)], [("a\n", "b")])


def test_steps_that_are_none_are_refused() -> None:
    def of(*steps: str) -> StepLabels:
        return StepLabels("a", Prompt("p", (Message("user", "hi"),)), steps, (1.0,) * len(steps))

    assert cut_otherwise([of("a\n", "b"), of("a\nb\n", "c")], Steps()) == [of("a\nb\n", "c")]
    assert cut_otherwise([of("a"), of("b")], Steps()) == []
    with pytest.raises(UserError, match=r"steps.by: blank_line makes one step of each of 2 replies, though 2 of them"):
        cut_otherwise([of("a\n", "b"), of("b\n", "c")], Steps(by="blank_line"))
    with pytest.raises(UserError, match="each of 2 replies is labelled as one step, and 1 of them hold several lines"):
        cut_otherwise([of("a\nb"), of("c")], Steps())


def test_a_vote_counts_answers_by_value_and_verdicts_by_problem() -> None:
    """Of a half, "0.5" and "1/2" are one answer, which has two of four votes; and two files may have a prompt "1"."""
    half = Prompt("1", (Message("user", "a half?"),), meta={"answer": "1/2"})
    other = Prompt("1", (Message("user", "three?"),), meta={"answer": "3"})
    said = [
        (half, "#### 0.5"),
        (half, "#### 1/2"),
        (half, "#### 3"),
        (half, "#### 4"),
        (other, "#### 3"),
        (other, "hm"),
    ]
    records = [StepLabels(str(i), asked, (text,), (1.0,)) for i, (asked, text) in enumerate(said)]
    config = stage(verify={"kind": "verify"})
    answers = process_reward._answers(records, config)
    judged = [process_reward._judged(ScoredSteps(one, (0.5,)), config, answers) for one in records]
    assert [one.right for one in judged] == [True, True, False, False, True, False]
    assert judged[0].answer == judged[1].answer
    assert len({one.answer for one in judged[:4]}) == 3
    quality = process_quality(judged[:4], "min", 0.5)
    assert quality["best_of_n"][-1]["majority"] == [1.0, None, None]
    wrong = [replace(one, steps=(text,)) for one, text in zip(records[2:4], ("#### 7.0", "#### 7"), strict=True)]
    answers = process_reward._answers(wrong, config)
    assert len({answer for _, answer in answers.values()}) == 1


# ------------------------------------------------------------------------------------------------------------ the stage


def run(tmp: Path, base: Path, *settings: str) -> tuple[int, dict[str, Any]]:
    own = {"labels": tmp / "rows.jsonl", "batch_size": 16, "optim.lr": 5e-3}
    words = [f"model.path={base}", "device=cpu", "threads=1", *(f"process_reward.{k}={v}" for k, v in own.items())]
    recipe = tmp / "recipe.yaml"
    recipe.write_text(f"{packaged('process_reward').read_text()}  - {{kind: report, name: report}}\n")
    code = main(["run", str(recipe), *words, *settings, "--out", str(tmp / "run")])
    summary = tmp / "run" / "process_reward" / "summary.json"
    return code, read_json(summary) if summary.exists() else {}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return labelled_steps.write(tmp_path / "rows.jsonl", labelled_steps.replies(32, each=4))


def test_the_stage_says_how_good_its_model_is(rows: Path, base: Path, tmp_path: Path) -> None:
    gold = f"process_reward.gold={{kind: python_steps, ref: '{HERE}:truth'}}"
    code, summary = run(tmp_path, base, "process_reward.epochs=3", "process_reward.heldout_fraction=0.3", gold)
    assert code == 0
    heldout = summary["heldout"]
    auc, f1 = heldout["step_auc"], heldout["first_error"]["f1"]
    assert 0.8 < auc[1] <= auc[0] <= auc[2]
    assert 0.3 < f1[1] <= f1[0] <= f1[2]
    assert heldout["first_error"]["chosen_on"] > 0
    assert set(summary["aggregates"]) == {"min", "product", "last", "mean"}
    assert summary["aggregate"] == max(summary["aggregates"], key=summary["aggregates"].__getitem__)
    assert sum(count for _, _, count in heldout["calibration"]) == sum(len(r) for r in _labels(rows, tmp_path))
    curve = heldout["best_of_n"]
    assert [row["n"] for row in curve] == [1, 2, 4]
    assert curve[-1]["first"][0] < curve[-1]["score"][0] <= curve[-1]["oracle"][0]
    assert curve[-1]["majority"] is None
    config = json.loads((tmp_path / "run" / "process_reward" / "config.json").read_text())
    assert config["keel_process"] == {
        "steps": {"by": "line", "marker": None},
        "aggregate": summary["aggregate"],
        "level": "steps",
    }
    traces = read_json(tmp_path / "run" / "process_reward" / "traces.json")
    assert traces["replies"] == summary["heldout_rows"] == sum(count for count, _ in traces["kinds"].values())
    assert (traces["threshold"], traces["chosen"]) == (heldout["first_error"]["bound"], True)
    written = {tuple(row["completions"]): row["labels"] for row in map(json.loads, rows.read_text().splitlines())}
    for row in traces["rows"]:
        assert (row["by"], row["labels"]) == ("gold", written[tuple(row["steps"])])
        assert len(row["scores"]) == len(row["steps"])
        assert row["error"] == (row["labels"].index(0.0) if 0.0 in row["labels"] else -1)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Process reward model" in page
    assert "had not seen, step by step" in page


def _labels(rows: Path, tmp_path: Path) -> list[list[float]]:
    held = set(read_json(tmp_path / "run" / "process_reward" / "judgements.json")["heldout"])
    return [row["labels"] for row in map(json.loads, rows.read_text().splitlines()) if row["id"] in held]


def test_an_outcome_model_learns_the_last_label_alone(rows: Path, base: Path, tmp_path: Path) -> None:
    code, summary = run(tmp_path, base, "process_reward.level=outcome")
    assert code == 0
    assert summary["steps_labelled"] == summary["rows"]
    assert (summary["aggregate"], summary["level"]) == ("last", "outcome")
    assert summary["heldout"]["first_error"] is None
    assert not (tmp_path / "run" / "process_reward" / "traces.json").exists(), "it judges no steps"
    assert scorer(tmp_path / "run" / "process_reward").aggregate == "last"


@pytest.mark.parametrize(
    ("row", "settings", "sentence"),
    [
        ({"labels": [1.0]}, "", "line 2: field 'labels': expected a list of 2 labels, one a completion, got a list"),
        ({"labels": [1.0, 2.0]}, "", "line 2: field 'labels': expected a number from 0 to 1, got the number 2.0"),
        (
            {},
            "steps={by: blank_line}",
            "steps.by: blank_line makes one step of each of 2 replies, though 2 of them hold",
        ),
        ({}, "steps={by: marker}", "by: marker and marker: TEXT go together; give both, or neither"),
        ({}, "aggregate=min level=outcome", "level: outcome judges a reply by its last step, so aggregate is last"),
        (
            {},
            f"level=outcome gold={{kind: python_steps, ref: '{HERE}:truth'}}",
            "gold is the truth of steps, and level",
        ),
        ({}, f"gold={{kind: python_steps, ref: '{HERE}:no_truth'}}", "no_truth gave 0 scores for 2 steps of a reply"),
        ({}, "gold={kind: python_steps, ref: 'nowhere.py:truth'}", "nowhere.py"),
        ({}, "labels=[]", "labels is an empty list; name files or step_labels stages"),
        ({}, "labels=nowhere.jsonl", "'nowhere.jsonl' is neither a stage nor a file or folder"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_is_said_in_a_sentence_before_anything_is_trained(
    row: dict[str, Any], settings: str, sentence: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"prompt": "hi", "completions": ["a\n", "b"], "labels": [1.0, 0.0]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps({**good, 'prompt': 'ho', **row})}\n")
    words = re.split(r" (?=\w+=)", settings) if settings else []
    code, summary = run(tmp_path, base, *(f"process_reward.{word}" for word in words))
    assert (code, summary) == (2, {})
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_the_check_finds_what_the_stage_would(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(rows: list[dict[str, Any]], *settings: str) -> str:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = [f"model.path={base}", f"process_reward.labels={tmp_path / 'rows.jsonl'}", "device=cpu", *settings]
        main(["check", str(packaged("process_reward")), *words, "--out", str(tmp_path / "run")])
        captured = capsys.readouterr()
        return " ".join((captured.out + captured.err).split())

    good = [{"prompt": f"p{i}", "completions": ["a\n", "b"], "labels": [1.0, i % 2]} for i in range(4)]
    odd = [
        {"prompt": "q", "completions": ["a"], "labels": [None]},
        {"prompt": "r", "completions": ["a\nb\n", "c"], "labels": [1, 0]},
        {"prompt": "s", "completions": ["rope " * 80], "labels": [1]},
    ]
    found = said([*good, *odd], "data.max_length=60")
    assert "1 of 7 replies without a judged step are left out" in found
    assert "1 of 7 replies are labelled in other steps than steps.by: line cuts" in found
    assert "1 of 7 records are longer than data.max_length = 60 tokens" in found
    found = said([{**row, "labels": [1, 1]} for row in good])
    assert "every judged step has the label 1" in found
    assert "other steps" not in found
    assert "steps.by: blank_line makes one step of each of 4" in said(good, "process_reward.steps={by: blank_line}")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "asked of nobody here"}\n')
    answered = [{**row, "labels": [None, None], "meta": {"answer": "4"}} for row in good]
    verified = (f"data.prompts={prompts}", "process_reward.verify={kind: verify}", "process_reward.level=outcome")
    found = said(answered, *verified)
    assert "no answer in meta" not in found, "the answers stand in the rows, not with data.prompts"
    assert "every judged step" not in found
    assert "judged answer are left out" not in found, "the verdicts are learned in the labels' place"
    found = said([*answered, {**good[0], "prompt": "q"}], *verified)
    assert "1 of 5 prompts have no answer in meta.answer, which process_reward holds replies against" in found


def test_no_reply_of_a_model_stops_the_scorer(trained: tuple[Path, Any, Any]) -> None:
    """Blanks, cut characters, a marker that tokens hold together with what follows; it is said once how many."""
    notes: list[str] = []
    made = scorer(trained[0], note=notes.append)
    made.model.tokenizer.add_tokens(["..."])  # one token for the ends of three steps
    how = Steps(by="marker", marker=".")
    texts = ["hello... you. 2", "\ufffd\ufffd.a...\ufffd", "  ", "a. .b", "you. hello."]
    replies = [how.split(text) for text in texts]
    found = made.score_steps([prompt(0)] * len(replies), replies)
    assert [len(scores) for scores in found] == [len(steps) for steps in replies]
    assert found[2] == (0.0,)
    assert len(notes) == 1
    assert notes[0].startswith("2 of the first 4 replies have a step that ends in a token of the process reward")
    for steps, scores in zip(replies, found, strict=True):
        for k in range(1, len(steps)):
            [part] = made.score_steps([prompt(0)], [steps[:k]])
            assert part == pytest.approx(scores[:k], abs=1e-6), "no score depends on what follows"
    assert made.score_steps([prompt(0)], [replies[0]])[0] == pytest.approx(found[0], abs=1e-6)
    assert len(notes) == 1
    assert made.in_pieces > 2


def test_rows_are_learned_as_replies_are_scored(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And how many are read in pieces is said."""
    notes: list[str] = []
    reporter = Silent()
    monkeypatch.setattr(reporter, "note", notes.append, raising=False)
    c = context(tmp_path, base, reporter)
    model = load_scalar(base, new_head_seed=0)
    model.tokenizer.add_tokens(["..."])
    texts = ("hello... you.", "hello. you.")
    rows = [StepLabels(f"r{i}", prompt(i), Steps(by="marker", marker=".").split(t), ()) for i, t in enumerate(texts)]
    rows = [replace(row, labels=(1.0,) * len(row.steps)) for row in rows]
    made = [one.whole for one in _encoded(rows, model.chat, stage(), c)]
    assert [len(one.ends) for one in made] == [4, 2]
    assert [one.in_pieces for one in made] == [True, False]
    assert any("1 of 2 replies have a step that ends within a token" in note for note in notes)
