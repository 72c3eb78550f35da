"""The command line of the GPU's pieces.

python -m bench gpu                             all pieces, one after the other
python -m bench gpu --piece training            one piece; may be repeated
python -m bench gpu --piece training --model qwen3-1.7b --only compiled     some of its cases
python -m bench gpu --tiny --device cpu         every piece on next to nothing: does it run?
python -m bench gpu report                      tables and plots again from the results that are there
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.environments import FOLDER, ROOT
from bench.files import slug, write_json
from bench.gpu.models import ARCHITECTURES
from bench.gpu.setting import Setting, machine

RESULTS = ROOT / "bench" / "results"
# What each piece is, and its module in this package, which has a function run(setting) -> figures. A piece is imported
# when it runs.
PIECES = {
    "correctness": "what a GPU computes against the CPU, float64 and plain references",
    "training": "tokens a second, MFU, memory and time split of SFT, DPO, reward model, PPO and GRPO",
    "peers": "the same tasks beside TRL on this card, each in processes of its own",
    "sampling": "Keel's sampler beside generate and continuous batching, against the memory's rate",
    "steps": "where the time of a PPO and of a GRPO step goes",
    "memory": "peaks: the head's loss, PPO on one base, SFT by length",
}


def run(piece: str, setting: Setting) -> list[str]:
    """Runs a piece; -> the cases that failed."""
    piece_run: Callable[[Setting], dict[str, Any]] = importlib.import_module(f"bench.gpu.{piece}").run
    found = piece_run(setting)
    if "failed" in found and "cases" in found:  # it has kept its own record
        return list(found["failed"])
    about = machine(setting.device, setting.tiny)
    device = slug(about["device"]) if setting.cuda else "cpu"
    write_json(setting.out / f"gpu-{piece}-{device}.json", {"piece": piece, "machine": about, **found})
    return list(found.get("failed", []))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    pieces = "\n".join(f"  {name:12} {text}" for name, text in PIECES.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu",
        description=f"{__doc__}\npieces:\n{pieces}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", default="run", choices=("run", "report"))
    parser.add_argument("--piece", action="append", choices=PIECES, help="default: all; may be repeated")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ..., or cpu")
    parser.add_argument("--tiny", action="store_true", help="next to nothing of everything; the figures mean nothing")
    parser.add_argument("--model", action="append", choices=ARCHITECTURES, help="only these; may be repeated")
    parser.add_argument("--only", default="", help="regular expression: only cases whose names match")
    parser.add_argument("--minutes", type=float, default=7.5, help="budget of a piece; what does not fit is left out")
    parser.add_argument("--out", type=Path, help="folder of the results; default: bench/results, tiny .bench/tiny")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """-> 1 when a case failed."""
    args = parse(arguments)
    out = args.out or (FOLDER / "tiny" if args.tiny else RESULTS)
    failed = []
    if args.command == "run":
        setting = Setting(args.device, args.tiny, out, 60 * args.minutes, tuple(args.model or ()), args.only)
        for piece in args.piece or PIECES:
            failed += [f"{piece}: {name}" for name in run(piece, setting)]
    from bench.gpu import report

    for path in report.write(out):
        print(path.name)
    if failed:
        print(f"failed: {'; '.join(failed)}")
    return int(bool(failed))
