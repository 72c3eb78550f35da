"""TensorBoard event files beside ``metrics.jsonl``. The only file that imports TensorBoard."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from keel.run.metrics import Figures


class TensorBoardSink:
    """Writes scalars into ``folder``. ``resume_step``: TensorBoard hides earlier rows at or past it."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=resume_step)

    def write(self, step: int, figures: Figures) -> None:
        for name, figure in figures.items():
            self._writer.add_scalar(name, figure, step)

    def close(self) -> None:
        self._writer.close()
