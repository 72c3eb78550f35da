"""Which of a recipe's stages are done, which are stale, and the running of what is left, in order.

A stage is known by its *fingerprint*: a hash of its settings, the seed, the device class and precision, the contents
of the data that it reads, people's votes where it learns from them, Keel's major and minor version, and the
fingerprints of its parents (the stages whose results it uses). A finished stage with the fingerprint that the recipe
asks for is not run again.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from keel import __version__
from keel.config import (
    PEOPLE,
    AnnotateStage,
    DpoStage,
    EvalStage,
    GrpoStage,
    PolicyBase,
    PpoStage,
    PreferenceBase,
    PythonRef,
    Recipe,
    ReportStage,
    RewardStage,
    SampleStage,
    SftStage,
    Stage,
)
from keel.graph import ancestors, parents, references, sources
from keel.inputs import reads_store
from keel.model.checkpoint import pinned
from keel.run import (
    RunDir,
    StageContext,
    hash_config,
    hash_file,
    peak_rss_mb,
    resolve_device,
    seed_rng,
    versions,
)
from keel.store.trained_on import VoteHashes, vote_hashes
from keel.types import Reporter

# The data settings that a stage's result depends on, besides its own. The report has none: it reads the other stages.
_ROWS = ("max_length", "max_prompt_length", "over_length", "on_bad_row")
_DATA: dict[type[Any], tuple[str, ...]] = {
    SftStage: ("demonstrations", "heldout_fraction", *_ROWS),
    SampleStage: ("prompts", "heldout_prompts", "heldout_fraction", *_ROWS),
    AnnotateStage: (),
    RewardStage: ("preferences", *_ROWS),
    DpoStage: ("preferences", *_ROWS),
    PpoStage: ("prompts", "heldout_prompts", "heldout_fraction", *_ROWS),
    GrpoStage: ("prompts", "heldout_prompts", "heldout_fraction", *_ROWS),
    EvalStage: ("prompts", "heldout_prompts", "heldout_fraction", "base_text", "facts", *_ROWS),
    ReportStage: (),
}
_PATHS = ("demonstrations", "prompts", "preferences", "heldout_prompts", "pretraining", "base_text", "facts")


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


# ---------------------------------------------------------------------------------------------------- fingerprints


class _Contents:
    """Content hashes of files and folders, those of an earlier run reused while size and time are unchanged."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self._known = known

    def of(self, source: str) -> str:
        """A hash of what lies at ``source``; a source that is no path (a hub id) stands for itself."""
        path = Path(source)
        if not path.exists():
            return source
        if source not in self.entries:
            files = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
            stats = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            stamp = hash_config([list(stat) for stat in stats])
            known = self._known.get(source, {})
            digest = known["sha256"] if known.get("stamp") == stamp else hash_file(path)
            self.entries[source] = {"sha256": digest, "stamp": stamp}
        return str(self.entries[source]["sha256"])

    def of_python(self, ref: str) -> str:
        """A hash of the file that a ``module:name`` or ``file.py:name`` reference points into."""
        place, _, name = ref.rpartition(":")
        if place.endswith(".py"):
            return f"{self.of(place)}:{name}"
        try:
            spec = importlib.util.find_spec(place)
        except (ImportError, ValueError):
            spec = None
        return f"{self.of(spec.origin) if spec and spec.origin else place}:{name}"


def _fingerprint(
    recipe: Recipe, stage: Stage, above: Mapping[str, str], device: str, contents: _Contents, votes: VoteHashes
) -> str:
    settings = stage.model_dump(mode="json", exclude={"name", "log_every", "save_every_seconds"})
    if isinstance(settings.get("prompts"), str):
        settings["prompts"] = contents.of(settings["prompts"])
    if isinstance(stage, PreferenceBase):
        settings["preferences"] = [s if s in above or s == PEOPLE else contents.of(s) for s in stage.sources]
    if isinstance(stage, SftStage):
        settings["demonstrations"] = [s if s in above or s == PEOPLE else contents.of(s) for s in stage.sources]
    for reference in references(stage):
        if reference.target not in above and reference.target != "base":
            settings[f"content of {reference.place}"] = contents.of(reference.target)
    settings["code"] = [contents.of_python(source.ref) for _, source in sources(stage) if isinstance(source, PythonRef)]
    data = {name: getattr(recipe.data, name) for name in _DATA[type(stage)]}
    if isinstance(stage, PolicyBase) and stage.ptx is not None:
        data["pretraining"] = recipe.data.pretraining
    if "prompts" in data and data["prompts"] is None:  # they are taken from the other data then
        data |= {"demonstrations": recipe.data.demonstrations, "preferences": recipe.data.preferences}
    facts = {
        "settings": settings,
        "data": {name: contents.of(v) if name in _PATHS and v is not None else v for name, v in data.items()},
        "seed": recipe.seed,
        "keel": ".".join(__version__.split(".")[:2]),
        "parents": dict(above),
    }
    if isinstance(stage, AnnotateStage):
        facts["store"] = recipe.store  # the judgements lie there
    if _votes_of(recipe, stage, votes) != VoteHashes():  # what stands there besides the annotate stages' own
        facts["votes"] = asdict(_votes_of(recipe, stage, votes))
    if not isinstance(stage, AnnotateStage | ReportStage):
        template = recipe.model.chat_template
        model = recipe.model.model_dump(mode="json")
        model |= {"path": contents.of(recipe.model.path), "chat_template": contents.of(template) if template else None}
        facts |= {"model": model, "device": torch.device(device).type}
    return hash_config(facts)


