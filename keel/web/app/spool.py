"""A file that is sent while it is still being written. What is written waits on the disk, so that the database is read
at its own pace and not at that of whoever downloads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from keel.web.service.arena import Busy

MOST = 2  # files that are written at once
LOOK_SECONDS = 0.02  # between two looks at what was written
_PART = 256 * 1024  # bytes
_places = threading.BoundedSemaphore(MOST)


class Spool:
    """What ``write`` writes, as one file, into the folder that it is given; it stops when its second argument says that
    nobody reads on. Iterate to read. What it raises is raised here, at the start where nothing was written before.
    Busy when others' files are just being written."""

    def __init__(self, write: Callable[[Path, Callable[[], bool]], object]) -> None:
        if not _places.acquire(blocking=False):
            raise Busy("others' files are just being written; try again in a moment")
        self._write = write
        self._folder = TemporaryDirectory()
        self._ended, self._given_up = threading.Event(), threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="export")
        self._thread.start()
        self._parts = self._read()
        self._first = next(self._parts, b"")

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield self._first
            yield from self._parts
        finally:
            self.close()

    def close(self) -> None:
        """Nobody reads on."""
        self._given_up.set()

    def _work(self) -> None:
        try:
            self._write(Path(self._folder.name), lambda: not self._given_up.is_set())
        except Exception as error:
            self._error = error
        finally:
            self._ended.set()
            _places.release()
            self._given_up.wait()  # until it is read
            self._folder.cleanup()

    def _read(self) -> Iterator[bytes]:
        try:
            file = self._open()
            if file is not None:
                with file:
                    while (part := file.read(_PART)) or not self._ended.is_set():
                        if part:
                            yield part
                        else:
                            self._ended.wait(LOOK_SECONDS)
                    yield from iter(lambda: file.read(_PART), b"")
            if self._error is not None:
                raise self._error
        except BaseException:
            self.close()
            raise

    def _open(self) -> IO[bytes] | None:
        """What is being written, or was; None where nothing was. It stays the same file when it gets its name in the
        end."""
        while True:
            ended = self._ended.wait(LOOK_SECONDS)  # asked first: what is not there after the end will not come
            for path in Path(self._folder.name).iterdir():
                with suppress(FileNotFoundError):  # it got its name just now
                    return path.open("rb")
            if ended:
                return None
