"""Odd people at the labelling pages: slow double clicks, two windows, a session that ends in the middle of a reply, an
hour without a connection, somebody who is removed, something that is taken out while it is looked at. In a real
browser."""

from __future__ import annotations

from datetime import timedelta

from labelling_world import PASSWORD, person
from test_label_browser import (
    SETTLED,
    SHOTS,
    Clock,
    Served,
    annotator,
    browser,
    chromium,
    fetched,
    owner,
    press,
    wait_for_votes,
)
from test_label_outbox import clock, give_away, served
from waiting import eventually

from keel.store.records import NewVote, NewWriting
from keel.web.service.labelling import Labelling
from keel.web.service.manage import Manage

if True:  # after the skip of test_label_browser
    from playwright.sync_api import Browser, Dialog, Page, expect

__all__ = ["browser", "chromium", "clock", "served"]


def test_a_slow_double_click_is_one_vote(browser: Browser, served: Served) -> None:
    _, page = owner(browser, served)
    fetched(page)
    page.wait_for_timeout(SETTLED)
    place = page.get_by_role("button", name="Both bad").bounding_box()
    assert place is not None
    page.mouse.move(place["x"] + 5, place["y"] + 5)
    asked = [shown(page)]
    for count in (1, 2):  # as the system tells it: the second press within half a second
        page.mouse.down(click_count=count)
        page.mouse.up(click_count=count)
        page.wait_for_timeout(SETTLED + 50)
        asked.append(shown(page))
    assert asked[0] != asked[1] == asked[2]
    page.mouse.down()  # a click of its own
    page.mouse.up()
    wait_for_votes(served.store, 2)
    assert [one.prompt.messages[-1].content for one in served.store.judgements()] == asked[:2]


def test_what_is_typed_in_two_windows_is_kept(browser: Browser, served: Served) -> None:
    context, one = owner(browser, served)
    fetched(one)
    two = context.new_page()
    two.goto(f"{served.url}/compare")
    fetched(two)
    assert two.locator("#messages").inner_text() == one.locator("#messages").inner_text()
    asked = shown(two)
    two.locator("#reason").fill("in the second window")
    two.get_by_role("button", name="Flag").click()
    two.locator("#flag-text").fill("a phone number is in it")
    one.bring_to_front()
    press(one, "1")
    two.bring_to_front()
    expect(two.locator("#refused pre")).to_have_text("in the second window")
    two.get_by_role("button", name="Flag it").click()  # the dialog is about the item that it was opened on
    expect(two.locator("#toast")).to_contain_text("Flagged")
    (flag,) = eventually(Manage(served.store).flags)
    assert flag["text"] == "a phone number is in it"
    assert flag["messages"][-1]["content"] == asked


def test_a_session_that_ends_in_the_middle_of_a_reply(browser: Browser, served: Served) -> None:
    Manage(served.store).ask_for_writing(3, 1, "test")
    context, page = annotator(browser, served, "Bo")
    page.goto(f"{served.url}/write")
    expect(page.locator("#item")).to_be_visible()
    page.locator("#text").fill("forty minutes of work")
    context.clear_cookies()
    page.locator("#text").press("Control+Enter")
    expect(page.locator("#offline")).to_contain_text("You are signed out. 1 judgement of yours is kept")
    page.screenshot(path=SHOTS / "odd-signed-out.png")
    with context.expect_page() as opened:
        page.locator("#offline a").click()
    door = opened.value
    door.get_by_label("Name").fill("Bo")
    door.get_by_label("Password").fill(PASSWORD)
    door.get_by_role("button", name="Sign in").click()
    door.wait_for_url("**/compare")
    page.bring_to_front()
    page.evaluate("dispatchEvent(new Event('focus'))")
    expect(page.locator("#offline")).to_be_hidden()
    assert [one.messages[-1].content for one in served.store.demonstrations()] == ["forty minutes of work"]


