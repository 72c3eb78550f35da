"""How often somebody may knock: token buckets in memory. They are gone with the process, and that is enough: what they
are against takes many tries."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

MOST_KEYS = 20_000


@dataclass(frozen=True, slots=True)
class Rate:
    """``burst`` at once, ``per_second`` in the long run."""

    burst: float
    per_second: float


REQUESTS = Rate(120, 30)  # of one session, or of one address without a session
SIGN_IN_NAME = Rate(8, 8 / 900)  # failures for one name
SIGN_IN_ADDRESS = Rate(40, 40 / 900)  # failures from one address
SIGN_IN_ALL = Rate(100, 4)  # failures of everybody: each costs a tenth of a second of a processor
PASSWORDS = Rate(8, 8 / 900)  # new passwords of one account


def of_program(per_minute: int) -> Rate:
    """Of one token: a tenth of a minute's requests at once."""
    return Rate(max(1.0, per_minute / 10), per_minute / 60)


class Buckets:
    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: str) -> float:
        """Takes a token out of the key's bucket; 0, or the seconds to wait when there is none."""
        with self._lock:
            left, now = self._filled(key), time.monotonic()
            self._left[key] = (left - 1 if left >= 1 else left, now)
            self._left.move_to_end(key)
            if len(self._left) > MOST_KEYS:
                self._left.popitem(last=False)  # the one that was quiet for longest
        return self._until(left)

    def give(self, key: str) -> None:
        """A token comes back."""
        with self._lock:
            if key in self._left:  # else it is full
                self._left[key] = (min(self._rate.burst, self._filled(key) + 1), time.monotonic())

    def wait(self, key: str) -> float:
        """Seconds until there is a token, without taking it."""
        with self._lock:
            return self._until(self._filled(key))

    def _filled(self, key: str) -> float:
        left, then = self._left.get(key, (self._rate.burst, 0.0))
        return min(self._rate.burst, left + (time.monotonic() - then) * self._rate.per_second)

    def _until(self, left: float) -> float:
        return 0.0 if left >= 1 else (1 - left) / self._rate.per_second
