"""Formulas, tables, code and folded messages in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_label_browser import SHOTS, Browser, Served, browser, chromium, expect, owner

from keel.recipe.sections import SamplingConfig
from keel.store import Store
from keel.types import Completion, Message, Prompt

__all__ = ["browser", "chromium"]  # fixtures

GOOD = r"$x^2$, $$\frac{a}{b}$$ and \(f'(x)\)."
BAD = (
    r"$\frac{a$ $\nosuch x$ $\href{https://evil.example}{x}$ $\label{vote} y$ $\rule{900em}{900em}$ "
    + "$"
    + r"\sqrt " * 300
    + "x$\n\n|a long word in a head|another_one_that_is_longer_than_a_phone_is_wide|\n|-|-|\n|1|2|\n\n```\n"
    + "x" * 300
    + "\n```"
)


@pytest.mark.wide
def test_formulas_are_set_and_long_things_scroll_in_themselves(browser: Browser, tmp_path: Path) -> None:
    with Store(tmp_path / "feedback.db") as store:
        with store.session() as s:
            s.add_prompts([Prompt("p", (Message("user", "A line.\n" * 60),))])
            ids = s.add_responses("p", [Completion(GOOD), Completion(BAD)], "m", SamplingConfig(), fingerprint="f")
            s.add_comparisons([(ids[0], ids[1])], 1, "main")
        served = Served(store)
        _, page = owner(browser, served)
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.set_viewport_size({"width": 390, "height": 800})
        expect(page.locator("#item math")).to_have_count(5)
        sources = page.locator("#item code.source").all_inner_texts()
        assert sources[:3] == [r"$\frac{a$", r"$\nosuch x$", r"$\href{https://evil.example}{x}$"]
        assert sources[3].startswith(r"$\sqrt \sqrt")
        assert page.evaluate("document.querySelectorAll('#vote').length === 1 && !document.querySelector('#item a')")
        largest = page.evaluate("Math.max(...[...document.querySelectorAll('.formula')].map((e) => e.offsetHeight))")
        assert largest < 130
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for kind in (".table", "pre"):
            place = page.locator(f"#item {kind}")
            assert place.evaluate("(e) => e.scrollWidth > e.clientWidth")
            place.focus()
            page.keyboard.press("ArrowRight")
            page.wait_for_function("(e) => e.scrollLeft > 0", arg=place.element_handle())
        assert page.locator("#messages .fold").evaluate("(e) => !e.open")
        page.keyboard.press("o")
        assert page.locator("#messages .fold").evaluate("(e) => e.open")
        assert not page.locator("#left").evaluate("(e) => e.getBoundingClientRect().top < innerHeight")
        page.keyboard.press("d")
        page.wait_for_function("document.querySelector('#left').getBoundingClientRect().top < 200")
        page.screenshot(path=SHOTS / "texts-phone.png", full_page=True)
        assert said == []  # the content policy had nothing to refuse
        served.close()
