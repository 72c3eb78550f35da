"""The run directory: ``manifest.json``, one folder a stage, ``feedback.db``, ``summary.json``, ``report.html``.

A stage's folder holds its checkpoint (as transformers loads it), ``metrics.jsonl``, ``tensorboard/``, ``state/`` to
resume from, ``stage.json`` (which fingerprint it was made for, and whether it is done) and ``summary.json``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from keel.recipe.checkpoints import kept_folder
from keel.recipe.sections import LoggingConfig
from keel.run import state as state_file
from keel.run.files import atomic_dir, atomic_files, hash_config, read_json, recover, write_json
from keel.run.metrics import LoggedRun, MetricsLog, Sink
from keel.types import UserError

NO_SINKS = LoggingConfig(tensorboard=False)


class Manifest:
    """``manifest.json``: what was run, from what, with what. Every update replaces the file whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """The manifest, empty for a new run. `UserError` when the file is damaged."""
        if not self.path.exists():
            return {}
        value = read_json(self.path)
        # Other programs call files so, too.
        if not isinstance(value, dict) or not all(isinstance(value.get(key, {}), dict) for key in ("recipe", "stages")):
            raise UserError(f"{self.path}: not the manifest of a run; use another run directory")
        return value

    def update(self, changes: Mapping[str, Any]) -> None:
        """Replaces the top-level entries named in ``changes``."""
        write_json(self.path, {**self.read(), **changes})

    def update_stage(self, name: str, entry: Mapping[str, Any]) -> None:
        """Replaces the entry of one stage."""
        self.update({"stages": {**self.read().get("stages", {}), name: dict(entry)}})


