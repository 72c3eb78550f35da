"""Policies at equal KL: the judge's mean score (gold) against sqrt(KL), a curve a training run, read at asked nats.

A curve begins at the baseline, with KL 0, and goes through a run's checkpoints in the order of training. Between two of
them gold is straight in sqrt(KL), in which such curves are nearly straight (Gao, Schulman and Hilton 2022). Its value
at some nats is where it *first* reaches them along training; what comes after a turn back does not count. A curve that
never reaches them has no value there: nothing is extrapolated.

Intervals are percentile bootstraps. Prompts are drawn, the same for all checkpoints, with both their KL and their gold:
so differences are paired. Of a method's n > 1 runs (seeds), n - 1 are drawn besides, with replacement, which gives the
mean of n its own variance (McCarthy and Snowden 1985).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from keel.eval.grading import Estimate
from keel.run import read_json, write_json
from keel.stats import percentiles
from keel.types import UserError

FILE = "frontier.json"  # in the folder of an evaluation: what was measured of each checkpoint, prompt by prompt


@dataclass(frozen=True)
class Measured:
    """A checkpoint on N prompts; of each the mean over its replies. ``gold``: the judge's score, None where it gave no
    grade; ``kl``: log policy - log baseline, nats a reply; ``length``: tokens. ``finished``: share of all replies."""

    gold: tuple[float | None, ...]
    kl: tuple[float, ...]
    length: tuple[float, ...]
    finished: float

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Measured:
        return Measured(tuple(row["gold"]), tuple(row["kl"]), tuple(row["length"]), row["finished"])


@dataclass(frozen=True)
class Curve:
    """One training run of ``method``. ``points``: (name, checkpoint) in the order of training, the baseline first."""

    method: str
    name: str
    points: tuple[tuple[str, Measured], ...]


@dataclass(frozen=True)
class Cell:
    """What a method is worth at ``nats``: [point, low, high], low and high None where most resamples fall short of the
    KL; None: not reached, or ``ungraded`` curves get so far and the judge graded nothing there. ``gain``: gold beyond
    the baseline's. ``length``: tokens of a reply there. ``reached`` of the method's ``curves`` get so far with a grade,
    and the mean is over these."""

    method: str
    nats: float
    gold: list[float | None] | None
    gain: list[float | None] | None
    length: float | None
    reached: int
    curves: int
    ungraded: int = 0


@dataclass(frozen=True)
class Gap:
    """Gold of method ``a`` less that of ``b`` at ``nats``, [point, low, high]; None where one of them is not there."""

    a: str
    b: str
    nats: float
    gold: list[float | None] | None

    @property
    def parted(self) -> bool:
        """Whether the interval leaves out 0."""
        if self.gold is None or self.gold[1] is None or self.gold[2] is None:
            return False
        return self.gold[1] > 0 or self.gold[2] < 0


GOLD, GAIN, LENGTH = range(3)


class Frontier:
    """Curves on the same prompts, to be compared at equal KL. Pure: nothing is measured here, so that curves of several
    runs (:func:`read_frontier`) can be laid side by side."""

    def __init__(self, curves: Sequence[Curve], resamples: int = 2000, seed: int = 0) -> None:
        assert curves, "a frontier has a curve"
        self.curves, self.seed = list(curves), seed
        self.methods = list(dict.fromkeys(curve.method for curve in curves))
        sizes = {len(point.kl) for curve in curves for _, point in curve.points}
        if len(sizes) > 1:
            raise UserError(f"checkpoints were measured on different numbers of prompts ({sorted(sizes)})")
        (prompts,) = sizes
        points = [point for curve in self.curves for _, point in curve.points]
        self.graded = min(sum(gold is not None for gold in point.gold) for point in points)
        self.weight_RN = prompt_weights(prompts, resamples, np.random.default_rng([seed, 0]))
        self._along = {id(curve): along(curve, self.weight_RN) for curve in self.curves}

    def at(self, method: str, nats: float) -> Cell:
        mean_RF, reached = self._of(method, nats)
        own = [curve for curve in self.curves if curve.method == method]
        there = []
        for root_RP, value_RPF in (self._along[id(curve)] for curve in own):
            there.append(first_reach(root_RP[:1], value_RPF[:1], nats)[0, LENGTH])
        length = float(mean_RF[0, LENGTH])
        return Cell(
            method,
            nats,
            self._interval(mean_RF[:, GOLD]),
            self._interval(mean_RF[:, GAIN]),
            None if math.isnan(length) else length,
            reached,
            len(own),
            sum(map(math.isfinite, there)) - reached,
        )

    def gap(self, a: str, b: str, nats: float) -> Gap:
        return Gap(a, b, nats, self._interval(self._of(a, nats)[0][:, GOLD] - self._of(b, nats)[0][:, GOLD]))

    def gaps(self, nats: float) -> list[Gap]:
        """Of every two methods."""
        return [self.gap(a, b, nats) for a, b in combinations(self.methods, 2)]

    def _interval(self, values_R: np.ndarray) -> list[float | None] | None:
        """[point, low, high] of values whose first is that of the prompts as they are; None where that is not there.
        One graded prompt alone has no spread to tell an interval by."""
        if not math.isfinite(values_R[0]):
            return None
        low, high = (percentiles(values_R[1:]) if self.graded > 1 else None) or (None, None)
        return [float(values_R[0]), low, high]

    # ------------------------------------------------------------------------------------------------------- resamples

    def _of(self, method: str, nats: float) -> tuple[np.ndarray, int]:
        """(the method's mean gold, gain and length at ``nats`` [R, 3], NaN where no run of it gets so far; how many of
        its runs do, with the prompts as they are)."""
        own = [curve for curve in self.curves if curve.method == method]
        value_RSF = np.stack([first_reach(*self._along[id(curve)], nats) for curve in own], axis=1)
        there_RS = np.isfinite(value_RSF[:, :, GOLD])
        weight_RS = there_RS * self._seeds(method, len(own))
        total_R1 = weight_RS.sum(1, keepdims=True)
        with np.errstate(invalid="ignore"):
            mean_RF = (np.nan_to_num(value_RSF) * weight_RS[:, :, None]).sum(1) / total_R1
        return mean_RF, int(there_RS[0].sum())

    def _seeds(self, method: str, runs: int) -> np.ndarray:
        """How often each of a method's runs is drawn [R, S]."""
        rows = len(self.weight_RN)
        if runs == 1:
            return np.ones((rows, 1))
        rng = np.random.default_rng([self.seed, 1 + self.methods.index(method)])
        drawn = rng.multinomial(runs - 1, np.full(runs, 1 / runs), size=rows - 1)
        return np.vstack([np.ones(runs), drawn])


