"""Empty databases for tests, SQLite files and schemas of the tests' own PostgreSQL."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import create_engine, text

from keel.store.engine import parse_url


class Clock:
    """A store's time, which tests move on."""

    def __init__(self) -> None:
        self.time = datetime(2026, 11, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time


@contextmanager
def sqlite_urls(folder: Path) -> Iterator[Callable[[], str]]:
    numbers = itertools.count()
    yield lambda: f"sqlite:///{folder}/feedback{next(numbers)}.db"


@contextmanager
def postgres_urls(server: str) -> Iterator[Callable[[], str]]:
    engine = create_engine(parse_url(f"{server}/postgres"))

    def create() -> str:  # a schema of its own in one database: a new database takes longer to make and to remove
        name = f"keel_{uuid.uuid4().hex[:12]}"
        with engine.begin() as connection:
            connection.execute(text(f"CREATE SCHEMA {name}"))
        return f"{server}/postgres?options=-csearch_path%3D{name}"

    yield create
    engine.dispose()
