"""What a finished run says: the values at a figure's places, and those that a Python function measures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keel.pipeline.fingerprint import Contents
from keel.recipe.recipe import Recipe
from keel.report.wording import number
from keel.reward.python_ref import load_python
from keel.run import RunDir, hash_config, read_json, write_json
from keel.study.measures import check_replies, replies
from keel.study.plan import Curves, Figure, Study
from keel.types import UserError

DRAWS = 1000
RUN, METRICS = "run", "metrics"  # in a place: the run's own summary; a stage's metrics


@dataclass(frozen=True)
class Value:
    """A figure of one arm on one seed; None where the run has none (not reached, not defined).

    How much it owes to its prompts is told in one of two ways. ``rows``: it is a ratio of sums over groups (prompts,
    say), and this is what each group adds to (numerator, denominator). ``draws``: its values on resamples of the
    prompts, the same resamples in every arm.
    """

    value: float | None
    rows: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    draws: tuple[float, ...] = ()


MISSING = Value(None)


def check_places(study: Study, recipe: Recipe) -> None:
    """`UserError` for a place that begins with no stage of the recipe, and for a function that cannot be loaded."""
    stages = [stage.name for stage in recipe.stages]
    for name, figure in study.figures.items():
        for place in (*figure.places, *filter(None, [figure.minus])):
            stage, _, rest = place.partition(".")
            if stage not in (*stages, "base", RUN) or not rest:
                raise UserError(
                    f"figures.{name}: {place!r} is no place; write STAGE.KEY, where the stages are {', '.join(stages)}"
                )
        if figure.measure is not None:
            load_python(figure.measure)
    for curves in study.curves:
        stage, _, rest = curves.place.partition(".")
        if stage not in (*stages, RUN) or not rest:
            raise UserError(
                f"curves: {curves.place!r} is no place; write STAGE.KEY, where the stages are {', '.join(stages)}"
            )


def check_kept(study: Study, recipe: Recipe) -> None:
    """`UserError` where a run of ``recipe``, whose data are there, would not keep what a figure is measured of."""
    if any(load_python(figure.measure) is replies for figure in study.figures.values() if figure.measure is not None):
        check_replies(recipe)


def read_figures(study: Study, recipe: Recipe, run: RunDir) -> dict[str, Value]:
    """Every figure of a finished run."""
    return {name: _figure(figure, recipe, run) for name, figure in study.figures.items()}


def _figure(figure: Figure, recipe: Recipe, run: RunDir) -> Value:
    made = measured(figure.measure, recipe, run) if figure.measure else None
    values = [_at(place, run, made) for place in figure.places]
    found = _mean(values)
    if figure.minus is None or found.value is None:
        return found
    less = _at(figure.minus, run, made)
    if less.value is None:
        return MISSING
    alike = found.rows.keys() == less.rows.keys() and all(less.rows[g][1] == n for g, (_, n) in found.rows.items())
    rows = {g: (a - less.rows[g][0], n) for g, (a, n) in found.rows.items()} if alike else {}
    return Value(found.value - less.value, rows)


def _mean(values: Sequence[Value]) -> Value:
    """Of the same figure at several places, on the same groups where they have any."""
    known = [value.value for value in values if value.value is not None]
    if len(known) < len(values):
        return MISSING
    if len(values) == 1:
        return values[0]
    groups, middle = values[0].rows.keys(), sum(known) / len(known)
    if any(value.rows.keys() != groups for value in values):
        return Value(middle)
    if any(value.rows[g][1] != values[0].rows[g][1] for value in values for g in groups):
        return Value(middle, draws=_drawn(values, sorted(groups)))  # no ratio of sums is their mean
    rows = {g: (sum(v.rows[g][0] for v in values), sum(v.rows[g][1] for v in values)) for g in groups}
    return Value(sum(known) / len(known), rows)


def _drawn(values: Sequence[Value], groups: Sequence[str]) -> tuple[float, ...]:
    """The mean of the values on resamples of their groups, which are the same wherever the groups are."""
    times_RG = np.random.default_rng(0).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=DRAWS)
    means = []
    for value in values:
        sums_R2 = times_RG @ np.array([value.rows[group] for group in groups])
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append(sums_R2[:, 0] / sums_R2[:, 1])
    return tuple(float(mean) for mean in np.mean(means, axis=0))


def _at(place: str, run: RunDir, made: Mapping[str, Any] | None) -> Value:
    stage, _, rest = place.partition(".")
    keys = rest.split(".")
    if made is not None:
        return _value(made.get(stage), keys)
    if stage == RUN:
        return _value(run.summary(), keys)
    if keys[0] == METRICS and len(keys) > 1:
        key = rest.partition(".")[2]
        known = [value for row in _rows(run, stage) if (value := number(row.get(key))) is not None]
        return Value(known[-1]) if known else MISSING
    return _value(run.stage(stage).summary(), keys)


def _rows(run: RunDir, stage: str) -> list[dict[str, Any]]:
    return run.stage(stage).metrics.rows() if (run.stage(stage).path / "metrics.jsonl").exists() else []


def _value(tree: Any, keys: Sequence[str]) -> Value:
    for key in keys:
        if isinstance(tree, Mapping):
            tree = tree.get(key)
        elif isinstance(tree, list) and key.isdigit() and int(key) < len(tree):
            tree = tree[int(key)]
        else:
            return MISSING
    if isinstance(tree, Mapping) and "value" in tree:
        rows = {str(group): (float(a), float(b)) for group, (a, b) in tree.get("rows", {}).items()}
        draws = tuple(math.nan if drawn is None else float(drawn) for drawn in tree.get("draws", ()))
        return Value(number(tree["value"]), rows, draws)
    return Value(float(tree) if isinstance(tree, bool) else number(tree))


def read_curves(curves: Curves, run: RunDir) -> list[list[tuple[float, float]]]:
    """The points of every curve that lies at the place; none where there is nothing."""
    stage, _, rest = curves.place.partition(".")
    found: Any = run.summary() if stage == RUN else run.stage(stage).summary()
    for key in rest.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    if not isinstance(found, list):
        return []
    lines = [line.get("points", []) for line in found] if found and "points" in found[0] else [found]
    made = [[point for one in line if (point := _point(one, curves)) is not None] for line in lines]
    return [line for line in made if line]


def _point(point: Mapping[str, Any], curves: Curves) -> tuple[float, float] | None:
    x, y = number(point.get(curves.x)), number(point.get(curves.y))
    if x is None or y is None:
        return None
    return (math.sqrt(max(x, 0.0)) if curves.root else x), y


def measured(ref: str, recipe: Recipe, run: RunDir) -> Mapping[str, Any]:
    """What the function ``ref`` says of a finished run: ``(run, recipe) -> {stage: {name: value}}``, where a value is a
    number, None, or ``{"value": number, "rows": {group: [numerator, denominator]}}``, or the same with ``draws`` in the
    place of ``rows`` (see `Value`).

    It is asked once, and again when its file or a stage of the run has changed.
    """
    asked_of = {stage.name: run.stage(stage.name).fingerprint for stage in recipe.stages}
    kept = run.path / "measured" / f"{hash_config([Contents({}).of_python(ref), ref, asked_of])[:24]}.json"
    if not kept.exists():
        function = load_python(ref)
        try:
            found = function(run, recipe)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{ref} on {run.path}: {type(error).__name__}: {error}; the runs are kept") from error
        if not isinstance(found, Mapping):
            raise UserError(f"{ref}: it must return a mapping of stages, and returned {type(found).__name__}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_json(kept, found)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{ref} on {run.path}: {error}; values are plain finite numbers or None (float(x) for numpy's)"
            ) from error
    return dict(read_json(kept))
