"""What people do is kept in their browser until it counts: with the database locked or stopped, the server killed, the
session gone, the item given away, and storage that takes nothing. In a real browser."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from label_server import Process, postgres_that_stops, sqlite_that_locks
from labelling_world import PASSWORD, exported, fill, person
from test_label_browser import SETTLED, SHOTS, Clock, Served, browser, chromium, fetched, press, profile, wait_for_votes

from keel.store import Store
from keel.store.records import NewVote
from keel.web.service.labelling import Labelling
from keel.web.service.manage import Manage
from keel.web.service.start import prepare

if True:  # after the skip of test_label_browser
    from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

__all__ = ["browser", "chromium"]

NO_ROOM = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }"
CLOSED = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } })"


def process_of(url: str) -> Process:
    with Store(url) as store:
        fill(store, 12, replies=4)
        prepare(store)
    return Process(url)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def served(tmp_path: Path, clock: Clock) -> Iterator[Served]:
    with Store(tmp_path / "feedback.db", clock=clock) as store:
        fill(store, 12, replies=4)
        running = Served(store)
        yield running
        running.close()


def enter(context: BrowserContext, served: Served | Process, secret: str | None = None, page: str = "compare") -> Page:
    """A page of the owner's, or of whoever the link is for."""
    opened = context.new_page()
    opened.on("pageerror", lambda error: pytest.fail(f"a script failed: {error}"))
    opened.goto(f"{served.url}/enter/{secret or served.people.owner_link()}")
    opened.wait_for_url("**/compare")
    if page != "compare":
        opened.goto(f"{served.url}/{page}")
    return opened


def vote(page: Page, keys: str) -> list[tuple[str, str]]:
    """(question on the screen, key) of each vote."""
    said = []
    for key in keys:
        said.append((page.locator("#messages .text").last.inner_text(), key))
        press(page, key)
    return said


CHOICES = {
    "1": ("left", 3),
    "2": ("left", 2),
    "3": ("left", 1),
    "4": ("tie", None),
    "5": ("right", 1),
    "6": ("right", 2),
}


def counted(store: Store) -> list[tuple[str, str]]:
    keys = {choice: key for key, choice in CHOICES.items()}
    return [(one.prompt.messages[-1].content, keys[one.choice, one.strength]) for one in store.judgements()]


Database = AbstractContextManager[tuple[str, Callable[[], None], Callable[[], None]]]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_votes_made_while_the_database_is_away_are_kept(browser: Browser, tmp_path: Path, kind: str) -> None:
    database: Database = sqlite_that_locks(tmp_path) if kind == "sqlite" else postgres_that_stops()
    with ExitStack() as stack:
        url, take, give = stack.enter_context(database)
        process = process_of(url)
        stack.callback(process.close)
        page = enter(profile(browser), process)
        fetched(page)
        statuses: list[int] = []
        page.on("response", lambda answer: statuses.append(answer.status) if "/api/judge" in answer.url else None)
        take()
        said = vote(page, "163")
        said += [(page.locator("#messages .text").last.inner_text(), "5")]
        page.wait_for_timeout(SETTLED)
        page.keyboard.press("5")
        expect(page.locator("#offline")).to_contain_text("The server is in trouble. 4 judgements of yours are kept in")
        page.screenshot(path=SHOTS / f"outbox-trouble-{kind}.png")
        give()
        wait_for_votes(process.store, 4)
        assert counted(process.store) == said
        expect(page.locator("#offline")).to_be_hidden()
        assert set(statuses) == {503, 200}
        expect(page.locator("#item")).to_be_visible()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    running = process_of(f"sqlite:///{tmp_path}/feedback.db")
    yield running
    running.close()


def test_votes_outlive_a_killed_server_and_a_new_sign_in(browser: Browser, process: Process) -> None:
    context = profile(browser)
    page = enter(context, process)
    fetched(page)
    process.kill()
    said = vote(page, "16")
    expect(page.locator("#offline")).to_contain_text("No connection. 2 judgements of yours are kept")
    process.start()
    enter(context, process)  # signed in again in another window: this page's token is stale
    page.bring_to_front()
    wait_for_votes(process.store, 2)
    said += vote(page, "325")
    wait_for_votes(process.store, 5)
    assert counted(process.store) == said


