"""The feedback store, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pg_server
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from databases import Clock
from sqlalchemy import create_engine, insert, inspect, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError

import keel.store.api_tables  # noqa: F401 (its tables belong to the metadata)
from keel.data.sources import read_preferences
from keel.recipe.sections import SamplingConfig
from keel.store import Assignment, Judgement, LeaseLost, Store, exchange, review, tables
from keel.store.engine import VERSION_TABLE, alembic_config, parse_url
from keel.store.records import NewVote
from keel.store.settled import settle
from keel.types import Completion, Message, Preference, Prompt, UserError


@pytest.fixture
def url(new_url: Callable[[], str]) -> str:
    return new_url()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store(url) as store:
        yield store


def prompt(name: str = "p", content: str = "Who keeps the light?") -> Prompt:
    return Prompt(name, (Message("user", content),), kind="fact", meta={"answer": ["Ann"], "n": 1.5})


def add_items(store: Store, count: int, overlap: int = 1, batch: str = "") -> list[int]:
    with store.session() as s:
        pairs = []
        for i in range(count):
            s.add_prompts([prompt(f"{batch}p{i}", f"{batch} question {i}")])
            replies = [Completion(f"good {i}"), Completion(f"bad {i}", finished=False)]
            first, second = s.add_responses(f"{batch}p{i}", replies, "runs/sft", SamplingConfig(top_k=5), "abc")
            pairs.append((first, second))
        return s.add_comparisons(pairs, overlap, batch)


def must(assignment: Assignment | None) -> Assignment:
    assert assignment is not None
    return assignment


def judge(store: Store, annotator: int, token: str, choice: str = "left", strength: int | None = None) -> int:
    assignment = must(store.next_assignment(annotator))
    return store.submit(assignment.id, NewVote(choice, token=token, strength=strength))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- migrations


def test_tables_of_the_code_are_those_of_the_migrations(store: Store) -> None:
    with store._engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, tables.metadata) == []
        checks = {
            name: {c["name"] for c in inspect(connection).get_check_constraints(name)}
            for name in ("items", "judgements")
        }
    assert checks == {"items": {"ck_items_taken"}, "judgements": {"ck_judgements_choice"}}


def test_an_older_schema_is_upgraded_and_keeps_its_rows(url: str) -> None:
    engine = create_engine(parse_url(url))
    with engine.begin() as connection:
        command.upgrade(alembic_config(connection), "0001")
        row = {
            "at": Clock()(),
            "actor": "a",
            "action": "b",
            "entity": "c",
            "entity_id": "d",
            "old": None,
            "new": {"x": 1},
        }
        connection.execute(insert(tables.events), row)
    engine.dispose()
    with Store(url) as store:
        assert [(e.actor, e.new) for e in store.events()] == [("a", {"x": 1})]
        with pytest.raises(DBAPIError, match="append-only"), store._engine.begin() as connection:
            connection.execute(text("DELETE FROM events"))
    with Store(url) as store:  # and opens again as it is
        assert len(store.events()) == 1


def test_what_an_older_store_holds_gets_handles_and_an_order(url: str) -> None:
    engine = create_engine(parse_url(url))
    now = Clock()()
    with engine.begin() as connection:
        command.upgrade(alembic_config(connection), "0003")
        prompt = {"id": "p", "messages": [], "kind": "", "meta": {}, "created": now}
        connection.execute(insert(tables.prompts), prompt)
        who = {"id": 1, "name": "ann", "kind": "person", "role": "annotator", "created": now}
        connection.execute(insert(tables.annotators), who)
        for number in range(1, 9):
            connection.execute(
                text(
                    "INSERT INTO items (id, prompt_id, batch, key, overlap, taken, created, kind) "
                    "VALUES (:id, 'p', :batch, :key, 1, 1, :now, 'write')"
                ),
                {"id": number, "batch": "ab"[number > 4], "key": f"write/{number}", "now": now},
            )
            connection.execute(
                text(
                    "INSERT INTO assignments (id, item_id, annotator_id, shown, state, leased_at, expires_at) "
                    "VALUES (:id, :id, 1, '[]', 'judged', :now, :now)"
                ),
                {"id": number, "now": now},
            )
    engine.dispose()
    with Store(url) as store, store.transaction(writes=False) as connection:
        handles = list(connection.execute(select(tables.assignments.c.handle)).scalars())
        places = list(connection.execute(select(tables.items.c.place).order_by(tables.items.c.id)).scalars())
    assert len(set(handles)) == 8
    assert {len(handle) for handle in handles} == {22}
    assert [int(place) for place in places] == [0] * 4 + [1] * 4  # the older queue first
    assert len({place % 1 for place in places}) == 8


def test_a_foreign_database_and_a_newer_one_are_refused_untouched(new_url: Callable[[], str]) -> None:
    foreign, newer = new_url(), new_url()
    engine = create_engine(parse_url(foreign))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE customers (id INTEGER)"))
    with pytest.raises(UserError, match=r"customers.*no Keel store"):
        Store(foreign)
    with engine.connect() as connection:
        assert inspect(connection).get_table_names() == ["customers"]
        if engine.dialect.name == "sqlite":
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "delete"
    engine.dispose()
    Store(newer).close()
    engine = create_engine(parse_url(newer))
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(UserError, match=r"newer Keel \(schema 9999\)"):
        Store(newer)


def test_opening_at_once_from_many_threads_migrates_once(url: str) -> None:
    failures: list[BaseException] = []

    def open_it() -> None:
        try:
            Store(url).close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("mysql://u:secret@h/db", "mysql is not supported"),
        ("sqlite://", "names no file"),
        ("sqlite:////nowhere/at/all/x.db", "/nowhere/at/all does not exist"),
        ("postgresql://u:secret@127.0.0.1:1/db", "refused"),
    ],
)
def test_a_store_that_cannot_be_opened_says_why(location: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Store(location)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.db"
    file.write_text("these are my notes, not a database\n" * 100)
    before = file.read_bytes()
    with pytest.raises(UserError, match="not a database"):
        Store(file)
    assert file.read_bytes() == before


# ------------------------------------------------------------------------------------------------- what goes in


def test_prompts_and_responses_come_back_as_they_went_in(store: Store) -> None:
    asked = Prompt("x", (Message("system", "be brief"), Message("user", "né 🚢\n?")), "fact", {"a": [1, {"b": None}]})
    store.add_prompts([asked, asked])
    replies = [Completion("one"), Completion("two", finished=False), Completion("nul \0 and \ud800 here")]
    ids = store.add_responses("x", replies, "runs/sft", SamplingConfig(temperature=0.7), fingerprint="f00")
    assert store.prompts() == [asked]
    stored = store.responses("x")
    assert [r.id for r in stored] == ids
    assert [r.text for r in stored] == ["one", "two", "nul \ufffd and \ufffd here"]
    assert [r.finished for r in stored] == [True, False, True]
    assert {(r.model, r.fingerprint) for r in stored} == {("runs/sft", "f00")}
    assert stored[0].sampling == SamplingConfig(temperature=0.7).model_dump()
    # the same again is the same; another model's equal text is not
    assert store.add_responses("x", replies, "runs/sft", SamplingConfig(temperature=0.7), fingerprint="f00") == ids
    assert store.add_responses("x", replies[:1], "runs/other")[0] not in ids


def test_a_prompt_keeps_its_messages_and_may_change_its_meta(store: Store) -> None:
    store.add_prompts([prompt()])
    store.add_prompts([Prompt("p", prompt().messages)])  # says nothing new
    assert store.prompts() == [prompt()]
    store.add_prompts([Prompt("p", prompt().messages, kind="fact", meta={"answer": "Bo"})])
    assert store.prompts()[0].meta == {"answer": "Bo"}
    assert store.events()[-1].old == {"meta": {"answer": ["Ann"], "n": 1.5}}
    with pytest.raises(UserError, match="'p' already exists with other messages"):
        store.add_prompts([prompt(content="Something else?")])
    with pytest.raises(UserError, match=r"meta of prompt 'q'.*JSON"):
        store.add_prompts([Prompt("q", prompt().messages, meta={"bad": {1, 2}})])


def test_impossible_comparisons_are_refused(store: Store) -> None:
    add_items(store, 2)
    ids = [response.id for response in store.responses()]
    with pytest.raises(UserError, match="response 999"):
        store.add_comparisons([(ids[0], 999)])
    with pytest.raises(UserError, match="of one prompt"):
        store.add_comparisons([(ids[0], ids[2])])
    with pytest.raises(UserError, match="two different"):
        store.add_comparisons([(ids[0], ids[0])])
    with pytest.raises(UserError, match="prompt 'nobody'"):
        store.add_responses("nobody", [Completion("x")], "m")
    with pytest.raises(UserError, match="annotator 77 is not in the store"):
        store.next_assignment(77)
    with pytest.raises(UserError, match="overlap is 0"):
        store.add_comparisons([(ids[0], ids[1])], overlap=0)


def test_a_pair_is_one_item_either_way_round_and_batches_do_not_mix(store: Store) -> None:
    (item,) = add_items(store, 1, overlap=1)
    first, second = (response.id for response in store.responses())
    assert store.add_comparisons([(second, first), (first, second)], overlap=3) == [item, item]
    assert store.add_comparisons([(first, second)], overlap=1) == [item]  # never lowered
    assert store.progress().wanted == 3
    (other,) = store.add_comparisons([(first, second)], batch="b")
    annotator = store.add_annotator("ann")
    assert must(store.next_assignment(annotator, batch="b")).item_id == other
    assert store.next_assignment(annotator, batch="c") is None


def test_a_session_is_kept_whole_or_not_at_all(store: Store) -> None:
    def fails_halfway() -> None:
        with store.session() as s:
            s.add_prompts([prompt()])
            assert s.prompts() == [prompt()]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails_halfway()
    assert store.prompts() == []
    assert store.events() == []


# -------------------------------------------------------------------------------------------------------- the queue


def test_an_annotator_gets_each_item_once_and_holds_it_until_judged(store: Store) -> None:
    items = add_items(store, 3, overlap=2)
    ann, bo, cy = (store.add_annotator(name) for name in ("ann", "bo", "cy"))
    held = must(store.next_assignment(ann))
    assert must(store.next_assignment(ann)) == held
    ahead = must(store.next_assignment(ann, holding=[held.handle]))
    assert ahead.item_id != held.item_id
    assert held.prompt == prompt("p0", " question 0")
    assert sorted(held.shown) == ["bad 0", "good 0"] == sorted([held.left, held.right])
    for annotator in (ann, bo, cy):
        seen = []
        while (assignment := store.next_assignment(annotator)) is not None:
            seen.append(assignment.item_id)
            store.submit(assignment.id, NewVote("tie", token=uuid.uuid4().hex))
        assert seen == ([] if annotator == cy else items)  # two slots: nothing is left for the third
    assert store.progress().open == 0


def test_sides_are_random_remembered_and_the_same_for_a_seed(new_url: Callable[[], str]) -> None:
    runs = []
    for seed in (0, 0, 1):
        with Store(new_url(), seed=seed) as store:
            add_items(store, 60)
            annotator = store.add_annotator("sim", "simulated")
            shown = []
            with store.session() as s:
                while (assignment := s.next_assignment(annotator, seeded=True)) is not None:
                    shown.append(assignment.left.startswith("good"))
                    s.submit(assignment.id, NewVote("left", token=str(assignment.id)))
            votes = store.judgements()
            assert [vote.left.text.startswith("good") for vote in votes] == shown
            assert all(vote.preferred == vote.left for vote in votes)
            runs.append(shown)
    assert runs[0] == runs[1] != runs[2]
    assert 18 <= sum(runs[0]) <= 42  # 60 fair coins: outside this range with probability below 0.002


def test_only_simulated_annotators_get_sides_that_follow_from_a_seed(store: Store) -> None:
    add_items(store, 1)
    person = store.add_annotator("ann")
    for who, said in ((person, "no simulated one"), (person + 1, "not in the store")):
        with pytest.raises(UserError, match=said):
            store.next_assignment(who, seeded=True)


def test_submitting_twice_counts_once(store: Store) -> None:
    add_items(store, 2)
    annotator = store.add_annotator("ann")
    assignment = must(store.next_assignment(annotator))
    first = store.submit(assignment.id, NewVote("left", token="t", strength=3))
    assert store.submit(assignment.id, NewVote("left", token="t", strength=3)) == first
    with pytest.raises(UserError, match="judged already"):
        store.submit(assignment.id, NewVote("right", token="another"))
    with pytest.raises(UserError, match="used for another assignment"):
        store.submit(must(store.next_assignment(annotator)).id, NewVote("left", token="t"))
    assert len(store.judgements()) == 1
    assert Counter(event.action for event in store.events())["judged"] == 1


@pytest.mark.parametrize(
    ("vote", "message"),
    [
        ({"choice": "up"}, "choice 'up'"),
        ({"choice": "tie", "strength": 1}, "strength 1"),
        ({"choice": "left", "strength": 4}, "strength 4"),
        ({"choice": "left", "seconds": -1.0}, "seconds is -1"),
        ({"choice": "left", "seconds": float("nan")}, "seconds is nan"),
        ({"choice": "left", "token": ""}, "token is empty"),
        ({"choice": "left", "guideline": "7"}, "guideline '7'"),
    ],
)
def test_impossible_votes_are_refused(store: Store, vote: dict, message: str) -> None:
    add_items(store, 1)
    assignment = must(store.next_assignment(store.add_annotator("ann")))
    with pytest.raises(UserError, match=message):
        store.submit(assignment.id, NewVote(**({"token": "t"} | vote)))
    assert store.judgements() == []


def test_a_lease_that_ran_out_goes_to_somebody_else(url: str) -> None:
    clock = Clock()
    with Store(url, lease=timedelta(minutes=10), clock=clock) as store:
        add_items(store, 1)
        ann, bo = store.add_annotator("ann"), store.add_annotator("bo")
        late = must(store.next_assignment(ann))
        clock.time += timedelta(minutes=9)
        assert store.next_assignment(bo) is None
        clock.time += timedelta(minutes=2)
        taken = must(store.next_assignment(bo))
        assert taken.item_id == late.item_id
        with pytest.raises(LeaseLost):
            store.submit(late.id, NewVote("left", token="late"))
        store.submit(taken.id, NewVote("left", token="in time"))
        assert [vote.annotator for vote in store.judgements()] == ["bo"]


def test_a_late_vote_counts_while_the_slot_is_free_and_sides_stay(url: str) -> None:
    clock = Clock()
    with Store(url, lease=timedelta(minutes=10), clock=clock) as store:
        add_items(store, 1)
        ann, bo = store.add_annotator("ann"), store.add_annotator("bo")
        first = must(store.next_assignment(ann))
        clock.time += timedelta(minutes=11)
        must(store.next_assignment(bo))  # ann's lease is reclaimed and given to bo ...
        clock.time += timedelta(minutes=11)
        again = must(store.next_assignment(ann))  # ... and comes back when bo's runs out
        assert (again.id, again.shown) == (first.id, first.shown)
        clock.time += timedelta(minutes=11)
        store.submit(again.id, NewVote("left", token="late"))  # nobody wanted it meanwhile
        assert store.next_assignment(bo) is None
        assert store.progress().judged == 1


def test_undo_gives_the_assignment_back_and_keeps_the_row(store: Store) -> None:
    add_items(store, 2)
    annotator = store.add_annotator("ann")
    judgement = judge(store, annotator, "t1", "left", 2)
    back = store.undo(judgement)
    assert store.judgements() == []
    assert (store.progress().judged, store.progress().undone) == (0, 1)
    assert must(store.next_assignment(annotator)).id == back.id
    assert store.submit(back.id, NewVote("left", token="t1")) == judgement  # an old vote that comes late stays undone
    assert store.judgements() == []
    store.submit(back.id, NewVote("right", token="t2"))
    assert [vote.choice for vote in store.judgements()] == ["right"]
    with pytest.raises(UserError, match="taken back already"):
        store.undo(judgement)
    log = [(e.actor, e.action, e.old and e.old["choice"], e.new and e.new["choice"]) for e in store.events()[-3:]]
    assert log == [("ann", "judged", None, "left"), ("ann", "undone", "left", None), ("ann", "judged", None, "right")]


@pytest.mark.parametrize("overlap", [1, 3])
def test_threads_racing_for_the_last_slots_never_exceed_the_overlap(url: str, overlap: int) -> None:
    with Store(url) as store:
        items = add_items(store, 4, overlap)
        annotators = [store.add_annotator(f"a{i}") for i in range(8)]
        start = threading.Barrier(len(annotators))
        failures: list[BaseException] = []

        def work(annotator: int) -> None:
            try:
                start.wait()
                while (assignment := store.next_assignment(annotator)) is not None:
                    store.submit(assignment.id, NewVote("left", token=f"{annotator}/{assignment.id}"))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(annotator,)) for annotator in annotators]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        votes = store.judgements()
        assert Counter(vote.item_id for vote in votes) == dict.fromkeys(items, overlap)  # and no slot is left over
        assert len({(vote.item_id, vote.annotator) for vote in votes}) == len(votes)


def test_an_item_that_is_just_being_taken_is_waited_for_outside_a_session(store: Store) -> None:
    add_items(store, 1)
    ann, bo = store.add_annotator("ann"), store.add_annotator("bo")
    got: list[Assignment | None] = []
    waiter = threading.Thread(target=lambda: got.append(store.next_assignment(bo)))

    def takes_it_and_fails() -> None:
        with store.session() as taking:
            must(taking.next_assignment(ann))
            if store._engine.dialect.name == "postgresql":  # on SQLite a second writer could not even begin
                with store.session() as passing:
                    assert passing.next_assignment(bo) is None
            waiter.start()
            waiter.join(timeout=0.5)
            assert waiter.is_alive()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        takes_it_and_fails()
    waiter.join(timeout=20)
    assert must(got[0]).left in ("good 0", "bad 0")


def test_one_annotator_in_two_windows_gets_no_item_twice(store: Store) -> None:
    add_items(store, 6, overlap=2)
    annotator = store.add_annotator("ann")
    start = threading.Barrier(4)
    got: list[int] = []

    def work() -> None:
        mine: list[str] = []
        start.wait()
        while (assignment := store.next_assignment(annotator, holding=mine)) is not None and len(mine) < 10:
            mine.append(assignment.handle)
            got.append(assignment.id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store._engine.connect() as connection:
        rows = connection.execute(select(tables.items.c.taken)).scalars().all()
        assert rows == [1] * 6
    assert len(set(got)) == 6


def test_the_database_itself_refuses_what_the_code_must_not_do(store: Store) -> None:
    (item,) = add_items(store, 1)
    ann, bo = store.add_annotator("ann"), store.add_annotator("bo")
    judge(store, ann, "t")
    with pytest.raises(IntegrityError), store._engine.begin() as connection:
        connection.execute(update(tables.items).values(taken=2))
    row = {"item_id": item, "shown": [1, 2], "state": "judged", "leased_at": Clock()(), "expires_at": Clock()()}
    with pytest.raises(IntegrityError), store._engine.begin() as connection:
        connection.execute(insert(tables.assignments), row | {"annotator_id": ann})
    with pytest.raises(IntegrityError), store._engine.begin() as connection:
        connection.execute(insert(tables.assignments), row | {"annotator_id": bo, "item_id": 999})
    vote = {"assignment_id": 1, "token": "t2", "choice": "left", "created": Clock()()}
    with pytest.raises(IntegrityError), store._engine.begin() as connection:
        connection.execute(insert(tables.judgements), vote)  # a second standing judgement


def test_events_are_append_only(store: Store) -> None:
    add_items(store, 1)
    judge(store, store.add_annotator("ann"), "t")
    before = store.events()
    statements = ["UPDATE events SET actor = 'x'", "DELETE FROM events"]
    if store._engine.dialect.name == "sqlite":
        statements.append(
            "INSERT OR REPLACE INTO events (id, at, actor, action, entity, entity_id) "
            "VALUES (1, '2026-01-01', 'x', 'x', 'x', 'x')"
        )
    else:
        statements.append("TRUNCATE events")
    for statement in statements:
        with pytest.raises(DBAPIError, match="append-only"), store._engine.begin() as connection:
            connection.execute(text(statement))
    assert store.events() == before
    assert [(e.actor, e.action, e.entity) for e in before] == [
        ("keel", "added", "batch"),
        ("keel", "added", "annotator"),
        ("ann", "judged", "judgement"),
    ]
    assert before[-1].new["shown"] in ([1, 2], [2, 1])


def test_guidelines_do_not_change(store: Store) -> None:
    store.add_guideline("1", "Prefer the true one.")
    store.add_guideline("1")
    assert store.guideline("1") == "Prefer the true one."
    assert store.guideline("2") is None
    with pytest.raises(UserError, match="new version"):
        store.add_guideline("1", "Prefer the short one.")
    store.add_annotator("ann")
    with pytest.raises(UserError, match="'ann' already exists, as person"):
        store.add_annotator("ann", "simulated")


# ------------------------------------------------------------------------------------------------------ out and in


def filled(store: Store) -> None:
    """A store with every kind of vote."""
    add_items(store, 3, overlap=2, batch="one")
    add_items(store, 2, batch="two")
    store.add_guideline("1", "text")
    choices = itertools.cycle([("left", 3), ("right", 1), ("tie", None), ("both_bad", None), ("right", None)])
    for name, kind in (("ann", "person"), ("sim", "simulated")):
        annotator = store.add_annotator(name, kind)  # type: ignore[arg-type]
        for number in range(4):
            assignment = store.next_assignment(annotator)
            if assignment is None:
                break
            choice, strength = next(choices)
            store.submit(
                assignment.id,
                NewVote(
                    choice,
                    token=f"{name}{number}",
                    strength=strength,
                    seconds=1.25 * number or None,
                    guideline="1" if number else None,
                    reason='because\u2028of "this"\nand é' if number else None,
                ),
            )


def details(store: Store) -> list[dict]:
    """Every judgement with all that is known of it but the database's own numbers, items by their order."""
    rows = []
    items: dict[int, int] = {}
    for vote in store.judgements():
        (row,) = exchange._rows(vote)
        row["item"] = items.setdefault(vote.item_id, len(items))
        for source in ("chosen_source", "rejected_source"):
            del row[source]["created"]  # when the row was made, here or there
        rows.append(row)
    return rows


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_export_and_import_lose_nothing(new_url: Callable[[], str], tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"votes.{ending}"
    with Store(new_url()) as store, Store(new_url()) as copy:
        filled(store)
        assert store.export_preferences(file) == 8
        assert copy.import_preferences(exchange.read(file)) == 8
        assert details(copy) == details(store)
        assert copy.preferences() == store.preferences()
        assert {choice for row in details(copy) for choice in [row["choice"]]} == {"left", "right", "tie", "both_bad"}
        # once more adds nothing, here or there
        assert copy.import_preferences(exchange.read(file)) == 0
        assert store.import_preferences(exchange.read(file)) == 0
        assert copy.preferences() == store.preferences()
        assert copy.progress().open == 0
        assert Counter(event.action for event in copy.events())["imported"] == 8
        # the file is what every other reader of preference pairs expects
        plain = read_preferences(file)
        for read, pair in zip(plain, store.preferences(), strict=True):
            assert (read.id, read.chosen, read.rejected, read.tie) == (pair.id, pair.chosen, pair.rejected, pair.tie)
            assert (read.margin, read.annotator, read.prompt) == (pair.margin, pair.annotator, pair.prompt)
        # and only one batch goes out when one is asked for
        assert store.export_preferences(file, batch="two") == len(exchange.read(file)) == 2


def test_a_reviewers_word_goes_with_the_votes_out_and_in(new_url: Callable[[], str], tmp_path: Path) -> None:
    file, plain = tmp_path / "votes.jsonl", tmp_path / "plain.jsonl"
    with Store(new_url()) as store, Store(new_url()) as copy:
        filled(store)
        boss = store.add_annotator("boss")
        by_item: dict[int, list[Judgement]] = {}
        for vote in store.judgements():
            by_item.setdefault(vote.item_id, []).append(vote)
        first, second, *_ = by_item
        with store.transaction(writes=True) as connection:
            for item, word in ((first, "second"), (second, "tie")):
                review.adjudicate(connection, item, boss, "first", "too quick", "boss", store.now)
                review.adjudicate(connection, item, boss, word, None, "boss", store.now)
        later = {reply.id for reply in (by_item[first][0].left, by_item[first][0].right)}
        for vote in store.judgements():
            if vote.item_id == first:  # the word is told in terms of each vote's own sides
                assert {"left": vote.left, "right": vote.right}[vote.settled or ""].id == max(later)
            assert vote.settled_by == ("boss" if vote.item_id in (first, second) else None)
            assert (vote.settled == "tie") == (vote.item_id == second)
        assert store.export_preferences(file) == 8  # every raw vote
        assert copy.import_preferences(exchange.read(file)) == 8
        assert details(copy) == details(store)
        assert copy.preferences() == store.preferences()
        assert Counter(event.action for event in copy.events())["adjudicated"] == 2
        assert [p.settled for p in read_preferences(file)] == [p.settled for p in store.preferences()]
        # for tools that know no such column the word takes the place of the votes; a tie is left out
        expected = [p for p in settle(store.preferences()) if not p.tie]
        assert store.export_preferences(plain, plain=True) == len(expected)
        rows = [(p.prompt.messages, p.chosen, p.rejected) for p in read_preferences(plain)]
        assert rows == [(p.prompt.messages, p.chosen, p.rejected) for p in expected]
        (word_on_first,) = [p for p in expected if p.prompt == by_item[first][0].prompt]
        texts = {reply.id: reply.text for reply in (by_item[first][0].left, by_item[first][0].right)}
        assert word_on_first.chosen == texts[max(texts)]


def test_preference_pairs_of_others_are_kept_as_they_are(store: Store) -> None:
    pairs = [
        Preference("a", prompt("p"), "yes", "no", margin=0.25),
        Preference("b", prompt("p"), "yes", "no", annotator="ann"),
        Preference("c", prompt("p"), "no", "yes", annotator="ann"),  # changed her mind: both are kept
        Preference("d", prompt("p"), "yes", "no", tie=True, chosen_finished=False),
        Preference("d", prompt("q", "Why?"), "x", "y"),
    ]
    assert store.import_preferences(pairs) == 5
    back = store.preferences()
    assert [(p.chosen, p.rejected, p.tie, p.margin, p.chosen_finished) for p in back] == [
        (p.chosen, p.rejected, p.tie, p.margin, p.chosen_finished) for p in pairs
    ]
    assert [p.id for p in back] == ["a", "b", "c", "d", "d#2"]
    assert [p.annotator for p in back] == ["import", "ann", "ann#2", "import", "import"]
    assert store.import_preferences(pairs) == 0
    with pytest.raises(UserError, match="'a' is in the store with other contents"):
        store.import_preferences([Preference("a", prompt("p"), "yes", "maybe")])
    with pytest.raises(UserError, match="both responses are the same"):
        store.import_preferences([Preference("e", prompt("p"), "yes", "yes")])
    assert len(store.preferences()) == 5


def test_a_broken_export_names_file_and_row(tmp_path: Path, store: Store) -> None:
    file = tmp_path / "votes.jsonl"
    filled(store)
    store.export_preferences(file)
    lines = file.read_text(encoding="utf-8").split("\n")
    row = json.loads(lines[1])
    del row["chosen_side"]
    file.write_text("\n".join([lines[0], json.dumps(row)]), encoding="utf-8")
    with pytest.raises(UserError, match=r"votes.jsonl, row 2: KeyError 'chosen_side'"):
        exchange.read(file)
    with pytest.raises(UserError, match=r"\.jsonl, \.parquet, or a folder"):
        store.export_preferences(tmp_path / "votes.csv")
    with pytest.raises(UserError, match="nothing was written"):
        store.export_preferences(tmp_path / "no" / "votes.jsonl")
    with pytest.raises(UserError, match="can't be read"):
        exchange.read(tmp_path / "missing.jsonl")


# -------------------------------------------------------------------------------------------------------- kill -9

WRITER = """
import sys
from keel.store import NewVote, Store
store = Store(sys.argv[1])
annotator = store.add_annotator("ann")
while (assignment := store.next_assignment(annotator)) is not None:
    token = f"t{assignment.id}"
    store.submit(assignment.id, NewVote("left", token=token))
    print(token, flush=True)
"""


def test_a_killed_writer_loses_nothing_it_acknowledged(url: str) -> None:
    with Store(url) as store:
        items = add_items(store, 120)
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-c", WRITER, url]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        acknowledged = [process.stdout.readline().strip() for _ in range(25)]
        process.send_signal(signal.SIGKILL)
        acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
        process.wait()
        assert 25 <= len(acknowledged) < 120
        votes = store.judgements()
        assert {vote.token for vote in votes} >= set(acknowledged)
        assert len(votes) - len(acknowledged) in (0, 1)  # at most the one that was being acknowledged
        assert Counter(event.action for event in store.events())["judged"] == len(votes)
        # and the work goes on: the lease in hand comes back to its annotator, each item is judged once in the end
        annotator = store.add_annotator("ann")
        with store.session() as s:
            while (assignment := s.next_assignment(annotator)) is not None:
                s.submit(assignment.id, NewVote("left", token=f"t{assignment.id}"))
        assert [vote.item_id for vote in store.judgements()] == items


def test_sqlite_is_safe_against_power_cuts_and_lets_readers_read(tmp_path: Path) -> None:
    with Store(tmp_path / "a.db") as store:
        with store._engine.connect() as connection:
            pragmas = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            }
        assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30000}
        with store.session() as s:
            s.add_prompts([prompt()])
            assert store.prompts() == []  # reads what is committed, without waiting
        assert store.prompts() == [prompt()]


def test_a_locked_sqlite_file_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel.store.engine.WAIT_SECONDS", 0.1)
    with Store(tmp_path / "a.db") as store:
        other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UserError, match="database is locked"):
            store.add_prompts([prompt()])
        other.execute("ROLLBACK")
        other.close()
        store.add_prompts([prompt()])


def test_postgresql_may_not_be_skipped_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        return None

    monkeypatch.setattr(shutil, "which", nothing)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI must test PostgreSQL"):
        pg_server.server_or_skip()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="not installed"):
        pg_server.server_or_skip()
