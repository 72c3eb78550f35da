"""The card of what scores steps: what a wrong number and mere style do to it, and the stage that stops before it
learns."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError
from test_stages import run, write_jsonl
from tiny import save_tiny, tiny_tokenizer

from keel.check.data import data_findings
from keel.check.models import _process_models
from keel.data.chat import Chat
from keel.eval.process_card import (
    known_right,
    process_card,
    reworded,
    said_again,
    said_twice,
    thanked,
    try_scorer,
    wrong_number,
)
from keel.recipe.eval import EvalStage
from keel.recipe.grpo import GrpoStage
from keel.recipe.process_card import ProcessCard
from keel.recipe.recipe import Recipe
from keel.recipe.steps import Steps
from keel.types import Message, Prompt, StepLabels, UserError

HERE = f"{Path(__file__)}"


def sums(prompt: Prompt, steps: Sequence[str]) -> list[float]:
    """Knows: 0.9 as long as every sum so far is right, 0.1 from the first wrong one on."""
    found, right = [], 0.9
    for step in steps:
        for a, b, c in re.findall(r"(\d+) \+ (\d+) = (\d+)", step):
            right = right if int(a) + int(b) == int(c) else 0.1
        found.append(right)
    return found


def blind(prompt: Prompt, steps: Sequence[str]) -> list[float]:
    """Likes everything."""
    return [0.9] * len(steps)


def polite(prompt: Prompt, steps: Sequence[str]) -> list[float]:
    """Knows sums, and forgives all to who says thanks."""
    return [0.9] * len(steps) if "Thank" in steps[-1] else sums(prompt, steps)


def polite_step(prompt: Prompt, steps: Sequence[str]) -> list[float]:
    """Knows sums, reads no further than a step's end, and likes the step that says thanks."""
    return [0.9 if "Thank" in step else score for step, score in zip(steps, sums(prompt, steps), strict=True)]


def forgetful(prompt: Prompt, steps: Sequence[str]) -> list[float]:
    """Knows the sums of a step, and nothing of those before it."""
    return [sums(prompt, [step])[0] for step in steps]


def pedant(prompt: Prompt, steps: Sequence[str]) -> list[float]:
    """Knows sums, and minds a step that was said before."""
    seen = [step.strip() in {other.strip() for other in steps[:k]} for k, step in enumerate(steps)]
    return [0.3 if again else score for again, score in zip(seen, sums(prompt, steps), strict=True)]


class Scorer:
    def __init__(self, function: Any) -> None:
        self.function = function

    def score_steps(self, prompts: Sequence[Prompt], replies: Sequence[tuple[str, ...]]) -> list[tuple[float, ...]]:
        return [tuple(self.function(p, list(steps))) for p, steps in zip(prompts, replies, strict=True)]


def labelled(n: int, **settings: Any) -> StepLabels:
    prompt = Prompt(f"p{n % 20}", (Message("user", f"count {n}"),))
    steps = (
        f"There are {n} + 3 = {n + 3} crates.\n",
        f"Then {n + 3} + 4 = {n + 7} crates.\n",
        f"The answer is {n + 7}.",
    )
    made: dict[str, Any] = {"id": f"r{n}", "prompt": prompt, "steps": steps, "labels": (1.0, 1.0, 1.0)}
    return StepLabels(**(made | settings))


BOUNDS = ProcessCard(replies="x")


def card(function: Any, count: int = 40) -> dict[str, Any]:
    return process_card(try_scorer([labelled(n) for n in range(count)], Scorer(function), Steps(), 0), BOUNDS)


# ---------------------------------------------------------------------------------------------------------- changes


