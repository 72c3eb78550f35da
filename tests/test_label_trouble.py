"""What the server answers when its database is in trouble, what is sent twice, leases that are renewed, and the arena's
places and attempts. On both databases where the store has a part in it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from datetime import timedelta
from pathlib import Path

import pytest
import uvicorn
from alembic import command
from databases import Clock
from label_server import postgres_that_stops, sqlite_that_locks
from labelling_world import World, fake_sources, fill, person, token, words
from sqlalchemy import create_engine, event, insert, select
from sqlalchemy.exc import InterfaceError, ProgrammingError
from sqlalchemy.exc import TimeoutError as NoConnection
from waiting import eventually

from keel.store import Store, Unavailable, people_tables, tables
from keel.store.engine import alembic_config, parse_url
from keel.store.people import Account
from keel.store.records import NewVote, NewWriting
from keel.types import Message, UserError
from keel.web.app.create import RETRY_SECONDS, create_app
from keel.web.app.security import COOKIE
from keel.web.service.arena import Arena, Busy
from keel.web.service.labelling import Labelling
from keel.web.service.manage import Manage
from keel.web.service.people import People
from keel.web.service.sources import ArenaModel, Sources
from keel.web.service.start import name_of, prepare
from keel.web.service.streams import MOST_STREAMS, WAIT_SECONDS


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(new_url: Callable[[], str], clock: Clock) -> Iterator[Store]:
    with Store(new_url(), clock=clock) as store:
        yield store


# ----------------------------------------------------------------------------------------------- 503, and nothing else


Database = AbstractContextManager[tuple[str, Callable[[], None], Callable[[], None]]]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_trouble_with_the_database_is_503_for_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for place in ("engine", "store"):
        monkeypatch.setattr(f"keel.store.{place}.WAIT_SECONDS", 0.1)
    database: Database = sqlite_that_locks(tmp_path) if kind == "sqlite" else postgres_that_stops()
    with database as (url, take, give), Store(url) as store:
        world = World(store)
        client = world.client("ann")
        item = client.api("next", {"kind": "compare"}).json()["item"]
        vote = {"assignment": item["id"], "token": token(), "choice": "left"}
        invitation = world.people.invite("annotator", "keel")
        take()
        answers = [
            client.api("judge", vote),
            client.api("skip", {"assignment": item["id"], "token": token(), "kind": "compare"}),
            client.api("flag", {"assignment": item["id"], "token": token(), "text": "x"}),
            client.api("hold", {"assignments": [item["id"]]}),
            client.api("undo", {"kind": "compare"}),
            client.form("/account", password="a good long password"),  # forms tell their own refusals, not this one
        ]
        if kind == "postgresql":  # SQLite goes on reading
            answers += [client.get("/compare"), client.api("me", {}), client.get(f"/join/{invitation}")]
            answers[-2] = client.get("/api/me")
        assert [answer.status_code for answer in answers] == [503] * len(answers)
        for answer in answers:
            assert answer.headers["Retry-After"] == str(RETRY_SECONDS)
            assert "feedback" not in answer.text  # nor where the database is
            assert "127.0.0.1" not in answer.text
        give()
        assert client.api("judge", vote).status_code == 200
        assert client.api("judge", vote).status_code == 200
        assert [one.token for one in store.judgements()] == [vote["token"]]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NoConnection("QueuePool limit of size 10 overflow 30 reached"), 503),
        (InterfaceError("SELECT 1", {}, Exception("connection already closed")), 503),
        (ProgrammingError("SELECT 1", {}, Exception("syntax error")), 500),  # Keel's own fault
        (MemoryError(), 500),
    ],
)
def test_other_troubles_never_look_like_a_refusal(tmp_path: Path, error: Exception, status: int) -> None:
    with Store(tmp_path / "feedback.db") as store:
        client = World(store).client("ann")
        item = client.api("next", {"kind": "compare"}).json()["item"]

        def fail(*_: object) -> None:
            if "INSERT INTO judgements" in str(_[2]):
                raise error

        event.listen(store._engine, "before_cursor_execute", fail)
        answer = client.api("judge", {"assignment": item["id"], "token": token(), "choice": "left"})
        assert answer.status_code == status
        event.remove(store._engine, "before_cursor_execute", fail)
        assert store.judgements() == []


def test_a_full_disk_is_503(tmp_path: Path) -> None:
    with Store(tmp_path / "feedback.db") as store:
        world = World(store)
        client = world.client("ann")
        item = client.api("next", {"kind": "compare"}).json()["item"]

        def no_page_more(connection, _: object) -> None:  # type: ignore[no-untyped-def]
            connection.execute("PRAGMA max_page_count = 1")

        event.listen(store._engine, "connect", no_page_more)
        store._engine.dispose()
        body = {"assignment": item["id"], "token": token(), "choice": "left", "reason": "x" * 50_000}
        answer = client.api("judge", body)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, str(RETRY_SECONDS))
        event.remove(store._engine, "connect", no_page_more)
        store._engine.dispose()
        assert client.api("judge", body).status_code == 200


def test_the_command_line_still_says_it_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel.store.store.WAIT_SECONDS", 0.1)
    monkeypatch.setattr("keel.store.engine.WAIT_SECONDS", 0.1)
    with sqlite_that_locks(tmp_path) as (url, take, give), Store(url) as store:
        take()
        with pytest.raises(Unavailable, match="database is locked; nothing of this step was kept") as raised:
            store.add_guideline("1")
        assert isinstance(raised.value, UserError)
        give()


# ------------------------------------------------------------------------------------------- sent twice, counted once


def test_a_skip_sent_again_after_an_undo_skips_nothing(store: Store) -> None:
    fill(store, 3)
    prepare(store)
    labelling, ann = Labelling(store), person(store, "ann")
    item = labelling.next(ann, "compare")
    assert item is not None
    labelling.skip(ann, item.id, "", "skip-token-1")
    back = labelling.undo(ann, "compare")
    assert back is not None
    assert back.id == item.id
    labelling.skip(ann, item.id, "", "skip-token-1")  # its answer was lost: the browser sends it again
    again = labelling.next(ann, "compare")
    assert again is not None
    assert again.id == item.id
    labelling.skip(ann, item.id, "", "skip-token-2")
    assert [event.action for event in store.events()].count("skipped") == 2


@pytest.mark.parametrize("how", ["vote", "skip"])
def test_an_undo_sent_again_takes_back_nothing_else(store: Store, how: str) -> None:
    fill(store, 3)
    prepare(store)
    labelling, ann = Labelling(store), person(store, "ann")
    ids = hold_all(store, ann)
    for id in ids:
        if how == "skip":
            labelling.skip(ann, id, "", token())
        else:
            labelling.judge(ann, id, NewVote("tie", token=token()))
    for _ in range(3):  # its answer was lost
        back = labelling.undo(ann, "compare", ids[-1])
        assert back is not None
        assert back.id == ids[-1]
    states = [event.action for event in store.events()]
    assert states.count("undone") + states.count("unskipped") == 1
    with pytest.raises(UserError, match="not yours"):
        labelling.undo(person(store, "bo"), "compare", ids[0])
    first = labelling.undo(ann, "compare", ids[0])
    assert first is not None
    assert first.id == ids[0]


def test_a_store_has_a_name_of_its_own(new_url: Callable[[], str]) -> None:
    names = []
    for url in (new_url(), new_url()):
        with Store(url) as store:
            names += [name_of(store), name_of(store)]
    assert names[0] == names[1]
    assert names[2] == names[3]
    assert names[0] != names[2]


# --------------------------------------------------------------------------------------------------------------- leases


def hold_all(store: Store, who: Account, kind: str = "compare") -> list[str]:
    labelling, held = Labelling(store), []
    while (item := labelling.next(who, kind, held)) is not None:  # type: ignore[arg-type]
        held.append(item.id)
    return held


def test_a_lease_that_is_renewed_does_not_run_out_and_not_for_ever(store: Store, clock: Clock) -> None:
    fill(store, 2)
    prepare(store)
    labelling, ann, bo = Labelling(store), person(store, "ann"), person(store, "bo")
    held = hold_all(store, ann)
    began = clock.time
    while clock.time < began + timedelta(hours=11, minutes=20):
        clock.time += timedelta(minutes=20)
        assert sorted(labelling.hold(ann, held).held) == sorted(held)
        assert labelling.next(bo, "compare") is None
    for _ in range(3):  # twelve hours are enough
        labelling.hold(ann, held)
        clock.time += timedelta(minutes=20)
    assert len(hold_all(store, bo)) == 2
    assert labelling.hold(ann, held).held == ()


def test_a_lease_that_was_given_back_is_taken_again_while_there_is_a_slot(store: Store, clock: Clock) -> None:
    fill(store, 2)
    prepare(store)
    labelling, ann, bo = Labelling(store), person(store, "ann"), person(store, "bo")
    held = hold_all(store, ann)
    clock.time += timedelta(minutes=31)
    taken = labelling.next(bo, "compare")  # both of ann's are given back, and one of them goes to bo
    assert taken is not None
    assert labelling.hold(bo, held).held == ()  # they are ann's, not bo's
    kept = labelling.hold(ann, held).held
    assert len(kept) == 1
    assert labelling.next(bo, "compare", [taken.id]) is None
    labelling.judge(ann, kept[0], NewVote("tie", token=token()))
    found = labelling.hold(ann, held)
    assert (found.held, found.done) == ((), kept)


@pytest.mark.parametrize("kind", ["write", "edit"])
def test_a_reply_that_took_too_long_counts_beside_the_other_one(store: Store, clock: Clock, kind: str) -> None:
    fill(store, 1)
    prepare(store)
    manage, labelling = Manage(store), Labelling(store)
    manage.ask_for_writing(1, 1, "test") if kind == "write" else manage.ask_for("edit", 1, 1, "test")
    people = [person(store, name) for name in ("ann", "bo")]
    for who in people:  # the second one gets it when the first one's lease is over
        (id,) = hold_all(store, who, kind)
        clock.time += timedelta(minutes=31)
        if who.name == "ann":
            late = id
    labelling.write(people[1], id, NewWriting("bo's reply", token=token()))
    mine = token()
    labelling.write(people[0], late, NewWriting("forty minutes of ann's", token=mine, seconds=2400.0))
    labelling.write(people[0], late, NewWriting("forty minutes of ann's", token=mine, seconds=2400.0))
    written = [one.messages[-1].content for one in store.demonstrations()]
    assert written == ["bo's reply", "forty minutes of ann's"]
    with store.transaction(writes=False) as connection:
        item = connection.execute(select(tables.items).where(tables.items.c.kind == kind)).one()
    assert (item.overlap, item.taken) == (2, 2)
    changed = [event for event in store.events() if (event.action, event.entity) == ("changed", "item")]
    assert [(event.old["overlap"], event.new["overlap"]) for event in changed] == [(1, 2)]


# -------------------------------------------------------------------------------------------------------------- arena


def test_an_older_arena_is_upgraded_and_keeps_its_turns(new_url: Callable[[], str]) -> None:
    url = new_url()
    engine = create_engine(parse_url(url))
    now = Clock()()
    with engine.begin() as connection:
        command.upgrade(alembic_config(connection), "0003")
        who = {"id": 1, "name": "ann", "kind": "person", "role": "annotator", "created": now}
        connection.execute(insert(tables.annotators), who)
        connection.exec_driver_sql(
            "INSERT INTO conversations (id, annotator_id, model_left, model_right, created) VALUES "
            "(1, 1, 'a', 'b', '2026-11-01 12:00:00')"
        )
        connection.exec_driver_sql(
            'INSERT INTO turns (conversation_id, number, message, "left", "right", created) VALUES '
            "(1, 1, 'hello', 'hi', 'ho', '2026-11-01 12:00:00')"
        )
    engine.dispose()
    with Store(url) as store, store.transaction(writes=False) as connection:
        turn = connection.execute(select(people_tables.turns)).one()
        assert (turn.message, turn.left, turn.right, turn.attempt, turn.token) == ("hello", "hi", "ho", 1, None)


class Told:
    """Two models that answer when they are told to, a word of which attempt it is."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.go: dict[str, threading.Event] = {}
        self.models = [ArenaModel(name, self.reply) for name in ("one", "two")]

    def reply(self, messages: Sequence[Message]) -> Iterator[str]:
        message = messages[-1].content
        self.asked.append(message)
        yield "to "
        self.go.setdefault(message, threading.Event()).wait(20)
        yield message

    def tell(self, message: str) -> None:
        self.go.setdefault(message, threading.Event()).set()


