"""What a run's files say of one stage's model: the facts of its card. No names of people, no texts of theirs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel.recipe.checkpoints import kept_folder, stage_of
from keel.recipe.declared import PEOPLE, Makes
from keel.recipe.file import Draft, finish
from keel.recipe.graph import ancestors
from keel.recipe.judges import PythonRef
from keel.recipe.recipe import Recipe, Stage
from keel.recipe.sections import DataConfig
from keel.report.reading import RunFiles, StageFiles, read_run
from keel.run import RunDir, read_json
from keel.store import Store, ai_labels, lineage
from keel.store.engine import exists
from keel.store.records import VOTER_KINDS
from keel.types import UserError

SERVED: tuple[Makes, ...] = ("policy", "reward model", "process reward model")
_DATA = ("demonstrations", "prompts", "preferences", "heldout_prompts", "pretraining", "base_text", "facts")


@dataclass(frozen=True, slots=True)
class Named:
    """A stage of a run, by its folder: ``RUN/STAGE``, or ``RUN/STAGE@PERCENT`` for a checkpoint on its way."""

    run: RunDir
    recipe: Recipe
    stage: Stage
    name: str
    folder: Path

    @property
    def makes(self) -> Makes:
        """What kind of model it is."""
        return next(what for what in SERVED if what in self.stage.makes)


def find_stage(place: str) -> Named:
    """The finished stage at ``place``. UserError where there is none, or where it makes no model."""
    path = Path(place)
    path = path if path.name not in ("", "..") else path.resolve()  # the current folder, say
    run, (name, percent) = RunDir(path.parent), stage_of(path.resolve().name)
    manifest = run.manifest.read()
    if "recipe" not in manifest:
        inside = RunDir(path).manifest.read().get("recipe", {}).get("stages", ())
        made = ", ".join(str(path / stage["name"]) for stage in inside)
        there = f"; name one of its stages: {made}" if made else "; name a stage's folder, as in runs/mine/dpo"
        raise UserError(f"{place}: not a stage of a run{there}")
    recipe = finish(Draft(manifest["recipe"], str(run.manifest.path)))
    models = [stage for stage in recipe.stages if set(SERVED) & set(stage.makes)]
    stage = next((one for one in models if one.name == name), None)
    if stage is None:
        there = ", ".join(one.name for one in models) or "none"
        raise UserError(f"{place}: no stage of this run that makes a model; those that do: {there}")
    if not run.stage(name).done:
        raise UserError(f"{place}: this stage is not finished; finish it with keel run --out {run.path}")
    if run.stage(name).fingerprint != manifest.get("stages", {}).get(name, {}).get("fingerprint"):
        raise UserError(f"{place}: the run's manifest is of another version of this stage; run it again, then push it")
    folder = run.path / name
    if percent is not None:
        folder /= kept_folder(percent)
    if not (folder / "config.json").is_file():
        raise UserError(f"{place}: there is no checkpoint in {folder}; look with keel check, or run the stage again")
    return Named(run, recipe, stage, path.resolve().name, folder)


@dataclass(frozen=True, slots=True)
class Learned:
    """What one stage trained on. ``whose``: how many training records by 'people', 'models', 'simulated' or 'files'
    (what no store knows); ``annotators``: how many different ones of each gave them. ``guidelines``: records by the
    version that people worked by; ``principles``: (constitution, principle, its version, votes)."""

    stage: str
    kind: str
    whose: Mapping[str, int]
    annotators: Mapping[str, int]
    heldout: int
    settled: int
    guidelines: Mapping[str, int]
    principles: tuple[tuple[str, str, str, int], ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One stage that the model rests on, or itself."""

    name: str
    kind: str
    fingerprint: str
    seconds: float | None
    started: str


@dataclass(frozen=True, slots=True)
class DataFile:
    """What a stage read: for what, its last name (no folders of this machine), a hash of its content where one is
    known."""

    use: str
    name: str
    sha256: str | None
    stages: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """``evaluations``: the summaries of the evaluations of exactly this model, as a run's files each; ``outdated``: the
    evaluations that compared an earlier version. ``measured``: what the stage says of itself at its end; None for a
    checkpoint on its way (``percent``), of which it says nothing."""

    name: str
    kind: str
    makes: Makes
    run: str
    base: str
    base_on_hub: bool
    base_sha256: str | None
    revision: str | None
    lora: bool
    seed: int
    device: str
    versions: Mapping[str, str]
    steps: tuple[Step, ...]
    learned: tuple[Learned, ...]
    data: tuple[DataFile, ...]
    constitutions: tuple[tuple[str, str], ...]
    evaluations: tuple[RunFiles, ...]
    outdated: tuple[str, ...]
    measured: StageFiles | None
    percent: int | None
    without_kl: bool


