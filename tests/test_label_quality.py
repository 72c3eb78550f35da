"""The Quality page: who is named for bad votes, with known truth; agreement by day; what is worked out when."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import combinations
from pathlib import Path

import pytest
from harbor_pairs import reference_pairs
from labelling_world import World, person
from waiting import eventually

from keel.feedback.agreement import raw_agreement
from keel.feedback.simulated import label
from keel.harbor.annotators import population
from keel.harbor.facts import World as Harbor
from keel.run import Silent
from keel.stats import sigmoid
from keel.store import Store
from keel.store.overview import Vote
from keel.store.records import NewVote
from keel.store.vote_columns import VoteColumns
from keel.types import Completion
from keel.web.service import kept_quality
from keel.web.service.manage import Manage
from keel.web.service.quality import Quality, days, quality
from keel.web.service.reliability import Reliability, reliability

START = datetime(2026, 11, 1, 12, tzinfo=UTC)
LAZY, ADVERSARIAL = ("a03", "a11"), ("a07", "a16")


def vote(item: int, annotator: str, said: str, day: int = 0, **more: object) -> Vote:
    time = START + timedelta(days=day)
    plain = Vote(
        item, annotator, "person", said, None, None, None, 9.0, time, "main", "1", None, (2 * item, 2 * item + 1)
    )
    return replace(plain, **more)  # type: ignore[arg-type]


def crowd(seed: int, items: int, judges: int, responses: int = 2) -> list[Vote]:
    """20 annotators with an equal share of the votes: two toss a coin, two say the opposite of what they think, sixteen
    say what Bradley-Terry says. Each item's pair is of ``responses`` replies to a prompt."""
    rng, votes = random.Random(seed), []
    pairs = list(combinations(range(responses), 2))
    scores: dict[tuple[int, int], float] = {}
    for item in range(items):
        prompt, pair = divmod(item, len(pairs))
        a, b = ((prompt, reply) for reply in pairs[pair])
        lead = scores.setdefault(a, rng.gauss(0, 2)) - scores.setdefault(b, rng.gauss(0, 2))
        for name in rng.sample([f"a{n:02d}" for n in range(20)], judges):
            first = rng.random() < sigmoid(lead)
            first = rng.random() < 0.5 if name in LAZY else not first if name in ADVERSARIAL else first
            ids = (prompt * responses + a[1], prompt * responses + b[1])
            tie = name not in LAZY and rng.random() < 0.05
            votes.append(vote(item, name, "tie" if tie else "first" if first else "second", responses=ids))
    return votes


def precision_and_recall(found: Sequence[Quality]) -> tuple[float, float]:
    bad = {*LAZY, *ADVERSARIAL}
    named = [{one.annotator for one in each.named} for each in found]
    right = sum(len(names & bad) for names in named)
    return right / max(1, sum(map(len, named))), right / (len(bad) * len(found))


@pytest.mark.parametrize(
    ("items", "judges", "least"), [(700, 2, 0.6), pytest.param(1000, 3, 0.9, marks=pytest.mark.wide)]
)
def test_bad_annotators_are_named_and_no_others(
    items: int, judges: int, least: float, record_property: pytest.RecordProperty
) -> None:
    """A fifth of the votes is bad: 70 votes each, two an item, and 150, three an item; two populations."""
    found = [quality(VoteColumns.of(crowd(seed, items, judges)), {}) for seed in range(2)]
    precision, recall = precision_and_recall(found)
    record_property("precision", precision)
    record_property("recall", recall)
    print(f"{items} items, {judges} votes each: precision {precision:.2f}, recall {recall:.2f}")
    assert precision >= 0.9
    assert recall >= least
    for each in found:
        reasons = {one.annotator: one.reasons for one in each.named}
        for name in ADVERSARIAL:
            assert "mostly the opposite" in reasons[name][0]
        assert all(one.crowd_bt is None for one in each.annotators)  # too few votes a response for it to tell


