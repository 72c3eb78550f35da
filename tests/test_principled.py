"""Pairs judged by principles: the probability from both orders, what is kept of it, and what it leads back to."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from loopback import Reply, Server, chat_reply
from sqlalchemy import select
from test_stages import run, write_jsonl
from tiny import Counting, prompt, save_tiny

from keel.cli import main
from keel.endpoint import Endpoint
from keel.feedback.judging import judge_responses
from keel.feedback.pairing import PairChoice
from keel.feedback.principled import Asked, EndpointFeedback, PrincipledComparer, PythonFeedback, Said
from keel.recipe.annotate import AnnotateStage
from keel.recipe.constitution import Constitution
from keel.recipe.judges import EndpointRef
from keel.recipe.recipe import Recipe
from keel.recipe.sections import SamplingConfig
from keel.stats import sigmoid
from keel.store import Store, ai_labels
from keel.store.engine import exists
from keel.store.erase import erase_response
from keel.store.tables import items
from keel.types import Completion, Prompt, UserError
from keel.web.service.start import FIRST_BATCH, prepare

WORDS = {"text": "t", "critique": "c", "revision": "r"}
CONSTITUTION = Constitution.model_validate(
    {
        "name": "tiny",
        "principles": [{"id": one, "choose": f"Which is {one}?", **WORDS} for one in ("kind", "brief", "true")],
    }
)


class Table:
    """Answers from a table by (principle, first text); None where it has nothing."""

    def __init__(self, table: dict[tuple[str, str], float]) -> None:
        self.table, self.asked = table, list[Asked]()

    def prefer(self, asked: Sequence[Asked]) -> list[Said | None]:
        self.asked += asked
        found = [self.table.get((one.principle.id, one.first)) for one in asked]
        said = zip(asked, found, strict=True)
        return [None if p is None else Said(p, one.question(), f"{one.first} is fine") for one, p in said]


def comparer(feedback: Any, per_pair: int = 1, bounds: tuple[float, float] = (0.0, 1.0)) -> PrincipledComparer:
    return PrincipledComparer(feedback, CONSTITUTION, CONSTITUTION.principles, per_pair, bounds, seed=0)


def compared(feedback: Any, **settings: Any) -> Any:
    (opinion,) = comparer(feedback, **settings).compare([prompt(0)], [Completion("left")], [Completion("right")])
    return opinion


TABLE = {
    ("kind", "left"): 0.9, ("kind", "right"): 0.4, ("brief", "left"): 0.7, ("brief", "right"): 0.7,
    ("true", "left"): 1.0, ("true", "right"): 0.0,
}  # fmt: skip


def test_the_probability_is_the_mean_over_principles_and_orders() -> None:
    """Left first: .9, .7, 1; left second: 1 - .4, 1 - .7, 1 - 0."""
    opinion = compared(Table(TABLE), per_pair=3)
    assert opinion.orders == pytest.approx(((0.9 + 0.7 + 1) / 3, (0.6 + 0.3 + 1) / 3))
    assert opinion.probability == pytest.approx((0.9 + 0.7 + 1 + 0.6 + 0.3 + 1) / 6)
    assert opinion.choice == "left"
    by_id = {label.principle: (label.left_first, label.left_second) for label in opinion.labels}
    assert by_id["kind"] == pytest.approx((0.9, 0.6))
    assert by_id["brief"] == pytest.approx((0.7, 0.3))
    assert opinion.labels[0].asked.startswith(f"Which is {opinion.labels[0].principle}?\n\n{{")


def test_a_principle_without_an_answer_in_one_order_is_left_out() -> None:
    table = {**TABLE, ("kind", "right"): None}
    opinion = compared(Table(table), per_pair=3)  # type: ignore[arg-type]
    assert {label.principle for label in opinion.labels} == {"brief", "true"}
    assert opinion.probability == pytest.approx((0.7 + 1 + 0.3 + 1) / 4)
    assert compared(Table({}), per_pair=3) is None


def test_bounds_hold_the_probability_and_leave_the_labels_alone() -> None:
    opinion = compared(Table(TABLE), per_pair=3, bounds=(0.4, 0.6))
    assert opinion.probability == 0.6
    assert max(label.left_first for label in opinion.labels) == 1.0


def test_the_principle_of_a_pair_is_the_same_whichever_reply_is_left() -> None:
    drawn = []
    for left, right in (("x", "y"), ("y", "x")):
        table = Table({(p.id, t): 0.5 for p in CONSTITUTION.principles for t in "xy"})
        comparer(table).compare([prompt(n) for n in range(30)], [Completion(left)] * 30, [Completion(right)] * 30)
        drawn.append([one.principle.id for one in table.asked[::2]])
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {"kind", "brief", "true"}


def test_both_orders_take_an_order_bias_out() -> None:
    """The judge knows the better reply with P = sigmoid(1), and leans to the first by one in logits. In one order it
    says .88 or .50; of both the mean is .69, whichever side: what is left of the bias is nothing, for a bias of one
    logit on a lead of one."""

    def biased(asked: Prompt, first: str, second: str, principle: object) -> float:
        return sigmoid((1.0 if first == "left" else -1.0) + 1.0)

    straight = compared(PythonFeedback(biased, "f"))  # type: ignore[arg-type]
    turned = comparer(PythonFeedback(biased, "f")).compare(  # type: ignore[arg-type]
        [prompt(0)], [Completion("right")], [Completion("left")]
    )[0]
    assert turned is not None
    one_order = abs(straight.orders[0] - (1 - turned.orders[0]))  # the same pair, shown both ways round
    both = abs(straight.probability - (1 - turned.probability))
    assert one_order == pytest.approx(sigmoid(2.0) - 0.5)
    assert both == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("said", [1.2, -0.1, math.nan, None, "A"])
def test_a_function_that_returns_no_probability_is_named(said: object) -> None:
    feedback = PythonFeedback(lambda *_: said, "mine:feedback")  # type: ignore[arg-type,return-value]
    with pytest.raises(UserError, match=r"mine:feedback returned .* for the comparison of replies to prompt"):
        compared(feedback)


# ----------------------------------------------------------------------------------------------------------- endpoints


def endpoint(server: Server, votes: int = 1, thought: SamplingConfig | None = None) -> EndpointFeedback:
    ref = EndpointRef(url=server.url, model="m", key_env="TEST_JUDGE_KEY")
    quick = Endpoint(ref, "judge", "comparisons have no answer", timeout=60, retries=2, backoff=0.01)
    return EndpointFeedback(ref, "a.judge.url", Counting(), thought, votes, quick)


def test_an_endpoint_without_log_probabilities_is_asked_often(serve: Callable[..., Server]) -> None:
    """It says A three times of four where left is first, and once of four where it is second: .75 both ways."""
    seen: dict[str, int] = {}

    def answer(body: dict[str, Any], _: int) -> Reply:
        assert body["temperature"] == 1
        first = json.loads(body["messages"][-1]["content"].partition("\n\n")[2])["A"]
        seen[first] = seen.get(first, 0) + 1
        often = {"left": (1, 2, 3), "right": (1,)}[first]
        return chat_reply("A" if seen[first] in often else "B")

    opinion = compared(endpoint(serve(answer), votes=4))
    assert opinion.orders == (0.75, 0.75)
    assert seen == {"left": 4, "right": 4}


def test_an_endpoint_that_is_busy_talks_nonsense_and_thinks(serve: Callable[..., Server]) -> None:
    calls = []

    def answer(body: dict[str, Any], n: int) -> Reply:
        calls.append(n)
        if len(calls) == 1:
            return (429, {"Retry-After": "0"}, "busy")
        if len(calls) == 2:
            return (500, {}, "oh")
        pair = json.loads(body["messages"][-1]["content"].partition("\n\n")[2])
        return chat_reply(f"It is short.\n{'A' if pair['A'] == 'left' else 'B'}")

    opinion = compared(endpoint(serve(answer), thought=SamplingConfig(max_new_tokens=50)))
    assert (opinion.probability, opinion.reason) == (1.0, "It is short.")
    assert opinion.labels[0].thought == "It is short."
    with pytest.raises(UserError, match="instead of A or B"):
        compared(endpoint(serve(lambda *_: chat_reply("Bananas."))))


def test_reasons_are_sampled_as_the_recipe_says(serve: Callable[..., Server]) -> None:
    server = serve(lambda *_: chat_reply("A"))
    sampling = SamplingConfig(temperature=0.7, top_p=0.9, top_k=20, min_p=0.05, max_new_tokens=77)
    compared(endpoint(server, votes=2, thought=sampling))
    wanted = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "max_tokens": 77}
    assert len(server.requests) == 4
    for body in server.requests:
        assert {name: body[name] for name in wanted} == wanted
    server = serve(lambda body, _: (400, {}, "no temperature here") if "temperature" in body else chat_reply("A"))
    compared(endpoint(server, thought=SamplingConfig()))  # which is what such a server has by itself
    with pytest.raises(UserError, match="no temperature here"):
        compared(endpoint(server, thought=sampling))


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"judge": {"kind": "python", "ref": "m:f"}, "constitution": "harbor"}, "a judge that compares two replies"),
        ({"judge": {"kind": "python", "ref": "m:f"}, "tags": ["red"]}, "tags goes with a constitution"),
        ({"judge": {"kind": "python_feedback", "ref": "m:f"}}, "asked under a principle"),
        ({"votes_asked": 3, "constitution": "harbor"}, "votes_asked is of an endpoint"),
        ({"thought": {}, "constitution": "harbor"}, "leave thought out"),
        (
            {
                "judge": {"kind": "endpoint", "url": "http://h/v1", "model": "m"},
                "thought": {"stop": ["."]},
                "constitution": "harbor",
            },
            "would end an endpoint's answer before its letter",
        ),
        ({"clamp": [0.6, 0.9], "constitution": "harbor"}, "one below and one above a half"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AnnotateStage.model_validate({"name": "a", "judge": {"kind": "python_feedback", "ref": "m:f"}, **settings})


def test_reasons_hold_probabilities_near_a_half() -> None:
    judge = {"kind": "language_model", "model": "base"}
    stage = AnnotateStage.model_validate({"name": "a", "judge": judge, "constitution": "harbor", "thought": {}})
    assert stage.bounds == (0.4, 0.6)


FEEDBACK = """
def longer(prompt, first, second, principle):
    return 0.9 if len(first) > len(second) else 0.2 if len(first) < len(second) else 0.5

