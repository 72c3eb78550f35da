"""Waiting for what another thread, process or browser does: until it is done, however slow the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(ask: Callable[[], T], pause: Callable[[float], object] = time.sleep, seconds: float = 60.0) -> T:
    """The first answer that is true, or [...]; asked again every twentieth of a second. Where a page's handlers must
    work meanwhile, ``pause`` is that page's own."""
    end = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < end, f"still {answer!r} after {seconds:g} s"
        pause(0.05)
    return answer
