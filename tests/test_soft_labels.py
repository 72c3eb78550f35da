"""Soft labels: the posterior of an item's votes, what the losses and figures make of a probability, and files and the
store that keep it."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_votes import gradients, vote
from tiny import preferences, save_tiny

from keel.cli.exchange import read_votes
from keel.data.sources import read_preferences
from keel.eval.calibration import brier, temperature
from keel.eval.reward_quality import rank_correlation, reward_quality
from keel.feedback.aggregate import aggregate, likelier_first
from keel.feedback.agreement import FIRST, SECOND, TIE, Label
from keel.feedback.dawid_skene import posteriors
from keel.objective.preference import bradley_terry
from keel.recipe.declared import How
from keel.store import Store, exchange
from keel.store.foreign import Names
from keel.types import HeldoutPair, Preference, UserError

MIRRORED = {FIRST: SECOND, SECOND: FIRST, TIE: TIE}


# ------------------------------------------------------------------------------------------------------ the posterior


def test_the_posterior_by_bayes_rule() -> None:
    """Of items whose answer is known, a was right on 9 of 10 and b on 7 of 10; both classes are as frequent."""
    votes, known = [], {}
    for n in range(2000):
        known[n] = FIRST
        votes += [Label(n, "a", FIRST if n % 10 else SECOND), Label(n, "b", FIRST if n % 10 < 7 else SECOND)]
    votes += [Label("a", "a", SECOND), Label("b", "b", FIRST)]
    votes += [
        Label("agree", "a", FIRST),
        Label("agree", "b", FIRST),
        Label("differ", "a", FIRST),
        Label("differ", "b", SECOND),
    ]
    found = posteriors(votes, known, shrink=0.0)
    by_hand = {
        "a": 0.1,  # alone, for the second
        "b": 0.7,
        "agree": 0.9 * 0.7 / (0.9 * 0.7 + 0.1 * 0.3),
        "differ": 0.9 * 0.3 / (0.9 * 0.3 + 0.1 * 0.7),
    }
    assert {item: found[item][FIRST] for item in by_hand} == pytest.approx(by_hand, abs=2e-3)
    assert found[0] == {FIRST: 1.0, SECOND: 0.0}


def slow_em(votes: Sequence[Label], classes: Sequence[str], shrink: float) -> dict[object, dict[str, float]]:
    """Dawid & Skene's EM by dictionaries: posteriors of the items with two votes, each seen from both sides."""
    of_item: dict[object, list[Label]] = defaultdict(list)
    for one in votes:
        of_item[one.item].append(one)
    names = sorted({one.annotator for one in votes})
    post = {i: {c: sum(v.label == c for v in some) / len(some) for c in classes} for i, some in of_item.items()}
    for _ in range(300):
        before = {i: dict(classed) for i, classed in post.items()}
        prior = {c: sum(post[i][c] + post[i][MIRRORED[c]] for i in post) / (2 * len(post)) for c in classes}
        counts: dict[tuple[str, str, str], float] = defaultdict(float)
        for i, some in of_item.items():
            for one in some:
                for c in classes:
                    counts[one.annotator, c, one.label] += post[i][c] / 2
                    counts[one.annotator, MIRRORED[c], MIRRORED[one.label]] += post[i][c] / 2
        everyone = {(c, d): sum(counts[n, c, d] for n in names) for c in classes for d in classes}
        rate = {}
        for c in classes:
            whole = sum(everyone[c, d] for d in classes)
            share = {d: everyone[c, d] / whole if whole else 1 / len(classes) for d in classes}
            for n in names:
                own = {d: counts[n, c, d] + shrink * share[d] for d in classes}
                rate |= {(n, c, d): own[d] / sum(own.values()) for d in classes}
        for i, some in of_item.items():
            joint = {c: prior[c] * math.prod(rate[v.annotator, c, v.label] for v in some) for c in classes}
            post[i] = {c: joint[c] / sum(joint.values()) for c in classes}
        if max(abs(post[i][c] - before[i][c]) for i in post for c in classes) < 1e-7:
            break
    return post


