"""Markdown of models and people -> HTML that can do nothing. Raw HTML is shown as text, links are text with their
address beside it (nobody should follow a model's link from here), images are their description: nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup, escape

LONGEST = 100_000  # characters; what is longer is shown as plain text
DEEPEST = 40  # levels of quotes and lists; the parser drops what is deeper, so there it is shown as plain text, too


class _Renderer(RendererHTML):
    def link_open(self, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
        return '<span class="link">'

    def link_close(self, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
        depth = 0
        for token in reversed(tokens[:i]):
            depth += (token.type == "link_close") - (token.type == "link_open")
            if depth < 0:
                shown = "".join(t.content for t in tokens[tokens.index(token) + 1 : i])
                address = str(token.attrs.get("href", ""))
                beside = "" if shown == address else f" <code>{escape(address)}</code>"
                return f"</span>{beside}"
        return "</span>"

    def image(self, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
        return f'<span class="link">[image: {escape(tokens[i].content)}]</span>'


def _markdown(breaks: bool) -> MarkdownIt:
    return MarkdownIt(
        "commonmark", {"html": False, "breaks": breaks, "maxNesting": DEEPEST}, renderer_cls=_Renderer
    ).enable("table")


# Models and people in a conversation mean their line ends; a guideline's text is wrapped by its editor.
_MARKDOWN = {breaks: _markdown(breaks) for breaks in (True, False)}


@lru_cache(maxsize=4096)
def render(text: str, breaks: bool = True) -> Markup:
    """HTML of ``text``, safe to put into a page. ``breaks``: a line end stays one."""
    if len(text) <= LONGEST:
        markdown = _MARKDOWN[breaks]
        tokens = markdown.parse(text)
        if all(token.level < DEEPEST - 2 for token in tokens):
            return Markup(markdown.renderer.render(tokens, markdown.options, {}))
    return Markup("<pre>") + escape(text) + Markup("</pre>")