def turns(arena: Arena, who: Account) -> list[tuple[str, str | None, str | None]]:
    shown = arena.current(who)
    assert shown is not None
    return [(turn.message, turn.left, turn.right) for turn in shown.turns]


def test_an_answer_belongs_to_its_attempt(store: Store) -> None:
    prepare(store)
    told, ann = Told(), person(store, "ann")
    arena = Arena(store, told.models)
    id = arena.start(ann)
    first = arena.say(ann, id, "first")
    pieces = iter(first)
    assert next(pieces)[1] == "to "
    second = arena.say(ann, id, "second")  # in another window, say: the one before it ends
    assert list(pieces) == []
    assert "another window" in first.why
    told.tell("second")
    assert {piece for _, piece in second} == {"to ", "second", ""}
    told.tell("first")  # a model that comes late
    time.sleep(0.2)
    assert turns(arena, ann) == [("second", "to second", "to second")]


def test_the_store_itself_drops_an_answer_of_an_earlier_attempt(store: Store) -> None:
    from keel.store import arena

    prepare(store)
    ann = person(store, "ann").annotator_id
    with store.transaction(writes=True) as c:
        id = arena.start(c, ann, "a", "b", store.now)
        one = arena.say(c, id, ann, "what is a keel?", token="a-token-1", number=1, now=store.now)
        assert arena.answer(c, id, one.turns[-1], "left", "early")
        two = arena.say(c, id, ann, "what is a mast?", token="a-token-2", number=1, now=store.now)
        assert not arena.answer(c, id, one.turns[-1], "right", "a keel is")
        assert arena.answer(c, id, two.turns[-1], "right", "a mast is")
        found = arena.conversation(c, id, ann).turns
        assert [(turn.message, turn.left, turn.right) for turn in found] == [("what is a mast?", None, "a mast is")]
        arena.start(c, ann, "a", "b", store.now)  # the conversation is given up
        assert not arena.answer(c, id, two.turns[-1], "left", "too late")