def read_facts(named: Named) -> Facts:
    """Everything that the run's files say of the model. Reads only."""
    manifest, recipe, stage = named.run.manifest.read(), named.recipe, named.stage
    entries: Mapping[str, Any] = manifest["stages"]
    above, percent = ancestors(recipe, {stage.name}), stage_of(named.name)[1]
    used = [one for one in recipe.stages if one.name in above and one.name in entries]
    files = read_run(named.run.path)
    compared = [one for one in recipe.stages if one.compares_models and _looks_at(one, named, entries)]
    current, outdated = _evaluations(named, files, compared, entries)
    base, read_here = recipe.model.path, recipe.model.path in manifest.get("data", {})
    return Facts(
        name=named.name,
        kind=stage.kind,
        makes=named.makes,
        run=str(manifest.get("name", named.run.path.name)),
        base=public_name(base, read_here),
        base_on_hub=public_name(base, read_here) == base and "/" in base,
        base_sha256=_hash_of(base, manifest),
        revision=recipe.model.revision,
        lora=recipe.model.lora is not None,
        seed=int(manifest.get("seed", recipe.seed)),
        device=str(manifest.get("device", "")),
        versions=manifest.get("versions", {}),
        steps=tuple(_step(one, entries[one.name]) for one in used),
        learned=tuple(_learned(named, used, entries)),
        data=tuple(
            _data(recipe, [*used, *(one for one in compared if one.name in {run.name for run in current})], manifest)
        ),
        constitutions=tuple(_constitutions(named.run, used)),
        evaluations=tuple(current),
        outdated=tuple(outdated),
        measured=next(one for one in files.stages if one.name == stage.name) if percent is None else None,
        percent=percent,
        without_kl=not stage.worth_talking_to(),
    )


def _step(stage: Stage, entry: Mapping[str, Any]) -> Step:
    return Step(stage.name, stage.kind, entry["fingerprint"], entry.get("seconds"), str(entry.get("started", "")))


def _looks_at(stage: Stage, named: Named, entries: Mapping[str, Any]) -> bool:
    """Whether an evaluation has figures of the model: it loads it, or rests on that reward model."""
    rests = named.makes == "reward model" and named.name in entries.get(stage.name, {}).get("parents", {})
    return rests or named.name in {use.name for use in stage.loads()}


def _evaluations(
    named: Named, files: RunFiles, compared: Sequence[Stage], entries: Mapping[str, Any]
) -> tuple[list[RunFiles], list[str]]:
    """(what the evaluations of this very version found, the names of those of another version)."""
    found, outdated = [], []
    for stage in compared:
        summary = named.run.stage(stage.name).summary()
        if not summary:
            continue
        seen = entries.get(stage.name, {}).get("parents", {}).get(named.stage.name)
        has = any(named.name in summary.get(part, {}) for part in ("stages", "reward_bench"))
        if has and seen != entries[named.stage.name]["fingerprint"]:
            outdated.append(stage.name)
        elif has:
            found.append(RunFiles(stage.name, files.manifest, summary, files.stages))
    return found, outdated


# ------------------------------------------------------------------------------------------------- whose judgements


def _learned(named: Named, used: Sequence[Stage], entries: Mapping[str, Any]) -> Iterator[Learned]:
    """Of each stage that recorded what it learned from, in the recipe's order."""
    recorded = {one.name: named.run.stage(one.name).path / "judgements.json" for one in used}
    ids = {name: read_json(path) for name, path in recorded.items() if path.exists()}
    location = named.recipe.store or named.run.store_url
    if not exists(location):
        for name, parts in ids.items():
            yield _counted(name, entries[name]["kind"], parts, {}, ())
        return
    with Store(location) as store, store.transaction(writes=False) as connection:
        works = lineage.works(connection)
        for name, parts in ids.items():
            tokens = [_token(id, works) for id in parts.get("trained", ())]
            traced = ai_labels.trace(connection, [token for token in tokens if token in works])
            asked = [(t.constitution, t.principle, t.principle_hash, t.votes) for t in traced if t.principle]
            yield _counted(name, entries[name]["kind"], parts, works, asked)


