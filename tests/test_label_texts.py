"""How texts are shown: what the pages contain. What a browser makes of it is in test_label_browser.py."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
from labelling_world import World
from test_label_routes import next_item

from keel.recipe.sections import SamplingConfig
from keel.store import Store
from keel.types import Completion, Message, Prompt
from keel.web.app import latex, markdown
from keel.web.app.markdown import conversation, folded, render
from keel.web.app.render import STATIC
from keel.web.app.security import CONTENT_POLICY

HEBREW = "שלום"


def sources(html: str) -> list[str]:
    return [
        re.sub("&amp;", "&", found)
        for found in re.findall(r'<code class="tex" dir="ltr">(.*?)</code>', html, re.DOTALL)
    ]


@pytest.mark.parametrize(
    "text",
    [
        "I have $5 and $6.", "between $5 and 10$", "US$5 or A$6, 7$", "$10k to 20k$", "$1,$2,$3", "$5/$6", "5$, 6$",
        "$HOME/bin:$PATH", "$(this).find($(that))", "$$ and $$$ places", r"\[1\] and \[citation needed\]", "$ x $",
        r"\$x\$", "`$x$` and\n```\n$y$\n```", "    $$x$$ is code", r"\(optional\)", "$$", "$", r"\(", r"\[ x",
        "$a\n\nb$", r"$\def\a{\a\a}\a$", r"$\gdef\x{y}$", r"$\newcommand{\x}{y}$", "$" + "{" * 31 + "}" * 31 + "$",
        f"${'x' * 2001}$", "a$x$ b", "$x$1",
    ],
)  # fmt: skip
def test_what_is_no_formula_stays_text(text: str) -> None:
    assert sources(render(text)) == []
    assert sources(latex.plain(text)) == [] or text.startswith(("`", "    "))  # no Markdown, no code


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$x^2$, the $n$th and $AB$", ["$x^2$", "$n$", "$AB$"]),
        (r"\(a\) \[b = c\] $$d+e$$", [r"\(a\)", r"\[b = c\]", "$$d+e$$"]),
        (r"$a\$b$ costs $5", [r"$a\$b$"]),
        ("设$x$为", ["$x$"]),
        ("Then:\n$$\nx = 1\n- 2\n= 3\n# 4\n$$\nand", ["$$\nx = 1\n- 2\n= 3\n# 4\n$$"]),
        ("- a\n  \\[\n  b_1 \\\\[2pt]\n  c\n  \\]\n- d", ["\\[\nb_1 \\\\[2pt]\nc\n\\]"]),
        ("> $$\n> a_b\n> $$", ["$$\na_b\n$$"]),
        ("|a|\n|-|\n|$x_1$ and *y*|", ["$x_1$"]),
        ("**$a_1 * b_2 * c_3$**", ["$a_1 * b_2 * c_3$"]),  # no emphasis within
        (r"$a & b < c$ and $\frac12$", ["$a & b &lt; c$", r"$\frac12$"]),
    ],
)
def test_formulas_are_found_whole(text: str, expected: list[str]) -> None:
    assert sources(render(text)) == expected


def test_steps_are_no_markdown_but_have_formulas() -> None:
    shown = latex.plain("  *1* <b> $x^2$ and $5 and $6, \\[y=1\\]")
    assert shown.startswith("  *1* &lt;b&gt; <code")
    assert sources(shown) == ["$x^2$", r"\[y=1\]"]


def test_formulas_of_one_text_are_bounded() -> None:
    many = render("$x$ " * 500)
    assert len(sources(many)) == latex.MOST
    assert many.count("<code") == 500  # the others show their source
    assert sum(map(len, sources(render(f"$$ {'x+' * 900} y$$\n\n" * 30)))) <= latex.MOST_CHARACTERS


@pytest.mark.parametrize(
    "attack", [r"$\href{javascript:alert(1)}{x}$", "$<img src=x onerror=alert(1)>$", r'$"><script>x</script>$']
)
def test_a_formula_is_escaped(attack: str) -> None:
    html = render(attack)
    assert re.findall("<(?!/)([a-z]+)", html) in (["p", "code"], ["p"])


def test_the_library_is_kept_here_with_its_licence_and_trusts_nothing() -> None:
    script, licence = (STATIC / "temml" / name for name in ("temml.min.js", "LICENSE"))
    assert "MIT" in licence.read_text()
    assert script.stat().st_size > 100_000
    assert not re.search(
        r"url\((?!-|\))|@import|https?:", (STATIC / "temml" / "temml.css").read_text().replace("url-prefix()", "")
    )
    settings = (STATIC / "formulas.js").read_text()
    assert "trust: false" in settings
    assert "http" not in settings.replace("http://www.w3.org/1998/Math/MathML", "")
    assert "default-src 'none'" in CONTENT_POLICY
    assert "unsafe" not in CONTENT_POLICY
    assert "font-src" not in CONTENT_POLICY


# ------------------------------------------------------------------------------------------------ blocks and direction


def test_each_block_has_the_direction_of_its_letters() -> None:
    html = render(f"# {HEBREW}\n\nEnglish\n\n- **{HEBREW}** a\n- b\n\n> `code` 12 {HEBREW}\n\n1. a\n\n   {HEBREW}")
    assert '<h1 dir="auto">' in html
    assert '<ul dir="rtl">\n<li>\n<p dir="auto" class="tight">' in html
    assert '<blockquote dir="rtl">\n<p dir="auto"><code dir="ltr">' in html  # code is no sign of a direction
    assert '<ol dir="ltr">' in html


def test_a_table_scrolls_in_itself_and_is_aligned_without_styles() -> None:
    html = render(f"|a|b|c|d|\n|:-|:-:|-:|-|\n|1|2|3|{HEBREW}|\n")
    assert '<div class="table" tabindex="0" role="group" aria-label="Table"><table dir="ltr">' in html
    assert re.findall(r'<td dir="auto"(?: class="(.*?)")?>', html) == ["at-left", "at-center", "at-right", ""]
    assert "style=" not in html
    assert '<table dir="rtl">' in render(f"|{HEBREW}|\n|-|\n|x|\n")


def test_code_is_reached_by_keyboard_and_says_what_it_is() -> None:
    assert render("```py\nx\n```").startswith('<pre dir="ltr" tabindex="0" role="group" aria-label="Code, py"><code>')
    assert 'aria-label="Code"' in render("```\nx\n```")
    assert 'tabindex="0"' in render("    x")
    assert "<script" not in render('```"><script>\nx\n```')
    assert 'aria-label="Plain text"' in render("x" * 100_001)


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b\u00a0", "\u3164"])
def test_a_text_without_anything_to_see_says_so(text: str) -> None:
    assert 'class="nothing"' in render(text)
    assert ("Empty" in render(text)) == (not text)


@pytest.mark.parametrize("text", ["[a]: https://x.example", "```\n```", "&nbsp;", "#", "-", ">"])
def test_markdown_that_shows_nothing_is_shown_as_it_was_written(text: str) -> None:
    shown = re.sub("<[^>]+>", "", render(text)).replace("&amp;", "&").replace("&gt;", ">")
    assert shown == text


def test_long_messages_are_folded_with_both_ends_to_be_seen() -> None:
    long = f"Begin. {'word ' * 400}The question?"
    assert "<details" not in folded("short")
    assert "<details" in folded("line\n" * 30)
    html = folded(long)
    summary = html[: html.index("</summary>")]
    assert "Begin." in summary
    assert "The question?" in summary
    assert f"{len(long):,} characters" in summary
    shown = [one["html"] for one in conversation([("user", "x" * 500), ("assistant", "y" * 500), ("user", "z" * 500)])]
    assert not any("<details" in html for html in shown)
    shown = [one["html"] for one in conversation([("user", "x" * 500), ("assistant", "y" * 3500), ("user", "z" * 500)])]
    assert ["<details" in html for html in shown] == [True, True, False]  # long in all: the earlier ones


# ---------------------------------------------------------------------------------------------------- linear in time

NASTY: dict[str, Callable[[int], str]] = {
    name: (lambda n, piece=piece: (piece * (n // len(piece) + 1))[:n])  # type: ignore[misc]
    for name, piece in {
        "links": "[a](b) ", "open links": "[", "images": "![", "addresses": "[a](",
        "references": "[a]: b '\n",
        "emphasis": "*a **b ", "underscores": "_a__", "entities": "&amp", "quotes": "> a\n",
        "lists": "- a\n",
        "fences": "```\n", "lazy": "> - a\nb\n", "tables": "|a|\n|-|\n", "money": "$5 ",
        "dollars": "$a$b", "two": "$$\n",
        "inline": r"\(", "display": "\\[a\n", "closed": r"\[\(", "escapes": "$\\$", "backslashes": "$" + "\\" * 40,
        "words": "a $x b$ ",
    }.items()
} | {
    "ticks": lambda n: "".join("`" * i + " " for i in range(int((2 * n) ** 0.5))),
    "blank": lambda n: " " * n,
}  # fmt: skip


def operations(text: str) -> int:
    """Calls of Python functions while ``text`` is rendered, and the characters that slices and searches of the whole
    text could touch are bounded elsewhere: by ``LONGEST`` of a formula."""
    count = 0

    def counting(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(counting)
    try:
        render.__wrapped__(text)
    finally:
        sys.setprofile(None)
    return count


def ratio_of(name: str, small: int, times: int) -> float:
    few, many = (operations(NASTY[name](n)) for n in (small, times * small))
    return many / max(few, 300)


@pytest.mark.parametrize("name", NASTY)
def test_markdown_is_linear(name: str) -> None:
    assert ratio_of(name, 150, 4) < 6


@pytest.mark.wide
@pytest.mark.parametrize("name", NASTY)
def test_markdown_is_linear_at_200_kb(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "LONGEST", 10**9)
    assert ratio_of(name, 20_000, 10) < 13


# ---------------------------------------------------------------------------------------------------- on the pages


def test_pages_show_texts_so(tmp_path: Path) -> None:
    with Store(tmp_path / "feedback.db") as store:
        with store.session() as s:
            s.add_prompts([Prompt("p", (Message("user", "word " * 500),))])
            ids = s.add_responses("p", [Completion(""), Completion("$x^2$")], "m", SamplingConfig(), fingerprint="f")
            items = s.add_comparisons([(ids[0], ids[1])], 1, "main")
        world = World(store, items=0)
        item = next_item(world.client("ann"))
        assert "<details" in item["messages"][0]["html"]
        assert sorted((shown["text"], shown["html"][:4]) for shown in item["shown"]) == [
            ("", "<p c"),
            ("$x^2$", "<p d"),
        ]
        boss = world.client("עדה", "admin")
        page = boss.get("/manage/gold?batch=main").text
        assert items
        assert 'class="nothing"' in page
        assert 'class="tex"' in page
        assert "<details" in page
        assert "<bdi>עדה</bdi>" in page
        assert 'src="/static/formulas.js?v=' in page
        for path in ("/compare", "/rank", "/thumbs", "/principles", "/write"):
            shown = boss.get(path).text
            assert 'id="jump"' in shown
            assert "data-response" in shown
