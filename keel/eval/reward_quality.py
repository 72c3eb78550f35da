"""How good a reward model is on pairs that it has not seen: accuracy against the noise ceiling, and calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from keel.data.collate import messages_hash
from keel.eval.calibration import both_ways, brier, ece, reliability, temperature
from keel.eval.winrate import TIE_WIDTH, win_rate
from keel.stats import bootstrap_interval, ceiling_bounds, clustered_error, noise_ceiling, proportion, sigmoid
from keel.types import Completion, HeldoutPair, Judge, Preference, Scorer


def reward_quality(
    heldout: Sequence[HeldoutPair],
    truth: Mapping[str, float],
    agreement: float | None,
    seed: int,
) -> dict[str, Any]:
    """Figures over held-out pairs; ties are left out. Of a vote with a soft label the likelier side is the right one;
    in calibration, temperature and Brier score it is a vote that falls so with that probability.

    ``truth``: by pair id, the probability that the population prefers the record's chosen response, where it is known
    (simulated annotators): then the ceiling E[max(q, 1-q)] is exact and ``accuracy_on_truth`` says how often the model
    sides with the population's majority. Else ``ceiling`` is the upper bound that the agreement allows, if any.

    ``ece`` is that of sigmoid(lead / t), each pair's t fitted on the other half of the prompts (a margin in the loss
    makes a model too sure of itself, and no ranking depends on t); ``ece_raw`` that of sigmoid(lead);
    ``temperature`` the t of all pairs. ``brier`` is the Brier score of the same probabilities on these votes,
    ``brier_on_truth`` on votes that fall as the population's would, where that is known; ``_raw`` of sigmoid(lead).
    ``annotators``: see ``accuracy_by_annotator``.
    """
    decided = [row for row in heldout if not row[0].tie]
    if not decided:
        return {"accuracy": None, "ceiling": None, "ece": None, "annotator_agreement": agreement, "annotators": []}
    right = [_hit(lead) for _, lead, _, _ in decided]
    prompts = [messages_hash(record.prompt.messages) for record, _, _, _ in decided]
    n = len(right)
    accuracy = sum(right) / n
    leads = [lead for _, lead, _, _ in decided]
    said = [_outcome(record) for record, _, _, _ in decided]
    fitted, raw = _calibrated(decided), [sigmoid(lead) for lead in leads]
    probs, outcomes = both_ways(fitted, said)
    raw_probs, _ = both_ways(raw, said)
    known = [(truth[record.id], lead) for record, lead, _, _ in decided if record.id in truth]
    ceiling = noise_ceiling([q for q, _ in known])
    if ceiling is None and agreement is not None:
        ceiling = ceiling_bounds(agreement)[1]
    longer = [_hit(lead if a > b else -lead) for _, lead, a, b in decided if a != b]
    return {
        "accuracy": accuracy,
        "accuracy_se": clustered_error(right, prompts),
        "ceiling": ceiling,
        "ceiling_from": "truth" if known else "agreement" if agreement is not None else None,
        "accuracy_on_truth": sum(_hit((q - 0.5) * lead) for q, lead in known) / len(known) if known else None,
        **_share_of_ceiling([row for row in decided if row[0].id in truth], truth, seed),
        "expected_accuracy": sum(0.5 + (q - 0.5) * (2 * _hit(lead) - 1) for q, lead in known) / len(known)
        if known
        else None,
        "ece": ece(probs, outcomes),
        "ece_raw": ece(raw_probs, outcomes),
        "brier": brier(fitted, said),
        "brier_raw": brier(raw, said),
        **_brier_on_truth(decided, truth, fitted, raw),
        "temperature": temperature(leads, said),
        "reliability": [asdict(b) for b in reliability(probs, outcomes)],
        "decided_pairs": n,
        "annotator_agreement": agreement,
        "prefers_longer": sum(longer) / len(longer) if longer else None,
        "annotators": accuracy_by_annotator(
            [
                (record.annotator, lead > 0, prompt)
                for (record, lead, _, _), prompt in zip(decided, prompts, strict=True)
            ]
        ),
    }


def _outcome(record: Preference) -> float:
    """How probable it is that the chosen reply is preferred, as the vote says."""
    return 1.0 if record.probability is None else record.probability


def _brier_on_truth(
    decided: Sequence[HeldoutPair], truth: Mapping[str, float], fitted: Sequence[float], raw: Sequence[float]
) -> dict[str, float | None]:
    places = [i for i, (record, _, _, _) in enumerate(decided) if record.id in truth]
    if not places:
        return {"brier_on_truth": None, "brier_raw_on_truth": None}
    q = [truth[decided[i][0].id] for i in places]
    return {
        "brier_on_truth": brier([fitted[i] for i in places], q),
        "brier_raw_on_truth": brier([raw[i] for i in places], q),
    }


def _share_of_ceiling(known: Sequence[HeldoutPair], truth: Mapping[str, float], seed: int) -> dict[str, Any]:
    """How often the model sides with votes, over how often the majority does: [point, low, high], the interval a
    bootstrap over prompts."""
    if not known:
        return {"ceiling_on_votes": None, "share_of_ceiling": None}
    by_prompt: dict[str, list[float]] = {}
    for record, lead, _, _ in known:
        sums = by_prompt.setdefault(messages_hash(record.prompt.messages), [0.0, 0.0])
        sums[0] += _hit(lead)
        sums[1] += _hit(truth[record.id] - 0.5)
    rows = np.array(list(by_prompt.values()))
    model, majority = rows.sum(0).tolist()
    interval = bootstrap_interval(rows, lambda sums: sums[:, 0] / sums[:, 1], seed=seed)
    share = [model / majority, *(interval or (None, None))] if majority else None
    return {"ceiling_on_votes": majority / len(known), "share_of_ceiling": share}


def _hit(lead: float) -> float:
    return 1.0 if lead > 0 else 0.5 if lead == 0 else 0.0


def accuracy_by_annotator(votes: Sequence[tuple[str, bool, str]]) -> list[dict[str, Any]]:
    """With which share of each annotator's held-out decided votes the model agrees, those with the most votes first.
    ``votes``: (annotator, whether the model scores the chosen reply higher, the prompt); an empty name is nobody's.
    ``low`` and ``high``: Wilson's 95% interval, over prompts."""
    by_name: dict[str, list[tuple[bool, str]]] = {}
    for name, agrees, prompt in votes:
        if name:
            by_name.setdefault(name, []).append((agrees, prompt))
    rows = []
    for name, own in sorted(by_name.items(), key=lambda one: (-len(one[1]), one[0])):
        share = proportion([agrees for agrees, _ in own], [prompt for _, prompt in own])
        rows.append(
            {"annotator": name, "accuracy": share.point, "low": share.low, "high": share.high, "votes": share.count}
        )
    return rows