def test_who_is_signed_out_loses_nothing(browser: Browser, served: Served) -> None:
    context = profile(browser)
    page = enter(context, served)
    fetched(page)
    session = context.cookies()
    context.clear_cookies()
    said = vote(page, "61")
    expect(page.locator("#offline")).to_contain_text("You are signed out. 2 judgements of yours are kept")
    page.screenshot(path=SHOTS / "outbox-signed-out.png")
    assert served.store.judgements() == []
    page.goto("about:blank")  # and they wait where no page is open
    context.add_cookies(session)  # type: ignore[arg-type]
    page.goto(f"{served.url}/rank")
    wait_for_votes(served.store, 2)
    assert counted(served.store) == said


def test_votes_of_somebody_else_on_this_browser_wait_for_their_owner(browser: Browser, served: Served) -> None:
    context = profile(browser)
    page = enter(context, served)
    fetched(page)
    bo = context.new_page()
    bo.goto(f"{served.url}/join/{served.people.invite('annotator', 'keel')}")
    bo.get_by_label("Name").fill("Bo")
    bo.get_by_label("Password").fill(PASSWORD)
    bo.get_by_role("button", name="Join").click()
    page.bring_to_front()
    said = vote(page, "26")
    expect(page.locator("#offline")).to_contain_text("Bo is signed in on this browser now. 2 judgements of yours are")
    page.screenshot(path=SHOTS / "outbox-stranger.png")
    bo.bring_to_front()
    bo.goto(f"{served.url}/compare")
    fetched(bo)
    vote(bo, "4")
    wait_for_votes(served.store, 1)
    bo.wait_for_timeout(1500)
    assert [one.annotator for one in served.store.judgements()] == ["Bo"]
    page.goto("about:blank")
    enter(context, served)
    wait_for_votes(served.store, 3)
    assert [one.annotator for one in served.store.judgements()] == ["Bo", "owner", "owner"]
    assert counted(served.store)[1:] == said


def give_away(store: Store, name: str) -> None:
    """Everything that can be had goes to somebody else, who judges it."""
    who, labelling = person(store, name), Labelling(store)
    while (screen := labelling.next(who, "compare")) is not None:
        labelling.judge(who, screen.id, NewVote("tie", token=f"{name}-{screen.id}-token"))


LEASE = timedelta(minutes=31)  # and a minute


def test_what_is_refused_for_good_stays_on_the_page_with_its_text(
    browser: Browser, served: Served, clock: Clock
) -> None:
    context = profile(browser)
    page = enter(context, served)
    fetched(page)
    page.route("**/api/hold", lambda route: route.abort())  # a page that slept
    question = page.locator("#messages .text").last.inner_text()
    page.locator("#reason").fill("A gives its source, B does not")
    clock.ahead += LEASE
    give_away(served.store, "bo")
    page.locator("#reason").blur()
    page.keyboard.press("2")
    refused = page.locator("#refused")
    expect(refused).to_contain_text("Not counted: 1")
    for words in ("A is better", question, "somebody else has it now"):
        expect(refused).to_contain_text(words)
    expect(refused.locator("pre")).to_have_text("A gives its source, B does not")
    page.screenshot(path=SHOTS / "outbox-refused.png")
    page.reload()
    expect(refused.locator("pre")).to_be_visible()
    phone = browser.new_context(
        viewport={"width": 375, "height": 740}, color_scheme="dark", storage_state=context.storage_state()
    )
    small = phone.new_page()
    small.goto(f"{served.url}/compare")
    expect(small.locator("#refused pre")).to_be_visible()
    assert small.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    small.screenshot(path=SHOTS / "phone-outbox-refused.png")
    phone.close()
    refused.get_by_role("button", name="Discard").click()
    expect(refused).to_be_hidden()
    page.reload()
    expect(page.locator("#empty")).to_be_visible()
    expect(refused).to_be_hidden()
    assert {one.annotator for one in served.store.judgements()} == {"bo"}


def test_an_open_page_keeps_its_items(browser: Browser, served: Served, clock: Clock) -> None:
    context = browser.new_context()
    context.clock.install()
    page = enter(context, served)
    fetched(page)
    for _ in range(8):  # 40 minutes; an item that nobody asks for is kept for 30
        clock.ahead += timedelta(minutes=5)
        with page.expect_response("**/api/hold"):
            page.clock.run_for(300_000)
    give_away(served.store, "bo")
    assert len(served.store.judgements()) == 8  # the other four are before the page's person
    said = vote(page, "123")
    wait_for_votes(served.store, 11)
    assert counted(served.store)[8:] == said
    context.close()
    clock.ahead += LEASE
    give_away(served.store, "cy")  # the page is closed: what it held goes to others
    assert [one.annotator for one in served.store.judgements()] == ["bo"] * 8 + ["owner"] * 3 + ["cy"]


