"""Agreement and reliability against published worked examples, other packages' numbers and simulated truths."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from harbor_pairs import reference_pairs

from keel.feedback.agreement import (
    FIRST,
    MIRROR,
    SECOND,
    TIE,
    Label,
    named_votes,
)
from keel.feedback.crowd_bt import Comparison, crowd_bt
from keel.feedback.dawid_skene import dawid_skene, reliabilities
from keel.feedback.krippendorff import Scale, krippendorff_alpha
from keel.feedback.simulated import SimulatedAnnotator, label, true_probability
from keel.harbor.annotators import population
from keel.harbor.facts import World
from keel.run import Silent
from keel.stats import bootstrap_interval
from keel.store import Judgement, Store
from keel.store.records import NewVote
from keel.study.annotators import annotator_figures, doubtful
from keel.types import Completion, Message, Prompt

ORACLE = json.loads((Path(__file__).parent / "oracles" / "agreement.json").read_text())


def units(said: Sequence[Sequence[float | None]]) -> dict[int, list[float]]:
    """Coders' rows -> each unit's values that are there."""
    return {u: [x for x in column if x is not None] for u, column in enumerate(zip(*said, strict=True))}


def from_counts(table: str) -> dict[int, list[str]]:
    """Rows of how many raters chose each category."""
    return {
        item: [str(category) for category, count in enumerate(map(int, row.split())) for _ in range(count)]
        for item, row in enumerate(table.split("|"))
    }


# ------------------------------------------------------------------------------------------------ Krippendorff's alpha

# Krippendorff 2011, section C: 4 observers, 12 units, missing values.
FOUR_OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


@pytest.mark.parametrize(("scale", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_krippendorffs_own_example(scale: Scale, published: float) -> None:
    found = krippendorff_alpha(units(FOUR_OBSERVERS), scale)
    assert found is not None
    assert found.point == pytest.approx(published, abs=0.0005)
    assert found.items == 11  # the last unit has one value, and says nothing
    assert found.interval is not None
    assert found.interval[0] < published <= found.interval[1]


@pytest.mark.parametrize("case", range(4))
def test_alpha_is_the_krippendorff_packages(case: int) -> None:
    oracle = ORACLE["krippendorff"][case]
    for scale, expected in oracle["alpha"].items():
        found = krippendorff_alpha(units(oracle["said"]), scale, bootstrap=10)
        assert found is not None
        assert found.point == pytest.approx(expected, abs=1e-9)


def test_alpha_of_mirrored_values_by_hand() -> None:
    """(1, 1), (1, 1), (1, -1): coincidences 4 of 1-1, 1 each of 1 with -1; mirrored 2 and 2, and 1 each. n = 6, n_1 =
    n_-1 = 3: alpha = 1 - 5 * 2 / (2 * 3 * 3) = 4 / 9."""
    units = {1: [1.0, 1.0], 2: [1.0, 1.0], 3: [1.0, -1.0]}
    for scale in ("nominal", "ordinal", "interval"):
        found = krippendorff_alpha(units, scale, mirror=True)  # type: ignore[arg-type]
        assert found is not None
        assert found.point == pytest.approx(4 / 9)
        turned = {unit: [-value for value in values] if unit > 1 else values for unit, values in units.items()}
        again = krippendorff_alpha(turned, scale, mirror=True)  # type: ignore[arg-type]
        assert again == found  # also its interval: a unit weighs the same either way round
    assert krippendorff_alpha({1: [0.0, 0.0], 2: [0.0, 0.0]}, "nominal", mirror=True) is None
    agreed = krippendorff_alpha({1: [1.0, 1.0], 2: [1.0, 1.0]}, "nominal", mirror=True)
    assert agreed is not None
    assert agreed.point == 1.0


def test_alpha_that_is_not_defined_is_none_and_perfect_agreement_is_one() -> None:
    assert krippendorff_alpha({}, "nominal") is None
    assert krippendorff_alpha({1: [1.0], 2: [2.0]}, "nominal") is None  # nothing was coded twice
    assert krippendorff_alpha({1: [2.0, 2.0], 2: [2.0, 2.0]}, "ordinal") is None  # nothing could differ
    perfect = krippendorff_alpha({1: [1.0, 1.0], 2: [2.0, 2.0]}, "interval")
    assert perfect is not None
    assert perfect.point == 1.0


# --------------------------------------------------------------------------------------------- published tables

# Fleiss 1971, table 1: 30 patients, 6 psychiatrists, 5 diagnoses.
DIAGNOSES = (
    "0 0 0 6 0|0 3 0 0 3|0 1 4 0 1|0 0 0 0 6|0 3 0 3 0|2 0 4 0 0|0 0 4 0 2|2 0 3 1 0|2 0 0 4 0|0 0 0 0 6|1 0 0 5 0|"
    "1 1 0 4 0|0 3 3 0 0|1 0 0 5 0|0 2 0 3 1|0 0 5 0 1|3 0 0 1 2|5 1 0 0 0|0 2 0 4 0|1 0 2 0 3|0 0 0 0 6|0 1 0 5 0|"
    "0 2 0 1 3|2 0 0 4 0|1 0 0 4 1|0 5 0 1 0|4 0 0 0 2|0 2 0 4 0|1 0 5 0 0|0 0 0 0 6"
)
# The 10 x 5 table, 14 raters, of many textbooks.
TEXTBOOK = "0 0 0 0 14|0 2 6 4 2|0 0 3 5 6|0 3 9 2 0|2 2 8 1 1|7 7 0 0 0|3 2 6 3 0|2 5 3 2 2|6 5 2 1 0|0 2 2 3 7"


@pytest.mark.parametrize(("table", "published"), [(DIAGNOSES, 0.430), (TEXTBOOK, 0.210)])
def test_nominal_alpha_of_published_tables(table: str, published: float) -> None:
    """With n votes, as many of each item, 1 - alpha is (1 - Fleiss' kappa) (n - 1) / n."""
    votes = from_counts(table)
    found = krippendorff_alpha({item: [float(label) for label in said] for item, said in votes.items()}, "nominal")
    n = sum(len(said) for said in votes.values())
    assert found is not None
    assert found.point == pytest.approx(1 - (1 - published) * (n - 1) / n, abs=0.0005)
    assert found.interval is not None
    assert found.interval[0] < published < found.interval[1]


def test_bootstrap_is_a_plain_one() -> None:
    """Against items drawn one by one."""
    rng = np.random.default_rng(2)
    rows = rng.integers(0, 3, (25, 2)) + 1.0
    found = bootstrap_interval(rows, lambda sums: sums[:, 0] / sums[:, 1], resamples=20_000)
    plain = [np.divide(*rows[rng.integers(0, 25, 25)].sum(axis=0)) for _ in range(20_000)]
    assert found == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.01)
    assert bootstrap_interval(rows[:1], lambda sums: sums[:, 0]) is None
    assert bootstrap_interval(rows, lambda sums: np.full(len(sums), np.nan)) is None


