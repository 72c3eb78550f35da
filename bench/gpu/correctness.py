"""Whether a device computes what it should: Keel held against the models' own forward passes, float64 and plain loops.

python -m bench.gpu.correctness --device cuda           everything, some minutes
python -m bench.gpu.correctness --device cpu --tiny     everything on next to nothing: does it run?
python -m bench.gpu.correctness --only packed           only checks whose names match

A line a comparison: the check, what was compared, the error, what it may be. The exit status is 1 where one failed. A
check that raises does not keep the others from running.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as hf_logging

from bench.gpu import correct_model, correct_online, correct_sampling, correct_training
from bench.gpu.correct import Check, Gap, LeftOut, Setting

CHECKS = (*correct_model.CHECKS, *correct_sampling.CHECKS, *correct_training.CHECKS, *correct_online.CHECKS)


@dataclass(frozen=True)
class Alone:
    """The setting of ``python -m bench.gpu.correctness``."""

    device: str
    tiny: bool
    out: Path
    only: str = ""


def run(setting: Setting) -> dict[str, Any]:
    """-> {"checks": a dict for each comparison, "failed": the names of the checks that did}."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")  # float32 is compared as such, in convolutions too
    rows: list[dict[str, Any]] = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for check in CHECKS:
            if re.search(getattr(setting, "only", ""), check.name) and (check.tiny or not setting.tiny):
                rows += examine(check, setting)
    failed = sorted({row["check"] for row in rows if row["state"] == "FAIL"})
    left = sum(row["state"] == "left out" for row in rows)
    print(f"{len(rows) - left} comparisons, {left} left out, failed: {', '.join(failed) or 'none'}", flush=True)
    return {"checks": rows, "failed": failed}


def examine(check: Check, setting: Setting) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    began = time.monotonic()

    def note(row: dict[str, Any]) -> None:
        nonlocal began
        rows.append({"check": check.name, **row, "seconds": round(time.monotonic() - began, 2)})
        print(line(rows[-1]), flush=True)
        began = time.monotonic()

    torch.manual_seed(0)
    try:
        with closing(check.run(setting)) as said:  # type: ignore[type-var]
            for found in said:
                note(row_of(found))
    except Exception as error:
        note(problem(error))
    if setting.device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def row_of(found: Gap | LeftOut) -> dict[str, Any]:
    if isinstance(found, LeftOut):
        return {"what": found.what, "state": "left out", "why": found.why}
    state = "ok" if found.ok else "FAIL"
    return {"what": found.what, "error": found.error, "bound": found.bound, "state": state}


def problem(error: Exception) -> dict[str, Any]:
    """The first line of what was raised, and the innermost place in the project where it was."""
    root = str(Path(__file__).parents[2])
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(root)]
    places = [f"{Path(f.filename).relative_to(root)}:{f.lineno}" for f in frames if "site-packages" not in f.filename]
    first = next(iter(str(error).strip().splitlines()), "")
    return {"what": f"{type(error).__name__}: {first[:300]}", "state": "FAIL", "place": " < ".join(places[:-5:-1])}


def line(row: dict[str, Any]) -> str:
    figures = f"{row['error']:.2g} of {row['bound']:.2g}" if "error" in row else row.get("why", row.get("place", ""))
    return f"{row['state']:8} {row['check']}: {row['what']}: {figures} ({row['seconds']:.1f} s)"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.correctness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ..., or cpu")
    parser.add_argument("--tiny", action="store_true", help="on next to nothing")
    parser.add_argument("--only", default="", help="regular expression: only checks whose names match")
    parser.add_argument("--out", type=Path, help="folder for correctness.json; default: none is written")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = run(Alone(args.device, args.tiny, args.out or Path(folder), args.only))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "correctness.json").write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(found["failed"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
