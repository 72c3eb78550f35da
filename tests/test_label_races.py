"""Two people do the same at the same moment: no rule is broken, and nobody gets an error that is not theirs. Each of
the two has read what it reads before either writes, unless the store lets only one of them in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest
from labelling_world import PASSWORD, fill, person, token
from sqlalchemy import event, select

from keel.store import NewVote, Store, people_tables
from keel.types import UserError
from keel.web.service.labelling import Labelling
from keel.web.service.manage import Manage
from keel.web.service.people import People
from keel.web.service.start import prepare

WRITES = ("INSERT", "UPDATE", "DELETE")


@pytest.fixture
def store(new_url: Callable[[], str]) -> Iterator[Store]:
    with Store(new_url()) as store:
        fill(store, 2)
        prepare(store)
        yield store


@contextmanager
def in_step(store: Store) -> Iterator[None]:
    """Of two threads, neither writes before the other has come to its own first write, or waits for a lock."""
    both, past = threading.Barrier(2), threading.local()

    def hold(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith(WRITES) and not getattr(past, "it", False):
            past.it = True
            with suppress(threading.BrokenBarrierError):  # the other one waits for this one
                both.wait(0.3)

    event.listen(store._engine, "before_cursor_execute", hold)
    yield
    event.remove(store._engine, "before_cursor_execute", hold)


def at_once(store: Store, *does: Callable[[], Any]) -> list[Any]:
    """What each gave, or its UserError; any other error is raised."""
    said: list[Any] = [None] * len(does)

    def run(number: int) -> None:
        try:
            said[number] = does[number]()
        except Exception as error:
            said[number] = error

    with in_step(store):
        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(does))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    for one in said:
        if isinstance(one, Exception) and not isinstance(one, UserError):
            raise one
    return said


def open_rows(store: Store, table: Any) -> list[Any]:
    with store.transaction(writes=False) as connection:
        return list(connection.execute(select(table).where(table.c.undone_at.is_(None))))


def test_two_reviewers_at_once(store: Store) -> None:
    ann, rev, bo = person(store, "ann"), person(store, "rev", "reviewer"), person(store, "bo", "reviewer")
    manage, labelling = Manage(store), Labelling(store)
    screen = labelling.next(ann, "compare")
    assert screen is not None
    labelling.flag(ann, screen.id, "odd", token())
    labelling.judge(ann, screen.id, NewVote("left", token=token()))
    (item,) = (vote.item_id for vote in store.judgements())

    words = at_once(
        store,
        lambda: manage.adjudicate(item, "first", "", rev),
        lambda: manage.adjudicate(item, "second", "", bo),
    )
    assert words == [None, None]
    (word,) = open_rows(store, people_tables.adjudications)  # the later one stands, and the log says what was before
    first, second = [e for e in store.events() if e.action == "adjudicated"]
    assert first.old is None
    assert second.old == {"choice": first.new["choice"]}  # type: ignore[index]
    assert second.new["choice"] == word.choice  # type: ignore[index]

    for what, id in (("item", str(item)), ("prompt", "p0"), ("response", "1")):
        taken = [partial(manage.take_out, what, id, "", None, who) for who in (rev, bo)]  # type: ignore[arg-type]
        assert at_once(store, *taken) == [None, None]
        (removal,) = open_rows(store, people_tables.removals)
        back = at_once(store, *[partial(manage.put_back, removal.id, who) for who in (rev, bo)])
        assert sorted(map(str, back)) == ["None", "this is in use already"]
    (flag,) = manage.flags()
    assert at_once(store, *[lambda: manage.resolve_flag(flag["id"], "rev")] * 2) == [None, None]
    assert sum(e.action == "resolved" for e in store.events()) == 1


@pytest.mark.parametrize("change", [{"role": "annotator"}, {"active": False}])
def test_the_last_two_admins_demote_each_other_or_themselves(store: Store, change: dict[str, Any]) -> None:
    door = People(store)

    def admins() -> list[str]:
        return [a.name for a in door.accounts() if a.role == "admin" and a.active]

    for pairs in ((("ann", "bo"), ("bo", "ann")), (("cy", "cy"), ("di", "di"))):
        for name, _ in pairs:
            person(store, name, "admin")
        for left in set(admins()) - {name for pair in pairs for name in pair}:
            door.change(left, pairs[0][0], **change)
        said = at_once(store, *[partial(door.change, name, by, **change) for name, by in pairs])
        assert sum(isinstance(one, UserError) for one in said) == 1
        assert len(admins()) == 1


def test_a_link_that_is_made_while_its_maker_is_demoted_does_not_hold(store: Store) -> None:
    door = People(store)
    person(store, "boss", "admin")
    person(store, "ann", "admin")
    secret, _ = at_once(store, lambda: door.invite("admin", "ann"), lambda: door.change("ann", "boss", role="reviewer"))
    assert isinstance(secret, UserError) or door.link(secret) is None


def test_two_who_join_with_one_name_at_once(store: Store) -> None:
    door = People(store)
    person(store, "boss", "admin")
    links = [door.invite("annotator", "boss") for _ in range(2)]
    said = at_once(store, *[partial(door.accept, link, "Ann", PASSWORD) for link in links])
    (refused,) = (one for one in said if isinstance(one, UserError))
    assert "taken" in str(refused)
    assert [a.name for a in door.accounts()] == ["Ann", "boss"]
    left = links[said.index(refused)]
    assert door.link(left) is not None  # and their link still holds
    with pytest.raises(UserError, match="taken"):
        door.accept(left, "Ann", PASSWORD)


def test_two_admins_at_once(store: Store) -> None:
    """What else admins do: neither breaks, and one of the two may be told."""
    manage, door = Manage(store), People(store)
    boss = person(store, "boss", "admin")
    link = door.invite("annotator", "boss")
    with store.transaction(writes=False) as connection:
        id = connection.execute(select(people_tables.links.c.id)).scalars().all()[-1]
    for twice in (
        lambda: manage.add_guideline("words", "", "boss"),
        lambda: manage.set_gold(1, "first", "boss"),
        lambda: manage.set_gold_every(10, "boss"),
        lambda: manage.set_overlap("main", "compare", 2, "boss"),
        lambda: manage.put_first("main", "compare", "boss"),
        lambda: manage.erase("response", "1", boss),
        lambda: door.withdraw(id, "boss"),
    ):
        at_once(store, twice, twice)
    assert door.link(link) is None
