"""What an arena vote's conversation says in numbers: the style of both sides, and whether a model says who it is."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from keel.types import UserError

FEATURES = ("length", "headers", "lists", "bold")
MOST_NAMES, LONGEST_NAME = 200, 60
# Families of models and their makers that are hardly the name of anything else; an admin's list stands in their place.
NAMES = (
    "ChatGPT", "GPT-3", "GPT-3.5", "GPT-4", "GPT-4o", "GPT-5", "OpenAI", "Claude", "Anthropic", "Gemini", "Gemma",
    "DeepMind", "Llama", "Mistral", "Mixtral", "Qwen", "Tongyi", "通义千问", "DeepSeek", "ChatGLM", "Grok", "xAI",
    "Kimi", "Cohere", "Vicuna", "OLMo", "SmolLM", "Hunyuan",
)  # fmt: skip

Style = tuple[int, ...]  # FEATURES of all replies of one side

_CODE = re.compile(r"^ {0,3}(```|~~~).*?(?:^ {0,3}\1|\Z)", re.MULTILINE | re.DOTALL)
_HEADER = re.compile(r"^ {0,3}#{1,6}[ \t]+\S", re.MULTILINE)
_ITEM = re.compile(r"^[ \t]*(?:[-*+]|\d{1,9}[.)])[ \t]+\S", re.MULTILINE)
_BOLD = re.compile(r"(\*\*|__)(?=\S)[^\n]{1,500}?(?<=\S)\1")
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
_LETTER = "a-z\u00c0-\u024f\u0370-\u03ff\u0400-\u052f"  # of scripts that put spaces between words


@dataclass(frozen=True, slots=True)
class Facts:
    """``left``, ``right``: the style, None where the texts were erased. ``named``: the first name that a reply has of
    those looked for."""

    left: Style | None
    right: Style | None
    named: str | None


def style(replies: Iterable[str]) -> Style:
    """How long replies are and how they are set. Length: words and signs, letters of scripts without spaces each for
    itself; a model's own tokens would need its tokenizer. Code blocks are long, and not set."""
    counts = [0] * len(FEATURES)
    for text in replies:
        plain = _CODE.sub("\n", text)
        found = (len(pattern.findall(plain)) for pattern in (_HEADER, _ITEM, _BOLD))
        for at, count in enumerate((len(_WORD.findall(text)), *found)):
            counts[at] += count
    return tuple(counts)


def own_names(models: Iterable[str]) -> list[str]:
    """What models could call themselves, by what they are served as: the last part of a path. A single plain word
    ("policy", a stage's name) is none: replies have it for other reasons."""
    last = dict.fromkeys(re.split(r"[/\\:]", model.rstrip("/\\"))[-1] for model in models)
    return [name for name in last if not re.fullmatch(r"[^\W\d_]*|[\W\d_]*", name)]


def parse_names(text: str) -> list[str]:
    """An admin's list, a name a line or between commas. UserError for what no reply should be searched for."""
    names = list(dict.fromkeys(name for part in re.split(r"[\n,]", text) if (name := " ".join(part.split()))))
    if len(names) > MOST_NAMES or any(len(name) > LONGEST_NAME for name in names):
        raise UserError(f"give up to {MOST_NAMES} names of up to {LONGEST_NAME} characters")
    for name in names:
        if len(re.findall(r"\w", name)) < 2:
            raise UserError(f"the name {name!r} would be found everywhere; give two letters or more")
    return names


class Finder:
    """Finds names in replies: whole words, whatever their case; spaces, hyphens and underscores between their parts
    are the same. A number may follow a name that ends with a letter (Qwen2.5)."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._pattern = re.compile("|".join(f"({_pattern(name)})" for name in names)) if names else None

    def first(self, replies: Iterable[str]) -> str | None:
        for text in replies:
            found = self._pattern.search(_folded(text)) if self._pattern else None
            if found is not None and found.lastindex is not None:
                return self._names[found.lastindex - 1]
        return None


def _pattern(name: str) -> str:
    parts = [re.escape(part) for part in re.split(r"[-_\s]+", _folded(name)) if part]
    body = r"[-_\s]*".join(parts)
    before = f"(?<![{_LETTER}0-9])" if re.match(f"[{_LETTER}0-9]", parts[0]) else ""
    after = r"(?![0-9])" if parts[-1][-1].isdecimal() else ""
    return f"{before}{body}{after}(?![{_LETTER}])" if re.search(f"[{_LETTER}0-9]$", parts[-1]) else f"{before}{body}"


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
