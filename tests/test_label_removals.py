"""What is taken out of use, put back, and erased: who gets it, what is trained on, and what is left in any table."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from labelling_world import World, fake_sources, fill, person
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from keel.cli import main
from keel.data.sources import read_preferences
from keel.store import Store, exchange
from keel.store.people import Account
from keel.store.people_tables import erasures
from keel.store.records import NewRanking, NewThumb, NewVote, NewWriting
from keel.store.tables import events, metadata, responses
from keel.store.trained_on import vote_hashes
from keel.types import Message, Prompt, UserError
from keel.web.service.arena import Arena
from keel.web.service.exports import Export
from keel.web.service.labelling import Labelling, Screen
from keel.web.service.manage import Manage
from keel.web.service.people import People
from keel.web.service.start import prepare


@pytest.fixture
def url(new_url: Callable[[], str]) -> str:
    return new_url()


def must(screen: Screen | None) -> Screen:
    assert screen is not None
    return screen


def judge(labelling: Labelling, who: Account, screen: Screen, reason: str | None = None, token: str = "") -> None:
    labelling.judge(
        who, screen.id, NewVote("left", token=token or uuid.uuid4().hex, strength=2, seconds=1.0, reason=reason)
    )


def shown_of(store: Store, prompt: str) -> list[int]:
    return [response.id for response in store.responses(prompt)]


# ------------------------------------------------------------------------------------------------------------ taken out


@pytest.mark.parametrize("what", ["item", "response", "prompt"])
def test_what_is_out_is_given_to_nobody_and_trains_nothing(url: str, what: Any, tmp_path: Path) -> None:
    with Store(url) as store:
        items = fill(store, 3, overlap=2, replies=3)
        prepare(store)
        labelling, manage = Labelling(store), Manage(store)
        ann, boss = person(store, "ann"), person(store, "boss", "reviewer")
        seen = {}
        while (screen := labelling.next(ann, "compare")) is not None:
            seen[screen.messages[0].content] = screen
            judge(labelling, ann, screen)
        assert len(store.preferences()) == 3
        held = [must(labelling.next(boss, "compare"))]
        while (more := labelling.next(boss, "compare", [one.id for one in held])) is not None:
            held.append(more)
        before = vote_hashes(url)
        id = {"item": str(items[1]), "response": str(shown_of(store, "p1")[0]), "prompt": "p1"}[what]
        labelling.flag(ann, seen["Question 1?"].id, "odd", "flag-token")
        (flag,) = manage.flags()
        assert [r["model"] for r in flag["responses"]] == ["runs/hidden-model"] * 2  # reviewers learn whose it is
        manage.take_out(what, id, "odd", flag["id"], boss)
        manage.take_out(what, id, "odd", None, boss)  # once more is no more
        assert manage.flags() == []
        assert vote_hashes(url) != before  # the stages that were trained on it are stale
        assert {pair.prompt.id for pair in store.preferences()} == {"p0", "p2"}
        assert [vote.out for vote in store.judgements() if vote.prompt.id == "p1"] == [True]  # the raw vote is there
        assert store.progress().wanted == 4
        assert [queue.items for queue in manage.queues()] == [2]
        # on a page that has it, a vote is taken, and not used; nobody else gets it
        on_screen = next(one for one in held if one.messages[0].content == "Question 1?")
        judge(labelling, boss, on_screen)
        assert len([vote for vote in store.judgements() if vote.prompt.id == "p1"]) == 2
        cy = person(store, "cy")
        while (screen := labelling.next(cy, "compare")) is not None:
            assert screen.messages[0].content != "Question 1?"
            judge(labelling, cy, screen)
        # exports: training reads none of it, another store all of it
        pairs = [json.loads(line) for line in manage.export("pairs.jsonl", tmp_path).read_text().splitlines()]
        assert {row["prompt"][0]["content"] for row in pairs} == {"Question 0?", "Question 2?"}
        file = tmp_path / "votes.parquet"
        store.export_preferences(file)
        assert {pair.prompt.id for pair in read_preferences(file)} == {"p0", "p2"}
        assert {vote.prompt.id for vote in exchange.read(file)} == {"p0", "p1", "p2"}
        # new pairs are made of what is in use
        manage.ask_for("compare", 9, 1, "boss")
        assert all(p.item_id for p in store.judgements())
        (removal,) = manage.out()
        assert (removal["what"], removal["by"], removal["reason"]) == (what, "boss", "odd")
        manage.put_back(removal["id"], boss)
        assert len([pair for pair in store.preferences() if pair.prompt.id == "p1"]) == 2
        with pytest.raises(UserError, match="in use"):
            manage.put_back(removal["id"], boss)
        told = [(e.action, e.actor, e.entity) for e in store.events() if e.action in ("took out", "put back")]
        assert told == [("took out", "boss", what), ("put back", "boss", what)]


def test_a_page_learns_that_what_it_holds_is_out(url: str) -> None:
    with Store(url) as store:
        fill(store, 2)
        prepare(store)
        labelling, manage = Labelling(store), Manage(store)
        ann, boss = person(store, "ann"), person(store, "boss", "reviewer")
        one = must(labelling.next(ann, "compare"))
        two = must(labelling.next(ann, "compare", [one.id]))
        prompt = one.messages[0].content.removeprefix("Question ").removesuffix("?")
        manage.take_out("prompt", f"p{prompt}", "", None, boss)
        assert labelling.hold(ann, [one.id, two.id]).held == (two.id,)  # else its draft would wait where none sees it
        manage.put_back(manage.out()[0]["id"], boss)
        assert set(labelling.hold(ann, [one.id, two.id]).held) == {one.id, two.id}
        judge(labelling, ann, one)
        assert labelling.hold(ann, [one.id, two.id]).done == (one.id,)


def test_a_response_that_is_out_comes_in_no_new_pair(url: str) -> None:
    with Store(url) as store:
        fill(store, 1, replies=4)
        prepare(store)
        manage, boss = Manage(store), person(store, "boss", "reviewer")
        out, *others = shown_of(store, "p0")
        manage.take_out("response", str(out), "", None, boss)
        store.add_comparisons([(out, others[0])], batch="new")  # whoever adds it: it is out from the start
        assert store.next_assignment(boss.annotator_id, "new") is None
        assert manage.ask_for("rank", 5, 1, "boss") == 0  # three are left, and a ranking takes four
        assert manage.ask_for("compare", 5, 1, "boss") == 1
        manage.take_out("prompt", "p0", "", None, boss)
        assert manage.ask_for_writing(5, 1, "boss") == 0
        response, prompt = sorted(manage.out(), key=lambda one: one["what"], reverse=True)
        manage.put_back(prompt["id"], boss)  # the response is out still
        assert store.next_assignment(boss.annotator_id, "new") is None
        manage.put_back(response["id"], boss)
        assert store.next_assignment(boss.annotator_id, "new") is not None


def test_what_is_out_is_out_in_another_store_too(new_url: Callable[[], str], tmp_path: Path) -> None:
    with Store(new_url()) as store, Store(new_url()) as copy:
        live(store, person(store, "ann"), "word")
        boss = person(store, "boss", "admin")
        for prompt in [prompt.id for prompt in store.prompts()]:
            Manage(store).take_out("prompt", prompt, "", None, boss)
        assert store.preferences() == store.demonstrations() == []
        store.export_preferences(tmp_path / "votes.jsonl")
        given = exchange.read(tmp_path / "votes.jsonl")
        assert len(given) == 3
        copy.import_preferences(given)
        assert copy.preferences() == []
        assert len(copy.all_given()) == 3


# --------------------------------------------------------------------------------------------------------------- erased


def live(store: Store, ann: Account, word: str) -> None:
    """One person does everything once, with a word of theirs in each text, on prompts and responses that hold one."""
    with store.session() as s:
        from keel.types import Completion

        prompt = Prompt("p-" + word, (Message("user", f"ask {word}"),), meta={"note": f"meta {word}", "n": 1})
        s.add_prompts([prompt])
        ids = s.add_responses(prompt.id, [Completion(f"reply {n} {word}") for n in range(4)], "model")
        s.add_comparisons([(ids[0], ids[1]), (ids[2], ids[3])], 2, "main")
        s.add_prompts([Prompt(prompt.id, prompt.messages, meta={"note": f"changed {word}"})])
    prepare(store)
    manage, labelling = Manage(store), Labelling(store)
    manage.ask_for("rank", 1, 1, "boss")
    manage.ask_for("edit", 1, 1, "boss")
    manage.ask_for("thumb", 1, 1, "boss")
    manage.ask_for_writing(1, 1, "boss")
    first = must(labelling.next(ann, "compare"))
    judge(labelling, ann, first, f"undone {word}")
    labelling.undo(ann, "compare")
    judge(labelling, ann, first, f"because {word}")
    second = must(labelling.next(ann, "compare"))
    labelling.flag(ann, second.id, f"flag {word}", "flag-" + uuid.uuid4().hex)
    labelling.skip(ann, second.id, f"skip {word}")
    rank = must(labelling.next(ann, "rank"))
    labelling.rank(
        ann, rank.id, NewRanking([[0], [1], [2], [3]], token=uuid.uuid4().hex, seconds=1.0, reason=f"rank {word}")
    )
    thumb = must(labelling.next(ann, "thumb"))
    labelling.thumb(ann, thumb.id, NewThumb(True, f"thumb {word}", token=uuid.uuid4().hex, seconds=1.0))
    for kind in ("write", "edit"):
        screen = must(labelling.next(ann, kind))  # type: ignore[arg-type]
        labelling.write(ann, screen.id, NewWriting(f"{kind} {word}", token=uuid.uuid4().hex, seconds=1.0))
    manage.adjudicate(store.judgements()[0].item_id, "first", f"settled {word}", ann)
    arena = Arena(store, fake_sources().arena)
    talk = arena.start(ann)
    list(arena.say(ann, talk, f"hello {word}"))
    arena.vote(ann, talk, "left", uuid.uuid4().hex, f"arena {word}")


def everything(store: Store, folder: Path) -> str:
    """Each table and each export as one text."""
    found = []
    with store.transaction(writes=False) as connection:
        for table in metadata.sorted_tables:
            found += [repr(tuple(row)) for row in connection.execute(select(table))]
    for what in get_args(Export):
        path = Manage(store).export(what, folder)
        if what.endswith(".parquet"):
            import pyarrow.parquet as pq

            found.append(repr(pq.read_table(path).to_pylist()))
        else:
            found.append(path.read_text(encoding="utf-8"))
    return "\n".join(found)


@pytest.mark.parametrize("what", ["person", "prompt"])
def test_after_an_erasure_no_table_and_no_export_holds_it(url: str, what: str, tmp_path: Path) -> None:
    secret, name = "S" + uuid.uuid4().hex, "N" + uuid.uuid4().hex
    with Store(url) as store:
        boss = person(store, "boss", "admin")
        ann = person(store, name, "admin")
        people = People(store)
        link = people.way_in(name, "boss")
        assert people.enter(link) is not None
        people.invite("annotator", name)
        live(store, ann, secret)
        live(store, ann, "other")
        choices = [vote.choice for vote in store.judgements()]
        count = len(store.events())
        before = everything(store, tmp_path)
        assert before.count(secret) > 20
        assert name in before
        prompt = f"p-{secret}"
        if what == "person":
            new = people.erase(name, True, "boss")
            after = everything(store, tmp_path)
            assert name not in after
            assert {vote.annotator for vote in store.judgements()} == {new}
            left = [
                line for line in after.splitlines() if secret in line
            ]  # the prompt and its responses are not theirs
            assert all("ask " in line or "reply " in line or "changed " in line or prompt in line for line in left)
            for word in (
                "because",
                "undone",
                "flag",
                "skip",
                "rank",
                "thumb",
                "write",
                "edit",
                "settled",
                "hello",
                "arena",
            ):
                assert f"{word} {secret}" not in after
                assert f"{word} other" not in after
            assert store.demonstrations() == []  # a mark is nothing to learn from
            assert people.session(people.start_session(boss)) is not None
            with pytest.raises(UserError, match="nobody named"):
                people.erase(name, True, "boss")
        else:
            Manage(store).erase("prompt", prompt, boss)
            after = everything(store, tmp_path).replace(f"hello {secret}", "").replace(f"arena {secret}", "")
            after = after.replace(f"I heard: hello {secret} (1)", "")  # the arena's talk is on no prompt
            assert secret not in after.replace(f"heard:  ({1})", "")
            assert "because other" in after
            assert name in after
            assert {pair.prompt.id for pair in store.preferences()} == {"p-other"}
            assert len(store.demonstrations()) == 2
            (removal,) = Manage(store).out()
            with pytest.raises(UserError, match="erased"):
                Manage(store).put_back(removal["id"], boss)
            store.add_prompts([Prompt(prompt, (Message("user", "again"),))])  # a run that goes on finds no clash
        # choices and the log's length are as they were: an erasure adds, and takes words alone
        assert [vote.choice for vote in store.judgements()] == choices
        assert len(store.events()) >= count
        assert [e.entity for e in store.events() if e.action == "erased"] == [what]
        with store.transaction(writes=False) as connection:
            assert [row.open for row in connection.execute(select(erasures))] == [False]


def test_a_response_is_erased_with_what_was_written_about_it(url: str, tmp_path: Path) -> None:
    secret = "S" + uuid.uuid4().hex
    with Store(url) as store:
        boss, ann = person(store, "boss", "admin"), person(store, "ann")
        live(store, ann, secret)
        ids = shown_of(store, f"p-{secret}")
        for id in ids:
            Manage(store).erase("response", str(id), boss)
        after = everything(store, tmp_path)
        for word in ("reply 0", "reply 3", "because", "undone", "flag", "skip", "rank", "edit", "settled"):
            assert f"{word} {secret}" not in after
        assert f"write {secret}" in after  # written to the prompt, and about no response
        assert store.preferences() == []
        with store.transaction(writes=False) as connection:
            kept = connection.execute(select(responses.c.text, responses.c.key)).all()
        assert {row.text for row in kept} == {"[erased]"}
        assert all(row.key.startswith("erased/") for row in kept)  # nor a hash by which the text could be guessed


def test_an_export_after_an_erasure_comes_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both responses of a pair are one mark then, and of a ranking several; the rest comes in."""
    with Store(tmp_path / "a.db") as store:
        boss, ann = person(store, "boss", "admin"), person(store, "ann")
        live(store, ann, "gone")
        live(store, ann, "here")
        for id in shown_of(store, "p-gone"):
            Manage(store).erase("response", str(id), boss)
        kept = [(vote.token, vote.prompt.id) for vote in store.judgements() if vote.prompt.id == "p-here"]
        store.export_preferences(tmp_path / "votes.jsonl")
        votes = len((tmp_path / "votes.jsonl").read_text().splitlines())
    assert main(["import", str(tmp_path / "b.db"), str(tmp_path / "votes.jsonl")]) == 0
    told = capsys.readouterr().out
    assert "2 of erased responses left out" in told  # one vote, one ranking
    assert votes > 4
    with Store(tmp_path / "b.db") as store:
        assert [(vote.token, vote.prompt.id) for vote in store.judgements()] == kept
    assert main(["import", str(tmp_path / "b.db"), str(tmp_path / "votes.jsonl")]) == 0


