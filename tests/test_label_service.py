"""What the labelling app does, without HTTP, on both databases."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from databases import Clock
from labelling_world import HASHER, PASSWORD, World, exported, fake_sources, fill, person, token
from sqlalchemy import select, text
from test_label_models import Judged

from keel.store import LeaseLost, Store, overview, people, work
from keel.store.guidelines import parse_aspects
from keel.store.people_tables import aspect_ratings, links, sessions
from keel.store.records import NewRanking, NewVote, NewWriting
from keel.store.vote_columns import VoteReader
from keel.types import Completion, UserError
from keel.web.service.arena import Arena
from keel.web.service.labelling import Labelling
from keel.web.service.manage import Manage
from keel.web.service.models import Models
from keel.web.service.people import People, WrongPassword
from keel.web.service.quality import quality
from keel.web.service.sampling import Sampling
from keel.web.service.start import FIRST_BATCH, prepare


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(new_url: Callable[[], str], clock: Clock) -> Iterator[Store]:
    with Store(new_url(), clock=clock) as store:
        yield store


def judge_all(labelling: Labelling, who: people.Account, choice: str = "left") -> int:
    done = 0
    while (screen := labelling.next(who, "compare")) is not None:
        labelling.judge(who, screen.id, NewVote(choice, token=token(), seconds=3.0))
        done += 1
    return done


# ------------------------------------------------------------------------------------------------------- the queue


def test_a_store_that_the_pipeline_filled_opens_at_once(store: Store) -> None:
    fill(store, 5)
    simulated = store.add_annotator("sim", "simulated")
    while (assignment := store.next_assignment(simulated)) is not None:
        store.submit(assignment.id, NewVote("left", token=token()))
    store.add_guideline("1")  # as an annotate stage leaves it: a version without a text
    prepare(store)
    prepare(store)
    labelling = Labelling(store)
    ann = person(store, "ann")
    assert labelling.guideline() is not None
    assert labelling.guideline().version == "2"  # type: ignore[union-attr]
    assert labelling.progress(ann, "compare").wanted == 5  # one pair a prompt, in a queue of their own
    assert judge_all(labelling, ann) == 5
    assert {vote.batch for vote in store.judgements() if vote.annotator == "ann"} == {FIRST_BATCH}


def test_ratings_reasons_and_the_guideline_are_kept_with_the_vote(store: Store) -> None:
    fill(store, 1)
    prepare(store)
    labelling, ann = Labelling(store), person(store, "ann")
    screen = labelling.next(ann, "compare")
    assert screen is not None
    given = {"left": {"helpful": 4, "made up": 1}, "right": {"honest": 2}}
    labelling.judge(
        ann, screen.id, NewVote("left", token="t" * 8, strength=3, seconds=2.5, reason="better", ratings=given)
    )
    (vote,) = store.judgements()
    assert (vote.choice, vote.strength, vote.seconds, vote.reason, vote.guideline) == ("left", 3, 2.5, "better", "1")
    with store.transaction(writes=False) as connection:
        rows = connection.execute(select(aspect_ratings)).all()
    assert {(row.response_id, row.aspect, row.value) for row in rows} == {
        (vote.left.id, "helpful", 4),
        (vote.right.id, "honest", 2),  # and the aspect that the guideline does not have is left out
    }
    event = next(e for e in store.events() if e.action == "judged")
    assert event.guideline == "1"
    assert event.new["ratings"] == {"left": {"helpful": 4}, "right": {"honest": 2}}


def test_undo_takes_back_what_was_last_be_it_a_vote_or_a_skip(store: Store, clock: Clock) -> None:
    fill(store, 3)
    prepare(store)
    labelling, ann, bo = Labelling(store), person(store, "ann"), person(store, "bo")
    assert labelling.undo(ann, "compare") is None
    voted = labelling.next(ann, "compare")
    assert voted is not None
    labelling.judge(ann, voted.id, NewVote("tie", token=token()))
    clock.time += timedelta(seconds=1)
    skipped = labelling.next(ann, "compare")
    assert skipped is not None
    labelling.skip(ann, skipped.id, "can't tell")
    labelling.skip(ann, skipped.id, "can't tell")  # sent twice
    third = labelling.next(ann, "compare")
    assert third is not None
    assert third.id not in (voted.id, skipped.id)  # a skipped item does not come back
    assert labelling.undo(ann, "compare") == skipped
    assert labelling.undo(ann, "compare") == voted
    assert labelling.undo(ann, "compare") is None
    assert labelling.undo(bo, "compare") is None  # what others did is not theirs to take back
    actions = [e.action for e in store.events() if e.actor == "ann"]
    assert actions == ["judged", "skipped", "unskipped", "undone"]
    assert store.progress().judged == 0


def test_a_skipped_item_goes_to_somebody_else(store: Store) -> None:
    fill(store, 1)
    prepare(store)
    labelling, ann, bo = Labelling(store), person(store, "ann"), person(store, "bo")
    screen = labelling.next(ann, "compare")
    assert screen is not None
    assert labelling.next(bo, "compare") is None
    labelling.skip(ann, screen.id, "")
    assert labelling.next(ann, "compare") is None
    assert judge_all(labelling, bo) == 1
    with pytest.raises(UserError, match="somebody else has the item that you skipped"):
        labelling.undo(ann, "compare")


def test_nobody_can_touch_what_is_in_other_hands(store: Store) -> None:
    fill(store, 1, replies=4)
    prepare(store)
    labelling, ann, bo = Labelling(store), person(store, "ann"), person(store, "bo")
    Manage(store).ask_for("rank", 1, 1, "admin")
    Manage(store).ask_for_writing(1, 1, "admin")
    compare, rank, write = (labelling.next(ann, kind) for kind in ("compare", "rank", "write"))  # type: ignore[arg-type]
    assert compare is not None
    assert rank is not None
    assert write is not None
    attempts: list[Callable[[], object]] = [
        lambda: labelling.judge(bo, compare.id, NewVote("left", token=token())),
        lambda: labelling.rank(bo, rank.id, NewRanking([[0], [1], [2], [3]], token=token())),
        lambda: labelling.write(bo, write.id, NewWriting("text", token=token())),
        lambda: labelling.skip(bo, compare.id, ""),
        lambda: labelling.flag(bo, compare.id, "", token()),
    ]
    for attempt in attempts:
        with pytest.raises(UserError, match="this item is not yours"):
            attempt()
    with pytest.raises(UserError, match="this item is not yours"):  # a comparison is no ranking, whoever says so
        labelling.write(ann, compare.id, NewWriting("text", token=token()))
    assert store.judgements() == []


@pytest.mark.parametrize("overlap", [1, 3])
def test_32_people_racing_for_the_last_slots(store: Store, overlap: int) -> None:
    items = fill(store, 5, overlap)
    prepare(store)
    labelling = Labelling(store)
    crowd = [person(store, f"person {i}") for i in range(32)]
    start = threading.Barrier(len(crowd))
    failures: list[BaseException] = []

    def work_on(who: people.Account) -> None:
        try:
            start.wait()
            judge_all(labelling, who)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work_on, args=(who,)) for who in crowd]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    votes = store.judgements()
    assert Counter(vote.item_id for vote in votes) == dict.fromkeys(items, overlap)
    assert len({(vote.item_id, vote.annotator) for vote in votes}) == len(votes)


def test_one_vote_sent_by_many_at_once_counts_once(store: Store) -> None:
    fill(store, 1, overlap=2)
    prepare(store)
    labelling, ann = Labelling(store), person(store, "ann")
    screen = labelling.next(ann, "compare")
    assert screen is not None
    start = threading.Barrier(8)
    ids: list[int] = []

    def send() -> None:
        start.wait()
        ids.append(labelling.judge(ann, screen.id, NewVote("left", token="same token", strength=1)))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert len(set(ids)) == 1
    assert len(store.judgements()) == 1


# ------------------------------------------------------------------------------------------------------ gold items


def test_gold_items_reach_everybody_and_training_never_sees_them(store: Store) -> None:
    items = fill(store, 12)
    prepare(store)
    manage, labelling = Manage(store), Labelling(store)
    manage.set_gold_every(1, "admin")
    manage.set_gold(items[0], "first", "admin")
    manage.set_gold(items[1], "second", "admin")
    crowd = [person(store, f"person {i}") for i in range(3)]
    for who in crowd:
        for _ in range(4):
            screen = labelling.next(who, "compare")
            assert screen is not None
            labelling.judge(who, screen.id, NewVote("left", token=token(), seconds=1))
    votes = store.judgements()
    on_gold = Counter(vote.annotator for vote in votes if vote.item_id in items[:2])
    assert on_gold == {f"person {i}": 2 for i in range(3)}  # each met both, once
    assert len(store.preferences()) == len(votes) - sum(on_gold.values())
    assert store.progress("main").wanted == 10
    with store.transaction(writes=False) as connection:
        found = quality(VoteReader().read(connection), overview.skips(connection))
    assert {one.annotator: one.gold_votes for one in found.annotators} == on_gold
    manage.set_gold(items[0], None, "admin")
    assert [e.new["gold"] for e in store.events() if e.entity == "item"] == ["first", "second", None]


def test_a_gold_item_comes_among_others_alone(store: Store) -> None:
    items = fill(store, 6)
    prepare(store)
    manage, labelling, ann, bo = Manage(store), Labelling(store), person(store, "ann"), person(store, "bo")
    for item in items[:4]:
        manage.set_gold(item, "first", "admin")
    manage.set_gold_every(1, "admin")
    labelling.forget()
    assert judge_all(labelling, ann) == 6
    assert [vote.gold is not None for vote in store.judgements()] == [True] * 4 + [False] * 2  # one always waits behind
    # bo had none of the four, but nothing else is left: what came now could be nothing but a gold item
    assert labelling.next(bo, "compare") is None


def test_a_skipped_gold_item_is_lost_as_another_one_would_be(store: Store, clock: Clock) -> None:
    """It has slots for everybody; an annotator who skips must not learn that from what can be taken back."""
    items = fill(store, 8)
    prepare(store)
    manage, labelling = Manage(store), Labelling(store)
    manage.set_gold(items[0], "first", "admin")
    manage.set_gold_every(1, "admin")
    ann, bo = person(store, "ann"), person(store, "bo")
    gold = labelling.next(ann, "compare")
    assert gold is not None
    labelling.skip(ann, gold.id, "")
    assert labelling.undo(ann, "compare") == gold  # nobody was given anything meanwhile
    labelling.skip(ann, gold.id, "")
    clock.time += timedelta(minutes=1)
    manage.set_gold_every(0, "admin")
    labelling.forget()
    assert labelling.next(bo, "compare") is not None
    with pytest.raises(UserError, match="somebody else has the item that you skipped"):
        labelling.undo(ann, "compare")


@pytest.mark.parametrize("taken", [False, True])
def test_a_late_gold_item_fares_as_the_one_beside_it(store: Store, clock: Clock, taken: bool) -> None:
    items = fill(store, 8)
    prepare(store)
    manage, labelling = Manage(store), Labelling(store)
    manage.set_gold(items[0], "first", "admin")
    manage.set_gold_every(1, "admin")
    ann, bo = person(store, "ann"), person(store, "bo")
    gold = labelling.next(ann, "compare")
    assert gold is not None
    beside = labelling.next(ann, "compare", [gold.id])
    assert beside is not None
    clock.time += timedelta(hours=1)
    if taken:
        assert judge_all(labelling, bo) == 8  # the gold one, six, and in the end the one whose time has run out
    for screen in (gold, beside):
        if taken:
            with pytest.raises(LeaseLost):
                labelling.judge(ann, screen.id, NewVote("left", token=token()))
        else:
            labelling.judge(ann, screen.id, NewVote("left", token=token()))


# ------------------------------------------------------------------------------------------- ranking and writing


def test_a_ranking_is_one_judgement_and_its_pairs_are_trained_on(store: Store) -> None:
    fill(store, 1, replies=4)
    prepare(store)
    assert Manage(store).ask_for("rank", 5, 1, "admin") == 1
    labelling, ann = Labelling(store), person(store, "ann")
    screen = labelling.next(ann, "rank")
    assert screen is not None
    a, b, c, d = screen.shown
    for wrong in ([[0], [1]], [[0, 1], [1, 2, 3]], [[0, 1, 2, 3], []], [[0, 1, 2, 9]]):
        with pytest.raises(UserError, match="places each response once"):
            labelling.rank(ann, screen.id, NewRanking(wrong, token=token()))
    first = labelling.rank(ann, screen.id, NewRanking([[2], [0, 1], [3]], token="rank-token", seconds=9.0, reason="so"))
    assert (
        labelling.rank(ann, screen.id, NewRanking([[2], [0, 1], [3]], token="rank-token", seconds=9.0, reason="so"))
        == first
    )
    pairs = store.preferences()
    assert {(p.chosen, p.rejected) for p in pairs if not p.tie} == {(c, a), (c, b), (c, d), (a, d), (b, d)}
    assert [{p.chosen, p.rejected} for p in pairs if p.tie] == [{a, b}]
    assert len({p.id for p in pairs}) == 6
    assert labelling.undo(ann, "rank") == screen
    assert store.preferences() == []


def test_what_people_write_is_a_demonstration_and_an_edit_is_a_pair_too(store: Store) -> None:
    fill(store, 2)
    prepare(store)
    manage, labelling, ann = Manage(store), Labelling(store), person(store, "ann")
    assert manage.ask_for_writing(1, 1, "admin") == 1
    assert manage.ask_for("edit", 1, 1, "admin") == 1
    write, edit = labelling.next(ann, "write"), labelling.next(ann, "edit")
    assert write is not None
    assert edit is not None
    assert (len(write.shown), len(edit.shown)) == (0, 1)
    with pytest.raises(UserError, match="empty"):
        labelling.write(ann, write.id, NewWriting("  ", token=token()))
    with pytest.raises(UserError, match="as it was"):
        labelling.write(ann, edit.id, NewWriting(edit.shown[0] + "\n", token=token()))
    labelling.write(ann, write.id, NewWriting("My reply\0", token=token(), seconds=4.0))
    labelling.write(ann, edit.id, NewWriting("Improved", token=token(), seconds=4.0))
    assert [d.messages[-1].content for d in store.demonstrations()] == ["My reply\ufffd", "Improved"]
    (pair,) = store.preferences()
    assert (pair.chosen, pair.rejected, pair.annotator) == ("Improved", edit.shown[0], "ann")
    assert {one.what for one in labelling.mine(ann)} == {"Improved", "My reply\ufffd"}
    labelling.undo(ann, "edit")
    assert store.preferences() == []


# -------------------------------------------------------------------------------------------------- sampling, arena


@pytest.mark.parametrize(("kind", "count"), [("compare", 3), ("rank", 4), ("thumb", 1), ("edit", 1)])
def test_responses_that_were_asked_for_are_sampled_and_queued(store: Store, kind: str, count: int) -> None:
    fill(store, 3)
    prepare(store)
    sampling = Sampling(store, fake_sources())
    with pytest.raises(UserError, match="no model"):
        sampling.request("nothing", 1, 2, 1, "compare", "admin")
    with pytest.raises(UserError, match="responses each"):
        sampling.request("sft", 1, 3, 1, "rank", "admin")
    sampling.request("sft", 2, count, 1, kind, "admin")  # type: ignore[arg-type]
    sampling.wait()
    (request,) = sampling.requests()
    assert (request["state"], request["message"]) == (
        "done",
        f"{2 * count} responses to 2 prompts, 2 items queued",
    )
    ann = person(store, "ann")
    screen = Labelling(store).next(ann, kind) if kind != "compare" else None  # type: ignore[arg-type]
    assert screen is None or all(shown.startswith("sampled") for shown in screen.shown)


def test_the_arena_tells_names_with_the_vote_only(store: Store) -> None:
    prepare(store)
    arena, ann, bo = Arena(store, fake_sources().arena), person(store, "ann"), person(store, "bo")
    id = arena.start(ann)
    with pytest.raises(UserError, match="once both have answered"):
        arena.vote(ann, id, "left", "vote-token", None)
    with pytest.raises(UserError, match="is not here"):
        arena.say(bo, id, "hello")
    said = {"left": "", "right": ""}
    for side, piece in arena.say(ann, id, "hello"):
        said[side] += piece
    assert said == {"left": "I heard: hello (1)", "right": "I heard: hello (1)"}
    assert "".join(piece for side, piece in arena.say(ann, id, "again") if side == "left") == "I heard: again (3)"
    shown = arena.current(ann)
    assert shown is not None
    assert shown.names is None
    voted = arena.vote(ann, id, "left", "vote-token", "why not")
    assert sorted(voted.names or ()) == ["secret-one", "secret-two"]
    assert arena.vote(ann, id, "left", "vote-token", None).names == voted.names
    with pytest.raises(UserError, match="has ended"):
        arena.say(ann, id, "more")
    assert arena.current(ann) is None
    rows = list(exported(store, "arena.jsonl"))
    assert [(row["turn"], row["choice"], len(row["conversation_left"])) for row in rows] == [(2, "left", 4)]


# ---------------------------------------------------------------------------------------------------------- people


def test_links_work_once_and_passwords_are_kept_as_hashes(store: Store, clock: Clock) -> None:
    door = People(store)
    secret = door.owner_link()
    cookie = door.enter(secret)
    assert cookie is not None
    assert door.enter(secret) is None
    session = door.session(cookie)
    assert session is not None
    assert (session.account.name, session.account.role) == ("owner", "admin")
    invitation = door.invite("reviewer", "owner")
    with pytest.raises(UserError, match="10 to 256 characters"):
        door.accept(invitation, "Ann", "short")
    with pytest.raises(UserError, match="taken"):
        door.accept(invitation, "owner", PASSWORD)  # and the link still holds
    joined = door.session(door.accept(invitation, " Ann ", PASSWORD))
    assert joined is not None
    assert (joined.account.name, joined.account.role) == ("Ann", "reviewer")
    with pytest.raises(UserError, match="used already"):
        door.accept(invitation, "Bo", PASSWORD)
    for name, password in (("Ann", PASSWORD + "x"), ("nobody", PASSWORD), ("owner", "")):
        with pytest.raises(WrongPassword):
            door.sign_in(name, password)
    assert door.session(door.sign_in("Ann", PASSWORD)) is not None
    late = door.invite("annotator", "owner")
    clock.time += timedelta(days=8)
    assert door.link(late) is None
    clock.time += timedelta(days=8)
    assert door.session(cookie) is None
    with store.transaction(writes=False) as connection:
        kept = [*connection.execute(select(links.c.digest)).scalars()]
        kept += [*connection.execute(select(sessions.c.digest)).scalars()]
        kept.append(connection.execute(text("SELECT password FROM accounts WHERE password IS NOT NULL")).scalar_one())
    everything = " ".join(map(str, [*kept, *store.events()]))
    assert not any(known in everything for known in (secret, invitation, cookie, PASSWORD))
    assert "$argon2id$" in everything


def test_a_guess_at_a_stolen_password_costs_what_rfc_9106_recommends() -> None:
    """Its second choice, for where memory is short: 64 MiB, three passes. (The tests' own hasher is cheap.)"""
    assert HASHER.hash(PASSWORD).startswith("$argon2id$v=19$m=65536,t=3,p=4$")


def test_a_changed_role_ends_sessions_and_the_last_admin_stays(store: Store) -> None:
    door = People(store)
    owner = door.session(door.enter(door.owner_link()) or "")
    assert owner is not None
    ann = person(store, "ann")
    cookie = door.start_session(ann)
    door.change("ann", "owner", role="reviewer")
    assert door.session(cookie) is None
    cookie = door.start_session(ann)
    door.change("ann", "owner", active=False)
    assert door.session(cookie) is None
    for change in ({"role": "annotator"}, {"active": False}):
        with pytest.raises(UserError, match="only admin"):
            door.change("owner", "owner", **change)  # type: ignore[arg-type]
    changes = [(e.old, e.new) for e in store.events() if e.action == "changed" and e.entity == "account"]
    assert changes == [
        ({"role": "annotator"}, {"role": "reviewer"}),
        ({"active": True}, {"active": False}),
    ]


# -------------------------------------------------------------------------------------------- managing, the log


def test_disagreements_are_settled_and_flags_resolved(store: Store) -> None:
    items = fill(store, 2, overlap=2)
    prepare(store)
    labelling, manage = Labelling(store), Manage(store)
    boss = person(store, "boss", "reviewer")
    for name, wanted in (("ann", "number 0"), ("bo", "number 1")):
        who = person(store, name)
        for number in range(2):
            screen = labelling.next(who, "compare")
            assert screen is not None
            labelling.flag(who, screen.id, f"odd {number}", f"{name}-flag-{number}")
            labelling.flag(who, screen.id, f"odd {number}", f"{name}-flag-{number}")
            best = next(i for i, shown in enumerate(screen.shown) if shown.endswith(wanted))
            choice = "tie" if number else ("left", "right")[best]
            labelling.judge(who, screen.id, NewVote(choice, token=token()))
    (case,) = manage.disagreements()
    item = case["id"]
    assert item in items
    assert {(vote["annotator"], vote["vote"]) for vote in case["votes"]} == {("ann", "first"), ("bo", "second")}
    manage.adjudicate(item, "first", "true", boss)
    assert manage.disagreements() == []
    manage.adjudicate(item, "second", "on second thought", boss)
    assert [row["choice"] for row in exported(store, "adjudications.jsonl")] == ["first", "second"]
    (case,) = manage.settled()
    assert (case["id"], case["word"].choice, case["word"].by, len(case["votes"])) == (item, "second", "boss", 2)
    manage.adjudicate(item, None, "", boss)  # taken back: it waits for a word again
    assert ([case["id"] for case in manage.disagreements()], manage.settled()) == ([item], [])
    assert store.events()[-1].old == {"choice": "second"}
    manage.adjudicate(item, "second", "on second thought", boss)
    # training gets that word in the place of the two votes, and every vote can still be had
    settled, *others = exported(store, "pairs.jsonl")
    assert settled["chosen"][0]["content"].endswith("number 1")
    assert (settled["annotator"], settled["settled"], len(others)) == ("", "chosen", 2)
    votes = [vote for vote in store.judgements() if vote.item_id == item]
    assert len(votes) == 2
    assert {vote.settled_by for vote in votes} == {"boss"}
    assert len(manage.flags()) == 4
    manage.resolve_flag(manage.flags()[0]["id"], "boss")
    assert len(manage.flags()) == 3


def test_models_lead_back_to_their_judgements(store: Store) -> None:
    models = Models(store, Judged(store).models)
    count, entries = models.work("reward", "trained", None, None, 0)
    assert count == 4
    assert {entry["work"].token for entry in entries} == {"ann-0", "ann-1", "a-ranking", "a-writing"}
    assert [work.token for work in models.one("ppo").parts["undone"]] == ["bo-0"]


def test_every_judgement_can_be_recomputed_from_the_log(store: Store) -> None:
    fill(store, 8, overlap=2)
    prepare(store)
    labelling = Labelling(store)
    for name in ("ann", "bo"):
        who = person(store, name)
        judge_all(labelling, who, "right")
        labelling.undo(who, "compare")
        labelling.undo(who, "compare")
    standing: dict[str, tuple] = {}
    for e in store.events():
        if e.action == "judged":
            standing[e.entity_id] = (e.actor, e.new["item"], e.new["choice"], e.guideline)
        elif e.action == "undone":
            del standing[e.entity_id]
    votes = [(v.annotator, v.item_id, v.choice, v.guideline) for v in store.judgements()]
    assert sorted(standing.values()) == sorted(votes)
    assert len(votes) == 12


def test_overlap_guidelines_and_exports(store: Store, tmp_path: Path) -> None:
    fill(store, 2)
    prepare(store)
    manage, labelling = Manage(store), Labelling(store)
    assert manage.set_overlap("main", "compare", 3, "admin") == 2
    for name in ("ann", "bo", "cy"):
        assert judge_all(labelling, person(store, name)) == 2
    assert manage.set_overlap("main", "compare", 1, "admin") == 0  # judgements that were given are not unwanted
    assert manage.add_guideline("New words", "helpful: Is it?\n\nkind: Is it kind?", "admin") == "2"
    labelling.forget()
    guideline = labelling.guideline()
    assert guideline is not None
    assert guideline.aspects == (("helpful", "Is it?"), ("kind", "Is it kind?"))
    for name in ("votes.jsonl", "votes.parquet", "pairs.jsonl", "events.jsonl", "ratings.jsonl", "rankings.jsonl"):
        assert manage.export(name, tmp_path).exists()  # type: ignore[arg-type]
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) == 6
    with pytest.raises(UserError, match="a line each"):
        parse_aspects(": no name")
    with pytest.raises(UserError, match="different names"):
        parse_aspects("a: b\na: c")


