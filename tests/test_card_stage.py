"""annotate.card in a run: a good judge labels, a bad one is refused before it does, and force goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from pydantic import ValidationError
from test_stages import run, write_jsonl
from tiny import save_tiny

from keel.recipe.annotate import AnnotateStage
from keel.recipe.constitution import Principle
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