class StageDir:
    """One stage's folder.

    ``begin(fingerprint)`` opens it for work, ``save_state``/``load_state`` carry the work over a kill, ``checkpoint``
    writes its model, ``finish(summary)`` marks it done. ``is_done(fingerprint)`` is true only of a stage that was
    finished for exactly that fingerprint.
    """

    def __init__(self, path: Path, logging: LoggingConfig = NO_SINKS) -> None:
        self.path = path
        self._logging = logging

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def logged(self) -> LoggedRun:
        """What the stage is to loggers that know runs: the same run when it is resumed, another for other settings."""
        identity = hash_config([str(self.path.resolve()), self.fingerprint])[:16]
        return LoggedRun(identity, f"{self.path.resolve().parent.name}/{self.name}", self.path)

    @cached_property
    def metrics(self) -> MetricsLog:
        """The stage's figures. A resuming stage calls ``metrics.resume(step)`` first, ``step`` being the first one
        that it will write again."""
        asked = {
            "TensorBoard": (self._logging.tensorboard, self._tensorboard),
            "Weights & Biases": (self._logging.wandb_project, self._wandb),
            "trackio": (self._logging.trackio_project, self._trackio),
            "MLflow": (self._logging.mlflow_experiment, self._mlflow),
        }
        sinks = {name: open_sink for name, (wanted, open_sink) in asked.items() if wanted}
        return MetricsLog(self.path / "metrics.jsonl", sinks=sinks)

    def begin(self, fingerprint: str) -> None:
        """Opens the folder for ``fingerprint``: what another fingerprint left there is deleted, a half-done stage of
        the same fingerprint is kept, to be resumed."""
        if self.path.exists() and self._mark().get("fingerprint") != fingerprint:
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "stage.json", {"fingerprint": fingerprint, "done": False})

    def is_done(self, fingerprint: str) -> bool:
        return self._mark() == {"fingerprint": fingerprint, "done": True}

    @property
    def fingerprint(self) -> str | None:
        """What the folder's content was made for; None when nothing was begun."""
        fingerprint = self._mark().get("fingerprint")
        return fingerprint if isinstance(fingerprint, str) else None

    @property
    def done(self) -> bool:
        """Whether the stage was finished, for whichever fingerprint."""
        return self._mark().get("done") is True

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes the stage's summary, marks it done, and deletes the state that it no longer needs to resume."""
        if "metrics" in self.__dict__:
            self.metrics.close()
        write_json(self.path / "summary.json", dict(summary))
        write_json(self.path / "stage.json", {"fingerprint": self.fingerprint, "done": True})
        shutil.rmtree(self.path / "state", ignore_errors=True)

    def summary(self) -> dict[str, Any]:
        """What `finish` wrote; empty when the stage is not done."""
        path = self.path / "summary.json"
        return dict(read_json(path)) if path.exists() else {}

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Saves what the stage needs to go on after a kill (see `keel.run.save_state`), in place of the last one."""
        state_file.save_state(self.path / "state" / "state.pt", state)

    def load_state(self) -> dict[str, Any] | None:
        """The last saved state, tensors on the CPU; None when the stage starts from the beginning."""
        return state_file.load_state(self.path / "state" / "state.pt")

    def checkpoint(self) -> contextlib.AbstractContextManager[Path]:
        """``with stage.checkpoint() as folder:`` save a model into ``folder``; its files then appear in the stage's
        own folder, which is what transformers loads."""
        return atomic_files(self.path)

    def kept(self, percent: int) -> contextlib.AbstractContextManager[Path]:
        """``with stage.kept(50) as folder:`` as ``checkpoint``, for one that is kept on the way: a folder of its own,
        all of it or none."""
        return atomic_dir(self.path / kept_folder(percent))

    def _mark(self) -> dict[str, Any]:
        path = self.path / "stage.json"
        return dict(read_json(path)) if path.exists() else {}

    def _tensorboard(self, resume_step: int | None) -> Sink:
        from keel.run.tensorboard import TensorBoardSink  # slow to import, and wanted only where figures are written

        return TensorBoardSink(self.path / "tensorboard", resume_step)

    def _wandb(self, resume_step: int | None) -> Sink:
        from keel.run.wandb import WandbSink  # an optional package

        assert self._logging.wandb_project is not None
        return WandbSink(self._logging.wandb_project, self.logged)

    def _trackio(self, resume_step: int | None) -> Sink:
        from keel.run.trackio import TrackioSink  # an optional package

        assert self._logging.trackio_project is not None
        return TrackioSink(self._logging.trackio_project, self.logged)

    def _mlflow(self, resume_step: int | None) -> Sink:
        from keel.run.mlflow import MlflowSink  # an optional package

        assert self._logging.mlflow_experiment is not None
        return MlflowSink(self._logging.mlflow_experiment, self.logged)


class RunDir:
    """A run's folder. ``logging`` says which sinks the stages' metrics have besides ``metrics.jsonl``."""

    def __init__(self, path: Path | str, logging: LoggingConfig = NO_SINKS) -> None:
        self.path = Path(path)
        self.manifest = Manifest(self.path / "manifest.json")
        self._logging = logging

    @property
    def store_url(self) -> str:
        """SQLAlchemy URL of the run's own feedback database."""
        return f"sqlite:///{self.path / 'feedback.db'}"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def stage(self, name: str) -> StageDir:
        return StageDir(self.path / name, self._logging)

    def summary(self) -> dict[str, Any]:
        """``summary.json``, empty when it is not written yet."""
        path = self.path / "summary.json"
        return dict(read_json(path)) if path.exists() else {}

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(self.path / "summary.json", dict(summary))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the folder (with its parents) and holds it for this process, clearing what a killed run left.

        Raises `UserError` that names the other process when a run is at work here. The system frees the lock when its
        holder dies, so a killed run never blocks the next one.
        """
        import fcntl  # POSIX only; nothing else in this file is

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "run.lock").open("a+")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be used as a run directory ({error.strerror}); choose another --out"
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                file.seek(0)
                raise UserError(
                    f"{self.path}: another run (process {file.read().strip() or 'unknown'}) is at work here; "
                    "wait for it or choose another --out"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            recover(self.path)
            yield
