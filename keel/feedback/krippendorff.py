"""Krippendorff's alpha: one coefficient for any number of coders, any scale, and any values missing.

K. Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), whose steps and symbols these are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from keel.feedback.agreement import Agreement
from keel.stats import bootstrap_interval
from keel.store.sides import InStore

Scale = Literal["nominal", "ordinal", "interval"]
VALUES: Mapping[InStore, float] = {"first": 1.0, "second": -1.0, "tie": 0.0}  # of a comparison, as a number


def krippendorff_alpha(
    units: Mapping[int, Sequence[float]],
    scale: Scale,
    bootstrap: int = 2000,
    seed: int = 0,
    mirror: bool = False,
    clusters: Mapping[int, int] | None = None,
) -> Agreement | None:
    """1 - D_o / D_e: 1 for perfect agreement, 0 for chance.

    ``units``: each unit's values, one a coder who coded it; a value that is missing is just not there, and a unit with
    a single value says nothing. ``scale``: what a difference of values weighs: nominal (equal or not), ordinal (how
    many values lie between them), interval (their squared difference). None when no unit has two values, or when all
    values are equal (nothing could disagree). The interval is a bootstrap over units.

    ``mirror``: a value and its negative are one answer seen from either side, as with comparisons, where which response
    was stored first means nothing. Each unit then counts half as it is and half with all its values negated, so that
    what is expected by chance does not hang on that order.

    ``clusters``: which units belong together, as the steps of one reply do; the bootstrap is then over these.
    """
    twice = [unit for unit in sorted(units) if len(units[unit]) > 1]
    paired = [list(units[unit]) for unit in twice]
    given = {value for unit in paired for value in unit}
    values = sorted(given | {-value for value in given} if mirror else given)
    if len(values) < 2:
        return None
    place = {value: i for i, value in enumerate(values)}
    rows_NVV = np.stack([_coincidences([place[value] for value in unit], len(values)) for unit in paired])
    if mirror:
        rows_NVV = (rows_NVV + rows_NVV[:, ::-1, ::-1]) / 2
    rows_NF = rows_NVV.reshape(len(paired), -1)
    if clusters is not None:
        _, cluster_N = np.unique([clusters[unit] for unit in twice], return_inverse=True)
        together_KF = np.zeros((cluster_N.max() + 1, rows_NF.shape[1]))
        np.add.at(together_KF, cluster_N, rows_NF)
        rows_NF = together_KF
    values_V = np.array(values, dtype=np.float64)

    def alpha(sums: np.ndarray) -> np.ndarray:
        return _alpha(sums.reshape(-1, len(values), len(values)), values_V, scale)

    point = float(alpha(rows_NF.sum(axis=0)[None])[0])
    return Agreement(point, bootstrap_interval(rows_NF, alpha, bootstrap, seed), len(paired))


def alpha_of_counts(
    counts_UV: np.ndarray, values_V: np.ndarray, scale: Scale, bootstrap: int = 2000, seed: int = 0
) -> Agreement | None:
    """`krippendorff_alpha` with ``mirror``, of units of which it is known how often each of V values was given; the
    values are in order, each with its negative."""
    counts_DV, times_D = np.unique(counts_UV, axis=0, return_counts=True)
    twice_D = counts_DV.sum(axis=1) > 1
    counts_DV, times_D = counts_DV[twice_D].astype(np.float64), times_D[twice_D]
    given_V = counts_DV.any(axis=0)
    given_V |= given_V[::-1]
    counts_DV, values_V = counts_DV[:, given_V], values_V[given_V]
    size = len(values_V)
    if size < 2:
        return None
    rows_DVV = counts_DV[:, :, None] * counts_DV[:, None, :] - np.einsum("dv,vw->dvw", counts_DV, np.eye(size))
    rows_DVV /= (counts_DV.sum(axis=1) - 1)[:, None, None]
    rows_DF = ((rows_DVV + rows_DVV[:, ::-1, ::-1]) / 2).reshape(len(counts_DV), -1)

    def alpha(sums: np.ndarray) -> np.ndarray:
        return _alpha(sums.reshape(-1, size, size), values_V, scale)

    point = float(alpha((times_D @ rows_DF)[None])[0])
    interval = bootstrap_interval(rows_DF, alpha, bootstrap, seed, times_N=times_D)
    return Agreement(point, interval, int(times_D.sum()))


def _coincidences(unit: Sequence[int], size: int) -> np.ndarray:
    """What one unit adds to the coincidence matrix: each ordered pair of its values, divided by (values - 1)."""
    counts = Counter(unit)
    matrix = np.zeros((size, size))
    for a, n_a in counts.items():
        for b, n_b in counts.items():
            matrix[a, b] = n_a * (n_b - (a == b)) / (len(unit) - 1)
    return matrix


def _alpha(o_RVV: np.ndarray, values_V: np.ndarray, scale: Scale) -> np.ndarray:
    """Coincidence matrices [R, V, V] -> alphas [R]; NaN where only one value is left."""
    n_RV = o_RVV.sum(axis=2)
    n_R = n_RV.sum(axis=1)
    if scale == "nominal":
        delta_RVV = np.broadcast_to(1.0 - np.eye(len(values_V)), o_RVV.shape)
    else:
        # The ordinal metric, (sum of n_g from c to k, less half of n_c and n_k)^2, is a squared difference of midranks.
        at_RV = n_RV.cumsum(axis=1) - n_RV / 2 if scale == "ordinal" else np.broadcast_to(values_V, n_RV.shape)
        delta_RVV = (at_RV[:, :, None] - at_RV[:, None, :]) ** 2
    observed = (o_RVV * delta_RVV).sum(axis=(1, 2))
    expected = (n_RV[:, :, None] * n_RV[:, None, :] * delta_RVV).sum(axis=(1, 2))
    return 1 - (n_R - 1) * observed / np.where(expected > 0, expected, np.nan)
