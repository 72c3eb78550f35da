"""The gold of ledgers: what is right in every line of a reply, where the first error is, and what the judge says.

A line is read by its equation. It has three bits: its sum is true, its operands are those that the entry asks for, and
it follows from the count before it. A line that repeats an earlier one, restates a fact or says thanks is a note: it
earns nothing, and is wrong only where what it repeats is. What contradicts the ledger is wrong, wherever it stands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

from keel.harbor.ledger_entries import Entry
from keel.recipe.steps import Steps
from keel.types import Grade, Prompt, UserError

KIND = "ledger"
_STEPS = Steps(by="line", marker=None)
_WORDS = {"plus": "+", "minus": "-", "times": "*", "x": "*", "×": "*", "−": "-", "–": "-", "equals": "=", "makes": "="}
_WORD = re.compile(r"\b(?:plus|minus|times|equals|makes)\b|(?<=[\d\s])x(?=[\d\s])|[×−–]")
_BOLD = re.compile(r"(?<!\d)\*\*|\*\*(?!\d)")
_TERM = r"\d+(?:\s*\*\s*\d+)*"
_EQUATION = re.compile(
    rf"(?<![\d+*-])(?P<left>{_TERM}(?:\s*[+-]\s*{_TERM})*)\s*=\s*(?P<right>-?\d+)(?!\d|\.\d|\s*[+*=-])"
)
_ANSWER = re.compile(r"^\W*(?:(?:so|and|then|the)\W+)*(?:final\W+)?answer\b(?:\W+is\b)?(?P<said>.*)$", re.I | re.S)
_SAID = re.compile(r"\b(?:yes|no)\b|-?\d+", re.I)
_COUNTED = re.compile(r"^\W*(?:(?:line|step|entry)\W+)?(\d+)[.)](?!\d)", re.I)  # a line's own number
_LEFT, _ASKED = re.compile(r"\b(\d+)\s+(?:\w+\s+)?left\b", re.I), re.compile(r"\b(\d+)\s+asked\b", re.I)
_ENDLESS = re.compile(r"\d{20}")  # no count; Python refuses to read numbers of thousands of digits


@dataclass(frozen=True, slots=True)
class Line:
    """What a line of a reply is: a ``sum`` that takes the ledger on, a ``note`` that says nothing new, or an
    ``answer``. The bits hold what they say of a sum; of a note and an answer all are as ``follows``, which is whether
    it fits what stands before it."""

    role: Literal["sum", "note", "answer"]
    sum_true: bool
    operands_right: bool
    follows: bool

    @property
    def right(self) -> bool:
        return self.sum_true and self.operands_right and self.follows

    @staticmethod
    def plain(role: Literal["note", "answer"], fits: bool) -> Line:
        return Line(role, fits, fits, fits)


@dataclass(frozen=True, slots=True)
class _Equation:
    """``first``, then changes by sign and amount, and the result. ``numbers``: all on the left, as written."""

    first: int
    changes: tuple[tuple[str, int], ...]
    result: int
    numbers: frozenset[int]

    @property
    def true(self) -> bool:
        count = self.first
        for sign, amount in self.changes:
            count = count + amount if sign == "+" else count - amount
        return count == self.result


def _equations(text: str) -> list[_Equation]:
    plain = _BOLD.sub("", _WORD.sub(lambda word: _WORDS[word.group()], text.lower()))
    return [_equation(found["left"], found["right"]) for found in _EQUATION.finditer(plain)]


def _equation(left: str, right: str) -> _Equation:
    parts = re.split(r"([+-])", re.sub(r"\s+", "", left))
    terms = [reduce(lambda a, b: a * b, map(int, part.split("*"))) for part in parts[::2]]
    numbers = frozenset(map(int, re.findall(r"\d+", left)))
    return _Equation(terms[0], tuple(zip(parts[1::2], terms[1:], strict=True)), int(right), numbers)


class _Reader:
    """Reads a reply line by line: how far the ledger is worked, what the count is as the reply has it, and whether
    anything was wrong."""

    def __init__(self, meta: Mapping[str, Any]) -> None:
        self.entries = [Entry.of(list(row)) for row in meta["entries"]]
        self.answer = str(meta["answer"]).lower()
        self.count = self.start = int(meta["start"])
        self.bound = meta.get("bound")
        self.worked = 0
        self.wrong = False
        self.said: dict[_Equation, tuple[bool, frozenset[int]]] = {}  # and whether it was right; its entries' numbers
        self.texts: set[str] = set()
        self.answers: list[str] = []

    def read(self, text: str) -> Line:
        line = self._read(text)
        self.wrong |= not line.right
        return line

    @property
    def whole(self) -> bool:
        """Whether every entry was worked and nothing was wrong."""
        return self.worked == len(self.entries) and not self.wrong

    def _read(self, text: str) -> Line:
        if (answer := _ANSWER.match(text)) is not None:
            said = {word.lower() for word in _SAID.findall(answer["said"])}
            asked, fits = said & {"yes", "no"}, True
            if asked and self.bound is not None:  # "yes, 31 are left" is one answer
                fits = said - asked <= {str(self.count), str(self.bound)} and self._fits(answer["said"])
                said = asked
            self.answers += sorted(said)
            return Line.plain("answer", self.whole and fits and said == {self.answer})
        if _ENDLESS.search(text):
            return Line.plain("note", False)
        equations = _equations(text)
        if not equations:
            return Line.plain("note", "=" not in text and self._fits(text))
        lines = [self._sum(equation, text) for equation in equations]
        if all(line.role == "note" for line in lines):
            return lines[0] if len(lines) == 1 else Line.plain("note", all(line.right for line in lines))
        sums = [line for line in lines if line.role == "sum"]
        return Line(
            "sum",
            all(line.sum_true for line in lines),
            all(line.operands_right for line in sums),
            all(line.follows for line in lines),
        )

    def _sum(self, equation: _Equation, text: str) -> Line:
        """A sum that goes on from the count; else one said before, or an aside on the entry's own numbers; else it
        does not follow."""
        goes_on = bool(equation.changes) and equation.first == self.count and self.worked < len(self.entries)
        operands = goes_on and self._operands(equation, text)
        repeated = equation in self.said and (not goes_on or text.strip() in self.texts)
        if not operands and (repeated or (not goes_on and self._aside(equation))):
            right, numbers = self.said.get(equation, (equation.true, None))
            return Line.plain("note", right and (numbers is None or self._named(text) <= numbers))
        line = Line("sum", equation.true, operands, goes_on)
        worked = min(len(self.entries), self.worked + max(1, len(equation.changes)))
        numbers = frozenset({self.count}).union(*(entry.numbers for entry in self.entries[self.worked : worked]))
        self.said[equation] = line.right, numbers
        self.texts.add(text.strip())
        self.count, self.worked = equation.result, worked
        return line

    def _operands(self, equation: _Equation, text: str) -> bool:
        """Whether each change is what its entry asks for, and the words before the sum name none but its numbers."""
        entries = self.entries[self.worked : self.worked + len(equation.changes)]
        if len(entries) < len(equation.changes):
            return False
        count = equation.first
        for entry, (sign, amount) in zip(entries, equation.changes, strict=True):
            asked, much = entry.change(count)
            if much != amount or (asked != sign and amount):
                return False
            count = count + amount if sign == "+" else count - amount
        return self._named(text) <= frozenset({self.count}).union(*(entry.numbers for entry in entries))

    def _named(self, text: str) -> set[int]:
        """The numbers of the words before a sum; not that of the line."""
        clause, colon, _ = text.partition(":")
        counted = _COUNTED.match(clause)
        if counted is not None and int(counted[1]) == self.worked + 1:
            clause = clause[counted.end() :]
        return set(map(int, re.findall(r"\d+", clause))) if colon else set()

    def _aside(self, equation: _Equation) -> bool:
        """Such as 3*8=24 where three ships bring eight each."""
        return self.worked < len(self.entries) and equation.numbers <= self.entries[self.worked].numbers

    def _fits(self, text: str) -> bool:
        """Whether a line without a sum names numbers of the ledger alone, and says rightly how many are left."""
        known = {self.start, self.count, self.bound}.union(*(entry.numbers for entry in self.entries))
        left, asked = ({int(number) for number in one.findall(text)} for one in (_LEFT, _ASKED))
        return set(map(int, re.findall(r"\d+", text))) <= known and left <= {self.count} and asked <= {self.bound}


def read_lines(prompt: Prompt, steps: Sequence[str]) -> list[Line]:
    """What each line of a reply is, in order.

    Raises:
        UserError: the prompt's meta is no ledger's.
    """
    reader = _reader(prompt)
    return [reader.read(step) for step in steps]


def gold_steps(prompt: Prompt, steps: Sequence[str]) -> list[float]:
    """1 a step as long as nothing was wrong, 0 from the first error on. A note is as good as the step before it, a step
    of several lines as good as its worst."""
    good, reader = [], _reader(prompt)
    for step in steps:
        for line in _STEPS.split(step):
            reader.read(line)
        good.append(float(not reader.wrong))
    return good


def first_error(prompt: Prompt, text: str) -> int | None:
    """The index of the first wrong line; None where none is. An answer before the ledger is worked is wrong."""
    marks = gold_steps(prompt, _STEPS.split(text))
    return marks.index(0.0) if 0.0 in marks else None


def grade(prompt: Prompt, text: str) -> Grade:
    """The judge's rule. ``score``: half for the answer, half for the share of entries worked rightly before the first
    error. Flags: ``correct`` (the answer), ``lines_right`` (every entry worked and nothing wrong), ``lucky`` (of right
    answers: those with wrong working), ``answered``."""
    reader = _reader(prompt)
    worked, lines = 0, list[Line]()
    for step in _STEPS.split(text):
        lines.append(reader.read(step))
        if not reader.wrong:
            worked = reader.worked  # a line may work several entries
    correct = set(reader.answers) == {reader.answer}
    before = [line for line in lines if line.role != "answer"]
    lines_right = reader.worked == len(reader.entries) and all(line.right for line in before)
    parts = {"answer": 0.5 * correct, "lines": 0.5 * worked / len(reader.entries)}
    flags = {
        "answered": len(set(reader.answers)) == 1,
        "correct": correct,
        "lines_right": lines_right,
        "lucky": not lines_right if correct else None,
    }
    return Grade(score=sum(parts.values()), flags=flags, parts=parts)


def _reader(prompt: Prompt) -> _Reader:
    if prompt.kind != KIND:
        raise UserError(f"prompt {prompt.id!r}: kind {prompt.kind!r} has no ledger; steps are known of ledgers alone")
    try:
        return _Reader(prompt.meta)
    except KeyError as missing:
        raise UserError(f"prompt {prompt.id!r}: meta lacks {missing}; export the ledger's prompts again") from missing
