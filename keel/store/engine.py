"""Opening the database: which one, whether it is ours, and its schema brought up to date."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DatabaseError
from sqlalchemy.pool import ConnectionPoolEntry

from keel.types import UserError

VERSION_TABLE = "keel_schema"
WAIT_SECONDS = 30  # how long a writer waits for another one
_MIGRATION_LOCK = 0x6B65656C  # PostgreSQL advisory lock: "keel" in ASCII


def open_engine(location: str | Path) -> Engine:
    """An engine on the store at ``location`` (a file's path, ``sqlite:///file`` or ``postgresql://...``) with the
    schema at its head: an empty database is built, an older one upgraded.

    Raises UserError when it can't be reached, is not a Keel store, or was written by a newer Keel.
    """
    url = parse_url(location)
    if url.get_backend_name() == "sqlite":
        engine = _sqlite(url)
    else:
        engine = create_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=30)
    try:
        _migrate(engine, url)
        if engine.dialect.name == "sqlite":
            _use_wal(engine)
    except DatabaseError as error:
        engine.dispose()
        reason = str(error.orig).strip().splitlines()[0]
        raise UserError(f"store {url}: {reason}; check that it is a database that Keel may write to") from error
    except BaseException:
        engine.dispose()
        raise
    return engine


def parse_url(location: str | Path) -> URL:
    """The database's URL; a plain path is a SQLite file."""
    given = str(location)
    try:
        url = make_url(given) if "://" in given else URL.create("sqlite", database=given)
    except ArgumentError:
        raise UserError(f"store {given!r} is no URL; write a file's path, or postgresql://user@host/name") from None
    if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        if find_spec("psycopg") is None:
            raise UserError(f"store {url} needs psycopg; install it with: pip install 'keel-rlhf[postgres]'")
        return url.set(drivername="postgresql+psycopg")
    if url.drivername != "sqlite":
        raise UserError(f"store {url}: {url.drivername} is not supported; use sqlite:///file or postgresql://...")
    if not url.database or url.database == ":memory:":
        raise UserError(f"store {given!r} names no file; judgements must outlive the process: use sqlite:///file.db")
    folder = Path(url.database).resolve().parent
    if not folder.is_dir():
        raise UserError(f"store {url}: the folder {folder} does not exist; create it first")
    return url


def exists(location: str | Path) -> bool:
    """False for a SQLite file that opening would make; a server's database is taken to be there."""
    given = str(location)
    if "://" in given and not given.startswith("sqlite:"):
        return True
    return Path(make_url(given).database or "" if "://" in given else given).exists()


def alembic_config(connection: Connection) -> Config:
    """Alembic's settings for Keel's migrations, to run on ``connection`` inside its transaction."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _sqlite(url: URL) -> Engine:
    engine = create_engine(url, connect_args={"timeout": WAIT_SECONDS}, pool_size=10, max_overflow=30)

    # The sqlite3 module begins transactions late and by its own rules; Keel says itself when one begins (below).
    @event.listens_for(engine, "connect")
    def _connect(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        # FULL: a commit is on the disk when it returns, so that an acknowledged judgement outlives a power cut
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.close()

    # A writer takes the write lock at its start: one that reads first and writes later could find that another has
    # written between, and SQLite would then fail it without waiting.
    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("keel_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _migrate(engine: Engine, url: URL) -> None:
    with engine.connect() as connection:
        if _is_current(connection, url):
            return
    with engine.connect().execution_options(keel_writes=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        if not _is_current(connection, url):  # asked again: another process may have just done it
            command.upgrade(alembic_config(connection), "head")


def _is_current(connection: Connection, url: URL) -> bool:
    tables = inspect(connection).get_table_names()
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    revision = context.get_current_revision()
    if revision is None:
        if tables:
            raise UserError(
                f"store {url} holds other tables ({', '.join(sorted(tables)[:3])}, ...) and is no Keel store; "
                "give it an empty database of its own"
            )
        return False
    scripts = ScriptDirectory.from_config(alembic_config(connection))
    if revision not in {script.revision for script in scripts.walk_revisions()}:
        raise UserError(f"store {url} was written by a newer Keel (schema {revision}); upgrade keel-rlhf to open it")
    return revision == scripts.get_current_head()


def compact(engine: Engine) -> None:
    """See Store.compact."""
    connection = engine.raw_connection()
    try:
        cursor = connection.cursor()
        cursor.execute("VACUUM")
        cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        cursor.close()
    except engine.dialect.dbapi.OperationalError:  # type: ignore[union-attr]
        pass  # locked: the texts are gone from the tables, and the pages will be written over
    finally:
        connection.close()


def _use_wal(engine: Engine) -> None:
    """Write-ahead logging: readers do not wait for the writer. It is a property of the file, set once; SQLite does not
    wait for other connections here, so Keel does."""
    connection = engine.raw_connection()
    try:
        cursor = connection.cursor()
        deadline = time.monotonic() + WAIT_SECONDS
        while cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":  # type: ignore[attr-defined]
            try:
                cursor.execute("PRAGMA journal_mode = WAL")
            except engine.dialect.dbapi.OperationalError:  # type: ignore[union-attr]
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        cursor.close()
    finally:
        connection.close()
