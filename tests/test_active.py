"""Active choice: how much an ensemble disagrees, which pairs that chooses, and the annotate stage that does it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
import pytest
import torch
from test_stages import loop_recipe, run
from transformers import AutoModelForSequenceClassification

from keel.data.chat import Chat
from keel.feedback.pairing import PairChoice, make_comparisons
from keel.feedback.uncertainty import bald, best_first
from keel.model.checkpoint import load_tokenizer
from keel.pipeline.run import plan
from keel.recipe.recipe import Recipe
from keel.store import Response, Store
from keel.types import UserError


def entropy(p: float) -> float:
    return -sum(x * math.log(x) for x in (p, 1 - p) if x > 0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def information(leads: Sequence[float]) -> float:
    """The mutual information of a vote and a member drawn at random, from the joint distribution."""
    joint = [(p / len(leads), (1 - p) / len(leads)) for p in map(sigmoid, leads)]
    vote = [sum(cells) for cells in zip(*joint, strict=True)]
    return sum(c * math.log(c * len(leads) / vote[k]) for cells in joint for k, c in enumerate(cells) if c > 0)


def test_bald_by_hand() -> None:
    nine = math.log(9)  # the logit of 0.9
    gains = bald(np.array([[nine, nine, 0.0, 1000.0, 1000.0], [-nine, nine, 0.0, -1000.0, 1000.0]]))
    assert gains == pytest.approx([math.log(2) - entropy(0.9), 0.0, 0.0, math.log(2), 0.0], abs=1e-12)


def test_bald_is_the_information_that_a_vote_has_about_the_model() -> None:
    leads_MN = np.random.default_rng(0).normal(scale=3, size=(5, 40))
    expected = [information(column.tolist()) for column in leads_MN.T]
    assert bald(leads_MN) == pytest.approx(expected, rel=1e-9)
    assert bald(-leads_MN) == pytest.approx(expected, rel=1e-9)  # which of the two is first means nothing


def test_people_who_differ_are_no_reason_to_ask() -> None:
    """That all members call it a toss-up teaches nothing; that one is sure and one is not does."""
    toss_up, torn = bald(np.array([[0.1, 4.0], [-0.1, 0.0]]))
    assert toss_up < 0.01 < torn


def test_best_first_by_hand() -> None:
    gains, groups = [0.1, 0.9, 0.8, 0.9, 0.2], ["a", "b", "b", "c", "a"]
    assert best_first(gains, groups, per_group=1, count=None) == [1, 3, 4]
    assert best_first(gains, groups, per_group=2, count=3) == [1, 3, 2]
    assert best_first([], [], 1, 5) == []


def response(id: int, prompt: str) -> Response:
    return Response(id, prompt, f"text {id}", True, "m", "f", None, datetime.now(UTC))


def test_pairs_of_the_greatest_gain_that_were_not_asked_yet() -> None:
    responses = [response(i, "p" if i < 4 else "q") for i in range(7)]  # p: 0 1 2 3, q: 4 5 6

    def gains(pairs: Sequence[tuple[Response, Response]]) -> list[float]:
        return [float(10 * a.id + b.id) for a, b in pairs]

    def chosen(**more: Any) -> set[tuple[int, int]]:
        once, twice = make_comparisons(responses, PairChoice(gains=gains, **more), overlap=0.5, seed=0)
        assert abs(len(once) - len(twice)) <= 1
        return {*once, *twice}

    assert chosen(per_prompt=1) == {(2, 3), (5, 6)}
    assert chosen(per_prompt=2, count=3) == {(5, 6), (4, 6), (2, 3)}
    assert chosen(per_prompt=1, asked=frozenset({frozenset((6, 5))})) == {(2, 3), (4, 6)}
    drawn = make_comparisons(responses, PairChoice(per_prompt=6, count=4), 0.0, seed=0)[0]
    assert len(drawn) == len(set(drawn)) == 4
    every = frozenset(frozenset(pair) for ids in (range(4), range(4, 7)) for pair in combinations(ids, 2))
    with pytest.raises(UserError, match="not compared yet"):
        make_comparisons(responses, PairChoice(1, asked=every), 0.0, 0)


# ------------------------------------------------------------------------------------------------- in a recipe


def active_recipe(tmp: Path) -> dict[str, Any]:
    """Labels at random, an ensemble of two, the pairs they differ on, and a reward model of all votes."""
    recipe = loop_recipe(tmp, None)
    stages = {stage["name"]: stage for stage in recipe["stages"]}
    reward = {"kind": "reward", "preferences": "annotate", "heldout_fraction": 0.3, "optim": {"lr": 1e-2}}
    recipe["stages"] = [
        stages["sft"],
        stages["sample"],
        stages["annotate"] | {"pairs": 20, "pairs_per_prompt": 1},
        reward | {"name": "one", "seed": 1},
        reward | {"name": "two", "seed": 2},
        stages["annotate"]
        | {"name": "more", "choice": "uncertain", "rewards": ["one", "two"], "pairs": 8, "pairs_per_prompt": 1},
        reward | {"name": "reward", "preferences": ["annotate", "more"]},
    ]
    return recipe


def test_an_annotate_stage_asks_what_the_reward_models_differ_on(tmp_path: Path) -> None:
    recipe = active_recipe(tmp_path)
    done = run(recipe, tmp_path / "run")
    with Store(done.store_url) as store:
        asked = {(j.left.id, j.right.id) for j in store.judgements(done.stage("annotate").fingerprint)}
        chosen = {tuple(sorted((j.left.id, j.right.id))) for j in store.judgements(done.stage("more").fingerprint)}
        prompts = {prompt.id: prompt for prompt in store.prompts()}
        responses = store.responses()
        votes = len(store.judgements())
    assert len(chosen) == 8
    summary = done.stage("reward").summary()
    assert summary["pairs"] + summary["heldout_pairs"] == votes == summary["simulated_votes"]

    # the same by transformers' own forward pass, one reply at a time, and the joint distribution
    temperature = geometric_mean([done.stage(name).summary()["temperature"] for name in ("one", "two")])
    scores: list[dict[int, float]] = []
    for name in ("one", "two"):
        model = AutoModelForSequenceClassification.from_pretrained(done.stage(name).path).eval()
        chat = Chat(load_tokenizer(str(done.stage(name).path)))
        scores.append({})
        for r in responses:
            ids = chat.encode_reply(prompts[r.prompt_id].messages, r.text, r.finished).ids
            with torch.no_grad():
                scores[-1][r.id] = float(model(torch.tensor([ids])).logits[0, 0]) / temperature
    left = [
        (a, b)
        for a, b in combinations(responses, 2)
        if a.prompt_id == b.prompt_id and not {(a.id, b.id), (b.id, a.id)} & asked
    ]
    gain = {(a.id, b.id): information([own[a.id] - own[b.id] for own in scores]) for a, b in left}
    best: dict[str, float] = {}
    for a, b in left:
        best[a.prompt_id] = max(best.get(a.prompt_id, 0.0), gain[a.id, b.id])
    expected = sorted(best.values(), reverse=True)[:8]
    assert sorted((gain[pair] for pair in chosen), reverse=True) == pytest.approx(expected, rel=1e-3)
    assert expected[0] > 1.5 * sorted(gain.values())[len(gain) // 2]  # the ensemble does differ
    assert {step.state for step in plan(Recipe.model_validate(recipe), done)} == {"done"}


def test_members_with_other_seeds_hold_out_the_same_prompts(tmp_path: Path) -> None:
    recipe = active_recipe(tmp_path)
    recipe["stages"] = recipe["stages"][:5]
    done = run(recipe, tmp_path / "run")
    one, two = (done.stage(name).summary() for name in ("one", "two"))
    assert one["heldout_pairs"] == two["heldout_pairs"]
    assert one["ceiling"] == two["ceiling"]
    assert one["mean"] != two["mean"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choice": "uncertain", "rewards": ["one", "one"]}, "name two reward stages or more"),
        ({"rewards": ["one", "two"]}, "with choice: uncertain"),
    ],
)
def test_a_choice_that_cannot_be_made_fails_at_once(settings: dict[str, Any], message: str) -> None:
    annotate = {"kind": "annotate", "name": "annotate", "annotators": {"ref": "a.py:b"}, **settings}
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate({"model": {"path": "m"}, "stages": [annotate]})


def test_only_earlier_reward_stages_can_choose(tmp_path: Path) -> None:
    recipe = active_recipe(tmp_path)
    recipe["stages"][2] |= {"choice": "uncertain", "rewards": ["one", "two"]}
    with pytest.raises(UserError, match=r"annotate\.rewards\.0: stage 'one' comes after"):
        run(recipe, tmp_path / "run")
