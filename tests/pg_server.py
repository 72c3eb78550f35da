"""A PostgreSQL of the tests' own: started in a temporary folder on a free port of the loopback, gone at the end."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


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


@contextmanager
def running() -> Iterator[str]:
    """The URL of a server, without a database's name. It runs as another user where we are root: it refuses root."""
    folder = Path(tempfile.mkdtemp(prefix="keel-pg-"))
    account = _account()
    if account is not None:
        os.chown(folder, account.pw_uid, account.pw_gid)
    user = None if account is None else account.pw_uid
    group = None if account is None else account.pw_gid

    def call(program: str, *arguments: str) -> None:
        # output goes to a file: the server inherits it, and a pipe would stay open as long as the server runs
        with (folder.parent / f"{folder.name}.log").open("w+") as log:
            command = [str(binaries() / program), *arguments]
            done = subprocess.run(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=folder,
                user=user,
                group=group,
                extra_groups=None if account is None else [],
                timeout=120,
            )
            log.seek(0)
            assert done.returncode == 0, f"{program} failed: {log.read()}"

    data = str(folder / "data")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        call("initdb", "-D", data, "-U", "keel", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
        # fsync off: the tests kill our processes, never the database server
        options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off -c max_connections=60 -c shared_buffers=32MB"
        call("pg_ctl", "-D", data, "-w", "-t", "60", "-o", options, "start")
        try:
            yield f"postgresql://keel@127.0.0.1:{port}"
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        (folder.parent / f"{folder.name}.log").unlink(missing_ok=True)


def _account() -> pwd.struct_passwd | None:
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise Unavailable("PostgreSQL does not run as root, and there is neither a postgres nor a nobody user")
