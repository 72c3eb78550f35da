"""What every training stage is handed, what it records of its data, and the checks on lengths that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from keel.model.shared_base import SharedBase
from keel.precision import Precision
from keel.recipe.sections import DataConfig, ModelConfig, Source
from keel.run import StageDir, write_json
from keel.types import Encoded, Reporter, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class TrainContext:
    """``model_path`` is the checkpoint that the stage starts from; ``base_model`` the recipe's model section (adapters,
    template, revision, trust), which applies to it.
    ``shared``: that checkpoint held once, for stages whose models share it (``one_base``; see ``keel.train.roles``).
    ``texts``: the pretraining text that the recipe has the stage mix in. ``positions``: how long a record the model can
    read, where its config says."""

    stage: StageDir
    reporter: Reporter
    model_path: Path
    base_model: ModelConfig
    data: DataConfig
    device: str
    precision: Precision
    seed: int
    shared: SharedBase | None = None
    texts: Sequence[str] = ()
    positions: int | None = None

    def source(self, path: Path | None = None) -> Source:
        """Where the checkpoint at ``model_path``, or at another path, is read from."""
        return self.base_model.source(path or self.model_path)


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
    records: Sequence[T], encoded: Sequence[Sequence[Encoded]], ids: Sequence[str], context: TrainContext
) -> tuple[list[T], list[Sequence[Encoded]]]:
    """The records whose every encoding fits ``data.max_length`` and the model. Never cuts a record: a cut completion
    would teach the model to stop in the middle. Longer ones are an error, or left out and counted with
    ``data.over_length: skip``."""
    data, limit, name = context.data, context.data.max_length, "data.max_length"
    remedy = "raise data.max_length or set data.over_length: skip"
    if context.positions is not None and context.positions < limit:
        limit, name = context.positions, "the model's positions"
        remedy = "shorten them, set data.over_length: skip, or take a model with a longer context"
    if empty := [identity for parts, identity in zip(encoded, ids, strict=True) if not all(p.predicted for p in parts)]:
        raise UserError(
            f"{len(empty)} of {len(records)} records have nothing to learn (first: {empty[0]}); take out empty replies"
        )
    kept: list[T] = []
    kept_encoded: list[Sequence[Encoded]] = []
    over: list[tuple[str, int]] = []
    for record, parts, identity in zip(records, encoded, ids, strict=True):
        longest = max(len(part.ids) for part in parts)
        if longest > limit:
            over.append((identity, longest))
        else:
            kept.append(record)
            kept_encoded.append(parts)
    if over and data.over_length == "error":
        first, length = over[0]
        raise UserError(
            f"{len(over)} of {len(records)} records are longer than {name} = {limit} tokens "
            f"(first: {first}, {length} tokens); {remedy}"
        )
    if over:
        context.reporter.note(f"left out {len(over)} of {len(records)} records longer than {limit} tokens")
    if not kept:
        raise UserError(f"no record is left within {name} = {limit} tokens; shorten them or take a longer model")
    return kept, kept_encoded
