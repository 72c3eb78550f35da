"""A PostgreSQL of the tests' own: started in a temporary folder on a free port of the loopback, gone at the end."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from loopback import free_port


class Unavailable(Exception):
    """There is no PostgreSQL to test on."""


def server_or_skip() -> str:
    """Why a test may be skipped: no PostgreSQL here. In CI that is a failure."""
    try:
        return str(binaries())
    except Unavailable as reason:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must test PostgreSQL too: {reason}")
        pytest.skip(str(reason))


def binaries() -> Path:
    """The folder with initdb and pg_ctl."""
    on_path = shutil.which("initdb")
    found = [Path(on_path).resolve().parent] if on_path else []
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: -float(folder.parent.name))
    for folder in found:
        if (folder / "initdb").exists() and (folder / "pg_ctl").exists():
            return folder
    raise Unavailable("PostgreSQL is not installed (no initdb); on Debian: apt-get install postgresql")


class Server:
    """A server in a folder of its own. It runs as another user where we are root: it refuses root."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._data = folder, str(folder / "data")
        self._account = _account()
        if self._account is not None:
            os.chown(folder, self._account.pw_uid, self._account.pw_gid)
        self._port = free_port()
        self.url = f"postgresql://keel@127.0.0.1:{self._port}"
        self._call("initdb", "-D", self._data, "-U", "keel", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")

    def start(self) -> None:
        # fsync off: the tests kill our processes, never the database server
        options = f"-h 127.0.0.1 -p {self._port} -k {self.folder} -c fsync=off -c max_connections=60"
        options += " -c shared_buffers=32MB"
        self._call("pg_ctl", "-D", self._data, "-w", "-t", "60", "-o", options, "start")

    def stop(self, mode: str = "immediate") -> None:
        self._call("pg_ctl", "-D", self._data, "-m", mode, "-w", "stop")

    def _call(self, program: str, *arguments: str) -> None:
        account = self._account
        # output goes to a file: the server inherits it, and a pipe would stay open as long as the server runs
        with (self.folder.parent / f"{self.folder.name}.log").open("w+") as log:
            command = [str(binaries() / program), *arguments]
            done = subprocess.run(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                user=None if account is None else account.pw_uid,
                group=None if account is None else account.pw_gid,
                extra_groups=None if account is None else [],
                timeout=120,
            )
            log.seek(0)
            assert done.returncode == 0, f"{program} failed: {log.read()}"


@contextmanager
def started() -> Iterator[Server]:
    """A server that runs, and may be stopped and started again."""
    folder = Path(tempfile.mkdtemp(prefix="keel-pg-"))
    try:
        server = Server(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        (folder.parent / f"{folder.name}.log").unlink(missing_ok=True)


@contextmanager
def running() -> Iterator[str]:
    """The URL of a server, without a database's name."""
    with started() as server:
        yield server.url


def _account() -> pwd.struct_passwd | None:
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise Unavailable("PostgreSQL does not run as root, and there is neither a postgres nor a nobody user")
