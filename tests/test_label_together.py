"""Two windows of one person at once, on PostgreSQL: neither waits for what the other one holds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from databases import Clock
from labelling_world import fill, person

from keel.store import NewVote, Store, queue
from keel.web.service.labelling import Labelling
from keel.web.service.start import prepare


@pytest.mark.parametrize("new_url", ["postgresql"], indirect=True)
def test_what_ran_out_is_taken_up_in_one_window_and_asked_for_in_another(
    new_url: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first window has the assignment and wants its item's slot; the second has locked the item that it may be
    given and would lease the same assignment again. PostgreSQL ends such a circle by ending one of the two."""
    for what in ("hold", "judge"):
        with monkeypatch.context() as patches:
            at_once(new_url(), what, patches)


def at_once(url: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    with Store(url, lease=timedelta(minutes=10), clock=clock) as store:
        fill(store, 1)
        prepare(store)
        labelling, ann, bo = Labelling(store), person(store, "ann"), person(store, "bo")
        had = labelling.next(ann, "compare")
        assert had is not None
        clock.time += timedelta(hours=1)
        given = labelling.next(bo, "compare")  # the slot goes to bo,
        assert given is not None
        labelling.skip(bo, given.id, "")  # who gives it back: it is open, and ann's assignment has run out
        inside, second_has_item = threading.Event(), threading.Event()
        retake, lease_item = queue.retake, queue.lease_item

        def slow_retake(*arguments: Any) -> None:
            inside.set()
            second_has_item.wait(0.5)  # where it can't have it before this one is done, there is no circle
            retake(*arguments)

        def noted_lease(*arguments: Any) -> Any:
            second_has_item.set()
            return lease_item(*arguments)

        monkeypatch.setattr(queue, "retake", slow_retake)
        monkeypatch.setattr(queue, "lease_item", noted_lease)
        said: dict[str, Any] = {}

        def first() -> None:
            try:
                if what == "hold":
                    said["first"] = labelling.hold(ann, [had.id]).held
                else:
                    said["first"] = labelling.judge(ann, had.id, NewVote("left", token="a-late-token"))
            except Exception as error:
                said["first"] = error

        def second() -> None:
            inside.wait(5)
            try:
                said["second"] = labelling.next(ann, "compare")
            except Exception as error:
                said["second"] = error

        threads = [threading.Thread(target=work) for work in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        if what == "hold":
            assert said["first"] == (had.id,)
            assert said["second"] == had  # still theirs, and no second one
        else:
            assert [vote.token for vote in store.judgements()] == ["a-late-token"]
            assert said["second"] is None
