"""Searches in eval, sample and chat, on a tiny model that was taught three lines. Oracles: the figures counted here
from hand-written results, and plain sampling."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_search import by_last
from test_stages import run, write_jsonl
from tiny import prompt, save_tiny, tiny_tokenizer

from keel.check import check_recipe
from keel.cli import main
from keel.cli.chat import talk
from keel.data.chat import Chat, install_template
from keel.data.sources import read_demonstrations
from keel.eval.search import Marks, Searched, figures, powers_below, thirds
from keel.model.checkpoint import load_scalar, save
from keel.recipe.eval import EvalStage
from keel.recipe.recipe import Recipe
from keel.recipe.sections import SamplingConfig, Source
from keel.recipe.steps import Steps
from keel.reward.python_ref import load_python
from keel.run import RunDir, Silent
from keel.search.growing import Grower
from keel.search.paths import Costs, Found
from keel.search.paths import Path as Reply
from keel.search.revising import CHECK, Revising
from keel.stages.inputs import KEPT
from keel.stages.search import Searching
from keel.store import Store
from keel.types import Completion, Grade, Message, Prompt, UserError

HERE = str(Path(__file__))


# ------------------------------------------------------------------------------------------------- figures, by hand


class Judge:
    """An answer is right where it is the prompt's id; the last prompt has none."""

    def grade(self, prompts: Any, completions: Any) -> list[Grade]:
        return [
            Grade(0.3, {"correct": None if p.id == "none" else p.id == c.text})
            for p, c in zip(prompts, completions, strict=True)
        ]


PROMPTS = [Prompt(name, (Message("user", name),), kind="k" if name < "c" else "") for name in ("a", "b", "c", "none")]


def reply(place: int, text: str, state: Any = "finished") -> Reply:
    return Reply(place, 0, (1, 2), (0.0, 0.0), state, text, (text,))


def found(place: int, text: str | None, *texts: str, cost: int = 10) -> Found:
    answer = None if text is None else Completion(text)
    return Found(answer, tuple(reply(place, one) for one in texts), 1, cost, 2 * cost)


def test_right_answers_are_counted() -> None:
    marks = Marks(Judge(), PROMPTS)
    samples = [
        [reply(0, "a"), reply(0, "a"), reply(0, "x"), reply(0, "a", "cut")],
        [reply(1, "x"), reply(1, "b"), reply(1, "x"), reply(1, "x")],
        [reply(2, "x")] * 4,
        [reply(3, "x")] * 4,
    ]
    at_two = [found(0, "a", "a"), found(1, "x", "x"), found(2, None), found(3, "x")]
    block = [found(0, "x", cost=3), found(1, "b", cost=3), found(2, "x", cost=3), found(3, "x")]
    pool = Searched("pool", "best_of_n", "sft", 2, at_two, samples, {1: [block, at_two]})
    twice = Searched("twice", "revise", "sft", 1, [
        found(0, "a", "x", "a"), found(1, "x", "b", "x"), found(2, "c", "c", "c"), found(3, "x", "x")
    ])  # fmt: skip
    made = figures([pool, twice], marks, [0.5, 0.0, 1.0, 1.0], 8)
    one = made["search"]["pool"]
    assert one["accuracy"][0] == 1 / 3
    assert 0 < one["accuracy"][1] < 1 / 3 < one["accuracy"][2] < 1
    # Of two of the four samples: a cut one is no right one. 1 - C(2, 2) / C(4, 2), 1 - C(3, 2) / C(4, 2), 0.
    assert one["pass_at_n"] == pytest.approx((5 / 6 + 1 / 2 + 0) / 3)
    assert (one["generated_tokens"], one["scored_tokens"]) == (40, 80)
    assert (one["unanswered"], one["unfinished"], one["problems"]) == (1, 4, 3)
    # By the baseline's pass rate c is the easiest, b the hardest; the last prompt counts nowhere.
    assert {name: share[0] for name, share in one["by_third"].items()} == {"easy": 0.0, "middle": 1.0, "hard": 0.0}
    assert {kind: share[0] for kind, share in one["kinds"].items()} == {"k": 0.5}
    turned = made["search"]["twice"]
    assert (turned["wrong_to_right"], turned["right_to_wrong"]) == (1, 1)
    assert turned["pass_at_n"] == 1.0
    rows = {(row["name"], row["n"]): (row["accuracy"][0], row["tokens"]) for row in made["search_curve"]}
    assert rows == {("pool", 1): (2 / 6, (9 + 30) / 2), ("pool", 2): (1 / 3, 30), ("twice", 1): (2 / 3, 30)}
    assert made["search_thirds"]["pass_rate"] == {"easy": 1.0, "middle": 0.5, "hard": 0.0}


