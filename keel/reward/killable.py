"""A function that may hang, crash or fill the memory, in processes of its own that are killed when it does.

A timeout by signal does not end what hangs inside one long multiplication; ending the process does. Each process works
at one job at a time, ends itself should its parent be gone, and is replaced when it is killed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import IO, Any

from keel.types import UserError

STARTING = 120.0  # seconds that a process has to import what it needs
MEMORY = 4 << 30  # bytes of addresses a process may have
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from keel.reward.killable import serve; serve()"


class Killable:
    """``factory``: ``module:name`` of what makes, once in each process, a function from one JSON value to another.
    ``seconds``: for one job."""

    def __init__(self, factory: str, seconds: float = 4.0, processes: int = 2) -> None:
        self.factory, self.seconds, self.processes = factory, seconds, processes
        self._idle: list[_Process] = []
        self._close = weakref.finalize(self, _kill, self._idle)

    def map(self, jobs: Sequence[Any]) -> list[Any]:
        """What the function makes of each job; None of one that it did not end in time, or failed at."""
        found: list[Any] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))
        busy: dict[_Process, tuple[int, float]] = {}
        try:
            while waiting or busy:
                while waiting and len(busy) < self.processes:
                    process = self._idle.pop() if self._idle else _Process(self.factory, self.seconds)
                    place = waiting.popleft()
                    busy[process] = (place, time.monotonic() + self.seconds)
                    process.send(jobs[place])
                nearest = min(deadline for _, deadline in busy.values())
                ready, _, _ = select.select(list(busy), [], [], max(0.0, nearest - time.monotonic()))
                now = time.monotonic()
                for process in [one for one, (_, deadline) in busy.items() if one in ready or deadline <= now]:
                    place, _ = busy.pop(process)
                    line = process.read() if process in ready else ""
                    if line.endswith("\n"):
                        found[place] = json.loads(line)
                        self._idle.append(process)
                    else:  # it died, or its time is over
                        process.kill()
        finally:
            _kill(list(busy))
        return found

    def close(self) -> None:
        self._close()


class _Process:
    """One process that has said that it is ready."""

    def __init__(self, factory: str, seconds: float) -> None:
        arguments = [sys.executable, "-c", _BOOT, json.dumps(sys.path), factory, str(seconds)]
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="surrogatepass",
            start_new_session=True,  # Ctrl-C is for the parent, which ends its processes
        )
        try:
            ready, _, _ = select.select([self], [], [], STARTING)
            said = self.read() if ready else ""
        except BaseException:
            self.kill()
            raise
        if said != '"ready"\n':
            self.kill()
            why = json.loads(said) if said else "it said nothing"
            raise UserError(f"{factory}: its process did not start: {why}")

    def fileno(self) -> int:
        return self._out.fileno()

    @property
    def _out(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout

    def send(self, job: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then nothing will be read of it either
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()

    def read(self) -> str:
        return self._out.readline()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _kill(processes: list[_Process]) -> None:
    while processes:
        processes.pop().kill()


def serve() -> None:
    """What a process does: one job a line, until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the function prints is no answer
    _limit_memory()
    module, _, name = sys.argv[2].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)()
    except Exception as error:  # said to the parent, in whatever way it failed
        print(json.dumps(f"{type(error).__name__}: {error}"), file=out, flush=True)
        return
    print('"ready"', file=out, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, float(sys.argv[3]) + 1)  # nobody may be left to kill it
        try:
            answer = json.dumps(function(json.loads(line)))
        except Exception:  # whatever a library makes of hostile text
            answer = "null"
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(answer, file=out, flush=True)


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
