r"""Where a worked solution says its answer: behind ``####`` (GSM8K's files), or in its last ``\boxed{}`` (MATH's)."""

from __future__ import annotations

import re

MARK = "####"
OPEN = "\x00"  # stands for what a box would hold that is never closed
BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")


def final_answer(solution: str) -> str | None:
    """The answer in a worked solution; None where it marks none, or a box is never closed."""
    if MARK in solution:
        return solution.rpartition(MARK)[2].strip().split("\n", 1)[0].strip() or None
    found = boxed(solution)
    return None if found is None or found == OPEN else found.strip() or None


def boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{}``, with the braces inside it; ``\boxed 5`` is 5. None where there is no box,
    ``OPEN`` where it is never closed. One pass, however long the text."""
    found = None
    for found in BOX.finditer(text):  # noqa: B007
        pass
    if found is None:
        return None
    inner = text[found.end() :].lstrip(" ")
    if not inner.startswith("{"):
        token = re.match(r"[^\s$.,;]+", inner)
        return None if token is None else token[0]
    depth = 0
    for i, c in enumerate(inner):
        if c in "{}" and (i == 0 or inner[i - 1] != "\\"):
            depth += 1 if c == "{" else -1
            if depth == 0:
                return inner[1:i]
    return OPEN
