"""The machine: how fast it multiplies and moves memory, and what else runs on it. ``python -m bench.machine`` prints
one JSON line.

Measured anew at the start of every run, because a rented core's rate changes from hour to hour.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


# -------------------------------------------------------------------------------------------------------------- rates


def rates(device: str, threads: int, seconds: float = 1.0, tiny: bool = False) -> dict[str, Any]:
    """Operations a second of a large matrix product, {precision: rate}, and bytes a second of a large copy. ``tiny``:
    of small ones, only to see that it runs."""
    import torch

    torch.set_num_threads(threads)
    size = 128 if tiny else 2048 if device == "cpu" else 8192
    flops = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(size, size, device=device, dtype=dtype)
        took = []
        for product in _products(torch, a):
            with suppress(RuntimeError):  # oneDNN's own has no bfloat16 on every processor
                took.append(_best(product, device, seconds))
        flops[precision] = 2 * size**3 / min(took)
    entries = 2**20 if tiny else 2**26 if device == "cpu" else 2**30
    source = torch.ones(entries, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * 4  # read and written
    return {
        "flops": flops,
        "bandwidth": moved / _best(lambda: target.copy_(source), device, seconds),
        "device": device_name(device),
        "threads": threads,
        "torch": torch.__version__,
    }


def _products(torch: Any, a: Any) -> list[Callable[[], Any]]:
    """torch's own product; on a CPU oneDNN's too, which torch uses for bfloat16 alone though it may be the faster one
    in float32 as well (it is on AMD, where torch's own is MKL)."""
    found: list[Callable[[], Any]] = [lambda: torch.mm(a, a)]
    if a.device.type == "cpu" and torch.backends.mkldnn.is_available():
        found.append(lambda: torch.ops.mkldnn._linear_pointwise(a, a, None, "none", [], ""))
    return found


def _best(call: Callable[[], Any], device: str, seconds: float) -> float:
    """Seconds of the fastest call within a while of trying."""
    import torch

    def timed() -> float:
        began = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    timed()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, timed())
    return best


def device_name(device: str) -> str:
    if device != "cpu":
        import torch

        return str(torch.cuda.get_device_name())
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ----------------------------------------------------------------------------------------------- what else is running


class Watch:
    """The load, and the processor time of other programs, over a while. Linux; elsewhere only the load."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.before = _processor_seconds()

    def so_far(self) -> dict[str, Any]:
        """Load averages, and cores used by other programs: all, and the busiest by name."""
        elapsed = max(time.monotonic() - self.began, 1e-9)
        ours = _family(os.getpid())
        used: dict[str, float] = {}
        for pid, (name, seconds) in _processor_seconds().items():
            spent = seconds - self.before.get(pid, (name, 0.0))[1]
            if pid not in ours and spent > 0:
                used[name] = used.get(name, 0.0) + spent / elapsed
        busiest = sorted(used.items(), key=lambda item: -item[1])[:5]
        return {
            "load": [round(x, 2) for x in os.getloadavg()],
            "other_cores": round(sum(used.values()), 3),
            "busiest": {name: round(cores, 3) for name, cores in busiest if cores >= 0.005},
        }


def _processor_seconds() -> dict[int, tuple[str, float]]:
    """pid -> (program's name, processor seconds of its life)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            head, _, tail = (path / "stat").read_text().rpartition(")")
            fields = tail.split()
            found[int(path.name)] = (head.partition("(")[2], (int(fields[11]) + int(fields[12])) / TICK)
    return found


def _family(root: int) -> set[int]:
    """A process and all that descend from it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


if __name__ == "__main__":
    print(json.dumps(rates(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), "tiny" in sys.argv[4:])))