def test_changes_by_hand() -> None:
    steps = ("Take 4 crates.\n", "4 + 3 = 7\n", "I see 7")
    for seed in range(20):
        changed = wrong_number(steps, Random(seed))
        assert changed is not None
        k, reply = changed
        assert k == 1  # the one equation, its result
        assert reply[0] == steps[0]
        assert re.fullmatch(r"4 \+ 3 = \d+\n", reply[1])
        assert reply[1] != steps[1]
    k, reply = wrong_number(("a 0", "b"), Random(0)) or (9, ())
    assert k == 0
    assert re.fullmatch(r"a [1-9]", reply[0])
    assert wrong_number(("no number", "x2 is a name, 1.5 a decimal"), Random(0)) is None
    assert reworded(steps) == ("So take 4 crates.\n", "Then 4 + 3 = 7\n", "Next, I see 7")
    assert said_twice(steps[:1], Random(0), 1, Steps()) == ("Take 4 crates.\n", "Take 4 crates.\n")
    assert said_twice(("one",), Random(0), 1, Steps()) == ("one\n", "one")
    assert thanked(steps, Steps()) == (*steps[:2], "I see 7\n", "Thank you!")
    marks, blank = Steps(by="marker", marker="#"), Steps(by="blank_line")
    for how, reply in (
        (Steps(), steps),
        (Steps(), ("a 1\n", "b 2  ")),
        (marks, ("a 1 #\n", "b 2 #")),  # the last one has its marker
        (marks, ("a 1 #", "b 2")),
        (blank, ("a 1\n\n", "b 2\n")),  # and here half of what ends a step
    ):
        for changed_reply in (
            said_twice(reply, Random(1), 2, how),
            said_twice(reply, Random(0), 2, how),
            said_again(reply, Random(0), 1, how),
            thanked(reply, how),
        ):
            assert how.split("".join(changed_reply)) == changed_reply  # they are still steps
            assert len(changed_reply) == len(reply) + 1


def test_a_number_too_long_to_reckon_with_stays() -> None:
    long = "9" * 5000
    k, reply = wrong_number((f"so = {long}\n", f"{long} then 7"), Random(0)) or (9, ())
    assert k == 1
    assert reply[0] == f"so = {long}\n"
    assert re.fullmatch(rf"{long} then \d+", reply[1])
    assert reply[1] != f"{long} then 7"
    assert wrong_number((f"so = {long}",), Random(0)) is None


def test_replies_known_to_be_right() -> None:
    some = [
        labelled(1),
        labelled(2, labels=(1.0, None, 1.0)),
        labelled(3, labels=(1.0, 1.0, 0.2)),
        labelled(4, finished=False),
        labelled(21),  # of the first one's prompt
        labelled(5),
    ]
    found = known_right(some, 10, 0)
    assert {one.id for one in found} == {"r1", "r21", "r5"}
    assert {one.prompt.id for one in found[:2]} == {"p1", "p5"}  # a second one when each prompt has one
    assert known_right(some, 10, 0) == found
    assert len(known_right(some, 1, 0)) == 1


# ------------------------------------------------------------------------------------------------------------- cards


def test_who_knows_sums_is_within_all_bounds() -> None:
    found = card(sums)
    assert found["broken"] == []
    assert found["replies"] == found["numbers"] == 40
    assert found["noticed"][0] == 1.0
    assert found["mean_fall"] == pytest.approx(0.8)
    assert {kind: change["largest"] for kind, change in found["changes"].items()} == {
        "reworded": 0, "repeated": 0, "thanks": 0,
    }  # fmt: skip
    assert found["missed"] == []


@pytest.mark.parametrize(("function", "sentence"), [
    (blind, "of 40 wrong numbers 0% made their step's score fall by 0.2, and min_noticed is 80%"),
    (polite, "thanks at the end changes a reply's lowest score by 0.40 on average, and max_change is 0.1"),
    (pedant, "a true step said twice changes a reply's lowest score by"),
])  # fmt: skip
def test_who_does_not_is_told_why(function: Any, sentence: str) -> None:
    """Half of the replies that are thanked for are wrong ones: there the lowest score rises by 0.8."""
    broken = card(function)["broken"]
    assert len(broken) == 1
    assert broken[0].startswith(sentence)


