"""``keel study``: lists the studies, or runs one and shows what it found."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Table

import keel
from keel.cli.live import Progress, duration
from keel.cli.process import set_threads
from keel.study.plan import Harbor, Plan, World, read_study, shipped

if TYPE_CHECKING:
    from keel.pipeline.run import Runner
    from keel.recipe.recipe import Stage
    from keel.stages.context import StageContext
    from keel.study.run import Clock, Unit
    from keel.types import Reporter

OUT = Path("runs") / "studies"
MADE = "made.json"  # in a folder of the built-in world's data: of which sizes, by which Keel


def study(place: str | None, quick: bool, out: str | None, seeds: list[int]) -> int:
    console = Console()
    if place is None:
        console.print(listing())
        return 0
    made = read_study(place, quick, seeds)
    folder = Path(out) if out else OUT / (f"{made.study.name}-quick" if quick else made.study.name)
    result = _run(made, folder, console)
    console.print(table(result))
    for row in (*result["choices"], *(r for r in result["comparisons"] if r["verdict"] in ("more", "less"))):
        console.print(row["sentence"], highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nresults: {folder / 'study.json'}, {folder / 'index.html'}", soft_wrap=True, highlight=False)
    return 0


def listing() -> RenderableType:
    """The studies that come with Keel, a line each."""
    rows = Table(box=None, padding=(0, 2, 0, 0))
    rows.add_column("study", style="bold")
    rows.add_column("minutes", justify="right", style="cyan")
    rows.add_column("--quick", justify="right", style="cyan")
    rows.add_column("what it asks", overflow="fold")
    for name in shipped():
        known = read_study(name).study
        rows.add_row(name, f"{known.minutes:g}", f"{known.quick.minutes:g}", known.asks)
    rows.caption = "minutes on two cores; keel study NAME runs one, a file of your own too (docs/studies.md)"
    rows.caption_justify = "left"
    return rows


def _run(made: Plan, out: Path, console: Console) -> dict[str, Any]:
    from keel.run import atomic_write_text
    from keel.stages.registry import RUNNERS
    from keel.study.page import build_page
    from keel.study.results import summarise
    from keel.study.run import Clock, Work, checked, curves_of, planned, run_units, seconds_of, units_of, values_of

    units = planned(units_of(made, out, make_world))
    for finding in (found for found in checked(units) if found.level == "warning"):
        console.print(f"{finding.level}: {finding}", markup=False, highlight=False, soft_wrap=True, style="dim")
    threads = set_threads(units[0].recipe.threads)
    work = Work.of(units)
    clock = Clock(work, made.minutes)
    console.print(
        f"keel: {work.runs} runs of {work.stages} stages: {len(work.left)} to compute, {work.shared} shared with "
        f"another run, {work.done} done; about {duration(clock.left())} with {threads} CPU threads",
        highlight=False,
        soft_wrap=True,
    )

    @contextlib.contextmanager
    def showing(unit: Unit, names: Collection[str]) -> Iterator[tuple[dict[str, Runner], Reporter]]:
        label = {name: f"seed {unit.seed}, {unit.arm}: {name}" for name in names}

        def shown(runner: Runner) -> Runner:
            def work(stage: Stage, context: StageContext) -> dict[str, Any]:
                started = time.monotonic()
                with progress.stage(label[stage.name]):
                    summary = runner(stage, context)
                    clock.ended(stage.kind, stage.name, time.monotonic() - started)
                return summary

            return work

        with Progress(list(label.values()), console, lambda: _left(clock)) as progress:
            yield {kind: shown(runner) for kind, runner in RUNNERS.items()}, progress

    run_units(units, showing)
    console.print("keel: reading the runs' figures", highlight=False)
    result = summarise(made, values_of(made, units)) | {"curves": curves_of(made, units)}
    result |= {"keel": keel.__version__, "seconds": seconds_of(units)}
    atomic_write_text(out / "study.json", json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    build_page(result, out / "index.html")
    return result


def _left(clock: Clock) -> str:
    return f"about {duration(clock.left())} left in all" if clock.left() else ""


def make_world(sizes: Harbor, seed: int, folder: Path) -> World:
    """The built-in world's data of a seed in ``folder``, made unless it is there in the same sizes."""
    from keel.harbor.export import export, export_constitutional, export_reasoning
    from keel.run import RunDir, atomic_dir, read_json, write_json

    asked = {**sizes.model_dump(), "seed": seed, "keel": keel.__version__}
    files, ledgers = folder / "harbor", sizes.world == "ledgers"
    with RunDir(folder).lock():
        if not (files / MADE).exists() or read_json(files / MADE) != asked:
            with atomic_dir(files) as temporary:
                if ledgers:
                    written = sizes.sizes("demonstrations", "prompts", "heldout_prompts", "labelled")
                    export_reasoning(temporary, seed, **written)
                else:
                    export(temporary, seed, **sizes.sizes())
                if "constitutional" in sizes.also:
                    export_constitutional(temporary, seed, demonstrations=sizes.demonstrations)
                write_json(temporary / MADE, asked)
    base = str(Path(keel.__file__).parent / "harbor" / ("ledger_base" if ledgers else "base"))
    return World(base, {name: str(files / f"{name}.jsonl") for name in sizes.names()})


def table(result: Mapping[str, Any]) -> RenderableType:
    """A row an arm, a column a figure: the mean and its interval."""
    from keel.study.page import cell

    rows = Table(title=result["asks"], title_justify="left", box=None, padding=(0, 2, 0, 0))
    rows.add_column("")
    for figure in result["figures"].values():
        rows.add_column(figure["title"], justify="right", overflow="fold")
    for arm in result["arms"]:
        cells = [cell(result, name, arm) for name in result["figures"]]
        rows.add_row(arm, *(f"{c['mean']}\n{c['span']}" if c["span"] else c["mean"] for c in cells))
    return rows
