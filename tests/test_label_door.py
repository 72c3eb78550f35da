"""Who comes in, and what is looked at before: links, guesses at passwords, forwarded addresses, bodies, and what
strangers are told."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from databases import Clock
from fastapi.testclient import TestClient
from labelling_world import PASSWORD, Client, World, person, portal
from sqlalchemy import update
from test_label_routes import LEAST, ask

from keel.cli.parser import parse
from keel.store import Store, Unavailable, people_tables
from keel.types import UserError
from keel.web.app import security
from keel.web.app.create import create_app
from keel.web.app.limits import SIGN_IN_ALL, SIGN_IN_NAME, Rate
from keel.web.app.pages import Door
from keel.web.app.proxies import networks
from keel.web.service import people as accounts
from keel.web.service.people import People


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with Store(tmp_path / "feedback.db") as store:
        yield World(store)


# --------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("change", [{"role": "reviewer"}, {"active": False}])
def test_links_die_with_the_rights_of_who_made_them(new_url: Callable[[], str], change: dict[str, Any]) -> None:
    with Store(new_url(), clock=Clock()) as store:
        door = People(store)
        for name in ("boss", "ann"):
            person(store, name, "admin")
        person(store, "bo")
        owner = door.owner_link()
        kept = door.invite("admin", "boss")
        made = [door.invite("admin", "ann"), door.way_in("bo", "ann"), door.way_in("boss", "ann")]
        assert all(door.link(secret) for secret in made)
        door.change("ann", "boss", **change)
        assert [door.link(secret) for secret in made] == [None] * 3
        assert door.enter(made[1]) is None
        with pytest.raises(UserError, match="ask for a new one"):
            door.accept(made[0], "Friend", PASSWORD)
        assert [row["made_by"] for row in door.invitations()] == ["boss"]
        assert door.link(kept) is not None
        assert door.link(owner) is not None
        ended = [e for e in store.events() if (e.action, e.entity) == ("withdrew", "link")]
        assert [e.actor for e in ended] == ["boss"] * 3
        for who in ({"role": "admin"}, {"active": True}):  # what is dead stays so
            door.change("ann", "boss", **who)  # type: ignore[arg-type]
        assert [door.link(secret) for secret in made] == [None] * 3
        with store.transaction(writes=True) as connection:  # a store in which they were left open by an older Keel
            connection.execute(update(people_tables.links).values(used_at=None))
        assert door.link(made[0]) is not None  # ann is an admin again; then without the store's own ending them:
        with store.transaction(writes=True) as connection:
            connection.execute(
                update(people_tables.accounts).where(people_tables.accounts.c.annotator_id == 2).values(active=False)
            )
        assert [door.link(secret) is None for secret in (made[0], kept, owner)] == [True, False, False]


def test_a_link_of_an_account_dies_with_its_rights_and_its_password(new_url: Callable[[], str]) -> None:
    with Store(new_url()) as store:
        door, bo = People(store), person(store, "bo")
        person(store, "boss", "admin")
        first = door.way_in("bo", "boss")
        door.change("bo", "boss", role="reviewer")
        second = door.way_in("bo", "boss")
        door.set_password(bo, PASSWORD)
        third = door.way_in("bo", "boss")
        door.change("bo", "boss", active=False)
        door.change("bo", "boss", active=True)
        assert [door.link(secret) for secret in (first, second, third)] == [None] * 3
        with pytest.raises(UserError, match="no admin any more"):
            door.invite("annotator", "bo")
        with pytest.raises(UserError, match="no admin any more"):
            door.change("boss", "bo", active=False)


# -------------------------------------------------------------------------------------------------------------- guesses


def guess(client: Client, name: str, password: str = "a wrong password") -> int:
    return int(client.http.post("/sign-in", data={"name": name, "password": password}).status_code)


def test_guesses_that_come_at_once_are_counted_before_they_are_looked_at(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, go_on = [], threading.Event()

    def slow(self: People, hashed: str, password: str) -> bool:
        looked.append(password)
        go_on.wait(10)
        return False

    monkeypatch.setattr(People, "_fits", slow)
    monkeypatch.setattr(security, "REQUESTS", SIGN_IN_ALL)
    codes: list[int] = []
    clients = [world.client(None) for _ in range(30)]
    # however the name is spaced and spelled it is the same account's
    names = ["boss", " boss", "boss  ", "BOSS"]
    threads = [
        threading.Thread(target=lambda n=n, c=c: codes.append(guess(c, names[n % 4]))) for n, c in enumerate(clients)
    ]
    for thread in threads:
        thread.start()
    while len(codes) < 30 - SIGN_IN_NAME.burst:
        time.sleep(0.01)
    assert codes == [429] * 22
    # those eight wait in two threads, and everything else is answered meanwhile
    assert len(looked) == accounts.HASHING
    assert world.client("ann").api("next", {"kind": "compare"}).status_code == 200
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert sorted(codes) == [403] * 8 + [429] * 22
    assert len(looked) == 8


def test_a_flood_of_names_from_everywhere_is_bounded_and_those_who_know_theirs_are_not_counted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []

    def fits(self: People, hashed: str, password: str) -> bool:
        looked.append(password)
        return password == PASSWORD

    monkeypatch.setattr("keel.web.app.pages.SIGN_IN_ALL", Rate(15, 1e-6))
    world.app.state.door = Door()
    monkeypatch.setattr(People, "_fits", fits)
    ann = person(world.store, "Ann")
    People(world.store).set_password(ann, PASSWORD)
    stranger = world.client(None)
    monkeypatch.setattr("keel.web.app.pages.address", lambda request: f"2001:db8:{len(looked):x}::/64")
    assert [guess(stranger, "Ann", PASSWORD) for _ in range(12)] == [303] * 12  # more than any name has guesses
    world.app.state.guard._requests._left.clear()
    codes = []
    for number in range(20):
        codes.append(guess(world.client(None), f"name {number}"))
        world.app.state.guard._requests._left.clear()
    assert codes == [403] * 15 + [429] * 5
    assert len(looked) == 12 + 15


def test_trouble_with_the_database_is_no_guess(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise Unavailable("locked")

    with monkeypatch.context() as patch:
        patch.setattr(People, "sign_in", fail)
        assert [guess(world.client(None), "ann") for _ in range(10)] == [503] * 10
    assert guess(world.client(None), "ann") == 403


def test_no_password_is_hashed_for_what_cannot_be(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    person(world.store, "ann")
    link = world.people.invite("annotator", "keel")
    hashed = []
    monkeypatch.setattr(People, "_hash", lambda self, password: hashed.append(1))
    for secret, name, said in ((link, "ann", "taken"), ("x" * 43, "bo", "ask for a new one")):
        with pytest.raises(UserError, match=said):
            world.people.accept(secret, name, PASSWORD)
    assert hashed == []
    client = world.client("cy")
    monkeypatch.undo()
    codes = []
    for _ in range(9):
        answer = client.form("/account", password="short")
        codes.append(answer.status_code)
    assert codes == [400] * 8 + [429]


# -------------------------------------------------------------------------------------------------------------- proxies


def seen_from(store: Store, peer: str, proxies: list[str], **headers: str) -> tuple[str, str]:
    """The address and the scheme that the app takes a request to have."""
    app = create_app(store, proxies=proxies)
    found = []

    @app.get("/where")
    async def where(request: security.Request) -> dict[str, str]:
        found.append((security.address(request), request.url.scheme))
        return {}

    client = TestClient(app, client=(peer, 1234), base_url="http://testserver")
    client.portal = portal()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    assert client.get("/where", headers=named).status_code == 200
    return found[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("peer", "proxies", "forwarded", "address"),
    [
        ("127.0.0.1", [], "1.2.3.4", "127.0.0.1"),  # by default nobody is believed, this machine neither
        ("127.0.0.1", ["127.0.0.1"], "1.2.3.4", "1.2.3.4"),
        ("9.9.9.9", ["127.0.0.1"], "1.2.3.4", "9.9.9.9"),  # somebody who goes past the proxy
        ("127.0.0.1", ["127.0.0.1"], "6.6.6.6, 1.2.3.4", "1.2.3.4"),  # the client's own words come first
        ("10.0.0.7", ["10.0.0.0/8"], "6.6.6.6, 1.2.3.4, 10.9.9.9", "1.2.3.4"),  # two proxies
        ("10.0.0.7", ["10.0.0.0/8"], "10.1.1.1", "10.1.1.1"),
        ("127.0.0.1", ["127.0.0.1"], "1.2.3.4, nonsense", "127.0.0.1"),
        ("127.0.0.1", ["127.0.0.1"], "", "127.0.0.1"),
        ("127.0.0.1", ["127.0.0.1"], "1.2.3.4:5678", "1.2.3.4"),
        ("::ffff:127.0.0.1", ["127.0.0.1"], "1.2.3.4", "1.2.3.4"),
        ("::1", ["::1"], "[2001:db8:1:2:3:4:5:6]:99", "2001:db8:1:2::/64"),  # whoever has one has the network
    ],
)
def test_forwarded_addresses_are_believed_from_named_proxies_alone(
    world: World, monkeypatch: pytest.MonkeyPatch, peer: str, proxies: list[str], forwarded: str, address: str
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    scheme = "http" if peer == "9.9.9.9" or not proxies else "https"
    found = seen_from(world.store, peer, proxies, X_Forwarded_For=forwarded, X_Forwarded_Proto="https")
    assert found == (address, scheme)


def test_who_is_not_believed_is_told_once_in_the_log(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "keel.web"):
        client = TestClient(create_app(world.store), client=("127.0.0.1", 1))
        client.portal = portal()
        for _ in range(3):
            client.get("/sign-in", headers={"X-Forwarded-For": "1.2.3.4"})
    assert caplog.text.count("X-Forwarded-For from 127.0.0.1 is not believed") == 1


@pytest.mark.parametrize("wrong", ["*", "proxy.example", "10.0.0.1/8", "0.0.0.0/0", "::/0", ""])
def test_a_proxy_is_an_address_or_a_network(wrong: str) -> None:
    with pytest.raises(UserError, match="--proxy"):
        networks([wrong])
    named = parse(["label", "runs/demo", "--proxy", "127.0.0.1", "--proxy", "10.1.0.0/16"]).proxy
    assert [str(network) for network in networks(named)] == ["127.0.0.1/32", "10.1.0.0/16"]


# --------------------------------------------------------------------------------------------------------------- bodies


def sent(
    app: Any, path: str, size: int, cookie: str = "", length: bool = True, method: str = "POST"
) -> tuple[int, int, Any]:
    """The status, how many bytes of the body were read, and what was answered."""
    piece, read, answered = 10_000, [0], []
    kind = b"application/json" if path.startswith("/api/") else b"application/x-www-form-urlencoded"
    headers = [(b"host", b"testserver"), (b"content-type", kind)]
    headers += [(b"content-length", str(size).encode())] if length else [(b"transfer-encoding", b"chunked")]
    headers += [(b"cookie", f"{security.COOKIE}={cookie}".encode())] if cookie else []
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
    }
    scope |= {"raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http", "headers": headers}
    scope |= {"client": ("1.2.3.4", 1), "server": ("testserver", 80)}

    async def receive() -> dict[str, Any]:
        now = min(piece, size - read[0])
        read[0] += now
        return {"type": "http.request", "body": b"x" * now, "more_body": read[0] < size}

    async def send(message: Any) -> None:
        answered.append(message)

    asyncio.run(app(scope, receive, send))
    assert [m["type"] for m in answered].count("http.response.start") == 1
    return answered[0]["status"], read[0], b"".join(m.get("body", b"") for m in answered)


MEGABYTE = 1_000_000


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize(
    ("who", "path", "size", "status"),
    [
        (None, "/sign-in", 2 * MEGABYTE, 413),
        (None, "/join/" + "x" * 43, 2 * MEGABYTE, 413),
        (None, "/api/write", 900_000, 401),  # somebody who was signed out: their browser keeps it, and 413 is final
        (None, "/manage/prompts/import", 3 * MEGABYTE, 401),
        (None, "/nowhere", 3 * MEGABYTE, 401),
        ("annotator", "/api/judge", 2 * MEGABYTE, 413),
        ("reviewer", "/manage/prompts/responses", 3 * MEGABYTE, 403),
        ("admin", "/manage/prompts/responses", 4 * MEGABYTE, 413),
        ("admin", "/manage/guideline", 2 * MEGABYTE, 413),
    ],
)
def test_bodies_are_refused_before_they_are_read(
    world: World, monkeypatch: pytest.MonkeyPatch, who: Any, path: str, size: int, status: int, length: bool
) -> None:
    monkeypatch.setattr(security, "LARGEST_UPLOAD", 3 * MEGABYTE)
    if path in security.UPLOADS and who == "admin" and not length:
        return  # what a form holds is counted by its reader before
    cookie = "" if who is None else world.people.start_session(person(world.store, "somebody", who))
    found, read, body = sent(world.app, path, size, cookie, length)
    assert found == status
    most = {"annotator": security.LARGEST_BODY, "admin": security.LARGEST_BODY}.get(who, 0)
    if path in ("/sign-in", "/join/" + "x" * 43):
        most = security.LARGEST_UNASKED
    assert read <= (0 if length else most + 10_000)  # the piece that was one too many
    if path.startswith("/api/"):
        assert json.loads(body)["error"]  # in a form that the page's script takes for the app's own


def test_bodies_that_fit_are_read(world: World) -> None:
    cookie = world.people.start_session(person(world.store, "somebody"))
    for length in (True, False):
        assert sent(world.app, "/api/write", 990_000, cookie, length)[:2] == (422, 990_000)
        assert sent(world.app, "/sign-in", 60_000, "", length)[1] == 60_000
    assert sent(world.app, "/sign-in", 600_000, "", True, "GET")[:2] == (413, 0)


def test_trouble_with_the_database_is_503_also_where_a_large_body_asks_for_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Unavailable(f"store {world.store._url}: locked")

    cookie = world.people.start_session(person(world.store, "somebody"))
    app = create_app(world.store)
    monkeypatch.setattr(Store, "transaction", fail)
    status, read, body = sent(app, "/api/write", 900_000, cookie)
    assert (status, read) == (503, 0)
    assert str(world.store._url.database).encode() not in body


# ---------------------------------------------------------------------------------------------- what strangers are told


@contextmanager
def everything_fails(store: Store, error: Exception) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise error

        for name in ("transaction", "session", "_begin"):
            patch.setattr(Store, name, fail)
        yield


def test_strangers_never_see_where_the_store_is(new_url: Callable[[], str]) -> None:
    url = new_url()
    with Store(url) as store:
        world = World(store, items=0)
        where = (url, str(store._url), url.rpartition("//")[2], "feedback0", "search_path")
        secret = world.people.invite("annotator", "keel")
        client = world.client(None)
        client.http.cookies.set(security.COOKIE, "a-cookie-of-before")
        doors = [name for name in LEAST if "/sign-in" in name or "/join/" in name or "/enter/" in name]

        def told(names: list[str]) -> list[str]:
            world.app.state.guard._requests._left.clear()
            calls = [name.replace("{secret}", secret).split(" ") for name in names]
            answers = [ask(client, *call) for call in calls] + [client.get("/nowhere"), client.http.put("/sign-in")]
            said = [answer.text + json.dumps(dict(answer.headers)) for answer in answers]
            return [text for text in said if any(part in text for part in where)]

        assert told(list(LEAST)) == []
        for error in (
            Unavailable(f"store {store._url}: could not connect to {url}"),
            RuntimeError(f"{url} {store._url}"),
            UserError(f"store {store._url} was written by a newer Keel"),
        ):
            with everything_fails(store, error):
                assert told([*doors, "GET /manage", "POST /api/next"]) == []
