"""The page of steps in a real browser, on both databases: by keyboard, on a phone, and by odd people."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from labelling_world import PASSWORD, person
from test_label_browser import SETTLED, SHOTS, Clock, Served, annotator, browser, chromium, fetched, nameless, owner
from test_label_steps import LINES, ask, fill, given
from waiting import eventually

from keel.store import Store
from keel.store.step_records import NewSteps, StepJudgement
from keel.web.service.labelling import Labelling
from keel.web.service.steps import StepWork

if True:  # after the skip of test_label_browser
    from playwright.sync_api import Browser, Page, expect

__all__ = ["browser", "chromium"]

LONG = " ".join(["A step that goes on and on."] * 186)  # 5,021 characters
ODD = (
    "\n".join(f"{n} + 1 = {n + 1}" for n in range(60)),
    f"{LONG}\nso it is 3",
    "نبدأ بثلاثة وأربعة: 3 + 4 = 7\nالجواب 7",
    "<img src=x onerror=\"document.title='taken'\"> is 3\n<script>document.title='taken'</script>\n&lt;b&gt; 4 < 5",
)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def serve(url: str, clock: Clock, texts: tuple[str, ...] = ()) -> Iterator[Served]:
    with Store(url, clock=clock) as store:
        ids = fill(store, 6, texts)
        ask(store, ids)
        running = Served(store)
        yield running
        running.close()


@pytest.fixture
def served(new_url: Callable[[], str], clock: Clock) -> Iterator[Served]:
    yield from serve(new_url(), clock)


BOTH = [pytest.param("sqlite"), pytest.param("postgresql", marks=pytest.mark.wide)]


@pytest.fixture
def on_file(tmp_path: object, clock: Clock) -> Iterator[Served]:
    yield from serve(f"sqlite:///{tmp_path}/feedback.db", clock)


def opened(page: Page, served: Served) -> Page:
    page.goto(f"{served.url}/steps")
    fetched(page)
    page.wait_for_timeout(SETTLED)
    return page


def keys(page: Page, pressed: str) -> None:
    for key in pressed:
        page.keyboard.press(key)


def after(page: Page, act: Callable[[], object]) -> None:
    """Hands in, and waits until the next item takes labels."""
    before = page.locator("#messages").inner_text()
    act()
    expect(page.locator("#messages")).not_to_have_text(before)
    page.wait_for_timeout(SETTLED)


def said(served: Served, count: int) -> list[StepJudgement]:
    eventually(lambda: len(given(served.store)) == count)
    return given(served.store)


def states(page: Page) -> list[str]:
    return page.locator(".step-label").all_inner_texts()


@pytest.mark.parametrize("new_url", BOTH, indirect=True)
def test_by_keyboard_alone(browser: Browser, served: Served) -> None:
    _, page = owner(browser, served)
    opened(page, served)
    expect(page.locator("#answer")).to_have_text("14")
    keys(page, "1j3")  # the second is passed over, the third is bad
    assert states(page) == ["Good", "", "Bad"]
    page.keyboard.press("Enter")
    expect(page.locator("#toast")).to_have_text("Step 2 has no label yet")
    page.keyboard.press("3")  # an earlier rating, and the first bad step is another one now
    assert states(page) == ["Good", "Bad", "not judged"]
    keys(page, "j1")
    expect(page.locator("#toast")).to_have_text("Nothing after step 2 is judged: it is bad")
    keys(page, "57c")
    page.keyboard.type("Twice that: 7 * 2 = 14")
    page.keyboard.press("Enter")  # leaves the line
    expect(page.locator("#correction")).not_to_be_focused()
    page.screenshot(path=SHOTS / "steps.png")
    after(page, lambda: page.keyboard.press("Enter"))
    (one,) = said(served, 1)
    assert (one.labels, one.outcome, one.reasons) == (("good", "bad", None), "found_error", ("sum", "follow"))
    assert (one.correction, one.reference_shown, one.drawn) == ("Twice that: 7 * 2 = 14", True, "random")
    assert one.seconds is not None
    assert one.seconds == pytest.approx(sum(seconds or 0 for seconds in one.step_seconds), abs=0.05)
    assert one.step_seconds[0]  # it was looked at while the page settled
    after(page, lambda: page.keyboard.press("u"))
    assert states(page) == ["Good", "Bad", "not judged"]
    expect(page.locator("#correction")).to_have_value("Twice that: 7 * 2 = 14")
    keys(page, "kk")
    expect(page.locator("[aria-current=step] .step-text")).to_have_text(LINES[0].strip())
    keys(page, "j2j4")
    assert states(page) == ["Good", "Neutral", "Unsure"]
    after(page, lambda: page.keyboard.press("Enter"))
    (one,) = said(served, 1)
    assert (one.labels, one.outcome, one.correction) == (("good", "neutral", "unsure"), "solution", None)
    expect(page.locator("#refused pre")).to_have_text("Twice that: 7 * 2 = 14")  # what was typed is never thrown away
    keys(page, "a1g")
    expect(page.locator("#answer")).to_be_hidden()
    page.keyboard.type("I know nothing of this")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    after(page, lambda: page.keyboard.press("Enter"))
    page.keyboard.press("b")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    after(page, lambda: page.keyboard.press("Enter"))
    given_up, problem = said(served, 3)[1:]
    assert (given_up.outcome, given_up.labels, given_up.note) == (
        "give_up", ("good", None, None), "I know nothing of this",
    )  # fmt: skip
    assert (problem.outcome, problem.labels, problem.reference_shown) == ("bad_problem", (None,) * 3, False)


@pytest.mark.wide
def test_nothing_is_lost(browser: Browser, on_file: Served, clock: Clock) -> None:
    """A reload, a second window, no connection, a session that ends, and a lease that ran out."""
    context, page = annotator(browser, on_file, "Bo")
    opened(page, on_file)
    keys(page, "13")
    page.locator("#correction").fill("so it is")
    page.reload()
    expect(page.locator("#correction")).to_have_value("so it is")
    assert states(page) == ["Good", "Bad", "not judged"]
    page.wait_for_timeout(SETTLED)
    second = context.new_page()
    opened(second, on_file)
    expect(second.locator("#correction")).to_have_value("so it is")
    second.locator("#correction").fill("in the second window")
    page.bring_to_front()
    context.set_offline(True)
    after(page, lambda: page.get_by_role("button", name="Hand in").click())
    expect(page.locator("#offline")).to_contain_text("1 judgement of yours is kept")
    expect(second.locator("#refused pre")).to_contain_text("in the second window")
    expect(second.locator("#refused pre")).to_contain_text("2 bad")
    second.close()
    context.set_offline(False)
    (one,) = said(on_file, 1)
    assert one.correction == "so it is"
    keys(page, "111")
    clock.ahead += timedelta(minutes=31)
    other, labelling = person(on_file.store, "ann"), Labelling(on_file.store)
    while (screen := labelling.next(other, "step")) is not None:
        labelling.label_steps(other, screen.id, NewSteps(("good",) * 3, "solution", token=f"ann-{screen.id}"))
    assert len(given(on_file.store)) == 6
    context.clear_cookies()
    page.keyboard.press("Enter")
    expect(page.locator("#offline")).to_contain_text("You are signed out. 1 judgement of yours is kept")
    with context.expect_page() as door:
        page.locator("#offline a").click()
    door.value.get_by_label("Name").fill("Bo")
    door.value.get_by_label("Password").fill(PASSWORD)
    door.value.get_by_role("button", name="Sign in").click()
    door.value.wait_for_url("**/compare")
    page.bring_to_front()
    page.evaluate("dispatchEvent(new Event('focus'))")
    late = said(on_file, 7)[-1]
    assert (late.annotator, late.labels) == ("Bo", ("good",) * 3)
    assert len({one.token for one in given(on_file.store)}) == 7


@pytest.mark.wide
def test_what_was_said_of_a_step_stays_its_own(browser: Browser, on_file: Served) -> None:
    """A line for step 3 is none for step 1; who saw the answer has seen it; a tab that was left open for a day."""
    context, page = owner(browser, on_file)
    opened(page, on_file)
    keys(page, "a")  # hidden, before anything was said: it had been seen
    page.reload()
    fetched(page)
    page.wait_for_timeout(SETTLED)
    expect(page.locator("#answer")).to_be_hidden()
    keys(page, "1135")
    page.locator("#correction").fill("for the third")
    page.locator("#correction").press("Enter")
    keys(page, "kk36")
    assert states(page) == ["Bad", "not judged", "not judged"]
    expect(page.locator("#correction")).to_have_value("")
    assert page.get_by_role("checkbox", checked=True).count() == 1
    expect(page.locator("#refused")).to_contain_text("It was written for step 3, and step 1 is the first bad one")
    keys(page, "1")  # it was a slip
    keys(page, "jj")
    keys(page, "3")
    expect(page.locator("#correction")).to_have_value("for the third")
    expect(page.locator("#refused")).to_be_hidden()
    change = """key => {
        const kept = JSON.parse(localStorage.getItem(key));
        kept.fields.marks = kept.fields.marks.replace(/^1 good .*$/m, "1 good (86399.99 s)");
        localStorage.setItem(key, JSON.stringify(kept));
    }"""
    (draft,) = page.evaluate("Object.keys(localStorage).filter(key => key.startsWith('keel-draft-'))")
    page.evaluate(change, draft)
    opened(page, on_file)
    page.wait_for_timeout(1000)
    after(page, lambda: page.keyboard.press("Enter"))
    (one,) = said(on_file, 1)
    assert (one.labels, one.correction, one.reasons) == (("good", "good", "bad"), "for the third", ("sum",))
    assert (one.reference_shown, one.seconds) == (True, 86_400)
    opened(page, on_file)  # this tab knows nothing of it any more
    after(page, lambda: page.keyboard.press("u"))
    after(page, lambda: page.keyboard.press("Enter"))
    (one,) = said(on_file, 1)
    assert (one.labels, one.reference_shown) == (("good", "good", "bad"), True)
    context.close()


@pytest.mark.wide
def test_odd_replies_on_a_phone(browser: Browser, tmp_path: object, clock: Clock) -> None:
    for odd in serve(f"sqlite:///{tmp_path}/feedback.db", clock, ODD):
        _, page = owner(browser, odd, is_mobile=True, has_touch=True)
        page.set_viewport_size({"width": 375, "height": 740})
        opened(page, odd)
        counts = set()
        for number in range(len(ODD)):
            steps = page.locator(".step-text")
            counts.add(steps.count())
            text = "\n".join(steps.all_inner_texts())
            assert text in [one.strip() for one in ODD]
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 0
            if "نبدأ" in text:
                assert page.evaluate("getComputedStyle(document.querySelector('.step-text')).direction") == "rtl"
            page.get_by_role("button", name="Bad", exact=True).tap()
            page.screenshot(path=SHOTS / f"steps-phone-{number}.png")
            button = page.get_by_role("button", name="Hand in")
            button.tap()
            if number + 1 < len(ODD):
                expect(page.locator(".step-text").first).not_to_have_text(text.split("\n")[0])
                page.wait_for_timeout(SETTLED)
        assert counts == {60, 2, 3}
        assert {one.labels[0] for one in said(odd, len(ODD))} == {"bad"}
        assert page.title() == "Steps · Keel"


@pytest.mark.wide
def test_what_a_screen_reader_finds(browser: Browser, on_file: Served) -> None:
    StepWork(on_file.store).allow_reference(False, "boss")
    _, page = owner(browser, on_file)
    opened(page, on_file)
    expect(page.locator("#reference")).to_be_hidden()  # the project does not allow it
    assert page.evaluate("document.activeElement.id") == "prompt-h"
    assert nameless(page) == []
    expect(page.get_by_role("list", name="The reply, step by step").get_by_role("listitem")).to_have_count(3)
    page.keyboard.press("1")
    step = page.get_by_role("listitem").filter(has_text=LINES[1].strip())
    expect(step).to_be_focused()  # it is read
    expect(step).to_have_attribute("aria-current", "step")
    page.get_by_role("button", name="Unsure").focus()
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Unsure")).to_be_focused()  # who tabs keeps their place
    expect(page.locator("#reader")).to_have_text(f"Step 3: {LINES[2]}")
    keys(page, "3")
    expect(page.get_by_role("button", name="3 Bad")).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("group", name="Why?").get_by_role("checkbox")).to_have_count(4)
    page.get_by_role("checkbox", name="the sum is wrong").check(force=True)
    page.wait_for_timeout(SETTLED)
    page.get_by_role("button", name="Hand in").dblclick()  # one hand-in, whose second press is no word on the next
    page.wait_for_timeout(SETTLED)
    (one,) = said(on_file, 1)
    assert (one.labels, one.reasons, one.reference_shown) == (("good", "unsure", "bad"), ("sum",), False)
