"""Rewards without a model in a pipeline: GSM8K's rows read and learned from, processes that are killed, prompts without
an answer found before compute."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_chat import QWEN3, SPECIALS
from test_chat import tokenizer as chat_tokenizer
from test_stages import run, write_jsonl
from tiny import save_tiny, tiny_tokenizer

from keel.check import check_recipe
from keel.check.machine import extras
from keel.cli import main
from keel.data.chat import Chat
from keel.data.sources import read_demonstrations, read_prompts
from keel.model.checkpoint import load_scalar
from keel.recipe.judges import RewardTerm
from keel.recipe.recipe import Recipe
from keel.recipe.sample import SampleStage
from keel.recipe.steps import Thinking
from keel.recipe.verify import FormatRef, RandomRef, VerifyRef
from keel.reward.checks import Coin, Format, Verify, known_answer, make_check
from keel.reward.killable import Killable
from keel.reward.scorer import RewardModelScorer
from keel.run import RunDir, Silent
from keel.stages.context import StageContext
from keel.stages.scoring import make_judge, mixed_scorer
from keel.types import Completion, Message, Prompt, UserError

GSM8K = Path(__file__).parent / "data" / "gsm8k.jsonl"


def ask(answer: Any, field: str = "answer") -> Prompt:
    return Prompt("p", (Message("user", "how many?"),), meta={field: answer})


def verdicts(ref: VerifyRef, answer: Any, *replies: str) -> list[str]:
    grades = Verify(ref).grade([ask(answer)] * len(replies), [Completion(reply) for reply in replies])
    names = {(True, False): "right", (False, False): "wrong", (False, True): "unreadable"}
    return [names[bool(g.flags["correct"]), bool(g.flags["unreadable"])] for g in grades]


# --------------------------------------------------------------------------------------------------------- the rows


def test_gsm8k_is_read_as_it_is() -> None:
    prompts = read_prompts(GSM8K)
    assert [prompt.meta["answer"] for prompt in prompts] == ["26", "71,200", "-5", "3.5", "24", "10", "11", "18"]
    assert prompts[0].messages[0].content.startswith("Maren loads 16 crates")
    assert prompts[0].meta["solution"].endswith("#### 26")
    taught = read_demonstrations(GSM8K)
    assert [message.role for message in taught[0].messages] == ["user", "assistant"]
    assert taught[0].messages[1].content.endswith("26 crates.\n#### 26")
    grades = Verify(VerifyRef()).grade(prompts, [Completion(one.messages[-1].content) for one in taught])
    assert [grade.score for grade in grades] == [1.0] * 8


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"problem": "1+1?", "solution": "It is $\\boxed{2}$.", "level": "Level 1"}, "2"),
        ({"problem": "1/2?", "solution": "So $\\boxed{\\frac{1}{2}}$.", "answer": "\\frac{1}{2}"}, "\\frac{1}{2}"),
        ({"question": "1+1?", "answer": 2}, 2),
        ({"prompt": "1+1?", "answer": "2"}, "2"),
        ({"prompt": "1+1?", "question": "other", "answer": "1+1=2\n#### 2"}, "1+1=2\n#### 2"),
        ({"question": "1+1?"}, None),
    ],
)
def test_rows_with_answers(tmp_path: Path, row: dict[str, Any], answer: Any) -> None:
    (prompt,) = read_prompts(write_jsonl(tmp_path / "p.jsonl", [row]))
    assert prompt.meta.get("answer") == answer
    assert prompt.messages[0].content in ("1+1?", "1/2?")


def test_a_question_whose_options_are_elsewhere_is_refused(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "p.jsonl", [{"question": "Which?", "choices": ["a", "b"], "answer": "a"}])
    with pytest.raises(UserError, match="'choices': it is not shown with the question"):
        read_prompts(rows)
    with pytest.raises(UserError, match="'choices': it is not shown with the question"):
        read_demonstrations(rows)


# ------------------------------------------------------------------------------------------------ what is known, flags


@pytest.mark.parametrize(
    ("value", "known"),
    [(18, "18"), (0.1, "0.1"), (True, "yes"), (["7"], "7"), ([1, 2], "[1, 2]"), ("1+1=2\n#### 2", "2"), (0, "0")],
)
def test_what_counts_as_an_answer(value: Any, known: str) -> None:
    assert known_answer(ask(value), "answer") == known


@pytest.mark.parametrize("value", [None, "", "  ", {"a": 1}])
def test_what_counts_as_none(value: Any) -> None:
    with pytest.raises(UserError, match="no answer in 'answer'"):
        known_answer(ask(value), "answer")


def test_right_wrong_and_unreadable_have_scores_of_their_own() -> None:
    check = make_check(VerifyRef(right=2.0, wrong=-1.0, unreadable=-3.0, field="gold"))
    grades = check.grade([ask("5", "gold")] * 3, [Completion("5"), Completion("6"), Completion("so it goes")])
    assert [grade.score for grade in grades] == [2.0, -1.0, -3.0]


def test_the_answer_is_read_behind_the_thinking() -> None:
    ref = VerifyRef(thinking=Thinking())
    replies = ("<think>#### 5</think>#### 6", "<think>#### 6</think>#### 5", "<think>it is 5, #### 5", "#### 5")
    assert verdicts(ref, "5", *replies, "#### 6</think>#### 5", "</think>") == [
        "wrong", "right", "unreadable", "right", "right", "unreadable",
    ]  # fmt: skip
    # Thinking that never ends has no answer, wherever it begins: behind some words, or behind an answer.
    assert verdicts(ref, "5", "Well. <think>#### 5", "<think>6</think>5\n<think>#### 5") == ["unreadable"] * 2
    assert verdicts(ref, "5", "Well. <think>6</think>5", "<think>6</think>7<think>8</think>5") == ["right"] * 2
    opened = VerifyRef(thinking=Thinking(opened=True))
    assert verdicts(opened, "5", "it is 5\n#### 5", "it is 6</think>#### 5") == ["unreadable", "right"]
    own = VerifyRef(thinking=Thinking(open="[THINK]", close="[/THINK]"))
    assert verdicts(own, "5", "[THINK]6[/THINK] 5", "[THINK]6 or 5") == ["right", "unreadable"]


def test_thinking_has_a_limit() -> None:
    ref = VerifyRef(thinking=Thinking(), thinking_limit=5)
    assert verdicts(ref, "5", "<think>12345</think>5", "<think>123456</think>5", "5") == [
        "right",
        "unreadable",
        "right",
    ]
    (grade,) = Format(FormatRef(pattern="5", thinking=Thinking(), thinking_limit=1)).grade(
        [ask("5")], [Completion("<think>12</think>5")]
    )
    assert grade.flags == {"formatted": False}
    with pytest.raises(ValidationError, match="thinking_limit is for replies with thinking"):
        VerifyRef(thinking_limit=5)


@pytest.mark.parametrize("special", [True, False])
def test_marks_that_are_special_tokens_stay_in_the_text(special: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    chat = Chat(tokenizer)
    ids = tokenizer("<think>6 or 5</think>\n5", add_special_tokens=False)["input_ids"]
    assert len(tokenizer("<think></think>", add_special_tokens=False)["input_ids"]) == 2
    text = chat.decode([*ids, chat.stop_ids[0]])
    assert verdicts(VerifyRef(thinking=Thinking()), "5", text) == ["right"]
    assert Thinking().split(text) == ("6 or 5", "\n5")


def test_a_cut_reply_has_no_answer_at_its_end() -> None:
    prompts = [ask("1")] * 2
    grades = Verify(VerifyRef()).grade(prompts, [Completion("#### 1", finished=False), Completion("#### 1")])
    assert [grade.flags["unreadable"] for grade in grades] == [True, False]


def test_the_form_alone() -> None:
    ref = FormatRef(pattern=r".*#### -?\d+", thinking=Thinking(), good=0.5, bad=-0.5)
    check = Format(ref)
    replies = ["so\n#### 7", "7", "#### 7 apples", "<think>#### 7", "<think>x</think>#### 7"]
    grades = check.grade([ask("1")] * 5, [Completion(reply) for reply in replies])
    assert [grade.flags["formatted"] for grade in grades] == [True, False, False, False, True]
    assert [grade.score for grade in grades] == [0.5, -0.5, -0.5, -0.5, 0.5]
    with pytest.raises(ValidationError, match="is no regular expression"):
        FormatRef(pattern="(")


def test_a_coin_is_the_same_of_the_same_reply_and_fair() -> None:
    replies = [Completion(f"reply {i}") for i in range(4000)]
    prompts = [ask("1")] * len(replies)
    scores = [grade.score for grade in Coin(RandomRef(share=0.25)).grade(prompts, replies)]
    assert scores == [grade.score for grade in Coin(RandomRef(share=0.25)).grade(prompts, replies)]
    assert scores != [grade.score for grade in Coin(RandomRef(share=0.25, seed=1)).grade(prompts, replies)]
    assert abs(sum(scores) / 4000 - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5


# -------------------------------------------------------------------------------------------- processes that are killed


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_what_hangs_or_crashes_costs_its_own_answer() -> None:
    workers = Killable("misbehaving:make", seconds=0.5, processes=2)
    (before,) = workers.map(["pid"])
    jobs = ["a", "hang", "b", "crash", "c", "fail", "print", "\ud800\x00\n"]
    assert workers.map(jobs) == [["a"], None, ["b"], None, ["c"], None, ["print"], ["\ud800\x00\n"]]
    pids = {*workers.map(["pid"] * 4)}
    assert workers.map([]) == []
    workers.close()
    assert not any(alive(pid) for pid in {before, *pids})


def test_a_function_that_cannot_be_had_is_said() -> None:
    with pytest.raises(UserError, match="its process did not start: ModuleNotFoundError"):
        Killable("no_such_module:f").map([1])


@pytest.mark.parametrize("how", ["end", "interrupt", "kill"])
def test_no_process_is_left_behind(tmp_path: Path, how: str) -> None:
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job of a shell begins without it
        "from keel.reward.killable import Killable\n"
        f"sys.path.append({str(Path(__file__).parent)!r})\n"
        f"workers = Killable('misbehaving:make', seconds=0.4 if {how!r} == 'kill' else 30)\n"
        "print(workers.map(['pid'])[0], flush=True)\n"
        f"{how!r} == 'end' or workers.map(['hang'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True, env=environment)  # fmt: skip
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    if how != "end":
        time.sleep(0.1)
        parent.send_signal(signal.SIGINT if how == "interrupt" else signal.SIGKILL)
    parent.wait(20)
    begin = time.monotonic()
    while alive(pid) and time.monotonic() - begin < 6:  # its own alarm, where nobody is left to kill it
        time.sleep(0.05)
    assert not alive(pid)


def test_a_pattern_that_never_ends_is_not_fitted() -> None:
    check = Format(FormatRef(pattern="(a+)+b"))
    check._fits.seconds = 0.5
    grades = check.grade([ask("1")] * 3, [Completion("ab"), Completion("a" * 60), Completion("aab")])
    assert [grade.score for grade in grades] == [1.0, 0.0, 1.0]


needs_math = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")


@needs_math
def test_formulas_are_held_against_formulas() -> None:
    ref = VerifyRef(how="math")
    assert verdicts(ref, "x+1", "\\boxed{1+x}", "\\boxed{x+2}") == ["right", "wrong"]
    assert verdicts(ref, "2\\sqrt{3}", "\\boxed{\\sqrt{12}}", "\\boxed{3.46}") == ["right", "wrong"]
    assert verdicts(ref, "1/3", "0.333333333") == ["wrong"]  # by value, not by six digits
    assert verdicts(ref, "2\\sqrt{3}", "\\boxed{3.4641016}") == ["wrong"]
    replies = ("#### 5 miles", "\\boxed{> 5}", "\\boxed{5 or 6}", "\\boxed{\\approx 5}")
    assert verdicts(ref, "5 km", *replies) == ["unreadable"] * 4


@needs_math
def test_a_power_tower_is_given_back_within_six_seconds() -> None:
    tower = "\\boxed{9^{9^{9^{9}}}}"
    check = Verify(VerifyRef(how="math"))
    prompts, others = [ask("x+1")] * 3, [Completion("\\boxed{1+x}"), Completion("\\boxed{x}")]
    check.grade(prompts[:2], others)  # sympy is imported once
    begin = time.monotonic()
    grades = check.grade(prompts, [others[0], Completion(tower), others[1]])
    assert time.monotonic() - begin < 6
    assert [grade.flags["unreadable"] for grade in grades] == [False, True, False]
    assert [grade.score for grade in grades] == [1.0, 0.0, 0.0]


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is not None, reason="math-verify is installed")
def test_the_missing_extra_is_said() -> None:
    with pytest.raises(UserError, match=re.escape("pip install 'keel-rlhf[math]'")):
        make_check(VerifyRef(how="math"))
    stage = SampleStage(name="sample", candidates=8, rewards=[RewardTerm(source=VerifyRef(how="math"))])
    assert ["keel-rlhf[math]" in str(finding) for finding in extras(stage)] == [True]


# ------------------------------------------------------------------------------------------------------- a whole run


def recipe(tmp: Path, rewards: list[dict[str, Any]], **data: Any) -> dict[str, Any]:
    # A model of random weights hardly ever ends by itself: letters end its replies.
    sampling = {"max_new_tokens": 12, "batch_size": 16, "stop": list(string.ascii_letters)}
    return {
        "model": {"path": str(save_tiny(tmp / "base")), "chat_template": "keel"},
        "data": {
            "demonstrations": str(GSM8K), "prompts": str(GSM8K), "heldout_fraction": 0.4, "max_length": 256,
            "max_prompt_length": 128, **data,
        },
        "device": "cpu",
        "stages": [
            {"kind": "sft", "name": "sft", "model": "base", "epochs": 1, "batch_size": 4},
            {"kind": "sample", "name": "sample", "per_prompt": 1, "candidates": 2, "rewards": rewards,
             "sampling": sampling},
            {"kind": "grpo", "name": "grpo", "rewards": rewards, "episodes": 16, "rollout_batch": 8, "group_size": 2,
             "minibatches": 1, "sampling": sampling},
            {"kind": "eval", "name": "eval", "models": ["grpo"], "judge": {"kind": "verify"}, "rewards": rewards,
             "sampling": sampling, "bootstrap": 100},
        ],
    }  # fmt: skip


def test_gsm8k_goes_through_every_stage(tmp_path: Path) -> None:
    rewards = [
        {"source": {"kind": "verify", "wrong": -0.1, "unreadable": -0.2}},
        {"source": {"kind": "format", "pattern": ".*#### .*"}, "weight": 0.1},
        {"source": {"kind": "random", "seed": 3}, "weight": 0.1},
    ]
    directory = run(recipe(tmp_path, rewards), tmp_path / "run")
    summary = json.loads((directory.path / "summary.json").read_text())
    grpo = summary["stages"]["grpo"]
    assert grpo["counts"] == {"correct_rate": 4, "unreadable_rate": 4}, grpo
    assert grpo["gold_reward"] == grpo["correct_rate"]
    rows = directory.stage("grpo").metrics.rows()
    names = {name for name in rows[-1] if name.startswith("objective/scores/")}
    assert names == {f"objective/scores/{RewardTerm.model_validate(term).source.named}" for term in rewards}  # type: ignore[union-attr]


def test_prompts_without_an_answer_are_found_before_compute(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": f"what is {i}", "answer": "1" if i else ""} for i in range(8)]
    )
    made = recipe(tmp_path, [{"source": {"kind": "verify"}}], prompts=prompts)
    found = [str(f) for f in check_recipe(Recipe.model_validate(made), RunDir(tmp_path / "run")) if f.level == "error"]
    assert len(found) == 3, found  # sample, grpo, eval
    assert "1 of 8 prompts have no answer in meta.answer, which sample holds replies against" in found[0]
    assert f"{prompts}, line 1" in found[0]
    with pytest.raises(UserError, match="no answer in 'answer'"):
        run({**made, "stages": made["stages"][:2]}, tmp_path / "run")
    (tmp_path / "r.json").write_text(json.dumps(made))
    assert main(["check", str(tmp_path / "r.json"), "--out", str(tmp_path / "other")]) == 2


def test_a_group_takes_no_mean_of_scores_below_zero(tmp_path: Path) -> None:
    made = recipe(tmp_path, [{"source": {"kind": "verify", "wrong": -1.0}}])
    made["stages"][2] |= {"scale_rewards": "mean"}
    with pytest.raises(ValidationError, match="scale_rewards"):
        Recipe.model_validate(made)


# -------------------------------------------------------------------------------- thinking, and who is shown it


def heard(_: Prompt, text: str) -> float:
    """How long what it is shown is."""
    return float(len(text))


HEARD = f"{Path(__file__)}:heard"


def test_a_function_and_a_reward_model_can_be_shown_the_answer_alone(tmp_path: Path) -> None:
    answers = {"kind": "python", "ref": HEARD, "thinking": {}}
    opened = {"kind": "python", "ref": HEARD, "thinking": {"opened": True}}
    texts = ("<think>5 or 6</think>\n\nsix", "<think>5 or 6", "six")
    replies = [Completion(text, finished=not text.endswith("6")) for text in texts]
    rewards = [{"source": source, "weight": 2.0} for source in ({"kind": "python", "ref": HEARD}, answers)]
    recipe = Recipe.model_validate({"model": {"path": "x"}, "stages": [
        {"kind": "sample", "name": "s", "model": "base", "candidates": 8, "rewards": rewards},
        {"kind": "eval", "name": "e", "models": ["base"], "baseline": "base", "judge": opened},
    ]})  # fmt: skip
    context = StageContext(recipe, RunDir(tmp_path), RunDir(tmp_path).stage("s"), Silent(), "cpu")
    made = mixed_scorer(recipe.stages[0].rewards, context, "fp32")  # type: ignore[union-attr]
    scores = made.score([ask("6")] * 3, replies)
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        HEARD: [len(text) for text in texts],
        f"{HEARD} (answer)": [3.0, 0.0, 3.0],
    }
    context = StageContext(recipe, RunDir(tmp_path), RunDir(tmp_path).stage("e"), Silent(), "cpu")
    judge = make_judge(recipe.stages[1].judge, context, "fp32")  # type: ignore[union-attr]
    assert [grade.score for grade in judge.grade([ask("6")] * 3, replies) if grade] == [3.0, 0.0, 0.0]

    model = load_scalar(save_tiny(tmp_path / "rm"), new_head_seed=0)
    alone = RewardModelScorer(model, 4096, thinking=Thinking()).score([ask("6")] * 3, replies).reply_N
    plain = RewardModelScorer(model, 4096)
    bare = [Completion("six"), Completion("", finished=False), Completion("six")]
    assert torch.equal(alone, plain.score([ask("6")] * 3, bare).reply_N)
    assert not torch.equal(alone, plain.score([ask("6")] * 3, replies).reply_N)


def test_runs_from_before_it_stand() -> None:
    """Their fingerprints are of settings without it."""
    for source in ({"kind": "python", "ref": "a.py:f"}, {"kind": "model", "model": "rm"}):
        assert RewardTerm.model_validate({"source": source}).model_dump(mode="json")["source"] == source
        shown = RewardTerm.model_validate({"source": source | {"thinking": {}}}).model_dump(mode="json")
        assert shown["source"]["thinking"]["open"] == "<think>"
        assert RewardTerm.model_validate(shown).model_dump(mode="json") == shown


@pytest.mark.parametrize("kind", ["grpo", "ppo", "sample", "judge"])
def test_two_rewards_of_one_name_are_refused_at_once(kind: str) -> None:
    """A function of replies and one of steps are told apart by their references alone."""
    rewards: list[dict[str, Any]] = [
        {"source": {"kind": "python", "ref": "a.py:f"}},
        {"source": {"kind": "process", "scorer": {"kind": "python_steps", "ref": "a.py:f"}}},
    ]
    stage = {"kind": kind, "name": "s", "model": "base", "rewards": rewards}
    if kind == "judge":
        judge = {"kind": "mixed", "rewards": rewards}
        stage = {"kind": "eval", "name": "s", "models": ["base"], "baseline": "base", "judge": judge}
    with pytest.raises(ValidationError, match=r"rewards: two terms are called a.py:f.*leave one out"):
        Recipe.model_validate({"model": {"path": "x"}, "stages": [stage]})


THINKS = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)


@pytest.mark.parametrize("field", ["rewards.0.source.thinking", "search.thinking"])
def test_a_template_that_opens_thinking_must_be_known_to(tmp_path: Path, field: str) -> None:
    """A reply begins within it; one that is cut there would be all answer."""
    base = save_tiny(tmp_path / "base")
    tokenizer = chat_tokenizer(THINKS, SPECIALS["qwen"])
    assert Chat(tokenizer).opens("<think>")
    assert not Chat(tokenizer).opens("[THINK]")
    assert not Chat(chat_tokenizer(QWEN3, SPECIALS["qwen"])).opens("<think>")
    assert not Chat(tiny_tokenizer()).opens("<think>")
    tokenizer.save_pretrained(base)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "hi", "answer": "5"}])
    own: dict[str, Any] = {"rewards": [{"source": {"kind": "verify", "thinking": {}}}], "candidates": 2}
    if field == "search.thinking":
        own = {"search": {"how": "majority", "n": 2, "thinking": {}}}
    tree = {
        "model": {"path": str(base)},
        "data": {"prompts": prompts},
        "stages": [{"kind": "sample", "name": "s", "model": "base", "per_prompt": 1, **own}],
    }
    said = rf"s.{field}: the template of base opens thinking itself .*set s.{field}.opened: true"
    with pytest.raises(UserError, match=re.escape(f"s.{field}") + r": the template of base opens thinking itself"):
        run(tree, tmp_path / "run")
    found = [f for f in check_recipe(Recipe.model_validate(tree), RunDir(tmp_path / "run")) if f.level == "error"]
    assert any(re.search(said, str(f)) for f in found), found
