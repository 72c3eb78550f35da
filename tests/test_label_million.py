"""A large store: what is counted is what is there, lists come by the page, exports as they are read."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from counted import kept, recounted
from databases import Clock
from labelling_world import World, fill, person, token
from sqlalchemy import select, text

from keel.store import Store, erase, given, overview, row_files, whole
from keel.store.given import texts_of
from keel.store.migrations.versions.v0013_tallies import fill as count_again
from keel.store.people import Account
from keel.store.records import NewVote, NewWriting
from keel.store.tables import annotators
from keel.store.vote_columns import VoteColumns, VoteReader
from keel.types import Completion, Message, Prompt, UserError
from keel.web.app.spool import MOST, Spool
from keel.web.service.arena import Busy
from keel.web.service.kept_quality import WHOSE
from keel.web.service.labelling import Labelling
from keel.web.service.manage import Manage
from keel.web.service.start import prepare


def test_counts_are_those_of_the_rows_after_erasures(new_url: Callable[[], str], tmp_path: Path) -> None:
    """And in a copy of the whole store, and in a store of before there were counts. (test_label_log.py has all else
    that people do.)"""
    with Store(new_url()) as store, Store(new_url()) as moved:
        fill(store, 4, overlap=2)
        prepare(store)
        manage, labelling, boss = Manage(store), Labelling(store), person(store, "boss", "admin")
        manage.ask_for_writing(2, 2, "boss")
        for who, choice in ((person(store, "ann"), "left"), (person(store, "bo"), "both_bad")):
            for _ in range(4):
                screen = labelling.next(who, "compare")
                assert screen is not None
                labelling.judge(who, screen.id, NewVote(choice, token=token()))  # type: ignore[arg-type]
            screen = labelling.next(who, "write")
            assert screen is not None
            labelling.write(who, screen.id, NewWriting(f"{who.name}'s", token=token()))
        manage.take_out("prompt", "p1", "", None, boss)
        manage.take_out("prompt", "p2", "", None, boss)
        assert kept(store) == recounted(store)
        reader = VoteReader()
        columns(store, reader)
        reply = store.responses("p0")[0].id
        with store.transaction(writes=True) as connection:
            erase.erase_person(connection, "ann", True, "boss", store.now)
            erase.erase_response(connection, reply, boss.annotator_id, "boss", store.now)
            erase.erase_prompt(connection, "p1", boss.annotator_id, "boss", store.now)
        manage.put_back(next(one["id"] for one in manage.out() if not one["erased"]), boss)
        done, said = kept(store)
        assert (done, said) == recounted(store)
        mine = {
            place[4]: n for place, n in done.items() if place[0] == person_id(store, "bo") and place[2] == "compare"
        }
        assert mine == {True: 2, False: 2}  # two of the four pairs are out
        assert all(votes[3] == 1 and sum(votes) == 2 for votes in said.values())
        same(columns(store, reader), columns(store, VoteReader()))  # what was kept of before an erasure is forgotten
        with store.moment() as connection:
            whole.export(connection, tmp_path / "whole.jsonl")
        with moved.transaction(writes=True) as connection:
            whole.add(connection, tmp_path / "whole.jsonl")
        assert kept(moved) == (done, said)
        with store.transaction(writes=True) as connection:
            for statement in ("DELETE FROM tallies", "DELETE FROM item_votes", *count_again(connection.dialect.name)):
                connection.execute(text(statement))
        assert kept(store) == (done, said)


def person_id(store: Store, name: str) -> int:
    with store.transaction(writes=False) as connection:
        return int(connection.execute(select(annotators.c.id).where(annotators.c.name == name)).scalar_one())


def columns(store: Store, reader: VoteReader) -> VoteColumns:
    with store.moment() as connection:
        return reader.read(connection).of_kinds(WHOSE["all"])


def same(one: VoteColumns, other: VoteColumns) -> None:
    for name in VoteColumns.__slots__:
        mine, theirs = (getattr(votes, name) for votes in (one, other))
        if name.endswith("_V"):
            np.testing.assert_array_equal(mine, theirs, err_msg=name)
        else:
            assert mine == theirs


def test_votes_as_arrays_follow_what_happens(new_url: Callable[[], str]) -> None:
    """A reader that has read before says what the votes, one by one, say."""
    with Store(new_url()) as store:
        items, reader = fill(store, 4, overlap=3), VoteReader()
        manage, labelling, boss = Manage(store), Labelling(store), person(store, "boss", "reviewer")
        ann, bo = person(store, "ann"), person(store, "bo")

        def check() -> None:
            with store.transaction(writes=False) as connection:
                one_by_one = overview.votes(connection, WHOSE["all"])
            found = columns(store, reader)
            same(found.where(found.item_V > 0), with_names(VoteColumns.of(one_by_one), found))
            same(found, columns(store, VoteReader()))

        check()
        for who, choices in ((ann, "left tie right"), (bo, "right left both_bad")):
            for choice in choices.split():
                screen = labelling.next(who, "compare")
                assert screen is not None
                strength = 2 if choice in ("left", "right") else None
                labelling.judge(who, screen.id, NewVote(choice, token=token(), strength=strength, seconds=1.5))  # type: ignore[arg-type]
            check()
        labelling.undo(ann, "compare")
        check()
        manage.set_gold(items[0], "second", "boss")
        (settled, *_) = {vote.item_id for vote in store.judgements()} - {items[0]}
        manage.adjudicate(settled, "tie", "", boss)
        check()
        with store.transaction(writes=True) as connection:
            erase.erase_response(connection, store.responses("p1")[0].id, boss.annotator_id, "boss", store.now)
        check()


def with_names(votes: VoteColumns, like: VoteColumns) -> VoteColumns:
    """The votes with the names of ``like``, among which some may have given none."""
    place = np.array([like.names.index(name) for name in votes.names], dtype=np.int64)
    who_V = place[votes.annotator_V] if len(votes) else votes.annotator_V
    return replace(votes, names=like.names, kinds=like.kinds, annotator_V=who_V)


def test_lists_come_by_the_page_and_can_be_searched(new_url: Callable[[], str]) -> None:
    with Store(new_url()) as store:
        world = World(store, items=50)
        labelling, ann = Labelling(store), person(store, "ann")
        store.add_prompts([Prompt("odd", (Message("user", '100% of Čapek\'s "robots"?'),))])
        for number in range(22):
            screen = labelling.next(ann, "compare")
            assert screen is not None
            labelling.flag(ann, screen.id, f"flag <{number}>", token())
            labelling.skip(ann, screen.id, "")
        admin = world.client("boss", "admin")

        def rows(path: str, mark: str) -> int:
            answer = admin.get(path)
            assert answer.status_code == 200, path
            return answer.text.count(mark)

        case, row = '<section class="case"', '<td class="wide" dir="auto">'
        assert [rows(f"/manage/flags?number={n}", case) for n in (0, 1, 2)] == [20, 2, 0]
        assert [rows(f"/manage/flags?find={find}", case) for find in ("<21>", "ANN", "nobody", "%25")] == [1, 20, 0, 0]
        assert [rows(f"/manage/prompts?number={n}", row) for n in (0, 1, 2)] == [50, 1, 0]
        finds = {"odd": 1, "question 49": 1, "100%25": 1, "Čapek's \"ro": 1, "_": 0, "\\": 0}
        assert {find: rows(f"/manage/prompts?find={find}", row) for find in finds} == finds
        assert [rows(f"/manage/gold?number={n}", case) for n in (0, 2, 3)] == [20, 10, 0]
        assert rows("/manage/gold?batch=main&find=question 7?", case) == 1
        assert "batch=main&amp;number=1" in admin.get("/manage/gold?batch=main").text
        assert [rows(f"/manage/queue?find={find}", '<section class="card">') for find in ("MAI", "other")] == [1, 0]
        assert [rows(f"/manage/people?find={find}", '<th scope="row" class="name">') for find in ("AN", "x")] == [1, 0]
        for wrong in ("number=-1", "number=100001", "number=x", "find=" + 501 * "a"):
            assert admin.get(f"/manage/prompts?{wrong}").status_code == 422


def test_a_file_is_sent_while_it_is_written() -> None:
    more, ended = threading.Event(), threading.Event()

    def write(folder: Path, wanted: Callable[[], bool]) -> None:
        with (folder / ".rows.tmp").open("wb") as file:
            file.write(b"first\n")
            file.flush()
            more.wait(10)
            for _ in range(1000):
                if not wanted():
                    break
                file.write(b"x" * 1000)
            file.write(b"last\n")
        (folder / ".rows.tmp").replace(folder / "rows")
        ended.set()

    parts = iter(Spool(write))
    assert next(parts) == b"first\n"
    assert not ended.is_set()
    more.set()
    assert b"".join(parts) == 1_000_000 * b"x" + b"last\n"
    assert next(iter(Spool(lambda folder, wanted: (folder / "empty").touch()))) == b""


def test_a_file_that_goes_wrong_or_that_nobody_waits_for() -> None:
    def broken(folder: Path, wanted: Callable[[], bool]) -> None:
        raise UserError("no such thing")

    with pytest.raises(UserError, match="no such thing"):
        Spool(broken)

    def broken_late(folder: Path, wanted: Callable[[], bool]) -> None:
        (folder / "rows").write_bytes(b"some")
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):  # the connection is cut: nobody takes it for the whole
        b"".join(Spool(broken_late))
    ended = threading.Event()

    def endless(folder: Path, wanted: Callable[[], bool]) -> None:
        with (folder / "rows").open("wb", buffering=0) as file:
            while wanted():
                file.write(b"more")
        ended.set()

    spools = [Spool(endless) for _ in range(MOST)]
    with pytest.raises(Busy):
        Spool(endless)
    for spool in spools:
        parts = iter(spool)
        next(parts)
        parts.close()  # type: ignore[attr-defined]
    assert ended.wait(10)


def test_exports_are_read_as_they_are_written(
    new_url: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given, "_READ", 10)
    monkeypatch.setattr(row_files, "_GROUP", 7)
    with Store(new_url()) as store:
        fill(store, 30)
        who = store.add_annotator("sim", "simulated")
        with store.session() as session:
            while (found := session.next_assignment(who)) is not None:
                session.submit(found.id, NewVote("left", token=uuid.uuid4().hex))
        read: list[int] = []

        def texts(connection: Any, ids: Any, rows: Any) -> Any:
            read.append(len(rows))
            return texts_of(connection, ids, rows)

        monkeypatch.setattr(given, "texts_of", texts)
        with store.moment() as connection:
            votes = given.all_given(connection, None)
            tokens = [next(votes).token]
            assert read == [10]  # of thirty
            tokens += [vote.token for vote in votes]
        assert read == [10, 10, 10]
        assert store.export_preferences(tmp_path / "votes.parquet") == 30
        assert store.export_preferences(tmp_path / "votes.jsonl") == 30
        lines = (tmp_path / "votes.jsonl").read_text().splitlines()
        table = pyarrow.parquet.read_table(tmp_path / "votes.parquet")
        assert table.column("id").to_pylist() == [json.loads(line)["id"] for line in lines] == tokens


def test_who_is_ahead_of_the_others_gets_what_follows(new_url: Callable[[], str]) -> None:
    """And what is put first, and in the end what came free behind them."""
    clock = Clock()
    with Store(new_url(), clock=clock) as store:
        first, second, third = fill(store, 3, overlap=2)
        prepare(store)
        manage, labelling = Manage(store), Labelling(store)
        manage.set_gold_every(0, "admin")
        ann, bo, cy = (person(store, name) for name in ("ann", "bo", "cy"))

        def vote(who: Account) -> int | None:
            screen = labelling.next(who, "compare")
            if screen is None:
                return None
            labelling.judge(who, screen.id, NewVote("left", token=token()))
            return store.judgements()[-1].item_id

        one, held = vote(ann), labelling.next(bo, "compare")
        assert held is not None  # bo has the first item before him, and so it is full
        clock.time += timedelta(minutes=1)
        assert vote(cy) != one
        labelling.skip(bo, held.id, "")  # now it is free again, behind the place where cy is
        assert len({one, vote(cy)}) == 2
        assert vote(cy) == one
        assert vote(cy) is None
        assert vote(ann) != one
        with store.session() as session:
            pair = session.responses("p0")[0].id, session.add_responses("p0", [Completion("new")], "m")[0]
            (new,) = session.add_comparisons([pair], 1, "urgent")
        manage.put_first("urgent", "compare", "admin")
        assert vote(ann) == new
        assert {first, second, third} >= {vote(ann)}


def test_a_file_that_is_written_at_once_is_sent_whole() -> None:
    """Also where it comes, gets its name and is ended between two looks at the folder."""
    for k in range(30):

        def write(folder: Path, wanted: Callable[[], bool], wait: float = k / 1000) -> None:
            time.sleep(wait)
            (folder / ".x.tmp").write_bytes(b"abc")
            (folder / ".x.tmp").replace(folder / "x")

        assert b"".join(Spool(write)) == b"abc"