def test_a_page_that_nobody_looks_at_gives_its_items_back_at_last(browser: Browser, served: Served) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.clock.install()
    page.goto(f"{served.url}/enter/{served.people.owner_link()}")
    page.wait_for_url("**/compare")
    expect(page.locator("#item")).to_be_visible()
    held: list[str] = []
    page.on("request", lambda request: held.append(request.url) if "/api/hold" in request.url else None)
    page.clock.run_for(3_600_000)
    assert 10 <= len(held) <= 13  # every five minutes
    page.clock.run_for(2 * 3_600_000)
    held.clear()
    page.clock.run_for(3_600_000)
    assert held == []
    with page.expect_request("**/api/hold"):
        page.keyboard.press("Shift")  # somebody is there again
    assert len(held) == 1


def test_what_is_being_typed_survives_a_reload_and_a_crash(browser: Browser, served: Served) -> None:
    manage = Manage(served.store)
    manage.ask_for_writing(3, 1, "test")
    for kind in ("rank", "edit"):
        manage.ask_for(kind, 3, 1, "test")  # type: ignore[arg-type]
    context = profile(browser)
    page = enter(context, served)
    for path, field in (("compare", "#reason"), ("rank", "#reason"), ("write", "#text"), ("edit", "#text")):
        if path != "compare":
            page.goto(f"{served.url}/{path}")
        expect(page.locator("#item")).to_be_visible()
        page.locator(field).fill(f"forty minutes on {path}")
        if path in ("rank", "write"):  # a page's process costs more than a page
            page.reload()
        else:
            page.close(run_before_unload=False)
            page = context.new_page()
            page.goto(f"{served.url}/{path}")
        expect(page.locator(field)).to_have_value(f"forty minutes on {path}")
    page.get_by_role("button", name="Flag").click()
    page.locator("#flag-text").fill("a phone number")
    page.reload()
    expect(page.locator("#item")).to_be_visible()
    page.get_by_role("button", name="Flag").click()
    expect(page.locator("#flag-text")).to_have_value("a phone number")
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_timeout(SETTLED)
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#today")).to_have_text("1")
    assert [d.messages[-1].content for d in served.store.demonstrations()] == ["forty minutes on edit"]
    kept = json.dumps(page.evaluate("Object.entries(localStorage)"))
    assert "forty minutes on edit" not in kept  # what counts is kept here no longer
    assert "forty minutes on write" in kept


def test_a_draft_whose_item_went_away_is_in_the_list(browser: Browser, served: Served, clock: Clock) -> None:
    context = profile(browser)
    page = enter(context, served)
    fetched(page)
    page.locator("#reason").fill("half a thought")
    page.close()
    clock.ahead += LEASE
    give_away(served.store, "bo")
    page = context.new_page()
    page.goto(f"{served.url}/compare")
    expect(page.locator("#refused pre")).to_have_text("half a thought")
    expect(page.locator("#refused")).to_contain_text("it went to somebody else")


def test_only_keels_own_word_is_the_last_one_and_one_letter_in_trouble_holds_up_no_other(
    browser: Browser, served: Served
) -> None:
    context = profile(browser)
    page = enter(context, served)
    fetched(page)
    tries: list[str] = []

    def proxy(route: Route) -> None:
        sent = json.loads(route.request.post_data or "{}")
        tries.append(sent["choice"])
        if sent["choice"] == "tie":
            route.fulfill(status=500, json={"error": "something went wrong"})
        elif tries.count(sent["choice"]) == 1:  # nginx while the server starts, a hotel's network
            route.fulfill(status=404, body="<h1>Not Found</h1>")
        else:
            route.fallback()

    page.route("**/api/judge", proxy)
    said = vote(page, "416")
    wait_for_votes(served.store, 2, page)
    assert counted(served.store) == said[1:]
    assert tries.count("left") == tries.count("right") == 2
    expect(page.locator("#refused")).to_be_hidden()
    expect(page.locator("#offline")).to_contain_text("The server is in trouble. 1 judgement of yours is kept")
    page.unroute("**/api/judge")
    wait_for_votes(served.store, 3, page)
    assert counted(served.store)[-1] == said[0]


