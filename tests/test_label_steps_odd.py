"""Labels on the steps of replies where things are not as planned: other cuts, other files, other queues, other tabs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from labelling_world import World, person, token
from sqlalchemy import create_engine, insert
from test_label_steps import LINES, REPLY, ask, bad, fill, given, right

from keel.data.sources import read_steps
from keel.recipe.sections import SamplingConfig
from keel.recipe.steps import Steps
from keel.store import Store, lineage, overview, people, people_tables, review, step_files, steps, tables, thumbs, work
from keel.store.engine import alembic_config, parse_url
from keel.store.paging import Wanted
from keel.store.records import NewThumb
from keel.store.step_records import NewSteps, StepJudgement
from keel.types import Completion, Message, Prompt, UserError
from keel.web.service.labelling import Labelling
from keel.web.service.manage import Manage
from keel.web.service.steps import StepWork

TWO_PARTS = "So: 3 + 4 = 7\nthat is 7\n\nThe answer is 7."  # three lines, two blocks


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "feedback.db") as store:
        yield store


def judged(store: Store, said: NewSteps, name: str = "ann") -> None:
    labelling, who = Labelling(store), person(store, name)
    screen = labelling.next(who, "step")
    assert screen is not None
    labelling.label_steps(who, screen.id, said)


def add(store: Store, new: list[StepJudgement], batch: str | None = None) -> int:
    with store.transaction(writes=True) as connection:
        return step_files.add(connection, new, batch, store.now)


# --------------------------------------------------------------------------------------------------------------- files


def test_labels_stay_on_their_steps(new_url: Callable[[], str], tmp_path: Path) -> None:
    """Here by blocks, there by lines, in queues of one name."""
    with Store(new_url()) as here, Store(new_url()) as there:
        for store, split in ((here, Steps(by="blank_line")), (there, Steps())):
            ids = fill(store, texts=(TWO_PARTS,))
            with store.transaction(writes=True) as connection:
                steps.add_steps(connection, ids, split, 2, "steps", store.now)
        judged(here, NewSteps(("good", "bad"), "found_error", token=token()))
        judged(there, NewSteps(("good", "bad", None), "found_error", token=token()), "bo")
        step_files.export(there, tmp_path / "steps.jsonl")
        read = step_files.read(tmp_path / "steps.jsonl")
        assert add(here, read) == 1
        lines = ("So: 3 + 4 = 7\n", "that is 7\n\n", "The answer is 7.")
        expected = [(("".join(lines[:2]), lines[2]), (1.0, 0.0)), (lines, (1.0, 0.0, None))]
        with here.transaction(writes=False) as connection:
            assert [(one.steps, one.labels) for one in steps.labels(connection)] == expected
        step_files.export(here, tmp_path / "both.jsonl")
        with Store(new_url()) as third:  # brought into one queue they are still two
            assert add(third, step_files.read(tmp_path / "both.jsonl"), batch="all") == 2
            with third.transaction(writes=False) as connection:
                assert [(one.steps, one.labels) for one in steps.labels(connection)] == expected
        again = [replace(one, token=token(), annotator="cy") for one in read]
        assert add(here, again) == 1
        items = {one.token: one.batch for one in given(here)}
        assert items[again[0].token] == items[read[0].token]  # they are of one item, so that they can agree


def test_an_older_store_keeps_its_work_and_takes_steps(new_url: Callable[[], str]) -> None:
    """The schema before there were steps, with a thumb in it."""
    url = new_url()
    engine = create_engine(parse_url(url))
    with engine.begin() as connection:
        command.upgrade(alembic_config(connection), "0010")
        now = datetime(2026, 11, 1, 12, tzinfo=UTC)
        asked = {"id": "p", "messages": [{"role": "user", "content": "What?"}], "kind": "", "meta": {"answer": 15}}
        connection.execute(insert(tables.prompts), asked | {"created": now})
        made = {"prompt_id": "p", "finished": True, "model": "m", "fingerprint": "f", "sampling": None, "created": now}
        connection.execute(insert(tables.responses), made | {"text": REPLY, "key": "k"})
        (item,) = work.add_thumbs(connection, [1], 1, "thumb", now)
        ann = people.add_account(connection, "ann", "annotator", None, "test", now)
        given = {"item_id": item, "annotator_id": ann.annotator_id, "shown": [1], "state": "judged", "handle": "h" * 22}
        connection.execute(insert(tables.assignments), given | {"leased_at": now, "expires_at": now})
        thumb = {"assignment_id": 1, "token": "t", "up": True, "created": now}
        connection.execute(insert(people_tables.thumbs), thumb)
    engine.dispose()
    with Store(url) as store:
        with store.transaction(writes=False) as connection:
            assert [one.token for one in thumbs.given(connection, None)] == ["t"]
        assert StepWork(store).queue(Steps(), 5, 1, "boss") == 1
        judged(store, bad(correction="so"), "bo")
        with store.transaction(writes=False) as connection:
            assert [one.labels for one in steps.labels(connection)] == [(1.0, 0.0, None), (None, 1.0)]
            assert sorted(work.kind for work in lineage.works(connection).values()) == ["step", "thumb"]


def test_an_id_that_is_something_else_here_is_no_news(store: Store, tmp_path: Path) -> None:
    ask(store, fill(store, 1))
    judged(store, bad(token="known-token", correction="so"))
    step_files.export(store, tmp_path / "steps.jsonl")
    (one,) = step_files.read(tmp_path / "steps.jsonl")
    assert add(store, [one]) == 0
    assert add(store, [replace(one, correction="[erased]")]) == 0  # gone elsewhere
    for other in (
        replace(one, response=replace(one.response, text="Other: 1\nlines: 2\nhere: 3")),
        replace(one, prompt=Prompt("p9", one.prompt.messages), response=replace(one.response, prompt_id="p9")),
        replace(one, outcome="bad_problem"),
        replace(one, reasons=("sum",)),
        replace(one, correction="another line"),
    ):
        with pytest.raises(UserError, match="'known-token' are there with other contents"):
            add(store, [other])
    Manage(store).erase("response", "1", person(store, "boss", "admin"))
    assert add(store, [one]) == 0  # nothing of it comes back


# ---------------------------------------------------------------------------------------------------------- gold, queue


@pytest.mark.parametrize("kind", ["step", "thumb"])
def test_a_reply_comes_once_though_it_is_a_gold_item_elsewhere(store: Store, kind: str) -> None:
    """Twice is how one could tell."""
    ids = fill(store, texts=tuple(f"{REPLY} ({i})" for i in range(4)))
    with store.transaction(writes=True) as connection:
        if kind == "step":
            queues = [steps.add_steps(connection, ids, Steps(), 1, name, store.now) for name in ("a", "b")]
        else:
            queues = [work.add_thumbs(connection, ids, 1, name, store.now) for name in ("a", "b")]
        people.set_setting(connection, "gold_every", 0, "boss", store.now)
    manage, ann = Manage(store), person(store, "ann")
    seen = []
    for every in (0, 1):  # first two plain ones, then gold ones as long as there are any
        manage.set_gold_every(every, "boss")
        labelling = Labelling(store)
        while (screen := labelling.next(ann, kind)) is not None:  # type: ignore[arg-type]
            seen.append(screen.shown[0])
            if kind == "step":
                labelling.label_steps(ann, screen.id, right())
            else:
                labelling.thumb(ann, screen.id, NewThumb(True, token=token()))
            if every == 0 and len(seen) == 2:
                break
        if every == 0:
            for item in queues[1]:
                manage.set_gold(item, "right" if kind == "step" else "up", "boss")
    assert sorted(seen) == sorted(f"{REPLY} ({i})" for i in range(4))


def test_a_queue_that_is_put_first_keeps_its_order(store: Store) -> None:
    ids = fill(store, texts=tuple(f"{REPLY} ({i})" for i in range(12)))
    ask(store, ids[:8], ranked=set(ids[:8]))
    with store.transaction(writes=True) as connection:
        steps.add_steps(connection, ids[8:], Steps(), 1, "urgent", store.now)
        review.put_first(connection, "urgent", "step", "boss", store.now)
        review.put_first(connection, "steps", "step", "boss", store.now)
    with store.transaction(writes=False) as connection:
        rows = overview.browse(connection, "step", None, False, Wanted(size=50))
    order = [row["key"] for row in sorted(rows, key=lambda row: (row["turn"], row["place"]))]  # as they are given out
    assert order[:8] == [f"step/{id}" for id in ids[:8]]


def test_with_an_order_and_nothing_left_it_says_so(store: Store) -> None:
    def gains(replies: object) -> dict[int, float]:
        raise UserError("none of its replies is in the store")

    work = StepWork(store, gains)
    assert work.queue(Steps(), 5, 1, "boss") == 0
    fill(store, texts=("one step",))
    with pytest.raises(UserError, match="each of the 1 replies that are left is a single step"):
        work.queue(Steps(), 5, 1, "boss")


def test_nobody_is_asked_what_no_page_can_hand_in(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = fill(store, texts=(REPLY, REPLY + "\none\nmore"))
    monkeypatch.setattr(steps, "MOST_STEPS", 4)
    with store.transaction(writes=False) as connection:
        found, single = steps.open_replies(connection, Steps())
    assert ([reply.id for reply in found], single) == (ids[:1], 0)


# ------------------------------------------------------------------------------------------------------------- the page


def test_what_is_taken_back_comes_back_whole_however_often_it_is_asked(store: Store) -> None:
    ask(store, fill(store, 1))
    labelling, ann = Labelling(store), person(store, "ann")
    screen = labelling.next(ann, "step")
    assert screen is not None
    labelling.label_steps(ann, screen.id, bad(reference_shown=True, correction="so"))
    ways = (lambda: labelling.undo(ann, "step", screen.id),) * 2  # the first answer was lost
    for way in (*ways, lambda: labelling.next(ann, "step")):  # and in another browser
        back = way()
        assert back is not None
        assert back.said is not None
        assert (back.said["labels"], back.said["correction"]) == (["good", "bad", None], "so")
        assert back.said["reference_shown"] is True


@pytest.mark.parametrize("answer", ["2*3*4 <b>\\{1\\}</b>", "14.", 0])
def test_the_reference_answer_is_sent_as_it_stands(store: Store, answer: object) -> None:
    """It is no Markdown: 2*3*4 has no emphasis, 14. is no list."""
    world = World(store, items=0)
    with store.session() as session:
        session.add_prompts([Prompt("p", (Message("user", "What is it?"),), "", {"answer": answer})])
        ids = session.add_responses("p", [Completion(REPLY)], "model", SamplingConfig(), fingerprint="f")
    ask(store, ids)
    assert world.client("ann").api("next", {"kind": "step"}).json()["item"]["reference"] == str(answer)


# ------------------------------------------------------------------------------------------------------------ learning


def test_plain_rows_are_read_as_people_are(store: Store, tmp_path: Path) -> None:
    """A line that somebody wrote ends no reply: as an answer it would be right."""
    ask(store, fill(store, 2))
    judged(store, bad(correction="7 * 2 = 14"))
    judged(store, right(), "bo")
    step_files.export(store, tmp_path / "plain.jsonl", plain=True)
    with store.transaction(writes=False) as connection:
        expected = steps.labels(connection)
    read = read_steps(tmp_path / "plain.jsonl")
    assert [(one.id, one.steps, one.labels, one.finished) for one in read] == [
        (one.id, one.steps, one.labels, one.finished) for one in expected
    ]
    assert [one.finished for one in read] == [True, False, True]


def test_the_bad_step_copied_is_no_better_one(store: Store) -> None:
    ask(store, fill(store, 1))
    judged(store, bad(correction=LINES[1].strip()))
    with store.transaction(writes=False) as connection:
        (one,) = steps.labels(connection)
    assert one.labels == (1.0, 0.0, None)


def test_who_follows_a_model_back_reads_all_that_was_said(store: Store) -> None:
    ask(store, fill(store, 2))
    judged(store, bad(correction="7 * 2 = 14", reasons=("sum", "follow")))
    judged(store, NewSteps(("good", None, None), "give_up", note="too long for me", token=token()), "bo")
    with store.transaction(writes=False) as connection:
        found = lineage.texts(connection, list(lineage.works(connection).values()))
    by = {one["work"].annotator: one for one in found}
    assert [reply["text"] for reply in by["ann"]["replies"]] == [REPLY, "7 * 2 = 14"]
    assert by["ann"]["reason"] == "the sum is wrong; it does not follow"
    assert (by["bo"]["said"], by["bo"]["reason"], len(by["bo"]["replies"])) == ("given up", "too long for me", 1)
