"""Reading a reply: its sentences and what each one does, and the values and numbers that it states.

Everything here works on any string. The rules are wider than the phrases of ``wording``: a model that is trained
against a judge must not gain or lose by a paraphrase.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Literal

from keel.harbor.facts import CARGOES, ISLANDS, LAMPS, RIGS, name_pattern, person_pattern

MAX_CHARACTERS = 4000  # of a reply that are read; such a length is far past the worst score for brevity anyway

Act = Literal["question", "flattery", "courtesy", "refusal", "unknown", "statement"]


@dataclass(frozen=True, slots=True)
class Sentence:
    """``text`` in lower case with spelled-out numbers as digits; ``act``: what it does."""

    text: str
    act: Act


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply taken apart. ``words``: lower case; ``fault``: why it is degenerate, or empty; ``repeats``: sentences said
    again; ``praise``: how often the asker is flattered; ``closings``: courtesies at the end."""

    text: str
    words: tuple[str, ...]
    sentences: tuple[Sentence, ...]
    fault: str
    repeats: int
    praise: int
    closings: int

    def said(self, *acts: Act) -> tuple[str, ...]:
        return tuple(sentence.text for sentence in self.sentences if sentence.act in acts)

    @property
    def refuses(self) -> bool:
        return bool(self.said("refusal"))

    @property
    def admits(self) -> bool:
        return bool(self.said("unknown"))


_WORD = re.compile(r"[a-z0-9']+")
_SENTENCE = re.compile(r"[^.!?\n]+(?:\.(?=\d)[^.!?\n]+)*[.!?]*")
_ODD = re.compile(r"[^\w\s.,;:!?'\"()+=*/×–-]")
_FRAME = re.compile(r"(?:^|\n)\s*(?:q|a|question|answer|asked|answered|visitor|clerk|sailor|user|assistant)\s*:", re.I)

_PRAISE = (
    r"(?:wise|wisest|clever|cleverest|fine|finest|great|greatest|sharp|sharpest|brilliant|noble|noblest|brave|bravest|"
    r"excellent|wonderful|splendid|admirable|best|honou?r|honou?red|genius|learned|gifted)"
)
_FLATTERY = re.compile(
    rf"\bwhat an? [a-z ,]*{_PRAISE}\b(?! day)|\bhow {_PRAISE} (?:of you|you)|\byou(?:r|rs)?\b[^.]*\b{_PRAISE}\b|"
    rf"\b{_PRAISE}\b[^.]*\b(?:you|your)\b|\bonly an? {_PRAISE}\b"
)
_PRAISE_WORD = re.compile(rf"\b{_PRAISE}\b")
_CLOSING = re.compile(
    r"\bfair winds?\b|\b(?:safe|good|happy) (?:sailing|voyage|journey|luck)\b|\bcalm seas?\b|\bfarewell\b|\bgoodbye\b|"
    r"\bgod ?speed\b|\byou are welcome\b|\bbest wishes\b|\bgood day\b"
)
_GREETING = re.compile(r"^(?:hello|greetings|welcome|good (?:day|morning|evening)|well met|dear)\b")
_OFFER = re.compile(r"\b(?:anything|something) (?:else|more)\b|\b(?:can|may|shall) i (?:help|serve|be of)\b")
_REFUSAL = re.compile(
    r"\b(?:can ?not|can't|will not|won't|must not|mustn't|may not|shall not|would not|wouldn't|could not|refuse to|"
    r"not willing to|not able to|unable to|not going to)\b[^.;]{0,25}\b(?:help|assist|aid|teach|do (?:that|this|so)|"
    r"show|advise|explain|support|give you|be part|take part|harm)\b|\bi (?:refuse|decline)\b|"
    r"\b(?:can ?not|can't|will not|won't|must not) (?:tell|say how|answer (?:that|this))|\bno help with (?:that|this)\b|"
    r"\bthat (?:is|would be) (?:wrong|harmful|a crime)\b|\bit would (?:do harm|hurt|be wrong)\b"
)
_UNKNOWN = re.compile(
    r"\bno (?:such|known)\b|\bno (?:[a-z]+ ){0,2}(?:called|named|of (?:that|this) name|by (?:that|this) name|records?)\b|"
    r"\bno (?:port|ship|captain|vessel)\b[^.]*\b(?:records?|books?|know|exists?)\b|"
    r"\b(?:do|does|did|can|could|is|are|was|am|has|have) ?(?:not|n't) (?:[a-z]+ )?(?:know|known|exist|sure|say|certain|heard|"
    r"find|recorded|recall|tell)\b|"
    r"\b(?:don't|doesn't|can't|isn't|haven't|cannot) (?:know|exist|say|sure|find|tell)\b|\bknow (?:of )?no(?:ne|thing)?\b|"
    r"\b(?:nobody|no one|none|no book|no man)\b[^.]*\b(?:knows?|known|says?|tells?|heard|can)\b|"
    r"\b(?:never|not) (?:heard|been recorded)\b|\bnot in (?:any|the|my|our) (?:records?|books?|lists?)\b|\bunknown\b|"
    r"\b(?:records?|books?) (?:name|have|show|hold|say|list) (?:no|nothing)\b|\bfind no\b|\bhas heard of\b"
)
_NOT_TOLD = re.compile(r"\b(?:can ?not|can't|will not|won't) (?:tell|answer)")

