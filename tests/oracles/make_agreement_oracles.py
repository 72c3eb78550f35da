"""Writes agreement.json: what other packages say of small random tables of votes.

    python -m venv oracles && oracles/bin/pip install krippendorff==0.9.0 crowd-kit==1.4.2 scipy==1.12.0
    oracles/bin/python tests/oracles/make_agreement_oracles.py

krippendorff: alpha on three scales with missing values. crowd-kit: Dawid-Skene's class probabilities and error rates.
scipy: the maximum of Crowd-BT's penalised likelihood, found by L-BFGS from the formula of the paper, written out anew
here. None of them is needed to run the tests.
"""

from __future__ import annotations

import json
from pathlib import Path

import krippendorff
import numpy as np
import pandas as pd
from crowdkit.aggregation import DawidSkene
from scipy.optimize import minimize

HERE = Path(__file__).parent


def table(rng: np.random.Generator, units: int, coders: int, values: int, missing: float) -> np.ndarray:
    """[coders, units] with NaN for missing: a true value, kept by most, shifted by some."""
    truth = rng.integers(1, values + 1, units)
    noise = rng.choice([-1, 0, 0, 0, 1], (coders, units))
    said = np.clip(truth + noise, 1, values).astype(float)
    said[rng.random(said.shape) < missing] = np.nan
    return said


def plain(said: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(x) else x for x in row] for row in said.tolist()]


def alpha_cases(rng: np.random.Generator) -> list[dict]:
    cases = []
    for units, coders, values, missing in ((12, 3, 4, 0.2), (30, 5, 7, 0.5), (50, 2, 2, 0.1), (20, 8, 3, 0.7)):
        said = table(rng, units, coders, values, missing)
        levels = ("nominal", "ordinal", "interval")
        alphas = {s: float(krippendorff.alpha(reliability_data=said, level_of_measurement=s)) for s in levels}
        cases.append({"said": plain(said), "alpha": alphas})
    return cases


def dawid_skene_case(rng: np.random.Generator) -> dict:
    votes = []
    truth = rng.integers(0, 3, 60)
    errors = [np.eye(3) * a + (1 - a) / 3 for a in (0.85, 0.7, 0.6, 0.3, 0.75)]
    for item, true in enumerate(truth):
        for annotator in rng.choice(5, 4, replace=False):
            votes.append((item, f"w{annotator}", "abc"[rng.choice(3, p=errors[annotator][true])]))
    fit = DawidSkene(n_iter=5000, tol=1e-12).fit(pd.DataFrame(votes, columns=["task", "worker", "label"]))
    labels = ["a", "b", "c"]
    return {
        "votes": votes,
        "posterior": fit.probas_[labels].sort_index().to_numpy().tolist(),
        "prior": fit.priors_[labels].tolist(),
        # rows of crowd-kit: what was said; columns: the true class
        "errors": {
            w: fit.errors_.loc[w].loc[labels, labels].to_numpy().T.tolist() for w in sorted({v[1] for v in votes})
        },
    }


def crowd_bt_case(rng: np.random.Generator, penalty: float) -> dict:
    n, k = 8, 5
    scores, eta = rng.normal(size=n) * 1.5, np.array([0.95, 0.9, 0.8, 0.5, 0.15])
    votes = []
    for _ in range(250):
        a, b = rng.choice(n, 2, replace=False)
        annotator = rng.integers(k)
        truly = rng.random() < 1 / (1 + np.exp(scores[b] - scores[a]))
        says = truly if rng.random() < eta[annotator] else not truly
        votes.append((int(annotator), int(a if says else b), int(b if says else a)))
    who, won, lost = np.array(votes).T

    def loss(x: np.ndarray) -> float:
        s, e = x[:n], x[n:]
        right = 1 / (1 + np.exp(s[lost] - s[won]))
        fit = np.log(e[who] * right + (1 - e[who]) * (1 - right)).sum()
        held = penalty * (np.log(1 / (1 + np.exp(-s))) + np.log(1 / (1 + np.exp(s)))).sum()
        return -(fit + held)

    start = np.r_[np.zeros(n), np.full(k, 0.9)]
    bounds = [(None, None)] * n + [(1e-9, 1 - 1e-9)] * k
    best = minimize(
        loss, start, method="L-BFGS-B", bounds=bounds, options={"maxiter": 10000, "ftol": 1e-15, "gtol": 1e-9}
    )
    return {
        "penalty": penalty,
        "votes": votes,
        "scores": best.x[:n].tolist(),
        "eta": best.x[n:].tolist(),
        "objective": -float(best.fun),
    }


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    alphas = alpha_cases(rng)
    for units, coders, values, missing in ((15, 4, 3, 0.0), (25, 5, 3, 0.4), (40, 6, 2, 0.6)):
        table(rng, units, coders, values, missing)  # no longer kept; drawn so that what follows stays as it was
    oracle = {
        "krippendorff": alphas,
        "dawid_skene": dawid_skene_case(rng),
        "crowd_bt": [crowd_bt_case(rng, penalty) for penalty in (0.1, 1.0)],
    }
    (HERE / "agreement.json").write_text(json.dumps(oracle) + "\n")
