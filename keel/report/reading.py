"""What the report knows of a run: its files, read as they are, whatever stages it has and however far it came."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from keel.report.kinds import kind_of
from keel.run import RunDir, read_json
from keel.types import UserError

REVISED = 3  # of a critique stage's prompts that are shown whole


@dataclass(frozen=True, slots=True)
class StageFiles:
    """One stage. ``config`` is its part of the recipe, ``entry`` its part of the manifest, ``rows`` its metrics;
    ``revised``: the first of a critique stage's records that were kept; ``traces``: a process reward model's
    ``traces.json``; ``card``: that of what scores a policy's steps. Empty where there is no such file."""

    name: str
    kind: str
    config: Mapping[str, Any]
    entry: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]
    revised: tuple[Mapping[str, Any], ...] = ()
    traces: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        return self.entry.get("seconds")

    @property
    def parents(self) -> tuple[str, ...]:
        return tuple(self.entry.get("parents", ()))


@dataclass(frozen=True, slots=True)
class RunFiles:
    name: str
    manifest: Mapping[str, Any]
    summary: Mapping[str, Any]
    stages: tuple[StageFiles, ...]

    @property
    def recipe(self) -> Mapping[str, Any]:
        return self.manifest.get("recipe", {})

    @property
    def models(self) -> Mapping[str, Mapping[str, Any]]:
        """The evaluated models' figures by name, in the order in which they are shown."""
        table = self.summary.get("stages", {})
        order = [name for name in self.summary.get("order", ()) if name in table]
        return {name: table[name] for name in (*order, *(n for n in table if n not in order))}

    @property
    def baseline(self) -> str:
        return str(self.summary.get("baseline", "sft"))

    @property
    def contenders(self) -> list[str]:
        """The evaluated models that come after the baseline."""
        names = list(self.models)
        return names[names.index(self.baseline) + 1 :] if self.baseline in names else []

    def of_kind(self, kind: str) -> list[StageFiles]:
        return [stage for stage in self.stages if stage.kind == kind]


@dataclass(frozen=True, slots=True)
class _Known:
    """What recipe and manifest say of one stage."""

    config: Mapping[str, Any] = field(default_factory=dict)
    entry: Mapping[str, Any] = field(default_factory=dict)


def read_run(path: Path) -> RunFiles:
    """Reads a run directory. Stages come in the recipe's order; without a recipe, in the manifest's, then by name.

    Raises UserError when the folder holds no run, or a file of it is not JSON.
    """
    run = RunDir(path)
    manifest, summary = run.manifest.read(), run.summary()
    folders = sorted(p.name for p in path.iterdir() if _is_stage(p)) if path.is_dir() else []
    if not (manifest or summary or folders):
        raise UserError(f"{path}: no run here (no manifest.json, no summary.json, no stage); name the folder of a run")
    known = {config["name"]: _Known(config) for config in manifest.get("recipe", {}).get("stages", ())}
    for name, entry in manifest.get("stages", {}).items():
        known[name] = _Known(known.get(name, _Known()).config, entry)
    for name in folders:
        known.setdefault(name, _Known())
    stages = [_read_stage(path / name, facts) for name, facts in known.items()]
    shown = [stage for stage in stages if kind_of(stage.kind).shown]
    return RunFiles(str(manifest.get("name", path.resolve().name)), manifest, summary, tuple(shown))


def _is_stage(folder: Path) -> bool:
    return (folder / "summary.json").is_file() or (folder / "metrics.jsonl").is_file()


def _read_stage(folder: Path, known: _Known) -> StageFiles:
    kind = str(known.config.get("kind") or known.entry.get("kind") or "")
    return StageFiles(
        name=folder.name,
        kind=kind,
        config=known.config,
        entry=known.entry,
        summary=_json(folder / "summary.json"),
        rows=tuple(_own_loss(row, known.config) for row in _rows(folder / "metrics.jsonl")),
        revised=_revised(folder) if kind_of(kind).revises else (),
        traces=_json(folder / "traces.json") if kind_of(kind).traced else {},
        card=_json(folder / "process_card.json"),
    )


def _json(path: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = read_json(path) if path.is_file() else {}
    return found


def _revised(folder: Path) -> tuple[Mapping[str, Any], ...]:
    return tuple(islice((row for row in _rows(folder / "records.jsonl") if row.get("kept")), REVISED))


def _own_loss(row: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with the stage's own loss: where pretraining text is mixed in, ``loss`` holds its share too, and would
    lie above the held-out loss, which does not, for no fault of the model's."""
    loss, text = row.get("loss"), row.get("loss/ptx_avg")
    if loss is None or text is None or not config.get("ptx"):
        return row
    return {**row, "loss": loss - config["ptx"]["coef"] * text}


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Every whole row. The last line may be torn, when the stage is at work or was killed; nothing is written here."""
    if not path.is_file():
        return
    torn: tuple[int, json.JSONDecodeError] | None = None
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if torn is not None:
                raise UserError(f"{path}, line {torn[0]}: not JSON ({torn[1]}); run the stage again") from torn[1]
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                torn = number, error
                continue
            yield row
