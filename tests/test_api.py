"""The API for programs: tokens, who may call what, writes that are sent again, what is read, the client, webhooks."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from databases import Clock
from fastapi.testclient import TestClient
from labelling_world import SECRET_META, SECRET_MODEL, World, fill, person, portal
from sqlalchemy import text
from test_label_routes import all_routes

import keel.client
from keel.cli import main
from keel.client import ApiError, Client, verified
from keel.data.sources import read_prompts
from keel.data.unjudged import read_unjudged
from keel.store import NewVote, Store, feed, tokens, webhooks
from keel.store.people import ROLES
from keel.types import UserError
from keel.web.app.create import create_app
from keel.web.service import webhooks as sending
from keel.web.service.addresses import LOOPBACK, reachable
from keel.web.service.people import People
from keel.web.service.sources import Sources
from keel.web.service.start import prepare
from keel.web.service.tokens import Tokens
from keel.web.service.webhooks import Webhooks

# Every route of the API with the least role that may use it, and a body.
V1: dict[str, tuple[str, Any]] = {
    "GET /api/v1/me": ("annotator", None),
    "GET /api/v1/prompts": ("admin", None),
    "POST /api/v1/prompts": ("admin", {"rows": [{"prompt": "x"}]}),
    "GET /api/v1/responses": ("admin", None),
    "POST /api/v1/responses": ("admin", {"rows": [{"prompt": "x", "responses": ["a", "b"]}]}),
    "POST /api/v1/assignments": ("annotator", {"kind": "compare"}),
    "POST /api/v1/assignments/hold": ("annotator", {"assignments": []}),
    "POST /api/v1/assignments/{handle}": ("annotator", {"kind": "compare", "choice": "left"}),
    "POST /api/v1/assignments/{handle}/skip": ("annotator", {}),
    "POST /api/v1/assignments/{handle}/flag": ("annotator", {}),
    "POST /api/v1/assignments/{handle}/undo": ("annotator", {"kind": "compare"}),
    "GET /api/v1/votes": ("admin", None),
    "GET /api/v1/votes.jsonl": ("admin", None),
    "GET /api/v1/preferences.jsonl": ("admin", None),
    "GET /api/v1/progress": ("annotator", None),
    "GET /api/v1/quality": ("reviewer", None),
    "GET /api/v1/queues": ("reviewer", None),
    "GET /api/v1/guideline": ("annotator", None),
    "GET /api/v1/guidelines": ("admin", None),
    "GET /api/v1/openapi.json": ("annotator", None),
}


class Place:
    """A store, the app on it, and programs with tokens."""

    def __init__(self, url: str | Path, items: int = 4) -> None:
        self.clock = Clock()
        self.store = Store(url, clock=self.clock)
        self.items = fill(self.store, items, overlap=2)
        prepare(self.store)
        sources = Sources(
            read_prompts=lambda path: list(read_prompts(str(path))), read_unjudged=lambda p, u: read_unjudged(p, u)
        )
        self.app = create_app(self.store, sources, webhooks_to=LOOPBACK)
        self.tokens = Tokens(self.store)
        for role in ROLES:
            person(self.store, role, role)

    def token(self, of: str, role: Any = None, **more: Any) -> str:
        return self.tokens.make("a program", of, role or of, "admin", **more)

    def http(self, secret: str | None) -> TestClient:
        found = TestClient(self.app, follow_redirects=False, raise_server_exceptions=False)
        found.portal = portal()
        if secret:
            found.headers["Authorization"] = f"Bearer {secret}"
        return found

    def client(self, secret: str) -> Client:
        found = Client("http://127.0.0.1:1", secret)
        found._http = self.http(secret)  # type: ignore[assignment]
        found._base = "/api/v1"
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    found = Place(tmp_path_factory.mktemp("api") / "feedback.db")
    yield found
    found.store.close()


@pytest.fixture
def fresh(new_url: Callable[[], str]) -> Iterator[Place]:
    """On SQLite and on PostgreSQL."""
    found = Place(new_url())
    yield found
    found.store.close()


# ------------------------------------------------------------------------------------------------------ who may do what


def test_every_route_of_the_api_is_known_with_its_least_role(place: Place) -> None:
    assert {f"{m} {p}" for m, p in all_routes(place) if p.startswith("/api/v1")} == V1.keys()  # type: ignore[arg-type]


def test_every_route_with_every_role(place: Place) -> None:
    wrong = []
    for role in (None, "cookie", *ROLES):
        http = place.http(place.token(role) if role in ROLES else "keel_" + "x" * 43 if role is None else None)
        if role == "cookie":  # a session is no token, and a page's script of another site has no way in
            http.cookies.set("keel_session", People(place.store).start_session(person(place.store, "c", "admin")))
        for number, (name, (least, body)) in enumerate(V1.items()):
            method, _, path = name.partition(" ")
            headers = {"Idempotency-Key": f"{role}-{number:08}"} if body is not None else {}
            answer = http.request(method, path.replace("{handle}", "h" * 22), json=body, headers=headers)
            if role in ROLES and ROLES.index(role) >= ROLES.index(least):  # type: ignore[arg-type]
                right = answer.status_code not in (401, 403) and answer.status_code < 500
            elif role == "cookie" and path.endswith("openapi.json"):
                right = answer.status_code == 200
            else:
                right = answer.status_code == (403 if role in ROLES else 401)
            if not right:
                wrong.append((role, name, answer.status_code))
    assert wrong == []
    assert place.http(None).get("/api/v1/openapi.json").status_code == 401
    assert place.http(place.token("admin")).get("/manage/export").status_code == 303  # tokens open no pages


def test_the_description_names_every_route(place: Place) -> None:
    told = place.http(place.token("annotator")).get("/api/v1/openapi.json").json()
    found = {f"{method.upper()} {path}" for path, one in told["paths"].items() for method in one}
    assert found == V1.keys() - {"GET /api/v1/openapi.json"}
    assert "HTTPBearer" in told["components"]["securitySchemes"]


def test_tokens_end_with_rights_and_are_kept_as_hashes(fresh: Place) -> None:
    people = People(fresh.store)
    person(fresh.store, "boss", "admin")
    for name in ("ann", "bo"):
        person(fresh.store, name, "reviewer")
    with pytest.raises(UserError, match="may be no more, so not admin"):
        fresh.token("ann", "admin")
    with pytest.raises(UserError, match="no admin any more"):
        fresh.tokens.make("x", "ann", "annotator", "ann")
    made = [fresh.token("ann", "annotator"), fresh.token("bo", "reviewer"), fresh.token("admin", "annotator")]
    other = fresh.tokens.make("x", "bo", "annotator", "boss")
    cli = fresh.tokens.make("x", "boss", "admin", "keel")
    people.change("ann", "boss", role="annotator")  # their own role
    assert [fresh.tokens.find(one) is None for one in (*made, other)] == [True, False, False, False]
    people.change("admin", "boss", role="reviewer")  # the maker's
    assert [fresh.tokens.find(one) is None for one in (*made, other, cli)] == [True, True, True, False, False]
    people.change("admin", "boss", role="admin")
    assert fresh.tokens.find(made[1]) is None  # what has ended stays so
    (number,) = [one["id"] for one in fresh.tokens.all() if one["of"] == "bo"]
    fresh.tokens.end(number, "boss")
    assert fresh.tokens.find(other) is None
    ended = [e.entity_id for e in fresh.store.events() if (e.action, e.entity) == ("ended", "token")]
    assert len(ended) == 4
    with fresh.store.transaction(writes=False) as connection:
        rows = str(connection.execute(text("SELECT * FROM tokens")).all()) + str(fresh.store.events())
    assert not any(secret in rows for secret in (*made, other, cli))
    (kept,) = fresh.tokens.all()
    assert kept["last_used"] == fresh.clock.time
    people.erase("boss", False, "admin")
    assert fresh.tokens.find(cli) is None
    assert fresh.tokens.all() == []


def test_a_token_has_a_rate_of_its_own(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    secret = place.token("annotator", per_minute=30)
    http = place.http(secret)
    codes = [http.get("/api/v1/me") for _ in range(5)]
    assert [one.status_code for one in codes] == [200] * 3 + [429] * 2
    assert int(codes[-1].headers["retry-after"]) >= 1
    assert place.http(place.token("annotator")).get("/api/v1/me").status_code == 200
    assert secret not in caplog.text


def test_the_command_line_makes_lists_and_ends(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(place.store._url.database)
    assert main(["token", file, "--make", "nightly", "--role", "reviewer"]) == 0
    secret = capsys.readouterr().out.strip()
    found = place.tokens.find(secret)
    assert found is not None
    assert (found.name, found.account.role) == ("nightly", "reviewer")
    assert main(["token", file]) == 0
    assert f"{found.id}  nightly: of owner, reviewer, 600 a minute" in capsys.readouterr().out
    assert main(["token", file, "--end", str(found.id)]) == 0
    assert place.tokens.find(secret) is None
    capsys.readouterr()
    assert main(["token", file, "--end", str(found.id)]) == 2
    assert main(["token", file, "--make", "x", "--of", "annotator", "--role", "admin"]) == 2
    assert "may be no more" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ labelling


def test_a_program_labels_blind_and_a_retry_counts_once(fresh: Place) -> None:
    fresh.app.state.services.manage.set_gold(fresh.items[0], "first", "admin")
    fresh.app.state.services.manage.set_gold_every(1, "admin")
    keel, http = fresh.client(fresh.token("annotator")), fresh.http(fresh.token("annotator"))
    taken = http.post("/api/v1/assignments", json={"kind": "compare"})
    assert set(taken.json()["assignment"]) == {"id", "kind", "messages", "shown", "steps", "reference"}
    for secret in (SECRET_MODEL, SECRET_META, "feedface", "gold", "fingerprint"):
        assert secret not in taken.text
    id = taken.json()["assignment"]["id"]
    body, key = {"kind": "compare", "choice": "left", "strength": 2}, {"Idempotency-Key": "one-write-1"}
    said = [http.post(f"/api/v1/assignments/{id}", json=body, headers=key) for _ in range(3)]
    assert [one.status_code for one in said] == [200] * 3
    assert [one.headers.get("idempotency-replayed") for one in said] == [None, "true", "true"]
    with fresh.store.transaction(writes=True) as connection:  # stopped between the vote and the answer
        connection.execute(text("DELETE FROM answers"))
    assert http.post(f"/api/v1/assignments/{id}", json=body, headers=key).status_code == 200
    assert len(fresh.store.judgements()) == 1
    changed = http.post(f"/api/v1/assignments/{id}", json=body | {"choice": "right"}, headers=key)
    assert (changed.status_code, "another request" in changed.json()["error"]) == (422, True)
    assert http.post(f"/api/v1/assignments/{id}", json=body).status_code == 422  # no key
    again = http.post(f"/api/v1/assignments/{id}", json=body, headers={"Idempotency-Key": "another-1"})
    assert again.status_code == 400
    other = fresh.http(fresh.token("reviewer")).post(f"/api/v1/assignments/{id}/flag", json={}, headers=key)
    assert (other.status_code, "not yours" in other.json()["error"]) == (400, True)
    # the client: take, skip, undo, hold
    one = keel.take()
    assert one is not None
    assert keel.take()["id"] == one["id"]  # type: ignore[index]
    assert keel.take(holding=[one["id"]])["id"] != one["id"]  # type: ignore[index]
    keel.skip(one, "can't tell")
    keel.undo(one)
    assert keel.hold([one]) == {"gone": [], "done": []}
    keel.hand_in(one, choice="tie", reason="the same")
    with pytest.raises(keel_refused()) as refused:
        keel.hand_in(one, choice="up")
    assert refused.value.status == 422
    assert keel.progress()["today"] == 2
    assert len(fresh.store.judgements()) == 2


def keel_refused() -> type[ApiError]:
    return keel.client.Refused


# -------------------------------------------------------------------------------------------------------- in and out


def test_prompts_and_responses_come_in_as_an_import_does(place: Place) -> None:
    keel = place.client(place.token("admin"))
    rows = [{"prompt": "2+2?", "responses": ["4", "5", "6"]}, {"prompt": "1+1?", "response_a": "2", "response_b": "3"}]
    assert keel.add_responses(rows, overlap=2) == {"groups": 2, "prompts": 2, "responses": 5, "items": 4}
    assert keel.add_responses(rows, overlap=2)["responses"] == 0
    before = len(list(keel.prompts()))
    with pytest.raises(keel_refused(), match="rows, line 2: responses 1 and 2 are the same text"):
        keel.add_responses([{"prompt": "new", "responses": ["a", "b"]}, {"prompt": "q", "responses": ["a", "a"]}])
    assert len(list(keel.prompts())) == before
    assert keel.add_prompts([{"prompt": f"number {i}"} for i in range(150)]) == {"prompts": 150}
    found = list(keel.prompts())
    assert len(found) == before + 150 == len({one["id"] for one in found})
    mine = next(one["id"] for one in found if one["messages"][0]["content"] == "2+2?")
    assert [one["text"] for one in keel.responses(mine)] == ["4", "5", "6"]
    with pytest.raises(keel_refused(), match="annotation"):
        keel.add_responses([{"prompt": "q", "chosen": "a", "rejected": "b"}])
    big = json.dumps({"rows": [{"prompt": "x" * 1_500_000}]})
    sent = {"Content-Type": "application/json", "Idempotency-Key": "big-one-1"}
    codes = [
        place.http(secret).post("/api/v1/prompts", content=big, headers=sent).status_code
        for secret in (place.token("admin"), place.token("reviewer"), "keel_nobody")
    ]
    assert codes == [200, 403, 401]


def test_votes_are_read_as_they_come(fresh: Place) -> None:
    ann = person(fresh.store, "ann")
    reader = fresh.client(fresh.token("admin"))
    labelling = fresh.app.state.services.labelling
    for number in range(3):
        screen = labelling.next(ann, "compare")
        fresh.clock.time = fresh.clock.time.replace(minute=number)
        labelling.judge(ann, screen.id, NewVote("left", 2, "clear", token=f"vote-{number}"))
    labelling.undo(ann, "compare")
    found = list(reader.votes())
    assert [(one["news"], one["id"]) for one in found] == [
        ("given", "vote-0"), ("given", "vote-1"), ("given", "vote-2"), ("taken back", "vote-2"),
    ]  # fmt: skip
    assert [one["cursor"] for one in found] == sorted({one["cursor"] for one in found})
    assert list(reader.votes(cursor=found[2]["cursor"])) == found[3:]
    assert [one["id"] for one in reader.votes(since=fresh.clock.time.replace(minute=1))] == [
        "vote-1",
        "vote-2",
        "vote-2",
    ]
    first = found[0]
    (truth,) = [one for one in fresh.store.judgements() if one.token == "vote-0"]
    assert [one["text"] for one in first["shown"]] == [truth.left.text, truth.right.text]
    assert first["prompt"]["messages"][0]["content"] == truth.prompt.messages[0].content
    assert (first["said"]["choice"], first["said"]["strength"], first["annotator"]) == ("left", 2, "ann")
    http = fresh.http(fresh.token("admin"))
    lines = [json.loads(line) for line in http.get("/api/v1/votes.jsonl").text.splitlines()]
    assert lines == found
    page = http.get("/api/v1/votes", params={"limit": 2}).json()
    assert (page["votes"], page["more"]) == (found[:2], True)
    pairs = list(reader.preferences())
    assert [(p["id"], p["chosen"][0]["content"]) for p in pairs][:1] == [("vote-0", truth.left.text)]
    assert len(pairs) == 2
    assert http.get("/api/v1/votes", params={"since": "2026-01-01"}).status_code == 422
    assert fresh.client(fresh.token("reviewer")).quality()["annotators"][0]["annotator"] == "ann"
    assert reader.queues()[0]["done"] == 2
    assert reader.guidelines()[0]["version"] == reader.guideline()["version"]  # type: ignore[index]


def test_a_reader_misses_nothing_that_is_committed_late(fresh: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """On PostgreSQL an entry may show after one with a higher number; on SQLite there is one writer."""
    if fresh.store._engine.dialect.name != "postgresql":
        return
    monkeypatch.setattr(feed, "WAIT_SECONDS", 0.2)
    log = "INSERT INTO events (at, actor, action, entity, entity_id) VALUES (now(), 'x', 'y', 'z', '1')"
    with fresh.store.transaction(writes=False) as reading:
        before = feed.end(reading)
        with fresh.store.transaction(writes=True) as late:
            late.execute(text(log))  # it has its number, and nobody sees it yet
            with fresh.store.transaction(writes=True) as early:
                early.execute(text(log))
            assert feed.end(reading, before) == before
        assert feed.end(reading, before) == before + 2


# ------------------------------------------------------------------------------------------------------------ webhooks


class Receiver:
    """Answers each delivery with the next of ``answers`` (the last one for good); "hang" never does."""

    def __init__(self, answers: list[Any]) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        go_on = self.go_on = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.got.append((dict(self.headers), body))
                answer = answers[min(len(outer.got), len(answers)) - 1]
                if answer == "hang":
                    go_on.wait(10)
                    return
                self.send_response(answer)
                self.send_header("Location", "http://127.0.0.1:9/")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook?key=1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@contextmanager
def receiver(answers: list[Any]) -> Iterator[Receiver]:
    found = Receiver(answers)
    yield found
    found.go_on.set()
    found.server.shutdown()
    found.server.server_close()


def vote(place: Place, name: str) -> str:
    who = person(place.store, name)
    labelling = place.app.state.services.labelling
    labelling.judge(who, labelling.next(who, "compare").id, NewVote("left", token=f"token-{name}"))
    return f"token-{name}"


def test_a_delivery_is_signed_and_sent_until_it_is_taken(fresh: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    vote(fresh, "before")
    hooks = Webhooks(fresh.store, LOOPBACK)
    with receiver([500, "hang", 302, 200]) as to:
        secret = hooks.make(to.url, "admin")
        assert hooks.deliver() == 0  # nothing of what was before
        first = vote(fresh, "ann")
        problems = []
        for number in range(3):
            with monkeypatch.context() as patch:
                patch.setattr(sending, "SECONDS", 2.0 if number == 1 else 60.0)
                assert hooks.deliver() == 0
            (shown,) = hooks.all()
            problems.append(shown["last"]["problem"])
            assert hooks.deliver() == 0  # it is not time yet
            assert len(to.got) == number + 1
            waits = (shown["last"]["next_at"] - fresh.clock.time).total_seconds()
            assert waits == 10 * 2**number
            fresh.clock.time = shown["last"]["next_at"]
        second = vote(fresh, "bo")  # a vote waits for no receiver
        assert [hooks.deliver() for _ in range(3)] == [1, 1, 0]
    assert problems[0] == "it answered 500"
    assert problems[1].startswith("no answer within")
    assert "redirects are not followed" in problems[2]
    monkeypatch.setattr(keel.client.time, "time", lambda: fresh.clock.time.timestamp())
    said = [verified(secret, headers, body) for headers, body in (to.got[-2], to.got[-1])]
    assert [[one["id"] for one in each["votes"]] for each in said] == [[first], [second]]
    assert len({headers["Keel-Delivery"] for headers, _ in to.got}) == 2
    assert len({headers["Keel-Delivery"] for headers, _ in to.got[:4]}) == 1
    for broken in ((secret + "x", to.got[-1][1]), (secret, to.got[-1][1] + b" ")):
        with pytest.raises(UserError, match="signature"):
            verified(broken[0], to.got[-1][0], broken[1])
    monkeypatch.setattr(keel.client.time, "time", lambda: fresh.clock.time.timestamp() + 400)
    with pytest.raises(UserError, match="another time"):
        verified(secret, *to.got[-1])


def test_one_process_delivers_and_what_fails_for_days_waits_for_an_admin(
    fresh: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "MOST_ATTEMPTS", 1)
    with receiver([503, 200]) as to:
        one, other = Webhooks(fresh.store, LOOPBACK), Webhooks(fresh.store, LOOPBACK)
        one.make(to.url, "admin")
        vote(fresh, "ann")
        assert [one.deliver(), other.deliver()] == [0, 0]
        assert len(to.got) == 1
        (shown,) = one.all()
        assert shown["paused_at"] is not None
        fresh.clock.time = fresh.clock.time.replace(day=20)
        assert other.deliver() == 0
        one.send_again(shown["id"], "admin")
        assert [other.deliver(), one.deliver()] == [1, 0]
        person(fresh.store, "boss", "admin")
        vote(fresh, "bo")
        People(fresh.store).change("admin", "boss", role="annotator")  # it ends with its maker's rights
        assert [other.deliver(), other.all(), len(to.got)] == [0, [], 2]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://example.org/", "starts with https"),
        ("ftp://example.org/", "starts with https"),
        ("https://user:pw@127.0.0.1/", "no user:password"),
        ("https://127.0.0.1/", "not public"),
        ("https://[::ffff:10.0.0.1]/", "not public"),
        ("https://[64:ff9b::a00:1]/", "not public"),
        ("https://169.254.169.254/latest", "not public"),
        ("https://2130706433/", "not public"),
        ("https://0x7f.1/", "not public"),
        ("https://localhost/", "not public"),
        ("https://[fe80::1%25lo]/", "webhook's"),
        ("https://a b/", "starts with https"),
        ("https://x:99999/", "starts with https"),
        ("https://nothing.invalid/", "not known"),
    ],
)
def test_a_webhook_leads_to_no_door_that_is_open_to_the_server_alone(url: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        reachable(url, ())


def test_what_a_name_says_is_looked_at_each_time(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that was public when it was given leads to this machine when it is used."""
    answers = iter(["93.184.216.34", "127.0.0.1"])

    def looked_up(*_: Any, **__: Any) -> list[Any]:
        return [(2, 1, 6, "", (next(answers), 443))]

    monkeypatch.setattr("keel.web.service.addresses.socket.getaddrinfo", looked_up)
    hooks = Webhooks(place.store)
    hooks.make("https://hooks.example.org/x", "admin")
    vote(place, "rebound")
    assert hooks.deliver() == 0
    assert "not public (127.0.0.1)" in hooks.all()[-1]["last"]["problem"]


