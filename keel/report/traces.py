"""Worked replies step by step: each step with the score that a process reward model gives it, beside what is known of
it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keel.report.sections import Fact
from keel.report.wording import asked, shortened, two_places

LONGEST = 600  # characters of a step that are shown
MOST = 40  # steps of a reply that are shown whole; of a longer one, some at either end and around the first wrong ones
ENDS, AROUND = 8, 3
UNJUDGED = 2  # traces that are shown where nobody knows which steps are right
SHADES = 3  # of each side of the threshold

_HEADINGS = {
    "right": "Right, step by step",
    "caught": "Wrong, and the model finds where",
    "missed": "Wrong, and the model misses where",
    "lucky": "Right answer by wrong working",
    "open": "A reply that is not judged to its end",
}
_COUNTED = {
    "right": ("Right, step by step", "{agreed} of them without a doubt"),
    "caught": ("Wrong, first wrong step found", ""),
    "missed": ("Wrong, first wrong step missed", ""),
    "lucky": ("Right answer by wrong working", "the first wrong step found in {agreed}"),
    "open": ("Not judged to the end", ""),
}
_KNOWN_BY = {"gold": "gold", "mc": "Monte Carlo"}
AGGREGATES = {  # what a reply's score is, in words
    "min": "its lowest step’s",
    "product": "the product of its steps’",
    "last": "its last step’s",
    "mean": "the mean of its steps’",
}


@dataclass(frozen=True, slots=True)
class StepLine:
    """``shade``: a class of the style sheet. ``mark``: right, wrong, or empty where nobody judged it; ``label``: in
    numbers, where it is neither 1 nor 0. ``first_wrong``, ``first_doubt``: no step before it is wrong, or doubted."""

    number: int
    text: str
    score: str
    shade: str
    doubted: bool
    mark: str
    label: str
    first_wrong: bool
    first_doubt: bool


@dataclass(frozen=True, slots=True)
class Gap:
    """So many steps are left out here."""

    steps: int


@dataclass(frozen=True, slots=True)
class TraceCard:
    """One reply. ``known_by``: the heading of the marks, empty where there are none."""

    heading: str
    prompt: str
    lines: tuple[StepLine | Gap, ...]
    known_by: str
    said: str
    finished: bool


@dataclass(frozen=True, slots=True)
class Traces:
    """``replies``: how many there were to draw from. ``chosen``: the threshold was, by the first errors of some of
    them. ``counts``: how many of each kind."""

    replies: str
    threshold: str
    chosen: bool
    counts: tuple[Fact, ...]
    cards: tuple[TraceCard, ...]


def traces(found: Mapping[str, Any] | None) -> Traces | None:
    """Of what stands in a stage's ``traces.json``; None where there is no such file, as in an older run, or no
    reply."""
    if not found or not found["rows"]:
        return None
    return Traces(
        f"{found['replies']:,}",
        two_places(found["threshold"]),
        found["chosen"],
        tuple(_counts(found["kinds"])),
        tuple(_card(row, found) for row in _one_of_each(found["rows"])),
    )


def _counts(kinds: Mapping[str, Sequence[int]]) -> Iterator[Fact]:
    judged = any(count for kind, (count, _) in kinds.items() if kind != "open")
    for kind, (label, more) in _COUNTED.items():
        count, agreed = kinds[kind]
        if judged and (count or kind != "open"):
            yield Fact(label, f"{count:,}" + (f"; {more.format(agreed=agreed)}" if more and count else ""))


def _one_of_each(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first of each kind, of a problem that is not shown yet where there is one. Replies of which nobody knows
    which steps are right stand in where there are no others."""
    shown: list[Mapping[str, Any]] = []
    for kind in _HEADINGS:
        some = [row for row in rows if row["kind"] == kind]
        new = [row for row in some if row["problem"] not in {other["problem"] for other in shown}]
        if kind != "open":
            shown += (new or some)[:1]
        elif not shown:
            shown += some[:UNJUDGED]
    return shown


def _card(row: Mapping[str, Any], found: Mapping[str, Any]) -> TraceCard:
    known = any(label is not None for label in row["labels"])
    lines = [_line(i, row, found) for i in range(len(row["steps"]))]
    return TraceCard(
        _HEADINGS[row["kind"]],
        asked(row["prompt"]),
        tuple(_folded(lines, [place for place in (row["error"], row["found"]) if place is not None and place >= 0])),
        _KNOWN_BY.get(row["by"], "label") if known else "",
        _said(row, found["aggregate"]),
        row["finished"],
    )


def _line(place: int, row: Mapping[str, Any], found: Mapping[str, Any]) -> StepLine:
    score, label = row["scores"][place], row["labels"][place]
    return StepLine(
        number=place + 1,
        text=shortened(row["steps"][place], LONGEST),
        score=two_places(score),
        shade=shade(score, found["threshold"]),
        doubted=score < found["threshold"],
        mark="" if label is None else "right" if label > found["bound"] else "wrong",
        label="" if label in (None, 0, 1) else two_places(label),
        first_wrong=row["error"] == place,
        first_doubt=row["found"] == place,
    )


def shade(score: float, threshold: float) -> str:
    """``doubt0`` to ``doubt2`` below the threshold, the farther the higher; ``trust0`` to ``trust2`` above it."""
    if score < threshold:
        return f"doubt{min(SHADES - 1, int(SHADES * (threshold - score) / threshold))}"
    reach = max(1 - threshold, 1e-9)
    return f"trust{min(SHADES - 1, int(SHADES * (score - threshold) / reach))}"


def _folded(lines: Sequence[StepLine], places: Sequence[int]) -> Iterator[StepLine | Gap]:
    if len(lines) <= MOST:
        yield from lines
        return
    kept = {*range(ENDS), *range(len(lines) - ENDS, len(lines))}
    kept |= {i for place in places for i in range(place - AROUND, place + AROUND + 1)}
    left_out = 0
    for i, line in enumerate(lines):
        if i not in kept:
            left_out += 1
            continue
        if left_out:
            yield Gap(left_out)
            left_out = 0
        yield line


def _said(row: Mapping[str, Any], aggregate: str) -> str:
    """What is wrong, what the model doubts first, and what the reply's answer and score are."""
    error, found = row["error"], row["found"]
    if error is None:
        known = "Nobody has said of every step whether it is right"
    else:
        known = "No step is wrong" if error < 0 else f"The first wrong step is {error + 1}"
    doubt = "the model doubts none" if found < 0 else f"the model first doubts step {found + 1}"
    if error is not None and error == found >= 0:
        doubt = "the model doubts it first"
    answer = {True: " The answer is right.", False: " The answer is wrong.", None: ""}[row["right"]]
    worth = f" The reply’s score is {two_places(row['score'])}, {AGGREGATES[aggregate]}."
    return f"{known}; {doubt}.{answer}{worth}"
