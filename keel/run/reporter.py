"""The reporter that says nothing."""

from __future__ import annotations


class Silent:
    """A `keel.types.Reporter` for tests and scripts."""

    def start(self, task: str, total: int) -> None:
        pass

    def advance(self, steps: int = 1, **figures: float) -> None:
        pass

    def note(self, text: str) -> None:
        pass