def test_thirds_and_sizes() -> None:
    assert thirds([0.1, 0.9, 0.1, 0.5], [0, 1, 2, 3]) == {1: "easy", 3: "easy", 0: "middle", 2: "hard"}
    assert [powers_below(n) for n in (1, 2, 5, 8)] == [[], [1], [1, 2, 4], [1, 2, 4]]


def test_a_judge_that_counts_nothing_is_refused() -> None:
    class Scores(Judge):
        def grade(self, prompts: Any, completions: Any) -> list[Grade]:
            return [Grade(0.3) for _ in prompts]

    with pytest.raises(UserError, match="have it return 0 or 1"):
        Marks(Scores(), PROMPTS)
    with pytest.raises(UserError, match="of no prompt"):
        Marks(Judge(), PROMPTS[-1:])


# ---------------------------------------------------------------------------------------------------------- revision


class Twice:
    """A sampler whose first replies and second replies are written down; "..." is cut."""

    def __init__(self, chat: Chat, first: list[str], second: dict[str, str]) -> None:
        self.chat, self.first, self.second, self.asked = chat, first, second, []  # type: ignore[var-annotated]

    def generate(self, prompts: Any, sampling: Any, seed: int, streams: Any = None) -> list[Completion]:
        texts = [self.chat.tokenizer.decode(ids) for ids in prompts]
        self.asked += texts
        replies = [
            next((new for old, new in self.second.items() if old in text and CHECK in text), self.first[i])
            for i, text in enumerate(texts)
        ]
        encode = self.chat.tokenizer.encode
        ids = [tuple(encode(one, add_special_tokens=False)) for one in replies]
        ends = [() if one.endswith("...") else self.chat.end_ids for one in replies]
        return [
            Completion("", i + e, (0.0,) * len(i + e), bool(e)) for i, e in zip(ids, ends, strict=True)
        ]  # fmt: skip


def test_a_reply_is_revised_in_a_second_turn() -> None:
    tokenizer = tiny_tokenizer()
    install_template(tokenizer, "keel")
    chat, prompts = Chat(tokenizer), [prompt(n) for n in range(4)]
    first, second = ["wrong one", "right two", "so good", "no ..."], {
        "wrong one": "right yes", "right two": "wrong no", "so good": "it is ..."
    }  # fmt: skip

    def revised(ranker: Any, second: dict[str, str] = second) -> tuple[list[Found], Twice]:
        sampler = Twice(chat, first, second)
        encoded = dict(enumerate(chat.encode_prompts([p.messages for p in prompts])))
        grower = Grower(chat, sampler, frozenset(chat.stop_ids), Steps(), encoded, None, Costs.of(4))
        return Revising(grower, ranker, prompts, SamplingConfig(max_new_tokens=30), 0).run(range(4)), sampler

    plain, sampler = revised(None)
    answers = [one.answer and one.answer.text for one in plain]
    assert answers == ["right yes", "wrong no", "so good", None]
    assert [len(one.paths) for one in plain] == [2, 2, 1, 0]
    assert [one.unfinished for one in plain] == [0, 0, 1, 2]
    assert len(sampler.asked) == 4 + 3, "a reply that was cut is not asked about"
    assert prompts[0].messages[0].content in sampler.asked[4]
    assert sampler.asked[4].index("wrong one") < sampler.asked[4].index(CHECK)
    gated, _ = revised(by_last(lambda text: float("right" in text)))
    assert [one.answer and (one.answer.text, one.answer.reward) for one in gated] == [
        ("right yes", 1.0), ("right two", 1.0), ("so good", 0.0), None
    ]  # fmt: skip
    silent, _ = revised(None, {"wrong one": ""})
    assert silent[0].answer is not None
    assert silent[0].answer.text == "wrong one", "to say nothing is no revision"
    lengths = [len(path.ids) for one in gated[:1] for path in one.paths]
    assert (gated[0].generated, gated[0].scored) == (sum(lengths), sum(lengths))
    assert plain[0].scored == 0
    bare = Chat(tiny_tokenizer())
    with pytest.raises(UserError, match="no chat template"):
        Revising(Grower(bare, sampler, frozenset(), Steps(), {}, None, Costs.of(0)), None, [], SamplingConfig(), 0).run(
            []
        )


