"""The runs of a study: one run directory an arm and seed. What several of them have in common is computed once.

A stage is known by its fingerprint (`keel.pipeline`). Before a run begins, it takes over from the study's other runs
every finished stage whose fingerprint it asks for. The pipeline then finds them done, as it would the run's own. So
nothing is taken that the pipeline would not have kept, and a study that was killed goes on like any run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keel.check import check_recipe, preflight
from keel.check.finding import Finding
from keel.pipeline.run import Runner, Step, plan, run_pipeline
from keel.recipe.recipe import Recipe
from keel.run import RunDir, atomic_dir
from keel.study.figures import Value, check_kept, check_places, read_curves, read_figures
from keel.study.plan import Harbor, Plan, World, arm_recipe
from keel.types import Reporter, UserError

MakeWorld = Callable[[Harbor, int, Path], World]


@dataclass(frozen=True)
class Unit:
    """One run of a study. ``steps``: its stages' standing before anything is run."""

    arm: str
    seed: int
    recipe: Recipe
    run: RunDir
    steps: Sequence[Step] = ()


def run_folder(out: Path, arm: str, seed: int) -> Path:
    return out / f"seed{seed}" / arm


def units_of(made: Plan, out: Path, make_world: MakeWorld) -> list[Unit]:
    """Every run of the study, seed by seed, its data made where it is the built-in world's. `UserError` for a recipe
    that is wrong, before any data are."""
    for arm in made.arms:  # settings that are wrong are wrong on every seed
        check_places(made.study, arm_recipe(made, arm, made.seeds[0], "", _no_world(made.harbor)))
    units = []
    for seed in made.seeds:
        world = make_world(made.harbor, seed, out / f"seed{seed}" / "data") if made.harbor is not None else None
        store = f"sqlite:///{(out / f'seed{seed}' / 'feedback.db').resolve()}"
        for arm in made.arms:
            recipe = arm_recipe(made, arm, seed, store, world)
            try:
                check_kept(made.study, recipe)
            except UserError as error:
                raise UserError(f"{made.origin}: arm {arm}: {error}") from error
            units.append(Unit(arm, seed, recipe, RunDir(run_folder(out, arm, seed), recipe.logging)))
    return units


def _no_world(harbor: Harbor | None) -> World | None:
    """Names in the place of files that are not made yet."""
    return None if harbor is None else World("base", {name: name for name in harbor.names()})


def checked(units: Sequence[Unit]) -> list[Finding]:
    """What `keel check` finds in the recipes of runs that are not done: warnings and notes, each once. `UserError` for
    errors."""
    found: dict[Finding, Unit] = {}
    for unit in units:
        if any(step.state != "done" for step in unit.steps):
            for finding in check_recipe(unit.recipe, unit.run):
                found.setdefault(finding, unit)
    errors = [(finding, unit) for finding, unit in found.items() if finding.level == "error"]
    if errors:
        raise UserError("\n".join(f"arm {unit.arm}, seed {unit.seed}: {finding}" for finding, unit in errors))
    return list(found)


def planned(units: Sequence[Unit]) -> list[Unit]:
    """The runs with their stages' standing."""
    return [Unit(u.arm, u.seed, u.recipe, u.run, plan(u.recipe, u.run)) for u in units]


# --------------------------------------------------------------------------------------------------------- sharing


@dataclass
class Finished:
    """The finished stages of a study's runs, by fingerprint."""

    _places: dict[str, tuple[RunDir, str]] = field(default_factory=dict)

    def note(self, unit: Unit) -> None:
        """Takes down what lies finished in a run."""
        for step in unit.steps:
            if unit.run.stage(step.stage.name).is_done(step.fingerprint):
                self._places.setdefault(step.fingerprint, (unit.run, step.stage.name))

    def hand_over(self, unit: Unit) -> list[str]:
        """Puts into the run the stages that it lacks and others have; their names. They are hard links where the file
        system allows: what is finished is never written to again, only replaced."""
        lacking = [s for s in unit.steps if s.state != "done" and s.fingerprint in self._places and _can_be_taken(s)]
        if not lacking:
            return []
        taken = []
        with unit.run.lock():
            if not unit.run.manifest.read():  # the run begins here: what its folder is must stand there too
                unit.run.manifest.update({"recipe": unit.recipe.model_dump(mode="json")})
            for step in lacking:
                source, name = self._places[step.fingerprint]
                folder, own = source.stage(name), unit.run.stage(step.stage.name)
                if own.is_done(step.fingerprint) or not folder.is_done(step.fingerprint):
                    continue
                entry = source.manifest.read().get("stages", {}).get(name, {})
                kept = entry | {"kind": step.stage.kind, "fingerprint": step.fingerprint, "status": "done"}
                kept["taken_from"] = os.path.relpath(folder.path, unit.run.path)
                # The folder last: it says that the stage is done, and a run killed before it takes it over again.
                unit.run.manifest.update_stage(step.stage.name, {"seconds": 0.0, **kept})
                with atomic_dir(own.path) as temporary:
                    _linked(folder.path, temporary)
                taken.append(step.stage.name)
        return taken


