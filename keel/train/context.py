"""What every training stage is handed, what it records of its data, and the checks on lengths that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from keel.config import DataConfig, ModelConfig
from keel.model.precision import Precision
from keel.model.trunk import Trunk
from keel.run import StageDir, write_json
from keel.types import Encoded, Reporter, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class TrainContext:
    """``model_path`` is the checkpoint that the stage starts from; ``base_model`` the recipe's model section (adapters,
    template, revision), which applies to it.
    ``trunk``: that checkpoint held once, for stages whose models share it (``one_base``).
    ``texts``: the pretraining text that the recipe has the stage mix in."""

    stage: StageDir
    reporter: Reporter
    model_path: Path
    base_model: ModelConfig
    data: DataConfig
    device: str
    precision: Precision
    seed: int
    trunk: Trunk | None = None
    texts: Sequence[str] = ()


def record_lineage(
    stage: StageDir, trained: Sequence[str], heldout: Sequence[str], settled: Sequence[str] = ()
) -> None:
    """Writes the stage's ``judgements.json``: the ids of the votes (or demonstrations) that it trains on, of those held
    out, and of those in whose place a reviewer's word is trained on. It leads from a judgement to the weights that it
    shaped."""
    write_json(
        stage.path / "judgements.json", {"trained": list(trained), "settled": list(settled), "heldout": list(heldout)}
    )


def within_length(
    records: Sequence[T], encoded: Sequence[Sequence[Encoded]], ids: Sequence[str], data: DataConfig, reporter: Reporter
) -> tuple[list[T], list[Sequence[Encoded]]]:
    """The records whose every encoding fits ``data.max_length``. Never cuts a record: a cut completion would teach the
    model to stop in the middle. Longer ones are an error, or left out and counted with ``data.over_length: skip``."""
    kept: list[T] = []
    kept_encoded: list[Sequence[Encoded]] = []
    over: list[tuple[str, int]] = []
    for record, parts, identity in zip(records, encoded, ids, strict=True):
        longest = max(len(part.ids) for part in parts)
        if longest > data.max_length:
            over.append((identity, longest))
        else:
            kept.append(record)
            kept_encoded.append(parts)
    if over and data.over_length == "error":
        name, length = over[0]
        raise UserError(
            f"{len(over)} of {len(records)} records are longer than data.max_length = {data.max_length} tokens "
            f"(first: {name}, {length} tokens); raise data.max_length or set data.over_length: skip"
        )
    if over:
        reporter.note(f"left out {len(over)} of {len(records)} records longer than {data.max_length} tokens")
    if not kept:
        raise UserError(f"no record is left within data.max_length = {data.max_length} tokens; raise it")
    return kept, kept_encoded
