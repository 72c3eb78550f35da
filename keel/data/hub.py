"""Data sets of the Hugging Face hub, and folders that ``datasets`` saved: the one file that needs that package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keel.types import UserError

PREFIX = "hub:"
_FORM = "hub:owner/name, hub:owner/name:split or hub:owner/name:config:split"


def load(source: str) -> Iterator[Any]:
    """The rows of ``hub:owner/name[:config][:split]``; ``train`` where no split is named."""
    name, *rest = source.removeprefix(PREFIX).split(":")
    if not name or len(rest) > 2:
        raise UserError(f"{source}: expected {_FORM}")
    split = rest.pop() if rest else ""
    named = [name, *filter(None, rest)]  # the configuration, where there is one
    remedy = f"check its name, configuration, split and network ({_FORM}), or name a file"
    return _rows(source, lambda datasets: datasets.load_dataset(*named, split=split or "train"), remedy)


def load_saved(folder: Path) -> Iterator[Any]:
    """The rows of a folder that ``save_to_disk`` wrote."""
    return _rows(str(folder), lambda datasets: datasets.load_from_disk(str(folder)), "save it again")


def _rows(source: str, load: Callable[[Any], Any], remedy: str) -> Iterator[Any]:
    try:
        import datasets  # optional, and seconds to import
    except ImportError as error:
        raise UserError(f"{source}: needs a package: pip install 'keel-rlhf[hub]'") from error
    try:
        yield from load(datasets)
    except Exception as error:  # network, access, names, files that cannot be decoded: whatever the library raises
        reason = str(error).strip().rstrip(".")
        raise UserError(f"{source}: the data set cannot be loaded: {reason}; {remedy}") from error