def _can_be_taken(step: Step) -> bool:
    """A report is of its own run, and an evaluation leaves its summary there too."""
    return not (step.stage.of_what_is_there or step.stage.compares_models)


def _linked(source: Path, target: Path) -> None:
    def link(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:  # another device, or a file system without links
            shutil.copy2(a, b)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)


# --------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Work:
    """What there is to do. ``done``: stages that their runs have; ``shared``: that they take from others; ``left``:
    that are computed."""

    runs: int
    stages: int
    done: int
    shared: int
    left: tuple[Step, ...]

    @staticmethod
    def of(units: Sequence[Unit]) -> Work:
        steps = [step for unit in units for step in unit.steps]
        there = {step.fingerprint for step in steps if step.state == "done"}
        done, left = 0, []
        for step in steps:
            if step.state == "done":
                done += 1
            elif step.fingerprint not in there or not _can_be_taken(step):
                left.append(step)
                there.add(step.fingerprint)
        return Work(len(units), len(steps), done, len(steps) - done - len(left), tuple(left))


Shown = contextlib.AbstractContextManager[tuple[Mapping[str, Runner], Reporter]]


def run_units(units: Sequence[Unit], showing: Callable[[Unit, Collection[str]], Shown]) -> None:
    """Runs what is not done, one run after the other. ``showing(unit, names)`` is entered around a run that computes
    the stages ``names``: what runs each kind of stage, and who is told of it."""
    finished = Finished()
    for unit in units:
        finished.note(unit)
    for unit in units:
        taken = finished.hand_over(unit)
        todo = [s.stage.name for s in unit.steps if s.state != "done" and s.stage.name not in taken]
        if todo or taken:  # a run that took everything over still says in its manifest what it is
            try:
                with showing(unit, todo) as (runners, reporter):
                    run_pipeline(unit.recipe, unit.run, runners, reporter, None, preflight)
            except UserError as error:
                raise UserError(f"arm {unit.arm}, seed {unit.seed}: {error}") from error
            finished.note(unit)


def seconds_of(units: Sequence[Unit]) -> float:
    """What the runs took together, what they took over not counted twice."""
    entries = [entry for unit in units for entry in unit.run.manifest.read().get("stages", {}).values()]
    return round(sum(float(entry.get("seconds", 0.0)) for entry in entries if "taken_from" not in entry), 1)


def values_of(made: Plan, units: Sequence[Unit]) -> dict[str, dict[int, dict[str, Value]]]:
    """The figures of finished runs: arm -> seed -> figure."""
    values: dict[str, dict[int, dict[str, Value]]] = {arm: {} for arm in made.arms}
    for unit in units:
        values[unit.arm][unit.seed] = read_figures(made.study, unit.recipe, unit.run)
    return values


def curves_of(made: Plan, units: Sequence[Unit]) -> list[dict[str, Any]]:
    """Every curve that the study draws, of every run."""
    return [
        {
            **curves.model_dump(),
            "lines": [
                {"arm": unit.arm, "seed": unit.seed, "points": points}
                for unit in units
                for points in read_curves(curves, unit.run)
            ],
        }
        for curves in made.study.curves
    ]


# ------------------------------------------------------------------------------------------------------- time left


class Clock:
    """How long a study still takes: what a stage took before stands for the same stage of other runs, else for others
    of its kind; before there is any, the study's own estimate."""

    def __init__(self, work: Work, minutes: float) -> None:
        self._left: Counter[tuple[str, str]] = Counter((s.stage.kind, s.stage.name) for s in work.left)
        self._guess = 60 * minutes / max(work.stages - work.shared, 1)
        self._took: dict[tuple[str, str], list[float]] = {}

    def ended(self, kind: str, name: str, seconds: float) -> None:
        """A stage took so long."""
        self._took.setdefault((kind, name), []).append(seconds)
        self._left[kind, name] = max(self._left[kind, name] - 1, 0)

    def left(self) -> float:
        """Seconds."""
        return sum(count * self._expected(*what) for what, count in self._left.items())

    def _expected(self, kind: str, name: str) -> float:
        alike = self._took.get((kind, name)) or [s for (k, _), took in self._took.items() if k == kind for s in took]
        return sum(alike) / len(alike) if alike else self._guess
