"""Constitutions in the store and in the app: versions, drafts, questions about one principle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from databases import Clock
from labelling_world import World, fill, person, token
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from keel.cli import label
from keel.recipe.constitution import Constitution, read_constitution
from keel.run import RunDir, write_json
from keel.store import Store, Unavailable, ai_labels, constitutions, lineage, principles, removals, work
from keel.store.ai_labels import AiLabel
from keel.store.people_tables import constitutions as table
from keel.store.records import NewVote
from keel.types import UserError
from keel.web.service.constitutions import Constitutions


@pytest.fixture
def store(new_url: Callable[[], str]) -> Iterator[Store]:
    with Store(new_url(), clock=Clock()) as store:
        yield store


def two() -> Constitution:
    asks = {"critique": "What is wrong?", "revision": "Mend it.", "choose": "Which is better?"}
    rules = [
        {"id": "kind", "text": "Be kind.", **asks},
        {"id": "true", "text": "Say what is true.", "weight": 0.1, **asks},
    ]
    return Constitution.model_validate({"name": "house", "principles": rules})


def published(store: Store, author: int) -> None:
    with store.transaction(writes=True) as c:
        assert constitutions.publish_file(c, two(), author, store.now) == 1


def test_a_draft_is_edited_published_and_then_unchangeable(store: Store, tmp_path: Path) -> None:
    ann = person(store, "ann", "admin").annotator_id
    published(store, ann)
    with store.transaction(writes=True) as c:
        assert constitutions.publish_file(c, two(), ann, store.now) == 1  # the same again
        begun = constitutions.make_draft(c, "house", ann, store.now)
        with pytest.raises(UserError, match="says what version 1 says"):
            constitutions.publish(c, "house", begun.constitution.hash, ann, store.now)
        kind = begun.constitution.principles[0].model_dump() | {"text": "Be very kind: äöü."}
        edited = constitutions.change(c, "house", "kind", kind, begun.constitution.hash, ann, store.now)
        with pytest.raises(UserError, match="in the meantime"):
            constitutions.change(c, "house", "kind", None, begun.constitution.hash, ann, store.now)
        with pytest.raises(UserError, match="weight"):
            constitutions.change(c, "house", "kind", kind | {"weight": 0}, edited.constitution.hash, ann, store.now)
        gone = constitutions.change(c, "house", "true", None, edited.constitution.hash, ann, store.now)
        assert constitutions.publish(c, "house", gone.constitution.hash, ann, store.now) == 2
    with store.transaction(writes=False) as c:
        assert [one.number for one in constitutions.versions(c, "house")] == [2, 1]
        assert constitutions.published(c, "house", 1).constitution == two()
        new = constitutions.published(c, "house").constitution
    assert [(one.id, one.what) for one in constitutions.changes(two(), new)] == [("true", "gone"), ("kind", "changed")]
    for one in (two(), new):
        (tmp_path / "house.yaml").write_text(constitutions.as_file(one), encoding="utf-8")
        back = read_constitution(str(tmp_path / "house.yaml"))
        assert (back.hash, back.principles[0].hash) == (one.hash, one.principles[0].hash)
    for change in ("UPDATE constitutions SET hash = 'x'", "DELETE FROM constitutions"):
        with pytest.raises((DBAPIError, Unavailable), match="do not change"), store.transaction(writes=True) as c:
            c.execute(text(change))


def test_two_who_publish_at_once_make_one_version(store: Store) -> None:
    who = [person(store, name, "admin").annotator_id for name in ("ann", "bo")]
    published(store, who[0])
    with store.transaction(writes=True) as c:
        begun = constitutions.make_draft(c, "house", who[0], store.now)
        seen = constitutions.change(c, "house", "true", None, begun.constitution.hash, who[0], store.now)
    gate, said = threading.Barrier(2), []

    def go(author: int) -> None:
        gate.wait()
        try:
            with store.transaction(writes=True) as c:
                said.append(constitutions.publish(c, "house", seen.constitution.hash, author, store.now))
        except UserError as error:
            said.append(str(error))

    both = [threading.Thread(target=go, args=(author,)) for author in who]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert sum(one == 2 for one in said) == 1, said
    told = ("meantime", "no draft", "says what version 2 says")  # as far as the other one had come
    assert any(word in str(one) for one in said for word in told), said
    with store.transaction(writes=False) as c:
        assert len(c.execute(table.select()).all()) == 2


def test_questions_are_answered_once_taken_back_and_exported(store: Store) -> None:
    fill(store, 1)
    ann, bo = person(store, "ann").annotator_id, person(store, "bo").annotator_id
    published(store, ann)
    with store.transaction(writes=True) as c:
        one = principles.next_question(c, ann, (), store.now)
        assert one is not None
        assert principles.next_question(c, ann, (), store.now) == one  # shown, not answered
        mark = token()
        first = principles.answer(c, ann, one.handle, "broken", mark, store.now)
        assert principles.answer(c, ann, one.handle, "broken", mark, store.now) == first
        with pytest.raises(UserError, match="answered already"):
            principles.answer(c, ann, one.handle, "kept", token(), store.now)
        with pytest.raises(UserError, match="not yours"):
            principles.answer(c, bo, one.handle, "kept", token(), store.now)
        again = principles.undo(c, ann, None, store.now)
        assert again is not None
        assert (again.reply, again.principle, principles.given(c)) == (one.reply, one.principle, [])
        seen = set()
        while (asked := principles.next_question(c, ann, (), store.now)) is not None:
            seen.add((asked.reply, asked.principle))
            principles.answer(c, ann, asked.handle, "kept", token(), store.now)
        assert len(seen) == 4  # two replies, two principles
        rows = principles.given(c)
        removals.take_out(c, "prompt", c.execute(text("SELECT id FROM prompts")).scalar_one(), "", None, store.now)
        assert [row | {"out": True} for row in rows] == principles.given(c)
    hashes = {p.id: p.hash for p in two().principles}
    assert len(rows) == 4
    assert not any(row["out"] for row in rows)
    assert all(row["principle_hash"] == hashes[row["principle"]] and row["answer"] == "kept" for row in rows)


def test_a_second_answer_comes_before_new_questions(store: Store) -> None:
    fill(store, 6)
    ann, bo, cy = (person(store, name).annotator_id for name in ("ann", "bo", "cy"))
    published(store, ann)

    def ask(who: int) -> tuple[str, str]:
        with store.transaction(writes=True) as c:
            asked = principles.next_question(c, who, (), store.now)
            assert asked is not None
            principles.answer(c, who, asked.handle, "kept", token(), store.now)
            return asked.reply, asked.principle

    once = {ask(ann) for _ in range(3)}
    assert {ask(bo) for _ in range(3)} == once
    new = ask(bo)
    assert new not in once
    assert ask(cy) == new  # the three have two answers


def test_a_skipped_question_comes_again_only_once_that_is_taken_back(store: Store) -> None:
    fill(store, 1)
    ann = person(store, "ann").annotator_id
    published(store, ann)
    with store.transaction(writes=True) as c:
        one = principles.next_question(c, ann, (), store.now)
        assert one is not None
        mark = token()
        for _ in range(2):
            principles.skip(c, ann, one.handle, mark, store.now)
        seen = []
        while (asked := principles.next_question(c, ann, (), store.now)) is not None:
            principles.answer(c, ann, asked.handle, "unsure", token(), store.now)
            principles.skip(c, ann, asked.handle, token(), store.now)  # too late
            seen.append((asked.reply, asked.principle))
        assert len(set(seen)) == len(seen) == principles.answered(c, ann) == 3
        assert (one.reply, one.principle) not in seen
        assert principles.undo(c, ann, one.handle, store.now) == one
        assert principles.next_question(c, ann, (), store.now) == one
        assert principles.answered(c, ann) == 3


def labelled(store: Store) -> str:
    """A person and a model on one pair: the model's label under `kind` says the left reply, whichever it is."""
    return labelled_by(store, "judge", 0.9, 0.3)


