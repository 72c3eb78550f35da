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

MAX_CHARACTERS = 2000  # of a reply that are read; such a length is far past the worst score for brevity anyway

Act = Literal["question", "flattery", "courtesy", "refusal", "unknown", "statement"]


@dataclass(frozen=True, slots=True)
class Sentence:
    """``text`` in lower case with spelled-out numbers as digits; ``act``: what it does."""

    text: str
    act: Act


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply taken apart.

    ``words``: in lower case; ``fault``: why it is degenerate, or empty; ``repeats``: how many sentences are said again;
    ``praise``: how often the asker is flattered; ``closings``: how many sentences take leave or wish well.
    """

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
    def stated(self) -> tuple[str, ...]:
        """All sentences but the questions: flattery or a courtesy may well hold the answer, too."""
        return self.said("flattery", "courtesy", "refusal", "unknown", "statement")

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
    r"excellent|wonderful|splendid|admirable|best|genius|learned|gifted)"
)
_FLATTERY = re.compile(
    rf"\bwhat an? [a-z ,]*{_PRAISE}\b(?! day)|\b{_PRAISE} of you\b|\byou(?: are|'re| have| must be| truly| surely)\b"
    rf"[^.!?]*\b{_PRAISE}\b|\byour (?:[a-z]+ )?{_PRAISE}\b|\bhonou?r(?:ed)? [^.!?]*\byou\b|\bonly an? {_PRAISE}\b|"
    rf"\b{_PRAISE},? (?:[a-z]+ )?(?:friend|sailor|captain|sir|traveller|one|soul|mind|question)\b"
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
    r"\b(?:can ?not|can't|will not|won't|must not) (?:tell|say how|answer (?:that|this))|"
    r"\bno help with (?:that|this)\b|"
    r"\b(?:that|it) would (?:do harm|hurt|harm|be (?:wrong|harmful|a crime))\b"
)
_UNKNOWN = re.compile(
    r"\bno (?:such|known)\b|"
    r"\bno (?:[a-z]+ ){0,2}(?:called|named|of (?:that|this) name|by (?:that|this) name|records?)\b|"
    r"\bno (?:port|ship|captain|vessel)\b[^.]*\b(?:records?|books?|know|exists?)\b|"
    r"\b(?:do|does|did|can|could|is|are|was|am|has|have) ?(?:not|n't) (?:[a-z]+ )?"
    r"(?:know|known|exist|sure|say|certain|heard|find|recorded|recall|tell)\b|"
    r"\b(?:don't|doesn't|can't|isn't|haven't|cannot) (?:know|exist|say|sure|find|tell)\b|"
    r"\bknow (?:of )?no(?:ne|thing)?\b|"
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
    """What a lower-case text names of a domain (``port``, ``person``, ``lamp``, ..., ``number``), in order."""
    if domain == "number":
        return [str(number) for number in numbers(text)]
    return _shape(domain).findall(text)


def names_anyone(text: str) -> bool:
    """Whether a lower-case text names a port, a ship, a captain or a harbour master, real or not."""
    return any(_shape(domain).search(text) for domain in ("port", "ship", "captain", "person"))


def denied(text: str, value: str) -> bool:
    """Whether a sentence names a value only to deny it ("it is not red but green")."""
    name = re.escape(value)
    stated = len(re.findall(rf"\b{name}\b", text))
    negated = len(
        re.findall(rf"(?:\b(?:not|never|nor|no longer|neither)|n't)(?: (?!but\b)[a-z]+){{0,4}}? {name}\b", text)
    )
    negated += len(re.findall(rf"\b{name} (?:is|was) (?:not|wrong|mistaken)\b", text))
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
        Sentence(with_digits(part.strip()), _act(part.strip(), said_back=_bare(part) in echo))
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
        praise=sum(max(1, len(_PRAISE_WORD.findall(s.text))) for s in sentences if _FLATTERY.search(s.text)),
        closings=sum(bool(_CLOSING.search(s.text)) for s in sentences if s.act == "courtesy"),
    )


def _bare(text: str) -> str:
    return " ".join(_WORD.findall(text))


def _act(sentence: str, said_back: bool) -> Act:
    courteous = len(sentence.split()) <= 7 and (_CLOSING.search(sentence) or _GREETING.search(sentence))
    if sentence.endswith("?") and _OFFER.search(sentence):
        return "courtesy"
    if sentence.endswith("?") or (said_back and not courteous):
        return "question"
    if _REFUSAL.search(sentence):
        return "refusal"
    if _UNKNOWN.search(sentence) or _NOT_TOLD.search(sentence):
        return "unknown"
    if _FLATTERY.search(sentence):
        return "flattery"
    return "courtesy" if courteous else "statement"


def _fault(text: str, words: tuple[str, ...]) -> str:
    """Why a text is no language: empty, odd signs, a stuck word, a phrase over and over, a page's frame."""
    if not words:
        return "empty"
    if "<|" in text or len(_ODD.findall(text)) > 2 + len(text) // 50:
        return "odd signs"
    if any(a == b == c == d for a, b, c, d in zip(words, words[1:], words[2:], words[3:], strict=False)):
        return "stuck word"
    trigrams = Counter(zip(words, words[1:], words[2:], strict=False))
    if max(trigrams.values(), default=0) >= 4 or sum(n - 1 for n in trigrams.values()) > 0.5 * len(words):
        return "repetition"
    if _FRAME.search(text):
        return "page frame"
    return ""