def _token(id: str, works: Collection[str]) -> str:
    """The work that a training record is of: a ranking's pairs are TOKEN/BETTER-WORSE."""
    return id if id in works else id.rpartition("/")[0]


def _counted(
    name: str,
    kind: str,
    parts: Mapping[str, Sequence[str]],
    works: Mapping[str, lineage.Work],
    principles: Sequence[tuple[str, str, str, int]],
) -> Learned:
    voter_of = {kind: who for who, kinds in VOTER_KINDS.items() for kind in kinds}
    whose: Counter[str] = Counter()
    guidelines: Counter[str] = Counter()
    names: dict[str, set[str]] = {}
    for id in parts.get("trained", ()):
        work = works.get(_token(id, works))
        who = "files" if work is None else voter_of[work.annotator_kind]
        whose[who] += 1
        if work is not None:
            names.setdefault(who, set()).add(work.annotator)
            if work.guideline:
                guidelines[work.guideline] += 1
    merged: Counter[tuple[str, str, str]] = Counter()
    for constitution, principle, version, votes in principles:
        merged[constitution, principle, version] += votes
    return Learned(
        stage=name,
        kind=kind,
        whose=dict(sorted(whose.items())),
        annotators={who: len(some) for who, some in sorted(names.items())},
        heldout=len(parts.get("heldout", ())),
        settled=len(parts.get("settled", ())),
        guidelines=dict(sorted(guidelines.items())),
        principles=tuple((*key, votes) for key, votes in sorted(merged.items())),
    )


# ------------------------------------------------------------------------------------------------------------- data


def public_name(source: str, local: bool = False) -> str:
    """What a source is called where others read it: a hub id as it is, of anything on this machine its last part.
    ``local``: it lay on this machine once, if it does no more."""
    local = local or Path(source).exists() or Path(source).is_absolute() or source.startswith((".", "~"))
    return Path(source).expanduser().resolve().name if local else source


def _hash_of(source: str, manifest: Mapping[str, Any]) -> str | None:
    found = manifest.get("data", {}).get(source, {}).get("sha256")
    return None if found is None else str(found)


def _data(recipe: Recipe, stages: Sequence[Stage], manifest: Mapping[str, Any]) -> Iterator[DataFile]:
    read: dict[tuple[str, str], list[str]] = {}
    for stage in stages:
        for use, source in _sources(recipe, stage):
            read.setdefault((use, source), []).append(stage.name)
    for (use, source), by in read.items():
        known = _hash_of(source, manifest)
        if use == "code":
            file, _, name = source.rpartition(":")
            local = file.endswith(".py")
            yield DataFile(use, f"{public_name(file, local)}:{name}", _hash_of(file, manifest), tuple(by))
        else:
            yield DataFile(use, public_name(source, not source.startswith("hub:")), known, tuple(by))


def _sources(recipe: Recipe, stage: Stage) -> Iterator[tuple[str, str]]:
    """(what for, where) of the files that a stage reads."""
    names = {one.name for one in recipe.stages} | {PEOPLE}
    data: DataConfig = recipe.data
    for use in stage.reads(data):
        if use in _DATA and (source := getattr(data, use)) is not None:
            yield use.replace("_", " "), source
    for use, named in stage.files().items():
        for source in (named,) if isinstance(named, str) else named:
            if source not in names:
                yield use.replace("_", " "), source
    for _, scoring in stage.scored_by():
        if isinstance(scoring, PythonRef):
            yield "code", scoring.ref


def _constitutions(run: RunDir, used: Sequence[Stage]) -> Iterator[tuple[str, str]]:
    """(name, hash) of each that a stage drew principles from, as it read them."""
    found: dict[tuple[str, str], None] = {}
    for stage in used:
        said = run.stage(stage.name).summary().get("constitution")
        if isinstance(said, Mapping):
            found[public_name(str(said.get("name", ""))), str(said.get("hash", ""))] = None
    yield from found
