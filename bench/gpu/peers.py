"""Keel beside TRL on this card: the bench's own comparison (``bench/harness.py``), a task at a time."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from bench.gpu.setting import Record, Setting

TASKS = ("dpo", "grpo", "reward", "ppo", "sft")
MODELS = ("qwen-0.5b", "qwen-1.5b")
KEPT = ("rate", "rates", "precision", "peak_mb", "share_of_limit", "parts", "settings", "versions", "problem")


def run(setting: Setting) -> dict[str, Any]:
    """A peer that cannot be had, or fails, says why in its place."""
    from bench.__main__ import Bench

    record = Record(setting, "peers")
    bench = Bench(
        Namespace(
            device=setting.device.partition(":")[0],
            quick=setting.tiny,
            threads=None,
            repeat=1 if setting.tiny else 2,
            out=setting.out,
            only="Keel fp32$" if setting.tiny else "Keel bf16$|TRL.*best",  # TRL's defaults compute activations twice
            curve=None,
        )
    )
    for model in ("S",) if setting.tiny else MODELS:
        for task in ("reward",) if setting.tiny else TASKS:
            record.case(f"{task} {model}", 70, lambda *of: _compared(bench, *of), task, model)
    return {"cases": record.cases, "failed": record.failed}


def _compared(bench: Any, task: str, model: str) -> dict[str, Any]:
    """The comparison's figures in short; the whole lies in TASK-DEVICE.json."""
    found = bench.task(task, model)
    rows = {name: {key: row[key] for key in KEPT if key in row} for name, row in found["contenders"].items()}
    return {"unit": found["unit"], "work": found["work"], "contenders": rows, "ratios": found["ratios"]}
