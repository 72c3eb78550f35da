"""Which of a recipe's stages are done, which are stale, and the running of what is left, in order.

A stage is known by its *fingerprint*: a hash of its settings, the seed, the device class and precision, the contents
of the data that it reads, people's votes where it learns from them, Keel's major and minor version, and the
fingerprints of its parents (the stages whose results it uses). A finished stage with the fingerprint that the recipe
asks for is not run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from keel import __version__
from keel.model.checkpoint import pinned
from keel.pipeline.fingerprint import Contents, release, stage_fingerprint, store_hashes, votes_of
from keel.recipe.graph import ancestors, parents
from keel.recipe.recipe import Recipe, Stage
from keel.run import RunDir, peak_rss_mb, resolve_device, seed_rng, versions
from keel.stages.context import StageContext
from keel.stages.judge_card import bounds_kept
from keel.store.trained_on import VoteHashes
from keel.types import Reporter, UserError


@dataclass(frozen=True)
class Step:
    """A stage's standing. ``done``: nothing to do. ``stale``: finished or begun for other settings. ``todo``: never
    run, or interrupted. ``reason`` says why in a few words."""

    stage: Stage
    state: Literal["done", "stale", "todo"]
    reason: str
    fingerprint: str
    parents: tuple[str, ...]


Runner = Callable[[Any, StageContext], dict[str, Any]]


Preflight = Callable[[Stage, StageContext], None]


def plan(recipe: Recipe, run: RunDir) -> list[Step]:
    """Every stage's standing in ``run``, in the recipe's order. Reads only. `UserError` for a broken reference."""
    contents = Contents(run.manifest.read().get("data", {}))
    return _plan(recipe, run, resolve_device(recipe.device), contents, store_hashes(recipe, run))


def _plan(recipe: Recipe, run: RunDir, device: str, contents: Contents, votes: VoteHashes) -> list[Step]:
    manifest = run.manifest.read()
    fingerprints: dict[str, str] = {}
    steps: list[Step] = []
    for stage in recipe.stages:
        above = {name: fingerprints[name] for name in parents(recipe, stage)}
        fingerprint = stage_fingerprint(recipe, stage, above, device, contents, votes)
        folder, bounds = run.stage(stage.name), stage.card_bounds()
        held = None if bounds is None else bounds_kept(folder.path)
        if held is not None and folder.fingerprint != fingerprint:
            before = stage_fingerprint(recipe, stage, above, device, contents, votes, held.first)
            fingerprint = before if folder.fingerprint == before else fingerprint
        fingerprints[stage.name] = fingerprint
        moved = [name for name in above if any(step.stage.name == name and step.state == "stale" for step in steps)]
        state: Literal["done", "stale", "todo"]
        if folder.is_done(fingerprint) and held is not None and held.last != bounds:
            state, reason = "todo", "other bounds for its judge's card, which is asked nothing again"
        elif folder.is_done(fingerprint):
            state, reason = "done", "up to date"
        elif folder.fingerprint == fingerprint:
            state, reason = "todo", "interrupted, goes on from its last saved state"
        elif folder.fingerprint is not None:
            state = "stale"
            reason = f"{', '.join(moved)} changed" if moved else _why(recipe, stage, manifest, votes)
        else:
            state, reason = "todo", "not run yet"
        steps.append(Step(stage, state, reason, fingerprint, tuple(above)))
    return steps


def _why(recipe: Recipe, stage: Stage, manifest: Mapping[str, Any], votes: VoteHashes) -> str:
    """Why a stage whose parents are as they were has another fingerprint than it had."""
    made_with = str(manifest.get("versions", {}).get("keel", __version__))
    if release(made_with) != release(__version__):
        return f"Keel {made_with} made it, and this is Keel {__version__}"
    known = manifest.get("votes")
    before = VoteHashes() if known is None else VoteHashes(**known)
    if votes_of(recipe, stage, before) != votes_of(recipe, stage, votes):
        return "people judged or wrote more, settled something, or took something back"
    return "its settings or data changed"


def run_pipeline(
    recipe: Recipe,
    run: RunDir,
    runners: Mapping[str, Runner],
    reporter: Reporter,
    targets: Collection[str] | None = None,
    preflight: Preflight | None = None,
    on_cached: Callable[[str], None] | None = None,
) -> list[Step]:
    """Runs what is not done, in order, and records it in the manifest; returns the plan that it carried out.

    ``runners`` has one function a stage kind: (stage, context) -> the stage's summary. ``targets``: run only these
    stages and what they rest on. ``preflight(stage, context)`` is called before each stage that runs,
    ``on_cached(name)`` for each that need not run.

    A failing or killed stage leaves the finished ones as they are; the same call goes on where it stopped.
    """
    device = resolve_device(recipe.device)
    with run.lock():
        earlier = run.manifest.read()
        if earlier and "recipe" not in earlier:
            raise UserError(f"{run.manifest.path}: not the manifest of a run; choose another --out")
        contents = Contents(earlier.get("data", {}))
        votes = store_hashes(recipe, run)
        steps = _plan(recipe, run, device, contents, votes)
        run.manifest.update(
            {
                "name": recipe.name,
                "recipe": recipe.model_dump(mode="json"),
                "versions": versions(),
                "seed": recipe.seed,
                "device": device,
                "data": contents.entries,
                "votes": asdict(votes),
                "stages": _kept_entries(run, recipe),
            }
        )
        wanted = ancestors(recipe, {stage.name for stage in recipe.stages} if targets is None else targets)
        model = recipe.model
        if any(step.stage.name in wanted and step.state != "done" for step in steps):
            model = model.model_copy(update={"path": pinned(model.path, model.revision)})
        given = recipe.model_copy(update={"model": model})
        for step in steps:
            if step.stage.name not in wanted:
                continue
            if step.state == "done":
                if on_cached is not None:
                    on_cached(step.stage.name)
                continue
            folder, read = run.stage(step.stage.name), contents.constitutions
            context = StageContext(given, run, folder, reporter, device, constitutions=read)
            _run_stage(step, context, runners[step.stage.kind], preflight)
        _record_totals(run)
    return steps


def _record_totals(run: RunDir) -> None:
    """Adds to the run's summary (when a stage wrote one) what no stage can know: every stage's time, memory, and the
    alarms of the cards of judges that label."""
    summary = run.summary()
    if summary:
        stages = run.manifest.read()["stages"]
        seconds = {name: entry["seconds"] for name, entry in stages.items()}
        peak = max(entry.get("peak_rss_mb", 0.0) for entry in stages.values())
        cards = {name: card for name in stages if (card := run.stage(name).summary().get("card"))}
        if cards:
            alarms = [alarm for alarm in summary.get("alarms", []) if alarm["stage"] not in cards]
            summary["alarms"] = alarms + [alarm for card in cards.values() for alarm in card.get("alarms", [])]
        run.write_summary(
            summary | {"seconds": seconds | {"total": round(sum(seconds.values()), 3)}, "peak_rss_mb": peak}
        )


def _kept_entries(run: RunDir, recipe: Recipe) -> dict[str, Any]:
    """The manifest's stage entries in the recipe's order, without those of stages that the recipe has no more."""
    entries = run.manifest.read().get("stages", {})
    return {stage.name: entries[stage.name] for stage in recipe.stages if stage.name in entries}


def _run_stage(step: Step, context: StageContext, runner: Runner, preflight: Preflight | None) -> None:
    name, stage_dir = step.stage.name, context.stage_dir
    earlier = context.run.manifest.read().get("stages", {}).get(name, {})
    # A stage that was killed goes on, and its time with it.
    before = float(earlier.get("seconds", 0.0)) if stage_dir.fingerprint == step.fingerprint else 0.0
    entry: dict[str, Any] = {
        "kind": step.stage.kind,
        "fingerprint": step.fingerprint,
        "parents": {parent: context.run.stage(parent).fingerprint for parent in step.parents},
        "status": "running",
        "seconds": before,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if preflight is not None:
        preflight(step.stage, context)
    stage_dir.begin(step.fingerprint)
    seed_rng(step.stage.seed_of(context.recipe.seed))
    context.run.manifest.update_stage(name, entry)
    started = time.monotonic()

    def record(status: str) -> None:
        entry.update(status=status, seconds=round(before + time.monotonic() - started, 3), peak_rss_mb=peak_rss_mb())
        context.run.manifest.update_stage(name, entry)

    try:
        summary = runner(step.stage, context)
    except KeyboardInterrupt:
        record("interrupted")
        raise
    except Exception:
        record("failed")
        raise
    record("done")
    stage_dir.finish(summary)
