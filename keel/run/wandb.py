"""Weights & Biases, when a recipe names a project. The only file that imports it."""

from __future__ import annotations

from pathlib import Path

from keel.run.files import hash_config
from keel.run.metrics import Figures
from keel.types import UserError

try:
    import wandb
except ImportError as error:
    raise UserError(
        "logging.wandb_project is set but wandb is not installed: pip install 'keel-rlhf[wandb]', or unset it"
    ) from error


class WandbSink:
    """One W&B run a stage. Its id is made from the stage's folder, so that a resumed stage goes on in its own run."""

    def __init__(self, project: str, folder: Path, resume_step: int | None) -> None:
        identity = hash_config([project, str(folder.resolve())])[:16]
        name = f"{folder.parent.name}/{folder.name}"
        self._run = wandb.init(project=project, id=identity, name=name, dir=str(folder), resume="allow")

    def write(self, step: int, figures: Figures) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()
