"""Answers that can be checked: read from a reply, held against a known one, exactly."""

from __future__ import annotations

import re

from keel.data.answers import BOX, MARK, OPEN, boxed
from keel.recipe.verify import ReadAs
from keel.reward.values import CHANGES, LONGEST, Value, Verdict, plain_digits, value_of

_TAIL = 20_000  # characters at a reply's end in which its answer is looked for
_CUT = OPEN  # stands where a reply was cut at the length limit: a number there may have gone on
_IS = re.compile(
    r"(?:\banswers?(?:\s+to\s+[^.\n]{1,80}?)?\s*(?:\*\*)?\s*(?:is|are|was|:|=)|\banswer\s*:)\s*(?:\*\*)?\s*:?"
    r"(?:\s*(?:therefore|thus|simply|just|equal to|then))?",
    re.IGNORECASE,
)
_NUMBERS = re.compile(
    r"(?:(?:(?<![\w.,])[+-])?\d*\\(?:[dtc]?frac|sqrt(?:\[\d+\])?|binom|log|ln|sin|cos|tan)\s*(?:\{[^{}]{0,40}\}|\d){1,2})|"
    r"(?:(?<![\w.,])[+-])?(?:[$€£¥₹]\s?)?(?:(?<=[$€£¥₹])[+-])?"
    r"(?:(?<![\w.])\d+\s+\d+/\d+|\d+/\d+(?![\d/])|(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+)"
    r"(?:\^\{?[+-]?\d+\}?)?(?:%|[a-zA-Z]+|\s(?:hundred|thousand|million|billion|trillion|dozen)\b)?"
)
_TAGS = re.compile(r"</?answer>")
_OTHERWISE = re.compile(
    r"\b(?:not|neither|nor|never|less|fewer|more|greater|over|under|between)\b|n't\b", re.IGNORECASE
)
_EITHER = re.compile(r"\d\S*(?:\s+\w+)?\s+or\s*$")  # before a number: another that might be meant
# Before a number, with no comma between: what is said is not that number.
_CHANGED = re.compile(
    r"(?:[<>≤≥≠±]|\\(?:l(?:e|t|eq|eqslant)|g(?:e|t|eq|eqslant)|neq?|pm|mp)\b|\b(?:half|twice|thrice|double|triple|root|plus|"
    r"minus|negative|times|(?:thir|four|fif|ten)ths?|quarters?|reciprocal|inverse|opposite|least|most)\b)[^,\d]*$",
    re.IGNORECASE,
)
_BELOW_ZERO = re.compile(r"(?<![\d)}])(\s|^)(?:negative|minus)\s+$", re.IGNORECASE)  # before a number: it is its sign
_RELATION = re.compile(r"(?:[<>≤≥≠±]|\\(?:l(?:e|t|eq|eqslant)|g(?:e|t|eq|eqslant)|neq?|pm|mp))\s*$")


# ---------------------------------------------------------------------------------------------------- from a reply


def read_answer(text: str, read: ReadAs = "auto", finished: bool = True) -> str | None:
    """The answer that a reply gives, as it is written there; None where it gives none that could be told from the rest.
    Not ``finished``: the reply was cut, and an answer at its very end may have gone on."""
    text = _TAGS.sub("\n", plain_digits(text[-_TAIL:])) + ("" if finished else _CUT)
    answer = _READERS[read](text)
    if answer is None or _CUT in answer or not answer.strip() or len(answer) > LONGEST:
        return None
    return answer.strip()


def _marked(text: str) -> str | None:
    hashes = text.rfind(MARK)
    said = list(_IS.finditer(text, hashes + len(MARK) if hashes >= 0 else 0))
    if said:
        return _phrase(text[said[-1].end() :])
    return None if hashes < 0 else _line(text[hashes + len(MARK) :])


def _line(text: str) -> str:
    """What stands on the first line of ``text`` that has a word."""
    rest = text.lstrip(" \t#*:")
    return rest.lstrip().split("\n", 1)[0].strip()


def _phrase(text: str) -> str | None:
    """What follows 'the answer is', up to the end of its sentence: all of it where it has a value, else its number."""
    line = _line(text)
    box = boxed(line)
    if box is not None:
        return box
    sentence = re.split(r"(?<=[^\s.])[.!?](?=\s+[A-Z(\\]|\s*$)|;\s|\s+(?:because|since|as)\s", line, maxsplit=1)[0]
    value = value_of(sentence)
    if value is not None and value.kind != "other" and not (value.kind == "words" and _NUMBERS.search(sentence)):
        return sentence
    if _OTHERWISE.search(sentence):
        return sentence
    equal = sentence.rsplit("=", 1)[-1] if "=" in sentence else sentence
    numbers = list(_NUMBERS.finditer(equal))
    if len(numbers) != 1 or _CUT in sentence:
        return sentence
    before = equal[: numbers[0].start()]
    if _BELOW_ZERO.search(before):
        return f"-{numbers[0][0]}"
    changed = _CHANGED.search(before) or _changed_behind(equal, numbers[0].end())
    return sentence if changed else numbers[0][0]


