"""What a stage's result depends on, as one hash."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from keel import __version__
from keel.recipe.checkpoints import stage_of
from keel.recipe.constitution import Constitution, principles_of, read_constitution
from keel.recipe.declared import PEOPLE, WITH_PEOPLE, StoreRead
from keel.recipe.graph import store_read
from keel.recipe.judges import PythonRef
from keel.recipe.recipe import Recipe, Stage
from keel.recipe.steps import PythonStepsRef
from keel.run import RunDir, hash_config, hash_file
from keel.store.trained_on import VoteHashes, vote_hashes

# The settings of ``data`` that name files: what lies there counts.
_PATHS = ("demonstrations", "prompts", "preferences", "heldout_prompts", "pretraining", "base_text", "facts")


def release(version: str) -> str:
    """The part of Keel's version that results depend on."""
    return ".".join(version.split(".")[:2])


class Contents:
    """Content hashes of files and folders, those of an earlier run reused while size and time are unchanged; and the
    constitutions that were read, by what recipes call them: a stage is given what its fingerprint was made of."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.constitutions: dict[str, Constitution] = {}
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

    def constitution(self, named: str) -> Constitution:
        """`UserError` for what is wrong with its file."""
        if named not in self.constitutions:
            self.constitutions[named] = read_constitution(named)
        return self.constitutions[named]

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


def stage_fingerprint(
    recipe: Recipe,
    stage: Stage,
    above: Mapping[str, str],
    device: str,
    contents: Contents,
    votes: VoteHashes,
    bounds: Mapping[str, Any] | None = None,
) -> str:
    """``above``: the fingerprints of the stages that it uses; ``votes``: of the run's store. ``bounds``: as Keel made
    it when the bounds of a judge's card counted, of a card with these."""
    settings = stage.settings()
    if bounds is not None:
        settings["card"] = {**settings["card"], **bounds}
    for field, named in stage.files().items():
        if isinstance(named, str):
            settings[field] = contents.of(named)
        else:
            settings[field] = [name if name in above or name == PEOPLE else contents.of(name) for name in named]
    for reference in stage.references():
        if stage_of(reference.target)[0] not in above and reference.target != "base":
            settings[f"content of {reference.place}"] = contents.of(reference.target)
    if (use := stage.principles()) is not None:
        read, _ = principles_of(use, stage.name, contents.constitution(use.constitution))
        settings["constitution"] = read.depends_on(use.ids, use.tags)
    scored = [one for _, one in stage.scored_by() if isinstance(one, PythonRef | PythonStepsRef)]
    settings["code"] = [contents.of_python(source.ref) for source in scored]
    learned = votes_of(recipe, stage, votes)
    data = {name: getattr(recipe.data, name) for name in stage.reads(recipe.data)}
    if (
        learned.people or learned.models or learned.written or learned.thumbs or learned.steps
    ):  # else these change nothing, and a run made before they counted still stands
        data |= {name: value for name in WITH_PEOPLE if (value := getattr(recipe.data, name)) is not None}
    facts = {
        "settings": settings,
        "data": {name: contents.of(v) if name in _PATHS and v is not None else v for name, v in data.items()},
        "seed": recipe.seed,
        "keel": release(__version__),
        "parents": dict(above),
    }
    if stage.stored == "all":
        facts["store"] = recipe.store
    if learned != VoteHashes():  # what stands there besides the annotate stages' own
        facts["votes"] = learned.facts()
    if stage.needs_model():
        template = recipe.model.chat_template
        model = recipe.model.settings()
        model |= {"path": contents.of(recipe.model.path), "chat_template": contents.of(template) if template else None}
        facts |= {"model": model, "device": torch.device(device).type}
    return hash_config(facts)


def votes_of(recipe: Recipe, stage: Stage, votes: VoteHashes) -> VoteHashes:
    """The hashes of what the stage learns from in the store."""
    read = store_read(recipe, stage)
    return VoteHashes(
        people=votes.people if "people" in read.voters else "",
        withdrawn=votes.withdrawn if "simulated" in read.voters | read.thumbs else "",
        written=votes.written if read.written else "",
        models=votes.models if "models" in read.voters else "",
        withdrawn_models=votes.withdrawn_models if "models" in read.voters else "",
        thumbs=votes.thumbs if "people" in read.thumbs else "",
        steps=votes.steps if "people" in read.steps else "",
    )


def store_hashes(recipe: Recipe, run: RunDir) -> VoteHashes:
    """Of the run's store, when a stage learns from it."""
    if all(store_read(recipe, stage) == StoreRead() for stage in recipe.stages):
        return VoteHashes()
    return vote_hashes(recipe.store or run.store_url)