# --------------------------------------------------------------------------------------------------------------- client


def test_the_client_tries_again_with_one_key_and_gives_up_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(keel.client.time, "sleep", waits.append)
    seen: list[str] = []
    answers: list[Any] = [
        httpx2.ConnectError("x"), httpx2.Response(503, json={"error": "busy"}),
        httpx2.Response(429, headers={"Retry-After": "7"}, json={"error": "slow"}),
        httpx2.Response(200, json={"prompts": 1}),
        httpx2.Response(401, json={"error": "no token"}), httpx2.Response(404, text="<html>"),
    ]  # fmt: skip

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers.get("idempotency-key", ""))
        one = answers.pop(0)
        if isinstance(one, Exception):
            raise one
        return one  # type: ignore[no-any-return]

    client = Client("http://127.0.0.1:1/", "keel_secret")
    client._http = httpx2.Client(transport=httpx2.MockTransport(answer))
    assert client.add_prompts([{"prompt": "x"}]) == {"prompts": 1}
    assert len(set(seen)) == 1
    assert len(seen[0]) > 20
    assert waits == [0.5, 1.0, 7.0]
    with pytest.raises(keel.client.NoToken, match="no token"):
        client.me()
    with pytest.raises(keel.client.Refused, match="labelling app's address"):
        client.me()
    assert "keel_secret" not in repr(client)
    for url in ("http://label.example.org", "label.example.org"):
        with pytest.raises(UserError, match="https"):
            Client(url, "keel_secret")


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_shows_a_secret_once_and_keeps_what_was_typed(tmp_path: Path) -> None:
    with Store(tmp_path / "feedback.db") as store:
        world = World(store)
        boss = world.client("boss", "admin")
        made = boss.form("/manage/api/tokens", name="nightly job", of="boss", role="reviewer", per_minute="60")
        secret = made.text.split('value="keel_')[1].split('"')[0]
        assert Tokens(store).find(f"keel_{secret}") is not None
        assert secret not in boss.get("/manage/api").text
        world.client("ann")
        refused = boss.form("/manage/api/tokens", name="too much", of="ann", role="admin")
        assert (refused.status_code, 'value="too much"' in refused.text) == (400, True)
        refused = boss.form("/manage/api/webhooks", url="https://10.0.0.1/x")
        assert (refused.status_code, 'value="https://10.0.0.1/x"' in refused.text) == (400, True)
        assert "made token 1, as reviewer" in boss.get("/manage/events").text
        with store.transaction(writes=False) as connection:
            assert [one["name"] for one in tokens.all_tokens(connection)] == ["nightly job"]