# -------------------------------------------------------------------------------------------------------- Dawid-Skene

# Dawid & Skene 1979, table 1: 45 patients; the first of 5 anaesthetists saw each three times.
PATIENTS = (
    "111 1 1 1 1|333 4 3 3 4|112 2 1 2 2|222 3 1 2 1|222 3 2 2 2|222 3 3 2 2|122 2 1 1 1|333 3 4 3 3|222 2 2 2 3|"
    "232 2 2 2 3|444 4 4 4 4|222 3 3 4 3|111 1 1 1 1|222 3 2 1 2|121 1 1 1 1|111 2 1 1 1|111 1 1 1 1|111 1 1 1 1|"
    "222 2 2 2 1|222 1 3 2 2|222 2 2 2 2|222 2 2 2 1|222 3 2 2 2|221 2 2 2 2|111 1 1 1 1|111 1 1 1 1|232 2 2 2 2|"
    "111 1 1 1 1|111 1 1 1 1|112 1 1 2 1|111 1 1 1 1|333 3 2 3 3|111 1 1 1 1|222 2 2 2 2|222 3 2 3 2|433 4 3 4 3|"
    "221 2 2 3 2|232 3 2 3 3|333 3 4 3 2|111 1 1 1 1|111 1 1 1 1|121 2 1 1 1|232 2 2 2 2|121 1 1 1 1|222 2 2 2 2"
)


