"""Simulated annotators against the closed form of their choices, and agreement statistics against worked numbers."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from keel.feedback import simulated
from keel.feedback.agreement import (
    FIRST,
    SECOND,
    TIE,
    cohens_kappa,
    raw_agreement,
    vote_pairs,
    votes_by_item,
)
from keel.feedback.simulated import SimulatedAnnotator, draw, label, true_probability
from keel.run import Silent
from keel.stats import expected_agreement, noise_ceiling
from keel.store import Store
from keel.store.records import NewVote
from keel.types import Completion, Message, Prompt, UserError

PROMPT = Prompt("p", (Message("user", "?"),))


def words(prompt: Prompt, text: str) -> float:
    return float(len(text.split()))


def one(**settings: float) -> SimulatedAnnotator:
    return SimulatedAnnotator("ann", words, **settings)


# -------------------------------------------------------------------------------------------------- one annotator


def test_probability_is_the_documented_formula() -> None:
    annotator = one(temperature=2.0, lapse=0.1, left_bias=0.5)
    # Shown left: d = 3 - 1 = 2, (2 + 0.5) / 2 = 1.25, sigmoid(1.25) = 0.777300, 0.9 * 0.777300 + 0.05 = 0.749570.
    # Shown right: (-2 + 0.5) / 2 = -0.75, sigmoid = 0.320821, the other wins with 0.9 * 0.320821 + 0.05 = 0.338739.
    expected = (0.749570 + 1 - 0.338739) / 2
    assert annotator.probability_of_first(PROMPT, "a b c", "a") == pytest.approx(expected, abs=1e-6)
    assert annotator.probability_of_first(PROMPT, "a", "a b c") == pytest.approx(1 - expected, abs=1e-6)
    assert one(lapse=1.0).probability_of_first(PROMPT, "a " * 900, "a") == 0.5
    assert one(temperature=1e-3).probability_of_first(PROMPT, "a", "a b") == 0.0  # no overflow
    assert one(tie_width=3.0).probability_of_first(PROMPT, "a b c", "a") is None


def chosen_left(annotator: SimulatedAnnotator, left: str, right: str) -> float:
    """The formula of `keel.feedback.simulated` with a word's worth of utility for each word."""
    felt = (len(left.split()) - len(right.split()) + annotator.left_bias) / annotator.temperature
    return (1 - annotator.lapse) / (1 + math.exp(-felt)) + annotator.lapse / 2


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 2.0}, {"temperature": 1.0, "lapse": 0.3}, {"temperature": 2.0, "left_bias": -1.5, "lapse": 0.1}],
)
def test_judgements_have_that_probability(settings: dict[str, float]) -> None:
    annotator, n = one(**settings), 20_000
    rng = random.Random(0)
    left = sum(annotator.judge(PROMPT, "a b c", "a b", rng).choice == "left" for _ in range(n))
    q = chosen_left(annotator, "a b c", "a b")
    assert abs(left / n - q) < 4 * math.sqrt(q * (1 - q) / n)


def test_ties_need_a_small_difference_and_no_luck() -> None:
    annotator = one(tie_width=1.5, lapse=0.5, left_bias=9.0)
    assert {annotator.judge(PROMPT, "a b", "a", random.Random(i)).choice for i in range(50)} == {"tie"}
    assert "tie" not in {annotator.judge(PROMPT, "a b c", "a", random.Random(i)).choice for i in range(50)}
    assert annotator.judge(PROMPT, "a", "a", random.Random(0)).strength is None


def test_strength_grows_with_the_difference_and_lapses_are_weak() -> None:
    def mean_strength(text: str, **settings: float) -> float:
        opinions = [one(**settings).judge(PROMPT, text, "a", random.Random(i)) for i in range(400)]
        assert {opinion.strength for opinion in opinions} <= {1, 2, 3}
        return sum(opinion.strength or 0 for opinion in opinions) / len(opinions)

    assert mean_strength("a b") < mean_strength("a b c") < mean_strength("a b c d e")
    assert mean_strength("a " * 30) == 3
    assert mean_strength("a " * 30, lapse=1.0) == 1
    # rescaling utility and temperature together changes nothing
    double = SimulatedAnnotator("ann", lambda prompt, text: 2 * words(prompt, text), temperature=2.0)
    for i in range(100):
        assert double.judge(PROMPT, "a b", "a", random.Random(i)) == one().judge(PROMPT, "a b", "a", random.Random(i))