def test_a_sqlite_file_is_rewritten_without_it(tmp_path: Path) -> None:
    secret = "S" + uuid.uuid4().hex
    with Store(tmp_path / "feedback.db") as store:
        live(store, person(store, "ann"), secret)
        boss = person(store, "boss", "admin")
        Manage(store).erase("prompt", f"p-{secret}", boss)
        People(store).erase("ann", True, "boss")
        held = b"".join(path.read_bytes() for path in tmp_path.glob("feedback.db*"))
        assert len(held) > 10_000
        assert secret.encode() not in held


def test_the_log_can_be_changed_in_no_other_way(url: str) -> None:
    with Store(url) as store:
        person(store, "ann")
        change = "UPDATE events SET {} WHERE id = 1"
        attempts = [
            [change.format("actor = 'x'")],
            ["INSERT INTO erasures VALUES (1, '2026-01-01', 'x', true)", change.format("action = 'x'")],
            ["INSERT INTO erasures VALUES (1, '2026-01-01', 'x', true)", change.format("guideline = '9'")],
            ["INSERT INTO erasures VALUES (1, '2026-01-01', 'x', true)", "DELETE FROM events"],
            ["INSERT INTO erasures VALUES (1, '2026-01-01', 'x', true)", "DELETE FROM erasures"],
            ["INSERT INTO erasures VALUES (1, '2026-01-01', 'x', false)", change.format("actor = 'x'")],
            ["INSERT INTO erasures VALUES (1, '2026-01-01', 'x', false)", "UPDATE erasures SET open = true"],
        ]
        for statements in attempts:
            with pytest.raises(DBAPIError, match="append-only"):
                _run(store, statements)
        with store._engine.connect() as connection:
            assert connection.execute(select(events.c.actor).where(events.c.id == 1)).scalar_one() == "test"


