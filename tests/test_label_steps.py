"""Labels on the steps of replies: asked for, given in the app, kept in both databases, exported, imported, read by
training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from databases import Clock
from labelling_world import SECRET_META, World, person, token

from keel.cli import main
from keel.cli.label_steps import order_of, splitter
from keel.feedback.step_agreement import Judged, step_agreement
from keel.feedback.stored import training_steps
from keel.recipe.sections import SamplingConfig
from keel.recipe.steps import Steps
from keel.store import Store, lineage, overview, people, step_files, steps
from keel.store.paging import Wanted
from keel.store.step_records import NewSteps, StepJudgement
from keel.store.trained_on import vote_hashes
from keel.types import Completion, Message, Prompt, UserError
from keel.web.service.labelling import Labelling
from keel.web.service.manage import Manage
from keel.web.service.people import People
from keel.web.service.start import prepare
from keel.web.service.step_habits import step_quality
from keel.web.service.steps import StepWork, begin

LINES = ("Three and four: 3 + 4 = 7\n", "Twice that: 7 * 2 = 15\n", "The answer is 15.")
REPLY = "".join(LINES)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def url(new_url: Callable[[], str]) -> str:
    return new_url()


@pytest.fixture
def store(url: str, clock: Clock) -> Iterator[Store]:
    with Store(url, clock=clock) as store:
        yield store


@pytest.fixture
def file_store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "feedback.db") as store:
        yield store


def fill(store: Store, replies: int = 3, texts: tuple[str, ...] = ()) -> list[int]:
    """A prompt with an answer for each reply of three lines (or of ``texts``); the replies' ids."""
    found = []
    with store.session() as session:
        for i, text in enumerate(texts or (REPLY,) * replies):
            session.add_prompts([Prompt(f"p{i}", (Message("user", f"Sum {i}?"),), "ledger", {"answer": "14"})])
            found += session.add_responses(f"p{i}", [Completion(text)], "model", SamplingConfig(), fingerprint="f")
    return found


def ask(store: Store, ids: list[int], overlap: int = 1, ranked: set[int] | None = None) -> list[int]:
    with store.transaction(writes=True) as connection:
        return steps.add_steps(connection, ids, Steps(), overlap, "steps", store.now, ranked)


def given(store: Store) -> list[StepJudgement]:
    with store.transaction(writes=False) as connection:
        return steps.given(connection)


def bad(**more: Any) -> NewSteps:
    """The second of three steps is the first bad one."""
    return NewSteps(("good", "bad", None), "found_error", token=more.pop("token", token()), **more)


def right(**more: Any) -> NewSteps:
    return NewSteps(("good", "neutral", "unsure"), "solution", token=token(), **more)