def test_a_phone_without_a_connection_for_an_hour(browser: Browser, served: Served, clock: Clock) -> None:
    """The item went to somebody else meanwhile; what had a free slot still counts, and the rest can be read."""
    Manage(served.store).ask_for_writing(1, 1, "test")
    context, page = owner(browser, served, is_mobile=True, has_touch=True)
    page.set_viewport_size({"width": 375, "height": 740})
    page.goto(f"{served.url}/write")
    expect(page.locator("#item")).to_be_visible()
    writing = page
    page = context.new_page()
    page.set_viewport_size({"width": 375, "height": 740})
    page.goto(f"{served.url}/compare")
    fetched(page)
    context.set_offline(True)
    writing.locator("#text").fill("a reply from the train")
    writing.get_by_role("button", name="Submit").tap()
    page.bring_to_front()
    for number in range(4):
        page.locator("#reason").fill(f"reason {number}")
        page.wait_for_timeout(4 * SETTLED)  # a busy phone shows the next item late, and a tap too soon is none
        page.locator("[data-choice=tie]").tap()
        expect(page.locator("#offline")).to_contain_text(f"{number + 2} judgements")  # the reply is one
    expect(page.locator("#offline")).to_contain_text("judgements of yours are kept in this browser")
    expect(page.locator("#waiting")).to_be_visible()
    page.screenshot(path=SHOTS / "odd-offline-phone.png")
    clock.ahead = timedelta(hours=1)
    bo, labelling = person(served.store, "bo"), Labelling(served.store)
    given = labelling.next(bo, "write")
    assert given is not None
    labelling.write(bo, given.id, NewWriting("bo's reply", token="a-token-of-bo", seconds=1.0))
    for number in range(2):  # those that come first, as they did for the phone: two of its four slots are free still
        screen = labelling.next(bo, "compare")
        assert screen is not None
        labelling.judge(bo, screen.id, NewVote("left", token=f"token-of-bo-{number}", strength=1, seconds=1.0))
    context.set_offline(False)
    page.evaluate("dispatchEvent(new Event('online'))")
    expect(page.locator("#offline")).to_be_hidden()
    wait_for_votes(served.store, 4)
    mine = {one.reason for one in served.store.judgements() if one.annotator == "owner"}
    refused = page.locator("#refused li")
    expect(refused).to_have_count(2)
    kept = {text.strip() for text in page.locator("#refused pre").all_inner_texts()}
    assert mine | kept == {f"reason {number}" for number in range(4)}
    assert [one.messages[-1].content for one in served.store.demonstrations()] == [
        "bo's reply",
        "a reply from the train",
    ]
    page.screenshot(path=SHOTS / "odd-after-an-hour.png")


def test_somebody_is_removed_while_they_hold_items(browser: Browser, served: Served, clock: Clock) -> None:
    _, page = annotator(browser, served, "Bo")
    fetched(page)
    served.people.change("Bo", "keel", active=False)
    page.wait_for_timeout(SETTLED)
    page.keyboard.press("1")
    expect(page.locator("#offline")).to_contain_text("1 judgement of yours is kept")
    page.screenshot(path=SHOTS / "odd-removed.png")
    assert served.store.judgements() == []
    clock.ahead = timedelta(minutes=31)
    give_away(served.store, "cy")  # what they held goes to others
    assert len(served.store.judgements()) == 12


def test_what_is_taken_out_leaves_the_screen_and_its_text_stays(browser: Browser, served: Served) -> None:
    _, page = owner(browser, served)
    fetched(page)
    question = page.locator("#messages .text").last.inner_text()
    page.locator("#reason").fill("half a thought")
    boss = person(served.store, "boss", "reviewer")
    prompt = question.removeprefix("Question ").removesuffix("?")
    Manage(served.store).take_out("prompt", f"p{prompt}", "", None, boss)
    page.reload()
    expect(page.locator("#refused pre")).to_have_text("half a thought")
    expect(page.locator("#refused")).to_contain_text("taken out")
    expect(page.locator("#messages")).not_to_contain_text(question)


def test_back_and_forth_between_pages_votes_on_what_is_shown(browser: Browser, served: Served) -> None:
    _, page = owner(browser, served)
    fetched(page)
    said = [shown(page)]
    press(page, "1")
    page.goto(f"{served.url}/mine")
    page.go_back()
    fetched(page)
    said.append(shown(page))
    press(page, "1")
    page.go_forward()
    page.go_back()
    fetched(page)
    said.append(shown(page))
    press(page, "1")
    wait_for_votes(served.store, 3)
    assert [one.prompt.messages[-1].content for one in served.store.judgements()] == said
    assert len(set(said)) == 3


def test_a_page_that_stood_open_over_a_weekend_still_votes(browser: Browser, served: Served) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.clock.install()
    page.goto(f"{served.url}/enter/{served.people.owner_link()}")
    page.wait_for_url("**/compare")
    fetched(page)
    page.clock.fast_forward(3 * 86_400_000)
    page.keyboard.press("1")
    wait_for_votes(served.store, 1)
    (vote,) = served.store.judgements()
    assert vote.seconds == 86_400
    expect(page.locator("#refused")).to_be_hidden()


def test_signing_out_with_votes_that_wait_says_so(browser: Browser, served: Served) -> None:
    _, page = owner(browser, served)
    fetched(page)
    page.route("**/api/**", lambda route: route.abort())
    press(page, "1")
    asked: list[str] = []

    def stay(dialog: Dialog) -> None:
        asked.append(dialog.message)
        dialog.dismiss()

    page.once("dialog", stay)
    page.get_by_role("button", name="Sign out").click()
    assert len(asked) == 1
    assert asked[0].startswith("1 judgement not sent yet will wait here")
    page.unroute_all(behavior="wait")  # a handler cut short ends the driver
    page.evaluate("dispatchEvent(new Event('online'))")
    wait_for_votes(served.store, 1)
    page.wait_for_function("!Object.keys(localStorage).some((key) => key.startsWith('keel-letter-'))")
    page.get_by_role("button", name="Sign out").click()  # nothing waits: nothing is asked
    page.wait_for_url("**/sign-in")


def shown(page: Page) -> str:
    return page.locator("#messages .text").last.inner_text()