# --------------------------------------------------------------------------------------------- before anything is drawn


def evaluation(judge: dict[str, Any], **search: Any) -> EvalStage:
    return EvalStage.model_validate(
        {"name": "eval", "models": ["base"], "baseline": "base", "judge": judge, "search": {"some": search}}
    )


@pytest.mark.parametrize("judge", [{"kind": "format", "pattern": ".*"}, {"kind": "random"}], ids=str)
def test_a_form_or_a_coin_does_not_know_the_answers(judge: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="search counts right answers"):
        evaluation(judge, how="majority", n=4)
    assert evaluation({"kind": "verify"}, how="majority", n=4).search


@pytest.mark.parametrize(
    ("search", "wrong"),
    [({"sampling": {"stop": ["yes no"]}}, "stop: 'yes no' is"),
     ({"steps": {"by": "blank_line"}}, "otherwise than .*scores was trained to judge"),
     ({"scorer": {"kind": "python_steps", "ref": f"{HERE}:nowhere"}}, "nowhere")],
    ids=str,
)  # fmt: skip
def test_what_a_search_cannot_have_is_said_before_it(tmp_path: Path, search: dict[str, Any], wrong: str) -> None:
    base, scorer = save_tiny(tmp_path / "base"), untrained_scorer(tmp_path)
    given = {"how": "best_of_n", "n": 2, "scorer": {"kind": "process", "model": scorer}} | search
    context = SimpleNamespace(
        device="cpu",
        reporter=Silent(),
        stage_dir=SimpleNamespace(name="eval"),
        source=lambda name: Source(str(base if name == "base" else name)),
        python=lambda ref: load_python(ref.ref),
    )
    stage = evaluation({"kind": "verify"}, **given)
    with pytest.raises(UserError, match=wrong):
        Searching(stage, context, [], Marks(Judge(), PROMPTS), "fp32").check()  # type: ignore[arg-type]


def test_chat_asks_the_model_that_a_search_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def find_model(run: str, stage: str | None) -> None:
        asked.append(stage)
        raise UserError("enough")

    monkeypatch.setattr("keel.cli.chat.find_model", find_model)
    found = evaluation({"kind": "verify"}, how="majority", n=4, model="policy").search["some"]
    monkeypatch.setattr("keel.cli.chat.find_search", lambda run, name: (None, None, found))
    for stage, search in ((None, "some"), ("sft", "some"), (None, None)):
        with pytest.raises(UserError, match="enough"):
            talk("runs/x", stage, 0.7, 8, search=search)
    assert asked == ["policy", "sft", None]


# -------------------------------------------------------------------------------------------------- through a recipe


def number_of(prompt: Prompt) -> int:
    return int(prompt.messages[-1].content.split()[-1])


def right(prompt: Prompt, text: str) -> float:
    return float(text.split()[-1:] == [str(number_of(prompt) % 2)])


def lines(prompt: Prompt, steps: tuple[str, ...]) -> list[float]:
    """A line is good where it is one of those that were taught; the last one where it is right."""
    return [0.9 if step.strip() in ("one", "two", str(number_of(prompt) % 2)) else 0.2 for step in steps]


