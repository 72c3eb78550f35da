"""A reward for the steps of replies: what the scorer makes of a reply, and GRPO and PPO learning from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_grpo_runs import PROMPTS, Killed
from test_stages import run, write_jsonl
from test_train import context
from tiny import prompt, save_tiny, tiny_tokenizer

from keel.data.chat import Chat
from keel.recipe.grpo import GrpoStage
from keel.recipe.judges import ProcessTerm
from keel.recipe.recipe import Recipe
from keel.recipe.steps import Steps
from keel.recipe.verify import VerifyRef
from keel.reward.process_term import ProcessTermScorer, reply_ends, split_reply
from keel.reward.scorer import MixedScorer, PythonScorer, RewardPart
from keel.reward.trace import Trace
from keel.train.grpo import Grpo, train_grpo
from keel.train.loop import _update
from keel.train.online import make_rollouts
from keel.train.optim import make_optimizer
from keel.train.rollouts import Shaped
from keel.train.trace_figures import trace_figures
from keel.types import Completion, Prompt, Step, UserError

SCORER = {"kind": "python_steps", "ref": f"{Path(__file__)}:few_signs"}


def few_signs(prompt: Prompt, steps: Sequence[str]) -> list[float]:
    return [1 / (1 + len(step.strip())) for step in steps]


def has_o(prompt: Prompt, text: str) -> float:
    return float("o" in text)


class ByWord:
    """'good' is right, 'bad' is wrong, anything else is in between."""

    def __init__(self, last: int = 10**9) -> None:
        self.last = last
        self.asked: list[tuple[str, ...]] = []

    def score_steps(self, prompts: Sequence[Prompt], replies: Sequence[tuple[str, ...]]) -> Sequence[tuple[float, ...]]:
        self.last -= 1
        if self.last < 0:
            raise Killed
        self.asked += replies
        return [tuple(0.9 if "good" in s else 0.1 if "bad" in s else 0.5 for s in steps) for steps in replies]


class Letters:
    """A step is scored by how many of its signs are an o."""

    def __init__(self, last: int = 10**9) -> None:
        self.last = last

    def score_steps(self, prompts: Sequence[Prompt], replies: Sequence[tuple[str, ...]]) -> Sequence[tuple[float, ...]]:
        self.last -= 1
        if self.last < 0:
            raise Killed
        return [tuple((1 + step.count("o")) / (2 + len(step)) for step in steps) for steps in replies]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(tiny_tokenizer())


def term(**settings: Any) -> ProcessTerm:
    return ProcessTerm.model_validate({"scorer": SCORER, **settings})


def reply(chat: Chat, text: str, finished: bool = True) -> Completion:
    ids = chat.tokenizer.encode(text, add_special_tokens=False)
    return Completion(text, (*ids, *(chat.stop_ids[:1] if finished else ())), (), finished)


# ------------------------------------------------------------------------------------------------- steps in a reply


def test_steps_end_where_their_last_sign_is_there(chat: Chat) -> None:
    one = reply(chat, "good day\n\nsails from\nto salt\n")
    steps, unfinished = split_reply(Steps(), one)
    assert steps == ("good day\n\n", "sails from\n", "to salt\n")
    assert unfinished == 0
    ends = reply_ends(chat.decode, one, steps)
    texts = [
        chat.decode(one.ids[begin : end + 1]) for begin, end in zip((0, *(e + 1 for e in ends)), ends, strict=False)
    ]
    assert [text.split() for text in texts] == [["good", "day"], ["sails", "from"], ["to", "salt"]]
    assert ends[-1] == len(one.ids) - 1  # with its end token


def test_a_token_of_two_steps_and_bytes_that_are_no_text_are_no_error(chat: Chat) -> None:
    marker = Steps(by="marker", marker="ai")  # within "captain", "sails", "salt"
    one = reply(chat, "captain sails", finished=False)
    steps, _ = split_reply(marker, one)
    assert steps == ("captai", "n sai", "ls")
    ends = reply_ends(chat.decode, one, steps)
    assert list(ends) == sorted(ends)
    assert max(ends) < len(one.ids)
    odd = (*chat.tokenizer.encode("é", add_special_tokens=False)[:1], *one.ids)
    broken = Completion(chat.decode(odd), odd, (), False)
    assert len(reply_ends(chat.decode, broken, split_reply(marker, broken)[0])) == 3


def test_a_step_ends_with_the_last_byte_of_its_last_sign(chat: Chat) -> None:
    """Held against every beginning of the reply, read by itself."""
    alone: dict[int, int] = {}
    for text in ("to √ salt ü\ngood", "a≈\n日本\n\n語", "é\né", "sail ü in in"):
        for how in (Steps(), Steps(by="marker", marker="in")):
            one = reply(chat, text, finished=False)
            steps, _ = split_reply(how, one)
            read = ["".join(chat.decode(one.ids[:k]).split()) for k in range(len(one.ids) + 1)]
            wanted = ["".join("".join(steps[: k + 1]).split()) for k in range(len(steps))]
            slowly = [next(k for k, said in enumerate(read) if said.startswith(want)) - 1 for want in wanted]
            assert list(reply_ends(chat.decode, one, steps, alone)) == slowly
    one = reply(chat, "a\ufffd\nb", finished=False)  # three bytes, each of which is read as the whole
    assert reply_ends(chat.decode, one, split_reply(Steps(), one)[0]) == (3, 5)


def test_the_ends_of_a_long_reply_are_found_by_reading_it_once(chat: Chat) -> None:
    one = reply(chat, "sails from the captain\n" * 100)
    steps, _ = split_reply(Steps(), one)
    read = 0

    def counted(ids: Sequence[int]) -> str:
        nonlocal read
        read += len(ids)
        return chat.decode(ids)

    ends = reply_ends(counted, one, steps)
    assert len(ends) == 100
    assert read < 10 * len(one.ids)  # the reply, a few times over, and not once for each step


def test_a_reply_that_says_nothing_has_its_progress_at_its_end(chat: Chat) -> None:
    replies = [reply(chat, " \n"), reply(chat, "go", finished=False), reply(chat, "bad")]
    found = ProcessTermScorer(term(start=0.5), ByWord(), decode=chat.decode).score([prompt(0)] * 3, replies)
    assert [[step.value for step in steps] for steps in found.steps] == [[-0.5], [-0.5], [pytest.approx(-0.4)]]
    assert [steps[0].end for steps in found.steps] == [len(one.ids) - 1 for one in replies]
    assert [len(trace.tokens) for trace in found.traces] == [0, 1, 1]  # it has no step all the same


def test_a_shut_gate_is_no_better_than_a_wrong_answer(chat: Chat) -> None:
    verify = {"kind": "verify", "wrong": -1.0, "unreadable": -0.5}
    gated = term(form="gated", outcome=verify, bound=0.5)
    outcome = PythonScorer(lambda _, text: 1.0 if "good" in text else -1.0)
    replies = [reply(chat, "go"), reply(chat, "good\nbad"), reply(chat, "good\ngo")]
    found = ProcessTermScorer(gated, ByWord(), outcome=outcome, decode=chat.decode).score([prompt(0)] * 3, replies)
    assert found.reply_N.tolist() == [-1.0, -1.0, 1.0]


def test_the_last_step_of_a_cut_reply_is_not_judged(chat: Chat) -> None:
    scorer = ByWord()
    replies = [
        reply(chat, "good\nbad\ngo", finished=False),  # within its third step
        reply(chat, "good\nbad\n", finished=False),  # at the end of its second
        reply(chat, "good\nbad\ngo"),
        reply(chat, "go", finished=False),  # within its first
        reply(chat, " \n"),  # blank
    ]
    found = ProcessTermScorer(term(form="sum"), scorer, decode=chat.decode).score([prompt(0)] * 5, replies)
    assert scorer.asked == [("good\n", "bad\n"), ("good\n", "bad\n"), ("good\n", "bad\n", "go")]
    assert [[step.value for step in steps] for steps in found.steps] == [
        [0.9, 0.1],
        [0.9, 0.1],
        [0.9, 0.1, 0.5],
        [],
        [],
    ]
    assert found.step_baseline == "tokens"
    assert [len(trace.tokens) for trace in found.traces] == [3, 2, 3, 1, 0]
    assert found.reply_N.tolist() == [0.0] * 5


def test_without_tokens_to_place_them_on_a_reply_has_the_sum(chat: Chat) -> None:
    replies = [reply(chat, "good\nbad\ngo"), reply(chat, "good\ngood")]
    found = ProcessTermScorer(term(start=0.25), ByWord()).score([prompt(0)] * 2, replies)
    assert found.steps == ()
    assert found.total_N.tolist() == pytest.approx([0.25, 0.65])
    placed = ProcessTermScorer(term(start=0.25), ByWord(), decode=chat.decode).score([prompt(0)] * 2, replies)
    assert placed.total_N.tolist() == pytest.approx([0.25, 0.65])
    assert placed.step_baseline == "returns"


def test_a_gate_lets_the_outcome_through_where_every_step_is_right(chat: Chat) -> None:
    outcome = PythonScorer(lambda _, text: 2.0)
    gated = term(form="gated", outcome={"kind": "python", "ref": "x:y"}, bound=0.5)
    replies = [reply(chat, "good\ngo"), reply(chat, "good\nbad"), reply(chat, "")]
    found = ProcessTermScorer(gated, ByWord(), outcome=outcome, decode=chat.decode).score([prompt(0)] * 3, replies)
    assert found.steps == ()
    assert found.reply_N.tolist() == [2.0, 0.0, 0.0]
    assert [trace.outcome for trace in found.traces] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(("said", "message"), [
    ((0.5,), r"'p0': the scorer of steps gave 1 numbers for 2 steps"),
    ((0.5, 1.5), r"'p0': the scorer of steps gave 1.5; scores lie between 0 and 1"),
    ((0.5, float("nan")), "gave nan"),
])  # fmt: skip
def test_what_is_no_score_a_step_is_refused(said: tuple[float, ...], message: str, chat: Chat) -> None:
    class Says:
        def score_steps(self, prompts: Any, replies: Any) -> Any:
            return [said]

    with pytest.raises(UserError, match=message):
        ProcessTermScorer(term(), Says()).score([prompt(0)], [reply(chat, "good\nbad")])


def test_a_mix_keeps_how_steps_are_held_and_knows_the_outcome(chat: Chat) -> None:
    process = ProcessTermScorer(term(form="sum"), ByWord(), decode=chat.decode)
    right = PythonScorer(has_o)
    replies = [reply(chat, "good\nbad")]
    mixed = MixedScorer([RewardPart(process, 0.5, "prm"), RewardPart(right, 1.0, "answer", outcome=True)])
    found = mixed.score([prompt(0)], replies)
    assert [step.value for step in found.steps[0]] == pytest.approx([0.45, 0.05])
    assert found.reply_N.tolist() == [1.0]
    assert found.step_baseline == "tokens"
    assert found.traces[0].outcome == 1.0
    # of weight 0 it only watches
    watched = MixedScorer([RewardPart(process, 0.0, "prm"), RewardPart(right, 1.0, "answer", outcome=True)])
    found = watched.score([prompt(0)], replies)
    assert found.steps == ()
    assert found.traces[0].scores == (0.9, 0.1)


# ---------------------------------------------------------------------------------------------------------- figures


def test_figures_by_hand() -> None:
    traces = [
        Trace((0.9, 0.8), (4, 6), outcome=1.0, thinking=3),
        Trace((0.9, 0.2, 0.9), (2, 4, 4), repeated=1, outcome=1.0, thinking=0),  # right by luck
        Trace((0.4,), (10, 2), outcome=0.0, thinking=12),
        Trace((), (), outcome=0.0, thinking=0),
    ]
    found = trace_figures(["a", "a", "b", "b"], traces, 2)
    assert found == pytest.approx({
        "process/steps": 7 / 4,
        "process/tokens_a_step": 32 / 7,
        "process/tokens_a_step_p95": 8.8,  # 2 2 4 4 4 6 10: at 5.7
        "process/repeated": 1 / 7,
        "process/mean": (0.9 + 0.8 + 0.9 + 0.2 + 0.9 + 0.4) / 6,
        "process/min": (0.8 + 0.2 + 0.4) / 3,
        "process/thinking_tokens": 15 / 4,
        "process/outcome": 0.5,
        "process/outcome_se": 0.5,  # sums of 1 and -1 by prompt: sqrt(2 * 2) / 4
        "process/lucky": 0.5,
        "process/pass_at_1": 0.5,
        "process/pass_at_group": 0.5,
    })  # fmt: skip
    assert "process/unmatched" in trace_figures(["a"], [Trace((0.5,), (3,), unmatched=1)], 1)
    assert trace_figures([], [], 2) == {}


def test_a_step_is_right_from_the_rewards_bound_on_and_an_answer_as_its_verifier_says(chat: Chat) -> None:
    traces = [Trace((0.9, 0.6), (1, 1), outcome=0.5, bound=0.7, right_above=0.25)]
    found = trace_figures(["a"], traces, 1)
    assert (found["process/lucky"], found["process/pass_at_1"]) == (1.0, 1.0)
    assert trace_figures(["a"], [Trace((0.9, 0.6), (1, 1), outcome=1.0)], 1)["process/lucky"] == 0.0
    process = ProcessTermScorer(term(bound=0.95), ByWord(), decode=chat.decode)
    half = VerifyRef(right=0.5, wrong=0.0, unreadable=-1.0)
    answer = RewardPart(PythonScorer(lambda _, text: 0.5), 1.0, "verify", outcome=True, right_above=half.right_above)
    (trace,) = MixedScorer([RewardPart(process, 1.0, "prm"), answer]).score([prompt(0)], [reply(chat, "good")]).traces
    assert (trace.bound, trace.right_above) == (0.95, 0.25)
    found = trace_figures(["a"], [trace], 1)
    assert (found["process/lucky"], found["process/pass_at_1"]) == (1.0, 1.0)


def test_steps_that_lack_or_repeat_something_are_counted(chat: Chat) -> None:
    scorer = ProcessTermScorer(term(step_pattern=r"\d+ = \d+", thinking={}), ByWord(), decode=chat.decode)
    thinks = reply(chat, "<think>good\ngood \n3 = 4</think>day")
    (trace, plain) = scorer.score([prompt(0)] * 2, [thinks, reply(chat, "good day")]).traces
    assert trace.repeated == 0
    assert trace.unmatched == 2
    assert plain.thinking == 0
    shown = chat.decode(thinks.ids[: trace.thinking])
    assert shown == "<think>good\ngood \n3 = 4</think>"
    never = scorer.score([prompt(0)], [reply(chat, "<think>good\ngood\ngood", finished=False)]).traces[0]
    assert never.thinking == sum(never.tokens)
    assert never.repeated == 1


# ---------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(("settings", "message"), [
    ({"ratio": "sequence", "normalise": "sequence"}, "value single steps of a reply, and ratio: sequence"),
    ({"baseline": "batch", "scale_rewards": "batch"}, "value single steps of a reply, and baseline: batch"),
    ({"scale_rewards": "mean", "missing_eos_penalty": 0}, "value single steps of a reply, and scale_rewards: mean"),
])  # fmt: skip
def test_what_knows_whole_replies_alone_is_refused_before_compute(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        stage(**settings)
    if "scale_rewards" not in settings or settings["scale_rewards"] != "mean":
        outcome = {"kind": "python", "ref": "x:y"}
        stage(rewards=[{"source": {**SOURCE, "form": "gated", "outcome": outcome}}], **settings)


SOURCE = {"kind": "process", "scorer": SCORER}


def stage(**settings: Any) -> GrpoStage:
    common: dict[str, Any] = {"name": "grpo", "model": "base", "rewards": [{"source": SOURCE}], "group_size": 4}
    common |= {"rollout_batch": 32, "sampling": {"max_new_tokens": 10}}
    return GrpoStage.model_validate({**common, **settings})


def test_a_clip_that_cuts_what_steps_change_is_refused() -> None:
    for form in ("progress", "min"):
        with pytest.raises(ValidationError, match="so that steps no longer add up"):
            stage(rewards=[{"source": {**SOURCE, "form": form}, "weight": 0.5}], reward_clip=0.4)
        stage(rewards=[{"source": {**SOURCE, "form": form}, "weight": 0.5}], reward_clip=0.5)
    stage(rewards=[{"source": {**SOURCE, "form": "sum"}}], reward_clip=0.4)


@pytest.mark.parametrize(("settings", "message"), [
    ({"level": "outcome"}, "grpo.rewards.0.source: prm is an outcome reward model"),
    ({"steps": {"by": "blank_line"}}, "grpo.rewards.0.source: it cuts replies otherwise than its model"),
])  # fmt: skip
def test_a_model_that_cannot_score_these_steps_is_refused_before_it_is_trained(
    settings: dict[str, Any], message: str
) -> None:
    prm = {"kind": "process_reward", "name": "prm", "model": "base", "labels": "steps.jsonl", **settings}
    source = {"kind": "process", "model": "prm", "steps": {"by": "line"}}
    rl = stage(rewards=[{"source": source}]).model_dump(mode="json")
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate({"model": {"path": "x"}, "stages": [prm, rl]})


def test_what_is_only_watched_gives_no_group_a_signal() -> None:
    """With combine: each every reward has its own advantages; one of weight 0 adds none."""
    rewards = [{"source": {"kind": "python", "ref": f"x:{name}"}, "weight": w} for name, w in (("a", 1), ("b", 0))]
    config = stage(rewards=rewards, combine="each", no_spread="drop", beta=0)
    algorithm = Grpo.__new__(Grpo)
    algorithm.config = config
    terms = torch.tensor(
        [[1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [1.0, 0.4], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
    )
    shaped = Shaped(terms[:, 0], terms, None, torch.ones(8, dtype=torch.bool), torch.arange(9))
    assert algorithm._signal(shaped)[1].tolist() == [True, False]


def test_two_process_rewards_are_refused() -> None:
    other = {"source": {**SOURCE, "form": "min"}}
    with pytest.raises(ValidationError, match="two terms value the steps"):
        stage(rewards=[{"source": SOURCE}, other])


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("form", ["progress", "min", "sum"])
def test_micro_batches_change_nothing_and_a_killed_run_ends_with_the_same_bits(
    form: str, model: Path, tmp_path: Path, chat: Chat
) -> None:
    how = term(form=form, steps={"by": "marker", "marker": "a"})
    ends = []
    for batch_tokens in (100_000, 60):
        config = stage(batch_tokens=batch_tokens, minibatches=1, old_logprobs="trainer", beta=0)
        c = context(tmp_path / str(batch_tokens), "grpo", model)
        scorer = ProcessTermScorer(how, Letters(), decode=chat.decode)
        algorithm = Grpo(make_rollouts(config, PROMPTS, scorer, None, c), config)
        (micros,) = algorithm.updates(0)
        assert (len(micros) > 3) == (batch_tokens == 60)
        figures = _update(algorithm, make_optimizer(algorithm.modules, config.optim, {}), micros, config, c, 0)
        ends.append((figures["loss"][0], figures["grad_norm"][0]))
    assert ends[0] == pytest.approx(ends[1], rel=1e-4, abs=1e-5)
    assert ends[0][1] > 0
    if form != "progress":
        return
    config = stage(episodes=96, save_every_seconds=0.0, beta=0)
    results = []
    for name, kills in (("whole", []), ("killed", [2])):
        c = context(tmp_path / name, "grpo", model)
        for last in kills:
            with pytest.raises(Killed):
                train_grpo(config, PROMPTS, ProcessTermScorer(how, Letters(last), decode=chat.decode), None, c)
        train_grpo(config, PROMPTS, ProcessTermScorer(how, Letters(), decode=chat.decode), None, c)
        results.append((c.stage.metrics.rows(), (c.stage.path / "model.safetensors").read_bytes()))
    assert results[0] == results[1]
    assert {"process/steps", "process/min", "process/tokens_a_step"} <= set(results[0][0][0])


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_recipe_learns_from_steps(kind: str, tmp_path: Path) -> None:
    """A step ends with an o, and its score is the higher the sooner that comes."""
    base = save_tiny(tmp_path / "base")
    steps = {"by": "marker", "marker": "o"}
    rewards = [
        {"source": {**SOURCE, "form": "sum", "steps": steps}},
        {"source": {"kind": "python", "ref": f"{Path(__file__)}:has_o"}, "weight": 0.1},
    ]
    made = {
        "kind": kind, "name": "rl", "model": "base", "rewards": rewards, "group_size": 4, "rollout_batch": 32,
        "episodes": 32 * 8, "minibatches": 1, "sampling": {"max_new_tokens": 8}, "optim": {"lr": 2e-2},
        "missing_eos_penalty": 0.0,
    }  # fmt: skip
    made |= {"beta": 0, "scale_rewards": "none"} if kind == "grpo" else {"kl": {"coef": 0.0}, "gamma": 1.0, "lam": 1.0}
    prompts = [{"prompt": f"what is {n} to the captain"} for n in range(20)]
    recipe = {
        "model": {"path": str(base)},
        "data": {"prompts": write_jsonl(tmp_path / "prompts.jsonl", prompts)},
        "stages": [made],
    }
    rows = run(recipe, tmp_path / "run").stage("rl").metrics.rows()
    first, last = (sum(row["objective/scores"] for row in part) / 2 for part in (rows[:2], rows[-2:]))
    assert last > first + 0.1
    assert {"process/outcome", "process/pass_at_1", "process/pass_at_group"} <= set(rows[0])


def test_steps_fall_on_their_tokens_in_ppo(chat: Chat) -> None:
    one = reply(chat, "good day\nbad")
    found = ProcessTermScorer(term(start=0.0), ByWord(), decode=chat.decode).score([prompt(0)], [one])
    first = len(chat.tokenizer.encode("good day", add_special_tokens=False)) - 1
    assert found.steps[0] == (Step(first, 0.9), Step(len(one.ids) - 1, pytest.approx(-0.8)))


@pytest.mark.wide
def test_more_steps_pay_with_sum_and_not_with_the_others(model: Path, tmp_path: Path, chat: Chat) -> None:
    """Every step is scored alike. That there is one at all pays with each form, so the count rises with all."""

    class Likes:
        def score_steps(self, prompts: Any, replies: Sequence[tuple[str, ...]]) -> list[tuple[float, ...]]:
            return [(0.9,) * len(steps) for steps in replies]

    ends = {}
    for form in ("sum", "min", "progress"):
        config = stage(
            episodes=32 * 14, beta=0, scale_rewards="none", missing_eos_penalty=0.0, optim={"lr": 2e-2},
            sampling={"max_new_tokens": 12},
        )  # fmt: skip
        c = context(tmp_path / form, "grpo", model)
        how = term(form=form, steps={"by": "marker", "marker": "o"})
        train_grpo(config, PROMPTS, ProcessTermScorer(how, Likes(), decode=chat.decode), None, c)
        ends[form] = sum(row["process/steps"] for row in c.stage.metrics.rows()[-3:]) / 3
    assert ends["sum"] > 1.5 * max(ends["min"], ends["progress"])