def test_dawid_skene_on_the_papers_patients() -> None:
    votes = [
        Label(patient, str(observer), said)
        for patient, row in enumerate(PATIENTS.split("|"), start=1)
        for observer, given in enumerate(row.split(), start=1)
        for said in given
    ]
    assert len(votes) == 45 * 7
    fit = dawid_skene(votes)
    assert fit.prior == pytest.approx([0.40, 0.42, 0.11, 0.07], abs=0.005)  # their table 4
    expected = [[0.89, 0.11, 0, 0], [0.07, 0.88, 0.05, 0], [0, 0.34, 0.66, 0], [0, 0, 0.56, 0.44]]
    assert fit.errors["1"] == pytest.approx(np.array(expected), abs=0.005)
    # patients whom the majority puts elsewhere: 2 and 36 are in class 4 almost surely
    assert fit.posterior[2][3] > 0.99
    assert fit.posterior[36][3] > 0.99


def test_dawid_skene_is_crowd_kits() -> None:
    oracle = ORACLE["dawid_skene"]
    fit = dawid_skene([Label(*vote) for vote in oracle["votes"]])
    assert fit.classes == ("a", "b", "c")
    assert np.stack([fit.posterior[item] for item in sorted(fit.posterior)]) == pytest.approx(
        np.array(oracle["posterior"]), abs=1e-4
    )
    assert fit.prior == pytest.approx(oracle["prior"], abs=1e-4)
    for annotator, errors in oracle["errors"].items():
        assert fit.errors[annotator] == pytest.approx(np.array(errors), abs=1e-4)


def coin_votes(rng: random.Random, right: Sequence[float], items: int, judges: int, ties: float = 0.0) -> list[Label]:
    """Annotator k says the truth with probability right[k], and nothing at all with probability ``ties``."""
    votes = []
    for item in range(items):
        truth = rng.choice([FIRST, SECOND])
        for k in rng.sample(range(len(right)), judges):
            said = truth if rng.random() < right[k] else MIRROR[truth]
            votes.append(Label(item, f"a{k:02d}", TIE if rng.random() < ties else said))
    return votes


RIGHT = [0.7, 0.73, 0.76, 0.79, 0.82, 0.85, 0.88, 0.91, 0.94, 0.75, 0.8, 0.9, 0.5, 0.5, 0.5, 0.15, 0.2, 0.1]


def test_reliabilities_are_recovered_with_their_intervals() -> None:
    rng, covered, errors = random.Random(0), 0, []
    for trial in range(4):
        found = reliabilities(coin_votes(rng, RIGHT, 400, 3, ties=0.1), bootstrap=100, seed=trial)
        for k, right in enumerate(RIGHT):
            estimate = found[f"a{k:02d}"]
            assert estimate.interval is not None
            covered += estimate.interval[0] <= right <= estimate.interval[1]
            errors.append(abs(estimate.point - right))
    assert covered / len(errors) >= 0.88
    assert sum(errors) / len(errors) < 0.07  # about 60 votes each: their standard error is 0.05 were the truth known


def test_gold_items_tell_annotators_apart_where_nothing_else_does() -> None:
    rng = random.Random(1)
    votes = coin_votes(rng, [0.9, 0.5], 300, 1)
    assert reliabilities(votes) == {}  # no item has two votes
    gold = {vote.item: FIRST for vote in votes}
    said = {"a00": [0.9, FIRST], "a01": [0.5, FIRST]}
    told = [replace(v, label=FIRST if rng.random() < said[v.annotator][0] else SECOND) for v in votes]
    found = reliabilities(told, known=gold, shrink=0.0, bootstrap=50)
    for name in ("a00", "a01"):
        own = [vote.label == FIRST for vote in told if vote.annotator == name]
        assert found[name].point == pytest.approx(sum(own) / len(own))