# ------------------------------------------------------------------------------------------- storage and other windows


@pytest.mark.parametrize("broken", [NO_ROOM, CLOSED])
def test_without_storage_votes_count_for_what_is_on_the_screen(browser: Browser, served: Served, broken: str) -> None:
    context = browser.new_context()
    context.add_init_script(broken)
    page = enter(context, served)
    fetched(page)
    said = vote(page, "163")
    wait_for_votes(served.store, 3)
    assert counted(served.store) == said
    page.route("**/api/**", lambda route: route.abort())
    said += vote(page, "52")
    unsaved = page.locator("#unsaved")
    expect(unsaved).to_contain_text("Closing this tab would lose 2 judgements not sent yet")
    page.screenshot(path=SHOTS / "outbox-no-storage.png")
    page.set_viewport_size({"width": 375, "height": 740})
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    page.screenshot(path=SHOTS / "phone-outbox-no-storage.png")
    asked: list[str] = []

    def stay(dialog: Any) -> None:
        asked.append(dialog.type)
        dialog.dismiss()

    page.on("dialog", stay)
    with page.expect_event("dialog"):
        page.close(run_before_unload=True)
    assert asked == ["beforeunload"]
    page.unroute("**/api/**")
    wait_for_votes(served.store, 5)
    assert counted(served.store) == said
    expect(unsaved).to_be_hidden()


def test_storage_that_is_emptied_or_spoiled_loses_no_vote(browser: Browser, served: Served) -> None:
    context = profile(browser)
    page = enter(context, served)
    fetched(page)
    page.route("**/api/**", lambda route: route.abort())
    said = vote(page, "26")
    page.evaluate("localStorage.clear()")
    page.unroute("**/api/**")
    wait_for_votes(served.store, 2)
    assert counted(served.store) == said
    page.route("**/api/**", lambda route: route.abort())
    said += vote(page, "5")
    page.evaluate(
        "const key = Object.keys(localStorage).find((key) => key.startsWith('keel-letter-'));"
        "localStorage.setItem(key.slice(0, -4) + 'zzzz', '{\"path\": \"/api/judge\", broken words')"
    )
    page.unroute("**/api/**")
    page.reload()
    wait_for_votes(served.store, 3)
    assert counted(served.store) == said
    expect(page.locator("#refused pre")).to_contain_text("broken words")


def test_letters_of_the_page_before_this_one_stay_readable(browser: Browser, served: Served) -> None:
    context = profile(browser)
    page = enter(context, served)
    fetched(page)
    owner = page.evaluate("document.querySelector('meta[name=person]').content.split('-').at(-1)")
    body = {"assignment": 1, "token": "of-an-old-page", "choice": "tie", "reason": "both of them are right"}
    letters = [{"path": "/api/judge", "body": body}, None]
    page.evaluate("([key, value]) => localStorage.setItem(key, value)", [f"keel-outbox-{owner}", json.dumps(letters)])
    page.reload()
    expect(page.locator("#refused")).to_contain_text("Not counted: 1")
    expect(page.locator("#refused pre")).to_contain_text("both of them are right")
    expect(page.locator("#refused")).to_contain_text("older page")
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.startsWith('keel-outbox'))") == []
    # and one that knows its item by a number, under the name of today, gets the server's last word
    number = {"path": "/api/judge", "at": 1, "about": {"what": "Tie", "text": "typed"}, "body": body}
    key = page.evaluate("`keel-letter-${document.querySelector('meta[name=person]').content}-of-an-old-page`")
    page.evaluate("([key, value]) => localStorage.setItem(key, value)", [key, json.dumps(number)])
    page.reload()
    expect(page.locator("#refused pre").first).to_contain_text("typed")
    expect(page.locator("#item")).to_be_visible()
    assert served.store.judgements() == []


