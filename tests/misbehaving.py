"""A function for processes that are killed (tests/test_verify_stages.py): it does as it is told."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def make() -> Callable[[Any], Any]:
    return behave


def behave(job: Any) -> Any:
    if job == "hang":
        sum(range(10**12))  # one call into C: no signal handler of Python's would be heard
    if job == "crash":
        os._exit(3)
    if job == "fail":
        raise ValueError(job)
    if job == "print":
        print("not an answer")
    return os.getpid() if job == "pid" else [job]