@pytest.mark.parametrize("ties", [0.0, 0.2])
def test_the_posterior_is_that_of_a_slow_em(ties: float) -> None:
    rng = random.Random(1)
    skill = {"good": 0.95, "fine": 0.8, "fair": 0.7, "bad": 0.15}
    votes = []
    for n in range(40):
        truth = rng.random() < 0.5
        for name in rng.sample(sorted(skill), 2 + n % 2):
            says = truth == (rng.random() < skill[name])
            votes.append(Label(n, name, TIE if rng.random() < ties else FIRST if says else SECOND))
    classes = (FIRST, SECOND, TIE) if ties else (FIRST, SECOND)
    expected = slow_em(votes, classes, shrink=1.0)
    found = posteriors(votes)
    for item, classed in expected.items():
        assert found[item] == pytest.approx(classed, abs=1e-4)
    turned = posteriors([replace(one, label=MIRRORED[one.label]) for one in votes])  # which is first means nothing
    assert all(turned[n][FIRST] == pytest.approx(found[n][SECOND], abs=1e-4) for n in found)


def test_a_single_vote_says_nothing_of_who_errs() -> None:
    """What it is worth is what its annotator's word was worth where somebody else judged."""
    votes = [Label(n, name, FIRST if right else SECOND) for n, name, right in _three_judges(400)]
    alone = [Label(f"alone {n}", "fair", FIRST) for n in range(500)]
    before, after = posteriors([*votes, alone[0], Label("new", "who", FIRST)]), posteriors([*votes, *alone])
    assert after["alone 0"][FIRST] == pytest.approx(before["alone 0"][FIRST], abs=1e-9)
    assert 0.58 < after["alone 0"][FIRST] < 0.72
    assert 0.7 < before["new"][FIRST] < 0.9  # one whom nobody knows: as all of them together
    assert posteriors([Label(n, "a", FIRST) for n in range(9)]) == {}


def _three_judges(items: int) -> list[tuple[int, str, bool]]:
    rng = random.Random(0)
    skill = (("good", 0.9), ("fine", 0.8), ("fair", 0.65))
    return [(n, name, rng.random() < right) for n in range(items) for name, right in skill]


# -------------------------------------------------------------------------------------------------- records of votes


def judged() -> list[Preference]:
    """``good`` is right nine times in ten, ``fine`` eight, ``fair`` six or seven: "yes" is the better response."""
    return [
        vote(n, "yes" if right else "no", name, margin=2.0 if name == "good" else 1.0)
        for n, name, right in _three_judges(200)
    ]


def test_one_record_an_item_for_the_likelier_response() -> None:
    votes = judged()
    made = aggregate(votes, "posterior")
    assert [p.prompt.id for p in made] == [f"p{n}" for n in range(200)]
    assert all(0.5 < p.probability <= 1 and not p.tie and p.annotator == "" and p.weight == 1.0 for p in made)  # type: ignore[operator]
    said = {(v.prompt.id, v.annotator): v.chosen for v in votes}
    by_pattern: dict[tuple[str, ...], set[float]] = defaultdict(set)
    for p in made:
        pattern = tuple(said[p.prompt.id, name] for name in ("good", "fine", "fair"))
        yes = p.probability if p.chosen == "yes" else 1 - p.probability  # type: ignore[operator]
        by_pattern[pattern].add(round(yes, 6))
        agree = [v.margin for v in votes if v.prompt == p.prompt and v.chosen == p.chosen]
        assert p.margin == pytest.approx(sum(agree) / len(agree) if agree else 0.0)
    assert all(len(values) == 1 for values in by_pattern.values())  # what the votes say decides, and nothing else
    (sure,), (torn,) = by_pattern["yes", "yes", "yes"], by_pattern["yes", "no", "yes"]
    assert sure > 0.95 > torn > 0.5
    turned = aggregate([v.swapped() for v in votes], "posterior")
    for one, other in zip(made, turned, strict=True):
        assert (one.item, other.chosen) == (other.item, one.rejected)
        assert other.probability == pytest.approx(one.probability, abs=1e-6)


