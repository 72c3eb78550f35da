"""Tables in the form that Hugging Face ``datasets`` keeps on the disk (``load_from_disk``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keel.types import UserError


def save(table: Any, folder: Path) -> None:
    """Writes an Arrow table as a folder."""
    _datasets().Dataset(table).save_to_disk(str(folder))


def load(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder that ``save_to_disk`` wrote."""
    rows: list[dict[str, Any]] = _datasets().load_from_disk(str(folder)).to_list()
    return rows


def _datasets() -> Any:
    try:
        import datasets  # optional, and seconds to import
    except ImportError as error:
        raise UserError("a folder for datasets needs the package: pip install 'keel-rlhf[hub]'") from error
    datasets.disable_progress_bars()
    return datasets