def _votes_of(recipe: Recipe, stage: Stage, votes: VoteHashes) -> VoteHashes:
    """The hashes of what the stage learns from in the store."""
    if isinstance(stage, SftStage) and PEOPLE in stage.sources:
        return VoteHashes(written=votes.written)
    annotated = {other.name for other in recipe.stages if isinstance(other, AnnotateStage)}
    if not isinstance(stage, PreferenceBase) or not reads_store(stage, annotated):
        return VoteHashes()
    people = PEOPLE in stage.sources or stage.voters != "simulated"
    simulated = bool(set(stage.sources) & annotated) and stage.voters != "people"
    return VoteHashes(people=votes.people if people else "", withdrawn=votes.withdrawn if simulated else "")


def _vote_hashes(recipe: Recipe, run: RunDir) -> VoteHashes:
    """Of the run's store, when a stage learns from it."""
    annotated = {stage.name for stage in recipe.stages if isinstance(stage, AnnotateStage)}
    if not any(reads_store(stage, annotated) for stage in recipe.stages):
        return VoteHashes()
    return vote_hashes(recipe.store or run.store_url)


def plan(recipe: Recipe, run: RunDir) -> list[Step]:
    """Every stage's standing in ``run``, in the recipe's order. Reads only. `UserError` for a broken reference."""
    contents = _Contents(run.manifest.read().get("data", {}))
    return _plan(recipe, run, resolve_device(recipe.device), contents, _vote_hashes(recipe, run))


def _plan(recipe: Recipe, run: RunDir, device: str, contents: _Contents, votes: VoteHashes) -> list[Step]:
    known = run.manifest.read().get("votes")
    fingerprints: dict[str, str] = {}
    steps: list[Step] = []
    for stage in recipe.stages:
        above = {name: fingerprints[name] for name in parents(recipe, stage)}
        fingerprint = _fingerprint(recipe, stage, above, device, contents, votes)
        fingerprints[stage.name] = fingerprint
        folder = run.stage(stage.name)
        moved = [name for name in above if any(step.stage.name == name and step.state == "stale" for step in steps)]
        state: Literal["done", "stale", "todo"]
        if folder.is_done(fingerprint):
            state, reason = "done", "up to date"
        elif folder.fingerprint == fingerprint:
            state, reason = "todo", "interrupted, goes on from its last saved state"
        elif folder.fingerprint is not None:
            before = VoteHashes() if known is None else VoteHashes(**known)
            voted = _votes_of(recipe, stage, before) != _votes_of(recipe, stage, votes)
            said = "people judged or wrote more, settled something, or took something back"
            reason = said if voted else "its settings or data changed"
            state, reason = "stale", f"{', '.join(moved)} changed" if moved else reason
        else:
            state, reason = "todo", "not run yet"
        steps.append(Step(stage, state, reason, fingerprint, tuple(above)))
    return steps


# --------------------------------------------------------------------------------------------------------- running


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
        contents = _Contents(run.manifest.read().get("data", {}))
        votes = _vote_hashes(recipe, run)
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
            context = StageContext(given, run, run.stage(step.stage.name), reporter, device)
            _run_stage(step, context, runners[step.stage.kind], preflight)
        _record_totals(run)
    return steps


def _record_totals(run: RunDir) -> None:
    """Adds to the run's summary (when a stage wrote one) what no stage can know: every stage's time, and memory."""
    summary = run.summary()
    if summary:
        stages = run.manifest.read()["stages"]
        seconds = {name: entry["seconds"] for name, entry in stages.items()}
        peak = max(entry.get("peak_rss_mb", 0.0) for entry in stages.values())
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
    own = step.stage.seed if isinstance(step.stage, RewardStage) else None
    seed_rng(context.recipe.seed if own is None else own)
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