def test_a_judgement_is_counted_once_taken_back_and_learned_from(store: Store, url: str) -> None:
    ask(store, fill(store))
    prepare(store)
    labelling, ann, bo = Labelling(store), person(store, "ann"), person(store, "bo")
    screen = labelling.next(ann, "step")
    assert screen is not None
    assert screen.sheet is not None
    assert screen.sheet == steps.Sheet(LINES, "14")
    again = bad(
        reasons=("sum",), correction=" 7 * 2 = 14\0 ", reference_shown=True, seconds=9.0, step_seconds=(4, 5, 0)
    )
    first = labelling.label_steps(ann, screen.id, again)
    assert labelling.label_steps(ann, screen.id, again) == first
    with pytest.raises(UserError, match="not yours"):
        labelling.label_steps(bo, screen.id, bad())
    with pytest.raises(UserError, match="judged already"):
        labelling.label_steps(ann, screen.id, right())
    (one,) = given(store)
    assert (one.labels, one.reasons, one.correction) == (("good", "bad", None), ("sum",), "7 * 2 = 14\ufffd")
    assert (one.reference_shown, one.seconds, one.step_seconds, one.guideline) == (True, 9.0, (4, 5, 0), "1")
    with store.transaction(writes=False) as connection:
        reply, corrected = steps.labels(connection)
    assert (reply.steps, reply.labels, reply.finished) == (LINES, (1.0, 0.0, None), True)
    assert (corrected.steps, corrected.labels) == ((LINES[0], "7 * 2 = 14\ufffd"), (None, 1.0))
    assert (corrected.id, corrected.finished) == (f"{reply.id}/corrected", False)
    assert labelling.progress(ann, "step").today == 1
    assert [(past.kind, past.what) for past in labelling.mine(ann)] == [("step", "step 2 is the first bad one")]
    assert Manage(store).overview().done == {"compare": 0, "step": 1}
    learned = vote_hashes(url)
    assert learned.steps
    assert not learned.people
    back = labelling.undo(ann, "step")
    assert back is not None
    assert back.said is not None
    assert (back.id, back.sheet, back.said["labels"]) == (screen.id, screen.sheet, ["good", "bad", None])
    assert back.said["correction"] == "7 * 2 = 14\ufffd"
    assert not given(store)
    assert vote_hashes(url).steps != learned.steps
    labelling.label_steps(ann, screen.id, right())
    told = [event for event in store.events() if event.entity == "step judgement"]
    assert [event.action for event in told] == ["labelled", "undone", "labelled"]
    assert told[1].old["labels"] == ["good", "bad", None]
    with store.transaction(writes=False) as connection:
        assert {work.kind for work in lineage.works(connection).values()} == {"step"}


