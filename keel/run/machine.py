"""The machine that a run is on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys

from keel import __version__
from keel.types import UserError


def resolve_device(device: str) -> str:
    """``auto`` -> cuda, mps or cpu, whichever is there first; a device that is not there is a `UserError`."""
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    wanted = torch.device(device)
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {device} does not exist ({torch.cuda.device_count()} CUDA devices); use device: auto")
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: mps is not available on this machine; use device: auto")
    return device


def versions() -> dict[str, str]:
    """The versions of what computes."""
    found = {"keel": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers"):
        found[package] = importlib.metadata.version(package)
    return found


def peak_rss_mb() -> float:
    """The most memory that this process has held at once, in MiB (of its whole life, not of a stage alone)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 * 1024 if sys.platform == "darwin" else 1024), 1)


def cpu_count() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
