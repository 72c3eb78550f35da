"""Markdown of models and people -> HTML that can do nothing. Raw HTML is shown as text, links are text with their
address beside it (nobody should follow a model's link from here), images are their description: nothing is fetched.
Each block has the direction of its own letters. What scrolls can be reached by keyboard and says what it is. A text
without anything to see says so."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup, escape

from keel.web.app.latex import Budget, formulas

LONGEST = 100_000  # characters; what is longer is shown as plain text
DEEPEST = 40  # levels of quotes and lists; the parser drops what is deeper, so there it is shown as plain text, too
FOLDED = 1_500  # characters of a message, or
FOLDED_LINES = 25  # its lines, from which it is folded,
EARLIER = 400  # and characters of an earlier message
CONVERSATION = 4_000  # of a conversation that is longer
ENDS = 160  # characters of a folded message's beginning and end that are shown

CONTAINERS = frozenset({"bullet_list", "ordered_list", "blockquote", "table"})
LEAVES = frozenset({"paragraph_open", "heading_open", "th_open", "td_open"})
DIRECTIONS = {"L": "ltr", "R": "rtl", "AL": "rtl"}
BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs that show nothing
SCROLLS = 'tabindex="0" role="group"'


class _Renderer(RendererHTML):
    def link_open(self, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
        env["link"] = i  # there is no link within a link
        return '<bdi class="link">'

    def link_close(self, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
        begin = env.pop("link")
        shown = "".join(t.content for t in tokens[begin + 1 : i])
        address = str(tokens[begin].attrs.get("href", ""))
        beside = "" if shown == address else f' <code dir="ltr">{escape(address)}</code>'
        return f"</bdi>{beside}"

    def image(self, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
        return f'<bdi class="link">[image: {escape(tokens[i].content)}]</bdi>'

    def code_inline(self, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
        return f'<code dir="ltr">{escape(tokens[i].content)}</code>'

    def fence(self, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
        words = tokens[i].info.split(maxsplit=1)
        return code(tokens[i].content, words[0][:40] if words else "")

    def code_block(self, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
        return code(tokens[i].content, "")

    def table_open(self, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
        return f'<div class="table" {SCROLLS} aria-label="Table">' + self.renderToken(tokens, i, options, env)

    def table_close(self, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
        return self.renderToken(tokens, i, options, env) + "</div>\n"

    def tex(self, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
        shown = str(env.setdefault("formulas", Budget()).html(tokens[i].meta["formula"]))
        return f"{shown}\n" if tokens[i].block else shown


def code(content: str, language: str) -> str:
    """``language``: without one it may be prose, whose lines have each its own direction."""
    label, lines = (f"Code, {escape(language)}", "") if language else ("Code", ' class="lines"')
    return f'<pre{lines} dir="ltr" {SCROLLS} aria-label="{label}"><code>{escape(content)}</code></pre>\n'


def _markdown(breaks: bool) -> MarkdownIt:
    settings = {"html": False, "breaks": breaks, "maxNesting": DEEPEST}
    return MarkdownIt("commonmark", settings, renderer_cls=_Renderer).enable("table").use(formulas)


# Models and people in a conversation mean their line ends; a guideline's text is wrapped by its editor.
_MARKDOWN = {breaks: _markdown(breaks) for breaks in (True, False)}


@lru_cache(maxsize=4096)
def render(text: str, breaks: bool = True) -> Markup:
    """HTML of ``text``, safe to put into a page. ``breaks``: a line end stays one."""
    if not visible(text):
        return Markup('<p class="nothing">{}</p>').format(
            "Blank: there is only white space." if text else "Empty: there is no text."
        )
    if len(text) <= LONGEST:
        markdown = _MARKDOWN[breaks]
        tokens = markdown.parse(text)
        if all(token.level < DEEPEST - 2 for token in tokens) and any(_seen(token) for token in tokens):
            _direct(tokens)
            return Markup(markdown.renderer.render(tokens, markdown.options, {}))
    return Markup('<pre class="lines whole" {} aria-label="Plain text">{}</pre>').format(Markup(SCROLLS), text)


def folded(text: str, longest: int = FOLDED) -> Markup:
    """A message of a conversation. A long one is folded, with its beginning, its end and its size to be seen."""
    html = render(text)
    if len(text) <= longest and text.count("\n") < FOLDED_LINES:
        return html
    begin, end = text[:ENDS].rpartition(" ")[0] or text[:ENDS], text[-ENDS:].partition(" ")[2] or text[-ENDS:]
    short = f"{begin} … {end}" if len(text) > 2 * ENDS else text
    return Markup(
        '<details class="fold"><summary><span class="ends" dir="auto">{}</span>'
        ' <span class="all">The whole message: {} characters</span></summary>{}</details>'
    ).format(short, f"{len(text):,}", html)


def conversation(messages: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Role and HTML of each message, of its role and its text. Long ones are folded; in a long conversation the earlier
    ones sooner."""
    earlier = EARLIER if sum(len(text) for _, text in messages) > CONVERSATION else FOLDED
    limits = [*[earlier] * (len(messages) - 1), FOLDED]
    return [{"role": role, "html": folded(text, most)} for (role, text), most in zip(messages, limits, strict=False)]


def visible(text: str) -> bool:
    return any(unicodedata.category(letter)[0] not in "ZC" and letter not in BLANK_LETTERS for letter in text)


def _seen(token: Token) -> bool:
    """Whether a reader sees anything of it: of a definition of a link, or of an empty list, nobody does."""
    if token.type in ("hr", "image", "tex", "link_open"):
        return True
    return any(map(_seen, token.children)) if token.children is not None else visible(token.content)


def _direct(tokens: Sequence[Token]) -> None:
    """Leaves have the direction that a browser finds in them; it looks for that of lists, quotes and tables in vain,
    since it skips what has one of its own, so these have that of their first letter."""
    undecided: list[Token | None] = []
    waiting = 0  # how many of them
    for token in tokens:
        kind, _, end = token.type.rpartition("_")
        if kind in CONTAINERS:
            if end == "open":
                undecided.append(token)
                waiting += 1
            elif undecided.pop() is not None:
                waiting -= 1
        elif token.type == "inline" and waiting and (found := _direction(token)):
            for place, container in enumerate(undecided):
                if container is not None:
                    container.attrSet("dir", found)
                    undecided[place] = None
            waiting = 0
        if token.type in LEAVES:
            token.attrSet("dir", "auto")
        if token.hidden and token.tag == "p":  # of a list without blank lines
            token.hidden = False
            if token.nesting == 1:
                token.attrSet("class", "tight")
        if "style" in token.attrs:  # the content policy allows none; a table's are text-align:right and the like
            token.attrSet("class", str(token.attrs.pop("style")).replace("text-align:", "at-"))


def _direction(inline: Token) -> str:
    letters = (letter for child in inline.children or () if child.type == "text" for letter in child.content)
    return next((DIRECTIONS[kind] for kind in map(unicodedata.bidirectional, letters) if kind in DIRECTIONS), "")