def test_a_tie_counts_for_both_and_a_reviewers_word_is_certain() -> None:
    votes = judged()
    votes = [replace(v, tie=True, margin=0.0) if v.prompt.id in ("p0", "p1") else v for v in votes]
    votes = [
        replace(v, settled="chosen" if v.chosen == "no" else "rejected") if v.prompt.id == "p2" else v for v in votes
    ]
    made = {p.prompt.id: p for p in aggregate(votes, "posterior")}
    assert [(made[id].tie, made[id].probability) for id in ("p0", "p1")] == [(True, 0.5)] * 2
    assert (made["p2"].chosen, made["p2"].probability, made["p2"].settled) == ("no", None, "chosen")
    with pytest.raises(UserError, match=r"posterior tells annotators apart .* there is none.*annotate\.overlap"):
        aggregate([vote(n, "yes", "ab"[n % 2]) for n in range(6)], "posterior")


def test_what_the_others_make_of_a_votes_own_probability() -> None:
    votes = [replace(v, probability=0.8) for v in judged()]
    assert aggregate(votes, "raw") == votes
    assert {p.probability for p in aggregate(votes, "majority")} == {None}
    assert {p.probability for p in aggregate(votes, "weighted")} == {0.8}
    word = [replace(v, settled="chosen" if v.chosen == "yes" else "rejected") for v in votes]
    assert {p.probability for p in aggregate(word, "raw")} == {None}


def test_who_is_mostly_wrong_is_turned_round_by_as_much_as_was_said() -> None:
    """Three agree on all, and one says the opposite of each item, as nine in ten sure."""
    votes = [vote(n, "yes", name) for n in range(12) for name in "abc"]
    votes += [vote(n, "no", "wrong", probability=0.9) for n in range(12)]
    turned = [record for record in aggregate(votes, "weighted") if record.annotator == "wrong"]
    assert {(r.chosen, r.rejected, r.probability) for r in turned} == {("yes", "no", 0.9)}


def test_one_voice_is_no_second_opinion() -> None:
    votes = [vote(1, "yes", ""), vote(1, "yes", "")]
    with pytest.raises(UserError, match="votes: posterior tells annotators apart"):
        aggregate(votes, "posterior")


def test_a_probability_below_a_half_is_a_vote_for_the_other_response(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "?", "chosen": "worse", "rejected": "better", "probability": 0.2}\n')
    with Store(tmp_path / "a.db") as store:
        store.import_preferences(read_votes(str(file), Names()))
        (pair,) = store.preferences()
    assert (pair.chosen, pair.rejected, pair.probability) == ("better", "worse", 0.8)


def test_the_likelier_response_comes_first() -> None:
    plain = vote(1, "yes", "a")
    assert likelier_first(plain) is plain
    assert likelier_first(replace(plain, probability=0.7)).chosen == "yes"
    turned = likelier_first(replace(plain, probability=0.25))
    assert (turned.chosen, turned.rejected, turned.probability, turned.tie) == ("no", "yes", 0.75, False)
    assert likelier_first(replace(plain, probability=0.5)).tie


# ----------------------------------------------------------------------------------------------------------- the loss


def test_the_soft_loss_by_hand() -> None:
    chosen, rejected, p = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0]), torch.tensor([0.8, 0.6])
    # -0.8 ln sigmoid(1) - 0.2 ln sigmoid(-1) = 0.8 * 0.3132617 + 0.2 * 1.3132617
    # -0.6 ln sigmoid(-3) - 0.4 ln sigmoid(3) = 0.6 * 3.0485874 + 0.4 * 0.0485874
    found = bradley_terry(chosen, rejected, probability_N=p)
    assert found.tolist() == pytest.approx([0.5132617, 1.8485874], abs=1e-6)
    smoothed = bradley_terry(chosen, rejected, label_smoothing=0.1, probability_N=p)  # 0.9 P + 0.1 (1 - P)
    assert smoothed.tolist() == pytest.approx(
        [0.74 * 0.3132617 + 0.26 * 1.3132617, 0.58 * 3.0485874 + 0.42 * 0.0485874]
    )


def test_a_soft_label_is_the_mixture_of_hard_ones() -> None:
    torch.manual_seed(0)
    chosen, rejected, p = torch.randn(50), torch.randn(50), torch.rand(50)
    hard, against = bradley_terry(chosen, rejected), bradley_terry(rejected, chosen)
    found = bradley_terry(chosen, rejected, probability_N=p)
    torch.testing.assert_close(found, p * hard + (1 - p) * against)
    torch.testing.assert_close(bradley_terry(rejected, chosen, probability_N=1 - p), found)  # swapped with its sides
    assert torch.equal(bradley_terry(chosen, rejected, probability_N=torch.ones(50)), hard)
    ties = bradley_terry(chosen, rejected, tie_N=torch.ones(50, dtype=torch.bool))
    torch.testing.assert_close(bradley_terry(chosen, rejected, probability_N=torch.full((50,), 0.5)), ties)


