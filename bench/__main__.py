"""The command line of the bench.

python -m bench                                     everything, about 40 minutes on two cores
python -m bench --quick                             everything on very little, some minutes: does it run?
python -m bench --task sft --model S --repeat 3     one comparison
python -m bench --task growth --curve memory        one curve of how cost grows
python -m bench tune --task sft --model S           search the peers' best settings
python -m bench install                             build the peers' environments under .bench/
python -m bench report                              tables and plots again from the results that are there
python -m bench --device cuda                       on a GPU; peers in this Python are used where nothing is built
python -m bench gpu                                 what a GPU is asked, in pieces: python -m bench gpu --help
python -m bench labelling-scale                     the labelling app on a large store: ... labelling-scale --help
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import report
from bench.contenders import PEERS, Contender, candidates, contenders
from bench.cost import Limits
from bench.environments import ENVIRONMENTS, FOLDER, ROOT, install
from bench.files import now, slug, write_json
from bench.growth import NAMES, curves
from bench.harness import compare, job, measure_limits
from bench.models import model_folder
from bench.work import SHAPES, UNITS, Job, Work, work_of
from keel.run.machine import cpu_count

RESULTS = ROOT / "bench" / "results"
REPEATS = {"cpu": 3, "cuda": 3}


class Bench:
    """One run: on which device, with how much work, and where results go."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.quick = args.device, args.quick
        self.threads = args.threads or cpu_count()
        self.repeats = args.repeat or (1 if args.quick else REPEATS[args.device])
        self.folder = args.out or (FOLDER / "quick" if args.quick else RESULTS)
        self.only = args.only
        self.curves: list[str] = args.curve or list(NAMES)
        self.folder.mkdir(parents=True, exist_ok=True)
        FOLDER.mkdir(exist_ok=True)
        self.limits: Limits
        self.limits, self.machine = measure_limits(self.device, self.threads, 0.05 if args.quick else 2.0, args.quick)
        self.name = "cpu" if self.device == "cpu" else slug(self.machine["device"])
        self.best_file = RESULTS / f"best-{self.name}.json"
        rates = ", ".join(f"{name} {report.rate_text(x, 'FLOP/s')}" for name, x in self.machine["flops"].items())
        print(f"{self.machine['device']}, {self.threads} threads: {rates}, "
              f"memory {report.rate_text(self.machine['bandwidth'], 'B/s')}", flush=True)  # fmt: skip

    def jobs(self, model: str, work: Work) -> Callable[[Contender], Job]:
        folder = model_folder(model, FOLDER / "models")
        return lambda contender: job(contender, model, folder, work, self.device, self.threads)

    def compared(self, who: Sequence[Contender], model: str, work: Work, repeats: int) -> dict[str, Any]:
        chosen = [c for c in who if not self.only or re.search(self.only, c.name)]
        if not chosen:
            raise SystemExit(f"--only {self.only!r} leaves nobody of: {', '.join(c.name for c in who)}")
        return compare(chosen, self.jobs(model, work), repeats, self.limits, lambda line: print(line, flush=True))

    def task(self, task: str, model: str) -> dict[str, Any]:
        """One comparison. The file of a task keeps its other models' results."""
        print(f"{task}, model {model}", flush=True)
        who = contenders(task, model, self.best_file, self.name)
        found = self.compared(who, model, work_of(task, model, self.device, self.quick), self.repeats)
        path = self.folder / f"{task}-{self.name}.json"
        result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"task": task, "models": {}}
        result["models"][model] = {"when": now(), "machine": self.machine, **found}
        write_json(path, result)
        print("\n".join(report.table(model, result["models"][model])), flush=True)
        return found

    def growth(self) -> None:
        """Keel in its default precision against each peer, one curve after the other. The file keeps the curves that
        are not measured now."""
        chosen = [curve for curve in curves(self.device, self.quick) if curve.name in self.curves]
        if not chosen:
            raise SystemExit(f"not measured on this device: {', '.join(self.curves)}")
        path = self.folder / f"growth-{self.name}.json"
        for curve in chosen:
            points = []
            for place in curve.places:
                print(f"{curve.name} {place.x:,.0f}", flush=True)
                who = growing(contenders(curve.task, place.model, self.best_file, self.name), curve.tuned)
                rows = self.compared(who, place.model, place.work, 1 if self.quick else curve.repeats)["contenders"]
                points.append({"x": place.x, "model": place.model, **figures(rows)})
            result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"series": {}}
            result["series"][curve.name] = {
                "when": now(),
                "machine": self.machine,
                "title": curve.title,
                "x_label": curve.x_label,
                "shows": curve.shows,
                "points": points,
            }
            write_json(path, result)

    def tune(self, task: str, model: str) -> None:
        """Tries every candidate of each peer, and keeps the fastest with all that was tried."""
        work = work_of(task, model, self.device, self.quick)
        for peer in PEERS:
            if task not in peer.tasks:
                continue
            tried = [peer.contender(f"{peer.name} {settings_text(s)}", s) for s in candidates(peer, task, self.name)]
            print(f"{peer.name}, {task}, model {model}: {len(tried)} candidates", flush=True)
            # One after the other: so many processes would not fit into memory together.
            rows: dict[str, Any] = {}
            for contender in tried:
                rows |= self.compared([contender], model, work, self.repeats)["contenders"]
            rates = {name: row["rate"] for name, row in rows.items() if "rate" in row}
            if not rates:
                continue
            fastest = max(rates, key=rates.__getitem__)
            kept = json.loads(self.best_file.read_text()) if self.best_file.exists() else {}
            index = [c.name for c in tried].index(fastest)
            kept[f"{peer.name}/{task}/{model}"] = {
                "when": now(),
                "settings": candidates(peer, task, self.name)[index],
                "tried": {name: row.get("rate", row.get("problem")) for name, row in rows.items()},
            }
            if not self.quick:
                write_json(self.best_file, kept)
            print(f"  fastest: {fastest}", flush=True)