def test_two_windows_of_one_person_do_not_vote_on_one_item_twice(browser: Browser, served: Served) -> None:
    context = profile(browser)
    one = enter(context, served)
    fetched(one)
    two = context.new_page()
    two.goto(f"{served.url}/compare")
    fetched(two)
    first = one.locator("#messages").inner_text()
    assert two.locator("#messages").inner_text() == first
    one.bring_to_front()
    said = vote(one, "1")
    expect(two.locator("#messages")).not_to_have_text(first)
    two.bring_to_front()
    second = two.locator("#messages").inner_text()
    said += vote(two, "6")
    one.bring_to_front()
    expect(one.locator("#messages")).not_to_have_text(second)
    said += vote(one, "3")
    wait_for_votes(served.store, 3)
    assert counted(served.store) == said
    for page in (one, two):
        expect(page.locator("#refused")).to_be_hidden()


def test_a_page_that_comes_back_from_the_browsers_memory_asks_again(browser: Browser, served: Served) -> None:
    context = browser.new_context()
    context.add_init_script("delete globalThis.BroadcastChannel")  # a page that was frozen hears nothing
    page = enter(context, served)
    fetched(page)
    old = page.locator("#messages").inner_text()
    other = context.new_page()
    other.goto(f"{served.url}/compare")
    fetched(other)
    said = vote(other, "1")
    wait_for_votes(served.store, 1)
    page.bring_to_front()
    assert page.locator("#messages").inner_text() == old
    page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")
    expect(page.locator("#messages")).not_to_have_text(old)
    said += vote(page, "2")
    wait_for_votes(served.store, 2)
    assert counted(served.store) == said


def test_a_clock_that_is_wrong_changes_nothing(browser: Browser, served: Served) -> None:
    context = browser.new_context()
    context.add_init_script("Date.now = () => 86400000 - (Date.ticks = (Date.ticks ?? 0) + 3600000)")  # runs backwards
    page = enter(context, served)
    fetched(page)
    page.route("**/api/**", lambda route: route.abort())
    said = vote(page, "163")
    page.unroute("**/api/**")
    wait_for_votes(served.store, 3)
    assert counted(served.store) == said


def test_an_undo_takes_back_only_what_has_not_left_the_browser(browser: Browser, served: Served) -> None:
    context = profile(browser)
    page = enter(context, served)
    fetched(page)
    page.route("**/api/judge", lambda route: (route.fetch(), route.abort()))  # it counts, and nobody hears of it
    said = vote(page, "1")
    wait_for_votes(served.store, 1, page)
    page.keyboard.press("u")
    expect(page.locator("#toast")).to_contain_text("may have been sent already")
    page.unroute("**/api/judge")
    page.evaluate("dispatchEvent(new Event('online'))")
    expect(page.locator("#offline")).to_be_hidden()
    page.keyboard.press("u")
    expect(page.locator("#messages")).to_contain_text(said[0][0])
    said = vote(page, "6")
    wait_for_votes(served.store, 1)
    assert counted(served.store) == said


# ----------------------------------------------------------------------------------------------------------- the arena


def test_a_message_whose_answer_broke_off_is_sent_again_as_the_same_turn(browser: Browser, served: Served) -> None:
    context = profile(browser)
    page = enter(context, served, page="arena")
    field = page.get_by_label("Your message", exact=True)
    field.fill("half a message")
    page.reload()
    expect(field).to_have_value("half a message")
    page.route("**/say", lambda route: (route.fetch(), route.abort()))  # answered, and the answer is lost
    field.fill("hello")
    page.keyboard.press("Enter")
    expect(page.locator("#problem")).to_contain_text("Send your message again")
    expect(field).to_have_value("hello")
    page.unroute("**/say")
    page.keyboard.press("Enter")
    expect(page.locator(".turn .response.b")).to_contain_text("I heard: hello (1)")
    expect(page.locator(".streaming")).to_have_count(0)
    expect(page.locator(".turn")).to_have_count(1)
    page.route("**/vote", lambda route: (route.fetch(), route.abort()))
    page.get_by_role("button", name="A is better").click()
    expect(page.locator("#problem")).to_contain_text("Your vote is kept in this browser")
    expect(page.locator("#choices")).to_be_hidden()
    page.screenshot(path=SHOTS / "outbox-arena-vote.png")
    page.unroute("**/vote")
    page.reload()
    expect(page.locator("#names")).to_contain_text("secret-one")
    (vote,) = exported(served.store, "arena.jsonl")
    assert (vote["choice"], vote["turn"]) == ("left", 1)
    assert [one["content"] for one in vote["conversation_left"]] == ["hello", "I heard: hello (1)"]
