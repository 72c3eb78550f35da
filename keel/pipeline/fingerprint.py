"""What a stage's result depends on, as one hash."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from keel import __version__
from keel.recipe.annotate import AnnotateStage
from keel.recipe.dpo import DpoStage
from keel.recipe.eval import EvalStage
from keel.recipe.graph import references, sources
from keel.recipe.grpo import GrpoStage
from keel.recipe.judges import PythonRef
from keel.recipe.ppo import PpoStage
from keel.recipe.recipe import Recipe, Stage
from keel.recipe.report import ReportStage
from keel.recipe.reward import RewardStage
from keel.recipe.sample import SampleStage
from keel.recipe.sft import SftStage
from keel.recipe.stage import PEOPLE, PolicyBase, PreferenceBase
from keel.run import RunDir, hash_config, hash_file
from keel.stages.inputs import reads_store
from keel.store.trained_on import VoteHashes, vote_hashes

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


class Contents:
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


def stage_fingerprint(
    recipe: Recipe, stage: Stage, above: Mapping[str, str], device: str, contents: Contents, votes: VoteHashes
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
    if votes_of(recipe, stage, votes) != VoteHashes():  # what stands there besides the annotate stages' own
        facts["votes"] = votes_of(recipe, stage, votes).facts()
    if not isinstance(stage, AnnotateStage | ReportStage):
        template = recipe.model.chat_template
        model = recipe.model.model_dump(mode="json")
        model |= {"path": contents.of(recipe.model.path), "chat_template": contents.of(template) if template else None}
        facts |= {"model": model, "device": torch.device(device).type}
    return hash_config(facts)


def votes_of(recipe: Recipe, stage: Stage, votes: VoteHashes) -> VoteHashes:
    """The hashes of what the stage learns from in the store."""
    if isinstance(stage, SftStage) and PEOPLE in stage.sources:
        return VoteHashes(written=votes.written)
    annotated = {other.name for other in recipe.stages if isinstance(other, AnnotateStage)}
    if not isinstance(stage, PreferenceBase) or not reads_store(stage, annotated):
        return VoteHashes()
    whose = stage.whose(annotated)
    return VoteHashes(
        people=votes.people if "people" in whose else "",
        withdrawn=votes.withdrawn if "simulated" in whose else "",
        models=votes.models if "models" in whose else "",
    )


def store_hashes(recipe: Recipe, run: RunDir) -> VoteHashes:
    """Of the run's store, when a stage learns from it."""
    annotated = {stage.name for stage in recipe.stages if isinstance(stage, AnnotateStage)}
    if not any(reads_store(stage, annotated) for stage in recipe.stages):
        return VoteHashes()
    return vote_hashes(recipe.store or run.store_url)