def test_who_shared_no_item_stands_where_all_do() -> None:
    votes = [*coin_votes(random.Random(2), [0.9] * 6, 100, 2), Label("alone", "new", FIRST)]
    found = reliabilities(votes, bootstrap=20)
    assert found["new"].items == 0
    assert found["new"].interval is None
    assert min(f.point for f in found.values()) < found["new"].point < max(f.point for f in found.values())


def test_which_response_was_stored_first_means_nothing() -> None:
    votes = coin_votes(random.Random(3), RIGHT, 150, 3, ties=0.2)
    turned = [replace(v, label=MIRROR[v.label]) if hash(v.item) % 2 else v for v in votes]
    for ties in (votes, turned):
        fit = dawid_skene(ties, mirror=MIRROR)
        assert fit.classes == (FIRST, SECOND, TIE)
        assert fit.prior[0] == pytest.approx(fit.prior[1])
    a, b = (dawid_skene(v, mirror=MIRROR) for v in (votes, turned))
    for name, errors in a.errors.items():
        assert errors == pytest.approx(b.errors[name], abs=1e-4)
    assert reliabilities(votes, bootstrap=0)["a00"].point == pytest.approx(
        reliabilities(turned, bootstrap=0)["a00"].point, abs=1e-4
    )


# ----------------------------------------------------------------------------------------------------------- Crowd-BT


@pytest.mark.parametrize("case", range(2))
def test_crowd_bt_reaches_the_maximum_that_scipy_finds(case: int) -> None:
    oracle = ORACLE["crowd_bt"][case]
    fit = crowd_bt([Comparison(str(k), a, b) for k, a, b in oracle["votes"]], penalty=oracle["penalty"])
    assert fit.objective == pytest.approx(oracle["objective"], abs=1e-3)
    assert [fit.scores[i] for i in range(8)] == pytest.approx(oracle["scores"], abs=0.02)
    assert [fit.eta[str(k)].point for k in range(5)] == pytest.approx(oracle["eta"], abs=0.01)


@pytest.mark.wide
def test_crowd_bt_recovers_scores_and_reliabilities() -> None:
    rng, covered, errors = random.Random(0), 0, []
    scores = [rng.gauss(0, 1.5) for _ in range(60)]
    votes = []
    for _ in range(2700):
        a, b = rng.sample(range(60), 2)
        k = rng.randrange(len(RIGHT))
        if (rng.random() < 1 / (1 + np.exp(scores[b] - scores[a]))) != (rng.random() < RIGHT[k]):
            a, b = b, a
        votes.append(Comparison(f"a{k:02d}", a, b))
    fit = crowd_bt(votes, bootstrap=30, seed=0)
    assert np.corrcoef([fit.scores[i] for i in range(60)], scores)[0, 1] > 0.85
    for k, right in enumerate(RIGHT):
        estimate = fit.eta[f"a{k:02d}"]
        assert estimate.interval is not None
        covered += estimate.interval[0] <= right <= estimate.interval[1]
        errors.append(abs(estimate.point - right))
    assert covered / len(errors) >= 0.85
    assert sum(errors) / len(errors) < 0.07


# ---------------------------------------------------------------------------------------------- from the store's votes


def shared_store(store: Store, pairs: Sequence[tuple[Prompt, str, str]], overlap: int) -> None:
    with store.session() as s:
        items = []
        for prompt, a, b in pairs:
            s.add_prompts([prompt])
            first, second = s.add_responses(prompt.id, [Completion(a), Completion(b)], "m")
            items.append((first, second))
        s.add_comparisons(items, overlap)


