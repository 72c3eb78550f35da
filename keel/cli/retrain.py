"""Training again in the background, for the labelling app: ``keel run --out RUN`` in a process of its own, which
outlives the server that started it.

``RUN/retrain/`` holds ``state.json``, ``log.txt`` and a lock. The lock is inherited by the processes that train. The
system frees it when the last of them ends, however it ends: who finds it free knows that nobody trains.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from keel.recipe.recipe import STAGES
from keel.run import RunDir, read_json, write_json
from keel.types import UserError
from keel.web.service.sources import StageProgress, TrainingStatus

FOLDER = "retrain"
LOG_LINES = 30


class Retraining:
    """`keel.web.service.sources.Training` for a run directory. ``command``: what trains (tests have their own)."""

    def __init__(self, run: str | Path, command: Sequence[str] | None = None) -> None:
        self._run = RunDir(run)
        self._folder = Path(run) / FOLDER
        self._command = list(command or [sys.executable, "-m", "keel", "run", "--out", str(run)])
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()

    def start(self, actor: str) -> None:
        if not self._run.manifest.read().get("recipe"):
            raise UserError(f"{self._run.path}: there is no run yet to train again; run a recipe with keel run first")
        self._folder.mkdir(exist_ok=True)
        with self._starting, self._locked() as lock:
            if lock is None:
                raise UserError("training is under way already; wait for it, or stop it")
            before = {name: _accuracy(self._run, name) for name in self._stages()}
            state = {"state": "running", "by": actor, "started": _now(), "ended": None, "before": before}
            state_file = self._folder / "state.json"
            write_json(state_file, state)
            supervisor = [sys.executable, "-m", "keel.cli.supervise", str(state_file), str(lock), *self._command]
            with (self._folder / "log.txt").open("wb") as log:
                self._process = subprocess.Popen(
                    supervisor,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C in the server's terminal is not meant for it
                    pass_fds=[lock],
                    env={**os.environ, "COLUMNS": "120", "PYTHONUNBUFFERED": "1"},
                )

    def stop(self) -> None:
        """As Ctrl-C would: the stage in hand goes on from its last saved state next time."""
        with self._starting, self._locked() as lock:
            if lock is not None:
                raise UserError("nothing is being trained")
            pid = self._state().get("pid")
            if pid is None:
                raise UserError("training is just starting; try it again in a moment")
            os.killpg(int(pid), signal.SIGINT)

    def status(self) -> TrainingStatus:
        if self._process is not None:
            self._process.poll()  # leaves no zombie behind
        with self._starting, self._locked() as lock:
            state, free = self._state(), lock is not None
        known: dict[str, dict[str, Any]] = self._run.manifest.read().get("stages", {})
        kinds = [kind for kind, stage in STAGES.items() if stage.learns_from == "preferences"]
        learned = [e["started"] for e in known.values() if e["kind"] in kinds and e["status"] == "done"]
        trained_at = min(map(datetime.fromisoformat, learned), default=None)
        if not state:
            return TrainingStatus("never", trained_at=trained_at)
        name, message = str(state["state"]), ""
        if name == "running" and free:
            name, message = "stopped", "the process was killed, or the machine started anew; train again to go on"
        started = datetime.fromisoformat(state["started"])
        return TrainingStatus(
            state=name,
            by=state["by"],
            started=started,
            ended=datetime.fromisoformat(state["ended"]) if state["ended"] else None,
            message=message,
            stages=[self._progress(stage, entry, state, started) for stage, entry in known.items()],
            log=self._log(),
            trained_at=trained_at,
        )

    def _progress(self, name: str, entry: dict[str, Any], state: dict[str, Any], started: datetime) -> StageProgress:
        touched = datetime.fromisoformat(entry["started"]) >= started.replace(microsecond=0)
        summary = self._run.stage(name).summary() if touched and entry["status"] == "done" else {}
        return StageProgress(
            name=name,
            kind=entry["kind"],
            state=entry["status"] if touched else "not touched",
            seconds=float(entry["seconds"]),
            accuracy=summary.get("accuracy"),
            before=state["before"].get(name) if touched else None,
            people_votes=summary.get("people_votes"),
            model_votes=summary.get("model_votes"),
            simulated_votes=summary.get("simulated_votes"),
        )

    def _stages(self) -> list[str]:
        return [str(stage["name"]) for stage in self._run.manifest.read()["recipe"]["stages"]]

    def _state(self) -> dict[str, Any]:
        path = self._folder / "state.json"
        return dict(read_json(path)) if path.exists() else {}

    def _log(self) -> list[str]:
        path = self._folder / "log.txt"
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            return file.read().decode(errors="replace").splitlines()[-LOG_LINES:]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int | None]:
        """The lock's descriptor, or None while somebody trains. Whoever inherits it keeps it locked."""
        if not self._folder.exists():
            yield -1
            return
        with (self._folder / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            yield file.fileno()


def _accuracy(run: RunDir, stage: str) -> float | None:
    value = run.stage(stage).summary().get("accuracy")
    return float(value) if isinstance(value, int | float) else None


def _now() -> str:
    return datetime.now(UTC).isoformat()