def labelled_by(store: Store, judge: str, first: float, second: float) -> str:
    model = store.add_annotator(judge, "model")
    theirs = store.next_assignment(model, seeded=True)
    assert theirs is not None
    mark = token()
    vote = store.submit(theirs.id, NewVote("left", token=mark, probability=0.8))
    hash = two().principles[0].hash
    with store.transaction(writes=True) as c:
        texts = "as it was sent", "what it thought", "sent the other way", "what it thought then"
        one = AiLabel("kind", hash, "house", two().hash, first, second, *texts)
        ai_labels.add(c, vote, [one], store.now)
    return mark


def test_agreement_and_flips_by_principle(store: Store) -> None:
    fill(store, 1, overlap=3)
    ann = person(store, "ann")
    labelled(store)
    labelled_by(store, "other", 0.1, 0.2)
    assignment = store.next_assignment(ann.annotator_id)
    assert assignment is not None
    with store.transaction(writes=False) as c:
        shown = c.execute(text("SELECT shown FROM assignments ORDER BY id")).scalars().all()
    same = shown[0] == shown[2]
    store.submit(assignment.id, NewVote("left" if same else "right", token=token()))
    kind, true = two().principles
    with store.transaction(writes=False) as c:
        found = principles.figures(c, [kind, true])
    shares = [(one.judge, one.labels, one.agreement, one.flips) for one in found[kind.hash].judged]
    told = [(name, n, a and a.point, f and f.point) for name, n, a, f in shares]
    # "judge" says the reply that is left for it, which ann prefers; "other" the right one of what it was shown
    other = float(shown[1] != shown[0])
    assert told == [("judge", 1, 1.0, 1.0), ("other", 1, other, 0.0)]
    assert found[true.hash].judged == ()


