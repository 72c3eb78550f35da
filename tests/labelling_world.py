"""A store with something to label, people to do it, and clients that are signed in as them."""

from __future__ import annotations

import queue
import re
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import anyio
from anyio.from_thread import BlockingPortal
from argon2 import PasswordHasher
from fastapi.testclient import TestClient

from keel.recipe.sections import SamplingConfig
from keel.store import Store, people
from keel.store.people import Account, AccountRole
from keel.types import Completion, Message, Prompt
from keel.web.app.create import create_app
from keel.web.app.security import COOKIE
from keel.web.service import exports
from keel.web.service import people as accounts
from keel.web.service.people import People
from keel.web.service.sources import ArenaModel, SampledModel, Sources
from keel.web.service.start import prepare

PASSWORD = "a long enough password"
SECRET_MODEL = "runs/hidden-model"
SECRET_META = "the graders' note"


# The package's takes 64 MiB and a tenth of a second. Each app hashes once at its start, and most tests start one.
HASHER = accounts._HASHER
accounts._HASHER = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


def token() -> str:
    return uuid.uuid4().hex


def fill(store: Store, items: int, overlap: int = 1, replies: int = 2) -> list[int]:
    """``items`` comparisons of the first two of ``replies`` responses each; the items' ids."""
    with store.session() as s:
        pairs = []
        for i in range(items):
            s.add_prompts([Prompt(f"p{i}", (Message("user", f"Question {i}?"),), meta={"answer": SECRET_META})])
            texts = [Completion(f"Answer {i}, number {j}") for j in range(replies)]
            ids = s.add_responses(f"p{i}", texts, SECRET_MODEL, SamplingConfig(), fingerprint="feedface")
            pairs.append((ids[0], ids[1]))
        return s.add_comparisons(pairs, overlap, "main")


def person(store: Store, name: str, role: AccountRole = "annotator") -> Account:
    """An account without a password: hashing takes longer than most tests."""
    with store.transaction(writes=True) as connection:
        return people.add_account(connection, name, role, None, "test", store.now)


def words(name: str, delay: float = 0.0) -> ArenaModel:
    def reply(messages: Sequence[Message]) -> Iterator[str]:
        for word in ["I", " heard:", f" {messages[-1].content}", f" ({len(messages)})"]:
            time.sleep(delay)
            yield word

    return ArenaModel(name, reply)


def fake_sources(delay: float = 0.0) -> Sources:
    def sample(prompts: Sequence[Prompt], count: int) -> list[list[Completion]]:
        return [[Completion(f"sampled {prompt.id} {i}") for i in range(count)] for prompt in prompts]

    def read(path: Path) -> list[Prompt]:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Prompt(f"imported-{i}", (Message("user", line),)) for i, line in enumerate(lines)]

    hidden = SampledModel("sft", SECRET_MODEL, "feedface", SamplingConfig(), sample)
    return Sources(read, [words("secret-one", delay), words("secret-two", delay)], {"sft": hidden})


@cache
def portal() -> BlockingPortal:
    """An event loop in a thread, for all clients: left alone, each of their requests starts one of its own."""
    begun: queue.SimpleQueue[BlockingPortal] = queue.SimpleQueue()

    async def stay() -> None:
        async with BlockingPortal() as made:
            begun.put(made)
            await made.sleep_until_stopped()

    threading.Thread(target=anyio.run, args=(stay,), daemon=True).start()
    return begun.get()


class Client:
    """A browser of sorts: it keeps the cookie and sends the page's token."""

    def __init__(self, app: object, cookie: str | None = None) -> None:
        self.http = TestClient(app, follow_redirects=False, raise_server_exceptions=False)  # type: ignore[arg-type]
        self.http.portal = portal()
        self.csrf = ""
        if cookie is not None:
            self.http.cookies.set(COOKIE, cookie)
            found = re.search(r'name="csrf" content="([^"]+)"', self.http.get("/guideline").text)
            assert found is not None
            self.csrf = found.group(1)

    def api(self, path: str, body: dict, csrf: bool = True):  # type: ignore[no-untyped-def]
        return self.http.post(f"/api/{path}", json=body, headers={"X-CSRF": self.csrf} if csrf else {})

    def form(self, path: str, **fields: str):  # type: ignore[no-untyped-def]
        return self.http.post(path, data={"csrf": self.csrf, **fields})

    def get(self, path: str):  # type: ignore[no-untyped-def]
        return self.http.get(path)


class World:
    def __init__(self, store: Store, items: int = 6, overlap: int = 1, replies: int = 2) -> None:
        self.store = store
        self.items = fill(store, items, overlap, replies) if items else []
        prepare(store)
        self.app = create_app(store, fake_sources())
        self.people = People(store)

    def client(self, name: str | None = None, role: AccountRole = "annotator") -> Client:
        """Signed in as somebody new; None: a stranger."""
        if name is None:
            return Client(self.app)
        return Client(self.app, self.people.start_session(person(self.store, name, role)))


def exported(store: Store, what: exports.Export) -> list[dict[str, Any]]:
    """The rows of one of the app's exports."""
    with store.moment() as connection:
        return list(exports.rows(connection, what))