@pytest.mark.wide
def test_the_harbors_bad_annotators_are_named(tmp_path: Path) -> None:
    honest = population(0)
    lazy, adversarial = {"a04", "a12"}, {"a08", "a17"}
    people = [
        replace(p, lapse=1.0)
        if p.name in lazy
        else replace(p, utility=lambda prompt, text, u=p.utility: -u(prompt, text))
        if p.name in adversarial
        else p
        for p in honest
    ]
    pairs = reference_pairs(World(0), 700, 0)
    with Store(tmp_path / "a.db") as store:
        shared_store(store, pairs, overlap=3)
        label(store, people, 0, "1", Silent())
        judgements = store.judgements()
    figures = annotator_figures(judgements, bootstrap=40)
    named = set(doubtful(figures))
    assert named <= lazy | adversarial
    assert adversarial <= named
    found = {f.name: f.reliability.point for f in figures if f.reliability is not None}
    # the truth: how often each sides with what most of the honest population prefers
    for person in people:
        says = []
        for prompt, a, b in pairs[:300]:
            most = true_probability(honest, prompt, a, b)
            own = person.probability_of_first(prompt, a, b)
            if own is not None:
                says.append(own if most > 0.5 else 1 - own)
        assert found[person.name] == pytest.approx(sum(says) / len(says), abs=0.2)


def test_habits_of_annotators_are_measured(tmp_path: Path) -> None:
    def length(prompt: Prompt, text: str) -> float:
        return float(len(text))

    people = [
        SimulatedAnnotator("left", lambda prompt, text: 0.0, left_bias=3.0),
        SimulatedAnnotator("long", length, temperature=0.1),
        SimulatedAnnotator("even", lambda prompt, text: 0.0),
        SimulatedAnnotator("none", lambda prompt, text: 0.0, tie_width=1.0),
    ]
    texts = [("a" * (1 + i % 3), "b" * 5) for i in range(120)]
    pairs = [(Prompt(f"p{i}", (Message("user", f"{i}"),)), a, b) for i, (a, b) in enumerate(texts)]
    with Store(tmp_path / "a.db") as store:
        shared_store(store, pairs, overlap=4)
        label(store, people, 0, "1", Silent())
        judgements = store.judgements()
    gold = {judgement.item_id: SECOND for judgement in judgements[:200]}
    figures = {f.name: f for f in annotator_figures(judgements, gold, bootstrap=20)}
    left, long, even, none = (figures[name] for name in ("left", "long", "even", "none"))
    assert left.left is not None
    assert left.left.low > 0.85
    assert long.longer is not None
    assert long.longer.point == 1.0
    assert long.failed is not None
    assert long.failed.point == 0.0  # the second response is the longer one, and the right one of each gold item
    assert even.left is not None
    assert even.left.point == pytest.approx(0.5, abs=4 * 0.5 / 120**0.5)
    assert even.failed is not None
    assert even.failed.point == pytest.approx(0.5, abs=4 * 0.5 / 50**0.5)
    assert (none.ties, none.left, none.longer) == (1.0, None, None)
    assert none.failed is not None
    assert none.failed.point == 1.0
    taken = sorted(j.seconds or 0 for j in judgements if j.annotator == "long")
    assert long.seconds is not None
    assert long.seconds[0] == pytest.approx((taken[59] + taken[60]) / 2)
    assert annotator_figures([]) == []


def test_a_judgement_is_a_vote_for_the_response_that_was_stored_first_or_second(tmp_path: Path) -> None:
    with Store(tmp_path / "a.db") as store:
        pairs = [(Prompt(f"p{i}", (Message("user", f"{i}"),)), "a", "b") for i in range(6)]
        shared_store(store, pairs, overlap=1)
        annotator = store.add_annotator("ann")
        answers = itertools.cycle([("a", 3), ("b", 2), ("a", None), ("tie", None), ("both_bad", None), ("b", 1)])
        while (assignment := store.next_assignment(annotator)) is not None:
            said, strength = next(answers)
            choice = {assignment.left: "left", assignment.right: "right"}.get(said, said)
            store.submit(assignment.id, NewVote(choice, strength=strength, token=f"{assignment.id}"))  # type: ignore[arg-type]
        judgements: list[Judgement] = store.judgements()
    assert [vote.label for vote in named_votes(judgements)] == [FIRST, SECOND, FIRST, TIE, TIE, SECOND]