def worth(prompt, text):
    return float(len(text))
"""
CONSTITUTION_FILE = """name: tiny
principles:
  - {id: kind, text: t, critique: c, revision: r, choose: "Which is kind?"}
  - {id: brief, text: t, critique: c, revision: r, choose: "Which is brief?"}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    save_tiny(tmp_path / "base")
    write_jsonl(tmp_path / "p.jsonl", [{"id": f"p{n}", "prompt": f"say {n}", "kind": "harmful"} for n in range(8)])
    (tmp_path / "c.yaml").write_text(CONSTITUTION_FILE, encoding="utf-8")
    (tmp_path / "f.py").write_text(FEEDBACK, encoding="utf-8")
    sampling = {"max_new_tokens": 8}
    judge = {"kind": "python_feedback", "ref": f"{tmp_path / 'f.py'}:longer"}
    return {
        "model": {"path": str(tmp_path / "base")},
        "data": {"prompts": str(tmp_path / "p.jsonl")},
        "stages": [
            {"kind": "sample", "name": "sample", "model": "base", "per_prompt": 3, "sampling": sampling},
            {
                "kind": "annotate", "name": "ai", "responses": "sample", "judge": judge, "pairs_per_prompt": 2,
                "constitution": str(tmp_path / "c.yaml"),
            },
            {"kind": "reward", "name": "reward", "model": "base", "preferences": "ai", "epochs": 1, "batch_size": 4},
        ],
    }  # fmt: skip