def test_draws_count_for_a_principle_whatever_else_stood_beside_it(tmp_path: Path) -> None:
    """Two stages drew `kind`, from constitutions of different names and hashes; one drew another `true`."""
    house, other = two(), two().model_copy(update={"name": "annex"})
    changed = house.principles[1].model_copy(update={"text": "Say what you know."})
    other = other.model_copy(update={"principles": [house.principles[0], changed]})
    run = RunDir(tmp_path / "run")
    for name, read, drawn in (("a", house, {"kind": 3, "true": 1}), ("b", other, {"kind": 4, "true": 9})):
        summary = {"constitution": {"name": read.name, "hash": read.hash}, "drawn": drawn, "changed": {"kind": 2}}
        run.stage(name).begin("f")
        write_json(run.stage(name).path / "constitution.json", read.model_dump(mode="json"))
        run.stage(name).finish(summary)
        run.manifest.update_stage(name, {"kind": "critique"})
    with Store(tmp_path / "feedback.db") as store:
        used = Constitutions(store, lambda: label._critiques([str(run.path)])).used()
    kind, true = (one.hash for one in house.principles)
    assert used == {kind: (7, 4), true: (1, 0), changed.hash: (9, 0)}


def test_figures_stand_by_judge(tmp_path: Path) -> None:
    with Store(tmp_path / "feedback.db") as store:
        world = World(store, items=1, overlap=2)
        published(store, person(store, "author", "admin").annotator_id)
        labelled(store)
        eve = world.client("eve", "reviewer")
        assert "Labels of judge" not in eve.get("/manage/constitution").text  # the only one
        labelled_by(store, "other", 0.1, 0.2)
        page = eve.get("/manage/constitution").text
        assert all(one in page for one in ("Labels of judge", "Labels of other", "Agrees with people: other"))


def test_what_was_taken_out_is_not_shown_again_by_an_undo(store: Store) -> None:
    fill(store, 2)
    ann = person(store, "ann")
    who = ann.annotator_id
    published(store, who)
    asked = []
    with store.transaction(writes=True) as c:
        for _ in range(2):
            one = principles.next_question(c, who, (), store.now)
            assert one is not None
            principles.answer(c, who, one.handle, "kept", token(), store.now)
            asked.append(one)
        ids = [c.execute(text("SELECT id FROM responses WHERE text = :t"), {"t": one.reply}).scalar() for one in asked]
        assert ids[0] != ids[1] or asked[0].principle != asked[1].principle
        removals.take_out(c, "response", ids[1], "", None, store.now)
        back = principles.undo(c, who, None, store.now)
        if ids[0] == ids[1]:
            assert back is None
        else:
            assert back is not None
            assert (back.reply, back.principle) == (asked[0].reply, asked[0].principle)
        assert principles.undo(c, who, asked[1].handle, store.now) is None
    votes = []
    while (held := store.next_assignment(who)) is not None:
        votes.append(held)
        store.submit(held.id, NewVote("left", token=token()))
    with store.transaction(writes=True) as c:
        for vote in votes:
            removals.take_out(c, "item", vote.item_id, "", None, store.now)
        undone = work.undo_last(c, "compare", who, guideline=None, now=store.now, lease=timedelta(minutes=5))
    assert votes
    assert undone is None


def test_why_stands_beside_votes_that_have_one(store: Store) -> None:
    fill(store, 1, overlap=2)
    mark, plain = labelled(store), token()
    model = store.add_annotator("scores alone", "model")
    theirs = store.next_assignment(model, seeded=True)
    assert theirs is not None
    store.submit(theirs.id, NewVote("left", token=plain, probability=0.8))
    with store.transaction(writes=False) as c:
        entries = lineage.texts(c, list(lineage.works(c).values()))
    assert {entry["work"].token: entry["why"] for entry in entries} == {mark: True, plain: False}


def test_why_is_refused_to_annotators_and_before_ones_own_vote(tmp_path: Path) -> None:
    with Store(tmp_path / "feedback.db") as store:
        world = World(store, items=1, overlap=2)
        published(store, person(store, "author", "admin").annotator_id)
        mark = labelled(store)
        ann, eve = world.client("ann"), world.client("eve", "reviewer")
        assert ann.get(f"/manage/why?vote={mark}").status_code == 403
        told = eve.get(f"/manage/why?vote={mark}").text
        assert all(one in told for one in ("as it was sent", "what it thought", "90%", "30%", "version 1"))
        assert all(one in told for one in ("sent the other way", "what it thought then"))
        item = eve.api("next", {"kind": "compare", "holding": []}).json()["item"]
        assert "waits for your own vote" in eve.get(f"/manage/why?vote={mark}").text
        eve.api("judge", {"assignment": item["id"], "token": token(), "choice": "left"})
        assert eve.get(f"/manage/why?vote={mark}").status_code == 200
        asked = ann.api("principles/next", {}).json()["question"]
        assert set(asked) == {"id", "messages", "reply", "principle"}
