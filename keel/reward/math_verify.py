"""Formulas held against formulas, by the package math-verify. The only file that imports it.

It works with sympy, which may compute for ever on what a model writes: so it runs in processes that can be killed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from keel.reward.killable import Killable
from keel.reward.values import Verdict
from keel.types import UserError

SECONDS = 4.0  # for one answer


def require() -> None:
    """UserError where math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "verify with how: math needs the package math-verify; pip install 'keel-rlhf[math]', or use how: exact"
        )


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
        return "right" if verify(*read, timeout_seconds=None) else "wrong"

    return verdict
