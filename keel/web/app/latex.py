r"""Formulas in texts of models and people: ``$...$``, ``$$...$$``, ``\(...\)``, ``\[...\]``. What is found here is
shown as its source, in an element that static/formulas.js sets with Temml (static/temml/). A sum of money is no
formula, nor is what only reads like one; when in doubt it stays the text that it is."""

from __future__ import annotations

import re
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markupsafe import Markup, escape

LONGEST = 2_000  # characters of one formula; a longer one is text
DEEPEST = 30  # braces within braces
MOST = 200  # formulas of one text that are set, and
MOST_CHARACTERS = 20_000  # their source; what follows is shown as its source

CLOSERS = {"$": "$", "$$": "$$", r"\(": r"\)", r"\[": r"\]"}
BLOCKS = ("$$", r"\[")  # a line that begins with one begins a formula of its own
_OPENER = re.compile(r"\$+|\\[\[(]|\\.", re.DOTALL)
_AFTER = re.compile(
    r"(?![0-9A-Za-z$])|(?:st|nd|rd|th|s)(?![0-9A-Za-z])"
)  # what may follow a closing $: $n$th, but not $1
_MONEY = re.compile(r"[\d.,–-]+(?:[kKmMbB]|bn)?[+%]?[\s,;:]+[^\W\d_]{2}")  # "5 and 10"
_SIGNS = frozenset(r"\^_{}=<>+*/|")
_WORD = re.compile(r"[^\W\d_][a-z]{2}")
# a formula may not define what others, or it itself, expand to
_DEFINES = re.compile(
    r"\\(?:[egx]?def|let|futurelet|global|long|(?:re)?newcommand|providecommand|DeclareMathOperator)(?![A-Za-z])"
)


class Formula(NamedTuple):
    source: str  # with its delimiters
    display: bool
    end: int  # in the text it was found in

    def html(self, setting: bool = True) -> Markup:
        """``setting``: a browser is to set it; otherwise its source stays."""
        shown = Markup('<code class="tex" dir="ltr">{}</code>' if setting else '<code dir="ltr">{}</code>').format(
            self.source
        )
        if not self.display:
            return shown
        return Markup('<span class="display" tabindex="0" role="group" aria-label="Formula">{}</span>').format(shown)


class Budget:
    """How many formulas of one text are set."""

    def __init__(self) -> None:
        self._formulas, self._characters = MOST, MOST_CHARACTERS

    def html(self, formula: Formula) -> Markup:
        self._formulas -= 1
        self._characters -= len(formula.source)
        return formula.html(self._formulas >= 0 and self._characters >= 0)


def formula_at(text: str, start: int, opener: str, stop: int | None = None) -> Formula | None:
    """The formula that begins at ``start`` with ``opener``, if one does. Looks on for ``LONGEST``, or to ``stop``."""
    closer, begin = CLOSERS[opener], start + len(opener)
    last = min(begin + LONGEST + len(closer), len(text) if stop is None else stop)
    end = text.find(closer, begin, last)
    while end > 0 and _escaped(text, begin, end):
        end = text.find(closer, end + 1, last)
    if end < 0:
        return None
    inside, after = text[begin:end], end + len(closer)
    if not _is_formula(inside, opener):
        return None
    if opener == "$":
        before = text[start - 1] if start else " "
        if (before.isascii() and before.isalnum()) or not _AFTER.match(text, after):
            return None
    elif opener == "$$" and text[after : after + 1] == "$":
        return None
    return Formula(text[start:after], opener in BLOCKS, after)


def plain(text: str) -> Markup:
    """HTML of a text that is no Markdown, with its formulas."""
    budget, shown, done, at = Budget(), Markup(""), 0, 0
    parts: list[Markup] = []
    while (found := _OPENER.search(text, at)) is not None:
        at = found.end()
        formula = formula_at(text, found.start(), found.group()) if found.group() in CLOSERS else None
        if formula is not None:
            parts += [escape(text[done : found.start()]), budget.html(formula)]
            done = at = formula.end
    return shown.join([*parts, escape(text[done:])])


def _escaped(text: str, begin: int, at: int) -> bool:
    backslashes = 0
    while at > begin and text[at - 1] == "\\":
        backslashes, at = backslashes + 1, at - 1
    return backslashes % 2 == 1


def _is_formula(inside: str, opener: str) -> bool:
    stripped = inside.strip()
    if not stripped or "`" in inside or "\n\n" in inside or opener in inside.replace("\\\\", "").replace(r"\$", ""):
        return False
    if _DEFINES.search(inside) or _depth(inside) > DEEPEST:
        return False
    if opener == "$" and (stripped != inside or inside[-1] in "([{" or _MONEY.match(inside)):
        return False
    if opener == r"\[" and stripped.isdecimal():  # \[1\] is a footnote whose brackets were escaped
        return False
    plain_words = not _SIGNS & set(inside) and _WORD.search(inside) is not None
    return not (plain_words and (opener != "$" or " " in inside))


def _depth(inside: str) -> int:
    depth = deepest = 0
    for brace in re.findall(r"[{}]", inside):
        depth += 1 if brace == "{" else -1
        deepest = max(deepest, depth)
    return deepest


# ------------------------------------------------------------------------------------------------------- in Markdown


def formulas(markdown: MarkdownIt) -> None:
    """A plugin: tokens of type ``tex``, whose ``meta`` has the formula."""
    # before escape, which takes the backslash of \( away
    markdown.inline.ruler.before("escape", "tex", _inline)
    stops = ["paragraph", "reference", "blockquote", "list"]
    markdown.block.ruler.before("fence", "tex_block", _block, {"alt": stops})


def _inline(state: StateInline, silent: bool) -> bool:
    if state.src[state.pos] not in "$\\":
        return False
    found = _OPENER.match(state.src, state.pos)
    if found is None:
        return False
    opener = found.group()
    formula = formula_at(state.src, state.pos, opener, state.posMax) if opener in CLOSERS else None
    if formula is None:
        if opener[0] == "\\":
            return False
        if not silent:
            state.pending += opener  # all of $$$ is text
        state.pos = found.end()
        return True
    if not silent:
        token = state.push("tex", "", 0)
        token.content, token.meta = formula.source, {"formula": formula}
    state.pos = formula.end
    return True


def _block(state: StateBlock, first: int, end: int, silent: bool) -> bool:
    if state.is_code_block(first):
        return False
    opener = state.src[state.bMarks[first] + state.tShift[first] :][:2]
    if opener not in BLOCKS:
        return False
    closer, line, length = CLOSERS[opener], first, 0
    while line < end and length <= LONGEST:
        begin, stop = state.bMarks[line] + state.tShift[line], state.eMarks[line]
        outside = line > first and (state.sCount[line] < state.blkIndent or state.src.startswith(r"\[", begin))
        if begin >= stop or outside:
            return False
        if (at := state.src.find(closer, begin + (2 if line == first else 0), stop)) >= 0:
            return _close(state, first, line, silent) if not state.src[at + 2 : stop].strip() else False
        length, line = length + stop - begin, line + 1
    return False


def _close(state: StateBlock, first: int, last: int, silent: bool) -> bool:
    source = state.getLines(first, last + 1, state.blkIndent, False).strip()
    formula = formula_at(source, 0, source[:2])
    if formula is None or formula.end != len(source):
        return False
    if not silent:
        token = state.push("tex", "", 0)
        token.block, token.map, token.content, token.meta = True, [first, last + 1], source, {"formula": formula}
        state.line = last + 1
    return True