def _run(store: Store, statements: list[str]) -> None:
    with store._engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def test_who_may_not_be_erased(url: str) -> None:
    with Store(url) as store:
        prepare(store)
        people = People(store)
        people.owner_link()
        with pytest.raises(UserError, match="owner"):
            people.erase("owner", True, "owner")
        boss = person(store, "boss", "admin")
        people.change("owner", "boss", role="annotator")
        with pytest.raises(UserError, match="only admin"):
            people.erase("boss", False, "boss")
        assert people.session(people.start_session(boss)) is not None
        invitation = people.invite("annotator", "boss")
        with pytest.raises(UserError, match="Keel's own"):
            people.accept(invitation, "keel", "a long enough password")
        elsewhere = store.add_annotator("imported", "unknown")
        assert people.erase("imported", False, "boss") == f"erased person {elsewhere}"


def test_flags_and_erasing_in_the_app(tmp_path: Path) -> None:
    with Store(tmp_path / "feedback.db") as store:
        world = World(store, items=3)
        ann, rev, boss = world.client("ann"), world.client("rev", "reviewer"), world.client("boss", "admin")
        item = ann.api("next", {"kind": "compare"}).json()["item"]
        flag = {"assignment": item["id"], "token": "t" * 8, "text": "a phone number"}
        assert ann.api("flag", flag).status_code == 200
        page = rev.get("/manage/flags").text
        assert all(shown["text"] in page for shown in item["shown"])
        assert page.count("runs/hidden-model") == 2
        assert "Erase" not in page  # admins alone
        first, second = (shown["text"] for shown in item["shown"])  # A and B are those of whoever flagged it
        assert page.index("Response A") < page.index(first) < page.index("Response B") < page.index(second)
        assert "Erase response A" in boss.get("/manage/flags").text
        (found,) = world.app.state.services.manage.flags()
        fields = {
            "what": "response",
            "id": str(found["responses"][0]["id"]),
            "reason": "phone",
            "flag": str(found["id"]),
        }
        assert rev.form("/manage/flags/out", **fields).status_code == 303
        page = rev.get("/manage/flags").text
        assert ("No open flags" in page, "Taken out" in page, "Put back" in page) == (True, True, True)
        (removal,) = world.app.state.services.manage.out()
        assert rev.form("/manage/flags/back", removal=str(removal["id"])).status_code == 303
        assert rev.form("/manage/flags/erase", what="response", id=fields["id"]).status_code == 403
        assert boss.form("/manage/flags/erase", what="response", id=fields["id"]).status_code == 303
        assert ">erased<" in rev.get("/manage/flags").text
        assert boss.form("/manage/people/erase", name="ann", texts="true").status_code == 303
        assert ann.get("/compare").headers["location"] == "/sign-in"
        assert "erased person" in boss.get("/manage/people").text
        assert boss.form("/manage/flags/out", what="item", id="x" * 9).status_code == 400
