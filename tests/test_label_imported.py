"""A store that took in another one's judgements is served like any other; nobody comes to own what is not theirs."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from labelling_world import Client, fake_sources, fill, person

from keel.store import Store, exchange, guidelines
from keel.store.records import NewVote
from keel.types import UserError
from keel.web.app.create import create_app
from keel.web.service.labelling import Labelling
from keel.web.service.manage import Manage
from keel.web.service.people import OWNER, People
from keel.web.service.start import prepare


def serve_and_judge(store: Store, votes: int = 2) -> str:
    """As ``keel label`` does: the owner's link, a session, and some votes; the name of the owner's account."""
    prepare(store)
    cookie = People(store).enter(People(store).owner_link())
    assert cookie is not None
    session = People(store).session(cookie)
    assert session is not None
    labelling = Labelling(store)
    for _ in range(votes):
        screen = labelling.next(session.account, "compare")
        assert screen is not None
        labelling.judge(
            session.account, screen.id, NewVote("left", token=uuid.uuid4().hex, strength=1, seconds=2.0, reason="so")
        )
    return session.account.name


def test_out_in_and_the_owner_signs_in(new_url: Callable[[], str], tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    with Store(new_url()) as first, Store(new_url()) as second, Store(new_url()) as third:
        fill(first, 5)
        assert serve_and_judge(first) == OWNER
        first.export_preferences(file)
        assert second.import_preferences(exchange.read(file)) == 2
        fill(second, 5)
        assert serve_and_judge(second) == "owner 2"  # "owner" is somebody who judged elsewhere
        assert serve_and_judge(second, 0) == "owner 2"  # the next day, too
        assert sorted(vote.annotator for vote in second.judgements()) == ["owner", "owner", "owner 2", "owner 2"]
        for _ in range(2):  # again: nothing is new
            assert second.import_preferences(exchange.read(file)) == 0
        second.export_preferences(file)
        assert third.import_preferences(exchange.read(file)) == 4
        assert serve_and_judge(third, 0) == "owner 3"
        client = Client(create_app(third, fake_sources()), People(third).enter(People(third).owner_link()))
        assert client.get("/manage/people").status_code == 200


def test_imported_people_do_not_become_those_who_have_accounts(new_url: Callable[[], str]) -> None:
    with Store(new_url()) as elsewhere, Store(new_url()) as store:
        fill(elsewhere, 3, overlap=3)
        for name in ("ann", "bo", "sim"):
            who = elsewhere.add_annotator(name, "simulated" if name == "sim" else "person")
            assignment = elsewhere.next_assignment(who)
            assert assignment is not None
            elsewhere.submit(assignment.id, NewVote("left", token=f"{name}-elsewhere"))
        reviewer = person(elsewhere, "ann 2", "reviewer")
        Manage(elsewhere).adjudicate(elsewhere.judgements()[0].item_id, "first", "", reviewer)
        votes = elsewhere.judgements()
        fill(store, 3)
        ann, sim = person(store, "ann"), person(store, "sim")
        person(store, "ann 2", "reviewer")
        assert store.import_preferences(votes) == 3
        assert store.import_preferences(votes) == 0
        again = [replace(votes[0], token="another"), replace(votes[2], token="and one")]
        with pytest.raises(UserError):  # a token names one vote
            store.import_preferences([replace(votes[0], choice="right")])
        store.import_preferences(again)
        names = {vote.token: (vote.annotator, vote.annotator_kind, vote.settled_by) for vote in store.judgements()}
        assert names == {
            "ann-elsewhere": ("ann (imported)", "person", "ann 2 (imported)"),
            "bo-elsewhere": ("bo", "person", "ann 2 (imported)"),
            "sim-elsewhere": ("sim (imported)", "simulated", "ann 2 (imported)"),
            "another": ("ann#2", "person", "ann 2 (imported)"),
            "and one": ("sim#2", "simulated", "ann 2 (imported)"),
        }
        assert [done.what for who in (ann, sim) for done in Labelling(store).mine(who)] == []
        with pytest.raises(UserError, match="imported judgements; choose another one, such as 'bo 2'"):
            person(store, "bo")
        person(store, "bo 2")


def test_an_imported_guideline_is_not_taken_for_one_that_is_here(new_url: Callable[[], str]) -> None:
    with Store(new_url()) as elsewhere, Store(new_url()) as store:
        for one in (elsewhere, store):
            fill(one, 2)
        elsewhere.add_guideline("1", "Theirs.")
        elsewhere.add_guideline("draft", "")
        for number, version in enumerate(("1", "draft")):
            assignment = elsewhere.next_assignment(elsewhere.add_annotator("ann"))
            assert assignment is not None
            elsewhere.submit(assignment.id, NewVote("left", token=f"t{number}", guideline=version))
        store.add_guideline("1", "Ours.")
        store.import_preferences(elsewhere.judgements())
        assert [vote.guideline for vote in store.judgements()] == ["1 (imported)", "draft"]
        assert store.guideline("1") == "Ours."
        prepare(store)
        with store.transaction(writes=False) as connection:
            current = guidelines.current_guideline(connection)
        assert current is not None
        assert (current.version, current.text) == ("1", "Ours.")
