"""The arena's standings: ratings, intervals, style, names that void a vote, what reviewers decide, the page."""

from __future__ import annotations

import csv
import json
import math
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from labelling_world import World, exported, person

from keel.cli import main
from keel.feedback.bradley_terry import Battle, comparable, fit
from keel.feedback.standings import POINTS, differences, standings
from keel.stats import t_quantile
from keel.store import Store, arena, erase, people
from keel.store.arena_facts import NAMES, Facts, Finder, own_names, parse_names, style
from keel.store.ballots import Ballot, ballots
from keel.store.people import Account
from keel.types import UserError
from keel.web.service.standings import ArenaStandings

# ----------------------------------------------------------------------------------------------------------- strengths


def drawn() -> list[Battle]:
    """240 votes of nine people with tastes, on four models; style matters."""
    rng = np.random.default_rng(3)
    b = [0.6, 0.2, -0.1, -0.7]
    found = []
    for n in range(240):
        left, right = rng.choice(4, 2, replace=False)
        z, who = round(float(rng.normal()), 2), n % 9
        p = 1 / (1 + math.exp(-(b[left] - b[right] + 0.4 * z + 0.3 * (who % 3 - 1) * int(left - right))))
        u = rng.random()
        score = 1.0 if u < p * 0.85 else 0.5 if u < p * 0.85 + 0.15 else 0.0
        found.append(Battle(str(who), "abcd"[left], "abcd"[right], score, (z,)))
    return found


def test_strengths_effects_and_errors_are_those_of_statsmodels() -> None:
    """statsmodels 0.15, GLM of the binomial family on the same design; errors: it fits again without each person."""
    battles = drawn()
    plain = fit([Battle(one.person, one.left, one.right, one.score) for one in battles], "abcd")
    styled = fit(battles, "abcd")
    assert plain is not None
    assert styled is not None
    np.testing.assert_allclose(plain.strengths, [0.41412644, 0.14726655, -0.18726281, -0.37413018], atol=2e-8)
    np.testing.assert_allclose(styled.strengths, [0.41586862, 0.14123975, -0.16816736, -0.38894101], atol=2e-8)
    np.testing.assert_allclose(styled.effects, [0.32433281], atol=2e-8)
    for fitted, exact in (
        (plain, [0.114299, 0.169122, 0.06604, 0.121839]),
        (styled, [0.108064, 0.185885, 0.066967, 0.133131, 0.164266]),
    ):  # of the jackknife to the end; ours takes one step
        errors = [fitted.error(row) for row in np.eye(len(exact))]
        np.testing.assert_allclose(np.array(errors, float), exact, rtol=0.015)


def test_two_models_by_hand() -> None:
    """Three wins of four, and two ties, are 4 of 6 points: odds of 2."""
    battles = [Battle("x", "a", "b", score) for score in (1.0, 1.0, 1.0, 0.0, 0.5, 0.5)]
    fitted = fit(battles, ("a", "b"))
    assert fitted is not None
    assert fitted.strengths == pytest.approx([math.log(2) / 2, -math.log(2) / 2])
    assert fitted.error(np.array([1.0, -1.0])) is None  # one person says nothing of how people differ
    turned = fit([Battle("x", one.right, one.left, 1 - one.score) for one in battles], ("a", "b"))
    assert turned is not None
    assert turned.strengths == pytest.approx(fitted.strengths)


def test_what_never_met_or_only_won_is_not_compared() -> None:
    battles = [Battle("x", "a", "b", 1.0), Battle("y", "b", "a", 1.0), Battle("x", "c", "d", 0.5)]
    assert comparable(battles) == [("a", "b"), ("c", "d")]
    assert comparable([*battles, Battle("x", "a", "c", 1.0)]) == [("a", "b"), ("c", "d")]  # one way
    assert comparable([*battles, Battle("x", "a", "c", 0.5)]) == [("a", "b", "c", "d")]
    circle = [Battle("x", one, other, 1.0) for one, other in (("a", "b"), ("b", "c"), ("c", "a"))]
    assert comparable(circle) == [("a", "b", "c")]


def test_style_that_tells_every_vote_has_no_answer() -> None:
    told = [Battle("x", "a", "b", score, (2 * score - 1,)) for score in (1.0, 0.0, 1.0, 0.0)]
    assert fit(told, ("a", "b")) is None
    same = [Battle("x", "a", "b", score, (1.0,)) for score in (1.0, 0.0, 1.0)]  # style is which model wrote it
    assert fit(same, ("a", "b")) is None


