"""Writing so that a kill, a full disk or a power cut leaves either the old file or the new one, never half of one.

Everything is written to a temporary name beside its target, flushed to the disk, and renamed. Temporary names are
``NAME.tmp-PID`` and, while a folder is being swapped, ``NAME.old-PID``; `recover` puts a folder back in order after
a kill. It must run only under the run directory's lock, when no other process writes there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from keel.types import UserError

_TEMPORARY = re.compile(r"^(?P<name>.+)\.(?P<what>tmp|old)-\d+$")
_FULL = ("the disk is full", "Free some space")
# What the system refuses, by its number: what that means, and what to do.
_REFUSED = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: ("a file would become larger than the system allows (ulimit -f)", "Raise that limit"),
    errno.EROFS: ("the file system is read-only", "Make it writable"),
    errno.EACCES: ("permission denied", "Change the rights of that file or folder"),
    errno.EPERM: ("permission denied", "Change the rights of that file or folder"),
    errno.EIO: ("the disk cannot be read or written", "Look at the disk"),
}
# Compiled writers (torch's zip writer, safetensors, SQLite) put the system's words into errors of their own.
_WORDS = {
    "database or disk is full": _FULL,
    **{os.strerror(code): _REFUSED[code] for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)},
}


def _refused(error: BaseException | None, path: Path) -> tuple[Path, str, str] | None:
    """(where, what, remedy) when an error, or one that it came from, says that the system refused to read or write."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REFUSED:
            named = Path(error.filename) if isinstance(error.filename, str) else path
            own = any(_TEMPORARY.match(part) for part in named.parts)  # of what is being written to ``path``
            return path if own else named, *_REFUSED[error.errno]
        for words, refused in _WORDS.items():
            if words in str(error):
                return path, *refused
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def refusals_as_user_errors(path: Path) -> Iterator[None]:
    """Turns what the system refuses in its body (a full disk, a folder that may not be written) into a `UserError` that
    says where; other errors pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        refused = _refused(error, path)
        if refused is None:
            raise
        where, what, remedy = refused
        raise UserError(
            f"{where}: {what}; what was saved before is intact. {remedy} and run the same command again: it resumes "
            "from the last saved state"
        ) from error


def _fsync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` durable (POSIX asks for an fsync of the directory itself)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network and FUSE file systems cannot sync a directory
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _temporary(path: Path, what: str = "tmp") -> Path:
    return path.with_name(f"{path.name}.{what}-{os.getpid()}")


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls ``write`` with a binary file whose content replaces ``path`` once it is safely on the disk."""
    temporary = _temporary(path)
    with refusals_as_user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Replaces ``path`` with ``text`` (UTF-8)."""
    atomic_write(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Replaces ``path`` with ``value`` as JSON (not a number becomes an error: JSON has no word for it)."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `UserError` when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error}); restore the file or use another run directory") from error


@contextlib.contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes ``path`` when the body ends; an existing ``path`` is swapped out
    whole. When the body fails, ``path`` is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _temporary(path), _temporary(path, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    with refusals_as_user_errors(path):
        try:
            temporary.mkdir()
            yield temporary
            _fsync_tree(temporary)
            if path.exists():
                os.rename(path, old)  # a kill between the two renames: `recover` puts the old one back
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if old.exists() and not path.exists():
                os.rename(old, path)
            raise
        _fsync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder whose entries are moved into ``folder``, one rename each, when the body ends.

    For a checkpoint that shares its folder with other files. A kill among the renames leaves whole files of two
    checkpoints: the caller must mark the folder complete afterwards and write it again when the mark is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(folder / "checkpoint")
    shutil.rmtree(temporary, ignore_errors=True)
    with refusals_as_user_errors(folder):
        try:
            temporary.mkdir()
            yield temporary
            _fsync_tree(temporary)
            for entry in sorted(temporary.iterdir()):
                target = folder / entry.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(entry, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _fsync_folder(folder)


def _fsync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _fsync_file(path)
    for path in (folder, *(entry for entry in folder.rglob("*") if entry.is_dir())):
        _fsync_folder(path)


def recover(folder: Path) -> list[Path]:
    """Clears what a killed process left in ``folder`` and its sub-folders; returns the paths that it dealt with.

    A swapped-out folder whose successor never arrived is put back; every other temporary is deleted.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        match = _TEMPORARY.match(path.name)
        if match is None or not path.exists():  # a temporary inside a temporary went with it
            continue
        found.append(path)
        target = path.with_name(match["name"])
        if match["what"] == "old" and not target.exists():
            os.rename(path, target)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return found


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, or of a folder's (names and contents, hidden entries left out), in hex."""
    digest = hashlib.sha256()
    if path.is_dir():
        for entry in sorted(path.rglob("*")):
            name = entry.relative_to(path)
            if entry.is_file() and not any(part.startswith(".") for part in name.parts):
                digest.update(f"{name.as_posix()}\0{hash_file(entry)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_config(value: Any) -> str:
    """SHA-256 of any JSON-like value, the same whatever the order of its keys, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