@pytest.mark.wide
def test_crowd_bt_names_them_where_nothing_was_judged_twice() -> None:
    """Nine replies a prompt, each pair judged once: Dawid & Skene can say nothing."""
    found = [quality(VoteColumns.of(crowd(seed, 100 * 36, 1, responses=9)), {}) for seed in range(1)]
    precision, recall = precision_and_recall(found)
    print(f"Crowd-BT alone: precision {precision:.2f}, recall {recall:.2f}")
    assert precision >= 0.9
    assert recall >= 0.7
    for each in found:
        assert each.agreement is each.alpha is each.graded_alpha is each.kappa is None
        assert all(one.reliability is None for one in each.annotators)
        assert all(one.crowd_bt is not None and one.crowd_bt.interval is not None for one in each.annotators)


@pytest.mark.wide
def test_the_app_names_the_harbors_bad_annotators(tmp_path: Path) -> None:
    """Through the store and the queue, with the demo's population, which has habits and noise of its own."""
    people = [
        replace(p, lapse=1.0)
        if p.name in LAZY
        else replace(p, utility=lambda prompt, text, u=p.utility: -u(prompt, text))
        if p.name in ADVERSARIAL
        else p
        for p in population(1)
    ]
    with Store(tmp_path / "a.db") as store:
        with store.session() as s:
            items = []
            for prompt, a, b in reference_pairs(Harbor(0), 600, 1):
                s.add_prompts([prompt])
                first, second = s.add_responses(prompt.id, [Completion(a), Completion(b)], "m")
                items.append((first, second))
            s.add_comparisons(items, overlap=3)
        label(store, people, 0, "1", Silent())
        found = Manage(store).quality("all")
        assert Manage(store).quality("people").annotators == []
    precision, recall = precision_and_recall([found])
    print(f"harbor: precision {precision:.2f}, recall {recall:.2f}")
    assert precision >= 0.8
    assert recall >= 0.75
    assert set(ADVERSARIAL) <= {one.annotator for one in found.named}


def test_figures_that_are_not_defined_are_none() -> None:
    found = quality(VoteColumns.of([vote(1, "ann", "first"), vote(2, "bo", "tie")]), {})
    assert found.agreement is found.kappa is found.alpha is found.graded_alpha is None
    assert [(one.reliability, one.crowd_bt, one.reasons) for one in found.annotators] == [(None, None, ())] * 2
    assert quality(VoteColumns.of([]), {}).annotators == []


def test_alpha_by_hand() -> None:
    """Two coders, four units, the values 1 1, 1 -1, -1 -1, 0 0. Coincidences: 11 2, 1-1 1 (each way), -1-1 2, 00 2;
    n = 8, n_1 = 3, n_-1 = 3, n_0 = 2. Nominal: D_o = 2/8, D_e = (2 * (3 * 3 + 3 * 2 + 3 * 2)) / (8 * 7) = 42/56."""
    said = [("first", "first"), ("first", "second"), ("second", "second"), ("tie", "both_bad")]
    votes = [vote(n, name, v) for n, pair in enumerate(said) for name, v in zip(("a", "b"), pair, strict=True)]
    votes += [vote(9, "a", "first", gold="second"), vote(9, "b", "second", gold="second")]  # gold items stay out
    votes = [replace(v, vote="tie" if v.vote == "both_bad" else v.vote) for v in votes]
    found = quality(VoteColumns.of(votes), {})
    assert found.alpha is not None
    assert found.alpha.point == pytest.approx(1 - (2 / 8) / (42 / 56))
    assert found.alpha.items == 4
    # graded: with the strengths 3 and 1 the second unit's disagreement weighs differently
    assert found.graded_alpha is not None
    stronger = [replace(v, strength=3.0) if v.vote != "tie" else v for v in votes]
    graded = quality(VoteColumns.of(stronger), {}).graded_alpha
    assert graded is not None
    assert graded.point == pytest.approx(found.graded_alpha.point)  # an ordinal scale knows order, not size


