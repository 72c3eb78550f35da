"""The pages of constitutions in a real browser."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright")

from labelling_world import person
from playwright.sync_api import Browser, expect
from test_label_browser import SETTLED, SHOTS, Served, browser, chromium, nameless, owner, served  # noqa: F401
from test_label_constitution import labelled, two
from waiting import eventually

from keel.store import constitutions, principles


def answers(served: Served) -> list[str]:  # noqa: F811
    with served.store.transaction(writes=False) as c:
        return [row["answer"] for row in principles.given(c)]


def test_a_draft_is_published_and_its_principles_are_asked_about(browser: Browser, served: Served) -> None:  # noqa: F811
    author = person(served.store, "author", "admin").annotator_id
    with served.store.transaction(writes=True) as c:
        constitutions.publish_file(c, two(), author, served.store.now)
    mark = labelled(served.store)
    context, page = owner(browser, served)
    page.goto(f"{served.url}/manage/constitution")
    page.get_by_role("button", name="Begin a draft").click()
    assert nameless(page) == []
    page.get_by_text("Edit kind").click()
    page.get_by_label("Text").first.fill("Be kind to everybody.")
    page.get_by_role("button", name="Keep in the draft").first.click()
    expect(page.locator("ins")).to_have_text("Be kind to everybody.")
    page.get_by_role("button", name="Publish version 2").click()
    expect(page.locator("#content")).to_contain_text("version 2 is published")
    page.screenshot(path=SHOTS / "constitution.png", full_page=True)
    page.goto(f"{served.url}/manage/why?vote={mark}")
    expect(page.locator(".case")).to_contain_text("version 1")
    expect(page.locator(".case")).to_contain_text("as it was sent")
    page.screenshot(path=SHOTS / "why.png", full_page=True)
    page.goto(f"{served.url}/principles")
    expect(page.locator("#item")).to_be_visible()
    assert nameless(page) == []
    assert page.evaluate("document.activeElement.id") == "prompt-h"  # reading starts at the conversation
    page.screenshot(path=SHOTS / "principles.png", full_page=True)
    page.wait_for_timeout(SETTLED)
    page.keyboard.press("2")
    eventually(lambda: answers(served) == ["broken"], lambda s: page.wait_for_timeout(1000 * s))
    expect(page.locator("#item")).to_be_visible()
    expect(page.locator("#today")).to_have_text("1")
    page.wait_for_timeout(SETTLED)
    with page.expect_response("**/api/principles/skip"):
        page.keyboard.press("s")
    expect(page.locator("#item")).to_be_visible()
    expect(page.locator("#today")).to_have_text("1")
    with page.expect_response("**/api/principles/undo"):
        page.keyboard.press("u")
    expect(page.locator("#item")).to_be_visible()
    page.wait_for_timeout(SETTLED)
    page.keyboard.press("u")
    eventually(lambda: answers(served) == [], lambda s: page.wait_for_timeout(1000 * s))
    expect(page.locator("#item")).to_be_visible()
    page.wait_for_timeout(SETTLED)
    context.set_offline(True)
    page.get_by_role("button", name="Kept").click()
    expect(page.locator("#offline")).to_contain_text("kept in this browser")
    context.set_offline(False)
    eventually(lambda: answers(served) == ["kept"], lambda s: page.wait_for_timeout(1000 * s))
    page.set_viewport_size({"width": 390, "height": 844})
    page.emulate_media(color_scheme="dark")
    expect(page.locator("#item")).to_be_visible()
    page.screenshot(path=SHOTS / "principles-phone.png", full_page=True)
    for path in ("/constitution", "/manage/constitution"):
        answer = page.goto(f"{served.url}{path}")
        assert answer is not None
        assert answer.ok, path
        page.screenshot(path=SHOTS / f"{path.replace('/', '')}-phone.png", full_page=True)
        wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
        assert not wide, path