def test_a_message_that_is_sent_again_is_the_same_turn(store: Store) -> None:
    prepare(store)
    ann, arena = person(store, "ann"), Arena(store, [words("one"), words("two")])
    id = arena.start(ann)
    first = list(arena.say(ann, id, "hello", "a-token-1", 1))
    again = list(arena.say(ann, id, "hello", "a-token-1", 1))  # the answer to it was lost on its way
    joined = [{side: "".join(p for s, p in said if s == side) for side in ("left", "right")} for said in (first, again)]
    assert joined[0] == joined[1]
    assert turns(arena, ann) == [("hello", "I heard: hello (1)", "I heard: hello (1)")]
    with pytest.raises(UserError, match="another window"):
        arena.say(ann, id, "something else", "a-token-2", 1)  # a page that has not seen the first turn
    list(arena.say(ann, id, "hello", "a-token-2", 2))  # the same words once more are a message of their own
    assert len(turns(arena, ann)) == 2
    with pytest.raises(UserError, match="another window"):
        arena.vote(ann, id, "left", "vote-token", None, 1)
    assert arena.vote(ann, id, "left", "vote-token", None, 2).names is not None


def test_a_vote_waits_for_the_answers(store: Store) -> None:
    prepare(store)
    told, ann = Told(), person(store, "ann")
    arena = Arena(store, told.models)
    id = arena.start(ann)
    told.tell("one")
    list(arena.say(ann, id, "one"))
    stream = arena.say(ann, id, "two")
    pieces = iter(stream)
    next(pieces)
    with pytest.raises(UserError, match="still answering"):
        arena.vote(ann, id, "left", "vote-token", None)
    told.tell("two")
    list(pieces)
    arena.vote(ann, id, "left", "vote-token", None)


