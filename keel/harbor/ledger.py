"""Ledgers: prompts whose answer takes four to eight lines of working, and what bookkeepers write.

A ledger says what is in a store and what comes and goes; asked is how many are left, or whether as many as a number
are. A reply works one entry a line, a clause and a sum, and ends with an answer line. More than half of the
ledgers have a trap (`keel.harbor.ledger_entries`) that most bookkeepers misread in the same way: voting among samples
then agrees on a wrong answer, and a question for yes or no has many right answers with wrong working.

``meta``: answer (text), form (number or yes_no), lines (how many entries), traps (the kinds of its traps), start,
entries ([kind, n, k] each), bound (what a yes_no asks for, else None).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from keel.harbor.ledger_entries import PLAIN, TRAPS, Entry, draw_entry
from keel.harbor.ledger_gold import KIND, first_error, gold_steps, grade, read_lines
from keel.harbor.prompts import heldout
from keel.types import Demonstration, Message, Prompt

__all__ = [
    "BOOKKEEPERS",
    "Bookkeeping",
    "checked_page",
    "first_error",
    "gold_steps",
    "grade",
    "make_demonstrations",
    "make_prompts",
    "page",
    "read_lines",
    "write_reply",
]

Side = Literal["train", "heldout"]

TRAPPED = 0.6  # share of ledgers drawn with a trap: of those that fit, a little over half
SECOND_TRAP = 0.5  # of the trapped ones with `LONG` entries or more
LONG = 8
YES_NO = 0.5
SAME_SIDE = 0.7  # of the trapped yes_no: both readings give the same answer
GOODS = ("crates", "planks", "candles", "letters", "books", "barrels", "sails", "cheeses")
_THANKS = ("Thank you.", "Thanks for your trust.", "A good day to you.")


@dataclass(frozen=True, slots=True)
class Bookkeeping:
    """Probabilities, each of one thing that a bookkeeper may do where it applies."""

    falls: float = 0.6  # misreads a trap
    slips: float = 0.01  # a line's sum is wrong
    repeats: float = 0.01  # writes a line twice
    thanks: float = 0.03


BOOKKEEPERS = Bookkeeping()
PAGES = Bookkeeping(falls=0.5)  # what a base model reads: either way as often
SHORT, DRILLED = 0.6, 0.8  # share of short pages, and of those with a trap
CHECKED = Bookkeeping(falls=0.4, slips=0.1)
SHORT_CHECKED, MISCOPIED = 0.4, 0.33
_NUMBER = re.compile(r"\d+")


def make_prompts(n: int, seed: int, side: Side = "train", lines: tuple[int, int] = (4, 8)) -> list[Prompt]:
    """``n`` different ledgers of ``lines`` entries (from, to). A ledger is on one side only, whatever the seed."""
    rng = Random(f"ledgers {seed} {side} {lines}")
    found: dict[str, Prompt] = {}
    while len(found) < n:
        prompt = _draw(rng, rng.randint(*lines))
        if prompt is not None and heldout(prompt.messages[0].content) == (side == "heldout"):
            found.setdefault(prompt.id, prompt)
    return list(found.values())


def make_demonstrations(
    n: int, seed: int, habits: Bookkeeping = BOOKKEEPERS, lines: tuple[int, int] = (4, 8)
) -> list[Demonstration]:
    """``n`` training ledgers, each with the reply of a bookkeeper of these habits."""
    rng = Random(f"ledger demonstrations {seed}")
    return [
        Demonstration(f"demo-{prompt.id}", (*prompt.messages, Message("assistant", write_reply(prompt, rng, habits))))
        for prompt in make_prompts(n, rng.randrange(2**32), "train", lines)
    ]


def page(rng: Random) -> tuple[str, str]:
    """A page of a ledger's book, as its question and its working: half of them are short, where most of what is read
    is a trap. For pretraining; no page is a held-out ledger."""
    while True:
        short = rng.random() < SHORT
        prompt = _draw(rng, rng.randint(1, 3) if short else rng.randint(4, 8), DRILLED if short else TRAPPED)
        if prompt is not None and not heldout(prompt.messages[0].content):
            return prompt.messages[0].content, write_reply(prompt, rng, PAGES)


def checked_page(rng: Random) -> tuple[str, list[str], bool]:
    """A page that somebody checked: its question, its working line by line as far as it was right, with the first wrong
    line if there is one, and whether there is none. Traps are misread often, sums are often wrong, and in one page of
    three a number was copied wrongly. For pretraining; no page is a held-out ledger."""
    while True:
        short = rng.random() < SHORT_CHECKED
        prompt = _draw(rng, rng.randint(1, 3) if short else rng.randint(4, 8), DRILLED)
        if prompt is not None and not heldout(prompt.messages[0].content):
            break
    lines = write_reply(prompt, rng, CHECKED).split("\n")
    if rng.random() < MISCOPIED:
        _miscopy(prompt, lines, rng)
    right = gold_steps(prompt, lines)
    if 0.0 in right:
        return prompt.messages[0].content, lines[: right.index(0.0) + 1], False
    return prompt.messages[0].content, lines, True


def _miscopy(prompt: Prompt, lines: list[str], rng: Random) -> None:
    """One number of one line becomes a neighbour, or another number of the page."""
    i = rng.randrange(len(lines))
    found = list(_NUMBER.finditer(lines[i]))
    if found:
        number = rng.choice(found)
        near = [str(max(0, int(number.group()) + by)) for by in (-20, -10, -2, -1, 1, 2, 10, 20)]
        others = _NUMBER.findall(prompt.messages[0].content + " " + " ".join(lines[:i]))
        lines[i] = lines[i][: number.start()] + rng.choice([*near, *others]) + lines[i][number.end() :]


def write_reply(prompt: Prompt, rng: Random, habits: Bookkeeping = BOOKKEEPERS) -> str:
    """A reply as a bookkeeper of these habits would put it."""
    lines = _work(prompt, rng, habits)
    while lines is None:  # a slip led to half a crate, or to fewer than none
        lines = _work(prompt, rng, habits)
    if rng.random() < habits.thanks:
        lines.append(rng.choice(_THANKS))
    return "\n".join(lines)


def _work(prompt: Prompt, rng: Random, habits: Bookkeeping) -> list[str] | None:
    count, lines = int(prompt.meta["start"]), []
    for row in prompt.meta["entries"]:
        entry = Entry.of(list(row))
        sign, amount = entry.misread(count) if rng.random() < habits.falls else entry.change(count)
        if amount is None:
            return None
        result = count + amount if sign == "+" else count - amount
        if rng.random() < habits.slips:
            result += rng.choice((-10, -1, 1, 10))
        if not 0 <= result <= 99:
            return None
        lines.append(f"{entry.clause}: {count}{sign}{amount}={result}")
        if rng.random() < habits.repeats:
            lines.append(lines[-1])
        count = result
    bound = prompt.meta["bound"]
    compared = [] if bound is None else [f"{count} left, {bound} asked."]
    return [*lines, *compared, f"Answer: {_answer(count, bound)}."]


def _answer(count: int, bound: int | None) -> str:
    return str(count) if bound is None else "yes" if count >= bound else "no"


def _draw(rng: Random, lines: int, trapped: float = TRAPPED) -> Prompt | None:
    """One ledger, or None where the entries drawn do not fit."""
    start = rng.randint(10, 80)
    traps = 0
    if rng.random() < trapped:
        traps = 2 if lines >= LONG and rng.random() < SECOND_TRAP else 1
    places = set(rng.sample(range(lines), traps))
    counts, entries = frozenset({start}), list[Entry]()
    for i in range(lines):
        drawn = None
        for _ in range(40):
            drawn = draw_entry(TRAPS if i in places else PLAIN, counts, rng)
            if drawn is not None:
                break
        if drawn is None:
            return None
        entries.append(drawn[0])
        counts = drawn[1]
    right, misread = start, start
    for entry in entries:
        right, misread = _after(right, *entry.change(right)), _after(misread, *entry.misread(misread))
    bound = _bound(right, misread, rng) if rng.random() < YES_NO else None
    goods = rng.choice(GOODS)
    question = f"How many {goods} are left?" if bound is None else f"Are {bound} or more left?"
    text = " ".join((f"There are {start} {goods}.", *(entry.text for entry in entries), question))
    meta: dict[str, Any] = {
        "answer": _answer(right, bound),
        "form": "number" if bound is None else "yes_no",
        "lines": lines,
        "traps": [entry.kind for entry in entries if entry.trap],
        "start": start,
        "entries": [[entry.kind, entry.n, entry.k] for entry in entries],
        "bound": bound,
    }
    digest = hashlib.sha256(f"{KIND} {text}".encode()).hexdigest()[:12]
    return Prompt(f"{KIND}-{digest}", (Message("user", text),), KIND, meta)


def _after(count: int, sign: str, amount: int | None) -> int:
    assert amount is not None
    return count + amount if sign == "+" else count - amount


def _bound(right: int, misread: int, rng: Random) -> int:
    """Near the right count, at or under it as often as over it; by `SAME_SIDE` the misread count is on its side."""
    yes, same = rng.random() < 0.5, rng.random() < SAME_SIDE
    bounds = range(max(1, right - 15), right + 1) if yes else range(right + 1, right + 16)
    fitting = [bound for bound in bounds if right == misread or ((misread >= bound) == yes) == same]
    return rng.choice(fitting or list(bounds))