def _changed_behind(text: str, end: int) -> bool:
    """Whether the word behind a number makes another one of it: 5 squared, 5 lakh."""
    word = re.match(r"[ -]([a-zA-Z]+)", text[end : end + 20])
    return word is not None and word[1].casefold() in CHANGES


def _last_number(text: str) -> str | None:
    last = None
    for last in _NUMBERS.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    before = text[max(0, last.start() - 40) : last.start()]
    for other in (_EITHER, _RELATION):
        if found := other.search(before):
            return before[found.start() :] + last[0]
    behind = text[last.end() :]
    if _changed_behind(text, last.end()):
        return last[0] + behind.split("\n", 1)[0]
    answer = f"-{last[0]}" if _BELOW_ZERO.search(before) else last[0]
    return answer + behind if behind.strip(".,") == _CUT else answer


def _auto(text: str) -> str | None:
    box = max((found.start() for found in BOX.finditer(text)), default=-1)
    hashes = text.rfind(MARK)
    if box > hashes:
        said = [found.start() for found in _IS.finditer(text, box)]
        return boxed(text) if not said else _marked(text[said[-1] :])
    marked = _marked(text)
    if marked is not None:
        return marked
    line = text.strip().rsplit("\n", 1)[-1]
    if len(line) <= 200 and _CUT not in line and _stands_alone(line):
        return line
    return _last_number(text)


def _stands_alone(line: str) -> bool:
    """Whether a line is an answer and no sentence."""
    value = value_of(line)
    if value is None:
        return False
    if value.kind == "other":
        return " " not in line and "=" not in line
    return value.kind != "words" or line.count(" ") < 4


_READERS = {"auto": _auto, "marked": _marked, "boxed": boxed, "last_number": _last_number}


# ------------------------------------------------------------------------------------------------------ comparison


def same(a: str, b: str) -> bool:
    """Whether two answers are the same by value."""
    return compare(value_of(a), value_of(b), a, b) == "right"


def compare(known: Value | None, given: Value | None, a: str = "", b: str = "") -> Verdict:
    """What ``given`` is where ``known`` is right. ``a``, ``b``: how they are written, for those that are no value."""
    if known is not None and given is not None and known.kind == given.kind == "number":
        return _numbers(known, given)
    if a and a.split() == b.split():
        return "right"
    if known is None or given is None:
        return "unreadable"
    if known.items or given.items:
        return _lists(known, given)
    if known.kind == "choice" and given.kind == "words" and given.text.upper() == known.text:
        return "right"
    if known.text == given.text:
        return "right"
    if known.kind != given.kind or known.kind == "other":
        return "unreadable"
    return "wrong"


def _numbers(known: Value, given: Value) -> Verdict:
    """A unit may be left out on one side. '50%' is 50 where the question has the per cent, and 0.5."""
    if known.unit == given.unit:
        return "right" if known.number == given.number else "wrong"
    if "%" in (known.unit, given.unit) and "" in (known.unit, given.unit):
        rate, other = (known, given) if known.unit == "%" else (given, known)
        return "right" if other.number in (rate.number, rate.number / 100) else "wrong"
    if "" in (known.unit, given.unit):
        return "right" if known.number == given.number else "wrong"
    return "unreadable"


def _lists(known: Value, given: Value) -> Verdict:
    if not known.items or not given.items:
        several, one = (known, given) if known.items else (given, known)
        unsure = several.unsure or (one.kind == "number" and "," in one.text)  # its comma may be the list's
        unknown = "other" in (one.kind, *(item.kind for item in several.items))
        return "unreadable" if unsure or unknown else "wrong"
    if known.kind == "set" or given.kind == "set":
        return _sets(known, given)
    if known.closed and given.closed and len(known.items) == 2 and known.closed != given.closed:
        return "wrong"  # an interval's ends
    if len(known.items) != len(given.items):
        return "wrong"
    pairs = [compare(x, y, x.text, y.text) for x, y in zip(known.items, given.items, strict=True)]
    if all(pair == "right" for pair in pairs):
        return "right"
    if "unreadable" in pairs:
        return "unreadable"
    # Bare lists may be sequences or not: only one that holds other things is surely wrong.
    bare = not known.closed and not given.closed
    return "unreadable" if bare and _sets(known, given) == "right" else "wrong"


def _sets(known: Value, given: Value) -> Verdict:
    found: list[list[Verdict]] = [[compare(x, y, x.text, y.text) for y in given.items] for x in known.items]
    rows = all("right" in row for row in found)
    columns = all(any(row[i] == "right" for row in found) for i in range(len(given.items)))
    both_sets = known.kind == given.kind == "set"
    if rows and columns and (both_sets or len(known.items) == len(given.items)):
        return "right"
    return "unreadable" if any("unreadable" in row for row in found) else "wrong"


def judge_reply(known: str, reply: str, read: ReadAs = "auto", finished: bool = True) -> Verdict:
    """What a reply's answer is where ``known`` is right."""
    answer = read_answer(reply, read, finished)
    if answer is None:
        return "unreadable"
    return compare(value_of(known), value_of(answer), known, answer)
