"""Formulas held against formulas, by the package math-verify. The only file that imports it.

It works with sympy, which may compute for ever on what a model writes: so it runs in processes that can be killed.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable

from keel.reward.killable import Killable
from keel.reward.values import Verdict, value_of, words_of
from keel.types import UserError

SECONDS = 4.0  # for one answer
_PLACES = 12  # at which decimals are compared, where nothing else is left; by default six, and 3.464102 were 2√3

_COMMAND = re.compile(r"\\(?:begin|end)\{[a-z]+\*?\}|\\[a-zA-Z]+")
_CALCULATES = re.compile(r"[a-zA-Z_\\^*!+√π]|\d\s*[-/(]")
_RELATION = re.compile(r"[<>≤≥≠≈±∓~]|\\(?:l(?:e|t|eq|eqslant)|g(?:e|t|eq|eqslant)|neq?|approx|sim|pm|mp)\b")
_WORD = re.compile(r"[a-zA-Z]{2,}")
_FUNCTIONS = words_of("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp sqrt pi max min gcd lcm")
_ENGLISH = words_of("or if is in to of on no at by it be as an so do we he my up us")


def require() -> None:
    """UserError where math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "verify with how: math needs the package math-verify; pip install 'keel-rlhf[math]', or use how: exact"
        )


def formulas(known: str, given: str) -> bool:
    """Whether two answers are formulas, or a formula and a number, so that there is something to compute. All else
    that is unreadable stays so: the package would strip its units, its relation (``> 5``), its words, and say right."""
    sides = [_is_formula(text) for text in (known, given)]
    plain = [_is_number(text) for text in (known, given)]
    same = bool(_RELATION.search(known)) == bool(_RELATION.search(given))
    return same and any(sides) and all(map(max, sides, plain))


def _is_number(text: str) -> bool:
    value = value_of(text)
    return value is not None and value.kind == "number" and not value.unit


def _is_formula(text: str) -> bool:
    """Signs to compute with, closed braces, no words."""
    depths, depth = [0], 0
    for c in text:
        depth += (c == "{") - (c == "}")
        depths.append(depth)
    said = (word.casefold() for word in _WORD.findall(_COMMAND.sub(" ", text)))
    words = any(word in _ENGLISH or (len(word) > 2 and word not in _FUNCTIONS) for word in said)
    return depth == 0 and min(depths) == 0 and _CALCULATES.search(text) is not None and not words


def checker() -> Killable:
    require()
    return Killable("keel.reward.math_verify:make", SECONDS)


def make() -> Callable[[tuple[str, str]], Verdict]:
    """(the right answer, another) -> what the other is. Called in a process of its own."""
    from math_verify import parse, verify

    def verdict(pair: tuple[str, str]) -> Verdict:
        read = []
        for text in pair:  # their own timeouts are off: they do not end what hangs, and use this process's alarm
            found = parse(f"\\boxed{{{text}}}", parsing_timeout=None)
            if not found:
                return "unreadable"
            read.append(found)
        same = verify(*read, float_rounding=_PLACES, timeout_seconds=None)
        return "right" if same else "wrong"

    return verdict
