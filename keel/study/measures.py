"""What figures can be measured of a finished run besides those in its summaries (``measure:`` in a study)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from keel.data.sources import read_prompts
from keel.recipe.recipe import Recipe
from keel.run import RunDir
from keel.types import UserError

FEATURES = ("score", "reward")
RESAMPLES = 1000


def replies(run: RunDir, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What the run's evaluation says of each model's replies, prompt by prompt: the judge's ``score``, the ``reward``,
    and its flags (``correct``, ...), each over the prompts that have it. `UserError` where the evaluation kept fewer
    prompts (``show``) than it asked.
    """
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    summary = run.summary()
    samples = summary.get("samples", ())
    asked = max((int(figures.get("prompts", 0)) for figures in summary.get("stages", {}).values()), default=0)
    if len(samples) < asked:
        raise UserError(f"{run.path}: {_too_few(_evaluation(recipe) or 'eval', len(samples), asked)}")
    for number, sample in enumerate(samples):
        group = f"{number} {sample['prompt']}"
        for model, reply in sample["replies"].items():
            said = {name: reply[name] for name in FEATURES} | reply["flags"]
            for name, value in said.items():
                if value is not None:
                    table.setdefault(model, {}).setdefault(name, {})[group] = [float(value), 1.0]
    return {
        model: {
            name: {"value": sum(v for v, _ in rows.values()) / len(rows), "rows": rows} for name, rows in named.items()
        }
        for model, named in table.items()
    }


def check_replies(recipe: Recipe) -> None:
    """`UserError` where it can be seen before anything is computed that ``replies`` would lack some: where the
    evaluation's prompts lie in a file that is there."""
    name = _evaluation(recipe)
    if name is None:
        return
    stage = recipe.stage(name)
    file, kept = stage.files().get("prompts") or recipe.data.heldout_prompts, stage.shows()
    if kept is None or not isinstance(file, str) or not Path(file).expanduser().exists():
        return
    asked = len(read_prompts(file))
    if kept < asked:
        raise UserError(_too_few(name, kept, asked))


def _evaluation(recipe: Recipe) -> str | None:
    """The stage whose summary is the run's: the last that evaluates."""
    return next((stage.name for stage in reversed(recipe.stages) if stage.shows() is not None), None)


def _too_few(name: str, kept: int, asked: int) -> str:
    return (
        f"{name}.show: keel.study.measures:replies needs the replies to all {asked} prompts, and the evaluation keeps "
        f"those to {kept}; set {name}.show={asked} or more"
    )


def frontier(run: RunDir, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Of each evaluation with a ``frontier``: ``gold`` and ``gain`` (gold beyond the baseline's) at each of its nats,
    the mean over the curves that get there; None where none does. A place is ``eval.gold.5``."""
    from keel.eval.frontier import FILE, read_frontier

    found: dict[str, dict[str, Any]] = {}
    for stage in recipe.stages:
        folder = run.stage(stage.name).path
        if not (folder / FILE).exists():
            continue
        known = read_frontier(folder)
        at = {f"{nats:g}".replace(".", "_"): _at(known.curves, nats) for nats in known.at}
        found[stage.name] = {
            name: {nats: _drawn(values_R2[:, column]) for nats, values_R2 in at.items()}
            for column, name in enumerate(("gold", "gain"))
        }
    return found


def _at(curves: Any, nats: float) -> np.ndarray:
    """(gold, gain) [1 + R, 2], the mean over curves, NaN where none gets there: of the prompts as they are, then of
    resamples. These depend on the number of prompts alone, so that those of other arms are the same."""
    from keel.eval.frontier import GAIN, GOLD, along, first_reach, prompt_weights

    means = []
    for curve in curves:
        weight_RN = prompt_weights(len(curve.points[0][1].kl), RESAMPLES, np.random.default_rng(0))
        means.append(first_reach(*along(curve, weight_RN), nats)[:, [GOLD, GAIN]])
    there = np.isfinite(means).all(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(there, means, 0.0).sum(0) / there.sum(0))


def _drawn(values_R: np.ndarray) -> dict[str, Any] | None:
    if not math.isfinite(values_R[0]):
        return None
    draws = [round(float(value), 6) if math.isfinite(value) else None for value in values_R[1:]]
    return {"value": float(values_R[0]), "draws": draws}
