"""trackio, when a recipe names a project. The only file that imports it."""

from __future__ import annotations

import contextlib
import io

from keel.run.metrics import Figures, LoggedRun
from keel.types import UserError

try:
    import trackio
except ImportError as error:
    raise UserError(
        "logging.trackio_project is set but trackio is not installed: pip install 'keel-rlhf[trackio]', or unset it"
    ) from error


class TrackioSink:
    """One trackio run a stage, in a file on this machine. A resumed stage goes on in it, and rows that stand there
    already are left as they are."""

    def __init__(self, project: str, run: LoggedRun) -> None:
        name = f"{run.name} {run.identity[:8]}"  # trackio tells runs apart by their names
        with contextlib.redirect_stdout(io.StringIO()):  # it greets
            self._run = trackio.init(
                project=project, name=name, resume="allow", embed=False, auto_log_cpu=False, auto_log_gpu=False
            )
        self._first = int(getattr(self._run, "_next_step", 0))  # it says in no other way how far it came

    def write(self, step: int, figures: Figures) -> None:
        if step >= self._first:
            self._run.log(dict(figures), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()
