"""The labelling app as a process of its own, which tests stop, kill and start again, and databases that they take away
from under it."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pg_server
from databases import postgres_urls
from loopback import free_port

from keel.store import Store
from keel.web.service.people import People

SERVER = """
import sys
from datetime import timedelta
import keel.store.engine, keel.store.store
keel.store.engine.WAIT_SECONDS = keel.store.store.WAIT_SECONDS = float(sys.argv[4])
from keel.store import Store
from keel.web.server import serve
from keel.web.service.sources import Sources
store = Store(sys.argv[1], lease=timedelta(seconds=float(sys.argv[3])))
serve(store, "127.0.0.1", int(sys.argv[2]), Sources(), lambda line: print(line, flush=True))
"""


class Process:
    """``lease``: seconds; ``wait``: seconds that the server waits for a locked database."""

    def __init__(self, url: str, lease: float = 1800.0, wait: float = 1.0) -> None:
        port = free_port()  # one for good: what a browser keeps belongs to it
        self._arguments = [sys.executable, "-c", SERVER, url, str(port), str(lease), str(wait)]
        self.url = f"http://127.0.0.1:{port}"
        self.store = Store(url)
        self.people = People(self.store)
        self.start()

    def start(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        self._process = subprocess.Popen(self._arguments, stdout=subprocess.PIPE, text=True, env=environment)
        assert self._process.stdout is not None
        assert re.search(r":(\d+)", self._process.stdout.readline())
        self._process.stdout.readline()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def close(self) -> None:
        self.kill()
        self.store.close()


@contextmanager
def sqlite_that_locks(folder: Path) -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    """A database's URL, and what takes it away and gives it back."""
    file = folder / "feedback.db"
    others: list[sqlite3.Connection] = []

    def take() -> None:
        other = sqlite3.connect(file, isolation_level=None, timeout=10)
        other.execute("BEGIN EXCLUSIVE")
        others.append(other)

    def give() -> None:
        other = others.pop()
        other.execute("ROLLBACK")
        other.close()

    yield f"sqlite:///{file}", take, give


@contextmanager
def postgres_that_stops() -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    pg_server.server_or_skip()
    with pg_server.started() as server, postgres_urls(server.url) as make:
        yield make(), server.stop, server.start
