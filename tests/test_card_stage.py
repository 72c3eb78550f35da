"""annotate.card in a run: a good judge labels, a bad one is refused before it does, and force goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import permutations
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from pydantic import ValidationError
from test_stages import run, write_jsonl
from tiny import save_tiny, tiny_llama, tiny_tokenizer

from keel.data.chat import Chat
from keel.endpoint import key
from keel.eval.judge_card import Card, judge_card
from keel.eval.judge_effects import JudgedPair
from keel.recipe.annotate import AnnotateStage
from keel.recipe.constitution import Principle
from keel.run import RunDir
from keel.stages import judge_card as stage
from keel.stages.judge_card import voted_pairs
from keel.store import Response, Store
from keel.store.records import Judgement
from keel.types import Message, Prompt, UserError

HERE = f"{Path(__file__)}"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


CONSTITUTION = """
name: small
principles:
  - id: kind
    text: Be kind.
    critique: Is it unkind?
    revision: Make it kind.
    choose: Which is kinder?
"""


def gold(prompt: Prompt, text: str) -> float:
    return float(crc32(text.encode()))


def good(prompt: Prompt, first: str, second: str, principle: Principle) -> float:
    return 0.9 if gold(prompt, first) > gold(prompt, second) else 0.1


def first_one(prompt: Prompt, first: str, second: str, principle: Principle) -> float:
    return 0.9


def recipe(tmp: Path, judge: str, **card: Any) -> dict[str, Any]:
    base = save_tiny(tmp / "base") or tmp / "base"
    constitution = tmp / "constitution.yaml"
    constitution.write_text(CONSTITUTION)
    prompts = [{"prompt": f"what is {n} to the captain"} for n in range(30)]
    return {
        "model": {"path": str(base)},
        "data": {"prompts": write_jsonl(tmp / "prompts.jsonl", prompts)},
        "stages": [
            {"kind": "sample", "name": "sample", "model": "base", "sampling": {"max_new_tokens": 6}},
            {
                "kind": "annotate",
                "name": "annotate",
                "constitution": str(constitution),
                "judge": {"kind": "python_feedback", "ref": f"{HERE}:{judge}"},
                "card": {"against": {"ref": f"{HERE}:gold"}, "pairs": 25, **card},
            },
        ],
    }


def test_a_good_judge_labels_and_its_card_is_in_the_summary(tmp_path: Path) -> None:
    done = run(recipe(tmp_path, "good", min_agreement=0.9), tmp_path / "run")
    summary = done.stage("annotate").summary()
    card = summary["card"]
    assert card["agreement"][0] == 1.0
    assert card["flips"][0] == 0.0
    assert card["against"] == "gold"
    assert card["broken"] == card["alarms"] == []
    assert "25 pairs have a known truth" in card["untold"]["length"]
    assert summary["judgements"] > 0
    assert json.loads((done.stage("annotate").path / "judge_card.json").read_text()) == card


def test_a_judge_of_order_is_refused_before_it_labels_and_forced_without_being_asked_again(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage annotate: its judge is beyond its bounds: its choice turned .* 100%"):
        run(recipe(tmp_path, "first_one"), tmp_path / "run")
    folder = tmp_path / "run" / "annotate"
    assert json.loads((folder / "judge_card.json").read_text())["alarms"][0]["name"] == "order_flips"
    with Store(f"sqlite:///{tmp_path / 'run' / 'feedback.db'}") as store:
        assert store.judgements() == []
    asked = (folder / "card_answers.jsonl").read_text()
    done = run(recipe(tmp_path, "first_one", force=True), tmp_path / "run")
    assert done.stage("annotate").summary()["card"]["broken"]
    assert (folder / "card_answers.jsonl").read_text() == asked
    with Store(f"sqlite:///{tmp_path / 'run' / 'feedback.db'}") as store:
        votes = [vote.token for vote in store.judgements()]
    with pytest.raises(UserError, match="beyond its bounds"):  # what was forced is not so for ever
        run(recipe(tmp_path, "first_one"), tmp_path / "run")
    done = run(recipe(tmp_path, "first_one", max_flips=1.0, max_effect=1.0), tmp_path / "run")
    assert done.stage("annotate").summary()["card"]["broken"] == []
    with Store(f"sqlite:///{tmp_path / 'run' / 'feedback.db'}") as store:
        assert [vote.token for vote in store.judgements()] == votes
    assert (folder / "card_answers.jsonl").read_text() == asked


def test_a_language_model_is_looked_at_for_its_own_and_for_likely_replies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All replies are by the judge's own model; how likely each is to it, its transformers forward says."""
    seen: list[JudgedPair] = []

    def looked_at(pairs: Sequence[JudgedPair], *rest: Any, **named: Any) -> Card:
        seen.extend(pairs)
        return judge_card(pairs, *rest, **named)

    monkeypatch.setattr(stage, "judge_card", looked_at)
    tree = recipe(tmp_path, "good")
    base = tiny_llama()
    base.get_input_embeddings().weight.data *= 6  # else all tokens are about as likely
    base.save_pretrained(tmp_path / "base")
    sample, annotate = tree["stages"]
    tree["stages"] = [sample | {"per_prompt": 2}, annotate | {"judge": {"kind": "language_model", "model": "base"}}]
    tree["stages"][-1]["card"] |= {"force": True}
    done = run(tree, tmp_path / "run")
    card = done.stage("annotate").summary()["card"]
    lines = (done.path / "annotate" / "card_answers.jsonl").read_text().splitlines()
    said = {row["key"]: row["said"] for row in map(json.loads, filter(None, lines))}
    assert card["pairs"] == len(said) == len(seen) > 10
    assert {one.own for one in seen} == {(True, True)}
    chat = Chat(tiny_tokenizer())
    with Store(done.store_url) as store:
        replies = {(one.prompt_id, one.text): one for one in store.responses()}
        prompts = {one.id: one for one in store.prompts()}
    found = []
    for (a, left), (b, right) in permutations(replies, 2):
        if a != b or (place := key(a, left, right)) not in said:
            continue
        assert tuple(said[place]["logprob"]) in [one.logprob for one in seen]
        for text, told in zip((left, right), said[place]["logprob"], strict=True):
            found.append(told)
            assert told == pytest.approx(mean_logprob(base, chat, prompts[a], replies[a, text]), abs=0.05)
    assert len(found) == 2 * len(said)
    assert max(found) - min(found) > 0.5