@pytest.mark.parametrize("p", [0.5, 0.6, 0.9, 0.999])
def test_nothing_pulls_where_the_model_says_what_the_label_says(p: float) -> None:
    lead = torch.tensor([math.log(p / (1 - p)) + shift for shift in (-0.5, 0.0, 0.5)], requires_grad=True)
    bradley_terry(lead, torch.zeros(3), probability_N=torch.full((3,), p)).sum().backward()
    below, at, above = lead.grad.tolist()  # type: ignore[union-attr]
    assert below < 0 < above
    assert at == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


def test_a_reward_model_learns_from_both_labels_in_proportion(model: Path) -> None:
    a, b, c = preferences(3)
    soft = [replace(a, probability=0.7), replace(b, probability=1.0), c]
    mixed = [replace(a, weight=0.7), replace(a.swapped(), weight=0.3), b, c]
    for found, expected in zip(gradients(model, soft, 10_000), gradients(model, mixed, 10_000), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    hard = [replace(p, probability=None) for p in soft]
    as_hard = gradients(model, soft, 10_000, labels="hard")
    for found, expected in zip(as_hard, gradients(model, hard, 10_000), strict=True):
        assert torch.equal(found, expected)


def test_a_margin_counts_as_far_as_the_label_is_more_than_a_tie(model: Path) -> None:
    """A strength of 2 at a weight of 0.5 is a margin of 1; at P = 0.7 it is 0.4 of that, for either side."""
    from test_train import context

    from keel.model.checkpoint import load_scalar
    from keel.recipe.reward import RewardStage
    from keel.train.pairs import encode_pairs
    from keel.train.reward import RewardTraining

    scorer = load_scalar(model, new_head_seed=0)
    c = context(model.parent / "run", "r", model)
    pairs = encode_pairs([replace(p, margin=2.0, probability=0.7) for p in preferences(3)], scorer.chat, c)
    stage = RewardStage(name="r", margin_weight=0.5, center_coef=0.0)
    training = RewardTraining(scorer, [pairs], [], stage, c)
    loss_N, _ = training._loss(pairs)
    chosen, rejected = training._raw(pairs)
    lead = chosen - rejected
    expected = -0.7 * F.logsigmoid(lead - 0.4) - 0.3 * F.logsigmoid(-lead - 0.4)
    torch.testing.assert_close(loss_N, expected)


# -------------------------------------------------------------------------------------------------------- the figures


def test_brier_and_temperature_by_hand() -> None:
    assert brier([0.8, 0.3], [1.0, 0.0]) == pytest.approx((0.2**2 + 0.3**2) / 2)
    assert brier([0.8], [0.6]) == pytest.approx(0.6 * 0.2**2 + 0.4 * 0.8**2)
    # at p = y it is y (1 - y), and anything else is worse
    assert brier([0.6], [0.6]) == pytest.approx(0.24)
    assert min(brier([0.5], [0.6]), brier([0.7], [0.6])) > 0.24
    # of two leads that votes follow with these probabilities, the t that fits both exactly
    probabilities = [1 / (1 + math.exp(-lead / 2.5)) for lead in (1.0, 3.0)]
    assert temperature([1.0, 3.0], probabilities) == pytest.approx(2.5, abs=1e-6)
    assert temperature([1.0, -2.0, 3.0]) == temperature([1.0, -2.0, 3.0], [1.0, 1.0, 1.0])


def test_a_reward_models_brier_score_on_votes_and_on_truth() -> None:
    """Of raw leads, before any temperature: sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4."""
    rows = [HeldoutPair(vote(n, "yes", "a"), lead * math.log(3), 3, 3) for n, lead in enumerate((1.0, -1.0))]
    rows.append(HeldoutPair(vote(2, "yes", "a", tie=True), 5.0, 3, 3))
    figures = reward_quality(rows, {rows[0].record.id: 0.6}, None, 0)
    assert figures["brier_raw"] == pytest.approx((0.25**2 + 0.75**2) / 2)
    assert figures["brier_raw_on_truth"] == pytest.approx(0.6 * 0.25**2 + 0.4 * 0.75**2)
    soft = [replace_record(row, probability=0.75) for row in rows[:1]]
    assert reward_quality(soft, {}, None, 0)["brier_raw"] == pytest.approx(0.75 * 0.25**2 + 0.25 * 0.75**2)
    assert reward_quality(soft, {}, None, 0)["brier_on_truth"] is None


def replace_record(row: HeldoutPair, **changes: float) -> HeldoutPair:
    return row._replace(record=replace(row.record, **changes))  # type: ignore[arg-type]


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation([1.0, 2.0, 9.0], [10.0, 20.0, 30.0]) == pytest.approx(1.0)
    # ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * 4 / (4 * 15)
    assert rank_correlation([1, 2, 3, 4], [20, 10, 40, 30]) == pytest.approx(0.6)
    # equal values share the mean of their ranks: 1.5 1.5 3 against 1 2 3
    assert rank_correlation([0, 0, 5], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert rank_correlation([1, 1], [1, 2]) is None
    assert rank_correlation([], []) is None


# ----------------------------------------------------------------------------------------------- what it is good for


def linear_fit(x_ND: np.ndarray, records: Sequence[Preference], hard: bool) -> np.ndarray:
    """A Bradley-Terry model that is linear in features, fitted to soft labels and weights by Newton's method. Response
    "yes" of prompt n has features x[n], "no" has none."""
    features = np.array([(1 if p.chosen == "yes" else -1) * x_ND[int(p.prompt.id[1:])] for p in records])
    said = np.array([1.0 if p.probability is None or hard else p.probability for p in records])
    w, b = np.array([p.weight for p in records]), np.zeros(x_ND.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-features @ b))
        slope = features.T @ (w * (said - p)) - b
        b += np.linalg.solve((features * (w * p * (1 - p))[:, None]).T @ features + np.eye(len(b)), slope)
    return b


@pytest.mark.wide
def test_what_soft_labels_gain_and_what_they_do_not() -> None:
    """Every pair is judged by three of twenty annotators with tastes of their own, who vote as Bradley-Terry says; then
    with three lazy and two adversarial ones among them. Brier scores are of votes of the honest ones on fresh pairs."""
    arms: dict[str, tuple[How, bool]] = {
        "raw": ("raw", False), "majority": ("majority", False), "weighted": ("weighted", False),
        "hard": ("posterior", True), "soft": ("posterior", False),
    }  # fmt: skip
    found: dict[tuple[bool, str], list[float]] = defaultdict(list)
    for bad in (False, True):
        for seed in range(5):
            rng = np.random.default_rng(seed)
            tastes = rng.normal(size=16) * 0.6 + rng.normal(size=(20, 16)) * 0.2
            x_ND, fresh = rng.normal(size=(500, 16)), rng.normal(size=(4000, 16))
            votes = []
            for n, x_D in enumerate(x_ND):
                for k in rng.choice(25 if bad else 20, 3, replace=False):
                    lead = 0.0 if 20 <= k < 23 else x_D @ (tastes[k] if k < 20 else -tastes[k - 20])
                    yes = rng.random() < 1 / (1 + np.exp(-lead))
                    votes.append(vote(n, "yes" if yes else "no", f"a{k}"))
            q = (1 / (1 + np.exp(-fresh @ tastes.T))).mean(axis=1)
            for arm, (how, hard) in arms.items():
                p = 1 / (1 + np.exp(-fresh @ linear_fit(x_ND, aggregate(votes, how), hard)))
                found[bad, arm].append(brier(p.tolist(), q.tolist()) - float((q * (1 - q)).mean()))
    for key, values in found.items():
        print(key, [round(1e4 * value) for value in values], f"mean {1e4 * np.mean(values):.0f}")
    mean = {key: float(np.mean(values)) for key, values in found.items()}
    assert mean[True, "soft"] < min(mean[True, "raw"], mean[True, "majority"])
    assert mean[False, "raw"] < mean[False, "soft"] < mean[False, "majority"]
    for bad in (False, True):
        assert mean[bad, "weighted"] < mean[bad, "soft"] < mean[bad, "hard"]


# ----------------------------------------------------------------------------------------------------- files and store

PAIR = {"prompt": "a", "chosen": "x", "rejected": "y"}


@pytest.mark.parametrize(
    "name",
    [
        *("probability", "prob", "preference_probability", "preference_prob", "chosen_probability", "p_chosen"),
        "soft_label",
    ],
)
@pytest.mark.parametrize(
    ("value", "read"), [(0.25, 0.25), ("0.75", 0.75), (1, 1.0), (0, 0.0), (None, None), ("", None)]
)
def test_a_probability_is_read(name: str, value: object, read: float | None, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({**PAIR, name: value}) + "\n" + json.dumps({**PAIR, "chosen": "z"}) + "\n")
    first, second = read_preferences(file)
    assert (first.probability, second.probability) == (read, None)
    assert (first.chosen, first.rejected) == ("x", "y")  # as it stands, whichever is likelier


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"probability": 1.2}, "field 'probability': expected a number from 0 to 1, got the number 1.2"),
        ({"prob": -0.1}, "field 'prob': expected a number from 0 to 1"),
        ({"probability": "nan"}, "field 'probability': expected a number from 0 to 1, got the text"),
        ({"probability": math.nan}, "pairs.jsonl, line 1: field 'probability': expected a label, got NaN; write null"),
        ({"p_chosen": math.nan}, "field 'p_chosen': expected a label, got NaN"),
        ({"tie": math.nan}, "field 'tie': expected a label, got NaN"),
        ({"probability": True}, "field 'probability': expected a number"),
        ({"soft_label": [0.2, 0.8]}, "field 'soft_label': expected a number"),
        ({"probability": 0.2, "prob": 0.3}, "probability and prob differ; keep one"),
        ({"probability": 0.7, "tie": True}, "field 'probability': expected 0.5 in a tie"),
    ],
)
def test_a_probability_that_is_none(row: Mapping[str, object], says: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({**PAIR, **row}) + "\n")
    with pytest.raises(UserError, match=says):
        read_preferences(file)