def test_intervals_hold_where_people_differ() -> None:
    """40 arenas of known strengths; people's tastes differ, and some vote far more than others."""
    rng = np.random.default_rng(0)
    true_M = np.array([0.5, 0.1, -0.6])
    held = 0
    for _ in range(40):
        taste_GM = rng.normal(0, 0.5, (10, 3))
        battles = []
        for who in rng.choice(10, 150, p=rng.dirichlet(np.ones(10))).tolist():
            left, right = rng.choice(3, 2, replace=False).tolist()
            lead = true_M[left] - true_M[right] + taste_GM[who, left] - taste_GM[who, right]
            battles.append(Battle(str(who), "abc"[left], "abc"[right], float(rng.random() < 1 / (1 + math.exp(-lead)))))
        fitted = fit(battles, "abc")
        assert fitted is not None
        error = fitted.error(np.array([1.0, 0.0, -1.0]))
        assert error is not None
        half = t_quantile(0.975, len(fitted.jackknife) - 1) * error
        held += abs(fitted.strengths[0] - fitted.strengths[2] - 1.1) <= half
    assert held >= 35  # of 40, where 38 are wanted: fewer are one case in a hundred


# ------------------------------------------------------------------------------------------------------- style, names


def test_style_is_counted_by_hand() -> None:
    text = "# Title\n\nIt is **very** good.\n\n- one\n- two\n3) three\n\n```\n# no header\n- no item\n**x**\n```\n"
    words = 2 + 9 + 2 + 2 + 3 + 6 + 3 + 3 + 5  # with every sign
    assert style([text]) == (words, 1, 3, 1)
    assert style(["好的,再见"]) == (5, 0, 0, 0)
    assert style(["one", "two __three__"]) == (1 + 1 + 1, 0, 0, 1)
    assert differences((30, 1, 0, 0), (10, 1, 0, 5)) == (0.5, 0.0, 0.0, -1.0)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("I am Qwen, made by Alibaba.", "Qwen"),
        ("我是qwen2.5模型", "Qwen"),
        ("我是通义千问。", "通义千问"),
        ("**GPT 4** here", "GPT-4"),
        ("gpt-40 is none", None),
        ("Claudette sang; two llamas ate.", None),
        ("As my_model-7b I would say", "my-model-7B"),
        ("a policy of sft", None),
        ("", None),
    ],
)
def test_names_are_found_as_words(text: str, found: str | None) -> None:
    assert (
        Finder([*NAMES, *own_names(["runs/demo:sft", "policy", "hub/my-model-7B"])]).first(["nothing", text]) == found
    )


def test_which_names_are_looked_for() -> None:
    assert own_names(["runs/demo:sft", "Qwen2.5-0.5B@x", "/a/b/my-model/", "dpo2"]) == [
        "Qwen2.5-0.5B@x", "my-model", "dpo2"
    ]  # fmt: skip
    assert parse_names("Sky Net,  HAL 9000\n\nHAL  9000") == ["Sky Net", "HAL 9000"]
    for bad in ("x", "...", "y" * 61, ",".join(f"name{n}" for n in range(201))):
        with pytest.raises(UserError):
            parse_names(bad)


# ------------------------------------------------------------------------------------------------------------ standings


def ballot(who: str, left: str, right: str, choice: str, n: int = 0, longer: int = 0, **other: object) -> Ballot:
    facts = Facts((20 + 10 * longer, 0, 0, 0), (20, 0, 0, 0), None)
    made = {"facts": facts, "counted": None, "created": None} | other
    return Ballot(n, who, left, right, choice, **made)  # type: ignore[arg-type]


def many(seed: int = 0, votes: int = 600, worth: float = 0.0) -> list[Ballot]:
    """Of 20 people on three models: a beats b, b is as good as c; the longer reply wins by ``worth``."""
    rng = np.random.default_rng(seed)
    strength = {"a": 1.2, "b": 0.0, "c": 0.0}
    found = []
    for n in range(votes):
        left, right = rng.choice(list("abc"), 2, replace=False).tolist()
        longer = int(rng.integers(0, 2)) if left != "c" else int(rng.random() < 0.9)  # c is wordy
        lead = strength[left] - strength[right] + worth * longer
        choice = "left" if rng.random() < 1 / (1 + math.exp(-lead)) else "right"
        found.append(ballot(f"p{n % 20}", left, right, choice, n, longer))
    return found


def test_ranks_say_what_is_sure() -> None:
    found = standings(many())
    ranks = {one.model: (one.best, one.worst) for one in found.plain.standings}
    assert ranks == {"a": (1, 1), "b": (2, 3), "c": (2, 3)}
    assert sum(one.rating or 0 for one in found.plain.standings) == pytest.approx(3000)
    assert found.warnings == ()
    a, b = (next(one for one in found.plain.standings if one.model == name) for name in "ab")
    assert ((a.rating or 0) - (b.rating or 0)) / POINTS == pytest.approx(1.2, abs=0.3)


