"""Empty databases for tests, SQLite files and schemas of the tests' own PostgreSQL."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, event, inspect, text

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


class Migrations:
    """Stands for ``alembic.command`` where the store opens a database. An empty one gets the statements that the first
    one of its kind got: to work them out takes ten times as long as to run them."""

    def __init__(self) -> None:
        self.statements: dict[str, list[tuple[str, Any]]] = {}

    def upgrade(self, config: Config, revision: str) -> None:
        connection = config.attributes["connection"]
        kind = connection.dialect.name
        if inspect(connection).get_table_names():
            command.upgrade(config, revision)
        elif kind in self.statements:
            with closing(connection.connection.cursor()) as cursor:
                for statement, parameters in self.statements[kind]:
                    connection.dialect.do_execute(cursor, statement, parameters)
        else:
            taken: list[tuple[str, Any]] = []

            def take(_: object, __: object, statement: str, parameters: Any, *more: object) -> None:
                taken.append((statement, parameters))

            event.listen(connection.engine, "before_cursor_execute", take)
            command.upgrade(config, revision)
            event.remove(connection.engine, "before_cursor_execute", take)
            self.statements[kind] = taken