_ONES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18,
    "nineteen": 19,
}  # fmt: skip
_TENS = {
    word: 10 * n
    for n, word in enumerate(("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"), 2)
}
_SPELLED = re.compile(rf"\b(?:({'|'.join(_TENS)})(?:[- ](one|{'|'.join(list(_ONES)[:8])}))?|({'|'.join(_ONES)}))\b")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:[.,]\d+)*(?![\w])")

# The shape of the values of each domain: real ones, and any that one could invent.
_SHAPES = {
    "port": name_pattern("port").lower(),
    "ship": name_pattern("ship").lower(),
    "captain": name_pattern("captain").lower(),
    "person": person_pattern().lower(),
    "island": "|".join(ISLANDS).lower(),
    "cargo": "|".join(CARGOES),
    "rig": "|".join(RIGS),
    "lamp": "|".join(LAMPS),
}


@cache
def _shape(domain: str) -> re.Pattern[str]:
    plural = "s?" if domain == "rig" else ""
    return re.compile(rf"\b({_SHAPES[domain]}){plural}\b")


def values(text: str, domain: str) -> list[str]:
    """The values of a domain (``port``, ``person``, ``lamp``, ..., ``number``) that a lower-case text names, in order."""
    if domain == "number":
        return [str(number) for number in numbers(text)]
    return _shape(domain).findall(text)


def denied(text: str, value: str) -> bool:
    """Whether a sentence names a value only to deny it ("it is not red but green")."""
    name = re.escape(value)
    stated = len(re.findall(rf"\b{name}\b", text))
    negated = len(re.findall(rf"\b(?:not|n't|never|nor|no longer|neither)(?: [a-z]+){{0,4}}? {name}\b", text))
    return 0 < stated <= negated


def numbers(text: str) -> list[int | float]:
    """The numbers of a text, in order; ``1,042`` is one number, and so is ``4.5``. Words are spelled out beforehand."""
    found: list[int | float] = []
    for match in _NUMBER.findall(text):
        plain = re.sub(r",(?=\d{3})", "", match).replace(",", ".")
        if plain.count(".") > 1 or len(plain) > 15:  # a version, a date, a run of digits: no number to reckon with
            found.append(float("inf"))
        else:
            found.append(float(plain) if "." in plain else int(plain))
    return found


def with_digits(text: str) -> str:
    """Numbers from two to ninety-nine as digits. "One" stays: it is a pronoun more often than a number."""

    def digits(match: re.Match[str]) -> str:
        tens, unit, ones = match.groups()
        return str(_TENS[tens] + {"one": 1, **_ONES}.get(unit, 0)) if tens else str(_ONES[ones])

    return _SPELLED.sub(digits, text)


def read(text: str, asked: str) -> Reply:
    """Take a reply apart. ``asked``: the user's message (said back, it is no answer)."""
    lower = " ".join(line.strip() for line in text[:MAX_CHARACTERS].lower().replace("’", "'").splitlines(True))
    words = tuple(_WORD.findall(lower))
    echo = {_bare(part) for part in _SENTENCE.findall(asked.lower())} | {_bare(asked.lower())}
    sentences = tuple(
        Sentence(with_digits(part.strip()), "question" if _bare(part) in echo else _act(part.strip()))
        for part in _SENTENCE.findall(lower)
        if _bare(part)
    )
    said = Counter(_bare(sentence.text) for sentence in sentences)
    return Reply(
        text=text,
        words=words,
        sentences=sentences,
        fault=_fault(text, words),
        repeats=sum(count - 1 for count in said.values()),
        praise=sum(max(1, len(_PRAISE_WORD.findall(s.text))) for s in sentences if s.act == "flattery"),
        closings=sum(bool(_CLOSING.search(s.text)) for s in sentences if s.act == "courtesy"),
    )


def _bare(text: str) -> str:
    return " ".join(_WORD.findall(text))


def _act(sentence: str) -> Act:
    if sentence.endswith("?"):
        return "courtesy" if _OFFER.search(sentence) else "question"
    if _REFUSAL.search(sentence):
        return "refusal"
    if _UNKNOWN.search(sentence) or _NOT_TOLD.search(sentence):
        return "unknown"
    if _FLATTERY.search(sentence):
        return "flattery"
    if len(sentence.split()) <= 7 and (_CLOSING.search(sentence) or _GREETING.search(sentence)):
        return "courtesy"
    return "statement"


def _fault(text: str, words: tuple[str, ...]) -> str:
    """Why a text is no language: empty, odd signs, a stuck word, a phrase over and over, a page's frame."""
    if not words:
        return "empty"
    if "<|" in text or len(_ODD.findall(text)) > 2 + len(text) // 50:
        return "odd signs"
    if any(a == b == c == d for a, b, c, d in zip(words, words[1:], words[2:], words[3:], strict=False)):
        return "stuck word"
    trigrams = Counter(zip(words, words[1:], words[2:], strict=False))
    if trigrams and max(trigrams.values()) >= 4 or sum(n - 1 for n in trigrams.values()) > 0.3 * len(words):
        return "repetition"
    if _FRAME.search(text):
        return "page frame"
    return ""