def test_control_of_style_takes_out_what_length_wins() -> None:
    found = standings(many(1, 1200, worth=1.5))
    assert found.controlled is not None
    lead = [{one.model: one.rating or 0 for one in table.standings} for table in (found.plain, found.controlled)]
    wordy, at_equal_style = (one["c"] - one["b"] for one in lead)
    assert wordy > 30
    assert abs(at_equal_style) < 20
    (effect,) = found.controlled.effects
    assert effect.feature == "length"
    assert effect.low is not None
    assert effect.low > 0
    assert found.controlled.left_out == ("headers", "lists", "bold")  # nobody used any


def test_few_votes_parts_and_heavy_voters_are_said() -> None:
    few = [ballot("p1", "a", "b", "left"), ballot("p2", "a", "b", "right"), ballot("p1", "b", "a", "tie")]
    lone = [ballot(who, "c", "a", "left") for who in ("p1", "p2")]
    newest = [ballot("p2", "d", "a", choice) for choice in ("left", "right")]
    found = standings([*few, *lone, *newest])
    told = {one.model: one for one in found.plain.standings}
    assert "few" in told["a"].note
    assert told["a"].rating is not None
    assert told["a"].low is not None  # d, which one person knows, does not spoil it
    assert told["c"].rating is None
    assert told["c"].note.startswith("won all of its 2 votes")
    assert told["d"].note == "one person alone voted on it"
    assert any("parts that can't be compared" in warning for warning in found.warnings)
    assert any(warning.startswith("p2 gave 4 of the 7 votes") for warning in found.warnings)
    assert standings([]).plain.standings == ()
    (alone, other) = standings([ballot("p1", "a", "b", choice) for choice in ("left", "right")]).plain.standings
    assert (alone.rating, alone.low, (alone.best, alone.worst)) == (1000, None, (1, 2))
    assert "rests on one person" in other.note


def test_whoever_moves_a_rating_is_named() -> None:
    stuffed = [ballot("rigger", "c", "b", "left", n) for n in range(120)]
    found = standings([*many(), *stuffed])
    assert any(warning.startswith("Without rigger, ") for warning in found.warnings)
    assert not any("Without p" in warning for warning in found.warnings)


# ---------------------------------------------------------------------------------------------- the store and the page


def talk(store: Store, who: Account, models: tuple[str, str], replies: Sequence[str], choice: str) -> int:
    """A conversation of one turn with its vote; the vote's id."""
    with store.transaction(writes=True) as c:
        id = arena.start(c, who.annotator_id, *models, store.now)
        turn = arena.say(c, id, who.annotator_id, "Who?", token=None, number=1, now=store.now).turns[-1]
        for side, text in zip(("left", "right"), replies, strict=True):
            assert arena.answer(c, id, turn, side, text)
        arena.vote(c, id, who.annotator_id, choice, token=uuid.uuid4().hex, reason="so", guideline=None, now=store.now)
        return ballots(c)[-1].id


@pytest.fixture
def store(new_url: object) -> Iterator[Store]:
    with Store(new_url()) as found:  # type: ignore[operator]
        yield found


def counting(store: Store) -> list[bool]:
    with store.transaction(writes=False) as connection:
        return [one.counts for one in ballots(connection)]


def test_a_vote_after_a_name_is_kept_marked_and_not_counted_until_a_reviewer_says_so(store: Store) -> None:
    ann, boss = person(store, "ann"), person(store, "boss", "reviewer")
    talk(store, ann, ("m-1", "m-2"), ("Hello **there**", "Hi"), "left")
    told = talk(store, ann, ("m-2", "m-1"), ("I am Qwen", "Hi"), "right")
    own = talk(store, ann, ("m-2", "m-1"), ("Hi", "You talk to M 1."), "tie")
    place = ArenaStandings(store)
    assert counting(store) == [True, False, False]
    assert (place.found().counted, place.found().voided) == (1, 2)
    assert [row["named"] for row in exported(store, "arena.jsonl")] == [None, "Qwen", "m-1"]
    place.decide(told, True, boss)
    assert counting(store) == [True, True, False]
    assert place.found().counted == 2
    place.decide(told, None, boss)
    assert counting(store) == [True, False, False]
    place.set_names("Sky Net", boss)  # Qwen is none any more; what the models are served as always is
    assert counting(store) == [True, True, False]
    assert place.found().counted == 2
    place.set_names("  ", boss)
    assert place.as_names()[0] == list(NAMES)
    with pytest.raises(UserError, match="no arena vote"):
        place.decide(999, True, boss)
    actions = [event.action for event in store.events() if event.entity == "arena vote"]
    assert actions == ["voted"] * 3 + ["counted", "left to the names"]
    count, looks = place.votes(True, 0)
    assert (count, looks[0].ballot.id, looks[0].reason) == (2, own, "so")
    assert looks[0].turns == [("Who?", "Hi", "You talk to M 1.")]


