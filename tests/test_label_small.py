"""Small things that a team stumbles over: each was wrong once."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from datetime import timedelta

import pytest
from databases import Clock
from labelling_world import Client, World, exported, fake_sources, fill, person, token
from test_label_log import Clock as Ticking
from test_label_log import live

from keel.store import Store, guidelines
from keel.store.guidelines import parse_aspects
from keel.store.paging import Wanted
from keel.store.records import NewVote
from keel.types import UserError
from keel.web.app.create import create_app
from keel.web.server import checked_address
from keel.web.service.labelling import Labelling
from keel.web.service.log_words import Entries
from keel.web.service.manage import Manage
from keel.web.service.start import prepare


def test_a_pair_that_was_gold_for_a_moment_is_wanted_as_often_as_before(new_url: Callable[[], str]) -> None:
    with Store(new_url()) as store:
        first, second = fill(store, 2, overlap=3)
        prepare(store)
        manage, labelling = Manage(store), Labelling(store)
        for answer in ("first", "second", None, None, "tie", None):
            manage.set_gold(first, answer, "admin")
        assert store.progress("main").wanted == 6
        manage.set_gold_every(1, "admin")
        manage.set_gold(second, "first", "admin")
        manage.set_overlap("main", "compare", 4, "admin")
        for name in ("ann", "bo", "cy", "dee"):  # more than it was wanted from; each is wanted then
            who = person(store, name)
            while (screen := labelling.next(who, "compare")) is not None:
                labelling.judge(who, screen.id, NewVote("left", token=token()))
        manage.set_gold(second, None, "admin")
        assert store.progress("main").wanted == 4 + 4


def test_the_guideline_in_force_is_the_highest_number(new_url: Callable[[], str]) -> None:
    clock = Clock()
    with Store(new_url(), clock=clock) as store:
        prepare(store)
        manage = Manage(store)
        versions = []
        for days in (1, -30, -60):  # a clock that is set back
            clock.time += timedelta(days=days)
            versions.append(manage.add_guideline(f"Words {days}", "", "admin"))
        clock.time += timedelta(days=365)
        store.add_guideline("2 (imported)", "Another store's")
        for number in range(5, 11):
            store.add_guideline(str(number), f"Words {number}")
        assert versions == ["2", "3", "4"]
        with store.transaction(writes=False) as connection:
            current = guidelines.current_guideline(connection)
            order = [one.version for one in guidelines.all_guidelines(connection)]
            assert guidelines.next_version(connection) == "11"
        assert current is not None
        assert current.version == "10"
        assert order == [*map(str, range(10, 0, -1)), "2 (imported)"]


def test_aspects_may_be_called_anything(new_url: Callable[[], str]) -> None:
    names = ["speed/size", "__proto__", '"quoted" <b>', "1:2", "漢字", "a'b", "left/x", "constructor"]
    with Store(new_url()) as store:
        world = World(store, items=1)
        manage = Manage(store)
        text = "\n".join(f"{name}: Is it, say: {name}?" for name in names)
        assert parse_aspects(text) == [{"name": name, "question": f"Is it, say: {name}?"} for name in names]
        assert parse_aspects("plain:no space") == [{"name": "plain", "question": "no space"}]
        manage.add_guideline("Words", text, "admin")
        client = world.client("ann")
        page = client.get("/compare").text
        shown = {html.unescape(name) for name in re.findall(r'type="radio" name="([^"]+)"', page)}
        assert shown == {f"{side}/{name}" for side in ("left", "right") for name in names}
        item = client.api("next", {"kind": "compare", "holding": []}).json()["item"]
        sent = {"left": dict.fromkeys(names, 4), "right": {names[0]: 1}}
        body = {"assignment": item["id"], "token": token(), "choice": "left", "strength": 2, "ratings": sent}
        assert client.api("judge", body).status_code == 200
        (vote,) = store.judgements()
        assert vote.ratings == sent


def test_links_name_the_configured_address(new_url: Callable[[], str]) -> None:
    with Store(new_url()) as store:
        prepare(store)
        world = World(store, items=0)
        admin = world.client("boss", "admin")
        for configured, host in (("https://label.example.org", "label.example.org"), (None, "testserver")):
            app = create_app(store, fake_sources(), address=configured)
            client = Client(app, admin.http.cookies["keel_session"])
            found = [
                client.http.post(
                    f"/manage/people/{path}", data={"csrf": client.csrf, **fields}, headers={"Host": host_sent}
                ).text
                for path, fields in (
                    ("invite", {"role": "annotator"}),
                    ("link", {"name": "boss"}),
                )
                for host_sent in ("evil.example", "testserver")
            ]
            links = [re.search(r'value="(https?://[^/"]+)/', text).group(1) for text in found]  # type: ignore[union-attr]
            if configured:
                assert links == [configured] * 4
            else:
                assert links[1] == f"http://{host}"
    assert checked_address("http://[::1]:8765/") == "http://[::1]:8765"
    for wrong in ("label.example.org", "https://a.org/keel", "javascript:x", "https://a.org\n", "https://a b.org", ""):
        with pytest.raises(UserError, match="--address"):
            checked_address(wrong)


def test_a_count_of_disagreements_is_no_limit(new_url: Callable[[], str]) -> None:
    with Store(new_url()) as store:
        world = World(store, items=3, overlap=2)
        labelling = Labelling(store)
        for name in ("ann", "bo"):
            who = person(store, name)
            while (screen := labelling.next(who, "compare")) is not None:
                best = next(i for i, shown in enumerate(screen.shown) if shown.endswith("0" if name == "ann" else "1"))
                labelling.judge(who, screen.id, NewVote(("left", "right")[best], token=token()))
        manage = Manage(store)
        pages = [manage.disagreements_counted(Wanted(number=number, size=2)) for number in (0, 1, 2)]
        assert [(len(page), page.more, total) for page, total in pages] == [(2, True, 3), (1, False, 3), (0, False, 3)]
        assert len({case["id"] for page, _ in pages for case in page}) == 3
        boss = world.client("boss", "reviewer")
        page = boss.get("/manage/disagreements").text
        assert "3 pairs on which people’s votes differ." in page
        assert page.count('class="case"') == 3
        found = boss.get("/manage/disagreements?find=QUESTION 1").text
        assert "1 pair on which people’s votes differ." in found
        assert found.count('class="case"') == 1
        assert "None here." in boss.get("/manage/disagreements?find=100%25").text  # no pattern


def test_two_people_flag_one_item_and_each_flag_is_answered(new_url: Callable[[], str]) -> None:
    with Store(new_url()) as store:
        (item,) = fill(store, 1, overlap=2)
        prepare(store)
        manage, labelling, boss = Manage(store), Labelling(store), person(store, "boss", "reviewer")
        for name in ("ann", "bo"):
            who = person(store, name)
            screen = labelling.next(who, "compare")
            assert screen is not None
            labelling.flag(who, screen.id, f"{name} says so", token())
            if name == "ann":
                manage.resolve_flag(manage.flags()[0]["id"], "boss")
                assert manage.flags() == []
        (second,) = manage.flags()
        assert (second["name"], second["text"], second["item_id"]) == ("bo", "bo says so", item)
        manage.take_out("item", str(item), "bo is right", second["id"], boss)
        assert (manage.flags(), [one["id"] for one in store_out(manage)]) == ([], [item])


def store_out(manage: Manage) -> list[dict[str, int]]:
    return [{"id": one["item_id"]} for one in manage.out()]


def test_the_log_is_in_words_and_can_be_searched(new_url: Callable[[], str]) -> None:
    with Store(new_url(), clock=Ticking()) as store:
        live(store)
        manage = Manage(store)
        written = {
            (row["annotator"], row["created"], row["guideline"]) for row in exported(store, "demonstrations.jsonl")
        }
        wrote = [event for event in store.events() if event.action == "wrote"]
        assert len(written) == len(store.demonstrations())
        assert written <= {(event.actor, event.at.isoformat(), event.guideline) for event in wrote}
        told = {(one["action"], one["entity"]): one["words"] for one in reversed(manage.events(Entries(limit=10_000)))}
        words = "\n".join(told.values())
        assert "voted in the arena: left" in words
        assert "flagged item" in words
        assert "published version 2 of the guideline" in words
        assert not re.search(r"None|\{|lambda", words), words
        ann = manage.events(Entries(who="ann", what="judged"))
        assert ann
        assert {(one["actor"], one["action"]) for one in ann} == {("ann", "judged")}
        day = manage.events(Entries(day="2026-03-01", limit=10_000))
        assert {f"{one['at']:%d}" for one in day} == {"01"}
        assert len(day) == sum(f"{event.at:%d}" == "01" for event in store.events())
        some = manage.events(Entries(limit=5))
        older = manage.events(Entries(limit=5, before=some[-1]["id"]))
        assert [one["id"] for one in some + older] == [event.id for event in reversed(store.events())][:10]
        client = Client(create_app(store, fake_sources()))
        assert client.get("/manage/events").status_code == 303
        world = World(store, items=0)
        admin = world.client("root", "admin")
        assert "took item" in admin.get("/manage/events?who=boss&what=took+out").text
        assert "Nothing of this kind" in admin.get("/manage/events?who=nobody").text
        assert admin.get("/manage/events?day=2026-99-99").status_code == 400
        assert admin.get("/manage/events?day=x").status_code == 422
