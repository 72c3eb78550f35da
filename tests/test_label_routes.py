"""The app's routes: who may use them, what they reveal, what they refuse. On SQLite; the service is tested on both."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from labelling_world import PASSWORD, SECRET_META, SECRET_MODEL, Client, World, token

from keel.store import Store
from keel.store.people import ROLES
from keel.web.app.limits import Buckets, Rate
from keel.web.app.markdown import render
from keel.web.app.security import CONTENT_POLICY


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with Store(tmp_path / "feedback.db") as store:
        yield World(store)


def vote_on(client: Client, item: dict, choice: str = "left", **more: Any):  # type: ignore[no-untyped-def]
    return client.api("judge", {"assignment": item["id"], "token": token(), "choice": choice, **more})


def next_item(client: Client, kind: str = "compare", holding: tuple[str, ...] = ()) -> dict:
    item = client.api("next", {"kind": kind, "holding": list(holding)}).json()["item"]
    assert item is not None
    return item


# ------------------------------------------------------------------------------------------------- who may do what

# Every route with the least role that may use it; None: anybody. A route that is missing here fails the test.
LEAST: dict[str, str | None] = {
    "GET /": None, "GET /sign-in": None, "POST /sign-in": None, "GET /enter/{secret}": None,
    "POST /enter/{secret}": None, "GET /join/{secret}": None, "POST /join/{secret}": None,
    "POST /sign-out": "annotator", "GET /compare": "annotator", "GET /rank": "annotator", "GET /write": "annotator",
    "GET /thumbs": "annotator", "POST /api/thumb": "annotator",
    "GET /edit": "annotator", "GET /arena": "annotator", "GET /mine": "annotator", "GET /guideline": "annotator",
    "GET /account": "annotator", "POST /account": "annotator", "POST /api/next": "annotator",
    "GET /api/me": "annotator", "POST /api/hold": "annotator",
    "POST /api/judge": "annotator", "POST /api/rank": "annotator", "POST /api/write": "annotator",
    "POST /api/skip": "annotator", "POST /api/flag": "annotator", "POST /api/undo": "annotator",
    "POST /api/arena": "annotator", "POST /api/arena/{handle}/say": "annotator",
    "POST /api/arena/{handle}/vote": "annotator",
    "GET /manage": "reviewer", "GET /manage/quality": "reviewer", "GET /manage/disagreements": "reviewer",
    "GET /manage/models": "reviewer", "GET /manage/models/{model}": "reviewer",
    "GET /manage/models/{model}/judgements": "reviewer",
    "POST /manage/disagreements/{item}": "reviewer", "GET /manage/flags": "reviewer",
    "POST /manage/flags/out": "reviewer", "POST /manage/flags/back": "reviewer", "POST /manage/flags/erase": "admin",
    "POST /manage/people/erase": "admin", "POST /manage/prompts/responses": "admin",
    "POST /manage/flags/{id}": "reviewer", "GET /manage/prompts": "admin", "POST /manage/prompts/import": "admin",
    "POST /manage/prompts/sample": "admin", "POST /manage/prompts/ask": "admin", "GET /manage/queue": "admin",
    "POST /manage/queue/overlap": "admin", "POST /manage/queue/first": "admin", "GET /manage/gold": "admin",
    "POST /manage/queue/order": "admin", "GET /manage/training": "admin", "POST /manage/training/start": "admin",
    "POST /manage/training/stop": "admin",
    "POST /manage/gold/every": "admin", "POST /manage/gold/{item}": "admin", "GET /manage/people": "admin",
    "POST /manage/people/invite": "admin", "POST /manage/people/link": "admin",
    "POST /manage/people/withdraw": "admin", "POST /manage/people/change": "admin", "GET /manage/guideline": "admin",
    "POST /manage/guideline": "admin", "GET /manage/export": "admin", "GET /manage/export/{what}": "admin",
    "GET /manage/events": "admin", "GET /constitution": "annotator", "GET /principles": "annotator",
    "POST /api/principles/next": "annotator", "POST /api/principles/answer": "annotator",
    "POST /api/principles/skip": "annotator",
    "POST /api/principles/undo": "annotator", "GET /manage/constitution": "reviewer",
    "GET /manage/constitution/{name}/{number}": "reviewer", "POST /manage/constitution/import": "admin",
    "POST /manage/constitution/draft": "admin", "POST /manage/constitution/drop": "admin",
    "POST /manage/constitution/principle": "admin", "POST /manage/constitution/publish": "admin",
    "GET /manage/why": "reviewer", "GET /steps": "annotator", "POST /api/steps": "annotator",
    "GET /manage/arena": "reviewer", "GET /manage/arena/votes": "reviewer",
    "POST /manage/arena/votes/{vote}": "reviewer", "POST /manage/arena/names": "admin",
    "POST /manage/steps/queue": "admin", "POST /manage/steps/reference": "admin",
    "GET /manage/api": "admin", "POST /manage/api/tokens": "admin", "POST /manage/api/tokens/end": "admin",
    "POST /manage/api/webhooks": "admin", "POST /manage/api/webhooks/end": "admin",
    "POST /manage/api/webhooks/again": "admin",
}  # fmt: skip

API_BODIES: dict[str, dict] = {
    "/api/next": {"kind": "compare"},
    "/api/hold": {"assignments": ["h" * 22]},
    "/api/judge": {"assignment": "h" * 22, "token": "t" * 8, "choice": "left"},
    "/api/rank": {"assignment": "h" * 22, "token": "t" * 8, "tiers": [[0]]},
    "/api/thumb": {"assignment": "h" * 22, "token": "t" * 8, "up": True},
    "/api/steps": {"assignment": "h" * 22, "token": "t" * 8, "labels": ["good"], "outcome": "solution"},
    "/api/write": {"assignment": "h" * 22, "token": "t" * 8, "kind": "write", "text": "x"},
    "/api/skip": {"assignment": "h" * 22, "token": "t" * 8, "kind": "compare"},
    "/api/flag": {"assignment": "h" * 22, "token": "t" * 8},
    "/api/undo": {"kind": "compare"},
    "/api/principles/next": {},
    "/api/principles/answer": {"question": "h" * 22, "token": "t" * 8, "answer": "kept"},
    "/api/principles/skip": {"question": "h" * 22, "token": "t" * 8},
    "/api/principles/undo": {},
    "/api/arena": {},
    f"/api/arena/{'h' * 22}/say": {"message": "x"},
    f"/api/arena/{'h' * 22}/vote": {"token": "t" * 8, "choice": "left"},
}
FORMS: dict[str, dict[str, str]] = {
    "/account": {"password": "short"},
    "/manage/disagreements/1": {"choice": "nonsense"},
    "/manage/prompts/sample": {"model": "x", "prompts": "1", "per_prompt": "1", "overlap": "1", "kind": "compare"},
    "/manage/prompts/ask": {"kind": "write", "prompts": "0", "overlap": "1"},
    "/manage/steps/queue": {"by": "line", "replies": "0", "overlap": "1"},
    "/manage/steps/reference": {"allowed": "true"},
    "/manage/queue/overlap": {"batch": "nothing", "kind": "compare", "overlap": "2"},
    "/manage/queue/first": {"batch": "nothing", "kind": "compare"},
    "/manage/queue/order": {"by": "added"},
    "/manage/gold/every": {"every": "20"},
    "/manage/gold/1": {"answer": "none"},
    "/manage/flags/out": {"what": "prompt", "id": "nothing"},
    "/manage/flags/back": {"removal": "1"},
    "/manage/flags/erase": {"what": "prompt", "id": "nothing"},
    "/manage/people/erase": {"name": "nobody"},
    "/manage/people/invite": {"role": "annotator"},
    "/manage/people/link": {"name": "nobody"},
    "/manage/people/withdraw": {"id": "1"},
    "/manage/people/change": {"name": "nobody", "role": "annotator"},
    "/manage/guideline": {"text": "words"},
    "/manage/api/tokens": {"name": "x", "of": "nobody", "role": "annotator"},
    "/manage/api/tokens/end": {"id": "1"},
    "/manage/api/webhooks": {"url": "http://example.org"},
    "/manage/api/webhooks/end": {"id": "1"},
    "/manage/api/webhooks/again": {"id": "1"},
    "/manage/constitution/draft": {"name": "nothing"},
    "/manage/constitution/drop": {"name": "nothing"},
    "/manage/constitution/principle": {"name": "nothing", "seen": "x", "id": "x"},
    "/manage/constitution/publish": {"name": "nothing", "seen": "x"},
}


def all_routes(world: World) -> list[tuple[str, str]]:
    found = []

    def walk(routes: Any) -> None:
        for route in routes:
            if isinstance(route, APIRoute):
                found.extend((method, route.path) for method in route.methods)
            elif hasattr(route, "original_router"):
                walk(route.original_router.routes)

    walk(world.app.routes)
    return found


def ask(client: Client, method: str, route: str):  # type: ignore[no-untyped-def]
    path = route.replace("{secret}", "x" * 43).replace("{what}", "votes.jsonl")
    path = path.replace("{handle}", "h" * 22).replace("{id}", "1").replace("{item}", "1").replace("{model}", "reward")
    if method == "GET":
        return client.get(path)
    if path in API_BODIES:
        return client.api(path.removeprefix("/api/"), API_BODIES[path])
    if path in ("/manage/prompts/import", "/manage/prompts/responses"):
        return client.http.post(path, data={"csrf": client.csrf}, files={"file": ("p.jsonl", b"one\n")})
    return client.form(path, **FORMS.get(path, {}))


def test_every_route_is_known_with_its_least_role(world: World) -> None:
    # programs' routes take tokens: tests/test_api.py
    here = {f"{method} {path}" for method, path in all_routes(world) if not path.startswith("/api/v1/")}
    assert here == LEAST.keys()


@pytest.mark.parametrize("role", [None, *ROLES])
def test_every_route_with_every_role(world: World, role: Any) -> None:
    wrong = []
    for name, least in LEAST.items():
        client = world.client(None) if role is None else world.client(f"{role} {name}", role)
        method, _, route = name.partition(" ")
        answer = ask(client, method, route)
        allowed = least is None or (role is not None and ROLES.index(role) >= ROLES.index(least))  # type: ignore[arg-type]
        if allowed:
            refused = answer.status_code in (401, 403) and route != "/sign-in"
        else:
            refused = answer.status_code == (403 if role else 401)
            refused = refused or (role is None and method == "GET" and answer.headers.get("location") == "/sign-in")
        if refused == allowed or answer.status_code >= 500:
            wrong.append((name, answer.status_code))
    assert wrong == []


def test_nothing_is_done_without_the_pages_token(world: World) -> None:
    for name in (name for name, least in LEAST.items() if least and name.startswith("POST")):
        client = world.client(name, "admin")
        events = len(world.store.events())
        client.csrf = "x" * 32
        assert ask(client, "POST", name.split()[1]).status_code == 403, name
        assert len(world.store.events()) == events, name


@pytest.mark.parametrize(
    "headers", [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}]
)
def test_other_sites_are_turned_away(world: World, headers: dict[str, str]) -> None:
    client = world.client("ann")
    client.http.headers.update(headers)
    assert client.api("next", {"kind": "compare"}).status_code == 403
    assert world.client(None).http.post("/sign-in", headers=headers).status_code == 403


def test_every_response_has_the_security_headers(world: World) -> None:
    client = world.client("ann")
    for answer in (
        client.get("/compare"), client.get("/nowhere"), client.get("/manage"), client.api("next", {"kind": "x"}),
        client.get("/static/app.css"), world.client(None).get("/sign-in"), client.api("judge", {}, csrf=False),
    ):  # fmt: skip
        assert answer.headers["content-security-policy"] == CONTENT_POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "unsafe" not in CONTENT_POLICY
        assert "server" not in answer.headers
    assert client.get("/compare").headers["cache-control"] == "no-store"
    versioned = re.findall(r'(?:src|href)="(/static/[^"]+)"', client.get("/compare").text)
    assert len(versioned) == 5
    assert all("immutable" in client.get(path).headers["cache-control"] for path in versioned)
    shared = client.get("/static/common.js")  # compare.js imports it by this name: a newer Keel must reach the browser
    assert shared.headers["cache-control"] == "no-cache"
    assert shared.headers["etag"]
    cookie = world.client(None).http.post(f"/enter/{world.people.owner_link()}").headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=lax" in cookie.lower()


# ------------------------------------------------------------------------------------------------------- blindness


def test_nothing_about_the_models_reaches_the_browser_before_the_vote(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with Store(tmp_path / "feedback.db") as store:
        _nothing_is_told(World(store, items=6, replies=4), caplog)


def _nothing_is_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    manage = world.app.state.services.manage
    manage.set_gold(world.items[0], "first", "admin")
    manage.set_gold_every(1, "admin")
    manage.ask_for("rank", 2, 1, "admin")
    manage.ask_for("edit", 2, 1, "admin")
    client = world.client("ann")
    pages = [client.get(path) for path in ("/compare", "/rank", "/write", "/edit", "/arena", "/mine", "/guideline")]
    first = client.api("next", {"kind": "compare"})
    plain = client.api("next", {"kind": "compare", "holding": [first.json()["item"]["id"]]})
    assert set(first.json()["item"]) == {"id", "kind", "messages", "shown"} == set(plain.json()["item"])
    assert [set(shown) for shown in first.json()["item"]["shown"]] == [{"html", "text"}] * 2
    others = [client.api("next", {"kind": kind}) for kind in ("rank", "edit")]
    for answer in (first, plain, *others):  # a gold item, one that is fetched ahead, and other work look alike
        said = answer.json()
        assert set(said) == {"item", "progress", "guideline"}
        assert set(said["item"]) == {"id", "kind", "messages", "shown"}
        assert {key for shown in said["item"]["shown"] for key in shown} == {"html", "text"}
        assert {key for message in said["item"]["messages"] for key in message} == {"role", "html"}
    assert first.json()["progress"]["wanted"] == plain.json()["progress"]["wanted"]
    voted = vote_on(client, first.json()["item"])
    started = client.api("arena", {})
    said = client.api(f"arena/{started.json()['id']}/say", {"message": "hello"})
    for answer in (*pages, first, plain, *others, voted, client.api("undo", {"kind": "compare"}), started, said):
        assert answer.status_code == 200
        everything = re.sub(r"[\w-]{22,}", "", answer.text + json.dumps(dict(answer.headers)))  # tokens hold any word
        for secret in (SECRET_MODEL, SECRET_META, "feedface", "secret-one", "secret-two", "gold", "fingerprint"):
            assert secret not in everything, (answer.url, secret)
    told = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "asyncio"))]
    assert not any(secret in line for line in told for secret in ("secret-one", "secret-two", SECRET_MODEL))
    names = client.api(f"arena/{started.json()['id']}/vote", {"token": token(), "choice": "left"}).json()
    assert sorted(names.values()) == ["secret-one", "secret-two"]


def test_annotators_see_their_own_work_alone(world: World) -> None:
    ann, bo = world.client("ann"), world.client("bo")
    item = next_item(ann)
    assert vote_on(bo, item).status_code == 400
    assert vote_on(ann, item, reason="ann's own words").status_code == 200
    assert re.sub("<[^>]+>", "", item["messages"][0]["html"]).strip() in ann.get("/mine").text
    assert "Question" not in bo.get("/mine").text
    id = ann.api("arena", {}).json()["id"]
    assert bo.api(f"arena/{id}/say", {"message": "x"}).status_code == 400
    assert bo.api(f"arena/{id}/vote", {"token": token(), "choice": "left"}).status_code == 400


@pytest.mark.parametrize(
    ("markdown", "never", "kept"),
    [
        ("<script>alert(1)</script>", "<script", "&lt;script&gt;"),
        ('<img src=x onerror="alert(1)">', "<img", "&lt;img"),
        ("![pixel](https://evil.example/p.png)", "<img", "[image: pixel]"),
        ("[click](javascript:alert(1))", "href", "click"),
        ("[click](https://evil.example)", "href", "https://evil.example"),
        ("**bold** and `<b>`", "<b>", "<strong>bold</strong>"),
        ("```html\n<script>\n```", "<script>", "&lt;script&gt;"),
        ('[a](https://e.example "onmouseover=x")', "href", "https://e.example"),
        ("<https://evil.example>", "href", "https://evil.example"),
        ("> " * 500 + "deep", "<script", "deep"),
    ],
)
def test_markdown_can_do_nothing(markdown: str, never: str, kept: str) -> None:
    html = render(markdown)
    assert never not in html
    assert kept in html


# --------------------------------------------------------------------------------------------------- votes over HTTP


def test_a_vote_sent_twice_counts_once(world: World) -> None:
    client = world.client("ann")
    body = {"assignment": next_item(client)["id"], "token": token(), "choice": "right", "strength": 2}
    answers = [client.api("judge", body) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[-1].json()["progress"]["today"] == 1
    assert len(world.store.judgements()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"choice": "up"}, {"strength": 4}, {"seconds": -1}, {"seconds": 1e999}, {"token": "short"},
        {"token": "a b" * 9},
        {"assignment": 2**40}, {"assignment": -1}, {"ratings": {"middle": {}}}, {"ratings": {"left": {"helpful": 9}}},
        {"more": 1}, {"reason": "x" * 200_000},
    ],
)  # fmt: skip
def test_impossible_votes_are_refused(world: World, change: dict) -> None:
    client = world.client("ann")
    body = {"assignment": next_item(client)["id"], "token": token(), "choice": "left", **change}
    answer = client.http.post(
        "/api/judge",
        content=json.dumps(body),
        headers={"X-CSRF": client.csrf, "Content-Type": "application/json"},
    )
    assert answer.status_code == 422
    assert "error" in answer.json()
    assert world.store.judgements() == []


def test_a_vote_counts_under_the_guideline_that_its_page_was_made_with(world: World) -> None:
    client = world.client("ann")
    page = client.get("/compare").text
    assert '<meta name="guideline" content="1">' in page
    old, late = next_item(client), next_item(client, holding=())
    assert client.api("next", {"kind": "compare"}).json()["guideline"] == "1"
    world.client("boss", "admin").form("/manage/guideline", text="New words", aspects="kind: Is it kind?")
    assert client.api("next", {"kind": "compare"}).json()["guideline"] == "2"  # the page says that there is a new one
    given = {"left": {"helpful": 4, "kind": 1}}
    assert vote_on(client, old, guideline="1", ratings=given).status_code == 200
    assert vote_on(client, next_item(client), ratings=given).status_code == 200
    assert vote_on(client, next_item(client), guideline="9").status_code == 400
    assert [(v.guideline, dict(v.ratings)) for v in world.store.judgements()] == [
        ("1", {"left": {"helpful": 4}}),
        ("2", {"left": {"kind": 1}}),
    ]
    assert late == old


def test_holding_too_much_gets_no_more(world: World) -> None:
    client = world.client("ann")
    assert client.api("next", {"kind": "compare", "holding": [f"{n:022}" for n in range(8)]}).json()["item"] is None


def test_rank_write_and_edit_over_http(tmp_path: Path) -> None:
    with Store(tmp_path / "feedback.db") as store:
        world = World(store, items=2, replies=4)
        admin, ann = world.client("boss", "admin"), world.client("ann")
        for kind in ("rank", "write", "edit"):
            assert admin.form("/manage/prompts/ask", kind=kind, prompts="2", overlap="1").status_code == 303
        rank = next_item(ann, "rank")
        given = {"assignment": rank["id"], "token": token(), "tiers": [[3], [0, 1, 2]]}
        assert ann.api("rank", given).json()["progress"]["today"] == 1
        for kind in ("write", "edit"):
            item = next_item(ann, kind)
            body = {"assignment": item["id"], "token": token(), "kind": kind, "text": f"my {kind}"}
            assert ann.api("write", body).status_code == 200
        pairs = admin.get("/manage/export/pairs.jsonl").text.splitlines()
        shown = [json.loads(line)["messages"][-1]["content"] for line in
                 admin.get("/manage/export/demonstrations.jsonl").text.splitlines()]  # fmt: skip
        assert (len(pairs), shown) == (7, ["my write", "my edit"])


# ---------------------------------------------------------------------------------------------------------- the door


def test_invitation_password_and_signing_out(world: World) -> None:
    admin, stranger = world.client("boss", "admin"), world.client(None)
    page = admin.form("/manage/people/invite", role="reviewer").text
    link = page.split('readonly value="')[1].split('"')[0]
    path = "/join/" + link.split("/join/")[1]
    assert link.split("/join/")[1] not in admin.get("/manage/people").text  # shown once
    assert stranger.get(path).status_code == 200
    assert stranger.http.post(path, data={"name": "Ann", "password": "short"}).status_code == 400
    joined = stranger.http.post(path, data={"name": "Ann", "password": PASSWORD})
    assert (joined.status_code, joined.headers["location"]) == (303, "/guideline")
    assert stranger.get("/manage/quality").status_code == 200
    assert world.client(None).get(path).status_code == 404
    stranger.csrf = stranger.get("/guideline").text.split('name="csrf" content="')[1].split('"')[0]
    assert stranger.form("/sign-out").status_code == 303
    assert stranger.get("/compare").headers["location"] == "/sign-in"
    assert stranger.http.post("/sign-in", data={"name": "Ann", "password": PASSWORD}).status_code == 303


def test_looking_at_a_link_does_not_use_it(world: World) -> None:
    path = f"/enter/{world.people.owner_link()}"
    stranger = world.client(None)
    for _ in range(3):
        assert stranger.get(path).status_code == 200
    assert stranger.http.post(path).status_code == 303
    assert world.client(None).http.post(path).status_code == 404


def test_guessing_passwords_ends_in_a_pause(world: World) -> None:
    stranger = world.client(None)
    codes = [
        stranger.http.post("/sign-in", data={"name": "ann", "password": f"guess number {i}"}).status_code
        for i in range(10)
    ]
    assert codes[0] == 403
    assert codes[-1] == 429
    answer = stranger.http.post("/sign-in", data={"name": "ANN", "password": "x"})
    assert int(answer.headers["retry-after"]) > 0


def test_buckets_fill_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("keel.web.app.limits.time.monotonic", lambda: now[0])
    buckets = Buckets(Rate(burst=2, per_second=0.5))
    assert [buckets.take("a") for _ in range(3)] == [0, 0, 2.0]
    assert buckets.take("b") == 0
    now[0] += 2
    assert buckets.wait("a") == 0
    assert [buckets.take("a") for _ in range(2)] == [0, 2.0]


def test_many_requests_of_one_session_end_in_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel.web.app.security.REQUESTS", Rate(20, 0.001))  # a slow machine would never get to the end
    with Store(tmp_path / "feedback.db") as store:
        world = World(store)
        ann, bo = world.client("ann"), world.client("bo")  # whose first request this is
        assert [ann.get("/guideline").status_code for _ in range(21)] == [200] * 19 + [429] * 2
        assert bo.get("/guideline").status_code == 200


def test_what_is_too_large_is_refused(world: World) -> None:
    client = world.client("ann")
    answer = client.http.post("/api/next", content=b"x" * 1_100_000, headers={"X-CSRF": client.csrf})
    assert answer.status_code == 413

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 100_000

    chunked = client.http.post("/api/next", content=chunks(), headers={"X-CSRF": client.csrf})
    assert 400 <= chunked.status_code < 500


def test_errors_name_the_remedy_and_no_secret_is_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    client = world.client("boss", "admin")
    answer = client.form("/manage/guideline", text="x", aspects=": nothing")
    assert answer.status_code == 400
    assert "a line each" in answer.text
    # what was typed is still there
    assert ">x</textarea>" in answer.text
    assert ">: nothing</textarea>" in answer.text
    refused = client.form("/manage/prompts/ask", kind="rank", prompts="0", overlap="1")
    assert (refused.status_code, 'href="/manage/prompts"' in refused.text) == (400, True)
    secret = world.people.owner_link()
    world.app.state.services.people.link = None  # a fault inside the server
    assert client.get(f"/enter/{secret}").status_code == 500
    assert secret not in caplog.text
    assert "/enter/{secret}" in caplog.text