def test_what_was_queued_once_is_not_queued_again(store: Store) -> None:
    fill(store, 3, replies=4)
    with store.session() as s:  # a text that another model gave too: nobody could tell the two apart
        (same,) = s.add_responses("p0", [Completion("Answer 0, number 0")], "another model")
    prepare(store)
    manage = Manage(store)
    for kind in ("rank", "edit"):
        assert [manage.ask_for(kind, 2, 1, "admin") for _ in range(3)] == [2, 1, 0]  # type: ignore[arg-type]
    assert [manage.ask_for_writing(2, 1, "admin") for _ in range(3)] == [2, 1, 0]
    # a pair of each prompt at a time, until all six of each are there
    assert [manage.ask_for("compare", 10, 1, "admin") for _ in range(7)] == [3] * 6 + [0]
    with store.transaction(writes=False) as connection:
        keys = set(connection.execute(text("SELECT key FROM items WHERE batch = 'people'")).scalars())
    assert len(keys) == 18
    assert not any(str(same) in key.split("-") for key in keys)
    added = [e for e in store.events() if e.action == "added" and e.entity == "batch" and e.entity_id == "people"]
    assert [e.new["items"] for e in added] == [3] * 6


def test_the_overview_counts_everything_that_people_did(store: Store) -> None:
    fill(store, 2, replies=4)
    prepare(store)
    manage, labelling, ann, bo = Manage(store), Labelling(store), person(store, "ann"), person(store, "bo")
    for kind in ("rank", "edit"):
        manage.ask_for(kind, 1, 1, "admin")  # type: ignore[arg-type]
    assert judge_all(labelling, ann) == 2
    ranked, edited = labelling.next(bo, "rank"), labelling.next(bo, "edit")
    assert ranked is not None
    assert edited is not None
    labelling.rank(bo, ranked.id, NewRanking([[0], [1], [2, 3]], token=token(), seconds=1))
    labelling.write(bo, edited.id, NewWriting("better", token=token(), seconds=1))
    found = manage.overview()
    assert (found.done, found.annotators) == ({"compare": 2, "rank": 1, "edit": 1}, 2)
    assert [(day.done, day.annotators) for day in found.days] == [(4, 2)]


def test_habits_name_those_to_look_at(store: Store) -> None:
    fill(store, 40, overlap=3)
    world = World(store, items=0)
    labelling = Labelling(store)
    for name, seconds in (("careful", 9.0), ("hasty", 0.5), ("third", 8.0)):
        who = person(store, name)
        for number in range(40):
            screen = labelling.next(who, "compare")
            assert screen is not None
            best = next(i for i, shown in enumerate(screen.shown) if shown.endswith("number 0"))
            choice = "left" if name == "hasty" else "tie" if number % 8 == 0 else ("left", "right")[best]
            labelling.judge(who, screen.id, NewVote(choice, token=token(), seconds=seconds))
    assert world.items == []
    found = {one.annotator: one for one in Manage(store).quality("people").annotators}
    assert found["careful"].with_others == 1.0
    # Where the better one stands is drawn at random: by chance nearly all may stand on one side.
    assert set(found["careful"].warnings) <= {"prefers the left side", "prefers the right side"}
    assert set(found["hasty"].warnings) >= {"prefers the left side", "takes 0.5 s an item"}
    assert found["hasty"].left == 1.0
    assert work.RANKED[0] == 4