def mean_logprob(model: Any, chat: Chat, asked: Prompt, reply: Response) -> float:
    (row,) = chat.encode_replies([(asked.messages, reply.text, reply.finished)], ["here"])
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return float(logps[-row.predicted :].mean())


def test_an_evaluations_judge_has_a_card(tmp_path: Path) -> None:
    """It scores by length, and who knows better by the text's checksum: on whole pairs of the two models' replies."""
    tree = recipe(tmp_path, "good")
    save_tiny(tmp_path / "other", seed=1)
    gold_card = {"against": {"ref": f"{HERE}:gold"}, "pairs": 20, "min_agreement": 1.0}
    tree["stages"] = [
        {
            "kind": "eval", "name": "eval", "models": ["base", str(tmp_path / "other")], "baseline": "base",
            "judge": {"kind": "python", "ref": f"{HERE}:longer"}, "prompts": tree["data"]["prompts"],
            "sampling": {"max_new_tokens": 6}, "card": gold_card,
        }
    ]  # fmt: skip
    with pytest.raises(UserError, match="stage eval: its judge is beyond its bounds: it agrees with the gold score on"):
        run(tree, tmp_path / "run")
    card = RunDir(tmp_path / "run").summary()["judge_card"]  # what was measured is kept
    assert (card["pairs"], card["known"], card["flips"], card["ece"]) == (20, 20, None, None)
    assert json.loads((tmp_path / "run" / "eval" / "judge_card.json").read_text()) == card


def longer(prompt: Prompt, text: str) -> float:
    return float(len(text))


def test_against_people_needs_their_votes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"card\.against is people, and they judged no pair in the store"):
        run(recipe(tmp_path, "good", against="people"), tmp_path / "run")


def test_force_changes_no_fingerprint_and_a_card_is_a_judges() -> None:
    judge = {"kind": "endpoint", "url": "http://localhost:1", "model": "m"}
    stages = [AnnotateStage.model_validate({"name": "a", "judge": judge, "card": {"force": f}}) for f in (False, True)]
    assert stages[0].settings() == stages[1].settings()
    assert "card" not in AnnotateStage.model_validate({"name": "a", "judge": judge}).settings()
    with pytest.raises(ValidationError, match="card is a judge's, and annotators are simulated"):
        AnnotateStage.model_validate({"name": "a", "annotators": {"ref": "a:b"}, "card": {}})


def test_peoples_votes_on_a_pair_stand_together_whichever_side_each_saw() -> None:
    said = Prompt("p", (Message("user", "hello"),))
    one, other = response(1, "yes"), response(2, "no")
    votes = [
        vote(said, one, other, "left"),
        vote(said, other, one, "right"),
        vote(said, other, one, "tie"),
        vote(said, one, other, "right"),
        replace(vote(said, one, other, "left"), gold="left"),
        replace(vote(said, one, other, "left"), annotator_kind="simulated"),
    ]
    (pair,) = voted_pairs(votes, 10, 0)
    assert (pair.left.text, pair.right.text) == ("no", "yes")
    assert pair.votes == (0.0, 0.0, 0.5, 1.0)


def response(number: int, text: str) -> Response:
    return Response(number, "p", text, True, "m", "f", None, NOW)


def vote(said: Prompt, left: Response, right: Response, choice: Any) -> Judgement:
    return Judgement("t", "", 1, "ann", "person", said, left, right, choice, None, None, None, None, NOW)