def test_an_answer_that_cannot_be_kept_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise Unavailable("the disk is full")

    with Store(tmp_path / "feedback.db") as store:
        prepare(store)
        ann, arena = person(store, "ann"), Arena(store, [words("one"), words("two")])
        id = arena.start(ann)
        with monkeypatch.context() as patch:
            patch.setattr("keel.store.arena.answer", fail)
            began = time.monotonic()
            pieces = list(arena.say(ann, id, "hello"))
            assert time.monotonic() - began < WAIT_SECONDS  # nobody waits for what will not come
        assert not {("left", ""), ("right", "")} <= set(pieces)
        list(arena.say(ann, id, "hello"))
        assert turns(arena, ann) == [("hello", "I heard: hello (1)", "I heard: hello (1)")]


def test_places_are_for_people_and_come_back_at_once(tmp_path: Path) -> None:
    with Store(tmp_path / "feedback.db") as store:
        prepare(store)
        told = Told()
        arena = Arena(store, told.models)
        crowd = [person(store, f"person {n}") for n in range(MOST_STREAMS + 1)]
        last = crowd.pop()
        held = []
        for _ in range(MOST_STREAMS + 2):  # one person with many windows
            held.append(arena.say(crowd[0], arena.start(crowd[0]), "mine"))
        held = [arena.say(who, arena.start(who), "mine") for who in crowd]
        id = arena.start(last)
        with pytest.raises(Busy):
            arena.say(last, id, "let me in")
        assert turns(arena, last) == []  # what was refused is no turn
        next(iter(held[3]))  # one that is being read, whose model hangs, and whose reader goes
        held[3].close()
        mine = arena.say(last, id, "let me in")
        with pytest.raises(Busy):
            arena.say(crowd[3], arena.start(crowd[3]), "again")
        held.pop(4)  # one that is never begun
        again = arena.say(crowd[3], arena.start(crowd[3]), "again")
        told.tell("mine")  # and one whose models are done, though nobody has read it to the end
        eventually(lambda: not held[0].running)
        more = arena.say(crowd[4], arena.start(crowd[4]), "more")
        for stream in (mine, again, more):
            stream.close()