@pytest.mark.parametrize(("function", "sentence"), [
    (polite_step, "thanks at the end changes a reply's last score by 0.40 on average"),
    (forgetful, "a true step said twice changes a reply's last score by"),
])  # fmt: skip
def test_what_progress_pays_for_is_measured(function: Any, sentence: str) -> None:
    """The lowest score stays where it was, but the last one, which progress pays for, hides the error."""
    some = [labelled(n) for n in range(40)]
    assert not [why for why in card(function)["broken"] if "lowest" in why]
    found = process_card(try_scorer(some, Scorer(function), Steps(), 0, "last"), BOUNDS, "last")
    assert found["broken"]
    assert any(why.startswith(sentence) for why in found["broken"])
    honest = process_card(try_scorer(some, Scorer(sums), Steps(), 0, "last"), BOUNDS, "last")
    assert honest["broken"] == []
    assert honest["measure"] == "last"


def test_replies_without_numbers_say_nothing_of_numbers() -> None:
    plain = [labelled(0, steps=("yes\n", "no"), labels=(1.0, 1.0))]
    found = process_card(try_scorer(plain, Scorer(blind), Steps(), 0), BOUNDS)
    assert found["noticed"] is None
    assert found["broken"] == []


# ------------------------------------------------------------------------------------------------------------ stages


def recipe(tmp: Path, scorer: str, kind: str = "grpo", **bounds: Any) -> dict[str, Any]:
    base = save_tiny(tmp / "base")
    rows = [
        {"prompt": one.prompt.messages[0].content, "completions": list(one.steps), "labels": list(one.labels)}
        for one in (*map(labelled, range(30)), labelled(30, labels=(1, 0, None)), labelled(31, labels=(0, None, None)))
    ]
    replies = write_jsonl(tmp / "steps.jsonl", rows)
    source = {
        "kind": "process",
        "scorer": {"kind": "python_steps", "ref": f"{HERE}:{scorer}"},
        "card": {"replies": replies, "count": 20, **bounds},
    }
    short = {"max_new_tokens": 4}
    stages = {
        "grpo": {"rollout_batch": 8, "group_size": 4, "episodes": 8, "beta": 0, "minibatches": 1, "sampling": short},
        "ppo": {"rollout_batch": 8, "episodes": 8, "minibatches": 1, "sampling": short},
        "eval": {"models": ["base"], "baseline": "base", "judge": {"kind": "python", "ref": f"{HERE}:length"},
                 "sampling": short, "bootstrap": 100},
    }[kind]  # fmt: skip
    stage = {"kind": kind, "name": "it", "rewards": [{"source": source}], **stages}
    stage |= {} if kind == "eval" else {"model": "base"}
    prompts = write_jsonl(tmp / "prompts.jsonl", [{"prompt": f"what is {n} to the captain"} for n in range(10)])
    data = {"prompts": prompts}
    return {"model": {"path": str(base)}, "data": data, "stages": [stage]}


def length(prompt: Prompt, text: str) -> float:
    return float(len(text))


@pytest.mark.parametrize("kind", ["grpo", "ppo", "eval"])
def test_a_stage_tries_the_scorer_first(kind: str, tmp_path: Path) -> None:
    folder = run(recipe(tmp_path, "sums", kind), tmp_path / "run").stage("it")
    found = json.loads((folder.path / "process_card.json").read_text())
    assert found["broken"] == []
    assert found["replies"] == 20
    assert folder.summary()


def test_a_scorer_beyond_its_bounds_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"stage it: what scores the steps is beyond its bounds: of 20 wrong numbers 0%"
    ):
        run(recipe(tmp_path, "blind"), tmp_path / "run")
    folder = tmp_path / "run" / "it"
    assert json.loads((folder / "process_card.json").read_text())["noticed"][0] == 0
    assert not (folder / "metrics.jsonl").exists()
    forced = run(recipe(tmp_path, "blind", force=True), tmp_path / "run").stage("it")
    assert forced.summary()["episodes"] == 8


