"""The app in a real browser: Debian's Chromium, driven by Playwright. Screenshots are kept in test-artefacts/."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import uvicorn
from labelling_world import PASSWORD, fake_sources, fill, person
from loopback import free_port
from test_label_constitution import labelled, two
from test_label_models import Judged
from waiting import eventually

from keel.store import Store, constitutions, thumbs
from keel.web.app.create import create_app
from keel.web.service.manage import Manage
from keel.web.service.people import People
from keel.web.service.sources import TrainedModel
from keel.web.service.start import prepare

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
if not Path(CHROMIUM).exists() and os.environ.get("CI") != "true":
    pytest.skip("Chromium is not installed; on Debian: apt-get install chromium", allow_module_level=True)

from playwright.sync_api import Browser, BrowserContext, Page, ViewportSize, expect, sync_playwright  # noqa: E402

expect.set_options(timeout=30_000)  # a slow machine is none of the things that are tested
MANAGED = (
    "quality", "models", "disagreements", "flags", "constitution", "prompts", "queue", "gold", "training", "people",
    "guideline", "export", "events", "arena", "arena/votes",
)  # fmt: skip
DESKTOP: ViewportSize = {"width": 1280, "height": 800}
SETTLED = 300  # milliseconds, after which an item on the screen takes a vote
if os.environ.get("CI"):  # nobody looks at pictures there, and each costs a browser some time
    Page.screenshot = lambda page, **_: page.wait_for_timeout(SETTLED) or b""  # type: ignore[method-assign,func-returns-value]
SHOTS = Path(__file__).parent.parent / "test-artefacts" / "label"


class Clock:
    """The server's time, which tests move on."""

    ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


class Served:
    """The app on a free port, in a thread."""

    def __init__(
        self, store: Store, delay: float = 0.01, trained: Callable[[], Sequence[TrainedModel]] = tuple
    ) -> None:
        prepare(store)
        self.store = store
        self.people = People(store)
        app = create_app(store, replace(fake_sources(delay), trained=trained))
        config = uvicorn.Config(app, port=free_port(), log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        eventually(lambda: self._server.started)
        self.url = f"http://127.0.0.1:{config.port}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with Store(tmp_path / "feedback.db") as store:
        fill(store, 30, replies=4)
        running = Served(store)
        yield running
        running.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        browser.new_context(viewport=DESKTOP)
        yield browser
        browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """Pages that were left open would go on asking a server that is gone."""
    yield chromium
    kept, *others = chromium.contexts
    for context in others:
        context.close()
    for page in kept.pages:
        page.close()
    kept.clear_cookies()
    kept.set_offline(False)


def profile(browser: Browser, **options: object) -> BrowserContext:
    """A browser of somebody's own. The first of each test is one and the same, since to make one takes longer than
    most tests: it has no cookies, and what its pages stored belongs to servers of other ports. It is not closed before
    the last test ends. Tests that set its clock or change its scripts make their own."""
    kept = browser.contexts[0]
    if options or kept.pages:
        return browser.new_context(viewport=DESKTOP, **options)  # type: ignore[arg-type]
    return kept


def open_as(browser: Browser, served: Served, link: str, **options: object) -> tuple[BrowserContext, Page]:
    context = profile(browser, **options)
    page = context.new_page()
    page.on("pageerror", lambda error: pytest.fail(f"a script failed: {error}"))
    page.goto(f"{served.url}{link}")
    return context, page


def owner(browser: Browser, served: Served, **options: object) -> tuple[BrowserContext, Page]:
    context, page = open_as(browser, served, f"/enter/{served.people.owner_link()}", **options)
    page.wait_for_url("**/compare")
    return context, page


def annotator(browser: Browser, served: Served, name: str) -> tuple[BrowserContext, Page]:
    context, page = open_as(browser, served, f"/join/{served.people.invite('annotator', 'keel')}")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Join").click()
    page.goto(f"{served.url}/compare")
    return context, page


def press(page: Page, key: str) -> None:
    """A key once there is an item on the screen, and then a new item (or none)."""
    before = page.locator("#messages").inner_text()
    page.wait_for_timeout(SETTLED)
    page.keyboard.press(key)
    expect(page.locator("#messages")).not_to_have_text(before)


def nameless(page: Page) -> list[str]:
    """The controls of which a screen reader could not say what they are."""
    found: list[str] = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea, select')].filter((e) => e.type !== 'hidden' &&"
        " !(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label'))).map((e) => e.outerHTML)"
    )
    return found