def prompt_weights(prompts: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of N prompts is drawn [1 + R, N]. The first row is the prompts as they are: point estimates."""
    drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    return np.vstack([np.ones(prompts), drawn])


def along(curve: Curve, weight_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sqrt(KL) [R, P], gold, gain and length [R, P, 3]) of a curve's points in every resample of its prompts."""
    points = [point for _, point in curve.points]
    kl_NP, length_NP = (np.array(columns).T for columns in zip(*((p.kl, p.length) for p in points), strict=True))
    gold_NP = np.array([[math.nan if g is None else g for g in point.gold] for point in points]).T
    total_R1 = weight_RN.sum(1, keepdims=True)
    root_RP = np.sqrt(np.maximum(weight_RN @ kl_NP / total_R1, 0.0))
    graded_NP = np.isfinite(gold_NP)
    with np.errstate(invalid="ignore"):  # no grade at all in a resample: no value
        gold_RP = (weight_RN @ np.where(graded_NP, gold_NP, 0.0)) / (weight_RN @ graded_NP)
    length_RP = weight_RN @ length_NP / total_R1
    return root_RP, np.stack([gold_RP, gold_RP - gold_RP[:, :1], length_RP], axis=-1)


def first_reach(root_RP: np.ndarray, value_RPF: np.ndarray, nats: float) -> np.ndarray:
    """The values [R, F] where each of R curves first reaches ``nats`` along its P points; NaN where it never does.

    root_RP: sqrt(KL) of the points, in the order of training; between two of them the values are straight in it."""
    level = math.sqrt(nats)
    found_RF = np.full((len(root_RP), value_RPF.shape[2]), math.nan)
    open_R = np.ones(len(root_RP), dtype=bool)
    for before, after in pairwise(range(root_RP.shape[1])):
        low_R, high_R = root_RP[:, before], root_RP[:, after]
        here_R = open_R & (low_R <= level) & (level <= high_R)
        width_R = np.where(high_R > low_R, high_R - low_R, 1.0)
        share_R1 = ((level - low_R) / width_R)[:, None]
        between_RF = value_RPF[:, before] + share_R1 * (value_RPF[:, after] - value_RPF[:, before])
        found_RF[here_R] = between_RF[here_R]
        open_R &= ~here_R
    return found_RF


# ---------------------------------------------------------------------------------------------------- what is written


@dataclass(frozen=True)
class Recorded:
    """What an evaluation left of its frontier. ``prompts``: a hash of the prompts, in their order, and of how many
    replies each got; ``against``: the baseline's name; ``at``: the nats that were asked for."""

    prompts: str
    against: str
    at: tuple[float, ...]
    curves: tuple[Curve, ...]


def write_frontier(
    folder: Path,
    prompts: str,
    against: str,
    at: Sequence[float],
    methods: Mapping[str, Mapping[str, Sequence[str]]],
    checkpoints: Mapping[str, Measured],
) -> None:
    """``methods``: by method and by run of it the names of its checkpoints, in the order of training. All that was
    measured is written, whole at every call, so that a killed evaluation goes on from there."""
    value = {"prompts": prompts, "against": against, "at": list(at), "methods": methods}
    write_json(folder / FILE, value | {"checkpoints": {name: asdict(one) for name, one in checkpoints.items()}})


def read_checkpoints(folder: Path) -> dict[str, Measured]:
    """What an evaluation has measured so far, by the checkpoint's name."""
    path = folder / FILE
    rows = read_json(path)["checkpoints"] if path.exists() else {}
    return {name: Measured.from_json(row) for name, row in rows.items()}


def read_frontier(folder: Path) -> Recorded:
    """The curves that the finished evaluation in ``folder`` (RUN/STAGE) measured, without measuring anything again.

    To lay those of several runs side by side, read each, give each curve the method and the name that it has there
    (``dataclasses.replace(curve, method=..., name=...)``), see that ``prompts`` is the same for all, and hand all
    curves to one :class:`Frontier`. UserError when there is no such file."""
    path = folder / FILE
    if not path.exists():
        raise UserError(f"{path}: not there; the evaluation needs a frontier section, and must have ended")
    value = read_json(path)
    measured = {name: Measured.from_json(row) for name, row in value["checkpoints"].items()}
    return Recorded(
        value["prompts"], value["against"], tuple(value["at"]), tuple(curves_of(value["methods"], measured))
    )


def curves_of(methods: Mapping[str, Mapping[str, Sequence[str]]], measured: Mapping[str, Measured]) -> list[Curve]:
    return [
        Curve(method, run, tuple((name, measured[name]) for name in names))
        for method, runs in methods.items()
        for run, names in runs.items()
    ]


def summary(frontier: Frontier, against: str, at: Sequence[float]) -> dict[str, Any]:
    """The ``frontier`` entry of summary.json: every curve's points, a table of methods x nats (:class:`Cell`), the gaps
    between methods (:class:`Gap`), and what they show in words."""
    cells = [frontier.at(method, nats) for method in frontier.methods for nats in at]
    gaps = [gap for nats in at for gap in frontier.gaps(nats)]
    return {
        "against": against,
        "at": list(at),
        "prompts": frontier.weight_RN.shape[1],
        "curves": [
            {"method": curve.method, "name": curve.name, "points": [_point(*point) for point in curve.points]}
            for curve in frontier.curves
        ],
        "table": [asdict(cell) for cell in cells],
        "gaps": [asdict(gap) for gap in gaps],
        "statements": statements(cells, gaps),
    }


def _point(name: str, one: Measured) -> dict[str, Any]:
    kl, length = Estimate.of(one.kl), Estimate.of(one.length)
    graded = [score for score in one.gold if score is not None]
    gold = Estimate.of(graded) if graded else None
    return {
        "name": name,
        "kl": kl.mean,
        "kl_se": kl.se,
        "gold": gold.mean if gold else None,
        "gold_se": gold.se if gold else None,
        "length": length.mean,
        "finished": one.finished,
    }


def statements(cells: Sequence[Cell], gaps: Sequence[Gap]) -> list[str]:
    """What the table shows: who does not reach which KL, and only those differences whose 95% interval, in brackets,
    leaves out 0."""
    said = []
    for nats in dict.fromkeys(cell.nats for cell in cells):
        here = [cell for cell in cells if cell.nats == nats]
        short = [cell.method for cell in here if cell.gold is None and not cell.ungraded]
        ungraded = [cell.method for cell in here if cell.gold is None and cell.ungraded]
        if short:
            said.append(f"{nats:g} nats: not reached by {', '.join(short)}.")
        if ungraded:
            said.append(f"{nats:g} nats: without a grade are {', '.join(ungraded)}.")
        if len(here) - len(short) - len(ungraded) < 2:
            continue
        above = [_turned(gap) for gap in gaps if gap.nats == nats and gap.parted]
        for cell in here:
            below = [
                f"{b} by {point:.2f} ({low:z.2f} to {high:z.2f})"
                for a, b, point, low, high in above
                if a == cell.method
            ]
            if below:
                said.append(f"{nats:g} nats: {cell.method} is above {', '.join(below)}.")
        if not above:
            said.append(f"{nats:g} nats: no two methods differ by more than their interval.")
    return said


def _turned(gap: Gap) -> tuple[str, str, float, float, float]:
    """(the better method, the other, by how much, its interval)."""
    assert gap.gold is not None, "it is parted"
    point, low, high = (float(value or 0.0) for value in gap.gold)
    return (gap.b, gap.a, -point, -high, -low) if point < 0 else (gap.a, gap.b, point, low, high)