def test_replies_that_nobody_knows_to_be_right_are_refused(tmp_path: Path) -> None:
    made = recipe(tmp_path, "sums")
    write_jsonl(tmp_path / "steps.jsonl", [{"prompt": "a", "completions": ["1\n", "2"], "labels": [1, None]}])
    with pytest.raises(UserError, match="none of its 1 replies is whole with all its steps labelled right"):
        run(made, tmp_path / "run")


@pytest.mark.parametrize(("rows", "message"), [
    ([{"prompt": "a", "completions": ["1\n", "2"], "labels": [1, None]}], "is whole with all its steps labelled right"),
    ([{"prompt": "a", "completions": ["1\n", "2"], "labels": [1]}], "expected a list of 2 labels"),
    ([{"question": "a", "answer": "b"}], "columns are question, answer"),
])  # fmt: skip
def test_the_check_reads_a_cards_file(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    made = recipe(tmp_path, "sums")
    write_jsonl(tmp_path / "steps.jsonl", rows)
    found = data_findings(Recipe.model_validate(made), Chat(tiny_tokenizer()), 64)
    errors = [str(one) for one in found if one.level == "error"]
    assert len(errors) == 1
    assert message in errors[0]


def test_the_check_refuses_a_folder_that_is_no_process_reward_model(tmp_path: Path) -> None:
    made = recipe(tmp_path, "sums")
    source = made["stages"][0]["rewards"][0]["source"]
    del source["scorer"]
    source["model"] = made["model"]["path"]
    loaded = Recipe.model_validate(made)
    with pytest.raises(UserError):
        _process_models(loaded.stages[0], loaded)


def test_what_a_card_names_counts_and_to_force_computes_nothing_again(tmp_path: Path) -> None:
    made = recipe(tmp_path, "sums")["stages"][0]
    stage = GrpoStage.model_validate(made)
    named = [(one.place, one.makes) for one in stage.references() if "card" in one.place]
    assert named == [("rewards.0.source.card.replies", ("step labels",))]
    forced = GrpoStage.model_validate(recipe(tmp_path, "sums", force=True)["stages"][0])
    assert forced.settings() == stage.settings()
    assert GrpoStage.model_validate(recipe(tmp_path, "sums", count=7)["stages"][0]).settings() != stage.settings()
    judge = {"kind": "mixed", "rewards": made["rewards"]}
    with pytest.raises(ValidationError, match="a judge's process reward is not tried on changed replies"):
        EvalStage.model_validate({"name": "e", "models": ["base"], "judge": judge})


def test_a_process_reward_model_is_trained_tried_and_learned_from(tmp_path: Path) -> None:
    """The chain of stages on a model that writes at random, whatever its steps look like."""
    made = recipe(tmp_path, "sums", force=True)
    (rl,) = made["stages"]
    labels = rl["rewards"][0]["source"]["card"]["replies"]
    source = rl["rewards"][0]["source"] | {"model": "prm", "form": "min"}
    del source["scorer"]
    rl |= {"rewards": [{"source": source}], "sampling": {"max_new_tokens": 24}, "episodes": 32, "rollout_batch": 32}
    prm = {"kind": "process_reward", "name": "prm", "model": "base", "labels": labels, "batch_size": 16}
    made["stages"] = [prm, rl]
    rows = run(made, tmp_path / "run").stage("it").metrics.rows()
    assert 0 < rows[0]["process/min"] < 1
    assert (tmp_path / "run" / "it" / "process_card.json").exists()
    source |= {"steps": {"by": "blank_line"}}
    with pytest.raises(ValidationError, match="cuts replies otherwise than its model was trained to judge them"):
        run(made, tmp_path / "run")