def test_votes_lead_back_to_principles(
    tmp_path: Path, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(recipe, tmp_path / "run")
    location = folder.store_url
    assert exists(location)
    with Store(location) as store, store.transaction(writes=False) as connection:
        votes = store.judgements()
        labels = ai_labels.of(connection, [vote.token for vote in votes])
        traced = ai_labels.trace(connection, [vote.token for vote in votes])
    assert len(labels) == len(votes) > 0
    for vote in votes:
        (label,) = labels[vote.token]
        left, right = (len(text) for text in (vote.left.text, vote.right.text))
        first = 0.9 if left > right else 0.2 if left < right else 0.5
        second = 1 - (0.9 if right > left else 0.2 if right < left else 0.5)
        assert (label.left_first, label.left_second) == pytest.approx((first, second))
    assert sum(row.votes for row in traced) == len(votes)
    assert {(row.annotator_kind, row.prompt_kind) for row in traced} == {("model", "harmful")}
    assert main(["lineage", str(folder.path)]) == 0
    told = capsys.readouterr().out
    assert "under tiny/kind (version " in told
    assert "on prompts of kind harmful: 0 votes of people, 0 votes of simulated" in told


def test_no_answer_of_an_endpoint_is_asked_for_twice_after_the_run_was_stopped(
    tmp_path: Path, recipe: dict[str, Any], serve: Callable[..., Server]
) -> None:
    """The server refuses the key after some answers, in either stage: what it had answered stands."""
    answered: list[str] = []
    until = [3]

    def answer(body: dict[str, Any], _: int) -> Reply:
        if len(answered) >= until[0]:
            return (401, {}, "no more money")
        answered.append(json.dumps(body["messages"]))
        return chat_reply("A" if len(answered) % 3 else "B")

    sample, ai, _ = recipe["stages"]
    judge = {"kind": "endpoint", "url": serve(answer).url, "model": "m", "key_env": "TEST_JUDGE_KEY"}
    plain = {"kind": "annotate", "name": "plain", "responses": "sample", "judge": judge}
    recipe["stages"] = [
        sample,
        {**ai, "judge": judge, "card": {"against": {"ref": f"{tmp_path / 'f.py'}:worth"}}},
        plain,
    ]
    recipe["stages"][1]["card"] |= {"pairs": 3, "force": True}
    for more in (3, 9, 30, 3, 1000):
        until[0] = len(answered) + more
        try:
            folder = run(recipe, tmp_path / "run")
        except UserError as error:
            assert "no more money" in str(error)  # noqa: PT017
        for thread in threading.enumerate():  # what was under way is kept, too
            if thread.name.startswith("ThreadPoolExecutor"):
                thread.join()
    assert len(answered) == len(set(answered))
    with Store(folder.store_url) as store:
        votes = store.judgements()
    assert 2 * len(votes) == len(answered)  # both orders; those of the card are the stage's own pairs
    assert not (folder.path / "ai" / "state").exists()


def test_hard_labels_have_no_probability_and_erasing_a_reply_erases_what_was_asked(tmp_path: Path) -> None:
    table = Table({(p.id, text): p_ for p in CONSTITUTION.principles for text, p_ in (("one", 0.8), ("two", 0.3))})
    with Store(tmp_path / "a.db") as store:
        with store.session() as s:
            s.add_prompts([prompt(n) for n in range(4)])
            for n in range(4):
                s.add_responses(prompt(n).id, [Completion("one"), Completion("two")], "m", None, "made")
        for hard in (False, True):
            judge_responses(
                store, comparer(table), f"judge {hard}", "made", f"q/{hard}", PairChoice(1), "1", 0, Counting(),
                tmp_path, hard,
            )  # fmt: skip
        soft, flat = store.judgements("q/False"), store.judgements("q/True")
        assert [vote.probability for vote in soft] == pytest.approx([0.75] * 4)  # the mean of .8 and 1 - .3
        assert [vote.probability for vote in flat] == [None] * 4
        with store.transaction(writes=True) as connection:
            erase_response(connection, store.responses()[0].id, 1, "judge False", store.now)
        with store.transaction(writes=False) as connection:
            labels = ai_labels.of(connection, [vote.token for vote in (*soft, *flat)])
        found = [label for some in labels.values() for label in some]
        assert len(found) == 8
        for column in ("asked", "thought", "asked_second", "thought_second"):
            texts = [getattr(label, column) for label in found]
            held = [any(reply in text for reply in ("one", "two")) for text in texts]
            assert sum(held) == 6, column  # of the prompt whose reply is gone no text is left
        for label in found:
            if "one" in label.asked:
                first, second = (
                    json.loads(text[text.index("{") :]) for text in (label.asked, label.asked_second or "")
                )
                assert (first["A"], first["B"]) == (second["B"], second["A"])
                assert (label.thought, label.thought_second) == (f"{first['A']} is fine", f"{second['A']} is fine")


def test_a_preference_model_learns_from_people_and_from_principles(tmp_path: Path, recipe: dict[str, Any]) -> None:
    """Simulated people judge some responses, a function under principles others: each keeps its kind."""
    simulated = "from keel.feedback.simulated import SimulatedAnnotator\ndef make(seed):\n"
    simulated += "    return [SimulatedAnnotator(n, lambda p, t: len(t), temperature=1.0) for n in 'ab']\n"
    (tmp_path / "s.py").write_text(simulated, encoding="utf-8")
    write_jsonl(tmp_path / "q.jsonl", [{"id": f"q{n}", "prompt": f"tell {n}", "kind": "howto"} for n in range(8)])
    sample, ai, reward = recipe["stages"]
    helpful = {**sample, "name": "helpful", "prompts": str(tmp_path / "q.jsonl")}
    people = {
        "kind": "annotate", "name": "crowd", "responses": "helpful", "annotators": {"ref": f"{tmp_path / 's.py'}:make"}
    }  # fmt: skip
    recipe["stages"] = [sample, helpful, ai, people, {**reward, "preferences": ["crowd", "ai"]}]
    folder = run(recipe, tmp_path / "run")
    tokens = json.loads((folder.path / "reward" / "judgements.json").read_text())["trained"]
    with Store(folder.store_url) as store, store.transaction(writes=False) as connection:
        found = {
            (row.annotator_kind, row.prompt_kind, bool(row.principle)) for row in ai_labels.trace(connection, tokens)
        }
    assert found == {("model", "harmful", True), ("simulated", "howto", False)}
    recipe["stages"][-1]["voters"] = "simulated"
    with pytest.raises(ValueError, match="voters: simulated leaves out the votes of ai"):
        Recipe.model_validate(recipe)


def test_people_are_not_asked_about_what_a_model_judges_by_principles(tmp_path: Path, recipe: dict[str, Any]) -> None:
    write_jsonl(tmp_path / "q.jsonl", [{"id": f"q{n}", "prompt": f"tell {n}", "kind": "howto"} for n in range(8)])
    sample, ai, _ = recipe["stages"]
    recipe["stages"] = [sample, {**sample, "name": "helpful", "prompts": str(tmp_path / "q.jsonl")}, ai]
    folder = run(recipe, tmp_path / "run")
    with Store(folder.store_url) as store:
        prepare(store)
        with store.transaction(writes=False) as connection:
            asked = connection.execute(select(items.c.prompt_id).where(items.c.batch == FIRST_BATCH)).scalars().all()
    assert {prompt_id[0] for prompt_id in asked} == {"q"}