@pytest.mark.parametrize(
    ("labels", "outcome", "more", "says"),
    [
        (("good", "bad", "good"), "found_error", {}, "a step after step 2 has a label"),
        (("good", None, "bad"), "found_error", {}, "step 2 has no label"),
        (("good", "good", "good"), "found_error", {}, "no step is bad"),
        (("good", None, "good"), "solution", {}, "step 2 has no label"),
        (("good", "good", "bad"), "solution", {}, "a solution has no bad step"),
        (("good", "bad", None), "give_up", {"note": "hm"}, "step 2 is bad, so the error is found"),
        (("good", None, None), "give_up", {"note": " "}, "say in note why"),
        (("good", "great", None), "give_up", {"note": "x"}, "the label 'great' is unknown"),
        (("good", "bad", None), "maybe", {}, "the outcome 'maybe' is unknown"),
        (("good", "bad", None), "found_error", {"reasons": ("ugly",)}, "the reason 'ugly' is unknown"),
        (("good", "bad", None), "found_error", {"reasons": ("sum", "sum")}, "a reason comes twice"),
        (("good", "good", "good"), "solution", {"correction": "x"}, "belong to a bad step"),
        (("good", "good", "good"), "solution", {"step_seconds": (1.0,)}, "1 times for 3 steps"),
        (("good", "good", "good"), "solution", {"step_seconds": (1, 1, float("nan"))}, "a time that is none"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(labels: Any, outcome: Any, more: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        NewSteps(labels, outcome, token="t", **more)


def test_what_of_it_is_learned(file_store: Store) -> None:
    """Neutral as the recipe says, unsure and what follows the first bad step never, bad problems not at all."""
    ask(file_store, fill(file_store, 4))
    labelling, ann = Labelling(file_store), person(file_store, "ann")
    said = [
        right(),
        bad(),
        NewSteps(("good", None, None), "give_up", note="too long for me", token=token()),
        NewSteps((None, None, None), "bad_problem", note="no question", token=token()),
    ]
    for one in said:
        screen = labelling.next(ann, "step")
        assert screen is not None
        labelling.label_steps(ann, screen.id, one)
    with file_store.transaction(writes=False) as connection:
        numbers = {how: [one.labels for one in steps.labels(connection, how)] for how in ("good", "bad", "out")}  # type: ignore[arg-type]
    rest = [(1.0, 0.0, None), (1.0, None, None)]
    assert numbers == {
        "good": [(1.0, 1.0, None), *rest], "bad": [(1.0, 0.0, None), *rest], "out": [(1.0, None, None), *rest],
    }  # fmt: skip


def test_a_label_belongs_to_the_step_that_was_looked_at(file_store: Store) -> None:
    """Another way to cut changes nothing that is queued; another number of labels is refused."""
    ask(file_store, fill(file_store, 2))
    labelling, ann = Labelling(file_store), person(file_store, "ann")
    fill(file_store, texts=(REPLY, REPLY, REPLY.upper()))
    with pytest.raises(UserError, match="each of the 1 replies that are left is a single step by blank_line"):
        StepWork(file_store).queue(Steps(by="blank_line"), 10, 1, "boss")
    screen = labelling.next(ann, "step")
    assert screen is not None
    assert screen.sheet is not None
    assert screen.sheet.steps == LINES
    with pytest.raises(UserError, match="2 labels for 3 steps"):
        labelling.label_steps(ann, screen.id, NewSteps(("good", "good"), "solution", token=token()))
    with pytest.raises(UserError, match="is a single step by marker '##'"), file_store.transaction(True) as connection:
        steps.add_steps(connection, [1], Steps(by="marker", marker="##"), 1, "other", file_store.now)


def test_a_queue_in_an_order_keeps_a_share_at_random(file_store: Store, clock: Clock) -> None:
    ids = fill(file_store, texts=(*tuple(f"{REPLY} ({i})" for i in range(20)), "one step"))
    gains = {id: float(id) for id in ids[:20]}
    work = StepWork(file_store, lambda replies: {reply.id: gains[reply.id] for reply in replies})
    assert work.queue(Steps(), 10, 1, "boss") == 10
    with file_store.transaction(writes=False) as connection:
        rows = overview.browse(connection, "step", None, False, Wanted(size=50))
        drawn = {row.item_id: row.drawn for row in connection.execute(steps.step_items.select())}
    order = [(int(row["key"].partition("/")[2]), drawn[row["id"]]) for row in sorted(rows, key=lambda row: row["turn"])]
    ranked = [id for id, how in order if how == "ranked"]
    assert len(ranked) == 8
    assert ranked == sorted(ranked, reverse=True)
    at_random = {id for id, how in order if how == "random"}
    assert ranked == [id for id in sorted(gains, reverse=True) if id not in at_random][:8]
    labelling, ann = Labelling(file_store), person(file_store, "ann")
    for id, _ in order[:3]:  # they come so
        screen = labelling.next(ann, "step")
        assert screen is not None
        assert screen.shown == (f"{REPLY} ({ids.index(id)})",)
        labelling.label_steps(ann, screen.id, right())
    with file_store.transaction(writes=False) as connection:
        random = {one.id for one in steps.labels(connection, drawn="random")}
    assert random == {one.token for one in given(file_store) if one.drawn == "random"}
    assert work.queue(Steps(), 100, 1, "boss") == 10  # the others; the single step is none
    with pytest.raises(UserError, match="each of the 1 replies that are left is a single step by line"):
        work.queue(Steps(), 100, 1, "boss")


def test_an_order_of_few_replies_is_filled_up(file_store: Store) -> None:
    ids = fill(file_store, 12)
    assert StepWork(file_store, lambda _: {ids[3]: 1.0, ids[7]: 2.0}).queue(Steps(), 10, 1, "boss") == 10
    with file_store.transaction(writes=False) as connection:
        rows = overview.browse(connection, "step", None, False, Wanted(size=50))
        drawn = {row.item_id: row.drawn for row in connection.execute(steps.step_items.select())}
    ranked = [row["key"] for row in sorted(rows, key=lambda row: row["turn"]) if drawn[row["id"]] == "ranked"]
    assert len(ranked) == 8
    known = [key for key in (f"step/{ids[7]}", f"step/{ids[3]}") if key in ranked]  # else they were drawn
    assert ranked[: len(known)] == known


def test_without_an_order_all_are_random(file_store: Store) -> None:
    fill(file_store, 4)
    assert StepWork(file_store).queue(Steps(), 3, 2, "boss") == 3
    with file_store.transaction(writes=False) as connection:
        assert {row.drawn for row in connection.execute(steps.step_items.select())} == {"random"}
    (queue,) = Manage(file_store).queues()
    assert (queue.kind, queue.items, queue.wanted) == ("step", 3, 6)


def test_the_reference_answer_is_shown_where_it_may_be(file_store: Store) -> None:
    ask(file_store, fill(file_store, 2))
    world_store, work = file_store, StepWork(file_store)
    labelling, ann = Labelling(world_store), person(world_store, "ann")
    shown = labelling.next(ann, "step")
    assert shown is not None
    assert shown.sheet is not None
    assert shown.sheet.reference == "14"
    work.allow_reference(False, "boss")
    hidden = labelling.next(ann, "step", [shown.id])
    assert hidden is not None
    assert hidden.sheet is not None
    assert hidden.sheet.reference is None
    assert not work.settings().reference


def test_late_labels_count_beside_those_of_somebody_else(tmp_path: Path, clock: Clock) -> None:
    """It takes long to label: what comes after its time makes a slot of its own."""
    with Store(tmp_path / "late.db", clock=clock) as store:
        ask(store, fill(store, 1))
        labelling, ann, bo = Labelling(store), person(store, "ann"), person(store, "bo")
        late = labelling.next(ann, "step")
        clock.time += timedelta(hours=1)
        other = labelling.next(bo, "step")
        assert late is not None
        assert other is not None
        labelling.label_steps(bo, other.id, right())
        labelling.label_steps(ann, late.id, bad())
        assert sorted(one.annotator for one in given(store)) == ["ann", "bo"]


def test_nobody_has_a_reply_twice_and_gold_items_are_never_learned(store: Store, url: str) -> None:
    ids = fill(store, 4)
    items = ask(store, ids, overlap=2)
    with store.transaction(writes=True) as connection:
        steps.add_steps(connection, ids, Steps(), 1, "more", store.now)
        people.set_setting(connection, "gold_every", 1, "boss", store.now)
    manage, labelling = Manage(store), Labelling(store)
    with pytest.raises(UserError, match="the answer '4' is unknown; give right or 1 or 2 or 3"):
        manage.set_gold(items[0], "4", "boss")
    manage.set_gold(items[0], "2", "boss")
    (gold,) = manage.browse("step", None, True, 0)
    assert [number for number, _ in gold["numbers"]] == ["1", "2", "3"]
    for who, say in (("ann", bad), ("bo", right)):
        one = person(store, who)
        count = 0
        while (screen := labelling.next(one, "step")) is not None:
            labelling.label_steps(one, screen.id, say())
            count += 1
        assert count == 4  # the gold item, and each of the three others once, whichever queue it came from
    with store.transaction(writes=False) as connection:
        found = step_quality(steps.votes(connection, ("person",)))
        learned = steps.labels(connection)
    assert {one.annotator: (one.gold, one.gold_given) for one in found.annotators} == {"ann": (1.0, 1), "bo": (0.0, 1)}
    assert len(learned) == 6
    assert vote_hashes(url).steps


def test_agreement_by_hand() -> None:
    """Three replies of two people: the same error, the next step, an error against none. Of pairs: 1 of 3 exact, 2 of 3
    near. Alpha by Krippendorff's steps on the four units with two values: good-good, bad-bad, good-bad, good-good, with
    the later ones missing."""
    a = [("good", "bad", None), ("bad", None), ("good", "good")]
    b = [("good", "bad", None), ("good", "bad"), ("good", "bad")]
    found = [
        Judged(item, f"p{item}", labels, True, item == 0)
        for said in (a, b)
        for item, labels in enumerate(said)
    ]  # fmt: skip
    agreement = step_agreement(found, bootstrap=50)
    assert agreement.exact is not None
    assert agreement.near is not None
    assert agreement.alpha is not None
    assert (agreement.exact.point, agreement.near.point, agreement.exact.count) == (1 / 3, 2 / 3, 3)
    # pairs (g,g) (b,b) (b,g) (g,g) (g,b): 10 values, 6 good and 4 bad; D_o = 4/10, D_e = 2*6*4/(10*9)
    assert agreement.alpha.point == pytest.approx(1 - (4 / 10) / (2 * 6 * 4 / 90))
    assert agreement.alpha.items == 5
    assert agreement.wrong is not None
    assert (agreement.wrong.point, agreement.wrong.count) == (1.0, 2)
    alone = step_agreement(found[:3])
    assert (alone.exact, alone.near, alone.alpha) == (None, None, None)
    unsure = step_agreement([Judged(0, "p", ("unsure",), True, True), Judged(0, "p", ("good",), True, True)])
    assert unsure.alpha is None
    assert unsure.exact is not None
    assert unsure.exact.point == 1.0


# ---------------------------------------------------------------------------------------------------------- in and out


def test_out_and_in_again(new_url: Callable[[], str], tmp_path: Path) -> None:
    with Store(new_url()) as store, Store(new_url()) as copy:
        items = ask(store, fill(store, 4), overlap=2, ranked={1})
        labelling, ann = Labelling(store), person(store, "ann")
        said = [
            bad(
                reasons=("number", "follow"),
                correction="so",
                reference_shown=True,
                seconds=3.0,
                step_seconds=(1, 2, None),
            ),
            right(),
            NewSteps((None, "good", None), "give_up", note="lost", token=token()),
            NewSteps((None, None, None), "bad_problem", token=token()),
        ]
        for one in said:
            screen = labelling.next(ann, "step")
            assert screen is not None
            labelling.label_steps(ann, screen.id, one)
        Manage(store).set_gold(items[1], "right", "boss")
        Manage(store).take_out("item", str(items[2]), "", None, ann)
        for name in ("steps.jsonl", "steps.parquet"):
            assert step_files.export(store, tmp_path / name) == 4
            assert step_files.read(tmp_path / name) == [replaced(one) for one in given(store)]
        read = step_files.read(tmp_path / "steps.parquet")
        for expected in (4, 0):
            with copy.transaction(writes=True) as connection:
                assert step_files.add(connection, read, None, copy.now) == expected
        here = {one.token: one for one in given(copy)}
        assert here.keys() == {one.token for one in read}
        for one in read:
            two = here[one.token]
            assert (two.labels, two.outcome, two.gold, two.out, two.drawn, two.correction, two.steps) == (
                one.labels, one.outcome, one.gold, one.out, one.drawn, one.correction, one.steps,
            )  # fmt: skip
        rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
        learned = {tuple(row["labels"]) for row in rows}
        assert all(set(row) == set(step_files.COLUMNS) for row in rows)
        assert all(row["labels"] == [None] * 3 for row in rows if row["gold"] or row["out"])
        assert len(learned) > 1 or all(row["out"] or row["gold"] for row in rows)


def replaced(one: StepJudgement) -> StepJudgement:
    """As a file has it: the response's number is the database's own."""
    return replace(one, response=replace(one.response, id=0))


def test_plain_rows_are_what_training_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    db = str(tmp_path / "a.db")
    with Store(db) as store:
        ask(store, fill(store, 1))
        ann = person(store, "ann")
        screen = Labelling(store).next(ann, "step")
        assert screen is not None
        Labelling(store).label_steps(ann, screen.id, bad(correction="7 * 2 = 14"))
    assert main(["export", db, str(tmp_path / "plain.jsonl"), "--steps", "--plain"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "plain.jsonl").read_text().splitlines()]
    assert [(row["completions"], row["labels"]) for row in rows] == [
        (list(LINES), [1.0, 0.0, None]), ([LINES[0], "7 * 2 = 14"], [None, 1.0]),
    ]  # fmt: skip
    assert main(["export", db, str(tmp_path / "all.jsonl"), "--steps"]) == 0
    assert main(["import", str(tmp_path / "b.db"), str(tmp_path / "all.jsonl")]) == 0
    assert main(["import", str(tmp_path / "b.db"), str(tmp_path / "all.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "1 replies in steps imported\n" in said
    assert "0 replies in steps imported (1 were there already)" in said
    row = json.loads((tmp_path / "all.jsonl").read_text())
    for wrong, says in (
        ({"marks": ["good", "bad"]}, "2 marks for 3 completions"),
        ({"marks": ["bad", "bad", None]}, "a step after step 1 has a label"),
        ({"completions": [REPLY, "", ""]}, "completions are no steps by line"),
        ({"drawn": "so"}, "drawn 'so'"),
        ({"steps": {"by": "word"}}, "steps"),
    ):
        (tmp_path / "wrong.jsonl").write_text(json.dumps(row | wrong) + "\n")
        assert main(["import", db, str(tmp_path / "wrong.jsonl")]) == 2
        assert says in capsys.readouterr().err


def test_what_is_erased_is_learned_no_more(store: Store, url: str, tmp_path: Path) -> None:
    ids = fill(store, 2)
    ask(store, ids, overlap=2)
    labelling, ann, boss = Labelling(store), person(store, "ann"), person(store, "boss", "admin")
    for secret in ("call the harbour master", "my name is Annabella, of the lighthouse"):
        screen = labelling.next(ann, "step")
        assert screen is not None
        labelling.label_steps(ann, screen.id, bad(correction=secret))
    manage = Manage(store)
    manage.erase("response", str(ids[0]), boss)
    assert len(given(store)) == 1
    with store.transaction(writes=False) as connection:
        assert len(steps.votes(connection, ("person",))) == 2  # figures stay
    People(store).erase("ann", True, "boss")
    with store.transaction(writes=False) as connection:
        (one,) = steps.labels(connection)  # the labels stay, the line is gone
    assert (one.labels, one.annotator) == ((1.0, 0.0, None), "erased person 1")
    told = json.dumps([[event.old, event.new] for event in store.events()])
    assert "harbour" not in told  # words that no token can hold: digits and a name of three letters come by chance
    assert "lighthouse" not in told


# ------------------------------------------------------------------------------------------------- stages, keel label


def test_a_stage_keeps_what_it_began_with(tmp_path: Path, file_store: Store) -> None:
    store, url = file_store, f"sqlite:///{tmp_path}/feedback.db"
    ids = fill(store, 2)
    ask(store, ids, ranked={ids[0]})
    labelling, ann = Labelling(store), person(store, "ann")
    for _ in ids:
        screen = labelling.next(ann, "step")
        assert screen is not None
        labelling.label_steps(ann, screen.id, bad(correction="so"))
    found, random = training_steps(tmp_path, url, "good")
    assert len(found) == 4
    (measured,) = random  # not the one that was ranked, and no line that somebody wrote
    assert [one.id for one in found if one.id in random and one.steps == LINES] == [measured]
    labelling.undo(ann, "step")
    assert training_steps(tmp_path, url, "good") == (found, random)


def test_keel_label_asks_where_a_run_has_steps(tmp_path: Path, file_store: Store) -> None:
    assert splitter(None, None) is None
    assert splitter(None, "marker:ки") == Steps(by="marker", marker="ки")
    for wrong in ("word", "marker", "line:x"):
        with pytest.raises(UserError, match="give line, blank_line or marker:TEXT"):
            splitter(None, wrong)
    fill(file_store, texts=(REPLY, REPLY + " Right.", "no steps"))
    rows = [
        {"prompt": "Sum 1?", "completions": [*LINES[:2], LINES[2] + " Right."], "priority": 2},
        {"prompt": [{"role": "user", "content": "Sum 0?"}], "completion": REPLY, "priority": 1},
    ]
    (tmp_path / "order.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    order = order_of(str(tmp_path / "order.jsonl"))
    with file_store.transaction(writes=False) as connection:
        found, single = steps.open_replies(connection, Steps())
    assert ([reply.steps[2] for reply in found], single) == ([LINES[2], LINES[2] + " Right."], 1)
    assert order(found) == {found[0].id: 1.0, found[1].id: 2.0}
    with pytest.raises(UserError, match="none of its replies is in the store"):
        order([])
    assert begin(file_store, Steps(), order) == 2
    assert begin(file_store, Steps(), order) == 0  # once
    (tmp_path / "order.jsonl").write_text('{"prompt": "Sum 1?", "priority": 2}\n')
    with pytest.raises(UserError, match="expected prompt, completion"):
        order_of(str(tmp_path / "order.jsonl"))


# ------------------------------------------------------------------------------------------------------------ the app


def test_steps_over_http(tmp_path: Path) -> None:
    with Store(tmp_path / "feedback.db") as store:
        world = World(store, items=0)
        fill(store, texts=(REPLY + " <b>x</b>", REPLY))
        admin, ann = world.client("admin", "admin"), world.client("ann")
        assert "/steps" not in ann.get("/compare").text
        nothing = admin.form("/manage/steps/queue", by="marker", replies="2", overlap="1")
        assert (nothing.status_code, "a marker goes with steps" in nothing.text) == (400, True)
        assert admin.form("/manage/steps/queue", by="line", replies="2", overlap="1").status_code == 303
        assert "/steps" in ann.get("/compare").text
        answer = ann.api("next", {"kind": "step"})
        item = answer.json()["item"]
        assert set(item) == {"id", "kind", "messages", "steps", "html", "reference"}
        assert not any(
            word in answer.text for word in ("model", "gold", "fingerprint", "random", "ranked", SECRET_META)
        )
        body = {"assignment": item["id"], "token": token(), "labels": ["good", "bad", None], "outcome": "found_error"}
        for wrong in ({"labels": ["good", 1, None]}, {"outcome": "x"}, {"seconds": -1}, {"score": 1}):
            assert ann.api("steps", body | {"token": token()} | wrong).status_code == 422
        assert ann.api("steps", body | {"labels": ["good", "bad"]}).status_code == 400
        assert ann.api("steps", body).json()["progress"] == {"today": 1, "done": 1, "wanted": 2}
        assert ann.api("steps", body).json()["progress"] == {"today": 1, "done": 1, "wanted": 2}  # sent again
        undone = ann.api("undo", {"kind": "step"}).json()
        assert (undone["item"]["id"], undone["item"]["said"]["labels"]) == (item["id"], ["good", "bad", None])
        assert ann.api("steps", body | {"token": token()}).status_code == 200
        assert admin.form("/manage/steps/reference").status_code == 303
        assert ann.api("next", {"kind": "step"}).json()["item"]["reference"] is None
        for page in ("/manage/quality", "/manage/gold?kind=step", "/manage", "/manage/queue", "/manage/prompts"):
            assert admin.get(page).status_code == 200
        assert "Replies in steps" in admin.get("/manage/quality").text
        assert "step 2 is the first bad one" in ann.get("/mine").text
        (row,) = map(json.loads, admin.get("/manage/export/steps.jsonl").text.splitlines())
        assert (row["marks"], row["labels"], row["annotator"]) == (["good", "bad", None], [1.0, 0.0, None], "ann")
        gold = admin.form("/manage/gold/1", answer="3", kind="step")
        assert gold.headers["location"] == "/manage/gold?kind=step"
