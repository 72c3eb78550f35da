"""What a piece is told, and the record that it keeps: one JSON file, written again after every case."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import re
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.cost import Limits
from bench.files import now, slug, write_json
from bench.machine import rates
from keel.precision import Precision
from keel.run.machine import cpu_count

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "numba")
# The makers' figures for dense products in bfloat16, operations a second, by a part of the device's name.
DATASHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12}

Measure = Callable[..., dict[str, Any]]
"""Measures a case: -> its figures."""


@dataclass(frozen=True)
class Setting:
    """``budget``: seconds that a piece may take. ``models``: only these; () for what the piece chooses. ``only``: a
    regular expression that the names of cases must match."""

    device: str
    tiny: bool
    out: Path
    budget: float = 440.0
    models: tuple[str, ...] = ()
    only: str = ""

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def precision(self) -> Precision:
        return "bf16" if self.cuda else "fp32"

    def chosen(self, *models: str) -> list[str]:
        """Those that were asked for; in a tiny run the first of them."""
        found = [model for model in models if not self.models or model in self.models]
        return found[:1] if self.tiny else found


class Record:
    """A piece's results by case. A case that fails, or for which no time is left, says so in its place; the others go
    on. Cases that are not measured now keep what an earlier run on the same device found."""

    def __init__(self, setting: Setting, piece: str) -> None:
        self.setting, self.piece, self.began = setting, piece, time.monotonic()
        self.machine = machine(setting.device, setting.tiny)
        self.path = setting.out / f"gpu-{piece}-{slug(self.machine['device']) if setting.cuda else 'cpu'}.json"
        there = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.cases: dict[str, dict[str, Any]] = there.get("cases", {})
        self.failed: list[str] = []
        print(f"{piece}: {json.dumps(self.machine)}", flush=True)
        self.write()

    @property
    def limits(self) -> Limits:
        return Limits(self.machine["flops"], self.machine["bandwidth"])

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.setting.budget - (time.monotonic() - self.began)

    def case(self, name: str, seconds: float, measure: Measure, *of: Any) -> None:
        """Measures a case that takes about ``seconds``, where so many are left, by ``measure(*of)``."""
        if self.setting.only and not re.search(self.setting.only, name):
            return
        if self.left < seconds:
            self.leave_out(name, f"about {seconds:.0f} s, of which {max(self.left, 0):.0f} are left")
            return
        began = time.monotonic()
        found = self._tried(name, measure, of)
        release(self.setting.device)
        self.cases[name] = {"when": now(), "took": round(time.monotonic() - began, 1), **found}
        self.write()
        shown = {k: v for k, v in self.cases[name].items() if k not in ("when", "traceback")}
        print(f"  {name}: {json.dumps(shown)}", flush=True)

    def leave_out(self, name: str, why: str) -> None:
        """Notes that a case was not measured, unless an earlier run has it."""
        if self.setting.only and not re.search(self.setting.only, name):
            return
        print(f"  {name}: left out: {why}", flush=True)
        self.cases.setdefault(name, {"left_out": why})
        self.write()

    def _tried(self, name: str, measure: Measure, of: tuple[Any, ...]) -> dict[str, Any]:
        try:
            return measure(*of)
        except torch.OutOfMemoryError as error:
            return {"problem": f"out of memory: {str(error).splitlines()[0][:200]}"}
        except Exception as error:
            self.failed.append(name)
            lines = traceback.format_exc().strip().splitlines()
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            return {"problem": f"{type(error).__name__}: {first[:300]}", "traceback": lines[-12:]}

    def write(self) -> None:
        write_json(self.path, {"piece": self.piece, "machine": self.machine, "cases": self.cases})


def release(device: str) -> None:
    """Gives back what the last case held."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


@cache
def machine(device: str, tiny: bool) -> dict[str, Any]:
    """The device, its measured rates (``bench.machine``), and the versions of what runs on it."""
    found = rates(device, cpu_count(), 0.01 if tiny else 0.5, tiny)
    release(device)
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found |= {"memory": properties.total_memory, "processors": properties.multi_processor_count}
        found |= {"cuda": torch.version.cuda}
    sheet = [rate for part, rate in DATASHEET.items() if part in found["device"]]
    found |= {"datasheet": sheet[0]} if sheet else {}
    return found | {"versions": versions()}


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def share(machine: dict[str, Any], precision: str, flops: float, seconds: float) -> dict[str, float]:
    """How much of the device's rate of products ``flops`` in ``seconds`` are; by its makers' figure, of bfloat16."""
    found = {"flops_a_second": flops / seconds, "of_measured": flops / seconds / machine["flops"][precision]}
    return found | ({"of_datasheet": flops / seconds / machine["datasheet"]} if "datasheet" in machine else {})