def test_erased_conversations_keep_their_numbers(store: Store) -> None:
    ann, boss = person(store, "ann"), person(store, "boss", "admin")
    talk(store, ann, ("m-1", "m-2"), ("Hello **there** secret", "Hi"), "left")
    talk(store, ann, ("m-1", "m-2"), ("Hello from Qwen", "Hi"), "right")
    with store.transaction(writes=False) as connection:
        before = ballots(connection)
    with store.transaction(writes=True) as connection:
        erase.erase_person(connection, "ann", True, "boss", store.now)
    ArenaStandings(store).decide(before[1].id, True, boss)
    with store.transaction(writes=False) as connection:
        after = ballots(connection)
        assert "secret" not in str(connection.execute(people.settings.select()).all())
    assert [one.facts for one in after] == [one.facts for one in before]
    assert [one.counts for one in after] == [True, True]


def test_the_page_is_for_reviewers_and_the_names_for_admins(tmp_path: Path) -> None:
    with Store(tmp_path / "feedback.db") as store:
        world = World(store, items=0)
        ann = person(store, "ann")
        for _ in range(2):
            talk(store, ann, ("<b>one</b>-1", "m-2"), ("Hello", "Hi there"), "left")
            talk(store, ann, ("<b>one</b>-1", "m-2"), ("Hello", "Hi"), "right")
        told = talk(store, ann, ("<b>one</b>-1", "m-2"), ("I am <i>Claude</i>", "Hi"), "tie")
        for_ann, reviewer, admin = world.client("al"), world.client("re", "reviewer"), world.client("ad", "admin")
        assert for_ann.get("/manage/arena").status_code == 403
        shown = reviewer.get("/manage/arena").text
        assert "&lt;b&gt;one&lt;/b&gt;-1" in shown
        assert "<b>one" not in shown
        assert 'class="chart"' in shown
        assert reviewer.get("/manage/arena?style=true").status_code == 200
        assert reviewer.form("/manage/arena/names", names="x y").status_code == 403
        listed = reviewer.get("/manage/arena/votes").text
        assert "&lt;i&gt;Claude&lt;/i&gt;" in listed
        assert "left out" in listed
        assert reviewer.form(f"/manage/arena/votes/{told}", decision="count").status_code == 303
        assert counting(store)[-1]
        assert admin.form("/manage/arena/names", names="!").status_code == 400
        assert admin.form("/manage/arena/names", names="Hi there").status_code == 303
        assert counting(store) == [False, True, False, True, True]


def test_the_command_writes_what_the_page_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "feedback.db"
    with Store(path) as store:
        people_here = [person(store, f"p{n}") for n in range(3)]
    assert main(["arena", str(path)]) == 0
    assert "no vote in the arena" in capsys.readouterr().out
    with Store(path) as store:
        for who in people_here:
            for choice in ("left", "right", "left"):
                talk(store, who, ("m-1", "m-2"), ("Hello", "Hi"), choice)
        page = ArenaStandings(store).found()
    for name in ("standings.json", "standings.csv"):
        assert main(["arena", str(path), str(tmp_path / name)]) == 0
    said = json.loads((tmp_path / "standings.json").read_text(encoding="utf-8"))
    assert said["votes"] == {"counted": 9, "left_out": 0, "without_texts": 0}
    with (tmp_path / "standings.csv").open(encoding="utf-8", newline="") as file:
        first = next(csv.DictReader(file))
    assert (first["model"], first["won"], first["lost"]) == ("m-1", "6", "3")
    assert float(first["rating"]) == pytest.approx(1000 + 200 / math.log(10) * math.log(2), abs=0.05)  # odds of 2
    assert float(first["rating"]) == pytest.approx(page.plain.standings[0].rating, abs=0.05)
    capsys.readouterr()
    assert main(["arena", str(path)]) == 0
    assert "m-1" in capsys.readouterr().out
    assert main(["arena", str(path), str(tmp_path / "standings.txt")]) == 2
    assert "give the file one of these endings" in capsys.readouterr().err