def test_a_browser_that_goes_away_gives_its_place_back_though_the_model_hangs(tmp_path: Path) -> None:
    with Store(tmp_path / "feedback.db") as store:
        prepare(store)
        told = Told()
        app = create_app(store, Sources(arena=told.models))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        eventually(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        door = People(store)

        def say(name: str) -> http.client.HTTPConnection:
            who = person(store, name)
            cookie = door.start_session(who)
            session = door.session(cookie)
            assert session is not None
            headers = {"Cookie": f"{COOKIE}={cookie}", "X-CSRF": session.csrf, "Content-Type": "application/json"}
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("POST", "/api/arena", "{}", headers)
            id = json.loads(connection.getresponse().read())["id"]
            connection.request("POST", f"/api/arena/{id}/say", json.dumps({"message": "hang"}), headers)
            return connection

        connections = [say(f"person {n}") for n in range(MOST_STREAMS)]
        answers = [connection.getresponse() for connection in connections]
        for answer in answers:
            assert answer.status == 200
            assert answer.read(1) == b"{"
        with closing(say("late")) as late:
            answer = late.getresponse()
            assert (answer.status, answer.headers["Retry-After"]) == (503, str(RETRY_SECONDS))
        for connection, answer in zip(connections, answers, strict=True):  # the windows go; the models still hang
            answer.close()
            connection.close()
        eventually(lambda: not any(one.running for one in app.state.services.arena._places._of.values()))
        with closing(say("later")) as later:
            assert later.getresponse().status == 200
        told.tell("hang")
        server.should_exit = True
        thread.join(10)


def test_the_answers_of_the_arena_over_http_end_with_why(tmp_path: Path) -> None:
    with Store(tmp_path / "feedback.db") as store:
        world = World(store)
        client = world.client("ann")
        id = client.api("arena", {}).json()["id"]
        said = client.api(f"arena/{id}/say", {"message": "hello", "token": "a-token-1", "turn": 1})
        lines = [json.loads(line) for line in said.text.splitlines()]
        assert {line["side"] for line in lines if "html" in line} == {"left", "right"}
        stale = client.api(f"arena/{id}/say", {"message": "more", "token": "a-token-2", "turn": 1})
        assert stale.status_code == 400
        assert "another window" in stale.json()["error"]
        assert fake_sources().arena[0].name not in said.text
