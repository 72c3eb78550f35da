"""Over-optimisation: the learned reward (proxy) and the judge's (gold) against how far the policy has moved.

After Gao, Schulman and Hilton, "Scaling laws for reward model overoptimization" (2022): distance is d = sqrt(KL), and
for reinforcement learning the gold reward follows d (alpha - beta ln d). They also found that a KL penalty does not
change gold as a function of KL, it only stops earlier. So two runs are compared at equal steps *and* at equal KL. The
statements made here say what was measured and nothing about why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from keel.types import UserError

Rows = Sequence[Mapping[str, Any]]

KL, PROXY, GOLD = "objective/kl", "objective/scores", "eval/gold"
LEVELS = 5  # at how many equal KLs two runs are compared


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One row of a PPO run's metrics. kl: nats per sequence (k1); gold: None where it was not measured."""

    step: int
    kl: float
    proxy: float
    gold: float | None


@dataclass(frozen=True, slots=True)
class GaoFit:
    """gold = start + d (alpha - beta ln d), least squares; rmse in gold's unit. ``peak_kl``: where the fitted curve is
    highest, None when it has no maximum above 0 or has it beyond the KL that was measured."""

    start: float
    alpha: float
    beta: float
    rmse: float
    points: int
    peak_kl: float | None

    def at(self, kl: float) -> float:
        d = math.sqrt(max(kl, 0.0))
        return self.start + (d * (self.alpha - self.beta * math.log(d)) if d > 0 else 0.0)


@dataclass(frozen=True, slots=True)
class Side:
    """Where one run stands when compared."""

    kl: float
    proxy: float
    gold: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs side by side: ``step`` when compared at equal steps, None when at equal KL."""

    step: int | None
    kept: Side
    free: Side


def curve(rows: Rows, kl: str = KL, proxy: str = PROXY, gold: str = GOLD) -> list[CurvePoint]:
    """The rows that have the KL and the proxy, in the order of the run."""
    points = []
    for row in rows:
        k, p = finite(row.get(kl)), finite(row.get(proxy))
        if k is not None and p is not None:
            points.append(CurvePoint(int(row["step"]), k, p, finite(row.get(gold))))
    return points


def finite(value: Any) -> float | None:
    """The value as a float, or None when it is missing or not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def gao_fit(points: Sequence[CurvePoint]) -> GaoFit | None:
    """Least squares over the points with a gold reward; None with fewer than five of them (the curve has three free
    parameters) or when their KLs do not determine them.

    The start (gold at KL 0) is fitted too: pinning it to one noisy measurement would bend the whole curve.
    """
    measured = [(math.sqrt(max(p.kl, 0.0)), p.gold) for p in points if p.gold is not None]
    if len(measured) < 5:
        return None
    d, gold = (np.array(column) for column in zip(*measured, strict=True))
    d_log_d = np.where(d > 0, d * np.log(np.maximum(d, 1e-12)), 0.0)
    design = np.stack([np.ones_like(d), d, -d_log_d], axis=1)
    solution, _, rank, _ = np.linalg.lstsq(design, gold, rcond=1e-9)
    if rank < 3:
        return None
    start, alpha, beta = (float(x) for x in solution)
    rmse = float(np.sqrt(np.mean((design @ solution - gold) ** 2)))
    peak = None
    if beta > 0:  # d/dd [d (alpha - beta ln d)] = alpha - beta ln d - beta = 0
        log_peak = 2 * (alpha / beta - 1)
        if log_peak <= 2 * math.log(float(d.max())):
            peak = math.exp(log_peak)
    return GaoFit(start, alpha, beta, rmse, len(measured), peak)


def at_equal_steps(kept: Sequence[CurvePoint], free: Sequence[CurvePoint]) -> Comparison | None:
    """Both runs at the last step for which both measured gold; None when there is none."""
    sides = [{p.step: _side(p) for p in points if p.gold is not None} for points in (kept, free)]
    common = sides[0].keys() & sides[1].keys()
    if not common:
        return None
    return Comparison(max(common), sides[0][max(common)], sides[1][max(common)])


def _side(point: CurvePoint) -> Side:
    assert point.gold is not None
    return Side(point.kl, point.proxy, point.gold)


