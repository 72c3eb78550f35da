"""What runs have trained, as their folders tell: for the labelling app's pages about models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from keel.recipe.declared import MODELS
from keel.recipe.recipe import STAGES, kinds_making
from keel.run import RunDir, read_json
from keel.types import UserError
from keel.web.service.sources import TrainedModel


def trained_stages(runs: Sequence[str]) -> list[TrainedModel]:
    """The training stages that the runs have begun, in their order. Keys are the stages' names, behind that of the
    run's folder where there are several runs. UserError for a folder that holds no run, and for two of one name."""
    names = [Path(run).resolve().name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"two runs are called {max(names, key=names.count)!r}; rename one folder to tell them apart")
    many = len(runs) > 1
    return [model for run, name in zip(runs, names, strict=True) for model in _stages(Path(run), name, many)]


def _stages(path: Path, run: str, many: bool) -> Iterator[TrainedModel]:
    folder = RunDir(path)
    manifest = folder.manifest.read()
    if not manifest:
        raise UserError(f"{path}: not a run directory (no manifest.json); name one that keel run or keel demo made")
    entries: dict[str, dict[str, Any]] = manifest.get("stages", {})
    kinds = kinds_making(*MODELS)
    models = [name for name, entry in entries.items() if entry.get("kind") in kinds]

    def key(name: str) -> str:
        return f"{run}:{name}" if many else name

    for name in models:
        entry, stage = entries[name], folder.stage(name)
        ids = _recorded(stage.path / "judgements.json")
        above = entry.get("parents", {})
        yield TrainedModel(
            key=key(name),
            run=run,
            name=name,
            kind=entry["kind"],
            learns_from=STAGES[entry["kind"]].learns_from,
            status=entry.get("status", ""),
            started=datetime.fromisoformat(entry["started"]) if "started" in entry else None,
            seconds=entry.get("seconds"),
            fingerprint=entry.get("fingerprint", ""),
            parents=tuple(key(parent) for parent in above if parent in models),
            others=tuple(parent for parent in above if parent not in models),
            summary=stage.summary(),
            trained=None if ids is None else tuple(ids["trained"]),
            settled=tuple(ids["settled"]) if ids else (),
            heldout=tuple(ids["heldout"]) if ids else (),
        )


def _recorded(path: Path) -> dict[str, list[str]] | None:
    return dict(read_json(path)) if path.exists() else None