@pytest.fixture
def _verify(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last number, until Keel's own reader is there."""
    if importlib.util.find_spec("keel.reward.verify") is None:
        stub = SimpleNamespace(
            read_answer=lambda text, how: (re.findall(r"\d+", text) or [None])[-1], same=lambda a, b: int(a) == int(b)
        )
        monkeypatch.setitem(sys.modules, "keel.reward.verify", stub)  # type: ignore[arg-type]


def untrained_scorer(tmp: Path) -> str:
    """A process reward model that knows nothing."""
    scalar = load_scalar(save_tiny(tmp / "for_scores"), new_head_seed=0)
    scalar.set_process({"steps": {"by": "line"}, "aggregate": "mean", "level": "steps"})
    save(scalar.model, scalar.tokenizer, tmp / "scores")
    return str(tmp / "scores")


def recipe(tmp: Path) -> dict[str, Any]:
    rows = [
        {"messages": [{"role": "user", "content": prompt(n).messages[0].content},
                      {"role": "assistant", "content": f"one\ntwo\n{n % 2}"}]}
        for n in range(40)
    ]  # fmt: skip
    heldout = [{"prompt": prompt(n).messages[0].content, "kind": "even"} for n in range(40, 46)]
    save_tiny(tmp / "base")
    scorer = {"kind": "python_steps", "ref": f"{HERE}:lines"}
    process = {"kind": "process", "model": untrained_scorer(tmp)}
    short = {"max_new_tokens": 14, "batch_size": 32}
    searches = {
        "plain": {"how": "best_of_n", "n": 1, "scorer": scorer},
        "best": {"how": "best_of_n", "n": 4, "scorer": scorer},
        "vote": {"how": "majority", "n": 4},
        "weighed": {"how": "weighted", "n": 2, "scorer": scorer},
        "beam": {"how": "beam", "width": 2, "expand": 2, "scorer": scorer, "aggregate": "mean"},
        "trees": {"how": "dvts", "n": 4, "width": 2, "scorer": scorer, "pick": "weighted"},
        "ahead": {"how": "lookahead", "width": 1, "expand": 2, "depth": 1, "scorer": process},
        "again": {"how": "revise", "scorer": scorer},
    }
    return {
        "model": {"path": str(tmp / "base"), "chat_template": "keel"},
        "data": {
            "demonstrations": write_jsonl(tmp / "demos.jsonl", rows),
            "prompts": write_jsonl(tmp / "prompts.jsonl", heldout),
            "heldout_prompts": write_jsonl(tmp / "heldout.jsonl", heldout),
            "max_length": 200, "max_prompt_length": 100,
        },
        "stages": [
            {"kind": "sft", "name": "sft", "epochs": 10, "batch_size": 8, "optim": {"lr": 1e-2}},
            {"kind": "sample", "name": "found", "per_prompt": 1, "sampling": {**short, "temperature": 0.5},
             "prompts": str(tmp / "prompts.jsonl"), "search": {**searches["beam"], "sampling": short}},
            {"kind": "sample", "name": "one", "per_prompt": 1, "sampling": short,
             "prompts": str(tmp / "prompts.jsonl"), "search": searches["plain"]},
            {"kind": "sample", "name": "drawn", "per_prompt": 1, "sampling": short,
             "prompts": str(tmp / "prompts.jsonl")},
            {"kind": "eval", "name": "eval", "models": ["sft"], "sampling": short, "bootstrap": 100,
             "judge": {"kind": "python", "ref": f"{HERE}:right"}, "search": searches, "pass_rate_samples": 2},
        ],
    }  # fmt: skip


@pytest.mark.usefixtures("_verify")
def test_a_recipe_searches(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(tmp_path)
    assert [
        one for one in check_recipe(Recipe.model_validate(made), RunDir(tmp_path / "no")) if one.level == "error"
    ] == []
    directory = run(made, tmp_path / "run")
    summary = directory.stage("eval").summary()
    found, curve = summary["search"], summary["search_curve"]
    assert list(found) == list(made["stages"][-1]["search"])
    assert [(row["name"], row["n"]) for row in curve if row["name"] in ("best", "vote", "beam")] == [
        ("best", 1), ("best", 2), ("best", 4), ("vote", 1), ("vote", 2), ("vote", 4), ("beam", 4)
    ]  # fmt: skip
    for one in found.values():
        assert one["problems"] == 6
        assert one["generated_tokens"] > 0
        assert one["accuracy"][1] <= one["accuracy"][0] <= one["accuracy"][2]
    assert found["vote"]["scored_tokens"] == 0
    assert found["best"]["pass_at_n"] == found["vote"]["pass_at_n"], "of the same samples"
    assert found["plain"]["accuracy"][0] < found["best"]["accuracy"][0] <= found["best"]["pass_at_n"]
    # Of one sample a search is plain sampling: what the evaluation itself drew and judged.
    assert found["plain"]["accuracy"][0] == pytest.approx(summary["stages"]["sft"]["gold_reward"])
    # The kept responses are the search's, with its rewards, and SFT can learn from them.
    kept = [json.loads(line) for line in (directory.stage("found").path / KEPT).read_text().splitlines()]
    costs = directory.stage("found").summary()["search"]
    assert len(kept) == 6 - costs["unanswered"] > 0
    assert all(0 < row["reward"] <= 0.9 for row in kept)
    assert len(read_demonstrations(directory.stage("found").path / KEPT)) == len(kept)
    with Store(directory.store_url) as store, store.session() as session:
        stored = [one for one in session.responses() if one.fingerprint == directory.stage("found").fingerprint]
    assert {one.sampling["temperature"] for one in stored if one.sampling} == {1.0}, (
        "the search's own, by which it drew"
    )
    one, drawn = (texts(directory, name) for name in ("one", "drawn"))
    assert one == drawn, "of one sample a search is plain sampling"
    shutil.rmtree(directory.stage("eval").path)
    again = run(made, tmp_path / "run").stage("eval").summary()
    assert (again["search"], again["search_curve"]) == (found, curve), "the same seed, the same bits"
    chats(tmp_path / "run", capsys, monkeypatch)


def texts(directory: RunDir, name: str) -> list[str]:
    lines = (directory.stage(name).path / KEPT).read_text().splitlines()
    return [json.loads(line)["messages"][-1]["content"] for line in lines]


def chats(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the terminal: the reply that answers, above it each reply with its steps and their scores."""
    typed = iter([prompt(41).messages[0].content, "/quit"])
    monkeypatch.setattr("rich.console.Console.input", lambda *_: next(typed))
    for place in ("commands", "finished"):  # one thread, as in all tests
        monkeypatch.setattr(f"keel.cli.{place}.set_threads", lambda _: None)
    capsys.readouterr()
    assert main(["chat", str(folder), "--search", "beam", "--max-new-tokens", "14", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^\* \d  0\.\d{3}\n    0\.\d{3}  \w+", said, re.MULTILINE), said
    assert re.search(r"\d finished.*; \d+ tokens generated, \d+ scored\n", said)
    assert main(["chat", str(folder), "--search", "deep"]) == 2
    assert "there are found, one, plain, best" in " ".join(capsys.readouterr().err.split())
    assert main(["chat", str(folder), "--search", "vote", "--temperature", "0"]) == 2
    assert "all 4 samples" in " ".join(capsys.readouterr().err.split())


def test_recipes_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for stage, changed, wrong in [
        (-1, {"judge": None}, "search counts right answers"),
        (-1, {"sampling": {"temperature": 0}}, "all 4 samples"),
        (1, {"per_prompt": 2}, "one response a prompt"),
        (1, {"candidates": 4}, "leave rewards and candidates out"),
    ]:
        made = recipe(tmp_path)
        made["stages"][stage] |= changed
        with pytest.raises(ValueError, match=wrong):
            Recipe.model_validate(made)