# On a slow machine a page may ask for nothing for a while and not be done. Where a test has the clock, no list is kept.
FOUR_ASKED = """() => {
    const loaded = performance.getEntriesByType('resource').map((entry) => entry.name);
    return !loaded.length || loaded.filter((name) => name.endsWith('/api/next')).length >= 4;
}"""


def fetched(page: Page) -> None:
    """Once a page that was opened shows an item and has fetched the next ones. (Later on nothing is waited for.)"""
    expect(page.locator("#item")).to_be_visible()
    page.wait_for_function(FOUR_ASKED)
    page.wait_for_load_state("networkidle")


def wait_for_votes(store: Store, count: int, page: Page | None = None) -> None:
    """A page goes on once its browser keeps a vote; the store has it later. ``page``: its handlers work meanwhile."""
    rest = time.sleep if page is None else lambda seconds: page.wait_for_timeout(1000 * seconds)
    eventually(lambda: len(store.judgements()) == count, rest)


def test_a_new_guideline_is_announced_where_people_work(
    browser: Browser, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keel.web.service.labelling._KEPT_SECONDS", 0.0)
    _, page = owner(browser, served)
    expect(page.locator("#left")).to_contain_text("Answer")
    expect(page.locator("#changed")).to_be_hidden()
    Manage(served.store).add_guideline("New words", "", "boss")
    press(page, "1")
    expect(page.locator("#changed")).to_contain_text("The guideline has changed")
    page.screenshot(path=SHOTS / "compare-new-guideline.png")
    press(page, "2")
    page.get_by_role("link", name="Read the new version").click()
    expect(page.locator("main")).to_contain_text("New words")
    page.get_by_role("link", name="Start comparing").click()
    expect(page.locator("#left")).to_contain_text("Answer")
    press(page, "3")
    wait_for_votes(served.store, 3)
    assert [vote.guideline for vote in served.store.judgements()] == ["1", "1", "2"]


def test_twenty_items_by_keyboard_and_undo(browser: Browser, served: Served) -> None:
    _, page = owner(browser, served)
    expect(page.locator("#left")).to_contain_text("Answer")
    page.screenshot(path=SHOTS / "compare.png")
    keys = list("1234567tb") * 3
    for key in keys[:20]:
        press(page, key)
    wait_for_votes(served.store, 20)
    expect(page.locator("#today")).to_have_text("20")
    choices = [(vote.choice, vote.strength) for vote in served.store.judgements()]
    expected = {
        "1": ("left", 3), "2": ("left", 2), "3": ("left", 1), "4": ("tie", None), "5": ("right", 1),
        "6": ("right", 2), "7": ("right", 3), "t": ("tie", None), "b": ("both_bad", None),
    }  # fmt: skip
    assert choices == [expected[key] for key in keys[:20]]
    page.keyboard.press("u")
    expect(page.locator("#today")).to_have_text("19")
    press(page, "s")
    page.keyboard.press("r")
    page.keyboard.type("the 3rd is the best")  # digits in a field are no votes
    page.keyboard.press("Escape")
    page.get_by_text("Rate each response").click()
    page.locator('input[name="left/helpful"][value="4"]').check(force=True)
    page.screenshot(path=SHOTS / "compare-ratings.png")
    press(page, "2")
    wait_for_votes(served.store, 20)
    assert served.store.judgements()[-1].reason == "the 3rd is the best"
    page.keyboard.press("f")
    page.get_by_placeholder("For the reviewers").fill("personal data")
    page.screenshot(path=SHOTS / "compare-flag.png")
    with page.expect_response(
        "**/api/flag"
    ):  # leaving the page at once would keep it in the browser until the next visit
        page.get_by_role("button", name="Flag it").click()
    page.goto(f"{served.url}/manage/flags")
    expect(page.locator("main")).to_contain_text("personal data")


def test_a_key_or_tap_that_comes_twice_is_no_vote_on_the_next_item(browser: Browser, served: Served) -> None:
    _, page = owner(browser, served)
    fetched(page)
    first = page.locator("#messages").inner_text()
    page.keyboard.press("1")
    page.keyboard.press("1")
    wait_for_votes(served.store, 1)
    second = page.locator("#messages").inner_text()
    assert second != first
    page.wait_for_timeout(SETTLED)
    page.get_by_role("button", name="B is better").dblclick()
    wait_for_votes(served.store, 2)
    page.wait_for_timeout(500)
    assert [vote.choice for vote in served.store.judgements()] == ["left", "right"]


def test_thumbs_by_key_and_tap_undone_and_flagged(browser: Browser, served: Served) -> None:
    Manage(served.store).ask_for("thumb", 6, 1, "boss")
    context, page = owner(browser, served)
    page.goto(f"{served.url}/thumbs")
    expect(page.locator("#reply")).to_contain_text("Answer")
    page.screenshot(path=SHOTS / "thumbs.png")

    def one(act: Callable[[], None]) -> None:
        before = page.locator("#reply").inner_text()
        page.wait_for_timeout(SETTLED)
        act()
        expect(page.locator("#reply")).not_to_have_text(before)

    def given() -> list[tuple[bool, str | None]]:
        with served.store.transaction(writes=False) as connection:
            return [(thumb.up, thumb.reason) for thumb in thumbs.given(connection, None)]

    one(lambda: page.keyboard.press("1"))
    one(lambda: page.keyboard.press("2"))
    one(lambda: page.get_by_role("button", name="Thumbs up").click())
    expect(page.locator("#today")).to_have_text("3")
    taken_back = page.locator("#reply").inner_text()
    page.keyboard.press("u")
    expect(page.locator("#today")).to_have_text("2")
    expect(page.locator("#reply")).not_to_have_text(taken_back)
    page.keyboard.press("r")
    page.keyboard.type("2 of 3 sums are wrong")  # digits in a field are no thumbs
    page.keyboard.press("Escape")
    context.set_offline(True)  # what is done is kept, and sent later
    one(lambda: page.keyboard.press("2"))
    expect(page.locator("#offline")).to_contain_text("1 judgement")
    context.set_offline(False)
    expect(page.locator("#offline")).to_be_hidden()
    one(lambda: page.keyboard.press("s"))
    page.keyboard.press("f")
    page.get_by_placeholder("For the reviewers").fill("a name in it")
    with page.expect_response("**/api/flag"):
        page.get_by_role("button", name="Flag it").click()
    assert given() == [(True, None), (False, None), (False, "2 of 3 sums are wrong")]
    page.goto(f"{served.url}/manage/quality")
    expect(page.locator("main")).to_contain_text("Thumbs on single replies")
    page.screenshot(path=SHOTS / "thumbs-quality.png", full_page=True)
    page.goto(f"{served.url}/manage/gold?kind=thumb")
    page.screenshot(path=SHOTS / "thumbs-gold.png")
    page.get_by_role("button", name="Not good").first.click()
    expect(page.locator("main")).to_contain_text("1 gold item")


def test_two_people_at_once_get_different_items(browser: Browser, served: Served) -> None:
    _, ann = annotator(browser, served, "Ann")
    _, bo = annotator(browser, served, "Bo")
    for _ in range(6):
        press(ann, "2")
        press(bo, "6")
    wait_for_votes(served.store, 12)
    votes = served.store.judgements()
    assert len({vote.item_id for vote in votes}) == 12
    assert {vote.annotator for vote in votes} == {"Ann", "Bo"}


def test_votes_made_without_a_connection_are_sent_later_and_count_once(browser: Browser, served: Served) -> None:
    context, page = owner(browser, served)
    fetched(page)
    context.set_offline(True)
    press(page, "1")
    press(page, "7")
    expect(page.locator("#offline")).to_contain_text("kept in this browser")
    page.screenshot(path=SHOTS / "offline.png")
    assert served.store.judgements() == []
    context.set_offline(False)
    wait_for_votes(served.store, 2)
    expect(page.locator("#offline")).to_be_hidden()
    context.set_offline(True)
    press(page, "2")
    page.wait_for_timeout(300)
    context.set_offline(False)
    page.goto(f"{served.url}/rank")  # the browser left the page with a vote unsent; any working page sends it
    wait_for_votes(served.store, 3)
    assert [vote.choice for vote in served.store.judgements()] == ["left", "right", "left"]


def test_the_arena_streams_and_tells_names_after_the_vote(browser: Browser, served: Served) -> None:
    _, page = owner(browser, served)
    page.goto(f"{served.url}/arena")
    page.screenshot(path=SHOTS / "arena-empty.png")
    for message in ("hello", "and again"):
        page.get_by_label("Your message", exact=True).fill(message)
        page.keyboard.press("Enter")
        expect(page.locator(".turn").last.locator(".response.b")).to_contain_text(f"I heard: {message}")
        expect(page.locator(".streaming")).to_have_count(0)
    assert "secret" not in page.content()
    page.reload()  # the conversation is still there
    expect(page.locator(".turn")).to_have_count(2)
    page.get_by_role("button", name="A is better").click()
    expect(page.locator("#names")).to_contain_text("secret-one")
    expect(page.locator("#names")).to_contain_text("secret-two")
    page.screenshot(path=SHOTS / "arena-voted.png")


def test_admin_pages_rank_write_and_edit(browser: Browser, served: Served) -> None:
    _, page = owner(browser, served)
    for name in ("", "/quality", "/queue", "/events"):  # all of them: below, on a phone
        page.goto(f"{served.url}/manage{name}")
        expect(page.locator("h1")).to_be_visible()
        cut = "found => found.filter((e) => e.scrollWidth > e.clientWidth).length"
        assert page.locator(".tabs, .bar nav ul").evaluate_all(cut) == 0, name
        page.screenshot(path=SHOTS / f"manage{name.replace('/', '-')}.png", full_page=True)
    page.goto(f"{served.url}/manage/gold")
    page.get_by_role("button", name="Left is better").first.click()
    expect(page.locator("main")).to_contain_text("1 gold item")
    page.goto(f"{served.url}/manage/people")
    page.get_by_role("button", name="Make a link").click()
    assert "/join/" in page.get_by_label("Link").input_value()
    page.screenshot(path=SHOTS / "manage-people.png")
    page.goto(f"{served.url}/manage/prompts")
    file = {"name": "prompts.jsonl", "mimeType": "application/json", "buffer": b"What is a keel?\n"}
    page.get_by_label("File").set_input_files(files=[file])  # type: ignore[list-item]
    page.get_by_role("button", name="Import").click()
    expect(page.get_by_role("status").first).to_contain_text("1 prompt read")
    page.screenshot(path=SHOTS / "manage-prompts.png", full_page=True)
    for kind, label in (("rank", "rank responses"), ("write", "write replies"), ("edit", "edit responses")):
        page.get_by_label("Work").select_option(label=label)
        page.get_by_role("button", name="Queue", exact=True).first.click()
        expect(page.get_by_role("status").first).to_contain_text("items queued")
        assert kind
    page.goto(f"{served.url}/rank")
    expect(page.locator(".ranked .response")).to_have_count(4)
    for key in "2134":
        page.keyboard.press(key)
    page.screenshot(path=SHOTS / "rank.png")
    page.keyboard.press("Enter")
    expect(page.locator("#today")).to_have_text("1")
    page.keyboard.press("u")  # and what was said stands there again
    expect(page.locator(".ranked input:checked")).to_have_count(4)
    assert page.locator(".ranked input:checked").evaluate_all("found => found.map((e) => e.value).join('')") == "2134"
    page.keyboard.press("Enter")
    expect(page.locator("#today")).to_have_text("1")
    for kind in ("write", "edit"):
        page.goto(f"{served.url}/{kind}")
        page.locator("#text").fill(f"My own {kind}")
        page.screenshot(path=SHOTS / f"{kind}.png")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#today")).to_have_text("1")
        page.get_by_role("button", name="Undo the last one").click()
        expect(page.locator("#today")).to_have_text("0")
        expect(page.locator("#text")).to_have_value(f"My own {kind}")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#today")).to_have_text("1")
    assert [d.messages[-1].content for d in served.store.demonstrations()] == ["My own write", "My own edit"]
    assert len(served.store.preferences()) == 7


def test_model_pages_are_readable_on_a_desktop_and_a_phone(browser: Browser, tmp_path: Path) -> None:
    with Store(tmp_path / "feedback.db") as store:
        judged = Judged(store)
        served = Served(store, trained=judged.models)
        context, page = owner(browser, served)
        page.goto(f"{served.url}/manage/models")
        page.get_by_role("link", name="reward").click()
        expect(page.get_by_role("heading", name="reward")).to_be_visible()
        page.screenshot(path=SHOTS / "model.png", full_page=True)
        page.get_by_role("row", name="bo").get_by_role("link", name="2").click()
        expect(page.locator("h1")).to_have_text("Judgements of reward")
        expect(page.locator(".case")).to_have_count(2)
        page.screenshot(path=SHOTS / "model-judgements.png", full_page=True)
        phone = browser.new_context(viewport={"width": 375, "height": 740}, storage_state=context.storage_state())
        page = phone.new_page()
        for name in ("models", "models/reward", "models/ppo", "models/reward/judgements", "quality"):
            page.goto(f"{served.url}/manage/{name}")
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 0, name
            page.screenshot(path=SHOTS / f"phone-manage-{name.replace('/', '-')}.png", full_page=True)
        served.close()


def test_on_a_phone_in_the_dark_nothing_is_cut_off(browser: Browser, served: Served) -> None:
    context, _ = owner(browser, served)
    phone = browser.new_context(
        viewport={"width": 390, "height": 740},
        storage_state=context.storage_state(),
        color_scheme="dark",
        has_touch=True,
    )
    page = phone.new_page()
    for kind in ("rank", "edit", "thumb", "write"):
        Manage(served.store).ask_for_writing(3, 1, "test") if kind == "write" else Manage(served.store).ask_for(
            kind, 3, 1, "test"
        )
    mark, author = labelled(served.store), person(served.store, "author", "admin").annotator_id
    with served.store.transaction(writes=True) as c:
        constitutions.publish_file(c, two(), author, served.store.now)
    working = ("compare", "rank", "thumbs", "steps", "principles", "write", "edit", "arena", "mine")
    pages = (*working, "guideline", "constitution", "account", "manage", f"manage/why?vote={mark}")
    for path in (*pages, *(f"manage/{name}" for name in MANAGED)):
        answer = page.goto(f"{served.url}/{path}")
        assert answer is not None
        assert answer.ok, path
        page.wait_for_timeout(300)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, path
        if path in ("rank", "thumbs", "principles", "write", "edit"):
            expect(page.locator("#item")).to_be_visible()
            for button in page.locator("#vote button").all():
                box = button.bounding_box()
                assert box is not None
                assert box["x"] >= 0, path
                assert box["x"] + box["width"] <= 390, path
        if path.startswith("manage"):  # where the page is can be seen
            tab = page.locator(".tabs [aria-current]").bounding_box()
            assert tab is not None
            assert tab["x"] + tab["width"] <= 390, path
        ends = "found => found.map((e) => e.getBoundingClientRect().right)"
        places = page.locator(".bar nav a").evaluate_all(ends)  # of the menu, not the page's own alone
        assert 0 < max(places) <= 391, path
        page.screenshot(path=SHOTS / f"phone-{path.split('?')[0].replace('/', '-')}.png")
    page.goto(f"{served.url}/compare")
    expect(page.locator("#left")).to_contain_text("Answer")
    page.get_by_role("button", name="A is better").tap()
    wait_for_votes(served.store, 2)  # and the model's


def test_what_a_screen_reader_finds(browser: Browser, served: Served) -> None:
    _, page = owner(browser, served)
    expect(page.locator("#left")).to_contain_text("Answer")
    expect(page.get_by_role("main")).to_have_count(1)
    expect(page.get_by_role("navigation", name="Main")).to_be_visible()
    for name in ("Response A", "Response B"):
        expect(page.get_by_role("heading", name=name)).to_have_count(1)
    expect(page.get_by_role("region", name="Your judgement").get_by_role("button")).to_have_count(11)
    assert page.evaluate("document.activeElement.id") == "prompt-h"  # reading starts at the conversation
    assert nameless(page) == []
    page.keyboard.press("2")
    expect(page.locator("#toast")).to_have_text("A is better")
    assert page.locator("#toast").get_attribute("aria-live") == "polite"
    page.emulate_media(reduced_motion="reduce")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement !== document.body")