def test_a_rows_id_counts_its_probability_and_is_else_what_it_was(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({**PAIR, **more}) + "\n" for more in ({}, {"probability": 0.5}, {"prob": 0.6})))
    plain, half, other = read_preferences(file)
    assert plain.id == PLAIN_ID
    assert len({plain.id, half.id, other.id}) == 3
    file.write_text(json.dumps({**PAIR, "rejected": "x", "probability": 0.9}) + "\n")
    (same,) = read_preferences(file)
    assert (same.tie, same.probability) == (True, 0.5)


PLAIN_ID = "e25a004fe3ddcbfa26472b829d601b89"  # as earlier releases made it


SOFT = [0.1, 0.3, 1 / 3, 0.5, 0.7, 1.0, 0.0, None]


def test_a_probability_comes_out_of_the_store_as_it_went_in(tmp_path: Path) -> None:
    """Whichever side a response was drawn to: 1 - (1 - p) is not p for every number."""
    given = [replace(vote(n, "yes", "m"), probability=p, tie=p == 0.5) for n, p in enumerate(SOFT)]
    files = (("trl.jsonl", "trl"), ("trl.parquet", "trl"), ("openai.jsonl", "openai"))
    with Store(tmp_path / "a.db") as store:
        store.import_preferences(given)
        assert [p.probability for p in store.preferences()] == SOFT
        for name, form in files:
            store.export_preferences(tmp_path / name, form=form)  # type: ignore[arg-type]
    with Store(tmp_path / "b.db") as other:
        for number, (name, _) in enumerate(files):
            votes = exchange.read(tmp_path / name)
            assert [v.probability for v in votes] == SOFT  # type: ignore[union-attr]
            assert other.import_preferences(votes) == (0 if number else len(SOFT))
            read = {p.id: p for p in read_preferences(tmp_path / name)}
            assert [read[p.id].probability for p in given] == SOFT
            assert [read[p.id].chosen for p in given] == [p.chosen for p in given]
        assert [p.probability for p in other.preferences()] == SOFT