def test_longer_responses_take_longer() -> None:
    def mean(text: str) -> float:
        return sum(one().judge(PROMPT, text, "a", random.Random(i)).seconds for i in range(500)) / 500

    # 4 s and 41 words at 4 a second, times the mean of exp(0.3 z), e^0.045
    assert mean("a " * 40) == pytest.approx((4 + 41 / 4) * math.exp(0.045), rel=0.04)
    assert mean("a") < mean("a " * 40)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"lapse": 1.5}, {"tie_width": -1.0}, {"temperature": math.nan}]
)
def test_impossible_annotators_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"'ann': {next(iter(settings))}"):
        one(**settings)


def test_a_utility_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(UserError, match="prompt 'p' is not finite"):
        SimulatedAnnotator("ann", lambda prompt, text: math.nan).probability_of_first(PROMPT, "a", "b")


# ------------------------------------------------------------------------------------------------ a population


def test_true_probability_is_the_share_among_those_who_do_not_tie() -> None:
    sure, tying = one(temperature=0.01), one(tie_width=10)
    torn = SimulatedAnnotator("torn", lambda prompt, text: 0.0)
    assert true_probability([sure], PROMPT, "a b", "a") == pytest.approx(1.0)
    assert true_probability([sure, torn, tying], PROMPT, "a b", "a") == pytest.approx(0.75)
    assert true_probability([tying], PROMPT, "a b", "a") == 0.5
    # sides are drawn at random: a strong taste for the left cancels
    assert true_probability([one(left_bias=50.0)], PROMPT, "a b", "a") == pytest.approx(0.5)
    a = true_probability([sure, torn, one(left_bias=1.0)], PROMPT, "a b", "a")
    assert a + true_probability([sure, torn, one(left_bias=1.0)], PROMPT, "a", "a b") == pytest.approx(1.0)