def growing(who: Sequence[Contender], tuned: bool) -> list[Contender]:
    """One contender of each library, with the batch that the point of the curve says. vLLM is left out: its start-up is
    too long for so many points."""
    peers = [c for c in who if not c.ours and c.environment != "vllm" and c.name.endswith(", best") == tuned]
    shown = [*(c for c in who if c.name == "Keel bf16"), *peers]
    return [replace(c, settings={k: v for k, v in c.settings.items() if k != "batch"}) for c in shown]


def figures(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a point of a curve keeps of a comparison."""
    kept = {"rates": "rate", "peak_mb": "peak_mb", "problems": "problem"}
    return {key: {name: row[field] for name, row in rows.items() if field in row} for key, field in kept.items()}


def settings_text(settings: dict[str, Any]) -> str:
    return json.dumps(settings).translate(str.maketrans("", "", '{}"'))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", default="run", choices=("run", "tune", "install", "report"))
    parser.add_argument("--task", action="append", choices=(*UNITS, "growth"), help="default: all; may be repeated")
    parser.add_argument(
        "--curve", action="append", choices=NAMES, help="of the task growth; default: all; may be repeated"
    )
    parser.add_argument("--model", action="append", choices=SHAPES, help="default: what suits the device")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeat", type=int, help="repetitions of each contender, in turns")
    parser.add_argument("--threads", type=int, help="default: every core that this process may use")
    parser.add_argument("--only", help="regular expression: only contenders whose names match")
    parser.add_argument("--out", type=Path, help="folder of the results; default: bench/results, with --quick .bench")
    parser.add_argument("--quick", action="store_true", help="very little of everything: does it run?")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["gpu"]:
        from bench.gpu.command import main as gpu

        sys.exit(gpu(sys.argv[2:]))
    if sys.argv[1:2] == ["labelling-scale"]:
        from bench.labelling_scale import main as labelling_scale

        sys.exit(labelling_scale(sys.argv[2:]))
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a killed bench ends its workers too
    if args.command == "install":
        for name in ENVIRONMENTS:
            install(name)
        return
    models = args.model or (["S", "M"] if args.device == "cpu" else ["qwen-0.5b", "qwen-1.5b"])
    tasks = args.task or (["growth"] if args.curve else [*UNITS, "growth"])
    if args.command == "report":
        for device in report.devices(args.out or RESULTS):
            report.write(args.out or RESULTS, device)
        return
    bench = Bench(args)
    for task in tasks:
        if task == "growth":
            if args.command == "run":
                bench.growth()
            continue
        # A large vocabulary is where DPO's memory goes.
        for model in [*models, "S-128k"] if task == "dpo" and not args.model else models:
            (bench.task if args.command == "run" else bench.tune)(task, model)
    for path in report.write(bench.folder, bench.name):
        print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name)


if __name__ == "__main__":
    main()
