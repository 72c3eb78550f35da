"""Closing the loop: people's judgements in the store make the stages that learn from them stale, and are trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from labelling_world import person
from test_pipeline import World
from test_stages import loop_recipe, run, write_jsonl

from keel.feedback.stored import training_demonstrations, training_votes
from keel.pipeline.run import plan
from keel.recipe.declared import VOTERS
from keel.recipe.recipe import Recipe
from keel.run import RunDir, read_json
from keel.store import Store, review
from keel.store.people import Account
from keel.store.records import NewVote, NewWriting
from keel.store.trained_on import VoteHashes, vote_hashes
from keel.types import Completion, Message, Preference, Prompt, UserError
from keel.web.service.labelling import Labelling
from keel.web.service.manage import Manage

AGAIN = ["reward", "dpo", "ppo", "eval", "report"]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def store_of(run: RunDir) -> Store:
    run.path.mkdir(exist_ok=True)
    return Store(run.store_url)


def judge(store: Store, n: int, name: str = "ann", kind: Any = "person", batch: str = "people") -> int:
    """One vote, for the left response, on the pair of prompt ``n``."""
    with store.session() as s:
        s.add_prompts([Prompt(f"p{n}", (Message("user", f"question {n}"),))])
        first, second = s.add_responses(f"p{n}", [Completion(f"this {n}"), Completion(f"that {n}")], "m")
        s.add_comparisons([(first, second)], overlap=5, batch=batch)
        assignment = s.next_assignment(s.add_annotator(name, kind), batch)
        assert assignment is not None
        return s.submit(assignment.id, NewVote("left", token=f"{name}-{batch}-{n}", strength=2))


def write(store: Store, *texts: str) -> Account:
    """Replies to prompts that ask for one, in their order; returns who wrote them."""
    store.add_guideline("g1", "Write well.")
    with store.session() as s:
        s.add_prompts([Prompt(f"w{n}", (Message("user", f"question {n}"),)) for n in range(len(texts))])
    labelling, ann = Labelling(store), person(store, "ann")
    assert Manage(store).ask_for_writing(len(texts), 1, "admin") == len(texts)
    for n, text in enumerate(texts):
        screen = labelling.next(ann, "write")
        assert screen is not None
        labelling.write(ann, screen.id, NewWriting(text, token=f"written-{n:04d}", seconds=4.0))
    return ann


def states(world: World, recipe: Recipe | None = None) -> dict[str, str]:
    return {step.stage.name: step.state for step in plan(recipe or world.recipe(), world.run)}


# ------------------------------------------------------------------------------------- what is stale, with fake runners


def test_a_judgement_by_a_person_redoes_what_learns_from_it(world: World) -> None:
    world.go()
    assert not (world.run.path / "feedback.db").exists()  # looking makes no store
    with store_of(world.run) as store:
        assert set(states(world).values()) == {"done"}  # an empty store changes nothing
        judgement = judge(store, 1)
        reasons = {step.stage.name: step.reason for step in plan(world.recipe(), world.run)}
        assert (
            reasons["reward"]
            == reasons["dpo"]
            == "people judged or wrote more, settled something, or took something back"
        )
        assert reasons["annotate"] == "up to date"
        assert world.go() == AGAIN
        assert world.go() == []
        store.undo(judgement)
        assert world.go() == AGAIN


def test_what_people_write_redoes_the_sft_that_learns_from_it(world: World) -> None:
    """And only that: by default what is written changes no run, since all of one rests on its SFT model."""
    named = {"sft": {"demonstrations": [str(world.recipe().data.demonstrations), "people"]}}
    assert "sft" in world.go(world.recipe(named))
    with store_of(world.run) as store:
        ann = write(store, "Good day.")
        assert states(world, world.recipe(named))["sft"] == "stale"
        assert "sft" in world.go(world.recipe(named))
        assert world.go(world.recipe(named)) == []
        assert "sft" in world.go(world.recipe())  # other settings
        Labelling(store).undo(ann, "write")
        assert world.go(world.recipe()) == []
        assert "sft" in world.go(world.recipe(named))


def test_only_what_is_trained_on_counts(world: World) -> None:
    world.go()
    with store_of(world.run) as store:
        judge(store, 1, name="program", kind="simulated", batch="of another run")
        assert world.go() == []
        judge(store, 2, name="imported", kind="unknown")
        assert world.go() == AGAIN
        recipe = world.recipe({"reward": {"voters": "simulated"}})
        assert world.go(recipe) == ["reward", "ppo", "eval", "report"]
        judge(store, 3)
        assert world.go(recipe) == ["dpo", "eval", "report"]
        judge(store, 4, name="judge", kind="model")
        assert world.go(recipe) == ["dpo", "eval", "report"]
        recipe = world.recipe({"reward": {"voters": "people"}})
        world.go(recipe)
        judge(store, 5, name="judge", kind="model")
        assert world.go(recipe) == ["dpo", "eval", "report"]


def test_gold_items_are_no_training_votes(world: World) -> None:
    from keel.store import gold

    with store_of(world.run) as store:
        judge(store, 1)
        judge(store, 2, name="program", kind="simulated")
        before = vote_hashes(world.run.store_url)
        assert before.people
        assert before.withdrawn == ""
        with store.transaction(writes=True) as connection:
            for item in (1, 2):
                gold.set_gold(connection, item, "first", "admin", store.now)
        after = vote_hashes(world.run.store_url)
    assert after.people == ""
    assert after.withdrawn  # a simulated vote that was trained on no longer is


@pytest.mark.parametrize("kind", ["simulated", "person"])
def test_a_reviewers_last_word_redoes_what_learns_from_the_votes(world: World, kind: str) -> None:

    with store_of(world.run) as store:
        judge(store, 1, kind=kind)
        world.go()

        def settle(choice: str) -> None:
            with store.transaction(writes=True) as connection:
                review.adjudicate(connection, 1, 1, choice, None, "boss", store.now)

        for choice in ("second", "tie"):
            settle(choice)
            assert world.go() == AGAIN
            assert world.go() == []
        settle("tie")  # once more the same
        assert world.go() == []


def test_hashes_tell_every_change_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel.store.queue._sides", lambda key, draw: [int(id) for id in key.split("-")])  # else drawn
    with Store(tmp_path / "a.db") as a, Store(tmp_path / "b.db") as b:
        seen = {vote_hashes(tmp_path / "a.db").people}
        for n in (1, 2):
            judge(a, n)
            judge(b, n)
            seen.add(vote_hashes(tmp_path / "a.db").people)
            assert vote_hashes(tmp_path / "a.db") == vote_hashes(tmp_path / "b.db")
        judge(b, 2, name="bea")
        seen.add(vote_hashes(tmp_path / "b.db").people)
    assert len(seen) == 4
    assert vote_hashes(tmp_path / "nothing.db") == VoteHashes()
    assert not (tmp_path / "nothing.db").exists()


# ------------------------------------------------------------------------------------------------------- what is taken


def test_a_stage_goes_on_with_the_votes_that_it_began_with(tmp_path: Path) -> None:
    with Store(tmp_path / "f.db") as store:
        judge(store, 1)
        judge(store, 2, name="program", kind="simulated", batch="b")
        judge(store, 3, name="program", kind="simulated", batch="other")
        url = f"sqlite:///{tmp_path / 'f.db'}"
        first = training_votes(tmp_path / "stage", url, ["b"], VOTERS)
        judge(store, 4)
        assert training_votes(tmp_path / "stage", url, ["b"], VOTERS) == first
        found = {who: [(v.prompt.id, v.chosen, v.margin, v.annotator) for v in first[who]] for who in first}
        assert found["simulated"][0][0] == "p2"
        assert len(found["simulated"]) == 1
        assert [row[0] for row in found["people"]] == ["p1"]
        assert found["people"][0][2:] == (2.0, "ann")
        later = training_votes(tmp_path / "new", url, ["b"], {"people"})
        assert [v.prompt.id for v in later["people"]] == ["p1", "p4"]
        assert later["simulated"] == []
        assert all(isinstance(v, Preference) and replace(v) == v for v in later["people"])
        assert training_votes(tmp_path / "x", url, ["b"], {"simulated"})["people"] == []


def test_people_are_trained_on_beside_the_simulated_or_alone(tmp_path: Path) -> None:
    recipe = loop_recipe(tmp_path, None)
    recipe["stages"] = [s for s in recipe["stages"] if s["name"] in ("sft", "sample", "annotate", "reward", "dpo")]
    recipe["stages"] += [
        {"kind": "reward", "name": "only", "preferences": "people", "heldout_fraction": 0.3},
        {"kind": "reward", "name": "programs", "preferences": "annotate", "voters": "simulated"},
    ]
    both = {**recipe, "stages": recipe["stages"][:-2]}
    done = run(both, tmp_path / "run")
    assert done.stage("reward").summary()["people_votes"] == 0
    with pytest.raises(UserError, match="stage only: nobody has judged anything in the store yet"):
        run(recipe, tmp_path / "run")
    before = done.stage("reward").summary()
    held = Prompt("held", (Message("user", "kept for the evaluation"),))
    with Store(done.store_url) as store:
        for n in range(12):
            judge(store, n)
        for n in (20, 21):
            judge(store, n, name="judge", kind="model")
        with store.session() as s:
            s.add_prompts([held])
            pair = s.add_responses("held", [Completion("a"), Completion("b")], "m")
            s.add_comparisons([(pair[0], pair[1])], batch="held")
            assignment = s.next_assignment(s.add_annotator("ann"), "held")
            assert assignment is not None
            s.submit(assignment.id, NewVote("left", token="held"))
    recipe["data"]["heldout_prompts"] = write_jsonl(tmp_path / "held.jsonl", [{"prompt": held.messages[0].content}])
    run(recipe, tmp_path / "run")
    with Store(done.store_url) as store:
        simulated = sum(j.annotator_kind == "simulated" for j in store.judgements(done.stage("annotate").fingerprint))
    all_three = (simulated, 2, 12)
    expected = {"reward": all_three, "dpo": all_three, "only": (0, 0, 12), "programs": (simulated, 0, 0)}
    for name, votes in expected.items():
        summary = done.stage(name).summary()
        assert tuple(summary[f"{who}_votes"] for who in ("simulated", "model", "people")) == votes
    reward, only = done.stage("reward").summary(), done.stage("only").summary()
    assert reward["pairs"] + reward["heldout_pairs"] == simulated + 14
    assert only["pairs"] + only["heldout_pairs"] == 12
    assert reward["mean"] != before["mean"]  # other weights


def test_a_stage_goes_on_with_the_demonstrations_that_it_began_with(tmp_path: Path) -> None:
    with Store(tmp_path / "f.db") as store:
        ann = write(store, "Good day.", "Farewell.")
        url = f"sqlite:///{tmp_path / 'f.db'}"
        first = training_demonstrations(tmp_path / "stage", url)
        assert [d.messages[-1] for d in first] == [Message("assistant", x) for x in ("Good day.", "Farewell.")]
        Labelling(store).undo(ann, "write")
        assert training_demonstrations(tmp_path / "stage", url) == first
        assert training_demonstrations(tmp_path / "new", url) == first[:1]


def test_sft_learns_from_what_people_wrote(tmp_path: Path) -> None:
    recipe = loop_recipe(tmp_path, None)
    recipe["stages"] = [{**recipe["stages"][0], "demonstrations": "people"}]
    with pytest.raises(UserError, match="stage sft: nobody has written anything in the store yet"):
        run(recipe, tmp_path / "run")
    directory = RunDir(tmp_path / "run")
    with store_of(directory) as store:
        write(store, *(f"reply {n} good day" for n in range(12)))
        expected = {d.id for d in store.demonstrations() if d.messages[0].content != "question 3"}
    recipe["data"]["heldout_prompts"] = write_jsonl(tmp_path / "held.jsonl", [{"prompt": "question 3"}])
    recipe["data"]["heldout_fraction"] = 0.2
    run(recipe, directory.path)
    alone = directory.stage("sft").summary()
    assert alone["people_demonstrations"] == alone["demonstrations"] + alone["heldout"] == 11
    known = read_json(directory.stage("sft").path / "judgements.json")
    assert set(known["trained"] + known["heldout"]) == expected
    recipe["stages"][0]["demonstrations"] = [recipe["data"]["demonstrations"], "people"]
    run(recipe, directory.path)
    both = directory.stage("sft").summary()
    assert both["people_demonstrations"] == 11
    assert both["demonstrations"] + both["heldout"] > 11