def gold_accuracy(
    pairs: Sequence[Preference], judge: Judge, scorers: Mapping[str, Scorer], n_boot: int = 2000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Which of several reward models is best: by name, how often each scores the reply higher that the gold judge
    scores higher. What annotators said of the pairs does not enter; a pair that was judged often counts once.

    ``accuracy``: [point, low, high], the interval a bootstrap over prompts, None where nothing is decided; ``pairs``:
    how many the judge and the model tell apart. Pairs that the judge scores alike are left out. ``rank_correlation``:
    Spearman's, of the scores that judge and model give to the different replies, None where one of them gives all the
    same.
    """
    different = {pair.item: pair for pair in pairs}
    prompts = [pair.prompt for pair in different.values() for _ in range(2)]
    replies = [
        Completion(text, finished=finished)
        for p in different.values()
        for text, finished in ((p.chosen, p.chosen_finished), (p.rejected, p.rejected_finished))
    ]
    gold = [math.nan if grade is None else grade.score for grade in judge.grade(prompts, replies)] if prompts else []
    told = [i for i in range(0, len(gold), 2) if abs(gold[i] - gold[i + 1]) > TIE_WIDTH]  # a missing one tells nothing
    better = [i if gold[i] > gold[i + 1] else i + 1 for i in told]
    worse = [2 * i + 1 - b for i, b in zip(told, better, strict=True)]
    groups = [prompts[i].id for i in told]
    table: dict[str, dict[str, Any]] = {}
    for name, scorer in scorers.items():
        scores = scorer.score(prompts, replies).total_N.tolist() if prompts else []
        right = win_rate([scores[i] for i in better], [scores[i] for i in worse], groups, n_boot, seed)
        table[name] = {"accuracy": right.as_list(), "pairs": right.wins + right.losses}
        each = {(p.id, r.text, r.finished): (s, g) for p, r, s, g in zip(prompts, replies, scores, gold, strict=True)}
        known = [(s, g) for s, g in each.values() if not math.isnan(g)]
        table[name]["rank_correlation"] = rank_correlation([s for s, _ in known], [g for _, g in known])
    return table


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's: Pearson's of the ranks, equals sharing the mean of theirs. None where one side does not vary."""
    ranks_2N = np.array([_ranks(a), _ranks(b)])
    if ranks_2N.shape[1] < 2 or not ranks_2N.std(axis=1).all():
        return None
    return float(np.corrcoef(ranks_2N)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, place_N, count_U = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count_U) - (count_U - 1) / 2)[place_N])


def _calibrated(decided: Sequence[HeldoutPair]) -> list[float]:
    """P(chosen is preferred) of each pair, by the temperature of the other half of the prompts."""
    halves = [int(messages_hash(record.prompt.messages), 16) % 2 for record, _, _, _ in decided]
    fitted = []
    for half in (0, 1):
        others = [row for row, of in zip(decided, halves, strict=True) if of != half]
        said = [_outcome(record) for record, _, _, _ in others]
        fitted.append(temperature([lead for _, lead, _, _ in others], said) if others else 1.0)
    return [sigmoid(lead / fitted[half]) for (_, lead, _, _), half in zip(decided, halves, strict=True)]