def fill(store: Store, count: int, overlap: int, batch: str = "") -> None:
    with store.session() as s:
        pairs = []
        for i in range(count):
            s.add_prompts([Prompt(f"p{i}", (Message("user", f"question {i}"),))])
            texts = ["a " * (1 + i % 5), "a " * (1 + (i // 5) % 5) + "b"]
            first, second = s.add_responses(f"p{i}", [Completion(t) for t in texts], "m")
            pairs.append((first, second))
        s.add_comparisons(pairs, overlap, batch)


def population(size: int = 6, **settings: float) -> list[SimulatedAnnotator]:
    return [SimulatedAnnotator(f"a{i}", words, **settings) for i in range(size)]


def test_labels_agree_as_the_closed_form_says(tmp_path: Path) -> None:
    annotators = population(temperature=1.5, lapse=0.06)  # alike, so q^2 + (1-q)^2 holds for any two of them
    with Store(tmp_path / "a.db") as store:
        fill(store, 600, overlap=2)
        summary = label(store, annotators, 0, "1", Silent())
        votes = store.judgements()
    assert summary["judgements"] == len(votes) == 1200
    assert summary["items"] == summary["doubly_judged"] == 600
    one_of_each = {vote.item_id: vote for vote in votes}.values()
    q = [true_probability(annotators, vote.prompt, vote.left.text, vote.right.text) for vote in one_of_each]
    expected = expected_agreement(q)
    assert expected is not None
    spread = math.sqrt(expected * (1 - expected) / 600)
    assert abs(summary["annotator_agreement"] - expected) < 3 * spread
    low, high = summary["annotator_agreement_interval"]
    assert low < summary["annotator_agreement"] < high
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.15)

    # the ceiling: how often a vote is for the response that the population prefers
    def preferred(vote):  # type: ignore[no-untyped-def]
        return vote.preferred.text == max(vote.left.text, vote.right.text, key=lambda text: len(text.split()))

    unequal = [vote for vote in votes if len(vote.left.text.split()) != len(vote.right.text.split())]
    q_unequal = [true_probability(annotators, v.prompt, v.left.text, v.right.text) for v in unequal]
    best = noise_ceiling(q_unequal)
    assert best is not None
    assert sum(map(preferred, unequal)) / len(unequal) == pytest.approx(best, abs=3 * math.sqrt(0.25 / len(unequal)))


def test_left_bias_shows_and_everyone_works_alike(tmp_path: Path) -> None:
    annotators = population(4, left_bias=2.0, temperature=1.0)
    with Store(tmp_path / "a.db") as store:
        fill(store, 400, overlap=1)
        summary = label(store, annotators, 0, "guide", Silent())
        votes = store.judgements()
    q = [chosen_left(annotators[0], v.left.text, v.right.text) for v in votes]
    assert summary["left"] == pytest.approx(sum(q) / len(q), abs=3 * math.sqrt(0.25 / 400))
    assert summary["left"] > 0.65
    assert [sum(v.annotator == a.name for v in votes) for a in annotators] == [100] * 4
    assert {(v.annotator_kind, v.guideline) for v in votes} == {("simulated", "guide")}
    assert all(v.seconds is not None and v.seconds > 0 for v in votes)
    assert summary["annotator_agreement"] is summary["cohens_kappa"] is None  # nothing was judged twice


def said(store: Store) -> list[tuple]:
    return [(v.token, v.annotator, v.item_id, v.left.id, v.choice, v.strength, v.seconds) for v in store.judgements()]


def test_labels_are_the_same_for_a_seed_also_when_work_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulated, "JUDGEMENTS_PER_TRANSACTION", 20)
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        with Store(tmp_path / f"{name}.db") as store:
            fill(store, 50, overlap=2)
            if name == "b":
                asked = itertools.count()

                def stops(prompt: Prompt, text: str, asked: Iterator[int] = asked) -> float:
                    if next(asked) == 2 * 47:  # two calls a judgement: in the middle of the third transaction
                        raise KeyboardInterrupt
                    return words(prompt, text)

                stopped = [replace(annotator, utility=stops) for annotator in population()]
                with pytest.raises(KeyboardInterrupt):
                    label(store, stopped, seed, "1", Silent())
                assert len(store.judgements()) == 40
            label(store, population(), seed, "1", Silent())
            runs.append(said(store))
            assert label(store, population(), seed, "1", Silent())["judgements"] == 100  # nothing is left to do
            assert said(store) == runs[-1]
    assert runs[0] == runs[1]
    assert [row[4] for row in runs[0]] != [row[4] for row in runs[2]]


def test_labelling_goes_on_after_an_undo_and_beside_others(tmp_path: Path) -> None:
    with Store(tmp_path / "a.db") as store:
        fill(store, 10, overlap=1, batch="one")
        fill(store, 10, overlap=1, batch="two")
        person = store.add_annotator("person")
        held = store.next_assignment(person, batch="one")
        assert held is not None
        assert label(store, population(2), 0, "1", Silent(), batch="one")["judgements"] == 9
        assert store.progress("two").judged == 0
        store.submit(held.id, NewVote("tie", token="x"))
        simulated_votes = [e for e in store.events() if e.action == "judged" and e.actor != "person"]
        store.undo(int(simulated_votes[-1].entity_id))
        assert label(store, population(2), 0, "1", Silent(), batch="one")["judgements"] == 10
        assert store.progress("one").undone == 1


def test_names_must_differ(tmp_path: Path) -> None:
    with Store(tmp_path / "a.db") as store:
        for wrong in ([], [one(), one()]):
            with pytest.raises(UserError, match="names must differ"):
                label(store, wrong, 0, "1", Silent())


def test_streams_are_independent_of_each_other() -> None:
    assert draw(0, "ann", "p").random() == draw(0, "ann", "p").random()
    assert len({draw(0, name, place).random() for name in ("ann", "bo") for place in ("p", "q")}) == 4


# -------------------------------------------------------------------------------------------------- agreement


def test_raw_agreement_by_hand() -> None:
    votes = {
        1: [FIRST, FIRST],  # 1
        2: [FIRST, SECOND],  # 0
        3: [FIRST, FIRST, SECOND],  # 1 of 3 pairs
        4: [FIRST, TIE],  # one vote is left without ties; else 0
        5: [TIE, TIE],  # none; else 1
        6: [SECOND],
    }
    without = raw_agreement(votes)
    assert without is not None
    assert without.point == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert without.items == 3
    with_ties = raw_agreement(votes, ties=True)
    assert with_ties is not None
    assert with_ties.point == pytest.approx((1 + 0 + 1 / 3 + 0 + 1) / 5)
    assert with_ties.items == 5


def test_what_is_not_defined_is_none() -> None:
    assert raw_agreement({}) is None
    assert raw_agreement({1: [FIRST], 2: [TIE, TIE]}) is None
    single = raw_agreement({1: [FIRST, FIRST]})
    assert single is not None
    assert single.interval is None
    assert cohens_kappa([]) is None
    assert cohens_kappa([(FIRST, FIRST)] * 5) is None
    assert noise_ceiling([]) is expected_agreement([]) is None


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = random.Random(1)
    covered = 0
    for trial in range(200):
        votes = {i: [FIRST, FIRST if rng.random() < 0.75 else SECOND] for i in range(120)}
        agreement = raw_agreement(votes, bootstrap=300, seed=trial)
        assert agreement is not None
        assert agreement.interval is not None
        covered += agreement.interval[0] <= 0.75 <= agreement.interval[1]
    assert 0.89 <= covered / 200 <= 0.99  # 95% +- 4 standard errors, a little less by the percentile method


def test_cohens_kappa_against_a_worked_table() -> None:
    # 50 cases, two raters: both yes 20, both no 15, yes-no 5, no-yes 10. p_o = 0.7,
    # p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5, kappa = 0.4
    pairs = [("y", "y")] * 20 + [("n", "n")] * 15 + [("y", "n")] * 5 + [("n", "y")] * 10
    assert cohens_kappa(pairs) == pytest.approx(0.4)
    assert cohens_kappa([("y", "n"), ("n", "y")]) == pytest.approx(-1.0)
    assert cohens_kappa([("y", "n")] * 3) == pytest.approx(0.0)  # no agreement, and none expected


def test_expected_agreement_and_ceiling_by_hand() -> None:
    assert expected_agreement([0.5, 1.0]) == pytest.approx((0.5 + 1.0) / 2)
    assert expected_agreement([0.8]) == pytest.approx(0.68)
    assert noise_ceiling([0.8, 0.2, 0.5]) == pytest.approx((0.8 + 0.8 + 0.5) / 3)


def test_votes_follow_the_response_not_the_side(tmp_path: Path) -> None:
    with Store(tmp_path / "a.db") as store:
        fill(store, 30, overlap=4)
        for name in ("a", "b", "c", "d"):
            annotator = store.add_annotator(name)
            while (assignment := store.next_assignment(annotator)) is not None:
                choice = "left" if assignment.left.endswith("b") else "right"  # always the second response
                if name in "cd":
                    choice = "tie" if name == "c" else "both_bad"
                store.submit(assignment.id, NewVote(choice, token=f"{assignment.id}"))  # type: ignore[arg-type]
        votes = votes_by_item(store.judgements())
    assert list(votes.values()) == [[SECOND, SECOND, TIE, TIE]] * 30
    assert vote_pairs(votes) == [(SECOND, SECOND)] * 30
    assert len(vote_pairs(votes, ties=True)) == 30 * 6