def at_equal_kl(kept: Sequence[CurvePoint], free: Sequence[CurvePoint], levels: int = LEVELS) -> list[Comparison]:
    """Both runs where each first reaches the same KL, at ``levels`` values evenly spaced in sqrt(KL) over the range
    that both cover; empty when they share no range. Between two measurements proxy and gold are interpolated linearly
    in sqrt(KL), in which the curves are nearly straight. Linear in KL would cut below a bent curve, most for the run
    whose measurements lie farther apart. It would show a difference where there is none."""
    runs = [[_side(p) for p in points if p.gold is not None] for points in (kept, free)]
    if not all(len(run) >= 2 for run in runs):
        return []
    low = max(max(run[0].kl, 0.0) for run in runs)
    high = min(max(side.kl for side in run) for run in runs)
    if high <= low:
        return []
    roots = np.linspace(math.sqrt(low), math.sqrt(high), levels + 1)[
        1:
    ]  # the start is the same model: nothing to compare
    comparisons = []
    for root in roots:
        level = min(float(root) ** 2, high)
        comparisons.append(Comparison(None, _first_reach(runs[0], level), _first_reach(runs[1], level)))
    return comparisons


def _first_reach(run: Sequence[Side], level: float) -> Side:
    for before, after in pairwise(run):
        if before.kl <= level <= after.kl:
            low, here, high = (math.sqrt(max(kl, 0.0)) for kl in (before.kl, level, after.kl))
            share = (here - low) / (high - low) if high > low else 0.0
            return Side(
                level,
                before.proxy + share * (after.proxy - before.proxy),
                before.gold + share * (after.gold - before.gold),
            )
    raise AssertionError("the level lies within the run's range")


def guardrail(kept_name: str, kept_rows: Rows, free_name: str, free_rows: Rows, levels: int = LEVELS) -> dict[str, Any]:
    """The ``guardrail`` entry of summary.json: a run with a KL penalty (``kept``) beside one without (``free``).

    ``runs``: name, points and fit of each; ``equal_steps``, ``equal_kl``: the comparisons; ``statements``: what they
    show, in words. Raises UserError when a run has no row with both KL and proxy.
    """
    curves = {}
    for name, rows in ((kept_name, kept_rows), (free_name, free_rows)):
        curves[name] = curve(rows)
        if not curves[name]:
            raise UserError(f"stage {name!r} has no metrics row with {KL} and {PROXY}; run it again before comparing")
    steps = at_equal_steps(curves[kept_name], curves[free_name])
    equal = at_equal_kl(curves[kept_name], curves[free_name], levels)
    fits = {name: gao_fit(points) for name, points in curves.items()}
    return {
        "runs": [
            {
                "name": name,
                "points": [asdict(p) for p in points],
                "fit": asdict(fit) if (fit := fits[name]) else None,
                "fitted": _fitted(fit, points) if fit else [],
            }
            for name, points in curves.items()
        ],
        "equal_steps": asdict(steps) if steps else None,
        "equal_kl": [asdict(c) for c in equal],
        "statements": statements(kept_name, free_name, steps, equal),
    }


def _fitted(fit: GaoFit, points: Sequence[CurvePoint], n: int = 40) -> list[dict[str, float]]:
    """The fitted curve over the range of KL where gold was measured, to be drawn."""
    measured = [math.sqrt(max(p.kl, 0.0)) for p in points if p.gold is not None]
    return [{"kl": float(d) ** 2, "gold": fit.at(float(d) ** 2)} for d in np.linspace(min(measured), max(measured), n)]


def statements(kept_name: str, free_name: str, steps: Comparison | None, equal: Sequence[Comparison]) -> list[str]:
    """What the curves show: measured numbers and their order, no cause and no significance."""
    if steps is None:
        return [f"{kept_name} and {free_name} have no step at which the gold reward of both was measured."]
    said = [
        f"At equal steps (step {steps.step}): {_described(kept_name, steps.kept)}; "
        f"{_described(free_name, steps.free)}.",
        f"At that step {free_name} has the {_order(steps.free.proxy, steps.kept.proxy)} proxy and the "
        f"{_order(steps.free.gold, steps.kept.gold)} gold reward of the two.",
    ]
    if not equal:
        said.append("The two runs share no range of KL, so they cannot be compared at equal KL.")
        return said
    gaps = [c.kept.gold - c.free.gold for c in equal]
    said.append(
        f"At equal KL ({len(equal)} levels from {equal[0].kept.kl:.2g} to {equal[-1].kept.kl:.3g} nats): the gold "
        f"reward of {kept_name} minus that of {free_name} lies between {min(gaps):+z.2f} and {max(gaps):+z.2f}, "
        f"mean {sum(gaps) / len(gaps):+z.2f}."
    )
    return said


def _described(name: str, side: Side) -> str:
    return f"{name} has KL {side.kl:z.1f} nats, proxy {side.proxy:z.2f}, gold {side.gold:z.2f}"


def _order(a: float, b: float) -> str:
    return "same" if a == b else "higher" if a > b else "lower"