def test_gold_items_and_reviewers_words_tell_annotators_apart() -> None:
    """Nobody shares an item; what is known of each is how often they are right where the answer is known."""
    rng, votes = random.Random(0), []
    for n in range(400):
        name = f"a{n % 4}"
        right = rng.random() < (0.2 if name == "a3" else 0.9)
        answer = rng.choice(["first", "second"])
        other = "second" if answer == "first" else "first"
        place = "gold" if n < 200 else "settled"
        votes.append(vote(n, name, answer if right else other, **{place: answer}))
    found = {one.annotator: one for one in quality(VoteColumns.of(votes), {}).annotators}
    assert [name for name, one in found.items() if one.reasons] == ["a3"]
    assert found["a3"].reliability is not None
    assert found["a3"].reliability.point == pytest.approx(0.2, abs=0.08)


def test_agreement_of_each_day_is_that_of_all_votes_until_then() -> None:
    rng = random.Random(1)
    votes = [
        vote(rng.randrange(40), f"a{n % 7}", rng.choice(["first", "first", "second", "tie"]), day=n // 50)
        for n in range(400)
    ]
    found = days(VoteColumns.of(votes))
    assert [day.votes for day in found] == [50] * 8
    for number, day in enumerate(found):
        items: dict[int, list[str]] = {}
        for one in votes[: 50 * (number + 1)]:
            items.setdefault(one.item_id, []).append(one.vote)
        expected = raw_agreement(items, bootstrap=1)
        assert expected is not None
        assert day.agreement == pytest.approx(expected.point)
    assert days(VoteColumns.of(votes), most=3) == found[-3:]


def test_figures_are_worked_out_again_when_something_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reliable: list[int] = []

    def counted(votes: VoteColumns) -> Reliability:
        reliable.append(len(votes))
        return reliability(votes)

    monkeypatch.setattr(kept_quality, "reliability", counted)
    with Store(tmp_path / "a.db") as store:
        World(store, items=300)
        manage = Manage(store)
        who = person(store, "ann")

        def judge(count: int) -> None:
            for _ in range(count):
                assignment = store.next_assignment(who.annotator_id)
                assert assignment is not None
                store.submit(assignment.id, NewVote("left", token=f"{assignment.id}"))

        def votes() -> int:
            return sum(one.votes for one in manage.quality("people").annotators)

        judge(100)
        first = manage.quality("people")
        assert manage.quality("people") is first
        judge(2)  # the votes are counted, the reliabilities stay for as long as that is at most 2%
        assert (votes(), manage.quality("people").reliability.votes, reliable) == (102, 100, [100])
        judge(1)
        assert (votes(), manage.quality("people").reliability.votes, reliable) == (103, 103, [100, 103])
        assert manage.quality("all").reliability.votes == 103  # everybody's are kept by themselves
        assert reliable == [100, 103, 103]
        # figures that took long are shown as they are for a minute, and say so; those of many votes come in two steps
        monkeypatch.setattr(kept_quality, "CHEAP_SECONDS", 0.0)
        monkeypatch.setattr(kept_quality, "AT_ONCE", 50)
        judge(10)
        old = manage.quality_kept("people")
        assert old is not None
        assert (old.behind, sum(one.votes for one in old.quality.annotators)) == (True, 103)
        monkeypatch.setattr(kept_quality, "OLD_SECONDS", 0.0)
        assert votes() == 113
        eventually(lambda: manage.quality("people").reliability.votes == 113)
        new = manage.quality_kept("people")
        assert new is not None
        assert (new.behind, new.at > old.at) == (False, True)


def test_a_page_waits_no_longer_than_somebody_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def slow(votes: VoteColumns) -> Reliability:
        go_on.wait(30)
        return reliability(votes)

    monkeypatch.setattr(kept_quality, "reliability", slow)
    with Store(tmp_path / "a.db") as store:
        world = World(store, items=3)
        who = person(store, "ann")
        assignment = store.next_assignment(who.annotator_id)
        assert assignment is not None
        store.submit(assignment.id, NewVote("left", token="a-token-of-1"))
        client = world.client("boss", "reviewer")
        assert world.app.state.services.manage.quality_kept("people", wait=0.05) is None
        go_on.set()
        world.app.state.services.manage.quality("people")
        assert "Figures of" in client.get("/manage/quality").text
