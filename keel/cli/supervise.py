"""Runs a command to its end and notes in a file how it ended: the server that asked for it may be gone by then.

A process of its own for as long as the command runs, so it imports nothing that is large.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

INTERRUPTED = 130
NICER = 10  # people who label come first


def supervise(file: Path, lock: int, command: Sequence[str]) -> None:
    """``file``: JSON that gains ``pid`` at the start and ``state`` (done, failed, stopped) and ``ended`` at the
    end. ``lock``: a descriptor that the command inherits."""
    # A handler, not SIG_IGN, which the command would inherit: the signal is for it, and this process notes the end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    os.nice(NICER)
    _note(file, pid=os.getpid())
    code = subprocess.run(command, pass_fds=[lock], check=False).returncode
    ended = "done" if code == 0 else "stopped" if code in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM) else "failed"
    _note(file, state=ended, ended=datetime.now(UTC).isoformat())


def _note(file: Path, **changes: Any) -> None:
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    os.replace(new, file)


if __name__ == "__main__":
    supervise(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
