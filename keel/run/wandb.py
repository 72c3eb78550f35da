"""Weights & Biases, when a recipe names a project. The only file that imports it."""

from __future__ import annotations

from keel.run.metrics import Figures, LoggedRun
from keel.types import UserError

try:
    import wandb
except ImportError as error:
    raise UserError(
        "logging.wandb_project is set but wandb is not installed: pip install 'keel-rlhf[wandb]', or unset it"
    ) from error


class WandbSink:
    """One W&B run a stage, which a resumed stage goes on in: rows that stand there already are left as they are."""

    def __init__(self, project: str, run: LoggedRun) -> None:
        self._run = wandb.init(project=project, id=run.identity, name=run.name, dir=str(run.folder), resume="allow")

    def write(self, step: int, figures: Figures) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()
